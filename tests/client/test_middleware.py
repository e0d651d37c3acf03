"""Middleware around the calls and streams of a client, with a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.helpers import until
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY, ServerThread
from zcproto.app.app import App, Items
from zcproto.app.context import Context
from zcproto.client.streams import OutgoingCall
from zcproto.common.middleware import CallNext
from zcproto.common.parameters import Ended
from zcproto.errors import Cancelled, DeadlineExceeded, InvalidArgument, NotFound, PermissionDenied

Next = CallNext[OutgoingCall]
Function = Callable[[OutgoingCall, Next], Coroutine[Any, Any, Any]]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Recorder:
    """Middleware that records when it is entered and left."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def named(self, name: str) -> Function:
        async def record(call: OutgoingCall, call_next: Next) -> Any:
            self.seen.append(("enter", name, call.method))
            try:
                result = await call_next(call)
            except BaseException as error:
                self.seen.append(("raise", name, type(error).__name__))
                raise
            self.seen.append(("leave", name, result))
            return result

        return record


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def server(serve: Serve) -> ServerThread:
    app = App()

    @app.method
    def add(a: int, b: int) -> int:
        return a + b

    @app.method
    def fail() -> None:
        raise NotFound("no such thing")

    @app.method
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    @app.method
    def trace(context: Context) -> str | None:
        return context.traceparent

    @app.method
    async def count(context: Context, n: int, fails: bool = False) -> AsyncIterator[Any]:
        for number in range(n):
            yield number
        if fails:
            raise NotFound("no such thing")
        yield Ended(context.traceparent)

    @app.method
    async def total(items: Items[int]) -> int:
        return sum([item async for item in items])

    return serve(app)


async def test_calls_are_within_the_middleware_in_order(
    server: ServerThread, connect_to: ConnectTo, recorder: Recorder
) -> None:
    async with connect_to(server, middleware=[recorder.named("a"), recorder.named("b")]) as client:
        assert await client.call("add", a=1, b=2) == 3
        assert recorder.seen == [
            ("enter", "a", "add"),
            ("enter", "b", "add"),
            ("leave", "b", 3),
            ("leave", "a", 3),
        ]
        recorder.seen.clear()
        with pytest.raises(NotFound):
            await client.call("fail")
        with pytest.raises(DeadlineExceeded):
            await client.call("wait", timeout=0.05)
        assert [event for event in recorder.seen if event[0] == "raise"] == [
            ("raise", "b", "NotFound"),
            ("raise", "a", "NotFound"),
            ("raise", "b", "DeadlineExceeded"),
            ("raise", "a", "DeadlineExceeded"),
        ]


async def test_middleware_changes_what_is_sent(server: ServerThread, connect_to: ConnectTo) -> None:
    seen: list[OutgoingCall] = []

    async def change(call: OutgoingCall, call_next: Next) -> Any:
        seen.append(replace(call))
        call.traceparent = TRACE
        if call.method == "add":
            call.params = {**call.params, "b": 40}
        return await call_next(call)

    async with connect_to(server, middleware=[change], timeout=TIMEOUT) as client:
        assert await client.call("add", {"a": 2}, idempotency_key="k") == 42
        assert await client.call("trace", timeout=None) == TRACE
        async with client.stream("count", n=2, timeout=2 * TIMEOUT) as stream:
            assert [item async for item in stream] == [0, 1]
            assert stream.result == TRACE
    assert seen == [
        OutgoingCall(method="add", params={"a": 2}, timeout=TIMEOUT, idempotency_key="k"),
        OutgoingCall(method="trace", params={}, timeout=None),
        OutgoingCall(method="count", params={"n": 2}, timeout=2 * TIMEOUT, is_stream=True),
    ]


async def test_middleware_may_answer_and_refuse(server: ServerThread, connect_to: ConnectTo) -> None:
    async def guard(call: OutgoingCall, call_next: Next) -> Any:
        if call.method == "add":
            return "cached"
        raise PermissionDenied("not here")

    async with connect_to(server, middleware=[guard]) as client:
        assert await client.call("add", a=1, b=2) == "cached"
        with pytest.raises(PermissionDenied):
            await client.call("fail")
        with pytest.raises(PermissionDenied):
            async with client.stream("count", n=1):
                pass
    assert server.server.state.methods["count"].calls == 0


async def test_middleware_of_a_stream_ends_with_it(
    server: ServerThread, connect_to: ConnectTo, recorder: Recorder
) -> None:
    async with connect_to(server, middleware=[recorder.named("a")]) as client:
        async with client.stream("total") as stream:
            await stream.send(4)
            assert recorder.seen == [("enter", "a", "total")]
            assert await stream.finished() == 4
        assert recorder.seen.pop() == ("leave", "a", 4)
        async with client.stream("count", n=100, window=(1, 1)) as stream:
            assert await stream.receive() == 0
        assert recorder.seen.pop() == ("leave", "a", None)
        with pytest.raises(NotFound):
            async for _ in client.stream("count", n=1, fails=True):
                pass
        assert recorder.seen.pop() == ("raise", "a", "NotFound")
        assert [item async for item in client.stream("count", n=1)] == [0]
        assert recorder.seen.pop() == ("leave", "a", None)
        with pytest.raises(InvalidArgument):
            async with client.stream("count", n="x") as stream:
                await stream.receive()


async def test_cancelled_user_of_a_stream_cancels_its_middleware(
    server: ServerThread, connect_to: ConnectTo, recorder: Recorder
) -> None:
    async with connect_to(server, middleware=[recorder.named("a")]) as client:

        async def use() -> None:
            async with client.stream("total") as stream:
                await stream.receive()

        task = asyncio.create_task(use())
        await until(lambda: server.server.state.tasks.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recorder.seen[-1] == ("raise", "a", "CancelledError")


async def test_cancelled_opening_of_a_stream_cancels_its_middleware(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    seen: list[str] = []

    async def slow(call: OutgoingCall, call_next: Next) -> Any:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            seen.append("left")

    async with connect_to(server, middleware=[slow]) as client:
        task = asyncio.create_task(client.stream("total").__aenter__())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["left"]


async def test_error_of_the_middleware_is_raised_on_leaving_the_stream(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    async def broken(call: OutgoingCall, call_next: Next) -> Any:
        await call_next(call)
        raise ValueError("the middleware failed")

    async def careless(call: OutgoingCall, call_next: Next) -> Any:
        task = asyncio.ensure_future(call_next(call))
        await asyncio.sleep(0)
        task.cancel()
        return None

    async with connect_to(server, middleware=[broken]) as client:
        with pytest.raises(ValueError, match="the middleware failed"):
            async with client.stream("count", n=1) as stream:
                assert [item async for item in stream] == [0]
    async with connect_to(server, middleware=[careless]) as client:
        with pytest.raises(RuntimeError, match="returned before the stream ended"):
            async with client.stream("count", n=1):
                pass


async def test_sessions_of_other_users_have_the_middleware_of_the_client(
    server: ServerThread, connect_to: ConnectTo, recorder: Recorder
) -> None:
    async with (
        connect_to(server, middleware=[recorder.named("a")]) as client,
        client.session_for(user="bob", key=KEY) as bob,
    ):
        assert await bob.call("add", a=1, b=2) == 3
    assert recorder.seen == [("enter", "a", "add"), ("leave", "a", 3)]


def test_blocking_client_has_middleware_for_calls_and_streams(
    server: ServerThread, blocking: Blocking, recorder: Recorder
) -> None:
    with blocking(server, middleware=[recorder.named("a")]) as client:
        assert client.call("add", a=1, b=2) == 3
        with client.stream("count", n=2) as stream:
            assert [*stream] == [0, 1]
            stream.close()  # the second time on leaving
    assert recorder.seen == [
        ("enter", "a", "add"),
        ("leave", "a", 3),
        ("enter", "a", "count"),
        ("leave", "a", None),
    ]


def test_other_functions_are_refused(connect_to: ConnectTo, server: ServerThread) -> None:
    with pytest.raises(TypeError, match=r"middleware <lambda>: write async def"):
        connect_to(server, middleware=[lambda call, call_next: call_next(call)])


async def test_cancelled_error_of_the_server_passes_the_middleware(
    server: ServerThread, connect_to: ConnectTo, recorder: Recorder
) -> None:
    async with connect_to(server, middleware=[recorder.named("a")]) as client:
        call = asyncio.create_task(client.call("wait"))
        await until(lambda: server.server.state.tasks.running)
        await asyncio.to_thread(server.drain)
        with pytest.raises(Cancelled):
            await call
    assert recorder.seen[-1] == ("raise", "a", "Cancelled")
