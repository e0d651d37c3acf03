"""Hold the requests in flight at a server, and make the frames that it sends (sans-IO).

The part of `ServerConnection` that its edge calls: answers, items, events and the end. `server.py` decides what may
arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

from zcproto.accelerator import compiled
from zcproto.connection import refusals
from zcproto.connection.events import (
    CallEnded,
    ConnectionEnded,
    GoAwayReason,
    Request,
    RequestEnded,
    ServerStream,
)
from zcproto.connection.joined_session import JoinedSession
from zcproto.connection.received_frames import ReceivedFrames
from zcproto.connection.server_calls import ServerCall, ServerCalls
from zcproto.connection.server_streams import ServerStreams, StreamTotals
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import Input, State, next_state
from zcproto.errors import Code, DeadlineExceeded, Unavailable
from zcproto.wire.frame import (
    CALL,
    CREDIT,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER,
    ITEM,
    MIN_LENGTH,
    NO_TOKEN,
    RESPONSE,
    WITHDRAW,
    encode_frame,
)
from zcproto.wire.message import MessageError, code_in, encode_body, encode_error
from zcproto.wire.usual import RequestRules

_IS_COMPILED: Final = compiled is not None
_pack_header = HEADER.pack
_CLOSED: Final = State.CLOSED
MS: Final = 1000


@dataclass(slots=True)
class ConnectionTotals:
    """Counters of the connections that share them."""

    refused: dict[tuple[str, int], int] = field(default_factory=dict)
    """Frames that reached no method, by cause and by the code of their answer."""
    dropped_stale: int = 0
    dropped_answers: int = 0
    """Answers of clients to no call, or too late."""
    streams: StreamTotals = field(default_factory=StreamTotals)


class ServerOutput:
    """The output of one connection. Its fields are those of `ServerConnection`."""

    __slots__ = (
        "_calls",
        "_counter",
        "_decoder",
        "_held",
        "_lingering",
        "_out",
        "_rules",
        "_session_deadline",
        "_streams",
        "deadline_moved",
        "salt",
        "sessions",
        "settings",
        "state",
        "totals",
    )

    settings: ConnectionSettings
    salt: bytes
    state: State
    sessions: dict[str, JoinedSession]
    totals: ConnectionTotals
    deadline_moved: bool
    _calls: ServerCalls | None
    _counter: int
    _decoder: ReceivedFrames | None
    _held: dict[int, Request]
    _lingering: int
    _out: list[bytes]
    _session_deadline: float  # of opening a session; with sessions, not later than what is due next for one
    _rules: RequestRules | None
    _streams: ServerStreams | None

    # --- answers --------------------------------------------------------------------------------

    def hold(self, request: Request, now: float) -> None:
        """Keep a request in flight to answer it in a later turn."""
        request.held = True
        self._held[request.stream] = request
        if isinstance(request, ServerStream):
            self.streams(now).begin()
            self.deadline_moved = True
        if request.meta.deadline_ms is not None:
            request.deadline = now + request.meta.deadline_ms / MS
            self.deadline_moved = True

    def respond_at_once(self, stream: int, token: bytes, body: bytes, wall: int) -> None:
        """Answer the last yielded request, which is not held, with an encoded result."""
        if self.state is _CLOSED:
            return
        # `_send` inlined: half of all frames pass here. So is `encode_frame` where it is a function in Python.
        counter = self._counter
        self._counter = counter + 1
        if _IS_COMPILED:
            self._out.append(encode_frame(RESPONSE, stream, wall, self.salt, counter, token, body))
        else:
            header = _pack_header(MIN_LENGTH + len(body), RESPONSE, stream, wall, self.salt, counter, token)
            self._out.append(header + body)

    def respond(self, request: Request, body: bytes, wall: int) -> bool:
        """Answer a request with an encoded result. Return False if it was already answered or the end came
        first."""
        if (request.held and not self._release(request)) or self.state is _CLOSED:
            return False
        self._send(RESPONSE, request.stream, request.token, body, wall)
        return True

    def fail(self, request: Request, body: bytes, wall: int) -> bool:
        """Answer a request with an encoded error. Return False if it was already answered or the end came first."""
        if (request.held and not self._release(request)) or self.state is _CLOSED:
            return False
        self._send(ERROR, request.stream, request.token, body, wall)
        return True

    def _release(self, request: Request) -> bool:
        if self.is_held(request):
            self._remove(request, lingers=False)
            return True
        if request.lingers:
            request.lingers = False
            self._lingering -= 1
            if isinstance(request, ServerStream) and self._streams is not None:
                self._streams.lingering -= 1
        return False

    def _remove(self, request: Request, *, lingers: bool) -> None:
        del self._held[request.stream]
        if isinstance(request, ServerStream) and self._streams is not None:
            self._streams.ended(request, lingers=lingers)

    def _cut(self, request: Request, body: bytes, wall: int) -> RequestEnded:
        """Answer a request in flight with an ERROR, although its method has not ended."""
        self._remove(request, lingers=True)
        # The handler may still run for a while; it counts against max_streams until it has ended.
        request.lingers = True
        self._lingering += 1
        self._send(ERROR, request.stream, request.token, body, wall)
        reason = refusals.reason_in(body) if isinstance(request, ServerStream) else ""
        return RequestEnded(request, Code(code_in(body)), reason)

    def is_held(self, request: Request) -> bool:
        """Return True if a held request has not been answered."""
        return self._held.get(request.stream) is request

    @property
    def in_flight(self) -> int:
        """Return the number of unanswered requests."""
        return len(self._held)

    # --- streams --------------------------------------------------------------------------------

    def streams(self, now: float) -> ServerStreams:
        """Return what the streams of this connection share."""
        if self._streams is None:
            assert self.settings.streams is not None, "announced"
            self._streams = ServerStreams(self.settings.streams, self.totals.streams, now)
        return self._streams

    def open_streams(self) -> list[ServerStream]:
        """Return the streams in flight."""
        if self._streams is None or not self._streams.in_flight:
            return []
        return [held for held in self._held.values() if isinstance(held, ServerStream)]

    def cut_stream(self, stream: ServerStream, body: bytes, wall: int) -> RequestEnded:
        """Cut a stream in flight, whatever its client sends, with an encoded error."""
        return self._cut(stream, body, wall)

    def cut_streams(self, session_id: str, code: Code, wall: int) -> list[RequestEnded]:
        """Cut the streams of a session that has ended."""
        return self._cut_streams(session_id, refusals.SESSION_ENDED[code], wall)

    def _cut_streams(self, session_id: str, body: bytes, wall: int) -> list[RequestEnded]:
        return [
            self._cut(stream, body, wall)
            for stream in self.open_streams()
            if stream.session is not None and stream.session.id == session_id
        ]

    def cut_denied(self, may_go_on: Callable[[ServerStream], bool], wall: int) -> list[RequestEnded]:
        """Cut the streams whose sessions may no longer call their methods."""
        denied = (stream for stream in self.open_streams() if not may_go_on(stream))
        return [self._cut(stream, refusals.DENIED, wall) for stream in denied]

    def send_item(self, stream: ServerStream, body: bytes, wall: int) -> None:
        """Send an encoded item. Only while the stream is in flight and its credit allows it."""
        length = MIN_LENGTH + len(body)
        counter = self._counter
        self._counter = counter + 1
        credit, streams = stream.credit, self._streams
        credit.sent_items += 1  # `SendCredit.count` inlined
        credit.sent_bytes += length
        assert streams is not None
        streams.sent_bytes += length
        totals = streams.totals
        totals.items_sent += 1
        totals.bytes_sent += length
        if _IS_COMPILED:  # as in `respond_at_once`
            self._out.append(encode_frame(ITEM, stream.stream, wall, self.salt, counter, stream.token, body))
        else:
            header = _pack_header(length, ITEM, stream.stream, wall, self.salt, counter, stream.token)
            self._out.append(header + body)

    def grant(self, stream: ServerStream, wall: int) -> bool:
        """Send the credit that is due: call this when the method asks for an item, and when it has taken one.

        Return False if none is due.
        """
        if stream.items is None or stream.is_answered or self.state is _CLOSED:
            return False
        granted = stream.items.next_grant()
        if granted is None:
            return False
        self._send(CREDIT, stream.stream, stream.token, encode_body(granted), wall)
        return True

    # --- calls to the client --------------------------------------------------------------------

    @property
    def has_calls(self) -> bool:
        """Whether a call waits for its answer."""
        return self._calls is not None and self._calls.is_waiting

    def register(self, session_id: str, methods: frozenset[str], most: int) -> None:
        """Set the methods that the client handles for a session used here, and how many of them at once."""
        if self._calls is None:
            self._calls = ServerCalls(self.settings.max_calls)
        self._calls.register(session_id, methods, most)

    @property
    def registered_sessions(self) -> list[str]:
        """The sessions for which the client handles methods, expired ones included."""
        return [] if self._calls is None else self._calls.registered_sessions

    def call(
        self, session_id: str, method: str, body: bytes, *, timeout_s: float, wall: int, now: float
    ) -> ServerCall:
        """Send a CALL with the newest token of the session, and a body of `encode_call`.

        Raises Unavailable if the client does not handle the method here, ResourceExhausted at a limit.
        """
        known = self.sessions.get(session_id)
        if known is None or known.cut_at != inf or self._calls is None or self.state is _CLOSED:
            raise Unavailable("the client handles no methods on this connection")
        call = self._calls.begin(session_id, known.token, method, now + timeout_s)
        self._send(CALL, call.number, call.token, body, wall)
        self.deadline_moved = True
        return call

    def withdraw(self, call: ServerCall, wall: int) -> bool:
        """Stop waiting for an answer. Return False if the call did not wait."""
        assert self._calls is not None, "a call was made"
        if not self._calls.settle(call):
            return False
        if call.is_in_flight and self.state is not _CLOSED:
            self._send(WITHDRAW, call.number, call.token, b"", wall)
        return True

    def withdraw_overdue(self, wall: int, now: float) -> list[CallEnded]:
        """Withdraw the calls whose time is over."""
        if self._calls is None:
            return []
        overdue = self._calls.overdue(now)
        for call in overdue:
            self.withdraw(call, wall)
        late = DeadlineExceeded("the client has not answered in time")
        return [CallEnded(call, None, late) for call in overdue]

    def withdraw_session(self, session_id: str, wall: int, *, is_kept: bool = False) -> list[ServerCall]:
        """Withdraw the calls of a session that has ended; return them.

        `is_kept`: its registration holds again once it was refreshed and is used here.
        """
        ended = [] if self._calls is None else self._calls.end_session(session_id, is_kept=is_kept)
        for call in ended:
            self.withdraw(call, wall)
        return ended

    @property
    def limit(self) -> int:
        """The largest `length` of a frame that is accepted now."""
        return self.settings.max_frame if self.sessions else self.settings.max_frame_before_session

    @property
    def buffered(self) -> int:
        """Return the number of bytes held of an incomplete frame."""
        return 0 if self._decoder is None else self._decoder.buffered

    # --- events ---------------------------------------------------------------------------------

    def send_event(self, session_id: str, name: str, data: Any, wall: int) -> bool:
        """Send an event of a session. Return False if its newest token was not shown on this connection.

        Raises MessageError if the data cannot be encoded or is too large.
        """
        known = self.sessions.get(session_id)
        if known is None or known.cut_at != inf or self.state is _CLOSED:
            return False
        body = encode_body([name, data])
        if len(body) > self.settings.max_body:
            raise MessageError(f"the event has {len(body)} bytes")
        self._send(EVENT, 0, known.token, body, wall)
        return True

    def announce(self, body: bytes, wall: int) -> None:
        """Send an event of the server itself (its encoded body), with a zero token."""
        if self.state is not _CLOSED:
            self._send(EVENT, 0, NO_TOKEN, body, wall)

    # --- the end --------------------------------------------------------------------------------

    def go_away(self, reason: GoAwayReason, retry_after_ms: int, wall: int) -> None:
        """Send GOAWAY: requests in flight are still answered, new ones get UNAVAILABLE."""
        if self.state is State.OPEN:
            self._enter(Input.GOAWAY)
            self._send_go_away(reason, retry_after_ms, wall)

    def _send_go_away(self, reason: GoAwayReason, retry_after_ms: int, wall: int) -> None:
        body = encode_body({"reason": reason, "retry_after_ms": retry_after_ms})
        self._send(GOAWAY, 0, NO_TOKEN, body, wall)

    def end_with(
        self, code: Code, reason: str, wall: int, details: dict[str, Any] | None = None
    ) -> ConnectionEnded:
        """End the connection with a fatal error (zcp1.md, section 10.3)."""
        self._send(ERROR, 0, NO_TOKEN, encode_error(code, reason, details), wall)
        self._enter(Input.FATAL)
        return ConnectionEnded(code, reason)

    def end(self) -> None:
        """End the connection: the transport is gone, or will be closed after queued output."""
        self._enter(Input.END)
        if self._streams is not None:
            self._streams.end(self._held)

    def _enter(self, by: Input) -> None:
        self.state = next_state(self.state, by)
        self._rules = None

    # --- frames ---------------------------------------------------------------------------------

    def _send(self, head: int, stream: int, token: bytes, body: bytes, wall: int) -> None:
        counter = self._counter
        self._counter = counter + 1
        self._out.append(encode_frame(head, stream, wall, self.salt, counter, token, body))

    def data_to_send(self) -> bytes:
        """Return and clear the queued output."""
        data = b"".join(self._out)
        self._out.clear()
        return data
