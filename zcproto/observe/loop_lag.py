"""How long the loop does not get round to its other work, measured by a timer that comes late.

The timer is due every few milliseconds while there is traffic and seldom while there is none, so that an idle
server sleeps. A pause shorter than the period can go unseen in part: the figures are short by at most PERIOD.

A loop stands still for one of three reasons: it works at something, it waits for the interpreter that another
thread has, or it waits for a processor. The last may be the doing of other programs, and then no change here would
help. So each pause is told twice: whole, and less what other programs took. Linux counts how long a thread could
have run and did not (`run_delay` in schedstat). Of that, all is taken off but the CPU of this process's other
threads in the same time, which may have been what it waited for: the second figure is never too small by them.
To ask the system takes longer than all else here, so that is done only for a while after somebody has looked: until
then the second figure is the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Final, NamedTuple

PERIOD: Final = 0.005
IDLE_PERIOD: Final = 0.25
TOLD_FOR: Final = 600.0
"""Seconds after a look at the figures in which what other programs took is told apart."""

BOUNDS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)

_NS: Final = 1_000_000_000


class Usage(NamedTuple):
    """What a thread and its process have had so far, in seconds."""

    waited: float
    """The thread could have run and had no processor."""
    beside: float
    """CPU of the process's other threads."""


class ThreadUsage:
    """Reads the usage of the thread that makes it, in that thread."""

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):  # another system, which does not tell: nothing was waited for
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> Usage:
        if self._file is None:
            return Usage(0.0, 0.0)
        _, waited, _ = os.pread(self._file, 80, 0).split()
        return Usage(int(waited) / _NS, time.process_time() - time.thread_time())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def taken_by_others(before: Usage, after: Usage) -> float:
    """Seconds between these two for which the thread waited for a processor that other programs had."""
    return max(0.0, (after.waited - before.waited) - (after.beside - before.beside))


class LoopLag:
    """Counts pauses of one loop. `activity` is a number that grows while there is traffic."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        activity: Callable[[], int],
        open_usage: Callable[[], ThreadUsage] = ThreadUsage,
    ) -> None:
        self._loop = loop
        self._activity = activity
        self._open_usage = open_usage
        self._usage: ThreadUsage | None = None
        self._used: Usage | None = None  # None: nobody has looked for a while
        self._used_until = 0.0
        self._seen = -1
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.longest = 0.0
        """Seconds, since it was last taken."""
        self.longest_own = 0.0
        """The longest of those that are left when what other programs took is taken off; seconds, likewise."""
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        """Pauses by length, bounds in BOUNDS_MS; the last is all that is longer."""
        self.total = 0.0
        """Seconds of all of them."""

    def start(self) -> None:
        """Begin, in the loop's thread."""
        self._usage = self._open_usage()
        self._arm(PERIOD)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._usage is not None:
            self._usage.close()
            self._usage = self._used = None

    def take_longest(self) -> float:
        """The longest pause in seconds since the last time it was taken."""
        longest, self.longest = self.longest, 0.0
        return longest

    def take_longest_own(self) -> float:
        """As `take_longest`, less what other programs took; call it in the loop's thread."""
        if self._usage is not None:
            self._used_until = time.perf_counter() + TOLD_FOR
            if self._used is None:
                self._used = self._usage.read()
        longest, self.longest_own = self.longest_own, 0.0
        return longest

    def _arm(self, period: float) -> None:
        self._due = time.perf_counter() + period
        self._timer = self._loop.call_later(period, self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        others = 0.0
        if self._used is not None:
            assert self._usage is not None
            before, self._used = self._used, self._usage.read()
            others = taken_by_others(before, self._used)
            if now > self._used_until:
                self._used = None
        self.record(now - self._due, others)
        activity = self._activity()
        busy = activity != self._seen
        self._seen = activity
        self._arm(PERIOD if busy else IDLE_PERIOD)

    def record(self, late: float, others: float = 0.0) -> None:
        """Take in one timer's lateness, and how much of it other programs took; in seconds."""
        self.longest = max(self.longest, late)
        self.longest_own = max(self.longest_own, late - others)
        self.total += max(0.0, late)
        self.counts[bisect_left(BOUNDS_MS, late * 1000)] += 1
