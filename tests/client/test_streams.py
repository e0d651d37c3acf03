"""Streams between a real client and a real server."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread, eventually
from zcproto.app.app import App
from zcproto.client.client import Client
from zcproto.common.parameters import Ended
from zcproto.errors import (
    Cancelled,
    ConnectionClosed,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Unimplemented,
)


class Methods:
    """An application with streams, and what happened in it."""

    def __init__(self) -> None:
        self.app = App()
        self.made = 0
        self.closed = 0

        @self.app.method("count")
        async def count(n: int, size: int = 0, pause: float = 0.0) -> AsyncIterator[Any]:
            try:
                for number in range(n):
                    self.made += 1
                    yield [number, bytes(size)]
                    if pause:
                        await asyncio.sleep(pause)
                yield Ended({"sent": n})
            finally:
                self.closed += 1

        @self.app.method("fail")
        async def fail() -> AsyncIterator[int]:
            for number in range(3):
                yield number
            raise NotFound("no such thing")

        @self.app.method("add")
        def add(a: int, b: int) -> int:
            return a + b


@pytest.fixture
def methods() -> Methods:
    return Methods()


@pytest.fixture
def server(serve: Serve, methods: Methods) -> ServerThread:
    return serve(methods.app)


@pytest.fixture
async def client(server: ServerThread, connect_to: ConnectTo) -> AsyncIterator[Client]:
    async with connect_to(server) as client:
        yield client


async def test_stream_yields_items_in_order_and_then_its_result(client: Client) -> None:
    async with client.stream("count", n=2_000, window=(7, 1_000)) as stream:
        got = [number async for number, _ in stream]
    assert got == [*range(2_000)]
    assert stream.result == {"sent": 2_000}


async def test_large_items_pass_a_small_window(client: Client) -> None:
    stream = client.stream("count", n=50, size=60_000, window=(10, 1))
    assert [len(data) async for _, data in stream] == [60_000] * 50


async def test_server_makes_only_what_the_window_allows(methods: Methods, client: Client) -> None:
    async with client.stream("count", n=1_000, window=(4, 100_000)) as stream:
        assert (await stream.receive())[0] == 0
        await client.call("add", a=1, b=2)
        assert methods.made <= 5


async def test_leaving_early_cancels_the_method(
    server: ServerThread, methods: Methods, client: Client
) -> None:
    async with client.stream("count", n=1_000, pause=0.001) as stream:
        async for number, _ in stream:
            if number == 3:
                break
    await client.call("add", a=1, b=2)
    server.until(lambda: methods.closed == 1)
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.result


async def test_break_out_of_the_short_form_cancels_the_method(
    server: ServerThread, methods: Methods, client: Client
) -> None:
    async for number, _ in client.stream("count", n=1_000, pause=0.001):
        if number == 3:
            break
    gc.collect()
    await asyncio.sleep(0)
    await client.call("add", a=1, b=2)
    server.until(lambda: methods.closed == 1)


async def test_error_comes_after_the_items(client: Client) -> None:
    async with client.stream("fail") as stream:
        assert [await stream.receive() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(NotFound):
            await stream.receive()


async def test_method_of_another_shape_is_refused_with_the_cure(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    async with connect_to(server) as client:
        with pytest.raises(FailedPrecondition, match="this method is not a stream; call it"):
            _ = [item async for item in client.stream("add", a=1, b=2)]
        with pytest.raises(FailedPrecondition, match="this method is a stream; open it with stream"):
            await client.call("count", n=1)
        shapes = {each["name"]: each["shape"] for each in (await client.call("server.info"))["methods"]}
        assert (shapes["count"], shapes["add"]) == ("server", "unary")


async def test_server_without_streams_is_unimplemented(
    serve: Serve, methods: Methods, connect_to: ConnectTo
) -> None:
    server = serve(methods.app, streams__max_open=0)

    async with connect_to(server) as client:
        with pytest.raises(Unimplemented):
            async with client.stream("count", n=1):
                pass


async def test_item_timeout_leaves_the_stream(server: ServerThread, methods: Methods, client: Client) -> None:
    async def use() -> None:
        async with client.stream("count", n=3, pause=3_600.0, item_timeout=0.5) as stream:
            await asyncio.to_thread(eventually, lambda: methods.made)
            async for _ in stream:
                pass

    with pytest.raises(DeadlineExceeded):
        await use()
    await client.call("add", a=1, b=2)
    server.until(lambda: methods.closed == 1)


async def test_timeout_of_the_whole_stream(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        async for _ in client.stream("count", n=3, pause=3_600.0, timeout=0.2):
            pass


async def test_second_task_that_iterates_fails(client: Client) -> None:
    async with client.stream("count", n=3, pause=3_600.0) as stream:
        await stream.receive()
        first = asyncio.ensure_future(stream.receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await stream.receive()
        first.cancel()


async def test_revoked_session_cuts_the_stream(
    server: ServerThread, methods: Methods, connect_to: ConnectTo, client: Client
) -> None:
    async with connect_to(server) as other, client.stream("count", n=3, pause=3_600.0) as stream:
        await stream.receive()
        assert client.session is not None
        await other.call("session.revoke", id=client.session.id)
        with pytest.raises(Cancelled) as caught:
            await stream.receive()
        assert caught.value.details == {"reason": "token_revoked"}


async def test_closed_session_ends_the_stream_after_its_items(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    client = await connect_to(server)
    async with client.stream("count", n=3, pause=3_600.0) as stream:
        await client.call("add", a=1, b=2)
        await client.close()
        assert (await stream.receive())[0] == 0
        with pytest.raises((Cancelled, ConnectionClosed)):
            await stream.receive()


def test_blocking_stream_yields_items_and_leaves_early(
    server: ServerThread, methods: Methods, blocking: Blocking
) -> None:
    with blocking(server) as client:
        with client.stream("count", n=100, window=(3, 1_000)) as stream:
            assert [number for number, _ in stream] == [*range(100)]
            assert stream.result == {"sent": 100}
        for number, _ in client.stream("count", n=1_000, pause=0.001):
            if number == 3:
                break
        gc.collect()
        client.call("add", a=1, b=2)
        server.until(lambda: methods.closed == 2)
