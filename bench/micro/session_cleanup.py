"""Remove expired sessions: how many a second, and how long each slice delays others.

The registry is cleaned in slices on the event loop; the time of one is CPU time of this thread. Once tokens
lapse (their sessions can be refreshed), once sessions end and leave.

The file of sessions is cleaned in the store's thread, as a server does it. Sessions are opened beside it, a few
at once, and each opening is timed until it is on the disk; the same is done without any cleaning. A slice is
shorter when another call waits.

Valkey or Redis is cleaned by scripts that each block the server for their time. A pause is how much later than
asked a timer of 1 ms was called.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Final

import click

from bench.command import COUNT, FOLDER, measurement
from bench.micro.timing import (
    NS_PER,
    STORE_TIMEOUT_S,
    Cleaned,
    clean_store,
    new_registry,
    open_sessions,
    quantile,
    time_rows,
)
from bench.micro.token_check import MAX_SLICE_MS, MIN_CLEAN_RATE, clean, fill
from bench.report import Row
from bench.valkey import VALKEY, Valkey
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.process import new_event_loop
from zcproto.sessions import TOKEN_SIZE, SessionRegistry, SessionSettings
from zcproto.stores.base import SessionStore
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.valkey.store import ValkeyStore

AT_ONCE: Final = 64
BESIDE: Final = 4
"""Openings at once beside the cleaning."""

OPENED: Final = 4_000
OPENED_PART: Final = 40
FIRST_USER: Final = 1_000_000


def measure_registry(sessions: int) -> list[Row]:
    kept, wall = bytearray(sessions * TOKEN_SIZE), system_clock.wall()
    rows, bars = list[Row](), {"longest": MAX_SLICE_MS}
    for what, settings in (("lapsing", SessionSettings()), ("ending", SessionSettings(refresh=False))):
        registry = SessionRegistry(settings, system_entropy)
        fill(registry, sessions, wall, kept)
        slices = clean(registry, wall + settings.lifetime_ms)
        rate = sessions / (sum(slices) / NS_PER["s"])
        rows += [
            Row(f"{what}_rate", f"registry, {what}: a second", rate, at_least=MIN_CLEAN_RATE),
            *time_rows(f"{what}_slice", f"registry, {what}: slice", slices, "ms", "longest", below=bars),
        ]
    return rows


async def measure_file(folder: Path, sessions: int) -> list[Row]:
    store = SqliteStore(folder / "home" / "sessions.db", timeout=STORE_TIMEOUT_S)
    await store.open(lambda change: None)
    await open_sessions(store, new_registry(), sessions, AT_ONCE)
    alone = await clean_store(store)
    await open_sessions(store, new_registry(), sessions, AT_ONCE)
    without = await open_some(store, FIRST_USER)
    cleaning = asyncio.create_task(clean_store(store))
    await asyncio.sleep(0)
    beside = await open_some(store, 2 * FIRST_USER, cleaning)
    shared = await cleaning
    await store.close()
    added = (quantile(beside, 0.5) - quantile(without, 0.5)) / NS_PER["ms"]
    return [
        Row("file_rate", "file: a second", alone.rate, at_least=MIN_CLEAN_RATE),
        *time_rows("file_slice", "file: slice", alone.slices, "ms", "p50", "longest"),
        Row("file_pause_ms", "file: longest pause of the loop", alone.pause_ms, "ms"),
        Row("file_shared_rate", "file, with openings beside it: a second", shared.rate),
        *time_rows("without", "opening, without cleaning", without, "ms", "p50", "p99", "longest"),
        *time_rows("beside", "opening beside cleaning", beside, "ms", "p50", "p99", "longest"),
        Row("added_ms", "added to an opening by cleaning, p50", added, "ms", below=MAX_SLICE_MS),
    ]


async def open_some(
    store: SessionStore, first_user: int, beside: asyncio.Task[Cleaned] | None = None
) -> list[int]:
    """Open sessions a few at once, until the task beside is done; return the nanoseconds of each, sorted."""
    latencies: list[int] = []
    for first in range(0, OPENED, OPENED_PART):
        opened = await open_sessions(store, new_registry(), OPENED_PART, BESIDE, first_user + first)
        latencies += opened.ns
        if beside is not None and beside.done():
            break
    return sorted(latencies)


async def measure_valkey(url: str, sessions: int) -> list[Row]:
    store = ValkeyStore(url, timeout=STORE_TIMEOUT_S)
    await store.open(lambda change: None)
    await open_sessions(store, new_registry(), sessions, AT_ONCE)
    cleaned = await clean_store(store)
    await store.close()
    return [
        Row("valkey_rate", "Valkey: a second", cleaned.rate),
        *time_rows("valkey_slice", "Valkey: slice", cleaned.slices, "ms", "p50", "longest"),
        Row("valkey_pause_ms", "Valkey: longest pause of the loop", cleaned.pause_ms, "ms"),
    ]


@measurement
@click.option("--sessions", type=COUNT, default=100_000, show_default=True, help="Sessions that are removed.")
@click.option("--program", default=VALKEY, show_default=True, help="valkey-server or redis-server.")
@click.option("--folder", type=FOLDER, help="Where the files are meanwhile; else a temporary folder.")
def command(sessions: int, program: str, folder: Path | None) -> list[Row]:
    rows = [Row("sessions", "sessions", sessions), *measure_registry(sessions)]
    with (
        tempfile.TemporaryDirectory(dir=folder) as run_folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        rows += runner.run(measure_file(Path(run_folder), sessions))
        if shutil.which(program) is not None:
            with Valkey(Path(run_folder) / "valkey", program) as valkey:
                rows += runner.run(measure_valkey(valkey.url, sessions))
    return rows
