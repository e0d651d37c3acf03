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

from zcproto.common.rates import TokenBucket
from zcproto.connection.client_calls import MAX_BLOCKED_REFUSALS, ClientCall, ClientCalls, Refused
from zcproto.connection.client_streams import ClientStream, ClientStreams, ClientStreamState
from zcproto.connection.events import (
    NEVER,
    CallReceived,
    CallWithdrawn,
    ClientEvent,
    ConnectionEnded,
    ErrorReceived,
    EventReceived,
    GoAwayReceived,
    ResponseReceived,
    Welcomed,
)
from zcproto.connection.settings import read_welcome
from zcproto.connection.silence import NO_PING, PING_AFTER, SentPing, Silence
from zcproto.connection.state import Input, State, next_state
from zcproto.errors import (
    Code,
    ConnectionClosed,
    InvalidArgument,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
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
    MAX_STREAM,
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
    RawFrame,
    Side,
    accepted_with_calls,
    accepted_with_durable,
    accepted_with_streams,
    encode_frame,
)
from zcproto.wire.message import (
    DEFAULT_MAX_DEPTH,
    Credit,
    MessageError,
    Resume,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    encode_body,
    encode_error,
    unpack,
)
from zcproto.wire.request_fast_path import FastAnswer, cut_values

MS: Final = 1000
MAX_STALE_IN_A_ROW: Final = 10
MAX_SERVER_TIME: Final = 2**62
"""Maximum clock of a server: timestamps derived from a later one could exceed 64 bits."""

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

MAX_FRAME_BEFORE_SESSION: Final = 16_384
"""Maximum `length` on a connection without a session, in both directions (zcp1.md, section 13)."""

REFRESH: Final = "session.refresh"
OPENING_METHODS: Final = frozenset({"session.open", REFRESH})
"""Methods sent without a token, whose result contains one."""

STALE_ANSWER: Final = "the answer was delayed for too long; check whether the request took effect"

DEAD_TOKEN_CODES: Final = frozenset(
    {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}
)

_ANSWERS: Final = frozenset({RESPONSE, ERROR})
_ON_STREAMS: Final = frozenset({ACCEPTED, ITEM, CREDIT})
_READ: Final = frozenset({ClientStreamState.OPEN, ClientStreamState.HALF})
_ON_CALLS: Final = frozenset({CALL, WITHDRAW})  # their numbers are the server's own
_OPENING: Final = b""  # in place of a token: the request has none and its result contains one
_OPEN: Final = State.OPEN  # members of an enumeration are slow to look up
_CLOSED: Final = State.CLOSED


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class ClientConnection:
    """One connection to a server.

    Args:
        max_frame: maximum `length` accepted from the server.
        tolerance_ms: maximum difference between its timestamps and our estimate of its clock.
        max_depth: maximum nesting of its bodies.

    Requests are allowed after the `Welcomed` event. Output accumulates until `data_to_send`. `welcome` is the
    map of WELCOME, unknown keys included; it is shared between connections, so do not modify it.
    `in_flight` has the token of each unanswered request by its stream. `salt` is covered by signatures of devices;
    it is empty before WELCOME. `clock_offset_ms` is the server's clock minus ours. `dropped_stale` and
    `dropped_unknown` count dropped stale frames and answers to unknown streams. Set `is_output_blocked` while the
    transport cannot send, and call `unblock_output` afterwards.
    """

    max_frame: int = 1_048_576
    tolerance_ms: int = 30_000
    max_depth: int = DEFAULT_MAX_DEPTH
    salt: bytes = field(default=b"", init=False)
    clock_offset_ms: int = field(default=0, init=False)
    dropped_stale: int = field(default=0, init=False)
    dropped_unknown: int = field(default=0, init=False)
    queued_bytes: int = field(default=0, init=False)
    sent_bytes: int = field(default=0, init=False)
    silence: Silence | None = field(default=None, init=False)  # once it is watched
    is_output_blocked: bool = field(default=False, init=False)
    welcome: dict[str, Any] = field(default_factory=dict, init=False)
    in_flight: dict[int, bytes] = field(default_factory=dict, init=False)
    state: State = field(default=State.AWAITING_WELCOME, init=False)
    _decoder: FrameDecoder = field(init=False)
    _counter: int = field(default=0, init=False)  # of the last frame sent; the first has 1
    _last_counter: int = field(default=0, init=False)  # WELCOME is frame 0
    _partial: tuple[int, float] | None = field(default=None, init=False)  # of a header: wall, now
    _stale_in_a_row: int = field(default=0, init=False)
    _next_stream: int = field(default=1, init=False)
    _streams: ClientStreams | None = field(default=None, init=False)  # once one was opened
    _calls: ClientCalls | None = field(default=None, init=False)  # once there was a session.handle
    _tokens: set[bytes] = field(default_factory=set, init=False)  # accepted by the server on this connection
    _last_token: bytes = field(default=NO_TOKEN, init=False)  # of the last request
    _out: list[bytes] = field(default_factory=list, init=False)
    _owes_pong: bytes | None = field(default=None, init=False)  # token of the latest unanswered PING
    _unrequested: TokenBucket = field(init=False)  # the frames that answer no request
    _last_heard: float = field(default=0.0, init=False)
    _sent_since_check: bool = field(default=False, init=False)
    _keepalive_interval: float = field(default=NEVER, init=False)
    _keepalive_at: float = field(default=NEVER, init=False)
    _pong_deadline: float = field(default=NEVER, init=False)
    _ping: SentPing = field(default=NO_PING, init=False)

    def __post_init__(self) -> None:
        self._decoder = FrameDecoder(Side.CLIENT, min(self.max_frame, MAX_FRAME_BEFORE_SESSION))
        self._unrequested = TokenBucket(UNREQUESTED_PER_S, UNREQUESTED_BURST / UNREQUESTED_PER_S)

    # --- input ----------------------------------------------------------------------------------

    def receive_answers(self, data: bytes, wall: int, now: float) -> tuple[list[FastAnswer], bytes]:
        """Return the answers that bytes begin with, and the bytes that remain.

        The answers are those that `receive_data` yields for RESPONSE, at less cost. Pass it the remaining bytes.
        """
        token = self._last_token
        decoder = self._decoder
        if (
            token not in self._tokens
            or decoder.partial is not None
            or self._stale_in_a_row
            or self.state is _CLOSED
        ):
            return [], data
        answers = cut_values(
            data,
            decoder.limit,
            RESPONSE,
            self.salt,
            self._last_counter,
            token,
            wall + self.clock_offset_ms,
            self.tolerance_ms,
            self.max_depth,
            unpack,
        )
        in_flight, streams = self.in_flight, self._streams
        for answer in answers:
            stream = answer[0]
            if in_flight.get(stream) is not token:
                del answers[answers.index(answer) :]
                break
            del in_flight[stream]
            if streams is not None:
                streams.end(stream)
        if not answers:
            return answers, data
        _, self._last_counter, _, end = answers[-1]
        self._last_heard = now
        return answers, data[end:]

    def receive_data(self, data: bytes, wall: int, now: float) -> Iterator[ClientEvent]:
        """Process decrypted bytes and yield their events, one at a time.

        `wall` is our own clock. Take all events of one call before the next call, and none after `end`.
        """
        if self.state is State.CLOSED:
            return
        decoder = self._decoder
        decoder.feed(data)
        judged_at = wall
        if self._partial is not None:
            if decoder.expected:
                if now >= self._partial[1] + FRAME_TIMEOUT:
                    yield self._end_with(None, "a frame of the server took too long to arrive")
                self._last_heard = now
                return
            judged_at, self._partial = self._partial[0], None
        try:
            while (frame := decoder.next_frame()) is not None:
                event = self._receive(frame, judged_at, wall, now)
                judged_at = wall
                if event is not None:
                    yield event
        except ProtocolError as error:
            yield self._end_with(error.code, error.reason)
            return
        if decoder.buffered >= HEADER_SIZE:
            self._partial = wall, now
            self._last_heard = now
        if self._owes_pong is not None and not self.is_output_blocked:
            self._send_pong(wall)

    def _receive(self, frame: RawFrame, judged_at: int, wall: int, now: float) -> ClientEvent | None:
        """Process a frame, whose header arrived at `judged_at`. Raises ProtocolError if it ends the connection."""
        _, head, stream, timestamp, salt, counter, token, body = frame
        if salt != self.salt or counter <= self._last_counter:
            if self.state is State.AWAITING_WELCOME:  # no salt matches before WELCOME
                return self._received_welcome(frame, wall, now)
            reason = (
                "nonce belongs to another connection" if salt != self.salt else "nonce counter did not grow"
            )
            raise ProtocolError(Code.REPLAYED, reason)
        self._last_counter = counter
        is_fresh = abs(judged_at + self.clock_offset_ms - timestamp) <= self.tolerance_ms
        if not (is_fresh or self._corrects_clock(head, body)):
            return self._received_stale(head, stream, token, body, wall)
        self._stale_in_a_row = 0
        self._last_heard = now
        if stream not in self.in_flight or head in _ON_CALLS:
            self._count_unrequested(body, now)
        if head == RESPONSE:
            return self._received_response(stream, body)
        if head == ERROR:
            return self._received_error(stream, body, wall)
        if head in _ON_STREAMS:
            if stream not in self.in_flight:
                self.dropped_unknown += 1
                return None
            if self._streams is None:
                self._streams = ClientStreams()
            return self._streams.receive(head, stream, body, self.max_depth)
        if head in _ON_CALLS:
            return self._received_call(head, stream, token, body, wall, is_fresh=True)
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

    def _received_stale(
        self, head: int, stream: int, token: bytes, body: bytes, wall: int
    ) -> ClientEvent | None:
        """Process a stale frame: what it should have answered fails. Raises ProtocolError like `_receive`."""
        self._stale_in_a_row += 1
        if self._stale_in_a_row >= MAX_STALE_IN_A_ROW:
            raise ProtocolError(Code.STALE_TIMESTAMP, "ten stale frames in a row")
        if head in _ANSWERS and self._failed(stream, was_lost=True) is not None:
            return ErrorReceived(stream, Code.DATA_LOSS, STALE_ANSWER, {})
        if head in _ON_STREAMS and self._streams is not None and self._streams.is_read(stream):
            left = self._streams[stream]
            left.was_lost = True
            if left.resume is None:
                self.cancel(stream, wall)  # a lost item or credit would go unnoticed
            else:
                self.detach(left, wall)
            return ErrorReceived(stream, Code.DATA_LOSS, STALE_ANSWER, {})
        if head in _ON_CALLS:
            return self._received_call(head, stream, token, body, wall, is_fresh=False)
        self.dropped_stale += 1
        return None

    def _answered(self, stream: int, *, was_lost: bool = False) -> bytes | None:
        """Forget a request that has its answer, and return its token; None if it is unknown."""
        if self._streams is not None:
            self._streams.end(stream, was_lost=was_lost)
        return self.in_flight.pop(stream, None)

    def _failed(self, stream: int, *, was_lost: bool = False) -> bytes | None:
        if self._calls is not None:
            self._calls.refreshing.pop(stream, None)
        return self._answered(stream, was_lost=was_lost)

    def _received_response(self, stream: int, body: bytes) -> ClientEvent | None:
        sent_with = self._answered(stream)
        if sent_with is None:
            self.dropped_unknown += 1
            return None
        try:
            value = decode_body(body, self.max_depth)
        except MessageError as error:
            return ErrorReceived(stream, Code.INTERNAL, f"the answer cannot be read: {error}", {})
        if sent_with not in self._tokens:
            self._add_token(stream, sent_with, value)
        return ResponseReceived(stream, value)

    def _received_call(
        self, head: int, number: int, token: bytes, body: bytes, wall: int, *, is_fresh: bool
    ) -> CallReceived | CallWithdrawn | None:
        """Process a CALL or WITHDRAW. Raises ProtocolError if it ends the connection."""
        calls = self._calls
        if head == WITHDRAW:  # not a replay, because its counter is new; cancelling is safe
            if body:
                raise ProtocolError(Code.PROTOCOL_ERROR, "this kind of frame has no body")
            call = None if calls is None else calls.withdraw(number, token)
            if calls is None or call is None:
                self.dropped_unknown += 1
                return None
            self._count_blocked(calls)
            self.fail_call(call, Code.CANCELLED, "the call was withdrawn", wall)
            return CallWithdrawn(call)
        if calls is None:
            raise ProtocolError(Code.PROTOCOL_ERROR, "CALL without session.handle")
        received = calls.receive(number, token, body, is_fresh=is_fresh, max_depth=self.max_depth)
        if not isinstance(received, Refused):
            return CallReceived(received)
        self._count_blocked(calls)
        self.refuse_call(number, token, received, wall)
        return None

    def _count_blocked(self, calls: ClientCalls) -> None:
        """Count a FAILURE that the server causes. Raises ProtocolError if it reads none of many."""
        if self.is_output_blocked:
            calls.blocked_refusals += 1
            if calls.blocked_refusals > MAX_BLOCKED_REFUSALS:
                raise ProtocolError(Code.PROTOCOL_ERROR, "the server calls, but reads no answers")

    def _count_unrequested(self, body: bytes, now: float) -> None:
        self._unrequested.charge(1 + len(body) / _UNREQUESTED_BYTES, now)

    def reading_delay(self, now: float) -> float:
        """Return the seconds for which to stop reading, because of a flood of frames that answer no request."""
        return max(self._unrequested.debt_s(now), 0.0)

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
            raise ProtocolError(_code_of(code), message)
        sent_with = self._failed(stream)
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

    def _received_welcome(self, frame: RawFrame, wall: int, now: float) -> Welcomed:
        _, head, _, timestamp, salt, counter, _, body = frame
        if head != WELCOME:
            raise ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not WELCOME")
        if counter != 0:
            raise ProtocolError(Code.PROTOCOL_ERROR, "WELCOME must have counter 0")
        if timestamp > MAX_SERVER_TIME:
            raise ProtocolError(Code.PROTOCOL_ERROR, "the server's clock is out of range")
        self.welcome = read_welcome(body, self.max_depth)
        self.salt = salt
        self.clock_offset_ms = timestamp - wall
        self._decoder.limit = self.max_frame
        if "streams" in self.welcome:
            self._decoder.accepted = accepted_with_streams(Side.CLIENT, self.welcome["streams"]["max_item"])
            if self.welcome["streams"].get("durable"):
                self._decoder.accepted = accepted_with_durable(self._decoder.accepted)
        if "calls" in self.welcome:
            self._decoder.accepted = accepted_with_calls(Side.CLIENT, self._decoder.accepted)
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

    # --- time -----------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return the latest time for the next `handle_timeout`, in monotonic seconds, or NEVER.

        It changes only with WELCOME and with each `handle_timeout`.
        """
        if self.state is State.CLOSED:
            return NEVER
        return min(self._keepalive_at, self._pong_deadline)

    def handle_timeout(self, wall: int, now: float, unsent: int = 0) -> list[ClientEvent]:
        """Send a PING after a silence, or end the connection after a PING without answer.

        Checks the connection at intervals of a third of the server's idle timeout. A PING is sent if nothing was
        sent or nothing was received since the last check, so a silence is shorter than two thirds of it. An
        early call does nothing. `unsent` are bytes that wait in the transport: while it sends those before a PING,
        the answer is not late.
        """
        if self.state is State.CLOSED:
            return []
        if self._pong_deadline <= now:
            if self._last_heard > self._pong_deadline - PONG_TIMEOUT:
                self._pong_deadline = NEVER  # other frames have arrived since
            elif self._ping.has_advanced(self.sent_bytes - unsent):
                self._pong_deadline = now + PONG_TIMEOUT
            else:
                return [self._end_with(None, "the server did not answer a PING")]
        if self._keepalive_at <= now:
            heard_since_check = self._last_heard > self._keepalive_at - self._keepalive_interval
            if not (self._sent_since_check and heard_since_check):
                if not self.is_output_blocked:
                    self.ping(wall)
                if self._pong_deadline == NEVER:
                    self._pong_deadline = now + PONG_TIMEOUT
                    self._ping = SentPing(self.sent_bytes, self.sent_bytes - unsent)
            self._sent_since_check = False
            self._keepalive_at = now + self._keepalive_interval
        return []

    # --- silence --------------------------------------------------------------------------------

    def watch_silence(self) -> None:
        """Find out with `check_silence` when the server is silent. Idempotent."""
        if self.silence is None:
            self.silence = Silence(self._last_heard, self.sent_bytes)

    @property
    def is_silent(self) -> bool:
        """Whether the server has sent nothing since a PING whose answer is late, while requests wait."""
        return self.silence is not None and self.silence.is_silent(self._last_heard)

    def has_answered_since(self, other: ClientConnection) -> bool:
        """Return whether a byte has arrived here since the last PING to the other, silent connection."""
        return other.silence is not None and self._last_heard > other.silence.asked_at

    def first_silence_check(self, now: float) -> float:
        """Return when to check for silence after a request while none was in flight. The first one after a longer
        silence has 5 s."""
        due = self._last_heard + PING_AFTER
        return due if due > now else now + PING_AFTER

    def check_silence(self, wall: int, now: float, unsent: int = 0, *, after: float = PING_AFTER) -> float:
        """Send a PING if requests have waited for `after` seconds without a byte, or if that is 0. Return when to
        check again, in monotonic seconds, or NEVER.

        `unsent` as in `handle_timeout`. A PING that is not answered in time does not end the connection.
        """
        silence = self.silence
        if silence is None or self.state is State.CLOSED:
            return NEVER
        waits = bool(self.in_flight) or not after
        if (
            silence.check(now, self._last_heard, self.sent_bytes, unsent, waits=waits, after=after)
            and not self.is_output_blocked
        ):
            self.ping(wall)
        return silence.check_at

    # --- requests -------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        wall: int,
        token: bytes = NO_TOKEN,
        meta: Mapping[str, Any] | None = None,
        head: int = REQUEST,
    ) -> int:
        """Queue a REQUEST. Return its stream, which identifies the answer.

        Methods that open a session are sent without a token; `session.refresh` replaces `token`.

        Raises:
            InvalidArgument: the request cannot be encoded, or is too large (details `size` and `limit`).
            ResourceExhausted: the server's limit of requests in flight is reached.
            Unavailable: before WELCOME or after GOAWAY.
            ConnectionClosed: after the end.
        """
        in_flight = self.in_flight
        if self.state is not _OPEN:
            self._refuse_request()
        if len(in_flight) >= self.welcome["max_streams"]:
            raise ResourceExhausted("too many requests in flight on this connection")
        try:
            # `encode_request` inlined
            body = encode_body([method, params, meta] if meta else [method, params])
        except MessageError as error:
            raise InvalidArgument(str(error)) from error
        size = MIN_LENGTH + len(body)
        if size > MAX_FRAME_BEFORE_SESSION or size > self.welcome["max_frame"]:
            self._check_size(size)
        stream = self._next_stream
        while stream in in_flight:
            stream = stream % MAX_STREAM + 1
        self._next_stream = stream % MAX_STREAM + 1
        if method in OPENING_METHODS:
            in_flight[stream] = _OPENING
            if self._calls is not None and method == REFRESH:
                self._calls.refreshing[stream] = token
            token = NO_TOKEN
        else:
            in_flight[stream] = self._last_token = token
        self._send(head, stream, token, body, wall)
        return stream

    def show(self, token: bytes, wall: int) -> int:
        """Queue a `session.info` with a token, and return its stream.

        Also after GOAWAY and at the limit of requests in flight: a refused request shows the token, too.
        Raises Unavailable before WELCOME, ConnectionClosed after the end.
        """
        if self.state not in (State.OPEN, State.DRAINING):
            self._refuse_request()
        stream = self._next_stream
        while stream in self.in_flight:
            stream = stream % MAX_STREAM + 1
        self._next_stream = stream % MAX_STREAM + 1
        self.in_flight[stream] = self._last_token = token
        self._send(REQUEST, stream, token, encode_body(["session.info", None]), wall)
        return stream

    def open_stream(
        self,
        method: str,
        params: Mapping[str, Any] | None,
        *,
        token: bytes,
        meta: Mapping[str, Any] | None = None,
        window: Credit,
        wall: int,
        resume: Resume | None = None,
    ) -> ClientStream:
        """Queue an OPEN that grants `window` items and bytes; `resume` makes it durable.

        Raises as `request` does; also Unimplemented if the server has no such streams, and ResourceExhausted at
        its `max_open`.
        """
        if self.state is State.OPEN:
            announced = self.welcome.get("streams")
            if announced is None:
                raise Unimplemented("this server has no streams")
            if resume is not None and not announced.get("durable"):
                raise Unimplemented("this server has no durable streams")
            if self._streams is not None and len(self._streams) >= announced["max_open"]:
                limit = announced["max_open"]
                raise ResourceExhausted("too many streams on this connection; close some", {"limit": limit})
        meta = {**(meta or {}), "credit": window}
        if resume is not None:
            meta["resume"] = {"id": resume.id, "from": resume.position}
            params = None if resume.attaches else params or {}
        number = self.request(method, params, token=token, meta=meta, wall=wall, head=OPEN)
        if self._streams is None:
            self._streams = ClientStreams()
        stream = self._streams[number] = ClientStream(number, token, window, resume)
        return stream

    def take_item(self, stream: ClientStream, wall: int) -> Any:
        """Return the next item of a stream, and send the credit that is due then.

        Raises IndexError if none waits, InternalError for one that cannot be decoded: cancel the stream then.
        """
        value = stream.read_item(self.max_depth)
        if stream.items.next_grant() is not None:
            self.send_credit(stream, wall)
        return value

    def send_credit(self, stream: ClientStream, wall: int) -> None:
        """Queue a CREDIT that repeats what was granted, with `taken` of an accepted durable stream."""
        if stream.state in _READ and self.state is not State.CLOSED:
            self._send(CREDIT, stream.number, stream.token, encode_body(stream.granted), wall)

    def send_item(self, stream: ClientStream, value: Any, wall: int) -> None:
        """Queue an ITEM, while `stream.credit.may_send`. Raises InvalidArgument for one that cannot be sent."""
        try:
            body = encode_body(value)
        except MessageError as error:
            raise InvalidArgument(str(error)) from error
        length, limit = MIN_LENGTH + len(body), self.welcome["streams"]["max_item"]
        if length > limit:
            raise InvalidArgument(
                f"the item has {length} bytes; the server accepts at most {limit} (streams.max_item_bytes):"
                " send it in pieces"
            )
        stream.credit.count(length)
        self._send(ITEM, stream.number, stream.token, body, wall)

    def end_items(self, stream: ClientStream, wall: int) -> None:
        """Queue an END: no more items follow. A durable stream takes none, and END would leave it."""
        if (
            stream.resume is None
            and stream.state is ClientStreamState.OPEN
            and self.state is not State.CLOSED
        ):
            stream.state = ClientStreamState.HALF
            self._send(END, stream.number, stream.token, b"", wall)

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
                f"the request has {size} bytes; the server accepts at most {limit} (limits.max_frame_bytes"
                f"{'' if self._tokens else '_before_session'}): send it in pieces, as a stream",
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

    def _add_token(self, stream: int, token: bytes, value: Any) -> None:
        """Record the token that a RESPONSE shows to be accepted, or contains."""
        accepted = value.get("token") if token == _OPENING and value.__class__ is dict else token
        if isinstance(accepted, bytes) and len(accepted) == TOKEN_SIZE and accepted != NO_TOKEN:
            self._tokens.add(accepted)
            if self._calls is not None:
                self._calls.refreshed(stream, accepted)

    def session_ended(self, token: bytes) -> None:
        """Apply the limits of a connection without a session again, if this was its session."""
        self._tokens.discard(token)

    def cancel(self, stream: int, wall: int) -> None:
        """Queue a CANCEL. The request stays in flight until its answer arrives."""
        token = self.in_flight.get(stream)
        if token is not None and self.state is not State.CLOSED:
            if self._streams is not None:
                self._streams.leave(stream)
            self._send(CANCEL, stream, token or NO_TOKEN, b"", wall)

    def detach(self, stream: ClientStream, wall: int) -> None:
        """Queue an END, which leaves a durable stream but not its run. The stream is in flight until the answer."""
        if stream.state in _READ and self.state is not State.CLOSED:
            stream.leave()
            self._send(END, stream.number, stream.token, b"", wall)

    def ping(self, wall: int) -> None:
        if self.state in (State.OPEN, State.DRAINING):
            self._send(PING, 0, NO_TOKEN, b"", wall)

    # --- calls of the server --------------------------------------------------------------------

    def handle(
        self, methods: frozenset[str], limit: int, receiver: object, *, token: bytes, wall: int
    ) -> int:
        """Queue `session.handle`, which lets the server call these methods, `limit` at once. Return its stream.

        Each call of them comes with the `receiver`. Raises as `request` does, and Unimplemented if the server
        makes no calls.
        """
        if self.state is State.OPEN and "calls" not in self.welcome:
            raise Unimplemented("this server makes no calls")
        params = {"methods": sorted(methods), "max": limit}
        stream = self.request("session.handle", params, token=token, wall=wall)
        self._calls = self._calls or ClientCalls()
        self._calls.register(token, methods, limit, receiver)
        return stream

    def handles(self, token: bytes) -> bool:
        """Return whether methods were registered for the session of a token."""
        return self._calls is not None and self._calls.handles(token)

    @property
    def running_calls(self) -> int:
        """Return the number of calls of the server that await their answer."""
        return 0 if self._calls is None else self._calls.running

    def answer_call(self, call: ClientCall, value: Any, wall: int) -> None:
        """Queue the RESULT of a call, unless it was withdrawn; a FAILURE if it cannot be sent."""
        try:
            body = encode_body(value)
        except MessageError as error:
            self.fail_call(call, Code.INTERNAL, f"the result of the handler: {error}", wall)
            return
        if MIN_LENGTH + len(body) > self.send_limit:
            self.fail_call(call, Code.INTERNAL, "the result of the handler is too large", wall)
        else:
            self._answer_call(RESULT, call, body, wall)

    def fail_call(
        self,
        call: ClientCall,
        code: Code,
        message: str,
        wall: int,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue the FAILURE of a call, unless it was withdrawn. The protocol's own codes become UNKNOWN."""
        if code > Code.UNAUTHENTICATED:
            code = Code.UNKNOWN
        try:
            body = encode_error(code, message, details)
        except MessageError:
            body = b""
        if not body or MIN_LENGTH + len(body) > self.send_limit:
            body = encode_error(Code.INTERNAL, "the error of the handler cannot be sent")
        self._answer_call(FAILURE, call, body, wall)

    def _answer_call(self, head: int, call: ClientCall, body: bytes, wall: int) -> None:
        assert self._calls is not None, "a call was received"
        if self.state is not State.CLOSED and self._calls.answer(call):
            self._send(head, call.number, call.token, body, wall)

    def refuse_call(self, number: int, token: bytes, refused: Refused, wall: int) -> None:
        """Queue the FAILURE of a CALL that is not run."""
        self._send(FAILURE, number, token, encode_error(refused.code, refused.message), wall)

    def release_call(self, call: ClientCall) -> None:
        """Record that the handler of a call has ended: another one may run."""
        call.session.running -= 1

    def cancel_calls(self, token: bytes, wall: int) -> list[ClientCall]:
        """End what is handled for a session. Answer its calls with CANCELLED, and return them."""
        cancelled = [] if self._calls is None else self._calls.end_session(token)
        for call in cancelled:
            self.fail_call(call, Code.CANCELLED, "the session has ended", wall)
        return cancelled

    def end_calls(self) -> list[ClientCall]:
        """End all calls of a connection that has ended; return them."""
        return [] if self._calls is None else self._calls.end_all()

    # --- output ---------------------------------------------------------------------------------

    def unblock_output(self, wall: int) -> None:
        """Send what waited for the transport. Call this when it can send again."""
        self.is_output_blocked = False
        if self._calls is not None:
            self._calls.blocked_refusals = 0
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
        timestamp = wall + self.clock_offset_ms
        if timestamp < 0:  # noqa: PLR1730  less than half the cost of max()
            timestamp = 0
        self.queued_bytes += MIN_LENGTH + len(body)
        self._out.append(encode_frame(head, stream, timestamp, self.salt, counter, token, body))

    def data_to_send(self) -> bytes:
        """Return and clear the queued output."""
        data = b"".join(self._out)
        self._out.clear()
        self.queued_bytes = 0
        if self.silence is not None:
            self.silence.note_sending(self._last_heard, self.sent_bytes)
        self.sent_bytes += len(data)
        return data

    # --- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """End the connection: the transport is gone, or will be closed after queued output."""
        self.state = next_state(self.state, Input.END)

    def _end_with(self, code: Code | None, reason: str) -> ConnectionEnded:
        self.state = next_state(self.state, Input.FATAL)
        return ConnectionEnded(code, reason)


def _code_of(code: int) -> Code:
    try:
        return Code(code)
    except ValueError:
        return Code.UNKNOWN
