"""The only reader of time and of the system's randomness.

Everything else takes `wall` (milliseconds since the Unix epoch, an int) or `now` (monotonic seconds, a
float) as an argument, so that tests turn the clock by hand.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

MS_PER_SECOND = 1000
NS_PER_MS = 1_000_000

_time_ns = time.time_ns  # every read of a server asks for it


class Clock(Protocol):
    """A source of time."""

    def wall(self) -> int:
        """Milliseconds since the Unix epoch. It may jump either way."""
        ...

    def now(self) -> float:
        """Seconds that only ever grow, from an arbitrary start."""
        ...


class Entropy(Protocol):
    """A source of random bytes fit for secrets."""

    def __call__(self, size: int, /) -> bytes: ...


class SystemClock:
    """The clock of this machine."""

    __slots__ = ()

    def wall(self) -> int:
        return _time_ns() // NS_PER_MS

    now = staticmethod(time.monotonic)


system_clock = SystemClock()
system_entropy: Entropy = os.urandom
