"""The steps by which a server hands over to its successor, a second supervisor on the same sockets.

    IDLE -> PREPARING   the successor starts its workers, which use the old coordinator
         -> FREEING     the old coordinator ends, and leaves the store
         -> TAKING      the successor starts its coordinator
         -> RETIRING    the successor serves; the old workers are drained one at a time
    before RETIRING: a failure -> ENDING, the successor ends -> IDLE, the old server serves on

Decides: what happens next. There is no way back once the successor serves.

Rules:
- At no time do two coordinators run, and no longer than for one start none.
- Workers of both servers accept until the successor serves, so that no connection is refused. From then on only its
  own do, so that no client has to connect again twice.

It must not know: processes, sockets, clocks.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Step(Enum):
    """How far an upgrade has come."""

    IDLE = "idle"
    PREPARING = "preparing"
    FREEING = "freeing"
    TAKING = "taking"
    RETIRING = "retiring"
    ENDING = "ending"


class Input(Enum):
    """What happened."""

    REQUESTED = "requested"
    PREPARED = "prepared"  # all workers of the successor are ready
    COORDINATOR_ENDED = "coordinator_ended"
    SERVING = "serving"  # the successor's coordinator is ready, too
    FAILED = "failed"  # the successor broke off, or took too long
    SUCCESSOR_ENDED = "successor_ended"
    WORKER_ENDED = "worker_ended"


class Action(Enum):
    """What to do."""

    START_SUCCESSOR = "start_successor"
    END_COORDINATOR = "end_coordinator"
    GIVE_STORE = "give_store"
    LEAVE = "leave"  # the successor owns the home folder and speaks to the service manager
    DRAIN_NEXT = "drain_next"  # or end, if there is no other worker
    END_SUCCESSOR = "end_successor"
    SERVE_ON = "serve_on"  # with a coordinator, if it has ended


_BREAK_OFF: Final[dict[Input, tuple[Step, tuple[Action, ...]]]] = {
    Input.FAILED: (Step.ENDING, (Action.END_SUCCESSOR,))
}
_IS_GONE: Final[dict[Input, tuple[Step, tuple[Action, ...]]]] = {
    Input.SUCCESSOR_ENDED: (Step.IDLE, (Action.SERVE_ON,))
}

TRANSITIONS: Final[dict[Step, dict[Input, tuple[Step, tuple[Action, ...]]]]] = {
    Step.IDLE: {Input.REQUESTED: (Step.PREPARING, (Action.START_SUCCESSOR,))},
    Step.PREPARING: {Input.PREPARED: (Step.FREEING, (Action.END_COORDINATOR,)), **_BREAK_OFF, **_IS_GONE},
    Step.FREEING: {Input.COORDINATOR_ENDED: (Step.TAKING, (Action.GIVE_STORE,)), **_BREAK_OFF, **_IS_GONE},
    Step.TAKING: {
        Input.SERVING: (Step.RETIRING, (Action.LEAVE, Action.DRAIN_NEXT)),
        **_BREAK_OFF,
        **_IS_GONE,
    },
    Step.RETIRING: {Input.WORKER_ENDED: (Step.RETIRING, (Action.DRAIN_NEXT,))},
    Step.ENDING: _IS_GONE,
}
"""What is not listed changes nothing: messages and ends of processes cross each other."""


class Handover:
    """The upgrade of one server."""

    def __init__(self) -> None:
        self.step = Step.IDLE

    @property
    def has_coordinator(self) -> bool:
        """Whether a coordinator that ends is started again."""
        return self.step in (Step.IDLE, Step.PREPARING)

    @property
    def is_retiring(self) -> bool:
        """Whether the successor serves."""
        return self.step is Step.RETIRING

    @property
    def is_timed(self) -> bool:
        """Whether the successor is to be waited for, for a limited time."""
        return self.step in (Step.PREPARING, Step.FREEING, Step.TAKING)

    def handle(self, given: Input) -> tuple[Action, ...]:
        """Take the next step; return what to do for it, in this order."""
        self.step, actions = TRANSITIONS[self.step].get(given, (self.step, ()))
        return actions
