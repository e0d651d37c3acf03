"""Several processes on one server: each hears of what the others do, and of nothing that it did itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.stores.contract import (
    DAY,
    EVICT_ONE,
    FIVE,
    KEEP,
    KEEP_ENDED,
    LEASE,
    MINUTE,
    WALL,
    digest,
    rotation,
    session,
)
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, running, until
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.base import Change, ChangeKind, Created, LimitReached, Rotated
from zcproto.stores.valkey.store import ValkeyStore

WITHIN = 1.0
"""Seconds in which a revocation has to be known everywhere."""


@pytest.fixture(params=PROGRAMS, scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with running(request.param, tmp_path_factory.mktemp("server")) as process:
        yield process


class Process:
    """A store as another process has it, and what it was told."""

    def __init__(self, url: str) -> None:
        self.store = ValkeyStore(url, timeout=5.0)
        self.told: list[Change] = []

    def heard_of(self, record: SessionRecord) -> bool:
        return Change(ChangeKind.SESSION, record.id) in self.told


@pytest.fixture
async def both(server: ServerProcess) -> AsyncIterator[tuple[Process, Process]]:
    server.command("FLUSHALL")
    here, there = Process(server.url), Process(server.url)
    for each in (here, there):
        await each.store.open(each.told.append)
    yield here, there
    for each in (here, there):
        await each.store.close()


CHANGES: dict[str, Callable[[ValkeyStore, SessionRecord], Awaitable[object]]] = {
    "end": lambda store, record: store.end([record.id], Code.TOKEN_REVOKED, WALL),
    "end_user": lambda store, record: store.end_user(record.user, Code.TOKEN_REVOKED, WALL),
    "end_all": lambda store, record: store.end_all(Code.TOKEN_REVOKED, WALL),
    "rotate": lambda store, record: store.rotate(rotation(record)),
    "a spent refresh token": lambda store, record: store.rotate(
        rotation(record, spent_digest=digest("spent"))
    ),
    "eviction": lambda store, record: store.create(session(99, record.user), EVICT_ONE),
    "a lapsed one that makes room": lambda store, record: store.create(
        session(99, record.user, WALL + 2 * DAY), EVICT_ONE
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_is_told_to_the_other(both: tuple[Process, Process], change: str) -> None:
    here, there = both
    record = session()
    await here.store.create(record, FIVE)
    assert await there.store.find(record.token_digest) == record
    await CHANGES[change](there.store, record)
    await until(lambda: here.heard_of(record))
    assert await here.store.find(record.token_digest) != record
    assert there.told == []


async def test_what_changes_nothing_for_others_is_not_told(both: tuple[Process, Process]) -> None:
    here, there = both
    record, past = session(), session(2, "bob", expires_at=WALL + 1, refresh_expires_at=WALL + 1)
    await here.store.create(record, FIVE)
    await here.store.create(past, FIVE)
    await there.store.touch([(record.id, WALL + 5)])
    await there.store.create(session(3), FIVE)
    await there.store.find(record.token_digest)
    await there.store.claim("alice", "k", digest("body"), WALL, LEASE)
    await there.store.keep_answer("alice", "k", b"", WALL, KEEP)
    await there.store.end([session(77).id], Code.TOKEN_REVOKED, WALL)
    assert await there.store.expire(WALL + 1, KEEP_ENDED, 10) == 1
    # News come in order: after this one, no others can be on their way.
    await there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
    await until(lambda: here.heard_of(record))
    assert here.told == [Change(ChangeKind.SESSION, record.id)]
    assert there.told == []


async def test_nothing_is_lost_when_both_write_at_once(both: tuple[Process, Process]) -> None:
    """The server tells of a key once for all that happens in one turn of it: nobody's news may hide another's."""
    here, there = both
    records = [session(number, f"user-{number}") for number in range(200)]
    await asyncio.gather(*(here.store.create(record, FIVE) for record in records))
    results = await asyncio.gather(
        *(here.store.rotate(rotation(record)) for record in records),
        *(there.store.end([record.id], Code.TOKEN_REVOKED, WALL) for record in records),
    )
    assert sum(len(result) for result in results[200:]) == 200
    for record, result in zip(records, results[:200], strict=True):
        await until(lambda record=record: here.heard_of(record))
        if isinstance(result, Rotated):
            await until(lambda record=record: there.heard_of(record))
        assert isinstance(await here.store.get(record.id), EndedRecord)


async def test_a_change_during_a_question_is_told_before_the_answer(both: tuple[Process, Process]) -> None:
    """So whoever asks can tell that the answer may be too old."""
    here, there = both
    took = []
    for number in range(100):
        record = session(number, f"user-{number}")
        await here.store.create(record, FIVE)
        found, gone = await asyncio.gather(
            here.store.find(record.token_digest), there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
        )
        assert gone
        if found == record:
            took.append(await until(lambda record=record: here.heard_of(record)))
        else:
            assert isinstance(found, EndedRecord)
    assert sorted([0.0, *took])[len(took) * 9 // 10] < WITHIN


async def test_fifty_that_race_through_two_processes_get_five(both: tuple[Process, Process]) -> None:
    results = await asyncio.gather(
        *(both[number % 2].store.create(session(number), FIVE) for number in range(50))
    )
    assert results.count(Created()) == 5
    assert results.count(LimitReached()) == 45
    assert await both[0].store.list("alice") == await both[1].store.list("alice")
    assert await both[0].store.count() == 5


async def test_of_two_that_refresh_at_once_one_succeeds(both: tuple[Process, Process]) -> None:
    records = [session(number, f"user-{number}") for number in range(20)]
    await asyncio.gather(*(both[0].store.create(record, FIVE) for record in records))
    for record in records:
        results = await asyncio.gather(
            *(each.store.rotate(rotation(record, number)) for number, each in enumerate(both))
        )
        assert sum(isinstance(result, Rotated) for result in results) == 1
        assert isinstance(await both[0].store.get(record.id), EndedRecord)


async def test_of_two_that_claim_one_runs(both: tuple[Process, Process]) -> None:
    here, there = both
    claims = [await each.store.claim("alice", "k", digest("body"), WALL, LEASE) for each in (here, there)]
    assert [claim.state.value for claim in claims] == ["new", "running"]
    assert claims[1].until == WALL + LEASE
    await here.store.keep_answer("alice", "k", b"answer", WALL, KEEP)
    assert (await there.store.claim("alice", "k", digest("body"), WALL, LEASE)).answer == b"answer"


async def test_when_the_connection_is_killed_all_may_have_changed(
    both: tuple[Process, Process], server: ServerProcess
) -> None:
    here, there = both
    record = session()
    await here.store.create(record, FIVE)
    assert server.command("CLIENT", "KILL", "TYPE", "normal") >= 2
    await until(lambda: here.told == there.told == [Change(ChangeKind.ALL)])
    await there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
    await until(lambda: here.heard_of(record))


async def test_news_under_load(both: tuple[Process, Process]) -> None:
    here, there = both
    records = [session(number, f"user-{number}") for number in range(50)]
    await asyncio.gather(*(here.store.create(record, FIVE) for record in records))
    loop = asyncio.get_running_loop()
    busy = True

    async def load(number: int) -> None:
        step = 0
        while busy:
            step += 1
            await here.store.create(session(1000 + 1000 * number + step, f"load-{number}-{step}"), FIVE)

    loads = [loop.create_task(load(number)) for number in range(20)]
    took = []
    for record in records:
        await there.store.end([record.id], Code.TOKEN_REVOKED, WALL + MINUTE)
        took.append(await until(lambda record=record: here.heard_of(record)))
    busy = False
    await asyncio.gather(*loads)
    assert sorted(took)[len(took) * 9 // 10] < WITHIN  # a busy machine may stand still now and then


async def test_one_that_is_closed_hears_nothing(both: tuple[Process, Process]) -> None:
    here, there = both
    await here.store.create(session(), FIVE)
    await here.store.close()
    await there.store.end([session().id], Code.TOKEN_REVOKED, WALL)
    assert await there.store.count() == 0
    assert here.told == []


async def test_two_that_share_a_server_but_no_prefix(server: ServerProcess) -> None:
    stores = [ValkeyStore(server.url, prefix=prefix) for prefix in ("a:", "b:")]
    told: list[Change] = []
    for store in stores:
        await store.open(told.append)
        await store.create(session(), FIVE)
    assert await stores[0].end_all(Code.TOKEN_REVOKED, WALL) == 1
    assert await stores[1].list() == [session()]
    for store in stores:
        await store.close()
    assert told == []
