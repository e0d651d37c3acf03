"""Outages of a real Valkey under load: a small run, and what an outcome proves."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.scenarios import outages as module
from bench.scenarios.outage_churn import Phase, Waits, added
from bench.scenarios.outages import OUTAGES, OutageOutcome, OutagePlan, report, run_outages
from bench.scenarios.sessions import Broken
from bench.valkey import VALKEY
from tests.stores.valkey.server_process import needs

QUICK = OutagePlan(
    seconds=1.5, sessions=20, shared=5, rate=100.0, openings=4.0, refreshes=4.0, revocations=6.0
)
SERVERS = ("the server", "the other server", "the server, started again", "a new server")


def by_phase(*seconds: float) -> dict[Phase, float]:
    return dict(zip(Phase, seconds, strict=True))


def waits(*seconds: float) -> Waits:
    return Waits(by_phase(*seconds), {Phase.DURING: "open"})


def checks(**broken: set[str]) -> dict[str, Broken]:
    """The last server has broken promises."""
    return {name: Broken(**broken) if name == SERVERS[-1] else Broken() for name in SERVERS}


def outcome(name: str = "hung", **changes: Any) -> OutageOutcome:
    """A good outage, but for the changes."""
    usual: dict[str, Any] = {
        "outage": OUTAGES[name],
        "sent": 1_000,
        "load_waits": by_phase(0.1, 0.2, 0.15),
        "call_waits": waits(0.02, 0.3, 0.01),
        "put_off": 20,
        "revoked": 10,
        "revoked_during": 6,
        "live": 30,
        "checks": checks(),
    }
    return OutageOutcome(**{**usual, **changes})


def failing(made: OutageOutcome) -> set[str]:
    return {row.key for row in made.rows() if not row.holds}


def test_good_outage_passes() -> None:
    made = report({"hung": outcome()})
    assert made.reasons() == []
    assert made.row("wait_added_ms").value == pytest.approx(100)
    assert made.row("call_added_ms").value == pytest.approx(280)


@pytest.mark.parametrize(
    ("changes", "key", "note"),
    [
        ({"lost": 1}, "lost", ""),
        ({"failed": Counter({"TOKEN_REVOKED": 2})}, "failed", "2 requests: TOKEN_REVOKED"),
        ({"calls_failed": Counter({"end: UNAVAILABLE": 1})}, "calls_failed", "1 calls: end: UNAVAILABLE"),
        ({"load_waits": by_phase(0.1, 0.2, 0.401)}, "wait_added_ms", ""),
        ({"call_waits": waits(0.1, 0.401, 0.1)}, "call_added_ms", "the longest other calls: open during"),
        ({"checks": {}}, "checks", ""),
        ({"checks": checks(lost={"ada/1"})}, "live_refused", "a new server: ada/1"),
        ({"checks": checks(revived={"ada/1"})}, "revived", "a new server: ada/1"),
        ({"checks": checks(reused={"ada/1"})}, "reused", "a new server: ada/1"),
        ({"revoked_during": 0}, "revoked_during", ""),
        ({"put_off": 0}, "put_off", ""),
    ],
)
def test_broken_promise_fails_and_is_named(changes: dict[str, Any], key: str, note: str) -> None:
    made = outcome(**changes)
    assert failing(made) == {key}
    assert any(note in each for each in report({"hung": made}).notes) or not note


def test_outage_that_lets_openings_through_need_not_put_any_off() -> None:
    assert failing(outcome("emptied", put_off=0)) == set()


def test_waits_are_longest_of_their_phase() -> None:
    noted, now = Waits(), time.monotonic()
    for ago, what in ((5.0, "a"), (9.0, "b"), (2.0, "c")):
        noted.note(Phase.AFTER, now - ago, what)
    assert noted.longest[Phase.AFTER] >= 9.0
    assert noted.what == {Phase.AFTER: "b"}
    assert added(noted.longest) == noted.longest[Phase.AFTER]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [pytest.param("hung", marks=pytest.mark.slow), "lost"])
def test_outage_loses_no_request_and_no_revocation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(VALKEY)
    monkeypatch.delenv("ZCPROTO_STORE__TIMEOUT")  # shorter than the outage
    monkeypatch.setattr(module, "CHURN_S", 15.0)
    made = run_outages(QUICK, tmp_path, [name])[name]
    assert made.sent >= 200
    assert (made.lost, made.failed) == (0, Counter())
    assert made.revoked_during > 0
    assert made.live >= QUICK.sessions
    assert made.checks == dict.fromkeys(SERVERS, Broken()), made.causes()
    assert not [why for why in made.calls_failed if not why.startswith("end: UNAVAILABLE")]  # a slow disk
