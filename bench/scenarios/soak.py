"""A server under everything at once for a long time: no answer is wrong, and nothing grows.

24 clients connect, open, use, refresh, close and revoke sessions, leave and come back; some send garbage. 12
others stay all the time. In each cycle of at most half a minute a certificate is rotated and the configuration
reloaded (new connections must see both), and in every other one the disk is full for a moment: a limit on the
size of files (RLIMIT_FSIZE) makes every write of the store and the log fail.

Every answer is judged by the answers before it. No connection may be lost.

After each cycle the 24 leave, and a sample is taken: resident memory, descriptors, tasks, threads. The first
third is warm-up; growth is the median of the last third of the rest less that of its first third. Ended
sessions are remembered for ten minutes: where part of that time is after the warm-up, the bound on memory is
higher by its share.

The order of all acts follows from the seed.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import click

from bench.command import measurement, progress
from bench.report import Report, Row, counted
from bench.scenarios.churning_clients import Client, Seen
from bench.scenarios.harness import on_interrupt, until
from bench.scenarios.rotation import Rotator, leaf_of
from bench.scenarios.sessions import open_session, with_retries
from bench.stage import ECDSA_ONLY, Server, Stage, memory_bytes
from zcproto.errors import Code, ConfigError, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential
from zcproto.load.processes import on_processor
from zcproto.tls.transport import TlsTransport

MIB: Final = 1 << 20
WARM_UP: Final = 1 / 3
"""Of all samples, the first of which are not judged: caches and tables fill."""

MEMORY_GROWTH_MIB: Final = 4.0
"""The bound on growth once all is full. Resident memory moves by one or two with the allocator's arenas."""

TOMBSTONE_MINUTES: Final = 10.0
"""For which ended sessions are remembered: until then that memory fills."""

TOMBSTONE_MIB: Final = 10.0
"""What they take at most: 2.6 MB of the process's tables, and 8 MB of the cache of the store's file."""

COUNT_GROWTH: Final = 2.0
"""The bound for descriptors, tasks and threads: a timer of the store may or may not be running."""

INTERNAL: Final = str(int(Code.INTERNAL))

REST_S: Final = 0.3
"""Between the end of the last connection and a sample, for work that the server does after it."""

GONE_S: Final = 20.0
"""Within which the server has to see that connections are closed."""

SEEN_S: Final = 15.0
"""Within which new connections have to see a change."""

RECOVER_S: Final = 30.0
"""Within which the store has to be healthy again when the disk has room."""

OUTAGE_CHANCE: Final = 0.5
"""That the disk is full in a cycle; a certificate is rotated and the configuration reloaded in each."""

MAX_STREAMS: Final = (100, 128)
"""Between which `limits.max_streams` is changed: more than clients have in flight."""


@dataclass(frozen=True, slots=True)
class SoakPlan:
    """One run. Sessions live for a short time, so that they expire, and ended ones are forgotten."""

    minutes: float
    seed: int = 1
    churning: int = 24
    steady: int = 12
    pause_s: float = 0.05
    """Between two acts of a churning client, on average; of a steady one twice as long."""
    lifetime_s: float = 60.0
    refresh_lifetime_s: float = 180.0
    outage_s: float = 1.5
    """How long the disk is full, at most."""
    cycle_s: float | None = None
    """From one rest to the next. None: a tenth of all, but at most half a minute."""

    @property
    def seconds(self) -> float:
        return self.minutes * 60

    @property
    def cycle(self) -> float:
        return min(max(self.seconds / 10, 1.0), 30.0) if self.cycle_s is None else self.cycle_s

    def check(self) -> None:
        """Raise ConfigError for a run that would prove nothing."""
        if self.seconds < 6 * self.cycle:
            raise ConfigError(
                [f"--minutes {self.minutes:g}: must be at least 0.1: growth is judged over several cycles"]
            )
        if sys.platform != "linux":
            raise ConfigError(["a soak needs Linux: it reads /proc and sets limits of another process"])

    def settings(self, max_streams: int) -> dict[str, Any]:
        return {
            "sessions.lifetime": f"{self.lifetime_s:g}s",
            "sessions.refresh_lifetime": f"{self.refresh_lifetime_s:g}s",
            "sessions.idle_timeout": "off",
            "sessions.open_timeout": "5m",
            "sessions.per_user": 100_000,  # a session whose answer was lost is forgotten, and never ended
            "limits.connections_per_address": 0,
            "limits.max_streams": max_streams,
            "certificates.watch_interval": "500ms",
            **ECDSA_ONLY,
        }


# --- samples -----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A server's process at rest. `at_s` is since the start."""

    at_s: float
    memory_mib: float
    descriptors: int
    tasks: int
    """Of asyncio, in the server's loop."""
    threads: int
    connections: int
    sessions: int
    answers: int
    """Judged by then."""


def take_sample(pid: int, stats: Mapping[str, Any], at_s: float, answers: int) -> Sample:
    process = Path(f"/proc/{pid}")
    return Sample(
        at_s,
        memory_bytes(pid)[0] / MIB,
        len(list((process / "fd").iterdir())),
        int(stats["tasks"]),
        len(list((process / "task").iterdir())),
        int(stats["tcp_connections"]),
        int(stats["sessions"]),
        answers,
    )


def judged(samples: Sequence[Sample]) -> list[Sample]:
    """Return those after the warm-up."""
    return list(samples[round(len(samples) * WARM_UP) :])


def growth(samples: Sequence[Sample], name: str) -> float | None:
    """Return by how much a figure is larger in the last third of those judged than in the first, by medians.

    None if there are too few samples.
    """
    values = [float(getattr(each, name)) for each in judged(samples)]
    if len(values) < 3:
        return None
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def slope_per_minute(samples: Sequence[Sample], name: str) -> float | None:
    """Return the slope of a figure after the warm-up: the median of the slopes between any two (Theil and Sen)."""
    some = judged(samples)
    slopes = [
        (getattr(later, name) - getattr(sooner, name)) / (later.at_s - sooner.at_s) * 60
        for number, sooner in enumerate(some)
        for later in some[number + 1 :]
    ]
    return statistics.median(slopes) if slopes else None


# --- what it proves ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class SoakOutcome:
    """What a soak has seen."""

    plan: SoakPlan
    seen: Seen
    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """Rotations, reloads and outages."""
    failed: dict[str, str] = field(default_factory=dict)
    """The last reason why one of them failed, by its name."""
    outages: list[tuple[float, float]] = field(default_factory=list)
    """From when to when the disk was full, in seconds since the start."""
    errors: Mapping[str, int] = field(default_factory=dict)
    """Errors that the server answered with, by code."""
    log_events: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def memory_bound_mib(self) -> float:
        """By how much memory may grow. In under half an hour some tombstones fill after the warm-up."""
        minutes = self.plan.minutes
        filling = max(0.0, min(minutes, TOMBSTONE_MINUTES) - minutes * WARM_UP)
        return MEMORY_GROWTH_MIB + TOMBSTONE_MIB * filling / TOMBSTONE_MINUTES

    def report(self) -> Report:
        seen, samples, done = self.seen, self.samples, self.done
        slope = slope_per_minute(samples, "memory_mib")
        rows = [
            Row("minutes", "minutes", self.seconds / 60, "min"),
            Row("samples", "samples at rest", len(samples)),
            Row("answers", "answers judged", seen.judged),
            Row("wrong", "of them wrong", seen.wrong.total(), equals=0),
            Row("lost", "connections lost", seen.lost.total(), equals=0),
            Row("later", "calls put off", seen.later.total()),
            Row("internal", "internal errors of the server", self.errors.get(INTERNAL, 0), equals=0),
            Row("connects", "connections made", seen.right["connect"]),
            Row("opened", "sessions opened", seen.right["open"]),
            Row("refreshed", "refreshed", seen.right["refresh"]),
            Row("ended", "ended", seen.right["end"]),
            Row("refused", "ended ones refused", seen.right["refused"]),
            Row("disconnected", "senders of garbage disconnected", seen.right["disconnected"]),
            Row("rotations", "certificates rotated", done["rotation"]),
            Row("reloads", "configurations reloaded", done["reload"]),
            Row("outages", "times the disk was full", done["outage"]),
            Row("not_done", "of these failed", len(self.failed), equals=0),
            Row("memory", "memory at the end", samples[-1].memory_mib if samples else None, "MiB"),
            Row("memory_growth", "memory growth after the warm-up", growth(samples, "memory_mib"), "MiB",
                below=self.memory_bound_mib),
            Row("memory_slope", "that is", None if slope is None else slope * 1024, "KiB/min"),
            Row("descriptor_growth", "descriptor growth", growth(samples, "descriptors"), below=COUNT_GROWTH),
            Row("task_growth", "task growth", growth(samples, "tasks"), below=COUNT_GROWTH),
            Row("thread_growth", "thread growth", growth(samples, "threads"), below=COUNT_GROWTH),
        ]  # fmt: skip
        notes = [*counted("wrong", seen.wrong), *counted("lost", seen.lost)]
        notes += [f"{name} failed: {why}" for name, why in self.failed.items()]
        notes += counted("in the server's log", self.log_events)
        details = {
            "answers": {"right": seen.right, "wrong": seen.wrong, "later": seen.later, "lost": seen.lost},
            "failed": self.failed,
            "errors": dict(self.errors),
            "log": self.log_events,
            "outages": self.outages,
            "samples": [sample._asdict() for sample in samples],
        }
        return Report({"figure": rows}, notes=notes, details=details, interrupted=self.interrupted)


# --- what is done to the server ----------------------------------------------------------------------------


class Faults:
    """Rotations, reloads and full disks. Each raises ZcprotoError if the server does not come through it."""

    def __init__(self, plan: SoakPlan, server: Server, target: LoadTarget, operator: Caller) -> None:
        self._plan = plan
        self._server = server
        self._target = target
        self._operator = operator
        self._rotator = Rotator.of(server.stage.home, new_key_every=3)
        self._rotations = 0

    async def rotate(self) -> None:
        """Replace the certificate by its files, and wait until it is served."""
        self._rotations += 1
        rotated = await self._rotator.rotate_beside(self._rotations)
        if rotated.problem:
            raise ZcprotoError(rotated.problem)

        async def is_served() -> bool:
            caller = await self._target.caller()
            try:
                tls = cast("TlsTransport", caller.transport).get_extra_info("ssl_object")
                return leaf_of(tls) in rotated.leaves.values()
            finally:
                await caller.disconnect()

        if not await until(is_served, SEEN_S):
            raise ZcprotoError(f"the new certificate was not served within {SEEN_S:.0f} s")

    async def reload(self, streams: int) -> None:
        """Change a limit, and wait until new connections get it in WELCOME."""
        self._server.stage.configure(self._plan.settings(streams))
        os.kill(self._server.pid, signal.SIGHUP)

        async def is_active() -> bool:
            caller = await self._target.caller()
            try:
                return int(caller.conversation.welcome["max_streams"]) == streams
            finally:
                await caller.disconnect()

        if not await until(is_active, SEEN_S):
            raise ZcprotoError(f"the new configuration was not active within {SEEN_S:.0f} s")

    async def fill_disk(self, seconds: float) -> None:
        """Let no file of the server grow for a while, then wait until its store is healthy."""
        pid = self._server.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            await asyncio.sleep(seconds)
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

        async def is_healthy() -> bool:
            return bool((await self.stats())["store"]["state"] == "healthy")

        if not await until(is_healthy, RECOVER_S):
            raise ZcprotoError(f"the store was not healthy within {RECOVER_S:.0f} s")

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await self._operator.call("server.stats", {})
        return stats


# --- the run -----------------------------------------------------------------------------------------------


class Soak:
    """Cycles of churn with faults in between, and a rest after each in which a sample is taken."""

    def __init__(
        self, plan: SoakPlan, server: Server, target: LoadTarget, users: Sequence[Credential]
    ) -> None:
        self._plan = plan
        self._server = server
        self._target = target
        self._chance = random.Random(plan.seed)  # noqa: S311 - an order, no secret
        self._seen = Seen()
        self._outcome = SoakOutcome(plan, self._seen)
        self._began = 0.0
        self._stopping = asyncio.Event()
        clients = [self._client(number, user) for number, user in enumerate(users)]
        self._churning, self._steady = clients[: plan.churning], clients[plan.churning :]

    def _client(self, number: int, user: Credential) -> Client:
        is_steady = number >= self._plan.churning
        chance = random.Random(self._chance.getrandbits(64))  # noqa: S311 - choices, no secret
        pause_s = self._plan.pause_s * (2 if is_steady else 1)
        return Client(self._target, user, chance, self._seen, pause_s, is_steady)

    async def conduct(self) -> SoakOutcome:
        """Carry it out. The first Ctrl-C ends it early."""
        with on_interrupt(self._interrupt):
            operator = await self._target.caller()
            await self._renew(operator)
            await self._conduct(operator)
            await operator.disconnect()
        return self._outcome

    def _interrupt(self) -> None:
        self._outcome.interrupted = True
        self._stopping.set()

    async def _conduct(self, operator: Caller) -> None:
        plan, outcome = self._plan, self._outcome
        faults = Faults(plan, self._server, self._target, operator)
        self._began = time.monotonic()
        async with asyncio.TaskGroup() as running:
            for client in self._steady:
                running.create_task(client.run())
            while time.monotonic() - self._began < plan.seconds and not self._stopping.is_set():
                await self._cycle(faults)
                await self._renew(operator)
                await self._sample(faults)
            for client in self._steady:
                client.stop()
        outcome.seconds = time.monotonic() - self._began
        progress("judging once more everything that the clients remember ...")
        for client in (*self._churning, *self._steady):
            await client.settle()
        outcome.errors = (await faults.stats())["errors"]

    async def _cycle(self, faults: Faults) -> None:
        """Churn, with faults at random moments."""
        plan, chance = self._plan, self._chance
        begin = time.monotonic()
        moments = sorted(chance.uniform(0.1, 0.8) for _ in range(3))
        length_s = min(plan.outage_s, plan.cycle / 4) * chance.uniform(0.3, 1.0)
        acts: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("rotation", faults.rotate),
            ("reload", partial(faults.reload, chance.randrange(*MAX_STREAMS))),
            ("outage" if chance.random() < OUTAGE_CHANCE else "", partial(faults.fill_disk, length_s)),
        ]
        chance.shuffle(acts)
        async with asyncio.TaskGroup() as running:
            for client in self._churning:
                running.create_task(client.run())
            for moment, (name, act) in zip(moments, acts, strict=True):
                await self._sleep(begin + moment * plan.cycle - time.monotonic())
                if name and not self._stopping.is_set():
                    await self._do(name, act)
            await self._sleep(begin + plan.cycle - time.monotonic())
            for client in self._churning:
                client.stop()

    async def _do(self, name: str, act: Callable[[], Awaitable[None]]) -> None:
        outcome, begin = self._outcome, time.monotonic() - self._began
        try:
            await act()
        except ZcprotoError as error:
            outcome.failed[name] = str(error)
        else:
            outcome.done[name] += 1
        if name == "outage":
            outcome.outages.append((begin, time.monotonic() - self._began))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _renew(self, operator: Caller) -> None:
        """Open a new session for the operator, whose sessions live no longer than others, and close the old
        one.
        """
        old, user = operator.token, self._server.stage.operator
        operator.token = (await with_retries(lambda: open_session(operator, user))).token
        if any(old):
            await operator.call("session.close", {}, old)

    async def _sample(self, faults: Faults) -> None:
        """Wait until the churning clients' connections are closed, and take a sample."""
        outcome, at_rest = self._outcome, self._plan.steady + 1

        async def is_at_rest() -> bool:
            return bool((await faults.stats())["tcp_connections"] <= at_rest)

        await until(is_at_rest, GONE_S)
        await asyncio.sleep(REST_S)
        at_s = time.monotonic() - self._began
        sample = take_sample(self._server.pid, await faults.stats(), at_s, self._seen.judged)
        outcome.samples.append(sample)
        progress(
            f"{at_s / 60:.1f} of {self._plan.minutes:g} min: {sample.answers:,} answers judged, "
            f"{self._seen.wrong.total()} wrong; {sample.memory_mib:.1f} MiB, {sample.descriptors} descriptors, "
            f"{sample.tasks} tasks, {sample.sessions:,} sessions"
        )


def soak(plan: SoakPlan, folder: Path) -> SoakOutcome:
    """Carry out a plan in a home folder. Raises ConfigError for what cannot be measured here."""
    plan.check()
    stage = Stage(folder, plan.settings(MAX_STREAMS[1]))
    users = stage.add_users("client", plan.churning + plan.steady)
    with stage.serve("sqlite") as server, on_processor(1), asyncio.Runner() as runner:
        outcome = runner.run(_conduct(plan, server, users))
    outcome.log_events = stage.log_events()
    return outcome


async def _conduct(plan: SoakPlan, server: Server, users: Sequence[Credential]) -> SoakOutcome:
    target = server.target()
    try:
        return await Soak(plan, server, target, users).conduct()
    finally:
        target.close()


@measurement
@click.option(
    "--minutes", type=click.FloatRange(0.1, 10_080), default=30.0, show_default=True, help="How long."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of all acts.")
def command(minutes: float, seed: int) -> Report:
    with temporary_home() as home:
        return soak(SoakPlan(minutes, seed), home.path).report()
