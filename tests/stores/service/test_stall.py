"""A process that did not run for a while accepts no token before the store has answered."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.faulty import FAILS, HANGS, WORKS
from tests.stores.service.harness import TIMEOUT, FaultyStoreView, Log, SessionProcess, StartProcess, raw
from tests.workers.hub_harness import until
from zcproto.errors import Code
from zcproto.sessions.health import MAX_DELAY_S, HealthState
from zcproto.stores.base import HEARTBEAT_S

LIMIT = HEARTBEAT_S + TIMEOUT


async def run_for(process: SessionProcess, seconds: float) -> None:
    for _ in range(round(seconds / 0.05)):
        await process.advance(0.05)


@pytest.mark.parametrize("grace", [0.0, 300.0])
async def test_session_revoked_during_a_stall_is_never_accepted(
    one: SessionProcess, start_process: StartProcess, grace: float, log: Log
) -> None:
    other = await start_process(FaultyStoreView(one.store), heartbeat=HEARTBEAT_S, grace=grace)
    revoked, unused, kept = await one.open(), await one.open(), await one.open()
    for each in (revoked, unused, kept):
        await other.find(each.token)
    other.use(revoked)
    other.use(kept)
    await run_for(other, 2.0)
    assert other.is_valid(revoked)
    await one.revoke(revoked)
    await one.revoke(unused)
    generation = other.registry.generation
    other.clock.advance(LIMIT)  # the first request comes before any timer
    for each in (revoked, unused, kept):
        assert other.check(each.token) is Code.UNAVAILABLE
    other.store.late["ping"] = asyncio.Event()
    other.timers.advance(other.clock.now() - other.timers.time())
    await until(lambda: other.registry.generation > generation)  # connections check their sessions again
    assert other.check(kept.token) is Code.UNAVAILABLE
    other.store.report_change(raw(revoked))
    other.store.report_change(raw(unused))
    other.store.late.pop("ping").set()
    await other.settle()
    assert other.is_valid(kept)
    assert await other.find(revoked.token) is Code.TOKEN_REVOKED
    assert await other.find(unused.token) is Code.TOKEN_REVOKED
    assert log.events.count("store.stalled") == 1
    await run_for(other, 2.0)
    assert other.is_valid(kept)
    assert other.state is HealthState.HEALTHY


async def test_changes_are_applied_before_trust_returns(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(FaultyStoreView(one.store), heartbeat=HEARTBEAT_S)
    opened = await one.open()
    await other.join(opened)
    await one.revoke(opened)
    other.store.late["get"] = asyncio.Event()
    other.store.report_change(raw(opened))
    other.clock.advance(LIMIT)
    other.timers.advance(other.clock.now() - other.timers.time())
    await until(lambda: {*other.store.calls[-2:]} == {"get", "ping"})
    assert other.check(opened.token) is Code.UNAVAILABLE
    other.store.late.pop("get").set()
    await other.settle()
    assert other.check(opened.token) is Code.TOKEN_REVOKED


async def test_machine_that_slept_is_noticed_by_the_wall_clock(start_process: StartProcess) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S)
    opened = await process.open()
    process.use(opened)
    process.clock.wall_ms += 60_000
    assert process.check(opened.token) is Code.UNAVAILABLE
    await process.advance(0.2)
    assert process.is_valid(opened)


async def test_stall_is_noticed_although_the_wall_clock_went_back(start_process: StartProcess) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S)
    opened = await process.open()
    process.use(opened)
    await process.advance(0.1)
    process.store.calls.clear()
    process.clock.wall_ms -= 60_000
    process.clock.advance(LIMIT)
    process.store.late["ping"] = asyncio.Event()
    process.timers.advance(process.clock.now() - process.timers.time())
    assert process.check(opened.token) is Code.UNAVAILABLE
    process.store.late.pop("ping").set()
    await process.settle()
    assert process.store.calls == ["ping"]
    assert process.is_valid(opened)


async def test_connections_check_their_sessions_again_after_the_wall_clock_went_back(
    start_process: StartProcess,
) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S)
    await process.advance(LIMIT / 4)
    generation = process.registry.generation
    process.clock.wall_ms -= 60_000
    await process.advance(LIMIT / 4)
    assert process.registry.generation > generation
    assert process.registry.trusted_until <= process.clock.wall() + LIMIT * 1000
    generation = process.registry.generation
    await run_for(process, LIMIT)
    assert process.registry.generation == generation


@pytest.mark.parametrize("mode", [FAILS, HANGS])
async def test_grace_of_an_outage_after_a_stall_began_with_the_stall(
    start_process: StartProcess, mode: str
) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S, grace=60.0)
    opened = await process.open()
    process.use(opened)
    process.store.mode = mode
    await process.advance(20.0)
    assert process.state is not HealthState.HEALTHY
    assert process.is_valid(opened)
    await run_for(process, 25.0)
    assert process.is_valid(opened)
    await run_for(process, 16.0)
    assert process.registry.closed
    process.store.mode = WORKS
    await run_for(process, MAX_DELAY_S)
    assert process.is_valid(opened)


async def test_failing_store_after_a_stall_longer_than_the_grace_refuses_all(
    start_process: StartProcess,
) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S, grace=60.0)
    opened = await process.open()
    process.use(opened)
    process.store.mode = FAILS
    process.clock.wall_ms += 61_000  # the machine slept, and its monotonic clock stood still
    await process.advance(0.2)
    assert process.registry.closed


async def test_stall_during_an_outage_does_not_end_the_grace(start_process: StartProcess) -> None:
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S, grace=60.0)
    opened = await process.open()
    process.use(opened)
    await process.outage()
    await run_for(process, 2.0)
    assert process.is_valid(opened)
    for _ in range(2):
        await process.advance(LIMIT)
        assert process.is_valid(opened)
    process.clock.wall_ms += 30_000
    await run_for(process, 0.2)
    assert process.is_valid(opened)
    await run_for(process, 28.0)
    assert process.registry.closed
    process.store.mode = WORKS
    await run_for(process, 2 * MAX_DELAY_S)
    assert process.is_valid(opened)


async def test_store_that_does_not_answer_after_a_stall_is_an_outage_with_a_grace(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of another process keeps the time of its operations, for longer than tokens can be refused."""
    process = await start_process(shared=True, heartbeat=HEARTBEAT_S)
    opened = await process.open()
    process.use(opened)
    process.store.keeps_time = True
    process.store.late["ping"] = asyncio.Event()
    await process.advance(LIMIT)
    assert process.state is not HealthState.HEALTHY
    assert process.is_valid(opened)
    process.store.late.pop("ping").set()
    await process.recover()


async def test_process_with_its_own_store_is_trusted_after_a_stall(start_process: StartProcess) -> None:
    process = await start_process(heartbeat=HEARTBEAT_S)
    opened = await process.open()
    process.clock.advance(10 * LIMIT)
    assert process.is_valid(opened)
