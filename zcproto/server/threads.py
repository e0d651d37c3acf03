"""Runs methods that block, in a bounded number of threads.

    run -> a free thread? or a place in the queue, else UNAVAILABLE -> thread -> result

Rules:
- A call that is cancelled while it waits for a thread is never run. One that runs cannot be stopped: it keeps its
  thread until it returns, and its result is discarded.
- One user may take all threads, but not all places in the queue.
- All of this but the method itself runs in the event loop.
- A thread does not keep the process from exiting.

It must not know: connections, which method runs.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from zcproto.app.context import thread_kind
from zcproto.errors import ResourceExhausted, Unavailable

RETRY: Final = {"retry_after_ms": 250}

Job = tuple[Callable[[], Any], "asyncio.Future[tuple[Any, BaseException | None]]", str]


@dataclass(frozen=True, slots=True)
class ThreadLimits:
    """Methods that run in threads at once, and calls that wait for one."""

    threads: int = 16
    waiting: int = 64

    @property
    def per_user(self) -> int:
        """Calls of one user that run or wait."""
        return max(self.threads, (self.threads + self.waiting) // 2)


class ThreadPool:
    """The threads of one server. They are started when they are needed first.

    `running` methods have a thread, also those whose callers have gone. `refused` counts calls.
    """

    def __init__(self, limits: ThreadLimits = ThreadLimits()) -> None:
        self.limits = limits
        self.running = 0
        self.refused = 0
        self._calls_of: Counter[str] = Counter()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._ended = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Calls that wait for a thread."""
        return len(self._waiting)

    async def run(self, owner: str, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread, for a user or an address, and return its result.

        Raises Unavailable if too many calls wait for a thread, ResourceExhausted if too many are the owner's.
        """
        limits = self.limits
        if self._calls_of[owner] >= limits.per_user:
            self.refused += 1
            raise ResourceExhausted(
                "too many calls of this user wait for a thread; send fewer at once", RETRY
            )
        if self.running >= limits.threads and self.waiting >= limits.waiting:
            self.refused += 1
            raise Unavailable("too many calls wait for a thread; try again", RETRY)
        self._calls_of[owner] += 1
        loop, has_place = asyncio.get_running_loop(), False
        try:
            await self._take_place()
            has_place = True
            self._prepare_thread(loop)
        except BaseException:
            self._forget(owner)
            if has_place:
                self._leave_place()
            raise
        done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        self._jobs.put((partial(contextvars.copy_context().run, work), done, owner))
        result, error = await done
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def reconfigure(self, limits: ThreadLimits) -> None:
        """Apply other limits; methods that run stay."""
        self.limits = limits
        while self.running < limits.threads and self._let_next():
            self.running += 1

    async def close(self, limit: float) -> int:
        """Let the threads end, and wait at most `limit` seconds for methods; return how many still run."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = self._idle = 0
        if self.running:
            self._ended.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._ended.wait()
        return self.running

    async def _take_place(self) -> None:
        """Wait until a thread is free."""
        if self.running < self.limits.threads:
            self.running += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it has just got a place
                self._leave_place()
            else:  # or callers that come and go would fill the queue
                with suppress(ValueError):
                    self._waiting.remove(waiter)
            raise

    def _leave_place(self) -> None:
        """Give a place to the call that has waited longest."""
        if self.running <= self.limits.threads and self._let_next():
            return
        self.running -= 1
        if not self.running:
            self._ended.set()

    def _let_next(self) -> bool:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # cancelled
                waiter.set_result(None)
                return True
        return False

    def _prepare_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._idle:
            self._idle -= 1
            return
        try:
            threading.Thread(target=self._work, args=(loop,), name="zcproto-method", daemon=True).start()
        except RuntimeError as error:
            raise Unavailable("the server cannot start a thread; try again", RETRY) from error
        self._threads += 1

    def _forget(self, owner: str) -> None:
        self._calls_of[owner] -= 1
        if not self._calls_of[owner]:
            del self._calls_of[owner]

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run jobs, in a thread."""
        thread_kind.is_method = True
        while (job := self._jobs.get()) is not None:
            work, done, owner = job
            result, failure = None, None
            try:
                result = work()
            except BaseException as error:  # raised in the loop
                failure = error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._finish, done, owner, result, failure)
            del job, work, done, result, failure

    def _finish(
        self, done: asyncio.Future[tuple[Any, BaseException | None]], owner: str, result: Any, error: Any
    ) -> None:
        self._idle += 1
        self._forget(owner)
        self._leave_place()
        if not done.done():
            done.set_result((result, error))
