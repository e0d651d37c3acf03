"""A server that hangs beside another one: a small run, and unanswered calls and clients that stay are detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.scenarios import frozen_server
from bench.scenarios.frozen_server import FrozenPlan, Seen
from tests.limits import TIMEOUT


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_idempotent_calls_of_a_frozen_server_are_answered_by_the_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_server, "CALL_S", TIMEOUT)
    file = tmp_path / "frozen.json"
    main(["scenario", "frozen_server", "--clients", "20", "--json", str(file)])
    rows = json.loads(file.read_text())["figures"]["figure"]
    assert rows["not_answered"]["value"] == 0, rows
    assert rows["calls"]["value"] > 20
    assert rows["gap_s"]["value"] > 0


def judged(seen: Seen) -> list[str]:
    rows = frozen_server.report(FrozenPlan(), seen).columns["figure"]
    return [row.key for row in rows if not row.holds]


def test_unanswered_call_long_gap_and_client_that_stays_fail() -> None:
    assert judged(Seen(sent=9, answered=8, at_stopped=2, moved=2, unknown=1, gaps_s=[0.5, 7.5])) == []
    assert judged(Seen(sent=9, answered=8, at_stopped=2, moved=1, gaps_s=[8.5])) == [
        "moved",
        "not_answered",
        "gap_s",
    ]
    assert judged(Seen()) == ["at_stopped", "calls"]
