"""Kill one of three servers again and again under clients that know all three.

The servers share a Valkey. Each of 300 clients has a session and calls once a second, every tenth call without
an idempotency key. Every 5 seconds the next server is killed and started again. Each call with a key must get an
answer, and no call may run twice: each run leaves a trace that outlives the server.

The outcome of a call that runs when its server is killed is unknown. The other servers answer UNKNOWN as soon as
they count that server as gone (specification, section 16.1). Such calls are counted by themselves.

The calls during a failover are those of the clients that were connected to the killed server: in flight when it was
killed, or due within a second after that. All are timed from when they were due. The report shows where that time
went: until an attempt to connect began, TCP, TLS, and from there to the answer; and how long the process that all
clients share ran, and waited for a processor. 300 machines would have 300 of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, RATE, SECONDS, measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.failover_app import RUNS_VARIABLE
from bench.scenarios.failover_times import Done, FailoverTimes
from bench.scenarios.failover_times import rows as rows_of_times
from bench.scenarios.harness import CALL_S, cause_of, for_each
from bench.scenarios.helper import Helper
from bench.stage import ECDSA_ONLY, HOST, Server, Stage, room_for
from bench.valkey import Valkey
from zcproto.client.client import Client
from zcproto.client.dial import Dialer
from zcproto.client.options import ConnectOptions
from zcproto.common.clock import MonotonicClock, system_clock
from zcproto.common.process import new_event_loop
from zcproto.errors import UnknownError, ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential

SERVERS: Final = 3
APP: Final = "bench.scenarios.failover_app:app"
KEYLESS_EVERY: Final = 10
"""One of so many calls has no idempotency key, and is not repeated if it may have run."""

MAX_P99_MS: Final = 1_000.0
RESTART_S: Final = 1.5
"""From a kill to the start of the server: its imports would delay clients that share its processors."""

LAST_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class FailoverClientsPlan:
    """One run."""

    seconds: float = 120.0
    clients: int = 300
    interval_s: float = 5.0
    """From one kill to the next."""
    rate: float = 1.0
    """Calls of each client a second."""

    @property
    def kills(self) -> int:
        return int(self.seconds / self.interval_s)


@dataclass(slots=True)
class FleetSeen:
    """What became of the calls."""

    times: FailoverTimes = field(default_factory=FailoverTimes)
    names: list[str] = field(default_factory=list)
    """Of the calls that were answered with a result, keyed or not."""
    keyed: int = 0
    keyless: int = 0
    unknown: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    """Calls with a key and any other error, by cause."""
    not_repeated: Counter[str] = field(default_factory=Counter)
    """Calls without a key that failed, by cause."""
    sessions_lost: int = 0
    reconnects: int = 0


class FailoverClients:
    """Clients that know all servers, each with a session and a loop of calls."""

    def __init__(self, ports: Sequence[int], ca_file: Path, users: Sequence[Credential], rate: float) -> None:
        self._random = random.Random(1)  # noqa: S311 - an order, no secret
        self._rate = rate
        self._seen = FleetSeen()
        self._stopped = asyncio.Event()
        addresses = [f"{HOST}:{port}" for port in ports]
        self._clients = [
            self._client(
                number, addresses, ConnectOptions(user=user, key=key, ca_file=ca_file, timeout=CALL_S)
            )
            for number, (user, key) in enumerate(users)
        ]

    def _client(self, number: int, addresses: Sequence[str], options: ConnectOptions) -> Client:
        options = replace(options, on_connected=self._connected)
        dialer = Dialer(options, MonotonicClock(system_clock), system_clock)
        return Client(addresses, options, dial=self._seen.times.timed(dialer, number))

    def _connected(self, _: object) -> None:
        self._seen.reconnects += 1

    async def open(self) -> None:
        """Connect all clients."""
        await for_each(self._clients, Client.open)
        self._sessions = [client.session and client.session.id for client in self._clients]
        self._seen.reconnects = 0

    async def load(self) -> FleetSeen:
        """Call until `stop`; then wait for the last answers."""
        await asyncio.gather(*(self._loop(number, client) for number, client in enumerate(self._clients)))
        now = [client.session and client.session.id for client in self._clients]
        self._seen.sessions_lost = sum(
            before != after for before, after in zip(self._sessions, now, strict=True)
        )
        return self._seen

    async def note_kill(self, at: float) -> None:
        """Note where the clients are connected before a server is killed."""
        self._noting = asyncio.create_task(self._seen.times.note_load())
        self._seen.times.ports[at] = {
            number: client.endpoint.port
            for number, client in enumerate(self._clients)
            if client.endpoint is not None
        }

    async def stop(self) -> None:
        self._stopped.set()

    async def disconnect(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))

    async def _loop(self, number: int, client: Client) -> None:
        due, calls = time.monotonic(), 0
        async with asyncio.TaskGroup() as running:
            while not self._stopped.is_set():
                due += self._random.expovariate(self._rate)
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await self._stopped.wait()
                    return
                calls += 1
                call = self._call(client, number, f"{number}-{calls}", due, calls % KEYLESS_EVERY != 0)
                running.create_task(call)

    async def _call(self, client: Client, number: int, name: str, due: float, is_keyed: bool) -> None:
        seen, begin = self._seen, time.monotonic()
        seen.keyed += is_keyed
        seen.keyless += not is_keyed
        try:
            answer = await client.call("book", name=name, idempotency_key=name if is_keyed else None)
        except ZcprotoError as error:
            if not is_keyed:
                seen.not_repeated[cause_of(error)] += 1
            elif isinstance(error, UnknownError):
                seen.unknown += 1
            else:
                seen.unanswered[cause_of(error)] += 1
            return
        if answer != name:
            seen.unanswered["the answer of another call"] += 1
            return
        seen.names.append(name)
        if is_keyed:
            seen.times.done.append(Done(due, begin, time.monotonic(), number))


class Fleet:
    """Three servers on one store."""

    def __init__(self, stage: Stage, store: str) -> None:
        self._servers = []
        for number in range(SERVERS):
            copied = stage if not number else stage.copy(stage.home.path.with_name(f"server-{number}"))
            self._servers.append(Server(copied, store, APP, _free_port()))

    @property
    def ports(self) -> list[int]:
        return [server.port for server in self._servers]

    async def start(self, stack: AsyncExitStack) -> None:
        for server in self._servers:
            await asyncio.to_thread(server.__enter__)
            stack.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)

    async def kill(self, number: int) -> None:
        """Kill a server and start it again a moment later, as a service manager does."""
        server = self._servers[number % SERVERS]
        server.kill()
        await asyncio.to_thread(server.__exit__, None, None, None)
        await asyncio.sleep(RESTART_S)
        await asyncio.to_thread(server.__enter__)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def kill_often(
    fleet: Fleet, clients: Helper, plan: FailoverClientsPlan
) -> tuple[FleetSeen, dict[float, int]]:
    """Carry out all kills while the clients call; return what became of the calls, and the kills."""
    kills: dict[float, int] = {}
    async with clients:
        await clients.call("open")
        loading = asyncio.create_task(clients.call("load"))
        began = time.monotonic() + plan.interval_s / 2
        for number in range(plan.kills):
            await asyncio.sleep(began + number * plan.interval_s - time.monotonic())
            at = time.monotonic()
            await clients.call("note_kill", at)
            kills[at] = fleet.ports[number % SERVERS]
            await fleet.kill(number)
            progress(f"kill {number + 1} of {plan.kills}: serving again after {time.monotonic() - at:.1f} s")
        await asyncio.sleep(LAST_S)
        await clients.call("stop")
        seen: FleetSeen = await loading
        await clients.call("disconnect")
    return seen, kills


def report(plan: FailoverClientsPlan, seen: FleetSeen, kills: dict[float, int], runs: Counter[str]) -> Report:
    """Hold what was seen against the bars."""
    twice = [name for name, count in runs.items() if count > 1]
    never = [name for name in seen.names if not runs[name]]
    rows = [
        Row("kills", "kills", len(kills), equals=plan.kills),
        Row("reconnects", "reconnects of clients", seen.reconnects, at_least=1),
        Row("keyed", "calls with a key", seen.keyed, at_least=1),
        Row("unanswered", "of these without an answer", seen.unanswered.total(), equals=0),
        Row("unknown", "of these killed while they ran (UNKNOWN)", seen.unknown),
        Row("keyless", "calls without a key", seen.keyless, at_least=1),
        Row("not_repeated", "of these failed, as they may have run", seen.not_repeated.total()),
        Row("twice", "calls that ran twice", len(twice), equals=0),
        Row("never", "calls that were answered and did not run", len(never), equals=0),
        Row("sessions_lost", "clients whose session was replaced", seen.sessions_lost, equals=0),
        *rows_of_times(seen.times, kills, MAX_P99_MS),
    ]  # fmt: skip
    notes = [
        *counted("unanswered", seen.unanswered),
        *counted("not repeated", seen.not_repeated),
        *(f"ran twice: {name}" for name in twice[:5]),
    ]
    return Report({"figure": rows}, notes=notes)


async def conduct(stage: Stage, plan: FailoverClientsPlan, folder: Path) -> Report:
    """Carry out a plan. Raises ZcprotoError for a server that does not start."""
    users = stage.add_users_for("client", plan.clients)
    runs = folder / "runs"
    runs.touch()
    os.environ[RUNS_VARIABLE] = str(runs)
    stage.make_certificates()
    async with AsyncExitStack() as stack:
        valkey = Valkey(folder / "valkey", fsync="everysec")
        await asyncio.to_thread(valkey.__enter__)
        stack.push_async_callback(asyncio.to_thread, valkey.__exit__)
        fleet = Fleet(stage, valkey.url)
        await fleet.start(stack)
        clients = Helper(FailoverClients, fleet.ports, stage.ca_file, users, plan.rate, processor=None)
        seen, kills = await kill_often(fleet, clients, plan)
    return report(plan, seen, kills, Counter(runs.read_text().split()))


@measurement
@click.option("--seconds", type=SECONDS, default=120.0, show_default=True, help="How long.")
@click.option("--clients", type=COUNT, default=300, show_default=True, help="How many.")
@click.option("--interval", type=SECONDS, default=5.0, show_default=True, help="Seconds between two kills.")
@click.option("--rate", type=RATE, default=1.0, show_default=True, help="Calls a second of each client.")
def command(seconds: float, clients: int, interval: float, rate: float) -> Report:
    settings = {**room_for(clients), **ECDSA_ONLY}
    plan = FailoverClientsPlan(seconds, clients, interval, rate)
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        stage = Stage(home.path / "server-0", settings)
        return runner.run(conduct(stage, plan, home.path))
