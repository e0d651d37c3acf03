"""Hold MockTransport against a transport of asyncio: the same calls have the same effects on a protocol."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.helpers import FakeTimers, MockTransport, until

MUCH = bytes(8 << 20)
"""More than the buffers of a socket take."""


class Recorder(asyncio.BufferedProtocol):
    """Records what its transport calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.received = b""
        self._buffer = bytearray(65_536)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.received += self._buffer[:count]

    def pause_writing(self) -> None:
        self.calls.append("paused")

    def resume_writing(self) -> None:
        self.calls.append("resumed")

    def connection_lost(self, error: Exception | None) -> None:
        self.calls.append(("lost", error))


class MockPeer:
    def __init__(self, recorder: Recorder) -> None:
        self.timers = FakeTimers()
        self.transport = MockTransport(self.timers)
        self.transport.connect(recorder)
        self.transport.stuck = True

    async def send(self, data: bytes) -> None:
        self.transport.deliver(data)

    async def read(self, size: int) -> None:
        assert len(self.transport.take()) == size
        self.transport.drain()

    async def turn(self) -> None:
        self.timers.run()


class SocketPeer:
    def __init__(self, transport: asyncio.Transport, other: socket.socket) -> None:
        self.transport, self._other, self._loop = transport, other, asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._other, data)

    async def read(self, size: int) -> None:
        while size:
            size -= len(await self._loop.sock_recv(self._other, size))

    async def turn(self) -> None:
        await asyncio.sleep(0)


@asynccontextmanager
async def peer_of(kind: str, recorder: Recorder) -> AsyncIterator[MockPeer | SocketPeer]:
    if kind == "mock":
        yield MockPeer(recorder)
        return
    own, other = socket.socketpair()
    other.setblocking(False)
    with other:
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: recorder, sock=own)
        yield SocketPeer(transport, other)


@pytest.mark.parametrize("kind", ["mock", "socket"])
async def test_transport_reads_pauses_and_closes(kind: str) -> None:
    recorder = Recorder()
    async with peer_of(kind, recorder) as peer:
        transport = peer.transport
        await peer.send(b"abc")
        await until(lambda: recorder.received == b"abc")
        transport.set_write_buffer_limits(high=1_000)
        assert transport.get_write_buffer_size() == 0
        transport.write(MUCH)
        assert transport.get_write_buffer_size() > 1_000
        assert recorder.calls == ["made", "paused"]
        await peer.read(len(MUCH))
        await until(lambda: recorder.calls == ["made", "paused", "resumed"])
        assert transport.get_write_buffer_size() == 0
        transport.pause_reading()
        assert not transport.is_reading()
        transport.resume_reading()
        assert transport.is_reading()
        transport.close()
        transport.write(b"too late")
        assert transport.is_closing()
        assert recorder.calls[3:] == [], "the end is reported in a later turn"
        await peer.turn()
        await until(lambda: recorder.calls[3:] == [("lost", None)])
        transport.abort()
        await peer.turn()
        assert len(recorder.calls) == 4
