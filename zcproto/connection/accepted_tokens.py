"""Decide which tokens a connection of a server accepts, and when each is checked again (sans-IO).

A token that was accepted needs no check while no token of the server becomes invalid, for TOUCH_INTERVAL_MS at
most. After one has become invalid, `check_again` decides, which costs less than looking the token up. A connection
may serve many sessions: each token is kept by the same rules until its session leaves the connection.

It must not know: frames, what is in flight.
"""

from __future__ import annotations

from typing import Final

from zcproto.connection.settings import ConnectionSettings
from zcproto.sessions import Session, SessionRegistry
from zcproto.sessions.session import BOUND
from zcproto.wire.frame import NO_TOKEN, REQUEST
from zcproto.wire.request_fast_path import DECODING, RequestRules

MS: Final = 1000
ALWAYS: Final = 2**64
"""Milliseconds: later than any time."""

TOUCH_INTERVAL_MS: Final = 1_000
"""Minimum interval at which one connection updates the last use of a session; idle limits are minutes."""

NO_KEYS: Final[frozenset[str]] = frozenset()


class AcceptedToken:
    """A token that needs no check before `recheck_at`, while `generation` is that of the registry.

    `rules` are those of its requests in the fast path.
    """

    __slots__ = ("generation", "recheck_at", "rules", "session", "token")

    def __init__(
        self,
        settings: ConnectionSettings,
        salt: bytes,
        token: bytes,
        session: Session | None,
        recheck_at: int,
        generation: int,
    ) -> None:
        self.token = token
        self.session = session
        self.recheck_at = recheck_at
        self.generation = generation
        self.rules: RequestRules = (
            settings.max_frame_before_session if session is None else settings.max_frame,
            REQUEST,
            salt,
            token,
            settings.tolerance_ms,
            settings.max_depth,
            session,
            DECODING,
        )


class AcceptedTokens:
    """The tokens that one connection accepts. `last` is that of the last request; at first NO_TOKEN."""

    __slots__ = ("_all", "_proved", "_registry", "_salt", "_settings", "last")

    def __init__(self, settings: ConnectionSettings, registry: SessionRegistry, salt: bytes) -> None:
        self._settings = settings
        self._registry = registry
        self._salt = salt
        self._all: dict[bytes, AcceptedToken] | None = None  # those of sessions, once there were several
        self._proved = NO_KEYS
        self.last = AcceptedToken(settings, salt, NO_TOKEN, None, ALWAYS, registry.generation)

    def earlier(self, token: bytes) -> AcceptedToken | None:
        """Return what is kept of a token that was accepted here before the last one."""
        return None if self._all is None else self._all.get(token)

    def accepts(self, token: bytes, wall: int) -> bool:
        """Return whether a token was accepted here and is still valid. It is the last one then, and used now."""
        accepted = self.last if token == self.last.token else self.earlier(token)
        return accepted is not None and self.use(accepted, wall)

    def use(self, accepted: AcceptedToken, wall: int) -> bool:
        """Make a token the last one. Return whether it is still valid; if it was not used lately, it is now."""
        self.last = accepted
        session, registry = accepted.session, self._registry
        if registry.generation != accepted.generation:  # most often another token became invalid
            if session is not None:
                if not registry.check_again(session, wall):
                    return False
                accepted.recheck_at = self._next_check(session, wall)
            accepted.generation = registry.generation
        if wall < accepted.recheck_at:
            return True
        if session is None or wall >= registry.trusted_until or session.valid_until - wall <= 2 * MS:
            return False
        registry.touch(session, wall)
        accepted.recheck_at = min(wall + TOUCH_INTERVAL_MS, registry.trusted_until)
        return True

    def _next_check(self, session: Session, wall: int) -> int:
        """Return until when a token of a session, used now, is accepted."""
        # Half of the remaining time, so that a session in use is touched before it would count as idle.
        return min(wall + TOUCH_INTERVAL_MS, (wall + session.valid_until) // 2, self._registry.trusted_until)

    def accept(self, session: Session | None, token: bytes, wall: int) -> None:
        """Accept frames with a token that was just checked, for a while; those without a session always."""
        before, registry = self.last, self._registry
        recheck_at = ALWAYS if session is None else self._next_check(session, wall)
        self.last = AcceptedToken(self._settings, self._salt, token, session, recheck_at, registry.generation)
        if self._all is not None:
            if session is not None:
                self._all[token] = self.last
        elif before.session is not None and before.token != token:
            self._all = (
                {before.token: before} if session is None else {before.token: before, token: self.last}
            )

    def accept_opened(self, session: Session, token: bytes, wall: int, *, is_alone: bool) -> None:
        """Accept the token of a session that a request of this connection opened, if it is still valid.

        `is_alone`: no request is in flight, so that this one was accepted just now, with the last token. The token
        of a bound session is checked with its next frame, because its key must be proved.
        """
        registry = self._registry
        is_checked = is_alone and registry.generation == self.last.generation and not registry.closed
        if not session.flags & BOUND and (is_checked or registry.check_again(session, wall)):
            self.accept(session, token, wall)

    def forget(self, token: bytes) -> None:
        """Check the next frame with a token."""
        if self._all is not None:
            self._all.pop(token, None)
        last = self.last
        if token == last.token:
            self.last = AcceptedToken(self._settings, self._salt, NO_TOKEN, None, ALWAYS, last.generation)

    # --- keys -----------------------------------------------------------------------------------

    def prove(self, key: str) -> None:
        """Record that the peer has proved this key: sessions bound to it may be used here."""
        self._proved |= {key}

    def has_proved(self, key: str) -> bool:
        return key in self._proved

    def disprove(self, key: str) -> None:
        """Withdraw a proved key, and check all tokens."""
        if key in self._proved:
            self._proved -= {key}
            self._all = None
            self.forget(self.last.token)
