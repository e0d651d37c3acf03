"""One connection of the scripted server: TLS in memory, frames by hand, and checks of what the client sends.

Decides: whether each frame of the client is valid at this point of the connection: its header, salt, counter,
timestamp, length and stream.
Rules: the scenario decides what the server sends: valid frames by `send`, any bytes by `write`, any end by `close`,
`truncate` and `reset`. Nothing is shared with the real server or client, so their faults are not shared either.
Must not know: what a scenario is about.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from zcproto.common.clock import Clock, Entropy
from zcproto_conformance.errors import CheckFailed, expect

HEADER: Final = struct.Struct("!IBBHIQ8sQ32s")
NO_TOKEN: Final = bytes(32)
MIN_LENGTH: Final = 64
BEFORE_SESSION: Final = 16_384
MAX_FRAME: Final = 1_048_576
TOLERANCE_MS: Final = 30_000
READ_SIZE: Final = 65_536
QUIET: Final = 0.3
"""Seconds to wait for a frame that must not come. On a busy machine this may miss a fault but never invents one."""

KINDS: Final = {
    "WELCOME": 1,
    "REQUEST": 2,
    "RESPONSE": 3,
    "ERROR": 4,
    "CANCEL": 5,
    "PING": 6,
    "PONG": 7,
    "GOAWAY": 8,
    "EVENT": 9,
    "OPEN": 0x10,
    "ITEM": 0x11,
    "END": 0x12,
    "CREDIT": 0x13,
    "ACCEPTED": 0x14,
    "CALL": 0x18,
    "RESULT": 0x19,
    "FAILURE": 0x1A,
    "WITHDRAW": 0x1B,
}
STREAMS: Final = {"max_open": 64, "max_item": 65_536}
"""`streams` of WELCOME."""
DURABLE_STREAMS: Final = {**STREAMS, "durable": True}

_NAMES: Final = {number: name for name, number in KINDS.items()}
_OF_STREAMS: Final = {"OPEN", "ITEM", "END", "CREDIT"}
_OF_CALLS: Final = {"RESULT", "FAILURE"}
_FROM_CLIENT: Final = {"REQUEST", "CANCEL", "PING", "PONG"}
_ON_A_STREAM: Final = {"REQUEST", "CANCEL"} | _OF_STREAMS | _OF_CALLS
_WITH_METHOD: Final = {"REQUEST", "OPEN"}
_WITH_BODY: Final = {"REQUEST", "OPEN", "ITEM", "CREDIT", "RESULT", "FAILURE"}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame received from the client."""

    kind: str
    stream: int
    timestamp: int
    counter: int
    token: bytes
    body: bytes

    @property
    def value(self) -> Any:
        """The decoded body."""
        try:
            return msgpack.unpackb(self.body)
        except (ValueError, msgpack.UnpackException) as error:
            raise CheckFailed(f"received a body that is not msgpack: {type(error).__name__}") from error

    @property
    def method(self) -> str:
        return str(self.value[0])

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = self.value[1] or {}
        return params

    @property
    def meta(self) -> dict[str, Any]:
        value = self.value
        return value[2] if len(value) > 2 else {}

    def __str__(self) -> str:
        if self.kind in _WITH_METHOD:
            return f"{self.kind} {self.method} on stream {self.stream}"
        return f"{self.kind} on stream {self.stream}"


def pack(value: Any) -> bytes:
    """Encode a value as msgpack."""
    packed: bytes = msgpack.packb(value)
    return packed


class ConnectionEnded(CheckFailed):
    """The client ended the connection. `how` is close_notify, truncated or reset."""

    def __init__(self, how: str, expected: str) -> None:
        super().__init__(f"the client ended the connection ({how}) instead of {expected}")
        self.how = how


Responder = Callable[["Connection", Frame], None]


class Connection:
    """One connection, from the accepted socket on.

    `clock_ahead_ms` is how far the server's clock is ahead of this machine's. `auto_responses` has the responses to
    requests that a client may send on its own initiative; a scenario that checks such a request removes it.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        clock: Clock,
        entropy: Entropy,
        *,
        patience: float,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._data = b""
        self._end: str | None = None
        self._write_ended = False
        self._last_counter = 0
        self.patience = patience
        self.salt = entropy(8)
        self.counter = 0
        self.clock_ahead_ms = 0
        self.frame_limit = BEFORE_SESSION
        self.checks_timestamps = True
        self.in_flight: dict[int, Frame] = {}
        self.allowed = set(_FROM_CLIENT)  # kinds that the client may send
        self.client_hello = b""
        self.frames_received = 0
        self.auto_responses: dict[str, Responder] = {
            "session.info": lambda connection, request: connection.respond(request, {}),
            "session.close": lambda connection, request: connection.respond(request, {}),
        }

    @property
    def wall(self) -> int:
        """The server's time, in milliseconds since the Unix epoch."""
        return self._clock.wall() + self.clock_ahead_ms

    @property
    def suite(self) -> str:
        """The negotiated cipher suite; empty before the handshake."""
        cipher = None if self._tls is None else self._tls.cipher()
        return "" if cipher is None else cipher[0]

    # --- TLS ----------------------------------------------------------------------------------------

    async def handshake(self, context: ssl.SSLContext) -> None:
        """Perform the TLS handshake. Raises ConnectionEnded or CheckFailed if the client does not complete it."""
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not await self._receive("the TLS handshake"):
                    raise ConnectionEnded(self._end or "truncated", "finishing the handshake") from None
                continue
            except ssl.SSLError as error:
                self._flush()
                raise CheckFailed(f"the TLS handshake failed: {error.reason}") from error
            self._flush()
            return

    async def _receive(self, expected: str) -> bool:
        """Read from the network. Return False at the end. Raises CheckFailed on a timeout."""
        try:
            async with asyncio.timeout(self.patience):
                data = await self._reader.read(READ_SIZE)
        except TimeoutError:
            raise CheckFailed(f"{expected}: nothing received within {self.patience:g} s") from None
        except OSError:
            self._end = "reset"
            return False
        if not data:
            self._incoming.write_eof()
            self._end = self._end or "truncated"
            return False
        if len(self.client_hello) < BEFORE_SESSION:
            self.client_hello += data
        self._incoming.write(data)
        return True

    def _flush(self) -> None:
        if self._outgoing.pending and not (self._write_ended or self._writer.is_closing()):
            self._writer.write(self._outgoing.read())

    def _decrypt(self) -> None:
        assert self._tls is not None
        while self._end is None:
            try:
                data = self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLZeroReturnError:
                data = b""
            except ssl.SSLError as error:
                self._end = f"TLS failure {error.reason}"
                return
            if not data:
                self._end = "close_notify"
                self.close()
                return
            self._data += data

    # --- frames in ----------------------------------------------------------------------------------

    def _parse_frame(self) -> Frame | None:
        data = self._data
        if len(data) < HEADER.size:
            return None
        length, version, kind, flags, stream, timestamp, salt, counter, token = HEADER.unpack_from(data)
        expect(length >= MIN_LENGTH, f"received a frame with length {length}")
        expect(
            length <= self.frame_limit, f"received a frame of {length} bytes; the limit is {self.frame_limit}"
        )
        if len(data) < 4 + length:
            return None
        self._data = data[4 + length :]
        name = _NAMES.get(kind, f"kind {kind:#x}")
        expect(version == 1, f"received a frame of version {version}")
        expect(name in self.allowed, f"received {name}, which this client must not send")
        expect(flags == 0, f"received {name} with flags {flags:#x}")
        expect((name in _ON_A_STREAM) == (stream != 0), f"received {name} on stream {stream}")
        expect(salt == self.salt, f"received {name} with a salt other than this connection's")
        expect(
            counter > self._last_counter, f"received {name} with counter {counter} after {self._last_counter}"
        )
        self._last_counter = counter
        self.frames_received += 1
        offset = timestamp - self.wall
        if self.checks_timestamps:
            expect(abs(offset) <= TOLERANCE_MS, f"received {name} with a timestamp that is {offset} ms off")
        frame = Frame(name, stream, timestamp, counter, token, data[HEADER.size : 4 + length])
        expect(name in _WITH_BODY or not frame.body, f"received {name} with a body")
        if name in _WITH_METHOD:
            expect(stream not in self.in_flight, f"stream {stream} was reused while in flight")
            self.in_flight[stream] = frame
        return frame

    async def _next(self, expected: str) -> Frame:
        while True:
            frame = self._parse_frame()
            if frame is not None:
                return frame
            if self._end is not None:
                raise ConnectionEnded(self._end, expected)
            if await self._receive(expected):
                self._decrypt()
            elif self._end is None:
                self._end = "truncated"

    def _auto_respond(self, frame: Frame) -> bool:
        if frame.kind == "PING":
            self.send("PONG", token=frame.token)
            return True
        if frame.kind == "REQUEST" and frame.method in self.auto_responses:
            self.auto_responses[frame.method](self, frame)
            return True
        return False

    async def next_frame(self, expected: str = "a frame") -> Frame:
        """Return the next frame that has no automatic response."""
        while True:
            frame = await self._next(expected)
            if not self._auto_respond(frame):
                return frame

    async def next_raw_frame(self, expected: str) -> Frame:
        """Return the next frame, without automatic responses."""
        return await self._next(expected)

    async def expect_request(self, method: str) -> Frame:
        """Return the next frame. Raises CheckFailed unless it is a request of this method."""
        frame = await self.next_frame(f"REQUEST {method}")
        expect(
            frame.kind == "REQUEST" and frame.method == method,
            f"received {frame} instead of REQUEST {method}",
        )
        return frame

    async def expect_frame(self, kind: str, stream: int) -> Frame:
        """Return the next frame. Raises CheckFailed unless it is of this kind and on this stream."""
        frame = await self.next_frame(f"{kind} on stream {stream}")
        expect(
            frame.kind == kind and frame.stream == stream,
            f"received {frame} instead of {kind} on stream {stream}",
        )
        return frame

    async def expect_open(self, method: str) -> Frame:
        """Return the next frame. Raises CheckFailed unless it opens a stream of this method."""
        frame = await self.next_frame(f"OPEN {method}")
        expect(frame.kind == "OPEN" and frame.method == method, f"received {frame} instead of OPEN {method}")
        return frame

    async def expect_requests(self, method: str, count: int) -> list[Frame]:
        """Return the next `count` frames, which must be requests of one method."""
        return [await self.expect_request(method) for _ in range(count)]

    async def frames_within(self, seconds: float = QUIET) -> AsyncIterator[Frame]:
        """Yield the frames received within a time that have no automatic response.

        Raises ConnectionEnded if the client ends the connection.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    frame = await self._next("keeping it open")
            except TimeoutError:
                return
            if not self._auto_respond(frame):
                yield frame

    async def expect_silence(self, when: str, seconds: float = QUIET) -> None:
        """Raise CheckFailed if the client sends a frame or ends the connection within a time."""
        async for frame in self.frames_within(seconds):
            raise CheckFailed(f"received {frame} {when}")

    async def expect_silence_or_end(self, when: str, seconds: float = QUIET) -> bool:
        """Raise CheckFailed if the client sends a frame within a time. Return True if it ends the connection."""
        try:
            await self.expect_silence(when, seconds)
        except ConnectionEnded:
            return True
        return False

    async def sync(self) -> None:
        """Return once the client has read everything sent so far, or has ended the connection."""
        self.send("PING")
        try:
            frame = await self.next_frame("PONG")
        except ConnectionEnded:
            return
        expect(frame.kind == "PONG", f"received {frame} instead of PONG")

    @contextlib.asynccontextmanager
    async def auto_responding(self) -> AsyncIterator[None]:
        """Send automatic responses in the background. Any other frame fails the check."""
        task = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def _serve(self) -> None:
        while True:
            frame = await self._next("keeping it open")
            expect(self._auto_respond(frame), f"received an unexpected {frame}")

    async def wait_for_end(self, when: str) -> str:
        """Wait until the client ends the connection, and return how. Frames still in transit are checked."""
        while True:
            try:
                frame = await self._next(f"ending the connection {when}")
            except ConnectionEnded as ended:
                return ended.how
            expect(frame.kind != "PONG", f"received {frame} {when}")

    async def expect_close(self, when: str) -> None:
        """Raise CheckFailed unless the client ends the connection with close_notify."""
        how = await self.wait_for_end(when)
        expect(how == "close_notify", f"the client ended with {how} instead of close_notify {when}")

    # --- frames out ---------------------------------------------------------------------------------

    def frame_bytes(
        self,
        kind: str | int,
        stream: int = 0,
        body: bytes = b"",
        *,
        token: bytes = NO_TOKEN,
        salt: bytes | None = None,
        counter: int | None = None,
        offset_ms: int = 0,
        timestamp: int | None = None,
        version: int = 1,
        flags: int = 0,
        length: int | None = None,
    ) -> bytes:
        """Encode a frame. Omitted fields get valid values."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        number = KINDS[kind] if isinstance(kind, str) else kind
        sent_at = self.wall + offset_ms if timestamp is None else timestamp
        size = MIN_LENGTH + len(body) if length is None else length
        header = HEADER.pack(size, version, number, flags, stream, sent_at, salt or self.salt, counter, token)
        return header + body

    def send(self, kind: str | int, stream: int = 0, body: bytes = b"", **fields: Any) -> None:
        """Send a frame; see `frame_bytes`."""
        self.write(self.frame_bytes(kind, stream, body, **fields))

    def write(self, data: bytes) -> None:
        """Encrypt and send arbitrary bytes."""
        assert self._tls is not None
        if data:
            self._tls.write(data)
        self._flush()

    def limit_receive_buffer(self) -> None:
        """Let the kernel hold little of what the client sends while nothing is read."""
        raw: socket.socket = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    async def write_and_drain(self, data: bytes) -> None:
        """Send arbitrary bytes, and wait until the kernel has them all."""
        self._writer.transport.set_write_buffer_limits(0)
        self.write(data)
        await self._writer.drain()

    def write_plain(self, data: bytes) -> None:
        """Send bytes without TLS and end the TCP stream."""
        self._writer.write(data)
        self._end_writing()

    async def write_in_pieces(self, data: bytes, at: Sequence[int] = ()) -> None:
        """Send bytes in several TLS records and TCP segments, cut at the offsets `at` or after each byte."""
        cuts = [0, *at, len(data)] if at else range(len(data) + 1)
        for begin, end in itertools.pairwise(cuts):
            self.write(data[begin:end])
            await self._writer.drain()
            await asyncio.sleep(0)

    def welcome(self, **changes: Any) -> None:
        """Send WELCOME. `changes` replaces keys; None removes one."""
        self.write(self.welcome_bytes(**changes))

    def welcome_bytes(self, *, header: dict[str, Any] | None = None, **changes: Any) -> bytes:
        settings = {
            "server": "conformance",
            "versions": [1],
            "max_frame": MAX_FRAME,
            "max_streams": 128,
            "idle_timeout_ms": 300_000,
            "tolerance_ms": TOLERANCE_MS,
            "sts": {"max_age": 0, "include_subdomains": False},
            **changes,
        }
        if isinstance(settings.get("streams"), dict):
            self.allowed |= _OF_STREAMS
        if isinstance(settings.get("calls"), dict):
            self.allowed |= _OF_CALLS
        body = pack({key: value for key, value in settings.items() if value is not None})
        return self.frame_bytes("WELCOME", 0, body, **{"counter": 0, **(header or {})})

    def response_bytes(self, request: Frame, result: Any, **fields: Any) -> bytes:
        """Encode a RESPONSE to a request."""
        self.in_flight.pop(request.stream, None)
        return self.frame_bytes(
            "RESPONSE", request.stream, pack(result), **{"token": request.token, **fields}
        )

    def respond(self, request: Frame, result: Any, **fields: Any) -> None:
        """Send a RESPONSE to a request."""
        self.write(self.response_bytes(request, result, **fields))

    def respond_error(self, request: Frame, code: int, details: Any = None, **fields: Any) -> None:
        """Send an ERROR to a request."""
        self.in_flight.pop(request.stream, None)
        body = [code, "refused by the scenario"] + ([] if details is None else [details])
        self.send("ERROR", request.stream, pack(body), **{"token": request.token, **fields})

    def item(self, opened: Frame, value: Any, **fields: Any) -> None:
        """Send an ITEM on the stream of an OPEN."""
        self.send("ITEM", opened.stream, pack(value), **{"token": opened.token, **fields})

    def accept(self, opened: Frame, **fields: Any) -> None:
        """Send the ACCEPTED that fits a durable OPEN, with other `fields`."""
        resume = opened.meta["resume"]
        run = {"id": resume["id"], "attachment": "a", "from": resume["from"], "state": "running"}
        body = pack({**run, "first": 0, "next": resume["from"] + 100, **fields})
        self.send("ACCEPTED", opened.stream, body, token=opened.token)

    def credit(self, opened: Frame, items: int, size: int, **fields: Any) -> None:
        """Send a CREDIT on the stream of an OPEN."""
        self.send("CREDIT", opened.stream, pack([items, size]), **{"token": opened.token, **fields})

    def call(self, number: int, method: str, params: Any, token: bytes, **fields: Any) -> None:
        """Send a CALL."""
        self.send("CALL", number, pack([method, params, {"deadline_ms": 20_000}]), token=token, **fields)

    def event(self, name: str, data: Any, token: bytes = NO_TOKEN) -> None:
        """Send EVENT."""
        self.send("EVENT", 0, pack([name, data]), token=token)

    def goaway(self, reason: str = "draining", retry_after_ms: int = 0) -> None:
        """Send GOAWAY."""
        self.send("GOAWAY", 0, pack({"reason": reason, "retry_after_ms": retry_after_ms}))

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send close_notify and end the TCP stream."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLError):  # the client's close_notify need not have arrived
            self._tls.unwrap()
        self._flush()
        self._end_writing()

    def truncate(self) -> None:
        """End the TCP stream without close_notify."""
        self._end_writing()

    def _end_writing(self) -> None:
        if not (self._write_ended or self._writer.is_closing()):
            self._write_ended = True
            with contextlib.suppress(OSError):  # the client closed first, and that was not read yet
                self._writer.write_eof()

    async def truncate_and_wait(self) -> None:
        """Truncate the TCP stream and wait until the client ends the connection.

        The client's next call needs an idempotency key: it may still be sent on the lost connection.
        """
        self.truncate()
        await self.wait_for_end("that was cut")

    def reset(self) -> None:
        """Abort the TCP connection so that the client receives a reset."""
        raw: socket.socket = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def abort(self) -> None:
        """Close the connection regardless of its state. Idempotent."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):  # it does not matter how it ended
            await self._writer.wait_closed()
