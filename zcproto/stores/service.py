"""What `session.*` does: sessions are opened, refreshed, ended and looked up, here and in the store.

What this file decides: what is done here before the store has answered, and what after; who waits for whom.

Rules:
- A session is told of when the store has it, and not before. One that has ended is refused here at once, and in
  the store by the time that this is answered.
- What was begun in the store is finished, whether its caller is still there or not.
- One refresh of a session runs at a time; who comes with the same token meanwhile gets the same pair. One of which
  nobody knows whether the store has done it is asked for again as it was, never anew: the token that it spent
  might count as stolen.
- A token is looked up once at a time; one that is not known is not looked up again for a while, and an address that
  shows many of them has to wait.

It must not know: connections, frames, how the store is kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Final, Protocol

from zcproto.common.clock import Clock
from zcproto.common.network import network_of
from zcproto.errors import CallError, Code, ResourceExhausted, TokenRevoked, Unavailable
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, OpenedSession, Session, SessionInfo, SessionRegistry, SessionSettings
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.sessions.registry import refresh_refused
from zcproto.sessions.session import BOUND, OPERATOR
from zcproto.sessions.token import FAMILY_SIZE, digest_of, id_from_text, id_of, id_text
from zcproto.stores.pending import Revocation
from zcproto.stores.store import LimitReached, NotRotated, StoreUnavailable
from zcproto.stores.sync import StoreKeeper

UNDECIDED: Final = 8_192
"""Refreshes of which nobody knows whether the store has done them."""

NOT_KNOWN: Final = 16_384
NOT_KNOWN_S: Final = 2.0
LOOKED_UP_AT_ONCE: Final = 256
MISSES_PER_ADDRESS: Final = 100
"""Tokens that are not known, of one address within `MISSES_S`: a client has one or two."""

MISSES_S: Final = 10.0
ADDRESSES: Final = 4_096

_RETRY_BUSY_MS: Final = 100
_RETRY_FULL_MS: Final = 10_000
_QUIET: Final = nullcontext()

Quietly = AbstractContextManager[Any]
"""Entered while sessions end here: their connections may be told otherwise than by event."""

log = get_logger("zcproto.sessions")


OnReuse = Callable[[str, str], None]


def _nobody(session_id: str, address: str) -> None:
    """Nobody is told."""


class Sessions(Protocol):
    """The sessions of a server. `looks_up`: tokens that are not known here may be good all the same."""

    on_reuse: OnReuse

    @property
    def looks_up(self) -> bool: ...

    async def open(
        self, user: str, *, operator: bool, client: str, address: str, key: str = ""
    ) -> OpenedSession:
        """Open a session for a user who has proved who they are. Raises as `SessionRegistry.open`, and
        Unavailable."""
        ...

    def open_at_once(
        self, user: str, *, operator: bool, client: str, address: str, key: str = ""
    ) -> OpenedSession | None:
        """As `open`, if that takes no store; None if it does, and nothing was done."""
        ...

    async def refresh(self, refresh_token: bytes, *, client: str, address: str) -> OpenedSession:
        """A new pair of tokens. Raises as `SessionRegistry.refresh`, and Unavailable."""
        ...

    async def revoke(
        self, session_id: str, *, user: str | None, reason: EndReason, quietly: Quietly = _QUIET
    ) -> bool:
        """End a session. False if none has this id, or if it is not `user`'s (None: any). Raises Unavailable if it
        cannot be promised that it will not come back; it has ended here all the same."""
        ...

    async def revoke_user(self, user: str, reason: EndReason, quietly: Quietly = _QUIET) -> int:
        """End all sessions of a user; how many there were. Raises as `revoke`."""
        ...

    async def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        """End those sessions of a user that are bound to a key; how many there were. Raises as `revoke`."""
        ...

    async def revoke_all(self, reason: EndReason) -> int:
        """End all sessions; how many of them were known here. Raises as `revoke`."""
        ...

    async def close(self, session: Session, quietly: Quietly = _QUIET) -> None:
        """End a session at its holder's wish. Raises as `revoke`."""
        ...

    def info(self, session: Session) -> SessionInfo:
        """What is known of a session that is in use. Raises NotFound."""
        ...

    async def of_refresh_token(self, refresh_token: bytes) -> SessionRecord | None:
        """The session that a refresh token is of, spent or not, if it is live or lapsed. Raises Unavailable."""
        ...

    async def list(self, user: str) -> list[SessionInfo]:
        """A user's sessions, the oldest first. Raises Unavailable."""
        ...

    async def records(self, user: str | None, limit: int) -> Sequence[SessionRecord]:
        """The sessions of a user, or of everybody: the oldest `limit`, lapsed ones included. Raises Unavailable."""
        ...

    async def find(self, token: bytes, address: str, code: Code) -> None:
        """See whether a token that was refused here with a code is good. What it is, the registry knows then.

        Raises Unavailable if nobody can tell, ResourceExhausted if that is asked too often.
        """
        ...

    def reconfigure(self, settings: SessionSettings) -> None:
        """Go by other settings: those that the registry has got already."""
        ...

    async def stop(self) -> None:
        """Bring to the end what is under way, and let go."""
        ...

    def statistics(self) -> dict[str, Any]: ...


class MemorySessions:
    """Sessions that end with the process: the registry is all there is. No coroutine here suspends.

    `on_reuse` is called with a session's id and an address when a spent refresh token has ended that session.
    """

    looks_up = False

    def __init__(self, registry: SessionRegistry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self.on_reuse: OnReuse = _nobody

    async def open(
        self, user: str, *, operator: bool, client: str, address: str, key: str = ""
    ) -> OpenedSession:
        return self.open_at_once(user, operator=operator, client=client, address=address, key=key)

    def open_at_once(
        self, user: str, *, operator: bool, client: str, address: str, key: str = ""
    ) -> OpenedSession:
        return self._registry.open(
            user, operator=operator, client=client, address=address, wall=self._clock.wall(), key=key
        )

    async def refresh(self, refresh_token: bytes, *, client: str, address: str) -> OpenedSession:
        registry, wall = self._registry, self._clock.wall()
        reused = registry.refresh_reused
        try:
            return registry.refresh(refresh_token, client=client, address=address, wall=wall)
        finally:
            if registry.refresh_reused > reused:
                session_id = id_text(id_of(refresh_token[:FAMILY_SIZE]))
                log.warning("session.refresh_reused", session=session_id, peer=address)
                self.on_reuse(session_id, address)

    async def revoke(
        self, session_id: str, *, user: str | None, reason: EndReason, quietly: Quietly = _QUIET
    ) -> bool:
        with quietly:
            return self._registry.revoke(session_id, user=user, reason=reason)

    async def revoke_user(self, user: str, reason: EndReason, quietly: Quietly = _QUIET) -> int:
        with quietly:
            return self._registry.revoke_user(user, reason)

    async def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        return self._registry.revoke_key(user, key, reason)

    async def revoke_all(self, reason: EndReason) -> int:
        return self._registry.revoke_all(reason)

    async def close(self, session: Session, quietly: Quietly = _QUIET) -> None:
        with quietly:
            self._registry.close(session)

    def info(self, session: Session) -> SessionInfo:
        return self._registry.info(session.id, self._clock.wall())

    async def of_refresh_token(self, refresh_token: bytes) -> SessionRecord | None:
        return self._registry.record(id_of(refresh_token[:FAMILY_SIZE]))

    async def list(self, user: str) -> list[SessionInfo]:
        return self._registry.list(user, self._clock.wall())

    async def records(self, user: str | None, limit: int) -> Sequence[SessionRecord]:
        return self._registry.records(user, limit)

    async def find(self, token: bytes, address: str, code: Code) -> None:
        """There is nothing more to know."""

    def reconfigure(self, settings: SessionSettings) -> None:
        """The registry knows them."""

    async def stop(self) -> None:
        """There is nothing to let go."""

    def statistics(self) -> dict[str, Any]:
        return {"state": "healthy"}


class StoredSessions:
    """Sessions that are kept in a store; the registry is what tokens are checked against.

    The counts are for operators: tokens that were looked up (`lookups`), and of these not known (`misses`).
    `on_reuse` is as for MemorySessions.
    """

    def __init__(self, keeper: StoreKeeper, settings: SessionSettings, clock: Clock) -> None:
        self._keeper = keeper
        self._registry = keeper.registry
        self._store = keeper.store
        self._settings = settings
        self._clock = clock
        self._limit = UserLimit(settings.per_user, settings.when_full, settings.idle_timeout_ms)
        self._opening = 0
        self._newest = 0
        self._refreshing: dict[bytes, asyncio.Task[OpenedSession]] = {}
        self._undecided: OrderedDict[bytes, tuple[Rotation, bytes, bytes]] = OrderedDict()
        self._finding: dict[bytes, asyncio.Task[None]] = {}
        self._not_known: OrderedDict[bytes, float] = OrderedDict()
        self._missed: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self.on_reuse: OnReuse = _nobody
        self.lookups = 0
        self.misses = 0

    def reconfigure(self, settings: SessionSettings) -> None:
        """Go by other settings, from the next opening on."""
        self._settings = settings
        self._limit = UserLimit(settings.per_user, settings.when_full, settings.idle_timeout_ms)

    @property
    def looks_up(self) -> bool:
        return self._keeper.is_shared

    async def stop(self) -> None:
        await self._keeper.stop()

    def statistics(self) -> dict[str, Any]:
        return {**self._keeper.statistics(), "lookups": self.lookups, "misses": self.misses}

    # --- opening -----------------------------------------------------------------------------------

    async def open(
        self, user: str, *, operator: bool, client: str, address: str, key: str = ""
    ) -> OpenedSession:
        self._keeper.check()
        if not self.looks_up and self._registry.kept + self._opening >= self._settings.max_sessions:
            raise ResourceExhausted(
                "the server has reached its limit of sessions; retry later",
                {"retry_after_ms": _RETRY_FULL_MS},
            )
        wall = self._clock.wall()
        self._newest = max(self._newest, wall)
        new = self._registry.new_session(
            user, operator=operator, client=client, address=address, wall=wall, key=key
        )
        self._opening += 1
        creating = self._keeper.spawn(self._create(new.record))
        creating.add_done_callback(self._created)
        try:
            await asyncio.wait([creating])
        except asyncio.CancelledError:
            self._keeper.in_background(self._abandon(creating, new.record))
            raise
        creating.result()
        opened = self._registry.opened_session(new)
        if opened is None:
            raise TokenRevoked("the session was revoked while it was opened; log in again")
        return opened

    def open_at_once(self, user: str, *, operator: bool, client: str, address: str, key: str = "") -> None:
        return None

    def _created(self, creating: asyncio.Task[None]) -> None:
        self._opening -= 1

    async def _create(self, record: SessionRecord) -> None:
        keeper, registry = self._keeper, self._registry
        changes = keeper.changes
        try:
            created = await self._store.create(record, self._limit)
            if isinstance(created, LimitReached):
                raise ResourceExhausted(
                    "the user has reached the limit of sessions; close one first",
                    {"limit": self._limit.per_user},
                )
            for ended in created.ended:
                keeper.end_here(ended)
            if keeper.changed_since(record.id, changes):
                keeper.take_in(await keeper.fetch(partial(self._store.store.get, record.id)))
            else:
                registry.restore(record, make_room=self.looks_up)
        except StoreUnavailable as error:
            keeper.add_orphan(record.id)
            raise keeper.unavailable() from error

    async def _abandon(self, creating: asyncio.Task[None], record: SessionRecord) -> None:
        """Whoever opened a session is gone, and nobody has its tokens."""
        await asyncio.wait([creating])
        if not creating.cancelled() and creating.exception() is None:
            self._registry.end(record.id, Code.TOKEN_REVOKED, EndReason.CLOSED, self._clock.wall())
            await self._keeper.revoke(Revocation(self._clock.wall(), record.id, record.user))

    # --- refreshing --------------------------------------------------------------------------------

    async def refresh(self, refresh_token: bytes, *, client: str, address: str) -> OpenedSession:
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
        self._keeper.check()
        known = self._undecided.get(made[0].spent_digest)
        if known is not None:
            rotation, token, new_refresh_token = known
            expires_at = made[0].expires_at
            rotation = replace(rotation, client=client, address=address, wall=wall, expires_at=expires_at)
            made = rotation, token, new_refresh_token
        task = self._refreshing[session_id] = self._keeper.spawn(self._rotate(*made))
        task.add_done_callback(lambda _: self._refreshing.pop(session_id))
        await asyncio.wait([task])
        opened = task.result()
        if registry.record(session_id) is None:
            raise refresh_refused(Code.TOKEN_REVOKED)
        return opened

    async def _rotate(self, rotation: Rotation, token: bytes, refresh_token: bytes) -> OpenedSession:
        keeper, registry = self._keeper, self._registry
        changes = keeper.changes
        try:
            await keeper.settle(rotation.id)
            rotated = await self._store.rotate(rotation)
            if isinstance(rotated, NotRotated):
                self._undecided.pop(rotation.spent_digest, None)
                raise self._not_rotated(rotation, rotated)
            record = rotated.record
            if keeper.changed_since(record.id, changes):
                found = await keeper.fetch(partial(self._store.store.get, record.id))
                if not isinstance(found, SessionRecord) or found.token_digest != record.token_digest:
                    keeper.take_in(found)
                    raise refresh_refused(Code.TOKEN_REVOKED)
        except StoreUnavailable as error:
            self._undecided[rotation.spent_digest] = (rotation, token, refresh_token)
            if len(self._undecided) > UNDECIDED:
                self._undecided.popitem(last=False)
            raise keeper.unavailable() from error
        self._undecided.pop(rotation.spent_digest, None)
        if self.looks_up and registry.record(record.id) is None:
            registry.restore(record, make_room=True)
        return registry.apply_rotation(record, rotation.spent_digest, token, refresh_token, rotation.wall)

    def _not_rotated(self, rotation: Rotation, refused: NotRotated) -> CallError:
        session_id, wall = rotation.id, rotation.wall
        if refused.reused:
            self._registry.refresh_reused += 1
            log.warning("session.refresh_reused", session=id_text(session_id), peer=rotation.address)
            self.on_reuse(id_text(session_id), rotation.address)
        if refused.code is not Code.UNAUTHENTICATED:
            reason = EndReason.REFRESH_REUSED if refused.reused else EndReason.UNKNOWN
            self._registry.end(session_id, refused.code, reason, wall)
        return refresh_refused(refused.code)

    # --- ending ------------------------------------------------------------------------------------

    async def revoke(
        self, session_id: str, *, user: str | None, reason: EndReason, quietly: Quietly = _QUIET
    ) -> bool:
        raw, registry, wall = id_from_text(session_id), self._registry, self._clock.wall()
        if raw is None:
            return False
        known = registry.record(raw)
        with quietly:
            ended = registry.revoke(session_id, user=user, reason=reason)
        if ended:
            assert known is not None
            await self._write(Revocation(wall, raw, known.user))
            return True
        waiting = self._keeper.pending.get(raw)
        if waiting is not None and user in (None, waiting.user):  # it may not have been promised then
            await self._write(waiting)
            return True
        if not self.looks_up or known is not None or registry.ended(raw) is not None:
            return False
        try:
            return bool(await self._keeper.finish(self._store.end([raw], Code.TOKEN_REVOKED, wall, user)))
        except StoreUnavailable as error:
            raise self._keeper.unavailable() from error

    async def revoke_user(self, user: str, reason: EndReason, quietly: Quietly = _QUIET) -> int:
        with quietly:
            known = self._registry.revoke_user(user, reason)
        ended = await self._write(Revocation(self._until(), user=user))
        return known if ended is None else max(known, len(ended))

    async def revoke_key(self, user: str, key: str, reason: EndReason) -> int:
        registry = self._registry
        records = {record.id: record for record in registry.records(user, registry.kept)}
        registry.revoke_key(user, key, reason)
        failed: Exception | None = None
        if self.looks_up:
            try:
                records |= {record.id: record for record in await self._store.list(user)}
            except StoreUnavailable as error:
                failed = error
        ids = [record.id for record in records.values() if record.key == key]
        wall = self._clock.wall()
        for session_id in ids:
            try:
                await self._write(Revocation(wall, session_id, user))
            except Unavailable as error:
                failed = error
        if failed is not None:
            raise self._keeper.unavailable() from failed
        return len(ids)

    async def revoke_all(self, reason: EndReason) -> int:
        known = self._registry.revoke_all(reason)
        await self._write(Revocation(self._until()))
        return known

    async def close(self, session: Session, quietly: Quietly = _QUIET) -> None:
        await self.revoke(session.id, user=session.user, reason=EndReason.CLOSED, quietly=quietly)

    def _until(self) -> int:
        """By when the sessions were opened that end now: some may be of a time before the clock was set back."""
        return max(self._clock.wall(), self._newest)

    async def _write(self, revocation: Revocation) -> list[EndedRecord] | None:
        return await self._keeper.finish(self._keeper.revoke(revocation))

    # --- looking -----------------------------------------------------------------------------------

    def info(self, session: Session) -> SessionInfo:
        return self._registry.info(session.id, self._clock.wall())

    async def of_refresh_token(self, refresh_token: bytes) -> SessionRecord | None:
        session_id = id_of(refresh_token[:FAMILY_SIZE])
        known = self._registry.record(session_id)
        if known is not None or not self.looks_up:
            return known
        try:
            found = await self._store.get(session_id)
        except StoreUnavailable as error:
            raise self._keeper.unavailable() from error
        return found if isinstance(found, SessionRecord) else None

    async def list(self, user: str) -> list[SessionInfo]:
        wall = self._clock.wall()
        if not self.looks_up:
            return self._registry.list(user, wall)
        try:
            records = await self._store.list(user)
        except StoreUnavailable as error:
            raise self._keeper.unavailable() from error
        return [info for record in records if (info := self._info(record, wall)) is not None]

    async def records(self, user: str | None, limit: int) -> Sequence[SessionRecord]:
        if not self.looks_up:
            return self._registry.records(user, limit)
        try:
            return (await self._store.list(user))[:limit]
        except StoreUnavailable as error:
            raise self._keeper.unavailable() from error

    def _info(self, record: SessionRecord, wall: int) -> SessionInfo | None:
        """What a user may know of a session; None if its time is up."""
        here = self._registry.record(record.id)
        last_used_at = record.last_used_at if here is None else max(here.last_used_at, record.last_used_at)
        idle_ms = self._settings.idle_timeout_ms
        live = wall < record.expires_at and (idle_ms is None or wall < last_used_at + idle_ms)
        if not live and wall >= record.refresh_expires_at:
            return None
        return SessionInfo(
            id=id_text(record.id),
            user=record.user,
            created_at=record.created_at,
            last_used_at=last_used_at,
            expires_at=record.expires_at,
            client=record.client,
            address=record.address,
            bound=record.flags & BOUND != 0,
            operator=record.flags & OPERATOR != 0,
            live=live,
            refresh_expires_at=record.refresh_expires_at or None,
        )

    async def find(self, token: bytes, address: str, code: Code) -> None:
        digest, now = digest_of(token), self._clock.now()
        if now < self._not_known.get(digest, 0.0):
            return
        known = self._registry.record_of(digest)
        if code is Code.TOKEN_EXPIRED:
            # By its absolute limit it is over, wherever it was used; during an outage so it is by the other.
            over = not isinstance(known, SessionRecord) or self._clock.wall() >= known.expires_at
            if over or not self._keeper.health.is_asked:
                return
        elif known is not None:  # it was refused for another reason
            return
        finding = self._finding.get(digest)
        if finding is None:
            self._keeper.check()
            network = network_of(address)
            self._admit(network, now)
            finding = self._finding[digest] = self._keeper.spawn(self._look_up(digest, network))
            finding.add_done_callback(lambda _: self._finding.pop(digest))
        await asyncio.wait([finding])
        try:
            finding.result()
        except StoreUnavailable as error:
            raise self._keeper.unavailable() from error

    async def _look_up(self, digest: bytes, network: str) -> None:
        self.lookups += 1
        registry = self._registry
        found = await self._keeper.fetch(partial(self._store.store.find, digest))
        if isinstance(found, SessionRecord):
            here = registry.record(found.id)
            if here is not None and here.token_digest == digest and here.last_used_at < found.last_used_at:
                registry.forget(found.id)  # it has been used elsewhere since it lapsed here
            if registry.restore(found, make_room=True) and self._is_live(found):
                return
        elif found is not None:
            self._keeper.end_here(found)
        else:
            self._count_miss(network)
        self._not_known[digest] = self._clock.now() + NOT_KNOWN_S
        if len(self._not_known) > NOT_KNOWN:
            self._not_known.popitem(last=False)

    def _is_live(self, record: SessionRecord) -> bool:
        wall, idle_ms = self._clock.wall(), self._settings.idle_timeout_ms
        return wall < record.expires_at and (idle_ms is None or wall < record.last_used_at + idle_ms)

    def _admit(self, network: str, now: float) -> None:
        """Raise ResourceExhausted if too much is looked up, or too much that nobody knows."""
        until, misses = self._missed.get(network, (0.0, 0))
        if misses >= MISSES_PER_ADDRESS and now < until:
            raise ResourceExhausted(
                "too many unknown tokens from this address",
                {"retry_after_ms": round((until - now) * 1000) + 1},
            )
        if len(self._finding) >= LOOKED_UP_AT_ONCE:
            raise ResourceExhausted("too many tokens to look up", {"retry_after_ms": _RETRY_BUSY_MS})

    def _count_miss(self, network: str) -> None:
        self.misses += 1
        now = self._clock.now()
        until, misses = self._missed.pop(network, (0.0, 0))
        self._missed[network] = (until, misses + 1) if now < until else (now + MISSES_S, 1)
        if len(self._missed) > ADDRESSES:
            self._missed.popitem(last=False)
