"""The operations of the store on rows of sessions. No SQL, no files.

What this file decides: which rows an operation needs, and how it changes them.

Several operations change the same rows one after the other before any of them is written. A row is a stored session
(`code` 0), the tombstone of an ended one, or the tombstone of a single token (`id` empty). Strings are UTF-8 bytes
with surrogates passed through, so that any string can be stored.

It must not know: where rows come from and go to, threads, clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from operator import attrgetter
from typing import ClassVar, Final, Generic, TypeVar

from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import Answers
from zcproto.stores.base import Claim, Created, LimitReached, NotRotated, Rotated

LIVE: Final = 0
"""The code of a row that is a stored session, live or lapsed."""

T_co = TypeVar("T_co", covariant=True)


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text(value: bytes) -> str:
    """Reverse `utf8`. Damaged bytes give a name that no user has."""
    try:
        return value.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace")


def session_of(
    id: bytes,
    token: bytes,
    refresh: bytes,
    user: bytes,
    client: bytes,
    address: bytes,
    key: bytes,
    flags: int,
    created_at: int,
    last_used_at: int,
    expires_at: int,
    refresh_expires_at: int,
) -> SessionRecord:
    """Return the record of a stored session from its columns, `id` first."""
    return SessionRecord(
        id,
        token,
        refresh,
        text(user),
        text(client),
        text(address),
        flags,
        created_at,
        last_used_at,
        expires_at,
        refresh_expires_at,
        text(key),
    )


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
        return cls(
            None,
            record.id,
            record.token_digest,
            record.refresh_digest,
            utf8(record.user),
            utf8(record.client),
            utf8(record.address),
            utf8(record.key),
            record.flags,
            record.created_at,
            record.last_used_at,
            record.expires_at,
            record.refresh_expires_at,
            LIVE,
            max(record.expires_at, record.refresh_expires_at),
        )

    @classmethod
    def token_tombstone(cls, token: bytes, code: Code, wall: int) -> Row:
        return cls(None, b"", token, b"", b"", b"", b"", b"", 0, 0, 0, 0, 0, code, wall)

    def record(self) -> SessionRecord | EndedRecord:
        if self.code != LIVE:
            return EndedRecord(self.id, self.token, Code(self.code), self.due)
        return self.session()

    def session(self) -> SessionRecord:
        return session_of(*_session_columns(self))

    def end(self, code: Code, wall: int) -> EndedRecord:
        """Make the row a tombstone."""
        self.refresh = self.user = self.client = self.address = self.key = b""
        self.flags = self.created_at = self.last_used_at = self.expires_at = self.refresh_expires_at = 0
        self.code, self.due = code, wall
        return EndedRecord(self.id, self.token, code, wall)


COLUMNS: Final[tuple[str, ...]] = tuple(Row.__dataclass_fields__)
_session_columns: Final = attrgetter(*COLUMNS[1:-2])


class RowKeys:
    """The rows that operations need: those with these ids or tokens, and the stored sessions of these users."""

    __slots__ = ("ids", "tokens", "users")

    def __init__(self) -> None:
        self.ids: set[bytes] = set()
        self.tokens: set[bytes] = set()
        self.users: set[bytes] = set()


class WorkingSet:
    """The rows that operations work on, and which of them were changed. `rows` come in the order of opening."""

    __slots__ = ("_by_id", "_by_token", "_by_user", "answers", "changed")

    def __init__(self, rows: Iterable[Row], answers: Answers) -> None:
        self._by_id: dict[bytes, Row] = {}
        self._by_token: dict[bytes, Row] = {}
        self._by_user: dict[bytes, list[Row]] = {}
        self.answers = answers
        self.changed: dict[int, Row] = {}  # by identity, in the order of the first change
        for row in rows:
            self._index(row)

    def by_id(self, id: bytes) -> Row | None:
        return self._by_id.get(id)

    def by_token(self, token: bytes) -> Row | None:
        return self._by_token.get(token)

    def of_user(self, user: bytes) -> list[Row]:
        """Return the stored sessions of a user in `RowKeys.users`, oldest first."""
        return [row for row in self._by_user.get(user, ()) if row.code == LIVE]

    def add(self, row: Row) -> None:
        self._index(row)
        self.changed[id(row)] = row

    def end(self, row: Row, code: Code, wall: int) -> EndedRecord:
        self.changed[id(row)] = row
        return row.end(code, wall)

    def rotate(self, row: Row, rotation: Rotation) -> bytes:
        """Replace the token pair of a session. Return the digest of the access token revoked by it."""
        old = row.token
        row.token, row.refresh = rotation.token_digest, rotation.refresh_digest
        row.client, row.address = utf8(rotation.client), utf8(rotation.address)
        row.last_used_at = rotation.wall
        row.expires_at = min(rotation.expires_at, row.refresh_expires_at)
        row.due = max(row.expires_at, row.refresh_expires_at)
        self._by_token[row.token] = row
        self.changed[id(row)] = row
        self.add(Row.token_tombstone(old, Code.TOKEN_REVOKED, rotation.wall))
        return old

    def _index(self, row: Row) -> None:
        self._by_token[row.token] = row
        if row.id:
            self._by_id[row.id] = row
            self._by_user.setdefault(row.user, []).append(row)


class Operation(Generic[T_co]):
    """An operation on rows."""

    __slots__ = ()
    lasting: ClassVar[bool] = False
    """Whether it is done even if its caller has given up."""

    def need(self, keys: RowKeys) -> None:
        """Add the rows that `apply` needs; none by default."""

    def apply(self, rows: WorkingSet) -> T_co:
        raise NotImplementedError


@dataclass(slots=True, eq=False)
class Create(Operation[Created | LimitReached]):
    record: SessionRecord
    limit: UserLimit

    def need(self, keys: RowKeys) -> None:
        keys.ids.add(self.record.id)
        keys.users.add(utf8(self.record.user))

    def apply(self, rows: WorkingSet) -> Created | LimitReached:
        record, limit, wall = self.record, self.limit, self.record.created_at
        if rows.by_id(record.id) is not None:
            return Created()
        ended: tuple[EndedRecord, ...] = ()
        others = rows.of_user(utf8(record.user))
        if len(others) >= limit.per_user:
            live = [row for row in others if self._is_live(row)]
            lapsed = [row for row in others if row not in live and wall < row.refresh_expires_at]
            if len(live) + len(lapsed) >= limit.per_user:
                if lapsed:
                    ended = (rows.end(lapsed[0], Code.TOKEN_EXPIRED, wall),)
                elif limit.when_full == "evict_oldest":
                    ended = (rows.end(live[0], Code.SESSION_REPLACED, wall),)
                else:
                    return LimitReached()
        rows.add(Row.of(record))
        return Created(ended)

    def _is_live(self, row: Row) -> bool:
        wall, idle = self.record.created_at, self.limit.idle_ms
        return wall < row.expires_at and (idle is None or wall < row.last_used_at + idle)


@dataclass(slots=True, eq=False)
class Rotate(Operation[Rotated | NotRotated]):
    rotation: Rotation

    def need(self, keys: RowKeys) -> None:
        keys.ids.add(self.rotation.id)

    def apply(self, rows: WorkingSet) -> Rotated | NotRotated:
        rotation, wall = self.rotation, self.rotation.wall
        row = rows.by_id(rotation.id)
        if row is None:
            return NotRotated(Code.UNAUTHENTICATED)
        if row.code != LIVE:
            return NotRotated(Code(row.code))
        if (row.token, row.refresh) == (rotation.token_digest, rotation.refresh_digest):
            return Rotated(row.session(), b"")
        if wall >= row.due:
            return NotRotated(Code.TOKEN_EXPIRED)
        if not compare_digest(row.refresh, rotation.spent_digest):
            rows.end(row, Code.TOKEN_REVOKED, wall)
            return NotRotated(Code.TOKEN_REVOKED, reused=True)
        if wall >= row.refresh_expires_at:
            return NotRotated(Code.TOKEN_EXPIRED)
        old = rows.rotate(row, rotation)
        return Rotated(row.session(), old)


@dataclass(slots=True, eq=False)
class Find(Operation[SessionRecord | EndedRecord | None]):
    token: bytes

    def need(self, keys: RowKeys) -> None:
        keys.tokens.add(self.token)

    def apply(self, rows: WorkingSet) -> SessionRecord | EndedRecord | None:
        row = rows.by_token(self.token)
        return None if row is None else row.record()


@dataclass(slots=True, eq=False)
class Get(Operation[SessionRecord | EndedRecord | None]):
    id: bytes

    def need(self, keys: RowKeys) -> None:
        keys.ids.add(self.id)

    def apply(self, rows: WorkingSet) -> SessionRecord | EndedRecord | None:
        row = rows.by_id(self.id)
        return None if row is None else row.record()


@dataclass(slots=True, eq=False)
class End(Operation[list[EndedRecord]]):
    lasting = True
    ids: Sequence[bytes]
    code: Code
    wall: int
    user: bytes | None

    def need(self, keys: RowKeys) -> None:
        keys.ids.update(self.ids)

    def apply(self, rows: WorkingSet) -> list[EndedRecord]:
        ended = []
        for id_ in self.ids:
            row = rows.by_id(id_)
            if row is not None and row.code == LIVE and self.user in (None, row.user):
                ended.append(rows.end(row, self.code, self.wall))
        return ended


@dataclass(slots=True, eq=False)
class EndUser(Operation[list[EndedRecord]]):
    lasting = True
    user: bytes
    code: Code
    wall: int

    def need(self, keys: RowKeys) -> None:
        keys.users.add(self.user)

    def apply(self, rows: WorkingSet) -> list[EndedRecord]:
        return [rows.end(row, self.code, self.wall) for row in rows.of_user(self.user)]


@dataclass(slots=True, eq=False)
class ListUser(Operation[list[SessionRecord]]):
    user: bytes

    def need(self, keys: RowKeys) -> None:
        keys.users.add(self.user)

    def apply(self, rows: WorkingSet) -> list[SessionRecord]:
        return [row.session() for row in rows.of_user(self.user)]


@dataclass(slots=True, eq=False)
class ClaimRequest(Operation[Claim]):
    user: str
    key: str
    digest: bytes
    wall: int
    lease_ms: int

    def apply(self, rows: WorkingSet) -> Claim:
        return rows.answers.claim(self.user, self.key, self.digest, self.wall, self.lease_ms)


@dataclass(slots=True, eq=False)
class KeepAnswer(Operation[None]):
    lasting = True
    user: str
    key: str
    answer: bytes
    wall: int
    keep_ms: int

    def apply(self, rows: WorkingSet) -> None:
        rows.answers.keep(self.user, self.key, self.answer, self.wall, self.keep_ms)


@dataclass(slots=True, eq=False)
class ReleaseClaim(Operation[None]):
    lasting = True
    user: str
    key: str

    def apply(self, rows: WorkingSet) -> None:
        rows.answers.release(self.user, self.key)
