"""The client's end of a conversation, against frames made by hand and against the server's end."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from zcproto.connection.client import (
    MAX_FRAME_BEFORE_SESSION,
    MAX_SERVER_TIME,
    PONG_TIMEOUT,
    ClientConnection,
)
from zcproto.connection.events import (
    NEVER,
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import State
from zcproto.errors import Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable
from zcproto.wire.frame import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER,
    MAX_STREAM,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    WELCOME,
)
from zcproto.wire.message import decode_request, encode_body, encode_error

from ..helpers import NOW, SALT, WALL, small_registry
from .helpers import GREETING, Conversation

TOKEN = b"k" * 32


@pytest.fixture
def talk() -> Conversation:
    """A conversation in which WELCOME was said."""
    return Conversation(GREETING)


def ended(events: list[ClientEvent]) -> ConnectionEnded:
    event = events[-1]
    assert isinstance(event, ConnectionEnded)
    return event


# --- WELCOME ----------------------------------------------------------------------------------------


def test_welcome_opens_the_conversation_and_its_map_is_kept_whole() -> None:
    talk = Conversation()
    assert talk.client.state is State.AWAITING_WELCOME
    events = talk.say(WELCOME, 0, encode_body(GREETING | {"motd": "hello"}), counter=0)
    assert events == [Welcomed(GREETING | {"motd": "hello"})]
    assert talk.client.state is State.OPEN
    assert talk.client.welcome["motd"] == "hello"


def test_nothing_is_sent_before_welcome() -> None:
    talk = Conversation()
    with pytest.raises(Unavailable):
        talk.request()
    talk.client.ping(talk.wall)
    assert talk.client.data_to_send() == b""
    assert talk.client.next_deadline() == NEVER


@pytest.mark.parametrize("ahead", [-(10**9), -1, 0, 7, 10**9])
def test_the_offset_is_the_servers_clock_minus_ours_and_goes_into_timestamps(ahead: int) -> None:
    talk = Conversation(GREETING, server_ahead_ms=ahead)
    assert talk.client.clock_offset_ms == ahead
    talk.wall += 1_234
    talk.request()
    (frame,) = talk.sent()
    assert frame[3] == WALL + 1_234 + ahead


def test_connections_to_one_server_share_the_map_of_its_welcome() -> None:
    assert Conversation(GREETING).client.welcome is Conversation(GREETING).client.welcome


@pytest.mark.parametrize("head", [RESPONSE, ERROR, PING, GOAWAY, EVENT])
def test_another_first_frame_than_welcome_ends_it(head: int) -> None:
    talk = Conversation()
    event = ended(talk.say(head, 1 if head == RESPONSE else 0, b"", counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert talk.client.state is State.CLOSED


def test_welcome_must_have_counter_0() -> None:
    talk = Conversation()
    assert ended(talk.say(WELCOME, 0, encode_body(GREETING), counter=1)).code is Code.PROTOCOL_ERROR


def test_a_second_welcome_ends_it(talk: Conversation) -> None:
    event = ended(talk.say(WELCOME, 0, encode_body(GREETING)))
    assert event == ConnectionEnded(Code.PROTOCOL_ERROR, "WELCOME came twice")


@pytest.mark.parametrize("timestamp", [MAX_SERVER_TIME + 1, 2**64 - 1])
def test_a_server_beyond_all_years_is_refused_because_timestamps_would_overflow(timestamp: int) -> None:
    talk = Conversation()
    event = ended(talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=timestamp))
    assert event.code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("timestamp", [0, MAX_SERVER_TIME])
def test_a_strange_but_possible_clock_of_the_server_is_followed(timestamp: int) -> None:
    talk = Conversation()
    talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=timestamp)
    talk.request()
    assert talk.sent()[0][3] == timestamp


def test_a_timestamp_never_falls_below_0_though_our_clock_goes_back() -> None:
    talk = Conversation()
    talk.say(WELCOME, 0, encode_body(GREETING), counter=0, timestamp=5_000)
    talk.wall -= 6_000
    talk.request()
    assert talk.sent()[0][3] == 0


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GREETING.items() if name != key}


@pytest.mark.parametrize(
    "greeting",
    [
        *[pytest.param(without(key), id=f"no {key}") for key in GREETING],
        *[
            pytest.param(GREETING | {key: wrong}, id=f"{key}={wrong!r}")
            for key, wrong in [
                ("server", 5),
                ("server", b"zcproto"),
                ("versions", 1),
                ("versions", []),
                ("versions", [2]),
                ("versions", [True]),
                ("versions", [1.0]),
                ("max_frame", "1"),
                ("max_frame", True),
                ("max_frame", 1.5),
                ("max_frame", 63),
                ("max_streams", 0),
                ("max_streams", -1),
                ("max_streams", None),
                ("idle_timeout_ms", -1),
                ("tolerance_ms", -1),
                ("sts", []),
                ("sts", {}),
                ("sts", {"max_age": 1}),
                ("sts", {"include_subdomains": True}),
                ("sts", {"max_age": -1, "include_subdomains": True}),
                ("sts", {"max_age": "1", "include_subdomains": True}),
                ("sts", {"max_age": 1, "include_subdomains": 1}),
            ]
        ],
    ],
)
def test_a_welcome_that_is_not_as_the_contract_says_ends_it(greeting: dict[str, Any]) -> None:
    talk = Conversation()
    event = ended(talk.say(WELCOME, 0, encode_body(greeting), counter=0))
    assert event.code is Code.PROTOCOL_ERROR
    assert "WELCOME" in event.reason
    assert talk.client.welcome == {}


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x90", encode_body([GREETING])])
def test_a_welcome_that_cannot_be_read_ends_it(body: bytes) -> None:
    talk = Conversation()
    assert ended(talk.say(WELCOME, 0, body, counter=0)).code is Code.PROTOCOL_ERROR


def test_a_welcome_larger_than_16_kib_is_refused_from_its_header() -> None:
    talk = Conversation()
    header = HEADER.pack(MAX_FRAME_BEFORE_SESSION + 1, WELCOME, 0, WALL, SALT, 0, NO_TOKEN)
    assert ended(talk.hear(header)).code is Code.FRAME_TOO_LARGE


# --- freshness of what the server sends -------------------------------------------------------------


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


# --- requests and answers ---------------------------------------------------------------------------


def test_a_request_is_a_frame_with_salt_counter_token_and_meta(talk: Conversation) -> None:
    talk.request("add", {"a": 1}, token=TOKEN, meta={"deadline_ms": 5})
    talk.request("time")
    first, second = talk.sent()
    assert first[1:7] == (REQUEST, 1, WALL, SALT, 1, TOKEN)
    assert decode_request(first[7])[:2] == ("add", {"a": 1})
    assert decode_request(first[7])[2].deadline_ms == 5
    assert second[1:7] == (REQUEST, 2, WALL, SALT, 2, NO_TOKEN)


def test_answers_are_matched_by_stream_in_any_order(talk: Conversation) -> None:
    one, two = talk.request(), talk.request()
    data = talk.frame(RESPONSE, two, b"\x02") + talk.frame(RESPONSE, one, b"\x01")
    assert talk.hear(data) == [ResponseReceived(two, 2), ResponseReceived(one, 1)]
    assert talk.client.in_flight == 0


def test_answers_are_the_same_one_byte_at_a_time(talk: Conversation) -> None:
    one, two = talk.request(), talk.request()
    data = talk.frame(RESPONSE, two, b"\x02") + talk.frame(ERROR, one, encode_error(5, "no"))
    events = [event for byte in data for event in talk.hear(bytes([byte]))]
    assert events == [ResponseReceived(two, 2), ErrorReceived(one, 5, "no", {})]


@pytest.mark.parametrize("head", [RESPONSE, ERROR])
def test_an_answer_for_an_unknown_stream_is_dropped_and_counted(talk: Conversation, head: int) -> None:
    body = encode_error(5, "no")
    assert talk.say(head, 9, body) == []
    stream = talk.request()
    talk.say(head, stream, body)
    assert talk.say(head, stream, body) == []
    assert talk.client.dropped_unknown == 2
    assert talk.client.state is State.OPEN


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\x81\x01\x01", b"\xd4\x01\x00"])
def test_a_response_that_cannot_be_read_fails_its_own_call_with_internal(
    talk: Conversation, body: bytes
) -> None:
    one, two = talk.request(), talk.request()
    (event,) = talk.say(RESPONSE, one, body)
    assert isinstance(event, ErrorReceived)
    assert (event.stream, event.code) == (one, Code.INTERNAL)
    assert talk.say(RESPONSE, two, b"\x01") == [ResponseReceived(two, 1)]


@pytest.mark.parametrize("body", [b"", encode_body([5]), encode_body(["5", "x"]), encode_body([5, "x", []])])
def test_an_error_that_cannot_be_read_fails_its_own_call_with_internal(
    talk: Conversation, body: bytes
) -> None:
    stream = talk.request()
    (event,) = talk.say(ERROR, stream, body)
    assert isinstance(event, ErrorReceived)
    assert event.code == Code.INTERNAL
    assert talk.client.state is State.OPEN


def test_answers_nested_deeper_than_allowed_are_not_taken() -> None:
    talk = Conversation(GREETING, max_depth=3)
    stream = talk.request()
    assert talk.say(RESPONSE, stream, encode_body([[[1]]])) == [ResponseReceived(stream, [[[1]]])]
    stream = talk.request()
    (event,) = talk.say(RESPONSE, stream, encode_body([[[[1]]]]))
    assert isinstance(event, ErrorReceived)


def test_no_more_requests_than_the_server_takes_are_in_flight(talk: Conversation) -> None:
    streams = [talk.request() for _ in range(4)]
    with pytest.raises(ResourceExhausted):
        talk.request()
    talk.say(RESPONSE, streams[2], b"\xc0")
    talk.request()


def test_a_value_that_cannot_be_sent_is_refused_here(talk: Conversation) -> None:
    with pytest.raises(InvalidArgument):
        talk.request("echo", {"x": object()})
    assert talk.client.in_flight == 0
    assert talk.client.data_to_send() == b""


def test_stream_ids_begin_again_after_the_last_one_and_skip_those_in_flight(talk: Conversation) -> None:
    first = talk.request()
    second = talk.request()
    talk.client._next_stream = MAX_STREAM - 1
    assert talk.request() == MAX_STREAM - 1
    assert talk.request() == MAX_STREAM
    talk.say(RESPONSE, MAX_STREAM, b"\xc0")
    assert talk.request() == 3
    talk.say(RESPONSE, second, b"\xc0")
    talk.client._next_stream = MAX_STREAM - 1
    assert talk.request() == MAX_STREAM
    talk.say(RESPONSE, MAX_STREAM - 1, b"\xc0")
    talk.client._next_stream = MAX_STREAM
    assert talk.request() == 2
    assert first == 1


def test_queued_bytes_tells_what_waits_to_be_sent(talk: Conversation) -> None:
    assert talk.client.queued_bytes == 0
    talk.request("echo", {"x": bytes(1_000)})
    assert 1_000 < talk.client.queued_bytes < 1_200
    talk.client.data_to_send()
    assert talk.client.queued_bytes == 0


# --- sizes and sessions -----------------------------------------------------------------------------


def body_of(size: int) -> dict[str, Any]:
    """Params whose request has this length."""
    overhead = 64 + len(encode_body(["echo", {"x": bytes(70_000)}])) - 70_000
    return {"x": bytes(size - overhead)}


def test_16_kib_is_the_limit_without_a_session_and_max_frame_with_one(talk: Conversation) -> None:
    assert not talk.client.has_session
    params = {"x": bytes(MAX_FRAME_BEFORE_SESSION - 64 - 12)}
    talk.request("echo", params, token=TOKEN)
    with pytest.raises(InvalidArgument) as caught:
        talk.request("echo", {"x": bytes(MAX_FRAME_BEFORE_SESSION)}, token=TOKEN)
    assert caught.value.details["limit"] == MAX_FRAME_BEFORE_SESSION
    assert caught.value.details["size"] > MAX_FRAME_BEFORE_SESSION
    assert talk.client.in_flight == 1

    talk.say(RESPONSE, 1, b"\xc0")
    assert talk.client.has_session
    talk.request("echo", body_of(GREETING["max_frame"]), token=TOKEN)
    assert talk.sent()[-1][0] == GREETING["max_frame"]
    with pytest.raises(InvalidArgument) as caught:
        talk.request("echo", body_of(GREETING["max_frame"] + 1), token=TOKEN)
    assert caught.value.details["limit"] == GREETING["max_frame"]


def test_a_server_with_a_tiny_limit_is_heeded() -> None:
    talk = Conversation(GREETING | {"max_frame": 200})
    talk.request("echo", {"x": bytes(100)})
    with pytest.raises(InvalidArgument):
        talk.request("echo", {"x": bytes(200)})


@pytest.mark.parametrize("method", ["session.open", "session.refresh"])
def test_opening_a_session_carries_no_token_and_its_result_gives_one(talk: Conversation, method: str) -> None:
    stream = talk.request(method, {}, token=TOKEN)
    assert talk.sent()[0][6] == NO_TOKEN
    talk.say(RESPONSE, stream, encode_body({"token": TOKEN}))
    assert talk.client.has_session
    talk.client.session_ended(TOKEN)
    assert not talk.client.has_session


@pytest.mark.parametrize(
    "result", [None, {}, {"token": "text"}, {"token": bytes(31)}, {"token": NO_TOKEN}, []]
)
def test_a_result_without_a_token_gives_no_session(talk: Conversation, result: Any) -> None:
    stream = talk.request("session.open", {})
    talk.say(RESPONSE, stream, encode_body(result))
    assert not talk.client.has_session


def test_a_token_taken_once_is_known_from_then_on(talk: Conversation) -> None:
    for _ in range(3):
        talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
        assert talk.client.has_session
    talk.client.session_ended(TOKEN)
    assert not talk.client.has_session


def test_no_token_is_in_the_repr_of_an_event() -> None:
    events: list[ClientEvent] = [ResponseReceived(1, {"token": TOKEN}), EventReceived("a", None, TOKEN)]
    assert "kkkk" not in repr(events)


def test_the_answer_of_a_public_method_shows_no_session(talk: Conversation) -> None:
    talk.say(RESPONSE, talk.request("server.info"), b"\xc0")
    assert not talk.client.has_session


@pytest.mark.parametrize(
    "code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED]
)
def test_a_refused_token_is_no_session_any_more(talk: Conversation, code: Code) -> None:
    talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
    talk.say(ERROR, talk.request(token=TOKEN), encode_error(Code.NOT_FOUND, "x"))
    assert talk.client.has_session
    talk.say(ERROR, talk.request(token=TOKEN), encode_error(code, "x"))
    assert not talk.client.has_session
    assert talk.client.send_limit == MAX_FRAME_BEFORE_SESSION


def test_a_revoked_session_is_none_any_more(talk: Conversation) -> None:
    talk.say(RESPONSE, talk.request(token=TOKEN), b"\xc0")
    body = encode_body(["session.revoked", {"reason": "operator"}])
    assert talk.say(EVENT, 0, body, token=TOKEN) == [
        EventReceived("session.revoked", {"reason": "operator"}, TOKEN)
    ]
    assert not talk.client.has_session


# --- CANCEL, PING, GOAWAY, EVENT, ERROR on stream 0 -------------------------------------------------


def test_cancel_carries_the_token_of_its_request_and_the_answer_is_still_awaited(talk: Conversation) -> None:
    stream = talk.request(token=TOKEN)
    talk.client.cancel(stream, WALL)
    assert [frame[1:3] + frame[6:] for frame in talk.sent()][1] == (CANCEL, stream, TOKEN, b"")
    assert talk.client.in_flight == 1
    talk.say(ERROR, stream, encode_error(Code.CANCELLED, "cancelled"))
    assert talk.client.in_flight == 0
    talk.client.cancel(stream, WALL)
    assert talk.sent() == []


def test_cancelling_the_opening_of_a_session_carries_zeros(talk: Conversation) -> None:
    stream = talk.request("session.open", {})
    talk.client.cancel(stream, WALL)
    assert talk.sent()[1][6] == NO_TOKEN


def test_nothing_is_cancelled_after_the_end(talk: Conversation) -> None:
    stream = talk.request()
    talk.sent()
    talk.client.end()
    talk.client.cancel(stream, WALL)
    talk.client.ping(WALL)
    assert talk.sent() == []
    with pytest.raises(ConnectionClosed):
        talk.request()
    assert talk.hear(talk.frame(RESPONSE, stream, b"\xc0")) == []
    talk.client.end()


def test_a_ping_is_answered_with_its_own_token(talk: Conversation) -> None:
    assert talk.say(PING, token=TOKEN) == []
    (frame,) = talk.sent()
    assert frame[1:3] == (PONG, 0)
    assert frame[6] == TOKEN


@pytest.mark.parametrize("head", [PING, PONG])
def test_a_ping_or_pong_with_a_body_ends_it(talk: Conversation, head: int) -> None:
    assert ended(talk.say(head, 0, b"\xc0")).code is Code.PROTOCOL_ERROR


def test_after_goaway_answers_still_come_and_nothing_new_is_sent(talk: Conversation) -> None:
    stream = talk.request()
    body = encode_body({"reason": "draining", "retry_after_ms": 1_000, "elsewhere": []})
    assert talk.say(GOAWAY, 0, body) == [GoAwayReceived("draining", 1_000)]
    assert talk.client.state is State.DRAINING
    with pytest.raises(Unavailable):
        talk.request()
    talk.client.cancel(stream, WALL)
    talk.client.ping(WALL)
    assert [frame[1] for frame in talk.sent()] == [REQUEST, CANCEL, PING]
    assert talk.say(GOAWAY, 0, body) == [GoAwayReceived("draining", 1_000)]
    assert talk.say(RESPONSE, stream, b"\x01") == [ResponseReceived(stream, 1)]


@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        {"reason": "x"},
        {"retry_after_ms": 1},
        {"reason": 1, "retry_after_ms": 1},
        {"reason": "x", "retry_after_ms": -1},
        {"reason": "x", "retry_after_ms": 1.0},
        {"reason": "x", "retry_after_ms": True},
    ],
)
def test_a_goaway_that_cannot_be_read_ends_it(talk: Conversation, said: Any) -> None:
    assert ended(talk.say(GOAWAY, 0, encode_body(said))).code is Code.PROTOCOL_ERROR


def test_an_event_is_handed_on_whatever_its_name(talk: Conversation) -> None:
    events = talk.say(EVENT, 0, encode_body(["weather.changed", [1, 2]]), token=TOKEN)
    assert events == [EventReceived("weather.changed", [1, 2], TOKEN)]


@pytest.mark.parametrize("said", [["a"], ["a", 1, 2], [1, 2], {}, "a"])
def test_an_event_that_cannot_be_read_ends_it(talk: Conversation, said: Any) -> None:
    assert ended(talk.say(EVENT, 0, encode_body(said))).code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("code", [Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE, Code.REPLAYED])
def test_an_error_on_stream_0_ends_it_with_the_servers_words(talk: Conversation, code: Code) -> None:
    talk.request()
    event = ended(talk.say(ERROR, 0, encode_error(code, "because")))
    assert event == ConnectionEnded(code, "because")
    assert talk.client.state is State.CLOSED


def test_an_unknown_code_on_stream_0_ends_it_as_unknown(talk: Conversation) -> None:
    assert ended(talk.say(ERROR, 0, encode_error(200, "?"))).code is Code.UNKNOWN


def test_an_error_on_stream_0_that_cannot_be_read_ends_it_all_the_same(talk: Conversation) -> None:
    assert ended(talk.say(ERROR, 0, b"\xc1")).code is Code.PROTOCOL_ERROR


def test_what_follows_the_end_in_the_same_read_is_not_looked_at(talk: Conversation) -> None:
    stream = talk.request()
    data = talk.frame(ERROR, 0, encode_error(Code.REPLAYED, "x")) + talk.frame(RESPONSE, stream, b"\x01")
    assert talk.hear(data) == [ConnectionEnded(Code.REPLAYED, "x")]


# --- keepalive --------------------------------------------------------------------------------------


def timeout(talk: Conversation) -> list[ClientEvent]:
    return talk.client.handle_timeout(talk.wall, talk.now)


def test_a_quiet_connection_pings_at_a_third_of_the_idle_timeout(talk: Conversation) -> None:
    assert talk.client.next_deadline() == NOW + 100
    talk.now = NOW + 99
    assert timeout(talk) == []
    assert talk.sent() == []
    talk.now = NOW + 100
    assert timeout(talk) == []
    assert [frame[1] for frame in talk.sent()] == [PING]
    assert talk.client.next_deadline() == talk.now + PONG_TIMEOUT


def test_a_pong_keeps_it_alive_until_the_next_look(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 1
    assert talk.say(PONG) == []
    assert talk.client.next_deadline() == NOW + 200


def test_ten_seconds_without_an_answer_to_a_ping_end_it(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += PONG_TIMEOUT
    event = ended(timeout(talk))
    assert event == ConnectionEnded(None, "the server does not answer")
    assert timeout(talk) == []
    assert talk.client.next_deadline() == NEVER


def test_any_fresh_frame_after_the_ping_shows_that_the_server_lives(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 5
    talk.say(EVENT, 0, encode_body(["a", None]))
    talk.now += 5
    assert timeout(talk) == []
    assert talk.client.next_deadline() == NOW + 200


def test_a_stale_pong_does_not_show_that_the_server_lives(talk: Conversation) -> None:
    talk.now = NOW + 100
    timeout(talk)
    talk.now += 5
    talk.stale()
    talk.now += 5
    assert ended(timeout(talk)).code is None


def test_a_busy_connection_does_not_ping(talk: Conversation) -> None:
    talk.now = NOW + 50
    talk.say(RESPONSE, talk.request(), b"\xc0")
    talk.sent()
    talk.now = NOW + 100
    assert timeout(talk) == []
    assert talk.sent() == []
    talk.now = NOW + 200
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [PING]


def test_one_that_only_hears_pings_all_the_same_for_the_server_counts_what_it_hears(
    talk: Conversation,
) -> None:
    talk.now = NOW + 90
    talk.say(EVENT, 0, encode_body(["a", None]))
    talk.now = NOW + 100
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [PING]


def test_one_that_only_sends_pings_too_for_the_server_may_be_dead(talk: Conversation) -> None:
    talk.now = NOW + 90
    talk.request()
    talk.now = NOW + 100
    timeout(talk)
    assert [frame[1] for frame in talk.sent()] == [REQUEST, PING]


def test_a_ping_that_waits_for_its_pong_is_not_forgotten_at_the_next_look() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 3_000})
    talk.now = NOW + 1
    timeout(talk)
    first = talk.client._pong_deadline
    talk.now = NOW + 2
    timeout(talk)
    assert talk.client._pong_deadline == first
    assert [frame[1] for frame in talk.sent()] == [PING, PING]


def test_a_tiny_idle_timeout_makes_no_flood() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 1})
    assert talk.client.next_deadline() == NOW + 0.25


def test_a_server_without_an_idle_timeout_needs_no_keepalive() -> None:
    talk = Conversation(GREETING | {"idle_timeout_ms": 0})
    assert talk.client.next_deadline() == NEVER


# --- both ends together -----------------------------------------------------------------------------


@pytest.fixture
def ends() -> tuple[ClientConnection, ServerConnection]:
    server = ServerConnection(ConnectionSettings(), small_registry(), salt=SALT, wall=WALL, now=NOW)
    client = ClientConnection()
    assert [type(event) for event in client.receive_data(server.data_to_send(), WALL, NOW)] == [Welcomed]
    return client, server


def test_the_two_ends_understand_each_other(ends: tuple[ClientConnection, ServerConnection]) -> None:
    client, server = ends
    stream = client.request("echo", {"x": 1}, wall=WALL)
    client.ping(WALL)
    events = server.receive_data(client.data_to_send(), WALL, NOW)
    request = next(events)
    server.respond(request, encode_body(request.params), WALL)
    assert list(events) == []
    server.go_away("draining", 5, WALL)
    assert list(client.receive_data(server.data_to_send(), WALL, NOW)) == [
        ResponseReceived(stream, {"x": 1}),
        GoAwayReceived("draining", 5),
    ]
