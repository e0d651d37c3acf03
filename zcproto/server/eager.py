"""Runs the first step of a coroutine at once, and makes it a task only if it waits.

The first step runs in the caller's turn of the loop. Most handlers end there and cost no task. A coroutine that
waits is adopted by an `asyncio.Task`. From Python 3.12 on `asyncio.Task(eager_start=True)` can replace this; with
3.11 a request whose handler does not wait would cost some 4 us more with a task of its own.

Rules:
- The task exists before the coroutine starts, and is the *current task* during the first step. So
  `asyncio.timeout`, `TaskGroup` and cancellation see one task from beginning to end.
- Each coroutine runs in its own context (PEP 567), as in its own task.
- A task that adopted a coroutine ends with it: a reference to the task cannot cancel another coroutine.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final, cast

Done = Callable[[Any, BaseException | None], None]
"""Called with the result of the coroutine, or with its exception."""


class EagerTasks:
    """Starts coroutines on one loop. `result` is the result of the last one that ended in its first step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: list[EagerWorker] = []
        self._workers: set[EagerWorker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._context = contextvars.copy_context()  # of callbacks, which all share it
        self.result: Any = None

    @property
    def running(self) -> int:
        """The number of waiting coroutines."""
        return len(self._workers) - len(self._idle) + len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> EagerWorker | None:
        """Run the first step; its exceptions propagate.

        Return None if it was the last step: its result is in `result`. Return a worker if the coroutine waits: set
        its `done`.
        """
        loop = self._loop
        idle = self._idle
        # Skip a task that was cancelled while idle: it would cancel the next coroutine.
        worker = idle.pop() if idle and not idle[-1].task.cancelling() else self._new_worker()
        context = contextvars.copy_context()
        try:
            _enter_task(loop, worker.task)
        except RuntimeError:
            return self._start_within_task(worker, coroutine, context)
        try:
            awaited = context.run(worker.send, coroutine)
        except BaseException:
            worker.set_driver(_new_driver(self))
            idle.append(worker)
            raise
        finally:
            _leave_task(loop, worker.task)
        if awaited is _ENDED:
            idle.append(worker)
            return None
        worker.adopt(awaited, context)
        return worker

    def start_task(
        self, coroutine: Coroutine[Any, Any, Any], ended: Callable[[asyncio.Task[Any]], None]
    ) -> asyncio.Task[Any]:
        """Run a coroutine that is expected to wait, from the next turn on. `ended` must call `forget_task`."""
        task = self._loop.create_task(coroutine, name="zcproto-stream")
        task.add_done_callback(ended, context=self._context)
        self._tasks.add(task)
        return task

    def forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)

    def _start_within_task(
        self, worker: EagerWorker, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context
    ) -> EagerWorker | None:
        """Run the first step inside another task, which is not the current one meanwhile."""
        self._idle.append(worker)
        outer = asyncio.current_task(self._loop)
        assert outer is not None
        _leave_task(self._loop, outer)
        try:
            return context.run(self.start, coroutine)
        finally:
            _enter_task(self._loop, outer)

    async def close(self, limit: float) -> int:
        """Cancel everything and wait at most `limit` seconds; return how many have not ended."""
        tasks: list[asyncio.Task[Any]] = [worker.task for worker in self._workers]
        for worker in list(self._workers):
            worker.cancel()
        for task in self._tasks:
            task.cancel()
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=limit)
        return self.running

    def _new_worker(self) -> EagerWorker:
        worker = EagerWorker(self, self._loop)
        self._workers.add(worker)
        return worker

    def forget(self, worker: EagerWorker) -> None:
        self._workers.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)


class EagerWorker:
    """A task and the coroutine that it has adopted, if any."""

    __slots__ = (
        "_job",
        "_loop",
        "_pool",
        "_wake",
        "done",
        "driver",
        "send",
        "task",
    )

    def __init__(self, pool: EagerTasks, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._job: tuple[Any, contextvars.Context] | None = None
        self._wake: asyncio.Future[None] | None = None
        self.done: Done | None = None
        self.set_driver(_new_driver(pool))
        work = self._work()
        work.send(None)
        self.task: asyncio.Task[None] = loop.create_task(work, name="zcproto-handler")
        self.task.add_done_callback(self._task_ended)

    def set_driver(self, driver: Driver) -> None:
        self.driver = driver
        self.send = driver.send  # bound once, not for each coroutine

    def adopt(self, awaited: Any, context: contextvars.Context) -> None:
        """Continue the coroutine in the driver; it waits for `awaited`."""
        self._job = (awaited, context)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def cancel(self) -> None:
        """Raise CancelledError in the coroutine where it waits."""
        self.task.cancel()

    async def _work(self) -> None:
        cancelled = False
        try:
            await _begin()
            if self._job is None:
                self._wake = self._loop.create_future()
                await self._wake
        except asyncio.CancelledError:
            self.task.uncancel()
            cancelled = True
        if self._job is None:
            return
        if cancelled:  # again, now that the task can cancel the coroutine's wait
            self.task.cancel()
        awaited, context = self._job
        self._job = None
        result, error = None, None
        try:
            await _resume(self.driver, awaited, context)
            result = self._pool.result
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as raised:  # passed to `done`; CancelledError too
            error = raised
        done, self.done = self.done, None
        if done is not None:
            done(result, error)
        del error  # its traceback refers to this frame

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._pool.forget(self)
        self._job = None
        done, self.done = self.done, None
        if done is not None:
            done(None, asyncio.CancelledError())


_ENDED: Final = object()

Driver = Generator[Any, Any, None]


@types.coroutine
def _begin() -> Generator[None, None, None]:
    """Yield once, so that the coroutine has begun before its task exists.

    A task that is cancelled before its first step, as by uvloop's timers, ends without running its coroutine.
    """
    yield


@types.coroutine
def _drive(pool: EagerTasks) -> Driver:
    """Run each coroutine that is sent: yield what it waits for, and `_ENDED` when it has returned.

    Driving a coroutine by its own `send` ends with a StopIteration, which costs more than the first step.
    """
    while True:
        coroutine = yield _ENDED
        pool.result = yield from coroutine


def _new_driver(pool: EagerTasks) -> Driver:
    driver = cast("Driver", _drive(pool))
    driver.send(None)
    return driver


@types.coroutine
def _resume(driver: Driver, awaited: Any, context: contextvars.Context) -> Generator[Any, Any, None]:
    """Continue a coroutine that yielded `awaited`, each step in its own context."""
    while awaited is not _ENDED:
        try:
            sent = yield awaited
        except GeneratorExit:
            driver.close()
            raise
        except BaseException as error:  # raised in the coroutine
            raised: BaseException | None = error
        else:
            raised = None
        try:
            awaited = context.run(driver.send, sent) if raised is None else context.run(driver.throw, raised)
        finally:
            raised = None  # its traceback refers to this frame
