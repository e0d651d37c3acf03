"""The states of a conversation, as one table, the same for both ends.

Rules: every change of state is in this table; what is not in it is a bug of ours, never an answer to a
peer's input. A peer's bad input is FATAL, which every open state has.

    AWAITING_WELCOME  client only: nothing may be sent, and WELCOME alone may arrive
    OPEN              both sides may send
    DRAINING          GOAWAY was said: what runs is answered, nothing new is taken
    CLOSED            over: nothing is read any more; what is queued is still to be sent
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class State(Enum):
    AWAITING_WELCOME = "awaiting_welcome"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Input(Enum):
    WELCOME = "welcome"
    GOAWAY = "goaway"
    FATAL = "fatal"
    END = "end"  # the transport ended, cleanly or not, or a timeout says that it must


TRANSITIONS: Final[dict[State, dict[Input, State]]] = {
    State.AWAITING_WELCOME: {
        Input.WELCOME: State.OPEN,
        Input.FATAL: State.CLOSED,
        Input.END: State.CLOSED,
    },
    State.OPEN: {
        Input.GOAWAY: State.DRAINING,
        Input.FATAL: State.CLOSED,
        Input.END: State.CLOSED,
    },
    State.DRAINING: {
        Input.GOAWAY: State.DRAINING,
        Input.FATAL: State.CLOSED,
        Input.END: State.CLOSED,
    },
    State.CLOSED: {
        Input.END: State.CLOSED,
    },
}


def next_state(state: State, given: Input) -> State:
    """The state that follows. A KeyError is a bug in zcproto."""
    return TRANSITIONS[state][given]
