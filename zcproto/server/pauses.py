"""How long the loop does not get round to its other work, measured by a timer that comes late.

The timer is due every few milliseconds while there is traffic and seldom while there is none, so that an idle
server sleeps. A pause shorter than the period can go unseen in part: the figures are short by at most PERIOD.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

PERIOD: Final = 0.005
IDLE_PERIOD: Final = 0.25
BOUNDS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)


class PauseMeter:
    """Counts pauses of one loop. `activity` is a number that grows while there is traffic."""

    def __init__(self, loop: asyncio.AbstractEventLoop, activity: Callable[[], int]) -> None:
        self._loop = loop
        self._activity = activity
        self._seen = -1
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.longest = 0.0
        """Seconds, since it was last taken."""
        self.counts = [0] * (len(BOUNDS_MS) + 1)
        """Pauses by length, bounds in BOUNDS_MS; the last is all that is longer."""

    def start(self) -> None:
        self._arm(PERIOD)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take_longest(self) -> float:
        """The longest pause in seconds since the last time it was taken."""
        longest, self.longest = self.longest, 0.0
        return longest

    def _arm(self, period: float) -> None:
        self._due = time.perf_counter() + period
        self._timer = self._loop.call_later(period, self._tick)

    def _tick(self) -> None:
        self.record(time.perf_counter() - self._due)
        activity = self._activity()
        busy = activity != self._seen
        self._seen = activity
        self._arm(PERIOD if busy else IDLE_PERIOD)

    def record(self, late: float) -> None:
        """Take in one timer's lateness, in seconds."""
        self.longest = max(self.longest, late)
        late_ms = late * 1000
        for index, bound in enumerate(BOUNDS_MS):
            if late_ms <= bound:
                self.counts[index] += 1
                return
        self.counts[-1] += 1
