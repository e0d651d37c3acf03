"""Ends sessions in the store: at once, or after an outage from the file of pending revocations.

Decides: when a revocation goes to the file, and what is repeated after the store has lost data.

Rules:
- A revocation is durable, in the store or in the file, before its caller gets an answer.
- Pending revocations reach the store before anything else does.
- After every gap in the connection to a shared store, recent revocations and rotations are repeated before any
  session is checked: a failover may have lost them although they were acknowledged (REPEAT in spec/store.pml). Not
  so if the store keeps its changes: they would keep it busy when all processes need it.
  An operation on several servers of a cluster may be answered after that, so what came since is repeated, too.
  Those of a user or a key list the user's sessions again: the old primary lacked what was opened on the new one.
  Sessions opened after the revocation are kept, so the clocks of processes are trusted here.
- A rotation is repeated only if the store has the refresh token that it spent, else it would look like theft. Those
  of several processes may depend on each other, so all processes repeat theirs for some seconds.
- Sessions that may have been created although no client got their tokens ("orphans") are ended.

It must not know: connections, how a call is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, NamedTuple, TypeVar

from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import Code, ResourceExhausted
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, SessionRegistry
from zcproto.sessions.health import NEVER
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord
from zcproto.stores.base import CLOCK_SKEW_MS, MAX_LISTED, DamagedRecord, NotRotated, StoreUnavailable
from zcproto.stores.operations import BackgroundTasks, Call, CircuitBreaker
from zcproto.stores.pending import PendingRevocations, Revocation, RevocationKey

MAX_ENDED: Final = 256
"""Sessions ended in one operation."""

REPEATS_S: Final = (*map(float, range(1, 11)), 20.0, 30.0)
"""When revocations are repeated after the store lost data. Each process restores the sessions that it knows once it
finds the store working again; all of them have done so within this time."""

AFTER_GAP_S: Final = REPEATS_S[:4]
"""When rotations are repeated after a gap. Processes notice a failover within a second of each other."""

RECENT: Final = 16_384
"""Revocations, and rotations, of this process that can be repeated: 27 a second for ten minutes."""

RECENT_LISTS: Final = 256
"""Revocations of a user or a key that can be repeated. Each costs one list of the user's sessions. What needs them
was acknowledged since the last heartbeat before a failover."""

ROTATED_AT_ONCE: Final = 64

RETRY_PAUSE_S: Final = 0.05
"""The pause after a failure that did not begin an outage."""

ORPHANS: Final = 8_192
_STORE_ALONE: Final = 0.5
"""The part of the timeout after which the revocation is also written to the file."""

_DISK_PART: Final = 0.7
"""The part of the timeout given to the file: together with the store little more than one timeout."""

MIN_DISK_S: Final = 0.05
"""The time given to the file, however short the store's timeout."""

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Called with the name and the values of a log event that may raise an alert."""

_REASONS: Final = {
    Code.TOKEN_REVOKED: EndReason.REVOKED_ELSEWHERE,
    Code.SESSION_REPLACED: EndReason.REPLACED,
    Code.TOKEN_EXPIRED: EndReason.UNKNOWN,
}

log = get_logger("zcproto.store")


class _Repeat(NamedTuple):
    """Revocations to repeat with those remembered `since` and with all rotations, and when: the next time last.

    Times are in monotonic seconds.
    """

    times: list[float]
    revocations: list[Revocation]
    since: float


K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last values added, at most `limit` and none older than `keep_s`."""

    def __init__(self, keep_s: float, clock: Clock, limit: int = RECENT) -> None:
        self._keep_s = keep_s
        self._limit = limit
        self._clock = clock
        self._added: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def add(self, key: K, value: V) -> None:
        self._added.pop(key, None)
        self._added[key] = self._clock.now(), value
        if len(self._added) > self._limit:
            self._added.popitem(last=False)

    def __contains__(self, key: K) -> bool:
        return key in self._added

    def values(self, since: float = 0.0) -> list[V]:
        """Return the values added since then, oldest first."""
        expired = self._clock.now() - self._keep_s
        while self._added and next(iter(self._added.values()))[0] < expired:
            self._added.popitem(last=False)
        return [value for added_at, value in self._added.values() if added_at >= since]


@dataclass(eq=False)
class Revoker:
    """Ends sessions in the store of one process. `replayed` counts pending revocations written since an outage."""

    breaker: CircuitBreaker
    registry: SessionRegistry
    pending: PendingRevocations
    tasks: BackgroundTasks
    wheel: DeadlineWheel
    clock: Clock
    keep_ended_ms: int
    on_event: OnEvent

    def __post_init__(self) -> None:
        self._store = self.breaker.store
        self._orphans: OrderedDict[bytes, None] = OrderedDict()
        keep_s = self.keep_ended_ms / MS_PER_SECOND
        self._ended: Recent[RevocationKey, Revocation] = Recent(keep_s, self.clock)
        self._lists: Recent[RevocationKey, Revocation] = Recent(keep_s, self.clock, RECENT_LISTS)
        self._rotations: Recent[bytes, Rotation] = Recent(keep_s, self.clock)
        self._repeats: list[_Repeat] = []
        self._is_repeating = False
        self.on_repeated: Callable[[], None] = lambda: None
        self.replayed = 0
        self.deadline_tick = 0

    # --- revoking ------------------------------------------------------------------------------------

    async def revoke(self, revocation: Revocation) -> list[EndedRecord] | None:
        """End sessions in the store that have ended here. Return those it had, or None during an outage.

        During an outage the revocation is written to the file. Raises Unavailable if that fails too.
        """
        breaker, timeout = self.breaker, self.breaker.timeout
        if not revocation.is_unverified:  # else what it has ended is remembered
            self.remember(revocation)
        within = max(timeout, MIN_DISK_S)
        writing: asyncio.Task[None] | None = None
        if breaker.health.is_healthy:
            ending = self.tasks.spawn(self._end(revocation))
            # The file is written before the store is given up, so that the caller does not wait for both in turn.
            within = max(timeout * _DISK_PART, MIN_DISK_S)
            ended_in_time, _ = await asyncio.wait([ending], timeout=timeout * _STORE_ALONE)
            if not ended_in_time:
                writing = self.tasks.spawn(self.pending.add(revocation, within))
                await asyncio.wait([ending])
            try:
                ended = ending.result()
            except DamagedRecord as error:
                self._not_kept(error)
                raise breaker.unavailable(error) from error
            except StoreUnavailable:
                # Only a probe replays the file, so there has to be one.
                breaker.health.begin_outage(self.clock.now())
            else:
                self.apply_ended(ended)
                if writing is not None:
                    self.tasks.run_in_background(self._remove_pending([revocation]))
                return ended
        try:
            await (writing or self.pending.add(revocation, within))
        except StoreUnavailable as error:
            if revocation.id and not revocation.is_unverified:
                self.add_orphan(revocation.id)  # remembered at least until this process ends
            self._not_kept(error)
            raise breaker.unavailable() from error
        return None

    def _not_kept(self, error: StoreUnavailable) -> None:
        log.error("revocations.not_kept", reason=error.reason)
        self.on_event("revocations.not_kept", {"reason": error.reason, "pending": len(self.pending)})

    async def _end(self, revocation: Revocation) -> list[EndedRecord]:
        store, code, wall = self._store, revocation.code, revocation.wall
        if revocation.id:
            return await self.breaker.call(store.end([revocation.id], code, wall, _owner(revocation)))
        if revocation.user is not None:
            return await self.breaker.call(store.end_user(revocation.user, code, wall))
        await self.breaker.call(store.end_all(code, wall))
        return []

    def apply_ended(self, ended: Iterable[EndedRecord]) -> None:
        """End sessions here that this process has ended in the store, and remember them."""
        for each in ended:
            self.remember(Revocation(each.ended_at, each.id, code=each.code))
            end_here(self.registry, each)

    def end_reused(self, session_id: bytes) -> None:
        """End a session here that the store has ended because a spent refresh token was shown."""
        wall = self.clock.wall()
        self.remember(Revocation(wall, session_id))
        self.registry.end(session_id, Code.TOKEN_REVOKED, EndReason.REFRESH_REUSED, wall)

    def remember(self, revocation: Revocation) -> Revocation:
        """Remember a revocation by this process. Return it as it has to be repeated."""
        if not revocation.id:
            # A session opened since must not be ended, so clocks are trusted here.
            revocation = replace(revocation, wall=revocation.wall - CLOCK_SKEW_MS)
        if self._store.shared:
            recent = self._ended if revocation.id or revocation.user is None else self._lists
            recent.add(revocation.key, revocation)
        return revocation

    def remember_rotation(self, rotation: Rotation) -> None:
        """Remember a rotation that the store has made."""
        if self._store.shared:
            self._rotations.add(rotation.refresh_digest, rotation)

    # --- after an outage -----------------------------------------------------------------------------

    async def replay(self, call: Call) -> None:
        """Write the pending revocations to the store."""
        entries = self.pending.entries
        if not entries:
            return
        uncertain = await self._end_again(call, entries)
        uncertain += [self.remember(entry) for entry in entries if not entry.id]
        if uncertain and self._store.shared and not self._store.keeps_changes:
            # The sessions may have ended before. Or the store lost them before this process started, in which case
            # another process may restore them.
            self._schedule(uncertain, REPEATS_S)
        await self._remove_pending(entries)
        self.replayed += len(entries)

    async def _remove_pending(self, revocations: Sequence[Revocation]) -> None:
        try:
            await self.pending.remove(revocations, max(self.breaker.timeout, MIN_DISK_S))
        except StoreUnavailable as error:
            log.warning("revocations.not_removed", reason=error.reason)

    async def _end_again(self, call: Call, revocations: Sequence[Revocation]) -> list[Revocation]:
        """Apply revocations. Return those of single sessions that the store had no live session for."""
        found = set()
        groups: dict[tuple[Code, str | None], list[Revocation]] = {}
        for revocation in revocations:
            if revocation.id:
                groups.setdefault((revocation.code, _owner(revocation)), []).append(revocation)
        for (code, user), group in groups.items():
            wall = max(
                revocation.wall for revocation in group
            )  # few operations, and some tombstones live longer
            found.update(await self._end_ids(call, [revocation.id for revocation in group], code, wall, user))
        for revocation in revocations:
            if not revocation.id:
                try:
                    await self._end_opened_before(call, revocation)
                except DamagedRecord as error:  # which would keep the store out for all users
                    self._not_kept(error)
        return [revocation for revocation in revocations if revocation.id and revocation.id not in found]

    async def _end_ids(
        self, call: Call, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[bytes]:
        found = []
        for first in range(0, len(ids), MAX_ENDED):
            ended = await call(self._store.end(ids[first : first + MAX_ENDED], code, wall, user))
            self.apply_ended(ended)
            found += [each.id for each in ended]
        return found

    async def end_in_store(self, call: Call, session_id: bytes) -> None:
        """End a session that the store has, and the registry has not or with another token."""
        ended = self.registry.ended(session_id)
        code = Code.TOKEN_REVOKED if ended is None else ended.code
        await self._end_ids(call, [session_id], code, self.clock.wall())

    async def _end_opened_before(self, call: Call, revocation: Revocation) -> None:
        """End the sessions of a user, a key, or all users that were opened before the revocation."""
        until = revocation.wall + (CLOCK_SKEW_MS if self._store.shared else 0)
        while True:
            records = await call(self._store.list(revocation.user))
            ids = [
                record.id
                for record in records
                if record.created_at <= until and revocation.bound_to in (None, record.key)
            ]
            await self._end_ids(call, ids, revocation.code, revocation.wall)
            if len(ids) < MAX_LISTED or revocation.user is not None:
                return

    # --- after the store has lost data ---------------------------------------------------------------

    def repeat_after_loss(self) -> None:
        """Repeat recent revocations, and those to come, for a while: other processes may restore the sessions."""
        self._schedule(self._recent_revocations(), REPEATS_S, self.clock.now())

    async def repeat_after_gap(self, call: Call) -> None:
        """Repeat recent revocations and rotations now: a failover may have lost them."""
        if self._store.keeps_changes:
            return
        since = self.clock.now()
        await self._end_again(call, self._recent_revocations())
        await self._rotate_again(call)
        self._schedule([], (*AFTER_GAP_S, AFTER_GAP_S[-1] + self.breaker.timeout), since)

    def _recent_revocations(self) -> list[Revocation]:
        """Return the revocations of this process, and those that it knows of other processes."""
        ended = self.registry.ended_since(self.clock.wall() - self.keep_ended_ms)
        known = [Revocation(each.ended_at, each.id, code=each.code) for each in ended]
        recent = (*known, *self._ended.values(), *self._lists.values())
        return [*{each.key: each for each in recent}.values()]

    async def _rotate_again(self, call: Call) -> None:
        """Repeat the rotations that the store has lost, of sessions that live."""
        chains: dict[bytes, list[Rotation]] = {}
        for rotation in self._rotations.values():
            if self.registry.ended(rotation.id) is None:
                chains.setdefault(rotation.id, []).append(rotation)
        each = list(chains.values())
        for first in range(0, len(each), ROTATED_AT_ONCE):
            some = each[first : first + ROTATED_AT_ONCE]
            await asyncio.gather(*(self._rotate_chain(call, chain) for chain in some))

    async def ensure_rotated(self, call: Call, session_id: bytes, refresh_digest: bytes) -> None:
        """Repeat the rotation that made a refresh token if the store has lost it: the token would look stolen."""
        if refresh_digest in self._rotations:
            record = await call(self._store.get(session_id))
            if isinstance(record, SessionRecord) and record.refresh_digest != refresh_digest:
                await self.rotate_session_again(call, session_id)

    async def rotate_session_again(self, call: Call, session_id: bytes) -> None:
        """Repeat the rotations of a session that the store has lost."""
        await self._rotate_chain(call, [each for each in self._rotations.values() if each.id == session_id])

    async def _rotate_chain(self, call: Call, chain: Sequence[Rotation]) -> None:
        with suppress(DamagedRecord):  # which would keep the store out for all users
            await self._rotate_in_turn(call, chain)

    async def _rotate_in_turn(self, call: Call, chain: Sequence[Rotation]) -> None:
        record = await call(self._store.get(chain[0].id)) if chain else None
        for rotation in chain:
            if isinstance(record, SessionRecord) and record.refresh_digest == rotation.spent_digest:
                left_ms = rotation.wall + rotation.grace_ms - self.clock.wall()
                record = await call(self._store.rotate(replace(rotation, grace_ms=max(left_ms, 0))))
                if isinstance(record, NotRotated) and record.reused:
                    self.end_reused(rotation.id)

    def has_issued(self, record: SessionRecord) -> bool:
        """Return whether the token of a session comes from a recent rotation of this process."""
        return any(each.token_digest == record.token_digest for each in self._rotations.values())

    def repeat_again(self) -> None:
        """Repeat rotations in a second, and call `on_repeated`, unless that is planned."""
        if not self._repeats:
            self._schedule([], AFTER_GAP_S[:1])

    def _schedule(self, revocations: list[Revocation], times: Sequence[float], since: float = NEVER) -> None:
        now = self.clock.now()
        self._repeats.append(_Repeat([now + after_s for after_s in reversed(times)], revocations, since))
        self.set_deadline()

    def set_deadline(self) -> None:
        """Set the timer for the next repetition. None is due during an outage or while one is in progress."""
        due = NEVER
        if not self._is_repeating and self.breaker.health.is_healthy:
            due = min((repeat.times[-1] for repeat in self._repeats), default=NEVER)
        if not self.tasks.is_stopping:
            self.wheel.set(self, due)

    def handle_deadline(self, now: float) -> None:
        if self.breaker.health.is_healthy:
            self._is_repeating = True
            self.tasks.run_in_background(self._repeat_due(now))

    async def _repeat_due(self, now: float) -> None:
        try:
            now = max(now, self.clock.now())  # a timer may be slightly early
            due = [repeat for repeat in self._repeats if repeat.times[-1] <= now]
            since = min((repeat.since for repeat in due), default=NEVER)
            revocations = [each for repeat in due for each in repeat.revocations]
            revocations += self._ended.values(since) + self._lists.values(since)
            await self._end_again(self.breaker.call, [*{each.key: each for each in revocations}.values()])
            await self._rotate_again(self.breaker.call)
            for repeat in due:
                while repeat.times and repeat.times[-1] <= now:
                    repeat.times.pop()
            self._repeats = [repeat for repeat in self._repeats if repeat.times]
            self.on_repeated()
        except (StoreUnavailable, ResourceExhausted):
            await asyncio.sleep(RETRY_PAUSE_S)
            raise
        finally:
            self._is_repeating = False
            self.set_deadline()

    # --- orphans -------------------------------------------------------------------------------------

    def add_orphan(self, session_id: bytes) -> None:
        """Remember a session that the store may have although no client got its tokens."""
        self._orphans[session_id] = None
        if len(self._orphans) > ORPHANS:
            self._orphans.popitem(last=False)

    async def end_orphans(self, call: Call) -> None:
        while self._orphans:
            ids = [*self._orphans][:MAX_ENDED]
            await call(self._store.end(ids, Code.TOKEN_REVOKED, self.clock.wall()))
            for session_id in ids:
                self._orphans.pop(session_id, None)


def _owner(revocation: Revocation) -> str | None:
    """Return the user whose session it must be; None if that was verified."""
    return revocation.user if revocation.is_unverified else None


def end_here(registry: SessionRegistry, ended: EndedRecord) -> None:
    """End a session in the registry that has ended in the store."""
    if not registry.end(ended.id, ended.code, _REASONS[ended.code], ended.ended_at):
        registry.restore_ended(ended)
