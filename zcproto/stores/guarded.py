"""A store that nobody waits for while it is out.

What this file decides: nothing; the health does. Each operation ends within the store's timeout, whatever the store
does, and fails at once while the health says that it is not asked.

It must not know: what an operation is for, what is done about an outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from zcproto.errors import Code
from zcproto.observe.histogram import WAITED_S, Histogram
from zcproto.sessions.health import StoreHealth
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.store import (
    Change,
    Claim,
    Created,
    LimitReached,
    NotRotated,
    Rotated,
    SessionStore,
    StoreUnavailable,
)

T = TypeVar("T")


class GuardedStore:
    """A store by its health. `timeout` is in seconds, `now` gives monotonic ones.

    `reason` is what the store last failed for; `asking` are the operations under way, `durations` how long others
    took, in seconds. `attempt` is for probes: it asks in any state, and what comes of it
    is not counted.
    """

    def __init__(
        self, store: SessionStore, health: StoreHealth, *, timeout: float, now: Callable[[], float]
    ) -> None:
        self.store = store
        self.health = health
        self.timeout = timeout
        self.reason = ""
        self.asking = 0
        self.durations = Histogram(WAITED_S)
        self._now = now

    @property
    def shared(self) -> bool:
        return self.store.shared

    async def ask(self, operation: Coroutine[Any, Any, T]) -> T:
        """What the store answers. Raises StoreUnavailable."""
        if not self.health.is_asked:
            operation.close()
            raise StoreUnavailable("it is out, and is not asked")
        began = self._now()
        self.asking += 1
        try:
            return await self.attempt(operation)
        except StoreUnavailable as error:
            self.reason = error.reason
            now = self._now()
            self.health.failed(now, now - began)
            raise
        finally:
            self.asking -= 1
            self.durations.add(self._now() - began)

    async def attempt(self, operation: Coroutine[Any, Any, T], within: float | None = None) -> T:
        """As `ask`, whatever the health."""
        limit = self.timeout if within is None else within
        try:
            async with asyncio.timeout(limit):
                return await operation
        except TimeoutError:
            raise StoreUnavailable(f"no answer within {limit * 1000:.0f} ms") from None

    # The operations, guarded

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        return await self.ask(self.store.create(record, limit))

    async def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        return await self.ask(self.store.rotate(rotation))

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return await self.ask(self.store.find(token_digest))

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return await self.ask(self.store.get(id))

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        await self.ask(self.store.touch(uses))

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        return await self.ask(self.store.end(ids, code, wall, user))

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return await self.ask(self.store.end_user(user, code, wall))

    async def end_all(self, code: Code, wall: int) -> int:
        return await self.ask(self.store.end_all(code, wall))

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        return await self.ask(self.store.list(user))

    async def count(self) -> int:
        return await self.ask(self.store.count())

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        return await self.ask(self.store.expire(wall, keep_ended_ms, limit))

    async def claim(self, user: str, key: str, request_digest: bytes, wall: int, lease_ms: int) -> Claim:
        return await self.ask(self.store.claim(user, key, request_digest, wall, lease_ms))

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        await self.ask(self.store.keep_answer(user, key, answer, wall, keep_ms))

    async def release_claim(self, user: str, key: str) -> None:
        await self.ask(self.store.release_claim(user, key))

    async def ping(self) -> None:
        await self.ask(self.store.ping())

    # These have no answer that a call waits for

    async def open(self, on_change: Callable[[Change], None]) -> None:
        await self.store.open(on_change)

    async def close(self) -> None:
        await self.store.close()

    def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        return self.store.load()
