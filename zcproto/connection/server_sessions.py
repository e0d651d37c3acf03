"""Decide which tokens a connection of a server accepts, and when each is checked again (sans-IO).

A token that was accepted needs no check while no token of the server becomes invalid, for TOUCH_INTERVAL_MS at
most. After one has become invalid, `check_again` decides, which costs less than looking the token up. A connection
may serve many sessions: the tokens accepted before the last one are kept aside, by the same rules.
"""

from __future__ import annotations

from typing import Final, Protocol

from zcproto.connection import refusals
from zcproto.connection.events import NEVER, KeyWanted, ServerEvent, SessionJoined, SessionLeft
from zcproto.connection.joined_session import JoinedSession
from zcproto.connection.server_output import MS, ServerOutput
from zcproto.connection.state import State
from zcproto.errors import Code
from zcproto.sessions import Session, SessionRegistry
from zcproto.sessions.session import BOUND
from zcproto.sessions.token import digest_of
from zcproto.wire.frame import EVENT, HEADER_SIZE, NO_TOKEN, REQUEST, TOKEN_SIZE
from zcproto.wire.message import encode_body
from zcproto.wire.usual import DECODING, RequestRules, UsualRequest, read_request

ALWAYS: Final = 2**64
"""Milliseconds: later than any time."""

TOUCH_INTERVAL_MS: Final = 1_000
"""Minimum interval at which one connection updates the last use of a session; idle limits are minutes."""

ROTATION_GRACE_S: Final = 60.0
"""How long streams go on after a refresh elsewhere until the newest token is shown (zcp1.md, section 9.6)."""

_COARSE_FROM_S: Final = 10.0
_COARSE_BY_S: Final = 1.0
"""Deadlines further away than the first may be handled later by the second; see `DeadlineWheel`."""

NO_KEYS: Final[frozenset[str]] = frozenset()
_TOKEN_AT: Final = HEADER_SIZE - TOKEN_SIZE
_CLOSED: Final = State.CLOSED


def _soon(at: float, now: float) -> float:
    """Return when to look at a deadline that must not be missed by the coarseness of timers."""
    return at - _COARSE_BY_S if at - now > _COARSE_FROM_S else at


class Edge(Protocol):
    """The owner of a connection."""

    def admits(self, session: Session) -> bool:
        """Return whether a session may be used here; False refuses its token like an unknown one."""


class ServerSessions(ServerOutput):
    """The sessions of one connection. Its fields are those of `ServerConnection`."""

    __slots__ = (
        "_accepts_joined",
        "_last_counter",
        "_others",
        "_proved",
        "_recheck_at",
        "_seen_generation",
        "_session",
        "_token",
        "edge",
        "registry",
    )

    registry: SessionRegistry
    edge: Edge | None
    _last_counter: int
    _token: bytes
    _session: Session | None
    _recheck_at: int
    _seen_generation: int
    _others: dict[bytes, tuple[RequestRules, int, int]] | None
    """Rules, next check and generation of the tokens accepted before the last one."""
    _accepts_joined: bool
    _proved: frozenset[str]

    # --- tokens ---------------------------------------------------------------------------------

    def _new_rules(self) -> RequestRules:
        """Return what makes a request with the last accepted token usual."""
        settings, session = self.settings, self._session
        return (
            settings.max_frame_before_session if session is None else settings.max_frame,
            REQUEST,
            self.salt,
            self._token,
            settings.tolerance_ms,
            settings.max_depth,
            session,
            DECODING,
        )

    def _is_accepted(self, wall: int) -> bool:
        """Return whether the last accepted token is still valid. If it has not been used lately, it is now."""
        session, registry = self._session, self.registry
        if registry.generation != self._seen_generation:  # most often another token became invalid
            if session is not None:
                if not self._is_current(session, self._token, wall):
                    return False
                self._recheck_at = self._next_check(session, wall)
            self._see_generation()
        if wall < self._recheck_at:
            return True
        if session is None or wall >= registry.trusted_until or session.valid_until - wall <= 2 * MS:
            return False
        registry.touch(session, wall)
        self._recheck_at = min(wall + TOUCH_INTERVAL_MS, registry.trusted_until)
        return True

    def _is_current(self, session: Session, token: bytes, wall: int) -> bool:
        """Return whether a session accepted here is still used here, with the same valid token."""
        known = self.sessions.get(session.id)
        return known is not None and known.token == token and self.registry.check_again(session, wall)

    def _next_check(self, session: Session, wall: int) -> int:
        """Return until when frames with the token of a session, used now, are accepted."""
        # Half of the remaining time, so that a session in use is touched before it would count as idle.
        return min(wall + TOUCH_INTERVAL_MS, (wall + session.valid_until) // 2, self.registry.trusted_until)

    def _see_generation(self) -> None:
        """Note that tokens may have become invalid, but not the one in question."""
        generation = self.registry.generation
        self._accepts_joined = (
            self._accepts_joined and generation == self._seen_generation
        ) or not self._held
        self._seen_generation = generation

    def _read_other(self, data: bytes, at: int, wall: int) -> UsualRequest | None:
        """Return the usual request at `at` if its token was accepted earlier and still is: it becomes the last."""
        others, registry = self._others, self.registry
        token = data[at + _TOKEN_AT : at + HEADER_SIZE]
        kept = None if others is None or self._rules is None else others.get(token)
        if kept is None:
            return None
        rules, recheck_at, generation = kept
        session = rules[6]
        found = read_request(data, at, rules, self._last_counter, wall)
        if found is None:
            return None
        if registry.generation != generation:
            if not self._is_current(session, token, wall):
                return None
            recheck_at = self._next_check(session, wall)
        self._set_aside()
        self._see_generation()
        self._token, self._session, self._rules, self._recheck_at = token, session, rules, recheck_at
        return found if self._is_accepted(wall) else None

    def _set_aside(self) -> None:
        """Keep the last accepted token, as another one takes its place. Its session has it: `_forget_token_of`."""
        if self._session is not None:
            if self._others is None:
                self._others = {}
            rules = self._rules or self._new_rules()
            self._others[self._token] = rules, self._recheck_at, self._seen_generation

    def _session_of(self, token: bytes, wall: int, now: float) -> SessionJoined | KeyWanted | bytes | None:
        """Check a token that differs from the last one or must be checked again.

        Return the body of an ERROR, KeyWanted if its key must be proved first, SessionJoined on its first use here,
        or None.
        """
        registry = self.registry
        if token != self._token:
            self._set_aside()
        self._see_generation()
        self._forget_last_token()  # until this token is accepted
        if token == NO_TOKEN:
            self._recheck_at = ALWAYS
            return None
        session = registry.check(token, wall)
        if isinstance(session, Code):
            return refusals.of_token(session, is_closed=registry.closed)
        known = self.sessions.get(session.id)
        is_known = known is not None and known.token == token and known.cut_at == NEVER
        if not is_known and self.edge is not None and not self.edge.admits(session):
            return refusals.TOKEN_ERRORS[Code.UNAUTHENTICATED]
        if session.bound:
            key = registry.key_of(session)
            if key not in self._proved:
                return KeyWanted(session, key)
            registry.use(session, wall)
        self._accept(session, token, wall)
        if is_known:
            return None
        self.join(session, token, wall, now)
        return SessionJoined(session.id)

    def _accept(self, session: Session, token: bytes, wall: int) -> None:
        """Accept frames with this token for a while."""
        if token != self._token:
            self._set_aside()
        self._token = token
        self._session = session
        self._rules = None
        self._recheck_at = self._next_check(session, wall)

    def prove(self, key: str) -> None:
        """Record that the peer has proved this key: sessions bound to it may be used here."""
        self._proved |= {key}

    def has_proved(self, key: str) -> bool:
        return key in self._proved

    def disprove(self, key: str) -> None:
        """Withdraw a proved key."""
        if key in self._proved:
            self._proved -= {key}
            self._forget_last_token()
            self._others = None

    # --- sessions -------------------------------------------------------------------------------

    def join(self, session: Session, token: bytes, wall: int, now: float) -> None:
        """Add a session used here: one that a request of this connection opened, refreshed or attached."""
        due_at = now + max(0, session.expiring_at - wall) / MS
        # Before the open deadline the edge need not look: `handle_timeout` comes then.
        if due_at < self._session_deadline:
            self.deadline_moved = True
            self._session_deadline = due_at
        elif not self.sessions:
            self._session_deadline = due_at
        known = self.sessions.get(session.id)
        if known is None:
            known = self.sessions[session.id] = JoinedSession(
                token, session.user, session.expires_at, due_at, wall
            )
        else:  # refreshed
            self._forget_token_of(session.id)
            known.token, known.expires_at, known.due_at, known.cut_at = (
                token,
                session.expires_at,
                due_at,
                NEVER,
            )
        if self._decoder is not None:
            self._decoder.limit = self.limit
        # Its next frame needs no check if no token has become invalid since that request was accepted, whatever
        # other frames came meanwhile.
        registry = self.registry
        is_unchanged = registry.generation == self._seen_generation and self._accepts_joined
        if is_unchanged and not (registry.closed or session.flags & BOUND):
            self._accept(session, token, wall)

    def leave(self, session_id: str, now: float) -> None:
        """Remove an ended session. Without any session, the limits of a new connection apply again."""
        self._forget_token_of(session_id)
        if self.sessions.pop(session_id, None) is not None and not self.sessions:
            if self._decoder is not None:
                self._decoder.limit = self.limit
            self._session_deadline = now + self.settings.open_timeout_s
            self.deadline_moved = True

    def _forget_token_of(self, session_id: str) -> None:
        """Drop what is kept of the token that a session had here: no other frame with it may be accepted."""
        known = self.sessions.get(session_id)
        if known is None:
            return
        if self._others is not None:
            self._others.pop(known.token, None)
        if known.token == self._token:
            self._forget_last_token()

    def _forget_last_token(self) -> None:
        """Check the next frame whatever its token is."""
        self._token, self._session, self._recheck_at, self._rules = NO_TOKEN, None, 0, None

    def suspend(self, session_id: str, token_digest: bytes, wall: int, now: float) -> bool:
        """Suspend a session that has a token with this digest now, unless it was shown here (zcp1.md, section 9.6).

        Return True if it is suspended from now on: it gets neither events nor calls, and its streams have a limit.
        """
        known = self.sessions.get(session_id)
        if known is None or known.cut_at != NEVER or digest_of(known.token) == token_digest:
            return False
        self._forget_token_of(session_id)  # if it becomes valid again it has to be shown again
        known.due_at, known.cut_at = NEVER, now + min(ROTATION_GRACE_S, max(0, known.expires_at - wall) / MS)
        self._session_deadline = min(self._session_deadline, _soon(known.cut_at, now))
        self.deadline_moved = True
        return True

    def is_suspended(self, session_id: str) -> bool:
        """Return whether a session is not used here, or not with its newest token."""
        known = self.sessions.get(session_id)
        return known is None or known.cut_at != NEVER

    def _handle_sessions(self, wall: int, now: float) -> list[ServerEvent]:
        """Do what is due for sessions used here: announce an expiry, let a token expire, end a suspension."""
        events: list[ServerEvent] = []
        for session_id, joined in [*self.sessions.items()]:
            if joined.cut_at <= now:
                events += self._lose(session_id, refusals.ROTATED, wall, now)
            elif joined.due_at <= now:
                if wall < joined.expires_at:
                    self._send_expiring(joined, wall, now)
                else:
                    joined.due_at = NEVER
                    self.registry.expire(session_id, wall)  # its observers may make this connection leave it
                    if session_id in self.sessions:  # the registry has forgotten it
                        body = refusals.SESSION_ENDED[Code.TOKEN_EXPIRED]
                        events += self._lose(session_id, body, wall, now)
        if self.sessions:
            dues = [min(joined.due_at, joined.cut_at) for joined in self.sessions.values()]
            self._session_deadline = _soon(min(dues), now)
        return events

    def _send_expiring(self, joined: JoinedSession, wall: int, now: float) -> None:
        """Send `session.expiring`, once."""
        joined.due_at = now + (joined.expires_at - wall) / MS
        body = encode_body(["session.expiring", {"expires_at": joined.expires_at}])
        self._send(EVENT, 0, joined.token, body, wall)

    def _lose(self, session_id: str, body: bytes, wall: int, now: float) -> list[ServerEvent]:
        """End the use of a session here; `body` cuts its streams."""
        cut = self._cut_streams(session_id, body, wall)
        self.leave(session_id, now)
        return [*cut, SessionLeft(session_id)]

    def session_revoked(self, session_id: str, reason: str, wall: int, now: float) -> None:
        """Send `session.revoked` for a session used here, and remove it."""
        known = self.sessions.get(session_id)
        if known is not None and self.state is not _CLOSED:
            self._send(EVENT, 0, known.token, encode_body(["session.revoked", {"reason": reason}]), wall)
        self.leave(session_id, now)
