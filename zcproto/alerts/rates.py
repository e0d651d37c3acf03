"""Decide when the growth of a counter begins and ends to be an alert (sans-IO).

    counters, read periodically -> sums over a sliding window -> is_on

Rules:
- It begins when the window holds `threshold` events, and ends when the window has held at most half of them for
  `quiet_s`. This hysteresis prevents flapping around the threshold.
- Counters are plain integers read from outside, so an event costs only its increment.
- A counter that decreases has been reset.

It must not know: what is counted, clocks; `now` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SLOTS: Final = 60
"""Parts of a window: a sum covers up to one part more than the window."""


@dataclass(frozen=True, slots=True)
class RateRule:
    """The threshold of events within `window_s`, and the quiet time before the end."""

    threshold: int
    window_s: float
    quiet_s: float


class RateWatch:
    """Watch one counter, which starts at `total`.

    `is_on` is True while the rate is an alert. `events` counts those since the previous reading, `in_window` those
    of the window.
    """

    def __init__(self, rule: RateRule, total: int = 0) -> None:
        assert rule.threshold >= 1, "a threshold below 1 would always alert"
        self.rule = rule
        self.is_on = False
        self.events = 0
        self.in_window = 0
        self._slots: dict[int, int] = {}  # events by part of time, oldest first
        self._total = total
        self._low_since: float | None = None

    def read(self, total: int, now: float) -> bool:
        """Process the current value of the counter. Return True if an alert begins, has more events, or ends."""
        rule = self.rule
        self.events = total - self._total if total >= self._total else total
        self._total = total
        self._expire(now)
        if self.events:
            part = self._part(now)
            self._slots[part] = self._slots.get(part, 0) + self.events
            self.in_window += self.events
        if not self.is_on:
            self.is_on, self._low_since = self.in_window >= rule.threshold, None
            return self.is_on
        if self.in_window > rule.threshold // 2:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - self._low_since >= rule.quiet_s:
            self.is_on = False
            return True
        return self.events > 0

    def _part(self, now: float) -> int:
        return int(now * SLOTS // self.rule.window_s)

    def _expire(self, now: float) -> None:
        oldest = self._part(now) - SLOTS
        for part in [each for each in self._slots if each <= oldest]:
            self.in_window -= self._slots.pop(part)
