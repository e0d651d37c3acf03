"""Runs methods that block, in a bounded number of threads.

    run -> a free thread? or a place in the user's queue, else UNAVAILABLE -> thread -> result

Rules:
- A call that is cancelled while it waits for a thread is never run. One that runs cannot be stopped: it keeps its
  thread until it returns, counts as its user's, and its result is discarded.
- One user holds at most `threads_per_user`, and not all places in the queue. The last free thread is for a user
  that holds none: no two users take all.
- Users with waiting calls are served in turn, one call each.
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
    def threads_per_user(self) -> int:
        """Threads that one user may hold: a quarter is left to the others."""
        return max(1, self.threads - max(1, self.threads // 4))

    @property
    def per_user(self) -> int:
        """Calls of one user that run or wait."""
        return max(self.threads, (self.threads + self.waiting) // 2)


class ThreadPool:
    """The threads of one server. They are started when they are needed first.

    `running` methods have a thread, also those whose callers have gone; `waiting` calls have none. `refused` counts
    calls.
    """

    def __init__(self, limits: ThreadLimits = ThreadLimits()) -> None:
        self.limits = limits
        self.running = 0
        self.waiting = 0
        self.refused = 0
        self._calls_of: Counter[str] = Counter()
        self._threads_of: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # by owner; the first is the next in turn
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = 0
        self._idle = 0
        self._ended = asyncio.Event()

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
        if self.waiting >= limits.waiting and not self._may_take(owner):
            self.refused += 1
            raise Unavailable("too many calls wait for a thread; try again", RETRY)
        self._calls_of[owner] += 1
        loop, has_place = asyncio.get_running_loop(), False
        try:
            await self._take_place(owner)
            has_place = True
            self._prepare_thread(loop)
        except BaseException:
            _decrease(self._calls_of, owner)
            if has_place:
                self._leave_place(owner)
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
        self._serve()

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

    def _may_take(self, owner: str) -> bool:
        """Return whether a thread is free for this owner."""
        held, limits = self._threads_of[owner], self.limits
        free = limits.threads - self.running
        return free > 0 and (not held or (free > 1 and held < limits.threads_per_user))

    def _take(self, owner: str) -> None:
        self.running += 1
        self._threads_of[owner] += 1

    async def _take_place(self, owner: str) -> None:
        """Wait until a thread is free."""
        if self._may_take(owner):  # then none of its calls waits
            self._take(owner)
            return
        waiter = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append(waiter)
        self.waiting += 1
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it has just got a place
                self._leave_place(owner)
            else:  # or callers that come and go would fill the queue
                self._leave_queue(owner, waiter)
            raise

    def _leave_queue(self, owner: str, waiter: asyncio.Future[None]) -> None:
        queue = self._queues.get(owner) or deque()
        if waiter in queue:  # or its turn has come and gone
            self.waiting -= 1
            queue.remove(waiter)
            if not queue:
                del self._queues[owner]

    def _leave_place(self, owner: str) -> None:
        """Give a place to the user whose turn it is."""
        self.running -= 1
        _decrease(self._threads_of, owner)
        self._serve()
        if not self.running:
            self._ended.set()

    def _serve(self) -> None:
        """Let calls run that have waited, one of each user in turn, as far as threads are free for them."""
        while (owner := next(filter(self._may_take, self._queues), None)) is not None:
            queue = self._queues.pop(owner)
            waiter = queue.popleft()
            self.waiting -= 1
            if queue:
                self._queues[owner] = queue  # behind the others
            if not waiter.done():  # cancelled
                self._take(owner)
                waiter.set_result(None)

    def _prepare_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._idle:
            self._idle -= 1
            return
        try:
            threading.Thread(target=self._work, args=(loop,), name="zcproto-method", daemon=True).start()
        except RuntimeError as error:
            raise Unavailable("the server cannot start a thread; try again", RETRY) from error
        self._threads += 1

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
        _decrease(self._calls_of, owner)
        self._leave_place(owner)
        if not done.done():
            done.set_result((result, error))


def _decrease(counts: Counter[str], owner: str) -> None:
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]
