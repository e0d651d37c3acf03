"""The database file of sessions: how it is opened, checked, locked and replaced when it is damaged.

Decides: the schema and pragmas, who may use the file, which errors mean damage, and what happens to
a file that is damaged, of a newer version or another program's.

Rules:
- One process holds the lock beside the file; the file is 0600 and so are its parts.
- A damaged file is renamed, never deleted, and an empty one takes its place.
- After any failure but a full disk the file is closed and opened again, so that its cache holds nothing that is not
  on disk.

It must not know: who calls, coroutines, clocks. It is for one thread.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, TypeVar

from zcproto.common.files import (
    OTHERS_ANY,
    check_access,
    check_folder,
    create_file,
    install_file,
    staging_path,
    sync_folder,
    try_lock,
)
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.stores.base import Notice, StoreUnavailable

VERSION: Final = 1
APPLICATION_ID: Final = 0x7A637031  # zcp1
MIN_SQLITE: Final = (3, 35, 0)

Connect = Callable[..., sqlite3.Connection]

_SCHEMA: Final = """
CREATE TABLE sessions (
    n INTEGER PRIMARY KEY AUTOINCREMENT, -- the order of opening; a mark in ended_all must never meet a later one
    id BLOB NOT NULL,                  -- empty: the memory of a token, whose session lives on with another
    token BLOB NOT NULL,               -- digests, both
    refresh BLOB NOT NULL,
    user BLOB NOT NULL,                -- UTF-8, as the next three
    client BLOB NOT NULL,
    address BLOB NOT NULL,
    key BLOB NOT NULL,
    flags INTEGER NOT NULL,
    created_at INTEGER NOT NULL,       -- milliseconds since the epoch, as all times
    last_used_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    refresh_expires_at INTEGER NOT NULL,
    code INTEGER NOT NULL,             -- 0: kept; else what the token is answered with
    due INTEGER NOT NULL,              -- kept: when both tokens are past; else when it ended
    CHECK (length(id) IN (0, 16) AND length(token) = 32 AND length(refresh) IN (0, 32)),
    CHECK (code IN (0, 68, 69, 70) AND typeof(code) = 'integer' AND flags BETWEEN 0 AND 127),
    CHECK (typeof(created_at) = 'integer' AND typeof(last_used_at) = 'integer' AND typeof(due) = 'integer'),
    CHECK (typeof(expires_at) = 'integer' AND typeof(refresh_expires_at) = 'integer'),
    CHECK (min(created_at, last_used_at, expires_at, refresh_expires_at, due) >= 0)
);
CREATE INDEX by_token ON sessions (substr(token, 1, 8));  -- digests differ at once: half the pages to write
CREATE INDEX by_id ON sessions (substr(id, 1, 8)) WHERE id != x'';
CREATE INDEX kept_by_user ON sessions (user) WHERE code = 0;
CREATE INDEX kept_by_due ON sessions (due) WHERE code = 0;
CREATE INDEX ended_by_due ON sessions (due) WHERE code != 0;
CREATE TABLE ended_all (               -- kept sessions up to n have ended
    n INTEGER PRIMARY KEY,
    code INTEGER NOT NULL,
    wall INTEGER NOT NULL
);
CREATE TABLE answers (                 -- of requests with an idempotency key
    user BLOB NOT NULL,
    key BLOB NOT NULL,
    digest BLOB NOT NULL,
    until INTEGER NOT NULL,
    answer BLOB,                       -- NULL: it runs
    PRIMARY KEY (user, key)
);
CREATE TABLE about (                   -- one row, in every version
    version INTEGER NOT NULL,          -- as user_version: damage to one of them is no newer version
    pings INTEGER NOT NULL
);
"""
# SQLite stores this text with its comments in the file, and a file with another text counts as damaged: a change of
# a comment needs a new VERSION.

_PRAGMAS: Final = (
    "PRAGMA synchronous = FULL",
    "PRAGMA fullfsync = ON",  # macOS: through the cache of the disk
    "PRAGMA cache_size = -8000",  # 8 MB
    "PRAGMA wal_autocheckpoint = 4000",  # pages, 16 MB: many changes of a page become one
    "PRAGMA automatic_index = OFF",  # it would scan all sessions to record the use of some
    "PRAGMA journal_size_limit = 16777216",
)
CACHED_STATEMENTS: Final = 16  # statements for many rows are large and of many sizes

_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TRANSIENT: Final = (
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_INTERRUPT),
)
"""Errors that may not occur again. Every other error while a file is opened is damage."""

_SHORTEST: Final = 512
_PARTS: Final = ("", "-wal", "-journal", "-shm")
_PERMANENT: Final = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)

T = TypeVar("T")


class _Damage(sqlite3.DatabaseError):
    """A check of the whole file found damage."""


class DatabaseFile:
    """A database file. Its constructor does no I/O. `ready` opens the file again if it had to be closed."""

    def __init__(self, path: Path, *, on_notice: Notice, connect: Connect = sqlite3.connect) -> None:
        self._path = path
        self._on_notice = on_notice
        self._connect = connect
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock: int | None = None

    def opened(self, db: sqlite3.Connection) -> None:
        """Read what is cached of the file; called each time that it was opened."""

    def invalidate(self) -> None:
        """Drop what is cached of the file: a change was rolled back, or the file closed."""

    # --- opening and closing -----------------------------------------------------------------------

    def open(self) -> None:
        """Lock and open the file; `close` it also after a failure.

        Raises StoreUnavailable, or ConfigError for a fault that retrying cannot fix.
        """
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            raise ConfigError(
                [
                    f"store.url: sqlite needs SQLite {'.'.join(map(str, MIN_SQLITE))} or later,"
                    f" this Python has {sqlite3.sqlite_version}; use another Python, or another store"
                ]
            )
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_folder(self._path.parent)
            self._take_lock()
            self._reopen()
        except OSError as error:
            message = f"{self._shown}: cannot be opened: {error.strerror or error}"
            if error.errno in _PERMANENT:
                raise ConfigError([f"{message}; check the folder and its owner"]) from error
            raise StoreUnavailable(message) from error

    def close(self) -> None:
        """Close the file and release the lock. A failure will show, and be reported, at the next start."""
        self._disconnect()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _shown(self) -> str:
        return escape_text(str(self._path))

    def _take_lock(self) -> None:
        """Lock the file against other processes, and against another store in this one."""
        path = self._path.with_name(self._path.name + ".lock")
        self._lock = try_lock(path)
        if self._lock is None:
            holder = path.read_bytes()[:32].decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise ConfigError(
                [f"{self._shown}: is in use by {who}; only one server can use a file, stop the other one"]
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def _reopen(self) -> sqlite3.Connection:
        """Open the file, or an empty one if it is missing or damaged."""
        for _ in range(2):
            self._ensure_file()
            try:
                return self._open_database()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                self._disconnect()
                if may_pass(error):
                    raise StoreUnavailable(reason_of(error)) from error
                self._set_aside(reason_of(error))
            except BaseException:
                self._disconnect()
                raise
        raise StoreUnavailable("a new file was damaged at once: check the disk")

    def _ensure_file(self) -> None:
        """Create the file if it is missing, and check that only its owner can use it."""
        path = self._path
        if not os.path.lexists(path):
            # The parts of a lost file must not be taken for parts of the new one.
            self._move_parts(_PARTS[1:])
            self._create()
            return
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError([f"{self._shown}: is not a regular file; move it away"])
        check_access(path, status, OTHERS_ANY)

    def _create(self) -> None:
        """Create a database without sessions, complete before it gets its name."""
        staged = staging_path(self._path)
        for part in _PARTS:
            Path(f"{staged}{part}").unlink(missing_ok=True)
        os.close(create_file(staged))
        with closing(self._connect(str(staged), timeout=0, isolation_level=None)) as db:
            create_tables(db)
        install_file(staged, self._path)

    def _open_database(self) -> sqlite3.Connection:
        db = self._db = self._connect(
            str(self._path), timeout=0, isolation_level=None, cached_statements=CACHED_STATEMENTS
        )
        status = self._path.stat()
        self._inode = status.st_dev, status.st_ino
        if status.st_size < _SHORTEST:
            raise _Damage("the file is too short")  # SQLite would take it for a new one
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL, which then needs no shared memory
        self._check_version(db)  # before anything is changed: it may be another program's
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreUnavailable(
                f"the file does not support a write-ahead log: its journal mode is {mode!r}"
            )
        for pragma in _PRAGMAS:
            db.execute(pragma)
        (checked,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if checked != "ok":
            raise _Damage(checked)
        # After a failure the last changes may be in the operating system's cache only: write them to disk.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.opened(db)
        return db

    def _check_version(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        schema = _schema_of(db)
        tables = {name for name, _ in schema}
        if not tables & {b"sessions", b"about"}:
            raise ConfigError([f"{self._shown}: is another program's database; move it away"])
        recorded = db.execute("SELECT version FROM about").fetchall() if b"about" in tables else []
        if recorded != [(version,)] or application != APPLICATION_ID:
            raise _Damage("the file does not record which version wrote it")
        if version > VERSION:
            raise ConfigError(
                [
                    f"{self._shown}: was written by a newer zcproto (format {version}, this one supports"
                    f" {VERSION}); run that version, or move the file away: then all users log in again"
                ]
            )
        with closing(sqlite3.connect(":memory:")) as expected:
            expected.executescript(_SCHEMA)
            if schema != _schema_of(expected):
                raise _Damage("the tables are not those of this version")

    def _disconnect(self) -> None:
        self.invalidate()
        if self._db is not None:
            db, self._db = self._db, None
            try:
                db.close()
            except sqlite3.Error as error:
                self._on_notice("store_close_failed", reason=reason_of(error))

    def _set_aside(self, reason: str) -> None:
        aside = self._move_parts(_PARTS)
        self._on_notice("store_damaged", path=str(self._path), aside=aside, reason=reason)

    def _move_parts(self, parts: Sequence[str]) -> str:
        """Rename the existing parts of the file, and return the new name of the file."""
        present = [part for part in parts if os.path.lexists(f"{self._path}{part}")]
        number = 1
        while any(os.path.lexists(f"{self._path}.damaged-{number}{part}") for part in _PARTS):
            number += 1
        aside = f"{self._path}.damaged-{number}"
        for part in present:  # the file first: the others are not read without it
            os.rename(f"{self._path}{part}", f"{aside}{part}")
        if present:
            sync_folder(self._path.parent)
        return aside

    # --- failures ----------------------------------------------------------------------------------

    def attempt(self, action: Callable[[], T]) -> T:
        """Run `action` and return its result.

        Raises StoreUnavailable if the disk or the file fails: then all of it may have been done, or nothing.
        Any other exception is a mistake of the caller, and nothing was done.
        """
        try:
            return action()
        except sqlite3.IntegrityError:
            self._roll_back()
            raise
        except (sqlite3.Error, OSError, MemoryError, UnicodeDecodeError) as error:
            raise StoreUnavailable(self._recover(error)) from error
        except ConfigError as error:  # about a file that appeared while the server runs
            self._disconnect()
            raise StoreUnavailable(str(error)) from error
        except BaseException:
            self._roll_back()
            raise

    def _recover(self, error: Exception) -> str:
        """Prepare for the next attempt, and return the reason why this one failed."""
        reason = reason_of(error)
        if is_damage(error):
            self._disconnect()
            try:
                self._set_aside(reason)
            except OSError as worse:
                return f"{reason}; and it cannot be set aside: {worse.strerror}"
        elif code_of(error) == sqlite3.SQLITE_FULL:
            self._roll_back()
        else:
            self._disconnect()
        return reason

    def _roll_back(self) -> None:
        self.invalidate()
        if self._db is not None and self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                self._disconnect()

    def ready(self) -> sqlite3.Connection:
        """Return the database, opened again if it has to be."""
        if self._db is not None:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status is None or (status.st_dev, status.st_ino) != self._inode:
                self._disconnect()
                self._on_notice("store_missing", path=str(self._path))
        return self._db or self._reopen()


def create_tables(db: sqlite3.Connection) -> None:
    """Make a new database one without sessions."""
    db.executescript(
        f"BEGIN; {_SCHEMA} INSERT INTO about VALUES ({VERSION}, 0);"  # noqa: S608 - a number of this file
        f" PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
    )


def _schema_of(db: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
    query = "SELECT CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_master ORDER BY 1"
    return db.execute(query).fetchall()


def is_damage(error: Exception) -> bool:
    """Return whether the content of the file is at fault.

    Messages of SQLite quote the content, valid UTF-8 or not, so a UnicodeDecodeError means damage too.
    """
    short_read = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ
    return short_read or code_of(error) in _DAMAGED or isinstance(error, UnicodeDecodeError)


def may_pass(error: Exception) -> bool:
    """Return whether an error says nothing about the content of the file: its disk may be full."""
    return code_of(error) in _TRANSIENT and not is_damage(error)


def code_of(error: Exception) -> int:
    """Return the primary result code of SQLite."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def reason_of(error: Exception) -> str:
    """Describe an error for the operator, without statements or values."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return "the database disk image is malformed"
    name = getattr(error, "sqlite_errorname", "")
    return f"{error} ({name})" if name else str(error) or type(error).__name__
