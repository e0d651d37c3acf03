"""A thread that runs jobs in groups and never makes the event loop wait.

Decides: which jobs form a group, and when a job is given up.

Rules:
- Jobs submitted in one turn of the loop form one group, and so do jobs submitted while the thread is busy.
- The time of a job is counted from when the thread begins it. While the thread hangs in one group for longer than
  the timeout, all jobs fail. Time in which the event loop did not run, or in which the thread used a processor or
  waited for one, does not count: the disk is well.
- A job that waits although the thread works is refused after some timeouts: the caller comes too often, the disk is
  well. A job that has not begun when it ends is not run, unless it is a lasting one.
- A busy event loop takes the interpreter back from the thread within microseconds, again and again. So when an
  answer is late the loop sleeps for a moment, repeatedly but not without limit.
- Jobs submitted as `ahead` form the next group. Jobs submitted as `behind` wait until no others do. Both
  queues are bounded: a job for a full one is refused, unless it is a lasting one, of which each follows a job that
  was admitted.

It must not know: what the jobs do.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, Final

from zcproto.common.clock import cpu_clock
from zcproto.common.process import queued_seconds
from zcproto.stores.base import StoreUnavailable, too_many_operations

GROUP: Final = 256
"""Jobs in one group: a few milliseconds of work."""

THREAD_NAME: Final = "zcproto-store"

CHECKS: Final = 4
"""How often a job is checked within its timeout. A loop that was blocked gets that many turns to read answers."""

PATIENCE: Final = 8
"""Timeouts that a job may wait for a thread that works."""

_READ_EVERY_S: Final = 0.005
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
    behind: bool
    future: asyncio.Future[Any]
    ahead: bool = False
    timer: asyncio.TimerHandle | None = None
    given_up: bool = False
    begun: bool = False
    done: bool = False
    result: Any = None
    error: BaseException | None = None


Perform = Callable[[Sequence[Job]], object]
"""Runs jobs and stores the outcome in each. Must not raise."""


class JobThread:
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
        self._behind: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._next: list[Job] = []
        self._waiting = [0, 0]  # jobs ahead, jobs behind
        self._groups = 0
        self._lock = Lock()  # for `begun` and `given_up`: a job is either run or given up
        self._is_group = False  # written by the thread
        self._is_busy = False  # likewise
        self._turns = 0  # likewise
        self._watched: asyncio.TimerHandle | None = None
        self._stopping = False
        self._has_ended = self._loop.create_future()
        self._thread = Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()
        self._cpu_seconds = cpu_clock(self._thread)
        self._queued, self._queued_at = 0.0, 0.0

    async def submit(
        self, work: Any, within: float, *, lasting: bool = False, behind: bool = False, ahead: bool = False
    ) -> Any:
        """Run a job and return its result.

        Raises StoreUnavailable if the thread takes longer than `within` seconds, ResourceExhausted at a full queue.
        """
        if self._stopping:
            raise StoreUnavailable("it is closed")
        if self._waiting[behind] >= self._limit and not lasting:
            raise too_many_operations()
        job = Job(work, lasting, behind, self._loop.create_future(), ahead)
        self._waiting[behind] += 1
        self._next.append(job)
        if len(self._next) == 1:
            self._loop.call_soon(self._flush)
        job.timer = self._loop.call_later(within / CHECKS, self._check, job, within, 1)
        try:
            return await job.future
        finally:
            job.timer.cancel()
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
            self._behind.extend(job for job in jobs if job.behind)
            self._ahead.extend(job for job in jobs if job.ahead)
            self._queue.put([job for job in jobs if not job.behind and not job.ahead])
            if self._watched is None:
                self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)

    def _watch(self, groups: int, pauses: int) -> None:
        """Pause if no group was finished since the last check."""
        self._watched = None
        if not any(self._waiting) or pauses == _MAX_PAUSES:
            return
        if groups != self._groups:
            self._watched = self._loop.call_later(_LATE_S, self._watch, self._groups, 0)
            return
        time.sleep(_PAUSE_S)
        self._watched = self._loop.call_later(_AGAIN_S, self._watch, groups, pauses + 1)

    def _check(
        self,
        job: Job,
        within: float,
        checks: int,
        still: int = 0,
        before: tuple[int, float, float] | None = None,
    ) -> None:
        """Give up a job if the thread hangs, or if it has waited too long for a thread that works.

        `still` counts the checks since the thread last did something, after which `_progress` was `before`.
        """
        progress = self._progress()
        still = still + 1 if progress == before else 0
        if not job.done:
            if self._is_busy and still >= CHECKS:
                job.given_up = True
                job.future.set_exception(
                    StoreUnavailable(f"the disk did not answer within {within * 1000:.0f} ms")
                )
                return
            if checks >= CHECKS * PATIENCE and self._give_up(job):
                job.future.set_exception(too_many_operations())
                return
        job.timer = self._loop.call_later(
            within / CHECKS, self._check, job, within, checks + 1, still, progress
        )

    def _progress(self) -> tuple[int, float, float]:
        """Return what changes whenever the thread does something other than wait for the disk."""
        now = self._loop.time()
        if now - self._queued_at >= _READ_EVERY_S:  # not for each of thousands of jobs
            self._queued, self._queued_at = queued_seconds(os.getpid(), self._thread.native_id), now
        return self._turns, self._cpu_seconds(), self._queued

    def _give_up(self, job: Job) -> bool:
        """Keep a job from being run. Return False if that is too late, or if it must be run."""
        with self._lock:
            job.given_up = not job.begun and not job.lasting
        return job.given_up

    def _deliver(self, jobs: Sequence[Job]) -> None:
        self._groups += 1
        for job in jobs:
            self._waiting[job.behind] -= 1
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
        return self._is_group or bool(self._behind or self._ahead) or not self._queue.empty()

    def _run(self) -> None:
        try:
            while (jobs := self._take()) is not None:
                while jobs or self._ahead:
                    if self._ahead:
                        group = [self._ahead.popleft() for _ in range(min(len(self._ahead), GROUP))]
                    else:
                        group, jobs = jobs[:GROUP], jobs[GROUP:]
                    self._is_group = len(jobs) + len(group) > 1
                    with self._lock:
                        for job in group:
                            job.begun = job.lasting or not job.given_up
                    self._begin_turn()
                    self._perform([job for job in group if job.begun])
                    for job in group:
                        job.done = True
                    self._call(self._deliver, group)
                jobs = group = []  # do not keep them alive while waiting
        finally:
            self._finish()
            self._call(self._has_ended.set_result, None)

    def _take(self) -> list[Job] | None:
        """Return the next group, maybe an empty one; None at the end."""
        while not self._behind and self._queue.empty() and self._is_idle_useful():
            pass
        jobs: list[Job] = []
        block = not self._behind
        while len(jobs) < GROUP:
            try:
                more = self._queue.get(block)
            except Empty:
                break
            block = False
            if more is None:
                if not jobs and not self._behind and not self._ahead:
                    return None
                self._queue.put(None)
                break
            jobs += more
        while self._behind and len(jobs) < GROUP:
            jobs.append(self._behind.popleft())
        return jobs

    def _is_idle_useful(self) -> bool:
        self._begin_turn()
        try:
            return self._idle()
        finally:
            self._is_busy = False

    def _begin_turn(self) -> None:
        self._turns += 1
        self._is_busy = True

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed
            return
