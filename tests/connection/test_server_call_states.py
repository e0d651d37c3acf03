"""Test every state of a call at the server with every input (zcp1.md, section 19.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import pytest

from tests.connection.helpers import pair_in_session
from tests.helpers import NOW, SALT, WALL, ConnectionPair, small_registry
from zcproto.connection.events import CallEnded, ConnectionEnded, GoAwayReason
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_calls import (
    CallToClient,
    ServerCall,
    ServerCallState,
    encode_call,
    encode_offer,
)
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import (
    Code,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    StaleTimestamp,
    Unavailable,
    UnknownError,
    ZcprotoError,
)
from zcproto.wire.frame import CALL, ERROR, FAILURE, NO_TOKEN, RESULT, WITHDRAW, encode_frame
from zcproto.wire.message import (
    RequestMeta,
    decode_call,
    decode_request,
    encode_body,
    encode_error,
    encode_request,
)

NONE, WAITING, WITHDRAWN = ServerCallState.NONE, ServerCallState.WAITING, ServerCallState.WITHDRAWN
SETTINGS = ConnectionSettings(max_calls=4)
TIMEOUT = 30.0
TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


def call_pair(settings: ConnectionSettings = SETTINGS) -> ConnectionPair:
    """Return a connection whose client handles `approve` for its session, three calls at once."""
    pair = pair_in_session(settings)
    pair.server.register(pair.opened.session.id, frozenset({"approve"}), 3)
    return pair


def heads(pair: ConnectionPair) -> list[int]:
    return [answer.raw[1] for answer in pair.answers()]


class Case(NamedTuple):
    """What an input causes: the next state, the outcome of the call, and the frames that are sent."""

    next: ServerCallState | None  # None: the connection ends
    outcome: object = None
    sent: tuple[int, ...] = ()


class Row:
    """A call in a state; `freed`: it waits, although a stale answer has freed its number."""

    def __init__(self, state: str) -> None:
        self.pair = pair = call_pair()
        self.call = pair.call()
        if state == "freed":
            pair.send(pair.frame(RESULT, 1, encode_body(1), late_ms=30_001))
        if state == "withdrawn":
            pair.server.withdraw(self.call, WALL)
        if state == "none":
            pair.send(pair.frame(RESULT, 1, encode_body(1)))
        pair.answers()


def frame(head: int, body: bytes, **fields: int | bytes) -> Callable[[Row], list[Any]]:
    return lambda row: row.pair.send(row.pair.frame(head, 1, body, **fields))


def deadline(row: Row) -> list[Any]:
    row.pair.clock.now_s += TIMEOUT
    return row.pair.timeout()


def cancel(row: Row) -> list[Any]:
    row.pair.server.withdraw(row.call, WALL)
    return []


def end_session(row: Row) -> list[Any]:
    row.pair.server.withdraw_session(row.pair.opened.session.id, WALL)
    return []


INPUTS = {
    "result": frame(RESULT, encode_body(True)),
    "result that cannot be read": frame(RESULT, b"\xc1"),
    "failure": frame(FAILURE, encode_error(Code.PERMISSION_DENIED, "no")),
    "failure that cannot be read": frame(FAILURE, encode_body("x")),
    "failure of the protocol": frame(FAILURE, encode_error(Code.TOKEN_REVOKED, "no")),
    "result with another token": frame(RESULT, encode_body(True), token=NO_TOKEN),
    "stale result": frame(RESULT, encode_body(True), late_ms=30_001),
    "stale failure": frame(FAILURE, encode_error(Code.NOT_FOUND, ""), late_ms=30_001),
    "deadline": deadline,
    "cancel": cancel,
    "session ends": end_session,
}
WITHDRAWS = (WITHDRAW,)
TABLE = {
    "waiting": {
        "result": Case(NONE, True),
        "result that cannot be read": Case(NONE, InternalError),
        "failure": Case(NONE, PermissionDenied),
        "failure that cannot be read": Case(NONE, InternalError),
        "failure of the protocol": Case(NONE, UnknownError),
        "result with another token": Case(WAITING),
        "stale result": Case(WAITING),
        "stale failure": Case(WAITING),
        "deadline": Case(WITHDRAWN, DeadlineExceeded, WITHDRAWS),
        "cancel": Case(WITHDRAWN, None, WITHDRAWS),
        "session ends": Case(WITHDRAWN, None, WITHDRAWS),
    },
    "freed": {
        **dict.fromkeys(INPUTS, Case(WAITING)),
        "deadline": Case(NONE, DeadlineExceeded),
        "cancel": Case(NONE),
        "session ends": Case(NONE),
    },
    "withdrawn": {
        **dict.fromkeys(INPUTS, Case(NONE)),
        "result with another token": Case(WITHDRAWN),
        "deadline": Case(WITHDRAWN),
        "cancel": Case(WITHDRAWN),
        "session ends": Case(WITHDRAWN),
    },
    "none": dict.fromkeys(INPUTS, Case(NONE)),
}


@pytest.mark.parametrize(("state", "given"), [(state, given) for state in TABLE for given in INPUTS])
def test_state_and_input_give_next_state_and_action(state: str, given: str) -> None:
    row = Row(state)
    events, expected = INPUTS[given](row), TABLE[state][given]
    assert row.call.state is expected.next
    assert tuple(heads(row.pair)) == expected.sent
    outcomes = [
        (event.call, event.value if event.error is None else type(event.error))
        for event in events
        if isinstance(event, CallEnded)
    ]
    assert len(outcomes) == len(events)
    assert outcomes == ([] if expected.outcome is None else [(row.call, expected.outcome)])


def test_call_has_the_newest_token_the_deadline_and_the_traceparent() -> None:
    pair = call_pair()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    newer = pair.registry.refresh(pair.opened.refresh_token, client="", address="", wall=WALL)
    pair.server.join(newer.session, newer.token, WALL, NOW)
    body = encode_call(CallToClient("approve", {"tool": "shell"}, 0.0015, trace), 1_000)
    pair.server.call(pair.opened.session.id, "approve", body, timeout_s=0.0015, wall=WALL, now=NOW)
    answer = pair.answer()
    assert (answer.raw[1], answer.stream, answer.token) == (CALL, 1, newer.token)
    method, params, meta = decode_request(answer.body)
    assert (method, params, meta.deadline_ms, meta.traceparent) == ("approve", {"tool": "shell"}, 2, trace)


def test_numbers_grow_and_skip_those_in_flight() -> None:
    pair = call_pair()
    calls = pair.server._calls
    assert calls is not None
    assert [pair.call().number, pair.call().number] == [1, 2]
    pair.send(pair.frame(RESULT, 1, encode_body(None)))
    calls._next_number = 2**32 - 1
    assert pair.call().number == 2**32 - 1
    pair.send(pair.frame(RESULT, 2**32 - 1, encode_body(None)))
    assert pair.call().number == 1
    assert pair.call().number == 3  # 2 is in flight
    calls._next_number = 3
    pair.send(pair.frame(RESULT, 1, encode_body(None)))
    calls._in_flight[2**32 - 1] = calls._in_flight[3]
    calls._next_number = 2**32 - 1
    assert pair.call().number == 1


def expect(error: type[ZcprotoError], pair: ConnectionPair, method: str = "approve") -> dict[str, object]:
    with pytest.raises(error) as caught:
        pair.call(method)
    assert pair.answers() == []
    return caught.value.details


def test_method_that_is_not_registered_is_unavailable() -> None:
    pair = call_pair()
    expect(Unavailable, pair, "other")
    pair.server.register(pair.opened.session.id, frozenset(), 3)
    expect(Unavailable, pair)
    pair.server.register(pair.opened.session.id, frozenset({"other"}), 3)
    assert pair.call("other").number == 1
    pair.server.leave(pair.opened.session.id, NOW)
    pair.answers()
    expect(Unavailable, pair, "other")


def test_registration_that_is_kept_holds_again_after_a_refresh() -> None:
    pair = call_pair()
    call = pair.call()
    pair.server.leave(pair.opened.session.id, NOW)
    assert pair.server.withdraw_session(pair.opened.session.id, WALL, is_kept=True) == [call]
    assert heads(pair) == [CALL, WITHDRAW]
    expect(Unavailable, pair)
    assert pair.server.registered_sessions == [pair.opened.session.id]
    newer = pair.registry.refresh(pair.opened.refresh_token, client="", address="", wall=WALL)
    pair.server.join(newer.session, newer.token, WALL, NOW)
    pair.call()
    assert [answer.token for answer in pair.answers()] == [newer.token]
    pair.send(pair.frame(FAILURE, 1, encode_error(Code.CANCELLED, "")))
    assert [pair.call(), pair.call()]
    pair.answers()
    assert expect(ResourceExhausted, pair) == {"limit": 3}, "calls of before the expiry count until they end"


def test_registration_of_nothing_is_not_kept() -> None:
    pair = call_pair()
    pair.server.register(pair.opened.session.id, frozenset(), 3)
    for _ in range(2):
        assert pair.server.withdraw_session(pair.opened.session.id, WALL, is_kept=True) == []
        assert pair.server.registered_sessions == []


def test_session_that_registered_elsewhere_is_unavailable() -> None:
    pair = call_pair()
    other = pair.registry.open("bob", client="", address="", wall=WALL)
    pair.server.join(other.session, other.token, WALL, NOW)
    pair.opened = other
    expect(Unavailable, pair)
    fresh = ServerConnection(SETTINGS, pair.registry, salt=SALT, wall=WALL, now=NOW)
    fresh.join(other.session, other.token, WALL, NOW)
    fresh.data_to_send()
    pair.server = fresh
    expect(Unavailable, pair)
    assert not fresh.has_calls
    assert fresh.withdraw_session(pair.opened.session.id, WALL) == []
    assert fresh.registered_sessions == []


def test_ended_connection_is_unavailable_and_withdraws_nothing() -> None:
    pair = call_pair()
    call = pair.call()
    pair.answers()
    pair.server.end()
    expect(Unavailable, pair)
    assert pair.server.withdraw(call, WALL)
    assert pair.answers() == []


def test_calls_beyond_the_limit_of_the_client_or_the_server_are_refused() -> None:
    pair = call_pair()
    calls = [pair.call() for _ in range(3)]
    pair.answers()
    assert expect(ResourceExhausted, pair) == {"limit": 3}
    pair.server.withdraw(calls[0], WALL)
    pair.answers()
    assert expect(ResourceExhausted, pair) == {"limit": 3}, "its number is in flight"
    pair.send(pair.frame(FAILURE, 1, encode_error(Code.CANCELLED, "")))
    pair.send(pair.frame(RESULT, 2, encode_body(1), late_ms=30_001))
    pair.call()
    pair.answers()
    assert expect(ResourceExhausted, pair) == {"limit": 3}, "one waits for its deadline"
    pair.server.register(pair.opened.session.id, frozenset({"approve"}), 100)
    pair.call()
    pair.answers()
    assert expect(ResourceExhausted, pair) == {"limit": 4}


def test_calls_are_refused_while_an_ended_session_has_some_in_flight() -> None:
    pair = call_pair(replace(SETTINGS, max_calls=1))
    pair.call()
    pair.server.withdraw_session(pair.opened.session.id, WALL)
    pair.answers()
    pair.server.register(pair.opened.session.id, frozenset({"approve"}), 3)
    assert expect(ResourceExhausted, pair) == {"limit": 1}
    pair.send(pair.frame(FAILURE, 1, encode_error(Code.CANCELLED, "")))
    pair.call()


@pytest.mark.parametrize("params", [{"x": object()}, {"x": bytes(1_000)}])
def test_params_that_cannot_be_sent_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        encode_call(CallToClient("approve", params, 1.0), 1_000)


def test_timeout_without_end_fits_the_wire() -> None:
    assert decode_request(encode_call(CallToClient("m", {}, 1e300), 1_000))[2].deadline_ms == 2**53


def test_deadlines_of_calls_are_deadlines_of_the_connection() -> None:
    pair = call_pair(replace(SETTINGS, idle_timeout_s=10_000.0))
    pair.server.next_deadline()
    pair.call(timeout=20.0)
    assert pair.server.deadline_moved
    pair.call(timeout=10.0)
    assert pair.server.next_deadline() == NOW + 10.0
    assert pair.server.handle_timeout(WALL, NOW + 9.9) == []
    pair.clock.now_s += 10.0
    assert [type(event) for event in pair.timeout()] == [CallEnded]
    assert pair.server.next_deadline() == NOW + 20.0


def test_connection_with_a_call_is_not_idle() -> None:
    pair = call_pair(replace(SETTINGS, idle_timeout_s=10.0))
    pair.call(timeout=15.0)
    assert pair.server.handle_timeout(WALL, NOW + 10.0) == []
    assert pair.server.next_deadline() == NOW + 15.0
    assert len(pair.server.handle_timeout(WALL, NOW + 15.0)) == 1
    assert pair.server.handle_timeout(WALL, NOW + 20.0) == [ConnectionEnded(None, GoAwayReason.IDLE)]


def test_calls_go_on_after_goaway() -> None:
    pair = call_pair()
    first = pair.call()
    pair.server.go_away(GoAwayReason.DRAINING, 1_000, WALL)
    pair.call()
    assert [event.call for event in pair.send(pair.frame(RESULT, 1, encode_body(1)))] == [first]
    assert pair.server.has_calls


def test_answers_that_answer_nothing_are_counted_and_slow_the_peer_down() -> None:
    pair = call_pair()
    call = pair.call()
    pair.server.withdraw(call, WALL)
    assert pair.send(pair.frame(RESULT, 1, encode_body(1))) == []
    assert (pair.server.totals.dropped_answers, pair.server.wasted) == (1, 0)
    assert pair.send(pair.frame(RESULT, 1, encode_body(1))) == []
    assert pair.send(pair.frame(FAILURE, 7, b"")) == []
    assert (pair.server.totals.dropped_answers, pair.server.wasted) == (3, 2)


def offer_of(pair: ConnectionPair, traceparent: str | None = None) -> ServerCall:
    """Offer a pending call."""
    body = encode_offer(encode_request("approve", {"tool": "shell"}), "id", TIMEOUT, traceparent)
    session_id, clock = pair.opened.session.id, pair.clock
    return pair.server.call(session_id, "approve", body, timeout_s=inf, wall=clock.wall(), now=clock.now())


@pytest.mark.parametrize("trace", [None, TRACE], ids=["no trace", "trace"])
def test_offer_has_the_id_of_its_call_and_no_deadline_here(trace: str | None) -> None:
    pair = call_pair()
    offer_of(pair, trace)
    (sent,) = pair.answers()
    meta = RequestMeta(deadline_ms=30_000, traceparent=trace)
    assert decode_call(sent.body) == ("approve", {"tool": "shell"}, meta, "id")
    assert not pair.server.has_calls
    assert pair.server.withdraw_overdue(WALL, NOW + 1e6) == []
    pair.call()
    assert pair.server.has_calls


def test_stale_answer_to_an_offer_ends_the_offer() -> None:
    pair = call_pair()
    offer = offer_of(pair)
    (ended,) = pair.send(pair.frame(RESULT, 1, encode_body(1), late_ms=30_001))
    assert isinstance(ended, CallEnded)
    assert (ended.call, type(ended.error)) == (offer, StaleTimestamp)
    assert offer.state is NONE
    pair.server.withdraw(offer_of(pair), WALL)
    assert pair.send(pair.frame(RESULT, 2, encode_body(1), late_ms=30_001)) == []


def test_answers_without_registration_are_dropped() -> None:
    registry = small_registry(idle_timeout_ms=None)
    server = ServerConnection(SETTINGS, registry, salt=SALT, wall=WALL, now=NOW)
    data = encode_frame(RESULT, 1, WALL, SALT, 1, NO_TOKEN, encode_body(1))
    assert list(server.receive_data(data, WALL, NOW)) == []
    data = encode_frame(RESULT, 1, WALL - 30_001, SALT, 2, NO_TOKEN, encode_body(1))
    assert list(server.receive_data(data, WALL, NOW)) == []
    assert server.totals.dropped_answers == 2


def test_ten_stale_answers_in_a_row_end_the_connection() -> None:
    pair = call_pair()
    events: list[Any] = []
    for number in range(10):
        events += pair.send(pair.frame(RESULT, number + 1, encode_body(1), late_ms=30_001))
    assert [type(event) for event in events] == [ConnectionEnded]
    assert heads(pair) == [ERROR]


def test_request_and_call_with_one_number_are_both_answered() -> None:
    pair = call_pair()
    call = pair.call()
    pair.get(pair.request(1))
    (ended,) = pair.send(pair.frame(RESULT, 1, encode_body(7)))
    assert isinstance(ended, CallEnded)
    assert (ended.call, ended.value) == (call, 7)
    assert "number=1" in repr(ended)
    assert "7" not in repr(ended)
    assert pair.send(pair.ping()) == []
