"""Test the places and timers of streams at the server: limits, waiting for credit, use of sessions, silence."""

from __future__ import annotations

from tests.connection.test_server_stream_states import LIMITS, stream_pair
from tests.helpers import NOW, WALL
from zcproto.connection.events import NEVER, ConnectionEnded, CreditReceived, Request, RequestEnded
from zcproto.connection.refusals import (
    CUT_REASONS,
    DEADLINE_EXCEEDED,
    DENIED,
    LEFT,
    ROTATED,
    SESSION_ENDED,
    SLOW,
    SLOW_FRAME,
    TOO_MUCH_HELD,
    WRONG_TOKEN,
    reason_in,
    stale_on_stream,
)
from zcproto.connection.server_streams import PONG_TIMEOUT_S, TOUCH_INTERVAL_S, StreamTotals
from zcproto.errors import Code
from zcproto.wire.frame import CANCEL, CREDIT, ITEM, OPEN, PONG, Kind, encode_frame
from zcproto.wire.message import NO_META, encode_body, encode_request

IDLE_S = 300.0


def test_streams_beyond_max_open_are_refused_until_a_method_has_ended() -> None:
    pair = stream_pair()
    streams = [pair.open(number) for number in range(1, LIMITS.max_open + 1)]
    one_more = encode_request("tokens", {})
    assert pair.send(pair.frame(OPEN, 9, one_more)) == []
    (refused,) = pair.answers()
    assert (refused.code, refused.error.details) == (Code.RESOURCE_EXHAUSTED, {"limit": LIMITS.max_open})
    pair.send(pair.frame(CANCEL, 1))
    assert pair.send(pair.frame(OPEN, 9, one_more)) == [], "its method still runs"
    pair.server.respond(streams[0], encode_body(None), WALL)
    pair.open(9)


def test_credit_wakes_only_a_stream_that_waits_and_may_send() -> None:
    pair = stream_pair()
    stream = pair.open(credit=(1, 1_000))
    assert pair.send(pair.frame(CREDIT, 1, encode_body([2, 1_000]))) == []
    for _ in range(2):
        pair.server.send_item(stream, encode_body("x"), WALL)
    streams = pair.server.streams(NOW)
    assert streams.wait_for_credit(stream, NOW)
    assert not streams.wait_for_credit(stream, NOW + 1), "the next deadline is not earlier"
    assert pair.send(pair.frame(CREDIT, 1, encode_body([2, 9_000]))) == []
    assert pair.send(pair.frame(CREDIT, 1, encode_body([3, 9_000]))) == [CreditReceived(stream)]
    assert stream.waits_until == NEVER


def test_item_has_the_stream_the_token_and_the_next_counter() -> None:
    pair = stream_pair()
    stream, body = pair.open(7), encode_body({"n": 1})
    counter = pair.server.outbox.counter
    pair.server.send_item(stream, body, WALL)
    frame = encode_frame(ITEM, 7, WALL, pair.server.salt, counter, pair.opened.token, body)
    assert pair.server.data_to_send() == frame
    assert stream.credit.sent_bytes == len(frame) - 4


def test_item_that_waits_too_long_cuts_its_stream_alone() -> None:
    pair = stream_pair()
    first, second, _third = pair.open(1), pair.open(2), pair.open(3)
    pair.server.hold(Request(4, pair.opened.token, pair.opened.session, "m", {}, NO_META), NOW)
    streams = pair.server.streams(NOW)
    streams.wait_for_credit(first, NOW)
    streams.wait_for_credit(second, NOW + 10)
    assert pair.server.handle_timeout(WALL, NOW + LIMITS.stall_timeout_s - 1) == []
    assert pair.server.handle_timeout(WALL, NOW + LIMITS.stall_timeout_s) == [
        RequestEnded(first, Code.CANCELLED, "slow")
    ]
    (answer,) = pair.answers()
    assert answer.error.details == {"reason": "slow"}
    assert streams.slow_at == second.waits_until
    assert pair.server.next_deadline() == second.waits_until


def test_streams_in_flight_count_as_use_of_their_sessions() -> None:
    pair = stream_pair()
    key = "device:laptop"
    bound = pair.registry.open("ben", client="", address="", wall=WALL, key=key)
    ended = pair.registry.open("eve", client="", address="", wall=WALL)
    pair.server.tokens.prove(key)
    for number, opened in enumerate((pair.opened, bound, ended), 1):
        pair.server.join(opened.session, opened.token, WALL, NOW)
        pair.open(number).session = opened.session
    pair.registry.close(ended.session)

    def last_used() -> set[int]:
        ids = pair.opened.session.id, bound.session.id
        return {pair.registry.info(each, later).last_used_at for each in ids}

    later = WALL + 60_000
    assert pair.server.next_deadline() == NOW + TOUCH_INTERVAL_S
    pair.server.handle_timeout(later, NOW + TOUCH_INTERVAL_S - 1)
    assert last_used() == {WALL}
    pair.server.handle_timeout(later, NOW + TOUCH_INTERVAL_S)
    assert last_used() == {later}
    assert pair.server.next_deadline() == NOW + 2 * TOUCH_INTERVAL_S


def test_silent_peer_with_a_stream_is_pinged_and_then_left() -> None:
    pair = stream_pair()
    pair.open()
    assert pair.server.handle_timeout(WALL, NOW + IDLE_S) == []
    assert [answer.kind for answer in pair.answers()] == [Kind.PING]
    assert pair.server.handle_timeout(WALL, NOW + IDLE_S + PONG_TIMEOUT_S - 1) == []
    assert pair.server.next_deadline() == NOW + IDLE_S + PONG_TIMEOUT_S
    ended = pair.server.handle_timeout(WALL, NOW + IDLE_S + PONG_TIMEOUT_S)
    assert ended == [ConnectionEnded(None, "peer_silent")]
    assert pair.answers() == []


def test_ping_behind_items_that_the_peer_still_receives_is_not_late() -> None:
    pair = stream_pair()
    stream = pair.open(credit=(100, 100_000))
    for _ in range(50):
        pair.server.send_item(stream, encode_body(bytes(100)), WALL)
    size, now = len(pair.server.data_to_send()), NOW + IDLE_S
    assert pair.server.handle_timeout(WALL, now, size) == []
    pair.server.data_to_send()
    for unsent in (size // 2, 0):
        now += PONG_TIMEOUT_S
        assert pair.server.handle_timeout(WALL, now, unsent) == []
        assert pair.server.next_deadline() == now + PONG_TIMEOUT_S
    ended = pair.server.handle_timeout(WALL, now + PONG_TIMEOUT_S, 0)
    assert ended == [ConnectionEnded(None, "peer_silent")]


def test_peer_that_answers_the_ping_keeps_its_stream() -> None:
    pair = stream_pair()
    pair.open()
    pair.server.handle_timeout(WALL, NOW + IDLE_S)
    pair.clock.now_s = NOW + IDLE_S + 1
    assert pair.send(pair.frame(PONG, 0)) == []
    pair.answers()
    assert pair.server.handle_timeout(WALL, pair.clock.now() + IDLE_S - 1) == []
    assert pair.answers() == []
    pair.server.handle_timeout(WALL, pair.clock.now() + IDLE_S)
    assert [answer.kind for answer in pair.answers()] == [Kind.PING]


def test_streams_of_an_ended_connection_may_neither_send_nor_take() -> None:
    pair = stream_pair()
    stream, other = pair.open(1, takes_items=True), pair.open(2)
    pair.server.hold(Request(4, pair.opened.token, pair.opened.session, "m", {}, NO_META), NOW)
    pair.server.grant(stream, WALL)
    pair.send(pair.frame(ITEM, 1, encode_body(1)))
    pair.server.end()
    assert not stream.credit.may_send
    assert not other.credit.may_send
    assert stream.items.held == 0
    assert not pair.server.grant(stream, WALL)


# --- figures ----------------------------------------------------------------------------------------------


def test_totals_count_streams_and_their_items() -> None:
    pair = stream_pair()
    assert pair.server.totals.streams == StreamTotals()
    assert pair.server.open_streams() == []
    stream, _other = pair.open(1, takes_items=True), pair.open(2)
    pair.server.grant(stream, WALL)
    pair.send(pair.frame(ITEM, 1, encode_body(1)))
    for _ in range(2):
        pair.server.send_item(stream, encode_body("x"), WALL)
    totals = StreamTotals(opened=2, items_sent=2, items_received=1, bytes_sent=132, bytes_received=65)
    assert pair.server.totals.streams == totals
    pair.server.respond(stream, encode_body(None), WALL)
    assert pair.server.totals.streams == totals
    assert len(pair.server.open_streams()) == 1


def test_cut_names_its_reason_and_that_of_a_request_does_not() -> None:
    pair = stream_pair()
    stream = pair.open()
    stream.deadline = NOW + 1
    request = Request(4, pair.opened.token, pair.opened.session, "m", {}, NO_META, NOW + 1)
    pair.server.hold(request, NOW)
    assert pair.server.handle_timeout(WALL, NOW + 1) == [
        RequestEnded(stream, Code.DEADLINE_EXCEEDED, "deadline"),
        RequestEnded(request, Code.DEADLINE_EXCEEDED),
    ]
    stream = pair.open(2)
    pair.send(pair.frame(OPEN, 3, encode_request("m", {"text": "x" * 100}))[:100])
    *_, ended, _end = pair.server.handle_timeout(WALL, NOW + 300)
    assert ended == RequestEnded(stream, Code.CANCELLED, "slow_frame")


def test_every_reason_of_a_cut_is_listed() -> None:
    bodies = [LEFT, WRONG_TOKEN, ROTATED, SLOW, DENIED, TOO_MUCH_HELD]
    bodies += [*SESSION_ENDED.values(), stale_on_stream(WALL), SLOW_FRAME]
    reasons = {reason_in(body) for body in [*bodies, DEADLINE_EXCEEDED]}
    assert reasons | {"draining"} == set(CUT_REASONS)
