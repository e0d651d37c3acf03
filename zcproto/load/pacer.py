"""Schedules: the times at which requests are due, and a pacer that acts at those times to about 50 microseconds.

Timers of event loops have a resolution of a millisecond, more than what is measured here. On Linux, a timerfd
(timerfd_create(2)) wakes the loop precisely. Elsewhere the loop's own timer is used, and the report shows the lag.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

ACTS_PER_TURN: Final = 64
"""Actions before the loop may read answers, when many are due at once."""

_CLOCK_MONOTONIC: Final = 1
_TFD_TIMER_ABSTIME: Final = 1
_EXPIRATIONS_SIZE: Final = 8


Item = TypeVar("Item")


def uniform_times(rate: float, count: int) -> Iterator[float]:
    """Yield evenly spaced times in seconds from the start."""
    for number in range(count):
        yield number / rate


def poisson_times(rate: float, duration_s: float, source: random.Random) -> Iterator[float]:
    """Yield `round(rate * duration_s)` random times in seconds from the start, in order.

    The requests of each second are uniform over that second, which makes them a Poisson process within it, like the
    requests of many independent clients. The number per second is exact.
    """
    total = round(rate * duration_s)
    done = 0
    start = 0.0
    while start < duration_s:
        length = min(1.0, duration_s - start)
        # Derived from the running total, so that fractions of a request are not lost.
        until = total if start + length >= duration_s else round(rate * (start + length))
        yield from sorted(start + length * source.random() for _ in range(until - done))
        done = until
        start += length


def shuffled_rounds(items: Sequence[Item], source: random.Random) -> Iterator[Item]:
    """Yield all items in random order, then all in another order, and so on."""
    order = list(items)
    while order:
        source.shuffle(order)
        yield from order


class Alarm(Protocol):
    """Calls back once, at or shortly after a time in monotonic seconds."""

    def set(self, when: float) -> None: ...

    def close(self) -> None: ...


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class TimerfdAlarm:
    """An alarm by timerfd, through ctypes because `os.timerfd_create` requires Python 3.13."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._spec = _Itimerspec()
        loop.add_reader(self._file, self._expired)

    def set(self, when: float) -> None:
        # zero would disarm the timer
        seconds, fraction = divmod(max(when, 1e-9), 1)
        self._spec.it_value.tv_sec = int(seconds)
        self._spec.it_value.tv_nsec = int(fraction * 1e9)
        self._libc.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)

    def _expired(self) -> None:
        try:
            os.read(self._file, _EXPIRATIONS_SIZE)
        except BlockingIOError:  # it was set again in the same turn
            return
        self._callback()

    def close(self) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1


class LoopAlarm:
    """An alarm by the event loop's timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._timer: asyncio.TimerHandle | None = None

    def set(self, when: float) -> None:
        self.close()
        self._timer = self._loop.call_later(max(when - time.monotonic(), 0.0), self._callback)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def new_alarm(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Alarm:
    """Return the most precise alarm of this system."""
    return TimerfdAlarm(loop, callback) if sys.platform == "linux" else LoopAlarm(loop, callback)


class Pacer:
    """Acts on a schedule: never early, and late only if the process is busy. Late actions are not skipped."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        alarm: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Alarm] = new_alarm,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._now = now
        self._alarm = alarm(loop, self._run_due)
        self._times: Iterator[float] = iter(())
        self._act: Callable[[float], None] = lambda due: None
        self._start = 0.0
        self._next: float | None = None
        self._finished: asyncio.Future[None] | None = None

    async def run(self, times: Iterator[float], act: Callable[[float], None]) -> None:
        """Call `act` at each of `times` (seconds from now, in order) with that time in monotonic seconds."""
        self._times = times
        self._act = act
        self._start = self._now()
        self._finished = self._loop.create_future()
        self._advance()
        self._run_due()
        try:
            await self._finished
        finally:
            self._next = None

    def stop(self) -> None:
        """Make `run` return now, without the remaining actions."""
        self._next = None
        self._finish()

    def close(self) -> None:
        self.stop()
        self._alarm.close()

    def _advance(self) -> None:
        offset = next(self._times, None)
        self._next = None if offset is None else self._start + offset

    def _run_due(self) -> None:
        left = ACTS_PER_TURN
        now = self._now()
        while self._next is not None:
            due = self._next
            if due > now:
                now = self._now()
                if due > now:
                    self._alarm.set(due)
                    return
            if not left:
                self._loop.call_soon(self._run_due)
                return
            left -= 1
            self._advance()
            self._act(due)
        self._finish()

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)
