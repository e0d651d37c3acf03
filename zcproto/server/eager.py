"""Coroutines started by hand, which become tasks only if they really wait.

A coroutine's first step runs at once, in the caller's turn of the loop. Most handlers end there, and cost no
task. One that waits is adopted by a real `asyncio.Task`.

That task exists before: it comes from a pool, waits for work, and is the *current task* already during the first
step. So `asyncio.timeout`, `TaskGroup` and cancellation, which ask for the current task, see the same one from
beginning to end. Each coroutine runs in a context of its own (PEP 567), as in a task of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import types
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Final

MAX_IDLE: Final = 128
"""Waiting tasks kept for later, each about 2 KiB."""

Done = Callable[[Any, BaseException | None], None]
"""Called with the coroutine's result, or with its exception."""


class EagerTasks:
    """Starts coroutines on one loop. `result` is what the last one that ended in its first step returned."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        self._closed = False
        self.result: Any = None

    @property
    def running(self) -> int:
        """Coroutines that wait."""
        return len(self._workers) - len(self._idle)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Worker | None:
        """Run the first step. What it raises comes through.

        None: that was the last step, take `result`. A Worker: the coroutine waits, give it a `done`.
        """
        loop = self._loop
        idle = self._idle
        worker = idle.pop() if idle else self._new_worker()
        context = contextvars.copy_context()
        try:
            _enter_task(loop, worker.task)
        except RuntimeError:
            return self._start_within_task(worker, coroutine, context)
        try:
            awaited = context.run(coroutine.send, None)
        except StopIteration as end:
            self.result = end.value
            idle.append(worker)
            return None
        except BaseException:
            idle.append(worker)
            raise
        finally:
            _leave_task(loop, worker.task)
        worker.adopt(coroutine, awaited, context)
        return worker

    def _start_within_task(
        self, worker: Worker, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context
    ) -> Worker | None:
        """As `start`, where a task is the current one already: it steps aside for the first step."""
        self._idle.append(worker)
        outer = asyncio.current_task(self._loop)
        assert outer is not None
        _leave_task(self._loop, outer)
        try:
            return context.run(self.start, coroutine)
        finally:
            _enter_task(self._loop, outer)

    async def close(self) -> None:
        """Cancel everything and wait until it has ended."""
        self._closed = True
        tasks = [worker.task for worker in self._workers]
        for worker in list(self._workers):
            worker.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _new_worker(self) -> Worker:
        worker = Worker(self, self._loop)
        self._workers.add(worker)
        return worker

    def released(self, worker: Worker) -> bool:
        """A worker has nothing to do: whether it is to wait for more."""
        if self._closed or len(self._idle) >= MAX_IDLE:
            return False
        self._idle.append(worker)
        return True

    def forget(self, worker: Worker) -> None:
        self._workers.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)


class Worker:
    """A task of the pool, and the coroutine that it has adopted, if any."""

    __slots__ = ("_cancel_asked", "_job", "_loop", "_pool", "_started", "_wake", "done", "task")

    def __init__(self, pool: EagerTasks, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._job: tuple[Coroutine[Any, Any, Any], Any, contextvars.Context] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._started = False
        self._cancel_asked = False
        self.done: Done | None = None
        self.task: asyncio.Task[None] = loop.create_task(self._work(), name="zcproto-handler")
        self.task.add_done_callback(self._task_ended)

    def adopt(self, coroutine: Coroutine[Any, Any, Any], awaited: Any, context: contextvars.Context) -> None:
        self._job = (coroutine, awaited, context)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def cancel(self) -> None:
        """Raise CancelledError in the coroutine where it waits."""
        self._cancel_asked = True
        if self._started:  # a task cancelled before its first step would never take that step
            self.task.cancel()

    async def _work(self) -> None:
        self._started = True
        while True:
            if self._job is None and not self._cancel_asked:
                self._wake = self._loop.create_future()
                try:
                    await self._wake
                except asyncio.CancelledError:
                    if self._job is not None and not self._cancel_asked:
                        self._forget_cancellation()  # it was meant for the work before
                self._wake = None
            if self._job is None:
                return
            coroutine, awaited, context = self._job
            cancelled, self._cancel_asked = self._cancel_asked, False
            result, error = None, None
            try:
                result = await _resume(coroutine, awaited, context, cancelled)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as raised:  # it is handed on; CancelledError is one of them
                error = raised
            self._job = None
            self._forget_cancellation()  # the next coroutine starts uncancelled
            done, self.done = self.done, None
            waits = self._pool.released(self)
            if done is not None:
                done(result, error)
            del coroutine, awaited, context, result, error, done
            if not waits:
                return

    def _forget_cancellation(self) -> None:
        self._cancel_asked = False
        while self.task.cancelling():
            self.task.uncancel()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._pool.forget(self)
        done, self.done = self.done, None
        if done is not None:
            done(None, asyncio.CancelledError())


@types.coroutine
def _resume(
    coroutine: Coroutine[Any, Any, Any], awaited: Any, context: contextvars.Context, cancelled: bool
) -> Generator[Any, Any, Any]:
    """Go on with a coroutine that has yielded `awaited`, each step in its own context."""
    while True:
        try:
            if cancelled:
                cancelled = False
                raise asyncio.CancelledError
            sent = yield awaited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:  # whatever comes belongs to the coroutine
            raised: BaseException | None = error
        else:
            raised = None
        try:
            awaited = context.run(coroutine.throw, raised) if raised else context.run(coroutine.send, sent)
        except StopIteration as end:
            return end.value
