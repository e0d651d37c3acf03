"""Durable runs of several workers over real links to a coordinator, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.runs.contract import LIMITS, agree, info_of
from tests.stores.valkey.server_process import until
from zcproto.common.unix_socket import listen_unix
from zcproto.errors import Code, NotFound, Unavailable
from zcproto.runs import shared
from zcproto.runs.log import Opening, RunKey, RunState, Superseded
from zcproto.runs.shared import LOST_S, SharedRuns
from zcproto.workers.link import LinkServer, Topics
from zcproto.workers.runs import RunHub, WorkerRuns

KEY = RunKey("ada", "one")
INFO = info_of(0)
MANY = 100, 1 << 20


class Fleet:
    """A coordinator, whose time is `now`, and the runs of workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        self.workers: list[SharedRuns] = []

    async def start(self, workers: int = 2) -> None:
        self.hub = RunHub(LIMITS, workers, lambda: self.now)
        self.server = LinkServer(listen_unix(self.path, 16), Topics(), name="coordinator")
        self.hub.serve(self.server)
        await self.server.start()
        while len(self.workers) < workers:
            await self.add_worker()
        await until(lambda: all(worker.is_up for worker in self.workers))

    async def add_worker(self) -> None:
        name = f"worker{len(self.workers)}"
        carrier = WorkerRuns(self.path, name, name=name, silence=TIMEOUT, random=lambda: 0.0)
        self.workers.append(SharedRuns(carrier, LIMITS, name))
        await self.workers[-1].start()

    async def replace_coordinator(self) -> None:
        await self.server.close()
        await until(lambda: not any(worker.is_up for worker in self.workers))
        await self.start(len(self.workers))


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path / "link.sock")
    await fleet.start()
    yield fleet
    for worker in fleet.workers:
        await worker.stop()
    await fleet.server.close()


def opening(attachment: str = "first", position: int = 0, *, starts: bool = True) -> Opening:
    return Opening("chat", b"digest", position, attachment, False, INFO if starts else None)


async def items(worker: SharedRuns, attachment: str, position: int = 0) -> list[bytes]:
    return [*(await worker.read(KEY, attachment, position, *MANY))[1]]


async def put(
    worker: SharedRuns, first: int, *bodies: bytes, end: tuple[int, bytes] | None = None
) -> RunState:
    state = await worker.append(KEY, INFO.generation, first, bodies, end)
    assert state is not None
    return state


@pytest.mark.parametrize("seed", range(5))
async def test_random_operations_have_the_answers_of_the_table(tmp_path: Path, seed: int) -> None:
    fleet = Fleet(tmp_path / "link.sock")
    await fleet.start(0)
    carrier = WorkerRuns(fleet.path, "p", name="p", silence=TIMEOUT, random=lambda: 0.0)
    runs = SharedRuns(carrier, LIMITS, "p")
    await runs.start()
    await until(lambda: runs.is_up)
    assert await agree(carrier, seed, 600) > 100
    await runs.stop()
    await fleet.server.close()


async def test_run_of_one_worker_is_read_in_another(fleet: Fleet) -> None:
    first, second = fleet.workers
    is_new, _ = await first.open(KEY, opening())
    await put(first, 0, b"a", b"b")
    assert is_new
    woken = asyncio.Event()
    first.watch(KEY, woken.set)
    await until(lambda: len(fleet.hub._watched) == 1)
    is_new, state = await second.open(KEY, opening("second", 1, starts=False))
    assert (is_new, state.next) == (False, 2)
    assert await items(second, "second", 1) == [b"b"]
    await woken.wait()
    with pytest.raises(Superseded):
        await items(first, "first")


async def test_workers_that_watch_a_run_are_woken(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    woken, cancelled = asyncio.Event(), asyncio.Event()
    second.watch(KEY, woken.set)
    first.watch(KEY, cancelled.set)
    await until(lambda: len(fleet.hub._watched) == 1)  # no operation shows that a notice has arrived
    await put(first, 0, b"a")
    await woken.wait()
    cancelled.clear()
    await second.cancel(KEY, "caller")
    await cancelled.wait()
    assert (await put(first, 1)).cancel == "caller"
    second.unwatch(KEY, woken.set)
    first.unwatch(KEY, cancelled.set)
    await until(lambda: not fleet.hub._watched)


async def test_new_coordinator_gets_runs_attachments_and_what_was_taken(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await put(first, 0, b"a", b"b", b"c")
    await second.open(KEY, opening("second", 0, starts=False))
    await second.take(KEY, "second", 1)
    await put(first, 3)
    await fleet.replace_coordinator()
    assert await items(second, "second", 1) == [b"b", b"c"]
    with pytest.raises(Superseded):
        await items(first, "first", 1)
    state = await put(first, 3, b"d", end=(0, b"done"))
    assert (state.first, state.taken, state.next, state.end) == (1, 1, 4, (0, b"done"))
    assert await items(second, "second", 3) == [b"d"]


async def test_owner_appends_while_the_coordinator_is_away(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await put(first, 0, b"a")
    await fleet.server.close()
    await until(lambda: not first.is_up)
    appending = asyncio.create_task(put(first, 1, b"b"))
    reading = asyncio.create_task(items(first, "first", 1))
    with pytest.raises(Unavailable):
        await second.open(RunKey("ada", "other"), opening())
    await fleet.start()
    assert (await appending).next == 2
    assert await reading in ([], [b"b"])
    assert await items(first, "first", 0) == [b"a", b"b"]


async def test_ended_run_is_not_started_again_by_a_new_coordinator(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await put(first, 0, b"a", end=(0, b"done"))
    await fleet.replace_coordinator()
    is_new, state = await second.open(KEY, Opening("chat", b"digest", 0, "again", False, info_of(1)))
    assert (is_new, state.end) == (False, (0, b"done"))
    loop = asyncio.get_running_loop()
    first._owned[KEY].forget_at = loop.time()  # instead of waiting for COPY_S
    first.sweep()
    await fleet.replace_coordinator()

    async def is_refused() -> bool:
        try:
            await second.open(KEY, Opening("chat", b"digest", 0, "third", False, info_of(2)))
        except NotFound:
            return True
        except Unavailable:
            return False
        raise AssertionError("it was started again")

    await until(is_refused)


async def test_unknown_run_is_awaited_until_all_workers_are_back(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await fleet.server.close()
    await until(lambda: not first.is_up)
    await first.stop()
    fleet.workers.remove(first)
    await fleet.start(1)
    fleet.hub._workers = 2
    with pytest.raises(Unavailable):
        await second.open(RunKey("ada", "other"), opening())
    fleet.now = LOST_S
    assert (await second.open(RunKey("ada", "other"), opening()))[0]


async def test_lost_worker_ends_its_runs_once_after_the_grace(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await put(first, 0, b"a")
    await second.open(KEY, opening("second", 0, starts=False))
    await first._carrier.stop()  # it is killed: nothing is flushed
    await until(lambda: len(fleet.server.links) == 1)
    fleet.hub.sweep()
    fleet.now = LOST_S - 1
    fleet.hub.sweep()
    assert (await second.read(KEY, "second", 0, *MANY))[0].end is None
    fleet.now = LOST_S
    fleet.hub.sweep()
    state, bodies = await second.read(KEY, "second", 0, *MANY)
    assert bodies == [b"a"]
    assert state.end == shared.owner_lost(1)
    assert state.end[0] == Code.UNKNOWN


async def test_attachment_of_a_lost_worker_ends(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    await second.open(KEY, opening("second", 0, starts=False))
    await second.stop()
    await until(lambda: len(fleet.server.links) == 1)
    fleet.hub.sweep()
    assert (await put(first, 0)).is_attached
    fleet.now = LOST_S
    fleet.hub.sweep()
    assert not (await put(first, 0)).is_attached


async def test_forgotten_run_is_not_written_back(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    assert await second.forget("ada") == 1
    assert await first.append(KEY, INFO.generation, 0, [b"a"], None) is None
    assert await second.runs("ada") == []
    assert first.size == 0


async def test_opening_that_was_cut_leaves_a_run_with_an_end(fleet: Fleet) -> None:
    first, second = fleet.workers
    starting = asyncio.create_task(first.open(KEY, opening()))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    async def has_ended() -> bool:
        return [state.end for _, state in await second.runs("ada")] == [shared.owner_lost(0)]

    await until(has_ended)


async def test_process_ends_a_run_that_names_it_and_that_it_does_not_run(fleet: Fleet) -> None:
    first, second = fleet.workers
    await first.open(KEY, opening())
    del first._owned[KEY]  # as if the store had lost the end after the owner has forgotten the run
    await second.open(KEY, opening("second", 0, starts=False))
    await first.runs("ada")
    await until(lambda: fleet.hub.table.runs("ada")[0][1].end == shared.owner_lost(0))


async def test_copies_are_dropped_once_they_were_taken(fleet: Fleet) -> None:
    first, _ = fleet.workers
    await first.open(KEY, opening())
    empty = first.size
    await put(first, 0, b"a" * 100, b"b" * 100)
    assert first.size == empty + 2 * 164
    await first.take(KEY, "first", 1)
    await put(first, 2)
    assert first.size == empty + 164
