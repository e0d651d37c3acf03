"""Server handshakes that end early: timeouts, disconnects, and what is counted."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from tests.helpers import NOW, FakeTimers, MockTransport
from tests.tls.conftest import NewPair
from tests.tls.support import (
    PEER,
    RecordingProtocol,
    TlsPair,
    captured_hello,
    is_refused,
    new_acceptor,
)
from zcproto.errors import TlsError
from zcproto.tls.context import ServerContext, SiteContexts
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsAcceptor, TlsServerTransport
from zcproto.tls.transport import LINGER_TIME, TlsPhase

TIMEOUT = 5.0


# --- timeouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["silent", "half a hello", "waiting for finished"])
def test_handshake_timeout_ends_connection(state: str, timers: FakeTimers, new_pair: NewPair) -> None:
    pair = new_pair(handshake_timeout=TIMEOUT)
    hello = pair.step()
    pair.raw.deliver({"silent": b"", "half a hello": hello[:500], "waiting for finished": hello}[state])
    timers.advance(TIMEOUT - 0.001)
    assert pair.failures == {}
    timers.advance(0.2)
    is_refused(pair, TlsFailure.HANDSHAKE_TIMEOUT)


@pytest.mark.parametrize("every", [0.25, 1.0, 2.4])
def test_slow_bytes_do_not_extend_handshake_timeout(
    every: float, timers: FakeTimers, new_pair: NewPair
) -> None:
    pair = new_pair(handshake_timeout=TIMEOUT)
    hello = pair.step()
    at = 0
    while pair.phase is TlsPhase.HELLO:
        pair.raw.deliver(hello[at : at + 1])
        at += 1
        timers.advance(every)
    assert timers.time() <= NOW + TIMEOUT + every
    assert pair.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}


def connect(acceptor: TlsAcceptor, timers: FakeTimers) -> TlsServerTransport:
    transport = TlsServerTransport(acceptor, PEER)
    MockTransport(timers).connect(transport)
    return transport


def test_each_handshake_has_its_own_deadline(agreed: TlsPair, timers: FakeTimers) -> None:
    timeout = agreed.acceptor.handshake_timeout
    timers.advance(timeout / 2)
    connect(agreed.acceptor, timers)
    timers.advance(timeout - 0.1)
    assert agreed.failures == {}
    timers.advance(0.3)
    assert agreed.failures == {TlsFailure.HANDSHAKE_TIMEOUT: 1}


@pytest.mark.parametrize(("old", "new"), [(30.0, TIMEOUT), (TIMEOUT, 30.0)])
def test_other_timeout_applies_to_later_handshakes_only(
    timers: FakeTimers, server_tls: ssl.SSLContext, old: float, new: float
) -> None:
    acceptor = new_acceptor(timers, server_tls, RecordingProtocol, [], handshake_timeout=old)
    first = connect(acceptor, timers)
    acceptor.handshake_timeout = new
    second = connect(acceptor, timers)
    timers.advance(TIMEOUT + 0.2)
    assert [first.is_closing(), second.is_closing()] == [old == TIMEOUT, new == TIMEOUT]
    timers.advance(30.0)
    assert acceptor.failures[TlsFailure.HANDSHAKE_TIMEOUT] == 2
    timers.advance(3.0)
    assert len(acceptor.wheel) == 0


def test_timed_out_handshake_that_raises_does_not_stop_the_others(
    timers: FakeTimers, server_tls: ssl.SSLContext
) -> None:
    faults = [RuntimeError()]

    def on_failure(failure: TlsFailure, peer: str) -> None:
        if faults:
            raise faults.pop()

    acceptor = new_acceptor(timers, server_tls, RecordingProtocol, [], handshake_timeout=TIMEOUT)
    acceptor.on_failure = on_failure
    for _ in range(200):
        connect(acceptor, timers)
    with pytest.raises(RuntimeError):
        timers.advance(TIMEOUT + 0.2)
    timers.advance(0.2)
    assert acceptor.failures[TlsFailure.HANDSHAKE_TIMEOUT] == 200


def test_timed_out_handshake_lingers_and_is_reset(timers: FakeTimers, new_pair: NewPair) -> None:
    pair = new_pair(handshake_timeout=TIMEOUT)
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


def test_handshake_counts_from_complete_hello(timers: FakeTimers, new_pair: NewPair) -> None:
    first = new_pair()
    acceptor = first.acceptor
    pairs = [first, *(new_pair(acceptor=acceptor) for _ in range(4))]
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


def test_connection_has_the_leaves_of_its_context_from_its_hello_on(
    timers: FakeTimers,
    server_tls: ServerContext,
    client_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_tls, "leaves", frozenset([b"the digest of a certificate"]))
    pair = TlsPair(timers, server_tls, client_tls)
    assert pair.server.leaves() == frozenset()
    pair.agree()
    assert pair.server.leaves() == server_tls.leaves


def test_acceptor_works_without_callbacks(
    timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext, new_pair: NewPair
) -> None:
    from zcproto.common.deadlines import DeadlineWheel

    acceptor = TlsAcceptor(
        SiteContexts(server_tls),
        {None: RecordingProtocol},
        DeadlineWheel(timers),
        timers,
    )
    pair = new_pair(acceptor=acceptor)
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
