"""Keep the deadlines of all connections in one coarse timer wheel, instead of one timer for each.

Entries are in buckets by their due time, rounded up: to a second if it is more than ten seconds away, to an
eighth of a second beyond one second, else to 1/64 s. Only the earliest bucket has a timer. An entry is in at most
one bucket; discarding it leaves no reference, so that the wheel never keeps a closed connection alive. An empty
bucket stays until its time, so that each tick is in the heap once: however often deadlines move, there are never
more buckets than ticks ahead.
"""

from __future__ import annotations

import asyncio
import heapq
import sys
from collections.abc import Callable
from math import ceil, inf
from typing import Any, Final, Protocol

TICKS_PER_SECOND: Final = 64
TICKS_PER_EIGHTH: Final = TICKS_PER_SECOND // 8
NEVER: Final = sys.maxsize
ENTRIES_PER_TURN: Final = 64
"""Entries handled before the event loop gets a turn, when thousands are due at once."""


def next_multiple(interval: float, now: float) -> float:
    """Return a multiple of `interval`, the next one that is at least a quarter of it away.

    An idle process wakes up rarely if what it does regularly is due at the same moments.
    """
    return ceil(now / interval + 0.25) * interval


async def sleep_together(interval: float) -> None:
    """Sleep until the next multiple of `interval` seconds, for work that is repeated."""
    now = asyncio.get_running_loop().time()
    await asyncio.sleep(next_multiple(interval, now) - now)


class Timed(Protocol):
    """An object with a deadline. `deadline_tick` is managed by the wheel and starts as 0."""

    deadline_tick: int

    def handle_deadline(self, now: float) -> None: ...


class Timers(Protocol):
    """The part of an event loop that the wheel needs."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Any: ...

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Any: ...


class DeadlineWheel:
    """Deadlines in the time of `timers.time()`, in seconds."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.now = timers.time
        """Returns the current time, on the scale of deadlines."""
        self._buckets: dict[int, set[Timed]] = {}
        self._heap: list[int] = []  # the ticks of the buckets
        self._armed_tick = NEVER
        self._timer: Any = None

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def set(self, entry: Timed, deadline: float) -> None:
        """Call `entry.handle_deadline` at `deadline` or slightly later. Replaces an earlier deadline."""
        ahead = deadline - self.now()
        # CPython specialises operations on two floats, not on a float and an integer.
        if ahead > 10.0:
            if deadline == inf:
                self.discard(entry)
                return
            tick = ceil(deadline) * TICKS_PER_SECOND
        elif ahead > 1.0:
            tick = ceil(deadline * 8.0) * TICKS_PER_EIGHTH
        else:
            tick = max(1, ceil(deadline * TICKS_PER_SECOND))
        buckets = self._buckets
        old = entry.deadline_tick
        if old:
            if tick == old:
                return
            buckets[old].discard(entry)
        bucket = buckets.get(tick)
        entry.deadline_tick = tick
        if bucket is not None:  # the timer is set for its tick or an earlier one
            bucket.add(entry)
            return
        buckets[tick] = {entry}
        heapq.heappush(self._heap, tick)
        if tick < self._armed_tick:
            self._arm()

    def discard(self, entry: Timed) -> None:
        """Remove an entry's deadline, if it has one."""
        tick = entry.deadline_tick
        if not tick:
            return
        entry.deadline_tick = 0
        self._buckets[tick].discard(entry)

    def close(self) -> list[Timed]:
        """Stop the timer, remove all entries and return them."""
        waiting = [entry for bucket in self._buckets.values() for entry in bucket]
        for entry in waiting:
            entry.deadline_tick = 0
        self._buckets.clear()
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._armed_tick = NEVER
        return waiting

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and not self._buckets[self._heap[0]]:
            del self._buckets[heapq.heappop(self._heap)]
        self._armed_tick = self._heap[0] if self._heap else NEVER
        if self._heap:
            self._timer = self._timers.call_at(self._armed_tick / TICKS_PER_SECOND, self._turn)

    def _turn(self) -> None:
        now = self.now()
        # libuv and asyncio may call a timer slightly early because of their clock resolution.
        due = max(self._armed_tick, int(now * TICKS_PER_SECOND))
        self._armed_tick = 0  # a deadline set during this turn arms no timer: the end of the turn does
        try:
            self._handle_due(due, max(now, due / TICKS_PER_SECOND))
        finally:  # an entry that raises must not stop the others
            self._arm()

    def _handle_due(self, due: int, now: float) -> None:
        left = ENTRIES_PER_TURN
        while left and self._heap and self._heap[0] <= due:
            bucket = self._buckets[self._heap[0]]
            if not bucket:
                del self._buckets[heapq.heappop(self._heap)]
                continue
            left -= 1
            entry = bucket.pop()
            entry.deadline_tick = 0
            entry.handle_deadline(now)
