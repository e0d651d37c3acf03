"""Run the calls of one connection to its client (sans-IO; zcp1.md, section 19).

The part of `ServerConnection` that only connections with registered methods pay for.

    session.handle  -> `register`
    a method calls  -> `begin`, then CALL
    RESULT, FAILURE -> `free` and `settle`, then `read_answer`

    state      a method waits   the number is in flight
    WAITING    yes              yes, unless a stale answer has freed it
    WITHDRAWN  no               yes
    NONE       no               no

Decides: which methods can be called, the numbers of calls, how many there may be, and when their time is over.

Rules:
- A number is in flight until its answer has arrived, after WITHDRAW too: a late answer never answers another call.
- A call counts against the limits until it is in state NONE.
- An answer with another token than its CALL is dropped.
- An offer of a pending call has no deadline here. It keeps no connection alive, and a drain does not wait for it.

It must not know: other requests, sessions beyond their ids, methods that wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from math import ceil, inf
from typing import Any, Final, NamedTuple

from zcproto.errors import (
    CallError,
    Code,
    InternalError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from zcproto.wire.frame import MAX_STREAM, RESULT
from zcproto.wire.message import MessageError, decode_body, decode_error, encode_body, encode_request

MS: Final = 1000
MAX_DEADLINE_MS: Final = 2**53
_ARRAY_OF_3: Final = b"\x93"

ANSWER_CODES: Final = frozenset({*range(Code.CANCELLED, Code.UNAUTHENTICATED + 1), Code.STALE_TIMESTAMP})
"""Codes that a FAILURE may have; any other is UNKNOWN."""


class CallToClient(NamedTuple):
    """What a method calls at a client."""

    method: str
    params: Mapping[str, Any]
    timeout_s: float
    """Sent as the call's deadline."""
    traceparent: str | None = None


class ServerCallState(Enum):
    """The states of zcp1.md, section 19.3."""

    NONE = "none"
    WAITING = "waiting"
    WITHDRAWN = "withdrawn"


class RegisteredSession:
    """What the client handles for one session. `calls` are those that are not in state NONE."""

    __slots__ = ("calls", "max", "methods")

    def __init__(self) -> None:
        self.methods: frozenset[str] = frozenset()
        self.max = 0
        self.calls = 0


class ServerCall:
    """One CALL. `deadline` is monotonic seconds, infinite for an offer of a pending call."""

    __slots__ = ("deadline", "is_in_flight", "is_waiting", "number", "registered", "token")

    def __init__(self, number: int, token: bytes, registered: RegisteredSession, deadline: float) -> None:
        self.number = number
        self.token = token
        self.registered = registered
        self.deadline = deadline
        self.is_waiting = True
        self.is_in_flight = True

    @property
    def state(self) -> ServerCallState:
        if self.is_waiting:
            return ServerCallState.WAITING
        return ServerCallState.WITHDRAWN if self.is_in_flight else ServerCallState.NONE


def no_handler(method: str) -> Unavailable:
    """Return the error of a CALL to a client that has not registered `method`."""
    return Unavailable(
        f"the client handles no method {method!r} on this connection; the client must await client.handle first"
    )


class ServerCalls:
    """The calls of one connection. Created with its first `session.handle`."""

    __slots__ = ("_calls", "_in_flight", "_limit", "_next_number", "_registered", "_waiting")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._registered: dict[str, RegisteredSession] = {}
        self._in_flight: dict[int, ServerCall] = {}
        self._waiting: set[ServerCall] = set()
        self._calls = 0  # not in state NONE
        self._next_number = 1

    # --- registration -----------------------------------------------------------------------------

    def register(self, session_id: str, methods: frozenset[str], most: int) -> None:
        """Set what the client handles for a session; nothing, if `methods` is empty."""
        registered = self._registered.setdefault(session_id, RegisteredSession())
        registered.methods, registered.max = methods, most

    @property
    def registered_sessions(self) -> list[str]:
        """The sessions with a registration, expired ones included."""
        return [*self._registered]

    @property
    def is_waiting(self) -> bool:
        """Whether a call waits for its answer, offers of pending calls aside."""
        return any(call.deadline != inf for call in self._waiting)

    # --- the life of a call -------------------------------------------------------------------------

    def begin(self, session_id: str, token: bytes, method: str, deadline: float) -> ServerCall:
        """Return a new call. Raises Unavailable without a registration, ResourceExhausted at a limit."""
        registered = self._registered.get(session_id)
        if registered is None or method not in registered.methods:
            raise no_handler(method)
        for limit, calls in ((self._limit, self._calls), (registered.max, registered.calls)):
            if calls >= limit:
                raise ResourceExhausted("too many calls to this client; wait for some", {"limit": limit})
        number = self._next_number
        while number in self._in_flight:
            number = 1 if number == MAX_STREAM else number + 1
        self._next_number = 1 if number == MAX_STREAM else number + 1
        call = self._in_flight[number] = ServerCall(number, token, registered, deadline)
        self._waiting.add(call)
        self._calls += 1
        registered.calls += 1
        return call

    def free(self, number: int, token: bytes) -> ServerCall | None:
        """Free the number of a call whose answer has arrived. None: the answer answers nothing."""
        call = self._in_flight.get(number)
        if call is None or call.token != token:
            return None
        del self._in_flight[number]
        call.is_in_flight = False
        self._release(call)
        return call

    def settle(self, call: ServerCall) -> bool:
        """Stop waiting for an answer. Return False if the call did not wait."""
        if not call.is_waiting:
            return False
        self._waiting.discard(call)
        call.is_waiting = False
        self._release(call)
        return True

    def _release(self, call: ServerCall) -> None:
        if call.state is ServerCallState.NONE:
            self._calls -= 1
            call.registered.calls -= 1

    def end_session(self, session_id: str, *, is_kept: bool = False) -> list[ServerCall]:
        """Return the calls of a session that wait. Remove its registration, unless it `is_kept` for a refresh."""
        registered = self._registered.get(session_id)
        if registered is None or not (is_kept and registered.methods):
            self._registered.pop(session_id, None)
        return [call for call in self._waiting if call.registered is registered]

    # --- time ---------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        return min((call.deadline for call in self._waiting), default=inf)

    def overdue(self, now: float) -> list[ServerCall]:
        """Return the calls whose time is over."""
        return [call for call in self._waiting if call.deadline <= now]


def encode_call(call: CallToClient, max_body: int) -> bytes:
    """Return the body of a CALL. Raises InvalidArgument if it cannot be sent."""
    meta: dict[str, Any] = {"deadline_ms": min(ceil(call.timeout_s * MS), MAX_DEADLINE_MS)}
    if call.traceparent is not None:
        meta["traceparent"] = call.traceparent
    try:
        body = encode_request(call.method, call.params, meta)
    except MessageError as error:
        raise InvalidArgument(str(error)) from error
    if len(body) > max_body:
        raise InvalidArgument(f"the call has {len(body)} bytes; at most {max_body} fit")
    return body


def encode_offer(request: bytes, pending: str, timeout_s: float, traceparent: str | None) -> bytes:
    """Return the body of a CALL that offers a pending call. `request` is the body `[method, params]`."""
    meta: dict[str, Any] = {"deadline_ms": ceil(timeout_s * MS), "pending": pending}
    if traceparent is not None:
        meta["traceparent"] = traceparent
    return _ARRAY_OF_3 + request[1:] + encode_body(meta)


def read_answer(head: int, body: bytes, max_depth: int) -> tuple[Any, CallError | None]:
    """Return the value of a RESULT, or the error of a FAILURE or of an answer that cannot be decoded."""
    try:
        if head == RESULT:
            return decode_body(body, max_depth), None
        code, message, details = decode_error(body, max_depth)
    except MessageError as error:
        return None, InternalError(f"the client's answer cannot be read: {error}")
    return None, CallError.from_wire(code if code in ANSWER_CODES else Code.UNKNOWN, message, details)
