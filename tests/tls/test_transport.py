"""Test records of an open connection: order, back-pressure, sizes and hostile records."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zcproto.tls.transport as tls_transport
from tests.helpers import FakeTimers
from tests.tls.conftest import NewPair
from tests.tls.support import ALERT, HANDSHAKE, Forger, RecordingProtocol, TlsPair, records
from zcproto.errors import TlsError
from zcproto.tls.context import client_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import READ_BUDGET
from zcproto.tls.transport import MAX_BARREN_BYTES, RECORD_SIZE, TlsPhase, TlsTransport, receive_buffer

MIB = 1_048_576


def pattern(size: int) -> bytes:
    """Return bytes without repeating sequences."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1))[:size]


# --- receiving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, RECORD_SIZE, RECORD_SIZE + 1, 60_000, 300_000])
@pytest.mark.parametrize("piece", [777, RECORD_SIZE, 65_536])
def test_data_is_delivered_complete_and_in_order(agreed: TlsPair, size: int, piece: int) -> None:
    data = pattern(size)
    agreed.say(data, piece)
    assert agreed.protocol.received == data


def test_record_byte_by_byte_is_decrypted(agreed: TlsPair) -> None:
    agreed.say(b"hello", 1)
    assert agreed.protocol.pieces == [b"hello"]


def test_bio_gets_at_most_one_record_at_a_time(agreed: TlsPair) -> None:
    """A MemoryBIO never shrinks."""
    pending: list[int] = []
    agreed.protocol.actions["data"] = lambda protocol, data: pending.append(agreed.server._incoming.pending)
    agreed.say(pattern(300_000))
    assert max(pending) < RECORD_SIZE + 1_000


def test_connections_share_one_receive_buffer(new_pair: NewPair) -> None:
    first = new_pair().agree()
    second = new_pair(acceptor=first.acceptor, protocol=RecordingProtocol())
    assert first.server.get_buffer(-1) is second.server.get_buffer(-1)


# --- reading paused -------------------------------------------------------------------------------------


def test_paused_reading_delivers_nothing_then_everything(agreed: TlsPair) -> None:
    agreed.server.pause_reading()
    assert not agreed.server.is_reading()
    assert not agreed.raw.is_reading()
    agreed.server.pause_reading()
    agreed.server.resume_reading()
    assert agreed.server.is_reading()
    assert agreed.raw.is_reading()
    agreed.server.resume_reading()
    agreed.say(b"hello")
    assert agreed.protocol.received == b"hello"


def test_pausing_at_each_piece_delivers_one_at_a_time(agreed: TlsPair) -> None:
    agreed.protocol.actions["data"] = lambda protocol, data: protocol.transport.pause_reading()
    data = pattern(60_000)
    agreed.say(data)
    heard = [len(agreed.protocol.received)]
    while len(agreed.protocol.received) < len(data):
        assert not agreed.raw.is_reading()
        agreed.server.resume_reading()
        heard.append(len(agreed.protocol.received))
    assert heard == [RECORD_SIZE, 2 * RECORD_SIZE, 3 * RECORD_SIZE, 60_000]
    assert agreed.protocol.received == data


@pytest.mark.parametrize(
    ("cost", "closes", "reads"), [(READ_BUDGET, False, False), (0.0, False, True), (READ_BUDGET, True, True)]
)
def test_read_that_takes_long_lets_others_have_their_turn(
    agreed: TlsPair, cost: float, closes: bool, reads: bool
) -> None:
    seconds = [100.0]
    agreed.acceptor.perf_counter = lambda: seconds[0]

    def work(protocol: RecordingProtocol, data: bytes) -> None:
        seconds[0] += cost
        if closes:
            protocol.transport.close()

    agreed.protocol.actions["data"] = work
    agreed.say(pattern(60_000))
    assert agreed.raw.is_reading() == reads
    agreed.timers.run()
    assert agreed.raw.is_reading()
    assert len(agreed.protocol.received) == (RECORD_SIZE if closes else 60_000)


def test_buffered_data_precedes_later_data(agreed: TlsPair) -> None:
    agreed.protocol.actions["data"] = lambda protocol, data: protocol.transport.pause_reading()
    agreed.raw.deliver(agreed.sealed(b"one") + agreed.sealed(b"two"))
    assert agreed.protocol.pieces == [b"one"]
    del agreed.protocol.actions["data"]
    agreed.server.resume_reading()
    agreed.say(b"three")
    assert agreed.protocol.pieces == [b"one", b"two", b"three"]


def test_large_read_is_buffered_while_paused(agreed: TlsPair) -> None:
    agreed.protocol.actions["data"] = lambda protocol, data: protocol.transport.pause_reading()
    data = pattern(50_000)
    agreed.raw.deliver(agreed.sealed(b"first") + agreed.sealed(data))
    assert agreed.protocol.received == b"first"
    assert agreed.server._incoming.pending < 65_536
    del agreed.protocol.actions["data"]
    agreed.server.resume_reading()
    assert agreed.protocol.received == b"first" + data


def test_protocol_may_resume_within_data_received(agreed: TlsPair) -> None:
    def stutter(protocol: RecordingProtocol, data: bytes) -> None:
        protocol.transport.pause_reading()
        protocol.transport.resume_reading()

    agreed.protocol.actions["data"] = stutter
    data = pattern(60_000)
    agreed.say(data)
    assert agreed.protocol.received == data


def test_resume_after_end_is_ignored(agreed: TlsPair) -> None:
    agreed.server.pause_reading()
    agreed.server.close()
    assert agreed.raw.is_reading(), "what still comes is discarded"
    agreed.raw.lose()
    agreed.server.resume_reading()
    agreed.server.pause_reading()


def test_close_notify_waits_while_paused(agreed: TlsPair) -> None:
    agreed.protocol.actions["data"] = lambda protocol, data: protocol.transport.pause_reading()
    agreed.raw.deliver(agreed.sealed(b"one") + agreed.sealed(b"two") + agreed.client_closes())
    assert agreed.protocol.calls == ["made"]
    agreed.server.resume_reading()
    assert agreed.protocol.calls == ["made"]
    agreed.server.resume_reading()
    assert agreed.protocol.pieces == [b"one", b"two"]
    assert agreed.protocol.calls == ["made", "eof"]


# --- sending ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (1, bytes),
        (100, memoryview),
        (RECORD_SIZE - 1, bytearray),
        (RECORD_SIZE, bytes),
        (RECORD_SIZE + 1, bytes),
        (3 * RECORD_SIZE, memoryview),
        (5 * RECORD_SIZE + 7, bytearray),
        (MIB, bytes),
    ],
)
def test_write_is_sent_complete_in_one_tcp_write(
    agreed: TlsPair, size: int, kind: Callable[[bytes], Any]
) -> None:
    data = pattern(size)
    agreed.raw.writes.clear()
    agreed.server.write(kind(data))
    assert len(agreed.raw.writes) == 1
    assert all(len(content) <= RECORD_SIZE + 256 for _, content in records(bytes(agreed.raw.sent)))
    assert agreed.client_reads() == data


def test_large_write_does_not_grow_bio(agreed: TlsPair) -> None:
    outgoing = agreed.server._outgoing
    largest = 0

    class Watched:
        def read(self) -> bytes:
            nonlocal largest
            data = outgoing.read()
            largest = max(largest, len(data))
            return data

        @property
        def pending(self) -> int:
            return outgoing.pending

    agreed.server._outgoing = Watched()  # type: ignore[assignment]
    agreed.server.write(bytes(MIB))
    assert RECORD_SIZE < largest < RECORD_SIZE + 256
    assert len(agreed.client_reads()) == MIB


def test_empty_write_is_ignored(agreed: TlsPair) -> None:
    agreed.server.write(b"")
    agreed.server.writelines([b"a", b"b"])
    assert agreed.client_reads() == b"ab"


def test_small_writes_are_separate_records(agreed: TlsPair) -> None:
    for _ in range(3):
        agreed.server.write(b"x")
    assert len(records(bytes(agreed.raw.sent))) == 3
    assert agreed.client_reads() == b"xxx"


# --- writing paused -------------------------------------------------------------------------------------


def test_peer_that_does_not_read_pauses_writing_and_reading(agreed: TlsPair) -> None:
    agreed.server.set_write_buffer_limits(high=10_000)
    agreed.raw.stuck = True
    agreed.server.write(bytes(8_000))
    assert agreed.protocol.calls == ["made"]
    agreed.server.write(bytes(8_000))
    assert agreed.protocol.calls == ["made", "pause"]
    assert not agreed.raw.is_reading()
    assert agreed.server.get_write_buffer_size() > 16_000
    agreed.raw.drain()
    assert agreed.protocol.calls == ["made", "pause", "resume"]
    assert agreed.raw.is_reading()


def test_reading_resumes_only_when_neither_side_is_paused(agreed: TlsPair) -> None:
    agreed.server.set_write_buffer_limits(high=1_000)
    agreed.raw.stuck = True
    agreed.server.write(bytes(2_000))
    agreed.server.pause_reading()
    agreed.server.resume_reading()
    assert not agreed.raw.is_reading(), "the peer does not read yet"
    agreed.server.pause_reading()
    agreed.raw.drain()
    assert not agreed.raw.is_reading(), "the protocol does not read yet"
    agreed.server.resume_reading()
    assert agreed.raw.is_reading()


def test_write_in_resume_writing_pauses_again(agreed: TlsPair) -> None:
    agreed.server.set_write_buffer_limits(high=1_000)
    agreed.raw.stuck = True
    agreed.protocol.actions["resume"] = lambda protocol: protocol.transport.write(bytes(2_000))
    agreed.server.write(bytes(2_000))
    agreed.raw.drain()
    assert agreed.protocol.calls == ["made", "pause", "resume", "pause"]
    assert not agreed.raw.is_reading()


def test_pause_during_handshake_is_not_forwarded(tls_pair: TlsPair) -> None:
    tls_pair.raw.stuck = True
    tls_pair.raw.high = 100
    tls_pair.raw.deliver(tls_pair.step())
    assert not tls_pair.raw.is_reading()
    tls_pair.raw.drain()
    tls_pair.raw.stuck = False
    tls_pair.hear()
    tls_pair.raw.deliver(tls_pair.step())
    assert tls_pair.protocol.calls == ["made"]


def test_resume_writing_after_end_is_ignored(agreed: TlsPair) -> None:
    agreed.server.set_write_buffer_limits(high=1_000)
    agreed.raw.stuck = True
    agreed.server.write(bytes(2_000))
    agreed.server.close()
    assert agreed.raw.is_reading()
    agreed.raw.drain()
    assert agreed.protocol.calls == ["made", "pause"]
    agreed.raw.lose()
    agreed.server.pause_writing()
    agreed.server.resume_writing()
    assert agreed.protocol.calls == ["made", "pause", None]


# --- hostile records ------------------------------------------------------------------------------------


@pytest.fixture
def forged(
    timers: FakeTimers, server_tls: ssl.SSLContext, ca_file: Path, tmp_path: Path
) -> tuple[TlsPair, Forger]:
    """Return an open connection and a forger with its client's keys."""
    context = client_context(ca_file=ca_file)
    context.keylog_filename = str(tmp_path / "keys")
    return TlsPair(timers, server_tls, context).agree(), Forger(tmp_path / "keys")


Forged = tuple[TlsPair, Forger]


def test_record_padding_is_removed(forged: Forged) -> None:
    """RFC 8446 section 5.4."""
    pair, forger = forged
    pair.raw.deliver(forger.record(b"hello", padding=1_000))
    assert pair.protocol.received == b"hello"


@pytest.mark.parametrize("answer", [False, True])
def test_key_updates_are_applied_and_answered(forged: Forged, answer: bool) -> None:
    """RFC 8446 section 4.6.3."""
    pair, forger = forged
    for number in range(10):
        pair.raw.deliver(forger.key_update(answer=answer) + forger.record(b"%d" % number))
    assert pair.protocol.received == b"0123456789"
    assert pair.phase is TlsPhase.OPEN
    pair.server.write(b"still here")
    assert pair.client_reads() == b"still here"


def test_key_update_is_answered_with_next_write(forged: Forged) -> None:
    pair, forger = forged
    pair.raw.deliver(forger.key_update(answer=True))
    pair.server.write(b"y")
    assert len(records(bytes(pair.raw.sent))) == 2
    assert pair.client_reads() == b"y"


def test_openssl_output_after_read_is_flushed(agreed: TlsPair) -> None:
    """OpenSSL currently delays its answers to the next write, but does not promise to."""
    agreed.protocol.actions["data"] = lambda protocol, data: agreed.server._outgoing.write(
        b"something of its own"
    )
    agreed.say(b"hello")
    assert bytes(agreed.raw.sent) == b"something of its own"


@pytest.mark.parametrize(("answer", "piece"), [(False, 65_536), (True, 100)])
def test_flood_of_key_updates_is_limited(forged: Forged, answer: bool, piece: int) -> None:
    pair, forger = forged
    before = len(pair.raw.sent)
    sent = 0
    while pair.phase is TlsPhase.OPEN:
        flood = b"".join(forger.key_update(answer=answer) for _ in range(200))
        sent += len(flood)
        pair.raw.deliver(flood, piece)
    assert MAX_BARREN_BYTES < sent < MAX_BARREN_BYTES + 20_000
    assert pair.failures == {TlsFailure.BARREN_RECORDS: 1}
    assert len(pair.raw.sent) - before < 2 * MAX_BARREN_BYTES
    assert pair.client_saw_close_notify()


def test_data_between_key_updates_resets_count(forged: Forged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_transport, "MAX_BARREN_BYTES", 3_000)
    pair, forger = forged
    for _ in range(3):
        pair.raw.deliver(b"".join(forger.key_update() for _ in range(100)))
        pair.raw.deliver(forger.record(b"x"))
    assert pair.protocol.received == b"xxx"
    assert pair.phase is TlsPhase.OPEN
    pair.raw.deliver(b"".join(forger.key_update() for _ in range(120)))
    assert pair.phase is TlsPhase.CLOSING


def test_record_in_many_pieces_is_not_barren(forged: Forged) -> None:
    pair, forger = forged
    for _ in range(6):
        pair.raw.deliver(forger.record(pattern(RECORD_SIZE)), 100)
    assert len(pair.protocol.received) == 6 * RECORD_SIZE


def test_flood_of_empty_records_is_limited(forged: Forged) -> None:
    """RFC 8446 section 5.1 allows empty records; OpenSSL allows 32 in a row."""
    pair, forger = forged
    pair.raw.deliver(forger.record(b"") * 1)
    assert pair.phase is TlsPhase.OPEN
    assert pair.protocol.received == b""
    pair.raw.deliver(b"".join(forger.record(b"") for _ in range(1_000)))
    assert pair.phase is TlsPhase.CLOSING
    assert pair.failures == {TlsFailure.BAD_RECORD: 1}


HOSTILE: dict[str, tuple[Callable[[Forger], bytes], TlsFailure, str]] = {
    "bad mac": (lambda f: _flipped(f.record(b"x")), TlsFailure.BAD_RECORD, "bad record mac"),
    "replayed": (lambda f: f.record(b"x") + _again(f, b"x"), TlsFailure.BAD_RECORD, "bad record mac"),
    "too much inside": (lambda f: f.record(bytes(RECORD_SIZE + 1)), TlsFailure.BAD_RECORD, "overflow"),
    "too long": (lambda f: b"\x17\3\3\x45\0" + bytes(0x4500), TlsFailure.BAD_RECORD, "overflow"),
    "too long, header alone": (lambda f: b"\x17\3\3\xff\xff", TlsFailure.BAD_RECORD, "overflow"),
    "garbage": (lambda f: b"garbage" * 5, TlsFailure.BAD_RECORD, "unexpected message"),
    "plaintext alert": (lambda f: b"\x15\3\3\0\2\2\x28", TlsFailure.BAD_RECORD, "unexpected message"),
    "plaintext handshake": (lambda f: b"\x16\3\3\0\2\1\0", TlsFailure.BAD_RECORD, "unexpected message"),
    "change cipher spec": (lambda f: b"\x14\3\3\0\1\1", TlsFailure.BAD_RECORD, "unexpected message"),
    "second hello": (
        lambda f: f.record(b"\1\0\0\2ab", HANDSHAKE),
        TlsFailure.UNEXPECTED_MESSAGE,
        "unexpected message",
    ),
    "bad key update": (
        lambda f: f.record(b"\x18\0\0\1\7", HANDSHAKE),
        TlsFailure.UNEXPECTED_MESSAGE,
        "illegal parameter",
    ),
}


def _flipped(record: bytes) -> bytes:
    """Flip a bit of the last byte of the tag."""
    return record[:-1] + bytes([record[-1] ^ 1])


def _again(forger: Forger, content: bytes) -> bytes:
    forger.sequence -= 1
    return forger.record(content)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_record_ends_connection_with_alert(forged: Forged, name: str) -> None:
    pair, forger = forged
    make, failure, alert = HOSTILE[name]
    pair.raw.deliver(make(forger))
    assert pair.failures == {failure: 1}
    assert pair.phase is TlsPhase.CLOSING
    assert pair.raw.eof_written
    assert alert in str(pair.refusal())
    pair.raw.deliver_eof()
    pair.timers.run()
    error = pair.protocol.calls[-1]
    assert isinstance(error, TlsError)
    assert error.failure == failure.value


def test_data_before_hostile_record_is_delivered_and_none_after(forged: Forged) -> None:
    pair, forger = forged
    pair.raw.deliver(forger.record(b"good") + b"\x17\3\3\0\x20" + bytes(32) + forger.record(b"never"))
    assert pair.protocol.received == b"good"
    assert pair.phase is TlsPhase.CLOSING


@pytest.mark.parametrize(
    ("number", "failure"), [(80, TlsFailure.PEER_ALERT), (48, TlsFailure.PEER_REJECTED_CERTIFICATE)]
)
def test_fatal_alert_of_peer_ends_connection(forged: Forged, number: int, failure: TlsFailure) -> None:
    pair, forger = forged
    before = bytes(pair.raw.sent)
    pair.raw.deliver(forger.record(bytes([2, number]), ALERT))
    assert pair.failures == {failure: 1}
    assert bytes(pair.raw.sent) == before, "an alert is not answered"
    pair.raw.lose()
    assert pair.protocol.calls[-1].failure == failure.value


def test_user_canceled_warning_is_ignored(forged: Forged) -> None:
    """RFC 8446 section 6.1."""
    pair, forger = forged
    pair.raw.deliver(forger.record(bytes([1, 90]), ALERT))
    pair.raw.deliver(forger.record(b"hello"))
    assert pair.protocol.received == b"hello"


def test_base_transport_has_no_handshake(timers: FakeTimers) -> None:
    from zcproto.common.deadlines import DeadlineWheel

    transport = TlsTransport(receive_buffer(), DeadlineWheel(timers), "peer")
    with pytest.raises(NotImplementedError):
        transport.buffer_updated(1)
    with pytest.raises(NotImplementedError):
        transport._handshake_completed()
    assert isinstance(transport, asyncio.Transport)
    assert isinstance(transport, asyncio.BufferedProtocol)
