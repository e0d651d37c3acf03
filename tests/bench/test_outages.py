"""Outages of a real Valkey under load: the whole on a small scale, and what its outcome proves."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.outages import __main__ as command
from bench.outages import run as module
from bench.outages.harm import HARMS
from bench.outages.load import Phase, Waits
from bench.outages.outcome import Check, Outcome
from bench.outages.plan import OutagePlan
from bench.outages.run import run_outages, show
from bench.outages.valkey import PROGRAM
from bench.row import Row
from bench.told import Broken
from tests.stores.valkey.server_process import needs
from zcproto.errors import ConfigError

QUICK = OutagePlan(
    seconds=1.5, sessions=20, shared=5, rate=100.0, openings=4.0, refreshes=4.0, revocations=6.0
)


def waits(before: float, meanwhile: float, after: float) -> Waits:
    return Waits(dict(zip(Phase, (before, meanwhile, after), strict=True)), {Phase.MEANWHILE: "open"})


def outcome(**changes: Any) -> Outcome:
    """An outage in which all went well."""
    usual: dict[str, Any] = {
        "name": "hung",
        "title": "hung (SIGSTOP)",
        "refuses": True,
        "sent": 1_000,
        "answered": 1_000,
        "load_waits": waits(0.1, 0.2, 0.15),
        "call_waits": waits(0.02, 0.3, 0.01),
        "refused": 20,
        "revoked": 10,
        "revoked_meanwhile": 6,
        "live": 30,
        "degraded_after_s": 0.25,
        "recovered_after_s": 1.5,
        "checks": [Check("the server", Broken()), Check("a new server", Broken())],
    }
    return Outcome(**{**usual, **changes})


def row(made: Outcome, key: str) -> Row:
    (found,) = (each for each in made.rows() if each.key == key)
    return found


def shown(*outcomes: Outcome) -> str:
    out = io.StringIO()
    show(outcomes, Console(file=out, width=110, highlight=False))
    return out.getvalue()


def test_a_good_outage_passes() -> None:
    made = outcome()
    assert made.reasons() == []
    assert all(each.holds for each in made.rows())
    assert row(made, "wait_added_ms").value == pytest.approx(100)
    assert row(made, "call_added_ms").value == pytest.approx(280)
    assert row(made, "held").value == 10
    assert row(made, "kept").value == 30
    text = shown(*[made] * 5)
    assert text.count("Outages of the store") == 2
    assert max(map(len, text.splitlines())) <= 110
    assert "hung (SIGSTOP): passed" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lost": 1}, "without an answer: 1"),
        ({"failed": Counter({"TOKEN_REVOKED": 2})}, "2 requests: TOKEN_REVOKED"),
        ({"calls_failed": Counter({"end: UNAVAILABLE": 1})}, "1 calls: end: UNAVAILABLE"),
        ({"load_waits": waits(0.1, 0.2, 0.401)}, "the request's more than before: 301"),
        ({"call_waits": waits(0.1, 0.401, 0.1)}, "the other call's: 301"),
        ({"call_waits": waits(0.1, 0.401, 0.1)}, "the longest other calls: open meanwhile"),
        ({"checks": []}, "it did not recover"),
        ({"checks": [Check("a new server", Broken(lost={"a"}))]}, "a new server: 1 sessions lost"),
        ({"checks": [Check("a new server", Broken(risen={"a"}))]}, "refused everywhere after: 9"),
        (
            {"checks": [Check("a new server", Broken(spent={"a"}))]},
            "replaced tokens that were taken after: 1",
        ),
        ({"revoked_meanwhile": 0}, "nothing was revoked meanwhile"),
        ({"refused": 0}, "there was no outage"),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], reason: str) -> None:
    made = outcome(**changes)
    assert [each for each in made.reasons() if reason in each], made.reasons()
    assert "FAILED" in shown(made)
    assert made.as_json()["passed"] is False


def test_what_lets_openings_through_need_not_refuse_any() -> None:
    assert outcome(refuses=False, refused=0).reasons() == []


def test_waits_are_the_longest_of_their_phase() -> None:
    noted = Waits()
    now = time.monotonic()
    for ago, what in ((5.0, "a"), (9.0, "b"), (2.0, "c")):
        noted.note(Phase.AFTER, now - ago, what)
    assert 9.0 <= noted.longest[Phase.AFTER] < 30.0
    assert noted.what == {Phase.AFTER: "b"}
    assert noted.added == noted.longest[Phase.AFTER]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [pytest.param("hung", marks=pytest.mark.slow), "lost"])
def test_nothing_is_lost_and_what_was_revoked_stays_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(PROGRAM)
    monkeypatch.setattr(module, "RECOVER_S", 60.0)
    monkeypatch.setattr(module, "NEWS_S", 3.0)
    plan = OutagePlan(**{**{key: getattr(QUICK, key) for key in QUICK.__slots__}, "only": (name,)})
    said: list[str] = []
    out, file = io.StringIO(), tmp_path / "outages.json"
    (made,) = run_outages(plan, Console(file=out, width=110), said.append, file)
    assert made.name == name
    assert made.sent >= 200
    assert made.answered == made.sent
    assert (made.lost, made.failed) == (0, Counter())
    assert made.revoked_meanwhile > 0
    assert made.live >= plan.sessions
    assert [each.where for each in made.checks][-1] == "a new server"
    assert made.broken == Broken(), made.reasons()
    assert not [why for why in made.calls_failed if not why.startswith("end: UNAVAILABLE")]  # a slow disk
    assert json.loads(file.read_text())["outages"][0]["name"] == name
    assert any("checking" in line for line in said)


def test_an_unknown_outage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "eaten"]) == 2
    said = capsys.readouterr().err
    assert "eaten" in said
    assert all(harm.name in said for harm in HARMS)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda: [outcome()], 0),
        (lambda: [outcome(), outcome(lost=1)], 1),
        (lambda: (_ for _ in ()).throw(ConfigError(["no"])), 2),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130),
    ],
)
def test_the_exit_code_is_the_verdict(
    end: Callable[[], Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> Any:
        result = end()
        return result if isinstance(result, list) else next(result)

    monkeypatch.setattr(command, "run_outages", run)
    assert command.main(["--seconds", "1"]) == code
