"""The HTTPS side of a server: HTTP on the TLS port, and the port without TLS that redirects to it.

Decides: the header fields and limits of both, which requests are redirected and which are refused,
and how both end with the server. Their resources are in resources.py. Requests to both count against the limits of
their address (request_limits.py).

Rules of the port without TLS, which is off unless `http.redirect_port` is set:
- GET and HEAD for a name of the server's certificates get 308, for any other name 421.
- A CA that checks a name by HTTP (RFC 8555 section 8.3) gets the answer to its challenge.
- Everything else gets 403, and so does a request with credentials: a redirect would hide from a program that it
  sent them over the network in the clear (OWASP ASVS 5.0, 4.1.2).
- No Strict-Transport-Security here (RFC 6797 section 7.2), one request per connection, few connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any, Final, cast
from urllib.parse import urlsplit

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.certs.acme.challenges import HTTP_PREFIX, challenge_folder
from zcproto.common.counts import ALONE, Counting, Counts
from zcproto.common.network import network_of, plain_address
from zcproto.config import Config
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import (
    Handler,
    HttpRequest,
    HttpResponse,
    Peer,
    Router,
    SecurityHeaders,
    text_response,
)
from zcproto.server.listener import AcceptLoop, bind
from zcproto.server.state import ServerState, log

HTTP_ALPN: Final = "http/1.1"

REDIRECT_LIMITS: Final = HttpLimits(
    max_head=8_192, max_body=1_024, max_requests=1, request_timeout=5.0, answer_timeout=5.0
)
MAX_REDIRECT_CONNECTIONS: Final = 256
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


class HttpSide:
    """The HTTPS side of one server. Routes may be added to `router` until it serves."""

    def __init__(self, config: Config, state: ServerState, counting: Counting = ALONE) -> None:
        self._config = config
        self._state = state
        self._counting = counting
        self.redirect: RedirectListener | None = None
        self.router = Router()
        self.endpoint = HttpEndpoint(
            state,
            limited(state, self.router.find),
            SecurityHeaders(tls=True),
            HttpLimits(),
            lambda transport: Peer(transport.peer, transport.peer_certificate),
        )

    def reconfigure(self, config: Config) -> None:
        """Expect the challenges of another configuration."""
        self._config = config

    @property
    def protocols(self) -> dict[str | None, Callable[[], asyncio.Protocol]]:
        """The protocols of the TlsAcceptor by ALPN name; None is for clients without ALPN."""
        return {HTTP_ALPN: self.endpoint.protocol, None: self.endpoint.protocol}

    def listen_plain(
        self, names: Callable[[], Iterable[str]], https_port: int, passed: Sequence[socket.socket] = ()
    ) -> None:
        """Bind the port without TLS, or use listening sockets of a service manager.

        `names` returns the names of the serving certificates. Raises ConfigError if the port cannot be bound.
        """
        config = self._config
        sockets = passed or bind(config.server.host, config.http.redirect_port, "http.redirect_port")
        counts = self._counting.counts("redirects_per_address")
        redirects = Redirects(names, https_port, self._challenge_text)
        self.redirect = RedirectListener(sockets, self._state, redirects, counts)

    def _challenge_text(self, token: str) -> bytes | None:
        folder = challenge_folder(self._config)
        return None if folder is None else folder.text(token)

    def close_those(self, is_bad: Callable[[bytes], bool]) -> None:
        """Close the connections of clients with a bad certificate (DER)."""
        for protocol in list(self.endpoint.connections):
            certificate = protocol.peer_certificate()
            if certificate is not None and is_bad(certificate):
                log.warning("connection.certificate_revoked", peer=protocol.peer, connection=protocol.id)
                protocol.close()

    def drain(self) -> None:
        """Keep answering, so that monitors see that the server drains. Each response ends its connection."""
        if self.redirect is not None:
            self.redirect.close()
        self.endpoint.drain()

    def close(self) -> None:
        """Close every connection, and the port without TLS."""
        if self.redirect is not None:
            self.redirect.close()
        self.endpoint.close()


Find = Callable[[HttpRequest], Handler | HttpResponse]


def limited(state: ServerState, find: Find) -> Find:
    """Refuse requests beyond the limits of their address with 429; use `find` for the others."""

    def admit(request: HttpRequest) -> Handler | HttpResponse:
        refusal = state.request_limits.check(None, request.peer.address, state.clock.now())
        if refusal is None:
            return find(request)
        seconds = ceil(refusal.details["retry_after_ms"] / 1000)
        return text_response(429, str(refusal), headers=(("Retry-After", str(seconds)),))

    return admit


# --- the port without TLS --------------------------------------------------------------------------------------


class Redirects:
    """The answer to every request.

    `names` returns the names of the serving certificates, `challenge` the answer to a token of a CA.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        https_port: int,
        challenge: Callable[[str], bytes | None] = lambda token: None,
    ) -> None:
        self._names = names
        self._challenge = challenge
        self._port = "" if https_port == _HTTPS_PORT else f":{https_port}"

    def find(self, request: HttpRequest) -> HttpResponse:
        if request.method not in ("GET", "HEAD") or not _CREDENTIALS.isdisjoint(request.headers):
            return SENT_IN_CLEAR
        if request.path.startswith(HTTP_PREFIX):
            text = self._challenge(request.path.removeprefix(HTTP_PREFIX))
            if text is not None:
                return HttpResponse(200, text, "application/octet-stream")
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
        redirects: Redirects,
        by_network: Counts,
    ) -> None:
        super().__init__(asyncio.get_running_loop())
        self.listen_on(sockets)
        self.state = state
        self.endpoint = HttpEndpoint(
            state,
            limited(state, redirects.find),
            SecurityHeaders(tls=False),
            REDIRECT_LIMITS,
            _plain_peer,
        )
        self._by_network = by_network
        self.open: set[LingeringProtocol] = set()
        self.refused = 0

    def start(self) -> None:
        super().start()
        for listening in self._sockets:
            host, port = listening.getsockname()[:2]
            log.info("server.redirecting", host=host, port=port)

    def close(self) -> None:
        """Stop accepting and reset the open connections."""
        super().close()
        for protocol in list(self.open):
            self.remove(protocol)
            protocol.abort()

    def _admit(self, connection: socket.socket, address: Any) -> None:
        client = plain_address(address[0])
        if len(self.open) >= MAX_REDIRECT_CONNECTIONS or not self._by_network.add(
            network_of(client), PER_ADDRESS
        ):
            self.refused += 1
            connection.close()
            return
        protocol = LingeringProtocol(self, client)
        self.open.add(protocol)
        self._adopt(connection, protocol)

    def remove(self, protocol: LingeringProtocol) -> None:
        """Release a connection. Idempotent."""
        if protocol in self.open:
            self.open.discard(protocol)
            self._by_network.remove(network_of(protocol.client))
        self.state.wheel.discard(protocol)


def _plain_peer(transport: asyncio.BaseTransport) -> Peer:
    address: Any = transport.get_extra_info("peername")
    return Peer(address[0] if address else "")


class LingeringProtocol(HttpProtocol):
    """An HTTP connection over TCP whose end does not destroy the response.

    Closing at once would answer input that is still on its way with a reset. So the write side is closed first, and
    input is discarded until the client ends too, for at most LINGER_TIME and LINGER_BYTES.
    """

    __slots__ = ("_left", "_listener", "client")

    def __init__(self, listener: RedirectListener, client: str) -> None:
        super().__init__(listener.endpoint)
        self._listener = listener
        self._left = LINGER_BYTES
        self.client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self in self._listener.open:
            super().connection_made(transport)
        else:  # the listener was closed meanwhile
            cast("asyncio.Transport", transport).abort()

    def data_received(self, data: bytes) -> None:
        if not self.is_ended:
            super().data_received(data)
            return
        self._left -= len(data)
        if self._left < 0:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._listener.remove(self)

    def handle_deadline(self, now: float) -> None:
        if self.is_ended:
            self.abort()
        else:
            super().handle_deadline(now)

    def close(self) -> None:
        """Close the write side and wait for the client's end."""
        transport = self._transport
        self._release()
        if transport is not None and not transport.is_closing():
            wheel = self._listener.state.wheel
            wheel.set(self, wheel.now() + LINGER_TIME)
            transport.write_eof()
            transport.resume_reading()
