"""A ServerProtocol with a fake transport and fake time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import Answer, FakeClock, FakeTimers, small_registry
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.settings import ConnectionSettings
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import IdempotencyCache
from zcproto.server.protocol import ServerProtocol
from zcproto.server.state import ServerState
from zcproto.sessions import OpenedSession
from zcproto.stores.service import SessionService
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import NO_TOKEN, REQUEST, Side, encode_frame
from zcproto.wire.message import encode_request

WRITE_BUFFER = 20_000
WRITE_TIMEOUT = 20.0
IDLE = 300.0


class FakeTransport:
    """Replaces the TLS transport. With `stuck` the peer reads nothing."""

    peer = "192.0.2.7"

    def __init__(self) -> None:
        self.protocol: ServerProtocol | None = None
        self.out = bytearray()
        self.unread = 0
        self.stuck = False
        self.high = 0
        self.paused = False
        self.reading = True
        self.closed = False
        self.aborted = False

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def write(self, data: bytes) -> None:
        if self.closed or self.aborted:
            return
        self.out += data
        if self.stuck:
            self.unread += len(data)
            if self.unread > self.high and not self.paused:
                self.paused = True
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unread

    def drain(self, *, stuck: bool = False) -> None:
        """Let the peer read all that waits; with `stuck` only once."""
        self.unread = 0
        self.stuck = stuck
        if self.paused:
            self.paused = False
            self.protocol.resume_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


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
            future = self.loop.create_future()
            self.futures.append(future)
            return await future

        @app.method("close.and.wait")
        async def close_and_wait(context: Context) -> None:
            context.caller.close("by a method")
            future = self.loop.create_future()
            self.futures.append(future)
            await future

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

    def connect(self) -> Peer:
        return Peer(self)

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


class Peer:
    """The client's end of a connection: it makes frames and reads answers."""

    kind = ServerProtocol

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.transport = FakeTransport()
        self.protocol = self.kind(harness.state)
        self.transport.protocol = self.protocol
        transport: Any = self.transport
        self.protocol.connection_made(transport)
        self.counter = 0
        self.token = NO_TOKEN
        self._decoder = FrameDecoder(Side.CLIENT, 2**32 - 1)
        self.welcome, *self.greeted = self.answers()
        self.salt = self.welcome.salt

    def frame(self, head: int, stream: int = 0, body: bytes = b"") -> bytes:
        self.counter += 1
        return encode_frame(
            head, stream, self.harness.clock.wall(), self.salt, self.counter, self.token, body
        )

    def request(self, stream: int, method: str, params: dict[str, Any] | None = None, **meta: Any) -> bytes:
        return self.frame(REQUEST, stream, encode_request(method, params, meta))

    def send(self, *frames: bytes) -> None:
        """Deliver the bytes of one read."""
        assert self.transport.reading, "the server does not read"
        self.harness.in_loop(lambda: self.protocol.data_received(b"".join(frames)))

    def answers(self) -> list[Answer]:
        self._decoder.feed(bytes(self.transport.out))
        self.transport.out.clear()
        return [Answer(frame) for frame in self._decoder.frames()]

    def login(self, user: str = "ada") -> OpenedSession:
        opened = self.harness.registry.open(user, client="", address="", wall=self.harness.clock.wall())
        self.token = opened.token
        self.send(self.frame(REQUEST, 99, encode_request("big", {"n": 0, "size": 0})))
        self.answers()
        self.harness.ran.clear()
        return opened

    def lose(self, error: Exception | None = None) -> None:
        self.protocol.connection_lost(error)


@pytest.fixture
def harness() -> Iterator[Harness]:
    loop = asyncio.new_event_loop()
    harness = Harness(loop)
    yield harness
    assert loop.run_until_complete(harness.state.tasks.close(1.0)) == 0
    loop.close()


@pytest.fixture
def peer(harness: Harness) -> Peer:
    peer = harness.connect()
    peer.login()
    return peer


def nothing_left(harness: Harness) -> None:
    harness.turn()
    state = harness.state
    assert state.connections == set()
    assert len(state.session_connections) == 0
    assert len(state.wheel) == 0
    assert state.tasks.running == 0


def ended(harness: Harness) -> dict[str, int]:
    return harness.state.counters.connections_ended
