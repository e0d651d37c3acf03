"""Salt, counter and timestamp of what a server sends, and the offset of its clock."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tests.connection.helpers import GREETING, TOKEN, Conversation, ended
from tests.helpers import WALL
from zcproto.connection.client import MAX_SERVER_TIME
from zcproto.connection.events import ConnectionEnded, ErrorReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import CANCEL, ERROR, EVENT, GOAWAY, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body, encode_error


def test_another_salt_ends_it(talk: Conversation) -> None:
    assert ended(talk.say(PONG, salt=bytes(8))).code is Code.REPLAYED


@pytest.mark.parametrize("counter", [0, 6, 7])
def test_a_counter_that_does_not_grow_ends_it(talk: Conversation, counter: int) -> None:
    assert talk.say(PONG, counter=7) == []
    assert ended(talk.say(PONG, counter=counter)).code is Code.REPLAYED


def test_a_counter_may_leave_numbers_out(talk: Conversation) -> None:
    assert talk.say(PONG, counter=7) == []
    assert talk.say(PONG, counter=2**64 - 1) == []
    assert talk.client.state is State.OPEN


@pytest.mark.parametrize("off", [-30_000, 30_000])
def test_a_timestamp_at_the_edge_of_the_tolerance_is_fresh(talk: Conversation, off: int) -> None:
    stream = talk.request()
    assert talk.say(RESPONSE, stream, b"\xc0", timestamp=WALL + off) == [ResponseReceived(stream, None)]


@pytest.mark.parametrize("timestamp", [WALL - 30_001, WALL + 30_001, 0, 2**64 - 1])
def test_a_stale_answer_is_dropped_and_counted(talk: Conversation, timestamp: int) -> None:
    stream = talk.request()
    assert talk.say(RESPONSE, stream, b"\xc0", timestamp=timestamp) == []
    assert talk.client.dropped_stale == 1
    assert talk.client.in_flight == 1
    assert talk.say(RESPONSE, stream, b"\xc0") == [ResponseReceived(stream, None)]


def test_the_tolerance_is_ours_to_choose() -> None:
    talk = Conversation(GREETING, tolerance_ms=5)
    assert talk.say(EVENT, 0, encode_body(["a", None]), timestamp=WALL + 6) == []
    assert talk.client.dropped_stale == 1


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
def test_every_kind_is_dropped_when_stale(talk: Conversation, head: int, body: bytes) -> None:
    assert talk.stale(head, 0, body) == []
    assert talk.client.dropped_stale == 1
    assert talk.client.state is State.OPEN
    assert talk.sent() == []


def test_a_stale_frame_uses_its_counter_up(talk: Conversation) -> None:
    talk.stale(counter=5)
    assert ended(talk.say(PONG, counter=5)).code is Code.REPLAYED


def test_the_tenth_stale_frame_in_a_row_ends_it(talk: Conversation) -> None:
    for _ in range(9):
        assert talk.stale() == []
    event = ended(talk.stale())
    assert event.code is Code.STALE_TIMESTAMP
    assert talk.client.dropped_stale == 10


def test_a_fresh_frame_ends_the_row_of_stale_ones(talk: Conversation) -> None:
    for _ in range(3):
        for _ in range(9):
            talk.stale()
        assert talk.say(PONG) == []
    assert talk.client.state is State.OPEN


def test_stale_timestamp_is_heard_though_it_is_stale_itself_and_sets_the_offset(talk: Conversation) -> None:
    stream = talk.request(token=TOKEN)
    hour = 3_600_000
    body = encode_error(Code.STALE_TIMESTAMP, "set the clock", {"server_time": WALL + hour})
    events = talk.say(ERROR, stream, body, timestamp=WALL + hour)
    assert events == [
        ErrorReceived(stream, Code.STALE_TIMESTAMP, "set the clock", {"server_time": WALL + hour})
    ]
    assert talk.client.clock_offset_ms == hour
    assert talk.client.dropped_stale == 0
    talk.sent()
    talk.request()
    assert talk.sent()[0][3] == WALL + hour
    assert talk.say(PONG, timestamp=WALL + hour) == []
    assert talk.client.dropped_stale == 0


@pytest.mark.parametrize("server_time", [None, "now", True, -1, MAX_SERVER_TIME + 1, 1.5])
def test_a_server_time_that_makes_no_sense_changes_no_offset(talk: Conversation, server_time: Any) -> None:
    stream = talk.request()
    details = {"server_time": server_time}
    (event,) = talk.say(ERROR, stream, encode_body([Code.STALE_TIMESTAMP, "x", details]))
    assert isinstance(event, ErrorReceived)
    assert talk.client.clock_offset_ms == 0


def test_stale_timestamp_on_stream_0_ends_it_and_corrects_no_more_than_it_may(talk: Conversation) -> None:
    event = ended(talk.stale(ERROR, 0, encode_error(Code.STALE_TIMESTAMP, "ten in a row")))
    assert event == ConnectionEnded(Code.STALE_TIMESTAMP, "ten in a row")


def test_a_fault_of_the_header_ends_it(talk: Conversation) -> None:
    assert ended(talk.hear(struct.pack("!I", 63))).code is Code.PROTOCOL_ERROR
    assert talk.hear(talk.frame(PONG)) == []  # nothing is read any more


def test_a_frame_above_our_limit_ends_it() -> None:
    talk = Conversation(GREETING, max_frame=20_000)
    assert ended(talk.say(RESPONSE, 1, bytes(20_001 - 64))).code is Code.FRAME_TOO_LARGE


@pytest.mark.parametrize("head", [REQUEST, CANCEL, 0x01100000, 0x02020000, 0x01030001])
def test_a_head_that_no_server_may_send_ends_it(talk: Conversation, head: int) -> None:
    assert ended(talk.say(head, 1)).code is Code.PROTOCOL_ERROR
