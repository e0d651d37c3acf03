"""Whole runs: real generator processes against a real server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import until
from tests.load.helpers import OPERATOR, RecordingView, app_with, plan_for, share, users
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.common.parameters import Ended
from zcproto.errors import ConfigError, ConnectionClosed, NotFound, ZcprotoError
from zcproto.load import run as module
from zcproto.load.hdr import write_file
from zcproto.load.plan import Target
from zcproto.load.record import RequestKind
from zcproto.load.report import as_json, figures
from zcproto.load.result import Moment, Result, Verdict
from zcproto.load.run import Stop, resolve, run
from zcproto.load.worker import WorkerPool


async def go(server: ServerThread, view: Any = None, stop: Stop | None = None, **changes: Any) -> Result:
    return await run(plan_for(server, **changes), view or RecordingView(), stop or Stop())


class ActingView(RecordingView):
    """A view that does something at the start of a phase."""

    def __init__(self, name: str, act: Callable[[], Any]) -> None:
        super().__init__()
        self.at, self.act, self.result = name, act, None

    def phase(self, name: str, label: str, total: int) -> None:
        super().phase(name, label, total)
        if name == self.at:
            self.result = self.act()


async def test_fifty_connections_from_two_processes_are_verified(serve: Serve) -> None:
    server = serve()
    view = RecordingView()
    parts = {"connections": 50, "sessions": 30, "credentials": users(6), "processes": 2}
    result = await go(server, view, **parts, rate=1000.0)
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.verified_connections == result.connected == 50
    assert {each.what: each[1:4] for each in result.counted()} == {
        "connections": (50, 50, 50),
        "sessions": (30, 30, 30),
        "requests": (350, 350, 350),
    }
    assert [*result.readings] == [*Moment]
    closed = result.readings[Moment.CLOSED].stats
    assert (closed.connections, closed.sessions) == (1, 1)
    assert (result.cpu_per_request_us or 0) > 0
    assert (result.connect_cpu_s or 0) > 0
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


async def test_streams_from_two_processes_are_verified(serve: Serve, tmp_path: Path) -> None:
    server = serve(sessions__per_user=5)
    assert (await go(server)).verdict is Verdict.VERIFIED  # its users have room again
    view = RecordingView()
    parts = {"stream": "repeat", "processes": 2, "credentials": users(3), "sessions": 9, "rate": 300.0}
    result = await go(server, view, **parts)
    assert result.reasons() == []
    assert result.record.items.equal == result.plan.load == 10 * result.plan.items_per_stream == 80
    assert ("load", "loading", 80) in view.phases
    assert result.counted()[-1][:4] == ("items", 80, 80, 80)
    value = as_json(result, {}, 1_800_000_000.0)
    assert value["items"]["equal"] == 80
    assert value["latency_ms"]["first_item"]["count"] == 10
    assert value["latency_ms"]["between_items"]["count"] == 70
    assert "request" not in value["latency_ms"]
    assert value["rate_per_s"]["items"]["asked"] == 300.0
    measured = {each.key for each in figures(result, {}) if each.value is not None}
    assert {"first_item_p99_ms", "item_p99_ms", "between_items_p99_ms", "item_cpu_us"} <= measured
    write_file(tmp_path / "run.hlog", result.record, 0.0)
    text = (tmp_path / "run.hlog").read_text()
    assert "Tag=first_item," in text
    assert "Tag=between_items," in text
    write_file(tmp_path / "run.hgrm", result.record, 0.0)
    assert "TotalCount     =       80.000" in (tmp_path / "run.hgrm").read_text()


# --- runs that fail -------------------------------------------------------------------------------------------


async def test_wrong_answers_fail_the_run(serve: Serve) -> None:
    result = await go(serve(app_with(lambda n, data: {"n": n, "data": b"x" * len(data)})))
    assert result.verdict is Verdict.FAILED
    assert "50 requests of the load got a wrong answer" in result.reasons()
    assert "10 of 10 connections not verified" in result.reasons()


async def test_different_server_count_fails_the_run(serve: Serve) -> None:
    server = serve()
    counters = server.server.state.counters

    def count_another() -> None:
        server.in_loop(lambda: setattr(counters, "requests", counters.requests + 1))

    result = await go(server, ActingView("verify", count_another))
    assert result.verdict is Verdict.FAILED
    assert result.reasons() == [
        "the server counts 71 requests, the client 70; run the benchmark without other clients of the server"
    ]


@pytest.mark.parametrize(
    ("phase", "verdict", "wrong"),
    [("load", Verdict.FAILED, ["connections", "sessions", "requests"]), ("close", Verdict.VERIFIED, [])],
)
async def test_connection_of_another_client_fails_the_run_until_it_closes(
    serve: Serve, phase: str, verdict: Verdict, wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSED_TIMEOUT", 0.05)
    monkeypatch.setattr(module, "CLOSED_POLL", 0.01)
    server = serve()
    view = ActingView(phase, lambda: server.client("another"))
    result = await go(server, view)
    view.result.close()
    assert [each.what for each in result.counted() if not each.agree] == wrong
    assert result.verdict is verdict
    assert result.readings[Moment.CLOSED].stats.connections == 2


async def test_session_limit_fails_the_run(serve: Serve) -> None:
    result = await go(serve(sessions__per_user=3))
    assert result.record.lost_connections == {"no session: RESOURCE_EXHAUSTED": 4}
    assert result.verdict is Verdict.FAILED


async def test_server_drained_during_the_run_fails_it(serve: Serve) -> None:
    server = serve()
    result = await go(server, ActingView("load", lambda: server.begin_drain(0.0)))
    assert result.verdict is Verdict.FAILED
    assert any(reason.startswith("the server's counters could not be read") for reason in result.reasons())
    assert [each.server for each in result.counted()] == [None, None, None]
    assert Moment.CONNECTED in result.readings
    assert Moment.LOADED not in result.readings


async def test_server_that_cannot_be_reached_raises(serve: Serve) -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        await resolve("no-such-host.invalid", 7443)
    assert await resolve("127.0.0.1", 7443) == "127.0.0.1"
    server = serve()
    lost = plan_for(server)
    await asyncio.to_thread(server.drain)
    with pytest.raises(ConnectionClosed, match="Connection refused"):
        await run(lost, RecordingView(), Stop())


# --- runs that are stopped ------------------------------------------------------------------------------------


async def test_stopped_run_closes_its_sessions(serve: Serve) -> None:
    server, stop = serve(), Stop()

    class StoppingView(RecordingView):
        def update(self, counts: dict[str, int]) -> None:
            if counts["load"] > 5:
                stop.request()

    result = await go(server, StoppingView(), stop, duration_s=60.0)
    assert result.interrupted
    assert result.verdict is Verdict.INTERRUPTED
    assert 5 < result.record.tallies[RequestKind.LOAD].equal < 200 * 60
    assert result.record.tallies[RequestKind.LAST].planned == 0
    assert result.record.tallies[RequestKind.CLOSE].equal == 10
    result = await go(server, stop=stop)  # stopped before its start
    assert (result.verdict, result.connected) == (Verdict.INTERRUPTED, 0)
    server.until_left()


async def test_connections_are_verified_after_what_runs_beside_the_load(serve: Serve) -> None:
    server, view = serve(), RecordingView()
    seen: list[tuple[list[str], int]] = []

    async def beside() -> None:
        seen.append(([name for name, _, _ in view.phases], server.stats["connections"]))

    result = await run(plan_for(server), view, Stop(), after_load=beside)
    assert seen == [(["connect", "load"], 11)]
    assert result.verdict is Verdict.VERIFIED


# --- generator processes --------------------------------------------------------------------------------------


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


# --- methods of the application -------------------------------------------------------------------------------

GREET = Target("greet", {"name": "ada", "raw": b"\x00\xff"}, ("hello ada",))


def greeter() -> App:
    app, numbers = App(), iter(range(1, 1_000))

    @app.method("greet")
    def greet(name: str, raw: bytes = b"") -> str:
        return f"hello {name}"

    @app.method("next")
    def following() -> int:
        return next(numbers)

    @app.method("missing")
    def missing() -> None:
        raise NotFound("no such greeting")

    return app


async def measure(serve: Serve, target: Target, **changes: Any) -> Result:
    usual: dict[str, Any] = {"credentials": users(1), "sessions": 3, "operator": None, "processes": 1}
    return await go(serve(greeter()), target=target, **{**usual, **changes})


def test_target_survives_its_way_to_a_process() -> None:
    assert Target.from_text(GREET.to_text()) == GREET
    assert Target.from_text(Target("greet", {}).to_text()).expected == ()
    assert Target("m", {}, (None,)).is_right(None)
    assert not Target("m", {}, (None,)).is_right(0)


async def test_method_of_the_application_is_called_with_the_key_of_one_user(serve: Serve) -> None:
    result = await measure(serve, GREET)
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert result.record.tallies[RequestKind.LOAD].equal == 50
    assert result.record.tallies[RequestKind.JOIN].equal == 7
    assert all(each.agree and each.server is None for each in result.counted())


async def test_counts_of_the_server_are_compared_with_an_operator(serve: Serve) -> None:
    result = await measure(serve, GREET, operator=OPERATOR)
    assert result.verdict is Verdict.VERIFIED
    assert all(each.server == each.client for each in result.counted())


@pytest.mark.parametrize(("expected", "verdict"), [((), Verdict.VERIFIED), ((1,), Verdict.FAILED)])
async def test_results_that_change_are_wrong_if_one_is_expected(
    serve: Serve, expected: tuple[int, ...], verdict: Verdict
) -> None:
    result = await measure(serve, Target("next", {}, expected))
    assert result.verdict is verdict
    assert result.record.tallies[RequestKind.JOIN].equal == (0 if expected else 7)


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        (Target("grete", {}), "grete cannot be measured: UNIMPLEMENTED"),
        (Target("greet", {}), "greet cannot be measured: INVALID_ARGUMENT"),
        (Target("missing", {}), "missing cannot be measured: NOT_FOUND: no such greeting"),
        (
            Target("greet", {"name": "eve"}, ("hello ada",)),
            "greet answered 'hello eve'; give that to --expect",
        ),
    ],
)
async def test_target_that_cannot_be_measured_is_refused_before_the_load(
    serve: Serve, target: Target, fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        await measure(serve, target)


async def test_stream_of_an_application_is_timed_as_a_request(serve: Serve) -> None:
    app = App()

    @app.method
    async def chat(prompt: str) -> AsyncIterator[str | Ended[int]]:
        for word in prompt.split():
            yield word
        yield Ended(3)

    server = serve(app)
    targets = [
        Target("chat", {"prompt": "one two three"}, (expected,), is_stream=True) for expected in (3, 4)
    ]
    right, wrong = [await go(server, target=target) for target in targets]
    assert right.verdict is Verdict.VERIFIED
    load = right.record.tallies[RequestKind.LOAD]
    totals = {name: right.record.latencies[name].total for name in ("request", "first_item", "between_items")}
    assert totals == {"request": load.equal, "first_item": load.equal, "between_items": 2 * load.equal}
    assert [*as_json(right, {}, 0.0)["latency_ms"]].count("first_item") == 1
    assert "item" not in as_json(right, {}, 0.0)["latency_ms"]
    assert (wrong.verdict, wrong.record.latencies["request"].total) == (Verdict.FAILED, 0)
