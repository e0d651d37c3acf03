"""Durable streams: a client goes on where it stopped, over reconnects and restarts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.server.conftest import Serve
from zcproto.app.app import App
from zcproto.client.client import Client
from zcproto.common.parameters import Ended
from zcproto.errors import (
    CallError,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    Unimplemented,
)
from zcproto.testing import Link, MemoryServer


class Methods:
    """An application with a durable method, and how often it ran."""

    def __init__(self) -> None:
        self.app = App()
        self.started = self.closed = 0
        self.may_end = asyncio.Event()

        @self.app.method("count", durable=True)
        async def count(n: int, hold_at: int = -1) -> AsyncIterator[int | Ended[str]]:
            self.started += 1
            try:
                for number in range(n):
                    if number == hold_at:
                        await self.may_end.wait()
                    yield number
                yield Ended("done")
            finally:
                self.closed += 1

        @self.app.method("fail", durable=True)
        async def fail() -> AsyncIterator[int]:
            yield 0
            raise DataLoss("no more")

        @self.app.method("plain")
        async def plain() -> AsyncIterator[int]:
            yield 0


@pytest.fixture
def methods() -> Methods:
    return Methods()


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
async def server(methods: Methods, link: Link) -> AsyncIterator[MemoryServer]:
    async with MemoryServer(methods.app, link=link) as server:
        yield server


@pytest.fixture
async def client(server: MemoryServer) -> AsyncIterator[Client]:
    async with server.connect("ada") as client:
        yield client


async def take(stream: Any, count: int) -> list[Any]:
    return [await stream.receive() for _ in range(count)]


@pytest.mark.parametrize("window", [(64, 262_144), (1, 1)], ids=["wide", "narrow"])
async def test_cut_connections_leave_no_gap_and_no_repeat(
    client: Client, methods: Methods, link: Link, window: tuple[int, int]
) -> None:
    got = []
    async with client.stream("count", n=200, durable=True, window=window) as stream:
        async for number in stream:
            got.append(number)
            if number % 50 == 25:
                link.cut()
    assert got == [*range(200)]
    assert (stream.result, stream.position, methods.started) == ("done", 200, 1)


async def test_leaving_detaches_and_resume_continues_after_the_position(
    client: Client, methods: Methods
) -> None:
    async with client.stream("count", n=10, hold_at=6, durable=True) as stream:
        assert await take(stream, 4) == [0, 1, 2, 3]
    assert stream.id is not None
    (run,) = await client.durable_streams()
    assert (run["id"], run["method"], run["state"], methods.closed) == (stream.id, "count", "running", 0)
    methods.may_end.set()
    async with client.resume(stream.id, after=stream.position) as again:
        assert [number async for number in again] == [4, 5, 6, 7, 8, 9]
    assert (again.result, methods.started) == ("done", 1)


async def test_cancel_ends_the_method(client: Client, methods: Methods) -> None:
    async with client.stream("count", n=10, hold_at=2, durable=True) as stream:
        await take(stream, 2)
        assert await stream.cancel()
        with pytest.raises(Cancelled) as caught:
            await stream.receive()
        assert caught.value.details["reason"] == "caller"
        assert not await stream.cancel()
    assert methods.closed == 1


async def test_of_two_readers_the_newest_wins(server: MemoryServer, client: Client, methods: Methods) -> None:
    async with client.stream("count", n=6, hold_at=3, durable=True) as stream:
        await take(stream, 3)
        assert stream.id is not None
        async with server.connect("ada") as other, other.resume(stream.id) as second:
            assert await take(second, 3) == [0, 1, 2]
            with pytest.raises(Cancelled) as caught:
                await stream.receive()
            assert caught.value.details["reason"] == "resumed_elsewhere"
            methods.may_end.set()
            assert [number async for number in second] == [3, 4, 5]


@pytest.mark.parametrize(
    ("after", "error"), [(7, OutOfRange), (6, None)], ids=["behind the end", "at the end"]
)
async def test_resume_at_the_bounds_of_what_is_kept(
    client: Client, after: int, error: type[CallError] | None
) -> None:
    async with client.stream("count", n=6, durable=True) as stream:
        assert await stream.finished() == "done"
    assert stream.id is not None
    resumed = client.resume(stream.id, method="count", after=after)
    if error is None:
        assert [number async for number in resumed] == []
    else:
        with pytest.raises(error):
            await take_all(resumed)


async def take_all(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest.mark.parametrize("method", ["", "count"])
async def test_resume_of_an_unknown_id_is_not_found(client: Client, method: str) -> None:
    with pytest.raises(NotFound):
        await take_all(client.resume("A" * 22, method=method))


async def test_run_of_another_user_is_not_found(server: MemoryServer, client: Client) -> None:
    async with client.stream("count", n=6, durable=True) as stream:
        await stream.finished()
    assert stream.id is not None
    async with server.connect("eve") as eve:
        assert await eve.durable_streams() == []
        with pytest.raises(NotFound):
            await take_all(eve.resume(stream.id, method="count"))


async def test_error_of_the_method_is_raised_after_its_items(client: Client) -> None:
    async with client.stream("fail", durable=True) as stream:
        assert await stream.receive() == 0
        with pytest.raises(DataLoss, match="no more"):
            await stream.receive()


async def test_plain_method_cannot_be_opened_durably(client: Client) -> None:
    with pytest.raises(FailedPrecondition, match="not durable"):
        await take_all(client.stream("plain", durable=True))


async def test_server_without_durable_streams_is_unimplemented() -> None:
    app = App()

    @app.method("plain")
    async def plain() -> AsyncIterator[int]:
        yield 0

    async with MemoryServer(app) as server, server.connect("ada") as client:
        with pytest.raises(Unimplemented, match="no durable streams"):
            await take_all(client.stream("plain", durable=True))


@pytest.mark.parametrize("option", [{"items": [1]}, {"reopen": lambda _: {}}], ids=["items", "reopen"])
async def test_durable_stream_takes_neither_items_nor_reopen(client: Client, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="resumes by itself"):
        client.stream("count", n=1, durable=True, **option)


async def test_plain_stream_has_no_id_and_no_position(client: Client) -> None:
    stream = client.stream("plain")
    assert (stream.id, stream.position) == (None, None)
    with pytest.raises(RuntimeError, match="leave a stream"):
        await stream.cancel()


async def test_restarted_client_continues_from_its_session_file(
    server: MemoryServer, methods: Methods, tmp_path: Path
) -> None:
    path = tmp_path / "session.json"
    async with (
        server.connect("ada", session_file=path) as client,
        client.stream("count", n=10, hold_at=6, durable=True) as stream,
    ):
        await take(stream, 4)
    kept = json.loads((tmp_path / "session.json.streams").read_text())
    assert kept["streams"] == {stream.id: 4}
    methods.may_end.set()
    async with server.connect("ada", session_file=path) as client:
        (run,) = await client.durable_streams()
        assert await take_all(client.resume(run["id"])) == [4, 5, 6, 7, 8, 9]
    assert methods.started == 1


async def test_item_whose_processing_failed_is_repeated_after_a_restart(
    server: MemoryServer, tmp_path: Path
) -> None:
    path = tmp_path / "session.json"
    async with server.connect("ada", session_file=path) as client:
        stream = client.stream("count", n=3, durable=True)

        async def process() -> None:
            async with stream:
                async for number in stream:
                    _ = 1 // (1 - number)

        with pytest.raises(ZeroDivisionError):
            await process()
    assert stream.id is not None
    async with server.connect("ada", session_file=path) as client:
        assert await take_all(client.resume(stream.id)) == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"streams": {"a": -1, "b": "c"}}'])
async def test_damaged_positions_count_as_none(server: MemoryServer, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "session.json.streams"
    file.write_bytes(content)
    file.chmod(0o600)
    async with server.connect("ada", session_file=tmp_path / "session.json") as client:
        async with client.stream("count", n=3, durable=True) as stream:
            await stream.finished()
        assert stream.id is not None
    assert json.loads(file.read_text())["streams"][stream.id] == 3


async def test_cut_tls_connections_leave_no_gap_and_no_repeat(
    serve: Serve, methods: Methods, connect_to: ConnectTo, tmp_path: Path
) -> None:
    server, cuts, got = serve(methods.app), 0, []
    async with (
        connect_to(server, session_file=tmp_path / "session.json") as client,
        client.stream("count", n=120, durable=True, window=(4, 262_144)) as stream,
    ):
        async for number in stream:
            got.append(number)
            connection = client._connections.current
            if number % 20 == 10 and connection is not None:
                connection.abort()
                cuts += 1
    assert got == [*range(120)]
    assert (stream.result, methods.started, cuts) == ("done", 1, 6)


def test_blocking_client_resumes_and_cancels(serve: Serve, methods: Methods, blocking: Blocking) -> None:
    server = serve(methods.app)
    with blocking(server) as client:
        with client.stream("count", n=10, hold_at=4, durable=True) as stream:
            assert [stream.receive() for _ in range(3)] == [0, 1, 2]
        assert stream.id is not None
        assert [run["id"] for run in client.durable_streams()] == [stream.id]
        with client.resume(stream.id, after=stream.position) as again:
            assert (again.receive(), again.position) == (3, 4)
            assert again.cancel()
            with pytest.raises(Cancelled):
                again.receive()
        assert not again.cancel()
    server.until(lambda: methods.closed == 1)
