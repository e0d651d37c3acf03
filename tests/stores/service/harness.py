"""A process whose store works, fails or hangs as a test requires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock, FakeTimers
from tests.sessions.helpers import CountedEntropy
from tests.stores.faulty import FAILS, WORKS, FaultyStore
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import CallError, Code, Unavailable
from zcproto.sessions import OpenedSession, Session, SessionRegistry, SessionSettings
from zcproto.sessions.health import MAX_DELAY_S, HealthState
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.token import id_from_text
from zcproto.stores.operations import UPKEEP
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.service import StoredSessionService
from zcproto.stores.sync import StoreSync

TIMEOUT = 0.25
GRACE = 300.0
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
ADDRESS = "192.0.2.7"
CLIENT = "test/1"


class SessionProcess:
    """The registry, the sync and the sessions of one process. Its store may be shared with another."""

    def __init__(
        self,
        folder: Path,
        store: FaultyStore,
        clock: FakeClock,
        entropy: CountedEntropy,
        *,
        pending_limit: int = 1_000,
        grace: float = GRACE,
        heartbeat: float = inf,
        **settings: Any,
    ) -> None:
        self.clock = clock
        self.store = store
        self.timers = FakeTimers(clock.now())
        self.settings = SessionSettings(**settings)
        self.registry = SessionRegistry(self.settings, entropy)
        self.ended: list[tuple[str, Code, str]] = []
        self.registry.observers.append(lambda *reported: self.ended.append(reported))
        self.used: set[str] = set()
        self.pending = PendingRevocations(folder / "revocations.pending", limit=pending_limit)
        self.sync = StoreSync(
            store,
            self.registry,
            self.pending,
            is_used=self.used.__contains__,
            in_use=lambda: self.used,
            wheel=DeadlineWheel(self.timers),
            clock=clock,
            random=lambda: 0.5,
            timeout=TIMEOUT,
            grace=grace,
            heartbeat=heartbeat,
            keep_ended_ms=self.settings.dead_keep_ms,
        )
        self.sessions = StoredSessionService(self.sync, clock)
        store.hung = lambda: clock.advance(TIMEOUT)

    # --- calls -------------------------------------------------------------------------------------

    async def open(self, user: str = "ada", **options: Any) -> OpenedSession:
        return await self.sessions.open(user, **{"client": CLIENT, "address": ADDRESS, **options})

    async def refresh(self, opened: OpenedSession, **options: Any) -> OpenedSession:
        assert opened.refresh_token is not None
        return await self.sessions.refresh(
            opened.refresh_token, **{"client": CLIENT, "address": ADDRESS, **options}
        )

    async def revoke(self, opened: OpenedSession, user: str | None = "ada") -> bool:
        return await self.sessions.revoke(opened.session.id, user=user, reason="asked for")

    async def find(self, token: bytes, address: str = ADDRESS) -> Session | Code:
        """Check a token like a connection does: here first, then in the store."""
        found = self.check(token)
        if self.sessions.looks_up and found in (Code.UNAUTHENTICATED, Code.TOKEN_EXPIRED):
            assert isinstance(found, Code)
            await self.sessions.look_up(token, address, found)
            return self.check(token)
        return found

    def check(self, token: bytes) -> Session | Code:
        return self.registry.check(token, self.clock.wall())

    def is_valid(self, opened: OpenedSession) -> bool:
        found = self.check(opened.token)
        return isinstance(found, Session) and found.id == opened.session.id

    def use(self, opened: OpenedSession) -> None:
        """A connection uses this session."""
        self.used.add(opened.session.id)

    async def join(self, *sessions: OpenedSession) -> None:
        """Use sessions of another process: this one finds them in the store."""
        for opened in sessions:
            await self.find(opened.token)
            self.use(opened)

    def stored(self, opened: OpenedSession) -> SessionRecord:
        """Return a session as the store has it."""
        record = self.store.registry.record(raw(opened))
        assert record is not None
        return record

    # --- time --------------------------------------------------------------------------------------

    async def advance(self, seconds: float) -> None:
        """Advance the time and finish all tasks that start in it."""
        self.clock.advance(seconds)
        self.timers.advance(self.clock.now() - self.timers.time())
        await self.settle()

    async def settle(self) -> None:
        for _ in range(1_000):
            running = [task for task in self.sync.tasks.running if task.get_name() != UPKEEP]
            if not running:
                return
            await asyncio.wait(running)
            await asyncio.sleep(0)
        raise AssertionError("tasks never end")

    async def recover(self) -> None:
        """Make the store work again, and wait until it is probed."""
        self.store.mode = WORKS
        self.store.modes.clear()
        await self.advance(MAX_DELAY_S)
        assert self.state is HealthState.HEALTHY

    async def outage(self, mode: str = FAILS) -> None:
        self.store.mode = mode
        self.sync.health.begin_outage(self.clock.now())
        await self.settle()

    @property
    def state(self) -> HealthState:
        return self.sync.health.state


class Log(list[dict[str, Any]]):
    """The lines that were logged."""

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self]

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of an event."""
        return [line for line in self if line["event"] == event]


StartProcess = Callable[..., Awaitable[SessionProcess]]


def raw(opened: OpenedSession) -> bytes:
    session_id = id_from_text(opened.session.id)
    assert session_id is not None
    return session_id


async def refused(work: Awaitable[Any], kind: type[CallError] = Unavailable) -> CallError:
    with pytest.raises(kind) as caught:
        await work
    return caught.value


async def cancel_and_wait(work: asyncio.Future[Any]) -> None:
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


def report_data_loss(process: SessionProcess) -> None:
    from zcproto.stores.base import Change, ChangeKind

    process.store.on_change(Change(ChangeKind.EMPTIED))


def start_opening(process: SessionProcess) -> asyncio.Future[OpenedSession]:
    return asyncio.ensure_future(process.open())


class FaultyStoreView(FaultyStore):
    """The same store as another process reaches it: with faults of its own."""

    def __init__(self, store: FaultyStore) -> None:
        super().__init__(store.settings, store.entropy, shared=store.shared)
        self.use_data_of(store)


class StoreWithOtherFind:
    """A MemoryStore whose `find` is another."""

    def __init__(self, inner: Any, find: Any) -> None:
        self._inner = inner
        self.find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
