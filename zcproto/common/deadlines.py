"""One coarse wheel of deadlines for a loop, instead of one timer for each connection.

Entries are put into buckets by the time at which they are due, rounded up: to a second if that is more than
ten seconds away, to an eighth of a second beyond one second, else to 1/64 s. Only the earliest bucket has a
timer. An entry is in one bucket at most; taking it out leaves nothing of it behind, so the wheel never keeps
a closed connection. An empty bucket stays until its time, so that each tick is in the heap once: however
often deadlines move, there are never more buckets than ticks ahead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from math import ceil, inf
from typing import Any, Final, Protocol

TICKS_PER_SECOND: Final = 64
ENTRIES_PER_TURN: Final = 64
"""When thousands are due at once, the loop gets its turn after this many."""


class Timed(Protocol):
    """Something with a deadline. `deadline_tick` belongs to the wheel; it starts as 0."""

    deadline_tick: int

    def handle_deadline(self, now: float) -> None: ...


class Timers(Protocol):
    """The part of an event loop that the wheel needs."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Any: ...

    def call_soon(self, callback: Callable[..., object], *args: Any) -> Any: ...


class DeadlineWheel:
    """Deadlines in the time of `timers.time()`, in seconds."""

    __slots__ = ("_armed_tick", "_buckets", "_heap", "_timer", "_timers")

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._buckets: dict[int, set[Timed]] = {}
        self._heap: list[int] = []  # the ticks of the buckets
        self._armed_tick = 0
        self._timer: Any = None

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def now(self) -> float:
        """The time that deadlines are in."""
        return self._timers.time()

    def set(self, entry: Timed, deadline: float) -> None:
        """Have `entry.handle_deadline` called at `deadline` or a little later. Replaces what was set before."""
        if deadline == inf:
            self.discard(entry)
            return
        ahead = deadline - self._timers.time()
        if ahead > 10:
            tick = ceil(deadline) * TICKS_PER_SECOND
        elif ahead > 1:
            tick = ceil(deadline * 8) * (TICKS_PER_SECOND // 8)
        else:
            tick = max(1, ceil(deadline * TICKS_PER_SECOND))
        buckets = self._buckets
        old = entry.deadline_tick
        if old:
            if tick == old:
                return
            buckets[old].discard(entry)
        bucket = buckets.get(tick)
        if bucket is None:
            buckets[tick] = {entry}
            heapq.heappush(self._heap, tick)
        else:
            bucket.add(entry)
        entry.deadline_tick = tick
        if self._timer is None or tick < self._armed_tick:
            self._arm()

    def discard(self, entry: Timed) -> None:
        """Forget an entry's deadline, if it has one."""
        tick = entry.deadline_tick
        if not tick:
            return
        entry.deadline_tick = 0
        self._buckets[tick].discard(entry)

    def close(self) -> list[Timed]:
        """Stop the timer. Entries are forgotten; those that still waited are returned."""
        waiting = [entry for bucket in self._buckets.values() for entry in bucket]
        for entry in waiting:
            entry.deadline_tick = 0
        self._buckets.clear()
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return waiting

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and not self._buckets[self._heap[0]]:
            del self._buckets[heapq.heappop(self._heap)]
        if self._heap:
            self._armed_tick = self._heap[0]
            self._timer = self._timers.call_at(self._armed_tick / TICKS_PER_SECOND, self._turn)

    def _turn(self) -> None:
        now = self._timers.time()
        # libuv and asyncio may both call a timer a little early, by their clocks' grain.
        due = max(self._armed_tick, int(now * TICKS_PER_SECOND))
        self._armed_tick = 0  # what is set meanwhile arms no timer: this turn does, at its end
        try:
            self._handle_due(due, max(now, due / TICKS_PER_SECOND))
        finally:  # an entry that raises must not stop the others' time
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
