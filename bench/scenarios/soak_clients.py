"""The clients of all languages at once against one server with faults: no answer is wrong, no call is lost.

The clients for asyncio, blocking Python, Node, Rust, Go and C (through ctypes) each run in the program with which
the conformance kit drives them. Those that are not built are left out; clients/README.md describes the builds.
They make calls with and without an idempotency key, open streams and answer calls of the server. Every answer is
compared with what was asked.

Meanwhile, in turn: a proxy resets all connections, certificates are rotated, the clock of the server is set by more
than its tolerance, a worker is killed, the server is replaced by `zcproto upgrade`, and stopped and started.

A call is lost if it fails although its client could have sent it again (specification, section 11.1). It is
uncertain if it may have run and has no idempotency key, or if its answer was discarded because of the clock; a
stream also if it has begun, a call with a key if its worker was killed, and one whose server or session has ended:
then the application decides. Each request notes on the server that it has run: none may run twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import click

from bench import KIT
from bench.command import measurement, progress
from bench.proxy import Proxy
from bench.report import Report, Row, counted
from bench.scenarios.harness import on_interrupt, until
from bench.scenarios.rolling_restart import Restarts, RollingServer
from bench.scenarios.rotation import Rotator
from bench.scenarios.soak_app import FOLDER, OFFSET, open_offset
from bench.scenarios.worker_kills import is_running
from bench.stage import ECDSA_ONLY, HOST, NAME, Server, Stage, bench_environment, family
from zcproto.common.process import new_event_loop
from zcproto.errors import Code, ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential
from zcproto_conformance.errors import CheckFailed
from zcproto_conformance.program import Program, StepFailed
from zcproto_conformance.values import typed, untyped

ROOT: Final = Path(__file__).parents[2]
APP: Final = "bench.scenarios.soak_app:app"
WORKERS: Final = 2
TIMEOUT_MS: Final = 60_000
"""Of a call: longer than all that happens to the server together, with the delays of reconnecting."""

STEP_S: Final = 40
"""By which the clock is set forward, and later back: more than the tolerance."""

FAULTS: Final = ("cut", "rotation", "clock", "kill", "upgrade", "restart")
SERVER_S: Final = 60.0
"""Within which the server has to end."""

ITEMS: Final = 20
SIZES: Final = (0, 1, 16, 200, 2_000)
WATCH_S: Final = 0.5
"""Between two looks at the session of a client."""

NO_ANSWER_S: Final = 2 * TIMEOUT_MS / 1_000
"""Within which every call has to end, whatever happens."""

ENDED: Final = (Code.TOKEN_REVOKED, Code.SESSION_REPLACED)
"""Codes of a session that the server has ended, and that only the application may open again."""


@dataclass(frozen=True, slots=True)
class SoakClientsPlan:
    """One run."""

    minutes: float
    seed: int = 1
    clients: int = 2
    """Of each language, each with a connection."""
    callers: int = 4
    """Calls at once of each client."""
    pause_s: float = 0.1
    """Between two calls of a caller, on average."""

    @property
    def interval_s(self) -> float:
        """Between two faults. Connections that last for five seconds reset the delays of reconnecting."""
        return min(8.0, self.minutes * 60 / (len(FAULTS) + 1))


@dataclass(slots=True)
class Tally:
    """What the clients of one language have seen."""

    calls: int = 0
    compared: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    """By what was asked for and how it failed."""
    uncertain: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    """Requests that have run twice."""
    reconnects: int = 0
    """Attempts included."""
    refreshes: int = 0
    sessions: int = 0
    """Opened after the first: a refresh that is repeated too late ends its session."""


def programs() -> dict[str, list[str]]:
    """Return the programs of the clients that are built here, by language."""
    clients, python = ROOT / "clients", sys.executable
    library = clients / "rust" / "target" / "debug" / "libzcproto.so"
    known: dict[str, tuple[Path, list[str]]] = {
        "asyncio": (ROOT, [python, "-m", "zcproto_conformance.python_client"]),
        "blocking": (ROOT, [python, "-m", "zcproto_conformance.blocking_client"]),
        "Node": (clients / "typescript" / "dist" / "conform.js", ["node"]),
        "Rust": (clients / "rust" / "target" / "debug" / "zcproto-conform", []),
        "Go": (clients / "go" / "dist" / "conform", []),
        "C": (library, [python, str(clients / "rust" / "c" / "tests" / "conform.py")]),
    }
    found = {}
    for name, (needed, command) in known.items():
        if needed.exists():
            found[name] = command if needed == ROOT else [*command, str(needed)]
    return found


# --- the clients -------------------------------------------------------------------------------------------


class Party:
    """The clients of one language: their program, their proxy, and callers that judge every answer."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        stage: Stage,
        users: Sequence[Credential],
        plan: SoakClientsPlan,
    ) -> None:
        self.name = name
        self.tally = Tally()
        self._stage = stage
        self._users = users
        self._plan = plan
        self._program = Program(command)
        self._program.secrets = {user.key for user in users}
        self._chance = random.Random(f"{plan.seed} {name}")  # noqa: S311 - an order, no secret
        self._numbers = count(1)
        self._stopping = False
        self._opening: set[str] = set()
        """Clients that open another session."""

    async def run(self, port: int, started: asyncio.Event) -> None:
        """Connect to a server, set `started`, make calls until `stop`, and close."""
        async with Proxy(port) as self.proxy:
            clients = [f"client-{number}" for number in range(len(self._users))]
            for client, user in zip(clients, self._users, strict=True):
                await self._connect(client, user)
            started.set()
            async with asyncio.TaskGroup() as running:
                answering = [running.create_task(self._answer(client)) for client in clients]
                watching = [running.create_task(self._watch(client)) for client in clients]
                callers = [
                    running.create_task(self._make_calls(client))
                    for client in clients
                    for _ in range(self._plan.callers)
                ]
                await asyncio.wait(callers)
                for task in (*answering, *watching):
                    task.cancel()
            for client in clients:
                await self._step("close", client=client)
            self.tally.reconnects = self.proxy.accepted - len(clients)
            if await self._program.stop() != 0:
                raise CheckFailed(f"the program for {self.name} failed: {self._program.stderr}")
            if self._program.leaked:
                self.tally.wrong["a key in the output"] += 1

    def stop(self) -> None:
        self._stopping = True

    async def _step(self, step: str, **fields: Any) -> Any:
        async with asyncio.timeout(NO_ANSWER_S):
            return await (await self._program.begin(step, fields))

    async def _connect(self, client: str, user: Credential) -> None:
        home = self._stage.home.path / f"{self.name}-{client}"
        home.mkdir(0o700)
        await self._step(
            "connect",
            client=client,
            address=f"{HOST}:{self.proxy.port}",
            server_name=NAME,
            ca_file=str(self._stage.ca_file),
            user=user.user,
            key=user.key,
            home=str(home),
            timeout_ms=TIMEOUT_MS,
        )
        await self._step("handle", client=client, method="soak.answer")

    async def _answer(self, client: str) -> None:
        """Answer calls of the server: double the number."""
        while True:
            called = await (await self._program.begin("called", {"client": client}))
            number = untyped(called["params"])["number"]
            await self._step("answer", client=client, call=called["call"], value=2 * number)

    async def _watch(self, client: str) -> None:
        """Count refreshes and new sessions."""
        before = await self._step("session", client=client)
        while True:
            await asyncio.sleep(WATCH_S)
            now = await self._step("session", client=client)
            if now is not None and before is not None:
                self.tally.sessions += now["id"] != before["id"]
                self.tally.refreshes += (
                    now["id"] == before["id"] and now["expires_at"] != before["expires_at"]
                )
            before = now or before

    async def _make_calls(self, client: str) -> None:
        acts = (self._echo, self._run_with_key, self._run, self._stream, self._ask)
        while not self._stopping:
            [act] = self._chance.choices(acts, (5, 2, 1, 1, 1))
            self.tally.calls += 1
            await act(client)
            await asyncio.sleep(self._chance.expovariate(1 / self._plan.pause_s))

    # --- what they ask for ----------------------------------------------------------------------------

    async def _echo(self, client: str) -> None:
        chance = self._chance
        params = {
            "n": chance.getrandbits(chance.choice((3, 31, 53, 64))),
            "data": chance.randbytes(chance.choice(SIZES)),
            "text": "".join(chance.choices("aä€\U0001f600\0", k=chance.randrange(20))),
            "deep": [{"x": [None, True, -chance.getrandbits(60), chance.random()]}],
        }
        await self._call("echo", client, "echo", params, params)

    async def _run_with_key(self, client: str) -> None:
        number = next(self._numbers)
        params = {"name": f"{self.name} {number}", "number": number}
        await self._call("run with a key", client, "soak.run", params, number, f"{self.name}-{number}")

    async def _run(self, client: str) -> None:
        number = next(self._numbers)
        await self._call(
            "run", client, "soak.run", {"name": f"{self.name} {number}", "number": number}, number
        )

    async def _ask(self, client: str) -> None:
        number = next(self._numbers)
        await self._call("ask", client, "soak.ask", {"number": number}, 2 * number)

    async def _call(
        self, what: str, client: str, method: str, params: Any, expected: Any, key: str | None = None
    ) -> None:
        call = f"call-{next(self._numbers)}"
        fields = {"client": client, "call": call, "method": method, "params": typed(params)}
        if key is not None:
            fields["idempotency_key"] = key
        await self._step("call", **fields)
        try:
            answer = untyped(await self._step("expect", call=call))
        except StepFailed as failure:
            await self._judge(what, client, failure.error, has_key=key is not None)
        else:
            self._compare(what, answer, expected)

    async def _stream(self, client: str) -> None:
        stream, first, items = f"stream-{next(self._numbers)}", next(self._numbers), 0
        params = {"first": first, "items": ITEMS}
        try:
            await self._step("open", client=client, stream=stream, method="soak.count", params=typed(params))
            while "item" in (answer := await self._step("next", stream=stream)):
                if untyped(answer["item"]) != first + items:
                    self.tally.wrong["stream: a different item"] += 1
                items += 1
        except StepFailed as failure:
            await self._judge("stream", client, failure.error, has_begun=items > 0)
        else:
            self._compare("stream", (items, untyped(answer["end"])), (ITEMS, ITEMS))

    def _compare(self, what: str, answer: Any, expected: Any) -> None:
        self.tally.compared += 1
        if answer != expected:
            self.tally.wrong[f"{what}: a different answer"] += 1

    async def _judge(
        self,
        what: str,
        client: str,
        error: Mapping[str, Any],
        *,
        has_key: bool = False,
        has_begun: bool = False,
    ) -> None:
        """Count a call that has failed. Open a session if the server has ended that of the call."""
        if error.get("code") in ENDED and client not in self._opening:
            self._opening.add(client)
            with suppress(StepFailed):  # the next call tries again
                await self._step("open_session", client=client)
            self._opening.discard(client)
        cause = error["name"] if error["kind"] == "call" else error["kind"]
        counts = self.tally.uncertain if is_uncertain(what, error, has_key, has_begun) else self.tally.lost
        counts[f"{what}: {cause}"] += 1


def is_uncertain(what: str, error: Mapping[str, Any], has_key: bool, has_begun: bool) -> bool:
    """Return whether a call has perhaps run, and its client must not send it again."""
    if error["kind"] == "closed":
        return not has_key
    if error["kind"] != "call":
        return False
    if has_begun:
        return True
    return error["code"] in (
        *ENDED,  # for the application to decide
        Code.CANCELLED,  # the server stopped before the method returned
        Code.DATA_LOSS,
        *((Code.UNKNOWN,) if has_key else ()),  # its worker was killed
        *((Code.ABORTED,) if what == "ask" else ()),  # the call of the server has failed
    )


# --- the server --------------------------------------------------------------------------------------------


class SoakServer:
    """A server with workers that can be replaced, stopped and started again on its port."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._restarts = Restarts()
        self.port = 0

    async def start(self) -> None:
        self._server = Server(self._stage, "sqlite", APP, self.port)
        await asyncio.to_thread(self._server.__enter__)
        self.port = self._server.port
        self._rolling = RollingServer(self._stage, self._server)

    async def stop(self) -> None:
        """End the newest server in order."""
        os.kill(self._rolling.pid, signal.SIGTERM)

        async def has_ended() -> bool:
            return not is_running(self._rolling.pid)

        if not await until(has_ended, SERVER_S):
            raise ZcprotoError(f"the server did not end within {SERVER_S:.0f} s")
        await asyncio.to_thread(self._server.__exit__, None, None, None)  # waits for the first one

    async def replace(self) -> None:
        await self._rolling.replace(False, self._restarts)

    def kill_worker(self, chance: random.Random) -> None:
        _, *processes = family(self._rolling.pid)
        coordinator = int(self._stage.home.sessions.with_suffix(".db.lock").read_text())  # it owns the file
        os.kill(chance.choice([pid for pid in processes if pid != coordinator]), signal.SIGKILL)


class SoakFaults:
    """What is done to the server and to the connections, each by a method of its name."""

    def __init__(
        self, plan: SoakClientsPlan, stage: Stage, server: SoakServer, parties: Sequence[Party], folder: Path
    ) -> None:
        self._server = server
        self.parties = parties
        self._chance = random.Random(plan.seed)  # noqa: S311 - an order, no secret
        self._rotator = Rotator.of(stage.home, new_key_every=3)
        self._offset = open_offset(folder / "clock")
        self.done: Counter[str] = Counter()

    async def do(self, name: str) -> None:
        """Raises ZcprotoError if the server does not come through it."""
        await getattr(self, name)()
        self.done[name] += 1

    async def cut(self) -> None:
        for party in self.parties:
            party.proxy.cut()

    async def rotation(self) -> None:
        rotated = await self._rotator.rotate_beside(self.done["rotation"] + 1)
        if rotated.problem:
            raise ZcprotoError(rotated.problem)
        await self.cut()  # so that new connections see it

    async def clock(self) -> None:
        step_s = STEP_S if self.done["clock"] % 2 == 0 else 0
        OFFSET.pack_into(self._offset, 0, step_s * 1_000_000_000)

    async def kill(self) -> None:
        self._server.kill_worker(self._chance)

    async def upgrade(self) -> None:
        await self._server.replace()

    async def restart(self) -> None:
        await self._server.stop()
        await self._server.start()


# --- the run -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class SoakClientsOutcome:
    """What a run has seen."""

    tallies: dict[str, Tally]
    done: Mapping[str, int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    log_events: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    interrupted: bool = False

    def report(self) -> Report:
        columns = {
            name: [
                Row("calls", "calls", tally.calls),
                Row("compared", "answers compared", tally.compared, at_least=1),
                Row("wrong", "wrong answers", tally.wrong.total(), equals=0),
                Row("lost", "calls lost that could be sent again", tally.lost.total(), equals=0),
                Row("twice", "requests that ran twice", tally.twice, equals=0),
                Row("uncertain", "calls that have perhaps run", tally.uncertain.total()),
                Row("reconnects", "attempts to reconnect", tally.reconnects, at_least=1),
                Row("refreshes", "sessions refreshed", tally.refreshes),
                Row("sessions", "sessions opened again", tally.sessions),
            ]
            for name, tally in self.tallies.items()
        }
        names = {
            "cut": "times all connections were cut",
            "rotation": "certificates rotated",
            "clock": "times the clock was set",
            "kill": "workers killed",
            "upgrade": "upgrades",
            "restart": "restarts",
        }
        columns["server"] = [
            *(Row(name, label, self.done.get(name, 0), at_least=1) for name, label in names.items()),
            Row("seconds", "duration", self.seconds, "s"),
        ]
        notes = [
            line
            for name, tally in self.tallies.items()
            for words in ("wrong", "lost", "uncertain")
            for line in counted(f"{name}, {words}", getattr(tally, words))
        ]
        notes += counted("in the server's log", self.log_events)
        return Report(columns, self.faults, notes, interrupted=self.interrupted)


async def conduct(
    plan: SoakClientsPlan, stage: Stage, folder: Path, parties: Sequence[Party]
) -> SoakClientsOutcome:
    """Carry out a plan. The first Ctrl-C ends it early."""
    outcome = SoakClientsOutcome({party.name: party.tally for party in parties})
    stopping, server = asyncio.Event(), SoakServer(stage)

    def interrupt() -> None:
        outcome.interrupted = True
        stopping.set()

    await server.start()
    faults = SoakFaults(plan, stage, server, parties, folder)
    outcome.done = faults.done
    began = time.monotonic()
    try:
        with on_interrupt(interrupt):
            async with asyncio.TaskGroup() as running:
                started = [asyncio.Event() for _ in parties]
                for party, is_started in zip(parties, started, strict=True):
                    running.create_task(party.run(server.port, is_started))
                for each in started:
                    await each.wait()
                began = time.monotonic()
                await _hurt(plan, faults, stopping, began)
                for party in parties:
                    party.stop()
    except* (CheckFailed, StepFailed, ZcprotoError, TimeoutError) as group:
        outcome.faults += [str(error) or "a step of a client did not end" for error in group.exceptions]
    finally:
        await server.stop()
    outcome.seconds = time.monotonic() - began
    return outcome


async def _hurt(plan: SoakClientsPlan, faults: SoakFaults, stopping: asyncio.Event, began: float) -> None:
    """Do everything in turn, once at least, until the time is over."""
    while time.monotonic() < began + plan.minutes * 60 or not faults.done:
        for name in FAULTS:
            await _pause(stopping, plan.interval_s)
            if stopping.is_set():
                return
            await faults.do(name)
            calls = sum(party.tally.compared for party in faults.parties)
            progress(
                f"{(time.monotonic() - began) / 60:.1f} of {plan.minutes:g} min: {name}; {calls:,} answers compared"
            )
    await _pause(stopping, plan.interval_s)


async def _pause(stopping: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()


@contextmanager
def environment(folder: Path) -> Iterator[None]:
    """Let the server find its folder, and the programs of clients the modules of this clone."""
    path = os.pathsep.join([bench_environment()["PYTHONPATH"], str(KIT)])
    changed = {FOLDER: str(folder), "PYTHONPATH": path}
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ |= changed
    try:
        yield
    finally:
        for name in changed:
            del os.environ[name]
        os.environ |= before


def soak_clients(
    plan: SoakClientsPlan, stage: Stage, commands: Mapping[str, Sequence[str]]
) -> SoakClientsOutcome:
    """Carry out a plan on a stage with the programs of clients."""
    folder = stage.home.path / "soak"
    folder.mkdir(0o700)
    (folder / "clock").write_bytes(bytes(OFFSET.size))
    (folder / "runs").touch()
    with environment(folder):
        users = stage.add_users("client", plan.clients * len(commands))
        parties = [
            Party(name, command, stage, users[number * plan.clients :][: plan.clients], plan)
            for number, (name, command) in enumerate(commands.items())
        ]
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            outcome = runner.run(conduct(plan, stage, folder, parties))
    for name, times in Counter((folder / "runs").read_text().splitlines()).items():
        outcome.tallies[name.partition(" ")[0]].twice += times > 1
    outcome.log_events = stage.log_events()
    return outcome


SETTINGS: Final = {
    "server.workers": WORKERS,
    "sessions.lifetime": "8s",
    "sessions.refresh_lifetime": "10m",
    "sessions.idle_timeout": "off",
    "sessions.per_user": 1_000,
    "limits.connections_per_address": 0,
    "certificates.watch_interval": "500ms",
    **ECDSA_ONLY,
}
"""Sessions live for a short time, so that they are refreshed."""


@measurement
@click.option(
    "--minutes",
    type=click.FloatRange(0.1, 10_080),
    default=5.0,
    show_default=True,
    help="How long, at least.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of all calls.")
def command(minutes: float, seed: int) -> Report:
    with temporary_home() as home:
        return soak_clients(SoakClientsPlan(minutes, seed), Stage(home.path, SETTINGS), programs()).report()
