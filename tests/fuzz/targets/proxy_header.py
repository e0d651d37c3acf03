"""Fuzz the first bytes of a load balancer's connection: a PROXY header, a failure, or incomplete."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from tests.fuzz.target import Target, divisions
from zcproto.tls.failure import TlsFailure
from zcproto.tls.proxy import MAX_SIZE, SIGNATURE, ProxyHeader, ProxyHeaderReader

FAILURES = frozenset(
    {TlsFailure.PROXY_HEADER_MISSING, TlsFailure.PROXY_HEADER_VERSION, TlsFailure.PROXY_HEADER_MALFORMED}
)


def verdict(pieces: Sequence[bytes]) -> tuple[ProxyHeader | TlsFailure | None, int]:
    """Return the verdict, and the number of bytes received until then."""
    reader = ProxyHeaderReader()
    size = 0
    for piece in pieces:
        size += len(piece)
        judged = reader.feed(piece)
        if judged is not None:
            return judged, size
        assert size < MAX_SIZE
    return None, size


def run(data: bytes) -> None:
    verdict([data])


def check(data: bytes) -> None:
    whole, _ = verdict([data])
    for pieces in divisions(data):
        judged, at = verdict(pieces)
        assert judged == verdict([data[:at]])[0]
        if isinstance(judged, ProxyHeader):
            assert isinstance(whole, ProxyHeader)
            assert whole == ProxyHeader(judged.address, judged.rest + data[at:])
        else:
            assert judged is whole
    if isinstance(whole, ProxyHeader):
        assert data.startswith(SIGNATURE)
        assert data.endswith(whole.rest)
        assert len(SIGNATURE) + 4 <= len(data) - len(whole.rest) <= MAX_SIZE
        if whole.address is not None:
            assert str(ipaddress.ip_address(whole.address)) == whole.address
    elif whole is None:
        assert SIGNATURE.startswith(data[:12]) or b"PROXY ".startswith(data)
    else:
        assert whole in FAILURES


TARGET = Target("proxy_header", run, check)
