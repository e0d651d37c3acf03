"""Test that a client checks salt, counter and timestamp of frames, and its clock offset."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness, ended
from tests.helpers import WALL
from zcproto.connection.client import MAX_SERVER_TIME
from zcproto.connection.events import ConnectionEnded, ErrorReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import CANCEL, ERROR, EVENT, GOAWAY, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body, encode_error


def test_wrong_salt_closes_connection_as_replayed(harness: ClientHarness) -> None:
    assert ended(harness.receive_frame(PONG, salt=bytes(8))).code is Code.REPLAYED


@pytest.mark.parametrize("counter", [0, 6, 7])
def test_counter_that_does_not_increase_closes_connection_as_replayed(
    harness: ClientHarness, counter: int
) -> None:
    assert harness.receive_frame(PONG, counter=7) == []
    assert ended(harness.receive_frame(PONG, counter=counter)).code is Code.REPLAYED


def test_counter_may_skip_numbers(harness: ClientHarness) -> None:
    assert harness.receive_frame(PONG, counter=7) == []
    assert harness.receive_frame(PONG, counter=2**64 - 1) == []
    assert harness.client.state is State.OPEN


@pytest.mark.parametrize("off", [-30_000, 30_000])
def test_timestamp_at_edge_of_tolerance_is_fresh(harness: ClientHarness, off: int) -> None:
    stream = harness.request()
    assert harness.receive_frame(RESPONSE, stream, b"\xc0", timestamp=WALL + off) == [
        ResponseReceived(stream, None)
    ]


@pytest.mark.parametrize("timestamp", [WALL - 30_001, WALL + 30_001, 0, 2**64 - 1])
@pytest.mark.parametrize(
    ("head", "body"), [(RESPONSE, b"\xc0"), (RESPONSE, b"\xc1"), (ERROR, encode_error(5, "")), (ERROR, b"")]
)
def test_stale_answer_fails_its_call_with_data_loss(
    harness: ClientHarness, head: int, body: bytes, timestamp: int
) -> None:
    stream, other = harness.request(), harness.request()
    (event,) = harness.receive_frame(head, stream, body, timestamp=timestamp)
    assert isinstance(event, ErrorReceived)
    assert (event.stream, event.code, event.details) == (stream, Code.DATA_LOSS, {})
    assert (harness.client.dropped_stale, len(harness.client.in_flight)) == (0, 1)
    assert harness.receive_frame(RESPONSE, stream, b"\xc0") == []
    assert harness.receive_frame(RESPONSE, other, b"\xc0") == [ResponseReceived(other, None)]


def test_stale_answer_to_nothing_is_dropped_and_counted(harness: ClientHarness) -> None:
    harness.request()
    assert harness.receive_stale(RESPONSE, 9, b"\xc0") == []
    assert (harness.client.dropped_stale, len(harness.client.in_flight)) == (1, 1)


def test_stale_answer_shows_no_accepted_token(harness: ClientHarness) -> None:
    stream = harness.request(token=TOKEN)
    assert isinstance(harness.receive_stale(RESPONSE, stream, b"\xc0")[0], ErrorReceived)
    assert not harness.client.has_session


def test_stale_answers_count_as_consecutive(harness: ClientHarness) -> None:
    for _ in range(9):
        harness.receive_stale(RESPONSE, harness.request(), b"\xc0")
    assert ended(harness.receive_stale(RESPONSE, harness.request(), b"\xc0")).code is Code.STALE_TIMESTAMP


def test_client_tolerance_is_configurable() -> None:
    harness = ClientHarness(WELCOME_MAP, tolerance_ms=5)
    assert harness.receive_frame(EVENT, 0, encode_body(["a", None]), timestamp=WALL + 6) == []
    assert harness.client.dropped_stale == 1


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (GOAWAY, encode_body({"reason": "draining", "retry_after_ms": 0})),
        (EVENT, encode_body(["a", None])),
        (ERROR, encode_error(Code.NOT_FOUND, "gone")),
        (ERROR, encode_error(Code.REPLAYED, "fatal")),
        (ERROR, b"\xc1"),
        (PING, b""),
        (PONG, b""),
    ],
)
def test_stale_frame_of_any_kind_is_dropped(harness: ClientHarness, head: int, body: bytes) -> None:
    assert harness.receive_stale(head, 0, body) == []
    assert harness.client.dropped_stale == 1
    assert harness.client.state is State.OPEN
    assert harness.sent() == []


def test_counter_of_stale_frame_cannot_be_reused(harness: ClientHarness) -> None:
    harness.receive_stale(counter=5)
    assert ended(harness.receive_frame(PONG, counter=5)).code is Code.REPLAYED


def test_tenth_consecutive_stale_frame_closes_connection(harness: ClientHarness) -> None:
    for _ in range(9):
        assert harness.receive_stale() == []
    event = ended(harness.receive_stale())
    assert event.code is Code.STALE_TIMESTAMP
    assert harness.client.dropped_stale == 9


def test_fresh_frame_resets_count_of_consecutive_stale_frames(harness: ClientHarness) -> None:
    for _ in range(3):
        for _ in range(9):
            harness.receive_stale()
        assert harness.receive_frame(PONG) == []
    assert harness.client.state is State.OPEN


def test_stale_timestamp_error_is_delivered_and_corrects_clock_offset(harness: ClientHarness) -> None:
    stream = harness.request(token=TOKEN)
    hour = 3_600_000
    body = encode_error(Code.STALE_TIMESTAMP, "set the clock", {"server_time": WALL + hour})
    events = harness.receive_frame(ERROR, stream, body, timestamp=WALL + hour)
    assert events == [
        ErrorReceived(stream, Code.STALE_TIMESTAMP, "set the clock", {"server_time": WALL + hour})
    ]
    assert harness.client.clock_offset_ms == hour
    assert harness.client.dropped_stale == 0
    harness.sent()
    harness.request()
    assert harness.sent()[0][3] == WALL + hour
    assert harness.receive_frame(PONG, timestamp=WALL + hour) == []
    assert harness.client.dropped_stale == 0


@pytest.mark.parametrize("server_time", [None, "now", True, -1, MAX_SERVER_TIME + 1, 1.5])
def test_invalid_server_time_does_not_change_clock_offset(harness: ClientHarness, server_time: Any) -> None:
    stream = harness.request()
    details = {"server_time": server_time}
    (event,) = harness.receive_frame(ERROR, stream, encode_body([Code.STALE_TIMESTAMP, "x", details]))
    assert isinstance(event, ErrorReceived)
    assert harness.client.clock_offset_ms == 0


def test_stale_timestamp_error_on_stream_0_closes_connection(harness: ClientHarness) -> None:
    event = ended(harness.receive_stale(ERROR, 0, encode_error(Code.STALE_TIMESTAMP, "ten in a row")))
    assert event == ConnectionEnded(Code.STALE_TIMESTAMP, "ten in a row")


def test_invalid_header_closes_connection(harness: ClientHarness) -> None:
    assert ended(harness.receive_data(struct.pack("!I", 63))).code is Code.PROTOCOL_ERROR
    assert harness.receive_data(harness.frame(PONG)) == []


def test_frame_above_client_limit_closes_connection() -> None:
    harness = ClientHarness(WELCOME_MAP, max_frame=20_000)
    assert ended(harness.receive_frame(RESPONSE, 1, bytes(20_001 - 64))).code is Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("head", [REQUEST, CANCEL, 0x01100000, 0x02020000, 0x01030001])
def test_head_not_allowed_for_servers_closes_connection(harness: ClientHarness, head: int) -> None:
    assert ended(harness.receive_frame(head, 1)).code is Code.PROTOCOL_ERROR
