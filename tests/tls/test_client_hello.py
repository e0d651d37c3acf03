"""Test the ClientHello parser: real hellos, what they offer, and the server's name."""

from __future__ import annotations

import itertools
import ssl
from dataclasses import replace

import pytest

from tests.tls.hello_judge import (
    GOOD,
    LOCALHOST,
    MALFORMED,
    NO_ALPN,
    NO_NAME,
    NO_SUITE,
    NO_TLS_1_3,
    PROTOCOLS,
    SUITES,
    Verdict,
    byte_by_byte,
    judge,
    reader,
)
from tests.tls.hellos import (
    AES_128,
    AES_256,
    ALPN,
    CCM,
    CHACHA20,
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
    SUITE_IDS,
    Accepted,
    AlertDescription,
    ClientHelloJudge,
    Refusal,
    alert_record,
)
from zcproto.tls.context import client_context

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
