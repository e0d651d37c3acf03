"""Test PROXY headers: every kind, every split, and invalid input."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zcproto.tls.failure import TlsFailure
from zcproto.tls.proxy_header import MAX_SIZE, SIGNATURE, ProxyHeader, ProxyHeaderReader

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
