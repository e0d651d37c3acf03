"""The file of sessions: a database of SQLite that one process has to itself.

What this file decides: what is on the disk, in which statements it gets there, and what is done about a file
that is damaged, or of another version, or somebody else's.

Rules:
- All that is done to the rows at hand goes to the disk in one transaction (WAL, synchronous=FULL).
- Few statements for many operations: between two of them the interpreter may be taken away for some
  milliseconds, when the event loop is busy. So rows come in one piece of text and go in one statement.
- A damaged file is renamed, never deleted, and an empty one takes its place.
- Ending all sessions is one row that says up to which `n` they have ended; they are rewritten later, in slices.

It must not know: who asks, coroutines, clocks. It is for one thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from zcproto.common.text import escape_text
from zcproto.errors import CallError, Code, ConfigError
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.answers import AnswerLimits, Answers, Entry, Key
from zcproto.stores.base import MAX_LISTED, Claim, ClaimState
from zcproto.stores.sqlite.rows import (
    KEPT,
    ClaimRequest,
    Operation,
    Row,
    Wanted,
    WorkingSet,
    session_of,
    text,
    utf8,
)

VERSION: Final = 1
APPLICATION_ID: Final = 0x7A637031  # zcp1
MIN_SQLITE: Final = (3, 35, 0)

Notice = Callable[..., object]
"""Called with the name of what happened and values that say more. It must not raise."""

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

_COLUMNS: Final = tuple(Row.__init__.__annotations__)[:-1]
_BLOBS: Final = ("id", "token", "refresh", "user", "client", "address", "key")
_NAMES: Final = ", ".join(_COLUMNS)
_AS_TEXT: Final = (
    "group_concat("
    + "||' '||".join(f"hex({name})" if name in _BLOBS else name for name in _COLUMNS)
    + ", char(10))"
)
_UPDATE: Final = " ON CONFLICT (n) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _COLUMNS[1:]
)

# SQLite takes at most 32,766 values in one statement.
_KEYS: Final = 5_000
_ROWS: Final = 1_000
_SLICE: Final = 256
_SWEPT: Final = 1_000
_EXPIRED: Final = 100  # half a millisecond
_MOST_EXPIRED: Final = 800  # each statement has a cost of its own: where nobody waits, fewer do more
_CACHED: Final = 16  # the statements for many rows are large, and of many sizes

_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FULL: Final = sqlite3.SQLITE_FULL
_OF_THE_DISK: Final = (
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_INTERRUPT),
)
"""What may be otherwise the next time. All else, when a file is opened, is damage."""
_SHORTEST: Final = 512
_PARTS: Final = ("", "-wal", "-journal", "-shm")
_OTHERS: Final = 0o077
_OTHERS_WRITE: Final = 0o022
_NOT_MENDED_BY_TIME: Final = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.EISDIR)

_T = TypeVar("_T")

Statement = tuple[str, Sequence[Any]]


class Position(NamedTuple):
    """How far the file was read."""

    ended: bool = False
    due: int = -1
    n: int = 0


class Outcome(NamedTuple):
    """What an operation came to."""

    result: object = None
    error: CallError | None = None


class StorageError(Exception):
    """The disk, or the file, does not do what it should. The message is for the operator."""


class SessionFile:
    """Made without I/O. Any method but `open` and `close` opens the file again if it had to be closed."""

    def __init__(
        self,
        path: Path,
        *,
        answers: AnswerLimits,
        on_notice: Notice,
        connect: Connect = sqlite3.connect,
    ) -> None:
        self._path = path
        self._limits = answers
        self._on_notice = on_notice
        self._connect = connect
        self._db: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock: int | None = None
        self._answers: Answers | None = None  # as in the file, without the answers themselves
        self._changed: dict[Key, Entry | None] = {}  # not written yet
        self._marks: list[tuple[int, int, int]] = []  # of ended_all, the oldest first
        self._swept = 0  # no kept session up to this n is under a mark

    # Opening and closing

    def open(self) -> None:
        """Raises ConfigError for what waiting cannot mend, StorageError for what it may."""
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            raise ConfigError(
                [
                    f"store.url: sqlite needs SQLite {'.'.join(map(str, MIN_SQLITE))} or later,"
                    f" this Python has {sqlite3.sqlite_version}; use another Python, or another store"
                ]
            )
        try:
            self._check_folder()
            self._take_lock()
            self._reopen()
        except OSError as error:
            self.close()
            said = f"{self._shown}: cannot be opened: {error.strerror or error}"
            if error.errno in _NOT_MENDED_BY_TIME:
                raise ConfigError([f"{said}; check the folder and its owner"]) from error
            raise StorageError(said) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go. What fails here does so again at the next start, and is told then."""
        self._disconnect()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _shown(self) -> str:
        return escape_text(str(self._path))

    def _check_folder(self) -> None:
        folder = self._path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & _OTHERS_WRITE:
            shown = escape_text(shlex.quote(str(folder)))
            raise ConfigError([f"{self._shown}: others may write to its folder; run: chmod go-w {shown}"])

    def _take_lock(self) -> None:
        """Have the file alone, among processes and within this one."""
        path = self._path.with_name(self._path.name + ".lock")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise ConfigError(
                [f"{self._shown}: is in use by {who}; one server has a file to itself, stop the other one"]
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def _reopen(self) -> sqlite3.Connection:
        """Open the file, a new one if it is not there, or if it is damaged."""
        for _ in range(2):
            self._make_file()
            try:
                return self._open_database()
            except (sqlite3.Error, UnicodeDecodeError) as error:
                self._disconnect()
                if code_of(error) in _OF_THE_DISK and not is_damage(error):
                    raise StorageError(reason_of(error)) from error
                self._set_aside(reason_of(error))
            except BaseException:
                self._disconnect()
                raise
        raise StorageError("a new file is damaged at once: the disk fails")

    def _make_file(self) -> None:
        """See to it that there is a file, and one that nobody else may use."""
        path = self._path
        if not os.path.lexists(path):
            # What is left of another file must not be taken for a part of this one.
            self._move_parts(_PARTS[1:])
            self._make_empty()
            return
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError([f"{self._shown}: is no file; move it away"])
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                [f"{self._shown}: belongs to another user (uid {status.st_uid}); run as that user"]
            )
        if status.st_mode & _OTHERS:
            shown = escape_text(shlex.quote(str(path)))
            raise ConfigError([f"{self._shown}: others may use this file; run: chmod 600 {shown}"])

    def _make_empty(self) -> None:
        """Make a database without sessions, whole before it gets its name."""
        staged = self._path.with_name(f".{self._path.name}.new")
        for part in _PARTS:
            Path(f"{staged}{part}").unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(staged, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # a umask may have taken the owner's bits
        finally:
            os.close(descriptor)
        with closing(self._connect(str(staged), timeout=0, isolation_level=None)) as db:
            db.executescript(
                f"BEGIN; {_SCHEMA} INSERT INTO about VALUES ({VERSION}, 0);"  # noqa: S608 - a number of this file
                f" PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
            )
        staged.rename(self._path)
        self._sync_folder()

    def _open_database(self) -> sqlite3.Connection:
        db = self._db = self._connect(
            str(self._path), timeout=0, isolation_level=None, cached_statements=_CACHED
        )
        status = self._path.stat()
        self._inode = status.st_dev, status.st_ino
        if status.st_size < _SHORTEST:
            raise _Damage("the file is too short")  # SQLite would take it for a new one
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before WAL: then there is no file of shared memory
        self._check_version(db)  # before anything is changed: it may be another program's
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"the file cannot be written ahead: its journal is {mode!r}")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA cache_size = -8000")  # 8 MB
        db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages, 16 MB: many changes of one page become one
        db.execute("PRAGMA automatic_index = OFF")  # it would scan all sessions to note the use of some
        db.execute("PRAGMA journal_size_limit = 16777216")
        (checked,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if checked != "ok":
            raise _Damage(checked)
        # To the disk what a failure may have left in its cache only.
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._read_marks(db)
        self._swept = 0
        return db

    def _check_version(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        schema = _schema_of(db)
        tables = {name for name, _ in schema}
        if not tables & {b"sessions", b"about"}:
            raise ConfigError([f"{self._shown}: is another program's database; move it away"])
        said = db.execute("SELECT version FROM about").fetchall() if b"about" in tables else []
        if said != [(version,)] or application != APPLICATION_ID:
            raise _Damage("the file does not say which version wrote it")
        if version > VERSION:
            raise ConfigError(
                [
                    f"{self._shown}: was written by a newer zcproto (format {version}, this one knows"
                    f" {VERSION}); run that version, or move the file away: then all log in again"
                ]
            )
        with closing(sqlite3.connect(":memory:")) as wanted:
            wanted.executescript(_SCHEMA)
            if schema != _schema_of(wanted):
                raise _Damage("the tables are not those that this version makes")

    def _disconnect(self) -> None:
        self._answers = None
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
        """Rename what is there of the file under the next free name, which is returned."""
        present = [part for part in parts if os.path.lexists(f"{self._path}{part}")]
        number = 1
        while any(os.path.lexists(f"{self._path}.damaged-{number}{part}") for part in _PARTS):
            number += 1
        aside = f"{self._path}.damaged-{number}"
        for part in present:  # the file first: without it nobody reads the others
            os.rename(f"{self._path}{part}", f"{aside}{part}")
        if present:
            self._sync_folder()
        return aside

    def _sync_folder(self) -> None:
        descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # What can fail

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What `action` returns. Raises StorageError if the disk or the file fails, and whatever is a mistake of
        the caller; then nothing of the action was done, or, after a failure, perhaps all of it."""
        try:
            return action()
        except sqlite3.IntegrityError:
            self._roll_back()
            raise
        except (sqlite3.Error, OSError, MemoryError, UnicodeDecodeError) as error:
            raise StorageError(self._after(error)) from error
        except ConfigError as error:  # of a file that came while we ran
            self._disconnect()
            raise StorageError(str(error)) from error
        except BaseException:
            self._roll_back()
            raise

    def _after(self, error: Exception) -> str:
        """Get ready for the next attempt; what to say of this one."""
        reason = reason_of(error)
        if is_damage(error):
            self._disconnect()
            try:
                self._set_aside(reason)
            except OSError as worse:
                return f"{reason}; and it cannot be set aside: {worse.strerror}"
        elif code_of(error) == _FULL:
            self._roll_back()
        else:
            self._disconnect()
        return reason

    def _roll_back(self) -> None:
        self._answers = None
        if self._db is not None and self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                self._disconnect()

    def _ready(self) -> sqlite3.Connection:
        """The database, opened again if it has to be."""
        if self._db is not None:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                status = None
            if status is None or (status.st_dev, status.st_ino) != self._inode:
                self._disconnect()
                self._on_notice("store_missing", path=str(self._path))
        return self._db or self._reopen()

    def _write(self, db: sqlite3.Connection, statements: Sequence[Statement]) -> None:
        if len(statements) == 1:  # a transaction of its own
            db.execute(*statements[0])
        elif statements:
            db.execute("BEGIN")
            for statement in statements:
                db.execute(*statement)
            db.execute("COMMIT")

    # Rows at hand

    def perform(self, operations: Sequence[Operation]) -> list[Outcome]:
        """Do some operations, one after the other, in one transaction."""
        db = self._ready()
        wanted = Wanted()
        for operation in operations:
            operation.want(wanted)
        answers = self._read_answers(db) if self._answers is None else self._answers
        rows = WorkingSet(self._read(db, wanted), answers)
        outcomes = [self._outcome(operation, rows, db) for operation in operations]
        self._write(db, [*_upserts(list(rows.changed.values())), *_answer_statements(self._changed)])
        self._written()
        return outcomes

    def _outcome(self, operation: Operation, rows: WorkingSet, db: sqlite3.Connection) -> Outcome:
        try:
            result = operation.apply(rows)
        except CallError as error:
            return Outcome(error=error)
        if isinstance(operation, ClaimRequest) and result == Claim(ClaimState.DONE):
            (answer,) = db.execute(
                "SELECT answer FROM answers WHERE user = ? AND key = ?",
                (utf8(operation.user), utf8(operation.key)),
            ).fetchone()
            return Outcome(Claim(ClaimState.DONE, answer))
        return Outcome(result)

    def _read(self, db: sqlite3.Connection, wanted: Wanted) -> list[Row]:
        found: dict[int, Row] = {}
        for query, keys in _queries(wanted):
            (lines,) = db.execute(query, keys).fetchone()
            for line in lines.split("\n") if lines else ():
                row = _row(line)
                assert row.n is not None
                found[row.n] = self._marked(row)
        return [found[n] for n in sorted(found)]

    def _read_answers(self, db: sqlite3.Connection) -> Answers:
        self._changed.clear()
        answers = self._answers = Answers(self._limits, self._changed.__setitem__)
        query = "SELECT user, key, digest, until, answer IS NULL, length(answer) FROM answers ORDER BY until"
        for user, key, digest, until, running, size in db.execute(query):
            entry = Entry(digest, until)
            entry.running, entry.size = bool(running), size or 0
            answers.restore(text(user), text(key), entry)
        return answers

    def _written(self) -> None:
        for entry in self._changed.values():
            if entry is not None:
                entry.answer = None  # the file has it
        self._changed.clear()

    def _marked(self, row: Row) -> Row:
        """A row as it is since all sessions were ended."""
        if row.code == KEPT:
            for n, code, wall in self._marks:
                assert row.n is not None
                if row.n <= n:
                    row.end(Code(code), wall)
                    break
        return row

    # The whole file

    def ping(self) -> None:
        """Write something."""
        self._write(self._ready(), [("UPDATE about SET pings = (pings + 1) & 0xFFFF", ())])

    def load(self, start: Position) -> tuple[list[SessionRecord | EndedRecord], Position | None]:
        """A slice of all rows, kept ones first, and where the next starts; None after the last."""
        if start.ended:
            where, order = "code != 0 AND (due, n) > (?, ?)", "due, n"
            arguments: tuple[int, ...] = (start.due, start.n)
        else:
            where, order, arguments = "code = 0 AND n > ?", "n", (start.n,)
        rows = self._select(where, arguments, order, _SLICE)
        records: list[SessionRecord | EndedRecord]
        if start.ended or self._marks:
            records = [self._marked(Row(*row)).record() for row in rows]
        else:
            records = [session_of(*row[1:-2]) for row in rows]
        if len(rows) == _SLICE:
            return records, Position(start.ended, rows[-1][-1], rows[-1][0])
        return records, None if start.ended else Position(ended=True)

    def list_all(self) -> list[SessionRecord]:
        """The sessions that were opened first."""
        rows = self._select("code = 0 AND n > ?", (self._last_mark(),), "n", MAX_LISTED)
        return [session_of(*row[1:-2]) for row in rows]

    def count(self) -> int:
        db = self._ready()
        query = "SELECT count(*) FROM sessions WHERE code = 0 AND n > ?"
        count: int = db.execute(query, (self._last_mark(),)).fetchone()[0]
        return count

    def end_all(self, code: Code, wall: int) -> int:
        count = self.count()
        if count:
            db = self._ready()
            self._write(db, [("INSERT INTO ended_all SELECT max(n), ?, ? FROM sessions", (code, wall))])
            self._read_marks(db)
        return count

    def sweep(self) -> None:
        """Rewrite some of the sessions that were ended with all others."""
        db = self._ready()
        if not self._marks:
            return
        n, code, wall = self._marks[0]
        query = "SELECT n FROM sessions WHERE code = 0 AND n > ? AND n <= ? ORDER BY n LIMIT ?"
        found = [row[0] for row in db.execute(query, (self._swept, n, _SWEPT))]
        if found:
            blank = ", ".join(f"{name} = x''" for name in _BLOBS if name not in ("id", "token"))
            change = f"UPDATE sessions SET code = ?, due = ?, {blank} WHERE n IN ({_holes(len(found))})"  # noqa: S608 - the names are of this file
            self._write(db, [(change, (code, wall, *found))])
            self._swept = found[-1]
        else:
            self._write(db, [("DELETE FROM ended_all WHERE n = ?", (n,))])
            self._read_marks(db)

    @property
    def sweeping(self) -> bool:
        """Whether there is something to sweep."""
        return bool(self._marks)

    def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """Note when sessions were last used."""
        latest: dict[bytes, int] = {}
        for id_, used_at in uses:
            latest[id_] = max(used_at, latest.get(id_, 0))
        statements = []
        for chunk in _chunks(list(latest.items()), _ROWS):
            values = ", ".join(["(?, ?)"] * len(chunk))
            change = (
                f"WITH used (id, wall) AS (VALUES {values})"  # noqa: S608 - holes only
                " UPDATE sessions SET last_used_at = used.wall FROM used"
                " WHERE substr(sessions.id, 1, 8) = substr(used.id, 1, 8) AND sessions.id = used.id"
                " AND sessions.id != x'' AND code = 0"
                " AND last_used_at < used.wall"
            )
            statements.append((change, [value for use in chunk for value in use]))
        self._write(self._ready(), statements)

    def expire(self, wall: int, keep_ended_ms: int, limit: int, enough: Callable[[], bool]) -> int:
        """Remove what is past its time: sessions, then memories, then answers; at most `limit`, and fewer if it is
        `enough`, which is asked now and then."""
        db = self._ready()
        answers = self._read_answers(db) if self._answers is None else self._answers
        removed = 0
        db.execute("BEGIN")
        for code, before in (("= 0", wall), ("!= 0", wall - keep_ended_ms)):
            past = f"SELECT n FROM sessions WHERE code {code} AND due <= ? ORDER BY due LIMIT ?"  # noqa: S608
            change = f"DELETE FROM sessions WHERE n IN ({past})"  # noqa: S608 - parts of this file
            step = _EXPIRED
            while not (removed and enough()):
                wanted = min(step, limit - removed)
                gone = db.execute(change, (before, wanted)).rowcount
                removed += gone
                if gone < wanted or removed >= limit:
                    break
                step = min(2 * step, _MOST_EXPIRED)
        removed += answers.expire(wall, limit - removed)
        for statement in _answer_statements(self._changed):
            db.execute(*statement)
        db.execute("COMMIT")
        self._written()
        return removed

    def _select(self, where: str, arguments: Iterable[int], order: str, limit: int) -> list[tuple[Any, ...]]:
        query = f"SELECT {_NAMES} FROM sessions WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608 - parts of this file
        return self._ready().execute(query, (*arguments, limit)).fetchall()

    def _last_mark(self) -> int:
        return self._marks[-1][0] if self._marks else 0

    def _read_marks(self, db: sqlite3.Connection) -> None:
        self._marks = db.execute("SELECT n, code, wall FROM ended_all ORDER BY n").fetchall()


class _Damage(sqlite3.DatabaseError):
    """A check of the whole file found something."""


def _schema_of(db: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
    query = "SELECT CAST(name AS BLOB), CAST(sql AS BLOB) FROM sqlite_master ORDER BY 1"
    return db.execute(query).fetchall()


def is_damage(error: Exception) -> bool:
    """What is in the file is at fault. The messages of SQLite quote it, be that UTF-8 or not."""
    short_read = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ
    return short_read or code_of(error) in _DAMAGED or isinstance(error, UnicodeDecodeError)


def code_of(error: Exception) -> int:
    """The primary code of SQLite."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def reason_of(error: Exception) -> str:
    """For the operator: no statement, no value."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return "the database disk image is malformed"
    name = getattr(error, "sqlite_errorname", "")
    return f"{error} ({name})" if name else str(error) or type(error).__name__


def _holes(count: int) -> str:
    return ", ".join("?" * count)


def _chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _queries(wanted: Wanted) -> Iterator[tuple[str, list[bytes]]]:
    """Statements that give all rows that are wanted, as one text each."""
    kinds = [_chunks(list(keys), _KEYS) for keys in (wanted.ids, wanted.tokens, wanted.users)]
    conditions = (
        "id != x'' AND substr(id, 1, 8) IN ({0}) AND id IN ({0})",
        "substr(token, 1, 8) IN ({0}) AND token IN ({0})",
        "code = 0 AND user IN ({0})",
    )
    for chunks in zip_longest(*kinds, fillvalue=()):
        found = " UNION ".join(
            f"SELECT n FROM sessions WHERE {condition.format(_holes(len(chunk)))}"  # noqa: S608 - holes only
            for condition, chunk in zip(conditions, chunks, strict=True)
            if chunk
        )
        query = f"SELECT {_AS_TEXT} FROM sessions WHERE n IN ({found})"  # noqa: S608
        ids, tokens, users = chunks
        yield query, [*(id_[:8] for id_ in ids), *ids, *(token[:8] for token in tokens), *tokens, *users]


def _row(line: str) -> Row:
    fields = line.split(" ")
    values: list[Any] = [int(fields[0]), *map(bytes.fromhex, fields[1:8]), *map(int, fields[8:])]
    return Row(*values)


def _upserts(rows: Sequence[Row]) -> Iterator[Statement]:
    one = f"({_holes(len(_COLUMNS))})"
    for chunk in _chunks(rows, _ROWS):
        values = ", ".join([one] * len(chunk))
        statement = f"INSERT INTO sessions ({_NAMES}) VALUES {values}{_UPDATE}"  # noqa: S608 - holes only
        yield statement, [getattr(row, name) for row in chunk for name in _COLUMNS]


def _answer_statements(changed: Mapping[Key, Entry | None]) -> Iterator[Statement]:
    removed = [key for key, entry in changed.items() if entry is None]
    for gone in _chunks(removed, _ROWS):
        pairs = ", ".join(["(?, ?)"] * len(gone))
        statement = f"DELETE FROM answers WHERE (user, key) IN (VALUES {pairs})"  # noqa: S608 - holes only
        yield statement, [utf8(part) for key in gone for part in key]
    kept = [(key, entry) for key, entry in changed.items() if entry is not None]
    for chunk in _chunks(kept, _ROWS):
        values = ", ".join(["(?, ?, ?, ?, ?)"] * len(chunk))
        statement = (
            f"INSERT INTO answers (user, key, digest, until, answer) VALUES {values}"  # noqa: S608 - holes only
            " ON CONFLICT (user, key) DO UPDATE"
            " SET digest = excluded.digest, until = excluded.until, answer = excluded.answer"
        )
        yield (
            statement,
            [
                value
                for (user, key), entry in chunk
                for value in (utf8(user), utf8(key), entry.digest, entry.until, entry.answer)
            ],
        )
