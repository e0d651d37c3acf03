"""Pending calls while connections are cut and processes killed: each is answered once, or refused when it expires.

\b
workers   a server of four workers: workers and the coordinator are killed, and the server is upgraded
servers   three servers on Valkey or Redis: servers are killed, and restarted with a drain

As the scenario `durable`, whose bars hold here too. Each run asks its user three questions, and one more that no
client answers and that must expire. Two clients of each user answer, and the second one often disappears. The log
shows how often a call was answered, and which ones expired. An answer that the method receives, and the one that a
client gave, are compared.

Before that, without faults, it measures how long an answer takes from a client at one process to a method at
another.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import click

from bench.command import COUNT, SECONDS, measurement
from bench.report import Report, Row
from bench.scenarios.durable import (
    ITEMS,
    TIMED,
    latency_rows,
    notes_of,
    only,
    percentiles,
    plans_for,
    rows_of,
    run_all,
    two_places,
    watch,
)
from zcproto.load.fleet import Fleet, conduct, fleet_of, judge, prepare_home, settings_for

ASKS: Final = 3
EXPIRES: Final = 1
DEVICES: Final = 2
DECIDED: Final = ("call.answered", "call.expired")


async def answer_latency(fleet: Fleet, ca_file: Path, user: tuple[str, str], times: int) -> dict[str, float]:
    """Time answers of a client at one process to a method at another one."""
    found = []
    async with AsyncExitStack() as stack:
        here, there = await two_places(fleet, stack, ca_file, user)
        answered_at = 0.0

        async def approve(run: str, position: int, silent: bool) -> str:
            nonlocal answered_at
            answered_at = time.monotonic()
            return f"{run}/{position}"

        await there.handle("approve", approve)
        asks = [*range(times)]
        stream = here.stream(
            "work", durable=True, run="timed", total=times, pause=0.005, asks=asks, expires=[]
        )
        async for _ in stream:
            found.append(1_000 * (time.monotonic() - answered_at))
    return percentiles(found)


def decisions(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what the logs of a fleet say about pending calls: the event, and the id of the call."""
    for path in folder.glob("home*/server.log"):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"call.' in line:
                    event: dict[str, Any] = json.loads(line)
                    yield event["event"], event.get("call", "")


async def measure(
    kind: str, folder: Path, runs: int, readers: int, interval: float, seed: int
) -> tuple[list[Row], list[str]]:
    """Return the figures of one kind of fleet, and what was wrong."""
    home, [timing, *users] = prepare_home(folder / "home", readers + 1, settings_for(kind, readers * DEVICES))
    async with fleet_of(kind, home) as fleet:
        times = await answer_latency(fleet, home.certs / "ca.crt", timing, TIMED)
        asks = {"asks": ASKS, "expires": EXPIRES, "devices": DEVICES}
        plans = plans_for(fleet, folder, users, runs, seed, **asks)
        seen = await conduct(fleet, plans, interval, seed, watch(kind, runs))
    found = judge(seen, ITEMS)
    logged = [*decisions(folder)]
    events = Counter(event for event, _ in logged)
    decided = Counter(call for event, call in logged if event in DECIDED)
    rows = [
        *rows_of(seen, found, runs),
        Row("offers", "questions that clients got", seen.offers, at_least=ASKS * found.complete),
        Row("answered", "calls answered", events["call.answered"], at_least=ASKS * found.complete),
        Row("expired", "calls expired", events["call.expired"], at_least=EXPIRES * found.complete),
        Row("decided_twice", "calls decided twice", sum(each > 1 for each in decided.values()), equals=0),
        *latency_rows({"answer": times}),
    ]
    return rows, notes_of(kind, seen, found)


@measurement
@click.option("--runs", type=COUNT, default=2_000, show_default=True, help="Of each fleet.")
@click.option(
    "--readers", type=COUNT, default=100, show_default=True, help="Users that read and answer at once."
)
@click.option("--interval", type=SECONDS, default=10.0, show_default=True, help="Seconds between two kills.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments and the choices.")
@only
def command(runs: int, readers: int, interval: float, seed: int, kinds: Sequence[str]) -> Report:
    return run_all(kinds, lambda kind, folder: measure(kind, folder, runs, readers, interval, seed))
