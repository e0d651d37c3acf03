"""Run the client end of a connection (sans-IO): bytes and time in; events, bytes and the next deadline out.

Decides the greeting, the clock offset, freshness of server frames, the request of an answer, what may be sent now
(streams in flight, frame size), keepalive, and the end of the connection.

Rules where the specification leaves the choice to the client:
- A client has no ERROR frame to send. After an error of the server it ends the connection and reports the reason.
- A RESPONSE or ERROR with an undecodable body fails its own call with INTERNAL, because it may have run. An
  undecodable WELCOME, GOAWAY, EVENT or ERROR on stream 0 ends the connection.
- A frame is judged by the clock at the arrival of its header, so a large one on a slow link is not stale.
- A stale answer fails its call with DATA_LOSS; any other stale frame is dropped and counted. The tenth in a row
  ends the connection. ERROR STALE_TIMESTAMP is processed whatever its timestamp: it corrects the clock offset.
- The bytes of an incomplete frame count as a sign of life, until it has taken FRAME_TIMEOUT.
- Until a RESPONSE shows that the server accepted a token here, the frame limit of a connection without a session
  applies to requests.
- At most one PONG waits to be sent. It answers all PINGs that arrive until then, so that a server that sends PINGs
  and reads nothing cannot fill the memory.
- Frames that answer no request are read at a limited rate: a server that floods them gets back-pressure.

It must not know: sockets, TLS, clocks, retries, sessions beyond their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from zcproto.connection.events import (
    NEVER,
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.connection.settings import read_welcome
from zcproto.connection.state import Input, State, next_state
from zcproto.errors import (
    Code,
    ConnectionClosed,
    InvalidArgument,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER,
    HEADER_SIZE,
    MAX_STREAM,
    MIN_LENGTH,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    TOKEN_SIZE,
    WELCOME,
    RawFrame,
    Side,
)
from zcproto.wire.message import (
    DEFAULT_MAX_DEPTH,
    MessageError,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    encode_request,
)

MS: Final = 1000
MAX_FRAME_BEFORE_SESSION: Final = 16_384
"""Maximum `length` on a connection without a session, in both directions (zcp1.md, section 13)."""

MAX_STALE_IN_A_ROW: Final = 10
MAX_SERVER_TIME: Final = 2**62
"""Maximum clock of a server: timestamps derived from a later one could exceed 64 bits."""

OPENING_METHODS: Final = frozenset({"session.open", "session.refresh"})
"""Methods sent without a token, whose result contains one."""

PONG_TIMEOUT: Final = 10.0
"""Seconds of silence after a PING until the connection is considered dead."""

FRAME_TIMEOUT: Final = 300.0
"""Seconds from the header of a frame to its last byte, until the connection is considered dead."""

MIN_KEEPALIVE_INTERVAL: Final = 0.25
"""Seconds. Prevents a server with a tiny idle timeout from causing a flood of PINGs."""

UNREQUESTED_PER_S: Final = 4_000
"""Rate at which frames that answer no request are read in the long run. Each 2 KiB of body count as one more."""

UNREQUESTED_BURST: Final = 8_000
"""Number of such frames that are read without a pause."""

_UNREQUESTED_BYTES: Final = 2_048

STALE_ANSWER: Final = "the answer was delayed for too long; check whether the request took effect"

DEAD_TOKEN_CODES: Final = frozenset(
    {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}
)

_ANSWERS: Final = frozenset({RESPONSE, ERROR})
_OPENING: Final = b""  # in place of a token: the request has none and its result contains one
_pack_header = HEADER.pack


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class ClientConnection:
    """One connection to a server.

    Args:
        max_frame: maximum `length` accepted from the server.
        tolerance_ms: maximum difference between its timestamps and our estimate of its clock.
        max_depth: maximum nesting of its bodies.

    Requests are allowed after the `Welcomed` event. Output accumulates until `data_to_send`. `welcome` is the
    map of WELCOME, unknown keys included; it is shared between connections, so do not modify it.
    `salt` is covered by signatures of devices; it is empty before WELCOME. `clock_offset_ms` is the server's
    clock minus ours. `dropped_stale` and `dropped_unknown` count dropped stale frames and answers to unknown
    streams. Set `is_output_blocked` while the transport cannot send, and call `unblock_output` afterwards.
    """

    max_frame: int = 1_048_576
    tolerance_ms: int = 30_000
    max_depth: int = DEFAULT_MAX_DEPTH
    salt: bytes = field(default=b"", init=False)
    clock_offset_ms: int = field(default=0, init=False)
    dropped_stale: int = field(default=0, init=False)
    dropped_unknown: int = field(default=0, init=False)
    queued_bytes: int = field(default=0, init=False)
    is_output_blocked: bool = field(default=False, init=False)
    welcome: dict[str, Any] = field(default_factory=dict, init=False)
    state: State = field(default=State.AWAITING_WELCOME, init=False)
    _decoder: FrameDecoder = field(init=False)
    _counter: int = field(default=0, init=False)  # of the last frame sent; the first has 1
    _last_counter: int = field(default=0, init=False)  # WELCOME is frame 0
    _partial: tuple[int, float] | None = field(default=None, init=False)  # of a header: wall, now
    _stale_in_a_row: int = field(default=0, init=False)
    _next_stream: int = field(default=1, init=False)
    _in_flight: dict[int, bytes] = field(default_factory=dict, init=False)  # stream -> token of its request
    _tokens: set[bytes] = field(default_factory=set, init=False)  # accepted by the server on this connection
    _out: list[bytes] = field(default_factory=list, init=False)
    _owes_pong: bytes | None = field(default=None, init=False)  # token of the latest unanswered PING
    _unrequested: float = field(
        default=0.0, init=False
    )  # of UNREQUESTED_BURST, at the time of `_unrequested_at`
    _unrequested_at: float = field(default=0.0, init=False)
    _last_heard: float = field(default=0.0, init=False)
    _sent_since_check: bool = field(default=False, init=False)
    _keepalive_interval: float = field(default=NEVER, init=False)
    _keepalive_at: float = field(default=NEVER, init=False)
    _pong_deadline: float = field(default=NEVER, init=False)

    def __post_init__(self) -> None:
        self._decoder = FrameDecoder(Side.CLIENT, min(self.max_frame, MAX_FRAME_BEFORE_SESSION))

    # --- input ----------------------------------------------------------------------------------

    def receive_data(self, data: bytes, wall: int, now: float) -> Iterator[ClientEvent]:
        """Process decrypted bytes and yield their events, one at a time.

        `wall` is our own clock. Take all events of one call before the next call, and none after `end`.
        """
        if self.state is State.CLOSED:
            return
        decoder = self._decoder
        next_frame = decoder.next_frame
        in_flight = self._in_flight
        decoder.feed(data)
        judged_at = wall
        if self._partial is not None:
            if decoder.expected:
                if now >= self._partial[1] + FRAME_TIMEOUT:
                    yield self._end_with(None, "a frame of the server took too long to arrive")
                self._last_heard = now
                return
            judged_at, self._partial = self._partial[0], None
        while True:
            try:
                frame = next_frame()
            except ProtocolError as error:
                yield self._end_with(error.code, error.reason)
                return
            if frame is None:
                if decoder.buffered >= HEADER_SIZE:
                    self._partial = wall, now
                if self._owes_pong is not None and not self.is_output_blocked:
                    self._send_pong(wall)
                return
            _, head, stream, timestamp, salt, counter, token, body = frame
            if salt != self.salt or counter <= self._last_counter:
                # Includes WELCOME: before it no salt matches.
                first = self._out_of_order(frame, wall, now)
                yield first
                if first.__class__ is ConnectionEnded:
                    return
                continue
            self._last_counter = counter
            tolerance = self.tolerance_ms
            is_fresh = -tolerance <= judged_at + self.clock_offset_ms - timestamp <= tolerance
            judged_at = wall
            if not (is_fresh or self._corrects_clock(head, body)):
                self._stale_in_a_row += 1
                if self._stale_in_a_row >= MAX_STALE_IN_A_ROW:
                    yield self._end_with(Code.STALE_TIMESTAMP, "ten stale frames in a row")
                    return
                if head in _ANSWERS and in_flight.pop(stream, None) is not None:
                    yield ErrorReceived(stream, Code.DATA_LOSS, STALE_ANSWER, {})
                else:
                    self.dropped_stale += 1
                continue
            self._stale_in_a_row = 0
            self._last_heard = now
            if head == RESPONSE:
                sent_with = in_flight.pop(stream, None)
                if sent_with is None:
                    self._count_unrequested(body, now)
                    self.dropped_unknown += 1
                    continue
                try:
                    value = decode_body(body, self.max_depth)
                except MessageError as error:
                    yield ErrorReceived(stream, Code.INTERNAL, f"the answer cannot be read: {error}", {})
                    continue
                if sent_with not in self._tokens:
                    self._add_token(sent_with, value)
                yield ResponseReceived(stream, value)
                continue
            if stream not in in_flight:
                self._count_unrequested(body, now)
            try:
                event = self._received_other(head, stream, token, body, wall)
            except ProtocolError as error:
                yield self._end_with(error.code, error.reason)
                return
            if event is not None:
                yield event
                if event.__class__ is ConnectionEnded:
                    return

    def _received_other(
        self, head: int, stream: int, token: bytes, body: bytes, wall: int
    ) -> ClientEvent | None:
        """Process a fresh frame other than RESPONSE. Raises ProtocolError if it ends the connection."""
        if head == ERROR:
            return self._received_error(stream, body, wall)
        if head == EVENT:
            try:
                name, data = decode_event(body, self.max_depth)
            except MessageError as error:
                raise ProtocolError(Code.PROTOCOL_ERROR, f"EVENT cannot be read: {error}") from error
            if name == "session.revoked":
                self._tokens.discard(token)
            return EventReceived(name, data, token, body)
        if head == GOAWAY:
            return self._received_go_away(body)
        if head == WELCOME:
            raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME came twice")
        if body:
            raise ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame has no body")
        if head == PING:
            self._owes_pong = token
        else:
            self._pong_deadline = NEVER
        return None

    def _count_unrequested(self, body: bytes, now: float) -> None:
        left = self._unrequested - (now - self._unrequested_at) * UNREQUESTED_PER_S
        self._unrequested = max(left, 0.0) + 1 + len(body) / _UNREQUESTED_BYTES
        self._unrequested_at = now

    def reading_delay(self, now: float) -> float:
        """Return the seconds for which to stop reading, because of a flood of frames that answer no request."""
        if self._unrequested <= UNREQUESTED_BURST:
            return 0.0
        return (self._unrequested - UNREQUESTED_BURST) / UNREQUESTED_PER_S - (now - self._unrequested_at)

    def _received_error(self, stream: int, body: bytes, wall: int) -> ClientEvent | None:
        try:
            code, message, details = decode_error(body, self.max_depth)
        except MessageError as error:
            if not stream:
                raise ProtocolError(Code.PROTOCOL_ERROR, f"ERROR cannot be read: {error}") from error
            code, message, details = Code.INTERNAL, f"the answer cannot be read: {error}", {}
        if code == Code.STALE_TIMESTAMP:
            self._correct_clock(details, wall)
        if not stream:
            self.state = next_state(self.state, Input.FATAL)
            return ConnectionEnded(_code_of(code), message)
        sent_with = self._in_flight.pop(stream, None)
        if sent_with is None:
            self.dropped_unknown += 1
            return None
        if code in DEAD_TOKEN_CODES:
            self._tokens.discard(sent_with)
        return ErrorReceived(stream, code, message, details)

    def _received_go_away(self, body: bytes) -> GoAwayReceived:
        try:
            goaway = decode_map(body, self.max_depth)
        except MessageError as error:
            raise ProtocolError(Code.PROTOCOL_ERROR, f"GOAWAY cannot be read: {error}") from error
        reason = goaway.get("reason")
        retry_after_ms = goaway.get("retry_after_ms")
        if reason.__class__ is not str or retry_after_ms.__class__ is not int or retry_after_ms < 0:
            raise ProtocolError(Code.PROTOCOL_ERROR, "GOAWAY must have a reason and retry_after_ms")
        self.state = next_state(self.state, Input.GOAWAY)
        return GoAwayReceived(reason, retry_after_ms)

    def _out_of_order(self, frame: RawFrame, wall: int, now: float) -> ClientEvent:
        """Process WELCOME if it is the first frame; end the connection otherwise."""
        if self.state is State.AWAITING_WELCOME:
            return self._received_first(frame, wall, now)
        if frame[4] != self.salt:
            return self._end_with(Code.REPLAYED, "nonce belongs to another connection")
        return self._end_with(Code.REPLAYED, "nonce counter did not grow")

    def _received_first(self, frame: RawFrame, wall: int, now: float) -> ClientEvent:
        _, head, _, timestamp, salt, counter, _, body = frame
        if head != WELCOME:
            return self._end_with(Code.PROTOCOL_ERROR, "the first frame is not WELCOME")
        if counter != 0:
            return self._end_with(Code.PROTOCOL_ERROR, "WELCOME must have counter 0")
        if timestamp > MAX_SERVER_TIME:
            return self._end_with(Code.PROTOCOL_ERROR, "the server's clock is out of range")
        try:
            self.welcome = read_welcome(body, self.max_depth)
        except ProtocolError as error:
            return self._end_with(error.code, error.reason)
        self.salt = salt
        self.clock_offset_ms = timestamp - wall
        self._decoder.limit = self.max_frame
        self._last_heard = now
        idle_timeout_ms = self.welcome["idle_timeout_ms"]
        if idle_timeout_ms:
            self._keepalive_interval = max(idle_timeout_ms / 3 / MS, MIN_KEEPALIVE_INTERVAL)
            self._keepalive_at = now + self._keepalive_interval
        self.state = next_state(self.state, Input.WELCOME)
        return Welcomed(self.welcome)

    # --- clock ----------------------------------------------------------------------------------

    def _corrects_clock(self, head: int, body: bytes) -> bool:
        """Return True if a stale frame is an ERROR STALE_TIMESTAMP, which must be processed."""
        if head != ERROR:
            return False
        try:
            return decode_error(body, self.max_depth).code == Code.STALE_TIMESTAMP
        except MessageError:
            return False  # dropped like any other stale frame

    def _correct_clock(self, details: Mapping[str, Any], wall: int) -> None:
        server_time = details.get("server_time")
        if server_time.__class__ is int and 0 <= server_time <= MAX_SERVER_TIME:
            self.clock_offset_ms = server_time - wall

    # --- requests -------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        *,
        token: bytes = NO_TOKEN,
        meta: Mapping[str, Any] | None = None,
        wall: int,
    ) -> int:
        """Queue a REQUEST. Return its stream, which identifies the answer.

        Methods that open a session are sent without a token, whatever `token` is.

        Raises:
            InvalidArgument: the request cannot be encoded, or is too large (details `size` and `limit`).
            ResourceExhausted: the server's limit of requests in flight is reached.
            Unavailable: before WELCOME or after GOAWAY.
            ConnectionClosed: after the end.
        """
        in_flight = self._in_flight
        if self.state is not State.OPEN:
            self._refuse_request()
        if len(in_flight) >= self.welcome["max_streams"]:
            raise ResourceExhausted("too many requests in flight on this connection")
        try:
            body = encode_request(method, params, meta)
        except MessageError as error:
            raise InvalidArgument(str(error)) from error
        size = MIN_LENGTH + len(body)
        if size > MAX_FRAME_BEFORE_SESSION or size > self.welcome["max_frame"]:
            self._check_size(size)
        stream = self._next_stream
        while stream in in_flight:
            stream = 1 if stream == MAX_STREAM else stream + 1
        self._next_stream = 1 if stream == MAX_STREAM else stream + 1
        if method in OPENING_METHODS:
            in_flight[stream] = _OPENING
            token = NO_TOKEN
        else:
            in_flight[stream] = token
        self._send(REQUEST, stream, token, body, wall)
        return stream

    def _refuse_request(self) -> None:
        if self.state is State.DRAINING:
            raise Unavailable("the server accepts no new requests on this connection; reconnect")
        if self.state is State.CLOSED:
            raise ConnectionClosed("the connection has ended")
        raise Unavailable("the server has not sent its WELCOME yet")

    def _check_size(self, size: int) -> None:
        limit = self.send_limit
        if size > limit:
            raise InvalidArgument(
                f"the request has {size} bytes; the server accepts at most {limit}",
                {"size": size, "limit": limit},
            )

    @property
    def send_limit(self) -> int:
        """Return the maximum `length` that the server accepts now."""
        max_frame: int = self.welcome["max_frame"]
        return max_frame if self._tokens else min(max_frame, MAX_FRAME_BEFORE_SESSION)

    @property
    def has_session(self) -> bool:
        """Return True if the server has accepted a token on this connection."""
        return bool(self._tokens)

    @property
    def in_flight(self) -> int:
        """Return the number of unanswered requests."""
        return len(self._in_flight)

    def _add_token(self, token: bytes, value: Any) -> None:
        """Record the token that a RESPONSE shows to be accepted, or contains."""
        accepted = value.get("token") if token == _OPENING and value.__class__ is dict else token
        if isinstance(accepted, bytes) and len(accepted) == TOKEN_SIZE and accepted != NO_TOKEN:
            self._tokens.add(accepted)

    def session_ended(self, token: bytes) -> None:
        """Apply the limits of a connection without a session again, if this was its session."""
        self._tokens.discard(token)

    def cancel(self, stream: int, wall: int) -> None:
        """Queue a CANCEL. The request stays in flight until its answer arrives."""
        token = self._in_flight.get(stream)
        if token is not None and self.state is not State.CLOSED:
            self._send(CANCEL, stream, token or NO_TOKEN, b"", wall)

    # --- time -----------------------------------------------------------------------------------

    def ping(self, wall: int) -> None:
        if self.state in (State.OPEN, State.DRAINING):
            self._send(PING, 0, NO_TOKEN, b"", wall)

    def next_deadline(self) -> float:
        """Return the latest time for the next `handle_timeout`, in monotonic seconds, or NEVER.

        It changes only with WELCOME and with each `handle_timeout`.
        """
        if self.state is State.CLOSED:
            return NEVER
        return min(self._keepalive_at, self._pong_deadline)

    def handle_timeout(self, wall: int, now: float) -> list[ClientEvent]:
        """Send a PING after a silence, or end the connection after a PING without answer.

        Checks the connection at intervals of a third of the server's idle timeout. A PING is sent if nothing was
        sent or nothing was received since the last check, so a silence is shorter than two thirds of it. An
        early call does nothing.
        """
        if self.state is State.CLOSED:
            return []
        if self._pong_deadline <= now:
            if self._last_heard <= self._pong_deadline - PONG_TIMEOUT:
                return [self._end_with(None, "the server did not answer a PING")]
            self._pong_deadline = NEVER  # other frames have arrived since
        if self._keepalive_at <= now:
            heard_since_check = self._last_heard > self._keepalive_at - self._keepalive_interval
            if not (self._sent_since_check and heard_since_check):
                if not self.is_output_blocked:
                    self.ping(wall)
                if self._pong_deadline == NEVER:
                    self._pong_deadline = now + PONG_TIMEOUT
            self._sent_since_check = False
            self._keepalive_at = now + self._keepalive_interval
        return []

    # --- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """End the connection: the transport is gone, or will be closed after queued output."""
        self.state = next_state(self.state, Input.END)

    def _end_with(self, code: Code | None, reason: str) -> ConnectionEnded:
        self.state = next_state(self.state, Input.FATAL)
        return ConnectionEnded(code, reason)

    # --- output ---------------------------------------------------------------------------------

    def unblock_output(self, wall: int) -> None:
        """Send what waited for the transport. Call this when it can send again."""
        self.is_output_blocked = False
        if self._owes_pong is not None and self.state is not State.CLOSED:
            self._send_pong(wall)

    def _send_pong(self, wall: int) -> None:
        assert self._owes_pong is not None
        self._send(PONG, 0, self._owes_pong, b"", wall)
        self._owes_pong = None

    def _send(self, head: int, stream: int, token: bytes, body: bytes, wall: int) -> None:
        counter = self._counter + 1
        self._counter = counter
        self._sent_since_check = True
        # Never negative, even if our clock goes back by more than the server's time.
        timestamp = max(wall + self.clock_offset_ms, 0)
        length = MIN_LENGTH + len(body)
        self.queued_bytes += length
        self._out.append(_pack_header(length, head, stream, timestamp, self.salt, counter, token) + body)

    def data_to_send(self) -> bytes:
        """Return and clear the queued output."""
        data = b"".join(self._out)
        self._out.clear()
        self.queued_bytes = 0
        return data


def _code_of(code: int) -> Code:
    try:
        return Code(code)
    except ValueError:
        return Code.UNKNOWN
