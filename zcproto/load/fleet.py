"""A fleet that is hurt: workers, or servers that share a Valkey, whose processes are killed and replaced at random
while clients read durable runs and answer questions.

    Fleet (WorkerFleet, ServerFleet) <- hurt: kills and upgrades at random moments
    fleet_clients.py, processes of their own -> outcomes -> judge: what must not have happened

Decides: whether an outcome is right.

Rules:
- A run gives each item once and in order, and then its result.
- It may end with UNKNOWN `owner_lost` after its stored items, if the process that ran it was killed.
- It may be unknown (NOT_FOUND) if that process and the coordinator, whose memory has the items, were both killed.
- No method runs twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from zcproto.auth import UserFile
from zcproto.common.home import Home
from zcproto.errors import ZcprotoError
from zcproto.load.demo import DemoServer
from zcproto.load.fleet_app import STARTED_VARIABLE
from zcproto.load.fleet_clients import ClientsPlan, Outcome
from zcproto.load.processes import module_command, module_environment, uninterrupted

APP: Final = "zcproto.load.fleet_app:app"
HOST: Final = "127.0.0.1"
WORKERS: Final = 4
SERVERS: Final = 3
STORES: Final = ("valkey-server", "redis-server")
SETTLE_S: Final = 60.0
UPGRADE_S: Final = 300.0
"""An upgrade drains one worker after the other, each for as long as `server.drain_timeout`."""
POLL_S: Final = 0.05
LINE_BYTES: Final = 1 << 26
"""The last line of the clients has all outcomes."""

WORKER_VICTIMS: Final = ("worker",) * 5 + ("coordinator",) * 3 + ("upgrade",) * 2
SERVER_VICTIMS: Final = ("server",) * 3 + ("upgrade",)
WRITE_BACK_S: Final = 15.0
"""A worker that is killed so soon after a coordinator may not have written back its runs."""


@dataclass(slots=True)
class Fault:
    """Something that was done to a process."""

    at: float
    victim: str
    pid: int


class Fleet(ABC):
    """Processes that serve one application with one state: an async context manager."""

    victims: Sequence[str]

    def __init__(self, home: Home) -> None:
        self._home = home
        self.killed: list[Fault] = []

    @abstractmethod
    async def __aenter__(self) -> Self: ...

    @abstractmethod
    async def __aexit__(self, *error: object) -> None: ...

    @property
    @abstractmethod
    def addresses(self) -> list[str]: ...

    @abstractmethod
    async def hurt(self, victim: str, chance: random.Random) -> None:
        """Kill or replace a process; return when it was done."""


class WorkerFleet(Fleet):
    """A server of four workers and a coordinator in whose memory all state is."""

    victims = WORKER_VICTIMS

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self._server = DemoServer(home.path, "memory", APP)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._server.__enter__)
        return self

    async def __aexit__(self, *error: object) -> None:
        supervisor = self._supervisor()
        with suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
        await _until(lambda: not _runs(supervisor), SETTLE_S)
        await asyncio.to_thread(self._server.__exit__, None, None, None)

    @property
    def addresses(self) -> list[str]:
        return [f"{HOST}:{self._server.port}"]

    def _processes(self) -> dict[str, int]:
        """Return the newest process of each name."""
        found = {}
        with (self._home.path / "server.log").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"worker.ready"' in line:
                    with suppress(ValueError):
                        event = json.loads(line)
                        found[event["worker"]] = event["pid"]
        return found

    def _supervisor(self) -> int:
        """Return the process whose children serve."""
        coordinator = self._processes().get("coordinator")
        with suppress(OSError, ValueError):
            return int(Path(f"/proc/{coordinator}/stat").read_text().rpartition(")")[2].split()[1])
        return self._server.pid

    async def hurt(self, victim: str, chance: random.Random) -> None:
        processes = self._processes()
        coordinator = processes.pop("coordinator")
        if victim == "upgrade":
            old = self._supervisor()
            self.killed.append(Fault(time.monotonic(), victim, old))
            os.kill(old, signal.SIGUSR2)
            await _until(lambda: not _runs(old), UPGRADE_S)
            return
        pid = coordinator if victim == "coordinator" else chance.choice([*processes.values()])
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed.append(Fault(time.monotonic(), victim, pid))
        await _until(lambda: pid not in self._processes().values(), SETTLE_S)


class ServerFleet(Fleet):
    """Three servers whose state is in a Valkey or Redis."""

    victims = SERVER_VICTIMS

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self._servers: list[DemoServer] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with self._stack:
            store = self._stack.enter_context(_store(self._home.path.with_name("store")))
            for number in range(SERVERS):
                path = self._home.path if not number else self._home.path.with_name(f"home-{number}")
                if number:
                    await asyncio.to_thread(_copy_home, self._home.path, path)
                server = DemoServer(path, store, APP, _free_port())
                await asyncio.to_thread(server.__enter__)
                self._servers.append(server)
                self._stack.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    @property
    def addresses(self) -> list[str]:
        return [f"{HOST}:{server.port}" for server in self._servers]

    async def hurt(self, victim: str, chance: random.Random) -> None:
        server = chance.choice(self._servers)
        self.killed.append(Fault(time.monotonic(), victim, server.pid))
        if victim == "server":
            server.kill()
        await asyncio.to_thread(server.__exit__, None, None, None)  # SIGTERM, if it runs
        await asyncio.to_thread(server.__enter__)


def _copy_home(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.sock", "*.log", "*.err", "sessions.db*"))
    config = target / "config.toml"
    config.write_text(config.read_text().replace(str(source), str(target)))


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def store_program() -> str | None:
    """Return the program that can keep what servers share; None if none is installed."""
    return next(filter(shutil.which, STORES), None) if find_spec("redis") else None


@contextmanager
def _store(folder: Path) -> Iterator[str]:
    """Run a Valkey or Redis in a folder; yield its URL."""
    program = store_program()
    if program is None:
        raise ZcprotoError(f"none of {', '.join(STORES)} is installed, or the package redis is missing")
    folder.mkdir(mode=0o700)
    path = folder / "socket"
    with uninterrupted(), (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", ""],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + SETTLE_S
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise ZcprotoError(f"{program} does not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(POLL_S)
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


def prepare_home(path: Path, users: int, settings: Mapping[str, Any]) -> tuple[Home, list[tuple[str, str]]]:
    """Create a home with users, and the file of the traces. Return it, and the users with their keys."""
    path.mkdir(mode=0o700, parents=True)
    home = Home(path)
    found = [*UserFile(home.users).add_many([f"reader-{number}" for number in range(users)])]
    lines = [
        f"[log]\nfile = {json.dumps(str(path / 'server.log'))}\nformat = \"json\"",
        *(f"[{section}]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
          for section, values in settings.items()),
    ]  # fmt: skip
    home.config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    home.config.chmod(0o600)
    started = path.with_name("started")
    started.touch()
    os.environ[STARTED_VARIABLE] = str(started)
    return home, [(user, key.reveal() if hasattr(key, "reveal") else key) for user, key in found]


# --- clients ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What the clients have seen, and what was done to the fleet."""

    began: float
    ended: float = 0.0
    ticks: list[dict[str, Any]] = field(default_factory=list)
    """What one process of clients has received so far, by the moment."""
    outcomes: list[Outcome] = field(default_factory=list)
    offers: int = 0
    faults: list[Fault] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    """The runs whose methods were started, and where."""

    @property
    def gaps(self) -> list[float]:
        """The longest gap between two items of each run, in seconds."""
        return [each.gap for each in self.outcomes]


async def conduct(
    fleet: Fleet,
    plans: Sequence[ClientsPlan],
    interval: float,
    seed: int,
    on_tick: Callable[[Seen], None] = lambda seen: None,
    seconds: float = 1e9,
) -> Seen:
    """Let the clients read to the end; hurt the fleet about every `interval` seconds for at most `seconds`."""
    seen, chance = Seen(time.monotonic()), random.Random(seed)  # noqa: S311 - moments and choices, no secret
    connected: set[str] = set()
    all_connected = asyncio.Event()

    def ticked(seen: Seen) -> None:
        tick = seen.ticks[-1]
        if not tick["waiting"] and not all_connected.is_set():
            connected.add(tick["plan"])
            if len(connected) == len(plans):
                seen.began = tick["began"]
                all_connected.set()
        on_tick(seen)

    async def hurt() -> None:
        await all_connected.wait()
        while True:
            await asyncio.sleep(interval * (0.5 + chance.random()))
            if time.monotonic() > seen.began + seconds:
                return
            await fleet.hurt(chance.choice(fleet.victims), chance)

    seen.faults = fleet.killed
    hurting = asyncio.create_task(hurt())
    try:
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(_clients(plan, seen, ticked)) for plan in plans]
            await asyncio.wait([*reading, hurting], return_when=asyncio.FIRST_COMPLETED)
            if hurting.done():
                hurting.result()
            await asyncio.gather(*reading)
    finally:
        hurting.cancel()
        await asyncio.wait([hurting])
    seen.ended = time.monotonic()
    seen.started = _started()
    return seen


def _started() -> list[tuple[str, int]]:
    lines = Path(os.environ[STARTED_VARIABLE]).read_text().splitlines()
    return [(run, int(pid)) for run, _, pid in (line.partition(" ") for line in lines)]


async def _clients(plan: ClientsPlan, seen: Seen, on_tick: Callable[[Seen], None]) -> None:
    """Run one process of clients."""
    process = await asyncio.create_subprocess_exec(
        *module_command("zcproto.load.fleet_clients"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=module_environment(),
        limit=LINE_BYTES,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        last = None
        async for line in process.stdout:
            last = json.loads(line)
            if "outcomes" not in last:
                seen.ticks.append({"plan": plan.prefix, **last})
                on_tick(seen)
        if last is None or "outcomes" not in last:
            raise ZcprotoError("the process of the clients has failed; its error is above")
        seen.outcomes += [Outcome(**each) for each in last["outcomes"]]
        seen.offers += last["offers"]
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# --- judgement ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Judgement:
    """What became of the runs. All but `complete`, `owner_lost` and `both_lost` must not happen."""

    complete: int = 0
    owner_lost: int = 0
    """Ended with the error that says so: the process that ran the method was killed."""
    both_lost: int = 0
    """Unknown: that process was killed, and the coordinator too before the reader had the end."""
    wrong: list[str] = field(default_factory=list)
    """Items that were missing, repeated, out of order or different."""
    unexplained: list[str] = field(default_factory=list)
    """Other ends, and those of which the rules hold not."""
    twice: list[str] = field(default_factory=list)


def judge(seen: Seen, items: int) -> Judgement:
    """Hold what the clients have seen against the rules."""
    made = Judgement()
    starts = Counter(run for run, _ in seen.started)
    made.twice = [each.run for each in seen.outcomes if starts[each.run] > 1]
    owners = dict(seen.started)
    killed = {fault.pid: fault.at for fault in seen.faults if fault.victim in ("worker", "server")}
    coordinators = [fault.at for fault in seen.faults if fault.victim in ("coordinator", "upgrade")]
    for each in seen.outcomes:
        made.wrong += [f"{each.run}: {fault}" for fault in each.faults[:1]]
        lost_at = killed.get(owners.get(each.run, 0))
        if each.run not in owners:  # killed between the opening and the start of the method
            lost_at = next((at for at in killed.values() if each.began <= at <= each.ended), None)
        owner = owners.get(each.run, "no process")
        moment = each.ended - seen.began
        end = f"{each.run} of {owner}: {each.end} {each.reason} after {each.items} items at {moment:.1f} s"
        if each.end == "result":
            made.complete += 1
            if each.items != items:
                made.wrong.append(end)
        elif (each.end, each.reason) == ("UNKNOWN", "owner_lost") and lost_at is not None:
            made.owner_lost += 1
            if each.end_items != each.items:
                made.wrong.append(f"{end} of {each.end_items}")
        elif (
            each.end == "NOT_FOUND"
            and lost_at is not None
            and any(lost_at - WRITE_BACK_S < at < each.ended for at in coordinators)
        ):
            made.both_lost += 1
        else:
            made.unexplained.append(end)
    return made


def _runs(pid: int) -> bool:
    """Return whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def _until(condition: Callable[[], bool], within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise ZcprotoError(f"the processes were not replaced within {within_s:.0f} s")
        await asyncio.sleep(POLL_S)


def fleet_of(kind: str, home: Home) -> Fleet:
    """Return a fleet of `workers` or `servers`."""
    return WorkerFleet(home) if kind == "workers" else ServerFleet(home)


def settings_for(kind: str, connections: int) -> dict[str, dict[str, Any]]:
    """Return the settings of a fleet of this kind with so many clients on this machine."""
    return {
        "server": {"workers": WORKERS if kind == "workers" else 1},
        "limits": {"max_connections": 2 * connections + 64, "connections_per_address": 0},
        "certificates": {"key_types": ["ecdsa-p256"]},
        "tls": {"max_pending": 2 * connections + 64},
        "sessions": {"per_user": 1_000},  # the session of a replaced client stays
    }


def percentile(values: Iterable[float], share: float) -> float | None:
    found = sorted(values)
    return found[min(int(len(found) * share), len(found) - 1)] if found else None


def is_supported() -> bool:
    """Return whether the processes of a server can be found and killed on this system."""
    return sys.platform == "linux"
