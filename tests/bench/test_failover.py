"""Failovers of a real Valkey under churn: a small run, and what an outcome proves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.report import Report
from bench.scenarios import failover as module
from bench.scenarios.failover import MAX_LATE_S, FailoverPlan, Graveyard, Outcome, run_failovers
from bench.valkey import VALKEY
from tests.limits import TIMEOUT
from tests.stores.valkey.server_process import needs
from zcproto.errors import TokenRevoked, Unavailable


def outcome(**changes: Any) -> Outcome:
    """A good outcome, but for the changes."""
    usual: dict[str, Any] = {
        "wanted": 1,
        "faults": 1,
        "counts": Counter({"opened": 5, "refreshed": 4, "ended": 3}),
        "dead": 7,
        "tried": 100,
    }
    return Outcome(**{**usual, **changes})


def test_good_outcome_passes() -> None:
    made = outcome(accepted=3, last_accepted_s=MAX_LATE_S, lost=2)
    assert Report({"planned": made.rows()}).reasons() == []
    assert made.notes() == []


@pytest.mark.parametrize(
    ("changes", "key", "note"),
    [
        ({"faults": 0}, "faults", ""),
        ({"counts": Counter({"opened": 5, "refreshed": 4})}, "ended", ""),
        ({"failed": Counter({"open: INTERNAL": 1})}, "calls_failed", "1 calls failed: open: INTERNAL"),
        ({"tried": 0}, "tried", ""),
        ({"late": ["ada/1 on node-0"]}, "accepted_late", "accepted late: ada/1 on node-0"),
        ({"stale": ["ada/1"]}, "accepted_stale", "accepted after a pause: ada/1"),
        ({"above_limit": ["ada on node-0"]}, "above_limit", "above the limit: ada on node-0"),
        ({"disagreed": ["ada/1"]}, "disagreed", "disagreed: ada/1"),
    ],
)
def test_broken_promise_fails_and_is_named(changes: dict[str, Any], key: str, note: str) -> None:
    made = outcome(**changes)
    assert {row.key for row in made.rows() if not row.holds} == {key}
    assert note == "" or made.notes() == [note]


class FakeCaller:
    """A server that accepts some tokens."""

    def __init__(self, accepted: set[bytes]) -> None:
        self.accepted = accepted
        self.is_out = False

    async def call(self, method: str, params: dict[str, Any], token: bytes) -> None:
        if self.is_out:
            raise Unavailable("out")
        if token not in self.accepted:
            raise TokenRevoked("revoked")


@pytest.mark.parametrize(("ago_s", "is_late"), [(0.0, False), (MAX_LATE_S + 1, True)])
async def test_accepted_dead_token_is_late_after_five_seconds(
    ago_s: float, is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 1_000.0))
    graveyard, caller = Graveyard(), FakeCaller({b"revived"})
    for token in (b"dead", b"revived"):
        graveyard.add(token, "ada/1", "revoked")
        graveyard.tokens[token].at = 1_000.0 - ago_s
    trying = asyncio.create_task(graveyard.haunt([caller], "node-0"))  # type: ignore[list-item]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    while graveyard.outcome.tried < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    trying.cancel()
    made = graveyard.outcome
    assert (made.dead, made.tried, made.accepted) == (2, 2, 1)
    assert bool(made.late) == is_late
    assert made.last_accepted_s == ago_s


async def test_token_that_died_before_the_end_of_a_pause_is_refused_after_it() -> None:
    graveyard, caller = Graveyard(), FakeCaller({b"revived"})
    graveyard.add(b"revived", "ada/1", "revoked")
    since = graveyard.tokens[b"revived"].at
    for resumed, count in ((since - 1, 0), (time.monotonic(), 1)):
        graveyard.resumed["node-0"] = resumed
        await graveyard.try_latest([caller], "node-0", since)  # type: ignore[list-item]
        assert len(graveyard.outcome.stale) == count
    await graveyard.try_latest([caller], "node-0", time.monotonic())  # type: ignore[list-item]
    assert graveyard.outcome.tried == 2


async def test_dead_token_that_cannot_be_checked_is_not_tried() -> None:
    graveyard, caller = Graveyard(), FakeCaller({b"revived"})
    caller.is_out = True
    graveyard.add(b"revived", "ada/1", "revoked")
    await graveyard._try(caller, b"revived", "node-0")  # type: ignore[arg-type]
    assert (graveyard.outcome.tried, graveyard.outcome.accepted) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_failovers_revive_no_dead_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(VALKEY)
    monkeypatch.delenv("ZCPROTO_STORE__TIMEOUT")
    monkeypatch.setattr(module, "MAX_LATE_S", TIMEOUT)  # no duration is promised on a machine that runs tests
    made = run_failovers(FailoverPlan(planned=1, unplanned=1, paused=1, rate=30.0), tmp_path)
    assert list(made) == ["planned", "unplanned", "paused"]
    for each in made.values():
        assert each.faults == 1
        assert Report({"figure": each.rows()}).reasons() == [], each.notes()
