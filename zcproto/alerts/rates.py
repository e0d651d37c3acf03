"""Decide when the growth of a counter begins and ends to be an alert (sans-IO).

    counters, read periodically -> sums over a sliding window -> BEGAN / CONTINUED / ENDED

Rules:
- It begins when the window holds `threshold` events, and ends when the window has held at most half of them for
  `quiet_s`. This hysteresis prevents flapping around the threshold.
- Counters are plain integers read from outside, so an event costs only its increment.
- A counter that decreases has been reset.

It must not know: what is counted, clocks; `now` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

SLOTS: Final = 60
"""Parts of a window: a sum covers up to one part more than the window."""


@dataclass(frozen=True, slots=True)
class RateRule:
    """The threshold of events within `window_s`, and the quiet time before the end."""

    threshold: int
    window_s: float
    quiet_s: float


class RateState(Enum):
    BEGAN = "began"
    CONTINUED = "continued"
    """More events after the beginning."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class RateChange:
    """A change of one counter. `events` are those since the last reading, `in_window` those of the window."""

    state: RateState
    events: int
    in_window: int


class RateWatch:
    """Watch one counter, which starts at `total`. `is_on` is True between BEGAN and ENDED."""

    def __init__(self, rule: RateRule, total: int = 0) -> None:
        assert rule.threshold >= 1, "a threshold below 1 would always alert"
        self.rule = rule
        self._slots: dict[int, int] = {}  # events by part of time, oldest first
        self._sum = 0
        self._total = total
        self.is_on = False
        self._low_since: float | None = None

    def read(self, total: int, now: float) -> RateChange | None:
        """Process the current value of the counter."""
        events = total - self._total if total >= self._total else total
        self._total = total
        self._expire(now)
        if events:
            part = self._part(now)
            self._slots[part] = self._slots.get(part, 0) + events
            self._sum += events
        state = self._next_state(events, now)
        return None if state is None else RateChange(state, events, self._sum)

    def _next_state(self, events: int, now: float) -> RateState | None:
        rule = self.rule
        if not self.is_on:
            if self._sum < rule.threshold:
                return None
            self.is_on, self._low_since = True, None
            return RateState.BEGAN
        if self._sum > rule.threshold // 2:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - self._low_since >= rule.quiet_s:
            self.is_on = False
            return RateState.ENDED
        return RateState.CONTINUED if events else None

    def _part(self, now: float) -> int:
        return int(now * SLOTS // self.rule.window_s)

    def _expire(self, now: float) -> None:
        oldest = self._part(now) - SLOTS
        for part in [each for each in self._slots if each <= oldest]:
            self._sum -= self._slots.pop(part)
