"""The port without TLS, which sends people on to https. It is off unless `http.redirect_port` names one.

What this file decides: who is sent on, and who is told off.

Rules:
- GET and HEAD are sent on, 308, if they ask for a name of the server's own; any other name is 421.
- All else is 403, and so is whatever shows credentials: a redirect would hide from programs that these went over
  the network in the clear (OWASP ASVS 5.0, 4.1.2).
- No Strict-Transport-Security here (RFC 6797 section 7.2), one request a connection, few connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast
from urllib.parse import urlsplit

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.common.network import network_of
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import HttpRequest, HttpResponse, Peer, text_response
from zcproto.http.security_headers import SecurityHeaders
from zcproto.server.state import ServerState, log

LIMITS: Final = HttpLimits(
    max_head=8_192, max_body=1_024, max_requests=1, request_timeout=5.0, answer_timeout=5.0
)
MAX_CONNECTIONS: Final = 256
PER_ADDRESS: Final = 16
BACKLOG: Final = 128
LINGER_TIME: Final = 2.0
"""Seconds in which a client may still send after the answer, before the connection is reset."""

LINGER_BYTES: Final = 65_536
_HTTPS_PORT: Final = 443
_CREDENTIALS: Final = frozenset({"authorization", "proxy-authorization", "cookie"})

SENT_IN_CLEAR: Final = text_response(
    403, "this port is not encrypted: use https; if a token or a key was sent here, revoke it"
)
NOT_OURS: Final = text_response(421, "this server has no such name")


class Redirects:
    """What every request is answered with. `names` are those that the server's certificates have now."""

    def __init__(self, names: Callable[[], Iterable[str]], https_port: int) -> None:
        self._names = names
        self._port = "" if https_port == _HTTPS_PORT else f":{https_port}"

    def find(self, request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD") or not _CREDENTIALS.isdisjoint(request.headers):
            return SENT_IN_CLEAR
        host = host_of(request.headers.get("host", ""))
        if host is None or not is_among(host, self._names()):
            return NOT_OURS
        query = f"?{request.query}" if request.query else ""
        shown = f"[{host}]" if ":" in host else host
        location = f"https://{shown}{self._port}{request.path}{query}"
        return text_response(308, "use https", headers=(("Location", location),))


def host_of(field: str) -> str | None:
    """The name or address in a Host header, in one form and without its port; None if there is none."""
    try:
        host = urlsplit(f"//{field}").hostname
    except ValueError:
        return None
    if not host:
        return None
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.removesuffix(".")


def is_among(host: str, names: Iterable[str]) -> bool:
    """Whether a certificate with these names is good for a host (RFC 9525 section 6.3)."""
    parent = host.partition(".")[2]
    return any(name.lower() in (host, f"*.{parent}") for name in names)


class PlainListener:
    """Accepts on the port without TLS, and keeps its connections few."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        state: ServerState,
        names: Callable[[], Iterable[str]],
        https_port: int,
    ) -> None:
        self._sockets = list(sockets)
        self._servers: list[asyncio.Server] = []
        self.state = state
        self.endpoint = HttpEndpoint(
            state,
            Redirects(names, https_port),
            SecurityHeaders(None),
            LIMITS,
            lambda transport: transport.peer,
        )
        self._by_network: dict[str, int] = {}
        self.open: set[PlainTransport] = set()
        self.refused = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            self._servers.append(
                await loop.create_server(lambda: PlainTransport(self), sock=listening, backlog=BACKLOG)
            )
            host, port = listening.getsockname()[:2]
            log.info("server.redirecting", host=host, port=port)

    def close(self) -> None:
        """Accept nothing more, and end what is there."""
        for server in self._servers:
            server.close()
        for listening in self._sockets:
            listening.close()
        for transport in list(self.open):
            transport.end()

    def figures(self) -> dict[str, Any]:
        """For `server.stats`."""
        counters = self.endpoint.counters
        return {
            "connections": len(self.open),
            "refused": self.refused,
            "responses": {str(status): count for status, count in sorted(counters.responses.items())},
        }

    def admit(self, transport: PlainTransport) -> bool:
        """Count a connection in, unless there are too many."""
        network = network_of(transport.peer.address)
        of_network = self._by_network.get(network, 0)
        if len(self.open) >= MAX_CONNECTIONS or of_network >= PER_ADDRESS:
            self.refused += 1
            return False
        self._by_network[network] = of_network + 1
        self.open.add(transport)
        return True

    def leave(self, transport: PlainTransport) -> None:
        if transport in self.open:
            self.open.discard(transport)
            network = network_of(transport.peer.address)
            left = self._by_network[network] - 1
            if left:
                self._by_network[network] = left
            else:
                del self._by_network[network]


class PlainTransport(asyncio.Protocol):
    """A TCP connection as an HttpProtocol sees it: closing it does not destroy the answer.

    Closing at once would answer input that is still on its way with a reset. So the end is announced, and what
    comes is discarded until the client ends, for LINGER_TIME and LINGER_BYTES at most.
    """

    __slots__ = ("_http", "_left", "_listener", "_raw", "deadline_tick", "peer")

    def __init__(self, listener: PlainListener) -> None:
        self._listener = listener
        self._raw = cast("asyncio.Transport", None)
        self._http: HttpProtocol | None = None
        self._left = LINGER_BYTES
        self.peer = Peer()
        self.deadline_tick = 0

    # --- what TCP calls ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast("asyncio.Transport", transport)
        address: Any = transport.get_extra_info("peername")
        self.peer = Peer(address[0] if address else "")
        if not self._listener.admit(self):
            self._raw.abort()
            return
        self._http = self._listener.endpoint.protocol()
        self._http.connection_made(cast("asyncio.BaseTransport", self))

    def data_received(self, data: bytes) -> None:
        if self._http is not None:
            self._http.data_received(data)
            return
        self._left -= len(data)
        if self._left < 0:
            self._raw.abort()

    def eof_received(self) -> bool:
        if self._http is not None:
            self._http.eof_received()
        return False

    def pause_writing(self) -> None:
        if self._http is not None:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._http is not None:
            self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go(exc)

    def handle_deadline(self, now: float) -> None:
        self._raw.abort()

    def end(self) -> None:
        """Reset the connection, whatever it is in."""
        self._let_go(None)
        self._raw.abort()

    def _let_go(self, exc: Exception | None) -> None:
        self._listener.state.wheel.discard(self)
        self._listener.leave(self)
        http, self._http = self._http, None
        if http is not None:
            http.connection_lost(exc)

    # --- what HttpProtocol calls ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._raw.write(data)

    def close(self) -> None:
        self._http = None
        if self._raw.is_closing():
            return
        wheel = self._listener.state.wheel
        wheel.set(self, wheel.now() + LINGER_TIME)
        self._raw.write_eof()
        self._raw.resume_reading()

    def abort(self) -> None:
        self._http = None
        self._raw.abort()

    def pause_reading(self) -> None:
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()
