"""HttpProtocol on a recording transport with a fake clock."""

from __future__ import annotations

import asyncio
import gc
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.helpers import FakeClock, FakeTimers
from tests.http.helpers import GET, LIMITS, SECURITY, answers
from tests.limits import TIMEOUT
from zcproto.admin.http_protocol import MIN_READ, HttpEndpoint, HttpProtocol
from zcproto.common.deadlines import DeadlineWheel
from zcproto.http.messages import HttpRequest, HttpResponse, Peer, Route, Router, text_response
from zcproto.server.eager import EagerTasks
from zcproto.server.state import ServerState

WRITE_TIMEOUT = 20.0


class Transport:
    """A transport that records. While `stuck`, the peer reads nothing."""

    def __init__(self) -> None:
        self.protocol: HttpProtocol | None = None
        self.out = bytearray()
        self.unread = 0
        self.high = 0
        self.stuck = False
        self.reading = True
        self.end = ""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0

    def write(self, data: bytes) -> None:
        self.out += data
        if self.stuck:
            self.unread += len(data)
            if self.unread > self.high and self.protocol is not None:
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.end = "closed"

    def abort(self) -> None:
        self.end = "aborted"


class Harness:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock.now())
        self.wheel = DeadlineWheel(self.timers)
        self.incidents: list[BaseException] = []
        self.served: list[str] = []
        self.gate: asyncio.Event = asyncio.Event()
        state = SimpleNamespace(
            clock=self.clock,
            wheel=self.wheel,
            tasks=EagerTasks(asyncio.get_running_loop()),
            call_soon=self.timers.call_soon,
            write_timeout=WRITE_TIMEOUT,
            incident=self.incident,
            run="ab",
            numbers=count(1),
        )
        router = Router(
            [Route("GET", "/", self.small), Route("GET", "/big", self.big), Route("GET", "/wait", self.wait)]
        )
        self.endpoint = HttpEndpoint(
            cast("ServerState", state), router.find, SECURITY, LIMITS, lambda transport: Peer("192.0.2.1")
        )

    def incident(self, what: str, error: BaseException, **values: Any) -> str:
        self.incidents.append(error)
        return "id"

    def small(self, request: HttpRequest) -> HttpResponse:
        self.served.append(request.path)
        return text_response(200, "x")

    def big(self, request: HttpRequest) -> HttpResponse:
        self.served.append(request.path)
        return text_response(200, "x" * 200_000)

    async def wait(self, request: HttpRequest) -> HttpResponse:
        self.served.append(request.path)
        await self.gate.wait()
        return text_response(200, "waited")

    def connect(self) -> tuple[HttpProtocol, Transport]:
        protocol, transport = self.endpoint.protocol(), Transport()
        transport.protocol = protocol
        protocol.connection_made(cast("asyncio.BaseTransport", transport))
        return protocol, transport

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.timers.clock += seconds
        self.timers.run()


BIG = GET.replace(b"GET /", b"GET /big")
WAIT = GET.replace(b"GET /", b"GET /wait")


async def test_pipelined_requests_are_answered_one_per_loop_turn() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(GET * 3)
    assert harness.served == ["/"]
    harness.timers.turn()
    assert harness.served == ["/"] * 2
    harness.timers.run()
    assert harness.served == ["/"] * 3
    assert len(answers(bytes(transport.out))) == 3
    assert harness.endpoint.responses == {200: 3}


async def test_client_that_never_reads_is_disconnected() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    transport.stuck = True
    protocol.data_received(BIG * 2)
    harness.timers.run()
    assert harness.served == ["/big"]
    assert not transport.reading
    harness.advance(WRITE_TIMEOUT - 1)
    assert transport.end == ""
    transport.unread -= MIN_READ - 1  # too slow
    harness.advance(2)
    assert transport.end == "aborted"
    assert harness.endpoint.write_timeouts == 1
    assert harness.endpoint.connections == set()
    assert len(harness.wheel) == 0


async def test_slow_reader_gets_more_time() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    transport.stuck = True
    protocol.data_received(BIG * 2)
    harness.timers.run()
    while transport.unread > MIN_READ:
        transport.unread -= MIN_READ
        harness.advance(WRITE_TIMEOUT + 0.5)
        assert transport.end == ""
    transport.stuck, transport.unread = False, 0
    protocol.resume_writing()
    harness.timers.run()
    assert harness.served == ["/big"] * 2
    assert transport.reading
    assert len(answers(bytes(transport.out))) == 2


async def test_closed_connection_cancels_its_handler_and_deadline() -> None:
    harness = Harness()
    for end in (
        lambda p: p.eof_received(),
        lambda p: p.connection_lost(None),
        lambda p: p.close(),
        lambda p: p.abort(),
    ):
        protocol, _ = harness.connect()
        protocol.data_received(WAIT)
        assert harness.endpoint.answering == 1
        end(protocol)
        end(protocol)
        for _ in range(5):
            await asyncio.sleep(0)
        assert harness.endpoint.answering == 0
        assert len(harness.wheel) == 0
        assert harness.endpoint.connections == set()
        protocol.data_received(GET)  # input that was in flight
        protocol.handle_deadline(1e9)
        protocol.go_away()
        protocol.resume_writing()
    assert harness.served == ["/wait"] * 4
    assert harness.incidents == []


async def test_externally_cancelled_handler_is_an_internal_error() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(WAIT)
    await harness.endpoint.state.tasks.close(5.0)
    (answer,) = answers(bytes(transport.out))
    assert answer.status == 500
    assert transport.end == "closed"
    assert isinstance(harness.incidents[0], asyncio.CancelledError)


async def test_pipelined_request_waits_for_a_running_handler() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(WAIT + GET)
    assert transport.reading
    assert transport.out == b""
    harness.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)
    harness.timers.run()
    assert harness.served == ["/wait", "/"]
    assert [answer.body for answer in answers(bytes(transport.out))] == [b"waited\n", b"x\n"]


async def test_excess_pipelined_input_is_not_read() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(WAIT + GET * 50)
    assert not transport.reading
    harness.gate.set()
    for _ in range(5):
        await asyncio.sleep(0)
    harness.timers.run()
    assert transport.end == "closed"  # after the maximum of requests
    assert len(answers(bytes(transport.out))) == LIMITS.max_requests


async def test_drain_waits_for_running_handlers() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    harness.connect()
    protocol.data_received(WAIT)
    harness.endpoint.drain()
    waiter = asyncio.ensure_future(harness.endpoint.wait_at_rest())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiter.done()
    harness.gate.set()
    await asyncio.wait_for(waiter, TIMEOUT)
    (answer,) = answers(bytes(transport.out))
    assert answer.closes
    harness.endpoint.close()
    assert harness.endpoint.connections == set()
    assert len(harness.wheel) == 0


async def test_closed_connection_is_garbage_collected() -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(GET + GET[:10])
    protocol.connection_lost(None)
    transport.protocol = None
    assert not any(isinstance(each, Transport) for each in gc.get_referents(protocol))


@pytest.mark.parametrize("seconds", [LIMITS.request_timeout])
async def test_truncated_request_is_408_at_its_deadline(seconds: float) -> None:
    harness = Harness()
    protocol, transport = harness.connect()
    protocol.data_received(GET[:10])
    harness.advance(seconds - 1.0)
    assert transport.end == ""
    harness.advance(2.5)
    assert transport.end == "closed"
    assert answers(bytes(transport.out))[0].status == 408
