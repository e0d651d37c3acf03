"""Tests of middleware around the methods of a server, called by a real client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.client.conftest import ConnectTo
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import eventually
from zcproto.app.app import App, Items
from zcproto.app.context import Context
from zcproto.client.client import Client
from zcproto.common.middleware import CallNext
from zcproto.common.parameters import Ended
from zcproto.common.roles import OPERATORS
from zcproto.errors import InternalError, InvalidArgument, NotFound, PermissionDenied, Unauthenticated

Next = CallNext[Context]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, TIMEOUT))


class Recorder:
    """Middleware that records when it is entered and left."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def named(self, name: str) -> Callable[[Context, Next], Coroutine[Any, Any, Any]]:
        async def record(context: Context, call_next: Next) -> Any:
            self.seen.append(("enter", name, context.method))
            try:
                result = await call_next(context)
            except BaseException as error:
                self.seen.append(("raise", name, type(error).__name__))
                raise
            self.seen.append(("leave", name, result))
            return result

        return record


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def application(recorder: Recorder) -> App:
    app = App()
    app.middleware(recorder.named("outer"))

    @app.method
    def add(a: int, b: int) -> int:
        return a + b

    @app.method
    async def slow_add(context: Context, a: int, b: int) -> str:
        await asyncio.sleep(0)
        return f"{a + b} for {context.user}"

    @app.method
    def fail() -> None:
        raise NotFound("no such thing")

    @app.method
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    @app.method
    async def count(n: int) -> AsyncIterator[int | Ended[str]]:
        for number in range(n):
            yield number
        yield Ended("counted")

    @app.method
    async def total(items: Items[int]) -> int:
        return sum([item async for item in items])

    @app.method
    async def double(numbers: Items[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    app.method("anything")(lambda **params: params)
    app.middleware(recorder.named("inner"))
    return app


def wrapped(method: str, result: Any) -> list[Any]:
    """What is recorded for a call that returns."""
    return [
        ("enter", "outer", method),
        ("enter", "inner", method),
        ("leave", "inner", result),
        ("leave", "outer", result),
    ]


def failed(method: str, error: type[BaseException]) -> list[Any]:
    """What is recorded for a call that raises."""
    return [
        ("enter", "outer", method),
        ("enter", "inner", method),
        ("raise", "inner", error.__name__),
        ("raise", "outer", error.__name__),
    ]


@pytest.mark.parametrize(
    ("method", "params", "result"),
    [
        ("add", {"a": 1, "b": 2}, 3),
        ("slow_add", {"a": 1, "b": 2}, "3 for ada"),
        ("anything", {"params": 1, "context": 2}, {"params": 1, "context": 2}),
    ],
)
def test_requests_run_within_the_middleware_in_order_of_registration(
    method: str, params: dict[str, Any], result: Any, recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client:
            assert await client.call(method, params) == result
            assert recorder.seen == wrapped(method, result)

    run(main())


@pytest.mark.parametrize(
    ("method", "params", "error"),
    [("fail", {}, NotFound), ("add", {"a": 1}, InvalidArgument), ("add", {"a": 1, "c": 2}, InvalidArgument)],
)
def test_middleware_sees_errors_and_faults_of_the_params(
    method: str,
    params: dict[str, Any],
    error: type[Exception],
    recorder: Recorder,
    serve: Serve,
    connect_to: ConnectTo,
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client:
            with pytest.raises(error):
                await client.call(method, params)
            assert recorder.seen == failed(method, error)

    run(main())


async def count(client: Client) -> None:
    async with client.stream("count", n=3) as stream:
        assert [item async for item in stream] == [0, 1, 2]
        assert stream.result == "counted"


async def total(client: Client) -> None:
    async with client.stream("total", items=[1, 2, 3]) as stream:
        assert await stream.finished() == 6


async def double(client: Client) -> None:
    async with client.stream("double", items=[1, 2, 3]) as stream:
        assert [item async for item in stream] == [2, 4, 6]


@pytest.mark.parametrize(("use", "result"), [(count, "counted"), (total, 6), (double, None)])
def test_streams_run_within_the_middleware_until_they_end(
    use: Callable[[Client], Coroutine[Any, Any, None]],
    result: Any,
    recorder: Recorder,
    serve: Serve,
    connect_to: ConnectTo,
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client:
            await use(client)
            assert recorder.seen == wrapped(use.__name__, result)

    run(main())


def test_stream_with_a_fault_in_its_params_is_refused_within_the_middleware(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client, client.stream("count", n="x") as stream:
            with pytest.raises(InvalidArgument):
                await stream.receive()
            assert recorder.seen == failed("count", InvalidArgument)

    run(main())


def test_run_with_an_idempotency_key_is_within_the_middleware_once(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client:
            for _ in range(3):
                assert await client.call("add", a=1, b=2, idempotency_key="k") == 3
            assert recorder.seen == wrapped("add", 3)

    run(main())


def test_cancelled_call_is_cancelled_within_the_middleware(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    server = serve(application(recorder))

    async def main() -> None:
        async with connect_to(server) as client:
            call = asyncio.create_task(client.call("wait"))
            while not recorder.seen:  # noqa: ASYNC110 - another thread records
                await asyncio.sleep(0.001)
            call.cancel()
            while len(recorder.seen) < 4:  # noqa: ASYNC110 - likewise
                await asyncio.sleep(0.001)
            assert recorder.seen == failed("wait", asyncio.CancelledError)

    run(main())


def test_middleware_may_refuse_and_replace(serve: Serve, connect_to: ConnectTo) -> None:
    app, made = App(), []

    @app.middleware
    async def guard(context: Context, call_next: Next) -> Any:
        if context.method.startswith("secret"):
            raise PermissionDenied("not you")
        return {"wrapped": await call_next(context)}

    @app.method
    async def secret_stream() -> AsyncIterator[int]:
        made.append(1)
        yield 1

    app.method("secret")(lambda: made.append(1))
    app.method("open")(lambda: 5)
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            assert await client.call("open") == {"wrapped": 5}
            with pytest.raises(PermissionDenied):
                await client.call("secret")
            with pytest.raises(PermissionDenied):
                await anext(aiter(client.stream("secret_stream")))

    run(main())
    assert made == []


def test_middleware_that_fails_is_an_incident(serve: Serve, connect_to: ConnectTo) -> None:
    app = App()

    @app.middleware
    async def broken(context: Context, call_next: Next) -> Any:
        raise ValueError("no")

    app.method("add")(lambda: 1)
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            with pytest.raises(InternalError):
                await client.call("add")

    run(main())
    assert server.server.state.counters.incidents == 1


def test_access_is_checked_before_the_middleware(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    app = application(recorder)
    app.method("operators", roles=OPERATORS)(lambda: 1)
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            with pytest.raises(PermissionDenied):
                await client.call("operators")
        async with connect_to(server, user=None) as client:
            with pytest.raises(Unauthenticated):
                await client.call("add", a=1, b=2)

    run(main())
    assert recorder.seen == []


def test_included_methods_run_within_both_middlewares(
    recorder: Recorder, serve: Serve, connect_to: ConnectTo
) -> None:
    app, jobs, nested = App(), App(), App()
    app.include(jobs, prefix="jobs.")
    jobs.include(nested, prefix="nested.")
    app.method("plain")(lambda: 1)
    nested.method("run")(lambda: 2)
    events = nested.topic("events")
    for each, name in ((app, "app"), (jobs, "jobs"), (nested, "nested")):
        each.middleware(recorder.named(name))
    server = serve(app)

    async def main() -> None:
        async with connect_to(server) as client:
            assert await client.call("plain") == 1
            assert [name for kind, name, _ in recorder.seen if kind == "enter"] == ["app"]
            recorder.seen.clear()
            assert await client.call("jobs.nested.run") == 2
            assert [name for kind, name, _ in recorder.seen if kind == "enter"] == ["app", "jobs", "nested"]
            assert {method for kind, _, method in recorder.seen if kind == "enter"} == {"jobs.nested.run"}
            async with client.stream("jobs.nested.events") as stream:
                await asyncio.to_thread(eventually, lambda: events.subscribers)
                server.in_loop(lambda: events.publish("news"))
                assert await stream.receive() == "news"

    run(main())


def test_methods_without_middleware_are_served_as_they_are() -> None:
    app = App()
    app.method("anything")(lambda **params: params)
    (method,) = app
    assert (method.is_unchecked, method.is_async) == (True, False)
    app.middleware(Recorder().named("one"))
    (method,) = app
    assert (method.is_unchecked, method.is_async) == (False, True)


def plain(context: Context, call_next: Next) -> Any: ...
async def takes_one(context: Context) -> Any: ...
async def takes_three(context: Context, call_next: Next, more: int) -> Any: ...


@pytest.mark.parametrize("function", [plain, takes_one, takes_three, 5, min])
def test_other_functions_are_refused_as_middleware(function: Any) -> None:
    with pytest.raises(TypeError, match=r"write async def \S+\(context, call_next\)"):
        App().middleware(function)


def test_callable_object_can_be_middleware() -> None:
    class Guard:
        async def __call__(self, context: Context, call_next: Next) -> Any:
            return await call_next(context)

    App().middleware(Guard())
