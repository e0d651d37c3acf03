"""Whole runs: real generator processes against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from tests.load.conftest import Serve
from tests.load.helpers import Watcher, plan_for, share, users
from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.errors import ConfigError, ConnectionClosed, ZcprotoError
from zcproto.load import run as module
from zcproto.load.result import Moment, Result, Verdict
from zcproto.load.run import Stop, resolve, run
from zcproto.load.tally import Kind
from zcproto.load.workers import Workers


async def go(server: ServerThread, stop: Stop | None = None, view: Any = None, **changes: Any) -> Result:
    return await run(plan_for(server, **changes), view or Watcher(), stop or Stop())


async def test_fifty_connections_from_two_processes_are_verified(serve: Serve) -> None:
    server = serve()
    view = Watcher()
    result = await go(
        server, view=view, connections=50, sessions=30, credentials=users(6), processes=2, rate=1000.0
    )
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.verified_connections == result.connected == 50
    assert {each.what: each[1:] for each in result.counted()} == {
        "connections": (50, 50, 50),
        "sessions": (30, 30, 30),
        "requests": (350, 350, 350),
    }
    assert [*result.readings] == [*Moment]
    assert result.readings[Moment.CLOSED].stats.connections == 1
    assert result.readings[Moment.CLOSED].stats.sessions == 1
    assert result.cpu_per_request_us is not None
    assert result.cpu_per_request_us > 0
    assert result.connect_cpu_s is not None
    assert result.connect_cpu_s > 0
    assert result.connect_rate > 0
    assert result.request_rate == pytest.approx(
        250 / result.load_s
    )  # a busy machine reaches less than asked for
    assert view.phases == [
        ("connect", "connecting", 50),
        ("load", "loading", 250),
        ("verify", "verifying", 50),
        ("close", "closing", 50),
    ]
    assert view.updates[-1] == {"connect": 50, "load": 250, "verify": 50, "failed": 0}
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_the_same_users_can_be_used_again(serve: Serve) -> None:
    server = serve(sessions__per_user=5)
    for _ in range(2):
        assert (await go(server)).verdict is Verdict.VERIFIED


async def test_a_server_that_answers_wrongly_is_not_verified(serve: Serve) -> None:
    app = App()

    @app.method("echo")
    def echo(n: int, data: bytes) -> dict[str, Any]:
        return {"n": n, "data": b"x" * len(data)}

    result = await go(serve(app))
    assert result.verdict is Verdict.FAILED
    assert "50 requests of the load were answered with something else than was sent" in result.reasons()
    assert "10 of 10 connections are unverified" in result.reasons()


async def test_a_server_that_counts_otherwise_is_not_verified(serve: Serve) -> None:
    app = App()
    server: list[ServerThread] = []

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        if params["n"] == 7:
            server[0].server.state.counters.requests += 1  # somebody else's request
        return params

    server.append(serve(app))
    result = await go(server[0])
    assert result.verdict is Verdict.FAILED
    assert result.reasons() == [
        "the server counts 71 requests, this side 70: does anybody else use this server?"
    ]


async def test_somebody_elses_connection_is_noticed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSED_TIMEOUT", 0.0)
    server = serve()
    stop = Stop()

    class Intruder(Watcher):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "load":
                self.client = server.client("somebody")

    view = Intruder()
    result = await run(plan_for(server), view, stop)
    view.client.close()
    assert [each.what for each in result.counted() if not each.agree] == [
        "connections",
        "sessions",
        "requests",
    ]
    assert result.verdict is Verdict.FAILED


async def test_a_user_without_room_for_sessions_is_told(serve: Serve) -> None:
    result = await go(serve(sessions__per_user=3))
    assert result.record.lost_links == {"no session: RESOURCE_EXHAUSTED": 4}
    assert result.verdict is Verdict.FAILED


async def test_a_server_that_dies_ends_in_a_report(serve: Serve) -> None:
    server = serve()

    class Killer(Watcher):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "load":
                server.begin_drain(0.0)

    result = await run(plan_for(server), Killer(), Stop())
    assert result.verdict is Verdict.FAILED
    assert any(reason.startswith("the server's figures could not be read") for reason in result.reasons())
    assert [each.server for each in result.counted()] == [None, None, None]
    assert Moment.CONNECTED in result.readings
    assert Moment.LOADED not in result.readings


async def test_a_run_can_be_stopped_and_closes_what_it_opened(serve: Serve) -> None:
    server = serve()
    stop = Stop()

    class Impatient(Watcher):
        def update(self, counts: dict[str, int]) -> None:
            if counts["load"] > 5:
                stop.request()

    result = await run(plan_for(server, duration_s=60.0), Impatient(), stop)
    assert result.interrupted
    assert result.verdict is Verdict.INTERRUPTED
    assert 5 < result.record.tallies[Kind.LOAD].equal < 6_000
    assert result.record.tallies[Kind.LAST].planned == 0
    assert result.record.tallies[Kind.CLOSE].equal == 10
    server.until_left()


async def test_a_run_stopped_before_it_began_still_ends(serve: Serve) -> None:
    server = serve()
    stop = Stop()
    stop.request()
    result = await run(plan_for(server), Watcher(), stop)
    assert result.verdict is Verdict.INTERRUPTED
    assert result.connected == 0
    server.until_left()


async def test_connections_that_stay_at_the_server_are_waited_for_and_told(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSED_TIMEOUT", 0.05)
    monkeypatch.setattr(module, "CLOSED_POLL", 0.01)
    server = serve()

    class Intruder(Watcher):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "close":
                self.client = server.client("somebody")

    view = Intruder()
    result = await run(plan_for(server), view, Stop())
    view.client.close()
    assert result.readings[Moment.CLOSED].stats.connections == 2


async def test_no_such_host_is_told() -> None:
    with pytest.raises(ConfigError, match="no such host"):
        await resolve("no-such-host.invalid", 7443)
    assert await resolve("127.0.0.1", 7443) == "127.0.0.1"


async def test_no_such_server_is_told(serve: Serve) -> None:
    server = serve()
    lost = plan_for(server)
    await asyncio.to_thread(server.drain)
    with pytest.raises(ConnectionClosed, match="Connection refused"):
        await run(lost, Watcher(), Stop())


# --- generator processes --------------------------------------------------------------------------------


async def test_a_generator_that_dies_is_told_and_the_others_are_ended(serve: Serve) -> None:
    server = serve()
    both = [share(server, number=number, processes=2) for number in (0, 1)]
    async with Workers(both, lambda counts: None) as workers:
        await workers.run("connect")
        pids = [process.pid for process in workers._processes]
        os.kill(pids[0], signal.SIGKILL)
        await workers._processes[0].wait()
        workers.stop()  # finds one of them gone
        with pytest.raises(ZcprotoError, match="a generator process ended by itself, with exit code -9"):
            await workers.run("load")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_generators_that_cannot_start_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = share(connections=1, ca_file="/no/such/file", credentials=[["user-1", "key"]])
    workers = Workers([bad], lambda counts: None)
    with pytest.raises(ZcprotoError, match="exit code 1"):
        await workers.__aenter__()
    assert [process.returncode for process in workers._processes] == [1]


async def test_a_generator_that_does_not_end_is_killed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.load.workers.END_TIMEOUT", 0.05)
    async with Workers([share(serve())], lambda counts: None) as workers:
        (process,) = workers._processes
        os.kill(process.pid, signal.SIGSTOP)
    assert process.returncode == -signal.SIGKILL
