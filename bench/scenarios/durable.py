"""Durable runs while connections are cut and processes killed: each item once and in order, or the right error.

\b
workers   a server of four workers, whose coordinator keeps the items: workers and the coordinator are killed, and
          the server is upgraded
servers   three servers whose items are in Valkey or Redis: servers are killed, and restarted with a drain

The clients run in processes of their own. Each reads one run of 50 items after the other. Its connection is cut
once in each run, and in some runs the client is replaced by another one, which resumes. Each method leaves a trace,
which shows whether one ran twice. A run whose process was killed must end with UNKNOWN `owner_lost` after its
stored items. It may be unknown instead if the coordinator was killed as well before the run had ended: nothing had
it any more.

Before that, without faults, it measures how long a cancellation and a revocation take from one process to another.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

import click

from bench.command import COUNT, SECONDS, measurement, progress
from bench.report import Report, Row
from zcproto.client.client import Client
from zcproto.client.options import ConnectOptions
from zcproto.common.process import new_event_loop
from zcproto.errors import Cancelled, ConfigError, TokenRevoked, ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.fleet import (
    Fleet,
    Judgement,
    Seen,
    conduct,
    fleet_of,
    is_supported,
    judge,
    percentile,
    prepare_home,
    settings_for,
    store_program,
)
from zcproto.load.fleet_clients import ClientsPlan

KINDS: Final = ("workers", "servers")
ITEMS: Final = 50
PROCESSES: Final = 2
TIMED: Final = 100
"""Cancellations and revocations that are timed."""

MAX_MS: Final = 100.0
PROGRESS_S: Final = 5.0
MAX_SHOWN: Final = 5
CONNECT_TRIES: Final = 100


async def two_places(
    fleet: Fleet, stack: AsyncExitStack, ca_file: Path, user: tuple[str, str]
) -> tuple[Client, Client]:
    """Return two clients of one user that different processes serve."""
    found: dict[int, Client] = {}
    for number in range(CONNECT_TRIES):
        options = ConnectOptions(user=user[0], key=user[1], ca_file=ca_file)
        client = Client(fleet.addresses[number % len(fleet.addresses)], options)
        await client.open()
        process = await client.call("process")
        if process in found:
            await client.close()
            continue
        stack.push_async_callback(client.close)
        found[process] = client
        if len(found) == 2:
            first, second = found.values()
            return first, second
    raise ZcprotoError("one process has served all connections")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {name: percentile(values, share) or 0.0 for name, share in (("p50", 0.5), ("p99", 0.99))}


async def timed(work: Callable[[], Awaitable[float]], times: int) -> dict[str, float]:
    """Return percentiles of what `work` measures, in milliseconds."""
    return percentiles([1_000 * await work() for _ in range(times)])


async def latencies(
    fleet: Fleet, ca_file: Path, user: tuple[str, str], times: int
) -> dict[str, dict[str, float]]:
    """Time a cancellation and a revocation at one process until a client at another one has the error."""
    async with AsyncExitStack() as stack:
        here, there = await two_places(fleet, stack, ca_file, user)

        async def one(end: Callable[[str], Awaitable[Any]]) -> float:
            with suppress(TokenRevoked):
                await here.call("process")  # notices the end of a session whose event has not arrived
            await here.open_session()
            stream = here.stream(
                "work", durable=True, run="timed", total=10_000, pause=0.005, asks=[], expires=[]
            )
            async with stream:
                await stream.receive()
                began = time.monotonic()
                ending = asyncio.ensure_future(end(stream.id or ""))
                with suppress(Cancelled, TokenRevoked):
                    while True:
                        await stream.receive()
                took = time.monotonic() - began
            await ending
            return took

        async def revoke(_: str) -> None:
            assert here.session is not None
            await there.call("session.revoke", id=here.session.id)

        cancel = await timed(lambda: one(lambda id: there.call("stream.cancel", id=id)), times)
        return {"cancel": cancel, "revocation": await timed(lambda: one(revoke), times)}


def plans_for(
    fleet: Fleet, folder: Path, users: Sequence[tuple[str, str]], runs: int, seed: int, **more: Any
) -> list[ClientsPlan]:
    """Return what each process of clients does."""
    shares = [[*users[number::PROCESSES]] for number in range(PROCESSES)]
    return [
        ClientsPlan(
            fleet.addresses,
            str(folder / "home" / "certs" / "ca.crt"),
            share,
            str(folder),
            runs // PROCESSES + (number < runs % PROCESSES),
            prefix=f"run-{number}",
            seed=seed + number,
            **{"items": ITEMS, **more},
        )
        for number, share in enumerate(shares)
        if share
    ]


def watch(kind: str, runs: int) -> Callable[[Seen], None]:
    """Return what prints the progress of the runs."""
    printed = time.monotonic()

    def on_tick(seen: Seen) -> None:
        nonlocal printed
        if time.monotonic() - printed > PROGRESS_S:
            printed = time.monotonic()
            last = {tick["plan"]: tick for tick in seen.ticks}
            done = sum(tick["done"] for tick in last.values())
            progress(f"{kind}: {done:,} of {runs:,} runs, {len(seen.faults):,} kills and upgrades")

    return on_tick


async def measure(
    kind: str, folder: Path, runs: int, readers: int, interval: float, seed: int
) -> tuple[list[Row], list[str]]:
    """Return the figures of one kind of fleet, and what was wrong."""
    home, [timing, *users] = prepare_home(folder / "home", readers + 1, settings_for(kind, readers))
    async with fleet_of(kind, home) as fleet:
        times = await latencies(fleet, home.certs / "ca.crt", timing, TIMED)
        plans = plans_for(fleet, folder, users, runs, seed)
        seen = await conduct(fleet, plans, interval, seed, watch(kind, runs))
    found = judge(seen, ITEMS)
    return [*rows_of(seen, found, runs), *latency_rows(times)], notes_of(kind, seen, found)


def rows_of(seen: Seen, found: Judgement, runs: int) -> list[Row]:
    """Return the figures that durable runs and pending calls have in common."""
    seconds = seen.ended - seen.began
    faults = Counter(each.victim for each in seen.faults)
    return [
        Row("runs", "runs with an end", len(seen.outcomes), equals=runs),
        Row("complete", "of these with every item and the result", found.complete),
        Row("owner_lost", "of these ended as their process was lost", found.owner_lost),
        Row("both_lost", "of these lost with process and coordinator", found.both_lost),
        Row("unexplained", "with another end", len(found.unexplained), equals=0),
        Row("wrong", "with an item missing, repeated or different", len(found.wrong), equals=0),
        Row("twice", "methods that ran twice", len(found.twice), equals=0),
        Row("cuts", "connections cut", sum(len(each.cuts) for each in seen.outcomes)),
        Row("restarts", "clients replaced", sum(len(each.restarts) for each in seen.outcomes)),
        *(Row(f"{name}_faults", f"{words} killed" if name != "upgrade" else "upgrades and restarts", faults[name])
          for name, words in VICTIMS.items() if faults[name]),
        Row("rate", "items", sum(each.items for each in seen.outcomes) / seconds, "/s"),
        Row("gap_p50_s", "longest gap in a run, p50", percentile(seen.gaps, 0.5), "s"),
        Row("gap_p99_s", "longest gap in a run, p99", percentile(seen.gaps, 0.99), "s"),
        Row("gap_s", "longest gap in a run, longest", percentile(seen.gaps, 1.0), "s"),
    ]  # fmt: skip


VICTIMS: Final = {"worker": "workers", "coordinator": "coordinators", "server": "servers", "upgrade": ""}


def latency_rows(times: dict[str, dict[str, float]]) -> list[Row]:
    return [
        Row(f"{name}_{share}_ms", f"{name} at another process, {share}", value, "ms",
            below=MAX_MS if share == "p99" else None)
        for name, shares in times.items()
        for share, value in shares.items()
    ]  # fmt: skip


def notes_of(kind: str, seen: Seen, found: Judgement) -> list[str]:
    """Return the first of each thing that went wrong, the longest gaps, and when what was done to the fleet."""
    wrong = [
        f"{kind}, {name}: {each}"
        for name in ("unexplained", "wrong", "twice")
        for each in getattr(found, name)[:MAX_SHOWN]
    ]
    gaps = sorted(seen.outcomes, key=lambda each: -each.gap)[:MAX_SHOWN]
    slow = [f"{each.gap:.1f} s until {each.gap_at - seen.began:.1f} s ({each.run})" for each in gaps]
    faults = [f"{each.at - seen.began:.1f} s {each.victim} {each.pid}" for each in seen.faults]
    return [*wrong, f"{kind}, longest gaps: {', '.join(slow)}", f"{kind}, faults: {', '.join(faults)}"]


async def measure_all(
    folder: Path, kinds: Sequence[str], measure: Callable[[str, Path], Awaitable[tuple[list[Row], list[str]]]]
) -> Report:
    """Measure each kind of fleet in a folder of its own."""
    made = Report({})
    for kind in kinds:
        made.columns[kind], notes = await measure(kind, folder / kind)
        made.notes += notes
    return made


def run_all(
    kinds: Sequence[str], measure: Callable[[str, Path], Awaitable[tuple[list[Row], list[str]]]]
) -> Report:
    """As `measure_all`, in an event loop of its own. Raises ConfigError if it cannot be measured here."""
    kinds = kinds or KINDS
    if not is_supported():
        raise ConfigError(["fleets need Linux: it finds the processes of a server in /proc"])
    if "servers" in kinds and store_program() is None:
        raise ConfigError(["valkey-server or redis-server is not installed; on Debian: apt install valkey"])
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure_all(home.path, kinds, measure))


only = click.option(
    "--only", "kinds", type=click.Choice(KINDS), multiple=True, help="One of the fleets. [default: both]"
)


@measurement
@click.option("--runs", type=COUNT, default=10_000, show_default=True, help="Of each fleet.")
@click.option("--readers", type=COUNT, default=150, show_default=True, help="Clients that read at once.")
@click.option("--interval", type=SECONDS, default=10.0, show_default=True, help="Seconds between two kills.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the choices.")
@only
def command(runs: int, readers: int, interval: float, seed: int, kinds: Sequence[str]) -> Report:
    return run_all(kinds, lambda kind, folder: measure(kind, folder, runs, readers, interval, seed))
