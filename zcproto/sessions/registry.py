"""Check tokens; open, refresh, list and revoke sessions in memory.

Decides the number of sessions per user, the result of a check, the effect of a refresh token, and access to
sessions of others. How sessions end is in lifecycle.py.

Rules:
- A caller may reuse a Session while `generation` is unchanged and `wall` is below its `valid_until` and
  `trusted_until`; after a change of `generation`, if `check_again` returns True.
- A lapsed session never prevents a login.
- A refresh token works once. Reuse of a spent one, however old, ends the whole session, except when the same client
  repeats the last one within the grace (zcp1.md, section 9.6; RFC 9700 section 4.14.2). Every spent refresh
  token is recognised while its session exists (see token.py).
- No operation takes longer with more sessions, except `revoke_all`.

It must not know: connections, stores, clocks. Times are passed as `wall`, random bytes come from `entropy`. Use it
from one thread. An observer must neither raise nor call the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from typing import Final, Unpack

from zcproto.common.roles import NO_ROLES, Roles, names_without_operator
from zcproto.common.roles import OPERATOR as OPERATOR_ROLE
from zcproto.common.secret import SecretBytes
from zcproto.errors import CallError, Code, InvalidArgument, NotFound, ResourceExhausted
from zcproto.sessions.exchange import Exchange
from zcproto.sessions.index import DigestIndex
from zcproto.sessions.record import ROLES, RecordFields, Rotation, SessionRecord, WhenFull, evicted_code
from zcproto.sessions.session import (
    BOUND,
    EXTERNAL,
    OPERATOR,
    EndReason,
    OpenedSession,
    Opening,
    Session,
    SessionInfo,
    SessionSettings,
    session_info,
)
from zcproto.sessions.strings import UNKNOWN
from zcproto.sessions.table import HELD, HOT, LAPSED, LIVE, NONE, RECORD_SIZE
from zcproto.sessions.token import FAMILY_SIZE, TOKEN_SIZE, digest_of, id_from_text, id_of, id_text

MAX_TEXT: Final = 128
"""Longest user name and client name, in characters."""

EVICTED_REASONS: Final[Mapping[WhenFull, EndReason]] = {
    "evict_disconnected": EndReason.DISCONNECTED,
    "evict_oldest": EndReason.REPLACED,
}

_RETRY_FULL_MS: Final = 10_000
_REFRESH_REFUSED: Final = {
    Code.UNAUTHENTICATED: "unknown refresh token; open a session",
    Code.TOKEN_EXPIRED: "the session has expired; open a new one",
    Code.TOKEN_REVOKED: "the session was revoked; log in again",
    Code.SESSION_REPLACED: "the session was replaced by a newer session of this user; open a new one",
}


class SessionRegistry(Exchange):
    """All sessions of one process.

    `observers` are called with (session id, code, reason) when a live session ends: TOKEN_EXPIRED (also if a
    refresh could revive it), TOKEN_REVOKED or SESSION_REPLACED; not for a refresh. `rotation_observers` are called
    with (session id, digest of its token) when a session may have another token than before: after a refresh, and
    when it is read from a store. `generation` grows whenever a token may have become invalid. Other integers are
    counters: sessions `opened`, `refreshed`, `expired`, `revoked` (neither closed by their clients nor ended by
    another server) and `replaced`; reused refresh tokens that ended a session (`refresh_reused`); tokens refused by
    `check` (`checks_refused`); completed passes of `clean` (`sweeps`).
    """

    def __init__(self, settings: SessionSettings, entropy: Callable[[int], bytes]) -> None:
        super().__init__(settings)
        self._entropy = entropy
        self._bytes = self._table.bytes
        self._read = HOT.unpack_from
        self._read_held = HELD.unpack_from
        self._tokens: DigestIndex | _NoTokens = self._table.tokens  # the index used by `check`
        self._users = self._table.users
        self.is_disconnected: Callable[[bytes], bool] = lambda session_id: False
        """Whether no connection uses a session, by its raw id. Until it is set, all count as in use."""

    # Checks

    def check(self, token: bytes, wall: int) -> Session | Code:
        """Return the session of a token, or the code to refuse it with. Accepts any bytes.

        A valid token counts as used now; a bound one only by `use`, after its key has been proved. UNAUTHENTICATED:
        unknown, or without a tombstone any more. UNAVAILABLE: all tokens are refused.
        """
        # Inlined for speed: every frame passes here.
        self._wall = wall
        digest = sha256(token).digest()
        slot = self._tokens.find(digest)
        if slot != NONE:
            record = self._read(self._bytes, slot * RECORD_SIZE)
            expires_at, last_used_at, user, state, flags, session_id = record
            idle_at = last_used_at + self._idle
            if state == LIVE and wall < expires_at and wall < idle_at and wall < self.trusted_until:
                if wall > last_used_at and not flags & BOUND:
                    self._last_used_at[slot] = wall
                    idle_at = wall + self._idle
                return Session(
                    session_id,
                    id_text(session_id),
                    self._users[user],
                    flags,
                    slot,
                    expires_at,
                    idle_at if idle_at < expires_at else expires_at,
                    expires_at - self._tenth,
                    self._role_names(slot) if flags & ROLES else "",
                    digest,
                )
        self.checks_refused += 1
        if self.closed or wall >= self.trusted_until:
            return Code.UNAVAILABLE
        return self._refusal(slot, wall)

    def check_again(self, session: Session, wall: int) -> bool:
        """Return True if `check` would return this session for its token again, at a fraction of the cost.

        A bound one counts as used, too: call it only where its key was proved.
        """
        self._wall = wall
        held = self._read_held(self._bytes, session.slot * RECORD_SIZE)
        digest, expires_at, last_used_at, state, flags = held
        if (
            digest != session.token_digest
            or state != LIVE
            or expires_at != session.expires_at
            or flags != session.flags
            or wall >= expires_at
            or wall >= last_used_at + self._idle
            or wall >= self.trusted_until
            or self.closed
        ):
            return False
        self.use(session, wall)
        return True

    def touch(self, session: Session, wall: int) -> None:
        """Count a session as used now. Ignored if the clock has gone back.

        Call it only while `generation` is unchanged since the check: the slot is not verified.
        """
        if wall > self._last_used_at[session.slot]:  # noqa: PLR1730 - a call of max() would double the cost
            self._last_used_at[session.slot] = wall

    def use(self, session: Session, wall: int) -> None:
        """Count a session as used right after its check; a bound one on a connection that proved its key."""
        self.touch(session, wall)
        session.valid_until = min(session.expires_at, self._last_used_at[session.slot] + self._idle)

    def key_of(self, session: Session) -> str:
        """Return the key that a session is bound to; empty if it is not bound or has ended."""
        slot = self._slot_of(session.raw_id)
        number = NONE if slot == NONE else self._table.key[slot]
        return "" if number == NONE else self._table.keys[number]

    def close(self, session: Session) -> None:
        """End a session on request of its holder. Does nothing if it has ended."""
        self.revoke(session.id, user=session.user, reason=EndReason.CLOSED)

    def refuse_all(self) -> None:
        """Refuse every token with UNAVAILABLE. Sessions do not end, and can still be revoked."""
        self.closed = True
        self._tokens = _NO_TOKENS
        self.generation += 1

    def stop_refusing(self) -> None:
        """Check tokens normally again."""
        self.closed = False
        self._tokens = self._table.tokens

    def distrust(self) -> None:
        """Refuse every token with UNAVAILABLE until `trusted_until` is set again."""
        self.trusted_until = 0
        self.generation += 1

    # Opening and refreshing

    def open(
        self,
        user: str,
        client: str,
        address: str,
        wall: int,
        roles: Roles = NO_ROLES,
        key: str = "",
        external: bool = False,
        ends_at: int | None = None,
        origin: bytes = b"",
    ) -> OpenedSession:
        """Open a session for an authenticated user.

        A user has at most `per_user` sessions, live and lapsed. The oldest lapsed ones are evicted first, without
        notice: they have no live token, and remnants of old logins must not lock a user out. `when_full` applies
        when `per_user` are live: `evict_disconnected` evicts those without a connection as if their tokens had
        expired. After the limit was lowered, as many are evicted as are too many.

        Raises:
            ResourceExhausted: the user has `details["limit"]` live sessions, none of which may be evicted; or, with
                `retry_after_ms`, the server has `max_sessions`.
            InvalidArgument: the name of the user or client is longer than MAX_TEXT.
        """
        self._wall = wall
        record, opened = self._new_session(user, client, address, wall, roles, key, external, ends_at, origin)
        table, settings = self._table, self._settings
        number = table.users.find(user)
        if self.kept >= settings.max_sessions or (
            number != UNKNOWN and table.users.uses[number] >= settings.per_user
        ):
            self._check_new(record)
            self._make_room(user, wall)
        opened.session.slot = slot = table.add(record)
        if slot == NONE:
            raise _entropy_repeats()
        self._live += 1
        self.opened += 1
        self._announce()
        return opened

    def new_session(
        self, user: str, *, wall: int, **opening: Unpack[Opening]
    ) -> tuple[RecordFields, bytes, bytes | None]:
        """Return the record, the token and the refresh token of a new session. It is unknown here until `restore`.

        Raises InvalidArgument if the name of the user or client is longer than MAX_TEXT.
        """
        record, opened = self._new_session(user, wall=wall, **opening)
        self._check_new(record)
        return record, opened.token, opened.refresh_token

    def _new_session(
        self,
        user: str,
        client: str,
        address: str,
        wall: int,
        roles: Roles = NO_ROLES,
        key: str = "",
        external: bool = False,
        ends_at: int | None = None,
        origin: bytes = b"",
    ) -> tuple[RecordFields, OpenedSession]:
        """Return a new session whose slot is not yet known."""
        if len(user) > MAX_TEXT or len(client) > MAX_TEXT:
            raise _too_long("client" if len(user) <= MAX_TEXT else "user")
        settings = self._settings
        token, refresh_token = SecretBytes(self._entropy(TOKEN_SIZE)), SecretBytes(self._entropy(TOKEN_SIZE))
        session_id = id_of(refresh_token[:FAMILY_SIZE])
        flags, names = (BOUND if key else 0) | (EXTERNAL if external else 0), ""
        if roles:
            names = names_without_operator(roles)
            flags |= (OPERATOR if OPERATOR_ROLE in roles else 0) | (ROLES if names else 0)
        expires_at = wall + settings.lifetime_ms
        refresh_expires_at = wall + settings.refresh_lifetime_ms if settings.refresh else 0
        if ends_at is not None:
            # Without a refresh token if it could prolong nothing.
            refresh_expires_at = min(refresh_expires_at, ends_at) if ends_at > expires_at else 0
            expires_at = min(expires_at, ends_at)
        digest = sha256(token).digest()
        record = (
            session_id,
            digest,
            sha256(refresh_token).digest(),
            user,
            client,
            address,
            flags,
            wall,
            wall,
            expires_at,
            refresh_expires_at,
            key,
            names,
            origin,
        )
        session = Session(
            session_id,
            id_text(session_id),
            user,
            flags,
            NONE,
            expires_at,
            min(expires_at, wall + self._idle),
            expires_at - self._tenth,
            names,
            digest,
        )
        if not refresh_expires_at:
            return record, OpenedSession(token, None, None, session)
        return record, OpenedSession(token, refresh_token, refresh_expires_at, session)

    def opened_session(
        self, session_id: bytes, token: bytes, refresh_token: bytes | None
    ) -> OpenedSession | None:
        """Return the result for the holder of a restored new session, or None if it has ended meanwhile."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return None
        self.opened += 1
        return self._opened(slot, token, refresh_token)

    def refresh(self, refresh_token: bytes, *, client: str, address: str, wall: int) -> OpenedSession:
        """Exchange a refresh token for a new pair of tokens. Both old tokens become invalid.

        The id and `refresh_expires_at` do not change, and no token outlives the latter. `client` and `address`
        replace those of the session.

        Raises:
            Unauthenticated: unknown, or without a tombstone any more.
            TokenExpired: `refresh_expires_at` has passed.
            TokenRevoked: the session was revoked, or is revoked now because the refresh token was reused.
            SessionReplaced: the session was evicted.
            InvalidArgument: the name of the client is longer than MAX_TEXT.
        """
        made = self.new_rotation(refresh_token, client=client, address=address, wall=wall)
        if made is None:
            raise refresh_refused(Code.UNAUTHENTICATED)
        rotation, token, new_refresh_token = made
        repeated = self.repeat_refresh(refresh_token, client=client, address=address, wall=wall)
        if repeated is not None:
            return repeated
        record, _ = self.rotate(rotation)
        slot = self._table.ids.find(record.id)
        return self._rotated(slot, rotation.spent_digest, token, new_refresh_token, wall)

    def new_rotation(
        self, refresh_token: bytes, *, client: str, address: str, wall: int
    ) -> tuple[Rotation, bytes, bytes] | None:
        """Return the rotation for a store and the new pair, or None if the bytes are not a refresh token.

        Raises InvalidArgument if the name of the client is longer than MAX_TEXT.
        """
        if len(client) > MAX_TEXT:
            raise _too_long("client")
        if not _is_token(refresh_token):
            return None
        family = refresh_token[:FAMILY_SIZE]
        token = SecretBytes(self._entropy(TOKEN_SIZE))
        token_digest = digest_of(token)
        if self._table.tokens.find(token_digest) != NONE:
            raise _entropy_repeats()
        new_refresh_token = SecretBytes(family + self._entropy(TOKEN_SIZE - FAMILY_SIZE))
        rotation = Rotation(
            id=id_of(family),
            spent_digest=digest_of(refresh_token),
            token_digest=token_digest,
            refresh_digest=digest_of(new_refresh_token),
            expires_at=wall + self._settings.lifetime_ms,
            client=client,
            address=address,
            wall=wall,
        )
        return rotation, token, new_refresh_token

    def rotate(self, rotation: Rotation) -> tuple[SessionRecord, bytes]:
        """Refresh a session as `refresh` does, without the grace. Return its record and the digest of its old
        token.

        Raises as `refresh` does.
        """
        table = self._table
        slot, wall = table.ids.find(rotation.id), rotation.wall
        self._wall = wall
        if slot == NONE or not self._is_kept(slot):
            raise refresh_refused(self._refusal(slot, wall))
        is_kept = self._expire_if_due(slot, wall)
        is_reused = is_kept and not compare_digest(rotation.spent_digest, table.refresh_digest(slot))
        if is_reused:
            self.refresh_reused += 1
            self._revoke(slot, EndReason.REFRESH_REUSED)
        self._announce()
        if is_reused:
            raise refresh_refused(Code.TOKEN_REVOKED)
        if not is_kept or wall >= table.refresh_expires_at[slot]:
            raise refresh_refused(Code.TOKEN_EXPIRED)
        old = self._replace(slot, rotation, wall)
        return self._record(slot), old

    def apply_rotation(
        self, record: SessionRecord, spent_digest: bytes, token: bytes, refresh_token: bytes, wall: int
    ) -> OpenedSession:
        """Apply a refresh made by a store, and keep the pair for the grace.

        Raises TokenRevoked if the session has ended here meanwhile.
        """
        table = self._table
        slot = self._slot_of(record.id)
        if slot != NONE:
            if table.tokens[slot] != record.token_digest:
                self._replace(slot, record, wall)
        elif not self.restore(record):
            raise refresh_refused(Code.TOKEN_REVOKED)
        slot = table.ids.find(record.id)
        table.expires_at[slot] = record.expires_at
        return self._rotated(slot, spent_digest, token, refresh_token, wall)

    def repeat_refresh(
        self, refresh_token: bytes, *, client: str, address: str, wall: int
    ) -> OpenedSession | None:
        """Return the pair issued for this refresh token within the grace, to the same client and address only."""
        table = self._table
        slot = self._slot_of(id_of(refresh_token[:FAMILY_SIZE])) if _is_token(refresh_token) else NONE
        if slot == NONE:
            return None
        spent = self._grace.find(table.ids[slot], digest_of(refresh_token), wall)
        if (
            spent is None
            or client != table.clients[table.client[slot]]
            or address != table.addresses[table.address[slot]]
        ):
            return None
        self._announce()
        return self._opened(slot, spent.token, spent.refresh_token)

    def _replace(self, slot: int, new: Rotation | SessionRecord, wall: int) -> bytes:
        """Replace the pair of a session. Return the digest of the invalidated token."""
        settings, table = self._settings, self._table
        old = table.tokens[slot]
        table.tokens.remove(slot)
        table.tokens.put(slot, new.token_digest)
        table.set_refresh_digest(slot, new.refresh_digest)
        table.add_token_tombstone(old, Code.TOKEN_REVOKED, wall)
        self._drop_surplus_tombstone()
        table.move(slot, new.client, new.address)
        if table.state[slot] == LAPSED:
            table.state[slot] = LIVE
            self._live += 1
        table.last_used_at[slot] = wall
        table.expires_at[slot] = min(wall + settings.lifetime_ms, table.refresh_expires_at[slot])
        self.generation += 1
        self._note_rotation(slot)
        return old

    def _rotated(
        self, slot: int, spent: bytes, token: bytes, refresh_token: bytes, wall: int
    ) -> OpenedSession:
        self._grace.keep(self._table.ids[slot], spent, token, refresh_token, wall)
        self.refreshed += 1
        self._announce()
        return self._opened(slot, token, refresh_token)

    # Listing and revoking

    def info(self, session_id: str, wall: int) -> SessionInfo:
        """Describe a live or lapsed session. Raises NotFound for an unknown id."""
        self._wall = wall
        slot = self._find(session_id)
        alive = slot != NONE and self._expire_if_due(slot, wall)
        self._announce()
        if not alive:
            raise NotFound("unknown session; call session.list to list your sessions")
        return self._info(slot)

    def list(self, user: str, wall: int) -> list[SessionInfo]:
        """Return a user's live and lapsed sessions, oldest first."""
        self._wall = wall
        infos = [self._info(slot) for slot in self._table.of_user(user) if self._expire_if_due(slot, wall)]
        self._announce()
        return infos

    def revoke(self, session_id: str, *, user: str | None, reason: EndReason) -> bool:
        """End a live or lapsed session. Return False if the id is unknown or not of `user` (None: any)."""
        slot = self._find(session_id)
        if slot == NONE or user not in (None, self._table.users[self._table.user[slot]]):
            return False
        self._revoke(slot, reason)
        self._announce()
        return True

    def revoke_user(self, user: str, reason: EndReason) -> int:
        """End all live and lapsed sessions of a user. Return their number."""
        return self._revoke_slots(self._table.of_user(user), reason)

    def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        """End all live and lapsed sessions of a user that are bound to a key. Return their number."""
        number = self._table.keys.find(key)
        slots = [slot for slot in self._table.of_user(user) if NONE != number == self._table.key[slot]]
        return self._revoke_slots(slots, reason)

    def _revoke_slots(self, slots: Sequence[int], reason: EndReason) -> int:
        for slot in slots:
            self._revoke(slot, reason)
        self._announce()
        return len(slots)

    def revoke_all(self, reason: EndReason) -> int:
        """End every live and lapsed session. Return their number. Takes some microseconds per session."""
        ended = slot = 0
        while slot < self._table.slab.size:  # the slab shrinks while it empties
            if self._is_kept(slot):
                self._revoke(slot, reason)
                ended += 1
            slot += 1
        self._announce()
        return ended

    # Helpers

    def _make_room(self, user: str, wall: int) -> None:
        """Make room at a limit for one more session of the user, or raise ResourceExhausted."""
        table, per_user, when_full = self._table, self._settings.per_user, self._settings.when_full
        slots = [slot for slot in table.of_user(user) if self._expire_if_due(slot, wall)]
        surplus = len(slots) + 1 - per_user  # above 1 after the limit was lowered
        if surplus > 0:
            lapsed = [slot for slot in slots if self._state[slot] == LAPSED]
            live = [slot for slot in slots if self._state[slot] != LAPSED]
            evictable = live if when_full == "evict_oldest" else []
            if when_full == "evict_disconnected":
                evictable = [slot for slot in live if self.is_disconnected(table.ids[slot])]
            if len(live) - len(evictable) >= per_user:
                self._announce()
                raise limit_reached(per_user, when_full)
            for slot in lapsed[:surplus]:
                self._end(slot, Code.TOKEN_EXPIRED, EndReason.UNKNOWN)
            for slot in evictable[: max(surplus - len(lapsed), 0)]:
                self.replaced += 1
                self._end(slot, evicted_code(when_full), EVICTED_REASONS[when_full])
        if self.kept >= self._settings.max_sessions:
            self._announce()
            raise ResourceExhausted(
                "the server has reached its limit of sessions; retry later",
                {"retry_after_ms": _RETRY_FULL_MS},
            )

    def _check_new(self, record: RecordFields) -> None:
        if self._table.ids.find(record[0]) != NONE or self._table.tokens.find(record[1]) != NONE:
            raise _entropy_repeats()

    def _find(self, session_id: str) -> int:
        raw = id_from_text(session_id)
        return NONE if raw is None else self._slot_of(raw)

    def _opened(self, slot: int, token: bytes, refresh_token: bytes | None) -> OpenedSession:
        refresh_expires_at = self._table.refresh_expires_at[slot] or None
        record = self._read(self._bytes, slot * RECORD_SIZE)
        expires_at, last_used_at, user, _, flags, session_id = record
        valid_until = min(expires_at, last_used_at + self._idle)
        session = Session(
            session_id,
            id_text(session_id),
            self._users[user],
            flags,
            slot,
            expires_at,
            valid_until,
            expires_at - self._tenth,
            self._role_names(slot) if flags & ROLES else "",
            self._table.tokens[slot],
        )
        return OpenedSession(token, refresh_token, refresh_expires_at, session)

    def _role_names(self, slot: int) -> str:
        return self._table.keys[self._table.roles[slot]]

    def _info(self, slot: int) -> SessionInfo:
        return session_info(self._record(slot), live=self._table.state[slot] == LIVE)


class _NoTokens:
    """An empty index that replaces the real one while every token is refused, so `check` needs no extra test."""

    def find(self, digest: bytes) -> int:
        return NONE


_NO_TOKENS: Final = _NoTokens()


def _too_long(name: str) -> InvalidArgument:
    return InvalidArgument(f"{name} is longer than {MAX_TEXT} characters")


def _is_token(refresh_token: bytes) -> bool:
    return len(refresh_token) == TOKEN_SIZE


def limit_reached(per_user: int, when_full: WhenFull) -> ResourceExhausted:
    """Return the error for a login of a user who has `per_user` live sessions that may not be evicted."""
    if when_full == "evict_disconnected":
        return ResourceExhausted(
            "all sessions of this user are in use; close another of its clients, end a session,"
            " or raise sessions.per_user",
            {"limit": per_user},
        )
    return ResourceExhausted(
        "the user has reached the limit of sessions; close one first", {"limit": per_user}
    )


def refresh_refused(code: Code) -> CallError:
    """Return the error that refuses a refresh with this code."""
    return CallError.by_code[code](_REFRESH_REFUSED[code])


def _entropy_repeats() -> RuntimeError:
    return RuntimeError("the source of random bytes repeated itself; its tokens are not safe")
