"""A disk that fails or hangs is an outage, and the store recovers from it."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import threading
from typing import Any

import pytest

from bench.disk import Disk
from tests.limits import TIMEOUT
from tests.stores.contract import FIVE, KEEP, LEASE, WALL, digest, ended, opened, rotation, session
from tests.stores.sqlite.harness import SqliteHarness, beside, change_file, hanging
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions.record import SessionRecord
from zcproto.stores import job_thread
from zcproto.stores.base import Claim, ClaimState, Created, StoreUnavailable
from zcproto.stores.sqlite import database
from zcproto.stores.sqlite import store as sqlite

FAILURES = {
    "full": (sqlite3.SQLITE_FULL, "SQLITE_FULL"),
    "input or output": (sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE"),
    "read-only": (sqlite3.SQLITE_READONLY, "SQLITE_READONLY"),
    "gone": (sqlite3.SQLITE_CANTOPEN, "SQLITE_CANTOPEN"),
}


@pytest.mark.requirement("recovery")
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("at", [("INSERT",), ("COMMIT",), ("SELECT",)])
async def test_disk_failure_is_an_outage_and_recovers(
    harness: SqliteHarness, disk: Disk, kind: str, at: tuple[str, ...]
) -> None:
    store = await harness.opened(connect=disk.connect)
    first, second, third = (session(number) for number in range(3))
    await opened(store, first)
    disk.fail(*FAILURES[kind], at=at)
    # Changes of two tables need a transaction with several statements.
    results = await asyncio.gather(
        store.create(second, FIVE),
        store.claim("alice", "k", digest("body"), LEASE),
        store.keep_answer("alice", "k", b"answer", KEEP),
        return_exceptions=True,
    )
    for result in results:
        assert isinstance(result, StoreUnavailable)
        assert FAILURES[kind][1] in result.reason
    disk.mend()
    assert await store.create(third, FIVE) == Created()
    assert await store.list() == [first, third]
    assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.NEW)
    assert harness.notices == []
    again = await harness.reopen(store)
    assert await again.list() == [first, third]


@pytest.mark.requirement("recovery")
async def test_full_disk_is_an_outage_and_recovers(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)

    def no_more(db: sqlite3.Connection) -> None:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")

    disk.before = no_more
    kept: list[SessionRecord] = []

    async def fill() -> None:
        for number in range(1_000):
            record = session(number, f"user-{number}")
            await opened(store, record)
            kept.append(record)

    with pytest.raises(StoreUnavailable, match="SQLITE_FULL"):
        await fill()
    assert kept
    with pytest.raises(StoreUnavailable, match="SQLITE_FULL"):
        await opened(store, *(session(number, f"user-{number}") for number in range(1_000, 1_100)))
    assert (await store.list())[: len(kept)] == kept
    disk.before = lambda db: db.execute("PRAGMA max_page_count = 1000000")
    late = session(5_000)
    await opened(store, late)
    assert await store.get(late.id) == late


@pytest.mark.requirement("recovery")
async def test_file_size_limit_is_an_outage_and_recovers(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beside(harness.path, "-wal").stat().st_size, before[1]))
    try:
        with pytest.raises(StoreUnavailable):
            await store.create(session(2), FIVE)
        with pytest.raises(StoreUnavailable):
            await store.ping()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await opened(store, session(3))
    assert session(1) in await store.list()
    assert session(3) in await store.list()


async def test_removed_folder_is_an_outage_and_recovers(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1))
    away = harness.path.parent.with_name("away")
    harness.path.parent.rename(away)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="No such file or directory"):
            await store.ping()
    away.rename(harness.path.parent)
    assert await store.list() == [session(1)]
    assert [name for name, _ in harness.notices] == ["store_missing"]


async def test_removed_file_is_reported_and_replaced(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1))
    harness.path.unlink()
    assert await store.list() == []
    await opened(store, session(2))
    assert harness.notices == [("store_missing", {"path": str(harness.path)})]
    again = await harness.reopen(store)
    assert await again.list() == [session(2)]


async def test_file_replaced_by_another_programs_database_is_unchanged(harness: SqliteHarness) -> None:
    store = await harness.opened()
    harness.path.unlink()
    change_file(harness.path, "CREATE TABLE birds (name)")
    harness.path.chmod(0o600)
    with pytest.raises(StoreUnavailable, match="another program's database"):
        await store.ping()
    harness.path.unlink()
    await store.ping()


async def test_file_system_without_write_ahead_log_is_an_outage(harness: SqliteHarness, disk: Disk) -> None:
    class Deleting:
        def fetchone(self) -> tuple[str]:
            return ("delete",)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> Any:
            return Deleting() if "journal_mode" in sql else super().execute(sql, *arguments)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return sqlite3.connect(*arguments, factory=Connection, **options)

    with pytest.raises(StoreUnavailable, match="its journal mode is 'delete'"):
        await harness.opened(connect=connect)


async def test_open_can_be_retried_after_a_disk_failure(harness: SqliteHarness, disk: Disk) -> None:
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("PRAGMA",))
    store = harness.new(connect=disk.connect)
    with pytest.raises(StoreUnavailable, match="SQLITE_IOERR"):
        await store.open(lambda change: None)
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.ping()
    disk.mend()
    await store.open(lambda change: None)
    await store.ping()


async def test_out_of_memory_is_an_outage(harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await harness.opened()

    def exhausted(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(database, "_upserts", exhausted)
        with pytest.raises(StoreUnavailable, match="MemoryError"):
            await store.create(session(), FIVE)
    await opened(store, session())


async def test_failed_close_is_reported(harness: SqliteHarness) -> None:
    class Connection(sqlite3.Connection):
        def close(self) -> None:
            super().close()
            raise sqlite3.OperationalError("disk I/O error")

    made: list[sqlite3.Connection] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        kind = Connection if made else sqlite3.Connection  # the first one creates the empty file
        made.append(sqlite3.connect(*arguments, factory=kind, **options))
        return made[-1]

    store = await harness.opened(connect=connect)
    await opened(store, session())
    await store.close()
    assert harness.notices == [("store_close_failed", {"reason": "disk I/O error"})]
    assert await (await harness.opened()).list() == [session()]


async def test_transaction_that_cannot_be_rolled_back_closes_the_file(
    harness: SqliteHarness, disk: Disk
) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session(1))
    connections = disk.connections
    disk.fail(sqlite3.SQLITE_FULL, "SQLITE_FULL", at=("COMMIT", "ROLLBACK"))
    results = await asyncio.gather(
        store.create(session(2), FIVE),
        store.claim("alice", "k", digest("body"), LEASE),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == 2 * [StoreUnavailable]
    disk.mend()
    assert await store.list() == [session(1)]
    assert disk.connections == connections + 1


async def test_operations_on_a_hung_disk_fail_after_the_timeout(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect, timeout=0.05)
    with hanging(disk):
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="the disk did not answer within 50 ms"):
                await store.create(session(1), FIVE)
    await harness.reopen(store)


async def test_timed_out_operations_that_had_not_begun_are_not_done(
    harness: SqliteHarness, disk: Disk
) -> None:
    store = await harness.opened(connect=disk.connect)
    doomed = session(9, "bob")
    await opened(store, doomed)
    store.timeout = 0.05
    with hanging(disk):
        for work in (
            store.create(session(1), FIVE),  # has begun
            store.create(session(2), FIVE),
            store.rotate(rotation(doomed)),
            store.end_user("bob", Code.TOKEN_REVOKED, WALL),
        ):
            with pytest.raises(StoreUnavailable):
                await work
    again = await harness.reopen(store)
    assert await again.list() == [session(1)]
    assert await again.get(doomed.id) == ended(doomed)  # a revocation is done even without a caller


async def test_cancelled_operation_that_had_not_begun_is_not_done(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    with hanging(disk):
        first = asyncio.create_task(store.create(session(1), FIVE))
        assert await asyncio.to_thread(disk.reached.wait, TIMEOUT)
        second = asyncio.create_task(store.create(session(2), FIVE))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
    await first
    assert await store.list() == [session(1)]


async def test_full_queue_refuses_operations(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect, queue=10)
    with hanging(disk):
        waiting = [asyncio.create_task(store.create(session(number), FIVE)) for number in range(10)]
        assert await asyncio.to_thread(disk.reached.wait, TIMEOUT)
        with pytest.raises(ResourceExhausted, match="too many operations wait"):
            await store.ping()
        ending = asyncio.create_task(store.end([session(0).id], Code.TOKEN_REVOKED, WALL))
        await asyncio.sleep(0)
    assert len(await asyncio.gather(*waiting)) == 10
    assert await ending == [ended(session(0))], "a revocation is never refused"
    await store.ping()


async def test_answer_is_kept_although_the_queue_is_full(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect, queue=1)
    body = digest("body")
    await store.claim("alice", "run", body, LEASE)
    with hanging(disk):
        waiting = asyncio.create_task(store.claim("alice", "next", body, LEASE))
        assert await asyncio.to_thread(disk.reached.wait, TIMEOUT)
        keeping = asyncio.create_task(store.keep_answer("alice", "run", b"answer", KEEP))
        await asyncio.sleep(0)
    await asyncio.gather(waiting, keeping)
    assert await store.claim("alice", "run", body, LEASE) == Claim(ClaimState.DONE, b"answer")


async def test_close_finishes_waiting_operations(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    record = session()
    with hanging(disk):
        creating = asyncio.create_task(store.create(record, FIVE))
        assert await asyncio.to_thread(disk.reached.wait, TIMEOUT)
        touching = asyncio.create_task(store.touch([(record.id, WALL + 9)]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
    await asyncio.gather(creating, touching, closing)
    again = await harness.opened()
    found = await again.get(record.id)
    assert isinstance(found, SessionRecord)
    assert found.last_used_at == WALL + 9


async def test_close_on_a_hung_disk_gives_up(
    harness: SqliteHarness, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CLOSE_TIMEOUT_S", 0.05)
    others = set(threading.enumerate())
    store = await harness.opened(connect=disk.connect, timeout=0.02)
    with hanging(disk):
        with pytest.raises(StoreUnavailable):
            await store.ping()
        await store.close()
        assert harness.notices == [("store_close_failed", {"reason": "the disk does not answer"})]
        with pytest.raises(StoreUnavailable, match="not open"):
            await store.ping()
    await asyncio.to_thread(_threads_have_ended, others)


def _threads_have_ended(others: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - others:
        if thread.name == job_thread.THREAD_NAME:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
