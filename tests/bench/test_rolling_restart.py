"""A server replaced under load: a small run, and lost requests and refused connections are detected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.scenarios import rolling_restart
from bench.scenarios.rolling_clients import Seen
from bench.scenarios.rolling_restart import Restarts, RollingPlan

SMALL = ["--restarts", "2", "--rate", "50", "--visit-rate", "5", "--clients", "4", "--interval", "0.1"]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_restarts_lose_no_request_and_refuse_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling_restart, "BY_SIGNAL_EVERY", 2)
    monkeypatch.setenv("ZCPROTO_SERVER__UPGRADE_TIMEOUT", "1h")
    file = tmp_path / "rolling.json"
    main(["scenario", "rolling_restart", *SMALL, "--json", str(file)])
    found = json.loads(file.read_text())
    rows = found["figures"]["figure"]
    assert [rows[key]["value"] for key in ("restarts", "lost", "refused", "skipped")] == [2, 0, 0, 0], found
    assert rows["requests"]["value"] > 50
    assert rows["visits"]["value"] > 5
    assert 0 < rows["serving_p50_s"]["value"] <= rows["restart_s"]["value"]


def judged(seen: Seen, restarts: Restarts) -> list[str]:
    rows = rolling_restart.report(RollingPlan(restarts=1), seen, restarts).columns["figure"]
    return [row.key for row in rows if not row.holds]


def test_lost_request_refused_connection_and_low_rate_fail() -> None:
    restarts = Restarts(serving_s=[1.0], restart_s=[2.0])
    seen = Seen(sent=50_000, answered=50_000, visits=1_000, seconds=10.0)
    assert judged(seen, restarts) == []
    seen.lost["no answer"] += 1
    seen.refused["connection reset"] += 1
    assert judged(seen, restarts) == ["lost", "refused"]
    assert judged(Seen(seconds=10.0, skipped=1), Restarts()) == ["restarts", "rate", "visit_rate", "skipped"]


def test_fault_of_the_server_fails() -> None:
    restarts = Restarts([1.0], [2.0], faults=["in the log: error: worker.killed"])
    seen = Seen(sent=50_000, answered=50_000, visits=1_000, seconds=10.0)
    made = rolling_restart.report(RollingPlan(restarts=1), seen, restarts)
    assert made.exit_code == 1
