"""The network between a server in memory and its clients, which a test cuts, holds, delays and throttles.

    protocol -> MemoryTransport -> in flight, as long as the link says -> the other MemoryTransport -> protocol

Rules: bytes keep their order. A transport whose bytes are not taken pauses its protocol, as TCP does. Times are
those of the event loop, which a MovableClock moves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from math import inf
from typing import Final, Literal

from zcproto.errors import TlsError
from zcproto.tls.failure import TlsFailure
from zcproto.tls.transport import LINGER_TIME

Direction = Literal["to_server", "from_server"]

HIGH_WATER: Final = 65_536
SLICE_S: Final = 0.02
"""Seconds after which a throttled link delivers what has arrived."""


class Link:
    """The network between the clients of a test and its server.

        link = Link(delay=0.05)
        async with connect_in_memory(app, user="ada", link=link) as client:
            link.cut()

    `delay` is the seconds that bytes take each way, `bytes_per_second` the most that each connection carries each
    way; None is unlimited. Both may be changed at any time, for what is sent from then on. `accepted` counts
    connections.
    """

    def __init__(self, *, delay: float = 0.0, bytes_per_second: float | None = None) -> None:
        self.delay = delay
        self.bytes_per_second = bytes_per_second
        self.accepted = 0
        self.is_down = False
        self.held: set[Direction] = set()
        self._open: set[MemoryTransport] = set()

    def hold(self, *directions: Direction) -> None:
        """Keep back the bytes of these directions, by default of both, until `release`: packets are lost."""
        self.held.update(directions or ("to_server", "from_server"))

    def release(self) -> None:
        """Deliver what was held."""
        self.held.clear()
        for transport in self._open:
            transport.plan_delivery()

    def cut(self) -> None:
        """Reset all connections; bytes in flight are lost. Clients may connect again at once."""
        for transport in list(self._open):
            transport.lose(TlsFailure.CONNECTION_RESET)

    def isolate(self) -> None:
        """Reset all connections and refuse new ones, until `restore`."""
        self.is_down = True
        self.cut()

    def restore(self) -> None:
        """Accept connections again."""
        self.is_down = False

    def join(self, client: asyncio.Protocol, server: asyncio.Protocol) -> None:
        """Connect the two ends of a connection."""
        self.accepted += 1
        to_server, from_server = MemoryTransport(self, "to_server"), MemoryTransport(self, "from_server")
        self._open |= {to_server, from_server}
        to_server.connect(client, from_server)
        from_server.connect(server, to_server)


class MemoryTransport(asyncio.Transport):
    """One end of a connection in memory, with what a server asks its TLS transport for."""

    peer = "127.0.0.1"

    def __init__(self, link: Link, direction: Direction) -> None:
        super().__init__()
        self._link = link
        self._direction = direction
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol | None = None
        self._other = self
        self._queue: deque[tuple[float, bytes | None]] = deque()  # times of arrival, and data or the end
        self._size = 0
        self._high = HIGH_WATER
        self._arrives = -inf  # when the last byte does
        self._timer: asyncio.Handle | None = None
        self._linger: asyncio.Handle | None = None
        self._is_closing = self._is_full = False
        self._is_reading = True

    def connect(self, protocol: asyncio.Protocol, other: MemoryTransport) -> None:
        """Begin, with the transport of the peer."""
        self._protocol, self._other = protocol, other
        protocol.connection_made(self)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing:
            return
        rate = self._link.bytes_per_second
        self._arrives = max(self._loop.time() + self._link.delay, self._arrives)
        step = max(1, len(data) if rate is None else int(rate * SLICE_S))
        for start in range(0, len(data), step):
            piece = bytes(data[start : start + step])
            if rate is not None:
                self._arrives += len(piece) / rate
            self._queue.append((self._arrives, piece))
        self._size += len(data)
        if not self._is_full and self._size > self._high:
            self._is_full = True
            assert self._protocol is not None, "it has just written"
            self._protocol.pause_writing()
        self.plan_delivery()

    def get_write_buffer_size(self) -> int:
        return self._size

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = self._high if high is None else high

    def pause_reading(self) -> None:
        self._is_reading = self._is_closing  # what arrives then is discarded

    def resume_reading(self) -> None:
        self._is_reading = True
        self._other.plan_delivery()

    def close(self) -> None:
        """Send the end after what was written, and wait for the peer's."""
        if not self._is_closing:
            self._is_closing = True
            self._queue.append((max(self._loop.time() + self._link.delay, self._arrives), None))
            self._linger = self._loop.call_later(LINGER_TIME, self.abort)
            self.plan_delivery()
            self.resume_reading()

    def abort(self) -> None:
        self._other.lose(TlsFailure.CONNECTION_RESET)
        self.lose(None)

    def leaves(self) -> frozenset[bytes]:
        """Return the certificates of the server, which it does not need in memory."""
        return frozenset()

    def peer_certificate(self) -> None:
        """Return no certificate."""

    @property
    def _may_deliver(self) -> bool:
        return bool(self._queue) and self._other._is_reading and self._direction not in self._link.held

    def plan_delivery(self) -> None:
        """Deliver the next bytes to the other end when they arrive, if they may."""
        if self._timer is None and self._may_deliver:
            arrives = self._queue[0][0]
            if arrives <= self._loop.time():
                self._timer = self._loop.call_soon(self._deliver)
            else:
                self._timer = self._loop.call_at(arrives, self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._may_deliver and self._queue[0][0] <= now:
            data = self._queue.popleft()[1]
            if data is None:
                self._other._end_received()
                return
            self._size -= len(data)
            if not self._other._is_closing and self._other._protocol is not None:
                self._other._protocol.data_received(data)
        if self._is_full and self._size <= self._high // 4:
            self._is_full = False
            if self._protocol is not None and not self._is_closing:
                self._protocol.resume_writing()
        self.plan_delivery()

    def _end_received(self) -> None:
        if self._protocol is not None and not self._is_closing:
            self._protocol.eof_received()
            self.close()
        self._finish(None)

    def lose(self, failure: TlsFailure | None) -> None:
        """End this end at once, for a failure of the network or None. What it has sent is lost. Idempotent."""
        self._queue.clear()
        self._finish(None if failure is None else TlsError(failure.value))

    def _finish(self, error: TlsError | None) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is None:
            return
        self._is_closing = self._is_reading = True
        self._link._open.discard(self)
        if self._linger is not None:
            self._linger.cancel()
        self._loop.call_soon(protocol.connection_lost, error)
