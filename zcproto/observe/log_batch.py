"""Batch the log lines of routine events.

When 10,000 clients connect, each opens a session and gets a line. A single line costs four times as much as one
in a batch, because its code and data are cold. Lines carry the time of their event, not of writing. Do not use
this for events that need attention.
"""

from __future__ import annotations

from typing import Any, Final

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.observe.log import AT, Logger, lines_together

DELAY: Final = 0.25
"""Maximum delay of a line in seconds: unnoticeable for readers, and long enough to batch about a hundred logins."""

MAX_LINES: Final = 128
"""Lines that trigger writing at once, about two milliseconds of the loop."""


class LogBatch:
    """Waiting lines of one loop."""

    def __init__(self, log: Logger, wheel: DeadlineWheel, clock: Clock) -> None:
        self._log = log
        self._wheel = wheel
        self._clock = clock
        self._lines: list[tuple[str, dict[str, Any]]] = []
        self.deadline_tick = 0

    def add(self, event: str, **values: Any) -> None:
        """Queue a line at the level info."""
        values[AT] = self._clock.wall()
        self._lines.append((event, values))
        if len(self._lines) == 1:
            self._wheel.set(self, self._wheel.now() + DELAY)
        elif len(self._lines) >= MAX_LINES:
            self.write()

    def write(self) -> None:
        """Write the waiting lines."""
        self._wheel.discard(self)
        lines, self._lines = self._lines, []
        if lines:
            with lines_together():
                for event, values in lines:
                    self._log.info(event, **values)

    def handle_deadline(self, now: float) -> None:
        self.write()
