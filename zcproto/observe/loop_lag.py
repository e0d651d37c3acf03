"""Measure the lag of the event loop by the delay of a timer.

The timer runs every few milliseconds under heavy traffic or while the loop lags, less often under light traffic,
when each run wakes a sleeping loop, and rarely without traffic. A lag shorter than the period may be missed in
part: the figures are low by at most PERIOD, or LIGHT_PERIOD under light traffic.

A loop lags because it works, because another thread holds the interpreter, or because it waits for a processor.
The last may be caused by other programs, so each lag is reported twice: in total, and without the time taken by
other programs. Linux counts the time during which a thread was runnable but not running (`run_delay` in
schedstat). The CPU time of this process's other threads is not subtracted, which this thread may have
waited for. Reading schedstat costs more than everything else here, and is done only for some minutes after the
figures were read; until then both figures are equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.deadlines import next_multiple
from zcproto.observe.histogram import Histogram
from zcproto.observe.loop_holds import LoopHolds

PERIOD: Final = 0.005
LIGHT_PERIOD: Final = 0.02
HEAVY: Final = 2_000
"""Requests and handshakes a second from which on traffic is heavy: some percent of a processor."""

IDLE_PERIOD: Final = 0.5
WAITING_PERIOD: Final = 0.05
"""While requests are in flight that wait: their methods may go on at any time."""

DETAIL_TIME: Final = 600.0
"""Seconds after the figures were read during which the time of other programs is measured."""

BOUNDS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)

_NS: Final = 1_000_000_000


class WaitingTime:
    """Read the time that a thread waited for a processor, in the thread that creates it."""

    def __init__(self, path: str = "/proc/thread-self/schedstat") -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):  # not available: report no waiting
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> float:
        """Return the seconds waited, less the CPU time of the other threads of this process."""
        if self._file is None:
            return 0.0
        _, waited, _ = os.pread(self._file, 80, 0).split()
        return int(waited) / _NS - (time.process_time() - time.thread_time())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class LoopLag:
    """Measure the lag of one loop. `activity` returns a number that grows under traffic.

    `is_waiting` returns whether requests wait. `holds` finds the causes of long lags, if it is set.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        activity: Callable[[], int],
        open_waiting: Callable[[], WaitingTime] = WaitingTime,
        is_waiting: Callable[[], object] = lambda: False,
    ) -> None:
        self._loop = loop
        self._activity = activity
        self._is_waiting = is_waiting
        self._period = PERIOD
        self.holds: LoopHolds | None = None
        self._open_waiting = open_waiting
        self._waiting: WaitingTime | None = None
        self._waited: float | None = None  # None: not read recently
        self._read_until = 0.0
        self._seen = -1
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.longest = 0.0
        """Longest lag in seconds since `take_longest`."""
        self.longest_own = 0.0
        """Longest lag in seconds without the time of other programs, since `take_longest_own`."""
        self.recent = 0.0
        """Longest lag in seconds since the reader of this attribute set it to 0."""
        self.lags = Histogram([bound / MS_PER_SECOND for bound in BOUNDS_MS])
        """All lags in seconds."""

    def start(self) -> None:
        """Start measuring, in the loop's thread."""
        self._waiting = self._open_waiting()
        if self.holds is not None:
            self.holds.start()
        self._arm(PERIOD)

    def traffic_begins(self) -> None:
        """Measure the request that has just arrived, if the loop was idle."""
        if self._period > LIGHT_PERIOD and self._timer is not None:
            self._timer.cancel()
            self._arm(PERIOD)

    def overdue(self) -> float:
        """Return for how many seconds the timer should have run; negative before. Called by another thread."""
        return time.perf_counter() - self._due

    def stop(self) -> None:
        if self.holds is not None:
            self.holds.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = self._waited = None

    def take_longest(self) -> float:
        """Return the longest lag in seconds since the last call."""
        longest, self.longest = self.longest, 0.0
        return longest

    def take_longest_own(self) -> float:
        """Return the longest lag without the time of other programs; call it in the loop's thread."""
        if self._waiting is not None:
            self._read_until = time.perf_counter() + DETAIL_TIME
            if self._waited is None:
                self._waited = self._waiting.read()
        longest, self.longest_own = self.longest_own, 0.0
        return longest

    def _arm(self, period: float) -> None:
        wait = period
        if period == IDLE_PERIOD:
            now = self._loop.time()
            wait = next_multiple(period, now) - now
        self._due = time.perf_counter() + wait
        if self.holds is not None and (period == IDLE_PERIOD) != (self._period == IDLE_PERIOD):
            (self.holds.sleep if period == IDLE_PERIOD else self.holds.wake)()
        self._period = period
        self._timer = self._loop.call_later(wait, self._tick)

    def _tick(self) -> None:
        now = time.perf_counter()
        others = 0.0
        if self._waited is not None:
            assert self._waiting is not None
            before, self._waited = self._waited, self._waiting.read()
            others = max(0.0, self._waited - before)
            if now > self._read_until:
                self._waited = None
        late = now - self._due
        self.record(late, others)
        if self.holds is not None:
            self.holds.timer_ran(late)
        activity = self._activity()
        grown, self._seen = activity - self._seen, activity
        if grown:
            is_heavy = late >= PERIOD or grown >= HEAVY * (self._period + late)
            self._arm(PERIOD if is_heavy else LIGHT_PERIOD)
        else:
            self._arm(WAITING_PERIOD if self._is_waiting() else IDLE_PERIOD)

    def record(self, late: float, others: float = 0.0) -> None:
        """Record the delay of one timer, and the part taken by other programs; in seconds."""
        self.longest = max(self.longest, late)
        self.recent = max(self.recent, late)
        self.longest_own = max(self.longest_own, late - others)
        self.lags.add(max(0.0, late))
