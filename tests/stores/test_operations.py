"""The circuit breaker counts and times operations, and stops calling the store during an outage."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from tests.helpers import FakeClock, small_registry
from tests.stores.memory_store import MemoryStore
from zcproto.errors import ResourceExhausted, Unavailable
from zcproto.sessions.health import FAILURES, StoreHealth
from zcproto.stores.base import StoreUnavailable, too_many_operations
from zcproto.stores.operations import BackgroundTasks, CircuitBreaker


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def breaker(clock: FakeClock) -> CircuitBreaker:
    health = StoreHealth(grace_s=60, timeout_s=5, random=lambda: 0.5, on_alert=lambda alert: None)
    return CircuitBreaker(MemoryStore(small_registry()), health, timeout=5, now=clock.now)


async def test_operation_in_progress_is_counted_and_timed_when_it_ends(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    finish = asyncio.Event()
    running = asyncio.create_task(breaker.call(finish.wait()))
    await asyncio.sleep(0)
    assert breaker.in_flight == 1
    assert sum(breaker.durations.counts) == 0
    clock.advance(0.3)
    finish.set()
    assert await running is True
    assert breaker.in_flight == 0
    assert sum(breaker.durations.counts) == 1
    assert breaker.durations.total == pytest.approx(0.3)


async def test_failed_and_cancelled_operations_are_timed_too(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    async def fails() -> None:
        clock.advance(0.1)
        raise StoreUnavailable("the test makes it fail")

    with pytest.raises(StoreUnavailable):
        await breaker.call(fails())
    assert breaker.reason == "the test makes it fail"
    running = asyncio.create_task(breaker.call(asyncio.Event().wait()))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert breaker.in_flight == 0
    assert sum(breaker.durations.counts) == 2


async def test_operation_that_exceeds_the_timeout_raises_store_unavailable(breaker: CircuitBreaker) -> None:
    breaker.timeout = 0.01
    with pytest.raises(StoreUnavailable, match="no answer within 10 ms"):
        await breaker.call(asyncio.Event().wait())
    assert breaker.health.failures == 1


async def test_during_an_outage_the_store_is_not_called(breaker: CircuitBreaker, clock: FakeClock) -> None:
    breaker.check()
    breaker.health.begin_outage(clock.now())
    operation = breaker.store.ping()
    with pytest.raises(StoreUnavailable, match="calls are suspended"):
        await breaker.call(operation)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        await operation
    assert sum(breaker.durations.counts) == 0
    with pytest.raises(Unavailable) as refused:
        breaker.check()
    assert refused.value.details is not None
    assert refused.value.details["retry_after_ms"] >= 100


async def test_attempt_calls_the_store_even_during_an_outage(
    breaker: CircuitBreaker, clock: FakeClock
) -> None:
    breaker.health.begin_outage(clock.now())
    assert await breaker.attempt(breaker.store.count()) == 0
    assert sum(breaker.durations.counts) == 0


async def test_refused_operation_is_not_counted_as_a_failure(breaker: CircuitBreaker) -> None:
    async def refuse() -> None:
        raise too_many_operations()

    for _ in range(FAILURES):
        with pytest.raises(ResourceExhausted):
            await breaker.call(refuse())
    assert breaker.health.is_healthy
    assert not breaker.health.failures


async def test_operation_that_ended_while_the_loop_was_blocked_is_not_late(breaker: CircuitBreaker) -> None:
    loop, breaker.timeout = asyncio.get_running_loop(), 0.004
    answered = loop.create_future()
    running = asyncio.create_task(breaker.call(answered))
    await asyncio.sleep(0)
    # The loop stands still for longer than the timeout. Then it takes two turns to read the answer.
    until = loop.time() + 2 * breaker.timeout
    while time.monotonic() < until:
        pass
    loop.call_soon(loop.call_soon, answered.set_result, "answer")
    assert await running == "answer"
    assert breaker.health.is_healthy


async def test_store_that_keeps_time_is_not_timed_again(
    breaker: CircuitBreaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStore, "keeps_time", True)
    breaker.timeout = 0.0
    assert await breaker.call(asyncio.sleep(0.001, "late")) == "late"


async def test_failure_of_a_task_whose_caller_is_gone_is_not_reported() -> None:
    tasks, gate = BackgroundTasks(), asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise StoreUnavailable("too late")

    caller = asyncio.create_task(tasks.finish(fail()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    del caller  # its traceback refers to the task
    gate.set()
    await asyncio.wait(tasks.running.copy())
    await asyncio.sleep(0)
    gc.collect()  # it would report the exception of a task that no caller has retrieved
