"""Sessions in memory behind the contract of stores, for tests.

The registry that checks tokens is the store, so there is one copy of each session. No coroutine here suspends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from zcproto.common.clock import MonotonicClock, system_clock
from zcproto.errors import CallError, Code, ResourceExhausted
from zcproto.sessions import EndReason
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.sessions.registry import SessionRegistry
from zcproto.stores.answers import AnswerLimits, Answers
from zcproto.stores.base import (
    LEASE_MS,
    MAX_LISTED,
    Change,
    Claim,
    Created,
    LimitReached,
    NotRotated,
    Repeated,
)

_SLOTS_EACH = 4
"""The most that `SessionRegistry.clean` counts for one entry, so that it removes at most the limit."""


class MemoryStore:
    """A store with the sessions of a registry."""

    __slots__ = ("_answers", "_last", "_leases", "_registry", "holder", "time")

    def __init__(
        self,
        registry: SessionRegistry,
        answers: AnswerLimits | None = None,
        time: Callable[[], int] | None = None,
    ) -> None:
        self._registry = registry
        self._last: dict[bytes, Rotation] = {}  # the last rotation of a session, if it has a sealed pair
        self._leases: dict[bytes, dict[str, int]] = {}
        self.time = time or MonotonicClock(system_clock).wall
        self.holder = "this process"
        """The process that calls."""
        self._answers = Answers(answers or AnswerLimits(bytes=16 << 20), self.time)

    @property
    def shared(self) -> bool:
        return False

    @property
    def keeps_time(self) -> bool:
        return False

    @property
    def keeps_changes(self) -> bool:
        return False

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def ping(self) -> None:
        """Do nothing."""

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Yield nothing: the registry has all sessions."""
        return
        yield []  # makes it a generator

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        """Create a session as in `SessionStore.create`, with the idle limit of the registry.

        Raises ResourceExhausted if the registry is full.
        """
        registry = self._registry
        if registry.ended(record.id) is not None or registry.record(record.id) is not None:
            return Created()
        mates = registry.records(record.user, registry.kept)
        if limit.when_full == "evict_disconnected":
            found = {
                mate.id
                for mate in mates
                if mate.id in limit.disconnected or self._is_disconnected(mate, limit.counts_expired)
            }
            limit = replace(limit, disconnected=found)
        ending = limit.make_room(mates, record.created_at)
        if ending is None:
            return LimitReached()
        if registry.kept - len(ending) >= registry.settings.max_sessions:
            raise ResourceExhausted("full", {"retry_after_ms": 10_000})
        ended = []
        for mate, code in ending:
            ended += self._end([mate], code, record.created_at)
        registry.restore(record)
        self._leases[record.id] = {self.holder: self.time() + LEASE_MS}
        return Created(tuple(ended))

    def _is_disconnected(self, record: SessionRecord, counts_expired: bool) -> bool:
        leases = self._leases.get(record.id)
        return leases is not None and all(
            holder == "" or (counts_expired and until <= self.time()) for holder, until in leases.items()
        )

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        for id, is_used in uses:
            leases = self._leases.setdefault(id, {})
            leases.pop(self.holder, None)
            if is_used:
                leases[self.holder] = self.time() + LEASE_MS
            else:
                leases[""] = self.time()

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        registry = self._registry
        record = registry.record(rotation.id)
        if record is not None and record.refresh_digest == rotation.refresh_digest:
            return record
        last = self._last.get(rotation.id)
        if (
            record is not None
            and last is not None
            and (last.spent_digest, last.token_digest) == (rotation.spent_digest, record.token_digest)
            and (record.client, record.address) == (rotation.client, rotation.address)
            and rotation.wall < last.wall + last.grace_ms
        ):
            return Repeated(record, last.sealed)
        reused = registry.refresh_reused
        try:
            rotated = registry.rotate(rotation)[0]
            if rotation.grace_ms:
                self._last[rotation.id] = rotation
            return rotated
        except CallError as refused:
            return NotRotated(refused.code, registry.refresh_reused > reused)

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return self._registry.record_of(token_digest)

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return self._registry.record(id) or self._registry.ended(id)

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        for id, used_at in uses:
            record = self._registry.record(id)
            if record is not None and used_at > record.last_used_at:
                self._registry.restore(record._replace(last_used_at=used_at))

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        records = [record for id in ids if (record := self._registry.record(id)) is not None]
        return self._end([record for record in records if user in (None, record.user)], code, wall)

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return self._end(self._registry.records(user, self._registry.kept), code, wall)

    async def end_all(self, code: Code, wall: int) -> int:
        return len(self._end(self._registry.records(None, self._registry.kept), code, wall))

    def _end(self, records: list[SessionRecord], code: Code, wall: int) -> list[EndedRecord]:
        return [
            EndedRecord(record.id, record.token_digest, code, wall)
            for record in records
            if self._registry.end(record.id, code, EndReason.UNKNOWN, wall)
        ]

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        return self._registry.records(user, MAX_LISTED if user is None else self._registry.kept)

    async def examine(self, wall: int) -> Sequence[str]:
        return ()

    async def count(self) -> int:
        return self._registry.kept

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove expired entries in a part of the table. The registry decides how long tombstones are kept."""
        registry = self._registry
        kept, remembered = registry.kept, registry.tombstones
        registry.clean(wall, _SLOTS_EACH * limit)
        ended = kept - registry.kept
        removed = ended + (remembered + ended - registry.tombstones)
        return removed + self._answers.expire(limit - min(removed, limit))

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        """Claim a request as in `SessionStore.claim`. Raises ResourceExhausted."""
        return self._answers.claim(user, key, request_digest, lease_ms)

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        self._answers.keep(user, key, answer, keep_ms)

    async def release_claim(self, user: str, key: str) -> None:
        self._answers.release(user, key)
