"""When a process that has ended unexpectedly is started again.

Rules:
- A process that has served for a while is started again at once: what ended it is not in its start.
- One that ends soon after its start again and again is started again after a growing delay: a short one if it was
  ready each time, since it serves in between and its clients wait.
"""

from __future__ import annotations

from typing import Final

from zcproto.common.backoff import backoff_s

SOON: Final = 1.0
"""Seconds after it was ready within which an end counts as a failed start."""

FREE: Final = 3
"""Failed starts in a row that are repeated at once: clients wait, and the cause may have been a passing one."""

FIRST_DELAY: Final = 0.25
LONGEST_DELAY: Final = 10.0
LONGEST_READY_DELAY: Final = 0.5
"""For a process that was ready. A start takes about a tenth of that, on one core."""


class RestartPacer:
    """The restarts of one process. `failures` is the number of failed starts in a row."""

    def __init__(self) -> None:
        self.failures = 0

    def ended(self, served: float | None) -> float:
        """Return the seconds until the next start. `served` is how long it was ready; None if it never was."""
        if served is not None and served >= SOON:
            self.failures = 0
            return 0.0
        self.failures += 1
        if self.failures <= FREE:
            return 0.0
        longest = LONGEST_DELAY if served is None else LONGEST_READY_DELAY
        return backoff_s(self.failures - FREE, FIRST_DELAY, longest)
