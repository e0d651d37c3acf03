"""Listening sockets: who is let in, and how many at once.

A connection beyond a limit is closed at accept, without a byte. While as many handshakes are in progress as
allowed, nothing is accepted: the rest wait in the kernel's backlog, where they cost no memory of ours.

A connection from a listed load balancer counts as the balancer's, without a limit, until its header has told whose
it is. Then it counts as its client's, and is closed if that is one too many.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any, Final

from zcproto.common.network import AddressSet, network_of, plain_address
from zcproto.errors import ConfigError
from zcproto.server.state import ServerState, log
from zcproto.tls.forwarded import ForwardedTransport
from zcproto.tls.server import TlsAcceptor, TlsServerTransport

BACKLOG: Final = 4_096
PAUSE_WHEN_EXHAUSTED: Final = 0.5
"""Seconds without accepting after the system ran out of descriptors or memory: it would fail again at once."""

NO_ADDRESSES: Final = AddressSet()

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class PlainSocket(socket.socket):
    """An accepted socket, which tells its family and type as numbers.

    `socket.accept`, and the loop that gets the socket, ask for them five times. To make members of enumerations of
    them takes as long as the system call.
    """

    __slots__ = ()
    # The properties of `socket.socket` promise the enumerations, which an int equals.
    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]


Opening = Coroutine[Any, Any, Any]
"""`connect_accepted_socket` on its way."""


def bind(hosts: Sequence[str], port: int, key: str = "server.port") -> list[socket.socket]:
    """Listening sockets for all addresses of the hosts. Raises ConfigError naming what could not be bound.

    `key` is the setting that the port comes from.
    """
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            for family, kind, protocol, _, address in _addresses(host, port):
                if sockets and port == 0:  # the same free port on every address
                    address = (address[0], sockets[0].getsockname()[1], *address[2:])  # noqa: PLW2901
                try:
                    listening = socket.socket(family, kind, protocol)
                    sockets.append(listening)
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    listening.bind(address)
                    listening.listen(BACKLOG)
                except OSError as error:
                    raise ConfigError(
                        [f"server.host = {host!r}, {key} = {address[1]}: cannot listen: {error.strerror}"]
                    ) from error
                listening.setblocking(False)
    except BaseException:
        for listening in sockets:
            listening.close()
        raise
    return sockets


def take_over(sockets: Sequence[socket.socket]) -> None:
    """Make listening sockets that others have bound like those of `bind`."""
    for listening in sockets:
        listening.setblocking(False)
        listening.listen(BACKLOG)  # who has bound it may have had a shorter one


def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"server.host = {host!r}: no such address; use one of this machine"]) from error
    return list(dict.fromkeys(found))


class Listener:
    """Accepts for one loop.

    `balancers` are those from which a PROXY protocol header is demanded, and believed. They may be replaced; that
    counts for connections to come.
    """

    def __init__(
        self,
        acceptor: TlsAcceptor,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        *,
        max_handshakes: int,
        max_connections: int,
        connections_per_address: int,
        balancers: AddressSet = NO_ADDRESSES,
    ) -> None:
        self._take_balancers(balancers)
        self._sockets: list[socket.socket] = []
        self.addresses: list[tuple[str, int]] = []
        """Host and port of each listening socket; kept after the end."""
        self._acceptor = acceptor
        self._state = state
        self._loop = loop
        self._max_handshakes = max_handshakes
        self._max_connections = max_connections
        self._per_address = connections_per_address
        self._by_network: dict[str, int] = {}
        self._open = 0
        self._accepting = False
        self._closed = False
        self._empty = asyncio.Event()
        self._adopting: set[Opening] = set()  # kept here until the loop has them
        acceptor.on_slot_free = self._resume
        acceptor.on_closed = self._connection_closed
        acceptor.on_forwarded = self._connection_forwarded

    def reconfigure(
        self,
        *,
        max_handshakes: int,
        max_connections: int,
        connections_per_address: int,
        balancers: AddressSet,
    ) -> None:
        """Go by other limits, for connections to come: those that are too many now stay."""
        self._max_handshakes = max_handshakes
        self._max_connections = max_connections
        self._per_address = connections_per_address
        self._take_balancers(balancers)
        self._resume()

    def _take_balancers(self, balancers: AddressSet) -> None:
        self.balancers = balancers
        self._has_balancers = bool(balancers)  # asked at each accept

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    @property
    def connections(self) -> int:
        """Open TCP connections, those in their handshake included."""
        return self._open

    @property
    def most_of_one(self) -> int:
        """Open connections of the address that has most of them."""
        return max(self._by_network.values(), default=0)

    def open(self, sockets: Sequence[socket.socket]) -> None:
        """Take listening sockets; `start` begins to accept on them, `close` closes them."""
        self._sockets = list(sockets)
        self.addresses = [listening.getsockname()[:2] for listening in sockets]

    def start(self) -> None:
        """Accept connections from now on."""
        self._resume()
        for host, port in self.addresses:
            log.info("server.listening", host=host, port=port)

    def close(self) -> None:
        """Accept nothing more. Connections go on."""
        self._closed = True
        self._pause()
        for listening in self._sockets:
            listening.close()

    async def wait_empty(self) -> None:
        """After `close`: return when the last connection is gone."""
        if self._open:
            await self._empty.wait()

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            for listening in self._sockets:
                self._loop.remove_reader(listening.fileno())

    def _resume(self) -> None:
        if not self._accepting and not self._closed:
            self._accepting = True
            for listening in self._sockets:
                self._loop.add_reader(listening.fileno(), self._accept, listening, int(listening.family))

    def _accept(self, listening: socket.socket, family: int) -> None:
        # One a call: the loop calls again while there are more, and others get their turn in between.
        if self._acceptor.handshakes_in_progress >= self._max_handshakes:
            self._pause()
            return
        try:
            # What `accept` is made of, in all versions of CPython; no stub names it.
            descriptor, address = listening._accept()  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._state.counters.accept_failed += 1
            log.error("listener.exhausted", reason=error.strerror, retry_after_s=PAUSE_WHEN_EXHAUSTED)
            self._pause()
            self._loop.call_later(PAUSE_WHEN_EXHAUSTED, self._resume)
            return
        connection = PlainSocket(family, socket.SOCK_STREAM, 0, descriptor)
        self._admit(connection, plain_address(address[0]))

    def _admit(self, connection: socket.socket, address: str) -> None:
        counters = self._state.counters
        network = network_of(address)
        is_forwarded = self._has_balancers and self.balancers.contains(address)
        if self._open >= self._max_connections:
            counters.refused_full += 1
            log.info("connection.refused_full", limit=self._max_connections)
            connection.close()
            return
        of_network = self._by_network.get(network, 0)
        if not is_forwarded and self._per_address and of_network >= self._per_address:
            self._refuse_address(address)
            connection.close()
            return
        self._by_network[network] = of_network + 1
        self._open += 1
        # From here on it is a handshake in progress.
        if is_forwarded:
            transport: TlsServerTransport = ForwardedTransport(self._acceptor, address)
        else:
            transport = self._acceptor.transport(address)
        self._adopt(connection, transport)

    def _refuse_address(self, address: str, balancer: str | None = None) -> None:
        self._state.counters.refused_per_address += 1
        log.info("connection.refused_per_address", peer=address, balancer=balancer, limit=self._per_address)

    def _connection_forwarded(self, balancer: str, client: str) -> bool:
        """The connection is this client's from here on; or False, if the client has as many as it may."""
        network = network_of(client)
        of_network = self._by_network.get(network, 0)
        if self._per_address and of_network >= self._per_address:
            self._refuse_address(client, balancer=balancer)
            return False
        self._by_network[network] = of_network + 1
        self._uncount(balancer)
        return True

    def _adopt(self, connection: socket.socket, transport: TlsServerTransport) -> None:
        """Give a socket to the loop. Stepped by hand: a task would cost as much as the rest of an accept."""
        opening: Opening = self._loop.connect_accepted_socket(lambda: transport, connection)
        self._adopting.add(opening)
        self._step(opening, connection, transport)

    def _step(
        self,
        opening: Opening,
        connection: socket.socket,
        transport: TlsServerTransport,
        waiter: asyncio.Future[Any] | None = None,
    ) -> None:
        # No function of its own for each socket, which would name itself: such a cycle keeps the transport.
        try:
            waiter = opening.send(None)
        except StopIteration:
            self._adopting.discard(opening)
        except OSError as error:  # it went away before it was ours
            self._adopting.discard(opening)
            connection.close()
            transport.connection_lost(error)
        else:
            waiter.add_done_callback(partial(self._step, opening, connection, transport))

    def _connection_closed(self, address: str) -> None:
        self._open -= 1
        if self._closed and not self._open:
            self._empty.set()
        self._uncount(address)

    def _uncount(self, address: str) -> None:
        network = network_of(address)
        left = self._by_network[network] - 1
        if left:
            self._by_network[network] = left
        else:
            del self._by_network[network]
