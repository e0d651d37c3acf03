"""Define sessions as a store keeps them: digests, never tokens.

All times are milliseconds since the Unix epoch. A copy of all records gives no access: `Rotation.sealed` is
encrypted under the spent refresh token.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar

from zcproto.errors import Code

WhenFull = Literal["evict_disconnected", "evict_oldest", "refuse"]

ROLES: Final = 8
"""Flag: the session has other roles than `operator`."""


ORIGIN_SIZE: Final = 8

NO_ORIGIN: Final = b"\xff" * ORIGIN_SIZE
"""The origin of a damaged record. Nothing has it."""

_ORIGIN_MARK: Final = "@"
"""Before an origin among the names of roles. No role begins with it."""


class SessionRecord(NamedTuple):
    """A live or lapsed session."""

    id: bytes
    """16 bytes, see `token.id_of`."""
    token_digest: bytes
    """SHA-256 of the access token."""
    refresh_digest: bytes
    """SHA-256 of the refresh token; of discarded random bytes without a refresh token."""
    user: str
    client: str
    address: str
    flags: int
    """OPERATOR, BOUND, EXTERNAL and ROLES, see session.py."""
    created_at: int
    last_used_at: int
    """Written behind: the time of the last `touch` of the store."""
    expires_at: int
    """Absolute expiry of the access token."""
    refresh_expires_at: int
    """0 without a refresh token."""
    key: str = ""
    """Key of a bound session: `device:NAME`, or `tls:` and the hex SHA-256 of a certificate's public key."""
    roles: str = ""
    """The names of its roles with ROLES in `flags`, see zcproto/common/roles.py."""
    origin: bytes = b""
    """A digest of what opened it: of the user's key and roles, and of the device's (zcproto/auth/directory.py).
    Empty for one of a version before, and where nothing is compared."""


RecordFields = tuple[bytes, bytes, bytes, str, str, str, int, int, int, int, int, str, str, bytes]
"""The fields of a SessionRecord, named or not. A login without a store does not name them: a plain tuple costs a
sixth."""


def stored_key(record: SessionRecord) -> str:
    """Return the key and the roles of a session as one text: stores have had a field for the key alone."""
    return f"{record.key}\0{record.roles}" if record.flags & ROLES else record.key


def key_and_roles(stored: str, flags: int) -> tuple[str, str]:
    """Reverse `stored_key`."""
    if not flags & ROLES:
        return stored, ""
    key, _, roles = stored.rpartition("\0")
    return key, roles


def pack_origin(record: SessionRecord) -> SessionRecord:
    """Return the record as it is kept outside this process: with its origin as one more name of its roles.

    A version that does not compare origins reads it as a role that no method needs, and keeps it.
    """
    if not record.origin:
        return record
    roles = f"{record.roles} {_ORIGIN_MARK}{record.origin.hex()}".lstrip()
    return record._replace(flags=record.flags | ROLES, roles=roles, origin=b"")


def unpack_origin(record: SessionRecord) -> SessionRecord:
    """Reverse `pack_origin`."""
    names, mark, text = record.roles.rpartition(_ORIGIN_MARK)
    if not mark or (names and not names.endswith(" ")):  # a role may contain the mark
        return record
    try:
        origin = bytes.fromhex(text)
    except ValueError:
        origin = NO_ORIGIN
    names = names.rstrip()
    flags = record.flags if names else record.flags & ~ROLES
    return record._replace(
        flags=flags, roles=names, origin=origin if len(origin) == ORIGIN_SIZE else NO_ORIGIN
    )


@dataclass(frozen=True, slots=True)
class EndedRecord:
    """The tombstone of a token: the reason given to its holder."""

    id: bytes
    """Empty if the session continues with another token."""
    token_digest: bytes
    code: Code
    """TOKEN_EXPIRED, TOKEN_REVOKED or SESSION_REPLACED."""
    ended_at: int


@dataclass(frozen=True, slots=True)
class UserLimit:
    """The limit of sessions per user, live and lapsed together.

    The oldest lapsed sessions are evicted first; `when_full` applies when `per_user` are live. After the limit was
    lowered, as many are evicted as are too many.
    """

    per_user: int
    when_full: WhenFull
    idle_ms: int | None
    """Idle limit, after which a session counts as lapsed."""
    disconnected: Container[bytes] = ()
    """For `evict_disconnected`: the ids of sessions that no connection uses; the others count as in use. A shared
    store looks at its leases instead."""
    counts_expired: bool = False
    """Whether expired leases count in a shared store, beside those that were given up."""

    def make_room(
        self, records: Sequence[SessionRecord], wall: int
    ) -> list[tuple[SessionRecord, Code]] | None:
        """Return the sessions that end, with their codes, when a user opens one more; None if that is refused.

        `records` are the user's, oldest first.
        """
        live, lapsed = [], []
        for record in records:
            if wall < record.expires_at and (
                self.idle_ms is None or wall < record.last_used_at + self.idle_ms
            ):
                live.append(record)
            elif wall < record.refresh_expires_at:
                lapsed.append(record)
        evicted = evictions(
            live, lapsed, self.per_user, self.when_full, lambda record: record.id in self.disconnected
        )
        if evicted is None:
            return None
        code = evicted_code(self.when_full)
        return [(each, Code.TOKEN_EXPIRED) for each in evicted[0]] + [(each, code) for each in evicted[1]]


T = TypeVar("T")


def evictions(
    live: Sequence[T],
    lapsed: Sequence[T],
    per_user: int,
    when_full: WhenFull,
    is_disconnected: Callable[[T], bool],
) -> tuple[Sequence[T], Sequence[T]] | None:
    """Return the lapsed and the live sessions of a user that end for one more; None if that is refused.

    Both are given oldest first.
    """
    evictable: Sequence[T] = live if when_full == "evict_oldest" else []
    if when_full == "evict_disconnected":
        evictable = [session for session in live if is_disconnected(session)]
    if len(live) - len(evictable) >= per_user:
        return None
    surplus = max(len(live) + len(lapsed) + 1 - per_user, 0)  # above 1 after the limit was lowered
    ended = lapsed[:surplus]
    return ended, evictable[: surplus - len(ended)]


def evicted_code(when_full: WhenFull) -> Code:
    """Return the code of live sessions that are evicted.

    A client opens another session after TOKEN_EXPIRED. After SESSION_REPLACED it does not (zcp1.md, section 9.8):
    clients whose sessions are in use would evict each other without end.
    """
    return Code.SESSION_REPLACED if when_full == "evict_oldest" else Code.TOKEN_EXPIRED


@dataclass(frozen=True, slots=True)
class Rotation:
    """A refresh of a session. The id, the user and `refresh_expires_at` do not change."""

    id: bytes
    spent_digest: bytes
    """SHA-256 of the presented refresh token."""
    token_digest: bytes
    refresh_digest: bytes
    expires_at: int
    client: str
    address: str
    wall: int
    sealed: bytes = b""
    """The new pair, encrypted for the holder of the spent token; empty if a repetition is not answered."""
    grace_ms: int = 0
    """How long `sealed` is kept."""
