"""The port without TLS, which redirects to https. It is off unless `http.redirect_port` is set.

What this file decides: which requests are redirected, and which are refused.

Rules:
- GET and HEAD for a name of the server's certificates get 308, for any other name 421.
- Everything else gets 403, and so does a request with credentials: a redirect would hide from a program that it
  sent them over the network in the clear (OWASP ASVS 5.0, 4.1.2).
- No Strict-Transport-Security here (RFC 6797 section 7.2), one request per connection, few connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast
from urllib.parse import urlsplit

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.common.network import plain_address
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import HttpRequest, HttpResponse, Peer, text_response
from zcproto.http.security_headers import SecurityHeaders
from zcproto.server.listener import AcceptLoop, AddressCounts
from zcproto.server.state import ServerState, log

LIMITS: Final = HttpLimits(
    max_head=8_192, max_body=1_024, max_requests=1, request_timeout=5.0, answer_timeout=5.0
)
MAX_CONNECTIONS: Final = 256
PER_ADDRESS: Final = 16
LINGER_TIME: Final = 2.0
"""Seconds in which a client may still send after the response, before the connection is reset."""

LINGER_BYTES: Final = 65_536
_HTTPS_PORT: Final = 443
_CREDENTIALS: Final = frozenset({"authorization", "proxy-authorization", "cookie"})

SENT_IN_CLEAR: Final = text_response(
    403, "this port is not encrypted: use https; if a token or a key was sent here, revoke it"
)
UNKNOWN_NAME: Final = text_response(421, "this server has no such name")


class Redirects:
    """The answer to every request. `names` returns the names of the serving certificates."""

    def __init__(self, names: Callable[[], Iterable[str]], https_port: int) -> None:
        self._names = names
        self._port = "" if https_port == _HTTPS_PORT else f":{https_port}"

    def find(self, request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD") or not _CREDENTIALS.isdisjoint(request.headers):
            return SENT_IN_CLEAR
        host = host_of(request.headers.get("host", ""))
        if host is None or not has_name(self._names(), host):
            return UNKNOWN_NAME
        query = f"?{request.query}" if request.query else ""
        url_host = f"[{host}]" if ":" in host else host
        location = f"https://{url_host}{self._port}{request.path}{query}"
        return text_response(308, "use https", headers=(("Location", location),))


def host_of(field: str) -> str | None:
    """Return the normalized name or address of a Host header, without its port; None if it has none."""
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


def has_name(names: Iterable[str], host: str) -> bool:
    """Whether a certificate with these names is valid for a host (RFC 9525 section 6.3)."""
    parent = host.partition(".")[2]
    return any(name.lower() in (host, f"*.{parent}") for name in names)


class RedirectListener(AcceptLoop):
    """Accept on the port without TLS within tight limits. `open` are its connections."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        state: ServerState,
        names: Callable[[], Iterable[str]],
        https_port: int,
    ) -> None:
        super().__init__(asyncio.get_running_loop())
        self._sockets = list(sockets)
        self.state = state
        self.endpoint = HttpEndpoint(
            state,
            Redirects(names, https_port),
            SecurityHeaders(None),
            LIMITS,
            lambda transport: transport.peer,
        )
        self._counts = AddressCounts()
        self.open: set[PlainTransport] = set()
        self.refused = 0

    def start(self) -> None:
        super().start()
        for listening in self._sockets:
            host, port = listening.getsockname()[:2]
            log.info("server.redirecting", host=host, port=port)

    def close(self) -> None:
        """Stop accepting and reset the open connections."""
        super().close()
        for transport in list(self.open):
            transport.end()

    def _admit(self, connection: socket.socket, address: Any) -> None:
        client = plain_address(address[0])
        if len(self.open) >= MAX_CONNECTIONS or not self._counts.add(client, PER_ADDRESS):
            self.refused += 1
            connection.close()
            return
        transport = PlainTransport(self, client)
        self.open.add(transport)
        self._adopt(connection, transport)

    def remove(self, transport: PlainTransport) -> None:
        if transport in self.open:
            self.open.discard(transport)
            self._counts.remove(transport.peer.address)


class PlainTransport(asyncio.Protocol):
    """Adapt a TCP connection to HttpProtocol so that closing it does not destroy the response.

    Closing at once would answer input that is still on its way with a reset. So the write side is closed first, and
    input is discarded until the client ends too, for at most LINGER_TIME and LINGER_BYTES.
    """

    __slots__ = ("_http", "_left", "_listener", "_raw", "deadline_tick", "peer")

    def __init__(self, listener: RedirectListener, address: str) -> None:
        self._listener = listener
        self._raw = cast("asyncio.Transport", None)
        self._http: HttpProtocol | None = None
        self._left = LINGER_BYTES
        self.peer = Peer(address)
        self.deadline_tick = 0

    # --- called by TCP ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast("asyncio.Transport", transport)
        if self not in self._listener.open:  # the listener was closed meanwhile
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
        self._release(exc)

    def handle_deadline(self, now: float) -> None:
        self._raw.abort()

    def end(self) -> None:
        """Reset the connection in whatever state it is."""
        self._release(None)
        if self._raw is not None:
            self._raw.abort()

    def _release(self, exc: Exception | None) -> None:
        self._listener.state.wheel.discard(self)
        self._listener.remove(self)
        http, self._http = self._http, None
        if http is not None:
            http.connection_lost(exc)

    # --- called by HttpProtocol ------------------------------------------------------------------------

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
