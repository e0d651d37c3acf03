"""Test every state of a call at the client with every input (zcp1.md, section 19.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.connection.helpers import TOKEN, WELCOME_MAP, ClientHarness, ended
from tests.helpers import WALL
from zcproto.connection.client import UNREQUESTED_BURST, UNREQUESTED_PER_S
from zcproto.connection.client_calls import MAX_BLOCKED_REFUSALS, ClientCall, ClientCallState
from zcproto.connection.events import CallReceived, CallWithdrawn, ClientEvent, ConnectionEnded, ErrorReceived
from zcproto.errors import Code, ConnectionClosed, Unimplemented
from zcproto.wire.frame import (
    CALL,
    ERROR,
    FAILURE,
    MIN_LENGTH,
    NO_TOKEN,
    PONG,
    RESPONSE,
    RESULT,
    WITHDRAW,
    Side,
    accepted_with_calls,
)
from zcproto.wire.message import decode_body, decode_error, encode_body, encode_error, encode_request

NONE, RUNNING = ClientCallState.NONE, ClientCallState.RUNNING
CALLS = WELCOME_MAP | {"calls": {"max": 8}}
NEW_TOKEN = b"n" * 32
METHODS = frozenset({"approve", "ask"})


class Calls(ClientHarness):
    """A client that handles `approve` and `ask` for one session, two calls at once."""

    def __init__(self, welcome: dict[str, Any] = CALLS, *, register: bool = True) -> None:
        super().__init__(welcome)
        self._decoder.accepted = accepted_with_calls(Side.SERVER, self._decoder.accepted)
        if register:
            self.client.handle(METHODS, 2, "receiver", token=TOKEN, wall=WALL)
            self.sent()

    def call(
        self, number: int = 1, method: str = "approve", *, token: bytes = TOKEN, stale: bool = False
    ) -> list[ClientEvent]:
        body = encode_request(method, {"tool": "shell"}, {"deadline_ms": 1_000})
        receive = self.receive_stale if stale else self.receive_frame
        return receive(CALL, number, body, token=token)

    def received(self, number: int = 1, method: str = "approve") -> ClientCall:
        (event,) = self.call(number, method)
        assert isinstance(event, CallReceived)
        return event.call

    def answers(self) -> list[tuple[int, int, Any]]:
        """Return number, head and value or code of each frame that was sent."""
        return [
            (
                number,
                head,
                decode_error(body).code if head == FAILURE else decode_body(body) if body else None,
            )
            for _, head, number, _, _, _, _, body in self.sent()
        ]


class Case(NamedTuple):
    next: ClientCallState | None  # None: the connection ends
    events: tuple[type, ...] = ()
    sent: tuple[tuple[int, int, Any], ...] = ()


class Row:
    """A call in a state."""

    def __init__(self, state: ClientCallState) -> None:
        self.harness = Calls()
        self.call = self.harness.received()
        if state is NONE:
            self.harness.client.answer_call(self.call, None, WALL)
        self.harness.sent()


def withdraw(*, stale: bool = False, **fields: Any) -> Callable[[Row], list[ClientEvent]]:
    def receive(row: Row) -> list[ClientEvent]:
        receive = row.harness.receive_stale if stale else row.harness.receive_frame
        return receive(WITHDRAW, 1, **{"token": TOKEN, **fields})

    return receive


def answer(row: Row) -> list[ClientEvent]:
    row.harness.client.answer_call(row.call, True, WALL)
    return []


def fail(row: Row) -> list[ClientEvent]:
    row.harness.client.fail_call(row.call, Code.NOT_FOUND, "", WALL, {"x": 1})
    return []


def end_session(row: Row) -> list[ClientEvent]:
    row.harness.client.cancel_calls(TOKEN, WALL)
    return []


INPUTS: dict[str, Callable[[Row], list[ClientEvent]]] = {
    "call on the number": lambda row: row.harness.call(1),
    "stale call on the number": lambda row: row.harness.call(1, stale=True),
    "withdraw": withdraw(),
    "stale withdraw": withdraw(stale=True),
    "withdraw with another token": withdraw(token=NEW_TOKEN),
    "withdraw with a body": withdraw(body=encode_body(1)),
    "result": answer,
    "failure": fail,
    "session ends": end_session,
}
CANCELLED = ((1, FAILURE, Code.CANCELLED),)
TABLE = {
    RUNNING: {
        "call on the number": Case(None, (ConnectionEnded,)),
        "stale call on the number": Case(None, (ConnectionEnded,)),
        "withdraw": Case(NONE, (CallWithdrawn,), CANCELLED),
        "stale withdraw": Case(NONE, (CallWithdrawn,), CANCELLED),
        "withdraw with another token": Case(RUNNING),
        "withdraw with a body": Case(None, (ConnectionEnded,)),
        "result": Case(NONE, (), ((1, RESULT, True),)),
        "failure": Case(NONE, (), ((1, FAILURE, Code.NOT_FOUND),)),
        "session ends": Case(NONE, (), CANCELLED),
    },
    NONE: {
        **dict.fromkeys(INPUTS, Case(NONE)),
        "call on the number": Case(NONE, (CallReceived,)),
        "stale call on the number": Case(NONE, (), ((1, FAILURE, Code.STALE_TIMESTAMP),)),
        "withdraw with a body": Case(None, (ConnectionEnded,)),
    },
}


@pytest.mark.parametrize(("state", "given"), [(state, given) for state in TABLE for given in INPUTS])
def test_state_and_input_give_next_state_and_action(state: ClientCallState, given: str) -> None:
    row = Row(state)
    events = INPUTS[given](row)
    expected = TABLE[state][given]
    assert tuple(type(event) for event in events) == expected.events
    if expected.next is not None:
        assert row.call.state is expected.next
        assert tuple(row.harness.answers()) == expected.sent


def test_call_has_its_params_deadline_and_receiver() -> None:
    harness = Calls()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = encode_request("ask", {"x": 1}, {"deadline_ms": 5, "traceparent": trace, "pending": "id"})
    (event,) = harness.receive_frame(CALL, 9, body, token=TOKEN)
    assert isinstance(event, CallReceived)
    call = event.call
    assert (call.method, call.params, call.deadline_ms, call.traceparent) == ("ask", {"x": 1}, 5, trace)
    assert call.pending == "id"
    assert call.session.receiver == "receiver"
    assert harness.client.running_calls == 1


@pytest.mark.parametrize(
    ("body", "token", "code"),
    [
        (encode_request("other", {}, {"deadline_ms": 1}), TOKEN, Code.UNIMPLEMENTED),
        (encode_request("approve", {}, {"deadline_ms": 1}), NEW_TOKEN, Code.UNAUTHENTICATED),
        (encode_request("approve", {}, {"deadline_ms": 1}), NO_TOKEN, Code.UNAUTHENTICATED),
        (encode_request("approve", {}), TOKEN, Code.INVALID_ARGUMENT),
        (encode_request("approve", {}, {"deadline_ms": 0}), TOKEN, Code.DEADLINE_EXCEEDED),
        (b"\xc1", TOKEN, Code.INVALID_ARGUMENT),
        (b"", TOKEN, Code.INVALID_ARGUMENT),
    ],
)
def test_call_that_is_not_possible_is_refused(body: bytes, token: bytes, code: Code) -> None:
    harness = Calls()
    assert harness.receive_frame(CALL, 1, body, token=token) == []
    assert harness.answers() == [(1, FAILURE, code)]
    assert harness.client.running_calls == 0


def test_handlers_count_until_they_end_even_if_withdrawn() -> None:
    harness = Calls()
    calls = [harness.received(number) for number in (1, 2)]
    assert harness.call(3) == []
    assert harness.answers() == [(3, FAILURE, Code.RESOURCE_EXHAUSTED)]
    harness.receive_frame(WITHDRAW, 1, token=TOKEN)
    harness.client.answer_call(calls[1], 1, WALL)
    assert harness.call(3) == []
    harness.sent()
    for call in calls:
        harness.client.release_call(call)
    assert [harness.received(number).number for number in (3, 4)] == [3, 4]


def test_call_without_registration_ends_the_connection() -> None:
    harness = Calls(register=False)
    assert harness.receive_frame(WITHDRAW, 1) == []
    assert harness.client.dropped_unknown == 1
    assert ended(harness.call()).code is Code.PROTOCOL_ERROR
    assert ended(Calls(register=False).call(stale=True)).code is Code.PROTOCOL_ERROR


def test_server_without_calls_cannot_call_and_handlers_cannot_be_registered() -> None:
    harness = Calls(WELCOME_MAP, register=False)
    with pytest.raises(Unimplemented):
        harness.client.handle(METHODS, 1, None, token=TOKEN, wall=WALL)
    client = harness.client
    assert client.running_calls == 0
    assert not client.handles(TOKEN)
    assert client.cancel_calls(TOKEN, WALL) == client.end_calls() == []
    assert ended(harness.call()).code is Code.PROTOCOL_ERROR
    with pytest.raises(ConnectionClosed):
        client.handle(METHODS, 1, None, token=TOKEN, wall=WALL)


def test_registration_is_a_request_with_the_token_and_replaces_the_earlier_one() -> None:
    harness = Calls(register=False)
    stream = harness.client.handle(METHODS, 2, None, token=TOKEN, wall=WALL)
    ((*_, token, body),) = harness.sent()
    assert token == TOKEN
    assert decode_body(body) == ["session.handle", {"methods": ["approve", "ask"], "max": 2}]
    harness.receive_frame(RESPONSE, stream, encode_body({}))
    running = harness.received(1, "ask")
    harness.client.handle(frozenset({"approve"}), 1, None, token=TOKEN, wall=WALL)
    harness.sent()
    assert harness.call(2) == harness.call(3, "ask") == []
    assert [code for *_, code in harness.answers()] == [Code.RESOURCE_EXHAUSTED, Code.UNIMPLEMENTED]
    harness.client.answer_call(running, 1, WALL)
    assert harness.answers() == [(1, RESULT, 1)]


def test_refreshed_session_is_called_by_its_new_token_at_once() -> None:
    harness = Calls()
    old = harness.received(1)
    stream = harness.request("session.refresh", {}, token=TOKEN)
    assert harness.sent()[0][6] == NO_TOKEN
    answer = harness.frame(RESPONSE, stream, encode_body({"token": NEW_TOKEN}))
    call = harness.frame(CALL, 2, encode_request("ask", {}, {"deadline_ms": 1}), token=NEW_TOKEN)
    events = harness.receive_data(answer + call)
    assert isinstance(events[1], CallReceived)
    assert not harness.client.handles(TOKEN)
    assert harness.client.handles(NEW_TOKEN)
    assert harness.call(3) == []
    assert harness.receive_frame(WITHDRAW, 1, token=TOKEN) == [CallWithdrawn(old)]
    assert [(number, code) for number, _, code in harness.answers()] == [
        (3, Code.UNAUTHENTICATED),
        (1, Code.CANCELLED),
    ]


@pytest.mark.parametrize("is_stale", [False, True])
def test_refused_refresh_keeps_the_token(is_stale: bool) -> None:
    harness = Calls()
    stream = harness.request("session.refresh", {}, token=TOKEN)
    receive = harness.receive_stale if is_stale else harness.receive_frame
    (event,) = receive(ERROR, stream, encode_error(Code.UNAVAILABLE, ""))
    assert isinstance(event, ErrorReceived)
    assert harness.client.handles(TOKEN)
    assert harness.client._calls.refreshing == {}


def test_opened_session_is_not_called_for_the_earlier_one() -> None:
    harness = Calls()
    stream = harness.request("session.open", {}, token=TOKEN)
    harness.receive_frame(RESPONSE, stream, encode_body({"token": NEW_TOKEN}))
    assert harness.client.handles(TOKEN)
    assert not harness.client.handles(NEW_TOKEN)


def test_result_that_cannot_be_sent_is_a_failure() -> None:
    harness = Calls()
    client = harness.client
    client.answer_call(harness.received(1), object(), WALL)
    client.answer_call(harness.received(2), bytes(16_384), WALL)
    assert harness.answers() == [(1, FAILURE, Code.INTERNAL), (2, FAILURE, Code.INTERNAL)]


def test_largest_result_is_sent() -> None:
    harness = Calls()
    stream = harness.request(token=TOKEN)
    harness.receive_frame(RESPONSE, stream, encode_body(None))
    harness.sent()
    value = bytes(1_048_576 - 64 - 5)
    harness.client.answer_call(harness.received(1), value, WALL)
    assert harness.answers() == [(1, RESULT, value)]
    harness.client.answer_call(harness.received(2), value + b"x", WALL)
    assert harness.answers() == [(2, FAILURE, Code.INTERNAL)]


@pytest.mark.parametrize(
    ("code", "message", "details", "sent"),
    [
        (Code.TOKEN_REVOKED, "", None, Code.UNKNOWN),
        (Code.STALE_TIMESTAMP, "", None, Code.UNKNOWN),
        (Code.UNAUTHENTICATED, "", None, Code.UNAUTHENTICATED),
        (Code.NOT_FOUND, "", {"x": object()}, Code.INTERNAL),
        (Code.NOT_FOUND, "x" * 20_000, None, Code.INTERNAL),
    ],
)
def test_failure_has_a_code_that_is_allowed(
    code: Code, message: str, details: dict[str, Any] | None, sent: Code
) -> None:
    harness = Calls()
    harness.client.fail_call(harness.received(), code, message, WALL, details)
    assert harness.answers() == [(1, FAILURE, sent)]


def test_ended_connection_answers_nothing_and_ends_its_calls() -> None:
    harness = Calls()
    call = harness.received()
    other = harness.received(2)
    harness.client.end()
    harness.client.answer_call(other, 1, WALL)
    assert harness.client.end_calls() == [call, other]
    assert harness.client.running_calls == 0
    assert harness.sent() == []


def test_refusals_that_the_server_does_not_read_are_bounded() -> None:
    harness = Calls()
    client = harness.client
    client.is_output_blocked = True
    for _ in range(MAX_BLOCKED_REFUSALS):
        assert harness.call(1, "other") == []
    client.unblock_output(WALL)
    client.is_output_blocked = True
    events: list[ClientEvent] = []
    for number in range(MAX_BLOCKED_REFUSALS // 2 + 1):
        call = harness.received(2 * number + 1)
        client.release_call(call)
        events += harness.receive_frame(WITHDRAW, call.number, token=TOKEN)
        events += harness.call(2 * number + 2, "other")
    assert ended(events).code is Code.PROTOCOL_ERROR


def test_calls_count_as_frames_that_answer_no_request() -> None:
    harness = Calls()
    harness.request()
    harness.received(1)
    for _ in range(UNREQUESTED_BURST - 1):
        harness.receive_frame(PONG)
    assert harness.client.reading_delay(harness.now) == pytest.approx(0, abs=1e-5)
    harness.receive_frame(PONG)
    assert harness.client.reading_delay(harness.now) == pytest.approx(1 / UNREQUESTED_PER_S, rel=0.1)


@pytest.mark.parametrize(("more", "code"), [(0, Code.NOT_FOUND), (1, Code.INTERNAL)])
def test_error_of_a_handler_is_sent_up_to_the_limit_of_a_frame(more: int, code: Code) -> None:
    harness = Calls()
    limit = harness.client.send_limit
    around = MIN_LENGTH + len(encode_error(Code.NOT_FOUND, "x" * (limit - 100))) - (limit - 100)
    harness.client.fail_call(harness.received(), Code.NOT_FOUND, "x" * (limit - around + more), WALL)
    assert harness.answers() == [(1, FAILURE, code)]
