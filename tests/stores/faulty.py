"""A store with faults: it fails, hangs, is slow, or does an operation and reports a failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from tests.stores.memory_store import MemoryStore
from zcproto.errors import Code
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.base import (
    Change,
    ChangeKind,
    Claim,
    Created,
    DamagedRecord,
    LimitReached,
    NotRotated,
    Repeated,
    StoreUnavailable,
    too_many_operations,
)

T = TypeVar("T")

WORKS, FAILS, BUSY, HANGS, FAILS_AFTER, HANGS_AFTER, READ_ONLY, DAMAGED = (
    "works",
    "fails",
    "refuses more operations",
    "hangs",
    "fails after doing it",
    "hangs after doing it",
    "is read-only",
    "meets a damaged record",
)

READS = frozenset({"find", "get", "list", "count"})


class FaultyStore:
    """A MemoryStore with its own registry, like one in another process.

    `mode` applies to all operations, `modes` to single ones by name. `calls` are the names of operations called.
    Each operation waits for `gate`, if set, before it is done, and for its event in `late` afterwards. `hung` is
    called when a hanging operation is cancelled.
    """

    keeps_time = False
    keeps_changes = False

    def __init__(
        self, settings: SessionSettings, entropy: Callable[[int], bytes], *, shared: bool = False
    ) -> None:
        self.settings = settings
        self.entropy = entropy
        self.shared = shared
        self.mode = WORKS
        self.modes: dict[str, str] = {}
        self.calls: list[str] = []
        self.gate: asyncio.Event | None = None
        self.late: dict[str, asyncio.Event] = {}
        self.hung: Callable[[], object] = lambda: None
        self.problems: list[str] = []
        self.holder = f"process {id(self)}"
        self.opened = 0
        self.closed = 0
        self.on_change: Callable[[Change], None] = lambda change: None
        self.lose_all()

    def lose_all(self) -> None:
        """Lose all data, as in a restart without persistence."""
        self.registry = SessionRegistry(self.settings, self.entropy)
        self.inner: Any = MemoryStore(self.registry)

    def roll_back(self, records: Sequence[SessionRecord]) -> None:
        """Return to an earlier state, as in a failover to a replica that lacks the last writes."""
        self.lose_all()
        for record in records:
            self.registry.restore(record)

    @property
    def records(self) -> Sequence[SessionRecord]:
        return self.registry.records(None, self.registry.kept)

    def use_data_of(self, other: FaultyStore) -> None:
        """Reach the same data as another store."""
        self.registry, self.inner = other.registry, other.inner

    def report_change(self, session_id: bytes, ended: EndedRecord | None = None) -> None:
        """Report a session as changed by another process, or how it ended."""
        self.on_change(Change(ChangeKind.SESSION, session_id, ended))

    def report_all_changed(self) -> None:
        self.on_change(Change(ChangeKind.ALL))

    async def called(self, name: str) -> None:
        """Wait until an operation of this name is called."""
        while name not in self.calls:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0)

    async def _do(self, name: str, operation: Coroutine[Any, Any, T]) -> T:
        self.calls.append(name)
        mode = self.modes.get(name, self.mode)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if mode == FAILS or (mode == READ_ONLY and name not in READS):
                raise StoreUnavailable("the test makes it fail")
            if mode == DAMAGED:
                raise DamagedRecord("the test damages it")
            if mode == BUSY:
                raise too_many_operations()
            if mode == HANGS:
                await self._hang()
            result = await operation
            if name in self.late:
                await self.late[name].wait()
            if mode == FAILS_AFTER:
                raise StoreUnavailable("the test makes it fail")
            if mode == HANGS_AFTER:
                await self._hang()
            return result
        finally:
            operation.close()

    async def _hang(self) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.hung()
            raise

    async def open(self, on_change: Callable[[Change], None]) -> None:
        self.on_change = on_change
        await self._do("open", self.inner.open(on_change))
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def ping(self) -> None:
        await self._do("ping", self.inner.ping())

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        if self.shared:
            return
        records = self.registry.records(None, self.registry.kept)
        for first in range(0, len(records), 1_000):
            await self._do("load", asyncio.sleep(0))
            yield records[first : first + 1_000]

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        self.inner.holder = self.holder
        return await self._do("create", self.inner.create(record, limit))

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        return await self._do("rotate", self.inner.rotate(rotation))

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return await self._do("find", self.inner.find(token_digest))

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return await self._do("get", self.inner.get(id))

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        await self._do("touch", self.inner.touch(uses))

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        self.inner.holder = self.holder
        await self._do("lease", self.inner.lease(uses))

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        return await self._do("end", self.inner.end(ids, code, wall, user))

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return await self._do("end_user", self.inner.end_user(user, code, wall))

    async def end_all(self, code: Code, wall: int) -> int:
        return await self._do("end_all", self.inner.end_all(code, wall))

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        return await self._do("list", self.inner.list(user))

    async def examine(self, wall: int) -> Sequence[str]:
        return await self._do("examine", asyncio.sleep(0, self.problems))

    async def count(self) -> int:
        return await self._do("count", self.inner.count())

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        return await self._do("expire", self.inner.expire(wall, keep_ended_ms, limit))

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        return await self._do("claim", self.inner.claim(user, key, request_digest, lease_ms))

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        await self._do("keep_answer", self.inner.keep_answer(user, key, answer, keep_ms))

    async def release_claim(self, user: str, key: str) -> None:
        await self._do("release_claim", self.inner.release_claim(user, key))
