"""Requirements: what fills their rows, the verdicts, and how a run is shown and written."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench import stage
from bench.__main__ import main
from bench.curves import run as curves_run
from bench.curves import sizes as curve_sizes
from bench.curves import tokens
from bench.curves.run import fitting
from bench.requirements import markdown, measures, table
from bench.requirements.finding import Finding, Scale, Verdict
from bench.requirements.marked_tests import finding_of, run_marked_tests
from bench.requirements.measures import Handshakes
from bench.requirements.requirement import KEYS, REQUIREMENTS
from bench.requirements.run import TESTED, Drawn, Fill, RequirementRow, Run, run_requirements, steps_of
from bench.requirements.sizes import FULL, QUICK
from bench.stage import Stages
from zcproto.certs import authority
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.record import Latencies

GOOD = Finding("as it should be", True)
TINY = replace(
    QUICK,
    handshakes=5,
    connections=20,
    load_s=0.5,
    tokens=300,
    checks=300,
    loads=3,
    responses=200,
    rotations=2,
    rotation_rest_s=0.5,
    rotation_connections=5,
    payload_requests=20,
)
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make own certificates of the default configuration once, with a small authority, and copy them later."""
    folder = tmp_path_factory.mktemp("own") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        stage.make_own_certificates(folder)
        patch.setattr(stage, "make_own_certificates", lambda copy: shutil.copytree(folder, copy))
        yield folder


def run_with(**findings: Finding | None) -> Run:
    """A good run but for these findings."""
    rows = [RequirementRow(each, findings.get(each.key, GOOD), "it broke") for each in REQUIREMENTS]
    return Run(FULL, rows)


def shown(run: Run) -> str:
    out = io.StringIO()
    table.show(run, Console(file=out, width=200))
    return out.getvalue()


# --- rows --------------------------------------------------------------------------------------------------


def test_every_requirement_is_filled_by_one_step(tmp_path: Path) -> None:
    steps = steps_of(Stages(tmp_path), Run(QUICK))
    assert Counter(key for step in steps for key in step.keys) == Counter(KEYS)
    assert len(KEYS) == len(REQUIREMENTS)


def test_good_run_passes() -> None:
    assert run_with().passes
    assert f"all of {len(REQUIREMENTS)} requirements hold" in shown(run_with())


@pytest.mark.parametrize(
    "finding", [None, Finding("too slow", False), Finding("too slow", False, small=True)]
)
def test_failed_or_missing_row_fails_run(finding: Finding | None) -> None:
    run = run_with(hsts=finding)
    assert not run.passes
    assert f"1 of {len(REQUIREMENTS)} requirements do not hold: HSTS max-age" in shown(run)


def test_missing_row_says_why() -> None:
    assert "not measured: it broke" in shown(run_with(hsts=None))


def test_smaller_run_proves_nothing() -> None:
    run = run_with(cleanup=Finding("good", True, small=True))
    assert run.passes
    assert table.as_json(run)["passed"] is False
    assert "1 were measured at a smaller size" in shown(run)


def test_run_without_rows_fails() -> None:
    assert not Run(FULL).passes


def test_failing_row_leaves_others_alone() -> None:
    out = io.StringIO()
    fill = Fill(Console(file=out, width=200))

    def broken() -> Finding:
        raise ZcprotoError("the server is gone")

    fill("one", broken)
    fill("two", lambda: GOOD)
    assert fill.reasons == {"one": "ZcprotoError: the server is gone"}
    assert fill.found == {"two": GOOD}
    assert "two: pass, as it should be" in out.getvalue()


def test_failing_step_is_reason_for_its_unfilled_rows() -> None:
    fill = Fill(Console(file=io.StringIO()))
    with fill.failing_for(("one", "two")):
        fill("one", lambda: GOOD)
        raise ConnectionRefusedError(111, "Connection refused")
    assert fill.reasons == {"two": "ConnectionRefusedError: [Errno 111] Connection refused"}


def test_bug_of_bench_is_raised() -> None:
    def faulty() -> Finding:
        raise KeyError("p99")

    with pytest.raises(KeyError):
        Fill(Console(file=io.StringIO()))("one", faulty)


def test_unknown_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no such step: nonsense; there are tokens, parts, handshakes"):
        run_requirements(QUICK, Console(file=io.StringIO()), ["nonsense"])


STEPS = [step.name for step in steps_of(Stages(Path()), Run(TINY)) if step.name != "tests"]


@pytest.mark.parametrize("name", STEPS)
def test_small_step_measures_all_its_rows(name: str, tmp_path: Path, certificates: Path) -> None:
    """On a busy machine figures may miss their targets."""
    step = next(each for each in steps_of(Stages(tmp_path, certificates), Run(TINY)) if each.name == name)
    fill = Fill(Console(file=io.StringIO(), width=200))
    with fill.failing_for(step.keys):
        step.act(fill)
    assert fill.reasons == {}
    assert set(fill.found) == set(step.keys)
    assert all(finding is not None and finding.small and finding.values for finding in fill.found.values())


# --- slower machines ---------------------------------------------------------------------------------------

FIGURES = {
    "lapsing_rate": 200_000.0,
    "ending_rate": 150_000.0,
    "lapsing_slice_longest_ms": 1.0,
    "ending_slice_longest_ms": 5.18,
}


def test_long_slice_fails_on_reference_machine() -> None:
    finding = measures.cleanup_row(FIGURES, FULL, Scale())
    assert finding.verdict is Verdict.FAIL
    assert "slower" not in finding.figure


def test_long_slice_is_scaled_on_slower_machine() -> None:
    finding = measures.cleanup_row(FIGURES, FULL, Scale(1.25))
    assert finding.verdict is Verdict.PASS
    assert (
        "1.25 times slower than the reference, so it counts as 187,500 a second and 4.14 ms" in finding.figure
    )
    assert finding.values["longest_slice_ms"] == 5.18


def test_far_too_long_slice_fails_on_slower_machine() -> None:
    slow = {**FIGURES, "ending_slice_longest_ms": 50.0}
    assert measures.cleanup_row(slow, FULL, Scale(2.0)).verdict is Verdict.FAIL


def test_slower_machine_is_offered_connections_more_slowly() -> None:
    assert Scale().offered(450.0) == 450.0
    assert Scale(1.5).offered(450.0) == 300.0


def test_times_of_rows_can_miss_their_targets() -> None:
    latencies = Latencies()
    latencies.add(0.101)
    found = {name: Handshakes(latencies, 1.0) for name in ("rsa-4096", "ecdsa-p256")}
    assert measures.at_rest_row(found, FULL, Scale()).verdict is Verdict.FAIL
    assert measures.at_rest_row(found, FULL, Scale(1.5)).verdict is Verdict.PASS
    check = {"check_p99_9_us": 1_001.0, "check_p50_us": 2.0, "single_p99_9_us": 1_500.0}
    assert measures.check_row(check, FULL, Scale()).verdict is Verdict.FAIL
    memory = {"memory_mb": 101.0, "memory_a_token": 1_010.0}
    assert measures.memory_row(memory, FULL).verdict is Verdict.FAIL


# --- rows that tests show ----------------------------------------------------------------------------------


def marked_keys() -> Iterator[str]:
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")]
    for text in texts:
        for node in ast.walk(ast.parse(text)) if ".requirement(" in text else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.requirement":
                yield from (str(ast.literal_eval(argument)) for argument in node.args)


def test_every_tested_requirement_has_marked_tests_and_no_other_key_is_marked() -> None:
    assert set(marked_keys()) == set(TESTED)


@pytest.mark.parametrize(
    ("results", "verdict", "figure"),
    [
        ({"a": "passed", "b": "passed", "c": "skipped"}, Verdict.PASS, "2 of 2 tests passed"),
        ({"a": "passed", "b": "failed"}, Verdict.FAIL, "1 of 2 tests passed; failed: b"),
        ({"b": "failed"}, Verdict.FAIL, "0 of 1 tests passed; failed: b"),
    ],
)
def test_results_of_tests_fill_row(results: dict[str, str], verdict: Verdict, figure: str) -> None:
    finding = finding_of(results)
    assert finding is not None
    assert (finding.verdict, finding.figure) == (verdict, figure)


@pytest.mark.parametrize("results", [{}, {"a": "skipped"}])
def test_row_without_passed_or_failed_tests_is_not_filled(results: dict[str, str]) -> None:
    assert finding_of(results) is None


def test_marked_tests_are_run_and_mapped(tmp_path: Path) -> None:
    results = run_marked_tests(["configuration"], tmp_path)
    assert set(results) == {"configuration"}
    assert set(results["configuration"].values()) == {"passed"}


def test_failing_marked_test_fails_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.requirement('hsts', 'logs')\ndef test_good(): pass\n"
        "@pytest.mark.requirement('logs')\ndef test_bad(): assert False\n"
        "@pytest.mark.requirement('refresh')\ndef test_other(): pass\n"
        "def test_unmarked(): assert False\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = requirement\n")
    monkeypatch.setattr("bench.requirements.marked_tests.ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    results = run_marked_tests(["hsts", "logs"], tmp_path)
    found = {key: finding_of(outcomes) for key, outcomes in results.items()}
    assert {key: finding and finding.holds for key, finding in found.items()} == {"hsts": True, "logs": False}


def test_failure_of_pytest_itself_is_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.requirements.marked_tests.ROOT", tmp_path)  # where there are no tests
    with pytest.raises(ZcprotoError, match="pytest failed with exit code"):
        run_marked_tests(["hsts"], tmp_path)


# --- as text -----------------------------------------------------------------------------------------------


def drawn() -> Drawn:
    latencies = Latencies()
    for micros in range(1_000, 2_000):
        latencies.add(micros / 1e6)
    return Drawn(handshakes={"ecdsa-p256": Handshakes(latencies, 0.7)})


def test_markdown_has_every_row_and_escapes_cells() -> None:
    run = run_with(hsts=Finding("a | b < c", True))
    run.drawn = drawn()
    lines = markdown.requirements(run)
    rows = [line for line in lines if line.startswith("| ") and line.count(" | ") == 5]
    assert len(rows) == len(REQUIREMENTS) + 5
    assert any(r"a \| b \< c" in line for line in lines)
    assert any(line.startswith("| handshake at rest, ecdsa-p256 | 1,000 | 1.5") for line in lines)
    assert "| ecdsa-p256 | 0.70 ms |" in lines


def test_json_has_every_row() -> None:
    written = json.loads(json.dumps(table.as_json(run_with(hsts=None))))
    assert [each["key"] for each in written["requirements"]] == [each.key for each in REQUIREMENTS]
    assert {each["verdict"] for each in written["requirements"]} == {"pass", "no figure"}


# --- the commands ------------------------------------------------------------------------------------------


def test_one_step_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, page = tmp_path / "out.json", tmp_path / "out.md"
    words = ["--quick", "--step", "handshakes", "--json", str(json_file), "--markdown", str(page)]
    code = main(["requirements", *words])
    output = capsys.readouterr()
    written = json.loads(json_file.read_text())
    assert code == (0 if written["requirements"][0]["holds"] else 1)
    assert "TLS handshake" in output.out
    assert "[1 of 1] handshakes" in output.err
    assert written["passed"] is False  # it was a small run
    assert written["machine"]["cpus"] >= 1
    text = page.read_text()
    assert text.startswith("# Benchmarks\n")
    assert "![Handshakes by key type](images/bench-handshakes-by-key-type.svg)" in text
    assert "<svg" in (tmp_path / "images" / "bench-handshakes-by-key-type.svg").read_text()


def test_failed_requirement_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "MAX_HSTS_NS", -1e9)
    assert main(["requirements", "--quick", "--step", "parts"]) == 1
    assert "requirements do not hold: " in capsys.readouterr().out


@pytest.mark.slow
def test_curves_are_measured_fitted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(curve_sizes.QUICK, connections=(3, 6, 9), sessions=(1, 20, 300), requests=40, load_s=0.3)
    monkeypatch.setattr(curve_sizes, "QUICK", small)
    json_file, page = tmp_path / "out.json", tmp_path / "out.md"
    assert main(["curves", "--quick", "--json", str(json_file), "--markdown", str(page)]) == 0
    out = capsys.readouterr().out
    written = json.loads(json_file.read_text())["curves"]
    assert written["failed"] == {}
    curves = {each["key"]: each for each in written["curves"]}
    assert set(curves) == {"sessions", "payload", "depth", "connections"}
    for key, curve in curves.items():
        assert curve["title"] in out
        assert "<svg" in (tmp_path / "images" / f"bench-curve-{key}.svg").read_text()
        for series in curve["series"]:
            assert len(series["values"]) == len(curve["sizes"])
            assert series["growth"] in page.read_text()
    assert curves["connections"]["sizes"] == [3, 6, 9]
    for name in ("payload", "depth"):
        assert all(value > 0 for series in curves[name]["series"] for value in series["values"])


def test_curve_that_cannot_be_measured_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(sessions: int, checks: int) -> tokens.Point:
        raise OSError("no more processes")

    monkeypatch.setattr(curves_run.tokens, "in_a_process", broken)
    assert main(["curves", "--quick", "--step", "sessions"]) == 1
    assert "curve sessions: not measured: OSError: no more processes" in capsys.readouterr().out


def test_settings_of_environment_are_ignored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_LIMITS__NONSENSE", "1")  # no server would start with it
    main(["requirements", "--quick", "--step", "handshakes"])
    assert "could not be measured" not in capsys.readouterr().err
    assert os.environ["ZCPROTO_LIMITS__NONSENSE"] == "1"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["requirements", "--step", "nonsense"], "no such step: nonsense"),
        (["curves", "--step", "nonsense"], "no such curve: nonsense"),
        (["requirements", "--markdown", "/nowhere/at/all.md"], "cannot be written"),
    ],
)
def test_unusable_options_fail_before_run(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        (30_000, (100, 3_000, 30_000)),
        (19_680, (100, 3_000, 19_500)),
        (3_000, (100, 3_000)),
        (250, (100, 250)),
    ],
)
def test_largest_number_of_connections_that_fits_replaces_larger_ones(
    most: int, counts: tuple[int, ...]
) -> None:
    found, notes = fitting((100, 3_000, 30_000), most)
    assert found == counts
    assert len(notes) == (most < 30_000)
