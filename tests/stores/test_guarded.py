"""The guard of a store counts what is under way, and times all of it."""

from __future__ import annotations

import asyncio

import pytest

from tests.helpers import FakeClock, small_registry
from zcproto.sessions.health import StoreHealth
from zcproto.stores.guarded import GuardedStore
from zcproto.stores.memory import MemoryStore
from zcproto.stores.store import StoreUnavailable


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def guarded(clock: FakeClock) -> GuardedStore:
    health = StoreHealth(grace_s=60, timeout_s=5, random=lambda: 0.5, on_alert=lambda alert: None)
    return GuardedStore(MemoryStore(small_registry()), health, timeout=5, now=clock.now)


async def test_an_operation_is_under_way_until_it_is_done_and_is_timed(
    guarded: GuardedStore, clock: FakeClock
) -> None:
    go_on = asyncio.Event()
    asking = asyncio.create_task(guarded.ask(go_on.wait()))
    await asyncio.sleep(0)
    assert guarded.asking == 1
    assert sum(guarded.durations.counts) == 0
    clock.advance(0.3)
    go_on.set()
    assert await asking is True
    assert guarded.asking == 0
    assert sum(guarded.durations.counts) == 1
    assert guarded.durations.total == pytest.approx(0.3)


async def test_one_that_fails_or_is_cancelled_is_timed_too(guarded: GuardedStore, clock: FakeClock) -> None:
    async def fails() -> None:
        clock.advance(0.1)
        raise StoreUnavailable("a test wants it so")

    with pytest.raises(StoreUnavailable):
        await guarded.ask(fails())
    asking = asyncio.create_task(guarded.ask(asyncio.Event().wait()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert guarded.asking == 0
    assert sum(guarded.durations.counts) == 2


async def test_one_that_is_not_even_asked_is_not_timed(guarded: GuardedStore, clock: FakeClock) -> None:
    guarded.health.begin_outage(clock.now())
    with pytest.raises(StoreUnavailable):
        await guarded.ping()
    assert sum(guarded.durations.counts) == 0
