"""Test requests and answers of a client connection."""

from __future__ import annotations

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness
from tests.helpers import SALT, WALL
from zcproto.connection.events import ErrorReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code, InvalidArgument, ResourceExhausted
from zcproto.wire.frame import ERROR, MAX_STREAM, NO_TOKEN, REQUEST, RESPONSE
from zcproto.wire.message import decode_request, encode_body, encode_error


def test_request_frame_has_salt_counter_token_and_meta(harness: ClientHarness) -> None:
    harness.request("add", {"a": 1}, token=TOKEN, meta={"deadline_ms": 5})
    harness.request("time")
    first, second = harness.sent()
    assert first[1:7] == (REQUEST, 1, WALL, SALT, 1, TOKEN)
    assert decode_request(first[7])[:2] == ("add", {"a": 1})
    assert decode_request(first[7])[2].deadline_ms == 5
    assert second[1:7] == (REQUEST, 2, WALL, SALT, 2, NO_TOKEN)


def test_out_of_order_answers_are_matched_by_stream(harness: ClientHarness) -> None:
    one, two = harness.request(), harness.request()
    data = harness.frame(RESPONSE, two, b"\x02") + harness.frame(RESPONSE, one, b"\x01")
    assert harness.receive_data(data) == [ResponseReceived(two, 2), ResponseReceived(one, 1)]
    assert len(harness.client.in_flight) == 0


def test_answers_received_byte_by_byte_are_the_same(harness: ClientHarness) -> None:
    one, two = harness.request(), harness.request()
    data = harness.frame(RESPONSE, two, b"\x02") + harness.frame(ERROR, one, encode_error(5, "no"))
    events = [event for byte in data for event in harness.receive_data(bytes([byte]))]
    assert events == [ResponseReceived(two, 2), ErrorReceived(one, 5, "no", {})]


@pytest.mark.parametrize("head", [RESPONSE, ERROR])
def test_answer_for_unknown_stream_is_dropped_and_counted(harness: ClientHarness, head: int) -> None:
    body = encode_error(5, "no")
    assert harness.receive_frame(head, 9, body) == []
    stream = harness.request()
    harness.receive_frame(head, stream, body)
    assert harness.receive_frame(head, stream, body) == []
    assert harness.client.dropped_unknown == 2
    assert harness.client.state is State.OPEN


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\x81\x01\x01", b"\xd4\x01\x00"])
def test_malformed_response_fails_only_its_own_request(harness: ClientHarness, body: bytes) -> None:
    one, two = harness.request(), harness.request()
    (event,) = harness.receive_frame(RESPONSE, one, body)
    assert isinstance(event, ErrorReceived)
    assert (event.stream, event.code) == (one, Code.INTERNAL)
    assert harness.receive_frame(RESPONSE, two, b"\x01") == [ResponseReceived(two, 1)]


@pytest.mark.parametrize("body", [b"", encode_body([5]), encode_body(["5", "x"]), encode_body([5, "x", []])])
def test_malformed_error_fails_its_request_with_internal(harness: ClientHarness, body: bytes) -> None:
    stream = harness.request()
    (event,) = harness.receive_frame(ERROR, stream, body)
    assert isinstance(event, ErrorReceived)
    assert event.code == Code.INTERNAL
    assert harness.client.state is State.OPEN


def test_answer_nested_too_deeply_fails_its_request() -> None:
    harness = ClientHarness(WELCOME_MAP, max_depth=3)
    stream = harness.request()
    assert harness.receive_frame(RESPONSE, stream, encode_body([[[1]]])) == [
        ResponseReceived(stream, [[[1]]])
    ]
    stream = harness.request()
    (event,) = harness.receive_frame(RESPONSE, stream, encode_body([[[[1]]]]))
    assert isinstance(event, ErrorReceived)


def test_requests_in_flight_are_limited_to_max_streams(harness: ClientHarness) -> None:
    streams = [harness.request() for _ in range(4)]
    with pytest.raises(ResourceExhausted):
        harness.request()
    harness.receive_frame(RESPONSE, streams[2], b"\xc0")
    harness.request()


def test_request_with_unserializable_value_is_not_sent(harness: ClientHarness) -> None:
    with pytest.raises(InvalidArgument):
        harness.request("echo", {"x": object()})
    assert len(harness.client.in_flight) == 0
    assert harness.client.data_to_send() == b""


def test_stream_ids_wrap_around_and_skip_those_in_flight(harness: ClientHarness) -> None:
    first = harness.request()
    second = harness.request()
    harness.client._next_stream = MAX_STREAM - 1
    assert harness.request() == MAX_STREAM - 1
    assert harness.request() == MAX_STREAM
    harness.receive_frame(RESPONSE, MAX_STREAM, b"\xc0")
    assert harness.request() == 3
    harness.receive_frame(RESPONSE, second, b"\xc0")
    harness.client._next_stream = MAX_STREAM - 1
    assert harness.request() == MAX_STREAM
    harness.receive_frame(RESPONSE, MAX_STREAM - 1, b"\xc0")
    harness.client._next_stream = MAX_STREAM
    assert harness.request() == 2
    assert first == 1


def test_queued_bytes_counts_unsent_frames(harness: ClientHarness) -> None:
    assert harness.client.queued_bytes == 0
    harness.request("echo", {"x": bytes(1_000)})
    assert 1_000 < harness.client.queued_bytes < 1_200
    harness.client.data_to_send()
    assert harness.client.queued_bytes == 0
