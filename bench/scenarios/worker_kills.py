"""Kill workers, the coordinator and the supervisor of a server at random, while sessions come and go.

Eight clients open, refresh, close and revoke sessions at a server of four workers, which keeps them in a file. At a
random moment one process is killed (SIGKILL). A worker and the coordinator are started again by the supervisor. Its
own death ends all others, and the server is started again at once on the same port, as a service manager does.
Then every live session must be accepted and its newest refresh token must give a new pair, at whatever worker;
every replaced token and every session that was closed or revoked must be refused. A refresh that was not answered
is repeated and must give a pair. All that is asked once every worker has the store again: until then known sessions
continue, and revocations wait.

The service is back with the first login of a new connection, measured from the kill. After the death of the
supervisor that includes the start of Python, and of the server while the old processes end: it is compared with the
starts of the same run. The slowest returns are listed with what the server has logged meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Final

import click

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row
from bench.scenarios.kills import CLIENTS, DAMAGE, GRACE, LONGEST_S, Kills, Seen
from bench.scenarios.sessions import open_session, with_retries
from bench.server_process import free_port
from bench.stage import ECDSA_ONLY, Server, Stage, compiled, family, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential

WORKERS: Final = 4
VICTIMS: Final = ("worker",) * 5 + ("coordinator",) * 4 + ("supervisor",)
MAX_BACK_S: Final = 1.0
MAX_OVER_START: Final = 1.25
"""How long the service may be away after the death of the supervisor, over one start on this machine."""

MAX_GONE_S: Final = 1.0
GONE_S: Final = 10.0
"""Seconds after which processes that are left, and a server that is not back, are given up."""

SETTLING: Final = 16
"""Connections that have to get a session before the check: as good as every worker has one of them."""

PROGRESS_KILLS: Final = 10
SLOWEST: Final = 3
"""Returns of each kind that are explained."""

TELLING: Final = ("worker.", "workers.", "store.", "server.", "sessions.", "revocations.")
"""The log events that explain a return, by their parts of the program."""

MAX_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Return:
    """One return of the service. `wall` is when the process died, in Unix seconds, `back_s` how long it took."""

    victim: str
    kill: int
    wall: float
    back_s: float
    tries: int


class WorkerKills(Kills):
    """Servers of several workers on one stage, and their clients."""

    def __init__(self, stage: Stage, users: Iterable[Credential], seed: int, seen: Seen) -> None:
        super().__init__(stage, users, seed, seen)
        [self._prober] = stage.add_users("prober", 1)
        self._moments = random.Random(seed)  # noqa: S311 - moments and choices, no secret
        self._port = free_port()
        self._died: float | None = None
        """When the supervisor before was killed."""
        self._gone: asyncio.Future[float | None] | None = None
        self.returns: list[Return] = []
        self.gone_s: list[float] = []
        """How long the other processes took to end after their supervisor."""
        self.left = 0
        """Processes that were left after their supervisor."""

    async def one_server(self, *, last: bool = False, kills: int = 0) -> None:
        """Start a server and kill its processes, until that was the supervisor or there were so many kills."""
        begin = time.monotonic()
        with self.stage.serve("sqlite", cpu=None, port=self._port) as server:
            self._seen.starts_s.append(time.monotonic() - begin)
            if self._died is not None:
                await self._probe(server, "supervisor", self._died)
                self._died = None
                await self._await_gone()
            while True:
                await self._settle(server)
                callers = await self._callers(server)
                try:
                    await self._check(callers)
                    if last or self._seen.kills >= kills:
                        return
                    victim = self._moments.choice(VICTIMS)
                    await self._churn_and_kill(callers, server, victim)
                finally:
                    await self._disconnect(callers)
                if victim == "supervisor":
                    return

    async def _settle(self, server: Server) -> None:
        """Wait until the workers have the store."""
        with target_of(server) as target:
            for _ in range(SETTLING):
                caller = await target.caller()
                try:
                    session = await with_retries(partial(open_session, caller, self._prober))
                    await with_retries(partial(caller.call, "session.close", {}, session.token))
                finally:
                    await caller.disconnect()

    async def _callers(self, server: Server) -> list[Caller]:
        self._target = server.target()
        return [await self._target.caller() for _ in self._clients]

    async def _disconnect(self, callers: Sequence[Caller]) -> None:
        for caller in callers:
            await caller.disconnect()
        self._target.close()

    async def _churn_and_kill(self, callers: Sequence[Caller], server: Server, victim: str) -> None:
        """Kill a process while the clients work, and let them work until the service is back."""
        _, *processes = family(server.pid)
        coordinator = int(self.stage.home.sessions.with_suffix(".db.lock").read_text())  # it owns the file
        workers = [pid for pid in processes if pid != coordinator]
        pid = coordinator if victim == "coordinator" else self._moments.choice(workers)
        async with asyncio.TaskGroup() as group:
            for client, caller in zip(self._clients, callers, strict=True):
                group.create_task(client.churn(caller))
            await asyncio.sleep(self._moments.choice(LONGEST_S) * self._moments.random())
            died = time.monotonic()
            self._seen.kills += 1
            if victim == "supervisor":
                server.kill()
                self._died = died
                # In a thread: the start of the next server blocks this one.
                self._gone = asyncio.get_running_loop().run_in_executor(None, ended, processes, died)
            else:
                os.kill(pid, signal.SIGKILL)
                await self._probe(server, victim, died)
            for caller in callers:
                if caller.transport is not None:
                    caller.transport.abort()
        if self._seen.kills % PROGRESS_KILLS == 0:
            slowest = max((each.back_s for each in self.returns), default=0.0)
            progress(f"{self._seen.kills:,} kills: back after {slowest:.2f} s at most")

    async def _await_gone(self) -> None:
        assert self._gone is not None
        gone_s = await self._gone
        if gone_s is None:
            self.left += 1
        else:
            self.gone_s.append(gone_s)

    async def _probe(self, server: Server, victim: str, died: float) -> None:
        """Measure the time until a new connection gets a session."""
        wall = time.time() - (time.monotonic() - died)
        tries = 0
        with target_of(server) as target:
            while True:
                tries += 1
                try:
                    caller = await target.caller()
                    try:
                        session = await open_session(caller, self._prober)
                        back_s = time.monotonic() - died
                        self.returns.append(Return(victim, self._seen.kills, wall, back_s, tries))
                        await caller.call("session.close", {}, session.token)
                        return
                    finally:
                        await caller.disconnect()
                except ZcprotoError:
                    if time.monotonic() > died + GONE_S:
                        raise
                    await asyncio.sleep(0.01)


@contextmanager
def target_of(server: Server) -> Iterator[LoadTarget]:
    target = server.target()
    try:
        yield target
    finally:
        target.close()


def ended(processes: Sequence[int], since: float) -> float | None:
    """Wait until no process is left; return how long that took. None if some are left after GONE_S."""
    while any(map(is_running, processes)):
        if time.monotonic() > since + GONE_S:
            return None
        time.sleep(0.005)
    return time.monotonic() - since


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def kill_often(run: WorkerKills, kills: int, seen: Seen) -> None:
    """Carry out all kills, and one last check."""
    while seen.kills < kills:
        try:
            await run.one_server(kills=kills)
        except ZcprotoError as error:
            raise ZcprotoError(f"after {seen.kills:,} kills: {error}") from error
    progress(f"{seen.kills:,} of {kills:,} kills: {seen.acknowledged.total():,} acknowledged")
    await run.one_server(last=True)


def report(run: WorkerKills, seen: Seen, kills: int, log: str = "") -> Report:
    made = seen.report(kills)
    rows = made.columns["figure"]
    by_victim = returns_by_victim(run.returns)
    for victim, returns in by_victim.items():
        times = [each.back_s for each in returns]
        bar = None if victim == "supervisor" else MAX_BACK_S
        rows += [
            Row(f"{victim}_kills", f"kills of a {victim}", len(times)),
            Row(f"{victim}_back_p50_s", "back after, p50", times[len(times) // 2], "s"),
            Row(f"{victim}_back_s", "back after, longest", times[0], "s", below=bar),
        ]
        if victim == "supervisor":
            over = times[0] / max(seen.starts_s)
            rows.append(Row("over_start", "over the longest start", over, "times", below=MAX_OVER_START))
    if run.gone_s:
        longest_s = max(run.gone_s)
        rows.append(Row("gone_s", "end after their supervisor, longest", longest_s, "s", below=MAX_GONE_S))
    rows.append(Row("left", "processes left after their supervisor", run.left, equals=0))
    logged = telling(log.splitlines())
    made.notes += [explained(each, logged) for returns in by_victim.values() for each in returns[:SLOWEST]]
    made.details = {"returns": [asdict(each) for each in run.returns]}
    return made


def returns_by_victim(returns: Sequence[Return]) -> dict[str, list[Return]]:
    """Return the returns of each kind, the slowest first."""
    found: dict[str, list[Return]] = {}
    for each in sorted(returns, key=lambda each: (each.victim, -each.back_s)):
        found.setdefault(each.victim, []).append(each)
    return found


def telling(lines: Iterable[str]) -> list[tuple[float, str]]:
    """Return the log events that explain a return, with their times in Unix seconds."""
    found = []
    for line in lines:
        with suppress(ValueError):  # cut off by a kill
            event = json.loads(line)
            if event["event"].startswith(TELLING):
                about = " ".join(str(event[name]) for name in ("worker", "reason") if name in event)
                moment = datetime.fromisoformat(event["timestamp"]).timestamp()
                found.append((moment, f"{event['event']} {about}".rstrip()))
    return found


def explained(returned: Return, events: Iterable[tuple[float, str]]) -> str:
    """Return a line with what the server has logged until it was back."""
    until = returned.wall + returned.back_s
    meanwhile = [
        f"{moment - returned.wall:.2f} {text}" for moment, text in events if returned.wall <= moment <= until
    ]
    head = f"{returned.victim}, kill {returned.kill}: {returned.back_s:.2f} s, {returned.tries} tries"
    return f"{head}: {', '.join(meanwhile[:MAX_SHOWN]) or 'nothing was logged'}"


@measurement
@click.option("--kills", type=COUNT, default=200, show_default=True, help="How many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the calls.")
def command(kills: int, seed: int) -> Report:
    seen = Seen()
    with temporary_home() as home, compiled(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        settings = {
            "server.workers": WORKERS,
            "sessions.per_user": 100_000,
            **GRACE,
            **room_for(100),
            **ECDSA_ONLY,
        }
        stage = Stage(home.path, settings)
        stage.make_certificates()
        run = WorkerKills(stage, stage.add_users("client", CLIENTS), seed, seen)
        runner.run(kill_often(run, kills, seen))
        log = stage.log_file.read_text(encoding="utf-8", errors="replace")
    seen.damage = sum(log.count(f'"{event}"') for event in DAMAGE)
    return report(run, seen, kills, log)
