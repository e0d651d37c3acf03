"""Run the calls of the server on one connection (sans-IO; zcp1.md, section 19).

The part of `ClientConnection` that only connections with registered methods pay for.

    RUNNING  the handler runs, and the server awaits its answer
    NONE     answered, or withdrawn

Decides: which CALL is refused and how, which handler is cancelled, and the token by which a session is called.

Rules:
- Each CALL gets one answer.
- A handler counts against the limit of its session until it has ended, even if its call was withdrawn.
- `session.refresh` replaces the token by which a session is called as soon as its answer arrives.

It must not know: what a handler does, how it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

from zcproto.errors import Code, ProtocolError
from zcproto.wire.frame import NO_TOKEN
from zcproto.wire.message import MessageError, decode_call

MAX_BLOCKED_REFUSALS: Final = 1_000
"""Refused CALLs whose FAILUREs may wait while the server does not read. An honest server respects `max`."""


class ClientCallState(Enum):
    """The states of zcp1.md, section 19.3."""

    NONE = "none"
    RUNNING = "running"


@dataclass(slots=True, eq=False, repr=False)
class HandledSession:
    """What this end handles for one session. `running` handlers have not ended. `receiver` is passed on unread."""

    receiver: Any
    methods: frozenset[str] = frozenset()
    max: int = 0
    running: int = 0


@dataclass(slots=True, eq=False, repr=False)
class ClientCall:
    """One CALL. `deadline_ms` counts from its arrival; `pending` is the id of its pending call."""

    number: int
    token: bytes
    session: HandledSession
    method: str
    params: dict[str, Any]
    deadline_ms: int
    traceparent: str | None
    pending: str | None
    state: ClientCallState = ClientCallState.RUNNING


class Refused(NamedTuple):
    """The FAILURE of a CALL that is not run."""

    code: Code
    message: str


_STALE: Final = Refused(Code.STALE_TIMESTAMP, "the call was delayed for too long; it was not run")
_UNKNOWN_TOKEN: Final = Refused(Code.UNAUTHENTICATED, "no session with this token handles calls here")
_NO_DEADLINE: Final = Refused(Code.INVALID_ARGUMENT, "meta.deadline_ms is missing")
_TOO_LATE: Final = Refused(Code.DEADLINE_EXCEEDED, "the deadline has passed")
_NO_HANDLER: Final = Refused(Code.UNIMPLEMENTED, "this client has no handler of this name")
_BUSY: Final = Refused(Code.RESOURCE_EXHAUSTED, "this client runs as many calls as it allows")


class ClientCalls:
    """The calls in flight on one connection. Created with the first `session.handle`."""

    __slots__ = ("_by_token", "_in_flight", "blocked_refusals", "refreshing")

    def __init__(self) -> None:
        self._by_token: dict[bytes, HandledSession] = {}
        self._in_flight: dict[int, ClientCall] = {}
        self.refreshing: dict[int, bytes] = {}
        """The token that each `session.refresh` in flight will replace, by stream."""
        self.blocked_refusals = 0

    @property
    def running(self) -> int:
        """The number of calls that await their answer."""
        return len(self._in_flight)

    # --- registration -----------------------------------------------------------------------------

    def register(self, token: bytes, methods: frozenset[str], limit: int, receiver: Any) -> None:
        """Set what is handled for the session of a token."""
        session = self._by_token.setdefault(token, HandledSession(receiver))
        session.methods, session.max = methods, limit

    def handles(self, token: bytes) -> bool:
        return token in self._by_token

    def refreshed(self, stream: int, token: bytes) -> None:
        """Replace the token of a session that `session.refresh` has refreshed."""
        session = self._by_token.pop(self.refreshing.pop(stream, NO_TOKEN), None)
        if session is not None:
            self._by_token[token] = session

    def end_session(self, token: bytes) -> list[ClientCall]:
        """Remove the registration of a session. Return its calls in flight."""
        session = self._by_token.pop(token, None)
        return [call for call in self._in_flight.values() if call.session is session]

    # --- the life of a call -------------------------------------------------------------------------

    def receive(
        self, number: int, token: bytes, body: bytes, *, is_fresh: bool, max_depth: int
    ) -> ClientCall | Refused:
        """Process a CALL. Raises ProtocolError if its number is in flight."""
        if number in self._in_flight:
            raise ProtocolError(Code.PROTOCOL_ERROR, "CALL on a number that is in flight")
        if not is_fresh:
            return _STALE
        session = self._by_token.get(token)
        if session is None:
            return _UNKNOWN_TOKEN
        try:
            method, params, meta, pending = decode_call(body, max_depth)
        except MessageError as error:
            return Refused(Code.INVALID_ARGUMENT, str(error))
        if meta.deadline_ms is None:
            return _NO_DEADLINE
        if meta.deadline_ms <= 0:
            return _TOO_LATE
        if method not in session.methods:
            return _NO_HANDLER
        if session.running >= session.max:
            return _BUSY
        session.running += 1
        call = ClientCall(number, token, session, method, params, meta.deadline_ms, meta.traceparent, pending)
        self._in_flight[number] = call
        return call

    def withdraw(self, number: int, token: bytes) -> ClientCall | None:
        """Return the call that a WITHDRAW concerns; None if it is ignored."""
        call = self._in_flight.get(number)
        return call if call is not None and call.token == token else None

    def answer(self, call: ClientCall) -> bool:
        """Free the number of a call. Return False if it was answered before."""
        if call.state is ClientCallState.NONE:
            return False
        call.state = ClientCallState.NONE
        del self._in_flight[call.number]
        return True

    def end_all(self) -> list[ClientCall]:
        """End the calls of a connection that has ended; return them."""
        calls = [*self._in_flight.values()]
        for call in calls:
            self.answer(call)
        return calls
