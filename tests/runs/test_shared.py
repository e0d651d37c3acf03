"""Runs in a shared store that loses answers, wake-ups and, in a failover, what a replica did not have."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from tests.helpers import until
from tests.runs.contract import LIMITS, info_of
from zcproto.errors import NotFound, OutOfRange, ResourceExhausted, Unavailable
from zcproto.runs import shared
from zcproto.runs.log import KNOWN_S, RUN_BYTES, Opening, RunKey, RunLimits, RunTable, Superseded
from zcproto.runs.shared import SharedRuns

KEY = RunKey("ada", "one")
INFO = info_of(0)
ITEMS = 30


class Store:
    """A table that processes share, and what its replica has."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.table = RunTable(LIMITS, may_lag=True)
        self.replica = deepcopy(self.table)
        self.carriers: list[LossyCarrier] = []
        self.faults = 0.1

    def replicate(self) -> None:
        self.replica = deepcopy(self.table)

    def fail_over(self) -> None:
        self.table = deepcopy(self.replica)
        for each in self.carriers:
            each.cut()


class LossyCarrier:
    """One process's way to the store. It loses requests and answers, and all wake-ups."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.absent: set[str] = set()
        self.process: SharedRuns
        store.carriers.append(self)

    async def start(self, runs: SharedRuns) -> None:
        self.process = runs
        runs.up()

    async def stop(self) -> None: ...

    def cut(self) -> None:
        self.process.down()
        self.process.up()

    def __getattr__(self, name: str) -> Any:
        async def operation(*arguments: Any) -> Any:
            await asyncio.sleep(0)
            store = self.store
            if store.chance.random() < store.faults:
                self.cut()
                raise Unavailable("the request was lost")
            if name == "append":
                key, info, *rest, taken = arguments
                arguments = (key, info.generation, *rest, 0.0, taken)
            elif name in ("open", "restore", "detach", "forget"):
                arguments = (*arguments, 0.0)
            result = deepcopy(getattr(store.table, name)(*arguments))
            if store.chance.random() < store.faults:
                self.cut()
                raise Unavailable("the answer was lost")
            await asyncio.sleep(0)
            return result

        return operation

    async def missing(self, processes: Collection[str]) -> set[str]:
        return self.absent & {*processes}

    async def restored(self, known: Iterable[RunKey]) -> None: ...
    def reconfigure(self, limits: RunLimits) -> None: ...
    def watch(self, key: RunKey) -> None: ...
    def unwatch(self, key: RunKey) -> None: ...


async def process_of(store: Store, name: str, limits: RunLimits = LIMITS) -> SharedRuns:
    runs = SharedRuns(LossyCarrier(store), limits, name)
    await runs.start()
    return runs


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lost operations be repeated at once, and readers read again without a wake-up."""
    monkeypatch.setattr(shared, "_FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(shared, "_LONGEST_PAUSE_S", 0.0)


def opening(attachment: str, position: int = 0, *, starts: bool = False) -> Opening:
    return Opening("chat", b"digest", position, attachment, False, INFO if starts else None)


class Reader:
    """A client that attaches at any process, again and again, and keeps what it has read."""

    def __init__(self, processes: list[SharedRuns], chance: random.Random) -> None:
        self.processes = processes
        self.chance = chance
        self.got: list[bytes] = []
        self.attachments = 0

    async def run(self) -> tuple[int, bytes]:
        while True:
            self.attachments += 1
            process, name = self.chance.choice(self.processes), f"a{self.attachments}"
            try:
                await process.open(KEY, opening(name, len(self.got)))
                while self.chance.random() > 0.05:
                    state, bodies = await process.read(KEY, name, len(self.got), 4, 1 << 20)
                    self.got += bodies
                    if state.end is not None and not bodies:
                        return state.end
                    if self.chance.random() < 0.5:
                        await process.take(KEY, name, len(self.got))
                await process.detach(KEY, name)
            except (Unavailable, Superseded, NotFound):
                await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(40))
async def test_reader_gets_each_item_once_whatever_the_store_loses(seed: int) -> None:
    chance = random.Random(seed)
    store = Store(chance)
    processes = [await process_of(store, f"p{number}") for number in range(3)]
    owner, others = processes[0], processes[1:]
    while True:
        try:
            assert (await owner.open(KEY, opening("a0", starts=True)))[0]
            break
        except Unavailable:
            await asyncio.sleep(0)
    reader = Reader([*others, owner], chance)

    async def produce() -> None:
        position = 0
        while position < ITEMS:
            bodies = [b"%d" % each for each in range(position, min(ITEMS, position + chance.randint(1, 3)))]
            state = await owner.append(KEY, INFO.generation, position, bodies, None)
            position += len(bodies)
            while state is not None and state.is_full:
                await asyncio.sleep(0)
                state = await owner.append(KEY, INFO.generation, position, [], None)
            assert state is not None
        assert await owner.append(KEY, INFO.generation, position, [], (0, b"end"))

    async def disturb() -> None:
        for _ in range(40):
            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            (store.fail_over if chance.random() < 0.3 else store.replicate)()
        store.faults = 0.0

    disturbing, producing = asyncio.create_task(disturb()), asyncio.create_task(produce())
    assert await reader.run() == (0, b"end")
    await asyncio.gather(disturbing, producing)
    assert reader.got == [b"%d" % number for number in range(ITEMS)]
    for each in processes:
        await each.stop()


async def test_taken_items_are_reported_again_after_the_owner_has_repaired_the_log() -> None:
    """Otherwise a method that waits for room would wait for ever."""
    store = Store(random.Random(0))
    store.faults = 0.0
    owner, other = await process_of(store, "p0"), await process_of(store, "p1")
    await owner.open(KEY, opening("a", starts=True))
    await other.open(KEY, opening("b"))
    store.replicate()
    await owner.append(KEY, INFO.generation, 0, [b"0", b"1"], None)
    await other.take(KEY, "b", 2)
    store.table = deepcopy(store.replica)
    for carrier in reversed(store.carriers):  # the owner is the last one to notice the failover
        carrier.cut()
        for _ in range(20):
            await asyncio.sleep(0)
    await other.read(KEY, "b", 2, 1, 1)
    state, _ = await other.read(KEY, "b", 2, 1, 1)
    assert (state.next, state.taken) == (2, 2)
    for each in (owner, other):
        await each.stop()


async def test_lost_owner_and_lost_reader_are_found_after_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "CHECK_S", 0.0)
    store = Store(random.Random(0))
    store.faults = 0.0
    first, second = await process_of(store, "p0"), await process_of(store, "p1")
    await first.open(KEY, opening("a", starts=True))
    await second.open(KEY, opening("b"))
    store.carriers[0].absent = {"p1"}
    for _ in range(20):
        await asyncio.sleep(0)
    assert store.table.runs()[0][1].is_attached
    monkeypatch.setattr(shared, "LOST_S", 0.0)
    while store.table.runs()[0][1].is_attached:
        await first.append(KEY, INFO.generation, 0, [], None)
    store.carriers[1].absent = {"p0"}
    await second.runs("ada")
    await until(lambda: store.table.runs()[0][1].end is not None)
    assert store.table.runs()[0][1].end == shared.owner_lost(0)
    assert await first.append(KEY, INFO.generation, 0, [b"late"], None) is None
    for each in (first, second):
        await each.stop()


async def test_copies_are_bounded_and_refuse_new_runs_alone() -> None:
    store = Store(random.Random(0))
    store.faults = 0.0
    runs = await process_of(store, "p0", RunLimits(total_bytes=RUN_BYTES + 100))
    await runs.open(KEY, opening("a", starts=True))
    await runs.append(KEY, INFO.generation, 0, [b"x" * 100], None)
    with pytest.raises(ResourceExhausted):
        await runs.open(RunKey("bob", "one"), opening("b", starts=True))
    runs.reconfigure(RunLimits(total_bytes=RUN_BYTES + 200))
    await runs.open(RunKey("bob", "one"), opening("b", starts=True))
    state = await runs.append(KEY, INFO.generation, 1, [b"y"], None)
    assert state is not None
    assert state.next == 2
    await runs.stop()
    with pytest.raises(Unavailable):
        await runs.read(KEY, "b", 0, 1, 1)


async def test_owner_reads_its_copies_until_another_process_changes_the_run() -> None:
    store = Store(random.Random(0))
    store.faults = 0.0
    first, second = await process_of(store, "p0"), await process_of(store, "p1")
    await first.open(KEY, opening("a", starts=True))
    await first.append(KEY, INFO.generation, 0, [b"x" * 10] * 3, None)
    store.faults = 1.0  # an operation would be repeated for ever
    state, bodies = await first.read(KEY, "a", 1, 2, 1)
    assert (state.next, bodies) == (3, [b"x" * 10])
    assert await first.read(KEY, "a", 3, 2, 100) == (state, [])
    store.faults = 0.0
    await second.open(KEY, opening("b"))
    first.woken(KEY)
    with pytest.raises(Superseded):
        await first.read(KEY, "a", 1, 2, 100)
    await first.append(KEY, INFO.generation, 3, [b"y"], None)
    with pytest.raises(Superseded):
        await first.read(KEY, "a", 3, 2, 100)
    await first.stop()
    await second.stop()


async def test_what_the_own_reader_has_taken_is_recorded_by_the_next_append() -> None:
    store, woken = Store(random.Random(0)), list[int]()
    store.faults = 0.0
    runs = await process_of(store, "p0")
    await runs.open(KEY, opening("a", starts=True))
    full = await runs.append(KEY, INFO.generation, 0, [b"x"] * LIMITS.items, None)
    assert full is not None
    assert full.is_full
    runs.watch(KEY, lambda: woken.append(1))
    await runs.take(KEY, "a", 4)
    assert woken, "the owner may append again"
    assert store.table.runs()[0][1].taken == 0
    state = await runs.append(KEY, INFO.generation, LIMITS.items, [], None)
    assert state is not None
    assert (state.taken, state.is_full) == (4, False)
    await runs.append(KEY, INFO.generation, LIMITS.items, [], (0, b"end"))
    await runs.take(KEY, "a", LIMITS.items)
    assert store.table.runs()[0][1].taken == LIMITS.items, "no append follows"
    await runs.stop()


async def test_run_and_its_params_count_until_the_copy_of_its_end_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, other = Store(random.Random(0)), RunKey("bob", "one")
    store.faults = 0.0
    runs = await process_of(store, "p0", RunLimits(total_bytes=RUN_BYTES + 1_000))
    await runs.open(KEY, replace(opening("a"), info=replace(INFO, size=1_000)))
    with pytest.raises(ResourceExhausted):
        await runs.open(other, opening("b", starts=True))
    await runs.append(KEY, INFO.generation, 0, [], (0, b"done"))
    runs.sweep()
    assert runs.size == RUN_BYTES + 1_000
    monkeypatch.setattr(shared, "COPY_S", 0.0)
    runs.reconfigure(LIMITS)
    store.table.forget(None, 0.0)
    store.table.sweep(KNOWN_S)
    assert (await runs.open(KEY, opening("a", starts=True)))[0], "the store has lost it"
    assert runs.size == RUN_BYTES
    await runs.append(KEY, INFO.generation, 0, [], (0, b"done"))
    runs.sweep()
    assert runs.size == 0
    await runs.stop()


async def test_deleted_run_of_an_outage_is_deleted_when_the_store_is_back() -> None:
    store = Store(random.Random(0))
    store.faults = 0.0
    runs = await process_of(store, "p0")
    await runs.open(KEY, opening("a", starts=True))
    store.faults = 1.0
    assert await runs.forget("ada") == 0
    store.faults = 0.0
    await until(lambda: not store.table.runs())
    with pytest.raises((NotFound, OutOfRange)):
        await runs.read(KEY, "a", 0, 1, 1)
    await runs.stop()
