"""Read the time and the system's randomness. Nothing else does.

Other modules take `wall` (milliseconds since the Unix epoch, an int) or `now` (monotonic seconds, a float) as an
argument, so that tests control the clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from threading import Thread
from typing import Protocol

from zcproto.accelerator import accelerated

MS_PER_SECOND = 1000
NS_PER_MS = 1_000_000


class Clock(Protocol):
    """A source of time."""

    def wall(self) -> int:
        """Return the milliseconds since the Unix epoch. They may jump in either direction."""

    def now(self) -> float:
        """Return monotonic seconds from an arbitrary start."""


Entropy = Callable[[int], bytes]
"""A source of random bytes for secrets: returns that many."""


@accelerated
def wall_ms() -> int:
    """Return the milliseconds since the Unix epoch."""
    return time.time_ns() // NS_PER_MS


class SystemClock:
    """The system's clock."""

    def __init__(self) -> None:
        # CPython calls fields faster than static methods, and a server reads the time several times for each read.
        self.wall = wall_ms
        self.now = time.monotonic


class MonotonicClock:
    """A clock whose wall time is read once, at its creation, and then advances with monotonic time.

    Setting the machine's clock does not change the timestamps of a running client, which corrects its offset from
    the server's clock with every WELCOME.
    """

    def __init__(self, clock: Clock) -> None:
        self.now = clock.now
        self._offset = clock.wall() - int(clock.now() * MS_PER_SECOND)

    def wall(self) -> int:
        return self._offset + int(self.now() * 1000.0)  # two floats: CPython specialises that


def cpu_clock(thread: Thread) -> Callable[[], float]:
    """Return a function that returns the processor seconds used by a running thread: 0 on systems that hide it."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return lambda: 0.0
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)

    def used() -> float:
        try:
            return time.clock_gettime(clock)
        except OSError:  # the thread has ended
            return 0.0

    return used


def used_cpu_s() -> float:
    """Return the processor seconds used by this process."""
    return time.process_time()


def random_fraction(entropy: Entropy) -> float:
    """Return a random number from 0 to below 1."""
    return int.from_bytes(entropy(4), "big") / 2.0**32


system_clock = SystemClock()
system_entropy: Entropy = os.urandom
