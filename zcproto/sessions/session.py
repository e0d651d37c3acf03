"""What callers see of sessions: the settings, and the records handed out.

All times are milliseconds since the Unix epoch, all durations milliseconds. Nothing here prints a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from zcproto.errors import ConfigError
from zcproto.sessions.record import SessionRecord, WhenFull
from zcproto.sessions.token import id_text

_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS
_MAX_GRACE_MS: Final = 60_000

OPERATOR: Final = 1
BOUND: Final = 2

DEVICE_KEY: Final = "device:"
"""Before a device's name: what its sessions are bound to."""
CERTIFICATE_KEY: Final = "tls:"
"""Before the hex SHA-256 of a client certificate's public key: what sessions opened with it are bound to."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How long sessions live and how many a user may have. Faults raise ConfigError, all at once."""

    lifetime_ms: int = _DAY_MS
    """A token's absolute limit, which use does not extend."""
    idle_timeout_ms: int | None = _HOUR_MS
    """A token unused for this long is dead. None: no idle limit."""
    per_user: int = 5
    """Sessions a user may have, with those that only wait to be refreshed (but see `SessionRegistry.open`)."""
    when_full: WhenFull = "refuse"
    """What a further login does: is refused, or ends the user's oldest session."""
    refresh: bool = True
    """Whether sessions get refresh tokens."""
    refresh_lifetime_ms: int = 30 * _DAY_MS
    """The absolute limit of a session with all its refreshes, counted from its opening."""
    refresh_grace_ms: int = 10_000
    """How long the refresh token used last may be shown again by the same client, whose answer was lost.
    At most a minute: for that long a thief at the same address could use it too."""
    dead_limit: int = 16_384
    """Dead tokens remembered, so that their holders learn what became of them; the oldest is forgotten
    first. A forgotten one is refused as unknown. Here: 2.6 MB at most, and over 1,600 refreshes a minute
    remembered in full."""
    dead_keep_ms: int = 600_000
    """How long a dead token is remembered: longer than any client takes to notice."""
    grace_limit: int = 8_192
    """Pairs kept for `refresh_grace_ms`; beyond that (800 refreshes a second) the oldest lose their
    grace, and showing the spent token again counts as reuse. About 500 bytes each."""

    max_sessions: int = 1_000_000
    """Sessions of all users together, lapsed ones included. Each takes about 170 bytes once it is there;
    until then address space is all that is reserved."""

    def __post_init__(self) -> None:
        faults = [
            f"sessions: {name} was {value}, must be at least {least}"
            for name, value, least in (
                ("lifetime_ms", self.lifetime_ms, 1),
                ("idle_timeout_ms", self.idle_timeout_ms, 1),
                ("per_user", self.per_user, 1),
                ("refresh_lifetime_ms", self.refresh_lifetime_ms, 1),
                ("refresh_grace_ms", self.refresh_grace_ms, 0),
                ("max_sessions", self.max_sessions, 1),
                ("dead_limit", self.dead_limit, 0),
                ("dead_keep_ms", self.dead_keep_ms, 0),
                ("grace_limit", self.grace_limit, 0),
            )
            if value is not None and value < least
        ]
        if self.refresh_grace_ms > _MAX_GRACE_MS:
            faults.append(
                f"sessions: refresh_grace_ms was {self.refresh_grace_ms}, must be at most {_MAX_GRACE_MS}"
            )
        if self.when_full not in ("refuse", "evict_oldest"):
            faults.append("sessions: when_full must be 'refuse' or 'evict_oldest'")
        if faults:
            raise ConfigError(faults)


class Session:
    """A live session as of one check of its token.

    `slot` is its place in the registry. It belongs to this session for as long as the registry's
    `generation` is what it was at the check. `expires_at` is the token's absolute limit; `valid_until`
    the moment from which the token must be checked again, because it may have been idle too long;
    `expiring_at` when a tenth of the lifetime is left.
    """

    __slots__ = ("_flags", "_id", "_id_text", "expires_at", "expiring_at", "slot", "user", "valid_until")

    def __init__(
        self,
        session_id: bytes,
        user: str,
        flags: int,
        slot: int,
        expires_at: int,
        valid_until: int,
        expiring_at: int,
    ) -> None:
        self._id = session_id
        self._id_text: str | None = None
        self._flags = flags
        self.user = user
        self.slot = slot
        self.expires_at = expires_at
        self.valid_until = valid_until
        self.expiring_at = expiring_at

    @property
    def operator(self) -> bool:
        """Whether the user may look at and steer the server."""
        return self._flags & OPERATOR != 0

    @property
    def bound(self) -> bool:
        """Whether the token is good only where its key was proved (wire.md section 6)."""
        return self._flags & BOUND != 0

    @property
    def raw_id(self) -> bytes:
        """The 16 bytes of the id."""
        return self._id

    @property
    def id(self) -> str:
        """The public handle: 22 characters of base64url. Made when first asked for: most checks never ask."""
        text = self._id_text
        if text is None:
            text = self._id_text = id_text(self._id)
        return text

    def __repr__(self) -> str:
        return f"Session(id={self.id!r}, user={self.user!r}, slot={self.slot}, expires_at={self.expires_at})"


@dataclass(slots=True, repr=False)  # a frozen one takes a call for each field
class OpenedSession:
    """A session just opened or refreshed, with the tokens, which are shown this once."""

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


@dataclass(frozen=True, slots=True, repr=False)
class NewSession:
    """A session that a store is asked to keep, with the tokens, which are shown this once."""

    record: SessionRecord
    token: bytes
    refresh_token: bytes | None

    def __repr__(self) -> str:
        return f"NewSession(record={self.record!r}, token=***, refresh_token=***)"


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a user may know of a session.

    `live` is False once the token has expired and only a refresh brings the session back. `client` and
    `address` are those of the login or of the last refresh. `refresh_expires_at` is None if there is no
    refresh token.
    """

    id: str
    user: str
    created_at: int
    last_used_at: int
    expires_at: int
    client: str
    address: str
    bound: bool
    operator: bool
    live: bool
    refresh_expires_at: int | None
