"""Define the states of a connection in one table for both ends.

    AWAITING_WELCOME  client only: it may not send, and only WELCOME may arrive
    OPEN              both sides may send
    DRAINING          GOAWAY was sent: requests in flight are answered, new ones refused
    CLOSED            nothing is read any more; queued output is still sent

Rules: every transition is in the table. A missing one is a bug in zcproto, never the result of a peer's input:
invalid input is FATAL, which every open state has.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class State(Enum):
    AWAITING_WELCOME = "awaiting_welcome"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"

    __hash__ = object.__hash__  # in C, as every connection needs some


class Input(Enum):
    WELCOME = "welcome"
    GOAWAY = "goaway"
    FATAL = "fatal"
    END = "end"  # the transport ended, or a timeout ends it

    __hash__ = object.__hash__


_END: Final = {Input.FATAL: State.CLOSED, Input.END: State.CLOSED}

TRANSITIONS: Final[dict[State, dict[Input, State]]] = {
    State.AWAITING_WELCOME: {Input.WELCOME: State.OPEN, **_END},
    State.OPEN: {Input.GOAWAY: State.DRAINING, **_END},
    State.DRAINING: {Input.GOAWAY: State.DRAINING, **_END},
    State.CLOSED: {Input.END: State.CLOSED},
}


def next_state(state: State, given: Input) -> State:
    """Return the next state. A KeyError is a bug in zcproto."""
    return TRANSITIONS[state][given]
