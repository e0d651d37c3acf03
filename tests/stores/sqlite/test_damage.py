"""A damaged file is set aside and replaced by an empty one."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.disk import Disk
from tests.stores.contract import FIVE, loaded, opened, session
from tests.stores.sqlite.harness import SqliteHarness, beside, change_file, mode
from zcproto.stores.base import Created, StoreUnavailable


def overwritten(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing is left": emptied,
    "half is left": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a page and a bit": lambda path: os.truncate(path, 5000),
    "another kind of file": lambda path: path.write_text("users = []\n" * 500),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "the first bytes": lambda path: overwritten(path, 0, b"\xff" * 100),
    "the root of all tables": lambda path: overwritten(path, 100, b"\xff" * 200),
    "a page of the table": lambda path: overwritten(path, 4096, b"\xff" * 4096),
    "a page of zeros": lambda path: overwritten(path, 4096, bytes(4096)),
    "the last page": lambda path: overwritten(path, path.stat().st_size - 4096, b"\x0d" * 4096),
    "the mark of the program": lambda path: change_file(path, "PRAGMA application_id = 7"),
    "the version": lambda path: change_file(path, "PRAGMA user_version = 2"),
    "the other version": lambda path: change_file(path, "UPDATE about SET version = 2"),
    "both versions are gone": lambda path: change_file(path, "DROP TABLE about"),
    "a word of the schema": lambda path: replaced(
        path, b"CREATE TABLE sessions", b"CREATE TABLE \xffessions"
    ),
    "a keyword of the schema": lambda path: replaced(path, b"CREATE INDEX by_id", b"CRE\xffTE INDEX by_id"),
    "the form of the file": lambda path: overwritten(path, 47, b"\x09"),
    "version 0": lambda path: change_file(path, "PRAGMA user_version = 0"),
    "an index is gone": lambda path: change_file(path, "DROP INDEX by_id"),
    "a state that none is": lambda path: change_file(
        path, "PRAGMA ignore_check_constraints = ON", "UPDATE sessions SET code = 7"
    ),
    "a time that is text": lambda path: change_file(
        path, "PRAGMA ignore_check_constraints = ON", "UPDATE sessions SET expires_at = 'soon'"
    ),
    "a short digest": lambda path: change_file(
        path, "PRAGMA ignore_check_constraints = ON", "UPDATE sessions SET token = x'00' WHERE n = 1"
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_damaged_file_is_set_aside_and_the_store_starts(harness: SqliteHarness, kind: str) -> None:
    records = [session(number, f"user-{number}") for number in range(100)]
    store = await harness.opened()
    await opened(store, *records)
    await store.close()
    DAMAGE[kind](harness.path)
    before = harness.path.read_bytes()

    store = await harness.opened()
    assert await loaded(store) == []
    assert await store.create(records[0], FIVE) == Created()
    await asyncio.sleep(0)
    ((name, values),) = harness.notices
    assert name == "store_damaged"
    assert values["path"] == str(harness.path)
    assert values["aside"] == f"{harness.path}.damaged-1"
    assert values["reason"]
    aside = beside(harness.path, ".damaged-1")
    assert aside.read_bytes() == before
    assert mode(aside) == 0o600
    again = await harness.reopen(store)
    assert await again.list() == [records[0]]
    assert len(harness.notices) == 1


async def test_each_damaged_file_gets_a_new_name(harness: SqliteHarness) -> None:
    for number in range(1, 4):
        store = await harness.opened()
        await store.close()
        harness.path.write_bytes(b"%d" % number)
        beside(harness.path, "-wal").write_bytes(b"wal %d" % number)
    store = await harness.opened()
    await store.ping()
    await store.close()
    for number in range(1, 4):
        aside = beside(harness.path, f".damaged-{number}")
        assert aside.read_bytes() == b"%d" % number
        assert beside(aside, "-wal").read_bytes() == b"wal %d" % number


async def test_journal_of_a_lost_file_is_not_applied_to_a_new_one(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session())
    wal = beside(harness.path, "-wal").read_bytes()
    await store.close()
    harness.path.unlink()
    beside(harness.path, "-wal").write_bytes(wal)
    again = await harness.opened()
    assert await again.count() == 0
    assert beside(harness.path, ".damaged-1-wal").read_bytes() == wal


@pytest.mark.parametrize("cut", [1, 24, 500, 4000])
async def test_truncated_journal_loses_only_truncated_changes(harness: SqliteHarness, cut: int) -> None:
    copy = SqliteHarness(harness.path.parent.parent / "copy" / "sessions.db")
    store = await harness.opened()
    records = [session(number, f"user-{number}") for number in range(20)]
    await opened(store, *records)
    shutil.copytree(harness.path.parent, copy.path.parent)
    wal = beside(copy.path, "-wal")
    os.truncate(wal, wal.stat().st_size - cut)
    found = await copy.opened()
    harness.stores.append(found)
    listed = await found.list()
    assert listed == records[: len(listed)]
    assert len(listed) >= 18
    assert copy.notices == []


async def test_damaged_user_name_belongs_to_no_user(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1, "alice"), session(2, "bob"))
    await store.close()
    change_file(harness.path, "UPDATE sessions SET user = x'616cff' WHERE n = 1")
    again = await harness.opened()
    assert [record.user for record in await again.list()] == ["al\ufffd", "bob"]


async def test_damage_found_while_running_is_set_aside(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(100)]
    await opened(store, *records)

    def forget_and_damage(db: sqlite3.Connection) -> None:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        db.execute("PRAGMA shrink_memory")
        overwritten(harness.path, 4096, b"\xff" * (harness.path.stat().st_size - 4096))

    disk.before = forget_and_damage
    with pytest.raises(StoreUnavailable):
        await store.get(records[0].id)
    assert await store.create(records[1], FIVE) == Created()
    assert await store.list() == [records[1]]
    assert [name for name, _ in harness.notices] == ["store_damaged"]
    assert beside(harness.path, ".damaged-1").exists()


async def test_damaged_file_that_cannot_be_renamed_is_an_outage(
    harness: SqliteHarness, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await harness.opened(connect=disk.connect)
    disk.fail(sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT", times=1)

    def refused(source: str, target: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(StoreUnavailable, match="cannot be set aside: Read-only file system"):
        await store.ping()
    monkeypatch.undo()
    await store.ping()


async def test_error_message_with_invalid_utf8_counts_as_damage(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)

    def quote(db: sqlite3.Connection) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    disk.before = quote
    with pytest.raises(StoreUnavailable, match="malformed"):
        await store.ping()
    await store.ping()
    assert [name for name, _ in harness.notices] == ["store_damaged"]


async def test_truncated_file_is_set_aside(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    disk.fail(sqlite3.SQLITE_IOERR_SHORT_READ, "SQLITE_IOERR_SHORT_READ", at=("SELECT",), times=1)
    with pytest.raises(StoreUnavailable, match="SHORT_READ"):
        await store.count()
    await store.ping()
    assert [name for name, _ in harness.notices] == ["store_damaged"]


async def test_disk_that_damages_every_file_is_an_outage(harness: SqliteHarness, disk: Disk) -> None:
    disk.fail(sqlite3.SQLITE_NOTADB, "SQLITE_NOTADB", at=("PRAGMA quick_check",))
    with pytest.raises(StoreUnavailable, match="damaged at once"):
        await harness.opened(connect=disk.connect)
