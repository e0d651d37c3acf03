"""Which reads of a loop are timed: one now and then, so that all the others cost nothing.

A busy server times one in each grain of the wheel, 64 a second: enough for the percentiles of a scrape. One that
gets a few requests a second times each of them.
"""

from __future__ import annotations

from typing import Final

from zcproto.deadlines import TICKS_PER_SECOND, DeadlineWheel

PERIOD: Final = 1 / TICKS_PER_SECOND


class ReadTiming:
    """`time_next` says that the next read is to be timed; whoever does so calls `timed`."""

    __slots__ = ("_wheel", "deadline_tick", "time_next")

    def __init__(self, wheel: DeadlineWheel) -> None:
        self._wheel = wheel
        self.time_next = True
        self.deadline_tick = 0

    def timed(self) -> None:
        """A read is being timed: none is for a moment."""
        if self.time_next:
            self.time_next = False
            self._wheel.set(self, self._wheel.now() + PERIOD)

    def stop(self) -> None:
        """Time nothing more."""
        self.time_next = False
        self._wheel.discard(self)

    def handle_deadline(self, now: float) -> None:
        self.time_next = True
