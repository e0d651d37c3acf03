"""Small runs of the scenarios with real servers, and faults that they have to find.

No duration is promised on a machine that runs tests: bars of times are raised or left out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import tracing
from bench.__main__ import main
from bench.report import Report
from bench.scenarios import (
    attacks,
    durable,
    failover,
    frozen_server,
    half_rate,
    kills,
    matrix,
    outages,
    readers,
    reloads,
    rolling_restart,
    rotation,
    soak,
    soak_clients,
    storms,
    streams,
    workers,
)
from bench.scenarios.harness import ask_control
from bench.scenarios.matrix import CELLS, CellResult, rounds, run_matrix
from bench.scenarios.matrix_cells import OPERATIONS
from bench.scenarios.matrix_faults import FAULTS
from bench.scenarios.matrix_site import CLUSTER, DEPLOYMENTS, MEMORY, SENTINEL, SQLITE, STORES, VALKEY
from bench.scenarios.sessions import Broken
from bench.stage import Server, Stage
from bench.valkey import VALKEY as PROGRAM
from tests.limits import TIMEOUT
from tests.server.helpers import KEY
from tests.stores.valkey.server_process import needs
from zcproto.common.home import Home
from zcproto.config import load_config
from zcproto.config.changes import TAKES_EFFECT, Effect
from zcproto.errors import ConfigError
from zcproto.load import fleet

Written = dict[str, Any]
Scenario = Callable[..., tuple[int, Written]]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    """Return a function that runs a scenario by its command: the exit code, and what it wrote as JSON."""

    def run(*words: str) -> tuple[int, Written]:
        file = tmp_path / "run.json"
        code = main(["scenario", *words, "--json", str(file)])
        return code, json.loads(file.read_text())

    return run


@pytest.fixture
def home(tmp_path: Path, certs: Path) -> Home:
    """A home with certificates, so that no RSA key of 4096 bits is made."""
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    shutil.copytree(certs, path / "certs")
    return Home(path)


def values(written: Written, column: str = "figure") -> dict[str, Any]:
    return {key: row["value"] for key, row in written["figures"][column].items()}


def failing(report: Report, column: str = "figure") -> set[str]:
    return {row.key for row in report.columns[column] if not row.holds}


def at_zero(written: Written, *keys: str) -> bool:
    found = values(written)
    return [found[key] for key in keys] == [0] * len(keys)


# --- harm to others -------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_attacks_pass(scenario: Scenario, monkeypatch: Patch) -> None:
    lenient = {name: replace(each, p99_ms=None, at_once=None) for name, each in attacks.ATTACKS.items()}
    small = attacks.AttackPlan(seconds=1.0, rest_s=0.2, honest=3, rate=20.0, logins=5.0)
    monkeypatch.setattr(attacks, "ATTACKS", lenient)
    monkeypatch.setattr(attacks, "TIMES_QUIET", 10_000.0)
    monkeypatch.setattr(attacks, "AttackPlan", lambda seconds, logins: small)
    code, written = scenario("attacks")
    assert code == 0, written["reasons"]
    assert [*written["figures"]] == [*attacks.ATTACKS]
    assert all(values(written, name)["logins"] == 5 for name in attacks.ATTACKS)


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_storm_and_mix_pass(scenario: Scenario, monkeypatch: Patch) -> None:
    """The other mixes are part of the last one."""
    monkeypatch.setattr(storms, "ALL_SERVED_S", TIMEOUT)
    monkeypatch.setattr(storms, "HONEST_P99_MS", TIMEOUT * 1000)
    monkeypatch.setattr(storms, "MIXES", (storms.MIXES[0], storms.MIXES[-1]))
    words = ["--clients", "20", "--honest", "3", "--rate", "100", "--seconds", "4", "--comes-back", "0.3"]
    code, written = scenario("storms", *words)
    assert code == 0, written["reasons"]
    assert all(len(each) == 20 for each in written["served_s"].values())
    counts = written["counts"]["all kinds"]
    assert all(counts[name] for name in ("bytes_dripped", "garbage_sent", "disconnected", "deaf_requests"))
    assert values(written, "all kinds")["replays"] > 0
    assert KEY not in json.dumps(written)


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_run_of_readers_misses_the_bar_that_cannot_be_met(
    scenario: Scenario, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(readers, "MAX_SLICE_MS", 1e9)
    monkeypatch.setattr(readers, "P99_MS", 1e9)
    monkeypatch.setattr(readers, "MAX_UNREAD_KIB", 1.0)
    small = partial(readers.ReadersPlan, events=2, unread=20, honest=2, rate=50.0)
    monkeypatch.setattr(readers, "ReadersPlan", small)
    code, written = scenario("readers", "--subscribers", "70", "--hasty", "1600")
    assert code == 1
    assert [*written["figures"]] == [*readers.KINDS]
    (reason,) = written["reasons"]
    assert reason.startswith("unread: memory that each takes")
    assert values(written, "hasty")["alive"] > 1


# --- servers that end -----------------------------------------------------------------------------------------


@pytest.fixture
def kills_come_when_all_was_acknowledged(monkeypatch: Patch) -> None:
    """Let each server work for as long as a slow machine needs to do something of each kind."""
    moment = kills.Kills._moment

    async def later(self: kills.Kills) -> None:
        done = self._seen.acknowledged
        while not (done["open"] and done["refresh"] and done["close"] + done["revoke"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await moment(self)

    monkeypatch.setattr(kills.Kills, "_moment", later)


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.usefixtures("kills_come_when_all_was_acknowledged")
def test_acknowledged_sessions_survive_each_kill(scenario: Scenario) -> None:
    code, written = scenario("kills", "--kills", "10", "--seed", "7")
    assert code == 0, written["reasons"]
    assert values(written)["kills"] == 10
    assert values(written)["live"] > 0


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("kills_come_when_all_was_acknowledged")
def test_server_that_loses_its_sessions_fails(scenario: Scenario, monkeypatch: Patch) -> None:
    inner = kills.Kills.one_server

    async def forgetful(self: kills.Kills, *, last: bool = False) -> None:
        await inner(self, last=last)
        for path in self.stage.home.path.glob("sessions.db*"):
            path.unlink()

    monkeypatch.setattr(kills.Kills, "one_server", forgetful)
    code, written = scenario("kills", "--kills", "2")
    assert code == 1
    assert [key for key, row in written["figures"]["figure"].items() if not row["holds"]] == ["lost"]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_acknowledged_sessions_survive_the_death_of_each_process(scenario: Scenario) -> None:
    _, written = scenario("worker_kills", "--kills", "8")
    assert values(written)["kills"] == 8
    assert at_zero(written, "lost", "revived", "reused", "half_done", "left"), written


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("durable", "servers"), ("pending", "workers")])
def test_runs_and_calls_survive_kills(scenario: Scenario, monkeypatch: Patch, name: str, kind: str) -> None:
    if kind == "servers":
        needs("valkey-server")
    monkeypatch.setattr(durable, "MAX_MS", TIMEOUT * 1000)
    monkeypatch.setattr(durable, "TIMED", 3)
    monkeypatch.setattr(fleet.WorkerFleet, "victims", ("worker", "coordinator"))
    words = ["--runs", "20", "--readers", "5", "--interval", "2", "--only", kind]
    _, written = scenario(name, *words)
    found = values(written, kind)
    assert [found[key] for key in ("unexplained", "wrong", "twice")] == [0, 0, 0], written
    assert found["runs"] == 20
    assert found["cuts"] > 0


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_clients_of_three_servers_go_on_while_one_is_killed(scenario: Scenario) -> None:
    needs("valkey-server")
    words = ["--seconds", "6", "--interval", "2", "--clients", "12", "--rate", "4"]
    _, written = scenario("failover_clients", *words)
    assert values(written)["kills"] == 3
    assert at_zero(written, "unanswered", "twice", "never", "sessions_lost"), written
    assert values(written)["reconnects"] >= 1
    assert values(written)["keyed"] > 50


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_idempotent_calls_of_a_frozen_server_are_answered_by_the_other_one(
    scenario: Scenario, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(frozen_server, "CALL_S", TIMEOUT)
    _, written = scenario("frozen_server", "--clients", "20")
    assert at_zero(written, "not_answered"), written
    assert values(written)["calls"] > 20
    assert values(written)["gap_s"] > 0


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_restarts_lose_no_request_and_refuse_no_connection(scenario: Scenario, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rolling_restart, "BY_SIGNAL_EVERY", 2)
    monkeypatch.setenv("ZCPROTO_SERVER__UPGRADE_TIMEOUT", "1h")
    words = ["--restarts", "2", "--rate", "50", "--visit-rate", "5", "--clients", "4", "--interval", "0.1"]
    _, written = scenario("rolling_restart", *words)
    found = values(written)
    assert found["restarts"] == 2
    assert at_zero(written, "lost", "refused", "skipped"), written
    assert found["requests"] > 50
    assert found["visits"] > 5
    assert 0 < found["serving_p50_s"] <= found["restart_s"]


# --- stores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def usual_store_timeout(monkeypatch: Patch) -> None:
    """Let outages exceed the timeout of the store."""
    monkeypatch.delenv("ZCPROTO_STORE__TIMEOUT")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("usual_store_timeout")
def test_failovers_revive_no_dead_token(tmp_path: Path, monkeypatch: Patch) -> None:
    needs(PROGRAM)
    monkeypatch.setattr(failover, "MAX_LATE_S", TIMEOUT)
    plan = failover.FailoverPlan(planned=1, unplanned=1, paused=1, rate=30.0)
    made = failover.run_failovers(plan, tmp_path)
    assert list(made) == ["planned", "unplanned", "paused"]
    for each in made.values():
        assert each.faults == 1
        assert Report({"figure": each.rows()}).reasons() == [], each.notes()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [pytest.param("hung", marks=pytest.mark.slow), "lost"])
@pytest.mark.usefixtures("usual_store_timeout")
def test_outage_loses_no_request_and_no_revocation(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    needs(PROGRAM)
    monkeypatch.setattr(outages, "CHURN_S", 15.0)
    rates = {"rate": 100.0, "openings": 4.0, "refreshes": 4.0, "revocations": 6.0}
    plan = outages.OutagePlan(seconds=1.5, sessions=20, shared=5, **rates)
    made = outages.run_outages(plan, tmp_path, [name])[name]
    assert made.sent >= 200
    assert (made.lost, made.failed) == (0, Counter())
    assert made.revoked_during > 0
    assert made.live >= plan.sessions
    assert len(made.checks) == 4
    assert all(each == Broken() for each in made.checks.values()), made.causes()
    assert not [why for why in made.calls_failed if not why.startswith("end: UNAVAILABLE")]  # a slow disk


def cells(*only: str) -> list[str]:
    return [made.name(operation) for made in rounds(only) for operation in made.operations]


def test_every_store_meets_every_fault_that_it_can_have_with_every_operation() -> None:
    names = cells()
    assert len(names) == len({*names}) >= CELLS
    stores = {kind: {name.split(" / ")[1] for name in cells(f"{kind} /")} for kind in STORES}
    of_server = {"clock +1 h", "clock -1 h", "server killed", "server paused"}
    of_store = {"store stopped", "store slow", "store full", "store read-only"}
    of_network = {"cut off, to the store", "cut off, from the store"}
    failovers = {"planned failover", "unplanned failover", "failover that loses writes"}
    assert stores == {
        MEMORY: of_server,
        SQLITE: of_server | of_store,
        VALKEY: of_server | of_store | of_network | {"store killed"},
        **dict.fromkeys(
            (SENTINEL, CLUSTER), of_server | of_store | of_network | failovers | {"store killed"}
        ),
    }
    assert stores[CLUSTER] == {fault.name for fault in FAULTS}
    each = Counter(name.rpartition(" / ")[2] for name in names)
    assert set(each.values()) == {len(names) // len(OPERATIONS)}
    assert cells("Valkey /, killed, in flight, refresh", "memory, clock +1 h, after, open") == [
        "memory / clock +1 h / after / open",
        "Valkey / store killed / in flight / refresh",
        "Valkey / server killed / in flight / refresh",
    ]


def test_broken_or_missing_cell_fails_and_is_named() -> None:
    good = CellResult(VALKEY, "store killed", "before", "refresh", ())
    bad = CellResult(VALKEY, "store killed", "after", "open", ("it was lost",))
    assert matrix.report([good], is_whole=False).reasons() == []
    assert (
        "Valkey / store killed / after / open: it was lost"
        in matrix.report([good, bad], is_whole=False).reasons()
    )
    assert matrix.report([good] * CELLS, is_whole=True).reasons() == []
    assert matrix.report([good] * (CELLS - 1), is_whole=True).reasons()


def broken(found: list[CellResult]) -> list[str]:
    return [f"{cell.name}: {sentence}" for cell in found for sentence in cell.broken]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "only",
    [
        "SQLite, store full, before, revoke one",
        f"{VALKEY} /, store killed, unacknowledged, refresh",
        pytest.param(f"{SENTINEL}, unplanned failover, before, re", marks=pytest.mark.slow),
        pytest.param(f"{CLUSTER}, failover that loses writes, after, re", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("usual_store_timeout")
def test_cells_hold_with_real_servers(only: str, tmp_path: Path) -> None:
    if any(kind in only for kind in DEPLOYMENTS):
        needs(PROGRAM)
    found = asyncio.run(run_matrix([only], 1, 2, tmp_path))
    assert len(found) == len(cells(only))
    assert broken(found) == []


@pytest.mark.timeout(240)
def test_server_that_loses_its_revocations_is_found(tmp_path: Path, monkeypatch: Patch) -> None:
    restart, act, saved = matrix.Site.restart, matrix.Running._act, tmp_path / "saved"

    async def forget(site: matrix.Site) -> None:
        for node in site.nodes:
            await node.kill()
        for file in saved.iterdir():
            shutil.copy(file, site.here.home)
        await restart(site)

    async def save_and_act(running: matrix.Running) -> None:
        saved.mkdir()
        for file in running._site.here.home.glob("sessions.db*"):
            shutil.copy(file, saved)
        await act(running)

    monkeypatch.setattr(matrix.Site, "restart", forget)
    monkeypatch.setattr(matrix.Running, "_act", save_and_act)
    found = asyncio.run(run_matrix(["SQLite, clock +1 h, after, revoke one"], 1, 1, tmp_path))
    assert any("was accepted here" in sentence for sentence in broken(found)), broken(found)


# --- reloads and rotations ------------------------------------------------------------------------------------

RELOADS = reloads.ReloadPlan(reloads=10, connections=10, rate=200.0, interval_s=0.1)


@pytest.fixture
def ask_reload(monkeypatch: Patch) -> Callable[[Home], Any]:
    """Return the function that asks for a reload; the file has the last word on what it changes."""
    monkeypatch.delenv("ZCPROTO_LIMITS__WRITE_TIMEOUT")
    return reloads.ask_reload


def test_changes_of_reloads_need_no_restart_and_their_files_are_valid(
    home: Home, ask_reload: Callable[[Home], Any]
) -> None:
    settings = reloads.Settings(Stage(home.path), 10)
    before = load_config(None, home=home.path, environ={})
    changed: set[str] = set()
    for _ in range(2 * len(reloads.CHANGES)):
        changed |= settings.change()
        load_config(None, home=home.path, environ={})
    assert all(TAKES_EFFECT[key] is not Effect.RESTART for key in changed)
    assert load_config(None, home=home.path, environ={}) == before  # each went back and forth
    settings.write(reloads.FAULTY)
    with pytest.raises(ConfigError):
        load_config(None, home=home.path, environ={})


def test_correct_reloads_pass(home: Home, ask_reload: Callable[[Home], Any]) -> None:
    report = reloads.reload_under_load(home, RELOADS)
    assert report.reasons() == []
    assert [report.row(key).value for key in ("reloads", "changing", "refused")] == [10, 5, 1]


def test_wrong_answers_to_reloads_fail(
    home: Home, ask_reload: Callable[[Home], Any], monkeypatch: Patch
) -> None:
    """Reloads with odd numbers are of a changed file, the tenth is of a faulty one."""
    given: list[tuple[int, dict[str, Any]]] = [
        (422, {"error": "x"}),
        (200, {"changed": [], "restart": [{"key": "server.port"}]}),
        (200, {"changed": [], "restart": []}),
        (200, {"changed": [{"key": "log.level"}], "restart": []}),
    ]
    answers = itertools.cycle(given)
    monkeypatch.setattr(reloads, "ask_reload", lambda home: next(answers))
    report = reloads.reload_under_load(home, RELOADS)
    for reason in (
        "reload 1: 422",
        "reload 2: 200, [] instead of []",
        "reload 3: 200, [] instead of ['",
        "reload 4: 200, ['log.level'] instead of []",
        "reload 10: a faulty file was answered with 200",
    ):
        assert any(reason in each for each in report.faults), reason
    assert report.row("wrong").value == 10


def test_connection_lost_by_a_reload_fails(
    home: Home, ask_reload: Callable[[Home], Any], monkeypatch: Patch
) -> None:
    def end_sessions(home: Home) -> Any:
        ask_control(home, "POST", "sessions/revoke", '{"user": "load-1"}')
        return ask_reload(home)

    monkeypatch.setattr(reloads, "ask_reload", end_sessions)
    assert {"requests_lost", "connections_kept"} <= failing(reloads.reload_under_load(home, RELOADS))


def test_interrupted_run_proves_nothing(
    monkeypatch: Patch, ask_reload: Callable[[Home], Any], capsys: Capture
) -> None:
    asked: list[Home] = []

    def interrupt(home: Home) -> Any:
        asked.append(home)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return ask_reload(home)

    monkeypatch.setattr(reloads, "ask_reload", interrupt)
    options = ["--reloads", "500", "--connections", "10", "--rate", "100", "--interval", "0.1"]
    assert main(["scenario", "reloads", *options]) == 130
    assert "prove nothing" in capsys.readouterr().out


ROTATIONS = rotation.RotationPlan(
    **{
        "rotations": 4,
        "interval_s": 0.1,
        "rest_s": 0.2,
        "new_key_every": 2,
        "connections": 10,
        "rate": 200.0,
    },
    **{"newcomers": 10.0, "delay_s": 0.2, "key_types": ("ecdsa-p256",)},
)
PAUSES = {"longest_pause_ms", "longest_own_pause_ms"}
"""Bars that prove nothing on a machine that runs tests."""


@pytest.fixture
def rotate(home: Home, monkeypatch: Patch) -> Callable[..., rotation.RotationOutcome]:
    """Return a function that rotates certificates under load, with changes of the plan."""
    monkeypatch.setattr(rotation, "TAIL_S", 0.2)

    def run(on_rotated: Any = None, **changes: Any) -> rotation.RotationOutcome:
        arguments = () if on_rotated is None else (on_rotated,)
        return rotation.rotate_under_load(home.path, replace(ROTATIONS, **changes), *arguments)

    return run


def test_server_that_picks_up_certificates_passes(rotate: Callable[..., Any], monkeypatch: Patch) -> None:
    """The server has as much time for it as it needs."""
    monkeypatch.setattr(rotation.RotationPlan, "load_s", 2.0)
    made = rotate(watch_interval_s=0.1, delay_s=TIMEOUT)
    assert failing(made.report(), "rotating") - PAUSES == set()
    assert (made.report().row("certificates_seen").value or 0) > 1
    assert [each.new_key for each in made.rotated] == [False, True, False, True]
    assert len({each.leaves["ecdsa"] for each in made.history}) == 5


def test_server_that_ignores_new_certificates_fails_and_loses_nothing(rotate: Callable[..., Any]) -> None:
    made = rotate(watch_interval_s=3600.0)
    assert {each.leaf for each in made.newcomers} == {made.history[0].leaves["ecdsa"]}
    assert failing(made.report(), "rotating") - PAUSES == {"old_longest_s", "last_seen"}
    assert made.load.reasons() == []


def test_server_that_dies_while_certificates_rotate_fails(
    rotate: Callable[..., Any], monkeypatch: Patch
) -> None:
    servers: list[Server] = []
    enter = Server.__enter__
    monkeypatch.setattr(Server, "__enter__", lambda server: servers.append(server) or enter(server))
    made = rotate(lambda rotated: servers[0].kill() if rotated.number == 1 else None)
    assert made.tls_failures is None
    assert {"connections_kept", "handshakes_failed"} <= failing(made.report(), "rotating")
    assert any(each.failure for each in made.newcomers)


# --- growth and rates -----------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_short_soak_has_no_wrong_answer(scenario: Scenario, monkeypatch: Patch) -> None:
    """Churn, a rotation, a reload and a full disk in each cycle."""
    monkeypatch.setattr(soak, "OUTAGE_CHANCE", 1.0)
    longer = partial(soak.SoakPlan, lifetime_s=3_600.0, refresh_lifetime_s=7_200.0)
    monkeypatch.setattr(soak, "SoakPlan", longer)
    code, written = scenario("soak", "--minutes", "0.1", "--seed", "7")
    answers, found = written["answers"], values(written)
    assert {"connect", "open", "echo", "refresh", "end"} <= answers["right"].keys()
    assert (answers["wrong"], answers["lost"], written["failed"]) == ({}, {}, {})
    assert found["rotations"] == found["reloads"] == found["outages"] > 0
    assert written["samples"]
    assert all(each["connections"] == soak.SoakPlan(0.1).steady + 1 for each in written["samples"])
    # A slow machine makes fewer cycles, too few to judge growth by: that fails, and is named.
    assert [why for why in written["reasons"] if "not measured" not in why] == []
    assert code == bool(written["reasons"])


SWAPPED = """
import asyncio
from zcproto_conformance import python_client

class Swapped(python_client.Conform):
    async def expect(self, step):
        answer = await super().expect(step)
        return answer + 2 if isinstance(answer, int) else answer

asyncio.run(Swapped().run())
"""
"""A client whose ints are wrong."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_python_clients_lose_no_call_and_wrong_answers_are_found(monkeypatch: Patch, capsys: Capture) -> None:
    found = {name: soak_clients.programs()[name] for name in ("asyncio", "blocking")}
    found["swapped"] = [found["asyncio"][0], "-c", SWAPPED]
    monkeypatch.setattr(soak_clients, "programs", lambda: found)
    monkeypatch.setattr(soak_clients, "TIMEOUT_MS", round(TIMEOUT * 1000))
    monkeypatch.setattr(soak_clients, "NO_ANSWER_S", 2 * TIMEOUT)
    monkeypatch.setenv("ZCPROTO_SERVER__UPGRADE_TIMEOUT", "1h")
    seen: list[soak_clients.SoakClientsOutcome] = []
    run = soak_clients.soak_clients
    monkeypatch.setattr(soak_clients, "soak_clients", lambda *given: seen.append(run(*given)) or seen[-1])
    assert main(["scenario", "soak_clients", "--minutes", "0.1"]) == 1
    assert seen[0].tallies.pop("swapped").wrong["run: a different answer"] > 0, capsys.readouterr()
    assert seen[0].report().reasons() == [], capsys.readouterr()


def test_half_of_the_answered_rate_is_asked_for_on_all_connections(tmp_path: Path) -> None:
    plan = half_rate.HalfPlan(
        connections=10, flood_rate=3_000.0, flood_s=0.3, seconds=0.5, arrival_rate=100.0
    )
    report = half_rate.half_of_maximum(tmp_path, plan)
    assert report.row("verified").value == 10
    maximum = report.row("maximum").value
    assert maximum
    assert report.row("asked").value == maximum / 2
    assert failing(report) <= {"p99_9_ms"}  # on a busy machine latency proves nothing


def test_streams_of_a_real_server_are_verified(tmp_path: Path) -> None:
    plan = streams.StreamsPlan(connections=10, rate=20.0, seconds=0.5)
    found = streams.open_streams(tmp_path / "home", plan)
    expected = {"streams": 10, "items": 100, "lost": 0, "wrong": 0}
    assert {key: found.row(key).value for key in expected} == expected
    assert found.faults == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("permitted", "code"), [(5, 0), (4, 1)])
def test_limit_of_sessions_holds_over_all_workers(
    permitted: int, code: int, scenario: Scenario, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(workers, "SESSIONS_PER_USER", permitted)
    found, written = scenario("workers", "--only", "limit", "--size", "40")
    assert (found, values(written, "limit")["sessions"]) == (code, 5)


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_small_loads_of_workers_are_measured(scenario: Scenario) -> None:
    for part, keys in (("balance", {"share", "private_mib"}), ("crowd", {"share", "kib"})):
        _, written = scenario("workers", "--only", part, "--size", "200")
        assert values(written, part)["connections_kept"] == 200
        assert all(values(written, part)[key] > 0 for key in keys)
    _, written = scenario("workers", "--only", "cpu", "--size", "1")
    rows = written["figures"]["cpu"]
    assert {key for key, row in rows.items() if row["below"]} == {"ratio_1", "ratio_16"}


@pytest.mark.slow
def test_small_run_of_tracing_measures_the_three_servers(tmp_path: Path) -> None:
    file = tmp_path / "tracing.json"
    assert main(["tracing", "--rounds", "1", "--requests", "2000", "--json", str(file)]) in {0, 1}
    assert "off / without" in file.read_text()


@pytest.mark.skipif("sys.gettrace() is not None", reason="it counts with a trace function of its own")
def test_request_that_is_not_recorded_costs_a_few_bytecodes() -> None:
    figures = {row.key: row.value or 0 for row in tracing.counted_rows()}
    assert 0 <= figures["bytecodes_off"] < tracing.MOST_BYTECODES
    assert 0 < figures["bytecodes_unrecorded"] < figures["bytecodes"] / 8
    assert figures["bytecodes_recorded"] > figures["bytecodes"]
