"""Test CANCEL, PING, GOAWAY, EVENT and connection errors of a client connection."""

from __future__ import annotations

from typing import Any

import pytest

from tests.connection.helpers import TOKEN, ClientHarness, ended
from tests.helpers import WALL
from zcproto.connection.client import UNREQUESTED_BURST, UNREQUESTED_PER_S
from zcproto.connection.events import ConnectionEnded, EventReceived, GoAwayReceived, ResponseReceived
from zcproto.connection.state import State
from zcproto.errors import Code, ConnectionClosed, Unavailable
from zcproto.wire.frame import CANCEL, ERROR, EVENT, GOAWAY, NO_TOKEN, PING, PONG, REQUEST, RESPONSE
from zcproto.wire.message import encode_body, encode_error


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
