"""The `session.*` operations: open, refresh, end and look up sessions, here and in the store.

Decides: what happens before the store has answered and what after; which callers wait for which.

Rules:
- A session is returned only after the store has it. An ended session is refused here at once, and in the store
  before the call returns.
- An operation begun in the store is finished even if its caller has gone.
- One refresh of a session runs at a time; concurrent refreshes with the same token share one result. A rotation
  with an unknown outcome is repeated unchanged: a different one would make its refresh token look stolen. A refresh
  that another process has just made, or this one before it was killed, is answered with the same pair, which the
  store has in sealed form (ONE_PAIR in spec/store.pml). Either process remembers the rotation.
- One look-up of a token runs at a time. An unknown token is not looked up again for a while, and an address that
  sends many unknown tokens has to wait.

It must not know: connections, frames, how the store works.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Final, TypeVar, Unpack

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from zcproto.common.clock import Clock
from zcproto.common.network import network_of
from zcproto.common.rates import EventRate
from zcproto.errors import CallError, Code, ResourceExhausted, TokenRevoked, Unavailable
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, OpenedSession, SessionInfo, SessionRegistry
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.sessions.registry import limit_reached, refresh_refused
from zcproto.sessions.session import Opening, session_info
from zcproto.sessions.token import FAMILY_SIZE, TOKEN_SIZE, digest_of, id_from_text, id_of, id_text
from zcproto.stores.base import (
    Created,
    DamagedRecord,
    LimitReached,
    NotRotated,
    Repeated,
    StoreUnavailable,
    too_many_sessions,
)
from zcproto.stores.pending import Revocation
from zcproto.stores.revoker import end_here
from zcproto.stores.sync import StoreSync

UNDECIDED: Final = 8_192
"""Rotations remembered whose outcome in the store is unknown."""

UNKNOWN_TOKENS: Final = 16_384
UNKNOWN_TOKEN_S: Final = 2.0
"""How long an unknown token is not looked up again."""

MAX_LOOKUPS: Final = 256
"""Look-ups in flight."""

MISSES_PER_ADDRESS: Final = 100
"""Unknown tokens from one address at once, and within `MISSES_S` in the long run; a client has one or two."""

MISSES_S: Final = 10.0

OPENINGS_PER_USER: Final = 32
"""Sessions of one user that are opened at once: others would wait behind a user who logs in without end."""

_RETRY_BUSY_MS: Final = 100

_SEAL_LABEL: Final = b"zcp/1 sealed pair\0"
_SEAL_NONCE: Final = bytes(12)  # each key seals one pair

SuppressEvent = AbstractContextManager[Any]
"""Entered while sessions end, so that the connection that asked for it gets no event about it."""

_WITH_EVENT: Final = nullcontext()

T = TypeVar("T")

OnReuse = Callable[[str, str, str], None]
"""Called with the id of a session that a spent refresh token has ended, its user, and the address that sent it."""

log = get_logger("zcproto.sessions")


class SessionService:
    """Sessions that end with the process: the registry is their only copy, and no coroutine here suspends."""

    is_stored = False
    """Whether opening a session awaits a store."""

    def __init__(self, registry: SessionRegistry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self.on_reuse: OnReuse = lambda session_id, user, address: None

    @property
    def looks_up(self) -> bool:
        """Whether a token that is unknown here may be valid, so that it has to be looked up."""
        return False

    def statistics(self) -> dict[str, Any]:
        return {"state": "healthy"}

    # --- opening and refreshing --------------------------------------------------------------------

    async def open(self, user: str, **opening: Unpack[Opening]) -> OpenedSession:
        """Open a session for an authenticated user. Raises like `SessionRegistry.open`, and Unavailable."""
        return self._registry.open(user, wall=self._clock.wall(), **opening)

    async def refresh(
        self, refresh_token: bytes, *, client: str, address: str, user: str = ""
    ) -> OpenedSession:
        """Issue a new token pair. `user` is the session's, to report a reuse.

        Raises like `SessionRegistry.refresh`, and Unavailable.
        """
        registry, wall = self._registry, self._clock.wall()
        reused = registry.refresh_reused
        try:
            return registry.refresh(refresh_token, client=client, address=address, wall=wall)
        finally:
            if registry.refresh_reused > reused:
                self._report_reuse(id_of(refresh_token[:FAMILY_SIZE]), user, address)

    def _report_reuse(self, session_id: bytes, user: str, address: str) -> None:
        log.warning("session.refresh_reused", session=id_text(session_id), user=user or None, peer=address)
        self.on_reuse(id_text(session_id), user, address)

    # --- ending ------------------------------------------------------------------------------------

    async def revoke(
        self,
        session_id: str,
        *,
        user: str | None,
        reason: EndReason,
        suppress_event: SuppressEvent = _WITH_EVENT,
    ) -> bool:
        """End a session. Return False if it does not exist or is not `user`'s (None: any user's).

        Raises Unavailable if the revocation could not be made durable; the session has ended here nevertheless.
        """
        with suppress_event:
            return self._registry.revoke(session_id, user=user, reason=reason)

    async def revoke_user(
        self, user: str, reason: EndReason, suppress_event: SuppressEvent = _WITH_EVENT
    ) -> int:
        """End all sessions of a user and return how many there were. Raises like `revoke`."""
        with suppress_event:
            return self._registry.revoke_user(user, reason)

    async def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        """End the sessions of a user bound to a key and return how many there were. Raises like `revoke`."""
        return self._registry.revoke_key(user, key, reason)

    async def revoke_all(self, reason: EndReason) -> int:
        """End all sessions and return how many of them were known here. Raises like `revoke`."""
        return self._registry.revoke_all(reason)

    # --- looking up --------------------------------------------------------------------------------

    async def find_by_refresh_token(self, refresh_token: bytes) -> SessionRecord | None:
        """Return the live or lapsed session of a refresh token, spent or not. Raises Unavailable."""
        return self._registry.record(id_of(refresh_token[:FAMILY_SIZE]))

    async def list(self, user: str) -> list[SessionInfo]:
        """Return the sessions of a user, oldest first. Raises Unavailable."""
        return self._registry.list(user, self._clock.wall())

    async def records(self, user: str | None, limit: int) -> Sequence[SessionRecord]:
        """Return the oldest `limit` sessions of a user or of all users, also lapsed ones. Raises Unavailable."""
        return self._registry.records(user, limit)

    async def holder(self, token_digest: bytes) -> SessionRecord | None:
        """Return the live session whose newest token has this digest, in all processes. Raises Unavailable."""
        return self._live(self._registry.record_of(token_digest))

    def _live(self, found: SessionRecord | EndedRecord | None) -> SessionRecord | None:
        """Return a session that has not ended here and has not reached the absolute end of its token."""
        if (
            isinstance(found, SessionRecord)
            and self._clock.wall() < found.expires_at
            and self._registry.ended(found.id) is None
        ):
            return found
        return None

    async def look_up(self, token: bytes, address: str, code: Code) -> None:
        """Look up a token that was refused here with `code`, and update the registry.

        Raises Unavailable if the store is out, ResourceExhausted at too many look-ups.
        """


class StoredSessionService(SessionService):
    """Sessions kept in a store; tokens are checked against the registry.

    `lookups` counts the tokens looked up in the store, `misses` those of them that it did not have.
    """

    is_stored = True

    def __init__(self, sync: StoreSync, clock: Clock) -> None:
        super().__init__(sync.registry, clock)
        self.sync = sync
        self._store = sync.store
        self._call = sync.breaker.call
        self._opening: dict[asyncio.Task[None], str] = {}
        self._opening_of: Counter[str] = Counter()
        self._newest = 0
        self._refreshing: dict[bytes, asyncio.Task[OpenedSession]] = {}
        self._undecided: OrderedDict[bytes, tuple[Rotation, bytes, bytes]] = OrderedDict()
        self._finding: dict[bytes, asyncio.Task[None]] = {}
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._misses: EventRate[str] = EventRate(MISSES_PER_ADDRESS / MISSES_S, MISSES_S)
        self.lookups = 0
        self.misses = 0

    @property
    def is_shared(self) -> bool:
        """Whether other processes write to the store."""
        return self._store.shared

    @property
    def looks_up(self) -> bool:
        return self.sync.looks_up

    def statistics(self) -> dict[str, Any]:
        return {**self.sync.statistics(), "lookups": self.lookups, "misses": self.misses}

    # --- opening -----------------------------------------------------------------------------------

    async def open(self, user: str, **opening: Unpack[Opening]) -> OpenedSession:
        self.sync.breaker.check()
        registry = self._registry
        if not self.is_shared:
            await self._check_room()
        if self._opening_of[user] >= OPENINGS_PER_USER:
            raise ResourceExhausted(
                "too many logins of this user at once; wait for one to end",
                {"retry_after_ms": _RETRY_BUSY_MS},
            )
        wall = self._clock.wall()
        self._newest = max(self._newest, wall)
        fields, token, refresh_token = registry.new_session(user, wall=wall, **opening)
        record = SessionRecord(*fields)
        self.sync.leases.unjoined.add(record.id)
        creating = self.sync.tasks.spawn(self._create(record))
        self._opening[creating] = user
        self._opening_of[user] += 1
        creating.add_done_callback(self._created)
        try:
            await self.sync.tasks.result(creating)
        except asyncio.CancelledError:
            self.sync.tasks.run_in_background(self._abandon(creating, record))
            raise
        finally:
            self.sync.leases.unjoined.discard(record.id)  # the caller joins it before it waits again
        opened = registry.opened_session(record.id, token, refresh_token)
        if opened is None:
            raise TokenRevoked("the session was revoked while it was opened; log in again")
        return opened

    async def _check_room(self) -> None:
        """Raise ResourceExhausted if the server has reached its limit of sessions."""
        most, sessions = self._registry.settings.max_sessions, self._registry.kept + self.sync.unloaded
        if self.sync.unloaded and sessions + len(self._opening) >= most:  # some may be counted twice
            sessions = await self._ask(self._call(self._store.count()))
        if sessions + len(self._opening) >= most:
            raise too_many_sessions()

    def _created(self, creating: asyncio.Task[None]) -> None:
        user = self._opening.pop(creating)
        self._opening_of[user] -= 1
        if not self._opening_of[user]:
            del self._opening_of[user]

    async def _create(self, record: SessionRecord) -> None:
        changes, settings = self.sync.changes, self._registry.settings
        count = changes.count
        limit = UserLimit(settings.per_user, settings.when_full, settings.idle_timeout_ms)
        try:
            created = await self._create_within(record, limit)
            if isinstance(created, LimitReached):
                raise limit_reached(limit.per_user, limit.when_full)
            self.sync.revoker.apply_ended(created.ended)
            if changes.has_changed(record.id, count):
                changes.apply(await changes.fetch(self._store.get, record.id))
            else:
                self._registry.restore(record, make_room=self.is_shared)
        except asyncio.CancelledError:  # the server stops
            self.sync.revoker.add_orphan(record.id)
            raise
        except StoreUnavailable as error:
            self.sync.revoker.add_orphan(record.id)
            raise self.sync.breaker.unavailable(error) from error

    async def _create_within(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        """Store a new session. Which sessions are in use is asked only for a user at the limit."""
        if limit.when_full != "evict_disconnected":
            return await self._call(self._store.create(record, limit))
        created = await self._call(self._store.create(record, replace(limit, when_full="refuse")))
        if isinstance(created, LimitReached):
            complete = await self.sync.leases.complete(limit, record.user)
            created = await self._call(self._store.create(record, complete))
            if isinstance(created, Created):
                for each in created.ended:
                    if not self._registry.end(each.id, each.code, EndReason.DISCONNECTED, each.ended_at):
                        log.info("session.evicted", session=id_text(each.id))  # unknown to this process
        return created

    async def _abandon(self, creating: asyncio.Task[None], record: SessionRecord) -> None:
        """End a session whose caller has gone before it got the tokens."""
        await asyncio.wait([creating])
        if not creating.cancelled() and creating.exception() is None:
            self._registry.end(record.id, Code.TOKEN_REVOKED, EndReason.CLOSED, self._clock.wall())
            await self.sync.revoker.revoke(Revocation(self._clock.wall(), record.id, record.user))

    # --- refreshing --------------------------------------------------------------------------------

    async def refresh(
        self, refresh_token: bytes, *, client: str, address: str, user: str = ""
    ) -> OpenedSession:
        registry = self._registry
        session_id = id_of(refresh_token[:FAMILY_SIZE])
        while True:
            wall = self._clock.wall()
            again = registry.repeat_refresh(refresh_token, client=client, address=address, wall=wall)
            if again is not None:
                return again
            running = self._refreshing.get(session_id)
            if running is None:
                break
            await asyncio.wait([running])
        made = registry.new_rotation(refresh_token, client=client, address=address, wall=wall)
        if made is None:
            raise refresh_refused(Code.UNAUTHENTICATED)
        self.sync.breaker.check()
        undecided = self._undecided.get(made[0].spent_digest)
        if undecided is not None:
            rotation, token, new_refresh_token = undecided
            expires_at = made[0].expires_at
            rotation = replace(rotation, client=client, address=address, wall=wall, expires_at=expires_at)
            made = rotation, token, new_refresh_token
        task = self._refreshing[session_id] = self.sync.tasks.spawn(self._rotate(refresh_token, user, *made))
        task.add_done_callback(lambda _: self._refreshing.pop(session_id))
        opened = await self.sync.tasks.result(task)
        if registry.record(session_id) is None and registry.ended(session_id) is None:  # forgotten meanwhile
            changes = self.sync.changes
            changes.apply(await self._ask(changes.fetch(self._store.get, session_id)))
        if registry.record(session_id) is None:
            raise refresh_refused(Code.TOKEN_REVOKED)
        return opened

    async def _rotate(
        self, spent_token: bytes, user: str, rotation: Rotation, token: bytes, refresh_token: bytes
    ) -> OpenedSession:
        changes, registry, wall = self.sync.changes, self._registry, rotation.wall
        count = changes.count
        if grace_ms := registry.settings.refresh_grace_ms:
            sealed = seal_pair(spent_token, rotation.token_digest, token, refresh_token)
            rotation = replace(rotation, sealed=sealed, grace_ms=grace_ms)
        try:
            await changes.ensure_stored(rotation.id)
            await self.sync.revoker.ensure_rotated(self._call, rotation.id, rotation.spent_digest)
            record = await self._call(self._store.rotate(rotation))
            if isinstance(record, NotRotated):
                self._undecided.pop(rotation.spent_digest, None)
                raise self._not_rotated(rotation, user, record)
            if isinstance(record, Repeated):
                pair = open_pair(spent_token, record.record.token_digest, record.sealed)
                if pair is None:
                    raise DamagedRecord("the pair of a recent refresh cannot be decrypted")
                (token, refresh_token), sealed, record = pair, record.sealed, record.record
                wall = record.last_used_at  # about when the other process made it: the grace begins there
                rotation = replace(
                    rotation,
                    token_digest=record.token_digest,
                    refresh_digest=record.refresh_digest,
                    expires_at=record.expires_at,
                    wall=wall,
                    sealed=sealed,
                )
            self.sync.revoker.remember_rotation(rotation)
            if changes.has_changed(record.id, count):
                # In a cluster, a failover may have lost it while another server was awaited.
                await self.sync.revoker.rotate_session_again(self._call, record.id)
                found = await changes.fetch(self._store.get, record.id)
                if not isinstance(found, SessionRecord) or found.token_digest != record.token_digest:
                    changes.apply(found)
                    raise refresh_refused(Code.TOKEN_REVOKED)
        except StoreUnavailable as error:
            self._undecided[rotation.spent_digest] = (rotation, token, refresh_token)
            if len(self._undecided) > UNDECIDED:
                self._undecided.popitem(last=False)
            raise self.sync.breaker.unavailable(error) from error
        self._undecided.pop(rotation.spent_digest, None)
        if self.is_shared and registry.record(record.id) is None:
            registry.restore(record, make_room=True)
        return registry.apply_rotation(record, rotation.spent_digest, token, refresh_token, wall)

    def _not_rotated(self, rotation: Rotation, user: str, refused: NotRotated) -> CallError:
        if refused.reused:
            self._registry.refresh_reused += 1
            self._report_reuse(rotation.id, user, rotation.address)
            self.sync.revoker.end_reused(rotation.id)
        elif refused.code is not Code.UNAUTHENTICATED:
            self._registry.end(rotation.id, refused.code, EndReason.UNKNOWN, rotation.wall)
        return refresh_refused(refused.code)

    # --- ending ------------------------------------------------------------------------------------

    async def revoke(
        self,
        session_id: str,
        *,
        user: str | None,
        reason: EndReason,
        suppress_event: SuppressEvent = _WITH_EVENT,
    ) -> bool:
        raw, registry, wall = id_from_text(session_id), self._registry, self._clock.wall()
        if raw is None:
            return False
        known = registry.record(raw)
        with suppress_event:
            ended = registry.revoke(session_id, user=user, reason=reason)
        if ended:
            assert known is not None
            await self._write(Revocation(wall, raw, known.user))
            return True
        waiting = self.sync.pending.get(raw, user)
        if waiting is not None:  # the first attempt may have failed
            await self._write(waiting)
            return True
        if not self.looks_up or known is not None:
            return False
        # Also if it is remembered as ended: a failover may have lost that.
        if user is not None and self.sync.pending.unverified(user) >= registry.settings.per_user:
            self.sync.breaker.check()  # no user has more sessions
        found = await self._write(Revocation(wall, raw, user, is_unverified=user is not None))
        registry.revoked += len(found or ())
        return found is None or bool(found)

    async def revoke_user(
        self, user: str, reason: EndReason, suppress_event: SuppressEvent = _WITH_EVENT
    ) -> int:
        with suppress_event:
            known = self._registry.revoke_user(user, reason)
        ended = await self._write(Revocation(self._opened_until(), user=user))
        revoked = known if ended is None else max(known, len(ended))
        self._registry.revoked += revoked - known  # those that only other servers know
        return revoked

    async def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        registry = self._registry
        records = {record.id: record for record in registry.records(user, registry.kept)}
        registry.revoke_key(user, key, reason)
        opened_until = self._opened_until()
        failed: Exception | None = None
        if self.looks_up:
            try:
                listed = await self._call(self._store.list(user))
                records |= {record.id: record for record in listed}
                self.sync.revoker.remember(Revocation(opened_until, user=user, bound_to=key))
            except (StoreUnavailable, ResourceExhausted) as error:
                failed = error
        ids = [record.id for record in records.values() if record.key == key]
        wall = self._clock.wall()
        for session_id in ids:
            try:
                await self._write(Revocation(wall, session_id, user))
            except Unavailable as error:
                failed = error
        if failed is not None:
            raise self.sync.breaker.unavailable() from failed
        return len(ids)

    async def revoke_all(self, reason: EndReason) -> int:
        known = self._registry.revoke_all(reason)
        await self._write(Revocation(self._opened_until()))
        if self.looks_up:
            self.sync.changes.handle_all_ended()
        return known

    def _opened_until(self) -> int:
        """Return the latest opening time of the sessions to end: the clock may have been set back since."""
        return max(self._clock.wall(), self._newest)

    async def _write(self, revocation: Revocation) -> list[EndedRecord] | None:
        return await self.sync.tasks.finish(self.sync.revoker.revoke(revocation))

    # --- looking up --------------------------------------------------------------------------------

    async def find_by_refresh_token(self, refresh_token: bytes) -> SessionRecord | None:
        session_id = id_of(refresh_token[:FAMILY_SIZE])
        known = self._registry.record(session_id)
        if known is not None or not self.looks_up:
            return known
        found = await self._ask(self._call(self._store.get(session_id)))
        return found if isinstance(found, SessionRecord) else None

    async def list(self, user: str) -> list[SessionInfo]:
        if not self.looks_up:
            return await super().list(user)
        wall = self._clock.wall()
        records = await self._ask(self._call(self._store.list(user)))
        return [info for record in records if (info := self._info(record, wall)) is not None]

    async def records(self, user: str | None, limit: int) -> Sequence[SessionRecord]:
        if not self.looks_up:
            return await super().records(user, limit)
        return (await self._ask(self._call(self._store.list(user))))[:limit]

    async def _ask(self, operation: Coroutine[Any, Any, T]) -> T:
        """Translate a failure of the store for callers. Raises Unavailable."""
        try:
            return await operation
        except StoreUnavailable as error:
            raise self.sync.breaker.unavailable(error) from error

    async def holder(self, token_digest: bytes) -> SessionRecord | None:
        if not self.looks_up:
            return await super().holder(token_digest)
        return self._live(await self._ask(self.sync.changes.fetch(self._store.find, token_digest)))

    def _info(self, record: SessionRecord, wall: int) -> SessionInfo | None:
        """Describe a session to its user. Return None if it has expired."""
        here = self._registry.record(record.id)
        last_used_at = record.last_used_at if here is None else max(here.last_used_at, record.last_used_at)
        live = self._is_live(record, last_used_at, wall)
        if not live and wall >= record.refresh_expires_at:
            return None
        return session_info(record._replace(last_used_at=last_used_at), live=live)

    def _is_live(self, record: SessionRecord, last_used_at: int, wall: int) -> bool:
        idle_ms = self._registry.settings.idle_timeout_ms
        return wall < record.expires_at and (idle_ms is None or wall < last_used_at + idle_ms)

    async def look_up(self, token: bytes, address: str, code: Code) -> None:
        if not self.looks_up:  # a connection from before the store was loaded
            return
        digest, now = digest_of(token), self._clock.now()
        if now < self._unknown.get(digest, 0.0):
            return
        known = self._registry.record_of(digest)
        if code is Code.TOKEN_EXPIRED:
            # Past its absolute limit it is expired everywhere. An idle one may have been used by another process,
            # which cannot be found out during an outage.
            expired = not isinstance(known, SessionRecord) or self._clock.wall() >= known.expires_at
            if expired or not self.sync.breaker.health.is_healthy:
                return
        elif known is not None:  # refused for another reason
            return
        finding = self._finding.get(digest)
        if finding is None:
            self.sync.breaker.check()
            network = network_of(address)
            self._check_rate(network, now)
            finding = self._finding[digest] = self.sync.tasks.spawn(self._find(digest, network))
            finding.add_done_callback(lambda _: self._finding.pop(digest))
        await self.sync.tasks.result(finding)

    async def _find(self, digest: bytes, network: str) -> None:
        self.lookups += 1
        registry, changes = self._registry, self.sync.changes
        found = await self._ask(changes.fetch(self._store.find, digest))
        if isinstance(found, SessionRecord):
            here = registry.record(found.id)
            if here is not None and here.token_digest == digest and here.last_used_at < found.last_used_at:
                registry.forget(found.id)  # another process has used it since it lapsed here
            is_live = self._is_live(found, found.last_used_at, self._clock.wall())
            if registry.restore(found, make_room=self.is_shared) and is_live:
                return
        elif found is not None:
            end_here(registry, found)
        else:
            self.misses += 1
            self._misses.charge(network, 1, self._clock.now())
        self._unknown[digest] = self._clock.now() + UNKNOWN_TOKEN_S
        if len(self._unknown) > UNKNOWN_TOKENS:
            self._unknown.popitem(last=False)

    def _check_rate(self, network: str, now: float) -> None:
        """Raise ResourceExhausted at too many look-ups, or too many misses from one network."""
        if self._misses.left(network, now) < 1:
            raise ResourceExhausted(
                "too many unknown tokens from this address", {"retry_after_ms": round(MISSES_S * 1000)}
            )
        if len(self._finding) >= MAX_LOOKUPS:
            raise ResourceExhausted("too many tokens to look up", {"retry_after_ms": _RETRY_BUSY_MS})


def _cipher(spent_token: bytes, token_digest: bytes) -> AESGCM:
    return AESGCM(hmac.digest(spent_token, _SEAL_LABEL + token_digest, "sha256"))


def seal_pair(spent_token: bytes, token_digest: bytes, token: bytes, refresh_token: bytes) -> bytes:
    """Encrypt a new pair, so that another process can repeat the refresh (zcp1.md, section 9.6).

    Only the holder of the spent refresh token can decrypt it; a copy of the store gives no access. `token_digest`
    is of the new access token.
    """
    return _cipher(spent_token, token_digest).encrypt(_SEAL_NONCE, bytes(token + refresh_token), None)


def open_pair(spent_token: bytes, token_digest: bytes, sealed: bytes) -> tuple[bytes, bytes] | None:
    """Decrypt what `seal_pair` returned. Return None if it is for another token, or damaged."""
    try:
        pair = _cipher(spent_token, token_digest).decrypt(_SEAL_NONCE, sealed, None)
    except (InvalidTag, ValueError):
        return None
    return pair[:TOKEN_SIZE], pair[TOKEN_SIZE:]
