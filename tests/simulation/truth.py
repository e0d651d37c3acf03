"""What really happened, as no single process knows it, and the invariants that are checked while it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARED_BOUND_S = 5.0
"""After so long a revocation applies on all servers that reach the store (SECURITY.md)."""

STREAM_S = 60.0
"""How long a stream of a token may go on that was replaced."""

LATE_S = 10.0
"""How much later than its timeout a call may end, beside pauses of its process."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Session:
    """A session that was ended, and the server that has acknowledged that."""

    user: str
    ended_at: float
    by: str


@dataclass
class Truth:
    """The record. Methods of the application and clients write it; each check raises Violation."""

    now: Callable[[], float]
    log: Callable[..., None]
    reached_since: Callable[[], float]
    """Since when all servers and the store could have exchanged everything."""
    ended: Counter[str] = field(default_factory=Counter)
    calls: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Calls in progress: when they must have ended, and the process of the client."""
    runs: dict[str, str] = field(default_factory=dict)
    """Calls that were run, and the server."""
    excused: set[str] = field(default_factory=set)
    """Keys whose claim a failover has lost."""
    sessions: dict[str, Session] = field(default_factory=dict)
    newest: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    """The newest token of each session that a server has accepted."""
    rotated: dict[bytes, float] = field(default_factory=dict)
    """Tokens that were replaced."""
    violation: Violation | None = None
    answers: dict[str, set[str]] = field(default_factory=dict)
    """For each approval the answers that handlers have given."""
    decided: set[str] = field(default_factory=set)

    def violated(self, what: str) -> Violation:
        """Record a violation, for the application may catch the error."""
        violation = Violation(what)
        self.violation = self.violation or violation
        return violation

    def store_lost(self, server: str) -> None:
        """A server has lost what it kept in memory: claims and sessions."""
        self.excused.update(call for call, ran_on in self.runs.items() if ran_on == server)

    def begin(self, call: str, timeout: float, process: str) -> None:
        self.calls[call] = self.now() + timeout, process

    def end(self, call: str) -> None:
        if self.calls.pop(call, None) is None:
            raise self.violated(f"{call} has ended twice")
        self.ended[call.partition(" ")[0]] += 1

    def client_crashed(self, process: str) -> None:
        self.calls = {call: entry for call, entry in self.calls.items() if entry[1] != process}

    def ran(self, call: str, server: str) -> None:
        """A method was called: at most once for each call, whatever was repeated."""
        if call in self.runs and call not in self.excused:
            raise self.violated(f"{call} ran on {self.runs[call]} and again on {server}")
        self.runs[call] = server

    def used(self, session_id: str, token: bytes, server: str) -> None:
        """A server has accepted a token."""
        self.check_ended(session_id, server)
        newest = self.newest.get(session_id)
        if newest is None or newest[0] == token:
            self.newest.setdefault(session_id, (token, self.now()))
        elif (rotated_at := self.rotated.get(token)) is None:
            # The client got this token after the one before it.
            self.rotated[newest[0]] = self.now()
            self.newest[session_id] = token, self.now()
        else:
            self._check_bound(f"a token of session {session_id}", rotated_at, "", server)

    def streamed(self, session_id: str, token: bytes, server: str) -> None:
        """A stream that a token has opened goes on."""
        self.check_ended(session_id, server)
        rotated_at = self.rotated.get(token)
        if rotated_at is not None:
            self._check_bound(f"the stream of session {session_id}", rotated_at + STREAM_S, "", server)

    def check_ended(self, session_id: str, server: str) -> None:
        """A server has run something for a session: it must not have ended for too long."""
        session = self.sessions.get(session_id)
        if session is not None:
            self._check_bound(f"session {session_id}", session.ended_at, session.by, server)

    def _check_bound(self, what: str, ended_at: float, by: str, server: str) -> None:
        """Check that something has ended lately, or that this server cannot have learned of it yet."""
        bound = ended_at
        if server != by:
            bound = max(bound, self.reached_since()) + SHARED_BOUND_S
        if self.now() > bound:
            age = self.now() - ended_at
            raise self.violated(
                f"{server} accepted {what} {age:.3f} s after its end, acknowledged by {by or 'a server'}"
            )

    def session_ended(self, session_id: str, user: str, by: str) -> None:
        self.sessions.setdefault(session_id, Session(user, self.now(), by))

    def answered(self, approval: str, client: str) -> None:
        """A handler of a client answers. It may be asked again after its connection was lost."""
        self.answers.setdefault(approval, set()).add(client)

    def decision(self, approval: str, answer: Any) -> None:
        """A method got the answer."""
        if approval in self.decided:
            raise self.violated(f"{approval} was answered twice")
        self.decided.add(approval)
        if answer not in self.answers.get(approval, ()):
            raise self.violated(f"{approval} got the answer {answer!r}, which no handler gave")

    def check_calls(self, paused: Callable[[str], float]) -> None:
        """Check that no call is overdue. `paused` returns until when a process was paused."""
        for call, (due, process) in self.calls.items():
            if self.now() > max(due, paused(process)) + LATE_S:
                raise self.violated(f"{call} of {process} has not ended")
