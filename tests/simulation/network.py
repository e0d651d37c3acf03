"""The network: connections in memory between the loops of two processes. TLS is left out.

Bytes keep their order on a connection and arrive after a delay from the seed. A link is the way between two
machines: it can be cut, and held, as when packets are lost and sent again. A receiver that does not read lets the
sender's buffer fill, as TCP does.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable
from random import Random

from tests.simulation.loop import SimulatedLoop
from zcproto.errors import TlsError
from zcproto.tls.failure import TlsFailure
from zcproto.tls.transport import LINGER_TIME

DELAY_S = 2e-4, 5e-3
HIGH_WATER = 65_536

Accept = Callable[[], asyncio.Protocol]
"""Returns the protocol of a new connection. Raises ConnectionRefusedError if the process does not accept any."""


class Network:
    """All connections. `random_of` returns the random numbers of one."""

    def __init__(self, random_of: Callable[[str], Random]) -> None:
        self._random_of = random_of
        self._connections: dict[int, tuple[End, End]] = {}
        self._number = 0
        self.held_until: dict[frozenset[str], float] = {}
        """Links that carry nothing until a time."""

    def connect(
        self, client: tuple[SimulatedLoop, asyncio.Protocol], server: tuple[SimulatedLoop, Accept]
    ) -> None:
        """Join two processes. The caller is the client; the server makes its protocol a moment later."""
        self._number += 1
        random = self._random_of(f"connection {self._number}")
        link = frozenset((client[0].name, server[0].name))
        near, far = (
            End(self, self._number, link, client[0].name, each[0], random) for each in (client, server)
        )
        near.peer_end, far.peer_end = far, near
        self._connections[self._number] = near, far
        near.begin(lambda: client[1])
        far.arrive(random.uniform(*DELAY_S), far.begin, server[1])

    def forget(self, number: int) -> None:
        ends = self._connections.get(number)
        if ends is not None and all(each.is_lost for each in ends):
            del self._connections[number]

    def between(self, *names: str) -> list[tuple[End, End]]:
        """Return the connections of these processes, the oldest first."""
        return [ends for ends in self._connections.values() if ends[0].link.issuperset(names)]

    def cut(self, *names: str) -> None:
        """Reset the connections of these processes. What is in flight is lost."""
        for ends in self.between(*names):
            for end in ends:
                end.lose(TlsFailure.CONNECTION_RESET)

    def crashed(self, name: str, *, is_silent: bool) -> None:
        """End the connections of a crashed process. Without its machine, others notice nothing for now."""
        for ends in self.between(name):
            for end in ends:
                if end.loop.name == name:
                    end.is_lost = True
                elif not is_silent:
                    end.lose(TlsFailure.CONNECTION_RESET)

    def hold(self, name: str, other: str, until: float) -> None:
        self.held_until[frozenset((name, other))] = until


def address_of(process: str) -> str:
    """Return the IP address of a process, which no other has."""
    number = zlib.crc32(process.encode())
    return ".".join(map(str, (10, *number.to_bytes(4, "big")[:3])))


class End(asyncio.Transport):
    """One end of a connection."""

    def __init__(
        self,
        network: Network,
        number: int,
        link: frozenset[str],
        client: str,
        loop: SimulatedLoop,
        random: Random,
    ) -> None:
        super().__init__()
        self.network, self.number, self.link, self.loop = network, number, link, loop
        self.peer = address_of(client)
        self.protocol: asyncio.Protocol
        self._random = random
        self.peer_end = self
        self._received: deque[bytes | None] = deque()
        self._arrives = 0.0
        self._unread = 0  # bytes that the peer has not taken
        self._high = HIGH_WATER
        self._linger: asyncio.TimerHandle | None = None
        self.has_begun = False
        self._is_reading = True
        self._is_full = False
        self.is_ending = self.is_lost = False

    def arrive(self, delay: float, call: Callable[..., object], *arguments: object) -> None:
        """Call a function of this end, in its process, after what has been sent before."""
        now = self.loop.time()
        held = self.network.held_until.get(self.link, 0.0)
        self._arrives = max(now + delay, self._arrives + 1e-9, held)
        self.loop.call_at(self._arrives, call, *arguments)

    def _send(self, call: Callable[..., object], *arguments: object) -> None:
        self.peer_end.arrive(self._random.uniform(*DELAY_S), call, *arguments)

    # --- what protocols use ---

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_ending or self.is_lost:
            return
        self._unread += len(data)
        if not self._is_full and self._unread > self._high:
            self._is_full = True
            self.protocol.pause_writing()
        self._send(self.peer_end.receive, bytes(data))

    def get_write_buffer_size(self) -> int:
        return self._unread

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = self._high if high is None else high

    def is_closing(self) -> bool:
        return self.is_ending or self.is_lost

    def pause_reading(self) -> None:
        self._is_reading = self.is_ending

    def resume_reading(self) -> None:
        self._is_reading = True
        self.loop.call_soon(self._deliver)

    def close(self) -> None:
        """Send the end after what was written, and wait for the peer's."""
        if not self.is_closing():
            self.is_ending = True
            self._send(self.peer_end.receive, None)
            self._linger = self.loop.call_later(LINGER_TIME, self.abort)
            self.resume_reading()

    def abort(self) -> None:
        if not self.is_lost:
            self._send(self.peer_end.lose, TlsFailure.CONNECTION_RESET)
            self.lose(None)

    def leaves(self) -> frozenset[bytes]:
        return frozenset()

    def peer_certificate(self) -> None:
        """There is no TLS here."""

    # --- what the network does ---

    def begin(self, accept: Accept) -> None:
        if not self.is_lost:
            try:
                self.protocol = accept()
            except ConnectionRefusedError:
                self.abort()
                return
            self.has_begun = True
            self.protocol.connection_made(self)
            self._deliver()

    def receive(self, data: bytes | None) -> None:
        self._received.append(data)
        if self.has_begun:
            self._deliver()

    def _deliver(self) -> None:
        while self._received and self._is_reading and not self.is_lost:
            data = self._received.popleft()
            if data is None:
                if not self.is_ending:
                    self.protocol.eof_received()
                    self.close()
                self._finish(None)
                return
            self.peer_end.arrive(0.0, self.peer_end.taken, len(data))
            if not self.is_ending:
                self.protocol.data_received(data)

    def taken(self, size: int) -> None:
        self._unread -= size
        if self._is_full and self._unread <= self._high // 4:
            self._is_full = False
            if not self.is_closing():
                self.protocol.resume_writing()

    def lose(self, failure: TlsFailure | None) -> None:
        """End this end at once. May be called by any process."""
        self._received.clear()
        self._finish(None if failure is None else TlsError(failure.value))

    def _finish(self, error: TlsError | None) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        if self._linger is not None:
            self._linger.cancel()
        if self.has_begun:
            self.loop.call_soon_threadsafe(self.protocol.connection_lost, error)
        self.network.forget(self.number)
