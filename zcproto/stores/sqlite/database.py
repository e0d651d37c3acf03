"""The statements that read and write sessions in the database file.

Rules:
- All changes to a working set are written in one transaction (WAL, synchronous=FULL).
- Few statements for many operations: while the event loop is busy, another thread may wait some milliseconds for
  the interpreter after each statement. So rows are read as one text and written by one statement.
- Ending all sessions writes one row, the mark up to which `n` they have ended; the sessions are rewritten later,
  in slices.
- The sealed pair of a refresh is written with it, among the answers under a name that no user has: who repeats the
  refresh after a crash, because its answer was lost, gets the pair. A clean-up removes it after its grace.

It must not know: who calls, coroutines, clocks. It is for one thread.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from zcproto.errors import CallError, Code
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.answers import DIGEST_SIZE, AnswerLimits, Answers, Entry, Key
from zcproto.stores.base import MAX_LISTED, Notice, StoreUnavailable
from zcproto.stores.sqlite.file import CACHED_STATEMENTS, Connect, DatabaseFile, create_tables, reason_of
from zcproto.stores.sqlite.rows import (
    COLUMNS,
    MAX_REPEATABLE,
    Operation,
    RecentRotations,
    Row,
    SealedPair,
    WorkingSet,
    columns_of,
    record_of,
    text,
    utf8,
)

_BLOBS: Final = ("id", "token", "refresh", "user", "client", "address", "key")
_NAMES: Final = ", ".join(COLUMNS)
_AS_TEXT: Final = (
    "group_concat("
    + "||' '||".join(f"hex({name})" if name in _BLOBS else name for name in COLUMNS)
    + ", char(10))"
)
_UPDATE: Final = " ON CONFLICT (n) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in COLUMNS[1:]
)

# SQLite takes at most 32,766 values in one statement.
_KEYS: Final = 5_000
_ROWS: Final = 1_000
_SLICE: Final = 200
"""Records loaded at once, which takes the event loop about a millisecond."""
_SWEPT: Final = 1_000
MAX_TOUCHED: Final = 500
_EXPIRED: Final = 100  # half a millisecond
_MOST_EXPIRED: Final = 800
"""Each statement has a fixed cost: when no caller waits, fewer statements remove more."""

_PAIRS: Final = b"\xff"
"""The user of the rows of `answers` that are sealed pairs, which no UTF-8 text is. Their key is the session."""

_MEMORY: Final = ":memory:"

_T = TypeVar("_T")

Statement = tuple[str, Sequence[Any]]

Outcome = tuple[object, CallError | None]
"""The result or the error of an operation."""


class Position(NamedTuple):
    """How far the rows have been loaded."""

    ended: bool = False
    due: int = -1
    n: int = 0


class SessionDatabase(DatabaseFile):
    """The sessions and answers in a database file."""

    def __init__(
        self,
        path: Path,
        *,
        answers: AnswerLimits,
        time: Callable[[], int],
        on_notice: Notice,
        connect: Connect = sqlite3.connect,
    ) -> None:
        super().__init__(path, on_notice=on_notice, connect=connect)
        self._limits = answers
        self._time = time
        self._answers: Answers | None = None  # as in the file, without the answers themselves
        self._changed: dict[Key, Entry | None] = {}  # not written yet
        self._marks: list[tuple[int, int, int]] = []  # the rows of ended_all, oldest first
        self._rotations = RecentRotations()
        self._swept = 0  # no stored session up to this n is under a mark

    def opened(self, db: sqlite3.Connection) -> None:
        self._read_marks(db)
        self._swept = 0
        self._rotations = RecentRotations()
        query = "SELECT key, digest, until, answer FROM answers WHERE user = ? ORDER BY until DESC LIMIT ?"
        for id, digests, until, sealed in reversed(db.execute(query, (_PAIRS, MAX_REPEATABLE)).fetchall()):
            pair = SealedPair(digests[:DIGEST_SIZE], digests[DIGEST_SIZE:], until, sealed)
            self._rotations.restore(id, pair)
        self._table(db)  # 65,536 answers take longer than one operation may

    def invalidate(self) -> None:
        self._answers = None
        self._rotations.changed.clear()

    # --- operations on rows ------------------------------------------------------------------------

    def perform(self, operations: Sequence[Operation[object]]) -> list[Outcome]:
        """Do operations, one after the other, in one transaction."""
        db = self.ready()
        rows = WorkingSet(self._read(db, operations), self._table(db), self._rotations)
        outcomes = [_outcome(operation, rows) for operation in operations]
        self._write(db, [*_upserts(list(rows.changed.values())), *self._answer_statements()])
        self._written()
        return outcomes

    def _write(self, db: sqlite3.Connection, statements: Sequence[Statement]) -> None:
        if len(statements) == 1:  # is its own transaction
            db.execute(*statements[0])
        elif statements:
            db.execute("BEGIN")
            for statement in statements:
                db.execute(*statement)
            db.execute("COMMIT")

    def _read(self, db: sqlite3.Connection, operations: Sequence[Operation[object]]) -> list[Row]:
        found: dict[int, Row] = {}
        for query, values in _queries(operations):
            (lines,) = db.execute(query, values).fetchone()
            for line in lines.split("\n") if lines else ():
                n, *columns = _parse(line)
                found[n] = Row(n, self._marked(n, record_of(columns)))
        return [found[n] for n in sorted(found)]

    def _table(self, db: sqlite3.Connection) -> Answers:
        """Return the table of answers, read from the file if it is not cached."""
        if self._answers is not None:
            return self._answers
        self._changed.clear()
        self._answers = answers = Answers(
            self._limits, self._time, self._changed.__setitem__, partial(_read_answer, db)
        )
        query = (
            "SELECT user, key, digest, until, answer IS NULL, length(answer) FROM answers"
            " WHERE user != ? ORDER BY until"
        )
        for user, key, digest, until, running, size in db.execute(query, (_PAIRS,)):
            answers.restore((text(user), text(key)), Entry(digest, until, bool(running), size=size or 0))
        return answers

    def _written(self) -> None:
        for entry in self._changed.values():
            if entry is not None:
                entry.answer = None  # it is in the file
        self._changed.clear()
        self._rotations.changed.clear()

    def _answer_statements(self) -> Iterator[Statement]:
        changed = self._changed.items()
        removed = [(utf8(user), utf8(key)) for (user, key), entry in changed if entry is None]
        kept = [
            (utf8(user), utf8(key), entry.digest, entry.until, entry.answer)
            for (user, key), entry in changed
            if entry is not None
        ]
        kept += [
            (_PAIRS, id, pair.spent_digest + pair.token_digest, pair.until, pair.sealed)
            for id, pair in self._rotations.changed.items()
        ]
        for gone in _chunks(removed, _ROWS):
            pairs = _rows(len(gone), 2)
            statement = f"DELETE FROM answers WHERE (user, key) IN (VALUES {pairs})"  # noqa: S608 - holes only
            yield statement, [value for row in gone for value in row]
        for chunk in _chunks(kept, _ROWS):
            statement = (
                f"INSERT INTO answers (user, key, digest, until, answer) VALUES {_rows(len(chunk), 5)}"  # noqa: S608 - holes only
                " ON CONFLICT (user, key) DO UPDATE"
                " SET digest = excluded.digest, until = excluded.until, answer = excluded.answer"
            )
            yield statement, [value for row in chunk for value in row]

    def _marked(self, n: int, record: SessionRecord | EndedRecord) -> SessionRecord | EndedRecord:
        """Apply the marks of ended_all to the record of a row."""
        if isinstance(record, SessionRecord):
            for last, code, wall in self._marks:
                if n <= last:
                    return EndedRecord(record.id, record.token_digest, Code(code), wall)
        return record

    # --- the whole file ----------------------------------------------------------------------------

    def ping(self) -> None:
        """Check that the file can be written."""
        self._write(self.ready(), [("UPDATE about SET pings = (pings + 1) & 0xFFFF", ())])

    def load(self, start: Position) -> tuple[list[SessionRecord | EndedRecord], Position | None]:
        """Return a slice of all rows, stored sessions first, and where the next starts; None after the last."""
        if start.ended:
            where, order = "code != 0 AND (due, n) > (?, ?)", "due, n"
            arguments: tuple[int, ...] = (start.due, start.n)
        else:
            where, order, arguments = "code = 0 AND n > ?", "n", (start.n,)
        rows = self._select(where, arguments, order, _SLICE)
        records = [self._marked(n, record_of(columns)) for n, *columns in rows]
        if len(rows) == _SLICE:
            return records, Position(start.ended, rows[-1][-1], rows[-1][0])
        return records, None if start.ended else Position(ended=True)

    def list_all(self) -> list[SessionRecord]:
        """Return the oldest sessions of all users."""
        rows = self._select("code = 0 AND n > ?", (self._last_mark(),), "n", MAX_LISTED)
        records = [record_of(columns) for _, *columns in rows]
        return [record for record in records if isinstance(record, SessionRecord)]

    def count(self) -> int:
        db = self.ready()
        query = "SELECT count(*) FROM sessions WHERE code = 0 AND n > ?"
        count: int = db.execute(query, (self._last_mark(),)).fetchone()[0]
        return count

    def end_all(self, code: Code, wall: int) -> int:
        count = self.count()
        if count:
            db = self.ready()
            self._write(db, [("INSERT INTO ended_all SELECT max(n), ?, ? FROM sessions", (code, wall))])
            self._read_marks(db)
        return count

    def sweep(self) -> bool:
        """Rewrite some sessions that are under a mark of ended_all.

        Return False if none are left, or after a failure, until the next job.
        """
        try:
            if self.sweeping:
                self.attempt(self._sweep)
        except StoreUnavailable:
            return False
        return self.sweeping

    def _sweep(self) -> None:
        db = self.ready()
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
        """Whether sessions are left to rewrite."""
        return bool(self._marks)

    def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        """Record when sessions were last used, at most MAX_TOUCHED."""
        latest: dict[bytes, int] = {}
        for id_, used_at in uses:
            latest[id_] = max(used_at, latest.get(id_, 0))
        change = (
            f"WITH used (id, wall) AS (VALUES {_rows(len(latest), 2)})"  # noqa: S608 - holes only
            " UPDATE sessions SET last_used_at = used.wall FROM used"
            " WHERE substr(sessions.id, 1, 8) = substr(used.id, 1, 8) AND sessions.id = used.id"
            " AND sessions.id != x'' AND code = 0"
            " AND last_used_at < used.wall"
        )
        self._write(self.ready(), [(change, [value for use in latest.items() for value in use])])

    def expire(self, wall: int, keep_ended_ms: int, limit: int, enough: Callable[[], bool]) -> int:
        """Remove expired sessions, then tombstones, answers and sealed pairs.

        At most `limit`, fewer if `enough()` is true.
        """
        db = self.ready()
        answers = self._table(db)
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
        removed += answers.expire(limit - removed)
        for statement in self._answer_statements():
            db.execute(*statement)
        pairs = "SELECT rowid FROM answers WHERE user = ? AND until <= ? LIMIT ?"
        change = f"DELETE FROM answers WHERE rowid IN ({pairs})"  # noqa: S608 - parts of this file
        removed += db.execute(change, (_PAIRS, wall, limit - removed)).rowcount
        db.execute("COMMIT")
        self._written()
        return removed

    def _select(self, where: str, arguments: Iterable[int], order: str, limit: int) -> list[tuple[Any, ...]]:
        query = f"SELECT {_NAMES} FROM sessions WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608 - parts of this file
        return self.ready().execute(query, (*arguments, limit)).fetchall()

    def _last_mark(self) -> int:
        return self._marks[-1][0] if self._marks else 0

    def _read_marks(self, db: sqlite3.Connection) -> None:
        self._marks = db.execute("SELECT n, code, wall FROM ended_all ORDER BY n").fetchall()


class MemoryDatabase(SessionDatabase):
    """Sessions and answers in memory, which end with the process: no file, the same statements.

    A failure that would have a file closed and opened again is rolled back: closing would end all sessions.
    """

    def __init__(
        self,
        *,
        answers: AnswerLimits,
        time: Callable[[], int],
        on_notice: Notice,
        connect: Connect = sqlite3.connect,
    ) -> None:
        super().__init__(Path(_MEMORY), answers=answers, time=time, on_notice=on_notice, connect=connect)

    def open(self) -> None:
        db = self._db = self._connect(_MEMORY, isolation_level=None, cached_statements=CACHED_STATEMENTS)
        create_tables(db)
        self.opened(db)

    def ready(self) -> sqlite3.Connection:
        assert self._db is not None, "it is closed last"
        return self._db

    def _recover(self, error: Exception) -> str:
        self._roll_back()
        return reason_of(error)


def _outcome(operation: Operation[object], rows: WorkingSet) -> Outcome:
    try:
        return operation.apply(rows), None
    except CallError as error:
        return None, error


def _read_answer(db: sqlite3.Connection, key: Key) -> bytes:
    query = "SELECT answer FROM answers WHERE user = ? AND key = ?"
    answer: bytes = db.execute(query, [utf8(part) for part in key]).fetchone()[0]
    return answer


def _holes(count: int) -> str:
    return ", ".join("?" * count)


def _rows(count: int, columns: int) -> str:
    return ", ".join([f"({_holes(columns)})"] * count)


def _chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _queries(operations: Sequence[Operation[object]]) -> Iterator[tuple[str, list[bytes]]]:
    """Return statements that read all needed rows, each as one text."""
    needed = (
        {id_ for operation in operations for id_ in operation.ids},
        {token for operation in operations for token in operation.tokens},
        {utf8(user) for operation in operations for user in operation.users},
    )
    kinds = [_chunks(list(keys), _KEYS) for keys in needed]
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


def _parse(line: str) -> list[Any]:
    fields = line.split(" ")
    return [int(fields[0]), *map(bytes.fromhex, fields[1:8]), *map(int, fields[8:])]


def _upserts(rows: Sequence[Row]) -> Iterator[Statement]:
    for chunk in _chunks(rows, _ROWS):
        values = _rows(len(chunk), len(COLUMNS))
        statement = f"INSERT INTO sessions ({_NAMES}) VALUES {values}{_UPDATE}"  # noqa: S608 - holes only
        yield statement, [value for row in chunk for value in (row.n, *columns_of(row.record))]
