"""The operations of the store on rows of sessions. No SQL, no files.

Decides: which rows an operation needs, and how it changes them.

Several operations change the same rows one after the other before any of them is written. A row is a stored session
(`code` 0), the tombstone of an ended one, or the tombstone of a single token (`id` empty). Strings are UTF-8 bytes
with surrogates passed through, so that any string can be stored.

It must not know: where rows come from and go to, threads, clocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hmac import compare_digest
from typing import Any, Final, Generic, NamedTuple, TypeVar

from zcproto.errors import Code
from zcproto.sessions.record import (
    EndedRecord,
    Rotation,
    SessionRecord,
    UserLimit,
    key_and_roles,
    pack_origin,
    stored_key,
    unpack_origin,
)
from zcproto.stores.answers import Answers
from zcproto.stores.base import Created, LimitReached, NotRotated, Repeated

LIVE: Final = 0
"""The code of a row that is a stored session, live or lapsed."""

MAX_REPEATABLE: Final = 65_536
"""Refreshes remembered for their grace, about 450 bytes each."""

T = TypeVar("T")


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text(value: bytes) -> str:
    """Reverse `utf8`. Damaged bytes give a name that no user has."""
    try:
        return value.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace")


COLUMNS: Final = (
    *("n", "id", "token", "refresh", "user", "client", "address", "key", "flags"),
    *("created_at", "last_used_at", "expires_at", "refresh_expires_at", "code", "due"),
)
"""`n` is the order of opening. `due` is when both tokens of a session have expired, or when it ended."""

_BLANK: Final = (b"",) * 5 + (0,) * 5


def columns_of(record: SessionRecord | EndedRecord) -> tuple[Any, ...]:
    """Return the columns of a row, without `n`."""
    if isinstance(record, EndedRecord):
        return (record.id, record.token_digest, *_BLANK, record.code, record.ended_at)
    record = pack_origin(record)
    id, token, refresh, user, client, address, *numbers, _, _, _ = record
    texts = map(utf8, (user, client, address, stored_key(record)))
    return (id, token, refresh, *texts, *numbers, LIVE, due_of(record))


def record_of(columns: Sequence[Any]) -> SessionRecord | EndedRecord:
    """Reverse `columns_of`."""
    id, token, refresh, user, client, address, key, *numbers, code, due = columns
    if code != LIVE:
        return EndedRecord(id, token, Code(code), due)
    key_, roles = key_and_roles(text(key), numbers[0])
    values: list[Any] = [text(user), text(client), text(address), *numbers, key_, roles]
    return unpack_origin(SessionRecord(id, token, refresh, *values))


def due_of(record: SessionRecord) -> int:
    return max(record.expires_at, record.refresh_expires_at)


@dataclass(slots=True, eq=False)
class Row:
    """A record and its place in the order of opening; None until it is written."""

    n: int | None
    record: SessionRecord | EndedRecord


class SealedPair(NamedTuple):
    """The pair of a refresh, for one that repeats it before `until`; digests of the spent and the new token."""

    spent_digest: bytes
    token_digest: bytes
    until: int
    sealed: bytes


class RecentRotations:
    """The sealed pair of the last refresh of each session, until its grace is over. Those to be written are in
    `changed`, by session.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, SealedPair] = OrderedDict()
        self.changed: dict[bytes, SealedPair] = {}

    def add(self, rotation: Rotation) -> None:
        kept = self._kept
        kept.pop(rotation.id, None)
        if rotation.grace_ms:
            until = rotation.wall + rotation.grace_ms
            pair = SealedPair(rotation.spent_digest, rotation.token_digest, until, rotation.sealed)
            kept[rotation.id] = self.changed[rotation.id] = pair
        while kept:
            oldest = next(iter(kept.values()))
            if len(kept) <= MAX_REPEATABLE and rotation.wall < oldest.until:
                break
            kept.popitem(last=False)

    def restore(self, id: bytes, pair: SealedPair) -> None:
        """Add a pair that was written before, oldest first."""
        self._kept[id] = pair

    def sealed(self, record: SessionRecord, again: Rotation) -> bytes:
        """Return the sealed pair of the last refresh if `again` repeats it; else nothing."""
        last = self._kept.get(record.id)
        if (
            last is not None
            and (last.spent_digest, last.token_digest) == (again.spent_digest, record.token_digest)
            and (record.client, record.address) == (again.client, again.address)
            and again.wall < last.until
        ):
            return last.sealed
        return b""


class WorkingSet:
    """The rows that operations work on, and which of them were changed. `rows` come in the order of opening."""

    def __init__(self, rows: Iterable[Row], answers: Answers, rotations: RecentRotations) -> None:
        self._by_id: dict[bytes, Row] = {}
        self._by_token: dict[bytes, Row] = {}
        self._by_user: dict[str, list[Row]] = {}
        self.answers = answers
        self._rotations = rotations
        self.changed: dict[int, Row] = {}  # by identity, in the order of the first change
        for row in rows:
            self._index(row)

    def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        if record.id in self._by_id:
            return Created()
        ending = limit.make_room(self.list_user(record.user), record.created_at)
        if ending is None:
            return LimitReached()
        ended = tuple(self._end(other, code, record.created_at) for other, code in ending)
        self._add(record)
        return Created(ended)

    def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        record, wall = self.get(rotation.id), rotation.wall
        if record is None:
            return NotRotated(Code.UNAUTHENTICATED)
        if isinstance(record, EndedRecord):
            return NotRotated(record.code)
        if (record.token_digest, record.refresh_digest) == (rotation.token_digest, rotation.refresh_digest):
            return record
        if wall >= due_of(record):
            return NotRotated(Code.TOKEN_EXPIRED)
        if not compare_digest(record.refresh_digest, rotation.spent_digest):
            if sealed := self._rotations.sealed(record, rotation):
                return Repeated(record, sealed)
            self._end(record, Code.TOKEN_REVOKED, wall)
            return NotRotated(Code.TOKEN_REVOKED, reused=True)
        if wall >= record.refresh_expires_at:
            return NotRotated(Code.TOKEN_EXPIRED)
        rotated = record._replace(
            token_digest=rotation.token_digest,
            refresh_digest=rotation.refresh_digest,
            client=rotation.client,
            address=rotation.address,
            last_used_at=wall,
            expires_at=min(rotation.expires_at, record.refresh_expires_at),
        )
        self._rotations.add(rotation)
        self._by_token[rotated.token_digest] = self._change(rotated)
        self._add(EndedRecord(b"", record.token_digest, Code.TOKEN_REVOKED, wall))
        return rotated

    def find(self, token: bytes) -> SessionRecord | EndedRecord | None:
        row = self._by_token.get(token)
        return None if row is None else row.record

    def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        row = self._by_id.get(id)
        return None if row is None else row.record

    def end(self, ids: Sequence[bytes], code: Code, wall: int, user: str | None) -> list[EndedRecord]:
        ended = []
        for id_ in ids:
            record = self.get(id_)
            if isinstance(record, SessionRecord) and user in (None, record.user):
                ended.append(self._end(record, code, wall))
        return ended

    def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return [self._end(record, code, wall) for record in self.list_user(user)]

    def list_user(self, user: str) -> list[SessionRecord]:
        """Return the stored sessions of a user, oldest first."""
        records = [row.record for row in self._by_user.get(user, ())]
        return [record for record in records if isinstance(record, SessionRecord)]

    def _end(self, record: SessionRecord, code: Code, wall: int) -> EndedRecord:
        ended = EndedRecord(record.id, record.token_digest, code, wall)
        self._change(ended)
        return ended

    def _change(self, record: SessionRecord | EndedRecord) -> Row:
        """Replace the record of a session."""
        row = self._by_id[record.id]
        row.record = record
        self.changed[id(row)] = row
        return row

    def _add(self, record: SessionRecord | EndedRecord) -> None:
        row = Row(None, record)
        self._index(row)
        self.changed[id(row)] = row

    def _index(self, row: Row) -> None:
        record = row.record
        self._by_token[record.token_digest] = row
        if record.id:
            self._by_id[record.id] = row
        if isinstance(record, SessionRecord):
            self._by_user.setdefault(record.user, []).append(row)


@dataclass(slots=True, eq=False)
class Operation(Generic[T]):
    """A change of a WorkingSet, and the rows it needs: those of `ids` and `tokens`, all sessions of `users`."""

    apply: Callable[[WorkingSet], T]
    ids: Sequence[bytes] = ()
    tokens: Sequence[bytes] = ()
    users: Sequence[str] = ()
