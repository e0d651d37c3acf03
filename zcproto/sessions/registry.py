"""Check tokens; open, refresh, list, revoke and expire sessions in memory; exchange them with a store.

Decides the number of sessions per user, the result of a check, the effect of a refresh token, access to sessions of
others, when a session is live, lapsed or ended, and how a stored record becomes a session and back.

Rules:
- A caller may reuse a Session while `generation` is unchanged and `wall` is below its `valid_until` and
  `trusted_until`; after a change of `generation`, if `check_again` returns True. `generation` grows whenever a
  token may have become invalid.
- A token is valid while `wall` is below its `expires_at` and below its last use plus the idle limit. A session once
  seen expired stays expired, even if the clock goes back. It stays, lapsed, while its refresh token is valid.
- A lapsed session never prevents a login.
- A refresh token works once. Reuse of a spent one, however old, ends the whole session, except when the same client
  repeats the last one within the grace (zcp1.md, section 9.6; RFC 9700 section 4.14.2). Every spent refresh
  token is recognised while its session exists (see token.py).
- Tombstones are kept for a time and up to a number, so that holders of ended tokens learn why. Without one a token
  is refused as unknown; dropping a tombstone never makes a token valid.
- An ended session stays ended: no record of a store, which may be older, revives it.
- Forgetting is not ending: observers are not notified, and the token is unknown until the session is restored.
- A change is complete before observers are notified of it.
- No operation takes longer with more sessions, except `revoke_all` and lists of all sessions.

It must not know: connections, stores, clocks. Times are passed as `wall`, random bytes come from `entropy`. Use it
from one thread. An observer must neither raise nor call the registry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from hmac import compare_digest
from typing import Final, NamedTuple, Unpack

from zcproto.common.roles import NO_ROLES, Roles, names_without_operator
from zcproto.common.roles import OPERATOR as OPERATOR_ROLE
from zcproto.common.secret import SecretBytes
from zcproto.errors import CallError, Code, InvalidArgument, NotFound, ResourceExhausted
from zcproto.sessions.index import DigestIndex
from zcproto.sessions.record import (
    ROLES,
    EndedRecord,
    RecordFields,
    Rotation,
    SessionRecord,
    WhenFull,
    evicted_code,
    evictions,
)
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
from zcproto.sessions.table import FREE, HELD, HOT, LAPSED, LIVE, NONE, RECORD_SIZE, TOKEN_ONLY, SessionTable
from zcproto.sessions.token import FAMILY_SIZE, TOKEN_SIZE, digest_of, id_from_text, id_of, id_text

Observer = Callable[[str, Code, EndReason], None]
RotationObserver = Callable[[str, bytes], None]

MAX_TEXT: Final = 128
"""Longest user name and client name, in characters."""

EVICTION_SAMPLE: Final = 64
"""Slots sampled to find the least recently used session."""

NEVER: Final = 2**63
_ENDING_COST: Final = 4  # ending a session takes about as long as scanning this many
_RETRY_FULL_MS: Final = 10_000
_EVICTED_REASONS: Final[Mapping[WhenFull, EndReason]] = {
    "evict_disconnected": EndReason.DISCONNECTED,
    "evict_oldest": EndReason.REPLACED,
}
_ENDED_CODES: Final = frozenset({Code.TOKEN_EXPIRED, Code.TOKEN_REVOKED, Code.SESSION_REPLACED})
_REFRESH_REFUSED: Final = {
    Code.UNAUTHENTICATED: "unknown refresh token; open a session",
    Code.TOKEN_EXPIRED: "the session has expired; open a new one",
    Code.TOKEN_REVOKED: "the session was revoked; log in again",
    Code.SESSION_REPLACED: "the session was replaced by a newer session of this user; open a new one",
}


class SessionRegistry:
    """All sessions of one process.

    `observers` are called with (session id, code, reason) when a live session ends: TOKEN_EXPIRED (also if a
    refresh could revive it), TOKEN_REVOKED or SESSION_REPLACED; not for a refresh. `rotation_observers` are called
    with (session id, digest of its token) when a session may have another token than before: after a refresh, and
    when it is read from a store. Other integers are counters: sessions `opened`, `refreshed`, `expired`, `revoked`
    (neither closed by their clients nor ended by another server) and `replaced`; reused refresh tokens that ended
    a session (`refresh_reused`); tokens refused by `check` (`checks_refused`); completed passes of `clean`
    (`sweeps`).
    """

    def __init__(self, settings: SessionSettings, entropy: Callable[[int], bytes]) -> None:
        # One more slot: a refresh adds a tombstone before the oldest one is dropped.
        self._table = table = SessionTable(settings.max_sessions + settings.dead_limit + 1)
        self._grace = GraceTable(settings.refresh_grace_ms, settings.grace_limit)
        self._entropy = entropy
        self._apply(settings)
        self._bytes = table.bytes
        self._read = HOT.unpack_from
        self._read_held = HELD.unpack_from
        self._tokens: DigestIndex | _NoTokens = table.tokens  # the index used by `check`
        self._users = table.users
        self._state = table.state
        self._last_used_at = table.last_used_at
        self._ended: list[tuple[bytes, Code, EndReason]] = []  # not yet announced to observers
        self._rotated_ids: list[bytes] = []  # likewise
        self._wall = 0  # of the last call that passed it; the time of death of sessions ended without one
        self._cursor = 0
        self._eviction_cursor = 0
        self._live = 0
        self.generation = 0
        self.closed = False  # refuse every token; see `refuse_all`
        self.trusted_until = NEVER  # a time from which on every token is refused; see `distrust`
        self.is_disconnected: Callable[[bytes], bool] = lambda session_id: False
        """Whether no connection uses a session, by its raw id. Until it is set, all count as in use."""
        self.observers: list[Observer] = []
        self.rotation_observers: list[RotationObserver] = []
        self.opened = self.refreshed = self.expired = self.revoked = self.replaced = 0
        self.refresh_reused = self.checks_refused = self.sweeps = 0

    def __len__(self) -> int:
        """Return the number of live sessions, including those not yet found expired."""
        return self._live

    @property
    def lapsed(self) -> int:
        """Return the number of lapsed sessions."""
        return self.kept - self._live

    @property
    def kept(self) -> int:
        """Return the number of live and lapsed sessions."""
        return self._table.tokens.count - self._table.tombstones

    @property
    def tombstones(self) -> int:
        """Return the number of tombstones."""
        return self._table.tombstones

    @property
    def settings(self) -> SessionSettings:
        return self._settings

    def reconfigure(self, settings: SessionSettings) -> None:
        """Apply new settings. Existing sessions keep their expiry; the idle limit changes for them too.

        `max_sessions`, `dead_limit` and `grace_limit` size the table and must not change.
        """
        assert (settings.max_sessions, settings.dead_limit, settings.grace_limit) == (
            self._settings.max_sessions,
            self._settings.dead_limit,
            self._settings.grace_limit,
        )
        self._apply(settings)
        self.generation += 1  # tokens may now expire at another time

    def _apply(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._idle = NEVER if settings.idle_timeout_ms is None else settings.idle_timeout_ms
        self._tenth = settings.lifetime_ms // 10
        self._grace.grace_ms = settings.refresh_grace_ms

    # Checks

    def check(self, token: bytes, wall: int) -> Session | Code:
        """Return the session of a token, or the code to refuse it with. Accepts any bytes.

        A valid token counts as used now; a bound one only by `use`, after its key has been proved. UNAUTHENTICATED:
        unknown, or without a tombstone any more. UNAVAILABLE: all tokens are refused.
        """
        # The fields are read at once, for speed: every new token of a connection passes here.
        self._wall = wall
        digest = sha256(token).digest()
        slot = self._tokens.find(digest)
        if slot != NONE:
            record = self._read(self._bytes, slot * RECORD_SIZE)
            expires_at, last_used_at, _, state, flags, _ = record
            idle_at = last_used_at + self._idle
            if state == LIVE and wall < expires_at and wall < idle_at and wall < self.trusted_until:
                if wall > last_used_at and not flags & BOUND:
                    self._last_used_at[slot] = wall
                    idle_at = wall + self._idle
                return self._session(slot, record, idle_at, digest)
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

    def open(self, user: str, *, wall: int, **opening: Unpack[Opening]) -> OpenedSession:
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
        record, token, refresh_token = self._new_session(user, wall=wall, **opening)
        table, settings = self._table, self._settings
        number = table.users.find(user)
        if self.kept >= settings.max_sessions or (
            number != NONE and table.users.uses[number] >= settings.per_user
        ):
            self._check_new(record)
            self._make_room(user, wall)
        slot = table.add(record)
        if slot == NONE:
            raise _entropy_repeats()
        self._live += 1
        self.opened += 1
        if self._ended:
            self._announce()
        return self._opened(slot, token, refresh_token, record[1])

    def new_session(
        self, user: str, *, wall: int, **opening: Unpack[Opening]
    ) -> tuple[RecordFields, bytes, bytes | None]:
        """Return the record, the token and the refresh token of a new session. It is unknown here until `restore`.

        Raises InvalidArgument if the name of the user or client is longer than MAX_TEXT.
        """
        new = self._new_session(user, wall=wall, **opening)
        self._check_new(new[0])
        return new

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
    ) -> tuple[RecordFields, bytes, bytes | None]:
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
        record = (
            session_id,
            sha256(token).digest(),
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
        return record, token, refresh_token if refresh_expires_at else None

    def opened_session(
        self, session_id: bytes, token: bytes, refresh_token: bytes | None
    ) -> OpenedSession | None:
        """Return the result for the holder of a restored new session, or None if it has ended meanwhile."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return None
        self.opened += 1
        return self._opened(slot, token, refresh_token, self._table.tokens[slot])

    def _make_room(self, user: str, wall: int) -> None:
        """Make room at a limit for one more session of the user, or raise ResourceExhausted."""
        table, per_user, when_full = self._table, self._settings.per_user, self._settings.when_full
        slots = [slot for slot in table.of_user(user) if self._expire_if_due(slot, wall)]
        evicted = evictions(
            [slot for slot in slots if self._state[slot] != LAPSED],
            [slot for slot in slots if self._state[slot] == LAPSED],
            per_user,
            when_full,
            lambda slot: self.is_disconnected(table.ids[slot]),
        )
        if evicted is None:
            self._announce()
            raise limit_reached(per_user, when_full)
        for slot in evicted[0]:
            self._end(slot, Code.TOKEN_EXPIRED, EndReason.UNKNOWN)
        for slot in evicted[1]:
            self.replaced += 1
            self._end(slot, evicted_code(when_full), _EVICTED_REASONS[when_full])
        if self.kept >= self._settings.max_sessions:
            self._announce()
            raise ResourceExhausted(
                "the server has reached its limit of sessions; retry later",
                {"retry_after_ms": _RETRY_FULL_MS},
            )

    def _check_new(self, record: RecordFields) -> None:
        if self._table.ids.find(record[0]) != NONE or self._table.tokens.find(record[1]) != NONE:
            raise _entropy_repeats()

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
        return self._opened(slot, spent.token, spent.refresh_token, table.tokens[slot])

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
        return self._opened(slot, token, refresh_token, self._table.tokens[slot])

    def _opened(self, slot: int, token: bytes, refresh_token: bytes | None, digest: bytes) -> OpenedSession:
        record = self._read(self._bytes, slot * RECORD_SIZE)
        session = self._session(slot, record, record[1] + self._idle, digest)
        return OpenedSession(token, refresh_token, self._table.refresh_expires_at[slot] or None, session)

    def _session(
        self, slot: int, record: tuple[int, int, int, int, int, bytes], idle_at: int, digest: bytes
    ) -> Session:
        """Return the session of a slot whose fields HOT are `record`."""
        expires_at, _, user, _, flags, session_id = record
        return Session(
            session_id,
            id_text(session_id),
            self._users[user],
            flags,
            slot,
            expires_at,
            idle_at if idle_at < expires_at else expires_at,  # a call of min() would double the cost
            expires_at - self._tenth,
            self._table.keys[self._table.roles[slot]] if flags & ROLES else "",
            digest,
        )

    # Exchange with a store. Ids are the 16 raw bytes.

    def restore(self, record: SessionRecord, *, make_room: bool = False) -> bool:
        """Insert or replace a session from its stored record.

        Return False if it has ended here, or if the table is full and `make_room` is not set.
        """
        table = self._table
        self._wall = max(self._wall, record.last_used_at)
        slot = table.ids.find(record.id)
        if slot != NONE:
            if not self._is_kept(slot):
                return False
            if table.tokens[slot] == record.token_digest:
                self._update(slot, record)
                return True
        if table.tokens.find(record.token_digest) != NONE:
            return False  # the token was valid once and is not any more
        if slot != NONE:
            self._forget(slot)
        elif self.kept >= self._settings.max_sessions:
            if not make_room:
                return False
            self._evict()
        added = table.add(record)
        self._live += 1
        if make_room or slot != NONE:  # not while a store is loaded: no connection has any of its sessions
            self._note_rotation(added)
            self._announce()
        return True

    def restore_ended(self, ended: EndedRecord) -> None:
        """Insert a tombstone from a store. If its session is known here, it ends."""
        assert ended.code in _ENDED_CODES
        if not self.end(ended.id, ended.code, EndReason.UNKNOWN, ended.ended_at) and (
            self._table.tokens.find(ended.token_digest) == NONE
        ):
            self._table.add_token_tombstone(ended.token_digest, ended.code, ended.ended_at)
            self._drop_surplus_tombstone()

    def end(self, session_id: bytes, code: Code, reason: EndReason, wall: int) -> bool:
        """End a live or lapsed session on behalf of a store. Return False if the id is unknown."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return False
        self._wall = wall
        if code is Code.SESSION_REPLACED:
            self.replaced += 1
        self._end(slot, code, reason)
        self._announce()
        return True

    def forget(self, session_id: bytes) -> bool:
        """Forget a live or lapsed session. Return False if the id is unknown."""
        slot = self._slot_of(session_id)
        if slot == NONE:
            return False
        self._forget(slot)
        return True

    def forget_unless(self, is_kept: Callable[[bytes], bool], start: int, max_slots: int) -> int:
        """Forget live and lapsed sessions for which `is_kept(id)` is False, in one slice of the table.

        Start at 0; return the start of the next slice, 0 at the end of the table.
        """
        slot, end = start, start + max_slots
        while slot < end and slot < self._table.slab.size:  # the slab shrinks while it empties
            if self._is_kept(slot) and not is_kept(self._table.ids[slot]):
                self._forget(slot)
            slot += 1
        return 0 if slot >= self._table.slab.size else slot

    def record(self, session_id: bytes) -> SessionRecord | None:
        """Return the record of a live or lapsed session, or None."""
        slot = self._slot_of(session_id)
        return None if slot == NONE else self._record(slot)

    def record_of(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        """Return the session of a token, its tombstone, or None."""
        slot = self._table.tokens.find(token_digest)
        if slot == NONE:
            return None
        return self._record(slot) if self._is_kept(slot) else self._tombstone(slot)

    def ended(self, session_id: bytes) -> EndedRecord | None:
        """Return the tombstone of an ended session, or None."""
        slot = self._table.ids.find(session_id)
        return None if slot == NONE or self._is_kept(slot) else self._tombstone(slot)

    def _tombstone(self, slot: int) -> EndedRecord:
        table = self._table
        session_id = b"" if table.flags[slot] & TOKEN_ONLY else table.ids[slot]
        return EndedRecord(session_id, table.tokens[slot], Code(self._state[slot]), self._last_used_at[slot])

    def ended_since(self, wall: int) -> list[EndedRecord]:
        """Return the tombstones of sessions that were revoked or replaced since `wall`, oldest first."""
        table = self._table
        return [
            self._tombstone(slot)
            for slot in table.tombstone_slots()
            if self._state[slot] != Code.TOKEN_EXPIRED
            and not table.flags[slot] & TOKEN_ONLY
            and self._last_used_at[slot] >= wall
        ]

    def records(self, user: str | None, limit: int) -> list[SessionRecord]:
        """Return the oldest `limit` live and lapsed sessions of a user (None: of all), oldest first."""
        table = self._table
        if user is not None:
            return [self._record(slot) for slot in table.of_user(user)[:limit]]
        slots = [slot for slot in range(table.slab.size) if self._is_kept(slot)]
        slots.sort(key=table.created_at.__getitem__)
        return [self._record(slot) for slot in slots[:limit]]

    def uses(self, since: int, start: int, max_slots: int) -> tuple[int, list[tuple[bytes, int]]]:
        """Return the sessions (id, time) of one slice that were used after `since`, with the start of the next
        slice.

        Start at 0; the next start is 0 at the end of the table.
        """
        table = self._table
        end = min(start + max_slots, table.slab.size)
        used = [
            (table.ids[slot], self._last_used_at[slot])
            for slot in range(start, end)
            if self._state[slot] == LIVE and self._last_used_at[slot] > since
        ]
        return (0 if end >= table.slab.size else end), used

    def _update(self, slot: int, record: SessionRecord) -> None:
        table = self._table
        if record.expires_at < table.expires_at[slot]:
            self.generation += 1
        table.expires_at[slot] = record.expires_at
        table.refresh_expires_at[slot] = record.refresh_expires_at
        table.last_used_at[slot] = max(table.last_used_at[slot], record.last_used_at)
        table.set_refresh_digest(slot, record.refresh_digest)

    def _forget(self, slot: int) -> None:
        if self._state[slot] == LIVE:
            self._live -= 1
            self.generation += 1
        self._grace.drop(self._table.ids[slot])
        self._table.drop(slot)

    def _evict(self) -> None:
        """Forget the least recently used session of a sample. There must be at least one session."""
        size, sampled, oldest = self._table.slab.size, 0, NONE
        while sampled < EVICTION_SAMPLE or oldest == NONE:
            slot = self._eviction_cursor = (self._eviction_cursor + 1) % size
            sampled += 1
            if self._is_kept(slot) and (
                oldest == NONE or self._last_used_at[slot] < self._last_used_at[oldest]
            ):
                oldest = slot
        self._forget(oldest)

    def _record(self, slot: int) -> SessionRecord:
        table = self._table
        key, roles = table.key[slot], table.roles[slot]
        return SessionRecord(
            id=table.ids[slot],
            token_digest=table.tokens[slot],
            refresh_digest=table.refresh_digest(slot),
            user=table.users[table.user[slot]],
            client=table.clients[table.client[slot]],
            address=table.addresses[table.address[slot]],
            flags=table.flags[slot],
            created_at=table.created_at[slot],
            last_used_at=table.last_used_at[slot],
            expires_at=table.expires_at[slot],
            refresh_expires_at=table.refresh_expires_at[slot],
            key="" if key == NONE else table.keys[key],
            roles="" if roles == NONE else table.keys[roles],
            origin=table.origin(slot),
        )

    # Expiry

    def clean(self, wall: int, max_slots: int) -> int:
        """Clean one slice of the table. Return the number of live tokens found expired.

        `max_slots` bounds the work: each scanned slot counts one, each ended session and dropped tombstone four
        more. A slice stops at the end of the table and then increments `sweeps`: call until it changes for a
        full pass.
        """
        self._wall = wall
        self._grace.expire(wall)
        before = self.expired
        work = max_slots - self._drop_old_tombstones(wall, max_slots // 2)
        state, slab, slot = self._state, self._table.slab, self._cursor
        while work > 0 and slot < slab.size:
            if FREE < state[slot] <= LAPSED and self._is_due(slot, wall):
                self._expire_if_due(slot, wall)
                work -= _ENDING_COST
            slot += 1
            work -= 1
        if slot >= slab.size:
            slot = 0
            self.sweeps += 1
        self._cursor = slot
        self._table.trim()
        self._announce()
        return self.expired - before

    def _drop_old_tombstones(self, wall: int, work: int) -> int:
        """Drop tombstones past their lifetime. Return the work done."""
        table, done = self._table, 0
        while done < work and table.tombstones and self._is_forgotten(table.first_tombstone, wall):
            table.drop_oldest_tombstone()
            done += _ENDING_COST
        return done

    def _drop_surplus_tombstone(self) -> None:
        if self._table.tombstones > self._settings.dead_limit:
            self._table.drop_oldest_tombstone()

    def _is_forgotten(self, slot: int, wall: int) -> bool:
        return wall - self._last_used_at[slot] >= self._settings.dead_keep_ms

    def expire(self, session_id: str, wall: int) -> None:
        """Let a session lapse or end now if it is due, before `clean` finds it."""
        slot = self._find(session_id)
        if slot != NONE:
            self._wall = wall
            self._expire_if_due(slot, wall)
            self._announce()

    def _is_due(self, slot: int, wall: int) -> bool:
        """Return True if a live session should have lapsed, or a lapsed one ended."""
        if self._state[slot] == LIVE:
            return wall >= self._table.expires_at[slot] or wall >= self._last_used_at[slot] + self._idle
        return wall >= self._table.refresh_expires_at[slot]

    def _expire_if_due(self, slot: int, wall: int) -> bool:
        """Let a live or lapsed session lapse or end if it is due. Return False if it has ended."""
        if not self._is_due(slot, wall):
            return True
        if self._state[slot] == LIVE:
            self.expired += 1
            reason = EndReason.EXPIRED if wall >= self._table.expires_at[slot] else EndReason.IDLE
            self._invalidate(slot, Code.TOKEN_EXPIRED, reason)
            self._state[slot] = LAPSED
        if wall < self._table.refresh_expires_at[slot]:
            return True
        self._end(slot, Code.TOKEN_EXPIRED, EndReason.UNKNOWN)
        return False

    def _refusal(self, slot: int, wall: int) -> Code:
        """Return the code for an invalid token."""
        if slot == NONE:
            return Code.UNAUTHENTICATED
        if self._is_kept(slot):
            self._expire_if_due(slot, wall)
            self._announce()
            return Code.TOKEN_EXPIRED
        return Code.UNAUTHENTICATED if self._is_forgotten(slot, wall) else Code(self._state[slot])

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

    def close(self, session: Session) -> None:
        """End a session on request of its holder. Does nothing if it has ended."""
        self.revoke(session.id, user=session.user, reason=EndReason.CLOSED)

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

    def _is_kept(self, slot: int) -> bool:
        return FREE < self._state[slot] <= LAPSED

    def _slot_of(self, session_id: bytes) -> int:
        """Return the slot of a live or lapsed session, or NONE."""
        slot = self._table.ids.find(session_id)
        return slot if slot != NONE and self._is_kept(slot) else NONE

    def _find(self, session_id: str) -> int:
        raw = id_from_text(session_id)
        return NONE if raw is None else self._slot_of(raw)

    def _info(self, slot: int) -> SessionInfo:
        return session_info(self._record(slot), live=self._table.state[slot] == LIVE)

    def _invalidate(self, slot: int, code: Code, reason: EndReason) -> None:
        """Invalidate a live token."""
        self._live -= 1
        self.generation += 1
        if self.observers:
            self._ended.append((self._table.ids[slot], code, reason))

    def _end(self, slot: int, code: Code, reason: EndReason) -> None:
        """End a live or lapsed session for good."""
        if self._state[slot] == LIVE:
            self._invalidate(slot, code, reason)
        self._grace.drop(self._table.ids[slot])
        self._table.add_tombstone(slot, code, self._wall)
        self._drop_surplus_tombstone()

    def _revoke(self, slot: int, reason: EndReason) -> None:
        if reason is not EndReason.CLOSED:
            self.revoked += 1
        self._end(slot, Code.TOKEN_REVOKED, reason)

    def _note_rotation(self, slot: int) -> None:
        """Note that a session has another token than it may have had."""
        if self.rotation_observers:
            self._rotated_ids.append(self._table.ids[slot])

    def _announce(self) -> None:
        """Notify observers of the sessions that ended or got another token since the last call."""
        if self._ended:
            ended, self._ended = self._ended, []
            for session_id, code, reason in ended:
                for observer in self.observers:
                    observer(id_text(session_id), code, reason)
        if self._rotated_ids:
            rotated, self._rotated_ids = self._rotated_ids, []
            for session_id in rotated:
                slot = self._slot_of(session_id)
                if slot != NONE:
                    for notify in self.rotation_observers:
                        notify(id_text(session_id), self._table.tokens[slot])


class _NoTokens:
    """An empty index that replaces the real one while every token is refused, so `check` needs no extra test."""

    def find(self, digest: bytes) -> int:
        return NONE


_NO_TOKENS: Final = _NoTokens()


class Spent(NamedTuple):
    """The digest of the last spent refresh token of a session, and the pair issued for it."""

    digest: bytes
    token: bytes
    refresh_token: bytes
    until: int

    def __repr__(self) -> str:
        return f"Spent(token=***, refresh_token=***, until={self.until})"


class GraceTable:
    """Keep one pair per session id for the last `limit` refreshes, each for `grace_ms`."""

    def __init__(self, grace_ms: int, limit: int) -> None:
        self.grace_ms = grace_ms
        self._limit = limit
        self._spent: OrderedDict[bytes, Spent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spent)

    def keep(self, session_id: bytes, digest: bytes, token: bytes, refresh_token: bytes, wall: int) -> None:
        """Store the pair issued for the refresh token with this digest, replacing the previous one."""
        self._spent.pop(session_id, None)
        self._spent[session_id] = Spent(digest, token, refresh_token, wall + self.grace_ms)
        self.expire(wall)

    def find(self, session_id: bytes, digest: bytes, wall: int) -> Spent | None:
        """Return the issued pair if the digest is that of the last spent token and the grace is not over."""
        spent = self._spent.get(session_id)
        if spent is None or wall >= spent.until or not compare_digest(digest, spent.digest):
            return None
        return spent

    def drop(self, session_id: bytes) -> None:
        """Remove the pair of a session that has ended."""
        if self._spent:
            self._spent.pop(session_id, None)

    def expire(self, wall: int) -> None:
        """Remove expired pairs, and the oldest ones above the limit."""
        spent = self._spent
        while spent:
            session_id = next(iter(spent))
            if len(spent) <= self._limit and wall < spent[session_id].until:
                return
            del spent[session_id]


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
