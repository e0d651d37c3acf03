"""Transactions, slices and bounds in the database."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.disk import Disk
from tests.stores.contract import (
    FIVE,
    KEEP,
    KEEP_ENDED,
    LEASE,
    MINUTE,
    WALL,
    StoreTime,
    digest,
    ended,
    expire_all,
    opened,
    rotation,
    session,
)
from tests.stores.sqlite.harness import SqliteHarness, hanging
from zcproto.errors import Code
from zcproto.stores import job_thread
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.base import Claim, ClaimState, Created, StoreUnavailable
from zcproto.stores.sqlite import database
from zcproto.stores.sqlite import store as sqlite
from zcproto.stores.sqlite.database import SessionDatabase
from zcproto.stores.sqlite.rows import Operation
from zcproto.stores.sqlite.store import SqliteStore


def is_sweeping(store: SqliteStore) -> bool:
    """Return True while rows ended by `end_all` are still to be rewritten, which no answer shows."""
    return store._database.sweeping


async def test_concurrent_operations_share_one_transaction(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session(99, "the first"))
    disk.statements.clear()
    await asyncio.gather(*(store.create(session(number, f"user-{number}"), FIVE) for number in range(64)))
    assert [statement.split()[0] for statement in disk.statements] == ["SELECT", "INSERT"]


async def test_first_request_with_a_key_reads_no_other(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await store.claim("alice", "k", digest("body"), LEASE)
    await store.close()
    again = await harness.opened(connect=disk.connect)
    disk.statements.clear()
    await again.claim("alice", "another", digest("body"), LEASE)
    assert [statement.split()[0] for statement in disk.statements] == ["INSERT"]


async def test_reads_write_nothing(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session())
    disk.statements.clear()
    await asyncio.gather(
        store.find(session().token_digest), store.get(session().id), store.list("alice"), store.count()
    )
    await store.list()
    await store.end([], Code.TOKEN_REVOKED, WALL)
    assert {statement.split()[0] for statement in disk.statements} == {"SELECT"}


async def test_invalid_operation_fails_without_affecting_others(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(0))
    results = await asyncio.gather(
        store.create(session(1), FIVE),
        store.create(session(2, expires_at=2**63), FIVE),
        store.create(session(3), FIVE),
        store.create(session(4, token_digest=b"short"), FIVE),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Created, OverflowError, Created, sqlite3.IntegrityError]
    assert await store.create(session(5), FIVE) == Created()
    assert await store.list() == [session(number) for number in (0, 1, 3, 5)]
    with pytest.raises(sqlite3.IntegrityError):  # after the first of its two statements
        await store.rotate(rotation(session(5), token_digest=b"short", sealed=b"pair", grace_ms=MINUTE))
    assert await store.create(session(6), FIVE) == Created()
    await store.close()
    store = await harness.opened()
    assert await store.list() == [session(number) for number in (0, 1, 3, 5, 6)]
    with pytest.raises(OverflowError):
        await store.touch([(session(0).id, 2**63)])
    with pytest.raises(OverflowError):
        await store.expire(2**63, 0, 10)
    await store.ping()


async def test_last_uses_are_written_in_batches(
    harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    touch = SessionDatabase.touch

    def counted(self: SessionDatabase, uses: Sequence[tuple[bytes, int]]) -> None:
        batches.append(len(uses))
        touch(self, uses)

    monkeypatch.setattr(sqlite, "MAX_TOUCHED", 2)
    monkeypatch.setattr(SessionDatabase, "touch", counted)
    store = await harness.opened()
    records = [session(number) for number in range(5)]
    await opened(store, *records)
    await store.touch([(record.id, WALL + 1) for record in records])
    assert batches == [2, 2, 1]
    assert {record.last_used_at for record in await store.list()} == {WALL + 1}


async def test_more_operations_than_one_group_succeed(harness: SqliteHarness) -> None:
    store = await harness.opened()
    records = [session(number, f"user-{number}") for number in range(2 * job_thread.GROUP + 9)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    assert await store.list() == records


async def test_end_user_with_very_many_sessions_is_atomic(harness: SqliteHarness) -> None:
    store = await harness.opened()
    records = [session(number, f"user-{number}") for number in range(1_100)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    ids = [record.id for record in records]
    unknown = [number.to_bytes(16, "big") for number in range(20_001)]
    gone = await store.end([*unknown, *ids], Code.TOKEN_REVOKED, WALL)
    assert gone == [ended(record) for record in records]
    assert await store.count() == 0


async def test_digests_with_the_same_prefix_are_distinguished(harness: SqliteHarness) -> None:
    store = await harness.opened()
    alike = [
        session(number, token_digest=bytes(8) + digest(f"{number}")[8:], id=bytes(15) + bytes([number]))
        for number in range(4)
    ]
    await opened(store, *alike)
    for record in alike:
        assert await store.find(record.token_digest) == await store.get(record.id) == record
    await store.touch([(alike[2].id, WALL + 5)])
    assert [record.last_used_at - WALL for record in await store.list()] == [0, 0, 5, 0]
    assert await store.end([alike[1].id], Code.TOKEN_REVOKED, WALL) == [ended(alike[1])]
    assert await store.find(bytes(8) + digest("unknown")[8:]) is None
    assert await store.get(bytes(15) + b"\xff") is None


async def test_lookups_use_an_index(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(300)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    disk.statements.clear()
    await asyncio.gather(*(store.get(record.id) for record in records))
    await asyncio.gather(*(store.find(record.token_digest) for record in records))
    await asyncio.gather(*(store.list(record.user) for record in records))
    await store.touch([(record.id, WALL + 1) for record in records])
    await store.expire(WALL, 0, 10)
    await store.close()
    db = sqlite3.connect(harness.path)
    db.execute("PRAGMA automatic_index = OFF")
    for statement in disk.statements:
        plan = db.execute(f"EXPLAIN QUERY PLAN {statement}", statement.count("?") * (1,)).fetchall()
        assert not [step for step in plan if step[3].startswith("SCAN sessions")], statement[:200]
    db.close()


async def test_very_many_answers_are_removed_at_once(harness: SqliteHarness) -> None:
    store = await harness.opened(answers=AnswerLimits(user_count=5_000))
    keys = [f"key-{number}" for number in range(1_500)]
    await asyncio.gather(*(store.claim("alice", key, digest("body"), LEASE) for key in keys))
    await asyncio.gather(*(store.release_claim("alice", key) for key in keys[:10]))
    harness.time.ms += LEASE
    assert await store.expire(WALL, KEEP_ENDED, 5_000) == 1_490


@pytest.mark.parametrize("why", ["another operation waits", "it takes long"])
async def test_expire_works_in_short_slices(
    harness: SqliteHarness, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await harness.opened()
    past = {"expires_at": WALL, "refresh_expires_at": WALL}
    records = [session(number, f"user-{number}", **past) for number in range(250)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    if why == "it takes long":
        monkeypatch.setattr(sqlite, "EXPIRE_S", 0.0)
    else:
        monkeypatch.setattr(sqlite, "EXPIRE_S", 60.0)
        monkeypatch.setattr(job_thread.JobThread, "is_waited_for", True)
    assert [await store.expire(WALL, 0, 1_000) for _ in range(4)] == [100, 100, 50, 0]
    monkeypatch.undo()
    assert await store.count() == 0


async def test_end_all_is_rewritten_in_slices_and_applies_at_once(
    harness: SqliteHarness, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_SWEPT", 7)
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(50)]
    await opened(store, *records)
    with hanging(disk, ("UPDATE sessions SET code",)):
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 50
        assert await asyncio.to_thread(disk.reached.wait, 10)
        copy = SqliteHarness(harness.path.parent.parent / "copy" / "sessions.db")
        shutil.copytree(harness.path.parent, copy.path.parent)
    # After a crash before the first slice all sessions have ended, but not those opened afterwards.
    disk.hang(("UPDATE sessions SET code",))
    other = await copy.opened(connect=disk.connect)
    harness.stores.append(other)
    try:
        late = session(99)
        creating = asyncio.create_task(other.create(late, FIVE))
        assert await asyncio.to_thread(disk.reached.wait, 10)
    finally:
        disk.go_on.set()
    assert await creating == Created()
    assert await other.list() == [late]
    for each, expected in ((store, []), (other, [late])):
        while is_sweeping(each):
            await each.count()
        assert await each.list() == expected
        assert [await each.get(record.id) for record in records] == [ended(record) for record in records]
        await each.close()
    db = sqlite3.connect(copy.path)
    assert db.execute("SELECT count(*), sum(code = 69) FROM sessions").fetchone() == (51, 50)
    assert db.execute("SELECT count(*) FROM ended_all").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM sessions WHERE code != 0 AND user != x''").fetchone() == (0,)
    db.close()


async def test_slice_of_end_all_that_fails_is_repeated(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(5)]
    await opened(store, *records)
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("UPDATE sessions SET code",))
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    assert await store.count() == 0
    assert is_sweeping(store)
    disk.mend()
    while is_sweeping(store):
        await store.count()
    assert await store.get(records[4].id) == ended(records[4])


async def test_end_all_spares_sessions_opened_after_rows_were_removed(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, *(session(number, f"user-{number}") for number in range(5)))
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 5
    while is_sweeping(store):
        await store.count()
    await expire_all(store, WALL + 2 * KEEP_ENDED)
    later = [session(number, f"user-{number}") for number in range(10, 13)]
    await opened(store, *later)
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 3
    while is_sweeping(store):
        await store.count()
    assert await store.count() == 0
    assert [await store.get(each.id) for each in later] == [ended(each) for each in later]


async def test_end_all_that_is_not_rewritten_spares_later_sessions(
    harness: SqliteHarness, disk: Disk
) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, *(session(number, f"user-{number}") for number in range(5)))
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("UPDATE sessions SET code",))
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    await expire_all(store, WALL + 366 * 86_400_000)
    later = session(10, "user-10")
    await opened(store, later)
    assert await store.list() == [later]
    disk.mend()


def test_file_removed_before_end_all_was_rewritten(tmp_path: Path) -> None:
    notices: list[str] = []
    file = SessionDatabase(
        tmp_path / "sessions.db",
        answers=AnswerLimits(),
        time=StoreTime(),
        on_notice=lambda name, **values: notices.append(name),
    )
    file.open()
    record = session(1)
    file.perform([Operation(lambda rows: rows.create(record, FIVE), ids=[record.id])])
    assert file.end_all(Code.TOKEN_REVOKED, WALL) == 1
    (tmp_path / "sessions.db").unlink()
    assert file.sweeping
    file.sweep()
    assert not file.sweeping
    assert notices == ["store_missing"]
    file.close()


async def test_two_consecutive_end_all_keep_their_codes(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    first, second = session(1), session(2)
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("UPDATE sessions SET code",))
    await opened(store, first)
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    await opened(store, second)
    await store.end_all(Code.SESSION_REPLACED, WALL + 1)
    for mended in (False, True):
        if mended:
            disk.mend()
            while is_sweeping(store):
                await store.count()
        assert await store.get(first.id) == ended(first)
        assert await store.get(second.id) == ended(second, Code.SESSION_REPLACED, WALL + 1)
        assert await store.list("alice") == []


async def test_answers_are_bounded_after_a_failure_and_after_reopening(
    harness: SqliteHarness, disk: Disk
) -> None:
    limits = AnswerLimits(count=3, bytes=100, user_count=3, user_bytes=100)
    store = await harness.opened(connect=disk.connect, answers=limits)
    for number in range(3):
        await store.claim("alice", f"{number}", digest("body"), LEASE)
        await store.keep_answer("alice", f"{number}", 30 * b"x", KEEP)
        harness.time.ms += 1
    disk.fail(sqlite3.SQLITE_FULL, "SQLITE_FULL", at=("BEGIN",))
    with pytest.raises(StoreUnavailable):
        await store.claim("bob", "k", digest("body"), LEASE)  # one entry is removed and one written
    disk.mend()
    await store.close()
    store = await harness.opened(answers=limits)
    await store.claim("bob", "k", digest("body"), LEASE)
    await store.keep_answer("bob", "k", 60 * b"y", KEEP)
    states = [await store.claim("alice", f"{number}", digest("other"), 0) for number in range(3)]
    assert [claim.state for claim in states] == [ClaimState.NEW, ClaimState.NEW, ClaimState.CONFLICT]


async def test_answer_is_read_in_the_transaction_that_evicts_it(harness: SqliteHarness) -> None:
    limits = AnswerLimits(count=9, bytes=100, user_count=9, user_bytes=100)
    store = await harness.opened(answers=limits)
    await store.claim("alice", "k", digest("body"), LEASE)
    await store.keep_answer("alice", "k", 60 * b"x", KEEP)
    await store.claim("bob", "k", digest("body"), LEASE)
    claim, _ = await asyncio.gather(
        store.claim("alice", "k", digest("body"), LEASE),
        store.keep_answer("bob", "k", 60 * b"y", KEEP),
    )
    assert claim == Claim(ClaimState.DONE, 60 * b"x")
    assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.NEW)
