"""One thread that does what is asked of it, in groups, and never keeps the event loop waiting.

What this file decides: what goes into one group, who is told what, and when nobody waits any longer.

Rules:
- What is asked for in one turn of the loop is done together; so is what comes while the thread is busy.
- A job is given up after its timeout, whatever the thread does. If it had not begun it is not done at all, but
  for a lasting one, which is done all the same.
- A busy event loop takes the interpreter back from the thread within microseconds each time, for as long as it
  likes. So when an answer is late, the loop stands aside for a moment, again and again, but not for ever.
- The queue is bounded. A thread that hangs makes every job fail at once when the queue is full.

It must not know: what the jobs are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from zcproto.stores.base import StoreUnavailable

GROUP: Final = 256
"""Jobs that are done together: a few milliseconds of work."""

THREAD_NAME: Final = "zcproto-store"

_LATE_S: Final = 0.015
_AGAIN_S: Final = 0.005
_ASIDE_S: Final = 0.0001
_ASIDE_TIMES: Final = 100
"""After so many the thread waits for the disk, not for the interpreter."""


class Job:
    """Something to do, and what came of it."""

    __slots__ = ("error", "future", "given_up", "lasting", "result", "work")

    def __init__(self, work: Any, lasting: bool, future: asyncio.Future[Any]) -> None:
        self.work = work
        self.lasting = lasting
        self.future = future
        self.given_up = False
        self.result: Any = None
        self.error: BaseException | None = None


Perform = Callable[[Sequence[Job]], object]
"""Does jobs and notes in each what came of it; it must not raise."""


class Worker:
    """The thread. Made and used in the event loop; `perform`, `rest` and `leave` are called in the thread.

    `rest` is called when there is nothing else to do, as long as it returns True; `leave` at the end.
    """

    def __init__(
        self, perform: Perform, rest: Callable[[], bool], leave: Callable[[], object], *, limit: int
    ) -> None:
        self._perform = perform
        self._rest = rest
        self._leave = leave
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._next: list[Job] = []
        self._waiting = 0
        self._groups = 0
        self._is_group = False  # the thread's
        self._watched: asyncio.TimerHandle | None = None
        self._stopping = False
        self._ended = self._loop.create_future()
        self._thread = Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    async def ask(self, work: Any, within: float, *, lasting: bool = False) -> Any:
        """What came of it. Raises StoreUnavailable if that takes longer than `within` seconds, or cannot be."""
        job = Job(work, lasting, self._loop.create_future())
        self._put(job)
        timer = self._loop.call_later(within, self._give_up, job, within)
        try:
            return await job.future
        finally:
            timer.cancel()
            job.given_up = True

    async def stop(self, within: float) -> bool:
        """Do what was asked for, then end. False if the thread has not ended in time: it is left behind."""
        if not self._stopping:
            self._stopping = True
            self._flush()
            self._queue.put(None)
        ended, _ = await asyncio.wait([self._ended], timeout=within)
        return bool(ended)

    # In the loop

    def _put(self, job: Job) -> None:
        if self._stopping:
            raise StoreUnavailable("it is closed")
        if self._waiting >= self._limit:
            raise StoreUnavailable(f"{self._waiting} operations wait for the disk already")
        self._waiting += 1
        self._next.append(job)
        if len(self._next) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._next:
            jobs, self._next = self._next, []
            self._queue.put(jobs)
            if self._watched is None:
                self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)

    def _watch(self, groups: int, times: int) -> None:
        """Stand aside if no group was done since the last look."""
        self._watched = None
        if not self._waiting or times == _ASIDE_TIMES:
            return
        if groups != self._groups:
            self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)
            return
        time.sleep(_ASIDE_S)
        self._watched = self._loop.call_later(_AGAIN_S, self._watch, groups, times + 1)

    def _give_up(self, job: Job, within: float) -> None:
        job.given_up = True
        if not job.future.done():
            job.future.set_exception(StoreUnavailable(f"no answer of the disk within {within * 1000:.0f} ms"))

    def _deliver(self, jobs: Sequence[Job]) -> None:
        self._waiting -= len(jobs)
        self._groups += 1
        for job in jobs:
            if job.future.done():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)

    # In the thread

    @property
    def is_waited_for(self) -> bool:
        """Whether there is more to do than one job."""
        return self._is_group or not self._queue.empty()

    def _run(self) -> None:
        try:
            while (jobs := self._take()) is not None:
                for start in range(0, len(jobs), GROUP):
                    group = jobs[start : start + GROUP]
                    self._is_group = len(jobs) > 1
                    self._perform([job for job in group if job.lasting or not job.given_up])
                    self._call(self._deliver, group)
                del jobs, group  # not kept alive while it waits
        finally:
            self._leave()
            self._call(self._ended.set_result, None)

    def _take(self) -> list[Job] | None:
        """The next group; None at the end."""
        while self._queue.empty() and self._rest():
            pass
        jobs = self._queue.get()
        if jobs is None:
            return None
        while len(jobs) < GROUP:
            try:
                more = self._queue.get_nowait()
            except Empty:
                break
            if more is None:
                self._queue.put(None)
                break
            jobs += more
        return jobs

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits
            return
