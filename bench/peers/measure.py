"""The figures: CPU of the server's process and its memory, each server in its turn on the same processor.

Disturbances of the machine hit all alike: a round gives each server a short slice of work, then each another.
CPU time is the scheduler's account of all threads of the process.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from bench.compare.client import connect_tls, context_for
from bench.peers.clients import (
    Client,
    GrpcClient,
    StreamsClient,
    UvicornClient,
    WebsocketsClient,
    ZcprotoClient,
)
from bench.peers.environment import Environment
from bench.stage import ECDSA_ONLY, Stage, bench_environment, cpu_seconds, room_for, settle
from zcproto.common.text import escape_text
from zcproto.errors import ZcprotoError
from zcproto.load.plan import SESSIONS_PER_USER
from zcproto.load.processes import on_processor

ZCPROTO: Final = "zcproto"
STREAMS: Final = "asyncio streams"
GRPC: Final = "grpcio aio"
UVICORN: Final = "uvicorn"
WEBSOCKETS: Final = "websockets on uvloop"
NAMES: Final = (ZCPROTO, STREAMS, GRPC, UVICORN, WEBSOCKETS)

ITEM_NAMES: Final = (ZCPROTO, GRPC)
"""The servers that have streams of items."""

_PEERS: Final[dict[str, tuple[str, type[Client]]]] = {
    STREAMS: ("streams", StreamsClient),
    GRPC: ("grpc_aio", GrpcClient),
    UVICORN: ("uvicorn_http", UvicornClient),
    WEBSOCKETS: ("websockets_uvloop", WebsocketsClient),
}

CONNECTIONS: Final = 50
"""With one request in flight on each."""

SLICE: Final = 1_000
"""Requests to one server before the turn of the next."""

CONNECTS: Final = 25
"""Connections made in a slice."""

WARM_UP: Final = 20
"""Connections made and closed before the memory of a new server is read."""

START_S: Final = 30.0
END_S: Final = 10.0
TIMEOUT_S: Final = 60.0
"""For each step of a connection."""

LINES_SHOWN: Final = 3
BYTES_PER_KIB: Final = 1_024

Say = Callable[[str], None]


@runtime_checkable
class Streaming(Protocol):
    """A connection to a server of ITEM_NAMES."""

    def items(self, count: int) -> None: ...


class Asked(Protocol):
    """A connection of any client."""

    @property
    def suite(self) -> str: ...

    def request(self) -> bytes: ...

    def send(self, request: bytes) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `held` connections are held to measure memory; 0 leaves that out."""

    rounds: int = 7
    requests: int = 5_000
    """In each round, of each server."""
    connects: int = 200
    held: int = 10_000
    payload_bytes: int = 64


@dataclass(slots=True)
class Figures:
    """Figures of each server, by its name: seconds by round; KiB of one connection."""

    request_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    connect_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in NAMES})
    item_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ITEM_NAMES})
    memory_kib: dict[str, float] = field(default_factory=dict)
    suites: dict[str, str] = field(default_factory=dict)
    call_us: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """CPU of a call at the clients of zcproto and websockets, by the calls in flight."""


class Server:
    """A running server, and how to connect to it."""

    def __init__(self, name: str, pid: int, port: int, connect: Callable[[], Asked]) -> None:
        self.name = name
        self.pid = pid
        self.port = port
        self.connect = connect

    def cpu_s(self) -> float:
        """Return the CPU time of all its threads so far."""
        return cpu_seconds(self.pid)

    def resident(self) -> int:
        """Return resident memory in bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Servers:
    """Starts each of them, on one processor, with the certificate of one home folder."""

    def __init__(self, folder: Path, environment: Environment, plan: Plan) -> None:
        # Sessions outlive their connections, so users that connect again and again need room for more than five.
        settings = {
            "sessions.per_user": 100_000,
            **room_for(max(plan.held, CONNECTIONS) + 1_000),
            **ECDSA_ONLY,
        }
        self._stage = Stage(folder, settings)
        self._environment = environment
        self._payload = os.urandom(plan.payload_bytes)
        self._users = self._stage.add_users("load", plan.held // SESSIONS_PER_USER + 1)
        self._stage.make_certificates()
        self.ca_file = self._stage.ca_file
        self.user = self._users[0]
        certs = self._stage.home.certs
        self._certificate = (certs / "server-ecdsa.crt", certs / "server-ecdsa.key")

    @contextlib.contextmanager
    def run(self, name: str) -> Iterator[Server]:
        """Run a new one."""
        starter = self._run_zcproto() if name == ZCPROTO else self._run_peer(name)
        with starter as server:
            yield server

    @contextlib.contextmanager
    def _run_zcproto(self) -> Iterator[Server]:
        context = context_for(self._stage.ca_file, *ZcprotoClient.alpn)
        params, users = {"data": self._payload}, itertools.cycle(self._users)
        with self._stage.serve() as server:
            yield Server(
                ZCPROTO,
                server.pid,
                server.port,
                lambda: ZcprotoClient(server.port, context, params, *next(users)),
            )

    @contextlib.contextmanager
    def _run_peer(self, name: str) -> Iterator[Server]:
        module, client = _PEERS[name]
        command = [str(self._environment.python), "-P", "-m", f"bench.peers.servers.{module}"]
        errors = self._stage.home.path / f"{module}.err"
        with on_processor(0), errors.open("wb") as log:
            process = subprocess.Popen(
                [*command, *map(str, self._certificate)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=bench_environment(),
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            readable, _, _ = select.select([process.stdout], [], [], START_S)
            line = process.stdout.readline() if readable else b""
            if not line.strip().isdigit():
                said = " / ".join(errors.read_text(errors="replace").splitlines()[-LINES_SHOWN:])
                raise ZcprotoError(f"the server of {name} did not start: {escape_text(said, 500)}")
            port = int(line)
            context = context_for(self._stage.ca_file, *client.alpn)
            yield Server(
                name, process.pid, port, lambda: client(connect_tls(port, context, TIMEOUT_S), self._payload)
            )
        finally:
            process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def measure(servers: Servers, plan: Plan, say: Say) -> Figures:
    """Measure all figures. Raises ZcprotoError for a wrong answer, OSError for a server that is gone."""
    figures = Figures()
    with on_processor(1):
        with contextlib.ExitStack() as stack:
            say("starting all five servers ...")
            running = [stack.enter_context(servers.run(name)) for name in NAMES]
            measure_requests(running, plan, figures, say)
            measure_items([server for server in running if server.name in ITEM_NAMES], plan, figures, say)
            measure_connects(running, plan, figures, say)
        if plan.held:
            for name in NAMES:
                say(f"{plan.held:,} connections to {name} ...")
                with servers.run(name) as server:
                    figures.memory_kib[name] = memory_of_connection(server, plan.held)
    return figures


def measure_requests(servers: list[Server], plan: Plan, figures: Figures, say: Say) -> None:
    """Measure the CPU of a request at depth 1."""
    connections = {server.name: [server.connect() for _ in range(CONNECTIONS)] for server in servers}
    try:
        for server in servers:
            asked = connections[server.name]
            figures.suites[server.name] = asked[0].suite
            _send_all(asked, 2 * SLICE // CONNECTIONS)
        turns = SLICE // CONNECTIONS
        slices = max(1, plan.requests // SLICE)
        for number in range(plan.rounds):
            say(f"requests, round {number + 1} of {plan.rounds} ...")
            spent = dict.fromkeys(connections, 0.0)
            for _ in range(slices):
                for server in servers:
                    before = server.cpu_s()
                    _send_all(connections[server.name], turns)
                    spent[server.name] += server.cpu_s() - before
            for name, seconds in spent.items():
                figures.request_s[name].append(seconds / (slices * turns * CONNECTIONS))
    finally:
        _close(itertools.chain.from_iterable(connections.values()))


def measure_items(servers: list[Server], plan: Plan, figures: Figures, say: Say) -> None:
    """Measure the CPU of an item, with one stream at a time whose client has room for all items."""
    connections = {server.name: server.connect() for server in servers}
    try:
        _send_all([*connections.values()], 1)
        slices = max(1, plan.requests // SLICE)
        for number in range(plan.rounds + 1):
            say(f"items, round {number} of {plan.rounds} ..." if number else "items, to warm up ...")
            spent = dict.fromkeys(connections, 0.0)
            for _ in range(slices):
                for server in servers:
                    connection, before = connections[server.name], server.cpu_s()
                    assert isinstance(connection, Streaming)
                    connection.items(SLICE)
                    spent[server.name] += server.cpu_s() - before
            for name, seconds in spent.items() if number else ():
                figures.item_s[name].append(seconds / (slices * SLICE))
    finally:
        _close(connections.values())


def measure_connects(servers: list[Server], plan: Plan, figures: Figures, say: Say) -> None:
    """Measure the CPU of a connection: accept, handshake, the opening of its protocol, and one request."""
    slices = max(1, plan.connects // CONNECTS)
    for number in range(plan.rounds):
        say(f"connections, round {number + 1} of {plan.rounds} ...")
        spent = {server.name: 0.0 for server in servers}
        opened: list[Asked] = []
        for _ in range(slices):
            for server in servers:
                before = server.cpu_s()
                for _ in range(CONNECTS):
                    connection = server.connect()
                    opened.append(connection)
                    _send_all([connection], 1)  # its answer shows that the server is done, too
                spent[server.name] += server.cpu_s() - before
        for name, seconds in spent.items():
            figures.connect_s[name].append(seconds / (slices * CONNECTS))
        _close(opened)
        settle()


def memory_of_connection(server: Server, count: int) -> float:
    """Return the KiB of resident memory of one of so many held connections, each after two requests."""
    warm = [server.connect() for _ in range(WARM_UP)]
    _send_all(warm, 2)
    _close(warm)
    settle()
    before = server.resident()
    held: list[Asked] = []
    try:
        for _ in range(count):
            connection = server.connect()
            held.append(connection)
            _send_all([connection], 1)
        for connection in held:  # all are still open
            _send_all([connection], 1)
        settle()
        return (server.resident() - before) / count / BYTES_PER_KIB
    finally:
        _close(held)


def _send_all(connections: list[Asked], turns: int) -> None:
    for _ in range(turns):
        requests = [connection.request() for connection in connections]
        for connection, request in zip(connections, requests, strict=True):
            connection.send(request)
        for connection in connections:
            connection.check()


def _close(connections: Iterable[Asked]) -> None:
    for connection in connections:
        connection.close()
