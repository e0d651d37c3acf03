"""Test the end of connections: close_notify, truncation, lingering, reset, and released memory."""

from __future__ import annotations

import gc
import ssl
import weakref
from typing import Any

import pytest

from tests.tls.conftest import NewPair
from tests.tls.support import RecordingProtocol, TlsPair
from zcproto.errors import TlsError
from zcproto.tls.context import SiteContexts
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsServerTransport
from zcproto.tls.transport import LINGER_TIME, TlsPhase

# --- clean ----------------------------------------------------------------------------------------------


def test_close_sends_close_notify_after_pending_output(agreed: TlsPair) -> None:
    agreed.server.write(b"last words")
    agreed.server.close()
    assert agreed.server.is_closing()
    assert agreed.raw.eof_written
    assert agreed.client_reads() == b"last words"
    assert agreed.client_saw_close_notify()


def test_clean_close_started_locally(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.hear()
    agreed.raw.deliver(agreed.client_closes())
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}
    assert agreed.log == ["closed"]
    assert not agreed.raw.aborted
    assert len(agreed.acceptor.wheel) == 0


def test_clean_close_started_by_peer(agreed: TlsPair) -> None:
    agreed.raw.deliver(agreed.client_closes())
    assert agreed.protocol.calls == ["made", "eof"]
    assert agreed.client_saw_close_notify()
    assert agreed.raw.eof_written
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.protocol.calls == ["made", "eof", None]
    assert agreed.failures == {}


def test_peer_gets_data_written_in_eof_received(agreed: TlsPair) -> None:
    agreed.protocol.actions["eof"] = lambda protocol: protocol.transport.write(b"farewell")
    agreed.raw.deliver(agreed.sealed(b"bye") + agreed.client_closes())
    assert agreed.protocol.received == b"bye"
    assert agreed.client_reads() == b"farewell"
    assert agreed.client_saw_close_notify()


@pytest.mark.parametrize("again", ["close", "abort"])
def test_protocol_may_close_in_eof_received(agreed: TlsPair, again: str) -> None:
    agreed.protocol.actions["eof"] = lambda protocol: getattr(protocol.transport, again)()
    agreed.raw.deliver(agreed.client_closes())
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.protocol.calls == ["made", "eof", None]
    assert agreed.raw.aborted is (again == "abort")


def test_close_is_idempotent(agreed: TlsPair) -> None:
    agreed.server.close()
    sent = len(agreed.raw.sent)
    agreed.server.close()
    assert len(agreed.raw.sent) == sent
    agreed.raw.lose()
    agreed.server.close()


def test_write_after_close_is_ignored(agreed: TlsPair) -> None:
    agreed.server.close()
    sent = len(agreed.raw.sent)
    agreed.server.write(b"late")
    agreed.server.write(bytes(100_000))
    assert len(agreed.raw.sent) == sent


@pytest.mark.parametrize("how", ["close", "abort"])
def test_protocol_that_closes_gets_no_more_data(agreed: TlsPair, how: str) -> None:
    agreed.protocol.actions["data"] = lambda protocol, data: getattr(protocol.transport, how)()
    agreed.raw.deliver(agreed.sealed(b"one") + agreed.sealed(b"two") + agreed.sealed(bytes(50_000)))
    assert agreed.protocol.pieces == [b"one"]
    assert agreed.failures == {}
    assert agreed.client_saw_close_notify() is (how == "close")
    agreed.timers.advance(10)
    assert agreed.protocol.calls == ["made", None]


# --- truncated ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [b"", b"half a record"])
def test_eof_without_close_notify_is_truncated(agreed: TlsPair, half: bytes) -> None:
    agreed.say(b"whole")
    if half:
        agreed.raw.deliver(agreed.sealed(half)[:-5])
    agreed.raw.deliver_eof()
    assert agreed.client_saw_close_notify(), "it may still read"
    agreed.timers.run()
    assert agreed.protocol.received == b"whole"
    assert agreed.failures == {TlsFailure.TRUNCATED: 1}
    made, error = agreed.protocol.calls
    assert made == "made"
    assert isinstance(error, TlsError)
    assert error.failure == "truncated"
    assert agreed.phase is TlsPhase.CLOSED


def test_reset_is_distinguished_from_truncation(agreed: TlsPair) -> None:
    agreed.raw.lose(ConnectionResetError())
    assert agreed.failures == {TlsFailure.CONNECTION_RESET: 1}
    assert agreed.protocol.calls[-1].failure == "connection_reset"


def test_peer_need_not_send_close_notify_after_ours(agreed: TlsPair) -> None:
    """RFC 8446 section 6.1: each side closes its own direction."""
    agreed.server.close()
    agreed.raw.deliver_eof()
    agreed.timers.run()
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}


# --- lingering ------------------------------------------------------------------------------------------


def test_data_after_close_is_discarded(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.deliver(agreed.sealed(bytes(200_000)))
    agreed.raw.deliver(b"garbage")
    assert agreed.protocol.received == b""
    assert agreed.failures == {}
    assert not agreed.raw.aborted
    assert agreed.server._incoming.pending < 100


def test_lingering_connection_is_reset_after_two_seconds(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.timers.advance(LINGER_TIME - 0.01)
    assert not agreed.raw.aborted
    agreed.timers.advance(0.2)
    assert agreed.raw.aborted
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}


@pytest.mark.parametrize("every", [0.1, 1.9])
def test_sending_does_not_extend_linger_time(agreed: TlsPair, every: float) -> None:
    agreed.server.close()
    waited = 0.0
    while not agreed.raw.aborted:
        agreed.raw.deliver(b"x")
        agreed.timers.advance(every)
        waited += every
    assert waited <= LINGER_TIME + every + 0.2


def test_linger_byte_limit_resets_connection(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.deliver(bytes(4 * 1024 * 1024))
    assert not agreed.raw.aborted
    agreed.raw.deliver(b"x")
    assert agreed.raw.aborted
    agreed.raw.deliver(b"more")
    agreed.timers.run()
    assert agreed.protocol.calls == ["made", None]


def test_failed_connection_lingers_so_that_alert_arrives(agreed: TlsPair) -> None:
    agreed.raw.deliver(b"\x17\3\3\0\x20" + bytes(32))
    agreed.raw.deliver(bytes(100_000))
    assert not agreed.raw.aborted
    assert "bad record mac" in str(agreed.refusal())
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted
    assert agreed.protocol.calls[-1].failure == "bad_record"


def test_slow_reader_extends_linger_while_it_reads(agreed: TlsPair) -> None:
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


def test_peer_that_stops_reading_is_reset(agreed: TlsPair) -> None:
    agreed.raw.stuck = True
    agreed.server.write(bytes(300_000))
    agreed.server.close()
    agreed.raw.drain(1_000)
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert not agreed.raw.aborted
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted


def test_transport_without_half_close_lingers(agreed: TlsPair) -> None:
    agreed.raw.can_half_close = False
    agreed.server.close()
    assert not agreed.raw.eof_written
    assert agreed.client_saw_close_notify()
    agreed.timers.advance(LINGER_TIME + 0.2)
    assert agreed.raw.aborted


def test_connection_lost_while_lingering_is_not_a_failure(agreed: TlsPair) -> None:
    agreed.server.close()
    agreed.raw.lose(ConnectionResetError())
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}
    agreed.timers.advance(10)
    assert not agreed.raw.aborted


def test_close_tolerates_unreported_reset(agreed: TlsPair) -> None:
    agreed.raw.is_reset = True
    agreed.server.close()
    agreed.timers.run()
    assert agreed.raw.aborted
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}
    assert len(agreed.acceptor.wheel) == 0


# --- aborted --------------------------------------------------------------------------------------------


def test_abort_is_not_a_failure_of_the_peer(agreed: TlsPair) -> None:
    agreed.server.abort()
    assert agreed.server.is_closing()
    agreed.server.write(b"late")
    agreed.timers.run()
    assert agreed.raw.aborted
    assert agreed.raw.take() == b""
    assert agreed.protocol.calls == ["made", None]
    assert agreed.failures == {}
    agreed.server.abort()


def test_late_deadline_does_not_affect_open_connection(agreed: TlsPair) -> None:
    agreed.server.handle_deadline(agreed.timers.time())
    assert agreed.phase is TlsPhase.OPEN
    agreed.raw.lose()
    agreed.server.buffer_updated(5)
    agreed.server.buffer_updated(60_000)
    assert agreed.protocol.calls[0] == "made"


# --- released memory ------------------------------------------------------------------------------------


class Tracked(TlsServerTransport):
    __slots__ = ("__weakref__",)


ENDS = ["silent", "half a hello", "refused", "timeout", "waiting for finished"]
ENDS += ["clean", "peer closed", "truncated", "reset", "bad record", "aborted", "lingered", "paused"]


def end(pair: TlsPair, how: str) -> None:
    """End a connection in one of many ways."""
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
def test_closed_connection_leaves_no_reference_cycle(
    how: str, server_tls: ssl.SSLContext, new_pair: NewPair
) -> None:
    """Checked without the garbage collector, which a server runs rarely: no cycle may remain."""
    pair = new_pair(kind=Tracked)
    gone: list[weakref.ref[Any]] = [weakref.ref(pair.server), weakref.ref(pair.protocol)]
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
        # Held by the test itself; the acceptor and its wheel stay alive.
        acceptor, pair.acceptor.protocols = pair.acceptor, {}
        del pair
        assert [reference() for reference in gone] == [None] * len(gone)
        assert acceptor.handshakes_in_progress == 0
    finally:
        gc.enable()


def test_closed_connection_holds_no_state(agreed: TlsPair) -> None:
    server = agreed.server
    agreed.raw.lose()
    references = [weakref.ref(each) for each in (agreed.raw, agreed.protocol)]
    agreed.acceptor.protocols = {}
    del agreed.raw, agreed.protocol
    assert [reference() for reference in references] == [None, None]
    assert server.get_extra_info("ssl_object") is None
    assert server._incoming is server._outgoing, "both are the shared empty BIO"
    assert not hasattr(server, "__dict__")


def test_protocol_is_released_after_connection_lost(agreed: TlsPair) -> None:
    assert isinstance(agreed.protocol, RecordingProtocol)
    agreed.raw.lose()
    assert agreed.protocol.transport is None
