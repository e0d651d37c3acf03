"""Replace a running server: a second supervisor, its successor, takes over on the same sockets.

    Handover     the steps in the old server: what happens next, without processes, sockets or clocks
    Successor    the process that is to take over, as the old server sees it
    Inheritance  the open descriptors that it gets, whose numbers are in an environment variable

    IDLE -> PREPARING   the successor starts its workers, which use the old coordinator
         -> FREEING     the old coordinator ends, and leaves the store
         -> TAKING      the successor starts its coordinator
         -> RETIRING    the successor serves; the old workers are drained one at a time
    before RETIRING: a failure -> ENDING, the successor ends -> IDLE, the old server serves on

Rules:
- There is no way back once the successor serves.
- At no time do two coordinators run, and no longer than for one start none.
- Workers of both servers accept until the successor serves, so that no connection is refused. From then on only its
  own do, so that no client has to connect again twice.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Self

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.runtime.process_setup import UPGRADE
from zcproto.workers.channel import Channel, failure_of


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


class Successor:
    """A process that is to take over. It has `descriptors`, and `theirs`, the other end of `channel`, among them.

    Until its supervisor runs, it ends at once with this process: it has the sockets and the locks of the home,
    and the import of the application may take long.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[int],
        channel: Channel,
        theirs: Channel,
    ) -> None:
        self.channel = channel
        self.failure = ""
        """Why it cannot serve, in its own words or in those of the server that waited for it."""
        self.is_ending = False
        """Whether it has closed its end of the channel: it ends by itself."""
        self._process = subprocess.Popen(  # noqa: S603 - our own
            command,
            env=environment,
            pass_fds=descriptors,
            preexec_fn=theirs.end_with_peer,  # noqa: PLW1509 - the supervisor has one thread
        )
        self.pid = self._process.pid

    @property
    def reason(self) -> str | None:
        """Why, or how, it has ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        how = (
            f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
        )
        return self.failure or how

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Close the channel, by which a successor that does not serve notices that it is not wanted."""
        self.channel.close()


MAX_SIZE: Final = 4_096

Owned = tuple[socket.socket, int]
"""A listening UNIX socket, and the descriptor of the lock of its file."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The descriptors. Both servers have all of them until the predecessor ends."""

    channel: Channel
    sockets: list[socket.socket]
    redirect_sockets: list[socket.socket]
    control: Owned | None
    link: Owned

    def encode(self) -> str:
        """Return the value of the variable."""
        return json.dumps(
            {
                "channel": self.channel.fileno(),
                "sockets": [each.fileno() for each in self.sockets],
                "redirect": [each.fileno() for each in self.redirect_sockets],
                "control": None if self.control is None else [self.control[0].fileno(), self.control[1]],
                "link": [self.link[0].fileno(), self.link[1]],
            },
            separators=(",", ":"),
        )

    def descriptors(self) -> list[int]:
        """Return all descriptors."""
        owned = [self.link] if self.control is None else [self.control, self.link]
        return [
            self.channel.fileno(),
            *(each.fileno() for each in (*self.sockets, *self.redirect_sockets)),
            *(number for each, lock in owned for number in (each.fileno(), lock)),
        ]

    def report(self, error: Exception) -> None:
        """Send the predecessor an error that has a message for the operator."""
        failure = failure_of(error)
        if failure["kind"] != "other":
            self.channel.send("failed", **failure)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Self | None:
        """Remove the variable, and take the descriptors; None without it. Raises ConfigError."""
        text = environ.pop(UPGRADE, None)
        if text is None:
            return None
        try:
            if len(text) > MAX_SIZE:
                raise ValueError("too long")
            found = json.loads(text)
            control = found["control"]
            return cls(
                Channel(_socket(found["channel"])),
                [_socket(each) for each in found["sockets"]],
                [_socket(each) for each in found["redirect"]],
                None if control is None else _owned(control),
                _owned(found["link"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise ConfigError(
                [f"{UPGRADE} = {escape_text(text, 60)!r} (environment): unset it; only a server sets it"]
            ) from error


def _socket(number: Any) -> socket.socket:
    if type(number) is not int or number < 0:
        raise ValueError("not a descriptor")
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)


def _owned(value: Any) -> Owned:
    number, lock = value
    if type(lock) is not int or lock < 0:
        raise ValueError("not a descriptor")
    os.set_inheritable(lock, False)
    return _socket(number), lock
