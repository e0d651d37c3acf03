"""ClientProtocol: one connection, in states that a whole client rarely reaches."""

from __future__ import annotations

import asyncio
import itertools
from hashlib import sha256
from typing import Any

import pytest

from tests.client.helpers import (
    GREETING,
    LoopClock,
    ScriptedServer,
    ServerLink,
    now,
    scripted,
    silence,
    turns,
)
from tests.wire.fast_path import needs_compiled
from zcproto.client.endpoints import Endpoint
from zcproto.client.protocol import ClientProtocol, PendingStream
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import EventReceived, GoAwayReceived
from zcproto.connection.state import State
from zcproto.errors import Code, ConnectionClosed, DeadlineExceeded, InvalidArgument
from zcproto.wire.frame import ERROR, EVENT, NO_TOKEN, PING, RESPONSE, WELCOME, encode_frame
from zcproto.wire.message import encode_body, encode_error

FOREVER = float("inf")


class RecordingOwner:
    """Records notifications."""

    def __init__(self) -> None:
        self.notifications: list[Any] = []

    def event_received(self, connection: ClientProtocol, event: EventReceived) -> None:
        self.notifications.append(event)

    def connection_draining(self, connection: ClientProtocol, event: GoAwayReceived) -> None:
        self.notifications.append(event)

    def connection_ended(self, connection: ClientProtocol, error: ConnectionClosed) -> None:
        self.notifications.append(error)

    def connection_free(self, connection: ClientProtocol, requests: int) -> None: ...

    has_other_address = False

    def connection_silent(self, connection: ClientProtocol) -> None:
        self.notifications.append("silent")

    def connection_heard(self, connection: ClientProtocol) -> None:
        self.notifications.append("heard")


class Ends:
    """A ClientProtocol and the server's end of its connection."""

    def __init__(self, *, welcome: bool = True, **greeting: Any) -> None:
        loop = asyncio.get_running_loop()
        self.server = ScriptedServer()
        self.server.script("echo", *[silence] * 100)
        self.owner = RecordingOwner()
        self.link = ServerLink(self.server, 1)
        clock = LoopClock()
        wheel = DeadlineWheel(loop)
        endpoint = Endpoint("server.example", 7443, "192.0.2.1")
        self.protocol = ClientProtocol(self.owner, loop, wheel, clock, ClientConnection(), endpoint)
        self.link.protocol = self.protocol
        self.protocol.connection_made(self.link)
        if welcome:
            self.link.send(WELCOME, 0, encode_body(GREETING | greeting))

    def call(self, deadline: float = FOREVER) -> asyncio.Future[Any]:
        return self.protocol.request("echo", {}, NO_TOKEN, None, deadline)[1]

    def stream_of(self, call: asyncio.Future[Any]) -> int:
        """Return the stream of a pending call."""
        return next(stream for stream, (each, _) in self.protocol._pending.items() if each is call)


@scripted
async def test_connection_is_ready_after_welcome() -> None:
    ends = Ends(welcome=False)
    assert not ends.protocol.ready
    ends.link.send(WELCOME, 0, encode_body(GREETING))
    assert ends.protocol.ready
    assert await ends.protocol.welcomed == ends.protocol.conversation.welcome == GREETING


@pytest.mark.parametrize("how", ["cut", "close_cleanly", "nonsense"])
@scripted
async def test_end_before_welcome_fails_the_waiter(how: str) -> None:
    ends = Ends(welcome=False)
    if how == "nonsense":
        ends.link.send(PING)
    else:
        getattr(ends.link, how)()
    with pytest.raises(ConnectionClosed):
        await ends.protocol.welcomed
    assert len(ends.owner.notifications) == 1


@scripted
async def test_end_before_welcome_without_waiter_is_silent() -> None:
    ends = Ends(welcome=False)
    ends.link.cut()
    await turns()
    del ends  # a future with an unretrieved error would log now


@scripted
async def test_welcome_after_cancelled_waiter_is_ignored() -> None:
    ends = Ends(welcome=False)
    ends.protocol.welcomed.cancel()
    ends.link.send(WELCOME, 0, encode_body(GREETING))
    assert ends.protocol.ready


@scripted
async def test_first_cause_of_end_is_reported_once() -> None:
    ends = Ends()
    call = ends.call()
    ends.link.fatal(Code.REPLAYED)
    ends.link.cut()
    await turns()
    with pytest.raises(ConnectionClosed) as caught:
        await call
    assert caught.value.code is Code.REPLAYED
    assert [type(each) for each in ends.owner.notifications] == [ConnectionClosed]
    await ends.protocol.closed


@scripted
async def test_server_message_is_escaped_and_truncated() -> None:
    ends = Ends()
    ends.link.send(0x01040000, 0, encode_body([Code.REPLAYED, "a\x1b[31m\n" + "b" * 10_000]))
    assert ends.protocol.error is not None
    assert ends.protocol.error.reason.isprintable()
    assert len(ends.protocol.error.reason) < 250


@scripted
async def test_message_of_an_error_is_escaped_and_truncated() -> None:
    ends = Ends()
    call = ends.call()
    ends.link.send(ERROR, ends.stream_of(call), encode_error(3, "a\x1b[31m\nb\u202e" + "c" * 10_000))
    with pytest.raises(InvalidArgument) as caught:
        await call
    assert caught.value.message.startswith("a\\x1b[31m\\nb\\u202eccc")
    assert len(caught.value.message) < 1_050


@scripted
async def test_ping_is_answered_at_once() -> None:
    ends = Ends()
    ends.link.send(PING)
    await turns()
    assert ends.server.writes == 1


@scripted
async def test_ping_flood_of_a_server_that_reads_nothing_is_answered_once() -> None:
    ends = Ends()
    ends.link.pause()
    for _ in range(100):
        ends.link.send(PING)
    await turns()
    assert ends.server.writes == 0
    ends.link.resume()
    await turns()
    assert ends.server.writes == 1


@scripted
async def test_reading_pauses_during_a_flood() -> None:
    ends = Ends()
    body = encode_body(["a", bytes(1_000_000)])
    for _ in range(20):
        ends.link.send(EVENT, 0, body)
    assert ends.link.reading == [False]
    await asyncio.sleep(10)
    assert ends.link.reading == [False, True]
    ends.link.send(EVENT, 0, body)
    assert ends.link.reading == [False, True]


@scripted
async def test_flood_that_ends_the_connection_does_not_pause_reading() -> None:
    ends = Ends()
    body = encode_body(["a", bytes(100_000)])
    wall, salt = ends.server.wall(), ends.link.salt
    counters = [*range(1, 200), 1]  # the last one is replayed
    flood = [encode_frame(EVENT, 0, wall, salt, counter, NO_TOKEN, body) for counter in counters]
    ends.protocol.data_received(b"".join(flood))
    assert ends.protocol.error is not None
    assert ends.link.reading == []


@scripted
async def test_connection_that_is_gone_has_no_certificate() -> None:
    class FakeTls:
        def getpeercert(self, *, binary_form: bool) -> bytes:
            return b"certificate"

    ends = Ends()
    ends.link.get_extra_info = {"ssl_object": FakeTls()}.get  # type: ignore[method-assign, assignment]
    assert ends.protocol.leaf == sha256(b"certificate").digest()
    ends.link.cut()
    await ends.protocol.closed
    assert ends.protocol.leaf == b""


@scripted
async def test_each_call_gets_its_own_error() -> None:
    ends = Ends()
    first, second = ends.call(), ends.call()
    ends.link.cut()
    await turns()
    assert first.exception() is not second.exception()
    assert first.exception() is not ends.protocol.error


@scripted
async def test_call_cancelled_in_the_same_turn_is_not_failed_again() -> None:
    ends = Ends()
    cancelled = ends.call()
    cancelled.cancel()
    ends.protocol.connection_lost(None)
    assert cancelled.cancelled()
    ends = Ends()
    late = ends.call(now() + 1)
    late.cancel()
    ends.protocol.handle_deadline(now() + 1)
    assert late.cancelled()


@scripted
async def test_expired_call_keeps_its_stream_until_the_answer() -> None:
    ends = Ends(max_streams=1)
    call = ends.call(now() + 1)
    assert not ends.protocol.ready
    with pytest.raises(DeadlineExceeded):
        await call
    await turns()
    assert ends.link.cancelled == [1]
    assert not ends.protocol.ready
    ends.link.send(RESPONSE, 1, b"\xc0")
    assert ends.protocol.ready


@scripted
async def test_answered_call_cannot_be_abandoned() -> None:
    ends = Ends()
    call = ends.call()
    await turns()
    stream = ends.stream_of(call)
    ends.link.send(RESPONSE, stream, b"\x07")
    assert not ends.protocol.abandon(stream)
    assert await call == 7
    await turns()
    assert ends.link.cancelled == []


@scripted
async def test_woken_waiter_without_stream_stays_first_in_queue() -> None:
    ends = Ends(max_streams=1)
    order: list[str] = []
    ends.call()

    async def wait(name: str) -> None:
        await ends.protocol.wait_ready()
        order.append(name)
        ends.call()

    first = asyncio.create_task(wait("first"))
    second = asyncio.create_task(wait("second"))
    await turns()
    ends.link.send(RESPONSE, 1, b"\xc0")  # wakes the first
    ends.call()  # another caller is faster
    await turns()
    assert order == []
    ends.link.send(RESPONSE, 2, b"\xc0")
    await turns()
    assert order == ["first"]
    ends.link.send(RESPONSE, 3, b"\xc0")
    await turns()
    assert order == ["first", "second"]
    await asyncio.gather(first, second)


@pytest.mark.parametrize("how", ["go_away", "cut"])
@scripted
async def test_waiter_is_woken_by_the_end(how: str) -> None:
    ends = Ends(max_streams=1)
    ends.call().add_done_callback(lambda call: call.exception())
    waiting = [asyncio.create_task(ends.protocol.wait_ready()) for _ in range(3)]
    await turns()
    waiting[0].cancel()
    await turns(0)
    getattr(ends.link, how)()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not ends.protocol.ready


@scripted
async def test_full_transport_blocks_requests() -> None:
    ends = Ends()
    ends.protocol.pause_writing()
    assert not ends.protocol.ready
    waiting = asyncio.create_task(ends.protocol.wait_ready())
    await turns()
    assert not waiting.done()
    ends.protocol.resume_writing()
    await waiting
    assert ends.protocol.ready


@scripted
async def test_close_sends_queued_data_first() -> None:
    ends = Ends()
    call = ends.call()
    ends.protocol.close("enough")
    with pytest.raises(ConnectionClosed, match="enough"):
        await call
    await ends.protocol.closed
    assert ends.server.writes == 1
    assert ends.protocol.conversation.state is State.CLOSED
    ends.protocol.close("again")
    ends.protocol.abort()


@scripted
async def test_each_pending_call_fails_at_its_own_deadline() -> None:
    ends = Ends()
    calls = [ends.call(now() + seconds) for seconds in (3, 1, 2, 2)]
    endless = ends.call()
    for elapsed, overdue in ((0.5, 0), (1.1, 1), (2.2, 3), (9.0, 4)):
        ends.protocol.handle_deadline(now() + elapsed)
        assert [call.done() for call in calls].count(True) == overdue
    assert all(isinstance(call.exception(), DeadlineExceeded) for call in calls)
    assert not endless.done()
    again = ends.call(now() + 1)
    ends.protocol.handle_deadline(now() + 2)
    assert isinstance(again.exception(), DeadlineExceeded)


@needs_compiled  # only answers that are read in C show that a call was alone
@scripted
async def test_call_alone_is_sent_at_once_and_several_in_one_write() -> None:
    ends = Ends()
    protocol, token = ends.protocol, b"t" * 32
    counter = itertools.count(1)
    written: list[bytes] = []
    ends.link.write = written.append  # type: ignore[method-assign]

    def call() -> asyncio.Future[Any]:
        return protocol.request("echo", {}, token, None, FOREVER)[1]

    def answer(*calls: asyncio.Future[Any]) -> None:
        wall, salt = protocol._clock.wall(), ends.link.salt
        frames = [
            encode_frame(RESPONSE, ends.stream_of(each), wall, salt, next(counter), token, b"\xc0")
            for each in calls
        ]
        protocol.data_received(b"".join(frames))

    for number in range(2):  # before the second answer the server is not known to accept the token
        first = call()
        assert len(written) == number
        await turns()
        assert len(written) == number + 1
        answer(first)
    written.clear()
    written.append(b"")
    calls = [call() for _ in range(4)]
    assert len(written) == 2
    await turns()
    assert len(written) == 3
    answer(*calls)
    for _ in range(4):  # by the callers that the answers have woken
        call()
    assert len(written) == 3
    await turns()
    assert len(written) == 4


@scripted
async def test_ended_connection_leaves_no_deadline() -> None:
    ends = Ends(idle_timeout_ms=1_000)
    answered, abandoned, lost = [ends.call(now() + 100) for _ in range(3)]
    lost.add_done_callback(lambda call: call.exception())
    ends.link.send(RESPONSE, ends.stream_of(answered), b"\xc0")
    ends.protocol.abandon(ends.stream_of(abandoned))
    ends.link.cut()
    await turns()
    assert len(ends.protocol._wheel) == 0


@pytest.mark.parametrize("kind", [ClientProtocol, PendingStream])
def test_frequent_objects_have_no_dict(kind: type[Any]) -> None:
    assert not hasattr(kind.__new__(kind), "__dict__")
