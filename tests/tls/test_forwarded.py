"""Test connections forwarded by a load balancer: a PROXY header, then TLS."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from tests.helpers import FakeTimers
from tests.tls.support import PEER, TlsPair
from tests.tls.test_proxy_header import header
from zcproto.tls.failure import TlsFailure
from zcproto.tls.forwarded import ForwardedTransport
from zcproto.tls.transport import TlsPhase

CLIENT = "198.51.100.9"
HEADER = header(body=bytes([198, 51, 100, 9, 192, 0, 2, 1]) + b"\x9c\x40\x1d\x13")


@pytest.fixture
def pair(timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> TlsPair:
    pair = TlsPair(timers, server_tls, client_tls, kind=ForwardedTransport)
    pair.acceptor.on_forwarded = lambda balancer, client: pair.log.append((balancer, client)) is None
    pair.acceptor.on_closed = lambda peer: pair.log.append(f"closed {peer}")
    return pair


def end(pair: TlsPair) -> list[Any]:
    pair.raw.deliver_eof()
    pair.timers.run()
    assert pair.phase is TlsPhase.CLOSED
    assert pair.acceptor.handshakes_in_progress == 0
    assert len(pair.acceptor.wheel) == 0
    return pair.log


def test_client_of_header_becomes_peer(pair: TlsPair) -> None:
    assert pair.server.peer == PEER
    pair.raw.deliver(HEADER)
    assert pair.server.peer == CLIENT
    pair.agree()
    assert pair.protocol.calls == ["made"]
    pair.say(b"hello")
    assert pair.protocol.received == b"hello"
    assert end(pair) == [(PEER, CLIENT), "slot free", (TlsFailure.TRUNCATED, CLIENT), f"closed {CLIENT}"]


@pytest.mark.parametrize("piece", [1, 7, 28, 29, 300, 65_536])
def test_header_and_hello_work_for_every_split(pair: TlsPair, piece: int) -> None:
    pair.raw.deliver(HEADER + pair.step(), piece)
    pair.hear()
    pair.raw.deliver(pair.step(), piece)
    assert pair.protocol.calls == ["made"]
    assert pair.server.peer == CLIENT


def test_local_command_keeps_balancer_as_peer(pair: TlsPair) -> None:
    pair.raw.deliver(header(command=0, family=0, body=b""))
    pair.agree()
    assert pair.server.peer == PEER
    assert pair.log == ["slot free"]


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", TlsFailure.PROXY_HEADER_VERSION),
        (header(command=2), TlsFailure.PROXY_HEADER_MALFORMED),
        (None, TlsFailure.PROXY_HEADER_MISSING),
    ],
)
def test_connection_without_header_gets_no_answer(
    pair: TlsPair, data: bytes | None, failure: TlsFailure
) -> None:
    hello = pair.step()
    pair.raw.deliver(hello if data is None else data + hello)
    assert pair.failures == {failure: 1}
    assert pair.raw.take() == b""
    assert pair.raw.eof_written
    pair.raw.deliver(HEADER + hello)  # too late: discarded
    assert pair.raw.take() == b""
    assert end(pair) == [(failure, PEER), "slot free", f"closed {PEER}"]


def test_refused_forwarded_client_is_cut_without_a_byte(pair: TlsPair) -> None:
    pair.acceptor.on_forwarded = lambda balancer, client: False
    pair.raw.deliver(HEADER + pair.step())
    assert pair.raw.aborted
    assert pair.raw.take() == b""
    assert end(pair) == ["slot free", f"closed {PEER}"]
    assert pair.failures == {}, "it is the limit's doing, which counts it"


def test_header_and_handshake_share_one_deadline(pair: TlsPair) -> None:
    pair.raw.deliver(HEADER[:-1])
    pair.timers.advance(4.0)
    pair.raw.deliver(HEADER[-1:])
    pair.timers.advance(1.5)
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}


def test_missing_header_ends_at_deadline(pair: TlsPair) -> None:
    for byte in HEADER[:5]:
        pair.raw.deliver(bytes([byte]))
        pair.timers.advance(1.1)
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}
    assert pair.raw.take() == b""


def test_balancer_health_probe_is_a_disconnect(pair: TlsPair) -> None:
    assert end(pair) == [(TlsFailure.DISCONNECTED, PEER), "slot free", f"closed {PEER}"]


def test_second_header_is_not_tls(pair: TlsPair) -> None:
    pair.raw.deliver(HEADER + HEADER)
    assert pair.failures == {TlsFailure.NOT_TLS: 1}
    assert pair.server.peer == CLIENT


def test_header_from_untrusted_address_is_not_tls(tls_pair: TlsPair) -> None:
    """An untrusted sender could claim any address."""
    tls_pair.raw.deliver(HEADER + tls_pair.step())
    assert tls_pair.failures == {TlsFailure.NOT_TLS: 1}
    assert tls_pair.server.peer == PEER
