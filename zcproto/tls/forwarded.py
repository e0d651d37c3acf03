"""A connection that a load balancer passes on: its header first, then TLS as ever.

The handshake's deadline began with the connection, so a header that does not come is no way to stay. Until it is
there, the peer is the balancer; from then on it is the client. What is refused here gets no alert, as no
TLS has begun.
"""

from __future__ import annotations

from zcproto.tls.failure import TlsFailure
from zcproto.tls.proxy_header import ProxyHeaderReader
from zcproto.tls.server import TlsAcceptor, TlsServerTransport


class ForwardedTransport(TlsServerTransport):
    """One connection of a TlsAcceptor, from an address whose headers are believed.

    Who else connects must never get one of these: the header's word is taken for the peer's address.
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
