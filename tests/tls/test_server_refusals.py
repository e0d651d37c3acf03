"""Handshakes that a server refuses, and early data that it skips."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.conftest import NewPair
from tests.tls.hellos import (
    AES_128,
    AES_256,
    CHACHA20,
    KEY_SHARE,
    Hello,
    alpn,
    in_records,
    vector,
    with_extension,
    with_last_extension,
    with_suites,
)
from tests.tls.support import (
    ALERT,
    DATA,
    TlsPair,
    is_refused,
    records,
)
from zcproto.tls import server as tls_server
from zcproto.tls.client_hello import AlertDescription, alert_record
from zcproto.tls.context import client_context, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import MAX_LARGE_HELLOS, MAX_QUEUED, PLAINTEXT_ANSWER
from zcproto.tls.transport import TlsPhase

# --- refused before OpenSSL ------------------------------------------------------------------


def only_tls_1_2() -> ssl.SSLContext:
    context = client_context(verify=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def foreign_alpn() -> ssl.SSLContext:
    return client_context(verify=False, protocols=("h2", "zcp/2"))


@pytest.mark.parametrize(
    ("context", "failure", "alert"),
    [
        (only_tls_1_2, TlsFailure.UNSUPPORTED_VERSION, AlertDescription.PROTOCOL_VERSION),
        (foreign_alpn, TlsFailure.NO_APPLICATION_PROTOCOL, AlertDescription.NO_APPLICATION_PROTOCOL),
    ],
)
def test_unsupported_client_gets_alert(
    context: Callable[[], ssl.SSLContext],
    failure: TlsFailure,
    alert: AlertDescription,
    timers: FakeTimers,
    server_tls: ssl.SSLContext,
) -> None:
    pair = TlsPair(timers, server_tls, context())
    pair.raw.deliver(pair.step())
    assert bytes(pair.raw.sent) == alert_record(alert)
    assert alert.name.replace("_", " ").lower() in str(pair.refusal())
    is_refused(pair, failure)


@pytest.mark.requirement("cipher_suites")
def test_aes_128_only_client_gets_alert_40(tls_pair: TlsPair) -> None:
    tls_pair.raw.deliver(with_suites(tls_pair.step(), AES_128))
    assert bytes(tls_pair.raw.sent) == bytes.fromhex("15 0303 0002 02 28")
    is_refused(tls_pair, TlsFailure.NO_SHARED_SUITE)


REFUSED: list[tuple[str, bytes, TlsFailure, bytes]] = [
    ("garbage", b"\xde\xad\xbe\xef" * 20, TlsFailure.NOT_TLS, b""),
    ("ssh", b"SSH-2.0-OpenSSH_9.9\r\n", TlsFailure.NOT_TLS, b""),
    ("http", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", TlsFailure.PLAINTEXT_HTTP, PLAINTEXT_ANSWER),
    ("alert first", alert_record(AlertDescription.DECODE_ERROR), TlsFailure.UNEXPECTED_MESSAGE, b"\x0a"),
    ("data first", b"\x17\3\3\0\5hello", TlsFailure.UNEXPECTED_MESSAGE, b"\x0a"),
    ("malformed", in_records(b"\1\0\0\0"), TlsFailure.MALFORMED_CLIENT_HELLO, b"\x32"),
    ("type 24", b"\x18\3\3\0\1\0", TlsFailure.UNEXPECTED_MESSAGE, b"\x0a"),
    ("large", b"\x16\3\1\0\4\1\2\1\x45", TlsFailure.CLIENT_HELLO_TOO_LARGE, b"\x2f"),
    ("alpn", Hello().with_extension(16, alpn(b"h2")).bytes(), TlsFailure.NO_APPLICATION_PROTOCOL, b"\x78"),
]


@pytest.mark.parametrize("piece", [1, 65_536])
@pytest.mark.parametrize(("name", "data", "failure", "answer"), REFUSED, ids=[row[0] for row in REFUSED])
def test_invalid_hello_is_answered_and_counted(
    tls_pair: TlsPair, name: str, data: bytes, failure: TlsFailure, answer: bytes, piece: int
) -> None:
    tls_pair.raw.deliver(data, piece)
    if len(answer) == 1:
        answer = b"\x15\3\3\0\2\2" + answer
    assert bytes(tls_pair.raw.sent) == answer
    is_refused(tls_pair, failure)


@pytest.mark.parametrize("more", [b"\x17\3\3\0\1x" * 200, Hello().bytes() * 300, b"x" * 65_000])
@pytest.mark.parametrize("at_once", [True, False])
def test_data_after_hello_is_refused_without_early_data(
    tls_pair: TlsPair, more: bytes, at_once: bool
) -> None:
    """It reaches OpenSSL only in pieces of a record, because a BIO keeps its size."""
    hello = tls_pair.step()
    for data in [hello + more] if at_once else [hello, more]:
        tls_pair.raw.deliver(data)
    assert tls_pair.phase is TlsPhase.CLOSING
    assert sum(tls_pair.failures.values()) == 1
    tls_pair.hear()
    tls_pair.step()
    with pytest.raises(ssl.SSLError, match="alert"):
        tls_pair.client.read(1)


EARLY = b"\x17\3\3\0\x40" + bytes(64)
"""A record of early data, which the server cannot decrypt."""


def offering_early_data(hello: bytes, *, retry: bool = False) -> bytes:
    """Return a captured hello that offers early data; with `retry` its only group needs a HelloRetryRequest."""
    identity = vector(vector(b"ticket", 2) + bytes(4), 2)
    psk = identity + vector(vector(bytes(48), 1), 2)
    hello = with_extension(hello, KEY_SHARE, vector(b"", 2)) if retry else hello
    hello = with_extension(with_extension(hello, 45, b"\1\1"), 42, b"")
    return with_last_extension(hello, 41, psk)


@pytest.mark.parametrize("wait", ["none", "queued", "started"])
@pytest.mark.parametrize("retry", [False, True])
def test_early_data_after_hello_is_skipped(
    timers: FakeTimers, wait: str, retry: bool, new_pair: NewPair
) -> None:
    """RFC 8446 section 4.2.10: in the same segment, while the handshake waits for its turn, and after it began."""
    pair = new_pair()
    hello, early = offering_early_data(pair.step(), retry=retry), EARLY * 100
    if wait == "queued":
        pair.acceptor.set_limits(0, 10)
    pair.raw.deliver(hello + early if wait == "none" else hello)
    if wait != "none":
        pair.raw.deliver(early)
    if wait == "queued":
        pair.acceptor.set_limits(1, 10)
        timers.run()
    assert pair.failures == {}
    assert pair.phase is TlsPhase.HANDSHAKE
    sent = bytes(pair.raw.sent)
    assert sent[:3] == b"\x16\3\3"
    assert sent[5] == 2  # ServerHello
    assert (sent[11:15] == b"\xcf\x21\xad\x74") is retry  # the random of a HelloRetryRequest


def test_queued_data_without_early_data_is_refused(timers: FakeTimers, new_pair: NewPair) -> None:
    pair = new_pair()
    pair.acceptor.set_limits(0, 10)
    pair.raw.deliver(pair.step())
    pair.raw.deliver(EARLY * 400)
    assert pair.failures == {}
    pair.acceptor.set_limits(1, 10)
    timers.run()
    is_refused(pair, TlsFailure.BAD_RECORD)


def test_data_of_a_queued_hello_is_bounded(new_pair: NewPair) -> None:
    pair = new_pair()
    pair.acceptor.pending.max_slots = 0
    pair.raw.deliver(pair.step())
    while pair.phase is TlsPhase.HELLO:
        pair.raw.deliver(EARLY * 100)
        assert len(pair.server._queued) <= MAX_QUEUED
    assert bytes(pair.raw.sent) == alert_record(AlertDescription.UNEXPECTED_MESSAGE)
    is_refused(pair, TlsFailure.UNEXPECTED_MESSAGE)


def test_hello_of_maximum_size_completes_handshake(new_pair: NewPair) -> None:
    """The client does not send one itself: the answer shows that OpenSSL read it whole."""
    pair = new_pair()
    hello = with_suites(pair.step(), *[AES_256] * 32_766, CHACHA20)
    pair.raw.deliver(with_extension(hello, 0x1A1A, bytes(60_000)))
    assert pair.failures == {}
    assert pair.phase is TlsPhase.HANDSHAKE
    assert bytes(pair.raw.sent)[:1] == b"\x16"


def test_large_hellos_are_bounded_in_number(new_pair: NewPair) -> None:
    acceptor = new_pair().acceptor
    start = in_records(b"\1" + (100_000).to_bytes(3, "big") + bytes(50_000))
    pairs = [new_pair(acceptor=acceptor) for _ in range(MAX_LARGE_HELLOS + 1)]
    for pair in pairs:
        pair.raw.deliver(start)
    assert [pair.phase for pair in pairs[:-1]] == [TlsPhase.HELLO] * MAX_LARGE_HELLOS
    assert pairs[-1].phase is TlsPhase.CLOSING
    assert pairs[-1].failures == {TlsFailure.CLIENT_HELLO_TOO_LARGE: 1}
    acceptor.pending.max_slots = 0
    early = new_pair(acceptor=acceptor)
    early.raw.deliver(early.step())
    early.raw.deliver(EARLY * 400)
    assert early.phase is TlsPhase.CLOSING
    acceptor.pending.max_slots = 10
    usual = new_pair(acceptor=acceptor)
    usual.raw.deliver(usual.step())
    assert usual.phase is TlsPhase.HANDSHAKE
    pairs[0].server.connection_lost(None)
    again = new_pair(acceptor=acceptor)
    again.raw.deliver(start)
    assert again.phase is TlsPhase.HELLO


def test_plaintext_answer_is_valid_http() -> None:
    head, _, body = PLAINTEXT_ANSWER.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Connection: close" in head
    assert b"TLS" in body


# --- refused by OpenSSL ---------------------------------------------------------------------------------


def test_no_shared_group_gets_openssl_alert(
    timers: FakeTimers, server_pairs: ServerPairs, ca_file: Path
) -> None:
    server, client = server_context(server_pairs, ["zcp/1"]), client_context(ca_file=ca_file)
    server.set_ecdh_curve("prime256v1")
    client.set_ecdh_curve("secp384r1")
    pair = TlsPair(timers, server, client)
    pair.raw.deliver(pair.step())
    assert bytes(pair.raw.sent) == alert_record(AlertDescription.HANDSHAKE_FAILURE)
    is_refused(pair, TlsFailure.NO_SHARED_GROUP)


@pytest.mark.parametrize("why", ["untrusted", "other name"])
def test_client_rejecting_certificate_is_counted(
    why: str, timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    client = ssl.create_default_context() if why == "untrusted" else client_tls
    pair = TlsPair(timers, server_tls, client, host="localhost" if why == "untrusted" else "other.example")
    pair.raw.deliver(pair.step())
    pair.hear()
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.step()
    pair.raw.deliver(pair.outgoing.read())
    is_refused(pair, TlsFailure.PEER_REJECTED_CERTIFICATE)


@pytest.mark.parametrize(
    ("data", "failure"),
    [
        (b"garbage!" * 4, TlsFailure.BAD_RECORD),
        (b"\x17\3\3\0\x20" + bytes(32), TlsFailure.BAD_RECORD),
        (b"\x17\3\3\xff\xff", TlsFailure.BAD_RECORD),
        (b"\x14\3\3\0\1\1" * 40, TlsFailure.BAD_RECORD),
        (alert_record(AlertDescription.DECODE_ERROR), TlsFailure.PEER_ALERT),
    ],
)
def test_corrupted_second_flight_ends_handshake(tls_pair: TlsPair, data: bytes, failure: TlsFailure) -> None:
    tls_pair.raw.deliver(tls_pair.step())
    tls_pair.raw.take()
    tls_pair.raw.deliver(data)
    sent = records(bytes(tls_pair.raw.sent))
    # Alerts are encrypted by now (RFC 8446 section 6) and not answered.
    assert [kind for kind, _ in sent] == ([] if failure is TlsFailure.PEER_ALERT else [DATA])
    is_refused(tls_pair, failure)


def test_hello_invalid_only_for_openssl_is_refused_by_it(tls_pair: TlsPair) -> None:
    hello = Hello()
    twice = Hello(extensions=[*(hello.extensions or ()), (43, b"\2\3\4")])
    tls_pair.raw.deliver(twice.bytes())
    ((kind, content),) = records(bytes(tls_pair.raw.sent))
    assert (kind, content[0]) == (ALERT, 2)
    assert sum(tls_pair.failures.values()) == 1
    assert tls_pair.phase is TlsPhase.CLOSING


# --- defence in depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["suite", "protocol"])
def test_wrong_negotiated_parameters_end_connection(
    what: str, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the ClientHello had been misread or the context misconfigured."""
    pair = new_pair()
    pair.raw.deliver(pair.step())
    pair.hear()
    if what == "suite":
        monkeypatch.setattr(tls_server, "suites_are_allowed", lambda tls: False)
    else:
        pair.acceptor.protocols = {"http/1.1": lambda: pair.protocol}
    pair.raw.deliver(pair.step() + pair.sealed(b"unheard"))
    assert pair.client_saw_close_notify()
    is_refused(pair, TlsFailure.WRONG_PARAMETERS)
