"""Ends sessions in the store: at once, or after an outage from the file of pending revocations.

Decides: when a revocation goes to the file, and what is repeated after the store has lost data.

Rules:
- A revocation is durable, in the store or in the file, before its caller gets an answer.
- Pending revocations reach the store before anything else does.
- Sessions that may have been created although no client got their tokens ("orphans") are ended.

It must not know: connections, how a call is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import Code
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, SessionRegistry
from zcproto.sessions.health import NEVER
from zcproto.sessions.record import EndedRecord
from zcproto.stores.base import CLOCK_SKEW_MS, MAX_LISTED, DamagedRecord, StoreUnavailable
from zcproto.stores.operations import BackgroundTasks, Call, CircuitBreaker
from zcproto.stores.pending import PendingRevocations, Revocation

MAX_ENDED: Final = 256
"""Sessions ended in one operation."""

REPEATS_S: Final = (*map(float, range(1, 11)), 20.0, 30.0)
"""When revocations are repeated after the store lost data. Each process restores the sessions that it knows once it
finds the store working again; all of them have done so within this time."""

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
    """Revocations to repeat, and when: monotonic seconds, the next one last."""

    times: list[float]
    revocations: list[Revocation]


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
        self._replayed: list[Revocation] = []  # those of a user or of all users
        self._repeats: list[_Repeat] = []
        self._is_repeating = False
        self.replayed = 0
        self.deadline_tick = 0

    # --- revoking ------------------------------------------------------------------------------------

    async def revoke(self, revocation: Revocation) -> list[EndedRecord] | None:
        """End sessions in the store that have ended here. Return those it had, or None during an outage.

        During an outage the revocation is written to the file. Raises Unavailable if that fails too.
        """
        breaker, timeout = self.breaker, self.breaker.timeout
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
                for each in ended:
                    end_here(self.registry, each)
                if writing is not None:
                    self.tasks.run_in_background(self._remove_pending([revocation]))
                return ended
        try:
            await (writing or self.pending.add(revocation, within))
        except StoreUnavailable as error:
            if revocation.id:
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
            return await self.breaker.call(store.end([revocation.id], code, wall))
        if revocation.user is not None:
            return await self.breaker.call(store.end_user(revocation.user, code, wall))
        await self.breaker.call(store.end_all(code, wall))
        return []

    # --- after an outage -----------------------------------------------------------------------------

    def begin_replay(self) -> None:
        """Forget what an earlier probe has replayed."""
        self.replayed = 0
        self._replayed.clear()

    async def replay(self, call: Call) -> None:
        """Write the pending revocations to the store."""
        entries = self.pending.entries
        if not entries:
            return
        unknown = await self._end_again(call, entries)
        if self._store.shared:
            # The sessions may have ended before. Or the store lost them before this process started, in which case
            # another process may restore them.
            self._schedule(unknown)
        await self._remove_pending(entries)
        self.replayed += len(entries)
        self._replayed += [entry for entry in entries if not entry.id]

    async def _remove_pending(self, revocations: Sequence[Revocation]) -> None:
        try:
            await self.pending.remove(revocations, max(self.breaker.timeout, MIN_DISK_S))
        except StoreUnavailable as error:
            log.warning("revocations.not_removed", reason=error.reason)

    async def _end_again(self, call: Call, revocations: Sequence[Revocation]) -> list[Revocation]:
        """Apply revocations. Return those of single sessions that the store had no live session for."""
        found = set()
        ids: dict[tuple[Code, int], list[bytes]] = {}
        for revocation in revocations:
            if revocation.id:
                ids.setdefault((revocation.code, revocation.wall), []).append(revocation.id)
        for (code, wall), group in ids.items():
            found.update(await self._end_ids(call, group, code, wall))
        for revocation in revocations:
            if not revocation.id:
                try:
                    await self._end_opened_before(call, revocation)
                except DamagedRecord as error:  # which would keep the store out for all users
                    self._not_kept(error)
        return [revocation for revocation in revocations if revocation.id and revocation.id not in found]

    async def _end_ids(self, call: Call, ids: Sequence[bytes], code: Code, wall: int) -> list[bytes]:
        found = []
        for first in range(0, len(ids), MAX_ENDED):
            for ended in await call(self._store.end(ids[first : first + MAX_ENDED], code, wall)):
                end_here(self.registry, ended)
                found.append(ended.id)
        return found

    async def _end_opened_before(self, call: Call, revocation: Revocation) -> None:
        """End the sessions of a user, or of all users, that were opened before the revocation."""
        until = revocation.wall + (CLOCK_SKEW_MS if self._store.shared else 0)
        while True:
            records = await call(self._store.list(revocation.user))
            ids = [record.id for record in records if record.created_at <= until]
            await self._end_ids(call, ids, revocation.code, revocation.wall)
            if len(ids) < MAX_LISTED or revocation.user is not None:
                return

    # --- after the store has lost data ---------------------------------------------------------------

    def repeat_after_loss(self) -> None:
        """Repeat all recent revocations for a while: other processes may restore the sessions."""
        since = self.clock.wall() - self.keep_ended_ms
        ended = self.registry.ended_since(Code.TOKEN_REVOKED, since)
        self._schedule([*self._replayed, *(Revocation(each.ended_at, each.id) for each in ended)])

    def _schedule(self, revocations: list[Revocation]) -> None:
        if revocations:
            now = self.clock.now()
            self._repeats.append(_Repeat([now + after_s for after_s in reversed(REPEATS_S)], revocations))
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
            self.tasks.run_in_background(self._repeat_due())

    async def _repeat_due(self) -> None:
        try:
            for repeat in list(self._repeats):
                now = self.clock.now()
                if repeat.times[-1] > now:
                    continue
                await self._end_again(self.breaker.call, repeat.revocations)
                while repeat.times and repeat.times[-1] <= now:
                    repeat.times.pop()
                if not repeat.times:
                    self._repeats.remove(repeat)
        except StoreUnavailable:
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


def end_here(registry: SessionRegistry, ended: EndedRecord) -> None:
    """End a session in the registry that has ended in the store."""
    if not registry.end(ended.id, ended.code, _REASONS[ended.code], ended.ended_at):
        registry.restore_ended(ended)
