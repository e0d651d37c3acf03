"""Open sessions in Valkey or Redis: how many a second, memory on the server, and how soon others learn of
changes.

It starts a server of its own, on a Unix socket in a folder (`--folder` chooses the disk). With `--fsync
always`, an opening is on the disk when it returns.

Memory is what the server counts as used by its data with the sessions open, above the same without. A
revocation is made through one store; the clock runs until another one, with a connection of its own, has
received it. All of this process shares two processors with the server.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Final

import click
import redis.asyncio

from bench.command import COUNT, FOLDER, measurement
from bench.micro.timing import STORE_TIMEOUT_S, clean_store, new_registry, open_sessions, time_rows
from bench.report import Row
from bench.valkey import VALKEY, Valkey
from zcproto.common.clock import system_clock
from zcproto.common.process import new_event_loop
from zcproto.errors import Code
from zcproto.stores.base import Change
from zcproto.stores.valkey.store import ValkeyStore

MIN_OPENINGS: Final = 2_000.0
MAX_NEWS_MS: Final = 1_000.0

REVOCATIONS: Final = 500
ALONE: Final = 50


class Listener:
    """Notes when it was notified of each change."""

    def __init__(self) -> None:
        self.heard_at: dict[bytes, int] = {}
        self.wanted = 0
        self.done = asyncio.Event()

    def __call__(self, change: Change) -> None:
        self.heard_at[change.id] = time.perf_counter_ns()
        if len(self.heard_at) >= self.wanted:
            self.done.set()


async def measure(url: str, sessions: int, at_once: int) -> list[Row]:
    store, other = (ValkeyStore(url, timeout=STORE_TIMEOUT_S) for _ in range(2))
    listener, registry = Listener(), new_registry()
    await store.open(lambda change: None)
    await other.open(listener)
    before, cpu = await used_memory(url), time.process_time()
    opened = await open_sessions(store, registry, sessions, at_once)
    cpu = time.process_time() - cpu
    memory = await used_memory(url) - before
    alone = await open_sessions(store, registry, ALONE, 1, first_user=sessions)
    news = await time_news(store, listener)
    cleaned = await clean_store(store)
    assert await store.count() == 0
    await other.close()
    await store.close()
    return [
        Row("sessions", "sessions", sessions),
        Row("at_once", "openings at once", at_once),
        Row("rate", "openings a second", opened.rate, at_least=MIN_OPENINGS),
        Row("cpu_us", "CPU of this process for one", cpu / sessions * 1e6, "us"),
        *time_rows("opening", "opening", opened.ns, "ms", "p50", "p99", "longest"),
        *time_rows("alone", "opening with no other", alone.ns, "ms", "p50"),
        Row("memory", "memory on the server, a session", memory / sessions, "B"),
        *time_rows(
            "news",
            "revocation received by others",
            news,
            "ms",
            "p50",
            "longest",
            below={"longest": MAX_NEWS_MS},
        ),
        Row("clean_rate", "sessions removed a second", cleaned.rate),
        *time_rows("slice", "slice", cleaned.slices, "ms", "longest"),
    ]


async def used_memory(url: str) -> int:
    """Return the bytes that the server uses, without those of its connections."""
    async with redis.asyncio.Redis.from_url(url) as client:
        memory = await client.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


async def time_news(store: ValkeyStore, listener: Listener) -> list[int]:
    """Return the nanoseconds from each of some revocations until the listener was notified."""
    records = (await store.list())[:REVOCATIONS]
    listener.wanted = len(records)
    asked_at = {}
    for record in records:
        asked_at[record.id] = time.perf_counter_ns()
        await store.end([record.id], Code.TOKEN_REVOKED, system_clock.wall())
    async with asyncio.timeout(STORE_TIMEOUT_S):
        await listener.done.wait()
    return [listener.heard_at[id] - at for id, at in asked_at.items()]


@measurement
@click.option("--program", default=VALKEY, show_default=True, help="valkey-server or redis-server.")
@click.option(
    "--sessions", type=click.IntRange(REVOCATIONS), default=50_000, show_default=True, help="Sessions."
)
@click.option("--concurrency", type=COUNT, default=64, show_default=True, help="Openings at once.")
@click.option(
    "--fsync", type=click.Choice(["always", "everysec", "no"]), default="always", help="appendfsync."
)
@click.option(
    "--folder", type=FOLDER, help="Where the server's files are meanwhile; else a temporary folder."
)
def command(program: str, sessions: int, concurrency: int, fsync: str, folder: Path | None) -> list[Row]:
    with (
        tempfile.TemporaryDirectory(dir=folder) as run_folder,
        Valkey(Path(run_folder) / "valkey", program, fsync) as valkey,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(measure(valkey.url, sessions, concurrency))
