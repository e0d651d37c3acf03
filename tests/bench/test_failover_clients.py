"""One of three servers killed under clients: a small run; calls that are lost, slow or run twice are detected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.scenarios import failover_clients, failover_times
from bench.scenarios.failover_clients import FailoverClientsPlan, FleetSeen
from bench.scenarios.failover_times import Connected, Done, FailoverTimes, Load
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
    times = FailoverTimes(
        done=[Done(10.5, 10.5, 10.6, 1), Done(10.5, 10.75, 15.0, 2)],
        ports={10.0: {1: 7443, 2: 7444}},
        loads=[Load(0.25, 0.5)],
    )
    times.connected[2] += [Connected(8.0, 8.1, 8.2), Connected(11.5, 12.0, 14.0), Connected(16.0, 16.1, 16.2)]
    return FleetSeen(times, names=["1-1", "2-1"], keyed=2, keyless=1, reconnects=1)


def test_only_calls_of_clients_of_the_killed_server_count_as_during_a_failover() -> None:
    runs = Counter(["1-1", "2-1"])
    assert judged(good(), runs, {10.0: 7443}) == []
    assert judged(good(), runs, {10.0: 7444}) == ["failover_p99_ms"]


def test_time_of_a_call_during_a_failover_is_divided_into_steps() -> None:
    steps = {"late": 250.0, "notice": 1_000.0, "tcp": 500.0, "tls": 2_000.0, "answer": 1_000.0}
    found = {row.key: row.value for row in failover_times.rows(good().times, {10.0: 7444}, 1_000.0)}
    assert {name: found[f"failover_{name}_ms"] for name in steps} == pytest.approx(steps, rel=0.01)
    assert found["failover_ms"] == pytest.approx(4_500.0, rel=0.01)
    assert (found["clients_ran_ms"], found["clients_waited_ms"]) == (250.0, 500.0)


def test_call_that_was_answered_before_its_client_reconnected_has_one_step() -> None:
    times = good().times
    times.done = [
        Done(9.5, 9.5, 10.5, 2),
        Done(15.0, 15.0, 15.5, 3),
    ]  # and one whose client was never connected
    times.ports = {10.0: {2: 7443}, 14.5: {3: 7443}}
    found = {row.key: row.value for row in failover_times.rows(times, {10.0: 7443, 14.5: 7443}, 1_000.0)}
    assert found["failover_again_ms"] == pytest.approx(1_000.0, rel=0.01)
    assert found["failover_answer_ms"] == pytest.approx(500.0, rel=0.01)
    assert found["failover_tls_ms"] == pytest.approx(0.0, abs=0.01)
    assert found["failover_calls"] == 2


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
