"""The HTTPS side of a server: HTTP on the TLS port, and the redirecting port without TLS.

What this file decides: the header fields and limits of both, and how they end with the server. Their resources are
in resources.py.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from zcproto.admin.http_protocol import HttpEndpoint, HttpProtocol
from zcproto.admin.redirect import RedirectListener
from zcproto.config import Config
from zcproto.config.model import HttpConfig
from zcproto.http.connection import HttpLimits
from zcproto.http.messages import Peer, Router
from zcproto.http.security_headers import SecurityHeaders, StrictTransportSecurity
from zcproto.server.listener import bind, take_over
from zcproto.server.state import ServerState, log
from zcproto.tls.server import TlsServerTransport

HTTP_ALPN: Final = "http/1.1"


class HttpSide:
    """The HTTPS side of one server. Routes may be added to `router` until it serves."""

    def __init__(self, config: Config, state: ServerState) -> None:
        self._config = config
        self._state = state
        self.redirect: RedirectListener | None = None
        self.router = Router()
        self.endpoint = HttpEndpoint(
            state, self.router, SecurityHeaders(hsts_of(config.http)), _limits(config), _tls_peer
        )

    def reconfigure(self, config: Config) -> None:
        """Apply another configuration to future connections."""
        self._config = config
        self.endpoint.security = SecurityHeaders(hsts_of(config.http))
        self.endpoint.limits = _limits(config)

    @property
    def protocols(self) -> dict[str | None, Callable[[], asyncio.Protocol]]:
        """The protocols of the TlsAcceptor by ALPN name; None is for clients without ALPN."""
        return {HTTP_ALPN: self.endpoint.protocol, None: self.endpoint.protocol}

    @property
    def connections(self) -> set[HttpProtocol]:
        return self.endpoint.connections

    def listen_plain(
        self, names: Callable[[], Iterable[str]], https_port: int, passed: Sequence[socket.socket] = ()
    ) -> None:
        """Bind the port without TLS, or use listening sockets of a service manager.

        Args:
            names: Returns the names of the serving certificates.

        Raises:
            ConfigError: The port cannot be bound.
        """
        if passed:
            sockets = list(passed)
            take_over(sockets)
        else:
            sockets = bind(self._config.server.host, self._config.http.redirect_port, "http.redirect_port")
        self.redirect = RedirectListener(sockets, self._state, names, https_port)

    def close_those(self, is_bad: Callable[[bytes], bool]) -> None:
        """Close the connections of clients with a bad certificate (DER)."""
        for protocol in list(self.connections):
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


def _limits(config: Config) -> HttpLimits:
    return HttpLimits(request_timeout=config.http.request_timeout, idle_timeout=config.http.idle_timeout)


def _tls_peer(transport: TlsServerTransport) -> Peer:
    return Peer(transport.peer, transport.peer_certificate)


def hsts_of(config: HttpConfig) -> StrictTransportSecurity | None:
    """Return the configured Strict-Transport-Security policy, or None if it is off."""
    if not config.hsts:
        return None
    return StrictTransportSecurity(
        config.hsts_max_age_seconds, config.hsts_include_subdomains, config.hsts_preload
    )
