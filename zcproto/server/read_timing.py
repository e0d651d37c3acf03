"""Which reads of a loop are timed: one now and then, so that all the others cost nothing.

A busy server times the first read in each part of 16 ms, 62 a second: enough for the percentiles of a scrape. One
that gets a few requests a second times each of them. No timer is set for it: the time of a read is known anyway.
"""

from __future__ import annotations

from typing import Final

PART_BITS: Final = 4
"""A part of time is the wall clock's milliseconds without so many of their lowest bits."""


class ReadTiming:
    """`part` is the part of time that had its timed read; a read of any other part is to be timed."""

    __slots__ = ("part",)

    def __init__(self) -> None:
        self.part = -1

    def timed(self, wall: int) -> None:
        """A read is being timed: no other one of this part is."""
        self.part = wall >> PART_BITS
