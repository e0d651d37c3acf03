"""A server in its own thread, and a blocking client that writes frames by hand.

The client does not use the client library, so that it can send invalid frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import msgpack
import uvloop

from tests.limits import TIMEOUT
from zcproto.app.app import App, default_app
from zcproto.app.authentication import CallableAuthenticator
from zcproto.auth import Authenticators, Identity
from zcproto.common.clock import Clock, wall_ms
from zcproto.common.roles import NO_ROLES, OPERATORS
from zcproto.config import Config, load_config
from zcproto.runtime.build import SINGLE, WorkerRole
from zcproto.runtime.reload import Reloaded
from zcproto.testing import LocalServer
from zcproto.tls.transport import TlsPhase

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

HEADER = struct.Struct("!IBBHIQ8sQ32s")
WELCOME, REQUEST, RESPONSE, ERROR, CANCEL, PING, PONG, GOAWAY, EVENT = range(1, 10)
NO_TOKEN = bytes(32)
KEY = "the right key"


def wall() -> int:
    return time.time_ns() // 1_000_000


PATIENT = {
    "limits__login_timeout": "10m",
    "limits__write_timeout": "10m",
    "server__lifespan_timeout": "1h",
    "sessions__open_timeout": "5m",
    "store__timeout": "10s",
    "tls__handshake_timeout": "30s",
}
"""The longest timeouts, which no busy machine exceeds. A test that waits for one sets it."""

PATIENT_CLIENT: dict[str, Any] = {"timeout": TIMEOUT, "connect_timeout": TIMEOUT}
"""The same for the options of a client."""


def configuration(home: Path, **settings: Any) -> Config:
    """Return a configuration; `limits__max_streams=4` sets `max_streams` in `[limits]`."""
    usual = {
        **PATIENT,
        "server__port": 0,
        "certificates__key_types": ["ecdsa-p256"],
        "limits__login_failures": 100,
        "sessions__per_user": 1000,
        "store__url": "memory",
    }
    overrides = {name.replace("__", "."): value for name, value in {**usual, **settings}.items()}
    return load_config(None, home=home, environ={}, overrides=overrides)


def identify(user: Any = None, key: Any = None) -> Identity | None:
    """Accept every user with the key; users named operator* are operators."""
    return (
        Identity(str(user), roles=OPERATORS if str(user).startswith("operator") else NO_ROLES)
        if key == KEY
        else None
    )


class TestClock:
    """The system clock with an adjustable wall time, and a monotonic time that `ServerThread.advance` moves."""

    __slots__ = ("ahead_ms", "ahead_s")
    __test__ = False

    def __init__(self) -> None:
        self.ahead_ms = 0
        self.ahead_s = 0.0

    def wall(self) -> int:
        return wall_ms() + self.ahead_ms

    def now(self) -> float:
        return time.monotonic() + self.ahead_s


class ServerThread(LocalServer):
    """A server on a loop in its own thread, so that tests may block.

    `in_loop` runs a function in the server's thread; `until` waits for a condition there.
    """

    _stuck_after_s = TIMEOUT

    def __init__(
        self,
        home: Path,
        certs: Path,
        app: App | None = None,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
        authenticators: Authenticators | None = None,
        users_file: bool = False,
        role: WorkerRole = SINGLE,
        **settings: Any,
    ) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        if not (home / "certs").exists():
            shutil.copytree(certs, home / "certs")
        self.clock = TestClock()
        if authenticators is None and not users_file:
            authenticators = [CallableAuthenticator("api_key", identify)]
        self.settings = settings

        def new_loop() -> asyncio.AbstractEventLoop:
            loop = loop_factory()
            if isinstance(loop, asyncio.BaseEventLoop):
                loop.time = self.clock.now
            return loop

        super().__init__(
            default_app() if app is None else app,
            configuration(home, **settings),
            home=home,
            loop_factory=new_loop,
            authenticators=authenticators,
            role=role,
            read_config=lambda: configuration(home, **self.settings),
            clock=self.clock,
        )

    start = LocalServer.__enter__

    def drain(self, limit: float | None = 0.0) -> None:
        super().drain(limit)

    def begin_drain(self, limit: float | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has just ended
            self.loop.call_soon_threadsafe(self.server.begin_drain, limit)

    def join(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self.alive, "the server did not end"

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def port(self) -> int:
        return self.server.port

    def reload(self, **settings: Any) -> Reloaded:
        """Reload with additional settings. Raises ConfigError."""
        self.settings = {**self.settings, **settings}
        return asyncio.run_coroutine_threadsafe(self.server.reload(), self.loop).result(TIMEOUT)

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds in the server's thread."""
        eventually(lambda: self.in_loop(condition))

    def advance(self, seconds: float) -> None:
        """Let time pass for a server on asyncio's loop: what is due by then happens in the next turn."""
        assert isinstance(self.loop, asyncio.BaseEventLoop), "the time of uvloop cannot be moved"
        self.in_loop(lambda: setattr(self.clock, "ahead_s", self.clock.ahead_s + seconds))

    @property
    def stats(self) -> dict[str, Any]:
        return self.in_loop(self.server.statistics)

    def cpu_time(self) -> float:
        """Return the CPU seconds that the server's thread has used."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def tcp(self, host: str = "127.0.0.1") -> socket.socket:
        raw = socket.create_connection((host, self.port), timeout=TIMEOUT)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return raw

    def client(self, user: str | None = None, **options: Any) -> Client:
        """Connect; with a user, also open a session."""
        return Client(self.port, self.home / "certs" / "ca.crt", user=user, **options)

    def leftovers(self) -> dict[str, int]:
        """Return the counts of everything that a connection may leave behind."""
        server = self.server
        state, wheel = server.state, server.parts.acceptor.wheel

        def not_open(entry: Any) -> bool:
            """Return whether a deadline counts: that of a completed handshake stays until its time."""
            return getattr(entry, "_phase", None) is not TlsPhase.OPEN

        def count() -> dict[str, int]:
            state.log_soon.write()  # queued log lines are not leftovers
            return {
                "connections": len(state.connections),
                "tcp": server.parts.listener.connections,
                "sites": server.parts.listener.most_per_address,
                "adopting": len(server.parts.listener._adopting),
                "by_session": len(state.session_connections),
                "wheel": sum(not_open(entry) for bucket in wheel._buckets.values() for entry in bucket),
                "handlers": state.tasks.running,
                "handshakes": server.parts.acceptor.handshakes_in_progress,
                "pending": server.parts.acceptor.pending.places,
                "http": 0 if server.parts.http is None else len(server.parts.http.endpoint.connections),
            }

        return self.in_loop(count)

    def until_left(self, **expected: int) -> None:
        """Wait until closed connections have left only what is expected."""

        def settled() -> bool:
            return all(count == expected.get(name, 0) for name, count in self.leftovers().items())

        try:
            eventually(settled)
        except AssertionError:
            raise AssertionError(f"left behind: {self.leftovers()}, expected {expected}") from None


def eventually(condition: Callable[[], Any]) -> None:
    """Poll until a condition holds that another thread or process causes."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.002)


class StoppedClock:
    """The wall time of a clock, and a monotonic time that a test sets."""

    def __init__(self, clock: Clock) -> None:
        self.wall = clock.wall
        self.seconds = clock.now()

    def now(self) -> float:
        return self.seconds


class Frame(NamedTuple):
    kind: int
    stream: int
    timestamp: int
    salt: bytes
    counter: int
    token: bytes
    body: bytes

    @property
    def value(self) -> Any:
        return msgpack.unpackb(self.body) if self.body else None

    @property
    def code(self) -> int:
        assert self.kind == ERROR, self
        return int(self.value[0])

    @property
    def message(self) -> str:
        assert self.kind == ERROR, self
        return str(self.value[1])

    @property
    def details(self) -> dict[str, Any]:
        assert self.kind == ERROR, self
        return dict(self.value[2]) if len(self.value) > 2 else {}


class ClosedError(Exception):
    """The server closed the connection: with close_notify (`clean`), by FIN alone, or by reset."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how
        self.clean = how == "close_notify"


class AnsweredError(Exception):
    """A call was answered with an ERROR."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame.value)
        self.frame = frame
        self.code = frame.code
        self.message = frame.message
        self.details = frame.details


def client_context(ca_file: Path, alpn: Sequence[str] = ("zcp/1",)) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca_file)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


contexts: dict[Path, ssl.SSLContext] = {}


class Client:
    """One connection, with a session if there is a user. `token` is the token of its frames."""

    def __init__(
        self,
        port: int,
        ca_file: Path,
        *,
        user: str | None = None,
        key: str = KEY,
        host: str = "127.0.0.1",
        receive_buffer: int | None = None,
        context: ssl.SSLContext | None = None,
        wall: Callable[[], int] = wall,
    ) -> None:
        context = context or contexts.get(ca_file)
        if context is None:
            context = contexts[ca_file] = client_context(ca_file)
        raw = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        raw.settimeout(TIMEOUT)
        try:
            if receive_buffer is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            raw.connect((host, port))
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.tls = context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)
        except BaseException:
            raw.close()
            raise
        self._wall = wall
        self.counter = 0
        self.stream = 0
        self.token = NO_TOKEN
        self.opened: dict[str, Any] = {}
        self.salt = b""
        self.events: list[Frame] = []
        self._rest = b""
        try:
            self.welcome = self.receive()
            assert self.welcome.kind == WELCOME
            self.salt = self.welcome.salt
            if user is not None:
                self.open_session(user, key)
        except BaseException:
            self.tls.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- out -----------------------------------------------------------------------------------------

    def frame(
        self,
        kind: int = REQUEST,
        body: bytes = b"",
        *,
        stream: int | None = None,
        token: bytes | None = None,
        timestamp: int | None = None,
        salt: bytes | None = None,
        counter: int | None = None,
        version: int = 1,
        flags: int = 0,
        length: int | None = None,
    ) -> bytes:
        """Return the bytes of a frame; fields default to valid values."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        if stream is None:
            if kind == REQUEST:
                self.stream += 1
                stream = self.stream
            else:
                stream = 0
        header = HEADER.pack(
            64 + len(body) if length is None else length,
            version,
            kind,
            flags,
            stream,
            self._wall() if timestamp is None else timestamp,
            self.salt if salt is None else salt,
            counter,
            self.token if token is None else token,
        )
        return bytes(header + body)

    def request(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> bytes:
        body = [method, params] if meta is None else [method, params, meta]
        return self.frame(REQUEST, msgpack.packb(body), **fields)

    def send(self, *frames: bytes) -> None:
        self.tls.sendall(b"".join(frames))

    def cancel(self, stream: int) -> None:
        self.send(self.frame(CANCEL, stream=stream))

    # --- in ------------------------------------------------------------------------------------------

    def _fill(self, size: int) -> None:
        while len(self._rest) < size:
            try:
                data = self.tls.recv(65_536)
            except ssl.SSLEOFError:
                raise ClosedError("FIN") from None
            except (ConnectionResetError, BrokenPipeError):
                raise ClosedError("reset") from None
            if not data:
                raise ClosedError("close_notify")
            self._rest += data

    def receive(self) -> Frame:
        """Return the next frame of any kind. Raises ClosedError at the end."""
        self._fill(HEADER.size)
        length, version, kind, flags, stream, timestamp, salt, counter, token = HEADER.unpack_from(self._rest)
        assert (version, flags) == (1, 0)
        self._fill(4 + length)
        body = self._rest[HEADER.size : 4 + length]
        self._rest = self._rest[4 + length :]
        return Frame(kind, stream, timestamp, salt, counter, token, body)

    def answer(self, stream: int | None = None) -> Frame:
        """Return the next answer, of the stream if one is given. Events are appended to `events`."""
        while (frame := self.receive()).kind == EVENT:
            self.events.append(frame)
        if stream is not None:
            assert frame.stream == stream, frame
        return frame

    def answers(self, count: int) -> dict[int, Frame]:
        found: dict[int, Frame] = {}
        for _ in range(count):
            frame = self.answer()
            assert frame.stream not in found, "answered twice"
            found[frame.stream] = frame
        return found

    def event(self) -> Frame:
        """Return the next event; no other frame may come before it."""
        if self.events:
            return self.events.pop(0)
        frame = self.receive()
        assert frame.kind == EVENT, frame
        return frame

    def call(self, method: str, params: Mapping[str, Any] | None = None, **fields: Any) -> Any:
        """Send a request and wait for its answer. Raises AnsweredError."""
        self.send(self.request(method, params, **fields))
        frame = self.answer(fields.get("stream", self.stream))
        if frame.kind == ERROR:
            raise AnsweredError(frame)
        assert frame.kind == RESPONSE
        return frame.value

    def refused(self, method: str, params: Mapping[str, Any] | None = None, **fields: Any) -> Frame:
        """Return the ERROR that answers a call."""
        try:
            value = self.call(method, params, **fields)
        except AnsweredError as answered:
            return answered.frame
        raise AssertionError(f"{method} was answered with {value!r}")

    def echo(self, *, size: int = 0) -> None:
        """Make one call that must succeed."""
        params = {"n": self.stream, "data": b"x" * size}
        assert self.call("echo", params) == params

    def is_open(self) -> bool:
        """Return whether the connection still answers."""
        try:
            self.send(self.frame(PING))
            while self.receive().kind != PONG:
                pass
        except (ClosedError, OSError):
            return False
        return True

    def rest_until_closed(self) -> tuple[list[Frame], str]:
        """Return all frames up to the end, and how it ended."""
        frames = []
        try:
            while True:
                frames.append(self.receive())
        except ClosedError as closed:
            return frames, closed.how

    # --- sessions and the end --------------------------------------------------------------------------

    def open_session(self, user: str, key: str = KEY, client: str = "test/1") -> dict[str, Any]:
        params = {"scheme": "api_key", "user": user, "key": key, "client": client}
        self.opened = self.call("session.open", params, token=NO_TOKEN)
        self.token = self.opened["token"]
        return self.opened

    def close(self) -> None:
        """Send close_notify and close, as a client should."""
        with contextlib.suppress(OSError, ValueError):
            self.tls.settimeout(5.0)  # a server that hangs does not answer
            while True:
                try:
                    self.tls.unwrap()
                    break
                except ssl.SSLError as error:
                    if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
                        break
                    self.tls.recv(65_536)
        self.tls.close()

    def fin(self) -> None:
        """Close without close_notify."""
        self.tls.close()

    def reset(self) -> None:
        reset(self.tls)


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_end(connection: socket.socket) -> tuple[bytes, str]:
    """Return all bytes up to the end of a plain TCP connection, and how it ended."""
    received = b""
    try:
        while data := connection.recv(65_536):
            received += data
    except ConnectionResetError:
        return received, "reset"
    return received, "FIN"


@contextlib.contextmanager
def bystander(server: ServerThread) -> Iterator[Client]:
    """Check that another user's connection works before, during and after the body."""
    with server.client("bystander") as client:
        client.echo()
        yield client
        client.echo()
        client.echo(size=5_000)
        assert client.events == []
