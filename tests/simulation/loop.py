"""Virtual time, and an event loop for each process, which a scheduler runs one turn at a time.

Each process has a loop of its own, as in reality: a paused process runs nothing, and a crashed one never again,
while others go on. Within a loop callbacks keep asyncio's order, on which programs may rely. Which process has the
next turn, and how long a turn takes, comes from the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import sys
import threading
from asyncio import events
from collections.abc import Callable, Iterator
from math import inf
from random import Random
from typing import Any

TURN_S = 2e-5, 2e-4
"""How long a turn of a loop takes at least and at most."""

THREAD_S = 1e-4, 5e-3
"""How long a function takes that a loop runs in a thread. It is run here, in the process of the simulation."""


class _Selector:
    """Nothing comes from outside of the simulation."""

    def select(self, timeout: float | None) -> tuple[()]:
        return ()


class SimulatedLoop(asyncio.BaseEventLoop):
    """The event loop of a process."""

    def __init__(self, scheduler: Scheduler, name: str, run: int) -> None:
        super().__init__()
        self._selector = _Selector()
        self._clock_resolution = 1e-9
        self._scheduler = scheduler
        self.name = name
        self.run = f"{name}.{run}"
        """The name of this process and no other, not even after a restart."""
        self.random = scheduler.random_of(self.run)
        self._turns = scheduler.random_of(f"{self.run} turns")
        self.free_at = 0.0  # a turn, or a pause, lasts until then
        self.planned = inf  # of the scheduler
        self.has_crashed = False

    def time(self) -> float:
        return self._scheduler.now

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = super().call_at(when, callback, *args, context=context)
        if when < self.planned:
            self._scheduler.plan(self, when)
        return handle

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except BaseException as error:
                future.set_exception(error)

        self.call_later(self._turns.uniform(*THREAD_S), run)
        return future

    def run_turn(self) -> None:
        """Run what is ready."""
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(self._asyncgen_firstiter_hook, self._asyncgen_finalizer_hook)
        try:
            self._run_once()
        finally:
            events._set_running_loop(None)

    @property
    def next_turn(self) -> float:
        """When something is ready to run."""
        if self._ready:
            return self.free_at
        timers: list[asyncio.TimerHandle] = self._scheduled
        while timers and timers[0].cancelled():
            heapq.heappop(timers)._scheduled = False
            self._timer_cancelled_count -= 1
        return max(timers[0].when(), self.free_at) if timers else inf

    def pause(self, seconds: float) -> None:
        """Run nothing for a while, as under SIGSTOP."""
        self.free_at = max(self.free_at, self._scheduler.now + seconds)

    def crash(self) -> None:
        """Run nothing any more. Tasks stay where they are."""
        self.has_crashed = True
        for task in asyncio.all_tasks(self):
            task._log_destroy_pending = False

    def _process_events(self, event_list: object) -> None:
        """Nothing has come."""

    def __del__(self, warn: object = None) -> None:
        """Loops end with the simulation."""

    def _write_to_self(self) -> None:
        self._scheduler.plan(self, self._scheduler.now)


class Scheduler:
    """Gives turns to loops in the order of virtual time. `now` is the time of all processes."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.now = 1_000.0
        self.turns = 0
        self._random = self.random_of("scheduler")
        self._heap: list[tuple[float, float, int, SimulatedLoop]] = []
        self._entries = 0

    def random_of(self, name: str) -> Random:
        """Return the random numbers of a part of the simulation.

        Each part has its own: what one does more or less leaves the others as they are.
        """
        return Random(f"{self.seed} {name}")

    def plan(self, loop: SimulatedLoop, when: float) -> None:
        """Give a loop its next turn at a time, unless it has an earlier one."""
        when = max(when, loop.free_at, self.now)
        if when < loop.planned:
            loop.planned = when
            self._entries += 1
            heapq.heappush(self._heap, (when, self._random.random(), self._entries, loop))

    def run_until(self, end: float) -> None:
        """Run all loops until a time."""
        while self._heap and self._heap[0][0] <= end:
            when, _, _, loop = heapq.heappop(self._heap)
            if when != loop.planned:
                continue  # it has got an earlier turn
            loop.planned = inf
            if loop.has_crashed:
                continue
            self.now = max(when, self.now)
            if loop.free_at <= self.now:
                self.turns += 1
                loop.planned = -inf  # it plans itself afterwards
                loop.run_turn()
                loop.free_at = max(loop.free_at, self.now + loop._turns.uniform(*TURN_S))
                loop.planned = inf
            due = loop.next_turn
            if due < inf:
                self.plan(loop, due)
        self.now = end


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Refuse to start threads: what they do would depend on the machine."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise AssertionError(f"the simulation has no threads: {thread.name}")

    threading.Thread.start = refuse
    try:
        yield
    finally:
        threading.Thread.start = start
