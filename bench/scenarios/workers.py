"""A server of several workers: how evenly they share connections, what they cost, and a limit that holds for all.

    balance   10,000 connections on two workers: how many each has, and what a worker takes at its start
    cpu       a request at two workers on one core, beside one at a single process on the same core, in turns and
              without what each takes when idle; and at two servers of a single process, to which the connections
              are dealt out: what two processes cost that share nothing, because each wakes up for fewer requests
    limit     200 logins of one user at once, over four workers: five get a session
    crowd     58,000 connections on three workers, each with its own session, and the memory of one

The crowd connects from several addresses of 127.0.0.0/8, by four processes, as each may have 20,000 open files. On
two cores it takes several minutes.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import click

from bench.command import COUNT, measurement, progress
from bench.compare.client import ALPN, context_for
from bench.compare.command import Running, Side
from bench.report import Report, Row
from bench.scenarios.harness import cause_of, load_rows, run_load_beside
from bench.scenarios.sessions import is_accepted, open_session
from bench.stage import (
    ECDSA_ONLY,
    KIB,
    SERVER_CPU,
    Server,
    Stage,
    family,
    memory_bytes,
    private_bytes,
    room_for,
    settle,
)
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, Operator
from zcproto.load.demo import temporary_home
from zcproto.load.plan import SESSIONS_PER_USER, check_plan, processes_for
from zcproto.load.result import Result

MIB: Final = 1 << 20
MAX_SHARE: Final = 52.0
MAX_PRIVATE_MIB: Final = 30.0
MAX_CPU_RATIO: Final = 1.02
"""Two workers beside two servers that share nothing."""

MAX_KIB: Final = 38.0

LOGINS: Final = 200
RATE: Final = 1_000.0
SECONDS: Final = 3.0
ARRIVAL_RATE: Final = 400.0
CROWD_RATE: Final = 200.0
"""Connections a second: four generators and three workers share two cores."""

SLICES: Final = 40
WARM_UP: Final = 2
IDLE_S: Final = 3.0
NAMES: Final = {"two": "two workers", "apart": "two single processes", "one": "a single process"}


def settings_for(workers: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"server.workers": workers, "log.level": "warning", **ECDSA_ONLY, **settings}


def stage_in(folder: Path, workers: int, settings: Mapping[str, Any] = {}) -> Stage:
    """Return a stage whose servers have so many workers."""
    return Stage(folder, settings_for(workers, settings))


def workers_of(server: Server) -> list[int]:
    """Return the processes of the workers; the first child is the coordinator."""
    return family(server.pid)[2:]


def open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def resident(pids: list[int]) -> int:
    return sum(memory_bytes(pid)[0] for pid in pids)


class Held:
    """A load of idle connections, and what the workers have of them."""

    def __init__(self, folder: Path, workers: int, connections: int, arrival_rate: float) -> None:
        self.arrival_rate = arrival_rate
        # On a busy machine the last connection comes long after the first, and handshakes wait.
        settings = {
            **room_for(connections),
            "limits.idle_timeout": "1h",
            "sessions.open_timeout": "1m",
            "tls.handshake_timeout": "30s",
        }
        self.stage = stage_in(folder, workers, settings)
        self.users = self.stage.add_users_for("user", connections)
        self.connections = connections
        self.counts: list[int] = []
        self.private: list[int] = []
        self.memory = 0

    def run(self) -> Result:
        with self.stage.serve(cpu=None) as server:
            settle()
            workers = workers_of(server)
            self.private = [private_bytes(pid) for pid in workers]
            files, memory = [open_files(pid) for pid in workers], resident(workers)
            plan = server.load(
                self.users,
                self.connections,
                RATE,
                SECONDS,
                arrival_rate=self.arrival_rate,
                processes=processes_for(self.connections),
            )
            check_plan(plan)

            async def look(operator: Operator) -> None:
                self.counts = [open_files(pid) - before for pid, before in zip(workers, files, strict=True)]
                self.memory = resident(workers) - memory

            return run_load_beside(plan, look)


def balance(folder: Path, connections: int) -> tuple[list[Row], list[str]]:
    held = Held(folder, 2, connections, ARRIVAL_RATE)
    result = held.run()
    share = 100 * max(held.counts, default=0) / max(sum(held.counts), 1)
    rows = [
        *load_rows(result),
        Row("share", "connections of the worker with more", share, "%", below=MAX_SHARE),
        Row("private_mib", "private memory of the last worker at its start", held.private[-1] / MIB, "MiB",
            below=MAX_PRIVATE_MIB),
    ]  # fmt: skip
    return rows, [f"connections by worker: {held.counts}"]


def crowd(folder: Path, connections: int) -> tuple[list[Row], list[str]]:
    held = Held(folder, 3, connections, CROWD_RATE)
    result = held.run()
    rows = [
        *load_rows(result),
        Row("share", "connections of the worker with most", 100 * max(held.counts) / sum(held.counts), "%"),
        Row("kib", "memory of a connection", held.memory / KIB / connections, "KiB", below=MAX_KIB),
    ]
    notes = [f"connections by worker: {held.counts}"]
    notes += [f"lost: {cause} {count:,}" for cause, count in result.record.lost_connections.items()]
    return rows, notes


class Together:
    """Servers that are measured as one. They get connections in turn."""

    def __init__(self, servers: Sequence[Running]) -> None:
        self._servers = servers
        self._ports = cycle([server.port for server in servers])

    @property
    def port(self) -> int:
        return next(self._ports)

    def cpu_us(self) -> float:
        return sum(server.cpu_us() for server in self._servers)


def cpu(folder: Path, rounds: int) -> tuple[list[Row], list[str]]:
    folder.mkdir()
    settings = {"limits.connections_per_address": 0}
    first = stage_in(folder / "first", 1, settings)
    users = first.add_users("user", 100)
    first.make_certificates()
    with ExitStack() as stack:
        sides, idle = [], []
        for name, (servers, workers) in {"two": (1, 2), "apart": (2, 1), "one": (1, 1)}.items():
            started = []
            for number in range(servers):
                stage = first.copy(folder / f"{name}-{number}")
                stage.configure(settings_for(workers, settings))
                server = stack.enter_context(stage.serve(cpu=SERVER_CPU))
                started.append(Running(server.pid, server.port))
            running = Together(started)
            sides.append(Side(running, context_for(first.ca_file, ALPN), iter(users)))
            stack.callback(sides[-1].close)
            settle()
            before = running.cpu_us()
            time.sleep(IDLE_S)
            idle.append((running.cpu_us() - before) / IDLE_S)
        rows = [
            Row(f"idle_{name}", f"idle, {label}", each / 1000, "ms/s")
            for (name, label), each in zip(NAMES.items(), idle, strict=True)
        ]
        for depth in (1, 16):
            costs = [
                [busy_cost(*each, depth) for each in zip(sides, idle, strict=True)]
                for _ in range(WARM_UP + rounds)
            ][WARM_UP:]
            for (name, label), values in zip(NAMES.items(), zip(*costs, strict=True), strict=True):
                rows.append(
                    Row(f"{name}_{depth}", f"depth {depth}, {label}", statistics.median(values), "us")
                )
            ratio = statistics.median(two / apart for two, apart, _ in costs)
            label = f"depth {depth}, two workers / two single processes"
            rows.append(Row(f"ratio_{depth}", label, ratio, below=MAX_CPU_RATIO))
            alone = statistics.median(two / one for two, _, one in costs)
            rows.append(Row(f"one_ratio_{depth}", f"depth {depth}, two workers / one", alone))
        return rows, []


def busy_cost(side: Side, idle: float, depth: int) -> float:
    """Return the CPU time of a request, without what the processes take while nothing happens."""
    began = time.monotonic()
    cost = side.request_cost("echo", depth)
    return cost - idle * (time.monotonic() - began) / side.requests_in_slice(depth)


def limit(folder: Path, logins: int) -> tuple[list[Row], list[str]]:
    # Sessions that no connection uses are replaced by default; here each login keeps its connection.
    stage = stage_in(folder, 4, {**room_for(logins), "store.url": "sqlite", "sessions.when_full": "refuse"})
    [user] = stage.add_users("racer", 1)
    answers: Counter[str] = Counter()

    async def race(server: Server) -> int:
        target = server.target()
        callers = [await target.caller() for _ in range(logins)]
        tokens: list[bytes] = []

        async def login(caller: Caller) -> None:
            try:
                tokens.append((await open_session(caller, user)).token)
            except ZcprotoError as error:
                answers[cause_of(error)] += 1

        try:
            await asyncio.gather(*map(login, callers))
            return sum([await is_accepted(callers[0], token) for token in tokens])
        finally:
            for caller in callers:
                await caller.disconnect()
            target.close()

    with stage.serve("sqlite", cpu=None) as server, asyncio.Runner(loop_factory=new_event_loop) as runner:
        accepted = runner.run(race(server))
    rows = [
        Row("logins", "logins at once", logins),
        Row("sessions", "sessions that are accepted", accepted, equals=SESSIONS_PER_USER),
        Row("refused", "logins refused", answers.total(), equals=logins - SESSIONS_PER_USER),
    ]
    return rows, [f"{cause}: {count}" for cause, count in answers.items()]


PARTS: Final[dict[str, tuple[Callable[[Path, int], tuple[list[Row], list[str]]], int]]] = {
    "balance": (balance, 10_000),
    "cpu": (cpu, SLICES),
    "limit": (limit, LOGINS),
    "crowd": (crowd, 58_000),
}
"""The parts, and the number of connections, slices or logins of each."""


@measurement
@click.option("--only", multiple=True, type=click.Choice([*PARTS]), help="Only this part; repeatable.")
@click.option("--size", type=COUNT, help="Connections, slices or logins of each part.")
def command(only: tuple[str, ...], size: int | None) -> Report:
    report = Report({})
    with temporary_home() as home:
        for name in only or PARTS:
            progress(f"{name} ...")
            part, usual = PARTS[name]
            rows, notes = part(home.path / name, size or usual)
            report.columns[name] = rows
            report.notes += [f"{name}: {note}" for note in notes]
    return report
