"""A thread that runs jobs in groups and never makes the event loop wait.

Decides: which jobs form a group, and when a job is given up.

Rules:
- Jobs submitted in one turn of the loop form one group, and so do jobs submitted while the thread is busy.
- A job fails after its timeout, whatever the thread does. A job that has not begun by then is not run, unless it is
  a lasting one.
- A busy event loop takes the interpreter back from the thread within microseconds, again and again. So when an
  answer is late the loop sleeps for a moment, repeatedly but not without limit.
- The queue is bounded. If the thread hangs, jobs fail at once when it is full.

It must not know: what the jobs do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Final

from zcproto.stores.base import StoreUnavailable

GROUP: Final = 256
"""Jobs in one group: a few milliseconds of work."""

THREAD_NAME: Final = "zcproto-store"

_LATE_S: Final = 0.015
_AGAIN_S: Final = 0.005
_PAUSE_S: Final = 0.0001
_MAX_PAUSES: Final = 100
"""After so many pauses the thread must be waiting for the disk, not for the interpreter."""


@dataclass(slots=True, eq=False)
class Job:
    """Something to do, and its outcome."""

    work: Any
    lasting: bool
    future: asyncio.Future[Any]
    given_up: bool = False
    result: Any = None
    error: BaseException | None = None


Perform = Callable[[Sequence[Job]], object]
"""Runs jobs and stores the outcome in each. Must not raise."""


class Worker:
    """The thread, for use in the event loop. `perform`, `idle` and `finish` are called in the thread.

    `idle` is called while there are no jobs, as long as it returns True; `finish` at the end.
    """

    def __init__(
        self, perform: Perform, idle: Callable[[], bool], finish: Callable[[], object], *, limit: int
    ) -> None:
        self._perform = perform
        self._idle = idle
        self._finish = finish
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._next: list[Job] = []
        self._waiting = 0
        self._groups = 0
        self._is_group = False  # written by the thread
        self._watched: asyncio.TimerHandle | None = None
        self._stopping = False
        self._has_ended = self._loop.create_future()
        self._thread = Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    async def submit(self, work: Any, within: float, *, lasting: bool = False) -> Any:
        """Run a job and return its result. Raises StoreUnavailable after `within` seconds or at a full queue."""
        if self._stopping:
            raise StoreUnavailable("it is closed")
        if self._waiting >= self._limit:
            raise StoreUnavailable(f"{self._waiting} operations are waiting for the disk")
        job = Job(work, lasting, self._loop.create_future())
        self._waiting += 1
        self._next.append(job)
        if len(self._next) == 1:
            self._loop.call_soon(self._flush)
        timer = self._loop.call_later(within, self._give_up, job, within)
        try:
            return await job.future
        finally:
            timer.cancel()
            job.given_up = True

    async def stop(self, within: float) -> bool:
        """Run the submitted jobs, then end. Return False if the thread has not ended in time; it is abandoned."""
        if not self._stopping:
            self._stopping = True
            self._flush()
            self._queue.put(None)
        ended, _ = await asyncio.wait([self._has_ended], timeout=within)
        return bool(ended)

    # --- in the event loop ---

    def _flush(self) -> None:
        if self._next:
            jobs, self._next = self._next, []
            self._queue.put(jobs)
            if self._watched is None:
                self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)

    def _watch(self, groups: int, pauses: int) -> None:
        """Pause if no group was finished since the last check."""
        self._watched = None
        if not self._waiting or pauses == _MAX_PAUSES:
            return
        if groups != self._groups:
            self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)
            return
        time.sleep(_PAUSE_S)
        self._watched = self._loop.call_later(_AGAIN_S, self._watch, groups, pauses + 1)

    def _give_up(self, job: Job, within: float) -> None:
        job.given_up = True
        if not job.future.done():
            job.future.set_exception(
                StoreUnavailable(f"the disk did not answer within {within * 1000:.0f} ms")
            )

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

    # --- in the thread ---

    @property
    def is_waited_for(self) -> bool:
        """Whether more than one job is to be done."""
        return self._is_group or not self._queue.empty()

    def _run(self) -> None:
        try:
            while (jobs := self._take()) is not None:
                for start in range(0, len(jobs), GROUP):
                    group = jobs[start : start + GROUP]
                    self._is_group = len(jobs) > 1
                    self._perform([job for job in group if job.lasting or not job.given_up])
                    self._call(self._deliver, group)
                del jobs, group  # do not keep them alive while waiting
        finally:
            self._finish()
            self._call(self._has_ended.set_result, None)

    def _take(self) -> list[Job] | None:
        """Return the next group; None at the end."""
        while self._queue.empty() and self._idle():
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
        except RuntimeError:  # the loop is closed
            return
