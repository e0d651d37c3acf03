"""Accept connections that a load balancer forwards: a PROXY header with the client's address, then TLS.

The header (haproxy.org, proxy-protocol.txt section 2.2) has a signature of 12 bytes, one byte with version and
command, one with the address family, two with the length of the rest, the addresses, and fields (TLVs) that are
ignored.

Every input gives a header, the failure, or None ("more bytes needed"). At most MAX_SIZE bytes are buffered, and
parsing takes constant time. Version 1, which is text without a length, is refused.

The handshake timeout starts with the connection, so a missing header does not hold it open. The peer is the
balancer until the header is complete, then the client: the connection takes a place of its network. A refusal here
sends no alert, because TLS has not begun.

Must not know: who may send such a header. A sender can give any address.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Final, NamedTuple

from zcproto.tls.failure import TlsFailure
from zcproto.tls.pending import Network
from zcproto.tls.server import TlsAcceptor, TlsServerTransport

MAX_SIZE: Final = 4_096
"""Maximum bytes of a header. Addresses take up to 232; some balancers add the certificate of the client."""

SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_VERSION_1: Final = b"PROXY "
_FIXED: Final = 16
_VERSION: Final = 2
_LOCAL: Final = 0
_PROXY: Final = 1

_UNKNOWN: Final = 0x00  # AF_UNSPEC
_TCP_4: Final = 0x11
_TCP_6: Final = 0x21
_UNIX_STREAM: Final = 0x31
_ADDRESSES: Final = {_UNKNOWN: 0, _TCP_4: 12, _TCP_6: 36, _UNIX_STREAM: 216}
"""Bytes of both addresses by family and transport. Datagram families (0x12, 0x22, 0x32) are not accepted."""

_fixed_part: Final = struct.Struct("!12xBBH").unpack_from


class ProxyHeader(NamedTuple):
    """A complete header.

    `address` is that of the client; None for a health check of the balancer or without a TCP address. `rest` are
    the bytes after the header: the beginning of TLS.
    """

    address: str | None
    rest: bytes


class ProxyHeaderReader:
    """Read the header of one connection of a load balancer."""

    __slots__ = ("_raw",)

    def __init__(self) -> None:
        self._raw = bytearray()

    def feed(self, data: bytes | memoryview) -> ProxyHeader | TlsFailure | None:
        """Add bytes. Return the result, or None if more bytes are needed. Do not call it after a result."""
        raw = self._raw
        raw += data
        size = len(raw)
        if raw[:12] != SIGNATURE[:size]:
            if size < len(_VERSION_1) and _VERSION_1.startswith(raw):
                return None
            is_version_1 = raw.startswith(_VERSION_1)
            return TlsFailure.PROXY_HEADER_VERSION if is_version_1 else TlsFailure.PROXY_HEADER_MISSING
        if size <= 12:
            return None
        if raw[12] >> 4 != _VERSION:
            return TlsFailure.PROXY_HEADER_VERSION
        if size < _FIXED:
            return None
        head, family, length = _fixed_part(raw)
        command = head & 0x0F
        if command not in (_LOCAL, _PROXY) or _FIXED + length > MAX_SIZE:
            return TlsFailure.PROXY_HEADER_MALFORMED
        # LOCAL: addresses and family are ignored (section 2.2).
        if command == _PROXY and length < _ADDRESSES.get(family, MAX_SIZE):
            return TlsFailure.PROXY_HEADER_MALFORMED
        if size < _FIXED + length:
            return None
        address = _source(raw, family) if command == _PROXY else None
        return ProxyHeader(address, bytes(raw[_FIXED + length :]))


def _source(raw: bytearray, family: int) -> str | None:
    """Return the client's address in a header of checked length."""
    if family == _TCP_4:
        return str(ipaddress.IPv4Address(bytes(raw[_FIXED : _FIXED + 4])))
    if family == _TCP_6:
        ip = ipaddress.IPv6Address(bytes(raw[_FIXED : _FIXED + 16]))
        return str(ip.ipv4_mapped or ip)
    return None


class ForwardedTransport(TlsServerTransport):
    """One connection of a TlsAcceptor, from an address whose PROXY headers are trusted.

    Never use it for other peers: the header sets the peer's address.
    """

    __slots__ = ("_header",)

    def __init__(
        self, acceptor: TlsAcceptor, peer: str, network: Network[TlsServerTransport] | None = None
    ) -> None:
        super().__init__(acceptor, peer, network)
        self._header: ProxyHeaderReader | None = ProxyHeaderReader()

    def _received_hello(self, data: memoryview) -> None:
        if self._header is None:
            super()._received_hello(data)
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
            self._leave_handshake()
            if not self._acceptor.on_forwarded(self.peer, client):
                self.abort()
                return
            self.peer = client
            self._acceptor.pending.join(self, self._acceptor.network_of(client))
        if rest:
            super()._received_hello(memoryview(rest))
