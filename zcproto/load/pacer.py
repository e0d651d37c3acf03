"""Doing things at their time, to some 50 microseconds.

Timers of event loops have a grain of a millisecond, which would be most of what is measured here. On Linux a
timerfd (timerfd_create(2)) wakes the loop exactly; elsewhere the loop's own timer has to do, and the lateness
shows in the report.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

ACTS_PER_TURN: Final = 64
"""When many are due at once, the loop gets to read answers after this many."""

_CLOCK_MONOTONIC: Final = 1
_TFD_TIMER_ABSTIME: Final = 1
_EXPIRATIONS_SIZE: Final = 8


class Alarm(Protocol):
    """Calls back once at a time in monotonic seconds, or a little later."""

    def set(self, when: float) -> None: ...

    def close(self) -> None: ...


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class TimerfdAlarm:
    """An alarm by timerfd. By ctypes, because `os.timerfd_create` came with Python 3.13."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._spec = _Itimerspec()
        loop.add_reader(self._file, self._rang)

    def set(self, when: float) -> None:
        # Zero would disarm it.
        seconds, fraction = divmod(max(when, 1e-9), 1)
        self._spec.it_value.tv_sec = int(seconds)
        self._spec.it_value.tv_nsec = int(fraction * 1e9)
        self._libc.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)

    def _rang(self) -> None:
        try:
            os.read(self._file, _EXPIRATIONS_SIZE)
        except BlockingIOError:  # it was set anew in the same turn
            return
        self._callback()

    def close(self) -> None:
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1


class LoopAlarm:
    """An alarm by the loop's own timer."""

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
    """The most exact alarm of this system."""
    return TimerfdAlarm(loop, callback) if sys.platform == "linux" else LoopAlarm(loop, callback)


class Pacer:
    """Acts on a schedule: never early, and late only if the process is; what is late is never left out."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        alarm: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Alarm] = new_alarm,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._now = now
        self._alarm = alarm(loop, self._due)
        self._times: Iterator[float] = iter(())
        self._act: Callable[[float], None] = lambda intended: None
        self._start = 0.0
        self._next: float | None = None
        self._finished: asyncio.Future[None] | None = None

    async def run(self, times: Iterator[float], act: Callable[[float], None]) -> None:
        """Call `act` with each time, in monotonic seconds. `times` are seconds from now, in order."""
        self._times = times
        self._act = act
        self._start = self._now()
        self._finished = self._loop.create_future()
        self._advance()
        self._due()
        try:
            await self._finished
        finally:
            self._next = None

    def stop(self) -> None:
        """Let `run` return now; what is still to come is left out."""
        self._next = None
        self._finish()

    def close(self) -> None:
        self.stop()
        self._alarm.close()

    def _advance(self) -> None:
        offset = next(self._times, None)
        self._next = None if offset is None else self._start + offset

    def _due(self) -> None:
        left = ACTS_PER_TURN
        now = self._now()
        while self._next is not None:
            intended = self._next
            if intended > now:
                now = self._now()
                if intended > now:
                    self._alarm.set(intended)
                    return
            if not left:
                self._loop.call_soon(self._due)
                return
            left -= 1
            self._advance()
            self._act(intended)
        self._finish()

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)
