"""Run the server end of a connection (sans-IO): bytes and time in; events, bytes and the next deadline out.

Decides freshness (salt, counter, timestamp), the session of a frame, the limits that apply, streams in flight,
deadlines, cancellation, and the end of the connection. Checks run in the order of the protocol (zcp1.md, section
8): header, freshness, stream in flight, token, body.

Rules:
- `receive_data` is lazy: each request is yielded before the next frame is parsed, so an answer that changes
  permissions (a session opened, closed or revoked) applies to the next frame of the same read.
- The edge must take all events of one call before the next call, and may pause in between while the peer does not
  read.
- A frame is judged by the clock at the arrival of its header, so a large one on a slow link is not stale.

It must not know: sockets, TLS, clocks, handlers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from zcproto.connection import refusals
from zcproto.connection.credit import SendCredit
from zcproto.connection.events import (
    NEVER,
    CallEnded,
    ConnectionEnded,
    FrameBuffered,
    FramesRead,
    GoAwayReason,
    KeyWanted,
    RawRequest,
    ServerEvent,
    ServerStream,
    SessionJoined,
    TokenUnknown,
)
from zcproto.connection.received_frames import REPORTED_FROM, ReceivedFrames
from zcproto.connection.sent_ping import SentPing
from zcproto.connection.server_calls import read_answer
from zcproto.connection.server_output import ConnectionTotals
from zcproto.connection.server_sessions import ALWAYS, NO_KEYS, Edge, ServerSessions
from zcproto.connection.server_streams import PONG_TIMEOUT_S
from zcproto.connection.settings import ConnectionSettings
from zcproto.connection.state import Input, State
from zcproto.errors import Code, ProtocolError
from zcproto.sessions import Session, SessionRegistry
from zcproto.sessions.session import DEVICE_KEY
from zcproto.wire.frame import (
    CANCEL,
    CREDIT,
    ERROR,
    FAILURE,
    HEADER_SIZE,
    ITEM,
    NO_TOKEN,
    OPEN,
    PING,
    PONG,
    REQUEST,
    RESULT,
    WELCOME,
    encode_frame,
)
from zcproto.wire.message import (
    NO_META,
    MessageError,
    code_in,
    decode_open,
    decode_request,
    encode_error,
)
from zcproto.wire.usual import RequestRules, UsualRequest, read_request

MS: Final = 1000
PEER_SILENT: Final = "peer_silent"
"""Reason of the end of a connection with streams whose client does not answer a PING."""

SILENT_FRAMES: Final = 16
"""Frames that are processed in a row without an event, for the edge to share its time among connections."""
FRAMES_READ: Final = FramesRead(SILENT_FRAMES)

ATTACH: Final = "session.attach"
"""The only method allowed with a bound token whose key is not proved."""

_WITH_BODY: Final = frozenset({REQUEST, OPEN, ITEM, CREDIT, RESULT, FAILURE})
_CLOSED: Final = State.CLOSED  # members of an enumeration are slow to look up
_OPEN: Final = State.OPEN
_DRAINING: Final = State.DRAINING
_READING: Final = frozenset({State.OPEN, State.DRAINING})


class ServerConnection(ServerSessions):
    """The connection of one client.

    Args:
        salt: 8 random bytes, unique to this connection and covered by signatures of devices.
        totals: counters; connections may share them.
        edge: asked when a token is first used here. An object, because a bound method costs each connection memory.

    Output accumulates until `data_to_send`. `deadline_moved`: `next_deadline` may be earlier, or `wasted` grew. The
    first deadline is `settings.first_timeout_s` after `now`.
    """

    __slots__ = ("_last_frame", "wasted")

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
        self.salt = salt
        self.totals = ConnectionTotals() if totals is None else totals
        self.edge = edge
        self.state = _OPEN
        self.deadline_moved = False
        self.wasted = 0  # PINGs, and frames that were refused or had no effect, until the edge resets it
        self.sessions = {}
        self._decoder = None  # once there was another than a usual frame
        self._counter = 1  # of the next frame sent; WELCOME is frame 0
        self._last_counter = 0  # the first client frame has 1 or more
        self._last_frame = now
        self._token = NO_TOKEN  # last accepted: most checks are one comparison
        self._session = None
        self._rules = None  # of usual requests, until they change
        self._others = None  # once there were several tokens
        self._seen_generation = registry.generation
        self._accepts_joined = True  # no token became invalid since requests are held
        self._recheck_at = ALWAYS
        self._proved = NO_KEYS  # keys of bound sessions usable here
        self._session_deadline = now + settings.open_timeout_s
        self._held = {}
        self._lingering = 0  # answered early, with their handlers still running
        self._streams = None  # once there was an OPEN
        self._calls = None  # once there was a session.handle
        self._out = [encode_frame(WELCOME, 0, wall, salt, 0, NO_TOKEN, settings.welcome_body)]

    # --- input ----------------------------------------------------------------------------------

    def receive_data(self, data: bytes, wall: int, now: float) -> Iterator[ServerEvent] | tuple[RawRequest]:
        """Process decrypted bytes and yield their events, one at a time; a single request may come in a tuple."""
        # Fast paths: usual requests without special conditions. Same results as `_events`, at less cost.
        rules = self._rules
        if rules is None:
            decoder = self._decoder
            if (
                decoder is None or (decoder.partial is None and not decoder.stale_in_a_row)
            ) and self.state is _OPEN:
                self._rules = rules = self._new_rules()
        if rules is not None:
            found = read_request(data, 0, rules, self._last_counter, wall)
            if found is None and self._others:
                found, rules = self._read_other(data, 0, wall), self._rules or rules
            if found is not None and (
                (wall < self._recheck_at and self.registry.generation == self._seen_generation)
                or self._is_accepted(wall)
            ):
                event, counter, following = found
                if following:
                    return self._usual_events(found, rules, data, wall, now)
                if not (self._held or self._lingering) or self._has_room(event[0]):
                    self._last_counter = counter
                    self._last_frame = now
                    return (event,)
        return self._events(data, wall, now)

    def _has_room(self, stream: int) -> bool:
        """Return whether a request may run beside those in flight."""
        return stream not in self._held and len(self._held) + self._lingering < self.settings.max_streams

    def _usual_events(
        self, found: UsualRequest | None, rules: RequestRules, data: bytes, wall: int, now: float
    ) -> Iterator[ServerEvent]:
        """Yield the events of bytes that begin with a usual request, up to a special condition by `_events`."""
        registry, held = self.registry, self._held
        generation, at = self._seen_generation, 0
        self._last_frame = now
        while found is not None:
            # An earlier request of this read may have changed each of these.
            while (
                found is not None
                and rules is self._rules
                and registry.generation == generation
                and (not (held or self._lingering) or self._has_room(found[0][0]))
            ):
                event, self._last_counter, at = found
                yield event
                if not at:
                    return
                found = read_request(data, at, rules, self._last_counter, wall)
            if found is not None or not self._others:
                break
            found = self._read_other(data, at, wall)
            rules, generation = self._rules or rules, self._seen_generation
        yield from self._events(data[at:] if at else data, wall, now)

    def _events(self, data: bytes, wall: int, now: float) -> Iterator[ServerEvent]:
        """Yield the events of bytes outside the fast paths."""
        if self.state not in _READING:
            return
        self._rules = None
        registry = self.registry
        tolerance = self.settings.tolerance_ms
        max_depth = self.settings.max_depth
        looks_up = self.settings.looks_up
        own_salt = self.salt
        decoder = self._decoder
        if decoder is None:
            decoder = self._decoder = ReceivedFrames(self.limit, self.settings.accepted)
        judged_at = wall
        silent = 0  # frames since the last FRAMES_READ that were not yielded
        decoder.feed(data)
        if decoder.header_at is not None:
            if decoder.expected:
                if decoder.reported < decoder.buffered >= REPORTED_FROM:
                    yield self._frame_buffered(decoder, now)
                return
            judged_at, decoder.header_at = decoder.header_at[0], None
        try:
            for length, head, stream, timestamp, salt, counter, token, body in decoder.frames():
                if salt != own_salt or counter <= self._last_counter:
                    what = "belongs to another connection" if salt != own_salt else "counter did not grow"
                    yield self.end_with(Code.REPLAYED, f"nonce {what}", wall)
                    return
                self._last_counter = counter
                self._last_frame = now
                silent += 1
                if silent > SILENT_FRAMES:
                    silent = 1
                    yield FRAMES_READ
                    if self.state is _CLOSED:
                        return
                if not -tolerance <= judged_at - timestamp <= tolerance:
                    decoder.stale_in_a_row += 1
                    ended = self._refuse_stale(decoder.stale_in_a_row, head, stream, token, wall)
                    if ended is not None:
                        yield ended
                        if self.state is _CLOSED:
                            return
                    if head != CANCEL:  # not a replay, because its counter is new; cancelling is safe
                        judged_at = wall
                        continue
                else:
                    decoder.stale_in_a_row = 0
                judged_at = wall
                if head not in (REQUEST, OPEN):
                    if body and head not in _WITH_BODY:
                        yield self.end_with(Code.PROTOCOL_ERROR, "this kind of frame has no body", wall)
                        return
                    if head == PING:
                        self._send(PONG, 0, token, b"", wall)
                        self._waste()
                    elif head == PONG:  # the server sends a PING after long silence
                        self._waste()
                    elif head == CANCEL:
                        held = self._held.get(stream)
                        if held is not None and held.token == token:
                            is_stream = isinstance(held, ServerStream)
                            silent -= 1
                            yield self._cut(held, refusals.LEFT if is_stream else refusals.CANCELLED, wall)
                        else:
                            self._waste()
                    else:
                        if head >= RESULT:
                            event: ServerEvent | None = self._receive_answer(head, stream, token, body)
                        else:
                            event = self._receive_on_stream(head, stream, token, body, wall, now)
                        if event is not None:
                            silent -= 1
                            yield event
                    continue
                if self._held and stream in self._held:
                    yield self.end_with(Code.PROTOCOL_ERROR, "stream is in flight", wall)
                    return
                if token != self._token or not self._is_accepted(wall):
                    joined = self._session_of(token, wall, now)
                    if looks_up and isinstance(joined, bytes) and joined in refusals.LOOKED_UP:
                        unknown = TokenUnknown(token, refusals.LOOKED_UP[joined])
                        yield unknown
                        if self.state is _CLOSED:
                            return
                        joined = unknown.refusal or self._session_of(token, wall, now)
                    if joined is not None:  # None: valid, and used here before
                        if isinstance(joined, KeyWanted):
                            yield joined  # the edge may be able to verify the key at once
                            joined = self._session_of(token, wall, now)
                        if isinstance(joined, SessionJoined):
                            yield joined
                            if registry.generation != self._seen_generation:  # the session may have ended
                                joined = self._session_of(token, wall, now)
                        if isinstance(joined, KeyWanted):
                            request = self._attaching(joined, head, length, stream, token, body, wall)
                            if request is not None:
                                silent -= 1
                                yield request
                                if self.state is _CLOSED:  # ended by the edge
                                    return
                            continue
                        if isinstance(joined, bytes):
                            self._refuse("token", stream, token, joined, wall)
                            continue
                session = self._session
                if (
                    self._held or self._lingering or session is None or self.state is _DRAINING
                ) and self._is_refused(head, length, stream, token, session, wall):
                    continue
                credit = None
                try:
                    if head == REQUEST:
                        method, params, meta = decode_request(body, max_depth)
                    else:
                        method, params, meta, credit = decode_open(body, max_depth)
                except MessageError as error:
                    malformed = encode_error(Code.INVALID_ARGUMENT, str(error))
                    self._refuse("malformed", stream, token, malformed, wall)
                    continue
                if meta is not NO_META and meta.deadline_ms is not None and meta.deadline_ms <= 0:
                    self._refuse("deadline", stream, token, refusals.DEADLINE_EXCEEDED, wall)
                    continue
                silent -= 1
                if credit is None:
                    yield stream, token, session, method, params, meta
                else:
                    opened = ServerStream(stream, token, session, method, params, meta)
                    opened.credit = SendCredit(credit)
                    yield opened
                if self.state is _CLOSED:  # ended by the edge
                    return
            buffered = decoder.buffered
            if buffered >= HEADER_SIZE:
                decoder.header_at = wall, now
                self.deadline_moved = True
            if decoder.reported or buffered >= REPORTED_FROM:
                yield self._frame_buffered(decoder, now)
        except ProtocolError as error:
            yield self.end_with(error.code, error.reason, wall)

    def _frame_buffered(self, decoder: ReceivedFrames, now: float) -> FrameBuffered:
        """Report an incomplete frame."""
        user = next((joined.user for joined in self.sessions.values()), "")
        return FrameBuffered(decoder.report(), decoder.header_at[1] if decoder.header_at else now, user)

    def _refuse_stale(
        self, in_a_row: int, head: int, stream: int, token: bytes, wall: int
    ) -> ServerEvent | None:
        """Refuse a stale frame. Return what ends: the connection at the limit of consecutive ones, or a stream."""
        if in_a_row >= self.settings.max_stale_in_a_row:
            return self.end_with(Code.STALE_TIMESTAMP, "ten stale frames in a row: set the clock", wall)
        if head >= RESULT:  # the deadline of the call ends the waiting
            if self._calls is not None:
                self._calls.free(stream, token)
            self.totals.dropped_answers += 1
            self._waste()
            return None
        held = self._held.get(stream) if head >= ITEM else None
        if isinstance(held, ServerStream):  # a lost item or credit would go unnoticed
            return self._cut(held, refusals.stale_on_stream(wall), wall)
        if head in (REQUEST, OPEN):
            self._refuse("stale", stream, token, refusals.stale(wall), wall)
        elif head != CANCEL:
            self.totals.dropped_stale += 1
            self._waste()
        return None

    def _waste(self) -> None:
        """Count a frame without effect, for which the edge slows the peer down."""
        self.wasted += 1
        self.deadline_moved = True

    def _receive_on_stream(
        self, head: int, stream: int, token: bytes, body: bytes, wall: int, now: float
    ) -> ServerEvent | None:
        """Process an ITEM, END or CREDIT. Raises ProtocolError if it ends the connection."""
        held = self._held.get(stream)
        outcome = self.streams(now).receive(head, held, token, body)
        if isinstance(outcome, bool):
            if not outcome:
                self._waste()
            return None
        if not isinstance(outcome, bytes):
            return outcome
        assert held is not None, "only a stream in flight can be cut"
        return self._cut(held, outcome, wall)

    def _receive_answer(self, head: int, number: int, token: bytes, body: bytes) -> CallEnded | None:
        """Process a RESULT or FAILURE; None if it is dropped."""
        call = None if self._calls is None else self._calls.free(number, token)
        if call is None:
            self._waste()
        elif self._calls is not None and self._calls.settle(call):
            return CallEnded(call, *read_answer(head, body, self.settings.max_depth))
        self.totals.dropped_answers += 1
        return None

    def _attaching(
        self, wanted: KeyWanted, head: int, length: int, stream: int, token: bytes, body: bytes, wall: int
    ) -> RawRequest | None:
        """Return a `session.attach` request for a token whose key is not proved; refuse any other.

        A body too large for a connection without a session is not decoded.
        """
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
        self._waste()
        self._send(ERROR, stream, token, body, wall)

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
        events: list[ServerEvent] = [self._cut(each, refusals.DEADLINE_EXCEEDED, wall) for each in overdue]
        events += self.withdraw_overdue(wall, now)
        streams = self._streams
        if streams is not None and streams.in_flight:
            slow = streams.take_slow(self._held, now)
            events += [self._cut(stream, refusals.SLOW, wall) for stream in slow]
            streams.touch(self._held, self.sessions, self.registry, wall, now)
        reason = None
        if self._session_deadline <= now and self.sessions:
            events += self._handle_sessions(wall, now)
        if self._session_deadline <= now:
            reason = GoAwayReason.NO_SESSION
            # Without an answer they would count as not run (zcp1.md, section 16).
            begun = [held for held in self._held.values() if held.session is not None]
            events += [self._cut(request, refusals.NO_SESSION, wall) for request in begun]
        elif self._silent_at() <= now:
            if self._decoder is not None and self._decoder.header_at is not None:
                reason = GoAwayReason.SLOW_FRAME
                unanswered = [*self._held.values()]  # likewise
                events += [self._cut(request, refusals.SLOW_FRAME, wall) for request in unanswered]
            elif streams is not None and streams.pinged_at > self._last_frame:
                if not streams.ping.has_advanced(streams.sent_bytes - unsent):
                    self.end()
                    return [*events, ConnectionEnded(None, PEER_SILENT)]
                streams.pinged_at = now
            elif streams is not None and streams.in_flight:
                self._send(PING, 0, NO_TOKEN, b"", wall)
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
