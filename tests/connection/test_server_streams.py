"""Test requests in flight: each gets one answer, from its handler, a CANCEL or its deadline."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import NOW, ConnectionPair
from zcproto.connection.events import NEVER, Request, RequestEnded
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.wire.frame import CANCEL, NO_TOKEN, PING, PONG, REQUEST, Kind
from zcproto.wire.message import encode_body, encode_error


@pytest.fixture
def pair() -> ConnectionPair:
    pair = ConnectionPair(settings=ConnectionSettings(max_streams=4))
    pair.login()
    return pair


def fail(pair: ConnectionPair, request: Request) -> bool:
    return pair.server.fail(request, encode_error(Code.INTERNAL, "incident"), pair.clock.wall())


# --- answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [1, 2, 2**31, 2**32 - 1])
def test_response_has_stream_and_token_of_its_request(pair: ConnectionPair, stream: int) -> None:
    assert pair.respond(pair.get(pair.request(stream)), encode_body([1, "two"]))
    answer = pair.answer()
    assert (answer.kind, answer.stream, answer.token) == (Kind.RESPONSE, stream, pair.token)
    assert answer.value == [1, "two"]


def test_error_has_stream_and_token_of_its_request(pair: ConnectionPair) -> None:
    assert fail(pair, pair.get(pair.request(3)))
    answer = pair.answer()
    assert (answer.stream, answer.code, answer.token) == (3, Code.INTERNAL, pair.token)


@pytest.mark.parametrize("finish", ["respond", "fail"])
def test_held_request_is_answered_once(pair: ConnectionPair, finish: str) -> None:
    request = pair.hold(pair.request(1))
    assert request.held
    assert pair.server.in_flight == 1
    assert pair.server.is_held(request)
    answer = pair.respond if finish == "respond" else lambda request: fail(pair, request)
    assert answer(request)
    assert not pair.server.is_held(request)
    assert pair.server.in_flight == 0
    assert not pair.respond(request)
    assert not fail(pair, request)
    assert len(pair.answers()) == 1


def test_answers_are_sent_in_order_of_completion(pair: ConnectionPair) -> None:
    requests = [pair.hold(pair.request(stream)) for stream in (1, 2, 3)]
    for request in (requests[1], requests[2], requests[0]):
        pair.respond(request)
    assert [answer.stream for answer in pair.answers()] == [2, 3, 1]


def test_answered_stream_can_be_reused(pair: ConnectionPair) -> None:
    for _ in range(3):
        pair.respond(pair.get(pair.request(1)))
    for _ in range(3):
        pair.respond(pair.hold(pair.request(1)))
    assert len(pair.answers()) == 6


def test_reusing_stream_in_flight_closes_connection(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1))
    assert pair.fatal(pair.request(1)).code == Code.PROTOCOL_ERROR
    assert not pair.respond(request)
    assert pair.answers() == []


def test_closed_connection_sends_no_answer(pair: ConnectionPair) -> None:
    held, at_once = pair.hold(pair.request(1)), pair.get(pair.request(2))
    pair.server.end()
    assert not pair.respond(held)
    assert not fail(pair, held)
    assert not pair.respond(at_once)
    assert not fail(pair, at_once)
    assert pair.answers() == []
    assert pair.server.in_flight == 0


# --- CANCEL ---------------------------------------------------------------------------------------------


def test_cancelled_request_is_answered_and_its_handler_ends(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1))
    assert pair.send(pair.cancel(1)) == [RequestEnded(request, Code.CANCELLED)]
    answer = pair.answer()
    assert (answer.stream, answer.code, answer.token) == (1, Code.CANCELLED, pair.token)
    assert not pair.server.is_held(request)
    assert not pair.respond(request)
    assert pair.answers() == []


@pytest.mark.parametrize("token", [NO_TOKEN, b"?" * 32, "another session's"])
def test_cancel_with_wrong_token_is_ignored(pair: ConnectionPair, token: Any) -> None:
    if isinstance(token, str):
        token = pair.open_session("ben").token
    request = pair.hold(pair.request(1))
    assert pair.send(pair.cancel(1, token=token)) == []
    assert pair.answers() == []
    assert pair.respond(request)


@pytest.mark.parametrize("stream", [2, 2**32 - 1])
def test_cancel_of_stream_not_in_flight_is_ignored(pair: ConnectionPair, stream: int) -> None:
    pair.hold(pair.request(1))
    pair.respond(pair.get(pair.request(2)))
    pair.answers()
    assert pair.send(pair.cancel(stream)) == []
    assert pair.answers() == []


def test_second_cancel_is_ignored(pair: ConnectionPair) -> None:
    pair.hold(pair.request(1))
    pair.send(pair.cancel(1))
    assert pair.send(pair.cancel(1)) == []
    assert len(pair.answers()) == 1


def test_cancel_of_public_request_has_no_token(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1, "session.open", token=NO_TOKEN))
    assert pair.send(pair.cancel(1, token=NO_TOKEN)) == [RequestEnded(request, Code.CANCELLED)]
    assert pair.answer().token == NO_TOKEN


def test_cancel_is_accepted_after_session_ended(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1))
    assert request.session is not None
    pair.registry.close(request.session)
    assert pair.send(pair.cancel(1)) == [RequestEnded(request, Code.CANCELLED)]


@pytest.mark.parametrize("kind", ["cancel in flight", "cancel", "ping", "pong"])
def test_unexpected_body_closes_connection(pair: ConnectionPair, kind: str) -> None:
    pair.hold(pair.request(1))
    head, stream = {
        "cancel in flight": (CANCEL, 1),
        "cancel": (CANCEL, 2),
        "ping": (PING, 0),
        "pong": (PONG, 0),
    }[kind]
    assert pair.fatal(pair.frame(head, stream, b"\xc0")).code == Code.PROTOCOL_ERROR


# --- max_streams ----------------------------------------------------------------------------------------


def test_request_above_max_streams_is_refused_until_one_is_answered(pair: ConnectionPair) -> None:
    requests = [pair.hold(pair.request(stream)) for stream in (1, 2, 3, 4)]
    answer = pair.refused(pair.request(5))
    assert (answer.stream, answer.code) == (5, Code.RESOURCE_EXHAUSTED)
    assert answer.error.details == {"retry_after_ms": 100}
    pair.respond(requests[2])
    pair.hold(pair.request(5))
    assert pair.send(pair.request(6)) == []


def test_immediately_answered_requests_do_not_count_against_max_streams(pair: ConnectionPair) -> None:
    for stream in range(1, 20):
        pair.respond(pair.get(pair.request(stream)))
    assert len(pair.answers()) == 19


def test_handler_running_after_cancel_counts_against_max_streams(pair: ConnectionPair) -> None:
    """Otherwise a caller could run any number of handlers by cancelling each request."""
    requests = [pair.hold(pair.request(stream)) for stream in (1, 2, 3, 4)]
    for stream in (1, 2, 3, 4):
        pair.send(pair.cancel(stream))
    pair.answers()
    assert pair.server.in_flight == 0
    assert pair.refused(pair.request(1)).code == Code.RESOURCE_EXHAUSTED
    assert not pair.respond(requests[0])
    again = pair.hold(pair.request(1))
    assert pair.refused(pair.request(2)).code == Code.RESOURCE_EXHAUSTED
    assert pair.respond(again)


def test_handler_answering_twice_frees_one_stream(pair: ConnectionPair) -> None:
    requests = [pair.hold(pair.request(stream)) for stream in (1, 2, 3, 4)]
    pair.send(pair.cancel(1))
    for _ in range(3):
        assert not pair.respond(requests[0])
    assert pair.respond(requests[1])
    for _ in range(3):
        assert not fail(pair, requests[1])
    pair.answers()
    assert pair.server.in_flight == 2
    pair.hold(pair.request(5))
    pair.hold(pair.request(6))
    assert pair.refused(pair.request(7)).code == Code.RESOURCE_EXHAUSTED


def test_cancelled_handler_cannot_answer_new_request_on_its_stream(pair: ConnectionPair) -> None:
    old = pair.hold(pair.request(1))
    pair.send(pair.cancel(1))
    new = pair.hold(pair.request(1))
    pair.answers()
    assert not pair.respond(old)
    assert pair.answers() == []
    assert pair.server.is_held(new)
    assert pair.respond(new)


def test_max_streams_is_checked_before_body_and_after_token(pair: ConnectionPair) -> None:
    for stream in (1, 2, 3, 4):
        pair.hold(pair.request(stream))
    assert pair.refused(pair.request(5, "NOT A METHOD")).code == Code.RESOURCE_EXHAUSTED
    assert pair.refused(pair.request(5, token=b"?" * 32)).code == Code.UNAUTHENTICATED


# --- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\xc1",
        b"\x91\xa4echo",
        b"\x92\x01\x80",
        b"\x92\xa0\x80",
        b"\x92\xa4ECHO\x80",
        b"\x92\xa4echo\x91\x01",
        b"\x93\xa4echo\x80\xc0",
        b"\x92\xa4echo\x80\x00",
        b"\x92\xa4echo\x81\x01\x01",
    ],
)
def test_malformed_body_fails_only_its_own_request(pair: ConnectionPair, body: bytes) -> None:
    answer = pair.refused(pair.frame(REQUEST, 6, body))
    assert (answer.stream, answer.code) == (6, Code.INVALID_ARGUMENT)
    pair.get(pair.request(6))


def test_nil_params_become_an_empty_map(pair: ConnectionPair) -> None:
    assert pair.get(pair.request(1, params=None)).params == {}


def test_max_depth_is_configurable() -> None:
    pair = ConnectionPair(settings=ConnectionSettings(max_depth=3))
    pair.get(pair.request(1, params={"a": [1]}))
    assert pair.refused(pair.request(1, params={"a": [[1]]})).code == Code.INVALID_ARGUMENT


# --- deadlines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline_ms", [0, -1, -(2**63)])
def test_request_past_its_deadline_is_refused(pair: ConnectionPair, deadline_ms: int) -> None:
    answer = pair.refused(pair.request(1, meta={"deadline_ms": deadline_ms}))
    assert (answer.stream, answer.code) == (1, Code.DEADLINE_EXCEEDED)


def test_request_past_its_deadline_is_refused_after_other_requests(pair: ConnectionPair) -> None:
    pair.respond(pair.get(pair.request(1)))
    assert pair.answer().kind is Kind.RESPONSE
    answer = pair.refused(pair.request(3, meta={"deadline_ms": 0}))
    assert (answer.stream, answer.code) == (3, Code.DEADLINE_EXCEEDED)
    assert pair.get(pair.request(5, meta={"deadline_ms": 1})).meta.deadline_ms == 1


def test_malformed_body_is_refused_after_other_requests(pair: ConnectionPair) -> None:
    pair.respond(pair.get(pair.request(1)))
    assert pair.answer().kind is Kind.RESPONSE
    answer = pair.refused(pair.frame(REQUEST, 3, b"\x92\xa4echo"))
    assert (answer.stream, answer.code) == (3, Code.INVALID_ARGUMENT)


def test_refused_frames_and_pings_are_counted_for_the_edge(pair: ConnectionPair) -> None:
    pair.server.next_deadline()
    for stream in (3, 5):
        pair.refused(pair.frame(REQUEST, stream, b"\x92\xa4echo"))
    assert pair.server.wasted == 2
    assert pair.server.deadline_moved
    pair.server.next_deadline()
    assert pair.send(pair.ping()) == []
    assert pair.server.wasted == 3
    assert pair.server.deadline_moved


def test_held_request_fails_at_its_deadline(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1, meta={"deadline_ms": 1_500}))
    assert request.deadline == NOW + 1.5
    assert pair.server.deadline_moved
    assert pair.server.next_deadline() == NOW + 1.5
    assert not pair.server.deadline_moved
    pair.clock.advance(1.499)
    assert pair.timeout() == []
    pair.clock.advance(0.001)
    assert pair.timeout() == [RequestEnded(request, Code.DEADLINE_EXCEEDED)]
    assert pair.answer().code == Code.DEADLINE_EXCEEDED
    assert not pair.respond(request)
    assert pair.timeout() == []
    assert pair.answers() == []


def test_held_requests_fail_each_at_its_own_deadline(pair: ConnectionPair) -> None:
    requests = {ms: pair.hold(pair.request(ms, meta={"deadline_ms": ms})) for ms in (300, 100, 200)}
    pair.hold(pair.request(1))
    for ms in (100, 200, 300):
        assert pair.server.next_deadline() == pytest.approx(NOW + ms / 1000)
        pair.clock.advance(0.1)
        assert pair.timeout() == [RequestEnded(requests[ms], Code.DEADLINE_EXCEEDED)]
    assert pair.server.in_flight == 1


def test_request_without_deadline_never_expires(pair: ConnectionPair) -> None:
    request = pair.get(pair.request(1))
    pair.server.next_deadline()
    pair.server.hold(request, NOW)
    assert request.deadline == NEVER
    assert not pair.server.deadline_moved


def test_answered_request_does_not_fail_at_its_deadline(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1, meta={"deadline_ms": 1_000}))
    assert pair.respond(request)
    pair.clock.advance(2)
    assert pair.timeout() == []
    assert len(pair.answers()) == 1


def test_cancel_after_deadline_is_ignored(pair: ConnectionPair) -> None:
    pair.hold(pair.request(1, meta={"deadline_ms": 1_000}))
    pair.clock.advance(1)
    pair.timeout()
    assert pair.send(pair.cancel(1)) == []
    assert len(pair.answers()) == 1


def test_huge_deadline_is_accepted(pair: ConnectionPair) -> None:
    request = pair.hold(pair.request(1, meta={"deadline_ms": 2**63}))
    assert request.deadline > NOW + 2**50
    assert pair.timeout() == []
