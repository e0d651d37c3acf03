"""Open sessions durably in a file: how many a second, memory of 100,000, the next start, and cleaning.

An opening is what a server does for `session.open` but for TLS and the proof of the user: tokens, the store (on
the disk when it returns), the registry. So many tasks open sessions, one after the other each, five to a user.
The disk alone is measured beside it: one page written and synced, again and again. `--folder` chooses the disk.

Memory is the resident memory of this process with the sessions open, above the same with an empty store and
registry. The next start opens the file and reads all of it, once as it is, once with the registry restoring the
sessions. A pause is how much later than asked a timer of 1 ms was called.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from array import array
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, FOLDER, measurement
from bench.micro.timing import (
    NS_PER,
    STORE_TIMEOUT_S,
    Pauses,
    clean_store,
    new_registry,
    open_sessions,
    resident_bytes,
    time_rows,
)
from bench.report import Row
from zcproto.common.process import new_event_loop
from zcproto.sessions import SessionRegistry
from zcproto.sessions.record import SessionRecord
from zcproto.stores.sqlite.store import SqliteStore

MIN_OPENINGS: Final = 3_000.0
MAX_MEMORY_MB: Final = 40.0
MAX_START_S: Final = 1.0
MIN_CLEAN_RATE: Final = 100_000.0

SYNCS: Final = 200
PAGE: Final = 4096
ALONE: Final = 50


async def measure(folder: Path, sessions: int, at_once: int) -> list[Row]:
    syncs = time_syncs(folder / "disk")
    path = folder / "home" / "sessions.db"
    store, registry = await open_store(path), new_registry()
    room = array("Q", [0]) * sessions  # as many latencies, resident before the count begins
    before = resident_bytes()
    del room
    opened = await open_sessions(store, registry, sessions, at_once)
    memory = (resident_bytes() - before) / 1e6
    alone = await open_sessions(store, registry, ALONE, 1, first_user=sessions)
    await store.close()
    size = path.stat().st_size / 1e6
    start_s, start_pause = await start_again(path, None)
    whole_s, whole_pause = await start_again(path, new_registry())
    store = await open_store(path)
    cleaned = await clean_store(store)
    assert await store.count() == 0
    await store.close()
    return [
        Row("sessions", "sessions", sessions),
        Row("at_once", "openings at once", at_once),
        Row("rate", "durable openings a second", opened.rate, at_least=MIN_OPENINGS),
        *time_rows("opening", "opening", opened.ns, "ms", "p50", "p99", "longest"),
        *time_rows("alone", "opening with no other", alone.ns, "ms", "p50"),
        *time_rows("disk", "the disk alone", syncs, "ms", "p50", "p99"),
        Row("memory_mb", "memory above the empty server", memory, "MB", below=MAX_MEMORY_MB),
        Row("size_mb", "size of the file", size, "MB"),
        Row("start_s", "opening and reading the file", start_s, "s", below=MAX_START_S),
        Row("start_pause_ms", "longest pause of the loop, reading", start_pause, "ms"),
        Row("restore_s", "with the registry restoring it", whole_s, "s"),
        Row("restore_pause_ms", "longest pause of the loop, restoring", whole_pause, "ms"),
        Row("clean_rate", "sessions removed a second", cleaned.rate, at_least=MIN_CLEAN_RATE),
        *time_rows("slice", "slice, in the thread", cleaned.slices, "ms", "longest"),
        Row("clean_pause_ms", "longest pause of the loop, removing", cleaned.pause_ms, "ms"),
    ]


async def open_store(path: Path) -> SqliteStore:
    store = SqliteStore(path, timeout=STORE_TIMEOUT_S)
    await store.open(lambda change: None)
    return store


def time_syncs(path: Path) -> list[int]:
    """Return the nanoseconds of writing and syncing each of some pages."""
    latencies = []
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for number in range(SYNCS):
            page = os.urandom(PAGE)
            begin = time.perf_counter_ns()
            os.pwrite(descriptor, page, number * PAGE)
            os.fdatasync(descriptor)
            latencies.append(time.perf_counter_ns() - begin)
    finally:
        os.close(descriptor)
    return latencies


async def start_again(path: Path, registry: SessionRegistry | None) -> tuple[float, float]:
    """Open the file and read it; return the seconds, and the longest pause of the loop in milliseconds."""
    pauses = Pauses()
    begin = time.perf_counter_ns()
    store = await open_store(path)
    async for batch in store.load():
        if registry is not None:
            for record in batch:
                assert isinstance(record, SessionRecord)
                registry.restore(record)
    duration = (time.perf_counter_ns() - begin) / NS_PER["s"]
    longest = pauses.stop()
    await store.close()
    return duration, longest


@measurement
@click.option("--sessions", type=COUNT, default=100_000, show_default=True, help="Sessions that are opened.")
@click.option("--concurrency", type=COUNT, default=64, show_default=True, help="Openings at once.")
@click.option("--folder", type=FOLDER, help="Where the file is meanwhile; else a temporary folder.")
def command(sessions: int, concurrency: int, folder: Path | None) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(dir=folder) as run_folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(measure(Path(run_folder), sessions, concurrency))
