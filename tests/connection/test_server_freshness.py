"""Test salt, counter and timestamp of received frames, and the order of all checks (zcp1.md, section 5)."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import pytest

from tests.helpers import SALT, WALL, ConnectionPair, FakeClock
from zcproto.connection.events import ConnectionEnded, Request, RequestEnded
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, SessionRegistry
from zcproto.wire.frame import CANCEL, NO_TOKEN, PING, PONG, REQUEST, Kind
from zcproto.wire.message import encode_request

KINDS = {"request": (REQUEST, 1), "cancel": (CANCEL, 1), "ping": (PING, 0), "pong": (PONG, 0)}


def frame_of_kind(pair: ConnectionPair, kind: str, **fields: Any) -> bytes:
    head, stream = KINDS[kind]
    return pair.frame(head, stream, encode_request("echo", None) if head == REQUEST else b"", **fields)


@pytest.fixture(scope="module")
def signed_in() -> tuple[SessionRegistry, OpenedSession]:
    """Return a session shared by all tests of this module; none of them ends it."""
    pair = ConnectionPair()
    return pair.registry, pair.login()


@pytest.fixture
def pair(signed_in: tuple[SessionRegistry, OpenedSession]) -> ConnectionPair:
    registry, opened = signed_in
    pair = ConnectionPair(registry)
    pair.use(opened)
    return pair


# --- salt -------------------------------------------------------------------------------------------


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "salt", [bytes(8), b"\xff" * 8, bytes([*SALT[:7], SALT[7] ^ 1]), bytes([SALT[0] ^ 0x80, *SALT[1:]])]
)
def test_wrong_salt_closes_connection_as_replayed(pair: ConnectionPair, kind: str, salt: bytes) -> None:
    answer = pair.fatal(frame_of_kind(pair, kind, salt=salt))
    assert answer.code == Code.REPLAYED
    assert answer.token == NO_TOKEN


# --- counter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("used", "counter"), [(None, 0), (1, 1), (7, 7), (7, 6), (7, 0), (2**64 - 1,) * 2])
def test_counter_that_does_not_increase_closes_connection_as_replayed(
    pair: ConnectionPair, kind: str, used: int | None, counter: int
) -> None:
    if used is not None:
        assert pair.send(pair.ping(counter=used)) == []
    assert pair.fatal(frame_of_kind(pair, kind, counter=counter)).code == Code.REPLAYED


@pytest.mark.parametrize("counters", [[1, 2, 3], [5, 6, 100], [2**63 - 1, 2**63, 2**64 - 1], [2**64 - 1]])
def test_counter_may_skip_numbers(pair: ConnectionPair, counters: list[int]) -> None:
    for counter in counters:
        assert isinstance(pair.get(pair.request(1, counter=counter)), Request)


def test_counters_of_both_directions_are_independent(pair: ConnectionPair) -> None:
    for _ in range(5):
        pair.send(pair.ping())
    assert [answer.counter for answer in pair.answers()] == [1, 2, 3, 4, 5]
    pair.send(pair.ping(counter=6))
    assert pair.answer().counter == 6


def test_server_counter_increases_by_one_from_welcome(pair: ConnectionPair) -> None:
    assert (pair.welcome.kind, pair.welcome.counter) == (Kind.WELCOME, 0)
    counters = []
    for stream in range(1, 20):
        pair.respond(pair.get(pair.request(stream)))
        pair.send(pair.ping())
        counters += [answer.counter for answer in pair.answers()]
    assert counters == list(range(1, 39))


def test_sent_frames_have_connection_salt_and_server_time(pair: ConnectionPair) -> None:
    pair.clock.advance(1.5)
    pair.send(pair.ping())
    pair.respond(pair.get(pair.request(1)))
    pair.send(pair.request(2, token=b"x" * 32))
    for answer in pair.answers():
        assert answer.salt == SALT
        assert answer.timestamp == WALL + 1_500


# --- timestamp --------------------------------------------------------------------------------------


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [-30_000, -29_999, -1, 0, 1, 29_999, 30_000])
def test_timestamp_within_tolerance_is_fresh(pair: ConnectionPair, kind: str, off: int) -> None:
    pair.send(frame_of_kind(pair, kind, timestamp=WALL + off))
    assert pair.server.totals.dropped_stale == 0
    assert all(answer.kind is Kind.PONG for answer in pair.answers())


@pytest.mark.requirement("replays")
@pytest.mark.parametrize("timestamp", [WALL - 30_001, WALL + 30_001, 0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_stale_request_is_refused_with_server_time(pair: ConnectionPair, timestamp: int) -> None:
    answer = pair.refused(pair.request(9, timestamp=timestamp))
    assert answer.code == Code.STALE_TIMESTAMP
    assert answer.stream == 9
    assert answer.token == pair.token
    assert answer.error.details == {"server_time": WALL}
    assert pair.server.totals.dropped_stale == 0


@pytest.mark.parametrize("kind", ["ping", "pong"])
@pytest.mark.parametrize("timestamp", [WALL - 30_001, WALL + 30_001, 0, 2**64 - 1])
def test_stale_frame_of_other_kind_is_dropped_and_counted(
    pair: ConnectionPair, kind: str, timestamp: int
) -> None:
    pair.hold(pair.request(1))
    assert pair.send(frame_of_kind(pair, kind, timestamp=timestamp)) == []
    assert pair.answers() == []
    assert pair.server.totals.dropped_stale == 1
    assert pair.server.in_flight == 1


@pytest.mark.parametrize("timestamp", [WALL - 30_001, WALL + 30_001, 0, 2**64 - 1])
def test_stale_cancel_is_honoured(pair: ConnectionPair, timestamp: int) -> None:
    request = pair.hold(pair.request(1))
    assert pair.send(frame_of_kind(pair, "cancel", timestamp=timestamp)) == [
        RequestEnded(request, Code.CANCELLED)
    ]
    (answer,) = pair.answers()
    assert (answer.stream, answer.code) == (1, Code.CANCELLED)
    assert (pair.server.totals.dropped_stale, pair.server.in_flight) == (0, 0)


def test_stale_cancel_with_body_is_fatal(pair: ConnectionPair) -> None:
    pair.hold(pair.request(1))
    assert pair.fatal(pair.frame(CANCEL, 1, b"\xc0", timestamp=0)).code == Code.PROTOCOL_ERROR


@pytest.mark.parametrize(("wall", "timestamp"), [(0, 0), (0, 30_000), (10, 0), (30_000, 0)])
def test_timestamps_near_zero_do_not_wrap_around(wall: int, timestamp: int) -> None:
    pair = ConnectionPair(clock=FakeClock(wall))
    pair.get(pair.request(1, "server.info", timestamp=timestamp))
    assert pair.answers() == []


@pytest.mark.parametrize("timestamp", [2**64 - 1, 2**64 - 30_000, 2**63])
def test_largest_timestamps_are_stale_near_zero(timestamp: int) -> None:
    pair = ConnectionPair(clock=FakeClock(0))
    assert pair.refused(pair.request(1, timestamp=timestamp)).code == Code.STALE_TIMESTAMP


@pytest.mark.parametrize("tolerance_ms", [0, 1, 5_000, 300_000])
def test_tolerance_is_configurable(tolerance_ms: int) -> None:
    pair = ConnectionPair(settings=ConnectionSettings(tolerance_ms=tolerance_ms))
    assert pair.welcome.value["tolerance_ms"] == tolerance_ms
    pair.get(pair.request(1, timestamp=WALL - tolerance_ms))
    pair.get(pair.request(1, timestamp=WALL + tolerance_ms))
    for off in (-tolerance_ms - 1, tolerance_ms + 1):
        assert pair.refused(pair.request(1, timestamp=WALL + off)).code == Code.STALE_TIMESTAMP


def test_counter_of_stale_frame_cannot_be_reused(pair: ConnectionPair) -> None:
    pair.refused(pair.request(1, timestamp=0, counter=5))
    assert pair.fatal(pair.request(1, counter=5)).code == Code.REPLAYED


def test_stale_request_on_stream_in_flight_is_refused_as_stale(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1))
    assert pair.refused(pair.request(1, timestamp=0)).code == Code.STALE_TIMESTAMP
    assert pair.respond(request)


@pytest.mark.parametrize("kind", KINDS)
def test_tenth_consecutive_stale_frame_closes_connection(pair: ConnectionPair, kind: str) -> None:
    for _ in range(9):
        assert pair.send(frame_of_kind(pair, "request", timestamp=0)) == []
    assert len(pair.answers()) == 9
    answer = pair.fatal(frame_of_kind(pair, kind, timestamp=0))
    assert answer.code == Code.STALE_TIMESTAMP
    assert answer.stream == 0


@pytest.mark.parametrize("kind", ["cancel", "ping", "pong"])
def test_dropped_stale_frames_count_as_consecutive(pair: ConnectionPair, kind: str) -> None:
    for _ in range(9):
        assert pair.send(frame_of_kind(pair, kind, timestamp=0)) == []
    assert pair.fatal(pair.request(1, timestamp=0)).code == Code.STALE_TIMESTAMP
    assert pair.server.totals.dropped_stale == (0 if kind == "cancel" else 9)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_frame_resets_count_of_consecutive_stale_frames(pair: ConnectionPair, kind: str) -> None:
    for _ in range(3):
        for _ in range(9):
            pair.refused(pair.request(1, timestamp=0))
        pair.send(frame_of_kind(pair, kind))
        pair.answers()
    pair.refused(pair.request(1, timestamp=0))


def test_refused_fresh_request_resets_count_of_consecutive_stale_frames(pair: ConnectionPair) -> None:
    for _ in range(9):
        pair.refused(pair.request(1, timestamp=0))
    pair.refused(pair.request(1, token=b"?" * 32))
    for _ in range(9):
        pair.refused(pair.request(1, timestamp=0))


# --- the order of the checks ------------------------------------------------------------------------

_HEADER = struct.Struct("!IBBHIQ8sQ32s")
_IN_FLIGHT = 7
# By fault, in the order of the checks: changed fields of a valid frame, code of the answer if this fault is the
# first, and the reason of the close (None: the connection stays open).
FAULTS: dict[str, tuple[dict[str, Any], Code, str | None]] = {
    "length": ({"length": 63}, Code.PROTOCOL_ERROR, "frame length below 64"),
    "version": ({"version": 2}, Code.PROTOCOL_ERROR, "unsupported frame version"),
    "kind": ({"kind": 0x10}, Code.PROTOCOL_ERROR, "frame kind not allowed here"),
    "flags": ({"flags": 1}, Code.PROTOCOL_ERROR, "frame flags set"),
    "stream": ({"stream": 0}, Code.PROTOCOL_ERROR, "stream does not fit the frame kind"),
    "salt": ({"salt": bytes(8)}, Code.REPLAYED, "nonce belongs to another connection"),
    "counter": ({"counter": 1}, Code.REPLAYED, "nonce counter did not grow"),
    "timestamp": ({"timestamp": 0}, Code.STALE_TIMESTAMP, None),
    "in flight": ({"stream": _IN_FLIGHT}, Code.PROTOCOL_ERROR, "stream is in flight"),
    "token": ({"token": b"?" * 32}, Code.UNAUTHENTICATED, None),
    "body": ({"body": b"\xc1"}, Code.INVALID_ARGUMENT, None),
}


def faulty(token: bytes, *names: str) -> bytes:
    fields: dict[str, Any] = {
        "version": 1,
        "kind": 2,
        "flags": 0,
        "stream": 1,
        "timestamp": WALL,
        "salt": SALT,
        "counter": 2,
        "token": token,
        "body": encode_request("echo", None),
    }
    for name in reversed(names):  # the first fault's field wins
        fields |= FAULTS[name][0]
    body = fields.pop("body")
    length = fields.pop("length", 64 + len(body))
    return _HEADER.pack(length, *fields.values()) + body


@pytest.mark.parametrize("names", [(name,) for name in FAULTS] + list(itertools.combinations(FAULTS, 2)))
def test_first_checked_of_two_faults_decides_the_answer(pair: ConnectionPair, names: tuple[str, ...]) -> None:
    pair.hold(pair.request(_IN_FLIGHT))
    events = pair.send(faulty(pair.token, *names))
    _, code, reason = FAULTS[names[0]]
    if reason is None:
        assert events == []
    else:
        assert events == [ConnectionEnded(code, reason)]
    answer = pair.answer()
    assert answer.code == code
    assert (answer.stream == 0) == (reason is not None)


def test_faults_are_reported_in_order_of_checks() -> None:
    names = list(FAULTS)
    for first in range(len(names)):
        pair = ConnectionPair()
        pair.login()
        pair.hold(pair.request(_IN_FLIGHT))
        pair.send(faulty(pair.token, *names[first:]))
        assert pair.answer().code == FAULTS[names[first]][1]


def test_deadline_is_checked_last(pair: ConnectionPair) -> None:
    gone = {"deadline_ms": 0}
    assert pair.refused(pair.request(1, meta=gone)).code == Code.DEADLINE_EXCEEDED
    assert pair.refused(pair.request(1, "NO", meta=gone)).code == Code.INVALID_ARGUMENT
    assert pair.refused(pair.request(1, meta=gone, token=b"?" * 32)).code == Code.UNAUTHENTICATED
