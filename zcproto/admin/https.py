"""The HTTPS side of a server: what speaks HTTP on its port, and on the port without TLS, if there is one.

What it decides: which fields and limits they have, and how they end with the server.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.admin.redirect import PlainListener
from zcproto.config import Config
from zcproto.config.model import HttpConfig
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import Peer
from zcproto.http.router import Router
from zcproto.http.security_headers import SecurityHeaders, StrictTransportSecurity
from zcproto.server.listener import bind, take_over
from zcproto.server.state import ServerState, log
from zcproto.tls.server import TlsServerTransport

HTTP_ALPN: Final = "http/1.1"


class HttpSide:
    """One server's HTTPS side. Its routes are added to `router`."""

    def __init__(self, config: Config, state: ServerState) -> None:
        self._config = config
        self._state = state
        self._plain: PlainListener | None = None
        self.router = Router()
        self.endpoint = HttpEndpoint(
            state, self.router, SecurityHeaders(hsts_of(config.http)), _limits(config), tls_peer
        )

    def reconfigure(self, config: Config) -> None:
        """Apply another configuration to future connections."""
        self._config = config
        self.endpoint.security = SecurityHeaders(hsts_of(config.http))
        self.endpoint.limits = _limits(config)

    @property
    def protocols(self) -> dict[str | None, Callable[[], asyncio.Protocol]]:
        """By ALPN name, for the TlsAcceptor. None: the client offers no ALPN."""
        return {HTTP_ALPN: self.endpoint.protocol, None: self.endpoint.protocol}

    @property
    def connections(self) -> set[HttpProtocol]:
        return self.endpoint.connections

    def figures(self) -> dict[str, Any]:
        """For `server.stats`."""
        counters = self.endpoint.counters
        return {
            "connections": len(self.connections),
            "connections_opened": counters.connections_opened,
            "responses": {str(status): count for status, count in sorted(counters.responses.items())},
            "write_timeouts": counters.write_timeouts,
            "redirect": None if self._plain is None else self._plain.figures(),
        }

    def redirect(
        self, names: Callable[[], Iterable[str]], https_port: int, passed: Sequence[socket.socket] = ()
    ) -> None:
        """Bind the port without TLS, or take sockets that were passed. `names` are those of the certificates.

        Raises ConfigError.
        """
        config = self._config
        if passed:
            sockets = list(passed)
            take_over(sockets)
        else:
            sockets = bind(config.server.host, config.http.redirect_port, "http.redirect_port")
        self._plain = PlainListener(sockets, self._state, names, https_port)

    async def start_redirecting(self) -> None:
        """Accept on the port without TLS, if there is one."""
        if self._plain is not None:
            await self._plain.start()

    def close_those(self, is_bad: Callable[[bytes], bool]) -> None:
        """Close the connections of clients whose certificate is bad."""
        for protocol in list(self.connections):
            certificate = protocol.peer_certificate()
            if certificate is not None and is_bad(certificate):
                log.warning("connection.certificate_revoked", peer=protocol.peer, connection=protocol.id)
                protocol.close()

    def drain(self) -> None:
        """Answer on: that the server is draining is what monitors ask for. Each answer ends its connection."""
        if self._plain is not None:
            self._plain.close()
        self.endpoint.drain()

    async def wait_at_rest(self) -> None:
        """After `drain`: return when no handler is at work."""
        await self.endpoint.wait_at_rest()

    def close(self) -> None:
        """Close every connection, and the port without TLS."""
        if self._plain is not None:
            self._plain.close()
        self.endpoint.close()


def hsts_of(config: HttpConfig) -> StrictTransportSecurity | None:
    """The policy of Strict-Transport-Security that is configured; None if it is switched off."""
    if not config.hsts:
        return None
    return StrictTransportSecurity(
        config.hsts_max_age_seconds, config.hsts_include_subdomains, config.hsts_preload
    )


def _limits(config: Config) -> HttpLimits:
    return HttpLimits(request_timeout=config.http.request_timeout, idle_timeout=config.http.idle_timeout)


def tls_peer(transport: TlsServerTransport) -> Peer:
    """Who is at the other end of a TLS connection."""
    return Peer(transport.peer, transport.peer_certificate)
