"""Test PROXY headers of every kind and split, invalid ones, and the connections that they precede."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.tls.conftest import NewPair
from tests.tls.support import PEER, TlsPair
from zcproto.tls.failure import TlsFailure
from zcproto.tls.proxy import MAX_SIZE, SIGNATURE, ForwardedTransport, ProxyHeader, ProxyHeaderReader
from zcproto.tls.transport import TlsPhase

MISSING = TlsFailure.PROXY_HEADER_MISSING
VERSION = TlsFailure.PROXY_HEADER_VERSION
MALFORMED = TlsFailure.PROXY_HEADER_MALFORMED

TCP_4 = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + struct.pack("!HH", 40_000, 7443)
TCP_6 = bytes.fromhex("20010db8" + "00" * 11 + "07" + "20010db8" + "00" * 11 + "01") + b"\0\1\0\2"
MAPPED = bytes(10) + b"\xff\xff\xc0\x00\x02\x07" + bytes(10) + b"\xff\xff\xc6\x33\x64\x01" + b"\0\1\0\2"
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")
TLV = b"\x01\x00\x05zcp/1" + b"\xe0\x00\x00"


def header(
    command: int = 1, family: int = 0x11, body: bytes = TCP_4, *, version: int = 2, length: int | None = None
) -> bytes:
    length = len(body) if length is None else length
    return SIGNATURE + bytes([version << 4 | command, family]) + struct.pack("!H", length) + body


GOOD = {
    "TCP over IPv4": (header(), "192.0.2.7"),
    "TCP over IPv6": (header(family=0x21, body=TCP_6), "2001:db8::7"),
    "IPv4 within IPv6": (header(family=0x21, body=MAPPED), "192.0.2.7"),
    "with fields": (header(body=TCP_4 + TLV), "192.0.2.7"),
    "with as many as may be": (header(body=TCP_4 + bytes(MAX_SIZE - 16 - 12)), "192.0.2.7"),
    "with broken fields": (header(body=TCP_4 + b"\x01\xff\xff"), "192.0.2.7"),
    "of a UNIX socket": (header(family=0x31, body=UNIX), None),
    "of what is unknown": (header(family=0, body=b""), None),
    "of what is unknown, with bytes": (header(family=0, body=TLV), None),
    "the balancer's own": (header(command=0, family=0, body=b""), None),
    "the balancer's own, with a family": (header(command=0), None),
    "the balancer's own, of any family": (header(command=0, family=0xFF, body=b"x"), None),
}
BAD = {
    "TLS": (b"\x16\x03\x01\x02\x00\x01", MISSING),
    "HTTP": (b"GET / HTTP/1.1\r\n\r\n", MISSING),
    "an empty line": (b"\r\n\r\n\x00\r\nQUIT\r\n", MISSING),
    "version 1": (b"PROXY TCP4 192.0.2.7 198.51.100.1 40000 7443\r\n", VERSION),
    "version 1 of what is unknown": (b"PROXY UNKNOWN\r\n", VERSION),
    "nearly version 1": (b"PROXIED", MISSING),
    "a later version": (header(version=3), VERSION),
    "version 1 in binary": (header(version=1), VERSION),
    "an unknown command": (header(command=2), MALFORMED),
    "an unknown family": (header(family=0x41), MALFORMED),
    "an unknown transport": (header(family=0x13), MALFORMED),
    "datagrams": (header(family=0x12), MALFORMED),
    "half a family": (header(family=0x10), MALFORMED),
    "too short for IPv4": (header(body=TCP_4[:-1]), MALFORMED),
    "too short for IPv6": (header(family=0x21, body=TCP_6[:-1]), MALFORMED),
    "too short for UNIX": (header(family=0x31, body=UNIX[:-1]), MALFORMED),
    "one byte too long": (header(body=TCP_4 + bytes(MAX_SIZE - 16 - 12 + 1)), MALFORMED),
    "the longest": (header(length=0xFFFF), MALFORMED),
    "the balancer's own, too long": (header(command=0, length=0xFFFF), MALFORMED),
}


def read(*pieces: bytes) -> ProxyHeader | TlsFailure | None:
    """Return the result of a reader for these pieces, with later pieces appended to its rest."""
    reader = ProxyHeaderReader()
    for at, piece in enumerate(pieces, 1):
        verdict = reader.feed(piece)
        if isinstance(verdict, ProxyHeader):
            return verdict._replace(rest=verdict.rest + b"".join(pieces[at:]))
        if verdict is not None:
            return verdict
    return None


@pytest.mark.parametrize(("raw", "address"), GOOD.values(), ids=GOOD)
def test_header_is_parsed_for_every_split(raw: bytes, address: str | None) -> None:
    for rest in (b"", b"\x16\x03\x01", bytes(20_000)):
        expected = ProxyHeader(address, rest)
        data = raw + rest
        assert read(data) == expected
        assert read(*(data[i : i + 1] for i in range(len(data)))) == expected
        for cut in range(len(raw) + 1):
            assert read(data[:cut], data[cut:]) == expected


@pytest.mark.parametrize(("raw", "address"), GOOD.values(), ids=GOOD)
def test_truncated_header_needs_more(raw: bytes, address: str | None) -> None:
    for cut in range(len(raw)):
        assert read(raw[:cut]) is None


@pytest.mark.parametrize(("raw", "failure"), BAD.values(), ids=BAD)
def test_invalid_header_is_refused_for_every_split(raw: bytes, failure: TlsFailure) -> None:
    assert read(raw) is failure
    for cut in range(len(raw) + 1):
        assert read(raw[:cut], raw[cut:]) is failure
    assert read(*(raw[i : i + 1] for i in range(len(raw)))) is failure


def test_oversized_header_is_refused_early() -> None:
    assert read(header(length=0xFFFF)[:16]) is MALFORMED


def test_header_accepts_memoryview() -> None:
    assert ProxyHeaderReader().feed(memoryview(header() + b"x")) == ProxyHeader("192.0.2.7", b"x")


any_header = st.builds(
    lambda head, family, length, body: SIGNATURE + bytes([head, family]) + struct.pack("!H", length) + body,
    st.sampled_from([0x20, 0x21, 0x21, 0x21, 0x22, 0x11, 0x31]),
    st.sampled_from([0, 0x11, 0x21, 0x31, 0x12, 0xFF]),
    st.integers(0, 300) | st.integers(0, 0xFFFF),
    st.binary(max_size=300),
)


@given(st.binary(max_size=60) | any_header, st.lists(st.integers(0, 400), max_size=5))
@example(b"", [])
def test_any_bytes_give_header_or_failure_for_every_split(data: bytes, cuts: list[int]) -> None:
    whole = read(data)
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    assert read(*(data[start:end] for start, end in pairwise(places))) == whole
    if isinstance(whole, ProxyHeader):
        assert data.startswith(SIGNATURE)
        assert data.endswith(whole.rest)
    elif whole is None:
        assert len(data) < MAX_SIZE


# --- connections ----------------------------------------------------------------------------------------

CLIENT = "198.51.100.9"
HEADER = header(body=bytes([198, 51, 100, 9, 192, 0, 2, 1]) + b"\x9c\x40\x1d\x13")


@pytest.fixture
def pair(new_pair: NewPair) -> TlsPair:
    pair = new_pair(kind=ForwardedTransport)
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
    assert end(pair) == [(PEER, CLIENT), (TlsFailure.TRUNCATED, CLIENT), f"closed {CLIENT}"]


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
    assert pair.log == []


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
    assert end(pair) == [(failure, PEER), f"closed {PEER}"]


def test_refused_forwarded_client_is_cut_without_a_byte(pair: TlsPair) -> None:
    pair.acceptor.on_forwarded = lambda balancer, client: False
    pair.raw.deliver(HEADER + pair.step())
    assert pair.raw.aborted
    assert pair.raw.take() == b""
    assert end(pair) == [f"closed {PEER}"]
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
    assert end(pair) == [(TlsFailure.DISCONNECTED, PEER), f"closed {PEER}"]


def test_second_header_is_not_tls(pair: TlsPair) -> None:
    pair.raw.deliver(HEADER + HEADER)
    assert pair.failures == {TlsFailure.NOT_TLS: 1}
    assert pair.server.peer == CLIENT


def test_header_from_untrusted_address_is_not_tls(tls_pair: TlsPair) -> None:
    """An untrusted sender could claim any address."""
    tls_pair.raw.deliver(HEADER + tls_pair.step())
    assert tls_pair.failures == {TlsFailure.NOT_TLS: 1}
    assert tls_pair.server.peer == PEER
