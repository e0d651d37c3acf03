"""Faults of the network in memory, by a real client and server."""

from __future__ import annotations

import asyncio

import pytest

import zcproto
from zcproto import App
from zcproto.testing import Link, MemoryServer, MovableClock, connect_in_memory
from zcproto.testing.link import HIGH_WATER


@pytest.fixture
def app() -> App:
    app = App()
    app.calls = []  # type: ignore[attr-defined]

    @app.method("add")
    def add(number: int) -> int:
        app.calls.append(number)  # type: ignore[attr-defined]
        return len(app.calls)  # type: ignore[attr-defined]

    @app.method("take")
    def take(data: bytes) -> int:
        return len(data)

    @app.method("give")
    def give(size: int) -> bytes:
        return bytes(size)

    return app


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.usefixtures("stopped_time")
async def test_cut_link_fails_the_call_and_the_next_one_reconnects(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.hold()
        call = asyncio.create_task(client.call("add", number=1))
        await turns()
        link.cut()
        link.release()
        with pytest.raises(zcproto.ConnectionClosed):
            await call
        clock.advance(5)
        assert await client.call("add", number=2) == 1
        assert link.accepted == 2


@pytest.mark.usefixtures("stopped_time")
async def test_lost_answer_is_repeated_by_the_idempotency_key(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.hold("from_server")
        call = asyncio.create_task(client.call("add", number=1, idempotency_key="once"))
        await turns()
        assert app.calls == [1]  # type: ignore[attr-defined]
        link.cut()
        link.release()
        await turns()
        clock.advance(5)
        assert await call == 1
    assert app.calls == [1]  # type: ignore[attr-defined]


async def test_request_held_on_its_way_does_not_run(app: App) -> None:
    link = Link()
    async with connect_in_memory(app, user="ada", link=link) as client:
        link.hold("to_server")
        call = asyncio.create_task(client.call("add", number=1))
        await turns()
        assert app.calls == []  # type: ignore[attr-defined]
        link.release()
        assert await call == 1


@pytest.mark.usefixtures("stopped_time")
async def test_isolated_link_refuses_connections_until_it_is_restored(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.isolate()
        await turns()
        call = asyncio.create_task(client.call("add", number=1, timeout=10))
        await turns()
        clock.advance(10)
        with pytest.raises(zcproto.DeadlineExceeded):
            await call
        link.restore()
        clock.advance(5)
        assert await client.call("add", number=2) == 1


async def test_new_client_is_refused_while_the_link_is_isolated(app: App) -> None:
    link = Link()
    async with MemoryServer(app, link=link) as server:
        link.isolate()
        with pytest.raises(zcproto.CannotConnect, match="the test has isolated its link"):
            await server.connect("ada").open()
        link.restore()
        async with server.connect("ada"):
            pass
    with pytest.raises(zcproto.CannotConnect, match="the server has ended"):
        await server.connect("ada").open()


async def test_cancelled_attempt_to_connect_leaves_no_connection(app: App) -> None:
    link = Link()
    async with MemoryServer(app, link=link) as server:
        link.hold()
        opening = asyncio.create_task(server.connect("ada").open())
        await turns()
        assert link.accepted == 1
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await turns()
        assert not link._open


@pytest.mark.usefixtures("stopped_time")
async def test_server_ends_the_connection_of_a_client_that_takes_no_answers(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.hold("from_server")
        calls = [asyncio.create_task(client.call("give", size=900_000)) for _ in range(4)]
        await turns()
        clock.advance(25)  # longer than limits.write_timeout, shorter than the timeout of the calls
        await turns()
        link.release()
        for ended in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(ended, zcproto.ConnectionClosed)


@pytest.mark.usefixtures("stopped_time")
async def test_delay_passes_with_the_clock(app: App) -> None:
    link, clock = Link(delay=100.0), MovableClock()
    link.delay = 0.0
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.delay = 5.0
        call = asyncio.create_task(client.call("add", number=1))
        await turns()
        clock.advance(4.9)
        await turns()
        assert app.calls == []  # type: ignore[attr-defined]
        clock.advance(0.2)
        await turns()
        assert app.calls == [1]  # type: ignore[attr-defined]
        assert not call.done()
        clock.advance(5.0)
        assert await call == 1
        link.delay = 0.0


@pytest.mark.usefixtures("stopped_time")
async def test_throttled_link_delivers_piece_by_piece(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.bytes_per_second = 10_000
        call = asyncio.create_task(client.call("take", data=bytes(100_000), timeout=60))
        await turns()
        clock.advance(9.0)
        await turns()
        assert not call.done()
        link.bytes_per_second = None
        while not call.done():  # what was paused is sent then
            clock.advance(1.2)
            await turns()
        assert await call == 100_000


@pytest.mark.usefixtures("stopped_time")
async def test_close_of_a_client_ends_although_the_link_is_held(app: App) -> None:
    link, clock = Link(), MovableClock()
    async with connect_in_memory(app, user="ada", link=link, clock=clock) as client:
        link.hold()
        closing = asyncio.create_task(client.close())
        for _ in range(
            2
        ):  # until the session's end is not answered, and until the server does not close its end
            await turns()
            assert not closing.done()
            clock.advance(5)
        await closing


# --- one end alone -----------------------------------------------------------------------------------------


class Recorder(asyncio.Protocol):
    """Records what an end of a connection receives."""

    def __init__(self) -> None:
        self.received: list[object] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def eof_received(self) -> None:
        self.received.append("end")

    def connection_lost(self, error: Exception | None) -> None:
        self.received.append(error)


def joined(link: Link) -> tuple[Recorder, Recorder]:
    client, server = Recorder(), Recorder()
    link.join(client, server)
    return client, server


async def test_end_that_closes_sends_its_end_once_after_its_bytes_and_nothing_more() -> None:
    client, server = joined(Link())
    client.transport.write(b"first")
    client.transport.close()
    client.transport.close()
    client.transport.write(b"later")
    await turns()
    assert server.received == [b"first", "end", None]
    assert client.received == [None]


async def test_closing_end_receives_nothing_more() -> None:
    client, server = joined(Link())
    server.transport.write(b"on its way")
    client.transport.close()
    await turns()
    assert client.received == [None]
    assert server.received == ["end", None]


@pytest.mark.usefixtures("stopped_time")
async def test_end_of_a_connection_takes_the_delay_of_the_link() -> None:
    clock = MovableClock()
    with clock.drive(asyncio.get_running_loop()):
        client, server = joined(Link(delay=1.0))
        client.transport.close()
        clock.advance(0.9)
        await turns()
        assert server.received == []
        clock.advance(0.2)
        await turns()
        assert server.received == ["end", None]


async def test_lost_end_is_closed_and_discards_what_arrives() -> None:
    link = Link()
    client, server = joined(link)
    server.transport.write(b"lost")
    link.cut()
    await turns()
    (error,) = client.received
    assert isinstance(error, zcproto.TlsError)
    client.transport.write(bytes(2 * HIGH_WATER))  # would pause a protocol
    await turns()
    assert len(server.received) == 1
