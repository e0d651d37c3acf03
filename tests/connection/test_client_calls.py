"""Requests and their answers."""

from __future__ import annotations

import pytest

from tests.connection.helpers import GREETING, TOKEN, Conversation
from tests.helpers import SALT, WALL
from zcproto.connection.events import ErrorReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code, InvalidArgument, ResourceExhausted
from zcproto.wire.frame import ERROR, MAX_STREAM, NO_TOKEN, REQUEST, RESPONSE
from zcproto.wire.message import decode_request, encode_body, encode_error


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
