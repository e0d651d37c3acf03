"""What sessions in Valkey or Redis cost: openings a second, memory on the server, and how soon others know.

    python -m bench.micro.session_opening_valkey [--program valkey-server] [--sessions 50000] [--concurrency 64]
        [--fsync always|everysec|no] [--folder DIR] [--json FILE]

It starts a server of its own, on a Unix socket in a folder that is gone afterwards (`--folder` says on which disk).
With `always`, an opening is on that disk when it returns.

- An opening is what a server does for `session.open` but for TLS and the proof of the user, as in session_opening.
- Memory is what the server counts as used by its data with the sessions open, above the same without.
- A revocation is made through one store; the clock runs until another one, with a connection of its own, has told
  of it. All of this process shares two processors with the server.
- Cleaning removes sessions past their time, 2,000 in a slice.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import subprocess
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import redis.asyncio

from bench.micro.session_opening import ALONE, NS_PER_S, PATIENCE_S, open_sessions
from bench.micro.token_check import NS_PER_MS, Figure, conclude, quantile
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.event_loop import new_event_loop
from zcproto.errors import Code
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.stores.base import Change
from zcproto.stores.sync import EXPIRED_AT_ONCE
from zcproto.stores.valkey.store import ValkeyStore

MIN_OPENINGS: Final = 2_000.0
MAX_NEWS_MS: Final = 1_000.0

REVOCATIONS: Final = 500
START_S: Final = 10.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.session_opening_valkey", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--program", default="valkey-server", help="valkey-server or redis-server")
    parser.add_argument("--sessions", type=int, default=50_000, help="sessions that are opened")
    parser.add_argument("--concurrency", type=int, default=64, help="openings at once")
    parser.add_argument("--fsync", choices=("always", "everysec", "no"), default="always", help="appendfsync")
    parser.add_argument("--folder", type=Path, help="where the server's files are for the time")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.sessions < REVOCATIONS or options.concurrency < 1:
        parser.error(f"at least {REVOCATIONS} sessions and one task are needed")
    if shutil.which(options.program) is None:
        parser.error(f"{options.program} is not installed")
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        server(options.program, Path(folder), options.fsync) as url,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        figures = runner.run(measure(url, options.sessions, options.concurrency))
    return conclude(figures, options.json)


@contextmanager
def server(program: str, folder: Path, fsync: str) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    path = folder / "socket"
    process = subprocess.Popen(
        [
            *(program, "--port", "0", "--unixsocket", str(path), "--dir", str(folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", fsync, "--maxmemory-policy", "noeviction"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_S
        while not _answers(path):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{program} does not start")
            time.sleep(0.01)
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()


def _answers(path: Path) -> bool:
    """Whether a server is there, and not only its socket, which cannot be connected to for a moment."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(START_S)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class Listener:
    """Hears of changes, and notes when."""

    def __init__(self) -> None:
        self.heard_at: dict[bytes, int] = {}
        self.wanted = 0
        self.done = asyncio.Event()

    def __call__(self, change: Change) -> None:
        self.heard_at[change.id] = time.perf_counter_ns()
        if len(self.heard_at) >= self.wanted:
            self.done.set()


async def measure(url: str, sessions: int, concurrency: int) -> list[Figure]:
    latencies, listener = array("Q", [0]) * sessions, Listener()
    store, other = (ValkeyStore(url, timeout=PATIENCE_S) for _ in range(2))
    registry = SessionRegistry(SessionSettings(), system_entropy)
    await store.open(lambda change: None)
    await other.open(listener)
    before = await used_memory(url)
    processor = time.process_time()
    rate = await open_sessions(store, registry, latencies, concurrency)
    processor = time.process_time() - processor
    memory = await used_memory(url) - before
    alone = array("Q", [0]) * ALONE
    await open_sessions(store, registry, alone, 1, first_user=sessions)
    news = await time_news(store, listener)
    cleaned, longest = await clean(store)
    await other.close()
    await store.close()
    ordered = sorted(latencies)
    return [
        Figure("sessions", sessions, ""),
        Figure("openings at once", concurrency, ""),
        Figure("openings a second", rate, "", MIN_OPENINGS, at_least=True),
        Figure("this process's part of one", processor / sessions * 1e6, "us"),
        Figure("opening, p50", quantile(ordered, 0.5) / 1e3, "ms"),
        Figure("opening, p99", quantile(ordered, 0.99) / 1e3, "ms"),
        Figure("opening, longest", ordered[-1] / NS_PER_MS, "ms"),
        Figure("opening with no other, p50", quantile(sorted(alone), 0.5) / 1e3, "ms"),
        Figure("memory on the server, a session", memory / sessions, "B"),
        Figure("revocation known to another, p50", quantile(news, 0.5) / 1e3, "ms"),
        Figure("revocation known, longest", news[-1] / NS_PER_MS, "ms", MAX_NEWS_MS),
        Figure("sessions cleaned away a second", cleaned, ""),
        Figure("longest slice", longest, "ms"),
    ]


async def used_memory(url: str) -> int:
    """Bytes that the server uses, but for what its connections take."""
    async with redis.asyncio.Redis.from_url(url) as client:
        memory = await client.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


async def time_news(store: ValkeyStore, listener: Listener) -> list[int]:
    """Nanoseconds from the asking for each of some revocations to the news of it elsewhere, sorted."""
    records = (await store.list())[:REVOCATIONS]
    listener.wanted = len(records)
    asked_at = {}
    for record in records:
        asked_at[record.id] = time.perf_counter_ns()
        await store.end([record.id], Code.TOKEN_REVOKED, system_clock.wall())
    async with asyncio.timeout(PATIENCE_S):
        await listener.done.wait()
    return sorted(listener.heard_at[id] - at for id, at in asked_at.items())


async def clean(store: ValkeyStore) -> tuple[float, float]:
    """Remove all sessions as past their time; how many a second, and the longest slice in milliseconds."""
    settings = SessionSettings()
    wall = system_clock.wall() + settings.refresh_lifetime_ms + settings.lifetime_ms
    removed, longest, begin = 0, 0, time.perf_counter_ns()
    while True:
        slice_begin = time.perf_counter_ns()
        once = await store.expire(wall, settings.dead_keep_ms, EXPIRED_AT_ONCE)
        if not once:
            break
        removed += once
        longest = max(longest, time.perf_counter_ns() - slice_begin)
    duration = time.perf_counter_ns() - begin
    assert await store.count() == 0
    return removed / (duration / NS_PER_S), longest / NS_PER_MS


if __name__ == "__main__":
    raise SystemExit(main())
