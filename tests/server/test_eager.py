"""Tests that coroutines started eagerly behave as in their own task, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
import uvloop

from tests.limits import TIMEOUT
from zcproto.server.eager import EagerTasks, EagerWorker

T = TypeVar("T")

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="untouched")


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def tasks(loop: asyncio.AbstractEventLoop) -> Iterator[EagerTasks]:
    tasks = EagerTasks(loop)
    yield tasks
    assert loop.run_until_complete(tasks.close(1.0)) == 0


class Outcome:
    """Records the call of a Worker's `done`."""

    def __init__(self) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.calls = 0

    def __call__(self, result: Any, error: BaseException | None) -> None:
        self.result, self.error = result, error
        self.calls += 1


class TaskHarness:
    """Runs steps as the loop does, outside any task."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tasks: EagerTasks) -> None:
        self.loop = loop
        self.tasks = tasks

    def in_loop(self, step: Callable[[], T]) -> T:
        """Call a function from a plain callback of the loop."""
        future: asyncio.Future[T] = self.loop.create_future()

        def callback() -> None:
            try:
                future.set_result(step())
            except BaseException as error:
                future.set_exception(error)

        self.loop.call_soon(callback)
        return self.loop.run_until_complete(future)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> EagerWorker | None:
        return self.in_loop(lambda: self.tasks.start(coroutine))

    def value(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a coroutine that must end in its first step."""
        assert self.start(coroutine) is None
        return self.tasks.result

    def waiting(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[EagerWorker, Outcome]:
        """Start a coroutine that must wait."""
        outcome = Outcome()

        def step() -> EagerWorker:
            worker = self.tasks.start(coroutine)
            worker.done = outcome
            return worker

        return self.in_loop(step), outcome

    def turns(self, count: int = 3) -> None:
        for _ in range(count):
            self.in_loop(lambda: None)

    def finish(self, outcome: Outcome) -> Outcome:
        """Run the loop until a worker is done."""

        async def wait() -> None:
            async with asyncio.timeout(TIMEOUT):
                while not outcome.calls:  # noqa: ASYNC110 - the EagerWorker knows no events
                    await asyncio.sleep(0)

        self.loop.run_until_complete(wait())
        self.turns()
        assert outcome.calls == 1
        return outcome

    def outcome(self, coroutine: Coroutine[Any, Any, Any]) -> Outcome:
        return self.finish(self.waiting(coroutine)[1])


@pytest.fixture
def harness(loop: asyncio.AbstractEventLoop, tasks: EagerTasks) -> TaskHarness:
    return TaskHarness(loop, tasks)


@pytest.fixture(params=["a new task", "a task that waits for work"])
def warm(request: pytest.FixtureRequest, harness: TaskHarness) -> None:
    """Cover the first coroutine, whose task has not run yet, and later ones."""
    if request.param == "a task that waits for work":
        harness.value(ready())
        harness.turns()


async def ready(value: Any = None) -> Any:
    return value


async def forever() -> None:
    await asyncio.Event().wait()


async def who() -> asyncio.Task[Any] | None:
    return asyncio.current_task()


# --- the first step --------------------------------------------------------------------------------------


def test_first_step_runs_in_the_callers_turn(harness: TaskHarness, warm: None) -> None:
    order = []

    async def coroutine() -> int:
        order.append("coroutine")
        return 7

    def step() -> None:
        assert harness.tasks.start(coroutine()) is None
        order.append("caller")
        assert harness.tasks.result == 7

    harness.in_loop(step)
    assert order == ["coroutine", "caller"]


def test_immediate_coroutines_reuse_one_task(harness: TaskHarness) -> None:
    assert len({harness.value(who()) for _ in range(100)}) == 1
    assert harness.tasks.running == 0
    assert len(asyncio.all_tasks(harness.loop)) == 1


def test_exception_of_first_step_propagates(harness: TaskHarness, warm: None) -> None:
    async def coroutine() -> None:
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"):
        harness.start(coroutine())
    assert harness.tasks.running == 0
    assert harness.value(ready(5)) == 5


def test_awaiting_a_finished_future_does_not_wait(
    harness: TaskHarness, loop: asyncio.AbstractEventLoop
) -> None:
    future: asyncio.Future[int] = loop.create_future()
    future.set_result(3)

    async def coroutine() -> int:
        async with asyncio.timeout(TIMEOUT):
            return await future + await ready(1)

    assert harness.value(coroutine()) == 4


# --- waiting ---------------------------------------------------------------------------------------------


def test_waiting_coroutine_continues_in_a_task(harness: TaskHarness, warm: None) -> None:
    async def coroutine() -> str:
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        return "done"

    worker, outcome = harness.waiting(coroutine())
    assert harness.tasks.running == 1
    harness.finish(outcome)
    assert (outcome.result, outcome.error) == ("done", None)
    assert worker.task.done()
    assert harness.tasks.running == 0


def test_exception_after_waiting_reaches_done(harness: TaskHarness, warm: None) -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise LookupError("late")

    outcome = harness.outcome(coroutine())
    assert isinstance(outcome.error, LookupError)
    assert harness.tasks.running == 0


def test_failed_future_raises_in_the_coroutine(
    harness: TaskHarness, loop: asyncio.AbstractEventLoop, warm: None
) -> None:
    future: asyncio.Future[None] = loop.create_future()

    async def coroutine() -> str:
        try:
            await future
        except OSError as error:
            await asyncio.sleep(0)
            return str(error)
        return "no error"

    _, outcome = harness.waiting(coroutine())
    harness.in_loop(lambda: future.set_exception(OSError("disk full")))
    assert harness.finish(outcome).result == "disk full"


class OddError(Exception):
    """A falsy exception."""

    def __len__(self) -> int:
        return 0


def test_falsy_exception_is_raised(harness: TaskHarness, loop: asyncio.AbstractEventLoop) -> None:
    future: asyncio.Future[None] = loop.create_future()

    async def coroutine() -> None:
        await future

    _, outcome = harness.waiting(coroutine())
    harness.in_loop(lambda: future.set_exception(OddError()))
    assert isinstance(harness.finish(outcome).error, OddError)


def test_current_task_does_not_change(harness: TaskHarness, warm: None) -> None:
    async def coroutine() -> list[Any]:
        tasks = [asyncio.current_task()]
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        return tasks

    worker, outcome = harness.waiting(coroutine())
    harness.finish(outcome)
    assert outcome.result == [worker.task] * 3


def test_task_that_waited_is_not_reused(harness: TaskHarness) -> None:
    """A reference to the task (in a library's table, a late cancellation) must not reach another coroutine."""

    async def coroutine() -> asyncio.Task[Any] | None:
        await asyncio.sleep(0)
        return asyncio.current_task()

    first = harness.outcome(coroutine()).result
    assert harness.value(who()) is not first
    assert harness.outcome(coroutine()).result is not first
    assert not first.cancel()


def test_concurrent_waits_have_separate_tasks(harness: TaskHarness, loop: asyncio.AbstractEventLoop) -> None:
    gate = asyncio.Event()

    async def coroutine(number: int) -> tuple[int, Any]:
        await gate.wait()
        return number, asyncio.current_task()

    outcomes = [harness.waiting(coroutine(number))[1] for number in range(200)]
    assert harness.tasks.running == 200
    harness.in_loop(gate.set)
    for outcome in outcomes:
        harness.finish(outcome)
    assert [outcome.result[0] for outcome in outcomes] == list(range(200))
    assert len({outcome.result[1] for outcome in outcomes}) == 200
    assert harness.tasks.running == 0
    # None of them is reused.
    assert len(asyncio.all_tasks(loop)) == 0


def test_result_without_done_is_dropped(harness: TaskHarness) -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise LookupError

    worker = harness.start(coroutine())
    harness.turns(5)
    assert worker.task.done()


# --- contexts --------------------------------------------------------------------------------------------


def test_coroutines_have_separate_contexts(harness: TaskHarness, warm: None) -> None:
    async def coroutine(name: str, wait: bool) -> list[str]:
        seen = [variable.get()]
        variable.set(name)
        if wait:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        seen.append(variable.get())
        return seen

    assert harness.value(coroutine("first", wait=False)) == ["untouched", "first"]
    _, second = harness.waiting(coroutine("second", wait=True))
    _, third = harness.waiting(coroutine("third", wait=True))
    assert harness.finish(second).result == ["untouched", "second"]
    assert harness.finish(third).result == ["untouched", "third"]
    assert variable.get() == "untouched"


def test_context_variable_of_the_caller_is_visible(harness: TaskHarness) -> None:
    async def coroutine() -> str:
        return variable.get()

    def step() -> str:
        variable.set("caller")
        assert harness.tasks.start(coroutine()) is None
        return str(harness.tasks.result)

    assert harness.in_loop(step) == "caller"


def test_child_task_inherits_the_context(harness: TaskHarness) -> None:
    async def child() -> str:
        return variable.get()

    async def coroutine() -> str:
        variable.set("parent")
        await asyncio.sleep(0)
        return await asyncio.create_task(child())

    assert harness.outcome(coroutine()).result == "parent"


# --- what asks for the current task ------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.01, 0.001, 0, -1])
def test_timeout_started_in_first_step_ends_the_wait(harness: TaskHarness, warm: None, delay: float) -> None:
    async def coroutine() -> int | None:
        try:
            async with asyncio.timeout(delay):
                if delay < 0.01:  # expired
                    time.sleep(0.005)  # noqa: ASYNC251 - uvloop runs the timer before the task
                await forever()
        except TimeoutError:
            return asyncio.current_task().cancelling()

    assert harness.outcome(coroutine()).result == 0


def test_wait_for_in_first_step_times_out(harness: TaskHarness, warm: None) -> None:
    assert isinstance(harness.outcome(asyncio.wait_for(forever(), 0.01)).error, TimeoutError)


def test_task_group_gathers_its_children(harness: TaskHarness, warm: None) -> None:
    async def child(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async def coroutine() -> list[int]:
        async with asyncio.TaskGroup() as group:
            children = [group.create_task(child(number)) for number in range(3)]
        return [task.result() for task in children]

    assert harness.outcome(coroutine()).result == [0, 1, 2]


def test_failing_child_cancels_only_its_group(harness: TaskHarness, warm: None) -> None:
    async def failing() -> None:
        raise LookupError("child")

    async def coroutine() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(failing())
                await forever()
        except* LookupError:
            pass
        await asyncio.sleep(0)
        return "went on"

    assert harness.outcome(coroutine()).result == "went on"


# --- from within a task ------------------------------------------------------------------------------------


def test_start_within_a_task_runs_first_step(harness: TaskHarness) -> None:
    async def failing() -> None:
        raise LookupError

    async def outer() -> bool:
        me = asyncio.current_task()
        assert harness.tasks.start(who()) is None
        inner = harness.tasks.result
        with pytest.raises(LookupError):
            harness.tasks.start(failing())
        return inner is not me and asyncio.current_task() is me

    assert harness.loop.run_until_complete(outer())


def test_start_within_a_task_may_wait(harness: TaskHarness) -> None:
    outcome = Outcome()

    async def inner() -> str:
        await asyncio.sleep(0)
        return "inner"

    async def outer() -> str:
        worker = harness.tasks.start(inner())
        worker.done = outcome
        await asyncio.sleep(0)
        return "outer"

    assert harness.loop.run_until_complete(outer()) == "outer"
    assert harness.finish(outcome).result == "inner"


def test_nested_start_in_first_step(harness: TaskHarness) -> None:
    async def level(depth: int) -> int:
        if depth == 0:
            return 0
        assert harness.tasks.start(level(depth - 1)) is None
        return int(harness.tasks.result) + 1

    assert harness.value(level(20)) == 20
    assert harness.tasks.running == 0


# --- memory and the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["result", "error", "cancelled"])
def test_ended_coroutine_leaves_no_reference(harness: TaskHarness, ending: str) -> None:
    class Thing:
        pass

    kept: list[weakref.ref[Thing]] = []

    async def coroutine() -> None:
        thing = Thing()
        kept.append(weakref.ref(thing))
        await asyncio.sleep(0)
        if ending == "error":
            raise LookupError(thing)
        if ending == "cancelled":
            await forever()

    gc.collect()
    gc.disable()
    try:
        worker, outcome = harness.waiting(coroutine())
        harness.turns()
        if ending == "cancelled":
            harness.in_loop(worker.cancel)
        harness.finish(outcome)
        outcome.error = None
        del worker
        assert kept[0]() is None
    finally:
        gc.enable()


def test_close_cancels_waiting_coroutines_and_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = EagerTasks(loop)
    harness = TaskHarness(loop, tasks)
    harness.value(ready())
    outcomes = [harness.waiting(forever())[1] for _ in range(3)]
    assert loop.run_until_complete(tasks.close(5.0)) == 0
    for outcome in outcomes:
        assert outcome.calls == 1
        assert isinstance(outcome.error, asyncio.CancelledError)
    assert asyncio.all_tasks(loop) == set()


def test_close_ends_a_task_that_never_began(loop: asyncio.AbstractEventLoop) -> None:
    tasks = EagerTasks(loop)
    outcome = Outcome()

    def start() -> None:
        assert tasks.start(ready()) is None
        worker = tasks.start(forever())
        worker.done = outcome

    loop.call_soon(start)

    async def close() -> int:
        return await tasks.close(5.0)

    assert loop.run_until_complete(close()) == 0
    assert isinstance(outcome.error, asyncio.CancelledError)


def test_close_of_empty_pool_returns(loop: asyncio.AbstractEventLoop) -> None:
    assert loop.run_until_complete(EagerTasks(loop).close(0.0)) == 0


def test_close_is_limited_in_time(loop: asyncio.AbstractEventLoop) -> None:
    gate = asyncio.Event()

    async def stubborn() -> str:
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    tasks = EagerTasks(loop)
    harness = TaskHarness(loop, tasks)
    _, outcome = harness.waiting(stubborn())
    assert loop.run_until_complete(tasks.close(0.01)) == 1
    harness.in_loop(gate.set)
    assert harness.finish(outcome).result == "at last"
    assert tasks.running == 0


def test_closing_the_loop_closes_waiting_coroutines() -> None:
    closed = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    loop = asyncio.new_event_loop()
    worker, _ = TaskHarness(loop, EagerTasks(loop)).waiting(stubborn())
    loop.run_until_complete(asyncio.sleep(0))
    worker.task.get_coro().close()  # as the interpreter does when the loop is gone
    assert closed == [True]
    worker.task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    assert isinstance(worker.task.exception(), RuntimeError)  # otherwise the loop reports it
    loop.close()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_propagates(end: type[BaseException]) -> None:
    async def coroutine() -> None:
        await asyncio.sleep(0)
        raise end

    loop = asyncio.new_event_loop()
    tasks = EagerTasks(loop)
    harness = TaskHarness(loop, tasks)
    worker, outcome = harness.waiting(coroutine())

    async def run() -> None:
        await asyncio.sleep(1)

    with pytest.raises(end):
        loop.run_until_complete(run())
    for task in asyncio.all_tasks(loop):
        task.cancel()
    harness.turns()
    assert isinstance(worker.task.exception(), end)
    assert isinstance(outcome.error, asyncio.CancelledError)
    loop.close()


def test_custom_awaitable_is_driven_like_a_task(harness: TaskHarness) -> None:
    class Pair:
        """A custom awaitable that yields to the loop twice."""

        def __await__(self) -> Iterator[Any]:
            yield
            yield
            return "driven"

    async def coroutine(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    assert harness.outcome(coroutine(Pair())).result == "driven"


# --- tasks from the beginning ----------------------------------------------------------------------------


def test_task_runs_from_the_next_turn_on_and_is_cancelled_by_close(loop: asyncio.AbstractEventLoop) -> None:
    tasks, ended, ran = EagerTasks(loop), [], []

    def forget(task: asyncio.Task[Any]) -> None:
        tasks.forget_task(task)
        ended.append(task)

    async def work() -> None:
        ran.append(asyncio.current_task())
        await loop.create_future()

    async def main() -> None:
        task = tasks.start_task(work(), forget)
        assert (ran, tasks.running) == ([], 1)
        await asyncio.sleep(0)
        assert ran == [task]
        assert await tasks.close(1.0) == 0
        assert ended == [task]

    loop.run_until_complete(main())


@pytest.mark.parametrize("is_begun", [False, True])
def test_cancel_raises_where_the_coroutine_waits(harness: TaskHarness, warm: None, is_begun: bool) -> None:
    cleaned: list[str] = []
    outcome = Outcome()

    def step() -> EagerWorker:
        worker = harness.tasks.start(noting(cleaned))
        worker.done = outcome
        if not is_begun:
            worker.cancel()
        return worker

    worker = harness.in_loop(step)
    if is_begun:
        harness.turns()
        harness.in_loop(worker.cancel)
    assert isinstance(harness.finish(outcome).error, asyncio.CancelledError)
    assert cleaned == ["cancelled", "ended"]


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


def test_self_cancel_at_the_end_does_not_affect_others(harness: TaskHarness, warm: None) -> None:
    async def coroutine(wait: bool) -> str:
        if wait:
            await asyncio.sleep(0)
        asyncio.current_task().cancel()
        return "ended"

    async def innocent() -> tuple[int, str]:
        before = asyncio.current_task().cancelling()
        await asyncio.sleep(0)
        return before, "untroubled"

    def step() -> tuple[Outcome, Outcome]:
        assert harness.tasks.start(coroutine(wait=False)) is None
        outcomes = Outcome(), Outcome()
        for outcome in outcomes:
            harness.tasks.start(innocent()).done = outcome
        return outcomes

    for outcome in harness.in_loop(step):
        assert harness.finish(outcome).result == (0, "untroubled")
    assert harness.outcome(coroutine(wait=True)).result == "ended"
    assert harness.outcome(innocent()).result == (0, "untroubled")


@pytest.mark.parametrize(("is_warm", "noted"), [(False, {"ended"}), (True, {"cancelled", "ended"})])
def test_self_cancel_before_waiting_cancels(harness: TaskHarness, is_warm: bool, noted: set[str]) -> None:
    cleaned: list[str] = []

    async def coroutine() -> None:
        asyncio.current_task().cancel()
        try:
            await noting(cleaned)
        finally:
            cleaned.append("ended")

    if is_warm:
        harness.value(ready())
        harness.turns()
    assert isinstance(harness.outcome(coroutine()).error, asyncio.CancelledError)
    assert noted <= {*cleaned}


def test_idle_task_cancelled_gets_no_work(harness: TaskHarness) -> None:
    task = harness.value(who())
    harness.turns()

    def step() -> asyncio.Task[Any] | None:
        task.cancel()
        assert harness.tasks.start(who()) is None
        return harness.tasks.result

    assert harness.in_loop(step) is not task
    harness.turns()
    assert task.done()
    assert harness.tasks.running == 0


async def noting(cleaned: list[str]) -> None:
    """Wait until a cancellation, and note it and the end."""
    try:
        await forever()
    except asyncio.CancelledError:
        cleaned.append("cancelled")
        raise
    finally:
        cleaned.append("ended")
