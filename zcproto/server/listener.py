"""Listening sockets: which connections are accepted, and how many at once.

    AcceptLoop  accept, adopt, pause when the system is exhausted: shared with the other listening sockets
    Listener    the TLS port

Rules:
- A connection beyond a limit is closed at accept, without a byte. If dropping a silent connection makes room for
  it, that one is closed instead (see `zcproto/tls/pending.py`).
- Connections of a network of which too many failed before are reset before any work is done for them: the server
  must refuse faster than an attacker connects, or others wait in the backlog behind the refused ones.
- While all places of pending connections are taken by clients that wait for a slot, nothing is accepted: the rest
  wait in the kernel's backlog, which costs this process no memory.
- A worker that has more connections than the mean of all leaves new ones to the others for a moment. The kernel
  wakes any of them, so one of them would otherwise have most.
- A connection from a listed load balancer counts as the balancer's, without a limit, until its PROXY header names
  the client. Then it counts as the client's, and is closed if the client is over its limit.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Final

from zcproto.common.counts import ALONE, Counting
from zcproto.common.network import AddressSet, network_of, plain_address
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.server.state import ServerState, log
from zcproto.tls.pending import Network
from zcproto.tls.proxy import ForwardedTransport
from zcproto.tls.server import TlsAcceptor, TlsServerTransport

BACKLOG: Final = 4_096
ACCEPTS_PER_TURN: Final = 64
"""Most connections accepted on the TLS port per turn of the loop. With one, clients would wait in the backlog
behind a flood. Ports with few places accept one: between two turns, connections that have ended free theirs."""

BATCH_GROWTH: Final = 1.125

PAUSE_WHEN_EXHAUSTED: Final = 0.5
"""Seconds without accepting after the system ran out of descriptors or memory: it would fail again at once."""

MEAN_PARTS: Final = 64
"""A worker may have this part of the mean of all, and one more, before it leaves connections to the others."""

LEFT_TIME: Final = 0.001
MOST_LEFT_TIME: Final = 0.02
"""Seconds for each connection beyond that. Then it accepts what is left: the others may be busy or gone."""

HANDSHAKE_COST: Final = 4
"""What a handshake that begins and is not completed counts as, in connections that send no ClientHello."""

CACHED_CLIENTS: Final = 1_024
"""Addresses whose networks are kept: most have the next connection soon."""

_ALL: Final = ""
"""The key of the count of all connections."""

_RESET: Final = struct.pack("ii", 1, 0)
"""Close by a reset (SO_LINGER): the kernel keeps nothing of the connection."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class PlainSocket(socket.socket):
    """An accepted socket whose family and type are plain numbers.

    `socket.accept` and the event loop read them five times. Converting them to members of enumerations takes as
    long as the system call.
    """

    __slots__ = ()
    # The properties of `socket.socket` promise the enumerations, which an int equals.
    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]


Opening = Coroutine[Any, Any, Any]
"""A running `connect_accepted_socket`."""


_LISTEN_CURES: Final = {
    errno.EADDRINUSE: "; end the program that uses it (ss -ltnp lists them), or set another port",
    errno.EADDRNOTAVAIL: "; use an address of this machine",
    errno.EACCES: "; let systemd bind ports below 1024 (zcproto.socket), or set another port",
}


def bind(
    hosts: Sequence[str], port: int, key: str = "server.port", *, backlog: int = BACKLOG
) -> list[socket.socket]:
    """Return listening sockets for all addresses of the hosts. `key` is the setting of the port, for messages.

    With a backlog of 0 they are bound only, for `listen` later. Raises ConfigError if an address cannot be bound.
    """
    sockets: list[socket.socket] = []
    with ExitStack() as stack:
        for host in hosts:
            for family, address in _addresses(host, port):
                if sockets and port == 0:  # the same free port on every address
                    address = (address[0], sockets[0].getsockname()[1], *address[2:])  # noqa: PLW2901
                try:
                    listening = stack.enter_context(_bound(family, address))
                    if backlog:
                        listening.listen(backlog)
                except OSError as error:
                    raise _cannot_listen(f"server.host = {host!r}, {key} = {address[1]}", error) from error
                sockets.append(listening)
        stack.pop_all()
    return sockets


def listen(sockets: Sequence[socket.socket]) -> None:
    """Let bound sockets listen. Raises ConfigError if another program listens there meanwhile."""
    for each in sockets:
        try:
            each.listen(BACKLOG)
        except OSError as error:
            raise _cannot_listen("{}, port {}".format(*each.getsockname()[:2]), error) from error


def _bound(family: int, address: Any) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


def _cannot_listen(where: str, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno or 0)  # sockets add the address to their own
    return ConfigError([f"{where}: cannot listen: {reason}{_LISTEN_CURES.get(error.errno or 0, '')}"])


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"server.host = {host!r}: no such address; use one of this machine"]) from error
    return list(dict.fromkeys((family, address) for family, *_, address in found))


class AcceptLoop:
    """Accept connections of some listening sockets in one event loop, at most `max_batch` per turn of it.

    Subclasses decide in `_admit`.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, max_batch: int = 1, *, backlog: int = BACKLOG
    ) -> None:
        self._loop = loop
        self._max_batch = max_batch
        self._backlog = backlog
        self._sockets: list[socket.socket] = []
        self._accepting = False
        self._batch = 1.0
        self._closed = False
        self._adopting: list[tuple[Opening, asyncio.Future[Any]]] = []  # until the loop has them

    def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Take listening sockets: `start` accepts on them, `close` closes them."""
        self._sockets = list(sockets)
        for listening in sockets:
            listening.setblocking(False)

    def replace_sockets(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on other listening sockets from now on, and close the old ones. Open connections are kept."""
        self._pause()
        for listening in self._sockets:
            listening.close()
        self.listen_on(sockets)
        self.start()

    def start(self) -> None:
        for listening in self._sockets:
            listening.listen(self._backlog)  # another process may have set a shorter one
        self._resume()

    def close(self) -> None:
        """Stop accepting and close the listening sockets. Open connections are kept."""
        self._closed = True
        self._pause()
        for listening in self._sockets:
            listening.close()

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

    def _is_full(self) -> bool:
        """Whether to leave further connections in the backlog until `_resume` is called."""
        return False

    def _admit(self, connection: socket.socket, address: Any) -> None:
        """Adopt an accepted connection, or close it."""
        raise NotImplementedError

    def _exhausted(self) -> None:
        """Count an accept that failed because the system has no descriptor or memory left."""

    def _accept(self, listening: socket.socket, family: int) -> None:
        # The loop calls again while there are more, and serves others in between. The batch grows while it is not
        # enough, and slowly: trying for one more than there are costs a system call.
        for _ in range(int(self._batch)):
            if self._is_full():
                self._pause()
                break
            try:
                # The private half of `socket.accept`, in all versions of CPython; no stub names it.
                descriptor, address = listening._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                break
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._exhausted()
                log.error("listener.exhausted", reason=error.strerror, retry_after_s=PAUSE_WHEN_EXHAUSTED)
                self._pause()
                self._loop.call_later(PAUSE_WHEN_EXHAUSTED, self._resume)
                break
            self._admit(PlainSocket(family, socket.SOCK_STREAM, 0, descriptor), address)
        else:
            self._batch = min(self._batch * BATCH_GROWTH, self._max_batch)
            return
        self._batch = max(self._batch / 2, 1.0)

    def _adopt(self, connection: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        """Hand a socket to the loop. Stepped by hand: a task would cost as much as the rest of an accept."""
        opening: Opening = self._loop.connect_accepted_socket(lambda: protocol, connection)
        try:
            waiter = opening.send(None)
        except OSError as error:  # the peer left before the loop had the socket
            connection.close()
            protocol.connection_lost(error)
            return
        if not self._adopting:
            self._loop.call_soon(self._end_adoptions)
        self._adopting.append((opening, waiter))

    def _end_adoptions(self) -> None:
        """End the coroutines of the sockets that the loop has by now. A callback for each would wake it again."""
        adopting, self._adopting = self._adopting, []
        for opening, waiter in adopting:
            if not waiter.done():
                self._adopting.append((opening, waiter))
            elif waiter.exception() is None:
                next(opening.__await__(), None)
            else:  # the protocol has closed its connection at once
                opening.close()
        if self._adopting:
            self._loop.call_soon(self._end_adoptions)


class Listener(AcceptLoop):
    """Accept TLS connections within the limits; balancers of `server.proxy_protocol_from` name the client."""

    def __init__(
        self,
        acceptor: TlsAcceptor,
        state: ServerState,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        counting: Counting = ALONE,
    ) -> None:
        super().__init__(loop, ACCEPTS_PER_TURN)
        self.addresses: list[tuple[str, int]] = []
        """Host and port of each listening socket; kept after the end."""
        self._acceptor = acceptor
        self._state = state
        self._wasted = counting.rate("failed_handshakes_per_network")
        """The rate of connections that end before their handshake is complete, by network."""
        self._set_limits(config)
        self._has_others = counting is not ALONE  # workers that accept on the same port
        self._all = counting.counts("max_connections")
        self._by_network = counting.counts("connections_per_address")
        self._empty = asyncio.Event()
        self._left: asyncio.TimerHandle | None = None
        self._takes_left = False
        acceptor.on_room = self._resume
        acceptor.on_closed = self._connection_closed
        acceptor.on_wasted = self._connection_wasted
        acceptor.on_forwarded = self._connection_forwarded

    def reconfigure(self, config: Config) -> None:
        """Apply new limits to future connections; existing ones are kept."""
        self._set_limits(config)
        self._resume()

    def _set_limits(self, config: Config) -> None:
        self._acceptor.set_limits(
            config.tls.max_handshakes,
            config.tls.max_pending,
        )
        self._wasted.set_rate(config.limits.failed_handshakes_per_network)
        self._max_connections = config.limits.max_connections
        self._per_address = config.limits.connections_per_address
        self.balancers = AddressSet(config.server.proxy_protocol_from)
        self._client = lru_cache(CACHED_CLIENTS)(self._new_client)

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        super().listen_on(sockets)
        self.addresses = [listening.getsockname()[:2] for listening in sockets]

    def start(self) -> None:
        super().start()
        for host, port in self.addresses if self._sockets else ():
            log.info("server.listening", host=host, port=port)

    @property
    def most_per_address(self) -> int:
        """The connections of the network with most of them."""
        return self._by_network.most

    @property
    def connections(self) -> int:
        """Open TCP connections, including those in their handshake."""
        return self._all.own(_ALL)

    @property
    def all_connections(self) -> int:
        """The connections that `limits.max_connections` counts: those of all workers."""
        return self._all[_ALL]

    async def wait_empty(self) -> None:
        """Wait, after `close`, until the last connection is gone."""
        if self.connections:
            await self._empty.wait()

    def _is_full(self) -> bool:
        return self._acceptor.pending.is_full or (self._has_others and self._leaves_to_others())

    def _leaves_to_others(self) -> bool:
        """Return whether other workers have the chance to accept, for as long as this one has more connections."""
        surplus = self._all.surplus(_ALL)
        surplus -= 1 + (self.connections - surplus) // MEAN_PARTS
        if surplus <= 0 or self._takes_left:
            return False
        if self._left is None:
            self._left = self._loop.call_later(min(surplus * LEFT_TIME, MOST_LEFT_TIME), self._take_left)
        return True

    def _take_left(self) -> None:
        """Accept one batch of what the others have left."""
        self._left = None
        if not self._closed:
            self._takes_left = True
            for listening in self._sockets:
                self._accept(listening, int(listening.family))
            self._takes_left = False
            self._resume()

    def _exhausted(self) -> None:
        self._state.counters.accept_failed += 1

    def _new_client(self, address: str) -> tuple[str, str, Network[TlsServerTransport], bool]:
        """Return an address in its plain form, the network whose connections count as its own, that of its pending
        connections, and whether it is a balancer's."""
        client = plain_address(address)
        is_balancer = bool(self.balancers) and self.balancers.contains(client)
        return client, network_of(client), self._acceptor.network_of(client), is_balancer

    def _admit(self, connection: socket.socket, address: Any) -> None:
        client, own_network, network, is_forwarded = self._client(address[0])
        if network.name in self._wasted and not is_forwarded and self._refuse_flooding(network, client):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.close()
            return
        pending = self._acceptor.pending
        if not self._all.add(_ALL, self._max_connections):
            if not pending.drop_oldest():
                self._state.counters.refused_full += 1
                log.info("connection.refused_full", limit=self._max_connections)
                connection.close()
                return
            self._all.add(_ALL)
        if not self._by_network.add(own_network, 0 if is_forwarded else self._per_address):
            self._refuse_address(client)
            self._all.remove(_ALL)
            connection.close()
            return
        if not pending.make_room(network):
            self._refuse_network(client)
            self._by_network.remove(own_network)
            self._all.remove(_ALL)
            connection.close()
            return
        # From here on it is pending.
        kind = ForwardedTransport if is_forwarded else TlsServerTransport
        self._adopt(connection, kind(self._acceptor, client, network))

    def _refuse_flooding(
        self, network: Network[TlsServerTransport], address: str, balancer: str | None = None
    ) -> bool:
        """Return whether a connection must be refused because too many others of its network have failed."""
        limit = self._wasted.per_second
        left = self._wasted.left(network.name, self._state.clock.now())
        if left >= limit or not limit or left >= network.connections + 1:
            return False
        self._state.counters.refused_flooding += 1
        log.info("connection.refused_flooding", peer=address, balancer=balancer, limit=limit)
        return True

    def _refuse_address(self, address: str, balancer: str | None = None) -> None:
        self._state.counters.refused_per_address += 1
        log.info("connection.refused_per_address", peer=address, balancer=balancer, limit=self._per_address)

    def _refuse_network(self, address: str, balancer: str | None = None) -> None:
        self._state.counters.refused_per_network += 1
        limit = self._acceptor.pending.max_places
        log.info("connection.refused_per_network", peer=address, balancer=balancer, limit=limit)

    def _connection_forwarded(self, balancer: str, client: str) -> bool:
        """Reassign the connection to the forwarded client. Return False if it is over its limit."""
        _, own_network, network, _ = self._client(client)
        if self._refuse_flooding(network, client, balancer):
            return False
        if not self._by_network.add(own_network, self._per_address):
            self._refuse_address(client, balancer=balancer)
            return False
        if not self._acceptor.pending.make_room(network):
            self._refuse_network(client, balancer=balancer)
            self._by_network.remove(own_network)
            return False
        self._by_network.remove(network_of(balancer))
        return True

    def _connection_wasted(self, network: Network[TlsServerTransport], begun: bool) -> None:
        self._wasted.charge(network.name, HANDSHAKE_COST if begun else 1, self._state.clock.now())

    def _connection_closed(self, address: str) -> None:
        self._by_network.remove(network_of(address))
        self._all.remove(_ALL)
        if self._closed and not self.connections:
            self._empty.set()
