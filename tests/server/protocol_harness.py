"""A ServerProtocol with a transport without a socket, and with fake time.

`harness.connect("ada")` is a client with a session. Its `send` delivers frames; its `turn` runs the loop and
returns answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from tests.helpers import Answer, FakeClock, FakeTimers, MockTransport, small_registry
from zcproto.app.app import App, Items, Method
from zcproto.app.context import ConnectedClient, Context
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.parameters import Ended
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.errors import Code, NotFound
from zcproto.runs.log import RunLimits, RunTable
from zcproto.runs.store import MemoryRuns
from zcproto.server.durable import serve_runs
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import IdempotencyCache
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import session_methods
from zcproto.server.state import ServerState
from zcproto.sessions import EndReason, OpenedSession
from zcproto.stores.service import SessionService
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import (
    CREDIT,
    END,
    ITEM,
    NO_TOKEN,
    OPEN,
    REQUEST,
    RESULT,
    Accepted,
    Kind,
    Side,
    accepted_with_calls,
    accepted_with_durable,
    accepted_with_streams,
    encode_frame,
)
from zcproto.wire.message import decode_body, encode_body, encode_request

WRITE_BUFFER = 20_000
WRITE_TIMEOUT = 20.0
IDLE = 300.0
LIMITS = StreamLimits(max_open=4, max_item=1_000, write_bytes=20_000)
ABANDON_AFTER = 900.0
PLENTY = (1_000, 1_000_000)
"""Credit for more items and bytes than a test sends."""


class Harness:
    """A ServerState, and connections to it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock.now())
        self.registry = small_registry(idle_timeout_ms=None)
        self.app = App()
        self.futures: list[asyncio.Future[Any]] = []
        self.ran: list[int] = []
        self.contexts: list[Context] = []
        self.closed: list[str] = []
        self.taken: list[Any] = []
        tasks = EagerTasks(loop)
        wheel = DeadlineWheel(self.timers)
        self.state = ServerState(
            settings=ConnectionSettings(idle_timeout_s=IDLE, max_streams=16),
            registry=self.registry,
            sessions=SessionService(self.registry, self.clock),
            idempotency=IdempotencyCache(tasks, self.clock, wheel),
            wheel=wheel,
            tasks=tasks,
            call_soon=self.timers.call_soon,
            clock=self.clock,
            entropy=lambda size: next(self._salts).to_bytes(size, "big"),
            write_buffer_bytes=WRITE_BUFFER,
            write_timeout=WRITE_TIMEOUT,
        )
        self.state.add_methods(self._methods())
        self._salts = itertools.count(1)

    def _methods(self) -> App:
        app = self.app

        @app.method("big")
        def big(n: int, size: int = 9_000) -> bytes:
            self.ran.append(n)
            return bytes(size)

        @app.method("big.unchecked")
        def big_unchecked(**unchecked: Any) -> bytes:
            return big(len(self.ran) + 1)

        @app.method("wait")
        async def wait(context: Context) -> Any:
            self.contexts.append(context)
            return await self.future()

        @app.method("close.and.wait")
        async def close_and_wait(context: Context) -> None:
            context.caller.close("by a method")
            await self.future()

        @app.method("close.and.answer")
        def close_and_answer(context: Context, size: int = 0) -> bytes:
            context.caller.close("by a method")
            return bytes(size)

        @app.method("exit")
        def exit_() -> None:
            raise SystemExit

        @app.method("context.join")
        def join(context: Context) -> None:
            self.contexts.append(context)

        return app

    def future(self) -> asyncio.Future[Any]:
        """Return a future for which a method waits until the test completes it."""
        self.futures.append(self.loop.create_future())
        return self.futures[-1]

    def add_method(self, function: Callable[..., Any], name: str = "", **options: Any) -> None:
        self.state.add_methods([Method(name or function.__name__, function, **options)])

    def allow_streams(self, limits: StreamLimits = LIMITS) -> None:
        """Announce streams to connections from now on, and add the methods of `add_stream_methods`."""
        settings = self.state.settings
        most = max(settings.max_streams, limits.max_open)
        self.state.settings = replace(settings, streams=limits, max_streams=most)
        self.state.add_methods(stream_methods(self))

    def allow_durable(self, **limits: Any) -> MemoryRuns:
        """Announce durable streams to connections from now on, of the methods that were added. Return the store."""
        self.allow_streams()
        store = MemoryRuns(RunTable(RunLimits(**limits)), self.clock.now)
        serve_runs(self.state, store, abandon_after=ABANDON_AFTER)
        return store

    def allow_calls(self, most: int = 8) -> None:
        """Announce calls to connections from now on; the method `call` calls its caller."""
        self.state.settings = replace(self.state.settings, max_calls=most)

        async def call(context: Context, method: str = "approve", **params: Any) -> Any:
            return await context.client.call(method, params)

        self.add_method(call)
        self.state.add_methods(session_methods(self.state, None))

    def connect(self, user: str | None = None, kind: type[ServerProtocol] = ServerProtocol) -> Peer:
        """Connect a client; with a user, also open a session and use it."""
        peer = Peer(self, kind)
        if user is not None:
            peer.login(user)
        return peer

    def advance(self, seconds: float) -> None:
        """Advance all clocks in steps, so that deadlines run at their due times."""
        end = self.clock.now() + seconds
        while True:
            due = [when for when in self.timers.armed if when <= end]
            step = (due[0] if due else end) - self.clock.now()
            self.clock.advance(max(0.0, step))
            self.timers.advance(max(0.0, self.clock.now() - self.timers.clock))
            if not due:
                return

    def turn(self) -> None:
        """Run the tasks of the real loop, then the callbacks of the fake one."""
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))
        self.timers.run()

    def in_loop(self, step: Any) -> Any:
        async def call() -> Any:
            return step()

        return self.loop.run_until_complete(call())


def stream_methods(harness: Harness) -> App:
    """Return methods that send and take items; `closed` has the names of those that have ended."""
    app = App()

    @app.method("count")
    async def count(n: int, size: int = 0) -> AsyncIterator[Any]:
        try:
            for number in range(n):
                yield bytes(size) if size else number
            yield Ended({"sent": n})
        finally:
            harness.closed.append("count")

    @app.method("ticks")
    async def ticks() -> AsyncIterator[int]:
        try:
            for number in range(100):
                await harness.future()
                yield number
        finally:
            harness.closed.append("ticks")

    @app.method("fail")
    async def fail(kind: str) -> AsyncIterator[Any]:
        for number in range(3):
            yield number
        if kind == "not_found":
            raise NotFound("no such thing")
        if kind == "key":
            raise KeyError("x")
        yield {"object": object(), "large": bytes(1_000)}[kind]

    @app.method("stubborn")
    async def stubborn() -> AsyncIterator[int]:
        try:
            await harness.future()
        except asyncio.CancelledError:
            await harness.future()
        yield 1

    @app.method("endless")
    async def endless() -> AsyncIterator[int]:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await harness.future()
            yield 1

    @app.method("until.stopping")
    async def until_stopping(context: Context) -> AsyncIterator[int]:
        yield 1
        await context.stopping.wait()

    @app.method("sum")
    async def sum_(numbers: Items[int], start: int = 0) -> int:
        total = start
        async for number in numbers:
            harness.taken.append(number)
            total += number
        return total

    @app.method("echo.items")
    async def echo_items(said: Items[Any]) -> AsyncIterator[Any]:
        async for value in said:
            yield value
        yield Ended("done")

    @app.method("slowly")
    async def slowly(said: Items[Any]) -> None:
        """Take an item each time that a future is done."""
        while True:
            await harness.future()
            try:
                harness.taken.append(await anext(said))
            except asyncio.CancelledError:
                harness.taken.append(await anext(said))

    @app.method("ignore")
    async def ignore(said: Items[Any]) -> str:
        await anext(said)
        return "enough"

    @app.method("pair")
    async def pair(said: Items[Any]) -> None:
        async def take() -> None:
            await anext(said)

        await asyncio.gather(take(), take())

    return app


class Peer:
    """The client's end of a connection: it makes frames and reads answers."""

    opened: OpenedSession

    def __init__(self, harness: Harness, kind: type[ServerProtocol] = ServerProtocol) -> None:
        self.harness = harness
        self.protocol = kind(harness.state)
        self.transport = MockTransport(harness.timers)
        self.transport.connect(self.protocol)
        self.counter = 0
        self.token = NO_TOKEN
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)
        settings = harness.state.settings
        if settings.streams is not None:
            self.accept(accepted_with_streams(Side.CLIENT, settings.streams.max_item))
            if settings.streams.durable:
                self.accept(accepted_with_durable(self._decoder.accepted))
        if settings.max_calls:
            self.accept(accepted_with_calls(Side.CLIENT, self._decoder.accepted))
        self.welcome, *self.greeted = self.answers()
        self.salt = self.welcome.salt

    def accept(self, accepted: Accepted) -> None:
        """Set the kinds of frames that the server may send; `answers` fails on another one."""
        self._decoder.accepted = accepted

    def frame(self, head: int, stream: int = 0, body: bytes = b"") -> bytes:
        self.counter += 1
        wall = self.harness.clock.wall()
        return encode_frame(head, stream, wall, self.salt, self.counter, self.token, body)

    def request(self, stream: int, method: str, params: dict[str, Any] | None = None, **meta: Any) -> bytes:
        return self.frame(REQUEST, stream, encode_request(method, params, meta))

    def open(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        stream: int = 1,
        credit: tuple[int, int] = PLENTY,
        **meta: Any,
    ) -> bytes:
        return self.frame(OPEN, stream, encode_request(method, params, {"credit": credit, **meta}))

    def credit(self, items: int, size: int = 1_000_000, stream: int = 1) -> bytes:
        return self.frame(CREDIT, stream, encode_body([items, size]))

    def items(self, *values: Any, stream: int = 1) -> list[bytes]:
        return [self.frame(ITEM, stream, encode_body(value)) for value in values]

    def end(self, stream: int = 1) -> bytes:
        return self.frame(END, stream)

    def result(self, number: int, value: Any) -> bytes:
        return self.frame(RESULT, number, encode_body(value))

    def send(self, *frames: bytes) -> None:
        """Deliver the bytes of one read."""
        assert self.transport.is_reading(), "the server does not read"
        self.harness.in_loop(lambda: self.protocol.data_received(b"".join(frames)))

    def answers(self) -> list[Answer]:
        self._decoder.feed(self.transport.take())
        return [Answer(frame) for frame in self._decoder.frames()]

    def heads(self) -> list[int]:
        return [answer.raw[1] for answer in self.answers()]

    def turn(self) -> list[Answer]:
        self.harness.turn()
        return self.answers()

    def settle(self) -> list[Answer]:
        """Let everything happen that does not wait for time. Return all answers."""
        answers = self.answers()
        for _ in range(4):
            answers += self.turn()
        return answers

    def call(self, client: ConnectedClient, method: str = "approve", **params: Any) -> asyncio.Task[Any]:
        """Call a client from outside of a method."""
        task = self.harness.loop.create_task(client.call(method, **params))
        self.harness.turn()
        return task

    def read_all(self) -> None:
        """Read what the server has sent, and from now on as it comes."""
        self.transport.stuck = False
        self.transport.drain()

    def login(self, user: str = "ada") -> OpenedSession:
        wall = self.harness.clock.wall()
        return self.use(self.harness.registry.open(user, client="", address="", wall=wall))

    def use(self, opened: OpenedSession) -> OpenedSession:
        """Use a session by a request."""
        self.opened, self.token = opened, opened.token
        self.send(self.frame(REQUEST, 99, encode_request("big", {"n": 0, "size": 0})))
        self.answers()
        self.harness.ran.clear()
        return opened

    def end_session(self, code: Code, reason: EndReason, opened: OpenedSession | None = None) -> None:
        """End a session, the last one without an argument, as another part of the server does."""
        session_id = (opened or self.opened).session.id
        self.harness.in_loop(lambda: self.protocol.session_ended(session_id, code, reason))

    def handle(self, *methods: str, most: int = 8, stream: int = 90) -> Answer:
        """Register methods that the server may call."""
        self.send(self.request(stream, "session.handle", {"methods": [*methods], "max": most}))
        (answer,) = self.answers()
        return answer

    def lose(self, error: Exception | None = None) -> None:
        self.transport.lose(error)


def nothing_left(harness: Harness) -> None:
    harness.turn()
    state = harness.state
    assert state.connections == set()
    assert len(state.session_connections) == 0
    assert len(state.wheel) == 0
    assert state.tasks.running == 0


def kinds(answers: list[Answer]) -> list[Kind]:
    return [answer.kind for answer in answers]


def items(answers: list[Answer]) -> list[Any]:
    return [decode_body(answer.body) for answer in answers if answer.kind is Kind.ITEM]


def cut(answers: list[Answer], reason: str) -> bool:
    """Return whether the last answer is CANCELLED with this reason."""
    error = answers[-1].error
    return error.code == Code.CANCELLED and error.details["reason"] == reason


def ended(harness: Harness) -> dict[str, int]:
    return harness.state.counters.connections_ended
