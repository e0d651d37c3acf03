"""Test server handshakes with an OpenSSL client, and every way in which they fail."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServerPairs
from tests.helpers import NOW, FakeTimers
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
    PEER,
    RecordingProtocol,
    TlsPair,
    captured_hello,
    new_acceptor,
    records,
)
from zcproto.errors import TlsError
from zcproto.tls.client_hello import AlertDescription, alert_record
from zcproto.tls.context import SUITES, SiteContexts, client_context, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import MAX_LARGE_HELLOS, MAX_QUEUED, PLAINTEXT_ANSWER, TlsAcceptor, TlsServerTransport
from zcproto.tls.transport import LINGER_TIME, TlsPhase

TIMEOUT = 5.0


def is_refused(pair: TlsPair, failure: TlsFailure) -> None:
    """Assert that the connection ended with this failure, counted once, and nothing reached the protocol."""
    assert pair.phase is TlsPhase.CLOSING
    assert pair.failures == {failure: 1}
    assert pair.log == [(failure, PEER)]
    assert pair.raw.eof_written
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.handshakes_completed == 0
    assert pair.protocol.calls == []
    pair.raw.deliver_eof()
    pair.timers.run()
    assert pair.log == [(failure, PEER), "closed"]
    assert pair.failures == {failure: 1}
    assert pair.protocol.calls == []
    assert pair.phase is TlsPhase.CLOSED
    assert len(pair.acceptor.wheel) == 0


# --- successful handshakes
# ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("tls_version")
def test_handshake_negotiates_tls_1_3_and_first_suite(agreed: TlsPair) -> None:
    assert agreed.client.version() == "TLSv1.3"
    cipher = agreed.client.cipher()
    assert cipher is not None
    assert cipher[0] == SUITES[0]
    assert agreed.protocol.calls == ["made"]
    assert agreed.log == []
    assert agreed.acceptor.handshakes_completed == 1
    assert agreed.acceptor.handshakes_in_progress == 0
    assert agreed.failures == {}
    assert len(agreed.acceptor.wheel) == 0


@pytest.mark.requirement("forward_secrecy")
def test_no_session_ticket_is_sent(agreed: TlsPair) -> None:
    """RFC 8446 section 4.6.1: a ticket would follow the handshake."""
    assert agreed.raw.take() == b""
    assert agreed.client.session is not None
    assert not agreed.client.session.has_ticket


@pytest.mark.parametrize(
    ("offer", "chosen"),
    [
        (["zcp/1"], "zcp/1"),
        (["http/1.1"], "http/1.1"),
        (["http/1.1", "zcp/1"], "zcp/1"),
        (["h2", "http/1.1"], "http/1.1"),
        ([], None),
    ],
)
def test_alpn_selects_protocol_factory(
    offer: list[str], chosen: str | None, timers: FakeTimers, server_tls: ssl.SSLContext, ca_file: Path
) -> None:
    spoke: list[str | None] = []

    def factory(name: str | None) -> Callable[[], RecordingProtocol]:
        return lambda: spoke.append(name) or RecordingProtocol()  # type: ignore[func-returns-value]

    client = client_context(ca_file=ca_file)
    if offer:
        client.set_alpn_protocols(offer)
    else:
        client = ssl.create_default_context(cafile=ca_file)
    protocols = {name: factory(name) for name in ("zcp/1", "http/1.1", None)}
    pair = TlsPair(timers, server_tls, client, protocols=protocols).agree()
    assert spoke == [chosen]
    assert pair.client.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("piece", [1, 2, 5, 100, 1_000])
def test_handshake_in_pieces_succeeds(tls_pair: TlsPair, piece: int) -> None:
    tls_pair.raw.deliver(tls_pair.step(), piece)
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step(), piece)
    assert tls_pair.protocol.calls == ["made"]


@pytest.mark.parametrize("size", [1, 7, 200, 1_000])
def test_hello_in_many_records_succeeds(tls_pair: TlsPair, size: int) -> None:
    tls_pair.raw.deliver(in_records(tls_pair.step()[5:], size, b"\3\1"))
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step())
    assert tls_pair.protocol.calls == ["made"]


def test_hello_retry_request_selects_shared_group(
    timers: FakeTimers, server_pairs: ServerPairs, client_tls: ssl.SSLContext
) -> None:
    """RFC 8446 section 4.1.4: the random of a HelloRetryRequest is a digest of its name."""
    context = server_context(server_pairs, ["zcp/1"])
    context.set_ecdh_curve("prime256v1")
    pair = TlsPair(timers, context, client_tls)
    pair.raw.deliver(pair.step())
    retry = pair.hear()
    assert bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c") in retry
    assert pair.phase is TlsPhase.HANDSHAKE
    assert pair.acceptor.handshakes_in_progress == 1
    pair.raw.deliver(pair.step())
    pair.hear()
    pair.raw.deliver(pair.step())
    assert pair.phase is TlsPhase.OPEN
    pair.say(b"hello")
    assert pair.protocol.received == b"hello"


def test_data_in_same_read_as_finished_is_delivered(tls_pair: TlsPair) -> None:
    tls_pair.raw.deliver(tls_pair.step())
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step() + tls_pair.sealed(b"first words"))
    assert tls_pair.protocol.received == b"first words"


def test_large_data_in_same_read_as_finished_is_delivered(tls_pair: TlsPair) -> None:
    data = bytes(range(256)) * 230
    tls_pair.raw.deliver(tls_pair.step())
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step() + tls_pair.sealed(data))
    assert tls_pair.protocol.received == data
    assert tls_pair.raw.writes


def test_protocol_may_write_and_close_in_connection_made(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    def made(protocol: RecordingProtocol) -> None:
        protocol.transport.write(b"go away")
        protocol.transport.close()

    pair = TlsPair(timers, server_tls, client_tls, protocol=RecordingProtocol(made=made))
    pair.raw.deliver(pair.step())
    pair.hear()
    pair.raw.deliver(pair.step() + pair.sealed(b"unheard"))
    assert pair.protocol.received == b""
    assert pair.client_reads() == b"go away"
    assert pair.client_saw_close_notify()


def test_protocol_may_pause_reading_in_connection_made(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(
        timers,
        server_tls,
        client_tls,
        protocol=RecordingProtocol(made=lambda protocol: protocol.transport.pause_reading()),
    )
    pair.raw.deliver(pair.step())
    pair.hear()
    pair.raw.deliver(pair.step() + pair.sealed(b"later"))
    assert pair.protocol.received == b""
    assert not pair.raw.is_reading()
    pair.server.resume_reading()
    assert pair.protocol.received == b"later"
    assert pair.raw.is_reading()


def test_new_connections_use_replaced_context(
    timers: FakeTimers, server_pairs: ServerPairs, client_tls: ssl.SSLContext
) -> None:
    old, new = (server_context([pair], ["zcp/1"]) for pair in server_pairs)
    first = TlsPair(timers, old, client_tls)
    first.raw.deliver(first.step())
    first.acceptor.contexts = SiteContexts(new)
    first.hear()
    first.raw.deliver(first.step())
    second = TlsPair(timers, old, client_tls, acceptor=first.acceptor).agree()
    assert first.phase is TlsPhase.OPEN
    assert first.client.getpeercert(True) != second.client.getpeercert(True)


def test_extra_info_matches_asyncio_tls_transport(agreed: TlsPair) -> None:
    transport = agreed.protocol.transport
    assert transport is agreed.server
    assert transport.get_extra_info("peername") == ("192.0.2.7", 40_000)
    assert transport.get_extra_info("cipher")[0] == SUITES[0]
    assert transport.get_extra_info("ssl_object").version() == "TLSv1.3"
    assert transport.get_extra_info("peercert") is None
    assert transport.get_extra_info("nothing", "default") == "default"
    assert transport.get_protocol() is agreed.protocol
    assert not transport.can_write_eof()
    assert transport.peer == PEER


def test_extra_info_is_empty_before_and_after_connection(tls_pair: TlsPair) -> None:
    server = tls_pair.server
    names = ("ssl_object", "cipher", "peercert")
    assert [server.get_extra_info(name, "none") for name in names] == ["none"] * 3
    tls_pair.agree()
    tls_pair.raw.lose()
    assert [server.get_extra_info(name, "none") for name in (*names, "peername")] == ["none"] * 4
    assert server.get_write_buffer_size() == 0
    server.set_write_buffer_limits(high=1)


def test_protocol_can_be_replaced(agreed: TlsPair) -> None:
    other = RecordingProtocol()
    agreed.server.set_protocol(other)
    agreed.say(b"hello")
    assert other.received == b"hello"
    assert agreed.protocol.received == b""


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
    timers: FakeTimers,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
    wait: str,
    retry: bool,
) -> None:
    """RFC 8446 section 4.2.10: in the same segment, while the handshake waits for its turn, and after it began."""
    pair = TlsPair(timers, server_tls, client_tls)
    hello, early = offering_early_data(pair.step(), retry=retry), EARLY * 100
    if wait == "queued":
        pair.acceptor.set_limits(0, 10, (24, 48))
    pair.raw.deliver(hello + early if wait == "none" else hello)
    if wait != "none":
        pair.raw.deliver(early)
    if wait == "queued":
        pair.acceptor.set_limits(1, 10, (24, 48))
        timers.run()
    assert pair.failures == {}
    assert pair.phase is TlsPhase.HANDSHAKE
    sent = bytes(pair.raw.sent)
    assert sent[:3] == b"\x16\3\3"
    assert sent[5] == 2  # ServerHello
    assert (sent[11:15] == b"\xcf\x21\xad\x74") is retry  # the random of a HelloRetryRequest


def test_queued_data_without_early_data_is_refused(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(timers, server_tls, client_tls)
    pair.acceptor.set_limits(0, 10, (24, 48))
    pair.raw.deliver(pair.step())
    pair.raw.deliver(EARLY * 400)
    assert pair.failures == {}
    pair.acceptor.set_limits(1, 10, (24, 48))
    timers.run()
    is_refused(pair, TlsFailure.BAD_RECORD)


def test_data_of_a_queued_hello_is_bounded(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(timers, server_tls, client_tls)
    pair.acceptor.pending.max_slots = 0
    pair.raw.deliver(pair.step())
    while pair.phase is TlsPhase.HELLO:
        pair.raw.deliver(EARLY * 100)
        assert len(pair.server._queued) <= MAX_QUEUED
    assert bytes(pair.raw.sent) == alert_record(AlertDescription.UNEXPECTED_MESSAGE)
    is_refused(pair, TlsFailure.UNEXPECTED_MESSAGE)


def test_hello_of_maximum_size_completes_handshake(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """The client does not send one itself: the answer shows that OpenSSL read it whole."""
    pair = TlsPair(timers, server_tls, client_tls)
    hello = with_suites(pair.step(), *[AES_256] * 32_766, CHACHA20)
    pair.raw.deliver(with_extension(hello, 0x1A1A, bytes(60_000)))
    assert pair.failures == {}
    assert pair.phase is TlsPhase.HANDSHAKE
    assert bytes(pair.raw.sent)[:1] == b"\x16"


def test_large_hellos_are_bounded_in_number(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    acceptor = TlsPair(timers, server_tls, client_tls).acceptor
    start = in_records(b"\1" + (100_000).to_bytes(3, "big") + bytes(50_000))
    pairs = [TlsPair(timers, server_tls, client_tls, acceptor=acceptor) for _ in range(MAX_LARGE_HELLOS + 1)]
    for pair in pairs:
        pair.raw.deliver(start)
    assert [pair.phase for pair in pairs[:-1]] == [TlsPhase.HELLO] * MAX_LARGE_HELLOS
    assert pairs[-1].phase is TlsPhase.CLOSING
    assert pairs[-1].failures == {TlsFailure.CLIENT_HELLO_TOO_LARGE: 1}
    acceptor.pending.max_slots = 0
    early = TlsPair(timers, server_tls, client_tls, acceptor=acceptor)
    early.raw.deliver(early.step())
    early.raw.deliver(EARLY * 400)
    assert early.phase is TlsPhase.CLOSING
    acceptor.pending.max_slots = 10
    usual = TlsPair(timers, server_tls, client_tls, acceptor=acceptor)
    usual.raw.deliver(usual.step())
    assert usual.phase is TlsPhase.HANDSHAKE
    pairs[0].server.connection_lost(None)
    again = TlsPair(timers, server_tls, client_tls, acceptor=acceptor)
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
    what: str, timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """As if the ClientHello had been misread or the context misconfigured."""
    pair = TlsPair(timers, server_tls, client_tls)
    pair.raw.deliver(pair.step())
    pair.hear()
    if what == "suite":
        pair.acceptor.suites = frozenset(SUITES[1:])
    else:
        pair.acceptor.protocols = {"http/1.1": lambda: pair.protocol}
    pair.raw.deliver(pair.step() + pair.sealed(b"unheard"))
    assert pair.client_saw_close_notify()
    is_refused(pair, TlsFailure.WRONG_PARAMETERS)


# --- timeouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["silent", "half a hello", "waiting for finished"])
def test_handshake_timeout_ends_connection(
    state: str, timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(timers, server_tls, client_tls, handshake_timeout=TIMEOUT)
    hello = pair.step()
    pair.raw.deliver({"silent": b"", "half a hello": hello[:500], "waiting for finished": hello}[state])
    timers.advance(TIMEOUT - 0.001)
    assert pair.failures == {}
    timers.advance(0.2)
    is_refused(pair, TlsFailure.HANDSHAKE_TIMEOUT)


@pytest.mark.parametrize("every", [0.25, 1.0, 2.4])
def test_slow_bytes_do_not_extend_handshake_timeout(
    every: float, timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(timers, server_tls, client_tls, handshake_timeout=TIMEOUT)
    hello = pair.step()
    at = 0
    while pair.phase is TlsPhase.HELLO:
        pair.raw.deliver(hello[at : at + 1])
        at += 1
        timers.advance(every)
    assert timers.time() <= NOW + TIMEOUT + every
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}


def test_timed_out_handshake_lingers_and_is_reset(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    pair = TlsPair(timers, server_tls, client_tls, handshake_timeout=TIMEOUT)
    timers.advance(TIMEOUT + 0.2)
    assert pair.raw.eof_written
    pair.raw.deliver(b"x" * 100)
    assert not pair.raw.aborted
    timers.advance(LINGER_TIME + 0.2)
    assert pair.raw.aborted
    assert pair.log[-1] == "closed"


def test_handshake_deadline_is_cleared_on_completion(agreed: TlsPair) -> None:
    agreed.timers.advance(1_000)
    assert agreed.phase is TlsPhase.OPEN
    assert agreed.failures == {}


# --- disconnects -----------------------------------------------------------------------------------------------


def hello_of(pair: TlsPair, state: str) -> bytes:
    hello = pair.step()
    return {"silent": b"", "half a hello": hello[:500], "waiting for finished": hello}[state]


@pytest.mark.parametrize("how", ["end of stream", "reset"])
@pytest.mark.parametrize("state", ["silent", "half a hello", "waiting for finished"])
def test_client_disconnect_during_handshake_is_counted(tls_pair: TlsPair, state: str, how: str) -> None:
    tls_pair.raw.deliver(hello_of(tls_pair, state))
    if how == "reset":
        tls_pair.raw.lose(ConnectionResetError())
    else:
        tls_pair.raw.deliver_eof()
        tls_pair.timers.run()
    assert tls_pair.failures == {TlsFailure.DISCONNECTED: 1}
    assert tls_pair.log == [(TlsFailure.DISCONNECTED, PEER), "closed"]
    assert tls_pair.acceptor.handshakes_in_progress == 0
    assert tls_pair.protocol.calls == []
    assert len(tls_pair.acceptor.wheel) == 0


def test_abort_during_handshake_is_not_a_failure_of_the_peer(tls_pair: TlsPair) -> None:
    tls_pair.raw.deliver(tls_pair.step())
    tls_pair.server.abort()
    tls_pair.timers.run()
    assert tls_pair.failures == {}
    assert tls_pair.log == ["closed"]


def test_close_during_handshake_is_silent(tls_pair: TlsPair) -> None:
    tls_pair.raw.deliver(tls_pair.step()[:100])
    tls_pair.server.close()
    assert tls_pair.raw.eof_written
    assert tls_pair.raw.take() == b""
    tls_pair.raw.deliver_eof()
    tls_pair.timers.run()
    assert tls_pair.failures == {}
    assert tls_pair.log == ["closed"]


def test_connection_lost_before_connection_made_leaves_nothing(
    timers: FakeTimers, server_tls: ssl.SSLContext
) -> None:
    """The listener does this if the socket fails while asyncio takes it over."""
    log: list[Any] = []
    acceptor = new_acceptor(timers, server_tls, RecordingProtocol, log)
    transport = TlsServerTransport(acceptor, PEER)
    assert acceptor.pending.places == 1
    transport.abort()
    transport.connection_lost(OSError())
    assert acceptor.pending.places == 0
    assert log == [(TlsFailure.DISCONNECTED, PEER), "closed"]


def test_closing_tcp_transport_is_not_touched(tls_pair: TlsPair) -> None:
    tls_pair.raw.close()
    tls_pair.server.close()
    assert not tls_pair.raw.eof_written
    assert len(tls_pair.timers.armed) == 1, "only the handshake's own time"
    tls_pair.timers.run()
    assert tls_pair.log == ["closed"]
    assert tls_pair.acceptor.wheel.now() == NOW
    assert len(tls_pair.acceptor.wheel) == 0


# --- counters -------------------------------------------------------------------------------------------


def test_handshake_counts_from_complete_hello(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    first = TlsPair(timers, server_tls, client_tls)
    acceptor = first.acceptor
    pairs = [first, *(TlsPair(timers, server_tls, client_tls, acceptor=acceptor) for _ in range(4))]
    hellos = [pair.step() for pair in pairs]
    for pair, hello in zip(pairs, hellos, strict=True):
        pair.raw.deliver(hello[:-1])
    assert (acceptor.pending.places, acceptor.handshakes_in_progress) == (5, 0)
    for pair, hello in zip(pairs[:4], hellos, strict=False):
        pair.raw.deliver(hello[-1:])
    assert (acceptor.pending.places, acceptor.handshakes_in_progress) == (1, 4)
    pairs[0].hear()
    pairs[0].raw.deliver(pairs[0].step())
    pairs[1].raw.deliver(b"garbage!")
    pairs[2].raw.lose()
    assert (acceptor.pending.places, acceptor.handshakes_in_progress) == (1, 1)
    timers.advance(TIMEOUT + 1)
    assert (acceptor.pending.places, acceptor.handshakes_in_progress) == (0, 0)
    assert acceptor.handshakes_completed == 1


def test_closing_open_connection_frees_no_second_slot(agreed: TlsPair) -> None:
    agreed.raw.lose()
    assert agreed.acceptor.handshakes_in_progress == 0


def test_acceptor_works_without_callbacks(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    from zcproto.common.deadlines import DeadlineWheel

    acceptor = TlsAcceptor(
        SiteContexts(server_tls),
        {None: RecordingProtocol},
        DeadlineWheel(timers),
        timers,
        suites=frozenset(SUITES),
    )
    pair = TlsPair(timers, server_tls, client_tls, acceptor=acceptor)
    pair.raw.deliver(captured_hello(client_tls))
    pair.raw.deliver_eof()
    timers.run()
    assert acceptor.failures[TlsFailure.NO_APPLICATION_PROTOCOL] == 1


def test_failure_reaches_protocol_only_if_connected(agreed: TlsPair) -> None:
    agreed.raw.lose(ConnectionResetError())
    made, error = agreed.protocol.calls
    assert made == "made"
    assert isinstance(error, TlsError)
    assert error.failure == "connection_reset"
