"""One of three servers killed under clients: a small run; calls that are lost, slow or run twice are detected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.scenarios import failover_clients
from bench.scenarios.failover_clients import Done, FailoverClientsPlan, FleetSeen
from tests.stores.valkey.server_process import is_installed

SMALL = ["--seconds", "6", "--interval", "2", "--clients", "12", "--rate", "4"]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_clients_of_three_servers_go_on_while_one_is_killed(tmp_path: Path) -> None:
    if not is_installed("valkey-server"):
        pytest.skip("valkey-server is not installed")
    file = tmp_path / "failover.json"
    main(["scenario", "failover_clients", *SMALL, "--json", str(file)])
    found = json.loads(file.read_text())
    rows = found["figures"]["figure"]
    values = {key: row["value"] for key, row in rows.items()}
    assert [values[key] for key in ("kills", "unanswered", "twice", "never", "sessions_lost")] == [
        3,
        0,
        0,
        0,
        0,
    ], found
    assert values["reconnects"] >= 1
    assert values["keyed"] > 50


def judged(seen: FleetSeen, runs: Counter[str], kills: dict[float, int]) -> list[str]:
    rows = failover_clients.report(FailoverClientsPlan(seconds=5), seen, kills, runs).columns["figure"]
    return [row.key for row in rows if not row.holds]


def good() -> FleetSeen:
    return FleetSeen(
        done=[Done(10.5, 10.6, 1), Done(10.5, 15.0, 2)],
        names=["1-1", "2-1"],
        keyed=2,
        keyless=1,
        ports={10.0: {1: 7443, 2: 7444}},
        reconnects=1,
    )


def test_only_calls_of_clients_of_the_killed_server_count_as_during_a_failover() -> None:
    runs = Counter(["1-1", "2-1"])
    assert judged(good(), runs, {10.0: 7443}) == []
    assert judged(good(), runs, {10.0: 7444}) == ["failover_p99_ms"]


def test_lost_call_repeated_run_and_lost_session_fail() -> None:
    seen = good()
    seen.unanswered["DEADLINE_EXCEEDED"] += 1
    seen.sessions_lost = 1
    assert judged(seen, Counter(["1-1", "1-1"]), {10.0: 7443}) == [
        "unanswered",
        "twice",
        "never",
        "sessions_lost",
    ]
