"""What the operations of a store do to rows of sessions. No SQL, no files.

What this file decides: which rows an operation has to see, and what it makes of them.

Several operations work on the same rows, one after the other, before any of it is written. A row is a kept
session (`code` 0), the memory of one that has ended, or of a token alone (`id` empty). Strings are UTF-8 bytes,
with surrogates as they come: any string may be kept.

It must not know: where rows come from and go to, threads, clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hmac import compare_digest
from typing import Final, Protocol

from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import Answers
from zcproto.stores.base import Claim, Created, LimitReached, NotRotated, Rotated

KEPT: Final = 0


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text(value: bytes) -> str:
    """What `utf8` was made of. Of damaged bytes: a name that nobody has."""
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
    """The record of a kept row, by the columns from `id` on."""
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


class Row:
    """One row. `n` is its place in the order of opening, None until it was written."""

    __slots__ = (
        "address",
        "client",
        "code",
        "created_at",
        "due",
        "expires_at",
        "flags",
        "id",
        "key",
        "last_used_at",
        "n",
        "refresh",
        "refresh_expires_at",
        "token",
        "user",
    )

    def __init__(
        self,
        n: int | None,
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
        code: int,
        due: int,
    ) -> None:
        self.n = n
        self.id = id
        self.token = token
        self.refresh = refresh
        self.user = user
        self.client = client
        self.address = address
        self.key = key
        self.flags = flags
        self.created_at = created_at
        self.last_used_at = last_used_at
        self.expires_at = expires_at
        self.refresh_expires_at = refresh_expires_at
        self.code = code
        self.due = due  # a kept session: when both its tokens are past; else when it ended

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
            KEPT,
            max(record.expires_at, record.refresh_expires_at),
        )

    @classmethod
    def memory(cls, id: bytes, token: bytes, code: Code, wall: int) -> Row:
        return cls(None, id, token, b"", b"", b"", b"", b"", 0, 0, 0, 0, 0, code, wall)

    def record(self) -> SessionRecord | EndedRecord:
        if self.code != KEPT:
            return EndedRecord(self.id, self.token, Code(self.code), self.due)
        return self.session()

    def session(self) -> SessionRecord:
        return session_of(
            self.id,
            self.token,
            self.refresh,
            self.user,
            self.client,
            self.address,
            self.key,
            self.flags,
            self.created_at,
            self.last_used_at,
            self.expires_at,
            self.refresh_expires_at,
        )

    def end(self, code: Code, wall: int) -> EndedRecord:
        """Keep nothing but the memory."""
        self.refresh = self.user = self.client = self.address = self.key = b""
        self.flags = self.created_at = self.last_used_at = self.expires_at = self.refresh_expires_at = 0
        self.code, self.due = code, wall
        return EndedRecord(self.id, self.token, code, wall)


class Wanted:
    """What rows operations have to see: those with these ids or tokens, and the kept ones of these users."""

    __slots__ = ("ids", "tokens", "users")

    def __init__(self) -> None:
        self.ids: set[bytes] = set()
        self.tokens: set[bytes] = set()
        self.users: set[bytes] = set()


class WorkingSet:
    """The rows at hand, and what was changed. `rows` come in the order of opening."""

    __slots__ = ("_by_id", "_by_token", "_by_user", "answers", "changed")

    def __init__(self, rows: Iterable[Row], answers: Answers) -> None:
        self._by_id: dict[bytes, Row] = {}
        self._by_token: dict[bytes, Row] = {}
        self._by_user: dict[bytes, list[Row]] = {}
        self.answers = answers
        self.changed: dict[int, Row] = {}  # by identity, in the order of the first change
        for row in rows:
            self._take_in(row)

    def by_id(self, id: bytes) -> Row | None:
        return self._by_id.get(id)

    def by_token(self, token: bytes) -> Row | None:
        return self._by_token.get(token)

    def of_user(self, user: bytes) -> list[Row]:
        """The user's kept sessions, if they were asked for. The oldest first."""
        return [row for row in self._by_user.get(user, ()) if row.code == KEPT]

    def add(self, row: Row) -> None:
        self._take_in(row)
        self.changed[id(row)] = row

    def end(self, row: Row, code: Code, wall: int) -> EndedRecord:
        self.changed[id(row)] = row
        return row.end(code, wall)

    def rotate(self, row: Row, rotation: Rotation) -> bytes:
        """Give a session another pair; the digest of the token that is dead from now on."""
        old = row.token
        row.token, row.refresh = rotation.token_digest, rotation.refresh_digest
        row.client, row.address = utf8(rotation.client), utf8(rotation.address)
        row.last_used_at = rotation.wall
        row.expires_at = min(rotation.expires_at, row.refresh_expires_at)
        row.due = max(row.expires_at, row.refresh_expires_at)
        self._by_token[row.token] = row
        self.changed[id(row)] = row
        self.add(Row.memory(b"", old, Code.TOKEN_REVOKED, rotation.wall))
        return old

    def _take_in(self, row: Row) -> None:
        self._by_token[row.token] = row
        if row.id:
            self._by_id[row.id] = row
            self._by_user.setdefault(row.user, []).append(row)


class Operation(Protocol):
    """Something that is done to the rows at hand."""

    lasting: bool
    """Whether it is done even if nobody waits for it any more."""

    def want(self, wanted: Wanted) -> None: ...

    def apply(self, rows: WorkingSet) -> object: ...


class Create:
    __slots__ = ("limit", "record")
    lasting = False

    def __init__(self, record: SessionRecord, limit: UserLimit) -> None:
        self.record = record
        self.limit = limit

    def want(self, wanted: Wanted) -> None:
        wanted.ids.add(self.record.id)
        wanted.users.add(utf8(self.record.user))

    def apply(self, rows: WorkingSet) -> Created | LimitReached:
        record, limit, wall = self.record, self.limit, self.record.created_at
        if rows.by_id(record.id) is not None:
            return Created()
        ended: tuple[EndedRecord, ...] = ()
        mates = rows.of_user(utf8(record.user))
        if len(mates) >= limit.per_user:
            live = [row for row in mates if self._is_live(row)]
            lapsed = [row for row in mates if row not in live and wall < row.refresh_expires_at]
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


class Rotate:
    __slots__ = ("rotation",)
    lasting = False

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation

    def want(self, wanted: Wanted) -> None:
        wanted.ids.add(self.rotation.id)

    def apply(self, rows: WorkingSet) -> Rotated | NotRotated:
        rotation, wall = self.rotation, self.rotation.wall
        row = rows.by_id(rotation.id)
        if row is None:
            return NotRotated(Code.UNAUTHENTICATED)
        if row.code != KEPT:
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


class Find:
    __slots__ = ("token",)
    lasting = False

    def __init__(self, token: bytes) -> None:
        self.token = token

    def want(self, wanted: Wanted) -> None:
        wanted.tokens.add(self.token)

    def apply(self, rows: WorkingSet) -> SessionRecord | EndedRecord | None:
        row = rows.by_token(self.token)
        return None if row is None else row.record()


class Get:
    __slots__ = ("id",)
    lasting = False

    def __init__(self, id: bytes) -> None:
        self.id = id

    def want(self, wanted: Wanted) -> None:
        wanted.ids.add(self.id)

    def apply(self, rows: WorkingSet) -> SessionRecord | EndedRecord | None:
        row = rows.by_id(self.id)
        return None if row is None else row.record()


class End:
    __slots__ = ("code", "ids", "user", "wall")
    lasting = True

    def __init__(self, ids: Sequence[bytes], code: Code, wall: int, user: str | None) -> None:
        self.ids = ids
        self.code = code
        self.wall = wall
        self.user = None if user is None else utf8(user)

    def want(self, wanted: Wanted) -> None:
        wanted.ids.update(self.ids)

    def apply(self, rows: WorkingSet) -> list[EndedRecord]:
        ended = []
        for id_ in self.ids:
            row = rows.by_id(id_)
            if row is not None and row.code == KEPT and self.user in (None, row.user):
                ended.append(rows.end(row, self.code, self.wall))
        return ended


class EndUser:
    __slots__ = ("code", "user", "wall")
    lasting = True

    def __init__(self, user: str, code: Code, wall: int) -> None:
        self.user = utf8(user)
        self.code = code
        self.wall = wall

    def want(self, wanted: Wanted) -> None:
        wanted.users.add(self.user)

    def apply(self, rows: WorkingSet) -> list[EndedRecord]:
        return [rows.end(row, self.code, self.wall) for row in rows.of_user(self.user)]


class ListUser:
    __slots__ = ("user",)
    lasting = False

    def __init__(self, user: str) -> None:
        self.user = utf8(user)

    def want(self, wanted: Wanted) -> None:
        wanted.users.add(self.user)

    def apply(self, rows: WorkingSet) -> list[SessionRecord]:
        return [row.session() for row in rows.of_user(self.user)]


class ClaimRequest:
    __slots__ = ("digest", "key", "lease_ms", "user", "wall")
    lasting = False

    def __init__(self, user: str, key: str, digest: bytes, wall: int, lease_ms: int) -> None:
        self.user = user
        self.key = key
        self.digest = digest
        self.wall = wall
        self.lease_ms = lease_ms

    def want(self, wanted: Wanted) -> None:
        """No row of a session."""

    def apply(self, rows: WorkingSet) -> Claim:
        return rows.answers.claim(self.user, self.key, self.digest, self.wall, self.lease_ms)


class KeepAnswer:
    __slots__ = ("answer", "keep_ms", "key", "user", "wall")
    lasting = True

    def __init__(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        self.user = user
        self.key = key
        self.answer = answer
        self.wall = wall
        self.keep_ms = keep_ms

    def want(self, wanted: Wanted) -> None:
        """No row of a session."""

    def apply(self, rows: WorkingSet) -> None:
        rows.answers.keep(self.user, self.key, self.answer, self.wall, self.keep_ms)


class ReleaseClaim:
    __slots__ = ("key", "user")
    lasting = True

    def __init__(self, user: str, key: str) -> None:
        self.user = user
        self.key = key

    def want(self, wanted: Wanted) -> None:
        """No row of a session."""

    def apply(self, rows: WorkingSet) -> None:
        rows.answers.release(self.user, self.key)
