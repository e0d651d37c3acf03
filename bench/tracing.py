"""OpenTelemetry: CPU of a request with traces switched off, and with one of a hundred recorded.

Three servers, in turns and on the same core, as in `compare`: `without` cannot import OpenTelemetry, `off` can and
does not use it, `on` records 1 % of the traces that begin there and sends them to a collector that this command
runs. CPU time is the kernel's, of the server process alone, with the thread that sends spans. A ratio is that of a
slice to the one right after it; the table has the median of all pairs, and the quartiles.

Each connection has one request in flight, or 16 at depth 16. With `unrecorded callers` all requests have a
`traceparent` of a trace that is not recorded, as those of clients that trace one of a hundred calls themselves: the
server passes it on to the calls of its methods. The other requests have none.

Bytecodes are those of the package for one request in memory, without TLS and sockets. They do not depend on the
machine, so that noise cannot hide what the code costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import click
import uvloop

from bench.command import COUNT, measurement
from bench.compare.client import ALPN, context_for
from bench.compare.command import (
    ANSWER,
    PARAMS,
    SLICE,
    USERS,
    Case,
    Measured,
    Running,
    Side,
    in_turn,
    report,
    run_zcproto,
)
from bench.guard.counting import Recorder
from bench.micro.metrics_cost import Peer, state_on, without_lines
from bench.report import Report, Row
from bench.stage import CLIENT_CPU, ECDSA_ONLY, Stage, bench_environment
from zcproto.common.text import extra_cure
from zcproto.errors import ConfigError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor
from zcproto.server.protocol import ServerProtocol, TracedProtocol

RATIO: Final = 0.01
MOST_OFF: Final = 1.01
MOST_ON: Final = 1.15

NOT_RECORDED: Final = {"traceparent": f"00-{'5' * 32}-{'6' * 16}-00"}

WITHOUT: Final = "import sys\n\nsys.modules['opentelemetry'] = None\n"
"""The module `sitecustomize` of a server that cannot import OpenTelemetry."""

LINES: Final = {"if state.tracing is not None and state.tracing.is_due(meta):": "if False:"}
"""The line of `Dispatcher.run` that traces need, and what replaces it."""

COUNTED: Final = 200
MOST_BYTECODES: Final = 8
"""What the check for traces may add to a request, of several hundred."""


class Traced(Side):
    """A side whose requests have a `traceparent` that is not recorded."""

    def request_cost(self, method: str, depth: int) -> float:
        connections, requests = self._connections, self.requests_in_slice(depth)
        before = self._server.cpu_us()
        for _ in range(requests // (len(connections) * depth)):
            for connection in connections:
                connection.send([connection.frame(method, PARAMS, NOT_RECORDED) for _ in range(depth)])
            for connection in connections:
                connection.check_echoes(ANSWER, depth)
        return (self._server.cpu_us() - before) / requests


class Collector(BaseHTTPRequestHandler):
    """Takes everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Run a collector; yield its address."""
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_server(home: Path, modules: Path | None = None) -> AbstractContextManager[Running]:
    """Run a server; `modules` is a folder of modules that it finds first."""
    environ = dict(bench_environment())
    if modules is not None:
        environ["PYTHONPATH"] = f"{modules}:{environ.get('PYTHONPATH', '')}".rstrip(":")
    return run_zcproto(home, environ)


def compare(folder: Path, rounds: int, requests: int) -> Report:
    """Measure the three servers. Raises ZcprotoError for a wrong answer."""
    settings = {"limits.connections_per_address": 0, "store.url": "memory", **ECDSA_ONLY}
    first = Stage(folder / "without", settings)
    users = first.add_users("user", USERS)
    first.make_certificates()
    (folder / "modules").mkdir()
    (folder / "modules" / "sitecustomize.py").write_text(WITHOUT)
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(collector())
        on_settings = {
            "telemetry.traces": True,
            "telemetry.sample_ratio": RATIO,
            "telemetry.endpoint": address,
        }
        stages = {name: first.copy(folder / name) for name in ("off", "on")}
        stages["on"].configure({**settings, **on_settings})
        context = context_for(first.ca_file, ALPN)
        servers = {
            "without": stack.enter_context(run_server(folder / "without", folder / "modules")),
            **{name: stack.enter_context(run_server(folder / name)) for name in stages},
        }
        sides = {name: _side(Side, server, context, users) for name, server in servers.items()}
        callers = {name: _side(Traced, servers[name], context, users[2_000:]) for name in ("without", "on")}
        cases = [
            _case("off / without", MOST_OFF, sides["off"], sides["without"], 1),
            _case("on / without", MOST_ON, sides["on"], sides["without"], 1),
            _case("on / without, depth 16", None, sides["on"], sides["without"], 16),
            _case("on / without, unrecorded callers", None, callers["on"], callers["without"], 1),
        ]
        found = {}
        for case in cases:
            in_turn(case, 1)  # to warm up
            found[case] = in_turn(case, rounds * max(1, requests // SLICE))
        for side in (*sides.values(), *callers.values()):
            side.close()
    return report(found)


def _side(kind: type[Side], server: Measured, context: ssl.SSLContext, users: list[Credential]) -> Side:
    return kind(server, context, iter(users))


def _case(name: str, bar: float | None, measured: Side, reference: Side, depth: int) -> Case:
    cost = "echo", depth
    return Case(
        name,
        bar,
        "us",
        partial(measured.request_cost, *cost),
        partial(reference.request_cost, *cost),
    )


# --- bytecodes -------------------------------------------------------------------------------------------------


def bytecodes(ratio: float | None, kind: type[ServerProtocol]) -> float:
    """Return the bytecodes of one request; `ratio` is the part that is recorded, None for no traces."""

    async def count() -> float:
        state = state_on(asyncio.get_running_loop())
        if ratio is not None:
            state.tracing = _tracing(state.methods.values(), ratio)
        peer = Peer(state, kind, "ada")
        state.clock = _Still(state.clock)
        for _ in range(2):  # the first looks its session up, and one read of an interval is timed
            peer.protocol.data_received(peer.request())
        frames = [peer.request() for _ in range(COUNTED)]
        recorder = Recorder()
        with recorder:
            for data in frames:
                peer.protocol.data_received(data)
        state.close()
        return sum(recorder.bytecodes.values()) / COUNTED

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(count())


class _Still:
    """A clock that stands still, so that no read is timed."""

    def __init__(self, clock: Any) -> None:
        wall, now = clock.wall(), clock.now()
        self.wall = lambda: wall
        self.now = lambda: now


def _tracing(methods: Any, ratio: float) -> Any:
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - it comes with an extra
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415 - as above

    from zcproto.telemetry.requests import ChosenIds, RequestTracing  # noqa: PLC0415 - needs the extra
    from zcproto.telemetry.spans import tracer_of  # noqa: PLC0415 - needs the extra

    ids = ChosenIds()
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False, id_generator=ids
    )
    return RequestTracing(tracer_of(provider), ids, methods, ratio=ratio)


def counted_rows() -> list[Row]:
    """Return the bytecodes of a request without what traces need, switched off, and not recorded."""
    without = bytecodes(None, without_lines(LINES))
    off = bytecodes(None, ServerProtocol)
    unrecorded = bytecodes(0.0, TracedProtocol)
    recorded = bytecodes(1.0, TracedProtocol)
    return [
        Row("bytecodes", "bytecodes of a request in memory, off", off, ""),
        Row("bytecodes_off", "of them, the check for traces", off - without, "", below=MOST_BYTECODES),
        Row("bytecodes_unrecorded", "more for a request that is not recorded", unrecorded - off, ""),
        Row("bytecodes_recorded", "more for one that is", recorded - off, ""),
    ]


@measurement
@click.option("--rounds", type=COUNT, default=7, show_default=True, help="How often each comparison is made.")
@click.option("--requests", type=COUNT, default=20_000, show_default=True, help="To each server in a round.")
def command(rounds: int, requests: int) -> Report:
    try:
        import opentelemetry.sdk  # noqa: F401, PLC0415 - it comes with an extra
    except ImportError:
        raise ConfigError([f"OpenTelemetry is not installed; {extra_cure('otel')}"]) from None
    with temporary_home() as home, on_processor(CLIENT_CPU):
        found = compare(home.path, rounds, requests)
    return Report({**found.columns, "figure": counted_rows()}, notes=found.notes)
