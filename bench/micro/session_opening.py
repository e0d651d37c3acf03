"""What sessions in a file cost: durable openings a second, memory of 100,000, the next start, and cleaning.

    python -m bench.micro.session_opening [--sessions 100000] [--concurrency 64] [--folder DIR] [--json FILE]

- An opening is what a server does for `session.open` but for TLS and the proof of the user: tokens, the store
  (on the disk when it returns), the registry. So many tasks open one after the other each, five to a user. The
  clock runs from the first to the last; a latency is that of one opening. `--folder` says on which disk.
- What the disk alone takes is measured beside it: one page written and brought to the disk, again and again.
- Memory is the resident memory of this process with the sessions open, above the same with an empty store and an
  empty registry.
- The next start opens the file and reads all of it, in batches; once as it is, once with the registry taking them
  in. A pause is how much later than asked a timer of 1 ms came, whatever else the machine did.
- Cleaning removes sessions past their time from the file, 2,000 in a slice.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from array import array
from pathlib import Path
from typing import Final

from bench.micro.token_check import NS_PER_MS, PER_USER, Figure, conclude, quantile, resident_bytes
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.event_loop import new_event_loop
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.stores.base import Created, SessionStore
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import EXPIRED_AT_ONCE

MIN_OPENINGS: Final = 3_000.0
MAX_MEMORY_MB: Final = 40.0
MAX_START_S: Final = 1.0
MIN_CLEAN_RATE: Final = 100_000.0

SYNCS: Final = 200
PAGE: Final = 4096
ALONE: Final = 50
TICK_S: Final = 0.001
NS_PER_S: Final = 1_000_000_000
PATIENCE_S: Final = 10.0
"""Of the stores and for their news: what is measured is how long it takes."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.session_opening", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--sessions", type=int, default=100_000, help="sessions that are opened")
    parser.add_argument("--concurrency", type=int, default=64, help="openings at once")
    parser.add_argument(
        "--folder", type=Path, help="where the file is made for the time; else a temporary folder"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.sessions < 1 or options.concurrency < 1:
        parser.error("at least one session and one task are needed")
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        figures = runner.run(measure(Path(folder), options.sessions, options.concurrency))
    return conclude(figures, options.json)


async def measure(folder: Path, sessions: int, concurrency: int) -> list[Figure]:
    syncs = sorted(time_syncs(folder / "disk"))
    path = folder / "home" / "sessions.db"
    latencies = array("Q", [0]) * sessions  # written, so that it is resident before the count begins
    store, registry = (
        SqliteStore(path, timeout=PATIENCE_S),
        SessionRegistry(SessionSettings(), system_entropy),
    )
    await store.open(lambda change: None)
    before = resident_bytes()
    rate = await open_sessions(store, registry, latencies, concurrency)
    memory = (resident_bytes() - before) / 1e6
    alone = array("Q", [0]) * ALONE
    await open_sessions(store, registry, alone, 1, first_user=sessions)
    await store.close()
    size = path.stat().st_size / 1e6
    start, start_pause = await start_again(path, None)
    registry = SessionRegistry(SessionSettings(), system_entropy)
    whole, whole_pause = await start_again(path, registry)
    cleaned, slice_ms, clean_pause = await clean(path)
    ordered = sorted(latencies)
    return [
        Figure("sessions", sessions, ""),
        Figure("openings at once", concurrency, ""),
        Figure("durable openings a second", rate, "", MIN_OPENINGS, at_least=True),
        Figure("opening, p50", quantile(ordered, 0.5) / 1e3, "ms"),
        Figure("opening, p99", quantile(ordered, 0.99) / 1e3, "ms"),
        Figure("opening, longest", ordered[-1] / NS_PER_MS, "ms"),
        Figure("opening with no other, p50", quantile(sorted(alone), 0.5) / 1e3, "ms"),
        Figure("the disk alone, p50", quantile(syncs, 0.5) / 1e3, "ms"),
        Figure("the disk alone, p99", quantile(syncs, 0.99) / 1e3, "ms"),
        Figure("memory above the empty server", memory, "MB", MAX_MEMORY_MB),
        Figure("size of the file", size, "MB"),
        Figure("opening and reading the file", start, "s", MAX_START_S),
        Figure("longest pause of the loop, reading", start_pause, "ms"),
        Figure("with the registry taking it in", whole, "s"),
        Figure("longest pause of the loop, taking in", whole_pause, "ms"),
        Figure("sessions cleaned away a second", cleaned, "", MIN_CLEAN_RATE, at_least=True),
        Figure("longest slice, in the thread", slice_ms, "ms"),
        Figure("longest pause of the loop meanwhile", clean_pause, "ms"),
    ]


def time_syncs(path: Path) -> array[int]:
    """Nanoseconds that each of some pages took to be on the disk."""
    latencies = array("Q", [0]) * SYNCS
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for number in range(SYNCS):
            page = os.urandom(PAGE)
            begin = time.perf_counter_ns()
            os.pwrite(descriptor, page, number * PAGE)
            os.fdatasync(descriptor)
            latencies[number] = time.perf_counter_ns() - begin
    finally:
        os.close(descriptor)
    return latencies


async def open_sessions(
    store: SessionStore,
    registry: SessionRegistry,
    latencies: array[int],
    concurrency: int,
    first_user: int = 0,
) -> float:
    """Open as many sessions as there is room for latencies; how many a second."""
    settings = SessionSettings()
    limit = UserLimit(settings.per_user, settings.when_full, settings.idle_timeout_ms)
    numbers = iter(range(len(latencies)))

    async def work() -> None:
        for number in numbers:  # shared by all
            begin = time.perf_counter_ns()
            new = registry.new_session(
                f"user-{first_user + number // PER_USER}",
                operator=False,
                client="bench/1",
                address="127.0.0.1",
                wall=system_clock.wall(),
            )
            assert await store.create(new.record, limit) == Created()
            assert registry.restore(new.record)
            assert registry.opened_session(new) is not None
            latencies[number] = time.perf_counter_ns() - begin

    begin = time.perf_counter_ns()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return len(latencies) / ((time.perf_counter_ns() - begin) / NS_PER_S)


async def start_again(path: Path, registry: SessionRegistry | None) -> tuple[float, float]:
    """Open the file and read it; seconds, and the longest pause of the loop in milliseconds."""
    pauses = Pauses()
    store = SqliteStore(path, timeout=PATIENCE_S)
    begin = time.perf_counter_ns()
    await store.open(lambda change: None)
    async for batch in store.load():
        if registry is not None:
            for record in batch:
                assert isinstance(record, SessionRecord)
                registry.restore(record)
    duration = (time.perf_counter_ns() - begin) / NS_PER_S
    longest = pauses.stop()
    await store.close()
    return duration, longest


class Pauses:
    """How much later than asked the timers of this loop come."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._ask()

    def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = time.perf_counter() + TICK_S
        self._timer = loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._longest = max(self._longest, time.perf_counter() - self._due)
        self._ask()

    def stop(self) -> float:
        """The longest in milliseconds."""
        self._timer.cancel()
        return self._longest * 1e3


async def clean(path: Path) -> tuple[float, float, float]:
    """Remove all sessions as past their time; how many a second, the longest slice, and the longest pause of the
    loop, both in milliseconds."""
    store = SqliteStore(path, timeout=PATIENCE_S)
    await store.open(lambda change: None)
    settings = SessionSettings()
    wall = system_clock.wall() + settings.refresh_lifetime_ms + settings.lifetime_ms
    pauses = Pauses()
    removed, longest, begin = 0, 0, time.perf_counter_ns()
    while True:
        slice_begin = time.perf_counter_ns()
        once = await store.expire(wall, settings.dead_keep_ms, EXPIRED_AT_ONCE)
        if not once:
            break
        removed += once
        longest = max(longest, time.perf_counter_ns() - slice_begin)
    duration = time.perf_counter_ns() - begin
    pause = pauses.stop()
    assert await store.count() == 0
    await store.close()
    return removed / (duration / NS_PER_S), longest / NS_PER_MS, pause


if __name__ == "__main__":
    raise SystemExit(main())
