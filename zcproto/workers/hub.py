"""One store for several processes of one server: each has it as a shared store.

Decides: who is notified of a change, and which sessions count as in use.

Rules:
- One process has the store; the others reach it over a link (remote_store.py). Each process is a member.
- Every member but the one that made a change is notified of it, also if it was a repetition, because the first
  attempt may have failed after it took effect. If an outcome is unknown, all members check all sessions as soon as
  the store has done what came before.
- A member has a lease for each session that its connections use, until it gives it up or leaves. The leases of a
  member that has left count for RETURN_S: its clients are about to connect to another one.
- The sessions of all members together are bounded, by a count that each clean-up corrects.
- A claim is stored with the id of its member, which is its owner also after a crash of this process. It is an
  orphan as soon as that member has left; after a crash, RETURN_S after the first has joined again. One that has
  expired is given to another member once it has been an orphan for RETURN_S.
- A session without a lease counts as in use until the hub has run for the time of a lease: members need time to
  renew theirs after a crash of this process.

It must not know: how members reach it, connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import Final, TypeVar

from zcproto.common.clock import MS_PER_SECOND, Entropy
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.base import (
    LEASE_MS,
    Change,
    ChangeKind,
    Claim,
    ClaimState,
    Created,
    LimitReached,
    NotRotated,
    Repeated,
    SessionStore,
    StoreUnavailable,
    too_many_sessions,
)

RETURN_S: Final = 10.0
SETTLE_PAUSE_S: Final = 0.1
"""Between attempts to find out that the store has done what came before."""

MAX_SESSIONS: Final = 1_000_000
"""As in one process: about 600 bytes each, in the file or in memory."""

_EPOCH_SIZE: Final = 8

T = TypeVar("T")

OnChanges = Callable[[Sequence[Change]], object]
"""Called with changes by other members, in their order."""


class StoreHub:
    """The members of one store, which `open` opens. `now` returns monotonic seconds.

    `epoch` changes when the store has lost its data: it is empty at first if the store outlives this process.
    """

    def __init__(
        self, store: SessionStore, *, is_lasting: bool, now: Callable[[], float], entropy: Entropy
    ) -> None:
        self.store = store
        self._now = now
        self._entropy = entropy
        self._began = now()
        self._opening = asyncio.Lock()
        self._is_open = False
        self.giving_away = asyncio.Lock()
        """Held while an expired claim is given to another member."""
        self._settling: asyncio.Task[None] | None = None
        self._members: dict[HubStore, None] = {}
        self._left: dict[HubStore, float] = {}  # with when their leases end
        self.sessions = 0
        self._given_up: set[bytes] = set()  # while unknown sessions count as in use
        self._gone: set[bytes] = set()  # ids of members that left, while others may have to join again
        self._complete_at = inf
        self.epoch = b"" if is_lasting else entropy(_EPOCH_SIZE)

    async def open(self) -> None:
        """Open the store, unless it is open. Raises as `SessionStore.open`."""
        async with self._opening:
            if not self._is_open:
                await self.store.open(lambda change: None)
                self._is_open = True
                self.sessions = await self.store.count()

    async def close(self) -> None:
        """Close the store."""
        if self._settling is not None:
            self._settling.cancel()
        await self.store.close()
        self._is_open = False

    def member(self, id: bytes = b"") -> HubStore:
        """Return the store of one process. Its claims are those of earlier members with the same id."""
        return HubStore(self, id)

    def store_emptied(self) -> None:
        """Have the members write back what they know: the store has lost its data."""
        self.epoch = self._entropy(_EPOCH_SIZE)
        self.sessions = 0
        self.notify([Change(ChangeKind.EMPTIED)], None)

    # --- for members ---------------------------------------------------------------------------------

    def join(self, member: HubStore) -> None:
        self._members[member] = None
        if member.id:  # else it is that of this process
            self._complete_at = min(self._complete_at, self._now() + RETURN_S)

    def leave(self, member: HubStore) -> None:
        if member in self._members:
            del self._members[member]
            self._forget_left()
            self._left[member] = self._now() + RETURN_S
            if self._is_complete:
                self._gone.clear()
            else:
                self._gone.add(member.id)

    def has_left(self, member: HubStore) -> bool:
        """Return whether a member has left, and its process has not joined again."""
        return member in self._left and not any(each.id == member.id for each in self._members)

    def is_gone(self, id: bytes) -> bool:
        """Return whether the process with this id has left, or has not come back after a crash of this one.

        One without an id had the store to itself.
        """
        is_member = any(member.id == id for member in self._members)
        return not id or (not is_member and (self._is_complete or id in self._gone))

    def is_gone_for_good(self, id: bytes) -> bool:
        """Return whether the process with this id is gone and had RETURN_S to come back."""
        self._forget_left()
        return self.is_gone(id) and not any(member.id == id for member in self._left)

    @property
    def _is_complete(self) -> bool:
        """Whether all processes had the time to join."""
        return self._now() >= self._complete_at

    def ended(self, ended: Sequence[EndedRecord], by: HubStore, others: Iterable[bytes] = ()) -> None:
        """Notify the members of sessions that have ended now, and of others that may have ended before."""
        self.sessions -= len(ended)
        for member in self._members:
            member.held.difference_update(each.id for each in ended)
        changes = {id: Change(ChangeKind.SESSION, id) for id in others}
        changes |= {each.id: Change(ChangeKind.SESSION, each.id, each) for each in ended}
        self.notify([*changes.values()], by)

    def notify(self, changes: Sequence[Change], by: HubStore | None) -> None:
        """Notify the members, except the one that made the changes."""
        for member in list(self._members):
            if member is not by and changes:
                member.on_changes(changes)

    def outcome_unknown(self) -> None:
        """Have all members check all sessions after what has failed now is done, or will never be."""
        if self._settling is None:
            self._settling = asyncio.get_running_loop().create_task(self._settle(), name="zcproto-store")

    async def _settle(self) -> None:
        while True:
            try:
                await self.store.ping()  # comes after it
                break
            except (StoreUnavailable, ResourceExhausted):
                await asyncio.sleep(SETTLE_PAUSE_S)
        self._settling = None
        self.notify([Change(ChangeKind.ALL)], None)

    # --- leases --------------------------------------------------------------------------------------

    @property
    def _is_trusted(self) -> bool:
        return self._now() >= self._began + LEASE_MS / MS_PER_SECOND

    def give_up(self, ids: Iterable[bytes]) -> None:
        """Note that a member does not use sessions any more."""
        if self._is_trusted:
            self._given_up.clear()
        else:
            self._given_up.update(ids)

    def disconnected(self) -> Disconnected:
        """Return the sessions that no connection uses."""
        self._forget_left()
        holders = [member.held for member in (*self._members, *self._left)]
        return Disconnected(holders, None if self._is_trusted else self._given_up)

    def _forget_left(self) -> None:
        now = self._now()
        for member in [member for member, until in self._left.items() if until <= now]:
            del self._left[member]


class Disconnected:
    """The sessions without a lease; only those of `given_up`, unless it is None. Safe to read in another thread."""

    def __init__(self, holders: Sequence[set[bytes]], given_up: set[bytes] | None) -> None:
        self._holders = holders
        self._given_up = given_up

    def __contains__(self, id: object) -> bool:
        if any(id in held for held in self._holders):
            return False
        return self._given_up is None or id in self._given_up


class HubStore:
    """The store of one process, as in `SessionStore`. `held` are the sessions that it has leases for."""

    shared = True
    keeps_time = True

    def __init__(self, hub: StoreHub, id: bytes) -> None:
        self._hub = hub
        self.id = id
        self._store = hub.store
        self.held: set[bytes] = set()
        self.on_changes: OnChanges = lambda changes: None

    @property
    def keeps_changes(self) -> bool:
        return not self._hub.epoch

    async def open(self, on_change: Callable[[Change], None]) -> None:
        def hear(changes: Sequence[Change]) -> None:
            for change in changes:
                on_change(change)

        self.on_changes = hear
        await self._hub.open()
        self._hub.join(self)

    async def close(self) -> None:
        self._hub.leave(self)

    async def ping(self) -> None:
        await self._store.ping()

    async def examine(self, wall: int) -> Sequence[str]:
        return await self._store.examine(wall)

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Yield nothing: sessions are looked up when they are needed."""
        return
        yield ()  # makes it a generator

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        hub = self._hub
        if hub.sessions >= MAX_SESSIONS:
            raise too_many_sessions()
        if limit.when_full == "evict_disconnected":
            limit = replace(limit, disconnected=hub.disconnected())
        self.held.add(record.id)  # before it can be seen by another login
        created: Created | LimitReached | None = None
        try:
            created = await self._change(self._store.create(record, limit))
        finally:
            if not isinstance(created, Created):  # a failed login uses no session, whatever became of it
                self.held.discard(record.id)
        if isinstance(created, Created):
            hub.sessions += 1
            hub.ended(created.ended, self)
        return created

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        rotated = await self._change(self._store.rotate(rotation))
        if isinstance(rotated, SessionRecord) or (isinstance(rotated, NotRotated) and rotated.reused):
            self._hub.notify([Change(ChangeKind.SESSION, rotation.id)], self)
        return rotated

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return await self._store.find(token_digest)

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return await self._store.get(id)

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        await self._store.touch(uses)

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        self.held.update(id for id, is_used in uses if is_used)
        unused = [id for id, is_used in uses if not is_used]
        self.held.difference_update(unused)
        self._hub.give_up(unused)

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        ended = await self._change(self._store.end(ids, code, wall, user))
        self._hub.ended(ended, self, ids)
        return ended

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        ended = await self._change(self._store.end_user(user, code, wall))
        self._hub.ended(ended, self)
        return ended

    async def end_all(self, code: Code, wall: int) -> int:
        count = await self._change(self._store.end_all(code, wall))
        self._hub.sessions -= count
        self._hub.notify([Change(ChangeKind.ALL)], self)
        return count

    async def count(self) -> int:
        return await self._store.count()

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        removed = await self._store.expire(wall, keep_ended_ms, limit)
        if not removed:  # the clean-up ends
            self._hub.sessions = await self._store.count()
        return removed

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        claim = await self._store.claim(user, key, request_digest + self.id, lease_ms)
        if self._is_free(claim):
            async with self._hub.giving_away:
                claim = await self._store.claim(user, key, request_digest + self.id, lease_ms)
                if self._is_free(claim):  # no other member got it meanwhile
                    await self._store.release_claim(user, key)
                    claim = await self._store.claim(user, key, request_digest + self.id, lease_ms)
        if claim.state is ClaimState.NEW and self._hub.has_left(self):  # before it could begin
            await self._store.release_claim(user, key)
        is_orphan = claim.state is ClaimState.RUNNING and not claim.is_own and self._hub.is_gone(claim.owner)
        return replace(claim, is_orphan=is_orphan)

    def _is_free(self, claim: Claim) -> bool:
        """Return whether a claim has expired and its process is gone."""
        return claim.has_expired and self._hub.is_gone_for_good(claim.owner)

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        await self._store.keep_answer(user, key, answer, keep_ms)

    async def release_claim(self, user: str, key: str) -> None:
        await self._store.release_claim(user, key)

    async def _change(self, operation: Awaitable[T]) -> T:
        try:
            return await operation
        except StoreUnavailable:
            self._hub.outcome_unknown()
            raise

    # Last in the class, because its name hides the builtin in annotations.

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        return await self._store.list(user)
