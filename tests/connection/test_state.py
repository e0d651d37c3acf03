"""Test the transition table, and every state of a server connection with every input."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import ConnectionPair
from zcproto.connection.events import NEVER, ConnectionEnded, Request, RequestEnded
from zcproto.connection.state import TRANSITIONS, Input, State, next_state
from zcproto.errors import Code
from zcproto.wire.frame import Kind, head_of


@pytest.mark.parametrize("state", State)
def test_transition_outside_table_raises(state: State) -> None:
    for given in Input:
        if given in TRANSITIONS[state]:
            assert next_state(state, given) is TRANSITIONS[state][given]
        else:
            with pytest.raises(KeyError):
                next_state(state, given)


def test_every_state_can_end_and_no_transition_goes_back() -> None:
    order = list(State)
    for state, ways in TRANSITIONS.items():
        assert ways[Input.END] is State.CLOSED
        assert all(order.index(to) >= order.index(state) for to in ways.values())
    assert set(TRANSITIONS) == set(State)


# --- every state of a server, every input -------------------------------------------------------------


def new(pair: ConnectionPair) -> None:
    pass


def with_session(pair: ConnectionPair) -> None:
    pair.login()


def in_flight(pair: ConnectionPair) -> None:
    pair.login()
    pair.hold(pair.request(1, "sleep"))


def draining(pair: ConnectionPair) -> None:
    in_flight(pair)
    pair.server.go_away("draining", 1_000, pair.clock.wall())


def closed(pair: ConnectionPair) -> None:
    in_flight(pair)
    pair.server.end()


STATES: dict[str, Callable[[ConnectionPair], None]] = {
    "new": new,
    "with a session": with_session,
    "in flight": in_flight,
    "draining": draining,
    "closed": closed,
}


def receive(make: Callable[[ConnectionPair], bytes]) -> Callable[[ConnectionPair], object]:
    return lambda pair: pair.send(make(pair))


INPUTS: dict[str, Callable[[ConnectionPair], object]] = {
    "request": receive(lambda pair: pair.request(2)),
    "request in flight": receive(lambda pair: pair.request(1)),
    "cancel in flight": receive(lambda pair: pair.cancel(1)),
    "cancel": receive(lambda pair: pair.cancel(2)),
    "ping": receive(lambda pair: pair.ping()),
    "pong": receive(lambda pair: pair.frame(head_of(Kind.PONG))),
    "welcome": receive(lambda pair: pair.frame(head_of(Kind.WELCOME), 0, b"\x80")),
    "response": receive(lambda pair: pair.frame(head_of(Kind.RESPONSE), 1, b"\x80")),
    "error": receive(lambda pair: pair.frame(head_of(Kind.ERROR), 0, b"\x92\x01\xa0")),
    "goaway": receive(lambda pair: pair.frame(head_of(Kind.GOAWAY), 0, b"\x80")),
    "event": receive(lambda pair: pair.frame(head_of(Kind.EVENT), 0, b"\x92\xa0\xc0")),
    "reserved": receive(lambda pair: pair.frame(1 << 24 | 0x10 << 16, 1)),
    "go away": lambda pair: pair.server.go_away("draining", 1_000, pair.clock.wall()),
    "timeout": lambda pair: pair.timeout(),
    "end": lambda pair: pair.server.end(),
}
FATAL = ("welcome", "response", "error", "goaway", "event", "reserved")

# Types of events, kinds of sent frames, and the resulting state.
Outcome = tuple[list[type], list[str], State]
OPEN, DRAINING, CLOSED = State.OPEN, State.DRAINING, State.CLOSED
NOTHING: dict[State, Outcome] = {state: ([], [], state) for state in State}
ENDS: Outcome = ([ConnectionEnded], ["PROTOCOL_ERROR"], CLOSED)

EXPECTED: dict[str, dict[str, Outcome]] = {
    "new": {
        "request": ([Request], [], OPEN),
        "request in flight": ([Request], [], OPEN),
        "ping": ([], ["PONG"], OPEN),
        "go away": ([], ["GOAWAY"], DRAINING),
        "end": ([], [], CLOSED),
    },
    "in flight": {
        "request": ([Request], [], OPEN),
        "request in flight": ENDS,
        "cancel in flight": ([RequestEnded], ["CANCELLED"], OPEN),
        "ping": ([], ["PONG"], OPEN),
        "go away": ([], ["GOAWAY"], DRAINING),
        "end": ([], [], CLOSED),
    },
    "draining": {
        "request": ([], ["UNAVAILABLE"], DRAINING),
        "request in flight": ENDS,
        "cancel in flight": ([RequestEnded], ["CANCELLED"], DRAINING),
        "ping": ([], ["PONG"], DRAINING),
        "end": ([], [], CLOSED),
    },
    "closed": {},
}
EXPECTED["with a session"] = EXPECTED["new"]


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("state", STATES)
def test_every_input_in_every_state_has_expected_outcome(state: str, given: str) -> None:
    pair = ConnectionPair()
    STATES[state](pair)
    pair.answers()
    before = pair.server.state
    expected = EXPECTED[state].get(given, NOTHING[before])
    if given in FATAL and before is not CLOSED:
        expected = ENDS
    events = INPUTS[given](pair) or []
    assert isinstance(events, list)
    sent = [
        Code(answer.code).name if answer.kind is Kind.ERROR else answer.kind.name for answer in pair.answers()
    ]
    assert ([type(event) for event in events], sent, pair.server.state) == expected
    if pair.server.state is CLOSED:
        assert pair.server.next_deadline() == NEVER
