"""Who may use the database file: modes, locks, versions."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from bench.disk import Disk
from tests.sessions.helpers import new_session
from tests.stores.contract import (
    FIVE,
    KEEP_ENDED,
    LEASE,
    MINUTE,
    WALL,
    digest,
    ended,
    opened,
    rotation,
    session,
)
from tests.stores.sqlite.harness import SqliteHarness, beside, change_file, mode
from zcproto.errors import Code, ConfigError
from zcproto.sessions.record import SessionRecord
from zcproto.stores.base import Claim, ClaimState, StoreUnavailable
from zcproto.stores.sqlite.file import APPLICATION_ID, VERSION
from zcproto.stores.sqlite.store import SqliteStore


async def test_file_has_mode_0600(harness: SqliteHarness) -> None:
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


async def test_folder_is_created_with_mode_0700(harness: SqliteHarness) -> None:
    await harness.opened()
    assert mode(harness.path.parent) == 0o700


async def test_only_digests_are_written(harness: SqliteHarness) -> None:
    from zcproto.sessions import SessionRegistry, SessionSettings

    registry = SessionRegistry(SessionSettings(), os.urandom)
    new = new_session(registry, "alice", client="zc/1", address="192.0.2.1", wall=WALL)
    store = await harness.opened()
    await opened(store, new.record)
    await store.close()
    written = harness.path.read_bytes()
    assert new.record.token_digest in written
    assert new.refresh_token is not None
    for secret in (new.token, new.refresh_token, new.refresh_token[:16], new.refresh_token[16:]):
        assert secret not in written


async def test_sealed_pair_of_a_refresh_is_removed_from_the_file_after_its_grace(
    harness: SqliteHarness,
) -> None:
    store = await harness.opened()
    records = [session(number) for number in range(3)]
    await opened(store, *records)
    for record, grace_ms in zip(records, (1, 1, MINUTE), strict=True):
        await store.rotate(rotation(record, wall=WALL, sealed=b"the pair", grace_ms=grace_ms))
    assert [await store.expire(WALL + 1, KEEP_ENDED, 1) for _ in range(3)] == [1, 1, 0]
    await store.close()
    with closing(sqlite3.connect(harness.path)) as db:
        assert db.execute("SELECT key, answer FROM answers").fetchall() == [(records[2].id, b"the pair")]


async def test_changes_are_on_disk_before_the_operation_returns(harness: SqliteHarness) -> None:
    copies = harness.path.parent.parent / "copies"
    store = await harness.opened()
    record = session()

    async def copied(name: str) -> SqliteStore:
        """Copy the files as a crash at this moment would leave them."""
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
    await store.claim("alice", "k", digest("body"), LEASE)
    claimed = await copied("claimed")
    assert await claimed.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.RUNNING)
    await store.end([record.id], Code.TOKEN_REVOKED, WALL)
    assert not isinstance(await (await copied("ended")).get(record.id), SessionRecord)
    late = session(2)
    await store.create(late, FIVE)
    await store.end_all(Code.TOKEN_REVOKED, WALL)
    assert await (await copied("all")).get(late.id) == ended(late)


@pytest.mark.parametrize("bits", [0o620, 0o604, 0o640])
async def test_file_accessible_to_others_is_refused(harness: SqliteHarness, bits: int) -> None:
    await (await harness.opened()).close()
    harness.path.chmod(bits)
    with pytest.raises(
        ConfigError, match=r"others can read or change this file .*; run: chmod 600 .*sessions\.db"
    ):
        await harness.opened()
    harness.path.chmod(0o600)
    await harness.opened()


@pytest.mark.parametrize("bits", [0o720, 0o702])
async def test_folder_writable_by_others_is_refused(harness: SqliteHarness, bits: int) -> None:
    harness.path.parent.mkdir()
    harness.path.parent.chmod(bits)
    with pytest.raises(ConfigError, match=r"others can change this folder .*; run: chmod go-w"):
        await harness.opened()
    assert not harness.path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_file_of_another_user_is_refused(harness: SqliteHarness) -> None:
    await (await harness.opened()).close()
    os.chown(harness.path, 12345, -1)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 12345\)"):
        await harness.opened()


async def test_path_that_is_not_a_regular_file_is_refused(harness: SqliteHarness) -> None:
    harness.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a regular file; move it away"):
        await harness.opened()


async def test_folder_that_is_a_file_is_refused(harness: SqliteHarness) -> None:
    harness.path.parent.write_text("")
    with pytest.raises((ConfigError, StoreUnavailable), match="cannot be opened"):
        await harness.opened()


async def test_lock_that_is_a_symbolic_link_is_refused(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    (harness.path.parent / "other").write_text("kept")
    beside(harness.path, ".lock").symlink_to("other")
    with pytest.raises(ConfigError, match="check the folder and its owner"):
        await harness.opened()
    assert (harness.path.parent / "other").read_text() == "kept"


async def test_dangling_symbolic_link_is_refused(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    harness.path.symlink_to("nowhere")
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await harness.opened()


async def test_old_sqlite_is_refused(harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigError, match=r"needs SQLite 3\.35\.0 or later"):
        await harness.opened()
    assert not harness.path.parent.exists()


async def test_file_of_a_newer_version_is_refused_and_unchanged(harness: SqliteHarness) -> None:
    await (await harness.opened()).close()
    change_file(
        harness.path, f"PRAGMA user_version = {VERSION + 1}", "UPDATE about SET version = version + 1"
    )
    before = harness.path.read_bytes()
    with pytest.raises(ConfigError, match=r"newer zcproto \(format 2, this one supports 1\)"):
        await harness.opened()
    assert harness.path.read_bytes() == before
    assert harness.notices == []


async def test_database_of_another_program_is_refused_and_unchanged(harness: SqliteHarness) -> None:
    harness.path.parent.mkdir()
    change_file(harness.path, "CREATE TABLE birds (name)", "INSERT INTO birds VALUES ('wren')")
    harness.path.chmod(0o600)
    before = harness.path.read_bytes()
    with pytest.raises(ConfigError, match="another program's database; move it away"):
        await harness.opened()
    assert harness.path.read_bytes() == before


async def test_second_store_on_the_file_is_refused(harness: SqliteHarness) -> None:
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
    """Start a process that has the file open, and yield its process id."""
    command = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        yield other.pid
        other.kill()


async def test_file_in_use_names_the_process(harness: SqliteHarness) -> None:
    with another_process(harness.path) as number, pytest.raises(ConfigError) as refused:
        await harness.opened()
    assert f"is in use by process {number};" in str(refused.value)
    await harness.opened()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file without writing a process id."""
    path.parent.mkdir()
    with beside(path, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_file_in_use_without_a_process_id_is_refused(harness: SqliteHarness) -> None:
    with locked(harness.path), pytest.raises(ConfigError, match="is in use by another process;"):
        await harness.opened()


async def test_file_system_without_locks_is_an_outage(
    harness: SqliteHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused)
        with pytest.raises(StoreUnavailable, match="No locks available"):
            await harness.opened()
    await harness.opened()


async def test_file_opened_by_another_program_is_an_outage_until_closed(harness: SqliteHarness) -> None:
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


async def test_other_programs_can_neither_read_nor_write_the_open_file(harness: SqliteHarness) -> None:
    store = await harness.opened()
    other = sqlite3.connect(harness.path, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("SELECT count(*) FROM sessions")
    other.close()
    await store.ping()


async def test_new_file_has_the_documented_schema(harness: SqliteHarness, disk: Disk) -> None:
    store = await harness.opened(connect=disk.connect)
    values: list[object] = []

    def look(db: sqlite3.Connection) -> None:
        for name in ("synchronous", "journal_mode", "locking_mode"):
            values.append(db.execute(f"PRAGMA {name}").fetchone()[0])

    disk.before = look
    await store.ping()
    assert values == [2, "wal", "exclusive"]  # 2: each transaction is on the disk when it is done
    await store.close()
    db = sqlite3.connect(harness.path)
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
    db.close()
