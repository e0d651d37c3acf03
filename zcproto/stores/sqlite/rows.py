"""The operations of the store on rows of sessions. No SQL, no files.

What this file decides: which rows an operation needs, and how it changes them.

Several operations change the same rows one after the other before any of them is written. A row is a stored session
(`code` 0), the tombstone of an ended one, or the tombstone of a single token (`id` empty). Strings are UTF-8 bytes
with surrogates passed through, so that any string can be stored.

It must not know: where rows come from and go to, threads, clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import Answers
from zcproto.stores.base import Created, LimitReached, NotRotated, Rotated

LIVE: Final = 0
"""The code of a row that is a stored session, live or lapsed."""

T = TypeVar("T")


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text(value: bytes) -> str:
    """Reverse `utf8`. Damaged bytes give a name that no user has."""
    try:
        return value.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace")


def session_of(columns: Sequence[Any]) -> SessionRecord:
    """Return the record of a stored session from the columns of SESSION_COLUMNS."""
    id, token, refresh, user, client, address, key, *numbers = columns
    values: list[Any] = [text(user), text(client), text(address), *numbers, text(key)]
    return SessionRecord(id, token, refresh, *values)


@dataclass(slots=True, eq=False)
class Row:
    """One row, with its columns in the order of the table."""

    n: int | None
    """The order of opening; None until it is written."""
    id: bytes
    token: bytes
    refresh: bytes
    user: bytes
    client: bytes
    address: bytes
    key: bytes
    flags: int
    created_at: int
    last_used_at: int
    expires_at: int
    refresh_expires_at: int
    code: int
    due: int
    """A stored session: when both its tokens have expired. A tombstone: when the session ended."""

    @classmethod
    def of(cls, record: SessionRecord) -> Row:
        texts = map(utf8, (record.user, record.client, record.address, record.key))
        times = record.created_at, record.last_used_at, record.expires_at, record.refresh_expires_at
        due = max(record.expires_at, record.refresh_expires_at)
        blobs = record.id, record.token_digest, record.refresh_digest, *texts
        columns: list[Any] = [*blobs, record.flags, *times, LIVE, due]
        return cls(None, *columns)

    @classmethod
    def token_tombstone(cls, token: bytes, code: Code, wall: int) -> Row:
        return cls(None, b"", token, b"", b"", b"", b"", b"", 0, 0, 0, 0, 0, code, wall)

    def record(self) -> SessionRecord | EndedRecord:
        if self.code != LIVE:
            return EndedRecord(self.id, self.token, Code(self.code), self.due)
        return self.session()

    def session(self) -> SessionRecord:
        return session_of(_session_columns(self))

    def end(self, code: Code, wall: int) -> EndedRecord:
        """Make the row a tombstone."""
        self.refresh = self.user = self.client = self.address = self.key = b""
        self.flags = self.created_at = self.last_used_at = self.expires_at = self.refresh_expires_at = 0
        self.code, self.due = code, wall
        return EndedRecord(self.id, self.token, code, wall)


COLUMNS: Final[tuple[str, ...]] = tuple(Row.__dataclass_fields__)
SESSION_COLUMNS: Final = slice(1, -2)
_session_columns: Final = attrgetter(*COLUMNS[SESSION_COLUMNS])


class WorkingSet:
    """The rows that operations work on, and which of them were changed. `rows` come in the order of opening."""

    def __init__(self, rows: Iterable[Row], answers: Answers) -> None:
        self._by_id: dict[bytes, Row] = {}
        self._by_token: dict[bytes, Row] = {}
        self._by_user: dict[bytes, list[Row]] = {}
        self.answers = answers
        self.changed: dict[int, Row] = {}  # by identity, in the order of the first change
        for row in rows:
            self._index(row)

    def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        wall = record.created_at

        def is_live(row: Row) -> bool:
            return wall < row.expires_at and (
                limit.idle_ms is None or wall < row.last_used_at + limit.idle_ms
            )

        if record.id in self._by_id:
            return Created()
        ended: tuple[EndedRecord, ...] = ()
        others = self._of_user(utf8(record.user))
        if len(others) >= limit.per_user:
            live = [row for row in others if is_live(row)]
            lapsed = [row for row in others if row not in live and wall < row.refresh_expires_at]
            if len(live) + len(lapsed) >= limit.per_user:
                if lapsed:
                    ended = (self._end(lapsed[0], Code.TOKEN_EXPIRED, wall),)
                elif limit.when_full == "evict_oldest":
                    ended = (self._end(live[0], Code.SESSION_REPLACED, wall),)
                else:
                    return LimitReached()
        self._add(Row.of(record))
        return Created(ended)

    def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        row, wall = self._by_id.get(rotation.id), rotation.wall
        if row is None:
            return NotRotated(Code.UNAUTHENTICATED)
        if row.code != LIVE:
            return NotRotated(Code(row.code))
        if (row.token, row.refresh) == (rotation.token_digest, rotation.refresh_digest):
            return Rotated(row.session(), b"")
        if wall >= row.due:
            return NotRotated(Code.TOKEN_EXPIRED)
        if not compare_digest(row.refresh, rotation.spent_digest):
            self._end(row, Code.TOKEN_REVOKED, wall)
            return NotRotated(Code.TOKEN_REVOKED, reused=True)
        if wall >= row.refresh_expires_at:
            return NotRotated(Code.TOKEN_EXPIRED)
        old = row.token
        row.token, row.refresh = rotation.token_digest, rotation.refresh_digest
        row.client, row.address = utf8(rotation.client), utf8(rotation.address)
        row.last_used_at = wall
        row.expires_at = min(rotation.expires_at, row.refresh_expires_at)
        row.due = max(row.expires_at, row.refresh_expires_at)
        self._by_token[row.token] = row
        self.changed[id(row)] = row
        self._add(Row.token_tombstone(old, Code.TOKEN_REVOKED, wall))
        return Rotated(row.session(), old)

    def find(self, token: bytes) -> SessionRecord | EndedRecord | None:
        row = self._by_token.get(token)
        return None if row is None else row.record()

    def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        row = self._by_id.get(id)
        return None if row is None else row.record()

    def end(self, ids: Sequence[bytes], code: Code, wall: int, user: bytes | None) -> list[EndedRecord]:
        ended = []
        for id_ in ids:
            row = self._by_id.get(id_)
            if row is not None and row.code == LIVE and user in (None, row.user):
                ended.append(self._end(row, code, wall))
        return ended

    def end_user(self, user: bytes, code: Code, wall: int) -> list[EndedRecord]:
        return [self._end(row, code, wall) for row in self._of_user(user)]

    def list_user(self, user: bytes) -> list[SessionRecord]:
        return [row.session() for row in self._of_user(user)]

    def _of_user(self, user: bytes) -> list[Row]:
        """Return the stored sessions of a user, oldest first."""
        return [row for row in self._by_user.get(user, ()) if row.code == LIVE]

    def _end(self, row: Row, code: Code, wall: int) -> EndedRecord:
        self.changed[id(row)] = row
        return row.end(code, wall)

    def _add(self, row: Row) -> None:
        self._index(row)
        self.changed[id(row)] = row

    def _index(self, row: Row) -> None:
        self._by_token[row.token] = row
        if row.id:
            self._by_id[row.id] = row
            self._by_user.setdefault(row.user, []).append(row)


@dataclass(slots=True, eq=False)
class Operation(Generic[T]):
    """A method of WorkingSet with its arguments, and the rows that it needs.

    These are the rows with `ids` and `tokens`, and the stored sessions of `users`.
    """

    apply: Callable[[WorkingSet], T]
    ids: Sequence[bytes] = ()
    tokens: Sequence[bytes] = ()
    users: Sequence[bytes] = ()
