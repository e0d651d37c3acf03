"""Rows of requirements: what fills them, what that is worth, and how it is shown."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from bench import page
from bench.requirements import html, machine, table, text
from bench.requirements.finding import Facts, Finding, Verdict
from bench.requirements.homes import Workshop
from bench.requirements.measures import Handshakes
from bench.requirements.requirement import KEYS, REQUIREMENTS
from bench.requirements.run import Drawn, Fill, Row, Run, run_requirements, steps_of
from bench.requirements.sizes import FULL, QUICK
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.latency import Latencies

GOOD = Finding("as it should be", True)


def run_with(**findings: Finding | None) -> Run:
    """A run in which all is well but what is given."""
    rows = [Row(each, findings.get(each.key, GOOD), "it broke") for each in REQUIREMENTS]
    return Run(FULL, rows)


def shown(run: Run) -> str:
    out = io.StringIO()
    table.show(run, Console(file=out, width=200))
    return out.getvalue()


# --- findings ---------------------------------------------------------------------------------------------


def test_facts_that_are_all_right_hold() -> None:
    facts = Facts()
    facts.note("one", True)
    facts.equal("two", 2, 2)
    finding = facts.finding("both")
    assert (finding.figure, finding.verdict) == ("both", Verdict.PASS)


def test_a_wrong_fact_fails_the_row_and_is_named() -> None:
    facts = Facts()
    facts.note("one", True)
    facts.equal("two", 3, 2)
    finding = facts.finding("both")
    assert finding.verdict is Verdict.FAIL
    assert finding.figure == "1 of 2 facts wrong: two: 3 instead of 2"


def test_many_wrong_facts_are_not_all_named() -> None:
    facts = Facts()
    for number in range(5):
        facts.note(f"fact {number}", False)
    assert facts.finding("").figure == "5 of 5 facts wrong: fact 0: no; fact 1: no; fact 2: no; and 2 more"


def test_where_nothing_was_looked_at_nothing_holds() -> None:
    assert Facts().finding("fine").verdict is Verdict.FAIL


def test_what_was_seen_cannot_steer_a_terminal() -> None:
    facts = Facts()
    facts.note("one", False, "\x1b[2J")
    assert "\x1b" not in facts.finding("").figure


# --- rows -------------------------------------------------------------------------------------------------


def test_every_requirement_is_filled_by_one_step(tmp_path: Path) -> None:
    steps = steps_of(Workshop(tmp_path), Run(QUICK), Console(file=io.StringIO()))
    assert Counter(key for step in steps for key in step.keys) == Counter(KEYS)
    assert len(KEYS) == len(REQUIREMENTS)


def test_all_well_is_passed() -> None:
    run = run_with()
    assert run.passes
    assert f"all of {len(REQUIREMENTS)} requirements hold" in shown(run)


@pytest.mark.parametrize(
    "finding", [None, Finding("too slow", False), Finding("too slow", False, small=True)]
)
def test_a_row_that_failed_or_has_no_figure_fails_the_run(finding: Finding | None) -> None:
    run = run_with(hsts=finding)
    assert not run.passes
    assert f"1 of {len(REQUIREMENTS)} requirements do not hold: HSTS max-age" in shown(run)


def test_a_row_without_a_figure_says_why() -> None:
    assert "not measured: it broke" in shown(run_with(hsts=None))


def test_a_smaller_run_proves_nothing_of_its_rows() -> None:
    run = run_with(hsts=Finding("good", True, small=True))
    assert run.passes
    assert table.as_json(run)["passed"] is False
    assert "1 of them at a smaller size" in shown(run)


def test_no_rows_are_no_success() -> None:
    assert not Run(FULL).passes


def test_a_check_that_fails_costs_its_own_row_alone() -> None:
    out = io.StringIO()
    fill = Fill(Console(file=out, width=200))

    def broken() -> Finding:
        raise ZcprotoError("the server is gone")

    fill("one", broken)
    fill("two", lambda: GOOD)
    assert fill.reasons == {"one": "ZcprotoError: the server is gone"}
    assert fill.found == {"two": GOOD}
    assert "two: pass, as it should be" in out.getvalue()


def test_a_step_that_fails_says_why_in_the_rows_that_it_did_not_fill() -> None:
    fill = Fill(Console(file=io.StringIO()))
    with fill.failing_for(("one", "two")):
        fill("one", lambda: GOOD)
        raise ConnectionRefusedError(111, "Connection refused")
    assert fill.reasons == {"two": "ConnectionRefusedError: [Errno 111] Connection refused"}


def test_a_fault_of_ours_is_not_taken_for_a_finding() -> None:
    fill = Fill(Console(file=io.StringIO()))

    def faulty() -> Finding:
        raise KeyError("p99")

    with pytest.raises(KeyError):
        fill("one", faulty)


def test_a_step_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no such step: nonsense; there are tokens, parts, handshakes"):
        run_requirements(QUICK, Console(file=io.StringIO()), ["nonsense"])


# --- as text ----------------------------------------------------------------------------------------------


def drawn() -> Drawn:
    latencies = Latencies()
    for micros in range(1_000, 2_000):
        latencies.add(micros / 1e6)
    return Drawn(handshakes={"ecdsa-p256": Handshakes(latencies, 0.7)})


def test_a_page_has_every_row_and_its_facts_and_runs_nothing() -> None:
    facts = Facts()
    facts.note("<script>alert(1)</script>", False, "a & b")
    run = run_with(hsts=facts.finding(""))
    run.drawn = drawn()
    written = page.page("title", html.parts(run))
    assert all(page.cell(each.name) in written for each in REQUIREMENTS)
    assert "<script" not in written
    assert "&lt;script&gt;alert(1)" in written
    assert "a &amp; b" in written
    assert written.count("<svg") == 1
    assert "Handshakes by key type" in written
    for loaded in ("src=", "<link", "@import", "url(http"):
        assert loaded not in written


def test_markdown_has_every_row_and_no_column_too_many() -> None:
    run = run_with(hsts=Finding("a | b < c", True))
    run.drawn = drawn()
    lines = text.requirements(run)
    rows = [line for line in lines if line.startswith("| ") and line.count(" | ") == 5]
    assert len(rows) == len(REQUIREMENTS) + 5
    assert any(r"a \| b \< c" in line for line in lines)
    assert any(line.startswith("| handshake at rest, ecdsa-p256 | 1,000 | 1.5") for line in lines)
    assert "| ecdsa-p256 | 0.70 ms |" in lines


def test_json_has_every_row() -> None:
    written = json.loads(json.dumps(table.as_json(run_with(hsts=None))))
    assert [each["key"] for each in written["requirements"]] == [each.key for each in REQUIREMENTS]
    assert {each["verdict"] for each in written["requirements"]} == {"pass", "no figure"}


def test_the_machine_is_told() -> None:
    told = machine.machine()
    assert told["memory_gib"] > 0
    assert f"Python {told['python']}" in machine.sentence(told)
    assert "cryptography" in machine.sentence(told)
