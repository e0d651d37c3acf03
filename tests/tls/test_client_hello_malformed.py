"""Test the ClientHello parser: truncated and malformed fields and records, other protocols, any bytes."""

from __future__ import annotations

import itertools
import math
import struct
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tls.hello_judge import (
    GOOD,
    HTTP,
    MALFORMED,
    NO_TLS_1_3,
    NOT_TLS,
    RECORD_TOO_LARGE,
    TOO_LARGE,
    UNEXPECTED,
    Verdict,
    byte_by_byte,
    judge,
    judge_pieces,
    reader,
)
from tests.tls.hellos import AES_256, SERVER_NAME, Hello, in_records, server_name, suite_list, vector
from zcproto.tls.client_hello import ACCEPTED, MAX_MESSAGE, MAX_SIZE, Refusal

# --- malformed in every field ---------------------------------------------------------------------------

BODY = GOOD.body()
SESSION_AT, SUITES_AT, COMPRESSION_AT, EXTENSIONS_AT = 34, 67, 75, 77


def with_body(body: bytes) -> bytes:
    return in_records(b"\1" + vector(body, 3))


def patched(at: int, new: bytes) -> bytes:
    return with_body(BODY[:at] + new + BODY[at + len(new) :])


def test_truncated_body_is_malformed_or_without_tls_1_3() -> None:
    for length in range(len(BODY)):
        # Without extensions it is a complete hello of an older version.
        expected = NO_TLS_1_3 if length == EXTENSIONS_AT else MALFORMED
        assert judge(with_body(BODY[:length])) == expected, length


@pytest.mark.parametrize(
    "data",
    [
        patched(SESSION_AT, b"\xff"),
        patched(SESSION_AT, b"\x1f"),
        with_body(replace(GOOD, session_id=bytes(33)).body()),
        with_body(replace(GOOD, suites=b"").body()),
        with_body(replace(GOOD, suites=b"\x13").body()),
        with_body(replace(GOOD, suites=b"\x13\x02\x13").body()),
        patched(SUITES_AT, b"\xff\xff"),
        patched(SUITES_AT, b"\0\7"),
        with_body(replace(GOOD, compressions=b"").body()),
        patched(COMPRESSION_AT, b"\xff"),
        patched(EXTENSIONS_AT, b"\xff\xff"),
        patched(EXTENSIONS_AT, b"\0\1"),
        patched(EXTENSIONS_AT + 4, b"\xff\xff"),
        with_body(BODY + b"\0"),
        with_body(replace(GOOD, extensions=None).body() + vector(b"\0", 2)),
        with_body(replace(GOOD, extensions=None).body() + vector(b"\0\x2b\0", 2)),
        with_body(replace(GOOD, extensions=None).body() + b"\0"),
        with_body(b""),
    ],
    ids=range(18),
)
def test_length_exceeding_its_container_is_malformed(data: bytes) -> None:
    assert judge(data) == MALFORMED
    assert byte_by_byte(data) == MALFORMED


@pytest.mark.parametrize("more", [1, 2, 255])
def test_last_extension_beyond_end_is_malformed(more: int) -> None:
    hello = replace(GOOD, extensions=[*(GOOD.extensions or ()), (0xFFFF, b"abc")])
    body = hello.body()
    assert body.endswith(b"\0\3abc")
    assert judge(with_body(body)) is ACCEPTED
    assert judge(with_body(body[:-5] + (3 + more).to_bytes(2, "big") + b"abc")) == MALFORMED


@pytest.mark.parametrize("session_id", [b"", bytes(1), bytes(32)])
def test_session_id_of_any_allowed_length_is_accepted(session_id: bytes) -> None:
    assert judge(replace(GOOD, session_id=session_id).bytes()) is ACCEPTED


def test_unknown_and_empty_extensions_are_ignored() -> None:
    extensions = [(0x0A0A, b""), (0xFFFF, b"x" * 500), *(GOOD.extensions or ()), (21, bytes(100))]
    assert judge(replace(GOOD, extensions=extensions).bytes()) is ACCEPTED


def test_hello_without_extensions_is_unsupported_version() -> None:
    assert judge(replace(GOOD, extensions=None).bytes()) == NO_TLS_1_3
    assert judge(replace(GOOD, extensions=[]).bytes()) == NO_TLS_1_3


# --- records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (b"\x16\3\1\0\0", MALFORMED),
        (GOOD.bytes()[:5] + b"", None),
        (b"\x16\3\1\xff\xff", RECORD_TOO_LARGE),
        (b"\x16\3\1\x40\x01", RECORD_TOO_LARGE),
        (b"\x16\3\1\x40\x00", None),
        (b"\x16\3\1\0\1\2", UNEXPECTED),
        (b"\x16\3\3\0\4\2\0\0\0", UNEXPECTED),
        (b"\x16\3\3\0\4\1\xff\xff\xff", TOO_LARGE),
        (b"\x16\3\3\0\4\1\2\1\x45", TOO_LARGE),
        (
            in_records(b"\1\1" + len(BODY).to_bytes(2, "big") + BODY),
            None,
        ),  # the high byte of the length counts
        (b"\x16\3\3\0\4\1\2\1\x44", None),
        (b"\x18\3\3\0\1\0", UNEXPECTED),
        (b"\x13\3", UNEXPECTED),
        (b"\xff\3\3\0\1\0", UNEXPECTED),
        (b"\0\3", UNEXPECTED),
        (b"\0", None),
        (b"\x16\3\3\0\4\1\0\0\0", MALFORMED),
        (b"\x15\3\1\0\2\2\x28", UNEXPECTED),
        (b"\x14\3\3\0\1\1", UNEXPECTED),
        (b"\x17\3\3\0\5hello", UNEXPECTED),
        (b"\x15", None),
        (b"\x16", None),
        (b"\x16\3", None),
        (b"\x16\3\1\2", None),
        (b"", None),
    ],
)
def test_first_bytes_that_are_records(data: bytes, verdict: Verdict) -> None:
    assert judge(data) == verdict
    assert byte_by_byte(data) == verdict


def test_empty_handshake_record_is_malformed() -> None:
    message = GOOD.message()
    data = in_records(message[:20]) + b"\x16\3\1\0\0" + in_records(message[20:])
    assert judge(data) == MALFORMED
    assert byte_by_byte(data) == MALFORMED


@pytest.mark.parametrize("kind", [20, 21, 23, 24, 0])
def test_record_of_other_type_within_hello_is_unexpected(kind: int) -> None:
    message = GOOD.message()
    data = in_records(message[:20]) + bytes([kind, 3, 3, 0, 1, 1]) + in_records(message[20:])
    assert judge(data) == UNEXPECTED
    assert byte_by_byte(data) == UNEXPECTED


@pytest.mark.parametrize("more", [b"\0", b"\x14\3\3\0\1\1", GOOD.bytes(), b"\x17\3\3\0\5hello"])
def test_records_after_hello_are_left_to_openssl(more: bytes) -> None:
    """They may be early data (RFC 8446 section 4.2.10)."""
    assert judge(GOOD.bytes() + more) is ACCEPTED
    assert judge(with_body(b"") + more) == MALFORMED


@pytest.mark.parametrize("size", [5, 100_000])
def test_data_after_hello_in_same_record_is_unexpected(size: int) -> None:
    data = in_records(GOOD.message() + b"\0", size)
    assert judge(data) == UNEXPECTED
    assert byte_by_byte(data) == UNEXPECTED


def test_any_legacy_record_version_is_accepted() -> None:
    """RFC 8446 section 5.1: ignored, except that 3 distinguishes TLS from noise."""
    for minor in range(256):
        assert judge(in_records(GOOD.message(), version=bytes([3, minor]))) is ACCEPTED


def large_message(size: int) -> bytes:
    """Return a valid hello of exactly `size` bytes, message header included."""
    missing = size - len(GOOD.message()) - 4
    return replace(GOOD, extensions=[*(GOOD.extensions or ()), (21, bytes(missing))]).message()


def test_hello_with_vectors_of_maximum_size_is_accepted() -> None:
    """That is OpenSSL's limit: 65,534 bytes of suites and 65,535 of extensions are less."""
    suites = GOOD.suites + suite_list(AES_256) * ((65_534 - len(GOOD.suites)) // 2)
    extensions = [*(GOOD.extensions or ()), (21, b"")]
    used = sum(4 + len(content) for _, content in extensions)
    hello = replace(GOOD, suites=suites, extensions=[*extensions[:-1], (21, bytes(65_535 - used))])
    assert judge(hello.bytes()) is ACCEPTED
    assert len(hello.message()) <= MAX_MESSAGE + 4


@pytest.mark.parametrize("size", [16_384, 2**14 + 1, 40_000])
def test_hello_in_records_of_maximum_size_is_accepted(size: int) -> None:
    data = in_records(large_message(size), 2**14)
    assert judge(data) is ACCEPTED
    assert judge_pieces(*(data[at : at + 1_000] for at in range(0, len(data), 1_000))) is ACCEPTED


def test_record_headers_count_towards_size_limit() -> None:
    message = large_message(30_000)
    assert judge(in_records(message, 2)) is ACCEPTED
    data = in_records(message, 1)
    assert len(data) > MAX_SIZE
    assert judge(data) == TOO_LARGE
    assert byte_by_byte(data) == TOO_LARGE


def test_incomplete_hello_buffers_at_most_the_limit() -> None:
    slow = reader()
    data = in_records(b"\1" + (60_000).to_bytes(3, "big") + bytes(60_000), 1)
    while slow.feed(data[len(slow.raw) : len(slow.raw) + 1_000]) is None:
        assert len(slow.raw) <= MAX_SIZE + 4
    assert len(slow.raw) <= MAX_SIZE + 1_000


# --- not TLS --------------------------------------------------------------------------------------

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE"]


@pytest.mark.parametrize("method", METHODS)
def test_plaintext_http_is_recognised(method: str) -> None:
    data = f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    assert judge(data) == HTTP
    assert byte_by_byte(data) == HTTP
    assert judge(f"{method} ".encode()) == HTTP
    for length in range(1, len(method) + 1):
        assert judge(data[:length]) is None


def test_http_2_preface_is_plaintext_http() -> None:
    assert judge(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") == HTTP


@pytest.mark.parametrize(
    "data",
    [
        b"get / HTTP/1.1\r\n",
        b"GETS / HTTP/1.1",
        b"GET\t/",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x80\x2e\1\0\2\0\x15\0\0\0\x10",  # SSLv2
        b"\0\0\0\x40\1\2\0\0",  # a frame of ZCP/1 without TLS
        b"\x16\2\0\0\x10",
        b"\x16\xff",
        b"\x15\x02",
        b"\x17garbage",
        b"\r\n\r\n",
        b"\xff" * 100,
        b" GET / HTTP/1.1",
    ],
)
def test_other_bytes_are_not_tls(data: bytes) -> None:
    assert judge(data) == NOT_TLS
    assert byte_by_byte(data) == NOT_TLS


# --- any bytes ------------------------------------------------------------------------------------------


def as_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.lists(st.integers(0, 10_000), max_size=6))
def test_any_bytes_give_verdict_or_need_more(data: bytes, cuts: list[int]) -> None:
    verdict = judge(data)
    assert verdict is None or isinstance(verdict, Refusal)
    assert judge_pieces(*as_pieces(data, cuts)) == verdict


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_hello_is_judged_the_same_for_every_split(data: st.DataObject) -> None:
    named = GOOD.with_extension(SERVER_NAME, server_name(b"a.example"))
    hello = bytearray(in_records(named.message(), data.draw(st.sampled_from([7, 40, 2**14]))))
    for _ in range(data.draw(st.integers(1, 4))):
        hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    whole = judge(bytes(hello))
    pieces = as_pieces(bytes(hello), data.draw(st.lists(st.integers(0, 10_000), max_size=6)))
    seen = judge_pieces(*pieces)
    assert seen == whole


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=40)), max_size=8), st.binary(max_size=12))
def test_any_extensions_give_verdict(extensions: list[tuple[int, bytes]], suites: bytes) -> None:
    assert judge(Hello(suites=suites, extensions=extensions).bytes()) is not None


def test_hello_of_one_byte_records_takes_linear_time() -> None:
    """Records of one byte, byte by byte: quadratic parsing took a minute."""

    def seconds(size: int) -> float:
        data = in_records(b"\1" + MAX_MESSAGE.to_bytes(3, "big") + bytes(size), 1)
        best = math.inf
        for _ in range(3):
            start = time.thread_time()  # CPU time, not wall time
            byte_by_byte(data)
            best = min(best, time.thread_time() - start)
        return best

    assert seconds(2_000) < 12 * seconds(400) + 0.01


def test_patch_offsets_match_the_hello() -> None:
    """Check the offsets protocol against the patched hello."""
    assert BODY[SESSION_AT] == 32
    assert struct.unpack_from("!H", BODY, SUITES_AT) == (6,)
    assert BODY[COMPRESSION_AT] == 1
    assert struct.unpack_from("!H", BODY, EXTENSIONS_AT) == (len(BODY) - EXTENSIONS_AT - 2,)
