"""The client's own clock: the wall time at its start, carried on by monotonic time.

When somebody sets this machine's clock, the timestamps of a client that runs on do not jump with it. What it is
off the server's clock is taken from each WELCOME.
"""

from __future__ import annotations

from zcproto.common.clock import MS_PER_SECOND, Clock


class SteadyClock:
    """A clock whose wall time never jumps."""

    __slots__ = ("_clock", "_start_now", "_start_wall")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_wall = clock.wall()
        self._start_now = clock.now()

    def wall(self) -> int:
        """Milliseconds since the Unix epoch, by the clock as it was set at the start."""
        return self._start_wall + int((self._clock.now() - self._start_now) * MS_PER_SECOND)

    def now(self) -> float:
        return self._clock.now()
