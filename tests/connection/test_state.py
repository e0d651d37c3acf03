"""The table of states, and every state of a server against every input."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers import ConnectionPair
from zcproto.connection.events import NEVER, ConnectionEnded, Request, RequestEnded
from zcproto.connection.state import TRANSITIONS, Input, State, next_state
from zcproto.errors import Code
from zcproto.wire.frame import Kind, head_of


@pytest.mark.parametrize("state", State)
def test_a_change_of_state_is_in_the_table_or_a_bug(state: State) -> None:
    for given in Input:
        if given in TRANSITIONS[state]:
            assert next_state(state, given) is TRANSITIONS[state][given]
        else:
            with pytest.raises(KeyError):
                next_state(state, given)


def test_every_state_has_a_way_to_its_end_and_none_leads_back() -> None:
    order = list(State)
    for state, ways in TRANSITIONS.items():
        assert ways[Input.END] is State.CLOSED
        assert all(order.index(to) >= order.index(state) for to in ways.values())
    assert set(TRANSITIONS) == set(State)


# --- a server: every state, every input ---------------------------------------------------------------


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


def feeds(make: Callable[[ConnectionPair], bytes]) -> Callable[[ConnectionPair], object]:
    return lambda pair: pair.send(make(pair))


INPUTS: dict[str, Callable[[ConnectionPair], object]] = {
    "request": feeds(lambda pair: pair.request(2)),
    "request in flight": feeds(lambda pair: pair.request(1)),
    "cancel in flight": feeds(lambda pair: pair.cancel(1)),
    "cancel": feeds(lambda pair: pair.cancel(2)),
    "ping": feeds(lambda pair: pair.ping()),
    "pong": feeds(lambda pair: pair.frame(head_of(Kind.PONG))),
    "welcome": feeds(lambda pair: pair.frame(head_of(Kind.WELCOME), 0, b"\x80")),
    "response": feeds(lambda pair: pair.frame(head_of(Kind.RESPONSE), 1, b"\x80")),
    "error": feeds(lambda pair: pair.frame(head_of(Kind.ERROR), 0, b"\x92\x01\xa0")),
    "goaway": feeds(lambda pair: pair.frame(head_of(Kind.GOAWAY), 0, b"\x80")),
    "event": feeds(lambda pair: pair.frame(head_of(Kind.EVENT), 0, b"\x92\xa0\xc0")),
    "reserved": feeds(lambda pair: pair.frame(1 << 24 | 0x10 << 16, 1)),
    "go away": lambda pair: pair.server.go_away("draining", 1_000, pair.clock.wall()),
    "timeout": lambda pair: pair.timeout(),
    "end": lambda pair: pair.server.end(),
}
FATAL = ("welcome", "response", "error", "goaway", "event", "reserved")

# What each input leads to: the kinds of events, the kinds of frames sent, the state.
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
def test_a_server_in_any_state_takes_any_input(state: str, given: str) -> None:
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
