"""Accept a connection forwarded by a load balancer: a PROXY header, then TLS.

The handshake timeout starts with the connection, so a missing header does not hold it open. The peer is the
balancer until the header is complete, then the client. A refusal here sends no alert, because TLS has not begun.
"""

from __future__ import annotations

from zcproto.tls.failure import TlsFailure
from zcproto.tls.proxy_header import ProxyHeaderReader
from zcproto.tls.server import TlsAcceptor, TlsServerTransport


class ForwardedTransport(TlsServerTransport):
    """One connection of a TlsAcceptor, from an address whose PROXY headers are trusted.

    Never use it for other peers: the header sets the peer's address.
    """

    __slots__ = ("_header",)

    def __init__(self, acceptor: TlsAcceptor, peer: str) -> None:
        super().__init__(acceptor, peer)
        self._header: ProxyHeaderReader | None = ProxyHeaderReader()

    def _received_in_handshake(self, data: memoryview) -> None:
        if self._header is None:
            super()._received_in_handshake(data)
            return
        verdict = self._header.feed(data)
        if verdict is None:
            return
        self._header = None
        if isinstance(verdict, TlsFailure):
            self._fail(verdict)
            return
        client, rest = verdict
        if client is not None:
            if not self._acceptor.on_forwarded(self.peer, client):
                self.abort()
                return
            self.peer = client
        if rest:
            super()._received_in_handshake(memoryview(rest))
