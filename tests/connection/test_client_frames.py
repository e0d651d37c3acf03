"""Test requests, answers, sessions and the other frames of a client connection."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness, ended
from tests.helpers import SALT, WALL
from zcproto.connection.client import MAX_FRAME_BEFORE_SESSION, UNREQUESTED_BURST, UNREQUESTED_PER_S
from zcproto.connection.events import (
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
)
from zcproto.connection.state import State
from zcproto.errors import Code, ConnectionClosed, InvalidArgument, ResourceExhausted, Unavailable
from zcproto.wire.frame import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    MAX_STREAM,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
)
from zcproto.wire.message import decode_request, encode_body, encode_error


def test_cancel_has_token_of_its_request_and_awaits_the_answer(harness: ClientHarness) -> None:
    stream = harness.request(token=TOKEN)
    harness.client.cancel(stream, WALL)
    assert [frame[1:3] + frame[6:] for frame in harness.sent()][1] == (CANCEL, stream, TOKEN, b"")
    assert len(harness.client.in_flight) == 1
    harness.receive_frame(ERROR, stream, encode_error(Code.CANCELLED, "cancelled"))
    assert len(harness.client.in_flight) == 0
    harness.client.cancel(stream, WALL)
    assert harness.sent() == []


def test_cancel_of_session_open_has_no_token(harness: ClientHarness) -> None:
    stream = harness.request("session.open", {})
    harness.client.cancel(stream, WALL)
    assert harness.sent()[1][6] == NO_TOKEN


def test_closed_connection_sends_nothing_and_refuses_requests(harness: ClientHarness) -> None:
    stream = harness.request()
    harness.sent()
    harness.client.end()
    harness.client.cancel(stream, WALL)
    harness.client.ping(WALL)
    assert harness.sent() == []
    with pytest.raises(ConnectionClosed):
        harness.request()
    assert harness.receive_data(harness.frame(RESPONSE, stream, b"\xc0")) == []
    harness.client.end()


def test_ping_is_answered_by_pong_with_its_token(harness: ClientHarness) -> None:
    assert harness.receive_frame(PING, token=TOKEN) == []
    (frame,) = harness.sent()
    assert frame[1:3] == (PONG, 0)
    assert frame[6] == TOKEN


def test_pings_of_one_read_are_answered_by_one_pong(harness: ClientHarness) -> None:
    pings = [harness.frame(PING, token=bytes([number]) * 32) for number in range(1, 101)]
    harness.receive_data(b"".join(pings))
    (pong,) = harness.sent()
    assert (pong[1], pong[6]) == (PONG, bytes([100]) * 32)


def test_ping_flood_of_a_server_that_reads_nothing_queues_one_pong(harness: ClientHarness) -> None:
    harness.client.is_output_blocked = True
    for _ in range(1_000):
        harness.receive_frame(PING)
    assert harness.client.queued_bytes == 0
    harness.client.unblock_output(harness.wall)
    assert [frame[1] for frame in harness.sent()] == [PONG]
    harness.client.unblock_output(harness.wall)
    assert harness.sent() == []
    harness.receive_frame(PING)
    assert [frame[1] for frame in harness.sent()] == [PONG]


def test_pong_owed_at_the_end_is_not_sent(harness: ClientHarness) -> None:
    harness.client.is_output_blocked = True
    harness.receive_frame(PING)
    harness.client.end()
    harness.client.unblock_output(harness.wall)
    assert harness.sent() == []


@pytest.mark.parametrize("kind", ["ping", "event", "large event", "answer to no request"])
def test_flood_of_unrequested_frames_delays_reading(harness: ClientHarness, kind: str) -> None:
    body = encode_body(["a", bytes(100_000 if kind == "large event" else 0)])
    head, stream = (PING, 0) if kind == "ping" else (EVENT, 0)
    if kind == "answer to no request":
        head, stream = RESPONSE, 9
    cost = 1 + (0 if kind == "ping" else len(body)) / 2_048
    for _ in range(int(UNREQUESTED_BURST / cost)):
        harness.receive_frame(head, stream, b"" if kind == "ping" else body)
    assert harness.client.reading_delay(harness.now) == pytest.approx(0, abs=1e-6)
    for _ in range(100):
        harness.receive_frame(head, stream, b"" if kind == "ping" else body)
    delay = harness.client.reading_delay(harness.now)
    assert delay == pytest.approx(100 * cost / UNREQUESTED_PER_S, rel=0.05)
    harness.receive_frame(head, stream, b"" if kind == "ping" else body)
    assert harness.client.reading_delay(harness.now) - delay == pytest.approx(cost / UNREQUESTED_PER_S)
    delay = harness.client.reading_delay(harness.now)
    harness.now += delay
    assert harness.client.reading_delay(harness.now) == pytest.approx(0.0, abs=1e-9)
    harness.now += UNREQUESTED_BURST / UNREQUESTED_PER_S
    harness.receive_frame(head, stream, b"" if kind == "ping" else body)
    assert harness.client.reading_delay(harness.now) == 0.0


def test_answers_to_requests_never_delay_reading(harness: ClientHarness) -> None:
    for _ in range(2 * UNREQUESTED_BURST):
        harness.receive_frame(RESPONSE, harness.request(), b"\xc0")
        harness.receive_frame(ERROR, harness.request(), encode_error(3, "x"))
        harness.sent()
    assert harness.client.reading_delay(harness.now) == 0.0


@pytest.mark.parametrize("head", [PING, PONG])
def test_ping_or_pong_with_body_closes_connection(harness: ClientHarness, head: int) -> None:
    assert ended(harness.receive_frame(head, 0, b"\xc0")).code is Code.PROTOCOL_ERROR


def test_after_goaway_new_requests_are_refused_and_answers_arrive(harness: ClientHarness) -> None:
    stream = harness.request()
    body = encode_body({"reason": "draining", "retry_after_ms": 1_000, "elsewhere": []})
    assert harness.receive_frame(GOAWAY, 0, body) == [GoAwayReceived("draining", 1_000)]
    assert harness.client.state is State.DRAINING
    with pytest.raises(Unavailable, match="accepts no new requests"):
        harness.request()
    harness.client.cancel(stream, WALL)
    harness.client.ping(WALL)
    assert [frame[1] for frame in harness.sent()] == [REQUEST, CANCEL, PING]
    assert harness.receive_frame(GOAWAY, 0, body) == [GoAwayReceived("draining", 1_000)]
    assert harness.receive_frame(RESPONSE, stream, b"\x01") == [ResponseReceived(stream, 1)]


@pytest.mark.parametrize(
    "content",
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
def test_malformed_goaway_closes_connection(harness: ClientHarness, content: Any) -> None:
    assert ended(harness.receive_frame(GOAWAY, 0, encode_body(content))).code is Code.PROTOCOL_ERROR


def test_unknown_event_is_delivered(harness: ClientHarness) -> None:
    body = encode_body(["weather.changed", [1, 2]])
    events = harness.receive_frame(EVENT, 0, body, token=TOKEN)
    assert events == [EventReceived("weather.changed", [1, 2], TOKEN, body)]


@pytest.mark.parametrize("content", [["a"], ["a", 1, 2], [1, 2], {}, "a"])
def test_malformed_event_closes_connection(harness: ClientHarness, content: Any) -> None:
    assert ended(harness.receive_frame(EVENT, 0, encode_body(content))).code is Code.PROTOCOL_ERROR


@pytest.mark.parametrize("code", [Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE, Code.REPLAYED])
def test_error_on_stream_0_closes_connection_with_its_reason(harness: ClientHarness, code: Code) -> None:
    harness.request()
    event = ended(harness.receive_frame(ERROR, 0, encode_error(code, "because")))
    assert event == ConnectionEnded(code, "because")
    assert harness.client.state is State.CLOSED


def test_unknown_code_on_stream_0_closes_connection_as_unknown(harness: ClientHarness) -> None:
    assert ended(harness.receive_frame(ERROR, 0, encode_error(200, "?"))).code is Code.UNKNOWN


def test_malformed_error_on_stream_0_closes_connection(harness: ClientHarness) -> None:
    assert ended(harness.receive_frame(ERROR, 0, b"\xc1")).code is Code.PROTOCOL_ERROR


def test_frame_after_fatal_error_in_same_read_is_ignored(harness: ClientHarness) -> None:
    stream = harness.request()
    data = harness.frame(ERROR, 0, encode_error(Code.REPLAYED, "x")) + harness.frame(
        RESPONSE, stream, b"\x01"
    )
    assert harness.receive_data(data) == [ConnectionEnded(Code.REPLAYED, "x")]


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


def body_of(size: int) -> dict[str, Any]:
    """Return params whose request frame has this length."""
    overhead = 64 + len(encode_body(["echo", {"x": bytes(70_000)}])) - 70_000
    return {"x": bytes(size - overhead)}


def test_send_limit_is_16_kib_without_session_and_max_frame_with_one(harness: ClientHarness) -> None:
    assert not harness.client.has_session
    params = {"x": bytes(MAX_FRAME_BEFORE_SESSION - 64 - 12)}
    harness.request("echo", params, token=TOKEN)
    with pytest.raises(InvalidArgument) as caught:
        harness.request("echo", {"x": bytes(MAX_FRAME_BEFORE_SESSION)}, token=TOKEN)
    assert caught.value.details["limit"] == MAX_FRAME_BEFORE_SESSION
    assert caught.value.details["size"] > MAX_FRAME_BEFORE_SESSION
    assert len(harness.client.in_flight) == 1

    harness.receive_frame(RESPONSE, 1, b"\xc0")
    assert harness.client.has_session
    harness.request("echo", body_of(WELCOME_MAP["max_frame"]), token=TOKEN)
    assert harness.sent()[-1][0] == WELCOME_MAP["max_frame"]
    with pytest.raises(InvalidArgument) as caught:
        harness.request("echo", body_of(WELCOME_MAP["max_frame"] + 1), token=TOKEN)
    assert caught.value.details["limit"] == WELCOME_MAP["max_frame"]


def test_send_limit_follows_smaller_server_max_frame() -> None:
    harness = ClientHarness(WELCOME_MAP | {"max_frame": 200})
    harness.request("echo", {"x": bytes(100)})
    with pytest.raises(InvalidArgument):
        harness.request("echo", {"x": bytes(200)})


@pytest.mark.parametrize("method", ["session.open", "session.refresh"])
def test_session_open_sends_no_token_and_its_result_has_one(harness: ClientHarness, method: str) -> None:
    stream = harness.request(method, {}, token=TOKEN)
    assert harness.sent()[0][6] == NO_TOKEN
    harness.receive_frame(RESPONSE, stream, encode_body({"token": TOKEN}))
    assert harness.client.has_session
    harness.client.session_ended(TOKEN)
    assert not harness.client.has_session


@pytest.mark.parametrize(
    "result", [None, {}, {"token": "text"}, {"token": bytes(31)}, {"token": NO_TOKEN}, []]
)
def test_result_without_valid_token_opens_no_session(harness: ClientHarness, result: Any) -> None:
    stream = harness.request("session.open", {})
    harness.receive_frame(RESPONSE, stream, encode_body(result))
    assert not harness.client.has_session


def test_accepted_token_counts_as_session_until_it_ends(harness: ClientHarness) -> None:
    for _ in range(3):
        harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
        assert harness.client.has_session
    harness.client.session_ended(TOKEN)
    assert not harness.client.has_session


def test_repr_of_event_hides_token() -> None:
    events: list[ClientEvent] = [ResponseReceived(1, {"token": TOKEN}), EventReceived("a", None, TOKEN, b"")]
    assert "kkkk" not in repr(events)


def test_answer_of_public_method_does_not_confirm_session(harness: ClientHarness) -> None:
    harness.receive_frame(RESPONSE, harness.request("server.info"), b"\xc0")
    assert not harness.client.has_session


@pytest.mark.parametrize(
    "code", [Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED]
)
def test_refused_token_ends_session(harness: ClientHarness, code: Code) -> None:
    harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
    harness.receive_frame(ERROR, harness.request(token=TOKEN), encode_error(Code.NOT_FOUND, "x"))
    assert harness.client.has_session
    harness.receive_frame(ERROR, harness.request(token=TOKEN), encode_error(code, "x"))
    assert not harness.client.has_session
    assert harness.client.send_limit == MAX_FRAME_BEFORE_SESSION


def test_session_revoked_event_ends_session(harness: ClientHarness) -> None:
    harness.receive_frame(RESPONSE, harness.request(token=TOKEN), b"\xc0")
    body = encode_body(["session.revoked", {"reason": "operator"}])
    assert harness.receive_frame(EVENT, 0, body, token=TOKEN) == [
        EventReceived("session.revoked", {"reason": "operator"}, TOKEN, body)
    ]
    assert not harness.client.has_session


# --- showing a token ----------------------------------------------------------------------------------


def test_token_is_shown_beyond_the_limit_of_requests_and_after_goaway(harness: ClientHarness) -> None:
    for _ in range(WELCOME_MAP["max_streams"]):
        harness.request("echo")
    with pytest.raises(ResourceExhausted):
        harness.request("echo")
    streams = [harness.client.show(TOKEN, harness.wall)]
    harness.receive_frame(GOAWAY, 0, encode_body({"reason": "draining", "retry_after_ms": 0}))
    with pytest.raises(Unavailable):
        harness.request("echo")
    streams.append(harness.client.show(TOKEN, harness.wall))
    *_, first, second = harness.sent()
    assert [frame[2] for frame in (first, second)] == streams
    assert {frame[6] for frame in (first, second)} == {TOKEN}
    assert {decode_request(frame[7])[0] for frame in (first, second)} == {"session.info"}
    assert set(streams) <= set(harness.client.in_flight)


def test_token_is_shown_on_a_stream_that_is_not_in_flight(harness: ClientHarness) -> None:
    harness.request("echo")
    harness.client._next_stream = 1  # as after 2^32 requests
    assert harness.client.show(TOKEN, harness.wall) == 2


def test_token_is_not_shown_after_the_end(harness: ClientHarness) -> None:
    harness.client.end()
    with pytest.raises(ConnectionClosed):
        harness.client.show(TOKEN, harness.wall)
