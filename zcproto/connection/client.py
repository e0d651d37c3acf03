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
from zcproto.connection.client_calls import MAX_BLOCKED_REFUSALS, ClientCalls, Refused
from zcproto.connection.client_output import MAX_FRAME_BEFORE_SESSION, ClientOutput
from zcproto.connection.client_streams import ClientStreams
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
from zcproto.connection.sent_ping import NO_PING, SentPing
from zcproto.connection.settings import read_welcome
from zcproto.connection.silence import PING_AFTER, Silence
from zcproto.connection.state import Input, State, next_state
from zcproto.errors import (
    Code,
    ProtocolError,
)
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    CALL,
    CREDIT,
    ERROR,
    EVENT,
    GOAWAY,
    HEADER_SIZE,
    ITEM,
    NO_TOKEN,
    PING,
    RESPONSE,
    WELCOME,
    WITHDRAW,
    RawFrame,
    Side,
    accepted_with_calls,
    accepted_with_streams,
)
from zcproto.wire.message import (
    DEFAULT_MAX_DEPTH,
    MessageError,
    decode_body,
    decode_error,
    decode_event,
    decode_map,
    unpack,
)
from zcproto.wire.usual import UsualFrame, cut_values

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

STALE_ANSWER: Final = "the answer was delayed for too long; check whether the request took effect"

DEAD_TOKEN_CODES: Final = frozenset(
    {Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED}
)

_ANSWERS: Final = frozenset({RESPONSE, ERROR})
_ON_STREAMS: Final = frozenset({ITEM, CREDIT})
_ON_CALLS: Final = frozenset({CALL, WITHDRAW})  # their numbers are the server's own
_CLOSED: Final = State.CLOSED


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class ClientConnection(ClientOutput):
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

    def receive_answers(self, data: bytes, wall: int, now: float) -> tuple[list[UsualFrame], bytes]:
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
        next_frame = decoder.next_frame
        in_flight = self.in_flight
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
                    self._last_heard = now
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
                    if self._streams is not None:
                        self._streams.end(stream, was_lost=True)
                    if self._calls is not None:
                        self._calls.refreshing.pop(stream, None)
                    yield ErrorReceived(stream, Code.DATA_LOSS, STALE_ANSWER, {})
                elif head in _ON_STREAMS and self._streams is not None and self._streams.is_read(stream):
                    self._streams[stream].was_lost = True
                    self.cancel(stream, wall)  # a lost item or credit would go unnoticed
                    yield ErrorReceived(stream, Code.DATA_LOSS, STALE_ANSWER, {})
                elif head in _ON_CALLS:
                    try:
                        late = self._received_call(head, stream, token, body, wall, is_fresh=False)
                    except ProtocolError as error:
                        yield self._end_with(error.code, error.reason)
                        return
                    if late is not None:
                        yield late
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
                if self._streams is not None:
                    self._streams.end(stream)
                try:
                    value = decode_body(body, self.max_depth)
                except MessageError as error:
                    yield ErrorReceived(stream, Code.INTERNAL, f"the answer cannot be read: {error}", {})
                    continue
                if sent_with not in self._tokens:
                    self._add_token(stream, sent_with, value)
                yield ResponseReceived(stream, value)
                continue
            if stream not in in_flight or head in _ON_CALLS:
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
        if head in _ON_STREAMS:
            if stream not in self.in_flight:
                self.dropped_unknown += 1
                return None
            if self._streams is None:
                self._streams = ClientStreams()
            return self._streams.receive(head, stream, body)
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
            self.state = next_state(self.state, Input.FATAL)
            return ConnectionEnded(_code_of(code), message)
        sent_with = self.in_flight.pop(stream, None)
        if sent_with is None:
            self.dropped_unknown += 1
            return None
        if self._streams is not None:
            self._streams.end(stream)
        if self._calls is not None:
            self._calls.refreshing.pop(stream, None)
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
        if "streams" in self.welcome:
            self._decoder.accepted = accepted_with_streams(Side.CLIENT, self.welcome["streams"]["max_item"])
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
