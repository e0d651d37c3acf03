"""Several processes on one server: each gets the changes of the others, and none of its own."""

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
from tests.stores.valkey.server_process import VALKEY_FIRST, ServerProcess, running, until
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.base import Change, ChangeKind, Created, LimitReached
from zcproto.stores.valkey.store import ValkeyStore


@pytest.fixture(params=VALKEY_FIRST, scope="module")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with running(request.param, tmp_path_factory.mktemp("server")) as process:
        yield process


class Process:
    """A store like one in another process, and the changes reported to it."""

    def __init__(self, url: str) -> None:
        self.store = ValkeyStore(url)
        self.changes: list[Change] = []

    def is_reported(self, record: SessionRecord) -> bool:
        return Change(ChangeKind.SESSION, record.id) in self.changes


@pytest.fixture
async def both(server: ServerProcess) -> AsyncIterator[tuple[Process, Process]]:
    server.command("FLUSHALL")
    here, there = Process(server.url), Process(server.url)
    for each in (here, there):
        await each.store.open(each.changes.append)
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
async def test_change_is_reported_to_the_other_process(both: tuple[Process, Process], change: str) -> None:
    here, there = both
    record = session()
    await here.store.create(record, FIVE)
    assert await there.store.find(record.token_digest) == record
    await CHANGES[change](there.store, record)
    await until(lambda: here.is_reported(record))
    assert await here.store.find(record.token_digest) != record
    assert there.changes == []


async def test_operations_without_effect_on_others_are_not_reported(both: tuple[Process, Process]) -> None:
    here, there = both
    record, past = session(), session(2, "bob", expires_at=WALL + 1, refresh_expires_at=WALL + 1)
    await here.store.create(record, FIVE)
    await here.store.create(past, FIVE)
    await there.store.touch([(record.id, WALL + 5)])
    await there.store.create(session(3), FIVE)
    await there.store.find(record.token_digest)
    await there.store.claim("alice", "k", digest("body"), LEASE)
    await there.store.keep_answer("alice", "k", b"", KEEP)
    await there.store.end([session(77).id], Code.TOKEN_REVOKED, WALL)
    assert await there.store.expire(WALL + 1, KEEP_ENDED, 10) == 1
    # Changes come in order: after this one no earlier one can follow.
    await there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
    await until(lambda: here.is_reported(record))
    assert here.changes == [Change(ChangeKind.SESSION, record.id)]
    assert there.changes == []


async def test_concurrent_writes_of_two_processes_are_all_reported(both: tuple[Process, Process]) -> None:
    """The server reports a key once per event loop turn, so a change must not hide that of another process."""
    here, there = both
    records = [session(number, f"user-{number}") for number in range(200)]
    await asyncio.gather(*(here.store.create(record, FIVE) for record in records))
    results = await asyncio.gather(
        *(here.store.rotate(rotation(record)) for record in records),
        *(there.store.end([record.id], Code.TOKEN_REVOKED, WALL) for record in records),
    )
    assert sum(len(result) for result in results[200:]) == 200
    for record, result in zip(records, results[:200], strict=True):
        await until(lambda record=record: here.is_reported(record))
        if isinstance(result, SessionRecord):
            await until(lambda record=record: there.is_reported(record))
        assert isinstance(await here.store.get(record.id), EndedRecord)


async def test_change_during_a_lookup_is_reported_before_its_reply(both: tuple[Process, Process]) -> None:
    """So the caller knows that the reply may be out of date."""
    here, there = both
    for number in range(100):
        record = session(number, f"user-{number}")
        await here.store.create(record, FIVE)
        found, gone = await asyncio.gather(
            here.store.find(record.token_digest), there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
        )
        assert gone
        if found == record:
            await until(lambda record=record: here.is_reported(record))
        else:
            assert isinstance(found, EndedRecord)


async def test_fifty_concurrent_openings_through_two_processes_get_five_sessions(
    both: tuple[Process, Process],
) -> None:
    results = await asyncio.gather(
        *(both[number % 2].store.create(session(number), FIVE) for number in range(50))
    )
    assert results.count(Created()) == 5
    assert results.count(LimitReached()) == 45
    assert await both[0].store.list("alice") == await both[1].store.list("alice")
    assert await both[0].store.count() == 5


async def test_concurrent_refreshes_through_two_processes_end_the_session(
    both: tuple[Process, Process],
) -> None:
    records = [session(number, f"user-{number}") for number in range(20)]
    await asyncio.gather(*(both[0].store.create(record, FIVE) for record in records))
    for record in records:
        results = await asyncio.gather(
            *(each.store.rotate(rotation(record, number)) for number, each in enumerate(both))
        )
        assert sum(isinstance(result, SessionRecord) for result in results) == 1
        assert isinstance(await both[0].store.get(record.id), EndedRecord)


async def test_concurrent_claims_through_two_processes_give_one_new(both: tuple[Process, Process]) -> None:
    here, there = both
    claims = [await each.store.claim("alice", "k", digest("body"), LEASE) for each in (here, there)]
    assert [claim.state.value for claim in claims] == ["new", "running"]
    assert not claims[1].is_own
    assert (await here.store.claim("alice", "k", digest("body"), LEASE)).is_own
    await here.store.keep_answer("alice", "k", b"answer", KEEP)
    assert (await there.store.claim("alice", "k", digest("body"), LEASE)).answer == b"answer"


async def test_reconnect_reports_that_all_may_have_changed(
    both: tuple[Process, Process], server: ServerProcess
) -> None:
    here, there = both
    record = session()
    await here.store.create(record, FIVE)
    assert server.command("CLIENT", "KILL", "TYPE", "normal") >= 2
    lost_and_all = [Change(ChangeKind.LOST), Change(ChangeKind.ALL)]
    await until(lambda: here.changes == there.changes == lost_and_all)
    await there.store.end([record.id], Code.TOKEN_REVOKED, WALL)
    await until(lambda: here.is_reported(record))


async def test_changes_are_reported_under_load(both: tuple[Process, Process]) -> None:
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
    for record in records:
        await there.store.end([record.id], Code.TOKEN_REVOKED, WALL + MINUTE)
        await until(lambda record=record: here.is_reported(record))
    busy = False
    await asyncio.gather(*loads)


async def test_closed_store_gets_no_changes(both: tuple[Process, Process]) -> None:
    here, there = both
    await here.store.create(session(), FIVE)
    await here.store.close()
    await there.store.end([session().id], Code.TOKEN_REVOKED, WALL)
    assert await there.store.count() == 0
    assert here.changes == []


async def test_stores_with_different_prefixes_are_independent(server: ServerProcess) -> None:
    stores = [ValkeyStore(server.url, prefix=prefix) for prefix in ("a:", "b:")]
    changes: list[Change] = []
    for store in stores:
        await store.open(changes.append)
        await store.create(session(), FIVE)
    assert await stores[0].end_all(Code.TOKEN_REVOKED, WALL) == 1
    assert await stores[1].list() == [session()]
    for store in stores:
        await store.close()
    assert changes == []
