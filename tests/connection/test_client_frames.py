"""What else is said: CANCEL, PING, GOAWAY, EVENT, and ERROR for the whole connection."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import TOKEN, Conversation, ended
from tests.helpers import WALL
from zcproto.connection.events import ConnectionEnded, EventReceived, GoAwayReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code, ConnectionClosed, Unavailable
from zcproto.wire.frame import CANCEL, ERROR, EVENT, GOAWAY, NO_TOKEN, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body, encode_error


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
