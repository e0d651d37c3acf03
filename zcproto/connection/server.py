"""Run the server end of a connection (sans-IO): bytes and time in; events, bytes and the next deadline out.

    bytes -> requests that are read in C (wire/request_fast_path.py), as far as nothing is special
          -> the general path: frame -> freshness -> `_RECEIVE`, by its kind -> events

Decides freshness (salt, counter, timestamp), the session of a frame, the limits that apply, streams in flight,
deadlines, cancellation, and the end of the connection. `AcceptedTokens` decides which tokens need no check. Checks
run in the order of the protocol (zcp1.md, section 8): header, freshness, stream in flight, token, body.

Rules:
- `receive_data` is lazy: each request is yielded before the next frame is judged, so an answer that changes
  permissions (a session opened, closed or revoked) applies to the next frame of the same read, also if that was
  read in C before.
- The edge must take all events of one call before the next call, and may pause in between while the peer does not
  read.
- A frame is judged by the clock at the arrival of its header, so a large one on a slow link is not stale.

It must not know: sockets, TLS, clocks, handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from zcproto.connection import refusals
from zcproto.connection.accepted_tokens import MS, AcceptedTokens
from zcproto.connection.credit import SendCredit
from zcproto.connection.events import (
    NEVER,
    CallEnded,
    ConnectionEnded,
    DurableStream,
    FrameBuffered,
    FramesRead,
    GoAwayReason,
    KeyWanted,
    RawRequest,
    Request,
    RequestEnded,
    ServerEvent,
    ServerStream,
    SessionJoined,
    SessionLeft,
    TokenUnknown,
)
from zcproto.connection.outbox import Outbox
from zcproto.connection.server_calls import ServerCall, ServerCalls, no_handler, read_answer
from zcproto.connection.server_streams import PONG_TIMEOUT_S, ServerStreams, StreamTotals
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.silence import SentPing
from zcproto.connection.state import Input, State, next_state
from zcproto.errors import Code, DeadlineExceeded, ProtocolError, StaleTimestamp
from zcproto.sessions import Session, SessionRegistry
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import digest_of
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    ACCEPTED,
    CALL,
    CANCEL,
    CREDIT,
    END,
    ERROR,
    EVENT,
    FAILURE,
    GOAWAY,
    HEADER_SIZE,
    ITEM,
    MIN_LENGTH,
    NO_TOKEN,
    OPEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    RESULT,
    TOKEN_SIZE,
    WELCOME,
    WITHDRAW,
    WITHOUT_BODY,
    Accepted,
    RawFrame,
    Side,
)
from zcproto.wire.message import (
    NO_META,
    MessageError,
    code_in,
    decode_open,
    decode_request,
    encode_body,
    encode_error,
)
from zcproto.wire.request_fast_path import ReadRequest, read_requests

ROTATION_GRACE_S: Final = 60.0
"""How long streams go on after a refresh elsewhere until the newest token is shown (zcp1.md, section 9.6)."""

PEER_SILENT: Final = "peer_silent"
"""Reason of the end of a connection with streams whose client does not answer a PING."""

SILENT_FRAMES: Final = 16
"""Frames that are processed in a row without an event, for the edge to share its time among connections."""
FRAMES_READ: Final = FramesRead(SILENT_FRAMES)

ATTACH: Final = "session.attach"
"""The only method allowed with a bound token whose key is not proved."""

_COARSE_FROM_S: Final = 10.0
_COARSE_BY_S: Final = 1.0
"""Deadlines further away than the first may be handled later by the second; see `DeadlineWheel`."""

_TOKEN_AT: Final = HEADER_SIZE - TOKEN_SIZE
_CLOSED: Final = State.CLOSED  # members of an enumeration are slow to look up
_OPEN: Final = State.OPEN
_DRAINING: Final = State.DRAINING
_READING: Final = frozenset({State.OPEN, State.DRAINING})


def _soon(at: float, now: float) -> float:
    """Return when to look at a deadline that must not be missed by the coarseness of timers."""
    return at - _COARSE_BY_S if at - now > _COARSE_FROM_S else at


class Edge(Protocol):
    """The owner of a connection."""

    def admits(self, session: Session) -> bool:
        """Return whether a session may be used here; False refuses its token like an unknown one."""


@dataclass(slots=True)
class ConnectionTotals:
    """Counters of the connections that share them."""

    refused: dict[tuple[str, int], int] = field(default_factory=dict)
    """Frames that reached no method, by cause and by the code of their answer."""
    dropped_stale: int = 0
    dropped_answers: int = 0
    """Answers of clients to no call, or too late."""
    streams: StreamTotals = field(default_factory=StreamTotals)


@dataclass(slots=True, eq=False, repr=False)
class JoinedSession:
    """A live session used on a connection.

    `token` is the one shown here last, and `expires_at` its expiry. `due_at` is monotonic seconds: of the event
    `session.expiring`, then of the expiry. `since` is the wall time of the first use here. `cut_at` is set while a
    newer token of the session was not shown here, which suspends it: monotonic seconds of its end here.
    """

    token: bytes
    user: str
    expires_at: int
    due_at: float
    since: int
    cut_at: float = NEVER

    def __repr__(self) -> str:
        return f"JoinedSession(expires_at={self.expires_at})"


# Smaller incomplete frames are part of the cost of a connection; a report for each read would cost a tenth of it.
REPORTED_FROM: Final = 4_096
REPORTED_STEP: Final = 65_536


class ReceivedFrames(FrameDecoder):
    """The frames of one client.

    `header_at` is when the header of an incomplete frame arrived: wall time and monotonic time. `reported` are the
    bytes of that frame that were reported to the edge.
    """

    __slots__ = ("header_at", "reported", "stale_in_a_row")

    def __init__(self, limit: int, accepted: Accepted) -> None:
        super().__init__(Side.SERVER, limit)
        self.accepted = accepted
        self.header_at: tuple[int, float] | None = None
        self.reported = 0
        self.stale_in_a_row = 0

    def report(self) -> int:
        """Return what the incomplete frame holds, in whole steps, and at most its size."""
        buffered = self.buffered
        in_steps = -(-buffered // REPORTED_STEP) * REPORTED_STEP
        self.reported = min(in_steps, self.expected) if buffered >= REPORTED_FROM else 0
        return self.reported


class ServerConnection:
    """The connection of one client.

    Args:
        salt: 8 random bytes, unique to this connection and covered by signatures of devices.
        totals: counters; connections may share them.
        edge: asked when a token is first used here. An object, because a bound method costs each connection memory.

    Output accumulates until `data_to_send`. `deadline_moved`: `next_deadline` may be earlier, or `wasted` grew. The
    first deadline is `settings.first_timeout_s` after `now`.
    """

    __slots__ = (
        "_calls",
        "_decoder",
        "_held",
        "_is_fast",
        "_last_counter",
        "_last_frame",
        "_lingering",
        "_session_deadline",
        "_streams",
        "deadline_moved",
        "edge",
        "outbox",
        "registry",
        "sessions",
        "settings",
        "state",
        "tokens",
        "totals",
        "wasted",
    )

    def __init__(
        self,
        settings: ConnectionSettings,
        registry: SessionRegistry,
        salt: bytes,
        wall: int,
        now: float,
        totals: ConnectionTotals | None = None,
        edge: Edge | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.outbox = Outbox(salt, 0)
        self.outbox.send(WELCOME, 0, NO_TOKEN, settings.welcome_body, wall)
        self.totals = ConnectionTotals() if totals is None else totals
        self.edge = edge
        self.state = _OPEN
        self.deadline_moved = False
        self.wasted = 0  # PINGs, and frames that were refused or had no effect, until the edge resets it
        self.sessions: dict[str, JoinedSession] = {}
        self._decoder: ReceivedFrames | None = None  # once a frame was not read in C
        self._is_fast = read_requests is not None  # reads may begin with requests that are read in C
        self._last_counter = 0  # the first client frame has 1 or more
        self._last_frame = now
        # Of opening a session; with sessions, not later than what is due next for one.
        self._session_deadline = now + settings.open_timeout_s
        self._held: dict[int, Request] = {}
        self.tokens = AcceptedTokens(settings, registry, salt)
        self._lingering = 0  # answered early, with their handlers still running
        self._streams: ServerStreams | None = None  # once there was an OPEN
        self._calls: ServerCalls | None = None  # once there was a session.handle

    @property
    def salt(self) -> bytes:
        return self.outbox.salt

    # --- input ----------------------------------------------------------------------------------

    def receive_data(self, data: bytes, wall: int, now: float) -> Iterator[ServerEvent] | tuple[RawRequest]:
        """Process decrypted bytes and yield their events, one at a time; a single request may come in a tuple."""
        if not self._is_fast or read_requests is None:
            return self._events(data, wall, now)
        accepted = self.tokens.last
        batch = read_requests(data, 0, accepted.rules, self._last_counter, wall)
        if not batch or wall >= accepted.recheck_at or self.registry.generation != accepted.generation:
            batch = self._read_again(batch, data, 0, wall)
            if not batch:
                return self._events(data, wall, now)
        self._last_frame = now
        event, counter, following = batch[0]
        if following or ((self._held or self._lingering) and not self._has_room(event[0])):
            return self._fast_events(batch, data, wall, now)
        self._last_counter = counter
        return (event,)

    def _read_again(self, batch: list[ReadRequest], data: bytes, at: int, wall: int) -> list[ReadRequest]:
        """Return the requests if their token is still accepted. Without any, read those with an earlier token."""
        accepted = self.tokens.last
        if not batch:
            earlier = self.tokens.earlier(data[at + _TOKEN_AT : at + HEADER_SIZE])
            if earlier is None or read_requests is None:
                return batch
            accepted = earlier
            batch = read_requests(data, at, accepted.rules, self._last_counter, wall)
        return batch if batch and self.tokens.use(accepted, wall) else []

    def _has_room(self, stream: int) -> bool:
        """Return whether a request may run beside those in flight."""
        return stream not in self._held and len(self._held) + self._lingering < self.settings.max_streams

    def _fast_events(
        self, batch: list[ReadRequest], data: bytes, wall: int, now: float
    ) -> Iterator[ServerEvent]:
        """Yield the requests that were read in C, and the events of what follows them.

        An earlier request may change what a later one was read by: the general path decides about those then.
        """
        registry, held, at = self.registry, self._held, 0
        while batch:
            accepted, generation = self.tokens.last, registry.generation
            for event, counter, following in batch:
                if (
                    accepted is not self.tokens.last
                    or registry.generation != generation
                    or not self._is_fast
                    or ((held or self._lingering) and not self._has_room(event[0]))
                ):
                    batch = []
                    break
                self._last_counter, at = counter, following
                yield event
                if not following:
                    return
            else:
                if read_requests is None or accepted is not self.tokens.last or not self._is_fast:
                    break
                batch = read_requests(data, at, accepted.rules, self._last_counter, wall)
                batch = self._read_again(batch, data, at, wall)
        yield from self._events(data[at:], wall, now)

    def _events(self, data: bytes, wall: int, now: float) -> Iterator[ServerEvent]:
        """Yield the events of bytes by the general path."""
        if self.state not in _READING:
            return
        self._is_fast = False
        tolerance, own_salt = self.settings.tolerance_ms, self.outbox.salt
        decoder = self._decoder
        if decoder is None:
            decoder = self._decoder = ReceivedFrames(self.limit, self.settings.accepted)
        judged_at = wall
        silent = 0
        decoder.feed(data)
        if decoder.header_at is not None:
            if decoder.expected:
                if decoder.reported < decoder.buffered >= REPORTED_FROM:
                    yield self._frame_buffered(decoder, now)
                return
            judged_at, decoder.header_at = decoder.header_at[0], None
        try:
            for frame in decoder.frames():
                _, head, _, timestamp, salt, counter, _, body = frame
                if salt != own_salt or counter <= self._last_counter:
                    what = "belongs to another connection" if salt != own_salt else "counter did not grow"
                    yield self.end_with(Code.REPLAYED, f"nonce {what}", wall)
                    return
                self._last_counter = counter
                self._last_frame = now
                is_fresh = -tolerance <= judged_at - timestamp <= tolerance
                judged_at = wall
                decoder.stale_in_a_row = 0 if is_fresh else decoder.stale_in_a_row + 1
                events: Iterable[ServerEvent] | None
                if not is_fresh and (
                    head != CANCEL or decoder.stale_in_a_row >= self.settings.max_stale_in_a_row
                ):
                    events = self._refuse_stale(frame, decoder.stale_in_a_row, wall)
                elif body and head in WITHOUT_BODY:
                    events = (self.end_with(Code.PROTOCOL_ERROR, "this kind of frame has no body", wall),)
                else:
                    events = _RECEIVE[head](self, frame, wall, now)
                is_silent = True
                for event in events or ():
                    is_silent = False
                    yield event
                    if self.state is _CLOSED:
                        return
                silent += is_silent
                if silent == SILENT_FRAMES:
                    silent = 0
                    yield FRAMES_READ
                    if self.state is _CLOSED:
                        return
            buffered = decoder.buffered
            if buffered >= HEADER_SIZE:
                decoder.header_at = wall, now
                self.deadline_moved = True
            if decoder.reported or buffered >= REPORTED_FROM:
                yield self._frame_buffered(decoder, now)
            is_idle = decoder.partial is None and not decoder.stale_in_a_row
            self._is_fast = read_requests is not None and is_idle and self.state is _OPEN
        except ProtocolError as error:
            yield self.end_with(error.code, error.reason, wall)

    def _frame_buffered(self, decoder: ReceivedFrames, now: float) -> FrameBuffered:
        """Report an incomplete frame."""
        user = next((joined.user for joined in self.sessions.values()), "")
        return FrameBuffered(decoder.report(), decoder.header_at[1] if decoder.header_at else now, user)

    def _refuse_stale(self, frame: RawFrame, in_a_row: int, wall: int) -> Iterable[ServerEvent] | None:
        """Refuse a stale frame. Return what ends: a stream, an offer, the connection at its limit of them."""
        _, head, stream, _, _, _, token, _ = frame
        if in_a_row >= self.settings.max_stale_in_a_row:
            return (self.end_with(Code.STALE_TIMESTAMP, "ten stale frames in a row: set the clock", wall),)
        held = self._held.get(stream) if ITEM <= head < RESULT else None
        if isinstance(held, ServerStream):  # a lost item or credit would go unnoticed
            return (self.cut(held, refusals.stale_on_stream(wall), wall),)
        if head in (REQUEST, OPEN):
            self._refuse("stale", stream, token, refusals.stale(wall), wall)
            return None
        self.count_wasted()
        if head < RESULT:
            self.totals.dropped_stale += 1
            return None
        self.totals.dropped_answers += 1
        call = None if self._calls is None else self._calls.free(stream, token)
        if call is None or call.deadline != NEVER or not self.withdraw(call, wall):
            return None  # the deadline of the call ends the waiting; an offer has none
        return (CallEnded(call, None, StaleTimestamp("the answer was delayed for too long; it was dropped")),)

    def count_wasted(self) -> None:
        """Count a frame without effect, for which the edge slows the peer down."""
        self.wasted += 1
        self.deadline_moved = True

    # --- frames by kind: each returns its events ------------------------------------------------

    def _receive_request(self, frame: RawFrame, wall: int, now: float) -> Iterator[ServerEvent]:
        """Process a REQUEST or OPEN: its stream, its token, limits, then its body. Raises ProtocolError."""
        length, head, stream, _, _, _, token, body = frame
        if stream in self._held:
            raise ProtocolError(Code.PROTOCOL_ERROR, "stream is in flight")
        tokens = self.tokens
        if not tokens.accepts(token, wall) and not (yield from self._check_token(frame, wall, now)):
            return
        session = tokens.last.session
        if (self._held or self._lingering or session is None or self.state is _DRAINING) and self._is_refused(
            head, length, stream, token, session, wall
        ):
            return
        credit = resume = None
        has_items = False
        try:
            if head == REQUEST:
                method, params, meta = decode_request(body, self.settings.max_depth)
            else:
                method, params, meta, credit, resume, has_items = decode_open(body, self.settings.max_depth)
        except MessageError as error:
            self._refuse("malformed", stream, token, encode_error(Code.INVALID_ARGUMENT, str(error)), wall)
            return
        if meta is not NO_META and meta.deadline_ms is not None and meta.deadline_ms <= 0:
            self._refuse("deadline", stream, token, refusals.DEADLINE_EXCEEDED, wall)
        elif credit is None:
            yield stream, token, session, method, params, meta
        elif resume is None:
            opened = ServerStream(stream, token, session, method, params, meta)
            opened.credit = SendCredit(credit)
            opened.has_items = has_items
            yield opened
        elif self.settings.streams is None or not self.settings.streams.durable:
            self._refuse("malformed", stream, token, refusals.NOT_DURABLE, wall)
        else:
            given = SendCredit(credit)
            yield DurableStream(stream, token, session, method, params, meta, credit=given, resume=resume)

    def _check_token(self, frame: RawFrame, wall: int, now: float) -> Generator[ServerEvent, None, bool]:
        """Check the token of a request, with the help of the edge. Return whether it is accepted."""
        stream, token = frame[2], frame[6]
        found = self._session_of(token, wall, now)
        if self.settings.looks_up and isinstance(found, bytes) and found in refusals.LOOKED_UP:
            unknown = TokenUnknown(token, refusals.LOOKED_UP[found])
            yield unknown
            found = unknown.refusal or self._session_of(token, wall, now)
        if isinstance(found, KeyWanted):
            yield found  # the edge may be able to verify the key at once
            found = self._session_of(token, wall, now)
        if isinstance(found, SessionJoined):
            yield found
            found = None if self.tokens.accepts(token, wall) else self._session_of(token, wall, now)
        if isinstance(found, KeyWanted):
            request = self._attaching(found, frame, wall)
            if request is not None:
                yield request
            return False
        if isinstance(found, bytes):
            self._refuse("token", stream, token, found, wall)
            return False
        return True  # a session that left during the event and is used again was reported by it

    def _attaching(self, wanted: KeyWanted, frame: RawFrame, wall: int) -> RawRequest | None:
        """Return a `session.attach` request for a token whose key is not proved; refuse any other.

        A body too large for a connection without a session is not decoded.
        """
        length, head, stream, _, _, _, token, body = frame
        refusal = refusals.NEEDS_ATTACH if wanted.key.startswith(DEVICE_KEY) else refusals.NEEDS_CERTIFICATE
        is_small = head == REQUEST and length <= self.settings.max_frame_before_session
        if refusal is refusals.NEEDS_ATTACH and is_small:
            try:
                method, params, meta = decode_request(body, self.settings.max_depth)
            except MessageError:
                method = ""
            if method == ATTACH:
                if self._is_refused(head, length, stream, token, wanted.session, wall):
                    return None
                if meta.deadline_ms is None or meta.deadline_ms > 0:
                    return stream, token, wanted.session, method, params, meta
                refusal = refusals.DEADLINE_EXCEEDED
        self._refuse("key_not_proved", stream, token, refusal, wall)
        return None

    def _receive_cancel(self, frame: RawFrame, wall: int, now: float) -> Iterable[ServerEvent] | None:
        held = self._held.get(frame[2])
        if held is None or held.token != frame[6]:
            self.count_wasted()
            return None
        body = refusals.LEFT if isinstance(held, ServerStream) else refusals.CANCELLED
        if (
            isinstance(held, DurableStream)
            and held.session is not None
            and self.is_suspended(held.session.id)
        ):
            body = refusals.ROTATED  # to end a run needs the newest token
        return (self.cut(held, body, wall),)

    def _receive_ping(self, frame: RawFrame, wall: int, now: float) -> None:
        self.outbox.send(PONG, 0, frame[6], b"", wall)
        self.count_wasted()

    def _receive_pong(self, frame: RawFrame, wall: int, now: float) -> None:
        self.count_wasted()  # the server sends a PING after long silence

    def _receive_on_stream(self, frame: RawFrame, wall: int, now: float) -> Iterable[ServerEvent] | None:
        """Process an ITEM, END or CREDIT. Raises ProtocolError if it ends the connection."""
        _, head, stream, _, _, _, token, body = frame
        held = self._held.get(stream)
        outcome = self.streams(now).receive(head, held, token, body)
        if isinstance(outcome, bool):
            if not outcome:
                self.count_wasted()
            return None
        if not isinstance(outcome, bytes):
            return (outcome,)
        assert held is not None, "only a stream in flight can be cut"
        return (self.cut(held, outcome, wall),)

    def _receive_answer(self, frame: RawFrame, wall: int, now: float) -> Iterable[ServerEvent] | None:
        """Process a RESULT or FAILURE, unless it is dropped."""
        call = None if self._calls is None else self._calls.free(frame[2], frame[6])
        if call is None:
            self.count_wasted()
        elif self._calls is not None and self._calls.settle(call):
            return (CallEnded(call, *read_answer(frame[1], frame[7], self.settings.max_depth)),)
        self.totals.dropped_answers += 1
        return None

    # --- refusals -------------------------------------------------------------------------------

    def _is_refused(
        self, head: int, length: int, stream: int, token: bytes, session: Session | None, wall: int
    ) -> bool:
        """Refuse a request because of the connection's state or limits, before decoding its body."""
        settings = self.settings
        if session is None and length > settings.max_frame_before_session:
            reason, body = "too_large_without_session", refusals.NEEDS_SESSION
        elif session is None and head == OPEN:
            reason, body = "token", refusals.NEEDS_SESSION
        elif self.state is State.DRAINING:
            reason, body = "draining", refusals.draining(settings.retry_draining_ms)
        elif len(self._held) + self._lingering >= settings.max_streams:
            reason, body = "max_streams", refusals.too_many_requests(settings.retry_busy_ms)
        elif head == OPEN and self._streams is not None and self._streams.is_full:
            reason, body = "max_open", refusals.too_many_streams(self._streams.max_open)
        else:
            return False
        self._refuse(reason, stream, token, body, wall)
        return True

    def _refuse(self, reason: str, stream: int, token: bytes, body: bytes, wall: int) -> None:
        """Answer a frame with an ERROR before it becomes a request, and count it."""
        refused, cause = self.totals.refused, (reason, code_in(body))
        refused[cause] = refused.get(cause, 0) + 1
        self.count_wasted()
        self.outbox.send(ERROR, stream, token, body, wall)

    # --- sessions -------------------------------------------------------------------------------

    def _session_of(self, token: bytes, wall: int, now: float) -> SessionJoined | KeyWanted | bytes | None:
        """Check a token that was not accepted here, or must be checked again.

        Return the body of an ERROR, KeyWanted if its key must be proved first, SessionJoined on its first use here,
        or None.
        """
        registry, tokens = self.registry, self.tokens
        tokens.forget(token)  # until it is accepted
        if token == NO_TOKEN:
            tokens.accept(None, token, wall)
            return None
        session = registry.check(token, wall)
        if isinstance(session, Code):
            return refusals.of_token(session, is_closed=registry.closed)
        known = self.sessions.get(session.id)
        is_known = known is not None and known.token == token and known.cut_at == NEVER
        if not is_known and self.edge is not None and not self.edge.admits(session):
            return refusals.TOKEN_ERRORS[Code.UNAUTHENTICATED]
        if session.bound:
            key = registry.key_of(session)
            if not tokens.has_proved(key):
                return KeyWanted(session, key)
            registry.use(session, wall)
        if not is_known:
            self._add_session(session, token, wall, now)
        tokens.accept(session, token, wall)
        return None if is_known else SessionJoined(session.id)

    def join(self, session: Session, token: bytes, wall: int, now: float) -> None:
        """Add a session that a request of this connection opened, refreshed or attached."""
        self._add_session(session, token, wall, now)
        self.tokens.accept_opened(session, token, wall, is_alone=not (self._held or self._lingering))

    def _add_session(self, session: Session, token: bytes, wall: int, now: float) -> None:
        due_at = now + max(0, session.expiring_at - wall) / MS
        # Before the open deadline the edge need not look: `handle_timeout` comes then.
        if due_at < self._session_deadline:
            self.deadline_moved = True
            self._session_deadline = due_at
        elif not self.sessions:
            self._session_deadline = due_at
        known = self.sessions.get(session.id)
        if known is None:
            known = self.sessions[session.id] = JoinedSession(
                token, session.user, session.expires_at, due_at, wall
            )
        else:  # refreshed
            self.tokens.forget(known.token)
            known.token, known.expires_at, known.due_at, known.cut_at = (
                token,
                session.expires_at,
                due_at,
                NEVER,
            )
        if self._decoder is not None:
            self._decoder.limit = self.limit

    def leave(self, session_id: str, now: float) -> None:
        """Remove an ended session. Without any session, the limits of a new connection apply again.

        Its requests in flight have a limit from now on: a thief's could wait long. Its streams are cut elsewhere.
        """
        left = self.sessions.pop(session_id, None)
        if left is None:
            return
        self.tokens.forget(left.token)
        ends_at = now + self.settings.open_timeout_s
        for request in self._held.values():
            session = None if isinstance(request, ServerStream) else request.session
            if session is not None and session.id == session_id:
                request.deadline = min(request.deadline, ends_at)
        self.deadline_moved = True
        if not self.sessions:
            if self._decoder is not None:
                self._decoder.limit = self.limit
            self._session_deadline = ends_at

    def suspend(self, session_id: str, token_digest: bytes, wall: int, now: float) -> bool:
        """Suspend a session that has a token with this digest now, unless it was shown here (zcp1.md, section 9.6).

        Return True if it is suspended from now on: it gets neither events nor calls, and its streams have a limit.
        """
        known = self.sessions.get(session_id)
        if known is None or known.cut_at != NEVER or digest_of(known.token) == token_digest:
            return False
        self.tokens.forget(known.token)  # if it becomes valid again it has to be shown again
        known.due_at, known.cut_at = NEVER, now + min(ROTATION_GRACE_S, max(0, known.expires_at - wall) / MS)
        self._session_deadline = min(self._session_deadline, _soon(known.cut_at, now))
        self.deadline_moved = True
        return True

    def is_suspended(self, session_id: str) -> bool:
        """Return whether a session is not used here, or not with its newest token."""
        known = self.sessions.get(session_id)
        return known is None or known.cut_at != NEVER

    def _handle_sessions(self, wall: int, now: float) -> list[ServerEvent]:
        """Do what is due for sessions used here: announce an expiry, let a token expire, end a suspension."""
        events: list[ServerEvent] = []
        for session_id, joined in [*self.sessions.items()]:
            if joined.cut_at <= now:
                events += self._lose(session_id, refusals.ROTATED, wall, now)
            elif joined.due_at <= now:
                if wall < joined.expires_at:
                    self._send_expiring(joined, wall, now)
                else:
                    joined.due_at = NEVER
                    self.registry.expire(session_id, wall)  # its observers may make this connection leave it
                    if session_id in self.sessions:  # the registry has forgotten it
                        body = refusals.SESSION_ENDED[Code.TOKEN_EXPIRED]
                        events += self._lose(session_id, body, wall, now)
        if self.sessions:
            dues = [min(joined.due_at, joined.cut_at) for joined in self.sessions.values()]
            self._session_deadline = _soon(min(dues), now)
        return events

    def _send_expiring(self, joined: JoinedSession, wall: int, now: float) -> None:
        """Send `session.expiring`, once."""
        joined.due_at = now + (joined.expires_at - wall) / MS
        body = encode_body(["session.expiring", {"expires_at": joined.expires_at}])
        self.outbox.send(EVENT, 0, joined.token, body, wall)

    def _lose(self, session_id: str, body: bytes, wall: int, now: float) -> list[ServerEvent]:
        """End the use of a session here; `body` cuts its streams."""
        cut = self._cut_streams(session_id, body, wall)
        self.leave(session_id, now)
        return [*cut, SessionLeft(session_id)]

    def session_revoked(self, session_id: str, reason: str, wall: int, now: float) -> None:
        """Send `session.revoked` for a session used here, and remove it."""
        known = self.sessions.get(session_id)
        if known is not None:
            self.outbox.send(
                EVENT, 0, known.token, encode_body(["session.revoked", {"reason": reason}]), wall
            )
        self.leave(session_id, now)

    # --- time -----------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return the latest time for the next `handle_timeout`, in monotonic seconds, or NEVER."""
        self.deadline_moved = False
        if self.state is _CLOSED:
            return NEVER
        soonest = min(self._session_deadline, self._silent_at())
        if self._streams is not None:
            soonest = min(soonest, self._streams.next_deadline())
        if self._calls is not None:
            soonest = min(soonest, self._calls.next_deadline())
        return min(soonest, *[held.deadline for held in self._held.values()]) if self._held else soonest

    def _silent_at(self) -> float:
        """Return when silence ends the connection. An incomplete frame has a limit of its own."""
        if self._decoder is not None and self._decoder.header_at is not None:
            return self._decoder.header_at[1] + self.settings.frame_timeout_s
        if self._streams is not None and self._streams.pinged_at > self._last_frame:
            return self._streams.pinged_at + PONG_TIMEOUT_S
        return self._last_frame + self.settings.idle_timeout_s

    def handle_timeout(self, wall: int, now: float, unsent: int = 0) -> list[ServerEvent]:
        """Handle due timers. An early call does nothing. `unsent` are bytes that wait in the transport."""
        if self.state is _CLOSED:
            return []
        overdue = [held for held in self._held.values() if held.deadline <= now]
        events: list[ServerEvent] = []
        for each in overdue:
            is_open = (
                isinstance(each, ServerStream) or each.session is None or each.session.id in self.sessions
            )
            events.append(
                self.cut(each, refusals.DEADLINE_EXCEEDED if is_open else refusals.SESSION_LEFT, wall)
            )
        events += self.withdraw_overdue(wall, now)
        streams = self._streams
        if streams is not None and streams.in_flight:
            slow = streams.take_slow(self._held, now)
            events += [self.cut(stream, refusals.SLOW, wall) for stream in slow]
            for session_id in streams.take_used(self._held, now) & self.sessions.keys():
                session = self.registry.check(self.sessions[session_id].token, wall)
                if isinstance(session, Session) and session.bound:
                    self.registry.use(session, wall)
        reason = None
        if self._session_deadline <= now and self.sessions:
            events += self._handle_sessions(wall, now)
        if self._session_deadline <= now:
            reason = GoAwayReason.NO_SESSION
            # Without an answer they would count as not run (zcp1.md, section 16).
            begun = [held for held in self._held.values() if held.session is not None]
            events += [self.cut(request, refusals.NO_SESSION, wall) for request in begun]
        elif self._silent_at() <= now:
            if self._decoder is not None and self._decoder.header_at is not None:
                reason = GoAwayReason.SLOW_FRAME
                unanswered = [*self._held.values()]  # likewise
                events += [self.cut(request, refusals.SLOW_FRAME, wall) for request in unanswered]
            elif streams is not None and streams.pinged_at > self._last_frame:
                if not streams.ping.has_advanced(streams.sent_bytes - unsent):
                    self.end()
                    return [*events, ConnectionEnded(None, PEER_SILENT)]
                streams.pinged_at = now
            elif streams is not None and streams.in_flight:
                self.outbox.send(PING, 0, NO_TOKEN, b"", wall)
                streams.pinged_at = now
                streams.ping = SentPing(streams.sent_bytes, streams.sent_bytes - unsent)
            elif self._held or self.has_calls:
                self._last_frame = now  # requests and calls in flight count as activity
            else:
                reason = GoAwayReason.IDLE
        if reason is not None:
            if self.state is State.OPEN:
                self._send_go_away(reason, 0, wall)
            self._enter(Input.END)
            events.append(ConnectionEnded(None, reason))
        return events

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

    def respond(self, request: Request, body: bytes, wall: int) -> bool:
        """Answer with an encoded result. Return False if the request was answered or the end came before."""
        return self._answer(RESPONSE, request, body, wall)

    def fail(self, request: Request, body: bytes, wall: int) -> bool:
        """Answer with an encoded error. Return False as `respond` does."""
        return self._answer(ERROR, request, body, wall)

    def _answer(self, head: int, request: Request, body: bytes, wall: int) -> bool:
        if (request.held and not self._release(request)) or self.state is _CLOSED:
            return False
        self.outbox.send(head, request.stream, request.token, body, wall)
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

    def cut(self, request: Request, body: bytes, wall: int) -> RequestEnded:
        """Answer a request in flight with an ERROR, although its method has not ended."""
        self._remove(request, lingers=True)
        # The handler may still run for a while; it counts against max_streams until it has ended.
        request.lingers = True
        self._lingering += 1
        reason = refusals.reason_in(body) if isinstance(request, ServerStream) else ""
        if isinstance(request, DurableStream) and not refusals.ends_run(reason, is_opener=request.is_opener):
            body = refusals.detaching(body, reason)
        self.outbox.send(ERROR, request.stream, request.token, body, wall)
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

    def cut_streams(self, session_id: str, code: Code, wall: int) -> list[RequestEnded]:
        """Cut the streams of a session that has ended."""
        return self._cut_streams(session_id, refusals.SESSION_ENDED[code], wall)

    def _cut_streams(self, session_id: str, body: bytes, wall: int) -> list[RequestEnded]:
        return [
            self.cut(stream, body, wall)
            for stream in self.open_streams()
            if stream.session is not None and stream.session.id == session_id
        ]

    def cut_denied(self, may_go_on: Callable[[ServerStream], bool], wall: int) -> list[RequestEnded]:
        """Cut the streams whose sessions may no longer call their methods."""
        denied = (stream for stream in self.open_streams() if not may_go_on(stream))
        return [self.cut(stream, refusals.DENIED, wall) for stream in denied]

    def accept(
        self, stream: DurableStream, run: Mapping[str, Any], wall: int, *, is_opener: bool = True
    ) -> None:
        """Send ACCEPTED: call this before the first item. `is_opener`: this session has started the run."""
        if not stream.is_answered:
            stream.is_accepted, stream.is_opener = True, is_opener
            self.outbox.send(ACCEPTED, stream.stream, stream.token, encode_body(run), wall)

    def send_item(self, stream: ServerStream, body: bytes, wall: int) -> int:
        """Send an encoded item, and return its `length`. Only in flight, and while the credit allows it."""
        length = MIN_LENGTH + len(body)
        credit, streams = stream.credit, self._streams
        credit.sent_items += 1  # `SendCredit.count` inlined
        credit.sent_bytes += length
        assert streams is not None
        streams.sent_bytes += length
        totals = streams.totals
        totals.items_sent += 1
        totals.bytes_sent += length
        self.outbox.send(ITEM, stream.stream, stream.token, body, wall)
        return length

    def grant(self, stream: ServerStream, wall: int) -> bool:
        """Send the credit that is due: call this when the method asks for an item, and when it has taken one.

        Return False if none is due.
        """
        if stream.items is None or stream.is_answered or self.state is _CLOSED:
            return False
        granted = stream.items.next_grant()
        if granted is None:
            return False
        self.outbox.send(CREDIT, stream.stream, stream.token, encode_body(granted), wall)
        return True

    # --- calls to the client --------------------------------------------------------------------

    @property
    def has_calls(self) -> bool:
        """Whether a call waits for its answer, offers of pending calls aside."""
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
        if known is None or known.cut_at != NEVER or self._calls is None or self.state is _CLOSED:
            raise no_handler(method)
        call = self._calls.begin(session_id, known.token, method, now + timeout_s)
        self.outbox.send(CALL, call.number, call.token, body, wall)
        self.deadline_moved = True
        return call

    def withdraw(self, call: ServerCall, wall: int) -> bool:
        """Stop waiting for an answer. Return False if the call did not wait."""
        assert self._calls is not None, "a call was made"
        if not self._calls.settle(call):
            return False
        if call.is_in_flight:
            self.outbox.send(WITHDRAW, call.number, call.token, b"", wall)
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
        if known is None or known.cut_at != NEVER or self.state is _CLOSED:
            return False
        body = encode_body([name, data])
        if len(body) > self.settings.max_body:
            raise MessageError(f"the event has {len(body)} bytes")
        self.outbox.send(EVENT, 0, known.token, body, wall)
        return True

    def announce(self, body: bytes, wall: int) -> None:
        """Send an event of the server itself (its encoded body), with a zero token."""
        self.outbox.send(EVENT, 0, NO_TOKEN, body, wall)

    # --- the end --------------------------------------------------------------------------------

    def go_away(self, reason: GoAwayReason, retry_after_ms: int, wall: int) -> None:
        """Send GOAWAY: requests in flight are still answered, new ones get UNAVAILABLE."""
        if self.state is State.OPEN:
            self._enter(Input.GOAWAY)
            self._send_go_away(reason, retry_after_ms, wall)

    def _send_go_away(self, reason: GoAwayReason, retry_after_ms: int, wall: int) -> None:
        body = encode_body({"reason": reason, "retry_after_ms": retry_after_ms})
        self.outbox.send(GOAWAY, 0, NO_TOKEN, body, wall)

    def end_with(
        self, code: Code, reason: str, wall: int, details: dict[str, Any] | None = None
    ) -> ConnectionEnded:
        """End the connection with a fatal error (zcp1.md, section 10.3)."""
        self.outbox.send(ERROR, 0, NO_TOKEN, encode_error(code, reason, details), wall)
        self._enter(Input.FATAL)
        return ConnectionEnded(code, reason)

    def end(self) -> None:
        """End the connection: the transport is gone, or will be closed after queued output."""
        self._enter(Input.END)
        if self._streams is not None:
            self._streams.end(self._held)

    def _enter(self, by: Input) -> None:
        self.state = next_state(self.state, by)
        self._is_fast = False
        if self.state is _CLOSED:
            self.outbox.close()

    def data_to_send(self) -> bytes:
        """Return and clear the queued output."""
        return self.outbox.take()


_RECEIVE: Final[
    dict[int, Callable[[ServerConnection, RawFrame, int, float], Iterable[ServerEvent] | None]]
] = {
    REQUEST: ServerConnection._receive_request,
    OPEN: ServerConnection._receive_request,
    CANCEL: ServerConnection._receive_cancel,
    PING: ServerConnection._receive_ping,
    PONG: ServerConnection._receive_pong,
    ITEM: ServerConnection._receive_on_stream,
    END: ServerConnection._receive_on_stream,
    CREDIT: ServerConnection._receive_on_stream,
    RESULT: ServerConnection._receive_answer,
    FAILURE: ServerConnection._receive_answer,
}
"""What processes a fresh frame, by its head."""
