"""Tests of cancelling coroutines started eagerly, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.server.eager_harness import Outcome, TaskHarness, forever, harness, loop, ready, tasks, warm
from zcproto.server.eager import EagerWorker

__all__ = ["harness", "loop", "tasks", "warm"]


def test_cancel_raises_where_the_coroutine_waits(harness: TaskHarness, warm: None) -> None:
    cleaned = []

    async def coroutine() -> None:
        try:
            await forever()
        finally:
            cleaned.append(True)

    worker, outcome = harness.waiting(coroutine())
    harness.turns()
    harness.in_loop(worker.cancel)
    harness.finish(outcome)
    assert isinstance(outcome.error, asyncio.CancelledError)
    assert cleaned == [True]


def test_cancel_before_first_task_step_reaches_the_coroutine(harness: TaskHarness, warm: None) -> None:
    cleaned = []

    async def coroutine() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            cleaned.append(True)
            raise

    outcome = Outcome()

    def step() -> None:
        worker = harness.tasks.start(coroutine())
        worker.done = outcome
        worker.cancel()

    harness.in_loop(step)
    harness.finish(outcome)
    assert isinstance(outcome.error, asyncio.CancelledError)
    assert cleaned == [True]


@pytest.mark.parametrize("when", ["before the task has begun", "before it goes on", "later"])
def test_cancel_reaches_the_awaited_future(
    harness: TaskHarness, loop: asyncio.AbstractEventLoop, warm: None, when: str
) -> None:
    children: list[str] = []

    async def child() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            children.append("cancelled")
            raise

    async def coroutine() -> None:
        await asyncio.gather(child(), child())

    outcome = Outcome()

    def step() -> EagerWorker:
        worker = harness.tasks.start(coroutine())
        worker.done = outcome
        if when == "before the task has begun":
            worker.cancel()
        elif when == "before it goes on":
            loop.call_soon(loop.call_soon, worker.cancel)
        return worker

    worker = harness.in_loop(step)
    if when == "later":
        harness.turns()
        assert outcome.calls == 0
        harness.in_loop(worker.cancel)
    harness.finish(outcome)
    harness.turns()
    assert isinstance(outcome.error, asyncio.CancelledError)
    # Children that have not begun never do; the others are cancelled where they wait.
    assert children in ([], ["cancelled"] * 2)
    assert [task for task in asyncio.all_tasks(loop) if task.get_name() != "zcproto-handler"] == []


def test_cancelled_coroutine_may_wait_while_cleaning_up(harness: TaskHarness, warm: None) -> None:
    async def coroutine() -> str:
        try:
            await forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)
            return "cleaned up"
        return "never"

    worker, outcome = harness.waiting(coroutine())
    harness.in_loop(worker.cancel)
    assert harness.finish(outcome).result == "cleaned up"


def test_cancel_after_the_end_does_nothing(harness: TaskHarness) -> None:
    async def coroutine() -> int:
        await asyncio.sleep(0)
        return 1

    worker, outcome = harness.waiting(coroutine())
    harness.finish(outcome)
    harness.in_loop(worker.cancel)
    assert harness.value(ready(2)) == 2
    assert harness.outcome(coroutine()).result == 1


def test_cancel_reaches_only_its_coroutine(harness: TaskHarness) -> None:
    async def coroutine() -> str:
        await asyncio.sleep(0.001)
        return "untroubled"

    victim, cancelled = harness.waiting(forever())
    others = [harness.waiting(coroutine())[1] for _ in range(5)]
    harness.in_loop(victim.cancel)
    harness.finish(cancelled)
    assert isinstance(cancelled.error, asyncio.CancelledError)
    assert [harness.finish(other).result for other in others] == ["untroubled"] * 5


def cancel_current_task() -> None:
    task = asyncio.current_task()
    task.cancel()


def test_self_cancel_at_the_end_does_not_affect_others(harness: TaskHarness, warm: None) -> None:
    async def coroutine(wait: bool) -> str:
        if wait:
            await asyncio.sleep(0)
        cancel_current_task()
        return "ended"

    async def innocent() -> tuple[int, str]:
        task = asyncio.current_task()
        before = task.cancelling()
        await asyncio.sleep(0)
        return before, "untroubled"

    def step() -> tuple[Outcome, Outcome]:
        assert harness.tasks.start(coroutine(wait=False)) is None
        outcomes = Outcome(), Outcome()
        for outcome in outcomes:
            worker = harness.tasks.start(innocent())
            worker.done = outcome
        return outcomes

    for outcome in harness.in_loop(step):
        assert harness.finish(outcome).result == (0, "untroubled")
    assert harness.outcome(coroutine(wait=True)).result == "ended"
    assert harness.outcome(innocent()).result == (0, "untroubled")


def test_self_cancel_before_waiting_cancels(harness: TaskHarness) -> None:
    cleaned = []

    async def coroutine() -> None:
        cancel_current_task()
        try:
            await forever()
        except asyncio.CancelledError:
            cleaned.append("cancelled")
            raise

    harness.value(ready())
    harness.turns()
    assert isinstance(harness.outcome(coroutine()).error, asyncio.CancelledError)
    assert cleaned == ["cancelled"]


def test_cancel_of_unstarted_task_ends_the_coroutine(harness: TaskHarness) -> None:
    cleaned = []

    async def coroutine() -> None:
        cancel_current_task()
        try:
            await forever()
        finally:
            cleaned.append("ended")

    assert isinstance(harness.outcome(coroutine()).error, asyncio.CancelledError)
    assert cleaned == ["ended"]


def test_idle_task_cancelled_gets_no_work(harness: TaskHarness) -> None:
    async def who() -> asyncio.Task[Any] | None:
        return asyncio.current_task()

    task = harness.value(who())
    harness.turns()

    def step() -> asyncio.Task[Any] | None:
        task.cancel()
        assert harness.tasks.start(who()) is None
        other: asyncio.Task[Any] | None = harness.tasks.result
        return other

    assert harness.in_loop(step) is not task
    harness.turns()
    assert task.done()
    assert harness.tasks.running == 0
