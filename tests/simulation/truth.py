"""What really happened, as no single process knows it, and the invariants that are checked while it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARED_BOUND_S = 5.0
"""After so long a revocation applies on all servers that reach the store (SECURITY.md)."""

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
    reached_since: Callable[[str], float]
    """Since when a server has reached the store without a gap."""
    begun: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    calls: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Calls in progress: when they must have ended, and the process of the client."""
    runs: dict[str, str] = field(default_factory=dict)
    """Calls that were run, and the server."""
    excused: set[str] = field(default_factory=set)
    """Keys whose claim a failover has lost."""
    sessions: dict[str, Session] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    """For each approval the answers that handlers have given."""
    decided: set[str] = field(default_factory=set)

    def store_lost(self, server: str) -> None:
        """A server has lost what it kept in memory: claims and sessions."""
        self.excused.update(call for call, ran_on in self.runs.items() if ran_on == server)

    def begin(self, call: str, timeout: float, process: str) -> None:
        self.begun[call.partition(" ")[0]] += 1
        self.calls[call] = self.now() + timeout, process

    def end(self, call: str) -> None:
        if self.calls.pop(call, None) is None:
            raise Violation(f"{call} has ended twice")
        self.ended[call.partition(" ")[0]] += 1

    def client_crashed(self, process: str) -> None:
        self.calls = {call: entry for call, entry in self.calls.items() if entry[1] != process}

    def ran(self, call: str, server: str) -> None:
        """A method was called: at most once for each call, whatever was repeated."""
        if call in self.runs and call not in self.excused:
            raise Violation(f"{call} ran on {self.runs[call]} and again on {server}")
        self.runs[call] = server

    def used(self, session_id: str, server: str) -> None:
        """A method was called in a session."""
        session = self.sessions.get(session_id)
        if session is None:
            return
        since = session.ended_at
        if server != session.by:
            since = max(since, self.reached_since(server)) + SHARED_BOUND_S
        if self.now() > since:
            age = self.now() - session.ended_at
            raise Violation(
                f"{server} accepted session {session_id} of {session.user} {age:.3f} s after {session.by}"
                " had acknowledged its end"
            )

    def session_ended(self, session_id: str, user: str, by: str) -> None:
        self.sessions.setdefault(session_id, Session(user, self.now(), by))

    def answered(self, approval: str, client: str) -> None:
        """A handler of a client answers."""
        answers = self.answers.setdefault(approval, [])
        if client in answers:
            raise Violation(f"{approval} was shown to {client} twice")
        answers.append(client)

    def decision(self, approval: str, answer: Any) -> None:
        """A method got the answer."""
        if approval in self.decided:
            raise Violation(f"{approval} was answered twice")
        self.decided.add(approval)
        if answer not in self.answers.get(approval, ()):
            raise Violation(f"{approval} got the answer {answer!r}, which no handler gave")

    def check_calls(self, paused: Callable[[str], float]) -> None:
        """Check that no call is overdue. `paused` returns until when a process was paused."""
        for call, (due, process) in self.calls.items():
            if self.now() > max(due, paused(process)) + LATE_S:
                raise Violation(f"{call} of {process} has not ended")
