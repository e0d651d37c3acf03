"""Sessions as they are kept outside of this process: values, with digests and never a token.

All times are milliseconds since the Unix epoch. Nothing here opens anything: a copy of all records lets nobody
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zcproto.errors import Code

WhenFull = Literal["refuse", "evict_oldest"]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One live or lapsed session."""

    id: bytes
    """16 bytes, as `token.id_of` makes them."""
    token_digest: bytes
    """SHA-256 of the access token."""
    refresh_digest: bytes
    """SHA-256 of the refresh token; of bytes that nobody was told where there is none."""
    user: str
    client: str
    address: str
    flags: int
    """OPERATOR and BOUND of session.py."""
    created_at: int
    last_used_at: int
    """Written behind: as old as the store's last `touch`."""
    expires_at: int
    """The token's absolute limit."""
    refresh_expires_at: int
    """0: there is no refresh token."""
    key: str = ""
    """What a bound session is bound to: `device:NAME`, or `tls:` and the hex SHA-256 of a certificate's key."""


@dataclass(frozen=True, slots=True)
class EndedRecord:
    """The memory of a token that was good once, so that its holder learns what became of it."""

    id: bytes
    """Empty if its session lives on with another token."""
    token_digest: bytes
    code: Code
    """TOKEN_EXPIRED, TOKEN_REVOKED or SESSION_REPLACED."""
    ended_at: int


@dataclass(frozen=True, slots=True)
class UserLimit:
    """How many sessions a user may have, live and lapsed ones together, and what one too many does.

    To make room the oldest lapsed one goes first; only when all are live does `when_full` decide.
    """

    per_user: int
    when_full: WhenFull
    idle_ms: int | None
    """The idle limit, by which a session counts as lapsed too."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """A refresh: what replaces what. The id, the user and `refresh_expires_at` stay."""

    id: bytes
    spent_digest: bytes
    """SHA-256 of the refresh token that was shown."""
    token_digest: bytes
    refresh_digest: bytes
    expires_at: int
    client: str
    address: str
    wall: int
