"""Test streams at the server: every state with every input (zcp1.md, section 18.10), limits, and timers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.connection.helpers import pair_in_session
from tests.helpers import NOW, WALL, ConnectionPair
from zcproto.connection.events import (
    NEVER,
    ConnectionEnded,
    CreditReceived,
    Request,
    RequestEnded,
    ServerStream,
    StreamState,
)
from zcproto.connection.refusals import (
    CUT_REASONS,
    DEADLINE_EXCEEDED,
    DENIED,
    DETACHED,
    LEFT,
    RESUMED_ELSEWHERE,
    ROTATED,
    SESSION_ENDED,
    SLOW,
    SLOW_FRAME,
    TOO_MUCH_HELD,
    WRONG_TOKEN,
    reason_in,
    stale_on_stream,
)
from zcproto.connection.server import FRAMES_READ, SILENT_FRAMES
from zcproto.connection.server_streams import PONG_TIMEOUT_S, TOUCH_INTERVAL_S, StreamTotals
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.wire.frame import (
    CANCEL,
    CREDIT,
    END,
    ITEM,
    NO_TOKEN,
    OPEN,
    PING,
    PONG,
    REQUEST,
    Kind,
    encode_frame,
)
from zcproto.wire.message import NO_META, encode_body, encode_error, encode_request

NONE, OPENED, HALF, LINGER = StreamState.NONE, StreamState.OPEN, StreamState.HALF, StreamState.LINGER
LIMITS = StreamLimits(max_open=4, max_item=1_000, window_items=4, window_bytes=1_000, stall_timeout_s=60)
LARGE = 10_000
SETTINGS = ConnectionSettings(streams=LIMITS, max_streams=8)


def stream_pair() -> ConnectionPair:
    return pair_in_session(SETTINGS)


def allowance(pair: ConnectionPair) -> int:
    return pair.server.streams(pair.clock.now()).allowance


class Case(NamedTuple):
    """What an input causes: the next state, the frames that are sent, and the change of the allowance."""

    next: StreamState | None  # None: the connection ends
    sent: tuple[Kind, ...] = ()
    allowance: int = 0


class Row:
    """A stream in a state: four items granted, one of them received, and credit for 10,000."""

    def __init__(self, state: str) -> None:
        self.pair = pair = stream_pair()
        self.stream: ServerStream | None = None
        if state != "none":
            self.stream = pair.open(takes_items=state != "half without items")
            pair.server.grant(self.stream, WALL)
        if state in ("open", "half", "linger"):
            pair.send(pair.frame(ITEM, 1, encode_body(1)))
        if state == "half":
            pair.send(pair.frame(END, 1))
        if state == "half after end":
            pair.send(pair.frame(ITEM, 1, encode_body(1)) + pair.frame(END, 1))
        if state == "linger":
            pair.send(pair.frame(CANCEL, 1))
        pair.answers()


def frame(head: int, body: bytes = b"", **fields: int | bytes) -> Callable[[Row], list[Any]]:
    return lambda row: row.pair.send(row.pair.frame(head, 1, body, **fields))


def respond(row: Row) -> list[Any]:
    assert row.stream is not None
    row.pair.server.respond(row.stream, encode_body(None), WALL)
    return []


def fail(row: Row) -> list[Any]:
    assert row.stream is not None
    row.pair.server.fail(row.stream, encode_error(Code.NOT_FOUND, ""), WALL)
    return []


def produce(row: Row) -> list[Any]:
    if row.stream.credit.may_send:
        row.pair.server.send_item(row.stream, encode_body("x"), WALL)
    return []


def take(row: Row) -> list[Any]:
    if row.stream.items is not None and row.stream.items.held:
        row.stream.items.take()
    row.pair.server.grant(row.stream, WALL)
    return []


def end_session(row: Row) -> list[Any]:
    pair = row.pair
    session_id = pair.opened.session.id
    pair.server.leave(session_id, NOW)
    return [*pair.server.cut_streams(session_id, Code.TOKEN_EXPIRED, WALL)]


def stall(row: Row) -> list[Any]:
    streams = row.pair.server.streams(NOW)
    if row.stream is not None and row.stream.state in (OPENED, HALF):
        streams.wait_for_credit(row.stream, NOW)
    row.pair.clock.now_s += LIMITS.stall_timeout_s
    return row.pair.timeout()


INPUTS = {
    "open": frame(OPEN, encode_request("tokens", {})),
    "request": frame(REQUEST, encode_request("echo", {})),
    "item": frame(ITEM, encode_body(2)),
    "end": frame(END),
    "credit": frame(CREDIT, encode_body([LARGE + 1, LARGE])),
    "credit equal": frame(CREDIT, encode_body([LARGE, LARGE])),
    "credit lower": frame(CREDIT, encode_body([LARGE - 1, LARGE + 1])),
    "credit undecodable": frame(CREDIT, b"\xc1"),
    "cancel": frame(CANCEL),
    "stale item": frame(ITEM, encode_body(2), late_ms=30_001),
    "stale end": frame(END, late_ms=30_001),
    "stale credit": frame(CREDIT, encode_body([LARGE + 1, LARGE]), late_ms=30_001),
    "stale cancel": frame(CANCEL, late_ms=30_001),
    "item with another token": frame(ITEM, encode_body(2), token=NO_TOKEN),
    "end with another token": frame(END, token=NO_TOKEN),
    "credit with another token": frame(CREDIT, encode_body([0, 0]), token=NO_TOKEN),
    "cancel with another token": frame(CANCEL, token=NO_TOKEN),
    "produce": produce,
    "take": take,
    "return": respond,
    "raise": fail,
    "session ends": end_session,
    "stall": stall,
}
NEEDS_STREAM = {"produce", "take", "return", "raise", "stall"}
CUT = (Kind.ERROR,)
FATAL = Case(None, (Kind.ERROR,))


def in_flight(state: StreamState, allowed: int) -> dict[str, Case]:
    """Return the rows that OPEN and HALF share. `allowed` items may still arrive."""
    cut = Case(LINGER, CUT, allowed)
    return {
        "open": FATAL,
        "request": FATAL,
        "credit": Case(state),
        "credit equal": Case(state),
        "credit lower": FATAL,
        "credit undecodable": FATAL,
        "cancel": cut,
        "stale item": cut,
        "stale end": cut,
        "stale credit": cut,
        "stale cancel": cut,
        "item with another token": cut,
        "end with another token": cut,
        "credit with another token": Case(state),
        "cancel with another token": Case(state),
        "produce": Case(state, (Kind.ITEM,)),
        "take": Case(state),
        "return": Case(NONE, (Kind.RESPONSE,), allowed),
        "raise": Case(NONE, (Kind.ERROR,), allowed),
        "session ends": cut,
        "stall": cut,
    }


def not_in_flight(state: StreamState, allowance: int) -> dict[str, Case]:
    """Return the rows of NONE and LINGER."""
    return {
        **dict.fromkeys(INPUTS, Case(state)),
        "item": Case(state, (), -1) if allowance else FATAL,
        "item with another token": Case(state, (), -1) if allowance else FATAL,
    }


TABLE: dict[str, dict[str, Case]] = {
    "none": not_in_flight(NONE, 0),
    "open": {**in_flight(OPENED, 3), "item": Case(OPENED), "end": Case(HALF), "take": Case(OPENED)},
    "half": {**in_flight(HALF, 0), "item": FATAL, "end": FATAL},
    "half without items": {**in_flight(HALF, 0), "item": FATAL, "end": Case(HALF)},
    "half after end": {**in_flight(HALF, 0), "item": FATAL, "end": FATAL},
    "linger": {**not_in_flight(LINGER, 3), "return": Case(NONE), "raise": Case(NONE)},
}


@pytest.mark.parametrize(
    ("state", "given"),
    [(state, given) for state in TABLE for given in INPUTS if state != "none" or given not in NEEDS_STREAM],
)
def test_state_and_input_give_next_state_and_action(state: str, given: str) -> None:
    row = Row(state)
    before = allowance(row.pair)
    expected = TABLE[state][given]
    events = INPUTS[given](row)
    sent = [answer for answer in row.pair.answers() if answer.kind is not Kind.PING]
    if expected.next is None:
        assert isinstance(events[-1], ConnectionEnded)
        assert sent[-1].stream == 0
        return
    assert tuple(answer.kind for answer in sent) == expected.sent
    assert (NONE if row.stream is None else row.stream.state) is expected.next
    assert allowance(row.pair) - before == expected.allowance


def test_every_input_is_listed_for_every_state() -> None:
    for state, cases in TABLE.items():
        assert cases.keys() == INPUTS.keys(), state


def test_request_that_ends_after_its_cut_makes_no_room_for_a_stream() -> None:
    pair = stream_pair()
    for stream in range(1, LIMITS.max_open + 1):
        pair.open(stream)
    *_, received = pair.send(pair.frame(REQUEST, 9, encode_request("slow", {})))
    assert isinstance(received, Request)
    pair.server.hold(received, NOW)
    pair.send(pair.frame(CANCEL, 9))
    pair.server.fail(received, encode_error(Code.CANCELLED, ""), WALL)
    pair.answers()
    pair.send(pair.frame(OPEN, 10, encode_request("tokens", {}, {"credit": (LARGE, LARGE)})))
    (refused,) = pair.answers()
    assert refused.code == Code.RESOURCE_EXHAUSTED


def test_grant_reports_whether_credit_was_sent() -> None:
    pair = stream_pair()
    stream = pair.open(takes_items=True)
    pair.answers()
    assert pair.server.grant(stream, WALL)
    assert not pair.server.grant(stream, WALL)
    assert [answer.kind for answer in pair.answers()] == [Kind.CREDIT]
    pair.server.fail(stream, encode_error(Code.NOT_FOUND, ""), WALL)
    assert not pair.server.grant(stream, WALL)


def test_frames_without_effect_count_as_wasted_and_others_do_not() -> None:
    pair = stream_pair()
    pair.open(1, credit=(1, 1_000))
    pair.open(3, takes_items=True)
    pair.send(pair.frame(CANCEL, 3))
    other, late = bytes(32), 30_001
    raised, equal = encode_body([2, 1_000]), encode_body([2, 1_000])
    for frames, wasted in (
        ([pair.frame(CREDIT, 1, raised), pair.frame(END, 1)], 0),  # the first CREDIT, and the first END
        ([pair.frame(CREDIT, 1, equal)], 1),
        ([pair.frame(CREDIT, 1, encode_body([3, 1_000]))], 1),  # one more than items
        ([pair.frame(CREDIT, 1, raised, token=other), pair.frame(CANCEL, 1, token=other)], 2),
        ([pair.frame(CREDIT, 3, raised), pair.frame(END, 3), pair.frame(CANCEL, 3)], 3),
        ([pair.frame(kind, 5, raised, late_ms=late) for kind in (CREDIT, ITEM)], 2),
        ([pair.frame(kind, 5, late_ms=late) for kind in (END, CANCEL)], 2),
        ([pair.frame(PING, 0, late_ms=late), pair.frame(PONG, 0)], 2),
        ([pair.frame(CREDIT, 1, raised, late_ms=late)], 0),  # cuts its stream
    ):
        pair.server.wasted, pair.server.deadline_moved = 0, False
        pair.send(b"".join(frames))
        assert (pair.server.wasted, pair.server.deadline_moved) == (wasted, wasted > 0)
    assert pair.server.state is State.OPEN


def test_late_items_are_not_wasted_up_to_the_allowance_and_fatal_beyond_it() -> None:
    pair = stream_pair()
    opened = pair.open(takes_items=True)
    assert pair.server.grant(opened, WALL)
    pair.send(pair.frame(CANCEL, 1))
    pair.server.wasted = 0
    items = [pair.frame(ITEM, 1, encode_body(number)) for number in range(LIMITS.window_items)]
    assert pair.send(b"".join(items)) == []
    assert (pair.server.wasted, allowance(pair)) == (0, 0)
    (ended,) = pair.send(pair.frame(ITEM, 1, encode_body(0)))
    assert isinstance(ended, ConnectionEnded)


def test_items_of_an_answered_stream_are_discarded() -> None:
    pair = stream_pair()
    opened = pair.open(takes_items=True)
    assert pair.server.grant(opened, WALL)
    pair.send(pair.frame(ITEM, 1, encode_body(0)))
    assert opened.items.held_bytes
    pair.send(pair.frame(CANCEL, 1))
    assert not opened.items.held_bytes


def test_credit_for_each_item_is_not_wasted() -> None:
    pair = stream_pair()
    opened = pair.open(credit=(1, LARGE))
    for number in range(1, 40):
        pair.server.send_item(opened, encode_body(number), WALL)
        pair.send(pair.frame(CREDIT, 1, encode_body([number + 1, LARGE])))
    assert pair.server.wasted == 0


def test_frames_without_events_are_reported_for_their_share_of_a_turn() -> None:
    pair = stream_pair()
    silent = [pair.frame(END, 7) for _ in range(2 * SILENT_FRAMES + 1)]
    assert pair.send(b"".join(silent)) == [FRAMES_READ, FRAMES_READ]
    pair.server.wasted = 0
    events = pair.receive_data(b"".join(pair.frame(END, 7) for _ in range(100)))
    assert next(iter(events)) is FRAMES_READ
    pair.server.end()
    assert list(events) == []
    assert pair.server.wasted == SILENT_FRAMES


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
    for later in (0, 1):
        assert not streams.wait_for_credit(stream, NOW + later), "the next deadline is not earlier"
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
    other = pair.open_session("joe")
    pair.server.hold(Request(9, other.token, other.session, "m", {}, NO_META), NOW)

    def last_used() -> set[int]:
        ids = pair.opened.session.id, bound.session.id
        return {pair.registry.info(each, later).last_used_at for each in ids}

    later = WALL + 60_000
    assert pair.server.next_deadline() == NOW + TOUCH_INTERVAL_S
    pair.server.handle_timeout(later, NOW + TOUCH_INTERVAL_S - 1)
    assert last_used() == {WALL}
    pair.server.handle_timeout(later, NOW + TOUCH_INTERVAL_S)
    assert last_used() == {later}
    assert pair.registry.info(other.session.id, later).last_used_at == WALL, "only streams count"
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
    bodies = [LEFT, WRONG_TOKEN, ROTATED, SLOW, DENIED, TOO_MUCH_HELD, DETACHED, RESUMED_ELSEWHERE]
    bodies += [*SESSION_ENDED.values(), stale_on_stream(WALL), SLOW_FRAME]
    reasons = {reason_in(body) for body in [*bodies, DEADLINE_EXCEEDED]}
    assert reasons | {"draining"} == set(CUT_REASONS)
