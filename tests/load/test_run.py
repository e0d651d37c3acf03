"""Whole runs: real generator processes against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers import until
from tests.load.helpers import RecordingView, plan_for, share, users
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.errors import ConfigError, ConnectionClosed, ZcprotoError
from zcproto.load import run as module
from zcproto.load.record import RequestKind
from zcproto.load.result import Moment, Result, Verdict
from zcproto.load.run import Stop, resolve, run
from zcproto.load.worker import WorkerPool


async def go(server: ServerThread, stop: Stop | None = None, view: Any = None, **changes: Any) -> Result:
    return await run(plan_for(server, **changes), view or RecordingView(), stop or Stop())


async def test_fifty_connections_from_two_processes_are_verified(serve: Serve) -> None:
    server = serve()
    view = RecordingView()
    result = await go(
        server, view=view, connections=50, sessions=30, credentials=users(6), processes=2, rate=1000.0
    )
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.verified_connections == result.connected == 50
    assert {each.what: each[1:4] for each in result.counted()} == {
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
    assert result.request_rate == pytest.approx(250 / result.load_s)  # a busy machine misses the planned rate
    assert view.phases == [
        ("connect", "connecting", 50),
        ("load", "loading", 250),
        ("verify", "verifying", 50),
        ("close", "closing", 50),
    ]
    assert view.updates[-1] == {"connect": 50, "load": 250, "verify": 50, "failed": 0}
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_users_can_be_reused_in_the_next_run(serve: Serve) -> None:
    server = serve(sessions__per_user=5)
    for _ in range(2):
        assert (await go(server)).verdict is Verdict.VERIFIED


async def test_wrong_answers_fail_the_run(serve: Serve) -> None:
    app = App()

    @app.method("echo")
    def echo(n: int, data: bytes) -> dict[str, Any]:
        return {"n": n, "data": b"x" * len(data)}

    result = await go(serve(app))
    assert result.verdict is Verdict.FAILED
    assert "50 requests of the load got a wrong answer" in result.reasons()
    assert "10 of 10 connections not verified" in result.reasons()


async def test_different_server_count_fails_the_run(serve: Serve) -> None:
    app = App()
    server: list[ServerThread] = []

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        if params["n"] == 7:
            server[0].server.state.counters.requests += 1  # another client's request
        return params

    server.append(serve(app))
    result = await go(server[0])
    assert result.verdict is Verdict.FAILED
    assert result.reasons() == [
        "the server counts 71 requests, the client 70; run the benchmark without other clients of the server"
    ]


async def test_connection_of_another_client_fails_the_run(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSED_TIMEOUT", 0.0)
    server = serve()
    stop = Stop()

    class OtherClient(RecordingView):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "load":
                self.client = server.client("another")

    view = OtherClient()
    result = await run(plan_for(server), view, stop)
    view.client.close()
    assert [each.what for each in result.counted() if not each.agree] == [
        "connections",
        "sessions",
        "requests",
    ]
    assert result.verdict is Verdict.FAILED


async def test_session_limit_fails_the_run(serve: Serve) -> None:
    result = await go(serve(sessions__per_user=3))
    assert result.record.lost_connections == {"no session: RESOURCE_EXHAUSTED": 4}
    assert result.verdict is Verdict.FAILED


async def test_server_drained_during_the_run_fails_it(serve: Serve) -> None:
    server = serve()

    class DrainingView(RecordingView):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "load":
                server.begin_drain(0.0)

    result = await run(plan_for(server), DrainingView(), Stop())
    assert result.verdict is Verdict.FAILED
    assert any(reason.startswith("the server's counters could not be read") for reason in result.reasons())
    assert [each.server for each in result.counted()] == [None, None, None]
    assert Moment.CONNECTED in result.readings
    assert Moment.LOADED not in result.readings


async def test_stopped_run_closes_its_sessions(serve: Serve) -> None:
    server = serve()
    stop = Stop()

    class StoppingView(RecordingView):
        def update(self, counts: dict[str, int]) -> None:
            if counts["load"] > 5:
                stop.request()

    result = await run(plan_for(server, duration_s=60.0), StoppingView(), stop)
    assert result.interrupted
    assert result.verdict is Verdict.INTERRUPTED
    assert 5 < result.record.tallies[RequestKind.LOAD].equal < 200 * 60
    assert result.record.tallies[RequestKind.LAST].planned == 0
    assert result.record.tallies[RequestKind.CLOSE].equal == 10
    server.until_left()


async def test_run_stopped_before_its_start_ends(serve: Serve) -> None:
    server = serve()
    stop = Stop()
    stop.request()
    result = await run(plan_for(server), RecordingView(), stop)
    assert result.verdict is Verdict.INTERRUPTED
    assert result.connected == 0
    server.until_left()


async def test_connections_that_stay_open_are_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSED_TIMEOUT", 0.05)
    monkeypatch.setattr(module, "CLOSED_POLL", 0.01)
    server = serve()

    class OtherClient(RecordingView):
        def phase(self, name: str, label: str, total: int) -> None:
            if name == "close":
                self.client = server.client("another")

    view = OtherClient()
    result = await run(plan_for(server), view, Stop())
    view.client.close()
    assert result.readings[Moment.CLOSED].stats.connections == 2


async def test_connections_are_verified_after_what_runs_beside_the_load(serve: Serve) -> None:
    server, view = serve(), RecordingView()
    seen: list[tuple[list[str], int]] = []

    async def beside() -> None:
        seen.append(([name for name, _, _ in view.phases], server.stats["connections"]))

    result = await run(plan_for(server), view, Stop(), after_load=beside)
    assert seen == [(["connect", "load"], 11)]
    assert result.verdict is Verdict.VERIFIED


async def test_unknown_host_raises_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        await resolve("no-such-host.invalid", 7443)
    assert await resolve("127.0.0.1", 7443) == "127.0.0.1"


async def test_refused_connection_raises(serve: Serve) -> None:
    server = serve()
    lost = plan_for(server)
    await asyncio.to_thread(server.drain)
    with pytest.raises(ConnectionClosed, match="Connection refused"):
        await run(lost, RecordingView(), Stop())


# --- generator processes --------------------------------------------------------------------------------


async def test_killed_worker_raises_and_ends_the_others(
    serve: Serve, children: Callable[[], list[int]]
) -> None:
    server = serve()
    both = [share(server, number=number, processes=2) for number in (0, 1)]
    async with WorkerPool(both, lambda counts: None) as workers:
        await workers.run("connect")
        killed, _ = children()
        os.kill(killed, signal.SIGKILL)
        await until(lambda: killed not in children())
        workers.stop()  # one of them has exited
        with pytest.raises(ZcprotoError, match="a generator process exited with code -9"):
            await workers.run("load")
    assert children() == []


async def test_failed_worker_start_leaves_no_process(children: Callable[[], list[int]]) -> None:
    bad = share(connections=1, ca_file="/no/such/file", credentials=[["user-1", "key"]])
    workers = WorkerPool([bad], lambda counts: None)
    with pytest.raises(ZcprotoError, match="exited with code 1"):
        await workers.__aenter__()
    assert children() == []


async def test_stopped_worker_is_killed(
    serve: Serve, children: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.load.worker.END_TIMEOUT", 0.05)
    async with WorkerPool([share(serve())], lambda counts: None):
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)  # it cannot end when asked to
    assert children() == []
