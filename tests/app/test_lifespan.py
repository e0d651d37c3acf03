"""Tests of lifespans: around a server, in the context of calls, and at their failures."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import ConnectTo
from tests.helpers import until
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import configuration
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.errors import ConfigError, InternalError, LifespanError
from zcproto.runtime.server import Server
from zcproto.server import lifespan as lifespan_module
from zcproto.server.lifespan import Lifespans


@dataclass
class Pool:
    name: str
    seen: list[str] = field(default_factory=list)


class Recorder:
    """Lifespans that record their start and end."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def app(self, name: str) -> App[Pool]:
        @asynccontextmanager
        async def lifespan(app: App[Pool]) -> AsyncIterator[Pool]:
            self.seen.append(f"start {name}")
            try:
                yield Pool(name)
            finally:
                self.seen.append(f"end {name}")

        app = App(lifespan=lifespan)
        app.method("state")(lambda: None)
        return app


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT))


def never() -> None:
    raise AssertionError("the lifespan has ended early")


# --- around a server -------------------------------------------------------------------------------------


def test_value_is_the_state_of_each_kind_of_call(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    app = recorder.app("app")

    @app.method
    def plain(context: Context[Pool]) -> str:
        return context.state.name

    @app.method
    async def waiting(context: Context[Pool]) -> str:
        await asyncio.sleep(0)
        return context.state.name

    @app.method
    async def stream(context: Context[Pool]) -> AsyncIterator[str]:
        yield context.state.name

    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            assert await client.call("plain") == "app"
            assert await client.call("waiting") == "app"
            assert await client.call("plain", idempotency_key="k") == "app"
            assert [item async for item in client.stream("stream")] == ["app"]

    run(main())
    assert recorder.seen == ["start app"]
    server.drain()
    assert recorder.seen == ["start app", "end app"]


def test_included_application_has_its_own_state_or_that_of_the_including_one(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    app, jobs, plain, bare = recorder.app("app"), recorder.app("jobs"), App(), App()

    def state(context: Context[Pool]) -> str:
        return context.state.name

    @app.middleware
    async def note(context: Context[Pool], call_next: Any) -> Any:
        context.state.seen.append(context.method)
        return await call_next(context)

    for each in (app, jobs, plain, bare):
        each.method("name")(state)
    app.include(jobs, prefix="jobs.")
    app.include(jobs, prefix="again.")
    app.include(plain, prefix="plain.")
    jobs.include(bare, prefix="bare.")
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            names = ("name", "jobs.name", "again.name", "plain.name", "jobs.bare.name")
            assert [await client.call(name) for name in names] == ["app", "jobs", "jobs", "app", "jobs"]

    run(main())
    server.drain()
    assert recorder.seen == ["start app", "start jobs", "end jobs", "end app"]


def test_state_without_a_lifespan_is_an_error(serve: Serve, connect_to: ConnectTo) -> None:
    app, errors = App(), []

    @app.method
    def state(context: Context) -> Any:
        try:
            return context.state
        except RuntimeError as error:
            errors.append(str(error))
            raise

    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            with pytest.raises(InternalError):
                await client.call("state")

    run(main())
    assert errors == ["this application has no lifespan; pass one: App(lifespan=...)"]


def test_lifespan_ends_after_the_methods(serve: Serve, connect_to: ConnectTo) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        yield
        seen.append("lifespan ended")

    app = App(lifespan=lifespan)

    @app.method
    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            seen.append("method ended")

    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            call = asyncio.create_task(client.call("wait"))
            await until(lambda: server.server.state.tasks.running)
            await asyncio.to_thread(server.drain)
            await asyncio.wait([call])
            assert call.exception() is not None

    run(main())
    assert seen == ["method ended", "lifespan ended"]


# --- failures --------------------------------------------------------------------------------------------


def failing(when: str, release: asyncio.Event | None = None) -> App:
    """An application whose lifespan raises, waits for ever, or until a release, at its start or its end."""

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        async def at(moment: str) -> None:
            if when == f"raise at {moment}":
                raise OSError("database gone")
            if when == f"wait at {moment}":
                await asyncio.get_running_loop().create_future()
            if when == f"stuck at {moment}":
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.get_running_loop().create_future()
                assert release is not None
                await release.wait()

        await at("start")
        try:
            yield
        finally:
            await at("end")

    app = App(lifespan=lifespan)
    app.method("fine")(lambda: 1)
    return app


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("raise at start", r"did not start: it raised OSError; the log has the traceback"),
        ("wait at start", r"did not start within 0.1 s; make it faster, or raise server.lifespan_timeout"),
    ],
)
def test_server_does_not_listen_if_the_lifespan_fails_to_start(
    when: str, message: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*_: Any) -> list[socket.socket]:
        raise AssertionError("the server binds a port")

    monkeypatch.setattr("zcproto.runtime.server.bind", bind)
    with pytest.raises(LifespanError, match=message):
        serve(failing(when), server__lifespan_timeout=0.1 if when == "wait at start" else "1h")


def test_lifespans_that_have_started_end_if_a_later_one_fails(recorder: Recorder, serve: Serve) -> None:
    app = recorder.app("app")
    app.include(failing("raise at start"))
    with pytest.raises(LifespanError):
        serve(app)
    assert recorder.seen == ["start app", "end app"]


def test_lifespan_ends_if_the_port_is_taken(recorder: Recorder, serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        serve(recorder.app("app"), server__port=taken.getsockname()[1])
    assert recorder.seen == ["start app", "end app"]


@pytest.mark.parametrize("when", ["raise at end", "wait at end"])
async def test_failure_at_the_end_is_kept(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifespan_module, "CANCELLED_TIME", TIMEOUT)
    lifespans = Lifespans(failing(when).lifespans(), {})
    await lifespans.start(TIMEOUT, never)
    await lifespans.stop(0.1)
    assert isinstance(lifespans.failure, LifespanError)
    assert "did not end" in str(lifespans.failure)
    assert not lifespans.is_stuck


async def test_failure_at_the_end_is_raised_on_leaving_the_server(tmp_path: Path, certs: Path) -> None:
    shutil.copytree(certs, tmp_path / "certs")
    server = Server(failing("raise at end"), configuration(tmp_path), home=tmp_path)
    with pytest.raises(LifespanError, match="did not end"):
        async with server:
            pass
    with pytest.raises(LifespanError, match="did not end"):
        await server.drain()
    await server.wait_closed()


async def test_lifespan_that_cannot_be_cancelled_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifespan_module, "CANCELLED_TIME", 0.01)
    release = asyncio.Event()
    lifespans = Lifespans(failing("stuck at end", release).lifespans(), {})
    await lifespans.start(TIMEOUT, never)
    await lifespans.stop(0.01)
    assert lifespans.is_stuck
    release.set()
    async with asyncio.timeout(TIMEOUT):
        while lifespans.is_stuck:  # noqa: ASYNC110 - its task ends in some turns
            await asyncio.sleep(0)


async def test_lifespan_stuck_at_the_start_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifespan_module, "CANCELLED_TIME", 0.01)
    release = asyncio.Event()
    lifespans = Lifespans(failing("stuck at start", release).lifespans(), {})
    with pytest.raises(LifespanError, match="did not start within"):
        await lifespans.start(0.01, never)
    assert lifespans.is_stuck
    await asyncio.wait_for(lifespans.stop(2 * TIMEOUT), TIMEOUT)
    assert lifespans.is_stuck
    release.set()
    async with asyncio.timeout(TIMEOUT):
        while lifespans.is_stuck:  # noqa: ASYNC110 - its task ends in some turns
            await asyncio.sleep(0)


async def test_cancelled_start_ends_the_lifespan(recorder: Recorder) -> None:
    app = recorder.app("app")
    app.include(failing("wait at start"))
    lifespans = Lifespans(app.lifespans(), {})
    start = asyncio.create_task(lifespans.start(TIMEOUT, never))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert recorder.seen == ["start app", "end app"]


async def test_nothing_runs_without_a_lifespan() -> None:
    lifespans = Lifespans(App().lifespans(), {})
    await lifespans.start(0.0, never)
    await lifespans.stop(0.0)
    assert lifespans.failure is None


def test_server_drains_if_a_task_of_the_lifespan_fails(serve: Serve, connect_to: ConnectTo) -> None:
    fail: list[Callable[[], None]] = []

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        trigger = asyncio.Event()
        loop = asyncio.get_running_loop()
        fail.append(lambda: loop.call_soon_threadsafe(trigger.set) and None)

        async def work() -> None:
            await trigger.wait()
            raise OSError("gone")

        async with asyncio.TaskGroup() as group:
            group.create_task(work())
            yield

    app = App(lifespan=lifespan)
    app.method("fine")(lambda: 1)
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            assert await client.call("fine") == 1
            fail[0]()
            await asyncio.to_thread(server.join)

    run(main())
    failure = server.server.parts.lifespans.failure
    assert failure is not None
    assert "ended early: it raised ExceptionGroup" in str(failure)


async def test_lifespan_that_suppresses_its_cancellation_has_ended_early() -> None:
    tasks: list[asyncio.Task[Any] | None] = []

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        tasks.append(asyncio.current_task())
        with suppress(asyncio.CancelledError):
            yield

    ended = asyncio.Event()
    lifespans = Lifespans(App(lifespan=lifespan).lifespans(), {})
    await lifespans.start(5.0, ended.set)
    assert tasks[0] is not None
    tasks[0].cancel()
    await asyncio.wait_for(ended.wait(), TIMEOUT)
    assert isinstance(lifespans.failure, LifespanError)


# --- definition ------------------------------------------------------------------------------------------


async def bare_generator(app: App) -> AsyncIterator[None]:
    yield


def plain_generator(app: App) -> Iterator[None]:
    yield


@pytest.mark.parametrize("lifespan", [bare_generator, plain_generator])
def test_generator_without_decorator_is_refused(lifespan: Any) -> None:
    with pytest.raises(TypeError, match=r"decorate the function with contextlib\.asynccontextmanager"):
        App(lifespan=lifespan)


class Manager(AbstractAsyncContextManager[int]):
    async def __aexit__(self, *_: object) -> None: ...

    async def __aenter__(self) -> int:
        return 7


async def test_any_async_context_manager_is_a_lifespan() -> None:
    values: dict[App[Any], Any] = {}
    app = App(lifespan=lambda app: Manager())
    lifespans = Lifespans(app.lifespans(), values)
    await lifespans.start(TIMEOUT, never)
    assert values == {app: 7}
    await lifespans.stop(5.0)
