"""An event loop whose time jumps, and a scripted server in memory."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec

from tests.helpers import NOW, WALL
from zcproto.client.client import Client
from zcproto.client.connections import ConnectionManager
from zcproto.client.dial import LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol
from zcproto.connection.client import ClientConnection
from zcproto.errors import Code, TlsError
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
    ITEM,
    NO_TOKEN,
    OPEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    RESULT,
    WELCOME,
    Side,
    accepted_with_calls,
    accepted_with_streams,
    encode_frame,
)
from zcproto.wire.message import (
    Resume,
    decode_body,
    decode_error,
    decode_open,
    decode_request,
    encode_body,
    encode_error,
    encode_request,
)

P = ParamSpec("P")

GREETING: dict[str, Any] = {
    "server": "zcproto",
    "versions": [1],
    "max_frame": 1_048_576,
    "max_streams": 128,
    "idle_timeout_ms": 0,
    "tolerance_ms": 30_000,
    "sts": {"max_age": 0, "include_subdomains": False},
}
STREAMS: dict[str, Any] = {"streams": {"max_open": 4, "max_item": 65_536}}
DURABLE: dict[str, Any] = {"streams": {**STREAMS["streams"], "durable": True}}
MAX_ITEM = 65_536
DAY_MS = 86_400_000


# --- time -------------------------------------------------------------------------------------------


class JumpingSelector(selectors.DefaultSelector):
    """Advances the loop's time to the next timer instead of waiting. These tests use no real sockets."""

    loop: JumpingLoop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("deadlock: no timer is set")
        ready = super().select(0)
        if not ready and timeout > 0:
            self.loop.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits."""

    def __init__(self) -> None:
        self.now = NOW
        selector = JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    @property
    def timers(self) -> list[float]:
        """Return the due times of active timers."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return [handle.when() for handle in heapq.nsmallest(100, scheduled) if not handle.cancelled()]


def scripted(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on a JumpingLoop."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


def now() -> float:
    return asyncio.get_running_loop().time()


async def turns(count: int = 20) -> None:
    """Run everything that needs no time."""
    for _ in range(count):
        await asyncio.sleep(0)


class LoopClock:
    """A clock with the loop's time and a wall time that tests set."""

    def __init__(self) -> None:
        self.wall_ms = WALL

    def wall(self) -> int:
        return self.wall_ms

    def now(self) -> float:
        return now()


# --- the server -------------------------------------------------------------------------------------


class ReceivedRequest(NamedTuple):
    """A request as it arrived, and the actions of scripts."""

    link: ServerLink
    stream: int
    token: bytes
    method: str
    params: dict[str, Any]
    meta: Any
    at: float
    resume: Resume | None = None

    def accept(self, first: int = 0, following: int = 1_000, **fields: Any) -> None:
        """Send ACCEPTED, with the position of the first item that is kept and that after the last one."""
        assert self.resume is not None
        run = {"id": self.resume.id, "attachment": "a", "from": self.resume.position, "state": "running"}
        body = encode_body({**run, "first": first, "next": following, **fields})
        self.link.send(ACCEPTED, self.stream, body, token=self.token)

    def respond(self, value: Any = None) -> None:
        self.link.send(RESPONSE, self.stream, encode_body(value), token=self.token)

    def fail(self, code: int, details: dict[str, Any] | None = None, message: str = "because") -> None:
        self.link.send(ERROR, self.stream, encode_error(code, message, details), token=self.token)


Action = Callable[[ReceivedRequest], object]


def ok(value: Any = None) -> Action:
    return lambda request: request.respond(value)


def fail(code: Code, **details: Any) -> Action:
    return lambda request: request.fail(code, details)


def cut(request: ReceivedRequest) -> None:
    """Reset the connection."""
    request.link.cut()


def goodbye(request: ReceivedRequest) -> None:
    """Send GOAWAY and close cleanly, without an answer."""
    request.link.go_away("draining", 500)
    request.link.close_cleanly()


def silence(request: ReceivedRequest) -> None:
    """Send no answer."""


class ServerLink(asyncio.Transport):
    """The server's end of one connection, and the transport that the client writes to."""

    def __init__(self, server: ScriptedServer, number: int) -> None:
        super().__init__()
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.protocol: Any = None
        self.salt = number.to_bytes(8, "big")
        self.counter = 0
        self.requests: list[ReceivedRequest] = []
        self.cancelled: list[int] = []
        self.pings: list[float] = []
        self.answers_pings = True
        self.last_counter = 0
        self.ended = ""
        self.gone = False
        self.reading: list[bool] = []
        self.paused = False
        self.unsent = 0  # bytes that wait in the transport
        self.answers: list[tuple[int, Any]] = []
        self.on_streams: list[tuple[int, int, bytes, Any]] = []  # kind, stream, token, value
        self._decoder = FrameDecoder(Side.SERVER, 2**32 - 1)
        accepted = accepted_with_streams(Side.SERVER, MAX_ITEM)
        self._decoder.accepted = accepted_with_calls(Side.SERVER, accepted)

    # called by the client

    def write(self, data: Any) -> None:
        self.server.writes += 1
        self.loop.call_soon(self._receive, bytes(data))

    def close(self) -> None:
        self._end("closed", None)

    def abort(self) -> None:
        self._end("aborted", TlsError("connection_reset"))

    def is_closing(self) -> bool:
        return bool(self.ended)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        if self.reading[-1:] != [False]:
            self.reading.append(False)

    def resume_reading(self) -> None:
        if self.reading[-1:] == [False]:
            self.reading.append(True)

    def _end(self, how: str, error: TlsError | None) -> None:
        if not self.ended:
            self.ended = how
            if self.server.lingers:
                self.loop.call_later(self.server.lingers, self._lost, error)
                return
        elif how != "aborted":
            return
        self.loop.call_soon(self._lost, error)

    def _lost(self, error: TlsError | None) -> None:
        if not self.gone:
            self.gone = True
            self.protocol.connection_lost(error)

    # called by tests

    def send(
        self, head: int, stream: int = 0, body: bytes = b"", *, token: bytes = NO_TOKEN, **fields: Any
    ) -> None:
        if self.ended:
            return
        wall = self.server.wall()
        frame = encode_frame(head, stream, wall, self.salt, self.counter, token, body)
        self.counter += 1
        self.protocol.data_received(frame)

    def go_away(self, reason: str = "draining", retry_after_ms: int = 0) -> None:
        self.send(GOAWAY, 0, encode_body({"reason": reason, "retry_after_ms": retry_after_ms}))

    def event(self, name: str, data: Any, token: bytes) -> None:
        self.send(EVENT, 0, encode_body([name, data]), token=token)

    def item(self, stream: int, value: Any) -> None:
        self.send(ITEM, stream, encode_body(value))

    def credit(self, stream: int, items: int, size: int = 1_000_000) -> None:
        self.send(CREDIT, stream, encode_body([items, size]))

    def call(self, number: int, method: str, params: dict[str, Any] | None = None, *, token: bytes) -> None:
        """Call the client; `answers` will have the number and the result, or the code of the error."""
        self.send(CALL, number, encode_request(method, params, {"deadline_ms": 30_000}), token=token)

    def fatal(self, code: Code) -> None:
        self.send(ERROR, 0, encode_error(code, "fatal"))
        self.close_cleanly()

    def close_cleanly(self) -> None:
        """Send close_notify."""
        if not self.ended:
            self.protocol.eof_received()
            self._end("closed by the server", None)

    def cut(self) -> None:
        self._end("cut", TlsError("connection_reset"))

    def pause(self) -> None:
        self.protocol.pause_writing()

    def resume(self) -> None:
        self.protocol.resume_writing()

    def _receive(self, data: bytes) -> None:
        self._decoder.feed(data)
        while (frame := self._decoder.next_frame()) is not None:
            _, head, stream, timestamp, salt, counter, token, body = frame
            assert salt == self.salt
            assert counter > self.last_counter
            self.last_counter = counter
            if head == RESULT:
                self.answers.append((stream, decode_body(body)))
            elif head == FAILURE:
                self.answers.append((stream, decode_error(body).code))
            if self.ended:
                continue
            if head in (CREDIT, END, ITEM):
                self.on_streams.append((head, stream, token, decode_body(body) if body else None))
            elif head in (REQUEST, OPEN):
                resume = decode_open(body)[4] if head == OPEN else None
                method, params, meta = decode_request(body, may_resume=head == OPEN)
                request = ReceivedRequest(self, stream, token, method, params, meta, now(), resume)
                self.requests.append(request)
                self.server.requests.append(request)
                if abs(timestamp - self.server.wall()) > 30_000:
                    request.fail(Code.STALE_TIMESTAMP, {"server_time": self.server.wall()})
                else:
                    self.server.act(request)
            elif head == CANCEL:
                self.cancelled.append(stream)
            elif head == PING:
                self.pings.append(now())
                if self.server.answers_pings and self.answers_pings:
                    self.send(PONG)


class ScriptedServer:
    """Answers each request of a method with the next action of its script, and then by default.

    `refuse` holds errors of the next attempts to connect, `on_welcome` actions after the next WELCOMEs. `lingers`
    is the time between the end of a connection and its close, `delay` that to WELCOME, or to an error of `refuse`,
    `storing` that from WELCOME to the use of the connection, as for storing its policy;
    `listens` is whether there is a TCP connection meanwhile. By default `session.open` and `session.refresh`
    return tokens, `echo` returns its params, and other methods return nil.
    """

    def __init__(self, **greeting: Any) -> None:
        self.greeting = GREETING | greeting
        self.links: list[ServerLink] = []
        self.requests: list[ReceivedRequest] = []
        self.dialled: list[float] = []
        self.refuse: list[Exception] = []
        self.scripts: dict[str, list[Action]] = {}
        self.answers_pings = True
        self.lingers = 0.0
        self.delay = 0.0
        self.storing = 0.0
        self.listens = True
        self.ahead_ms = 0
        self.session: dict[str, Any] = {}
        self.writes = 0
        self.on_welcome: list[Callable[[ServerLink], object]] = []
        self._tokens = itertools.count(1)

    def wall(self) -> int:
        return WALL + round((now() - NOW) * 1000) + self.ahead_ms

    def script(self, method: str, *actions: Action) -> None:
        self.scripts.setdefault(method, []).extend(actions)

    def act(self, request: ReceivedRequest) -> None:
        script = self.scripts.get(request.method)
        if script:
            script.pop(0)(request)
        elif request.method in ("session.open", "session.refresh"):
            request.respond(self.opened())
        elif request.method == "echo":
            request.respond(request.params)
        else:
            request.respond()

    def opened(self) -> dict[str, Any]:
        number = next(self._tokens)
        return {
            "token": token(number),
            "id": f"session-{number}",
            "user": "ada",
            "expires_at": self.wall() + DAY_MS,
            "idle_timeout_ms": 0,
            "refresh_token": None,
            "refresh_expires_at": None,
            "bound": False,
        } | {key: value(number) if callable(value) else value for key, value in self.session.items()}

    @property
    def link(self) -> ServerLink:
        return self.links[-1]

    def calls(self, method: str = "echo") -> list[ReceivedRequest]:
        """Return the requests of one method on all connections."""
        return [request for request in self.requests if request.method == method]

    @property
    def methods(self) -> list[str]:
        return [request.method for request in self.requests]

    async def hold_call(self, client: Client, **params: Any) -> asyncio.Task[Any]:
        """Let a client call `echo` and return the call, which gets no answer."""
        self.script("echo", silence)
        call = asyncio.create_task(client.call("echo", **params))
        await turns()
        return call

    async def lose(self) -> None:
        """Reset the connection and let the client notice it."""
        self.link.cut()
        await turns(3)

    async def dial(
        self, owner: ConnectionManager, resources: LoopResources, endpoint: Endpoint, clock: Any
    ) -> ClientProtocol:
        """Return a welcomed connection, like `Dialer`."""
        self.dialled.append(now())
        await asyncio.sleep(self.delay)
        if self.refuse:
            raise self.refuse.pop(0)
        link = ServerLink(self, len(self.links) + 1)
        self.links.append(link)
        protocol = ClientProtocol(
            owner, asyncio.get_running_loop(), resources.wheel, clock, ClientConnection(), endpoint
        )
        link.protocol = protocol
        protocol.connection_made(link)
        link.send(WELCOME, 0, encode_body(self.greeting))
        if self.on_welcome:
            self.on_welcome.pop(0)(link)
        await protocol.welcomed
        if self.storing:
            await asyncio.sleep(self.storing)
        return protocol


def token(number: int) -> bytes:
    """Return the token of a scripted server's session."""
    return bytes([number]) * 32


def token_of(client: Client) -> bytes:
    assert client.session is not None
    return client.session.token_bytes


def expire_token(client: Client) -> None:
    """Let the present token count as expired, as the server would report it."""
    client._sessions.expired(token_of(client))


def refreshable(**more: Any) -> dict[str, Any]:
    """Return the fields of a session with a refresh token."""
    return {
        "refresh_token": lambda number: bytes([100 + number]) * 32,
        "refresh_expires_at": WALL + 30 * DAY_MS,
        **more,
    }


def client_of(server: ScriptedServer, **options: Any) -> Client:
    """Return a client of a scripted server, whose random numbers are 0.5 by default."""
    return client_of_all({"server.example": server}, **options)


def client_of_all(servers: Mapping[str, ScriptedServer], **options: Any) -> Client:
    """Return a client of several scripted servers by their hosts, which are tried as listed by default."""
    internals = {
        name: options.pop(name, default)
        for name, default in (("random", lambda: 0.5), ("clock", LoopClock()))
    }
    options = {"user": "ada", "key": "secret", **options}
    if options["user"] is None:
        del options["key"]

    async def dial(
        owner: Any, resources: Any, endpoint: Endpoint, on_reached: Callable[[], None]
    ) -> ClientProtocol:
        server = servers[endpoint.ip]
        if server.listens:
            on_reached()
        return await server.dial(owner, resources, endpoint, client._clock)

    options.setdefault("address_order", "listed")
    client = Client([*servers], ConnectOptions(**options), dial=dial, **internals)
    return client


def numbers(*values: float) -> Callable[[], float]:
    """Return these numbers one by one, and then the last one repeatedly."""
    iterator: Iterator[float] = itertools.chain(values, itertools.repeat(values[-1]))
    return lambda: next(iterator)
