"""Metrics: a request with all that is counted for it and without that, and a scrape.

A request is all that happens between its bytes and those of its answer, without a network and without TLS,
beside which the counting would look smaller. Those without counting run the same code without the lines that
count, which are removed from its source. One read of each kind is made in turn, each timed alone, so that
disturbances of the machine hit both. The figure is the ratio of the medians.

A scrape is the text of all metrics of a server with 10,000 connections, in CPU time. Its share of a request is
that at 5,000 requests a second and a scrape in 15 seconds: 75,000 share one.
"""

from __future__ import annotations
import __future__

import asyncio
import inspect
import statistics
import textwrap
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import click
import uvloop

from bench.command import measurement
from bench.micro.timing import time_rows
from bench.report import Row
from zcproto.app.app import App
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.settings import ConnectionSettings
from zcproto.observe.metrics import Metrics, Reading
from zcproto.observe.process import process_readings
from zcproto.server import dispatch as module
from zcproto.server.dispatch import Dispatcher
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import IdempotencyCache
from zcproto.server.protocol import ServerProtocol
from zcproto.server.state import ServerState
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.stores.service import SessionService
from zcproto.tls.server import TlsServerTransport
from zcproto.wire.frame import REQUEST, encode_frame
from zcproto.wire.message import encode_request

ANNOTATIONS: Final = __future__.annotations.compiler_flag

COUNTING: Final = {
    "is_timed = wall >> PART_BITS != state.timed_part and opened is None": "is_timed = False",
    "method.calls += 1": "pass",
    "state.counters.requests += frames - others": "pass",
}
"""The lines of `Dispatcher.run` that count, and what replaces them."""

LEAST: Final = 1_000
CONNECTIONS: Final = 20
CONNECTED: Final = 10_000
REQUESTS_PER_SCRAPE: Final = 75_000
SCRAPES: Final = 9
MAX_ADDED: Final = 5.0
"""Percent of a request's CPU."""

BODY: Final = encode_request("echo", {"data": b"x" * 64})
SALT: Final = bytes(range(8))


def without_counting() -> type[ServerProtocol]:
    """Return the protocol of a connection without the lines that count."""
    return without_lines(COUNTING)


def without_lines(lines: Mapping[str, str]) -> type[ServerProtocol]:
    """Return the protocol of a connection with these lines of `Dispatcher.run` replaced."""
    source = textwrap.dedent(inspect.getsource(Dispatcher.run))
    for line, instead in lines.items():
        assert source.count(line) == 1, f"{line!r} does not occur exactly once"
        source = source.replace(line, instead)
    made: dict[str, Any] = {"__slots__": ()}
    exec(compile(source, module.__file__, "exec", ANNOTATIONS), module.__dict__, made)  # noqa: S102 - our own source
    changed: Any = type("Changed", (Dispatcher,), made)

    class Uncounted(ServerProtocol):
        __slots__ = ()

        def connection_made(self, transport: TlsServerTransport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._dispatcher.__class__ = changed

    return Uncounted


class Transport:
    """Keeps the last write."""

    peer = "192.0.2.7"

    def __init__(self) -> None:
        self.last = b""

    def set_write_buffer_limits(self, high: int) -> None:
        """Do nothing: nothing is buffered."""

    def pause_reading(self) -> None:
        """Do nothing: a read that took long ends a turn of the loop, and each read here is one."""

    def resume_reading(self) -> None:
        """Do nothing, likewise."""

    def write(self, data: bytes) -> None:
        self.last = data


class Peer:
    """One connection, and the client at its other end."""

    def __init__(self, state: ServerState, kind: type[ServerProtocol], user: str) -> None:
        self.transport = Transport()
        self.protocol = kind(state)
        self.protocol.connection_made(cast(TlsServerTransport, self.transport))
        wall = system_clock.wall()
        opened = state.registry.open(user, client="", address="", wall=wall)
        self.token = opened.token
        self.counter = 0

    def request(self) -> bytes:
        self.counter += 1
        return encode_frame(REQUEST, 1, system_clock.wall(), SALT, self.counter, self.token, BODY)


def state_on(loop: asyncio.AbstractEventLoop) -> ServerState:
    app = App()

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return params

    registry, tasks = SessionRegistry(SessionSettings(), system_entropy), EagerTasks(loop)
    wheel = DeadlineWheel(loop)
    state = ServerState(
        settings=ConnectionSettings(),
        registry=registry,
        sessions=SessionService(registry, system_clock),
        idempotency=IdempotencyCache(tasks, system_clock, wheel),
        wheel=wheel,
        tasks=tasks,
        call_soon=loop.call_soon,
        clock=system_clock,
        entropy=lambda size: SALT,
        write_buffer_bytes=1 << 20,
        write_timeout=20.0,
    )
    state.add_methods(app)
    return state


async def time_requests(requests: int) -> tuple[array[int], array[int]]:
    """Return the nanoseconds of each read of a request with counting, and of each without."""
    state = state_on(asyncio.get_running_loop())
    kinds = (ServerProtocol, without_counting())
    sides = [
        ([Peer(state, kind, f"{kind.__name__}{number}") for number in range(CONNECTIONS)], array("Q"))
        for kind in kinds
    ]
    clock = time.perf_counter_ns
    for number in range(requests):
        for peers, times in sides if number % 2 else reversed(sides):  # neither is always the first
            peer = peers[number % CONNECTIONS]
            data = peer.request()
            begin = clock()
            peer.protocol.data_received(data)
            times.append(clock() - begin)
        if not number % LEAST:
            await asyncio.sleep(0)  # so that timers come due: reads are timed in every 1/64 s
    echo = state.methods["echo"]
    assert echo.calls == requests, "one side counts, the other does not"
    assert all(BODY[-64:] in peer.transport.last for peers, _ in sides for peer in peers), (
        "an echo is missing"
    )
    assert sum(echo.durations.counts) > 0
    state.close()
    return sides[0][1], sides[1][1]


async def time_scrapes() -> list[int]:
    """Return the nanoseconds of CPU of some, with as many connections as are scanned for one."""
    state = state_on(asyncio.get_running_loop())
    state.connections.update(ServerProtocol(state) for _ in range(CONNECTED))

    def source() -> Iterator[Reading]:
        """Yield as many series as a server has, and those that scan the connections."""
        most = max(protocol.in_flight for protocol in state.connections)
        yield "zcproto_limit_use", most, "limits.max_streams"
        yield "zcproto_slow_readers", sum(protocol.is_slow_reader for protocol in state.connections)
        for number in range(150):
            yield "zcproto_method_calls_total", number, f"method{number}"
        for number in range(10):
            yield "zcproto_method_wait_seconds", state.methods["echo"].waits, f"method{number}"

    metrics = Metrics(source, process_readings)
    spent = []
    for _ in range(SCRAPES):
        begin = time.thread_time_ns()
        metrics.render("")
        spent.append(time.thread_time_ns() - begin)
    return spent


def measure(requests: int) -> list[Row]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        on, off = runner.run(time_requests(requests))
        scrapes = runner.run(time_scrapes())
    added = statistics.median(on) / statistics.median(off) - 1
    share = statistics.median(scrapes) / REQUESTS_PER_SCRAPE
    return [
        Row("requests", "requests of each kind", requests),
        *time_rows("on", "a request with counting", on, "us", "p50"),
        *time_rows("off", "a request without it", off, "us", "p50"),
        *time_rows("scrape", "a scrape with 10,000 connections", scrapes, "us", "p50"),
        Row("scrape_share_ns", "its share of a request", share, "ns"),
        Row("added", "added by counting", 100 * added, "%", below=MAX_ADDED),
    ]


@measurement
@click.option(
    "--requests", type=click.IntRange(LEAST), default=200_000, show_default=True, help="Of each kind."
)
def command(requests: int) -> list[Row]:
    return measure(requests)
