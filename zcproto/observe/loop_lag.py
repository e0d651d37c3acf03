"""Measure the lag of the event loop by the delay of a timer, and find the methods that hold the loop.

The timer runs every few milliseconds under heavy traffic or while the loop lags, less often under light traffic,
when each run wakes a sleeping loop, and rarely without traffic. A lag shorter than the period may be missed in
part: the figures are low by at most PERIOD, or LIGHT_PERIOD under light traffic.

A loop lags because it works, because another thread holds the interpreter, or because it waits for a processor.
The last may be caused by other programs, so each lag is reported twice: in total, and without the time taken by
other programs. Linux counts the time during which a thread was runnable but not running (`run_delay` in
schedstat). The CPU time of this process's other threads is not subtracted, which this thread may have
waited for. Reading schedstat costs more than everything else here, and is done only for some minutes after the
figures were read; until then both figures are equal.

A thread finds the method that holds the loop:

    the timer is overdue -> the stack of the loop's thread, every SAMPLE s -> the timer runs: which method was seen?

Rules:
- Calls cost nothing: the thread only reads, and looks at a stack only while the timer is overdue.
- The thread sleeps while the timer is rare, so that an idle server sleeps.
- A hold is one call that several samples in a row have seen. Many short ones in one turn of the loop are its load.
- A frame is not kept longer than the hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.deadlines import next_multiple
from zcproto.observe.histogram import Histogram

HELD: Final = 0.1
"""Seconds from which on a hold is reported."""

CHECK: Final = 0.05
"""Seconds between looks at the timer: each makes the loop give the interpreter away for a moment."""

SAMPLE: Final = 0.015
LEAST_SEEN: Final = 3
"""Samples of one call in a row, which the shortest hold has."""

MAX_NAMES: Final = 3

_taking_stacks = threading.Lock()


def current_stacks() -> Mapping[int, FrameType]:
    """Return the newest frame of each thread, by its id.

    On Python 3.11 a garbage collection meanwhile may run code while it holds a lock of the interpreter. A thread
    that is started then waits for the lock, and all others for that thread, for ever (CPython issue 106883).
    """
    with _taking_stacks:
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if is_enabled:
                gc.enable()


class Hold(NamedTuple):
    """A method that held the loop. `at` is the line that it ran: file, line and function."""

    method: str
    at: str
    seconds: float


class SeenCall:
    """The call that the last samples have seen."""

    __slots__ = ("at", "frame", "method", "times")

    def __init__(self, method: str, frame: FrameType) -> None:
        self.method = method
        self.frame = frame
        self.times = 0
        self.at = ""


class LoopHolds:
    """Watch the loop of the thread that creates it. `overdue` returns for how many seconds its timer is overdue.

    `counts` are holds by method. `on_hold` is called in the loop after each.
    """

    def __init__(
        self,
        overdue: Callable[[], float],
        functions: Iterable[tuple[str, Callable[..., Any]]],
        on_hold: Callable[[Hold], None],
        stacks: Callable[[], Mapping[int, FrameType]] = current_stacks,
    ) -> None:
        self._overdue = overdue
        self._names = names_by_code(functions)
        self._on_hold = on_hold
        self._stacks = stacks
        self._loop_thread = threading.get_ident()
        self._seen: SeenCall | None = None
        self._held: SeenCall | None = None  # it has ended, and the timer has not run since
        self._is_awake = threading.Event()
        self._is_stopped = False
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        self._is_awake.set()
        threading.Thread(target=self._watch, name="zcproto-watch", daemon=True).start()

    def stop(self) -> None:
        self._is_stopped = True
        self._is_awake.set()

    def wake(self) -> None:
        """Watch from now on: the timer is frequent."""
        self._is_awake.set()

    def sleep(self) -> None:
        """Stop watching until `wake`."""
        self._is_awake.clear()

    def timer_ran(self, late: float) -> None:
        """Report a hold if the loop's timer ran late because of one. Called in the loop."""
        seen, self._seen, self._held = self._held or self._seen, None, None
        if late >= HELD and seen is not None and seen.times >= LEAST_SEEN:
            self.counts[seen.method] += 1
            self._on_hold(Hold(seen.method, seen.at, late))

    def sample(self) -> None:
        """Look at the stack if the timer is overdue."""
        overdue = self._overdue()
        if overdue <= 0:
            self._seen = self._held = None
            return
        frame = self._stacks().get(self._loop_thread)
        while frame is not None and frame.f_code not in self._names:
            frame = frame.f_back
        seen = self._seen
        if seen is not None and seen.frame is not frame and seen.times >= LEAST_SEEN and overdue >= HELD:
            self._held = seen
        if frame is None:
            self._seen = None
            return
        if seen is None or seen.frame is not frame:
            seen = SeenCall(self._names[frame.f_code], frame)
        seen.times += 1
        path = PurePath(frame.f_code.co_filename)
        seen.at = f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        self._seen = seen

    def _watch(self) -> None:
        while self._is_awake.wait() and not self._is_stopped:
            time.sleep(CHECK if self._seen is None else SAMPLE)
            self.sample()
            if not self._is_awake.is_set():
                self._seen = self._held = None


def names_by_code(functions: Iterable[tuple[str, Callable[..., Any]]]) -> dict[CodeType, str]:
    """Return the names of functions by their code; functions that share their code share a name."""
    names: dict[CodeType, dict[str, None]] = {}
    for name, function in functions:
        code = _code_of(function)
        if code is not None:
            names.setdefault(code, {})[name] = None
    return {
        code: ", ".join([*found][:MAX_NAMES]) + (" and others" if len(found) > MAX_NAMES else "")
        for code, found in names.items()
    }


def _code_of(function: Any) -> CodeType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = getattr(function, "__call__", None)  # noqa: B004 - its code
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


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
