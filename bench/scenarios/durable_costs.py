"""What does a durable run cost the server, beside a plain stream, and while it is idle?

\b
process   one process, which keeps the items in its memory
workers   two workers, whose coordinator keeps them
servers   one server, and a Valkey that keeps them

The cost is the processor time of all processes of the server, but not of Valkey, for each item that clients in
another process read: of streams that send as fast as they are read, and of streams that send one item at a time.
A plain stream in the same server is the measure. An idle run has sent one item, and its reader has left.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
import redis

from bench.command import COUNT, measurement, progress
from bench.report import Report, Row
from bench.scenarios.helper import Helper
from bench.scenarios.reader_clients import RunReaders
from bench.stage import (
    ECDSA_ONLY,
    KIB,
    SETTLE_S,
    Server,
    Stage,
    cpu_seconds,
    family,
    private_bytes,
    room_for,
)
from bench.valkey import Valkey
from zcproto.common.process import new_event_loop
from zcproto.errors import ConfigError
from zcproto.load.demo import temporary_home

APP: Final = "bench.scenarios.reader_app:app"
KINDS: Final = {"process": (1, 1.5), "workers": (2, 3.0), "servers": (1, 3.0)}
"""The workers of each kind, and the cost of a durable item over a plain one that it must not exceed."""

READERS: Final = 32
RUNS_PER_USER: Final = 16
"""The default of `streams.durable_per_user`."""

FAST: Final = (4_000, 0.0)
"""Items of each stream, and the seconds between two."""

SLOW: Final = (200, 0.02)
WARM_UP: Final = (200, 0.0)
MAX_OWNER_KIB: Final = 4.0
MAX_VALKEY_KIB: Final = 1.0


@contextmanager
def store_of(kind: str, folder: Path) -> Iterator[Valkey | None]:
    if kind == "servers":
        with Valkey(folder / "valkey", fsync="everysec") as valkey:
            yield valkey
    else:
        yield None


def valkey_bytes(valkey: Valkey) -> int:
    with redis.Redis(unix_socket_path=str(valkey.socket)) as client:
        return int(client.info("memory")["used_memory"])


async def cost_us(server: Server, readers: Helper, method: str, total: int, pause: float) -> float:
    """Return the server's processor time for each item, in microseconds."""
    pids = family(server.pid)
    before = sum(map(cpu_seconds, pids))
    complete = await readers.call("read", method, total, pause)
    if complete != READERS:
        raise ConfigError([f"{READERS - complete} streams of {method} were not complete"])
    return (sum(map(cpu_seconds, pids)) - before) / READERS / total * 1e6


async def item_rows(server: Server, readers: Helper, bar: float) -> list[Row]:
    """Compare items of durable runs with those of plain streams."""
    rows = []
    for method in ("plain", "durable"):
        await readers.call("read", method, *WARM_UP)
    for name, words, (total, pause) in (
        ("fast", "as fast as they are read", FAST),
        ("slow", "one at a time", SLOW),
    ):
        plain, durable = [
            await cost_us(server, readers, method, total, pause) for method in ("plain", "durable")
        ]
        rows += [
            Row(f"{name}_plain_us", f"plain item, {words}", plain, "us"),
            Row(f"{name}_durable_us", f"durable item, {words}", durable, "us"),
            Row(f"{name}_cost", "over the plain one", durable / plain, "times", below=bar),
        ]
    return rows


async def idle_rows(server: Server, readers: Helper, valkey: Valkey | None, users: int) -> list[Row]:
    """Measure the memory of runs whose readers have left."""
    (_, *processes), runs = family(server.pid), users * RUNS_PER_USER
    coordinator, owners = (processes[:1], processes[1:]) if processes else ([], [server.pid])
    await readers.call("open")
    await asyncio.sleep(SETTLE_S)
    before, kept = (sum(map(private_bytes, pids)) for pids in (owners, coordinator))
    stored = valkey_bytes(valkey) if valkey else 0
    await readers.call("leave", RUNS_PER_USER)
    await asyncio.sleep(SETTLE_S)
    owner = (sum(map(private_bytes, owners)) - before) / runs / KIB
    rows = [
        Row("idle", "idle runs", runs),
        Row("idle_kib", "memory of each in its process", owner, "KiB", below=MAX_OWNER_KIB),
    ]
    if coordinator:
        in_coordinator = (sum(map(private_bytes, coordinator)) - kept) / runs / KIB
        rows.append(Row("coordinator_kib", "memory of each in the coordinator", in_coordinator, "KiB"))
    if valkey:
        in_valkey = (valkey_bytes(valkey) - stored) / runs / KIB
        rows.append(Row("valkey_kib", "memory of each in Valkey", in_valkey, "KiB", below=MAX_VALKEY_KIB))
    return rows


async def measure_one(kind: str, folder: Path, runs: int) -> list[Row]:
    """Return the figures of one kind of server."""
    workers, bar = KINDS[kind]
    users = -(-runs // RUNS_PER_USER)
    settings = {**room_for(users + READERS), **ECDSA_ONLY, "server.workers": workers}
    stage = Stage(folder / "home", settings)
    stage.make_certificates()
    reading, leaving = stage.add_users("reader", READERS), stage.add_users("idle", users)
    where = stage.ca_file
    with (
        store_of(kind, folder) as valkey,
        stage.serve(valkey.url if valkey else "memory", None, APP) as server,
    ):
        async with Helper(RunReaders, server.port, where, reading) as readers:
            await readers.call("open")
            rows = await item_rows(server, readers, bar)
        async with Helper(RunReaders, server.port, where, leaving) as readers:
            return rows + await idle_rows(server, readers, valkey, users)


async def measure(folder: Path, runs: int, kinds: tuple[str, ...]) -> Report:
    columns = {}
    load = os.getloadavg()[0]
    for kind in kinds:
        progress(f"{kind} ...")
        (folder / kind).mkdir(parents=True)
        columns[kind] = await measure_one(kind, folder / kind, runs)
    return Report(columns, notes=[f"load average: {load:.2f}"])


@measurement
@click.option("--runs", type=COUNT, default=10_000, show_default=True, help="Idle runs.")
@click.option(
    "--only", "kinds", type=click.Choice([*KINDS]), multiple=True, help="One kind; may be repeated."
)
def command(runs: int, kinds: tuple[str, ...]) -> Report:
    if not os.path.exists("/proc/self/smaps_rollup"):
        raise ConfigError(["costs of durable runs need Linux: they read the server's memory and CPU time"])
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(measure(home.path / "stage", runs, kinds or (*KINDS,)))
