"""Hold the requests in flight at a client, and make the frames that it sends (sans-IO).

The part of `ClientConnection` that its edge calls: requests, streams and output. `client.py` decides what may
arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from zcproto.connection.client_calls import ClientCall, ClientCalls, Refused
from zcproto.connection.client_streams import ClientStream, ClientStreams, ClientStreamState
from zcproto.connection.silence import Silence
from zcproto.connection.state import State
from zcproto.errors import (
    Code,
    ConnectionClosed,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from zcproto.wire.frame import (
    CANCEL,
    CREDIT,
    END,
    FAILURE,
    ITEM,
    MAX_STREAM,
    MIN_LENGTH,
    NO_TOKEN,
    OPEN,
    PING,
    PONG,
    REQUEST,
    RESULT,
    TOKEN_SIZE,
    encode_frame,
)
from zcproto.wire.message import Credit, MessageError, encode_body, encode_error

MAX_FRAME_BEFORE_SESSION: Final = 16_384
"""Maximum `length` on a connection without a session, in both directions (zcp1.md, section 13)."""

REFRESH: Final = "session.refresh"
OPENING_METHODS: Final = frozenset({"session.open", REFRESH})
"""Methods sent without a token, whose result contains one."""

_OPENING: Final = b""  # in place of a token: the request has none and its result contains one
_OPEN: Final = State.OPEN  # members of an enumeration are slow to look up


class ClientOutput:
    """The output of one connection. Its fields are those of `ClientConnection`."""

    __slots__ = (
        "_calls",
        "_counter",
        "_last_heard",
        "_last_token",
        "_next_stream",
        "_out",
        "_owes_pong",
        "_sent_since_check",
        "_streams",
        "_tokens",
        "clock_offset_ms",
        "in_flight",
        "is_output_blocked",
        "max_depth",
        "queued_bytes",
        "salt",
        "sent_bytes",
        "silence",
        "state",
        "welcome",
    )

    clock_offset_ms: int
    in_flight: dict[int, bytes]
    is_output_blocked: bool
    max_depth: int
    queued_bytes: int
    salt: bytes
    sent_bytes: int
    silence: Silence | None
    state: State
    welcome: dict[str, Any]
    _calls: ClientCalls | None
    _counter: int
    _last_heard: float
    _last_token: bytes
    _next_stream: int
    _out: list[bytes]
    _owes_pong: bytes | None
    _sent_since_check: bool
    _streams: ClientStreams | None
    _tokens: set[bytes]

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
    ) -> ClientStream:
        """Queue an OPEN that grants `window` items and bytes. Raises as `request` does.

        Raises also Unimplemented if the server has no streams, and ResourceExhausted at its `max_open`.
        """
        if self.state is State.OPEN:
            announced = self.welcome.get("streams")
            if announced is None:
                raise Unimplemented("this server has no streams")
            if self._streams is not None and len(self._streams) >= announced["max_open"]:
                limit = announced["max_open"]
                raise ResourceExhausted("too many streams on this connection; close some", {"limit": limit})
        meta = {**(meta or {}), "credit": window}
        number = self.request(method, params, token=token, meta=meta, wall=wall, head=OPEN)
        if self._streams is None:
            self._streams = ClientStreams()
        stream = self._streams[number] = ClientStream(number, token, window)
        return stream

    def take_item(self, stream: ClientStream, wall: int) -> Any:
        """Return the next item of a stream, and send the credit that is due then.

        Raises IndexError if none waits, InternalError for one that cannot be decoded: cancel the stream then.
        """
        value = stream.read_item(self.max_depth)
        granted = stream.items.next_grant()
        if granted is not None and self.state is not State.CLOSED:
            self._send(CREDIT, stream.number, stream.token, encode_body(granted), wall)
        return value

    def send_item(self, stream: ClientStream, value: Any, wall: int) -> None:
        """Queue an ITEM, while `stream.credit.may_send`. Raises InvalidArgument for one that cannot be sent."""
        try:
            body = encode_body(value)
        except MessageError as error:
            raise InvalidArgument(str(error)) from error
        length, limit = MIN_LENGTH + len(body), self.welcome["streams"]["max_item"]
        if length > limit:
            raise InvalidArgument(f"the item has {length} bytes; the server accepts at most {limit}")
        stream.credit.count(length)
        self._send(ITEM, stream.number, stream.token, body, wall)

    def end_items(self, stream: ClientStream, wall: int) -> None:
        """Queue an END: no more items follow."""
        if stream.state is ClientStreamState.OPEN and self.state is not State.CLOSED:
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

    def ping(self, wall: int) -> None:
        if self.state in (State.OPEN, State.DRAINING):
            self._send(PING, 0, NO_TOKEN, b"", wall)

    # --- calls of the server --------------------------------------------------------------------

    def handle(self, methods: frozenset[str], most: int, receiver: object, *, token: bytes, wall: int) -> int:
        """Queue `session.handle`, which lets the server call these methods, `most` at once. Return its stream.

        Each call of them comes with the `receiver`. Raises as `request` does, and Unimplemented if the server
        makes no calls.
        """
        if self.state is State.OPEN and "calls" not in self.welcome:
            raise Unimplemented("this server makes no calls")
        params = {"methods": sorted(methods), "max": most}
        stream = self.request("session.handle", params, token=token, wall=wall)
        if self._calls is None:
            self._calls = ClientCalls()
        self._calls.register(token, methods, most, receiver)
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
