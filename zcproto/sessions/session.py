"""Define the settings of sessions and the values returned to callers.

All times are milliseconds since the Unix epoch, all durations milliseconds. No `repr` contains a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Required, TypedDict, get_args

from zcproto.common.roles import Roles, roles_of
from zcproto.errors import ConfigError
from zcproto.sessions.record import SessionRecord, WhenFull
from zcproto.sessions.token import id_text

_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS
_MAX_GRACE_MS: Final = 60_000

OPERATOR: Final = 1
"""The session has the role `operator`."""
BOUND: Final = 2
EXTERNAL: Final = 4
"""The user is the application's, and not in the file of users of the home folder."""

DEVICE_KEY: Final = "device:"
"""Prefix of the key of sessions bound to a device; the device's name follows."""
CERTIFICATE_KEY: Final = "tls:"
"""Prefix of the key of sessions bound to a client certificate; the hex SHA-256 of its public key follows."""


class EndReason(StrEnum):
    """Why a session ended, as in the event `session.revoked` and in the log."""

    EXPIRED = "expired"
    IDLE = "idle"
    CLOSED = "closed"
    BY_USER = "revoked by its user"
    BY_OPERATOR = "revoked by an operator"
    USER_CHANGED = "the user was changed"
    DEVICE_REMOVED = "the device was removed or changed"
    REPLACED = "replaced by a newer session"
    DISCONNECTED = "ended without a connection, to make room for a newer session"
    REFRESH_REUSED = "refresh token reused"
    ELSEWHERE = "ended elsewhere"
    REVOKED_ELSEWHERE = "revoked"
    UNKNOWN = ""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Lifetimes and limits of sessions. Raises ConfigError with all faults at once."""

    lifetime_ms: int = _DAY_MS
    """Absolute lifetime of an access token; use does not extend it."""
    idle_timeout_ms: int | None = _HOUR_MS
    """A token unused for this long expires. None: no idle limit."""
    per_user: int = 5
    """Sessions per user, lapsed ones included (but see `SessionRegistry.open`)."""
    when_full: WhenFull = "evict_disconnected"
    """At the limit, end the user's oldest session without a connection, or the oldest one, or refuse the login."""
    refresh: bool = True
    """Issue refresh tokens."""
    refresh_lifetime_ms: int = 30 * _DAY_MS
    """Absolute lifetime of a session with all its refreshes, from its opening."""
    refresh_grace_ms: int = 10_000
    """Time during which the same client may repeat its last refresh because the response was lost. At most a
    minute: a thief at the same address could use it too."""
    dead_limit: int = 16_384
    """Tombstones kept, so that holders of ended tokens learn why; the oldest is dropped first, after which its
    token is refused as unknown. The default takes at most 2.6 MB and covers over 1,600 refreshes a minute."""
    dead_keep_ms: int = 600_000
    """Lifetime of a tombstone: longer than any client takes to notice."""
    grace_limit: int = 8_192
    """Pairs kept for `refresh_grace_ms`, about 500 bytes each. Beyond that (800 refreshes a second) the oldest lose
    their grace, and repeating their refresh counts as reuse."""

    max_sessions: int = 1_000_000
    """Sessions of all users, lapsed ones included. About 180 bytes each once used; before that only address
    space is reserved."""

    def __post_init__(self) -> None:
        faults = [
            f"sessions: {name} was {getattr(self, name)}, must be at least {least}"
            for least, names in (
                (1, "lifetime_ms idle_timeout_ms per_user refresh_lifetime_ms max_sessions"),
                (0, "refresh_grace_ms dead_limit dead_keep_ms grace_limit"),
            )
            for name in names.split()
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        if self.refresh_grace_ms > _MAX_GRACE_MS:
            faults.append(
                f"sessions: refresh_grace_ms was {self.refresh_grace_ms}, must be at most {_MAX_GRACE_MS}"
            )
        if self.when_full not in get_args(WhenFull):
            faults.append("sessions: when_full must be 'evict_disconnected', 'evict_oldest' or 'refuse'")
        if faults:
            raise ConfigError(faults)


@dataclass(slots=True, eq=False, repr=False)  # a frozen dataclass costs a call per field
class Session:
    """A live session at the time of a check of its token.

    `raw_id` are the 16 bytes of its id, `id` is its text: 22 characters of base64url. `slot` is its slot in the
    registry while the registry's `generation` is unchanged since the check; later `check_again` looks for
    `token_digest` there, the SHA-256 of its token. `expires_at` is the absolute expiry of the token; from
    `valid_until` on it must be checked again for idleness; at `expiring_at` a tenth of its lifetime is left.
    """

    raw_id: bytes
    id: str
    user: str
    flags: int
    slot: int
    expires_at: int
    valid_until: int
    expiring_at: int
    role_names: str
    token_digest: bytes

    @property
    def roles(self) -> Roles:
        """Return the roles that the session was opened with."""
        return roles_of(self.flags & OPERATOR != 0, self.role_names)

    @property
    def bound(self) -> bool:
        """Return True if the token is valid only on connections that proved its key (zcp1.md, section 9.5)."""
        return self.flags & BOUND != 0

    def __repr__(self) -> str:
        return f"Session(id={self.id!r}, user={self.user!r}, slot={self.slot}, expires_at={self.expires_at})"


class Opening(TypedDict, total=False):
    """What is known of a session to open, besides its user."""

    client: Required[str]
    address: Required[str]
    roles: Roles
    key: str
    """What it is bound to; empty for none."""
    external: bool
    """Whether the user is the application's."""
    ends_at: int | None
    """The time beyond which neither a token nor a refresh prolongs it."""
    origin: bytes
    """A digest of what opens it, see `SessionRecord.origin`."""


@dataclass(slots=True, repr=False)
class OpenedSession:
    """A session just opened or refreshed, with its tokens, which are not available again."""

    token: bytes
    refresh_token: bytes | None
    refresh_expires_at: int | None
    session: Session

    def __repr__(self) -> str:
        refresh = None if self.refresh_token is None else "***"
        return (
            f"OpenedSession(token=***, refresh_token={refresh}, "
            f"refresh_expires_at={self.refresh_expires_at}, session={self.session!r})"
        )


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as listed to its user.

    `live` is False once the token has expired and only a refresh revives the session. `client` and `address` are
    those of the login or the last refresh. `refresh_expires_at` is None without a refresh token.
    """

    id: str
    user: str
    created_at: int
    last_used_at: int
    expires_at: int
    client: str
    address: str
    bound: bool
    roles: Roles
    live: bool
    refresh_expires_at: int | None


def session_info(record: SessionRecord, *, live: bool) -> SessionInfo:
    """Describe a session to its user."""
    return SessionInfo(
        id=id_text(record.id),
        user=record.user,
        created_at=record.created_at,
        last_used_at=record.last_used_at,
        expires_at=record.expires_at,
        client=record.client,
        address=record.address,
        bound=record.flags & BOUND != 0,
        roles=roles_of(record.flags & OPERATOR != 0, record.roles),
        live=live,
        refresh_expires_at=record.refresh_expires_at or None,
    )
