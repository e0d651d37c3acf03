"""What the cleaning away of sessions costs: how many a second, and whom each slice of it holds up.

    python -m bench.micro.session_cleanup [--sessions 100000] [--program valkey-server] [--folder DIR] [--json FILE]

- The registry is cleaned in slices that hold the event loop; the time of one is that of this thread on the
  processor. Once tokens lapse (their sessions can be refreshed), once sessions end and leave.
- The file of sessions is cleaned in the store's thread, as a server does it. A slice holds up whoever else wants
  something of the store: so sessions are opened beside it, a few at once, and each opening is timed to its end on
  the disk; the same is done without any cleaning. A slice is shorter when somebody waits.
- Valkey or Redis is cleaned by scripts that each hold up the server for their time, on a server of our own.
- A pause is how much later than asked a timer of 1 ms came, whatever else the machine did.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from array import array
from pathlib import Path
from typing import Final, NamedTuple

from bench.micro import token_check
from bench.micro.session_opening import NS_PER_S, PATIENCE_S, Pauses, open_sessions
from bench.micro.session_opening_valkey import server
from bench.micro.token_check import (
    MAX_SLICE_MS,
    MIN_CLEAN_RATE,
    NS_PER_MS,
    Figure,
    conclude,
    fill,
    quantile,
)
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.event_loop import new_event_loop
from zcproto.sessions import TOKEN_SIZE, SessionRegistry, SessionSettings
from zcproto.stores.base import SessionStore
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import EXPIRE_PAUSE_S, EXPIRED_AT_ONCE
from zcproto.stores.valkey.store import ValkeyStore

CONCURRENCY: Final = 64
BESIDE: Final = 4
"""Openings at once beside the cleaning."""

OPENED: Final = 4_000
OPENED_PART: Final = 40
FIRST_USER: Final = 1_000_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.session_cleanup", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--sessions", type=int, default=100_000, help="sessions that are cleaned away")
    parser.add_argument("--program", default="valkey-server", help="valkey-server or redis-server")
    parser.add_argument(
        "--folder", type=Path, help="where the files are for the time; else a temporary folder"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.sessions < 1:
        parser.error("at least one session is needed")
    figures = [Figure("sessions", options.sessions, ""), *measure_registry(options.sessions)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            figures += runner.run(measure_file(Path(folder), options.sessions))
        if shutil.which(options.program) is not None:
            with (
                server(options.program, Path(folder), "always") as url,
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                figures += runner.run(measure_valkey(url, options.sessions))
    return conclude(figures, options.json)


def measure_registry(sessions: int) -> list[Figure]:
    kept, wall = bytearray(sessions * TOKEN_SIZE), system_clock.wall()
    figures = []
    for what, settings in (
        ("registry, lapsing", SessionSettings()),
        ("registry, ending", SessionSettings(refresh=False)),
    ):
        registry = SessionRegistry(settings, system_entropy)
        fill(registry, sessions, wall, kept)
        rate, longest = token_check.clean(registry, wall + settings.lifetime_ms)
        figures += [
            Figure(f"{what}: a second", rate, "", MIN_CLEAN_RATE, at_least=True),
            Figure(f"{what}: longest slice", longest, "ms", MAX_SLICE_MS),
        ]
    return figures


class Cleaned(NamedTuple):
    """One cleaning of a store. Slices in nanoseconds, sorted."""

    rate: float
    slices: list[int]
    pause_ms: float


async def clean(store: SessionStore) -> Cleaned:
    """Remove all sessions as past their time, in slices as a server does."""
    settings = SessionSettings()
    wall = system_clock.wall() + settings.refresh_lifetime_ms + settings.lifetime_ms
    pauses = Pauses()
    slices, removed, begin = array("Q"), 0, time.perf_counter_ns()
    while True:
        slice_begin = time.perf_counter_ns()
        once = await store.expire(wall, settings.dead_keep_ms, EXPIRED_AT_ONCE)
        if not once:
            break
        slices.append(time.perf_counter_ns() - slice_begin)
        removed += once
        await asyncio.sleep(EXPIRE_PAUSE_S if once < EXPIRED_AT_ONCE else 0)
    rate = removed / ((time.perf_counter_ns() - begin) / NS_PER_S)
    return Cleaned(rate, sorted(slices) or [0], pauses.stop())


async def fill_store(store: SessionStore, sessions: int) -> None:
    registry = SessionRegistry(SessionSettings(), system_entropy)
    await open_sessions(store, registry, array("Q", [0]) * sessions, CONCURRENCY)


async def open_some(
    store: SessionStore, first_user: int, beside: asyncio.Task[Cleaned] | None = None
) -> list[int]:
    """Open a few at once, as many as there may be or until the other is done; nanoseconds of each, sorted."""
    latencies: list[int] = []
    for first in range(0, OPENED, OPENED_PART):
        part = array("Q", [0]) * OPENED_PART
        registry = SessionRegistry(SessionSettings(), system_entropy)
        await open_sessions(store, registry, part, BESIDE, first_user=first_user + first)
        latencies += part
        if beside is not None and beside.done():
            break
    return sorted(latencies)


async def measure_file(folder: Path, sessions: int) -> list[Figure]:
    store = SqliteStore(folder / "home" / "sessions.db", timeout=PATIENCE_S)
    await store.open(lambda change: None)
    await fill_store(store, sessions)
    alone = await clean(store)
    await fill_store(store, sessions)
    without = await open_some(store, FIRST_USER)
    cleaning = asyncio.create_task(clean(store))
    await asyncio.sleep(0)
    beside = await open_some(store, 2 * FIRST_USER, cleaning)
    shared = await cleaning
    await store.close()
    added = (quantile(beside, 0.5) - quantile(without, 0.5)) / 1e3
    return [
        Figure("file: a second", alone.rate, "", MIN_CLEAN_RATE, at_least=True),
        Figure("file: slice where nobody waits, p50", quantile(alone.slices, 0.5) / 1e3, "ms"),
        Figure("file: longest of these", alone.slices[-1] / NS_PER_MS, "ms"),
        Figure("file: longest pause of the loop", alone.pause_ms, "ms"),
        Figure("file, with openings beside it: a second", shared.rate, ""),
        Figure("opening, without cleaning, p50", quantile(without, 0.5) / 1e3, "ms"),
        Figure("opening, without cleaning, p99", quantile(without, 0.99) / 1e3, "ms"),
        Figure("opening, without cleaning, longest", without[-1] / NS_PER_MS, "ms"),
        Figure("opening beside cleaning, p50", quantile(beside, 0.5) / 1e3, "ms"),
        Figure("opening beside cleaning, p99", quantile(beside, 0.99) / 1e3, "ms"),
        Figure("opening beside cleaning, longest", beside[-1] / NS_PER_MS, "ms"),
        Figure("what cleaning adds to an opening, p50", added, "ms", MAX_SLICE_MS),
    ]


async def measure_valkey(url: str, sessions: int) -> list[Figure]:
    store = ValkeyStore(url, timeout=PATIENCE_S)
    await store.open(lambda change: None)
    await fill_store(store, sessions)
    cleaned = await clean(store)
    await store.close()
    return [
        Figure("Valkey: a second", cleaned.rate, ""),
        Figure("Valkey: slice, p50", quantile(cleaned.slices, 0.5) / 1e3, "ms"),
        Figure("Valkey: longest slice", cleaned.slices[-1] / NS_PER_MS, "ms"),
        Figure("Valkey: longest pause of the loop", cleaned.pause_ms, "ms"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
