"""A clock that a test moves, and event loops that go by it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from zcproto.common.clock import MS_PER_SECOND, system_clock


class MovableClock:
    """The system's time, plus what `advance` has added.

        clock = MovableClock()
        async with connect_in_memory(app, user="ada", clock=clock) as client:
            clock.advance(3600)

    The server, its clients and their event loop go by it: `asyncio.sleep` and `asyncio.timeout` too, in methods and
    in the test. Several servers may share it.
    """

    def __init__(self) -> None:
        self._ahead = 0.0
        self._loops: Counter[asyncio.AbstractEventLoop] = Counter()

    def wall(self) -> int:
        """Return the milliseconds since the Unix epoch."""
        return system_clock.wall() + round(self._ahead * MS_PER_SECOND)

    def now(self) -> float:
        """Return monotonic seconds from an arbitrary start."""
        return system_clock.now() + self._ahead

    def advance(self, seconds: float) -> None:
        """Move the time ahead at once, as on a machine that was suspended: what is due by then runs late, in order.

        For an hour during which clients keep their connections alive and refresh their sessions, advance in steps
        and await something in between.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds:g}): time does not go back; give seconds from 0")
        self._ahead += seconds

    @contextmanager
    def drive(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Let a loop go by this clock, until the end of the block."""
        if not isinstance(loop, asyncio.BaseEventLoop):
            raise RuntimeError(
                f"the time of a {type(loop).__module__} loop cannot be moved: run this test on asyncio's own loop,"
                " or leave out clock="
            )
        current = loop.__dict__.get("time")
        if current not in (None, self.now):
            raise RuntimeError("this event loop goes by another MovableClock: pass the same one as clock=")
        self._loops[loop] += 1
        loop.time = self.now  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._loops[loop] -= 1
            if not self._loops[loop]:
                del self._loops[loop], loop.time
