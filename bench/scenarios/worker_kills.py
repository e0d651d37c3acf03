"""Kill workers, the coordinator and the supervisor of a server at random, while sessions come and go.

Eight clients open, refresh, close and revoke sessions at a server of four workers, which keeps them in a file. At a
random moment one process is killed (SIGKILL). A worker and the coordinator are started again by the supervisor. Its
own death ends all others, and the server is started again, as a service manager would. Then every live session must
be accepted and its newest refresh token must give a new pair, at whatever worker; every replaced token and every
session that was closed or revoked must be refused.

The service is back with the first login of a new connection. After the death of the supervisor that takes the start
of a server, which stands apart.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import click

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row
from bench.scenarios.kills import CLIENTS, DAMAGE, LONGEST_S, Kills, Seen
from bench.scenarios.sessions import open_session
from bench.stage import ECDSA_ONLY, Server, Stage, family, room_for
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.demo.run import temporary_home
from zcproto.load.plan import Credential

WORKERS: Final = 4
VICTIMS: Final = ("worker",) * 5 + ("coordinator",) * 4 + ("supervisor",)
MAX_BACK_S: Final = 1.0
GONE_S: Final = 10.0
"""Seconds within which the other processes end after their supervisor, and a server has to be back."""


class WorkerKills(Kills):
    """Servers of several workers on one stage, and their clients."""

    def __init__(self, stage: Stage, users: Iterable[Credential], seed: int, seen: Seen) -> None:
        super().__init__(stage, users, seed, seen)
        [self._prober] = stage.add_users("prober", 1)
        self._moments = random.Random(seed)  # noqa: S311 - moments and choices, no secret
        self.back_s: dict[str, list[float]] = defaultdict(list)
        self.left = 0
        """Processes that were left after their supervisor."""

    async def one_server(self, *, last: bool = False, kills: int = 0) -> None:
        """Start a server and kill its processes, until that was the supervisor or there were so many kills."""
        begin = time.monotonic()
        with self.stage.serve("sqlite", cpu=None) as server:
            self._seen.starts_s.append(time.monotonic() - begin)
            while True:
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

    async def _callers(self, server: Server) -> list[Caller]:
        self._target = server.target()
        return [await self._target.caller() for _ in self._clients]

    async def _disconnect(self, callers: Sequence[Caller]) -> None:
        for caller in callers:
            await caller.disconnect()
        self._target.close()

    async def _churn_and_kill(self, callers: Sequence[Caller], server: Server, victim: str) -> None:
        """Kill a process while the clients work, and let them work until the service is back."""
        processes = family(server.pid)
        pid = {
            "supervisor": server.pid,
            "coordinator": processes[1],
            "worker": self._moments.choice(processes[2:]),
        }[victim]
        async with asyncio.TaskGroup() as group:
            for client, caller in zip(self._clients, callers, strict=True):
                group.create_task(client.churn(caller))
            await asyncio.sleep(self._moments.choice(LONGEST_S) * self._moments.random())
            if victim == "supervisor":
                server.kill()
                await self._ended(processes)
            else:
                os.kill(pid, signal.SIGKILL)
                await self._probe(server, victim, time.monotonic())
            for caller in callers:
                if caller.transport is not None:
                    caller.transport.abort()
        self._seen.kills += 1

    async def _ended(self, processes: Sequence[int]) -> None:
        """Wait until no process is left, and count those that are."""
        end = time.monotonic() + GONE_S
        while any(map(is_running, processes)) and time.monotonic() < end:  # noqa: ASYNC110 - another process ends
            await asyncio.sleep(0.01)
        self.left += sum(map(is_running, processes))

    async def _probe(self, server: Server, victim: str, died: float) -> None:
        """Measure the time until a new connection gets a session."""
        with target_of(server) as target:
            while True:
                try:
                    caller = await target.caller()
                    try:
                        session = await open_session(caller, self._prober)
                        self.back_s[victim].append(time.monotonic() - died)
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


def report(run: WorkerKills, seen: Seen, kills: int) -> Report:
    made = seen.report(kills)
    rows = made.columns["figure"]
    for victim, times in sorted(run.back_s.items()):
        ordered = sorted(times)
        rows += [
            Row(f"{victim}_kills", f"kills of a {victim}", len(times)),
            Row(f"{victim}_back_p50_s", "back after, p50", ordered[len(ordered) // 2], "s"),
            Row(f"{victim}_back_s", "back after, longest", ordered[-1], "s", below=MAX_BACK_S),
        ]
    rows.append(Row("left", "processes left after their supervisor", run.left, equals=0))
    return made


@measurement
@click.option("--kills", type=COUNT, default=200, show_default=True, help="How many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the calls.")
def command(kills: int, seed: int) -> Report:
    seen = Seen()
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        settings = {"server.workers": WORKERS, "sessions.per_user": 100_000, **room_for(100), **ECDSA_ONLY}
        stage = Stage(home.path, settings)
        stage.make_certificates()
        run = WorkerKills(stage, stage.add_users("client", CLIENTS), seed, seen)
        runner.run(kill_often(run, kills, seen))
        log = stage.log_file.read_text(encoding="utf-8", errors="replace")
    seen.damage = sum(log.count(f'"{event}"') for event in DAMAGE)
    return report(run, seen, kills)
