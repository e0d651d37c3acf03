"""Shared test helpers: a free port, fake clocks and timers, a TCP transport without a socket, and
the two ends of a conversation joined in memory."""

from __future__ import annotations

import asyncio
import errno
import heapq
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from hypothesis import settings

from tests.limits import TIMEOUT
from zcproto.connection.events import ConnectionEnded, Request, ServerEvent, ServerStream
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_calls import CallToClient, ServerCall, encode_call
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.sessions import OpenedSession, SessionRegistry, SessionSettings
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    CANCEL,
    NO_TOKEN,
    OPEN,
    PING,
    REQUEST,
    Kind,
    RawFrame,
    Side,
    accepted_with_calls,
    accepted_with_durable,
    accepted_with_streams,
    encode_frame,
)
from zcproto.wire.message import ErrorMessage, decode_body, decode_error, decode_event, encode_request

WALL = 1_767_225_600_000
"""2026-01-01 00:00:00 UTC, in milliseconds."""
NOW = 1_000.0
"""Monotonic seconds at the start of a test."""
SALT = bytes.fromhex("a1b2c3d4e5f60718")
FATAL_CODES = frozenset({Code.PROTOCOL_ERROR, Code.FRAME_TOO_LARGE, Code.REPLAYED})
"""Codes that always end the connection (STALE_TIMESTAMP does so on stream 0 only)."""


ROOT: Final = Path(__file__).parents[1]

T = TypeVar("T")


def machine_settings(*, max_examples: int, steps: int) -> settings:
    """Return the settings of a state machine: these, or those of `--hypothesis-profile=long`."""
    if settings.get_current_profile_name() == "long":
        return settings()
    return settings(max_examples=max_examples, stateful_step_count=steps)


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the environment for settings such as `store__timeout`."""
    return {f"ZCPROTO_{name.upper()}": value for name, value in settings.items()}


def whole_lines(log: str) -> list[dict[str, Any]]:
    """Return the events of a log in JSON, which may end in a line that is being written."""
    return [json.loads(line) for line in log.split("\n")[:-1] if line.startswith("{")]


def run_mypy(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Check the types of programs that use the package, as strictly as its own.

    With the options of `python -m tests`, mypy finds what that has learned of the package. With others, each of the
    two would forget what the other has learned.
    """
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    return subprocess.run(
        [sys.executable, "-m", "mypy", *options, *arguments],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},  # it does not follow the hooks of an editable install
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that must never suspend, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("the coroutine suspended")


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises this error, whatever it is called with."""

    def fail(*arguments: object, **options: object) -> Any:
        raise error

    return fail


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that this loop, a thread or another process fulfils."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class FakeClock:
    """Wall and monotonic time that the test advances."""

    def __init__(self, wall: int = WALL, now: float = NOW) -> None:
        self.wall_ms = wall
        self.now_s = now

    def wall(self) -> int:
        return self.wall_ms

    def now(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.wall_ms += round(seconds * 1000)
        self.now_s += seconds


class FakeHandle:
    """The return value of `call_at`."""

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when = when
        self.callback = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTimers:
    """The clock and timers of an event loop, advanced by the test."""

    def __init__(self, now: float = NOW) -> None:
        self.clock = now
        self.early = 0.0  # how much too early timers fire, as in real loops
        self._soon: list[FakeHandle] = []
        self._heap: list[tuple[float, int, FakeHandle]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.clock

    def call_soon(self, callback: Callable[..., object], *args: Any) -> FakeHandle:
        handle = FakeHandle(self.clock, callback, args)
        self._soon.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> FakeHandle:
        handle = FakeHandle(when, callback, args)
        heapq.heappush(self._heap, (when, next(self._order), handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> FakeHandle:
        return self.call_at(self.clock + delay, callback, *args)

    @property
    def armed(self) -> list[float]:
        """Return the due times of the timers that were neither called nor cancelled."""
        return sorted(when for when, _, handle in self._heap if not handle.cancelled)

    @property
    def waiting(self) -> int:
        """The callbacks of the next turn."""
        return sum(not handle.cancelled for handle in self._soon)

    def turn(self) -> None:
        """Run one turn of the loop: due timers, then callbacks."""
        ready, self._soon = self._soon, []
        while self._heap and self._heap[0][0] <= self.clock + self.early:
            ready.append(heapq.heappop(self._heap)[2])
        for handle in ready:
            if not handle.cancelled:
                handle.callback(*handle.args)

    def run(self, limit: int = 1_000) -> int:
        """Run turns until nothing is ready; return how many."""
        for turns in range(limit):
            due = bool(self._heap) and self._heap[0][0] <= self.clock + self.early
            if not self._soon and not due:
                return turns
            self.turn()
        raise AssertionError("the loop never comes to rest")

    def advance(self, seconds: float) -> None:
        """Advance the time, stopping at each timer."""
        end = self.clock + seconds
        self.run()
        while self._heap and self._heap[0][0] - self.early <= end:
            self.clock = max(self.clock, self._heap[0][0] - self.early)
            self.run()
        self.clock = end
        self.run()


class MockTransport(asyncio.Transport):
    """A TCP transport, or a server's TLS transport, without a socket: `sent` is what was written.

    `deliver` passes bytes to a BufferedProtocol as the loop does. With `stuck` the peer reads nothing, and
    writes count against the high-water mark.
    """

    peer = "192.0.2.7"

    def __init__(self, timers: FakeTimers, *, high: int = 65_536) -> None:
        super().__init__()
        self.timers = timers
        self.protocol: Any = None
        self.sent = bytearray()
        self.unsent = 0
        self.high = high
        self.stuck = False
        self.writes: list[int] = []
        self.eof_written = False
        self.aborted = False
        self.can_half_close = True
        self.is_reset = False
        self.lost = False
        self._closing = False
        self._reading = True
        self.paused = False

    def connect(self, protocol: Any) -> None:
        self.protocol = protocol
        protocol.connection_made(self)

    # called by the test

    def deliver(self, data: bytes, piece: int = 65_536) -> None:
        """Deliver bytes from the network in reads of limited size. Fails if reading is paused."""
        for start in range(0, len(data), piece):
            assert self._reading or self.lost or self._closing, "delivered to a transport that is paused"
            if self.lost or self._closing:
                return
            part = data[start : start + piece]
            buffer = self.protocol.get_buffer(-1)
            buffer[: len(part)] = part
            self.protocol.buffer_updated(len(part))

    def deliver_eof(self) -> None:
        """Deliver the peer's FIN. As in asyncio, the transport closes unless the protocol keeps it open."""
        if not self._closing and not self.protocol.eof_received():
            self.close()

    def take(self) -> bytes:
        """Return what was sent since the last call."""
        data = bytes(self.sent)
        self.sent.clear()
        return data

    def drain(self, count: int | None = None) -> None:
        """Let the peer read all or some bytes."""
        self.unsent = 0 if count is None else self.unsent - count
        if self.paused and self.unsent <= self.high // 4:
            self.paused = False
            self.protocol.resume_writing()

    def lose(self, error: Exception | None = None) -> None:
        """Lose the connection."""
        if not self.lost:
            self.lost = self._closing = True
            protocol, self.protocol = self.protocol, None
            protocol.connection_lost(error)

    # called by the protocol

    def write(self, data: Any) -> None:
        assert not self.eof_written, "write after write_eof"
        if self._closing:
            return
        self.sent += data
        self.writes.append(len(data))
        if self.stuck:
            self.unsent += len(data)
            if self.unsent > self.high and not self.paused:
                self.paused = True
                self.protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return self.can_half_close

    def write_eof(self) -> None:
        if self.is_reset:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        self.eof_written = True

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._reading = False
            self.timers.call_soon(self.lose)

    def abort(self) -> None:
        self.aborted = True
        self._closing = True
        self._reading = False
        self.timers.call_soon(self.lose)

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if not self._closing:
            self._reading = False

    def resume_reading(self) -> None:
        if not self._closing:
            self._reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = 65_536 if high is None else high

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.peer, 40_000) if name == "peername" else default


def small_registry(**settings: Any) -> SessionRegistry:
    """Return a registry with predictable random bytes, different in each call."""
    numbers = itertools.count(1)

    def entropy(size: int) -> bytes:
        return next(numbers).to_bytes(4, "big") * (size // 4)

    settings = {"max_sessions": 64, "dead_limit": 64, "grace_limit": 16, "per_user": 50, **settings}
    return SessionRegistry(SessionSettings(**settings), entropy)


class Answer:
    """A decoded frame of the server."""

    def __init__(self, frame: RawFrame) -> None:
        self.raw = frame
        _, head, self.stream, self.timestamp, self.salt, self.counter, self.token, self.body = frame
        self.kind = Kind(head >> 16 & 0xFF)

    @property
    def error(self) -> ErrorMessage:
        assert self.kind is Kind.ERROR
        return decode_error(self.body)

    @property
    def code(self) -> int:
        return self.error.code

    @property
    def value(self) -> Any:
        assert self.kind in (Kind.RESPONSE, Kind.WELCOME, Kind.GOAWAY)
        return decode_body(self.body)

    @property
    def event(self) -> tuple[str, Any]:
        assert self.kind is Kind.EVENT
        return decode_event(self.body)

    def __repr__(self) -> str:
        return f"{self.kind.name}({self.stream}, {decode_body(self.body) if self.body else ''})"


def with_requests(events: Iterable[ServerEvent]) -> Iterator[ServerEvent | Request]:
    """Yield events as they come; raw requests become Request objects."""
    for event in events:
        yield Request(*event) if event.__class__ is tuple else event


class ConnectionPair:
    """A ServerConnection and a scripted client, joined without a socket.

    The methods that make frames return bytes; `send` gives bytes to the server and returns its events;
    `answers` are the frames sent since the last call. The test advances `clock`.
    """

    def __init__(
        self,
        registry: SessionRegistry | None = None,
        settings: ConnectionSettings | None = None,
        *,
        salt: bytes = SALT,
        clock: FakeClock | None = None,
    ) -> None:
        self.clock = FakeClock() if clock is None else clock
        self.registry = small_registry() if registry is None else registry
        self.settings = ConnectionSettings() if settings is None else settings
        self.salt = salt
        self.server = ServerConnection(
            self.settings, self.registry, salt=salt, wall=self.clock.wall(), now=self.clock.now()
        )
        self.counter = 0
        self.token = NO_TOKEN
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)
        if self.settings.streams is not None:
            self._decoder.accepted = accepted_with_streams(Side.CLIENT, self.settings.streams.max_item)
            if self.settings.streams.durable:
                self._decoder.accepted = accepted_with_durable(self._decoder.accepted)
        if self.settings.max_calls:
            self._decoder.accepted = accepted_with_calls(Side.CLIENT, self._decoder.accepted)
        self.welcome = self.answer()

    # frames of the client

    def frame(
        self,
        head: int,
        stream: int = 0,
        body: bytes = b"",
        *,
        token: bytes | None = None,
        counter: int | None = None,
        timestamp: int | None = None,
        late_ms: int = 0,
        salt: bytes | None = None,
    ) -> bytes:
        """Return one frame. The counter increases unless it is given."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        return encode_frame(
            head,
            stream,
            self.clock.wall() - late_ms if timestamp is None else timestamp,
            self.salt if salt is None else salt,
            counter,
            self.token if token is None else token,
            body,
        )

    def request(
        self,
        stream: int = 1,
        method: str = "echo",
        params: dict[str, Any] | None = None,
        meta: dict[str, Any] | None = None,
        **fields: Any,
    ) -> bytes:
        return self.frame(REQUEST, stream, encode_request(method, params, meta), **fields)

    def ping(self, **fields: Any) -> bytes:
        return self.frame(PING, 0, **fields)

    def cancel(self, stream: int, **fields: Any) -> bytes:
        return self.frame(CANCEL, stream, **fields)

    # both directions

    def receive_data(self, data: bytes) -> Iterator[ServerEvent | Request]:
        """Pass bytes to the server; yield its events one at a time."""
        return with_requests(self.server.receive_data(data, self.clock.wall(), self.clock.now()))

    def send(self, data: bytes) -> list[ServerEvent | Request]:
        """Pass bytes to the server; return all its events."""
        return list(self.receive_data(data))

    def get(self, data: bytes) -> Request:
        """Pass bytes that make exactly one request; return it."""
        (event,) = self.send(data)
        assert isinstance(event, Request)
        return event

    def hold(self, data: bytes) -> Request:
        """Pass one request that is not answered at once."""
        request = self.get(data)
        self.server.hold(request, self.clock.now())
        return request

    def open(
        self, stream: int = 1, *, takes_items: bool = False, credit: tuple[int, int] = (10_000, 10_000)
    ) -> ServerStream:
        """Open a stream whose method runs."""
        *_, opened = self.send(self.frame(OPEN, stream, encode_request("tokens", {}, {"credit": credit})))
        assert isinstance(opened, ServerStream)
        if takes_items:
            self.server.streams(self.clock.now()).take_items(opened)
        self.server.hold(opened, self.clock.now())
        return opened

    def call(self, method: str = "approve", timeout: float = 30.0) -> ServerCall:
        """Call a method of the client by its session."""
        body = encode_call(CallToClient(method, {"tool": "shell"}, timeout), self.settings.max_body)
        wall, now = self.clock.wall(), self.clock.now()
        return self.server.call(self.opened.session.id, method, body, timeout_s=timeout, wall=wall, now=now)

    def respond(self, request: Request, body: bytes = b"\x80") -> bool:
        return self.server.respond(request, body, self.clock.wall())

    def timeout(self) -> list[ServerEvent]:
        return self.server.handle_timeout(self.clock.wall(), self.clock.now())

    def answers(self) -> list[Answer]:
        self._decoder.feed(self.server.data_to_send())
        found: list[Answer] = []
        while (frame := self._decoder.next_frame()) is not None:
            found.append(Answer(frame))
        assert not self._decoder.buffered
        return found

    def answer(self) -> Answer:
        """Return the only frame that the server has sent."""
        (answer,) = self.answers()
        return answer

    def refused(self, data: bytes) -> Answer:
        """Pass one frame that is answered by an ERROR without an event."""
        assert self.send(data) == []
        return self.answer()

    def fatal(self, data: bytes) -> Answer:
        """Pass bytes that end the conversation; return the last ERROR."""
        event = self.send(data)[-1]
        assert isinstance(event, ConnectionEnded)
        answer = self.answers()[-1]
        assert answer.stream == 0
        assert event.code == answer.code
        return answer

    # sessions

    def open_session(self, user: str = "ada") -> OpenedSession:
        """Return a session that has not been used on this connection."""
        return self.registry.open(user, client="test/1", address="192.0.2.7", wall=self.clock.wall())

    def use(self, opened: OpenedSession) -> OpenedSession:
        """Use this session's token from now on, as if it had been opened on this connection."""
        self.opened, self.token = opened, opened.token
        self.server.join(opened.session, opened.token, self.clock.wall(), self.clock.now())
        return opened

    def login(self, user: str = "ada") -> OpenedSession:
        return self.use(self.open_session(user))
