"""Test the ClientHello parser: acceptance, refusals with their alerts, limits and the cache."""

from __future__ import annotations

import itertools
import math
import ssl
import struct
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tls.hellos import (
    AES_128,
    AES_256,
    ALPN,
    CCM,
    CHACHA20,
    KEY_SHARE,
    SERVER_NAME,
    SUPPORTED_VERSIONS,
    TLS_1_2_SUITE,
    Hello,
    alpn,
    in_records,
    server_name,
    suite_list,
    vector,
    versions,
    with_extension,
    with_suites,
)
from tests.tls.support import captured_hello
from zcproto.tls.client_hello import (
    ACCEPTED,
    MAX_NAME,
    MAX_SIZE,
    SUITE_IDS,
    Accepted,
    AlertDescription,
    ClientHelloJudge,
    ClientHelloReader,
    Refusal,
    alert_record,
)
from zcproto.tls.context import client_context
from zcproto.tls.failure import TlsFailure

SUITES = frozenset(SUITE_IDS.values())
PROTOCOLS = frozenset(["zcp/1", "http/1.1", None])
Verdict = Accepted | Refusal | None

NOT_TLS = Refusal(TlsFailure.NOT_TLS, None)
HTTP = Refusal(TlsFailure.PLAINTEXT_HTTP, None)
MALFORMED = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.DECODE_ERROR)
UNEXPECTED = Refusal(TlsFailure.UNEXPECTED_MESSAGE, AlertDescription.UNEXPECTED_MESSAGE)
TOO_LARGE = Refusal(TlsFailure.CLIENT_HELLO_TOO_LARGE, AlertDescription.ILLEGAL_PARAMETER)
NO_TLS_1_3 = Refusal(TlsFailure.UNSUPPORTED_VERSION, AlertDescription.PROTOCOL_VERSION)
NO_SUITE = Refusal(TlsFailure.NO_SHARED_SUITE, AlertDescription.HANDSHAKE_FAILURE)
NO_ALPN = Refusal(TlsFailure.NO_APPLICATION_PROTOCOL, AlertDescription.NO_APPLICATION_PROTOCOL)
NO_NAME = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.UNRECOGNIZED_NAME)
LOCALHOST = Accepted("localhost")

GOOD = Hello()


JUDGE = ClientHelloJudge(SUITES, PROTOCOLS)
"""Shared by all tests of this file: cached hellos must not change a verdict."""


def reader() -> ClientHelloReader:
    return ClientHelloReader(JUDGE)


def judge(data: bytes) -> Verdict:
    """Return the verdict on bytes received at once: the same by both entry points, whatever is cached."""
    verdict = reader().feed(data)
    for judging in (ClientHelloJudge(SUITES, PROTOCOLS), JUDGE, JUDGE):
        whole = judging.judge_record(data)
        assert whole is None or whole == verdict
    return verdict


def judge_pieces(*pieces: bytes) -> Verdict:
    """Feed pieces up to the first verdict."""
    slow = reader()
    for piece in pieces:
        verdict = slow.feed(piece)
        if verdict is not None:
            return verdict
    return None


def byte_by_byte(data: bytes) -> Verdict:
    return judge_pieces(*(data[at : at + 1] for at in range(len(data))))


# --- real hellos ------------------------------------------------------------------------------------------


def real_hello(kind: str, client: ssl.SSLContext) -> bytes:
    context = client_context(verify=False)
    match kind:
        case "post-quantum share":
            pass
        case "small share":
            context.set_ecdh_curve("prime256v1")
        case "without name":
            return captured_hello(context, None)
        case "long name":
            return captured_hello(context, ".".join(["a" * 60] * 4))
        case "many protocols":
            context.set_alpn_protocols(["h2", "http/1.1", "zcp/1", "x" * 255])
        case "http":
            context.set_alpn_protocols(["http/1.1"])
        case "without protocols":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
        case "tls 1.2 too":
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        case "trusting":
            context = client
    return captured_hello(context)


REAL: dict[str, str | None] = dict.fromkeys(
    [
        "post-quantum share",
        "small share",
        "many protocols",
        "http",
        "without protocols",
        "tls 1.2 too",
        "trusting",
    ],
    "localhost",
)
REAL |= {"without name": None, "long name": ".".join(["a" * 60] * 4)}


@pytest.mark.parametrize(("kind", "name"), REAL.items())
def test_real_hello_is_accepted_with_its_server_name(
    kind: str, name: str | None, client_tls: ssl.SSLContext
) -> None:
    data = real_hello(kind, client_tls)
    whole = reader()
    assert whole.feed(data) == Accepted(name)
    assert whole.raw == data


@pytest.mark.parametrize(("kind", "name"), REAL.items())
def test_real_hello_byte_by_byte_is_accepted(kind: str, name: str | None, client_tls: ssl.SSLContext) -> None:
    data = real_hello(kind, client_tls)
    assert byte_by_byte(data[:-1]) is None
    assert byte_by_byte(data) == Accepted(name)


def test_real_hello_is_accepted_for_every_split(client_tls: ssl.SSLContext) -> None:
    data = real_hello("post-quantum share", client_tls)
    assert len(data) > 1_400, "a post-quantum share makes a hello longer than a segment"
    for at in range(1, len(data)):
        cut = reader()
        assert cut.feed(data[:at]) is None
        assert cut.feed(data[at:]) == LOCALHOST
        assert cut.raw == data


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 100, 500, 1_000])
def test_real_hello_fragmented_over_records_is_accepted(size: int, client_tls: ssl.SSLContext) -> None:
    data = in_records(real_hello("post-quantum share", client_tls)[5:], size)
    assert judge(data) == LOCALHOST
    assert byte_by_byte(data) == LOCALHOST
    assert byte_by_byte(data[:-1]) is None


@pytest.mark.requirement("tls_version")
def test_tls_1_2_client_is_refused_with_alert_70() -> None:
    context = client_context(verify=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert judge(captured_hello(context)) == NO_TLS_1_3


@pytest.mark.requirement("cipher_suites")
@pytest.mark.parametrize(
    ("suites", "verdict"),
    [
        ([AES_256], LOCALHOST),
        ([CHACHA20], LOCALHOST),
        ([AES_128, CHACHA20], LOCALHOST),
        ([AES_128], NO_SUITE),
        ([AES_128, CCM, 0x1305], NO_SUITE),
        ([TLS_1_2_SUITE], NO_SUITE),
        ([0x0A0A, TLS_1_2_SUITE, AES_256], LOCALHOST),
    ],
)
def test_a_real_hello_with_other_suites(
    suites: list[int], verdict: Verdict, client_tls: ssl.SSLContext
) -> None:
    data = with_suites(real_hello("trusting", client_tls), *suites)
    assert judge(data) == verdict
    assert byte_by_byte(data) == verdict


# --- offers ------------------------------------------------------------------------------------

OLD = versions(0x0303)
FOREIGN = alpn(b"h2")
FAULTS = {
    "version": (SUPPORTED_VERSIONS, OLD, NO_TLS_1_3),
    "suite": (None, suite_list(AES_128), NO_SUITE),
    "alpn": (ALPN, FOREIGN, NO_ALPN),
}


def offering(*faults: str) -> Hello:
    hello = GOOD
    for fault in faults:
        kind, content, _ = FAULTS[fault]
        hello = replace(hello, suites=content) if kind is None else hello.with_extension(kind, content)
    return hello


@pytest.mark.parametrize(
    "faults", [names for count in (0, 1, 2, 3) for names in itertools.combinations(FAULTS, count)]
)
def test_order_of_alerts_is_70_40_120(faults: tuple[str, ...]) -> None:
    verdict = judge(offering(*faults).bytes())
    assert verdict == (FAULTS[faults[0]][2] if faults else ACCEPTED)


@pytest.mark.requirement("tls_version")
@pytest.mark.parametrize(
    ("offer", "verdict"),
    [
        (versions(0x0304), ACCEPTED),
        (versions(0x0303, 0x0304), ACCEPTED),
        (versions(0x0A0A, 0x7F1C, 0x0304), ACCEPTED),
        (versions(0x0303), NO_TLS_1_3),
        (versions(0x0305), NO_TLS_1_3),
        (versions(0x0400, 0x0403), NO_TLS_1_3),  # 03 04 across two
        (None, NO_TLS_1_3),
        (versions(), MALFORMED),
        (b"", MALFORMED),
        (b"\x03\x03\x04\x03", MALFORMED),
        (b"\x02\x03\x04\x00", MALFORMED),
        (b"\x04\x03\x04", MALFORMED),
    ],
)
def test_versions(offer: bytes | None, verdict: Verdict) -> None:
    assert judge(GOOD.with_extension(SUPPORTED_VERSIONS, offer).bytes()) == verdict


@pytest.mark.parametrize("legacy", [b"\3\0", b"\3\1", b"\3\4", b"\0\0", b"\xff\xff"])
def test_legacy_version_is_ignored(legacy: bytes) -> None:
    assert judge(replace(GOOD, legacy_version=legacy).bytes()) is ACCEPTED


@pytest.mark.parametrize(
    ("offer", "verdict"),
    [
        (alpn(b"zcp/1"), ACCEPTED),
        (alpn(b"http/1.1"), ACCEPTED),
        (alpn(b"http/1.1", b"zcp/1"), ACCEPTED),
        (alpn(b"h2", b"spdy/3", b"zcp/1"), ACCEPTED),
        (None, ACCEPTED),
        (alpn(b"h2"), NO_ALPN),
        (alpn(b"zcp/2"), NO_ALPN),
        (alpn(b"ZCP/1"), NO_ALPN),
        (alpn(b"zcp/1\0"), NO_ALPN),
        (alpn(b"zcp/", b"1"), NO_ALPN),
        (alpn(b"\xff\xfe"), NO_ALPN),
        (alpn(b"None"), NO_ALPN),
        (alpn(b"x" * 255), NO_ALPN),
        (alpn(), MALFORMED),
        (alpn(b""), MALFORMED),
        (alpn(b"zcp/1", b""), MALFORMED),
        (b"", MALFORMED),
        (b"\0", MALFORMED),
        (b"\0\6\5zcp/1\0", MALFORMED),
        (b"\0\7\5zcp/1", MALFORMED),
        (b"\0\6\6zcp/1", MALFORMED),
        (b"\0\5\5zcp/1", MALFORMED),
    ],
)
def test_protocols(offer: bytes | None, verdict: Verdict) -> None:
    assert judge(GOOD.with_extension(ALPN, offer).bytes()) == verdict


def test_hello_without_alpn_is_accepted_only_if_configured() -> None:
    hello = GOOD.with_extension(ALPN, None).bytes()
    assert ClientHelloJudge(SUITES, frozenset(["zcp/1"])).judge_record(hello) == NO_ALPN


@pytest.mark.requirement("cipher_suites")
def test_configured_suites_are_respected() -> None:
    only = ClientHelloJudge(frozenset([CHACHA20]), PROTOCOLS)
    assert only.judge_record(replace(GOOD, suites=suite_list(AES_256)).bytes()) == NO_SUITE


def test_suite_numbers_match_rfc_8446() -> None:
    assert SUITE_IDS == {"TLS_AES_256_GCM_SHA384": AES_256, "TLS_CHACHA20_POLY1305_SHA256": CHACHA20}


# --- the server's name ----------------------------------------------------------------------------------

LONGEST = b".".join([b"a" * 63] * 4)
assert len(LONGEST) == MAX_NAME


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (b"a.example", "a.example"),
        (b"A.Example", "a.example"),
        (b"a.example.", "a.example"),
        (b"localhost", "localhost"),
        (b"server1", "server1"),
        (b"1.2.3.example", "1.2.3.example"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"_service.a-b.example", "_service.a-b.example"),
        (LONGEST, LONGEST.decode()),
        # treated as missing
        (b"", None),
        (b".", None),
        (b"a..example", None),
        (b".example", None),
        (b"a.example..", None),
        (b"127.0.0.1", None),
        (b"2130706433", None),
        (b"::1", None),
        (b"[::1]", None),
        (b"a:443", None),
        (b"*.example", None),
        (b"a example", None),
        (b"a.example\n", None),
        (b"\xc3\xa4.example", None),
        (b"\xff", None),
        (b"../../etc", None),
    ],
)
def test_server_name_is_lowercased_and_invalid_names_are_ignored(name: bytes, read: str | None) -> None:
    data = GOOD.with_extension(SERVER_NAME, server_name(name)).bytes()
    assert judge(data) == Accepted(read)
    assert byte_by_byte(data) == Accepted(read)


SERVER_NAMES = [
    (server_name(b"a.example"), None),
    (server_name(b""), None),
    (server_name(b"127.0.0.1"), None),
    (server_name(b"\xff"), None),
    (server_name(LONGEST), None),
    (server_name(LONGEST + b"a"), NO_NAME),
    (server_name(b"a\0b"), NO_NAME),
    (server_name(b"\0"), NO_NAME),
    (b"", MALFORMED),
    (b"\0", MALFORMED),
    (b"\0\0", MALFORMED),
    (b"\0\1\0", MALFORMED),
    (b"\0\2\0\0", MALFORMED),
    (b"\0\3\0\0\1", MALFORMED),
    (b"\0\4\0\0\2a", MALFORMED),
    (b"\0\5\0\0\1a", MALFORMED),
    (server_name(b"a") + b"\0", MALFORMED),
    (server_name(b"a", 1), MALFORMED),
    (server_name(b"a", 255), MALFORMED),
    (vector(2 * (b"\0" + vector(b"a", 2)), 2), MALFORMED),  # RFC 6066: not two of one type
    (vector(b"\0" + vector(b"a", 2) + b"\1" + vector(b"b", 2), 2), MALFORMED),
]


@pytest.mark.parametrize(("content", "refusal"), SERVER_NAMES)
def test_malformed_server_name_list_is_refused(content: bytes, refusal: Refusal | None) -> None:
    for hello in (
        GOOD.with_extension(SERVER_NAME, content),
        replace(GOOD, extensions=[(SERVER_NAME, content), *(GOOD.extensions or ())]),
    ):
        for data in (hello.bytes(), in_records(hello.message(), 50)):
            verdict = judge(data)
            assert byte_by_byte(data) == verdict
            assert verdict == refusal or (refusal is None and isinstance(verdict, Accepted))


@pytest.mark.parametrize(("content", "refusal"), SERVER_NAMES)
def test_openssl_refuses_the_same_names_with_same_alert(
    content: bytes, refusal: Refusal | None, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    data = with_extension(captured_hello(client_tls), SERVER_NAME, content)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_tls.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(data)
    with pytest.raises(ssl.SSLError) as caught:
        server.do_handshake()
    assert isinstance(caught.value, ssl.SSLWantReadError) is (refusal is None)
    if refusal is not None:
        assert outgoing.read() == alert_record(refusal.alert or AlertDescription.DECODE_ERROR)
    verdict = judge(data)
    assert verdict == refusal or (refusal is None and isinstance(verdict, Accepted))


@pytest.mark.parametrize("faults", [("version",), ("suite",), ("alpn",)])
def test_server_name_does_not_override_other_refusals(faults: tuple[str]) -> None:
    hello = offering(*faults).with_extension(SERVER_NAME, server_name(b"a.example"))
    assert judge(hello.bytes()) == FAULTS[faults[0]][2]


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
        (b"\x16\3\1\xff\xff", MALFORMED),
        (b"\x16\3\1\x40\x01", MALFORMED),
        (b"\x16\3\1\x40\x00", TOO_LARGE),
        (b"\x16\3\1\0\1\2", UNEXPECTED),
        (b"\x16\3\3\0\4\2\0\0\0", UNEXPECTED),
        (b"\x16\3\3\0\4\1\xff\xff\xff", TOO_LARGE),
        (b"\x16\3\3\0\4\1\0\x3f\xfd", TOO_LARGE),
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
def test_data_after_hello_is_unexpected(more: bytes) -> None:
    assert judge(GOOD.bytes() + more) == UNEXPECTED


@pytest.mark.parametrize("size", [1, 5, 100_000])
def test_data_after_hello_in_same_record_is_unexpected(size: int) -> None:
    data = in_records(GOOD.message() + b"\0", size)
    assert judge(data) == UNEXPECTED


def test_any_legacy_record_version_is_accepted() -> None:
    """RFC 8446 section 5.1: ignored, except that 3 distinguishes TLS from noise."""
    for minor in range(256):
        assert judge(in_records(GOOD.message(), version=bytes([3, minor]))) is ACCEPTED


def large_hello(size: int) -> bytes:
    """Return a valid hello of exactly `size` bytes, record header included."""
    missing = size - len(GOOD.bytes()) - 4
    return replace(GOOD, extensions=[*(GOOD.extensions or ()), (21, bytes(missing))]).bytes()


def test_hello_of_16_kib_is_accepted() -> None:
    assert judge(large_hello(MAX_SIZE)) is ACCEPTED
    assert judge(large_hello(MAX_SIZE + 1)) == TOO_LARGE


def test_record_headers_count_towards_size_limit() -> None:
    message = large_hello(4_000)[5:]
    assert judge(in_records(message, 2)) is ACCEPTED
    data = in_records(message, 1)
    assert len(data) > MAX_SIZE
    assert judge(data) == TOO_LARGE
    assert byte_by_byte(data) == TOO_LARGE


def test_incomplete_hello_buffers_at_most_16_kib() -> None:
    slow = reader()
    data = in_records(b"\1" + (10_000).to_bytes(3, "big") + bytes(10_000), 1)
    while slow.feed(data[len(slow.raw) : len(slow.raw) + 1_000]) is None:
        assert len(slow.raw) <= MAX_SIZE + 4
    assert len(slow.raw) <= MAX_SIZE + 1_000


# --- cache ---------------------------------------------------------------------------------

SHARING = GOOD.with_extension(KEY_SHARE, bytes(38)).with_extension(SERVER_NAME, server_name(b"a.example"))
Counted = tuple[ClientHelloJudge, list[int]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Return a judge and the list of sizes of fully parsed hellos."""
    read: list[int] = []
    judge_hello = ClientHelloJudge.judge_hello

    def counting(self: ClientHelloJudge, data: bytes | bytearray, at: int) -> Accepted | Refusal:
        read.append(len(data))
        return judge_hello(self, data, at)

    monkeypatch.setattr(ClientHelloJudge, "judge_hello", counting)
    return ClientHelloJudge(SUITES, PROTOCOLS), read


def of_another_connection(hello: Hello) -> Hello:
    """Return the next hello of the same program."""
    hello = replace(hello, random=bytes(range(32, 64)), session_id=bytes(range(64, 96)))
    extensions = [
        (kind, bytes(each ^ 0xFF for each in content) if kind == KEY_SHARE else content)
        for kind, content in hello.extensions or ()
    ]
    return replace(hello, extensions=extensions)


@pytest.mark.parametrize("hello", [SHARING, GOOD, GOOD.with_extension(KEY_SHARE, b"")])
def test_repeated_hello_is_found_in_cache(hello: Hello, counted: Counted) -> None:
    judge, read = counted
    first = judge.judge_record(hello.bytes())
    assert isinstance(first, Accepted)
    assert judge.judge_record(of_another_connection(hello).bytes()) == first
    assert len(read) == 1


def test_hellos_of_same_size_are_cached_separately(counted: Counted) -> None:
    judge, read = counted
    other = SHARING.with_extension(SERVER_NAME, server_name(b"b.example"))
    for _ in range(3):
        assert judge.judge_record(SHARING.bytes()) == Accepted("a.example")
        assert judge.judge_record(other.bytes()) == Accepted("b.example")
    assert len(read) == 2


def test_refusal_is_not_cached(counted: Counted) -> None:
    judge, read = counted
    for _ in range(2):
        assert judge.judge_record(replace(GOOD, suites=suite_list(AES_128)).bytes()) == NO_SUITE
    assert len(read) == 2


@pytest.mark.parametrize(
    "hello",
    [
        replace(SHARING, session_id=b""),  # frequent clients send only size 32 (RFC 8446, D.4)
        GOOD.with_extension(21, bytes(1_024)),
    ],
)
def test_unusual_hello_is_not_cached(hello: Hello, counted: Counted) -> None:
    judge, read = counted
    for _ in range(2):
        assert isinstance(judge.judge_record(hello.bytes()), Accepted)
    assert len(read) == 2


def test_hello_cache_is_bounded(counted: Counted) -> None:
    judge, read = counted
    names = [server_name(f"{number:03}.example".encode()) for number in range(100)]
    hellos = [SHARING.with_extension(SERVER_NAME, name).bytes() for name in names]
    hellos += [SHARING.with_extension(21, bytes(size)).bytes() for size in range(100)]
    for hello in hellos:
        judge.judge_record(hello)
        assert judge.judge_record(hello) is not None
    assert len(read) == len(hellos), "the last one is always there"
    offers = list(judge._by_size.values())
    assert len(offers) <= 32
    assert all(len(each.accepted) <= 32 for each in offers)


def test_key_share_at_other_position_is_not_a_cache_hit(counted: Counted) -> None:
    """The excluded bytes must be the hello's own key share: elsewhere they hold judged fields."""
    judge, _ = counted
    share = (KEY_SHARE, versions(0x0304, 0x0303))
    judged = (SUPPORTED_VERSIONS, versions(0x0304, 0x0303))
    for extensions in [[share, judged], [judged, share]]:
        hello = replace(GOOD, extensions=extensions)
        assert judge.judge_record(hello.bytes()) is ACCEPTED
        for old in (OLD + b"\x03\x03", versions(0x0303, 0x0303)):
            changed = [(kind, old if kind == SUPPORTED_VERSIONS else content) for kind, content in extensions]
            data = replace(GOOD, extensions=changed).bytes()
            assert judge.judge_record(data) == ClientHelloJudge(SUITES, PROTOCOLS).judge_record(data)
            assert isinstance(judge.judge_record(data), Refusal)


def test_any_changed_byte_is_judged_the_same_with_and_without_cache() -> None:
    judge = ClientHelloJudge(SUITES, PROTOCOLS)
    hello = SHARING.bytes()
    for at, byte in enumerate(hello):
        assert judge.judge_record(hello) == Accepted("a.example")
        for other in {0, 1, 32, 33, byte ^ 1, byte ^ 0x80, 255}:
            changed = hello[:at] + bytes([other]) + hello[at + 1 :]
            uncached = ClientHelloJudge(SUITES, PROTOCOLS).judge_record(changed)
            assert judge.judge_record(changed) == uncached, (at, other)


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
        b"\x18\3\3\0\1\0",
        b"\x13\3\3\0\1\0",
        b"\r\n\r\n",
        b"\xff" * 100,
        b"\0",
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
    # Bytes after a complete hello are noticed only in the same read.
    assert seen == whole or (
        whole == UNEXPECTED
        and (isinstance(seen, Accepted) or seen in (MALFORMED, NO_NAME, NO_TLS_1_3, NO_SUITE, NO_ALPN))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.binary(max_size=40)), max_size=8), st.binary(max_size=12))
def test_any_extensions_give_verdict(extensions: list[tuple[int, bytes]], suites: bytes) -> None:
    assert judge(Hello(suites=suites, extensions=extensions).bytes()) is not None


def test_hello_of_one_byte_records_takes_linear_time() -> None:
    """Records of one byte, byte by byte: quadratic parsing took a minute."""

    def seconds(size: int) -> float:
        data = in_records(b"\1" + (MAX_SIZE - 4).to_bytes(3, "big") + bytes(size), 1)
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
