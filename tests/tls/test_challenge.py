"""Test handshakes of a CA that checks a name by TLS (RFC 8737): its answer, and nothing else."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from tests.helpers import FakeTimers
from tests.tls.hello_judge import GOOD, JUDGE, NO_ALPN, judge, judge_pieces
from tests.tls.hellos import ALPN, SERVER_NAME, alpn, server_name
from tests.tls.support import PEER, TlsPair
from zcproto.tls.client_hello import ACCEPTED, ACME_PROTOCOL, ChallengeHello
from zcproto.tls.context import client_context, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.transport import LINGER_TIME, TlsPhase

CHALLENGE = GOOD.with_extension(ALPN, alpn(b"acme-tls/1")).with_extension(
    SERVER_NAME, server_name(b"A.example")
)


def test_hello_of_a_ca_is_recognized() -> None:
    data = CHALLENGE.bytes()
    assert judge(data) == ChallengeHello("a.example")
    assert judge_pieces(*(data[i : i + 1] for i in range(len(data)))) == ChallengeHello("a.example")
    assert JUDGE.judge_record(data) == ChallengeHello("a.example")


def test_hello_of_a_ca_without_a_usable_name_has_none() -> None:
    for name in (b"192.0.2.7", b"a_/b", b""):
        hello = GOOD.with_extension(ALPN, alpn(b"acme-tls/1"))
        if name:
            hello = hello.with_extension(SERVER_NAME, server_name(name))
        assert judge(hello.bytes()) == ChallengeHello(None)


def test_client_that_offers_more_is_refused_or_served() -> None:
    """RFC 8737 section 3: the list has exactly one name."""
    both = GOOD.with_extension(ALPN, alpn(b"acme-tls/1", b"zcp/1"))
    assert judge(both.bytes()) in (ACCEPTED, judge(GOOD.bytes()))
    assert judge(GOOD.with_extension(ALPN, alpn(b"acme-tls/1", b"h2")).bytes()) == NO_ALPN


@pytest.fixture
def of_ca() -> ssl.SSLContext:
    """The context of a CA, which does not verify the certificate of the answer."""
    return client_context(verify=False, protocols=[ACME_PROTOCOL])


def answering(
    timers: FakeTimers, server_tls: ssl.SSLContext, of_ca: ssl.SSLContext, server_pairs: Any, **options: Any
) -> tuple[TlsPair, list[str | None], list[Any]]:
    asked: list[str | None] = []
    events: list[Any] = []
    pair_files = (server_pairs.ecdsa.certificate, server_pairs.ecdsa.key)

    def context(name: str | None) -> ssl.SSLContext | None:
        asked.append(name)
        return server_context([pair_files], [ACME_PROTOCOL])

    options = {"challenge_context": context, "on_challenge": events.append} | options
    pair = TlsPair(timers, server_tls, of_ca, host="a.example")
    for name, value in options.items():
        setattr(pair.acceptor, name, value)
    pair.acceptor.on_wasted = lambda network, begun: events.append(begun)
    return pair, asked, events


def test_answer_is_a_handshake_and_the_end(
    timers: FakeTimers, server_tls: ssl.SSLContext, of_ca: ssl.SSLContext, server_pairs: Any
) -> None:
    pair, asked, events = answering(timers, server_tls, of_ca, server_pairs)
    pair.raw.deliver(pair.step())
    assert pair.acceptor.handshakes_in_progress == 1
    pair.hear()
    last = pair.step()
    assert pair.client.selected_alpn_protocol() == ACME_PROTOCOL
    pair.raw.deliver(last + pair.sealed(b"GET / HTTP/1.1\r\n\r\n"))
    assert asked == ["a.example"]
    assert pair.client_reads() == b""  # close_notify, and no byte before it
    assert pair.protocol.calls == []
    assert pair.failures == {}
    assert events == [True, PEER]  # it counts as wasted
    assert pair.phase is TlsPhase.CLOSING
    assert pair.acceptor.handshakes_in_progress == 0
    timers.advance(LINGER_TIME + 1)
    assert pair.phase is TlsPhase.CLOSED
    assert pair.acceptor.handshakes_completed == 0


def test_ca_gets_no_other_certificate(
    timers: FakeTimers, server_tls: ssl.SSLContext, of_ca: ssl.SSLContext, server_pairs: Any
) -> None:
    pair, _, events = answering(timers, server_tls, of_ca, server_pairs, challenge_context=lambda name: None)
    pair.raw.deliver(pair.step())
    pair.hear()
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        pair.client.do_handshake()
    assert pair.failures == {TlsFailure.NO_APPLICATION_PROTOCOL: 1}
    assert pair.acceptor.handshakes_in_progress == 0
    assert events == [False]


def test_ca_waits_for_a_slot_like_any_other(
    timers: FakeTimers, server_tls: ssl.SSLContext, of_ca: ssl.SSLContext, server_pairs: Any
) -> None:
    pair, _, events = answering(timers, server_tls, of_ca, server_pairs)
    pair.acceptor.set_limits(0, 100)
    pair.raw.deliver(pair.step())
    assert pair.raw.take() == b""
    pair.raw.deliver(b"\x14\x03\x03\x00\x01\x01")  # what follows is queued, too
    pair.acceptor.set_limits(1, 100)
    timers.run()
    pair.hear()
    pair.raw.deliver(pair.step())
    assert PEER in events


def test_ca_that_sends_no_more_is_timed_out(
    timers: FakeTimers, server_tls: ssl.SSLContext, of_ca: ssl.SSLContext, server_pairs: Any
) -> None:
    pair, _, _ = answering(timers, server_tls, of_ca, server_pairs)
    pair.raw.deliver(pair.step())
    timers.advance(pair.acceptor.handshake_timeout + 1)
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}
