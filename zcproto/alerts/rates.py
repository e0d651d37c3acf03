"""Decides when events are so many that somebody must know, and when they are few again.

    counters, read now and then -> sums over a sliding window -> BEGAN / GOES_ON / ENDED

Rules:
- It begins when the window holds `threshold` events. It ends when the window has held no more than half of them for
  `quiet_s`: what hovers about the threshold begins once.
- Counters are read by whoever has them, once in a while: an event costs no more than the integer it is counted by.
- A counter that went down has begun anew.

It must not know: what is counted, clocks; `now` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

SLOTS: Final = 60
"""Parts of a window: a sum is of a time that is too long by less than one part."""


@dataclass(frozen=True, slots=True)
class RateRule:
    """How many events, within how many seconds, and for how long there must be few."""

    threshold: int
    window_s: float
    quiet_s: float


class RateState(Enum):
    BEGAN = "began"
    GOES_ON = "goes_on"
    """It has begun before, and there were more events."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class RateChange:
    """What became of one counter. `events` are those since it was read last, `in_window` those of the window."""

    state: RateState
    events: int
    in_window: int


class RateWatch:
    """Watches one counter, which begins at `total`."""

    __slots__ = ("_is_on", "_low_since", "_rule", "_slots", "_sum", "_total")

    def __init__(self, rule: RateRule, total: int = 0) -> None:
        assert rule.threshold >= 1, "no event is no alert"
        self._rule = rule
        self._slots: dict[int, int] = {}  # events by part of time, the oldest first
        self._sum = 0
        self._total = total
        self._is_on = False
        self._low_since: float | None = None

    @property
    def is_on(self) -> bool:
        """Whether it has begun and not ended."""
        return self._is_on

    def read(self, total: int, now: float) -> RateChange | None:
        """Take in what the counter says now."""
        events = total - self._total if total >= self._total else total
        self._total = total
        self._let_go(now)
        if events:
            part = self._part(now)
            self._slots[part] = self._slots.get(part, 0) + events
            self._sum += events
        state = self._next_state(events, now)
        return None if state is None else RateChange(state, events, self._sum)

    def _next_state(self, events: int, now: float) -> RateState | None:
        rule = self._rule
        if not self._is_on:
            if self._sum < rule.threshold:
                return None
            self._is_on, self._low_since = True, None
            return RateState.BEGAN
        if self._sum > rule.threshold // 2:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - self._low_since >= rule.quiet_s:
            self._is_on = False
            return RateState.ENDED
        return RateState.GOES_ON if events else None

    def _part(self, now: float) -> int:
        return int(now * SLOTS // self._rule.window_s)

    def _let_go(self, now: float) -> None:
        oldest = self._part(now) - SLOTS
        for part in [each for each in self._slots if each <= oldest]:
            self._sum -= self._slots.pop(part)
