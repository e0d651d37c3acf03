"""CPU of a request beside a bare server that checks nothing: in one run, in turns, on the same core.

The bare server (bare_server.py) does the least that a Python server of these frames can do. The ratio is what
the checks, sessions, limits, dispatch and metrics of zcproto cost. Both serve the same ECDSA P-256 certificate
on uvloop. CPU time is the kernel's, of the server process alone.

Both have their turns in slices of some tens of milliseconds. A ratio is that of a slice to the one right after
it; the table has the median of all pairs, and the quartiles: what disturbs the machine for a moment is in few
pairs, and what disturbs it for longer is in both sides of each.

An item of a stream, of the same params, stands beside a request of the same server: one stream whose client has
room for all items. The last row is a request on one of many connections at random, one at a time: the memory of
that connection is in no cache, as in production.

The server uses the accelerator if it was built; ZCPROTO_ACCELERATOR=off in the environment measures it without.

With `--floor` a server in C (floor.c), which checks nothing at all, stands beside it, too: that is TLS and
system calls. It needs a C compiler and OpenSSL's headers.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import click
import msgpack

from bench.command import COUNT, measurement
from bench.compare.client import ALPN, Connection, context_for
from bench.report import Report, Row
from bench.stage import (
    CLIENT_CPU,
    ECDSA_ONLY,
    SERVER_CPU,
    Stage,
    bench_environment,
    cpu_seconds,
    family,
    settle,
)
from zcproto import accelerator
from zcproto.errors import ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import SPARE_FILES, Credential, require_open_files
from zcproto.load.processes import module_command, on_processor

CONNECTIONS: Final = 50
SESSIONS_PER_USER: Final = 5
USERS: Final = 10_000
PARAMS: Final = {"data": b"x" * 64}
ANSWER: Final = msgpack.packb(PARAMS)

SLICE: Final = 2_000
"""Requests to one server before the other has its turn: some tens of milliseconds."""

CONNECTED: Final = 50
"""Connections in a slice."""

AT_ONCE: Final = 8
"""Connections under way at the same time, where several arrive."""

FIRST_PORT: Final = 20_000
PORTS: Final = 5_000
"""Each yardstick listens on one of so many, by the id of this process. The system assigns higher ones."""

END_S: Final = 10.0


class Case(NamedTuple):
    """One comparison: the cost of a slice at both servers, and the most of their ratio, if there is a bar."""

    name: str
    bar: float | None
    unit: str
    measured: Callable[[], float]
    reference: Callable[[], float]
    aim: float | None = None


class Bars(NamedTuple):
    """The most that a request at depth 1, one at depth 16 and a connection may cost beside the bare server's."""

    one: float
    sixteen: float
    connection: float
    """One of several that arrive at once, as after a restart."""

    lone_connection: float
    """One that arrives while the server has nothing else to do. It sleeps between the steps of the handshake
    and wakes with cold caches, so the time depends more on the amount of code than on instructions executed."""

    scattered: float
    """A request on one of many connections at random."""


WITH_ACCELERATOR: Final = Bars(1.20, 1.15, 1.55, 1.65, 1.25)
WITHOUT_ACCELERATOR: Final = Bars(1.50, 1.85, 1.6, 1.7, 1.4)
"""Above the spread of three kinds of processor: a figure that fails has become worse."""

AIMS: Final = Bars(1.05, 0.95, 1.3, 1.3, 1.1)


class Running(NamedTuple):
    """A server, by its first process."""

    pid: int
    port: int

    def cpu_us(self) -> float:
        """Return the CPU time of all its processes, in microseconds."""
        return sum(map(cpu_seconds, family(self.pid))) * 1e6


class Measured(Protocol):
    """A server, or several that are measured as one: `port` is that for the next connection."""

    @property
    def port(self) -> int: ...
    def cpu_us(self) -> float: ...


class Side:
    """A server, with connections for requests, and what slices of work cost it."""

    def __init__(
        self, server: Measured, context: ssl.SSLContext, users: Iterator[Credential] | None = None
    ) -> None:
        """With `users` each connection opens a session, five of each user."""
        self._server = server
        self._context = context
        self._users = users
        self._opened: list[Connection] = []
        self._random = random.Random(CONNECTIONS)  # noqa: S311 - the same choice each time
        self._connections = self._connect(CONNECTIONS)

    def _connect(self, count: int, at_once: int = 1) -> list[Connection]:
        groups = range(0, count, SESSIONS_PER_USER)
        users = [] if self._users is None else [next(self._users) for _ in groups]

        def connect(number: int) -> Connection:
            connection = Connection(self._server.port, self._context)
            if users:
                connection.open_session(*users[number // SESSIONS_PER_USER])
            else:
                connection.token = b"k" * 32
            return connection

        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(connect, range(count)))

    def requests_in_slice(self, depth: int) -> int:
        """Return how many requests `request_cost` makes: about SLICE, and as many on each connection."""
        in_turn = len(self._connections) * depth
        return max(1, SLICE // in_turn) * in_turn

    def request_cost(self, method: str, depth: int) -> float:
        """Make a slice of requests; return the server's CPU time for each, in microseconds."""
        connections, requests = self._connections, self.requests_in_slice(depth)
        before = self._server.cpu_us()
        for _ in range(requests // (len(connections) * depth)):
            for connection in connections:
                connection.echo(method, PARAMS, depth)
            for connection in connections:
                connection.check_echoes(ANSWER, depth)
        return (self._server.cpu_us() - before) / requests

    def item_cost(self) -> float:
        """Take a slice of items from one stream; return the server's CPU time for each, in microseconds."""
        connection = self._connections[0]
        before = self._server.cpu_us()
        connection.open_items("echo_items", {**PARAMS, "n": SLICE}, SLICE)
        connection.check_items([ANSWER] * SLICE)
        return (self._server.cpu_us() - before) / SLICE

    def connection_cost(self, at_once: int) -> float:
        """Make a slice of connections, some at once; return the server's CPU time for 10,000, in seconds."""
        before = self._server.cpu_us()
        self._opened += self._connect(CONNECTED, at_once)
        return (self._server.cpu_us() - before) / 1e6 * 10_000 / CONNECTED

    def scattered_cost(self) -> float:
        """Make requests on opened connections at random, one at a time; return the CPU time as `request_cost`."""
        before = self._server.cpu_us()
        for connection in self._random.choices(self._opened, k=SLICE):
            connection.echo("echo", PARAMS, 1)
            connection.check_echoes(ANSWER, 1)
        return (self._server.cpu_us() - before) / SLICE

    def open_many(self, count: int) -> None:
        self._opened += self._connect(count, AT_ONCE)

    def close(self) -> None:
        self.close_opened()
        for connection in self._connections:
            connection.close()

    def close_opened(self) -> None:
        for connection in self._opened:
            connection.close()
        self._opened.clear()


def compare(
    folder: Path, rounds: int, requests: int, connects: int, many: int, with_floor: bool = False
) -> Report:
    """Carry out all comparisons. Raises ZcprotoError for a wrong answer, or a server that does not start."""
    stage = Stage(folder, {"limits.connections_per_address": 0, "store.url": "memory", **ECDSA_ONLY})
    users = iter(stage.add_users("user", USERS))
    stage.make_certificates()
    with contextlib.ExitStack() as stack:
        context = context_for(stage.ca_file, ALPN)
        zcproto = Side(stack.enter_context(run_zcproto(folder)), context, users)
        bare = Side(stack.enter_context(run_bare(folder)), context)
        sync = partial(zcproto.request_cost, "echo", 1)
        bars = WITHOUT_ACCELERATOR if accelerator.compiled is None else WITH_ACCELERATOR
        cases = [
            Case(
                "CPU per request, depth 1, sync / bare",
                bars.one,
                "us",
                sync,
                partial(bare.request_cost, "echo", 1),
                AIMS.one,
            ),
            Case(
                "CPU per request, depth 16, sync / bare",
                bars.sixteen,
                "us",
                partial(zcproto.request_cost, "echo", 16),
                partial(bare.request_cost, "echo", 16),
                AIMS.sixteen,
            ),
            Case(
                "CPU per request, depth 1, async / sync",
                1.15,
                "us",
                partial(zcproto.request_cost, "echo_async", 1),
                sync,
            ),
            Case(
                "CPU per item of a stream / request, depth 16",
                0.5,
                "us",
                zcproto.item_cost,
                partial(zcproto.request_cost, "echo", 16),
            ),
        ]
        if with_floor:
            floor = Side(stack.enter_context(run_floor(folder)), context)
            lowest = partial(floor.request_cost, "echo", 1)
            cases.append(Case("CPU per request, depth 1, sync / floor in C", 4.0, "us", sync, lowest))
        found = {}
        for case in cases:
            in_turn(case, 1)  # to warm up
            found[case] = in_turn(case, rounds * max(1, requests // SLICE))
        for at_once, bar, aim in (
            (AT_ONCE, bars.connection, AIMS.connection),
            (1, bars.lone_connection, AIMS.lone_connection),
        ):
            case = Case(
                f"CPU to connect 10,000, with sessions, {at_once} at once / bare",
                bar,
                "s",
                partial(zcproto.connection_cost, at_once),
                partial(bare.connection_cost, at_once),
                aim,
            )
            found[case] = []
            for _ in range(max(3, rounds // 2)):
                found[case] += in_turn(case, max(1, connects // CONNECTED))
                zcproto.close_opened()
                bare.close_opened()
                settle()
        for side in (zcproto, bare):
            side.open_many(many)
        case = Case(
            f"CPU per request on one of {many:,} connections / bare",
            bars.scattered,
            "us",
            zcproto.scattered_cost,
            bare.scattered_cost,
            AIMS.scattered,
        )
        in_turn(case, 1)  # to warm up
        found[case] = in_turn(case, rounds)
    return report(found)


def in_turn(case: Case, slices: int) -> list[tuple[float, float]]:
    """Return the costs of slices in pairs of neighbours: what disturbs the machine disturbs both."""
    return [(case.measured(), case.reference()) for _ in range(slices)]


def report(found: dict[Case, list[tuple[float, float]]]) -> Report:
    columns: dict[str, list[Row]] = {name: [] for name in ("measured", "reference", "ratio", "from", "to")}
    for case, pairs in found.items():
        ratios = sorted(measured / reference for measured, reference in pairs)
        values = {
            "measured": statistics.median(measured for measured, _ in pairs),
            "reference": statistics.median(reference for _, reference in pairs),
            "ratio": statistics.median(ratios),
            "from": ratios[len(ratios) // 4],
            "to": ratios[-1 - len(ratios) // 4],
        }
        for column, value in values.items():
            below = case.bar if column == "ratio" else None
            unit = case.unit if column in ("measured", "reference") else ""
            aim = case.aim if column == "ratio" else None
            columns[column].append(Row(case.name, case.name, value, unit, below=below, aim=aim))
    return Report(columns, notes=[f"accelerator: {accelerator.describe()}"])


@contextlib.contextmanager
def run_zcproto(home: Path, environ: Mapping[str, str] | None = None) -> Iterator[Running]:
    words = ("--home", str(home), "serve", "bench.compare.app:app", "--port", "0")
    environ = environ or bench_environment()
    with running(module_command("zcproto", *words), stdout=subprocess.PIPE, env=environ) as server:
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        if "listening on" not in line:
            raise ZcprotoError(f"zcproto serve did not start: {line}")
        yield Running(server.pid, int(line.rpartition(":")[2]))


@contextlib.contextmanager
def run_bare(home: Path) -> Iterator[Running]:
    script = Path(__file__).parent / "bare_server.py"
    port = FIRST_PORT + os.getpid() % PORTS
    with _yardstick(
        home, port, lambda pem: [sys.executable, str(script), str(port), pem, "uvloop"]
    ) as server:
        yield server


@contextlib.contextmanager
def run_floor(home: Path) -> Iterator[Running]:
    program, source = home / "floor", Path(__file__).parent / "floor.c"
    command = ["cc", "-O2", "-o", str(program), str(source), "-lssl", "-lcrypto"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ZcprotoError(
            "floor.c cannot be compiled: it needs a C compiler and OpenSSL's headers; on Debian: "
            "apt-get install gcc libc6-dev libssl-dev"
        ) from error
    port = FIRST_PORT + PORTS + os.getpid() % PORTS
    with _yardstick(home, port, lambda pem: [str(program), str(port), pem]) as server:
        yield server


@contextlib.contextmanager
def _yardstick(home: Path, port: int, command: Callable[[str], list[str]]) -> Iterator[Running]:
    """Run a server that gets a port, and certificate and key in one file; it has started when it accepts."""
    pem = home / f"{port}.pem"
    with open(pem, "wb") as out:
        for name in ("server-ecdsa.crt", "server-ecdsa.key"):
            with open(home / "certs" / name, "rb") as part:
                shutil.copyfileobj(part, out)
    with running(command(str(pem))) as server:
        context = context_for(home / "certs" / "ca.crt", ALPN)
        for _ in range(100):
            try:
                Connection(port, context).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield Running(server.pid, port)


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process on a core of its own."""
    with on_processor(SERVER_CPU):
        process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@measurement
@click.option("--rounds", type=COUNT, default=7, show_default=True, help="How often each comparison is made.")
@click.option("--requests", type=COUNT, default=20_000, show_default=True, help="To each server in a round.")
@click.option("--connects", type=COUNT, default=2_000, show_default=True, help="Connections made in a round.")
@click.option("--many", type=COUNT, default=5_000, show_default=True, help="Connections of the last row.")
@click.option("--floor", is_flag=True, help="Compare with a server in C, too.")
def command(rounds: int, requests: int, connects: int, many: int, floor: bool) -> Report:
    open_files = 2 * (many + CONNECTIONS) + SPARE_FILES
    require_open_files(open_files, many, lambda limit: (limit - SPARE_FILES) // 2 - CONNECTIONS)
    with temporary_home() as home, on_processor(CLIENT_CPU):
        return compare(home.path, rounds, requests, connects, many, floor)
