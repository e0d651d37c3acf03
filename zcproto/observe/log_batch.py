"""Lines that tell of ordinary things, gathered and written some at a time.

Why: of 10,000 clients that connect, each opens a session, and each is worth a line. Written at once it costs the
login four times as much as among others, for all that a line needs is cold by then. A line has the time of its
event, not of its writing; nothing that somebody must see at once goes this way.
"""

from __future__ import annotations

from typing import Any, Final

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.observe.log import AT, Logger, lines_together

DELAY: Final = 0.25
"""Seconds that a line waits for others, at most: who reads along does not notice, and a login in a crowd finds a
hundred others to share the cold start with."""

MAX_LINES: Final = 128
"""Lines written in one turn of the loop, about two milliseconds; the next one does not wait any more."""


class LogBatch:
    """Lines of one loop that wait."""

    __slots__ = ("_clock", "_lines", "_log", "_wheel", "deadline_tick")

    def __init__(self, log: Logger, wheel: DeadlineWheel, clock: Clock) -> None:
        self._log = log
        self._wheel = wheel
        self._clock = clock
        self._lines: list[tuple[str, dict[str, Any]]] = []
        self.deadline_tick = 0

    def add(self, event: str, **values: Any) -> None:
        """Have a line written a little later, at the level info."""
        values[AT] = self._clock.wall()
        self._lines.append((event, values))
        if len(self._lines) == 1:
            self._wheel.set(self, self._wheel.now() + DELAY)
        elif len(self._lines) >= MAX_LINES:
            self.write()

    def write(self) -> None:
        """Write what waits."""
        self._wheel.discard(self)
        lines, self._lines = self._lines, []
        if lines:
            with lines_together():
                for event, values in lines:
                    self._log.info(event, **values)

    def handle_deadline(self, now: float) -> None:
        self.write()
