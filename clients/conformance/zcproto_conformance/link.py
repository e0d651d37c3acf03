"""One connection of the scripted server: TLS in memory, frames by hand, and a judge of what the client sends.

The judge holds for every conversation: each frame of the client must have a right header, this connection's salt,
a growing counter, the server's time, a length within the limit, and a stream that is not in flight. What a
conversation sends is up to it: right frames by `send`, any bytes by `write`, any end by `close`, `truncate` and
`reset`.
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
"""Seconds in which a client that sends what it must not would have sent it. A busy machine may hide a fault by it,
and never makes one."""

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
}
_NAMES: Final = {number: name for name, number in KINDS.items()}
_FROM_CLIENT: Final = {"REQUEST", "CANCEL", "PING", "PONG"}
_ON_A_STREAM: Final = {"REQUEST", "CANCEL"}


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of the client."""

    kind: str
    stream: int
    timestamp: int
    counter: int
    token: bytes
    body: bytes

    @property
    def value(self) -> Any:
        """The body of a REQUEST."""
        try:
            return msgpack.unpackb(self.body)
        except (ValueError, msgpack.UnpackException) as error:
            raise CheckFailed(f"a body that is no msgpack came: {type(error).__name__}") from error

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
        if self.kind == "REQUEST":
            return f"REQUEST {self.method} on stream {self.stream}"
        return f"{self.kind} on stream {self.stream}"


def pack(value: Any) -> bytes:
    """msgpack of a value."""
    packed: bytes = msgpack.packb(value)
    return packed


class Ended(CheckFailed):
    """The client ended the connection. `how` is close_notify, truncated or reset."""

    def __init__(self, how: str, waited_for: str) -> None:
        super().__init__(f"the client ended the connection ({how}) instead of {waited_for}")
        self.how = how


Answer = Callable[["Link", Frame], None]


class Link:
    """One connection, from the accepted socket on.

    `ahead_ms` is how far the server's clock is ahead of this machine's. `auto` answers requests that clients may
    make by themselves; a conversation that wants to see one takes it out.
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
        self._has_ended = False
        self._counter_in = 0
        self.patience = patience
        self.salt = entropy(8)
        self.counter = 0
        self.ahead_ms = 0
        self.limit = BEFORE_SESSION
        self.judges_time = True
        self.in_flight: dict[int, Frame] = {}
        self.hello = b""
        self.frames_seen = 0
        self.auto: dict[str, Answer] = {
            "session.info": lambda link, request: link.answer(request, {}),
            "session.close": lambda link, request: link.answer(request, {}),
        }

    @property
    def wall(self) -> int:
        """The server's time, in milliseconds since the Unix epoch."""
        return self._clock.wall() + self.ahead_ms

    @property
    def suite(self) -> str:
        """The cipher suite that was agreed on; empty before."""
        cipher = None if self._tls is None else self._tls.cipher()
        return "" if cipher is None else cipher[0]

    # --- TLS --------------------------------------------------------------------------------------

    async def handshake(self, context: ssl.SSLContext) -> None:
        """Agree on TLS. Raises Ended or CheckFailed if the client does not."""
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not await self._fill("the TLS handshake"):
                    raise Ended(self._end or "truncated", "finishing the handshake") from None
                continue
            except ssl.SSLError as error:
                self._flush()
                raise CheckFailed(f"the TLS handshake failed: {error.reason}") from error
            self._flush()
            return

    async def _fill(self, what: str, seconds: float | None = None) -> bool:
        """Take in what the network has. False at its end. Raises CheckFailed if nothing comes in time."""
        try:
            async with asyncio.timeout(self.patience if seconds is None else seconds):
                data = await self._reader.read(READ_SIZE)
        except TimeoutError:
            raise CheckFailed(f"{what}: nothing came within {self.patience:g} s") from None
        except OSError:
            self._end = "reset"
            return False
        if not data:
            self._incoming.write_eof()
            self._end = self._end or "truncated"
            return False
        if len(self.hello) < BEFORE_SESSION:
            self.hello += data
        self._incoming.write(data)
        return True

    def _flush(self) -> None:
        if self._outgoing.pending and not (self._has_ended or self._writer.is_closing()):
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

    # --- frames in --------------------------------------------------------------------------------

    def _take(self) -> Frame | None:
        data = self._data
        if len(data) < HEADER.size:
            return None
        length, version, kind, flags, stream, timestamp, salt, counter, token = HEADER.unpack_from(data)
        expect(length >= MIN_LENGTH, f"a frame with length {length} came")
        expect(length <= self.limit, f"a frame of {length} came, the limit is {self.limit} here")
        if len(data) < 4 + length:
            return None
        self._data = data[4 + length :]
        name = _NAMES.get(kind, f"kind {kind:#x}")
        expect(version == 1, f"a frame of version {version} came")
        expect(name in _FROM_CLIENT, f"{name} came, which clients do not send")
        expect(flags == 0, f"{name} with flags {flags:#x} came")
        expect((name in _ON_A_STREAM) == (stream != 0), f"{name} on stream {stream} came")
        expect(salt == self.salt, f"{name} with another salt than this connection's came")
        expect(counter > self._counter_in, f"{name} with counter {counter} came after {self._counter_in}")
        self._counter_in = counter
        self.frames_seen += 1
        off = timestamp - self.wall
        if self.judges_time:
            expect(abs(off) <= TOLERANCE_MS, f"{name} came with a timestamp that is {off} ms off")
        frame = Frame(name, stream, timestamp, counter, token, data[HEADER.size : 4 + length])
        expect(name == "REQUEST" or not frame.body, f"{name} with a body came")
        if name == "REQUEST":
            expect(stream not in self.in_flight, f"stream {stream} was used while it is in flight")
            self.in_flight[stream] = frame
        return frame

    async def _next(self, waited_for: str, seconds: float | None = None) -> Frame:
        while True:
            frame = self._take()
            if frame is not None:
                return frame
            if self._end is not None:
                raise Ended(self._end, waited_for)
            if await self._fill(waited_for, seconds):
                self._decrypt()
            elif self._end is None:
                self._end = "truncated"

    def _answers_itself(self, frame: Frame) -> bool:
        if frame.kind == "PING":
            self.send("PONG", token=frame.token)
            return True
        if frame.kind == "REQUEST" and frame.method in self.auto:
            self.auto[frame.method](self, frame)
            return True
        return False

    async def frame(self, waited_for: str = "a frame") -> Frame:
        """The next frame of the client, but for those that are answered by themselves."""
        while True:
            frame = await self._next(waited_for)
            if not self._answers_itself(frame):
                return frame

    async def any_frame(self, waited_for: str) -> Frame:
        """The next frame of the client, whatever it is."""
        return await self._next(waited_for)

    async def request(self, method: str) -> Frame:
        """The next frame, which must be a request of this method."""
        frame = await self.frame(f"a request of {method}")
        expect(
            frame.kind == "REQUEST" and frame.method == method, f"{frame} came instead of REQUEST {method}"
        )
        return frame

    async def requests(self, method: str, count: int) -> list[Frame]:
        """So many requests of one method."""
        return [await self.request(method) for _ in range(count)]

    async def collect(self, seconds: float = QUIET) -> AsyncIterator[Frame]:
        """What comes within a time, but for what is answered by itself. Raises Ended if the client leaves."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0:
            try:
                async with asyncio.timeout(left):
                    frame = await self._next("staying")
            except TimeoutError:
                return
            if not self._answers_itself(frame):
                yield frame

    async def quiet(self, why: str, seconds: float = QUIET) -> None:
        """Raise CheckFailed if the client sends a frame, or ends the connection, within a time."""
        async for frame in self.collect(seconds):
            raise CheckFailed(f"{frame} came {why}")

    async def heard(self) -> None:
        """Return when the client has read all that was sent before, or has left for it."""
        self.send("PING")
        try:
            frame = await self.frame("PONG")
        except Ended:
            return
        expect(frame.kind == "PONG", f"{frame} came instead of PONG")

    async def quiet_or_gone(self, why: str, seconds: float = QUIET) -> bool:
        """As `quiet`, but the client may leave. Whether it did."""
        try:
            await self.quiet(why, seconds)
        except Ended:
            return True
        return False

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """While this lasts, `auto` answers what comes, and any other frame is a fault."""
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
            frame = await self._next("staying")
            expect(self._answers_itself(frame), f"{frame} came, which nobody waits for")

    async def end(self, why: str) -> str:
        """Wait until the client ends the connection, and say how. Frames that were on their way are looked over."""
        while True:
            try:
                frame = await self._next(f"ending the connection {why}")
            except Ended as ended:
                return ended.how
            expect(frame.kind != "PONG", f"{frame} came {why}")

    async def ended_by_client(self, why: str) -> None:
        """The client must end the connection, with close_notify."""
        how = await self.end(why)
        expect(how == "close_notify", f"the client's end was {how} instead of close_notify {why}")

    # --- frames out -------------------------------------------------------------------------------

    def bytes_of(
        self,
        kind: str | int,
        stream: int = 0,
        body: bytes = b"",
        *,
        token: bytes = NO_TOKEN,
        salt: bytes | None = None,
        counter: int | None = None,
        off_ms: int = 0,
        timestamp: int | None = None,
        version: int = 1,
        flags: int = 0,
        length: int | None = None,
    ) -> bytes:
        """A frame. What is not said is right."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        number = KINDS[kind] if isinstance(kind, str) else kind
        when = self.wall + off_ms if timestamp is None else timestamp
        size = MIN_LENGTH + len(body) if length is None else length
        header = HEADER.pack(size, version, number, flags, stream, when, salt or self.salt, counter, token)
        return header + body

    def send(self, kind: str | int, stream: int = 0, body: bytes = b"", **fields: Any) -> None:
        """Send a frame; see `bytes_of`."""
        self.write(self.bytes_of(kind, stream, body, **fields))

    def write(self, data: bytes) -> None:
        """Encrypt and send any bytes."""
        assert self._tls is not None
        if data:
            self._tls.write(data)
        self._flush()

    def write_plain(self, data: bytes) -> None:
        """Send bytes without TLS, and end the stream."""
        self._writer.write(data)
        self._end_writing()

    async def write_in_pieces(self, data: bytes, at: Sequence[int] = ()) -> None:
        """Send bytes in several TLS records and TCP segments; without `at` each byte is one."""
        cuts = [0, *at, len(data)] if at else range(len(data) + 1)
        for begin, end in itertools.pairwise(cuts):
            self.write(data[begin:end])
            await self._writer.drain()
            await asyncio.sleep(0)

    def welcome(self, **changes: Any) -> None:
        """Send WELCOME; `changes` replaces keys, None takes one out."""
        self.write(self.welcome_bytes(**changes))

    def welcome_bytes(self, *, header: dict[str, Any] | None = None, **changes: Any) -> bytes:
        said = {
            "server": "conformance",
            "versions": [1],
            "max_frame": MAX_FRAME,
            "max_streams": 128,
            "idle_timeout_ms": 300_000,
            "tolerance_ms": TOLERANCE_MS,
            "sts": {"max_age": 0, "include_subdomains": False},
            **changes,
        }
        body = pack({key: value for key, value in said.items() if value is not None})
        return self.bytes_of("WELCOME", 0, body, **{"counter": 0, **(header or {})})

    def answer_bytes(self, request: Frame, result: Any, **fields: Any) -> bytes:
        """RESPONSE to a request."""
        self.in_flight.pop(request.stream, None)
        return self.bytes_of("RESPONSE", request.stream, pack(result), **{"token": request.token, **fields})

    def answer(self, request: Frame, result: Any, **fields: Any) -> None:
        """Send RESPONSE to a request."""
        self.write(self.answer_bytes(request, result, **fields))

    def refuse(self, request: Frame, code: int, details: Any = None, **fields: Any) -> None:
        """Send ERROR to a request."""
        self.in_flight.pop(request.stream, None)
        body = [code, "refused by the script"] + ([] if details is None else [details])
        self.send("ERROR", request.stream, pack(body), **{"token": request.token, **fields})

    def fatal(self, code: int) -> None:
        """Send ERROR on stream 0."""
        self.send("ERROR", 0, pack([code, "ended by the script"]))

    def event(self, name: str, data: Any, token: bytes = NO_TOKEN) -> None:
        """Send EVENT."""
        self.send("EVENT", 0, pack([name, data]), token=token)

    def goaway(self, reason: str = "draining", retry_after_ms: int = 0) -> None:
        """Send GOAWAY."""
        self.send("GOAWAY", 0, pack({"reason": reason, "retry_after_ms": retry_after_ms}))

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Send close_notify, and then nothing more."""
        assert self._tls is not None
        with contextlib.suppress(ssl.SSLError):  # the client's close_notify has not come, and need not
            self._tls.unwrap()
        self._flush()
        self._end_writing()

    def truncate(self) -> None:
        """End the TCP stream without close_notify."""
        self._end_writing()

    def _end_writing(self) -> None:
        if not (self._has_ended or self._writer.is_closing()):
            self._has_ended = True
            with contextlib.suppress(OSError):  # the client was quicker, and its end was not read yet
                self._writer.write_eof()

    async def lose(self) -> None:
        """End the TCP stream without close_notify, and wait for the client's end.

        A call that is made next needs an idempotency key: it may still go to the connection that is lost.
        """
        self.truncate()
        await self.end("that was cut")

    def reset(self) -> None:
        """Destroy the TCP connection: the client gets a reset, not an end."""
        plug: socket.socket = self._writer.get_extra_info("socket")
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def drop(self) -> None:
        """Be rid of the connection, whatever its state."""
        self._writer.transport.abort()
        with contextlib.suppress(OSError):  # how it ended is of no interest any more
            await self._writer.wait_closed()
