"""Open sessions durably from two worker processes that share one store, and revoke some on the other worker.

Three processes as with `zcproto serve --workers 2`: one has the file, the others reach it over its UNIX socket. An
opening is what a server does for `session.open` but for TLS and the proof of the user. First both workers open
sessions as fast as they can, then at `--rate` together. Meanwhile one of them revokes sessions that connections of
the other use: the time of a revocation ends when a request on such a connection would be refused. CPU is that of
each process, by its own account.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click

from bench.command import COUNT, FOLDER, measurement
from bench.micro.timing import NS_PER, PER_USER, STORE_TIMEOUT_S, new_registry, time_rows
from bench.report import Row
from zcproto.common.clock import random_fraction, system_clock, system_entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.process import new_event_loop
from zcproto.common.unix_socket import listen_unix
from zcproto.sessions import EndReason
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.service import StoredSessionService
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.sync import StoreSync
from zcproto.workers.hub import StoreHub
from zcproto.workers.link import LinkClient, LinkServer, Topics
from zcproto.workers.remote_store import RemoteStore, StoreServer

MIN_OPENINGS: Final = 6_000.0
MAX_REVOCATION_MS: Final = 50.0
WORKERS: Final = 2

_TURN_S: Final = 0.01
_REVOKE_EACH_S: Final = 0.02
_SETTLE_S: Final = 1.0
_CONNECT_S: Final = 30.0

Command = tuple[str, dict[str, Any]]


# --- the process with the store --------------------------------------------------------------------------


async def serve_store(folder: Path, pipe: Connection) -> None:
    """Serve a store until the pipe says so; then send the CPU seconds that it took."""
    store = SqliteStore(folder / "home" / "sessions.db", timeout=STORE_TIMEOUT_S)
    hub = StoreHub(store, is_lasting=True, now=system_clock.now, entropy=system_entropy)
    server = LinkServer(listen_unix(folder / "link.sock", WORKERS), Topics(), name="store")
    StoreServer(hub).serve(server)
    await hub.open()
    await server.start()
    pipe.send(None)
    while (await asyncio.to_thread(pipe.recv))[0] == "cpu":
        pipe.send(time.process_time())
    await server.close()
    await hub.close()


# --- workers -----------------------------------------------------------------------------------------------


class Worker:
    """The sessions of one worker, without connections. `used` are the sessions that it is said to have."""

    def __init__(self, folder: Path, number: int) -> None:
        path, name = folder / "link.sock", f"worker {number}"
        self.number = number
        self.opened = 0
        self.used: set[str] = set()
        self.refused: dict[str, int] = {}
        self.registry = new_registry()
        self.registry.observers.append(self._ended)
        self.calls = LinkClient(
            path,
            Topics(),
            name=name,
            silence=STORE_TIMEOUT_S,
            random=partial(random_fraction, system_entropy),
        )
        self.sync = StoreSync(
            RemoteStore(path, self.calls, name=name, silence=STORE_TIMEOUT_S, entropy=system_entropy),
            self.registry,
            PendingRevocations(folder / f"revocations.{number}"),
            is_used=self.used.__contains__,
            in_use=lambda: self.used,
            wheel=DeadlineWheel(asyncio.get_running_loop()),
            clock=system_clock,
            random=partial(random_fraction, system_entropy),
            timeout=STORE_TIMEOUT_S,
            grace=60.0,
            keep_ended_ms=self.registry.settings.dead_keep_ms,
        )
        self.sessions = StoredSessionService(self.sync, system_clock)

    def _ended(self, session_id: str, code: object, reason: object) -> None:
        self.refused[session_id] = time.monotonic_ns()

    async def open(self) -> str:
        number = self.opened
        self.opened += 1
        opened = await self.sessions.open(
            f"user-{self.number}-{number // PER_USER}", client="bench/1", address="127.0.0.1"
        )
        return opened.session.id

    # --- commands ----------------------------------------------------------------------------------

    async def open_fast(self, sessions: int, at_once: int) -> dict[str, Any]:
        """Open sessions by so many tasks, one after the other each."""
        numbers, durations = iter(range(sessions)), list[int]()

        async def work() -> None:
            for _ in numbers:  # shared by all
                begin = time.perf_counter_ns()
                await self.open()
                durations.append(time.perf_counter_ns() - begin)

        cpu, begin = time.process_time(), time.monotonic_ns()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return {"ns": durations, "begin": begin, "end": time.monotonic_ns(), "cpu": time.process_time() - cpu}

    async def open_used(self, sessions: int) -> list[str]:
        """Open sessions that connections of this worker use."""
        ids = [await self.open() for _ in range(sessions)]
        self.used.update(ids)
        return ids

    async def open_paced(self, rate: float, seconds: float, revoke: list[str]) -> dict[str, Any]:
        """Open sessions at a rate and revoke others meanwhile. Return how many were opened and when each was."""
        revoking = asyncio.ensure_future(self._revoke(revoke))
        opening, due, begin = set[asyncio.Task[str]](), 0, time.perf_counter()
        while (passed := time.perf_counter() - begin) < seconds:
            while due < rate * passed:
                due += 1
                task = asyncio.ensure_future(self.open())
                opening.add(task)
                task.add_done_callback(opening.discard)
            await asyncio.sleep(_TURN_S)
        await asyncio.gather(*opening)
        passed = time.perf_counter() - begin
        return {"rate": due / passed, "revoked": await revoking}

    async def refused_at(self) -> dict[str, int]:
        """Return when each session ended here."""
        await asyncio.sleep(_SETTLE_S)
        return self.refused

    async def _revoke(self, ids: list[str]) -> dict[str, int]:
        revoked = {}
        for session_id in ids:
            revoked[session_id] = time.monotonic_ns()
            assert await self.sessions.revoke(session_id, user=None, reason=EndReason.BY_OPERATOR)
            await asyncio.sleep(_REVOKE_EACH_S)
        return revoked


async def work(folder: Path, number: int, pipe: Connection) -> None:
    """Do the commands that come through the pipe, until one is empty."""
    worker = Worker(folder, number)
    worker.calls.start()
    await worker.calls.ready(_CONNECT_S)
    await worker.sync.start()
    pipe.send(None)
    while True:
        name, options = await asyncio.to_thread(pipe.recv)
        if not name:
            break
        pipe.send(await getattr(worker, name)(**options))
    await worker.sync.stop()
    await worker.calls.close()


def run_process(main: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main(*arguments))


# --- the measurement ---------------------------------------------------------------------------------------


class Processes:
    """The three processes, each with a pipe."""

    def __init__(self, folder: Path) -> None:
        self._context = get_context("spawn")
        self._processes: list[Any] = []
        self.store = self._start(serve_store, folder)
        self.workers = [self._start(work, folder, number) for number in range(WORKERS)]

    def _start(self, main: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=run_process, args=(main, *arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        ours.recv()  # it is ready
        return ours

    def all_do(self, *commands: Command) -> list[Any]:
        """Have each worker do its command at the same time, and return what they send."""
        for pipe, command in zip(self.workers, commands, strict=True):
            pipe.send(command)
        return [pipe.recv() for pipe in self.workers]

    def store_cpu(self) -> float:
        self.store.send(("cpu", {}))
        cpu: float = self.store.recv()
        return cpu

    def stop(self) -> None:
        store, *workers = self._processes
        for pipe in self.workers:
            pipe.send(("", {}))
        for process in workers:
            process.join()
        self.store.send(("", {}))
        store.join()


def measure(
    folder: Path, sessions: int, at_once: int, rate: float, seconds: float, revocations: int
) -> list[Row]:
    processes = Processes(folder)
    each = sessions // WORKERS
    before = processes.store_cpu()
    fast = processes.all_do(*[("open_fast", {"sessions": each, "at_once": at_once // WORKERS})] * WORKERS)
    cpu = processes.store_cpu() - before
    span = max(each["end"] for each in fast) - min(each["begin"] for each in fast)
    _, used = processes.all_do(("open_used", {"sessions": 0}), ("open_used", {"sessions": revocations}))
    options = {"rate": rate / WORKERS, "seconds": seconds}
    paced = processes.all_do(
        ("open_paced", {**options, "revoke": used}), ("open_paced", {**options, "revoke": []})
    )
    _, refused = processes.all_do(*[("refused_at", {})] * WORKERS)
    processes.stop()
    asked = paced[0]["revoked"]
    missing = len(asked.keys() - refused.keys())
    assert not missing, f"{missing} of {len(asked)} revocations were not applied on the other worker"
    took = [refused[id] - asked[id] for id in asked]
    durations = [ns for each in fast for ns in each["ns"]]
    return [
        Row("sessions", "sessions", len(durations)),
        Row("at_once", "openings at once", at_once),
        Row(
            "rate",
            "durable openings a second",
            len(durations) / (span / NS_PER["s"]),
            at_least=MIN_OPENINGS,
        ),
        *time_rows("opening", "opening", durations, "ms", "p50", "p99", "longest"),
        Row("store_cpu_us", "CPU of the store's process, each", cpu * 1e6 / len(durations), "us"),
        Row(
            "worker_cpu_us",
            "CPU of a worker, each",
            sum(each["cpu"] for each in fast) * 1e6 / len(durations),
            "us",
        ),
        Row("paced_rate", "openings a second meanwhile", sum(each["rate"] for each in paced)),
        Row("revocations", "revocations", len(took)),
        *time_rows(
            *(
                "revocation",
                "revocation, until refused on the other worker",
                took,
                "ms",
                "p50",
                "p99",
                "longest",
            ),
            below={"p99": MAX_REVOCATION_MS},
        ),
    ]


@measurement
@click.option("--sessions", type=COUNT, default=40_000, show_default=True, help="Opened as fast as possible.")
@click.option("--concurrency", type=COUNT, default=128, show_default=True, help="Openings at once.")
@click.option("--rate", type=COUNT, default=5_000, show_default=True, help="Openings a second meanwhile.")
@click.option("--revocations", type=COUNT, default=250, show_default=True, help="Sessions that are revoked.")
@click.option("--folder", type=FOLDER, help="Where the file is meanwhile; else a temporary folder.")
def command(sessions: int, concurrency: int, rate: int, revocations: int, folder: Path | None) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="zcproto-bench-", dir=folder) as made:
        seconds = revocations * _REVOKE_EACH_S
        return measure(Path(made), sessions, concurrency, rate, seconds, revocations)
