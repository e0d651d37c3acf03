"""Tests of ServerProtocol with a fake transport and fake time:
back-pressure, deadlines, and the release of all references at the end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import Answer, FakeClock, FakeTimers, small_registry
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code, TlsError
from zcproto.observe import log as log_module
from zcproto.observe.events import PER_ADDRESS
from zcproto.server.eager import EagerTasks
from zcproto.server.protocol import TAKEN_AT_LEAST, WRITE_BUFFER_HARD_FACTOR, ServerProtocol
from zcproto.server.state import ANNOUNCED_PER_TURN, ServerState
from zcproto.sessions import OpenedSession
from zcproto.wire.decoder import FrameDecoder
from zcproto.wire.frame import CANCEL, NO_TOKEN, PING, REQUEST, Kind, Side, encode_frame
from zcproto.wire.message import encode_body, encode_request

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
                assert self.protocol is not None
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unread

    def drain(self, *, stuck: bool = False) -> None:
        """Let the peer read all that waits; with `stuck` only once."""
        self.unread = 0
        self.stuck = stuck
        if self.paused:
            self.paused = False
            assert self.protocol is not None
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
        self.state = ServerState(
            settings=ConnectionSettings(idle_timeout_s=IDLE, max_streams=16),
            registry=self.registry,
            methods=self._methods(),
            wheel=DeadlineWheel(self.timers),
            tasks=EagerTasks(loop),
            call_soon=self.timers.call_soon,
            clock=self.clock,
            entropy=lambda size: next(self._salts).to_bytes(size, "big"),
            write_buffer_bytes=WRITE_BUFFER,
            write_timeout=WRITE_TIMEOUT,
            session_idle_timeout_ms=None,
        )
        self._salts = itertools.count(1)

    def _methods(self) -> App:
        app = self.app

        @app.method("big")
        def big(n: int, size: int = 9_000) -> bytes:
            self.ran.append(n)
            return bytes(size)

        @app.method("wait")
        async def wait(context: Context) -> Any:
            self.contexts.append(context)
            future = self.loop.create_future()
            self.futures.append(future)
            return await future

        @app.method("close.and.wait")
        async def close_and_wait(context: Context) -> None:
            context._connection.close("by a method")
            future = self.loop.create_future()
            self.futures.append(future)
            await future

        @app.method("close.and.answer")
        def close_and_answer(context: Context, size: int = 0) -> bytes:
            context._connection.close("by a method")
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

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.transport = FakeTransport()
        self.protocol = ServerProtocol(harness.state)
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
        opened = self.harness.registry.open(
            user, operator=False, client="", address="", wall=self.harness.clock.wall()
        )
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


# --- what the server says of itself ----------------------------------------------------------------------

BODY = encode_body(["pins.next", {"pins": ["sha256/x"], "from": 1}])


def announce(harness: Harness, body: bytes | None) -> None:
    harness.loop.run_until_complete(harness.state.announce(body))
    harness.turn()


def test_announcement_reaches_present_and_future_connections(harness: Harness, peer: Peer) -> None:
    without_session = harness.connect()
    announce(harness, BODY)
    late = harness.connect()
    for received in (peer.answers(), without_session.answers(), late.greeted):
        assert [(answer.kind, answer.token, answer.body) for answer in received] == [
            (Kind.EVENT, NO_TOKEN, BODY)
        ]


def test_repeated_announcement_is_sent_once(harness: Harness, peer: Peer) -> None:
    announce(harness, BODY)
    announce(harness, BODY)
    assert len(peer.answers()) == 1


def test_withdrawn_announcement_is_not_sent(harness: Harness, peer: Peer) -> None:
    announce(harness, BODY)
    peer.answers()
    announce(harness, None)
    assert peer.answers() == []
    assert harness.connect().greeted == []


def test_announcement_to_thousands_takes_several_turns_and_sends_the_newest(harness: Harness) -> None:
    peers = [harness.connect() for _ in range(ANNOUNCED_PER_TURN + 1)]
    newer = encode_body(["pins.next", {"pins": ["sha256/y"], "from": 2}])

    async def both() -> None:
        await asyncio.gather(harness.state.announce(BODY), harness.state.announce(newer))

    harness.loop.run_until_complete(both())
    harness.turn()
    received = [[answer.body for answer in peer.answers()] for peer in peers]
    assert received.count([BODY, newer]) == ANNOUNCED_PER_TURN
    assert received.count([newer]) == 1


def test_closed_connection_gets_no_announcement(harness: Harness, peer: Peer) -> None:
    peer.protocol.close("by a test")
    peer.protocol.announce(BODY)
    harness.turn()
    assert peer.answers() == []


# --- back-pressure -----------------------------------------------------------------------------------------


def test_back_pressure_stops_running_requests(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    assert harness.ran == [1, 2, 3]  # 27,000 bytes: the third exceeded the limit
    assert not peer.transport.reading
    assert peer.transport.unread < 2 * WRITE_BUFFER
    peer.transport.drain()
    assert harness.ran == list(range(1, 11))
    assert peer.transport.reading
    assert [answer.stream for answer in peer.answers()] == list(range(1, 11))


def test_back_pressure_resumes_as_the_peer_reads(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    streams = [answer.stream for answer in peer.answers()]
    while not peer.transport.reading:
        before = len(harness.ran)
        peer.transport.drain(stuck=True)
        assert len(harness.ran) - before <= 3
        streams += [answer.stream for answer in peer.answers()]
    assert streams == list(range(1, 11))


def test_small_answers_are_gathered_within_the_bound(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    for read in range(100):
        if not peer.transport.reading:
            break
        first = read * 20 + 1
        peer.send(*(peer.request(n, "big", {"n": n, "size": 100}) for n in range(first, first + 20)))
    assert not peer.transport.reading
    assert peer.transport.unread < 2 * WRITE_BUFFER
    peer.transport.drain()
    assert len(peer.answers()) == len(harness.ran)


def test_deadline_during_back_pressure_loses_no_request(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait", None, deadline_ms=5_000), peer.request(51, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    assert harness.ran == [1, 2, 3]
    harness.advance(6.0)
    peer.transport.drain()
    assert harness.ran == list(range(1, 11))
    answers = {answer.stream: answer for answer in peer.answers()}
    assert set(answers) == {50, *range(1, 11)}
    assert answers[50].code == Code.DEADLINE_EXCEEDED
    harness.turn()
    assert harness.futures[0].cancelled()
    harness.in_loop(lambda: harness.futures[1].set_result("still here"))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == ["still here"]


def test_cancel_behind_suspended_requests_is_processed_in_order(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    requests = [peer.request(n, "big", {"n": n}) for n in range(1, 6)]
    peer.send(*requests, peer.frame(CANCEL, 50), peer.frame(PING))
    assert 50 not in {answer.stream for answer in peer.answers()}
    peer.transport.drain()
    kinds = [(answer.kind, answer.stream) for answer in peer.answers()]
    assert kinds[-2:] == [(Kind.ERROR, 50), (Kind.PONG, 0)]


def test_peer_that_does_not_read_is_reset(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    harness.advance(WRITE_TIMEOUT - 1)
    assert not peer.transport.aborted
    harness.advance(2)
    assert peer.transport.aborted
    assert ended(harness) == {"write_timeout": 1}
    peer.transport.drain()
    assert harness.ran == [1, 2, 3]
    nothing_left(harness)
    assert harness.futures[0].cancelled()


def test_slow_steady_reader_is_kept(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unread += 4 * TAKEN_AT_LEAST  # as if much had been written before
    peer.protocol.pause_writing()
    for _ in range(4):
        harness.advance(WRITE_TIMEOUT - 1)
        peer.transport.unread -= TAKEN_AT_LEAST
        harness.advance(1)
        assert not peer.transport.aborted
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_dripping_reader_is_reset(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unread -= TAKEN_AT_LEAST - 1
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_added_output_does_not_hide_reading(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(50, "wait"))
    peer.transport.stuck = True
    peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 11)))
    peer.transport.unread -= TAKEN_AT_LEAST
    harness.futures[0].set_result(bytes(TAKEN_AT_LEAST))
    harness.turn()
    harness.advance(WRITE_TIMEOUT + 1)
    assert not peer.transport.aborted
    harness.advance(WRITE_TIMEOUT + 1)
    assert peer.transport.aborted


def test_peer_that_reads_in_time_is_kept(harness: Harness, peer: Peer) -> None:
    for _ in range(3):
        peer.transport.stuck = True
        peer.send(*(peer.request(n, "big", {"n": n}) for n in range(1, 4)))
        assert not peer.transport.reading
        harness.advance(WRITE_TIMEOUT - 1)
        peer.transport.drain()
        harness.advance(2)
    assert not peer.transport.aborted
    assert len(peer.answers()) == 9


def test_write_buffer_over_the_hard_limit_resets_the_connection(harness: Harness, peer: Peer) -> None:
    peer.send(*(peer.request(n, "wait") for n in range(1, 17)))
    peer.transport.stuck = True
    most = 0

    def answer(future: asyncio.Future[Any]) -> None:
        nonlocal most
        if not future.done():
            harness.in_loop(lambda: future.set_result(bytes(15_000)))
            harness.turn()
        most = max(most, peer.transport.unread)

    for future in harness.futures:
        answer(future)
    assert peer.transport.aborted
    assert ended(harness) == {"write_buffer_full": 1}
    assert most < WRITE_BUFFER_HARD_FACTOR * WRITE_BUFFER + 16_000
    nothing_left(harness)


def test_reset_during_processing_keeps_no_request(harness: Harness, peer: Peer) -> None:
    peer.transport.stuck = True
    size = (WRITE_BUFFER_HARD_FACTOR + 1) * WRITE_BUFFER
    peer.send(*(peer.request(n, "big", {"n": n, "size": size}) for n in range(1, 4)))
    assert peer.transport.aborted
    assert harness.ran == [1]
    peer.transport.drain()  # a late callback of the transport
    assert harness.ran == [1]
    nothing_left(harness)


def test_pause_writing_without_connection_does_nothing(harness: Harness) -> None:
    protocol = ServerProtocol(harness.state)
    protocol.pause_writing()
    protocol.resume_writing()
    peer = harness.connect()
    peer.lose()
    peer.protocol.pause_writing()
    peer.protocol.resume_writing()
    nothing_left(harness)


# --- time --------------------------------------------------------------------------------------------------


def test_idle_connection_is_closed(harness: Harness, peer: Peer) -> None:
    harness.advance(IDLE + 2)
    assert [answer.kind for answer in peer.answers()] == [Kind.GOAWAY]
    assert peer.transport.closed
    assert ended(harness) == {"idle": 1}
    nothing_left(harness)


def test_active_connection_is_kept(harness: Harness, peer: Peer) -> None:
    for _ in range(4):
        harness.advance(IDLE - 10)
        peer.send(peer.frame(PING))
    assert not peer.transport.closed
    assert {answer.kind for answer in peer.answers()} == {Kind.PONG}


def test_idle_time_counts_after_a_long_request(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"))
    harness.advance(5 * IDLE)
    assert not peer.transport.closed
    harness.in_loop(lambda: harness.futures[0].set_result(1))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == [1]
    harness.advance(2 * IDLE + 2)
    assert peer.transport.closed
    assert ended(harness) == {"idle": 1}


def test_connection_without_session_is_closed_soon(harness: Harness) -> None:
    peer = harness.connect()
    harness.advance(12)
    assert peer.transport.closed
    assert ended(harness) == {"no_session": 1}
    nothing_left(harness)


def test_late_deadline_callback_does_nothing(harness: Harness, peer: Peer) -> None:
    peer.lose()
    peer.protocol.handle_deadline(harness.clock.now())
    assert ended(harness) == {"closed_by_peer": 1}


# --- the end -----------------------------------------------------------------------------------------------


def test_fatal_error_is_sent_and_counted(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"), peer.frame(REQUEST, 0), peer.request(2, "big", {"n": 2}))
    (error,) = peer.answers()
    assert (error.stream, error.code) == (0, Code.PROTOCOL_ERROR)
    assert peer.transport.closed
    assert ended(harness) == {"protocol_error": 1}
    assert harness.state.counters.errors == {Code.PROTOCOL_ERROR: 1}
    assert harness.ran == []
    nothing_left(harness)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "closed_by_peer"), (TlsError("truncated"), "truncated"), (OSError(), "closed_by_peer")],
)
def test_lost_connection_is_counted_by_cause(
    harness: Harness, peer: Peer, error: Exception | None, reason: str
) -> None:
    peer.send(peer.request(1, "wait"))
    peer.lose(error)
    assert ended(harness) == {reason: 1}
    nothing_left(harness)
    assert harness.contexts[0].cancelled


def test_close_notify_then_eof_is_one_end(harness: Harness, peer: Peer) -> None:
    peer.protocol.eof_received()
    peer.lose()
    assert ended(harness) == {"closed_by_peer": 1}


def test_ended_connection_does_nothing(harness: Harness, peer: Peer) -> None:
    opened = peer.login("eve")
    peer.send(peer.request(1, "context.join"))
    context = harness.contexts[0]
    peer.answers()
    peer.protocol.close("test")
    peer.protocol.close("test")
    peer.protocol.data_received(b"anything")
    peer.protocol.go_away("test")
    peer.protocol.cancel_all()
    peer.protocol.abort("test")
    context.join(opened.session, opened.token)
    assert context.send_event("news", 1) is False
    assert context.cancelled
    harness.registry.revoke_user("eve", "test")
    assert peer.answers() == []
    peer.lose()
    peer.protocol.close("test")
    peer.protocol.abort("test")
    assert ended(harness) == {"test": 1}
    nothing_left(harness)


def test_planned_event_is_not_sent_after_the_end(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "context.join"))
    peer.answers()
    assert harness.contexts[0].send_event("news", 1) is True
    peer.lose()
    nothing_left(harness)
    assert peer.answers() == []


def test_ended_session_sends_no_further_event(harness: Harness, peer: Peer) -> None:
    peer.protocol.session_ended("no such session", Code.TOKEN_REVOKED, "test")
    harness.turn()
    assert peer.answers() == []
    assert not peer.transport.closed
    peer.lose()
    peer.protocol.session_ended("no such session", Code.TOKEN_REVOKED, "test")


def test_revocation_between_reads_is_sent_in_one_write(harness: Harness, peer: Peer) -> None:
    harness.registry.revoke_user("ada", "test")
    assert peer.answers() == []
    harness.turn()
    (event,) = peer.answers()
    assert event.event == ("session.revoked", {"reason": "test"})
    # Without a session it is closed after the open timeout.
    harness.advance(12)
    assert peer.transport.closed
    assert ended(harness) == {"no_session": 1}


def test_expired_session_sends_no_event(harness: Harness, peer: Peer) -> None:
    wall = harness.clock.wall() + 30 * 24 * 3_600_000
    harness.registry.clean(wall, 1_000)
    harness.turn()
    assert peer.answers() == []
    harness.advance(12)
    assert ended(harness) == {"no_session": 1}


def test_revocation_reaches_all_connections_of_a_session(harness: Harness, peer: Peer) -> None:
    others = [harness.connect() for _ in range(3)]
    for other in others:
        other.token = peer.token
        other.send(other.request(1, "big", {"n": 1}))
        other.answers()
        other.send(other.request(2, "big", {"n": 1}))
        other.answers()
    others.pop().lose()
    harness.registry.revoke_user("ada", "test")
    harness.turn()
    for each in (peer, *others):
        assert [answer.kind for answer in each.answers()] == [Kind.EVENT]
        each.lose()
    nothing_left(harness)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_last_connection_of_a_session_clears_the_index(
    harness: Harness, peer: Peer, order: tuple[int, ...]
) -> None:
    peers = [peer, harness.connect(), harness.connect()]
    for other in peers[1:]:
        other.token = peer.token
        other.send(other.request(1, "big", {"n": 1}))
    for index in order:
        assert len(harness.state.session_connections)
        peers[index].lose()
    nothing_left(harness)


def test_method_closing_its_connection_and_waiting_is_cancelled(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "close.and.wait"))
    nothing_left(harness)
    assert harness.futures[0].cancelled()
    assert ended(harness) == {"by a method": 1}


@pytest.mark.parametrize("size", [0, 10_000])
def test_method_closing_its_connection_gets_no_answer_sent(harness: Harness, peer: Peer, size: int) -> None:
    peer.send(peer.request(1, "close.and.answer", {"size": size}), peer.request(2, "big", {"n": 2}))
    assert peer.answers() == []
    assert harness.ran == []
    nothing_left(harness)


def test_system_exit_of_a_method_propagates(harness: Harness, peer: Peer) -> None:
    with pytest.raises(SystemExit):
        peer.protocol.data_received(peer.request(1, "exit"))
    peer.lose()


def test_drain_sends_goaway_and_waits_for_answers(harness: Harness, peer: Peer) -> None:
    peer.send(peer.request(1, "wait"))
    idle = harness.connect()
    harness.state.draining = True
    for each in (peer, idle):
        each.protocol.go_away("draining")
        assert [answer.kind for answer in each.answers()] == [Kind.GOAWAY]
    assert idle.transport.closed
    assert not peer.transport.closed
    late = harness.connect()
    assert late.transport.closed
    harness.in_loop(lambda: harness.futures[0].set_result(1))
    harness.turn()
    assert [answer.value for answer in peer.answers()] == [1]
    assert peer.transport.closed
    nothing_left(harness)


def alive() -> int:
    """Return the connections in memory, including unreachable cycles."""
    return sum(isinstance(each, ServerProtocol) for each in gc.get_objects())


@pytest.mark.parametrize("ending", ["close", "abort", "lose", "fatal", "timeout"])
def test_ended_connection_is_garbage_collected(harness: Harness, ending: str) -> None:
    gc.collect()
    gc.disable()
    try:
        peer = harness.connect()
        peer.login()
        peer.send(peer.request(1, "wait"), peer.request(2, "wait"))
        assert alive() == 1
        if ending == "close":
            peer.protocol.close("test")
        elif ending == "abort":
            peer.protocol.abort("test")
        elif ending == "fatal":
            peer.send(peer.request(1, "wait"))
        elif ending == "timeout":
            harness.registry.revoke_user("ada", "test")
            harness.advance(12)
        peer.lose()
        harness.turn()
        harness.futures.clear()
        harness.contexts.clear()
        peer.transport.protocol = None
        del peer
        assert alive() == 0
    finally:
        gc.enable()


# --- what connections share ----------------------------------------------------------------------------------


def test_leaving_an_unknown_session_does_nothing(harness: Harness, peer: Peer) -> None:
    harness.state.session_connections.leave("no such session", peer.protocol)


def test_log_lines_per_peer_are_limited_and_counted(
    harness: Harness, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module._state, "level", logging.INFO)
    monkeypatch.setattr(log_module._state, "clock", harness.clock)

    def fault(count: int) -> list[str]:
        for _ in range(count):
            peer = harness.connect()
            peer.send(peer.frame(REQUEST, 0))
        return capsys.readouterr().err.splitlines()

    capsys.readouterr()
    assert len(fault(PER_ADDRESS.lines + 7)) == PER_ADDRESS.lines
    assert fault(5) == []
    harness.advance(61)
    (line,) = fault(1)
    logged = json.loads(line)
    assert (logged["event"], logged["code"], logged["suppressed"]) == (
        "connection.refused",
        "PROTOCOL_ERROR",
        12,
    )
