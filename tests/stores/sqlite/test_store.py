"""The store in a file: the contract, and what the disk can do to it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.stores.contract import (
    FIVE,
    KEEP,
    KEEP_ENDED,
    LEASE,
    WALL,
    StoreContract,
    digest,
    ended,
    expire_all,
    loaded,
    opened,
    rotation,
    session,
)
from tests.stores.sqlite.disk import Disk
from zcproto.errors import Code, ConfigError
from zcproto.sessions.record import SessionRecord
from zcproto.stores import worker
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.base import Claim, ClaimState, Created, SessionStore, StoreUnavailable
from zcproto.stores.sqlite import database
from zcproto.stores.sqlite import store as sqlite
from zcproto.stores.sqlite.database import SessionDatabase
from zcproto.stores.sqlite.file import APPLICATION_ID, VERSION
from zcproto.stores.sqlite.rows import Create
from zcproto.stores.sqlite.store import SqliteStore

LONG = 20.0
"""A timeout that never ends a test's wait on a machine that is busy with other things."""


class SqliteHarness:
    durable = True
    bounded = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stores: list[SqliteStore] = []
        self.notices: list[tuple[str, dict[str, Any]]] = []

    def new(self, **options: Any) -> SqliteStore:
        """A store that is not open."""
        store = SqliteStore(self.path, **({"timeout": LONG, "on_notice": self._notice} | options))
        self.stores.append(store)
        return store

    async def opened(self, **options: Any) -> SqliteStore:
        store = self.new(**options)
        await store.open(lambda change: pytest.fail("nobody else changes this"))
        return store

    async def make_store(self, answers: AnswerLimits | None = None) -> SessionStore:
        return await self.opened(answers=answers)

    async def reopen(self, store: SessionStore) -> SessionStore:
        await store.close()
        return await self.opened()

    def _notice(self, name: str, **values: Any) -> None:
        self.notices.append((name, values))


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[SqliteHarness]:
    harness = SqliteHarness(tmp_path / "home" / "sessions.db")
    yield harness
    for store in harness.stores:
        await store.close()


@pytest.fixture
def disk() -> Disk:
    return Disk()


class TestSqliteStore(StoreContract):
    """Every test of the contract."""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def beside(path: Path, suffix: str) -> Path:
    """A file that belongs to the store's file."""
    return path.with_name(path.name + suffix)


def change_file(path: Path, *statements: str) -> None:
    """What another program does to a file that no store has open."""
    db = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


# --- the file ------------------------------------------------------------------------------------------------


async def test_the_file_is_its_owners_alone(harness: SqliteHarness) -> None:
    before = os.umask(0o777)
    try:
        harness.path.parent.mkdir(0o700)
        harness.path.parent.chmod(0o700)
        store = await harness.opened()
    finally:
        os.umask(before)
    await opened(store, session())
    files = sorted(path.name for path in harness.path.parent.iterdir())
    assert files == ["sessions.db", "sessions.db-wal", "sessions.db.lock"]
    assert mode(harness.path) == mode(beside(harness.path, "-wal")) == 0o600
    assert not mode(beside(harness.path, ".lock")) & 0o077
    assert not store.shared


async def test_its_folder_is_made_for_its_owner_alone(harness: SqliteHarness) -> None:
    await harness.opened()
    assert mode(harness.path.parent) == 0o700


async def test_only_digests_are_written(harness: SqliteHarness) -> None:
    from zcproto.sessions import SessionRegistry, SessionSettings

    registry = SessionRegistry(SessionSettings(), os.urandom)
    new = registry.new_session("alice", operator=False, client="zc/1", address="192.0.2.1", wall=WALL)
    store = await harness.opened()
    await opened(store, new.record)
    await store.close()
    written = harness.path.read_bytes()
    assert new.record.token_digest in written
    assert new.refresh_token is not None
    for secret in (new.token, new.refresh_token, new.refresh_token[:16], new.refresh_token[16:]):
        assert secret not in written


async def test_every_change_is_on_the_disk_before_it_is_answered(harness: SqliteHarness) -> None:
    copies = harness.path.parent.parent / "copies"
    store = await harness.opened()
    record = session()

    async def copied(name: str) -> SqliteStore:
        """What a crash at this moment would leave."""
        shutil.copytree(harness.path.parent, copies / name)
        other = SqliteHarness(copies / name / harness.path.name)
        harness.stores.append(found := await other.opened())
        return found

    await store.create(record, FIVE)
    assert await (await copied("created")).get(record.id) == record
    await store.rotate(wanted := rotation(record))
    found = await (await copied("rotated")).get(record.id)
    assert isinstance(found, SessionRecord)
    assert found.token_digest == wanted.token_digest
    await store.claim("alice", "k", digest("body"), WALL, LEASE)
    claimed = await copied("claimed")
    assert await claimed.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.RUNNING)
    await store.end([record.id], Code.TOKEN_REVOKED, WALL)
    assert not isinstance(await (await copied("ended")).get(record.id), SessionRecord)
    late = session(2)
    await store.create(late, FIVE)
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    assert await (await copied("all")).get(late.id) == ended(late)


@pytest.mark.parametrize("bits", [0o620, 0o604, 0o640])
async def test_a_file_that_others_may_use_is_refused(harness: SqliteHarness, bits: int) -> None:
    await (await harness.opened()).close()
    harness.path.chmod(bits)
    with pytest.raises(
        ConfigError, match=r"others can read or change this file .*; run: chmod 600 .*sessions\.db"
    ):
        await harness.opened()
    harness.path.chmod(0o600)
    await harness.opened()


@pytest.mark.parametrize("bits", [0o720, 0o702])
async def test_a_folder_that_others_may_write_to_is_refused(harness: SqliteHarness, bits: int) -> None:
    harness.path.parent.mkdir()
    harness.path.parent.chmod(bits)
    with pytest.raises(ConfigError, match=r"others can change this folder .*; run: chmod go-w"):
        await harness.opened()
    assert not harness.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_another_users_file_is_refused(harness: SqliteHarness) -> None:
    await (await harness.opened()).close()
    os.chown(harness.path, 12345, -1)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345\)"):
        await harness.opened()


async def test_what_is_no_file_is_refused(harness: SqliteHarness) -> None:
    harness.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a regular file; move it away"):
        await harness.opened()


async def test_a_folder_that_is_a_file_is_refused(harness: SqliteHarness) -> None:
    harness.path.parent.write_text("")
    with pytest.raises((ConfigError, StoreUnavailable), match="cannot be opened"):
        await harness.opened()


async def test_a_lock_that_is_a_link_is_refused(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    (harness.path.parent / "other").write_text("kept")
    beside(harness.path, ".lock").symlink_to("other")
    with pytest.raises(ConfigError, match="check the folder and its owner"):
        await harness.opened()
    assert (harness.path.parent / "other").read_text() == "kept"


async def test_a_link_that_leads_nowhere_is_no_store(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    harness.path.symlink_to("nowhere")
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await harness.opened()


async def test_an_old_sqlite_is_refused(harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigError, match=r"needs SQLite 3\.35\.0 or later"):
        await harness.opened()
    assert not harness.path.parent.exists()


async def test_a_newer_version_is_refused_and_left_as_it_is(harness: SqliteHarness) -> None:
    await (await harness.opened()).close()
    change_file(
        harness.path, f"PRAGMA user_version = {VERSION + 1}", "UPDATE about SET version = version + 1"
    )
    before = harness.path.read_bytes()
    with pytest.raises(ConfigError, match=r"newer zcproto \(format 2, this one supports 1\)"):
        await harness.opened()
    assert harness.path.read_bytes() == before
    assert harness.notices == []


async def test_another_programs_database_is_refused_and_left_as_it_is(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    change_file(harness.path, "CREATE TABLE birds (name)", "INSERT INTO birds VALUES ('wren')")
    harness.path.chmod(0o600)
    before = harness.path.read_bytes()
    with pytest.raises(ConfigError, match="another program's database; move it away"):
        await harness.opened()
    assert harness.path.read_bytes() == before


# --- one process ---------------------------------------------------------------------------------------------


async def test_a_second_store_on_the_file_is_refused(harness: SqliteHarness) -> None:
    store = await harness.opened()
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()};"):
        await harness.opened()
    await store.ping()
    await store.close()
    await harness.opened()


OTHER = """
import asyncio, sys
from pathlib import Path
from zcproto.stores.sqlite.store import SqliteStore

async def main():
    await SqliteStore(Path(sys.argv[1])).open(print)
    print("open", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


@contextmanager
def another_process(path: Path) -> Iterator[int]:
    """One that has the file open, by its number, until it is killed."""
    command = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        yield other.pid
        other.kill()


async def test_another_process_with_the_file_is_named(harness: SqliteHarness) -> None:
    with another_process(harness.path) as number, pytest.raises(ConfigError) as refused:
        await harness.opened()
    assert f"is in use by process {number};" in str(refused.value)
    await harness.opened()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock of a file, held by somebody who left no number in it."""
    path.parent.mkdir()
    with beside(path, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_a_holder_that_left_no_number(harness: SqliteHarness) -> None:
    with locked(harness.path), pytest.raises(ConfigError, match="is in use by another process;"):
        await harness.opened()


async def test_a_file_system_without_locks(harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        with pytest.raises(StoreUnavailable, match="No locks available"):
            await harness.opened()
    await harness.opened()


async def test_a_program_that_has_the_file_open_is_waited_for(harness: SqliteHarness) -> None:
    await (await harness.opened()).close()
    other = sqlite3.connect(harness.path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    store = harness.new()
    with pytest.raises(StoreUnavailable, match="database is locked"):
        await store.open(lambda change: None)
    other.close()
    await store.open(lambda change: None)
    await store.ping()


async def test_nobody_else_reads_or_writes_meanwhile(harness: SqliteHarness) -> None:
    store = await harness.opened()
    other = sqlite3.connect(harness.path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT count(*) FROM sessions")
    other.close()
    await store.ping()


# --- damage --------------------------------------------------------------------------------------------------


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
async def test_a_damaged_file_is_set_aside_and_the_store_starts(harness: SqliteHarness, kind: str) -> None:
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


async def test_each_damaged_file_gets_a_name_of_its_own(harness: SqliteHarness) -> None:
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


async def test_the_journal_of_another_file_is_not_taken_for_this_ones(harness: SqliteHarness) -> None:
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
async def test_a_journal_that_was_cut_short_loses_only_what_was_cut(harness: SqliteHarness, cut: int) -> None:
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


async def test_a_name_that_was_damaged_is_nobodys(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1, "alice"), session(2, "bob"))
    await store.close()
    change_file(harness.path, "UPDATE sessions SET user = x'616cff' WHERE n = 1")
    again = await harness.opened()
    assert [record.user for record in await again.list()] == ["al\ufffd", "bob"]


async def test_damage_that_is_found_later_is_set_aside_too(harness: SqliteHarness, disk: Disk) -> None:
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


async def test_a_damaged_file_that_cannot_be_set_aside(
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


async def test_a_message_that_quotes_damage(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)

    def quote(db: sqlite3.Connection) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    disk.before = quote
    with pytest.raises(StoreUnavailable, match="malformed"):
        await store.ping()
    await store.ping()
    assert [name for name, _ in harness.notices] == ["store_damaged"]


async def test_a_file_that_is_shorter_than_it_says(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    disk.fail(sqlite3.SQLITE_IOERR_SHORT_READ, "SQLITE_IOERR_SHORT_READ", at=("SELECT",), times=1)
    with pytest.raises(StoreUnavailable, match="SHORT_READ"):
        await store.count()
    await store.ping()
    assert [name for name, _ in harness.notices] == ["store_damaged"]


async def test_a_disk_on_which_every_file_is_damaged(harness: SqliteHarness, disk: Disk) -> None:
    disk.fail(sqlite3.SQLITE_NOTADB, "SQLITE_NOTADB", at=("PRAGMA quick_check",))
    with pytest.raises(StoreUnavailable, match="damaged at once"):
        await harness.opened(connect=disk.connect)


# --- a disk that fails ---------------------------------------------------------------------------------------

FAILURES = {
    "full": (sqlite3.SQLITE_FULL, "SQLITE_FULL"),
    "input or output": (sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE"),
    "read-only": (sqlite3.SQLITE_READONLY, "SQLITE_READONLY"),
    "gone": (sqlite3.SQLITE_CANTOPEN, "SQLITE_CANTOPEN"),
}


@pytest.mark.requirement("recovery")
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("at", [("INSERT",), ("COMMIT",), ("SELECT",)])
async def test_a_disk_that_fails_is_said_and_it_works_again_by_itself(
    harness: SqliteHarness, disk: Disk, kind: str, at: tuple[str, ...]
) -> None:
    store = await harness.opened(connect=disk.connect)
    first, second, third = (session(number) for number in range(3))
    await opened(store, first)
    disk.fail(*FAILURES[kind], at=at)
    # Two changes of different tables are a transaction of several statements.
    results = await asyncio.gather(
        store.create(second, FIVE),
        store.claim("alice", "k", digest("body"), WALL, LEASE),
        store.keep_answer("alice", "k", b"answer", WALL, KEEP),
        return_exceptions=True,
    )
    for result in results:
        assert isinstance(result, StoreUnavailable)
        assert FAILURES[kind][1] in result.reason
    disk.mend()
    assert await store.create(third, FIVE) == Created()
    assert await store.list() == [first, third]
    assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.NEW)
    assert harness.notices == []
    again = await harness.reopen(store)
    assert await again.list() == [first, third]


@pytest.mark.requirement("recovery")
async def test_a_disk_that_is_really_full(harness: SqliteHarness, disk: Disk) -> None:
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
async def test_a_limit_on_the_size_of_files(harness: SqliteHarness) -> None:
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


async def test_a_folder_that_goes_away_and_comes_back(harness: SqliteHarness) -> None:
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


async def test_a_file_that_was_taken_away_is_said_and_another_begun(harness: SqliteHarness) -> None:
    store = await harness.opened()
    await opened(store, session(1))
    harness.path.unlink()
    assert await store.list() == []
    await opened(store, session(2))
    assert harness.notices == [("store_missing", {"path": str(harness.path)})]
    again = await harness.reopen(store)
    assert await again.list() == [session(2)]


async def test_another_programs_file_in_its_place_is_left_alone(harness: SqliteHarness) -> None:
    store = await harness.opened()
    harness.path.unlink()
    change_file(harness.path, "CREATE TABLE birds (name)")
    harness.path.chmod(0o600)
    with pytest.raises(StoreUnavailable, match="another program's database"):
        await store.ping()
    harness.path.unlink()
    await store.ping()


async def test_a_file_system_without_such_journals(harness: SqliteHarness, disk: Disk) -> None:
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


async def test_opening_on_a_disk_that_fails_may_be_tried_again(harness: SqliteHarness, disk: Disk) -> None:
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("PRAGMA",))
    store = harness.new(connect=disk.connect)
    with pytest.raises(StoreUnavailable, match="SQLITE_IOERR"):
        await store.open(lambda change: None)
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.ping()
    disk.mend()
    await store.open(lambda change: None)
    await store.ping()


async def test_memory_that_runs_out_is_an_outage(
    harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await harness.opened()

    def exhausted(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(database, "_upserts", exhausted)
        with pytest.raises(StoreUnavailable, match="MemoryError"):
            await store.create(session(), FIVE)
    await opened(store, session())


async def test_a_close_that_fails_is_said(harness: SqliteHarness) -> None:
    class Connection(sqlite3.Connection):
        def close(self) -> None:
            super().close()
            raise sqlite3.OperationalError("disk I/O error")

    made: list[sqlite3.Connection] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        kind = Connection if made else sqlite3.Connection  # the first makes the empty file
        made.append(sqlite3.connect(*arguments, factory=kind, **options))
        return made[-1]

    store = await harness.opened(connect=connect)
    await opened(store, session())
    await store.close()
    assert harness.notices == [("store_close_failed", {"reason": "disk I/O error"})]
    assert await (await harness.opened()).list() == [session()]


async def test_a_transaction_that_cannot_be_undone_is_left(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session(1))
    connections = disk.connections
    disk.fail(sqlite3.SQLITE_FULL, "SQLITE_FULL", at=("COMMIT", "ROLLBACK"))
    results = await asyncio.gather(
        store.create(session(2), FIVE),
        store.claim("alice", "k", digest("body"), WALL, LEASE),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == 2 * [StoreUnavailable]
    disk.mend()
    assert await store.list() == [session(1)]
    assert disk.connections == connections + 1


# --- a disk that hangs ---------------------------------------------------------------------------------------


async def test_nobody_waits_for_longer_than_the_timeout(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect, timeout=0.05)
    disk.hang()
    try:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="the disk did not answer within 50 ms"):
                await store.create(session(1), FIVE)
        assert loop.time() - begin < 1.0
    finally:
        disk.go_on.set()
    await harness.reopen(store)


async def test_what_had_begun_may_have_taken_effect_and_the_rest_is_not_done(
    harness: SqliteHarness, disk: Disk
) -> None:
    store = await harness.opened(connect=disk.connect, timeout=0.05)
    doomed = session(9, "bob")
    await opened(store, doomed)
    disk.hang()
    try:
        for work in (
            store.create(session(1), FIVE),  # begins
            store.create(session(2), FIVE),
            store.rotate(rotation(doomed)),
            store.end_user("bob", Code.TOKEN_REVOKED, WALL),
        ):
            with pytest.raises(StoreUnavailable):
                await work
    finally:
        disk.go_on.set()
    again = await harness.reopen(store)
    assert await again.list() == [session(1)]
    assert await again.get(doomed.id) == ended(doomed)  # an end is done whoever waits


async def test_what_was_cancelled_before_it_began_is_not_done(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    disk.hang()
    try:
        first = asyncio.create_task(store.create(session(1), FIVE))
        assert await asyncio.to_thread(disk.reached.wait, 10)
        second = asyncio.create_task(store.create(session(2), FIVE))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
    finally:
        disk.go_on.set()
    await first
    assert await store.list() == [session(1)]


async def test_the_queue_is_bounded(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect, queue=10)
    disk.hang()
    try:
        waiting = [asyncio.create_task(store.create(session(number), FIVE)) for number in range(10)]
        assert await asyncio.to_thread(disk.reached.wait, 10)
        with pytest.raises(StoreUnavailable, match="10 operations are waiting for the disk"):
            await store.ping()
    finally:
        disk.go_on.set()
    assert len(await asyncio.gather(*waiting)) == 10
    await store.ping()


async def test_closing_writes_what_waits(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    record = session()
    disk.hang()
    try:
        creating = asyncio.create_task(store.create(record, FIVE))
        assert await asyncio.to_thread(disk.reached.wait, 10)
        touching = asyncio.create_task(store.touch([(record.id, WALL + 9)]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
    finally:
        disk.go_on.set()
    await asyncio.gather(creating, touching, closing)
    again = await harness.opened()
    found = await again.get(record.id)
    assert isinstance(found, SessionRecord)
    assert found.last_used_at == WALL + 9


async def test_closing_does_not_wait_for_ever(
    harness: SqliteHarness, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "CLOSE_TIMEOUT_S", 0.05)
    others = set(threading.enumerate())
    store = await harness.opened(connect=disk.connect, timeout=0.02)
    disk.hang()
    try:
        with pytest.raises(StoreUnavailable):
            await store.ping()
        await store.close()
        assert harness.notices == [("store_close_failed", {"reason": "the disk does not answer"})]
        with pytest.raises(StoreUnavailable, match="not open"):
            await store.ping()
    finally:
        disk.go_on.set()
    await asyncio.to_thread(_threads_have_ended, others)


def _threads_have_ended(others: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - others:
        if thread.name == worker.THREAD_NAME:
            thread.join(10)
            assert not thread.is_alive()


# --- groups --------------------------------------------------------------------------------------------------


async def test_what_is_asked_for_at_once_is_one_transaction(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session(99, "the first"))
    disk.statements.clear()
    await asyncio.gather(*(store.create(session(number, f"user-{number}"), FIVE) for number in range(64)))
    assert [statement.split()[0] for statement in disk.statements] == ["SELECT", "INSERT"]


async def test_reading_writes_nothing(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    await opened(store, session())
    disk.statements.clear()
    await asyncio.gather(
        store.find(session().token_digest), store.get(session().id), store.list("alice"), store.count()
    )
    await store.list()
    await store.end([], Code.TOKEN_REVOKED, WALL)
    assert {statement.split()[0] for statement in disk.statements} == {"SELECT"}


async def test_a_mistake_is_told_to_whom_it_is_and_to_nobody_else(harness: SqliteHarness) -> None:
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
    assert await store.list() == [session(0), session(1), session(3)]
    with pytest.raises(OverflowError):
        await store.touch([(session(0).id, 2**63)])
    with pytest.raises(OverflowError):
        await store.expire(2**63, 0, 10)
    await store.ping()


async def test_more_than_a_group_at_once(harness: SqliteHarness) -> None:
    store = await harness.opened()
    records = [session(number, f"user-{number}") for number in range(2 * worker.GROUP + 9)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    assert await store.list() == records


async def test_very_many_are_ended_whole(harness: SqliteHarness) -> None:
    store = await harness.opened()
    records = [session(number, f"user-{number}") for number in range(1_100)]
    await asyncio.gather(*(store.create(record, FIVE) for record in records))
    ids = [record.id for record in records]
    unknown = [number.to_bytes(16, "big") for number in range(20_001)]
    gone = await store.end([*unknown, *ids], Code.TOKEN_REVOKED, WALL)
    assert gone == [ended(record) for record in records]
    assert await store.count() == 0


async def test_digests_that_begin_alike_are_told_apart(harness: SqliteHarness) -> None:
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


async def test_what_is_looked_for_is_found_by_an_index(harness: SqliteHarness, disk: Disk) -> None:
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
    await asyncio.gather(*(store.claim("alice", key, digest("body"), WALL, LEASE) for key in keys))
    await asyncio.gather(*(store.release_claim("alice", key) for key in keys[:10]))
    assert await store.expire(WALL + LEASE, KEEP_ENDED, 5_000) == 1_490


@pytest.mark.parametrize("why", ["somebody waits", "it takes long"])
async def test_cleaning_away_is_done_in_short_slices(
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
        monkeypatch.setattr(worker.Worker, "is_waited_for", True)
    assert [await store.expire(WALL, 0, 1_000) for _ in range(4)] == [100, 100, 50, 0]
    monkeypatch.undo()
    assert await store.count() == 0


# --- the end of all ------------------------------------------------------------------------------------------


async def test_the_end_of_all_is_rewritten_in_slices_and_holds_meanwhile(
    harness: SqliteHarness, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_SWEPT", 7)
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(50)]
    await opened(store, *records)
    disk.hang(("UPDATE sessions SET code",))
    try:
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 50
        assert await asyncio.to_thread(disk.reached.wait, 10)
        copy = SqliteHarness(harness.path.parent.parent / "copy" / "sessions.db")
        shutil.copytree(harness.path.parent, copy.path.parent)
    finally:
        disk.go_on.set()
    # A crash before the first slice: all have ended, and what is opened then has not.
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
        while each._database.sweeping:
            await each.count()
        assert await each.list() == expected
        assert [await each.get(record.id) for record in records] == [ended(record) for record in records]
        await each.close()
    db = sqlite3.connect(copy.path)
    assert db.execute("SELECT count(*), sum(code = 69) FROM sessions").fetchone() == (51, 50)
    assert db.execute("SELECT count(*) FROM ended_all").fetchone() == (0,)
    assert db.execute("SELECT count(*) FROM sessions WHERE code != 0 AND user != x''").fetchone() == (0,)
    db.close()


async def test_a_slice_that_fails_is_done_later(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    records = [session(number, f"user-{number}") for number in range(5)]
    await opened(store, *records)
    disk.fail(sqlite3.SQLITE_IOERR, "SQLITE_IOERR", at=("UPDATE sessions SET code",))
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    assert await store.count() == 0
    assert store._database.sweeping
    disk.mend()
    while store._database.sweeping:
        await store.count()
    assert await store.get(records[4].id) == ended(records[4])


async def test_ending_all_holds_for_sessions_that_take_the_place_of_earlier_ones(
    harness: SqliteHarness,
) -> None:
    store = await harness.opened()
    await opened(store, *(session(number, f"user-{number}") for number in range(5)))
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 5
    while store._database.sweeping:
        await store.count()
    await expire_all(store, WALL + 2 * KEEP_ENDED)
    later = [session(number, f"user-{number}") for number in range(10, 13)]
    await opened(store, *later)
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 3
    while store._database.sweeping:
        await store.count()
    assert await store.count() == 0
    assert [await store.get(each.id) for each in later] == [ended(each) for each in later]


async def test_a_mark_that_was_not_swept_spares_what_is_opened_after_it(
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


def test_a_file_that_goes_away_before_it_was_rewritten(tmp_path: Path) -> None:
    notices: list[str] = []
    file = SessionDatabase(
        tmp_path / "sessions.db",
        answers=AnswerLimits(),
        on_notice=lambda name, **values: notices.append(name),
    )
    file.open()
    file.perform([Create(session(1), FIVE)])
    assert file.end_all(Code.TOKEN_REVOKED, WALL) == 1
    (tmp_path / "sessions.db").unlink()
    assert file.sweeping
    file.sweep()
    assert not file.sweeping
    assert notices == ["store_missing"]
    file.close()


async def test_two_ends_of_all_in_a_row_keep_their_own_reasons(harness: SqliteHarness, disk: Disk) -> None:
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
            while store._database.sweeping:
                await store.count()
        assert await store.get(first.id) == ended(first)
        assert await store.get(second.id) == ended(second, Code.SESSION_REPLACED, WALL + 1)
        assert await store.list("alice") == []


# --- answers -------------------------------------------------------------------------------------------------


async def test_answers_are_bounded_after_a_failure_and_after_reopening(
    harness: SqliteHarness, disk: Disk
) -> None:
    limits = AnswerLimits(count=3, bytes=100, user_count=3, user_bytes=100)
    store = await harness.opened(connect=disk.connect, answers=limits)
    for number in range(3):
        await store.claim("alice", f"{number}", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", f"{number}", 30 * b"x", WALL + number, KEEP)
    disk.fail(sqlite3.SQLITE_FULL, "SQLITE_FULL", at=("BEGIN",))
    with pytest.raises(StoreUnavailable):
        await store.claim("bob", "k", digest("body"), WALL, LEASE)  # one is removed, one is written
    disk.mend()
    await store.close()
    store = await harness.opened(answers=limits)
    await store.claim("bob", "k", digest("body"), WALL, LEASE)
    await store.keep_answer("bob", "k", 60 * b"y", WALL, KEEP)
    states = [await store.claim("alice", f"{number}", digest("other"), WALL, 0) for number in range(3)]
    assert [claim.state for claim in states] == [ClaimState.NEW, ClaimState.NEW, ClaimState.CONFLICT]


async def test_an_answer_is_read_in_the_group_that_pushes_it_out(harness: SqliteHarness) -> None:
    limits = AnswerLimits(count=9, bytes=100, user_count=9, user_bytes=100)
    store = await harness.opened(answers=limits)
    await store.claim("alice", "k", digest("body"), WALL, LEASE)
    await store.keep_answer("alice", "k", 60 * b"x", WALL, KEEP)
    await store.claim("bob", "k", digest("body"), WALL, LEASE)
    claim, _ = await asyncio.gather(
        store.claim("alice", "k", digest("body"), WALL, LEASE),
        store.keep_answer("bob", "k", 60 * b"y", WALL, KEEP),
    )
    assert claim == Claim(ClaimState.DONE, 60 * b"x")
    assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.NEW)


# --- the form ----------------------------------------------------------------------------------------------------


async def test_what_is_made_is_what_this_version_says(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    said: list[object] = []

    def look(db: sqlite3.Connection) -> None:
        for name in ("synchronous", "journal_mode", "locking_mode"):
            said.append(db.execute(f"PRAGMA {name}").fetchone()[0])

    disk.before = look
    await store.ping()
    assert said == [2, "wal", "exclusive"]  # 2: each transaction is on the disk when it is done
    await store.close()
    db = sqlite3.connect(harness.path)
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
    db.close()
