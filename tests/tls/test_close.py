"""How a connection ends: close_notify both ways, truncation, lingering, reset; and what is left of it."""

from __future__ import annotations

import gc
import ssl
import weakref
from typing import Any

import pytest

from tests.helpers import FakeTimers
from tests.tls.support import Above, TlsPair
from zcproto.errors import TlsError
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsServerTransport
from zcproto.tls.sites import SiteContexts
from zcproto.tls.transport import LINGER_BYTES, LINGER_TIME, Phase

# --- clean ----------------------------------------------------------------------------------------------


def test_our_close_sends_close_notify_behind_all_that_was_written(agreed: TlsPair) -> None:
    agreed.server.write(b"last words")
    agreed.server.close()
    assert agreed.server.is_closing()
    assert agreed.raw.eof_written
    assert agreed.client_reads() == b"last words"
    assert agreed.client_saw_close_notify()


def test_a_clean_end_begun_by_us(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.hear()
    agreed.raw.deliver(agreed.client_closes())
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}
    assert agreed.log == ["slot free", "closed"]
    assert not agreed.raw.aborted
    assert len(agreed.acceptor.wheel) == 0


def test_a_clean_end_begun_by_the_peer(agreed: TlsPair) -> None:
    agreed.raw.deliver(agreed.client_closes())
    assert agreed.above.told == ["made", "eof"]
    assert agreed.client_saw_close_notify()
    assert agreed.raw.eof_written
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.above.told == ["made", "eof", None]
    assert agreed.failures == {}


def test_a_peer_that_closed_still_gets_what_is_written_then(agreed: TlsPair) -> None:
    agreed.above._then["eof"] = lambda above: above.transport.write(b"farewell")
    agreed.raw.deliver(agreed.sealed(b"bye") + agreed.client_closes())
    assert agreed.above.received == b"bye"
    assert agreed.client_reads() == b"farewell"
    assert agreed.client_saw_close_notify()


@pytest.mark.parametrize("again", ["close", "abort"])
def test_a_protocol_may_end_it_when_the_peer_closes(agreed: TlsPair, again: str) -> None:
    agreed.above._then["eof"] = lambda above: getattr(above.transport, again)()
    agreed.raw.deliver(agreed.client_closes())
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.above.told == ["made", "eof", None]
    assert agreed.raw.aborted is (again == "abort")


def test_closing_twice_is_closing_once(agreed: TlsPair) -> None:
    agreed.server.close()
    sent = len(agreed.raw.sent)
    agreed.server.close()
    assert len(agreed.raw.sent) == sent
    agreed.raw.lose()
    agreed.server.close()


def test_after_our_close_nothing_is_written_any_more(agreed: TlsPair) -> None:
    agreed.server.close()
    sent = len(agreed.raw.sent)
    agreed.server.write(b"late")
    agreed.server.write(bytes(100_000))
    assert len(agreed.raw.sent) == sent


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_protocol_may_end_it_at_any_piece_and_hears_no_other(agreed: TlsPair, how: str) -> None:
    agreed.above._then["data"] = lambda above, data: getattr(above.transport, how)()
    agreed.raw.deliver(agreed.sealed(b"one") + agreed.sealed(b"two") + agreed.sealed(bytes(50_000)))
    assert agreed.above.pieces == [b"one"]
    assert agreed.failures == {}
    assert agreed.client_saw_close_notify() is (how == "close")
    agreed.timers.advance(10)
    assert agreed.above.told == ["made", None]


# --- truncated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [b"", b"half a record"])
def test_an_end_without_close_notify_is_a_truncation(agreed: TlsPair, half: bytes) -> None:
    agreed.say(b"whole")
    if half:
        agreed.raw.deliver(agreed.sealed(half)[:-5])
    agreed.raw.deliver_eof()
    assert agreed.client_saw_close_notify(), "it may still read"
    agreed.timers.run()
    assert agreed.above.received == b"whole"
    assert agreed.failures == {TlsFailure.TRUNCATED: 1}
    made, error = agreed.above.told
    assert made == "made"
    assert isinstance(error, TlsError)
    assert error.failure == "truncated"
    assert agreed.phase is Phase.CLOSED


def test_a_reset_is_told_apart_from_a_truncation(agreed: TlsPair) -> None:
    agreed.raw.lose(ConnectionResetError())
    assert agreed.failures == {TlsFailure.CONNECTION_RESET: 1}
    assert agreed.above.told[-1].failure == "connection_reset"


def test_after_our_close_the_peer_owes_no_close_notify(agreed: TlsPair) -> None:
    """RFC 8446 section 6.1: each side closes its own half."""
    agreed.server.close()
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}


# --- lingering ------------------------------------------------------------------------------------------


def test_what_arrives_after_our_close_is_discarded(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.deliver(agreed.sealed(bytes(200_000)))
    agreed.raw.deliver(b"garbage")
    assert agreed.above.received == b""
    assert agreed.failures == {}
    assert not agreed.raw.aborted
    assert agreed.server._incoming.pending < 100


def test_a_peer_that_stays_is_reset_after_two_seconds(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.timers.advance(LINGER_TIME - 0.01)
    assert not agreed.raw.aborted
    agreed.timers.advance(0.2)
    assert agreed.raw.aborted
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}


@pytest.mark.parametrize("every", [0.1, 1.9])
def test_a_peer_that_goes_on_sending_gains_no_time(agreed: TlsPair, every: float) -> None:
    agreed.server.close()
    waited = 0.0
    while not agreed.raw.aborted:
        agreed.raw.deliver(b"x")
        agreed.timers.advance(every)
        waited += every
    assert waited <= LINGER_TIME + every + 0.2


def test_a_peer_that_sends_too_much_is_reset_at_once(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.deliver(bytes(LINGER_BYTES))
    assert not agreed.raw.aborted
    agreed.raw.deliver(b"x")
    assert agreed.raw.aborted
    agreed.raw.deliver(b"more")
    agreed.timers.run()
    assert agreed.above.told == ["made", None]


def test_a_fault_lingers_too_so_that_its_alert_arrives(agreed: TlsPair) -> None:
    agreed.raw.deliver(b"\x17\3\3\0\x20" + bytes(32))
    agreed.raw.deliver(bytes(100_000))
    assert not agreed.raw.aborted
    assert "bad record mac" in str(agreed.refusal())
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted
    assert agreed.above.told[-1].failure == "bad_record"


def test_a_slow_reader_gets_its_answer_as_long_as_it_takes_any(agreed: TlsPair) -> None:
    agreed.raw.stuck = True
    agreed.server.write(bytes(300_000))
    agreed.server.close()
    for _ in range(25):
        agreed.raw.drain(10_000)
        agreed.timers.advance(1)
        assert not agreed.raw.aborted
    agreed.raw.drain()
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted


def test_a_peer_that_reads_nothing_more_is_reset(agreed: TlsPair) -> None:
    agreed.raw.stuck = True
    agreed.server.write(bytes(300_000))
    agreed.server.close()
    agreed.raw.drain(1_000)
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert not agreed.raw.aborted
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted


def test_a_transport_that_cannot_close_half_lingers_all_the_same(agreed: TlsPair) -> None:
    agreed.raw.can_half_close = False
    agreed.server.close()
    assert not agreed.raw.eof_written
    assert agreed.client_saw_close_notify()
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted


def test_a_connection_that_dies_while_it_lingers_is_no_failure(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.lose(ConnectionResetError())
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}
    agreed.timers.advance(10)
    assert not agreed.raw.aborted


def test_a_reset_that_is_not_told_yet_disturbs_no_close(agreed: TlsPair) -> None:
    agreed.raw.is_reset = True
    agreed.server.close()
    agreed.timers.run()
    assert agreed.raw.aborted
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}
    assert len(agreed.acceptor.wheel) == 0


# --- aborted --------------------------------------------------------------------------------------------


def test_our_abort_is_no_failure_of_the_peer(agreed: TlsPair) -> None:
    agreed.server.abort()
    assert agreed.server.is_closing()
    agreed.server.write(b"late")
    agreed.timers.run()
    assert agreed.raw.aborted
    assert agreed.raw.take() == b""
    assert agreed.above.told == ["made", None]
    assert agreed.failures == {}
    agreed.server.abort()


def test_a_deadline_that_comes_late_does_nothing_to_an_open_connection(agreed: TlsPair) -> None:
    agreed.server.handle_deadline(agreed.timers.time())
    assert agreed.phase is Phase.OPEN
    agreed.raw.lose()
    agreed.server.buffer_updated(5)
    agreed.server.buffer_updated(60_000)
    assert agreed.above.told[0] == "made"


# --- nothing is left ------------------------------------------------------------------------------------


class Tracked(TlsServerTransport):
    __slots__ = ("__weakref__",)


ENDS = ["silent", "half a hello", "refused", "timeout", "waiting for finished"]
ENDS += ["clean", "peer closed", "truncated", "reset", "bad record", "aborted", "lingered", "paused"]


def end(pair: TlsPair, how: str) -> None:
    """Bring a connection to its end in one way of many."""
    hello = pair.step()
    if how in ("silent", "half a hello", "waiting for finished"):
        pair.raw.deliver({"silent": b"", "half a hello": hello[:100]}.get(how, hello))
        pair.raw.lose(ConnectionResetError())
        return
    if how in ("refused", "timeout"):
        pair.raw.deliver(b"garbage" if how == "refused" else hello[:100])
        pair.timers.advance(20)
        return
    pair.raw.deliver(hello)
    pair.hear()
    pair.raw.deliver(pair.step())
    pair.say(b"hello")
    pair.server.write(b"x" * 100_000)
    match how:
        case "clean":
            pair.server.close()
            pair.raw.deliver(pair.client_closes())
            pair.raw.deliver_eof()
        case "peer closed":
            pair.raw.deliver(pair.client_closes())
            pair.raw.deliver_eof()
        case "truncated":
            pair.raw.deliver_eof()
        case "reset":
            pair.raw.lose(ConnectionResetError())
        case "bad record":
            pair.raw.deliver(b"\x17\3\3\0\x20" + bytes(32))
        case "aborted":
            pair.server.abort()
        case "lingered":
            pair.server.close()
        case "paused":
            pair.server.pause_reading()
            pair.raw.lose()
    pair.timers.advance(20)


@pytest.mark.parametrize("how", ENDS)
def test_a_connection_that_is_gone_is_kept_by_nothing(
    how: str, timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """Without the garbage collector, which a server runs seldom: no cycle may be left."""
    pair = TlsPair(timers, server_tls, client_tls, kind=Tracked)
    gone: list[weakref.ref[Any]] = [weakref.ref(pair.server), weakref.ref(pair.above)]
    wrap = ssl.SSLContext.wrap_bio

    class Watching(ssl.SSLContext):
        def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
            tls = wrap(server_tls, *args, **options)
            gone.append(weakref.ref(tls))
            return tls

    pair.acceptor.contexts = SiteContexts(Watching(ssl.PROTOCOL_TLS_SERVER))
    gc.disable()
    try:
        end(pair, how)
        assert pair.log[-1] == "closed"
        assert len(pair.acceptor.wheel) == 0
        assert len(gone) == (2 if how in ("silent", "half a hello", "refused", "timeout") else 3)
        # What the test itself holds; the acceptor and its wheel live on.
        acceptor, pair.acceptor.protocols = pair.acceptor, {}
        del pair
        assert [reference() for reference in gone] == [None] * len(gone)
        assert acceptor.handshakes_in_progress == 0
    finally:
        gc.enable()


def test_a_closed_connection_has_no_state_to_hold(agreed: TlsPair) -> None:
    server = agreed.server
    agreed.raw.lose()
    values = [getattr(server, name) for name in ("_raw", "_tls", "_protocol", "_hello")]
    assert values == [None] * 4
    assert server._incoming is server._outgoing, "both are the one BIO that stands for none"
    assert not hasattr(server, "__dict__")


def test_an_above_that_was_told_of_its_end_is_let_go(agreed: TlsPair) -> None:
    assert isinstance(agreed.above, Above)
    agreed.raw.lose()
    assert agreed.above.transport is None
