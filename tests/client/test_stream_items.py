"""Items of a real client for methods of a real server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App, Items
from zcproto.client.client import Client
from zcproto.client.streams import Stream
from zcproto.common.parameters import Ended
from zcproto.errors import InvalidArgument, NotFound


class Methods:
    """An application that takes items, and what happened in it."""

    def __init__(self) -> None:
        self.app = App()
        self.cancelled = 0

        @self.app.method("upload")
        async def upload(chunks: Items[bytes], most: int = 1_000_000) -> list[int]:
            count = size = 0
            async for chunk in chunks:
                count, size = count + 1, size + len(chunk)
                if count == most:
                    break
            return [count, size]

        @self.app.method("chat")
        async def chat(said: Items[str]) -> AsyncIterator[str | Ended[str]]:
            async for text in said:
                yield text.upper()
            yield Ended("bye")

        @self.app.method("deaf")
        async def deaf(said: Items[str]) -> None:
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        @self.app.method("refuse")
        async def refuse(said: Items[str]) -> None:
            await anext(said)
            raise NotFound("no such thing")


class Source:
    """Items of an application, which records what was taken from it."""

    def __init__(self, count: int, *, then_wait: bool = False, error: Exception | None = None) -> None:
        self.taken = 0
        self.closed = False
        self._count, self._then_wait, self._error = count, then_wait, error

    async def chunks(self, size: int = 1) -> AsyncIterator[bytes]:
        try:
            for _ in range(self._count):
                self.taken += 1
                yield bytes(size)
            if self._then_wait:
                await asyncio.sleep(3_600)
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


async def send_for_ever(stream: Stream, item: Any) -> None:
    while True:
        await stream.send(item)


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


async def test_items_are_sent_and_the_result_comes_back(client: Client) -> None:
    source = Source(1_000)
    async with client.stream("upload", items=source.chunks(5_000)) as stream:
        assert await stream.finished() == [1_000, 5_000_000]
    assert source.closed
    async with client.stream("upload", items=[b"a", b"bc"]) as stream:
        assert await stream.finished() == [2, 3]
    async with client.stream("upload", items=[]) as stream:
        assert await stream.finished() == [0, 0]


async def test_nothing_is_taken_before_the_method_wants_it(
    server: ServerThread, methods: Methods, client: Client
) -> None:
    source = Source(10)
    async with client.stream("deaf", items=source.chunks()):
        await client.call("server.info")
        assert source.taken == 0
    await client.call("server.info")
    server.until(lambda: methods.cancelled == 1)


async def test_leaving_a_stream_ends_the_source_of_its_items(server: ServerThread, client: Client) -> None:
    source = Source(1, then_wait=True)
    async with client.stream("upload", items=source.chunks()):
        while not source.taken:
            await client.call("server.info")
    assert source.closed


async def test_both_sides_send_in_turn(client: Client) -> None:
    async with client.stream("chat") as stream:
        for word in ("hello", "there"):
            await stream.send(word)
            assert await stream.receive() == word.upper()
        await stream.end()
        await stream.end()
        with pytest.raises(RuntimeError, match="have ended"):
            await stream.send("more")
        with pytest.raises(EOFError):
            await stream.receive()
        assert stream.result == "bye"


async def test_finished_discards_the_items_of_the_method(client: Client) -> None:
    async with client.stream("chat") as stream:
        await stream.send("hello")
        assert await stream.finished() == "bye"


async def test_method_that_returns_early_closes_the_source(client: Client) -> None:
    source = Source(3, then_wait=True)
    async with client.stream("upload", most=3, items=source.chunks()) as stream:
        assert await stream.finished() == [3, 3]
        await asyncio.sleep(0)
        assert source.closed
    async with client.stream("upload", most=1) as stream:
        await stream.send(b"x")
        with pytest.raises(EOFError):
            await send_for_ever(stream, b"x")
        assert await stream.finished() == [1, 1]


async def test_error_of_the_method_reaches_the_sender(client: Client) -> None:
    async with client.stream("refuse") as stream:
        with pytest.raises(NotFound):
            await send_for_ever(stream, "x")
    source = Source(3, then_wait=True)
    async with client.stream("refuse", items=source.chunks()) as stream:
        with pytest.raises(InvalidArgument) as caught:  # bytes are not str
            await stream.finished()
        assert caught.value.details["item"] == 0


async def test_error_of_the_source_fails_the_stream_and_cancels_the_method(client: Client) -> None:
    source = Source(3, error=OSError("the disk is full"))
    async with client.stream("upload", items=source.chunks()) as stream:
        with pytest.raises(OSError, match="disk"):
            await stream.finished()


async def test_item_that_cannot_be_sent_is_refused_and_the_stream_goes_on(client: Client) -> None:
    async with client.stream("upload") as stream:
        await stream.send(b"x")
        for item in (object(), bytes(70_000)):
            with pytest.raises(InvalidArgument):
                await stream.send(item)
        assert await stream.finished() == [1, 1]
    with pytest.raises(InvalidArgument):
        async with client.stream("upload", items=[object()]) as stream:
            await stream.finished()


async def test_one_task_sends_at_a_time(client: Client) -> None:
    async with client.stream("deaf") as stream:
        first = asyncio.ensure_future(stream.send("x"))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task"):
            await stream.send("y")
        stream.close()
        with pytest.raises(RuntimeError, match="closed"):
            await first
    async with client.stream("deaf", items=["x"]) as stream:
        with pytest.raises(RuntimeError, match="another task"):
            await stream.send("y")


def test_blocking_client_sends_items(server: ServerThread, blocking: Blocking) -> None:
    def chunks() -> Iterator[Any]:
        for _ in range(100):
            yield bytes(1_000)

    with blocking(server) as client:
        with client.stream("upload", items=chunks()) as stream:
            assert stream.finished() == [100, 100_000]
        with client.stream("chat") as stream:
            stream.send("hello")
            assert stream.receive() == "HELLO"
            stream.end()
            assert list(stream) == []
            assert stream.result == "bye"


def test_items_that_block_hold_up_neither_the_stream_nor_the_client(
    server: ServerThread, blocking: Blocking
) -> None:
    is_asked, go_on, is_closed = threading.Event(), threading.Event(), threading.Event()

    def chunks() -> Iterator[bytes]:
        try:
            is_asked.set()
            go_on.wait(TIMEOUT)
            yield b"late"
        finally:
            is_closed.set()

    with (
        blocking(server) as client,
        client.stream("upload", items=chunks()),
    ):
        assert is_asked.wait(TIMEOUT)
        client.call("server.info")
    go_on.set()
    assert is_closed.wait(TIMEOUT)


def test_error_of_items_that_block_fails_the_stream(server: ServerThread, blocking: Blocking) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"
        raise OSError("the disk is full")

    with (
        blocking(server) as client,
        client.stream("upload", items=chunks()) as stream,
        pytest.raises(OSError, match="disk"),
    ):
        stream.finished()
