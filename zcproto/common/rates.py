"""Limit how often something happens, by token buckets: one, or one for each of many keys.

Rules:
- A bucket holds the tokens of `burst_s` seconds at `per_second`. A refused event takes nothing from it.
- A bucket is kept as the time at which it is full again: nothing has to be done while time passes.
- The table of EventRate is bounded. When it is full of keys in use, further keys share a bucket.

These count for one process. It must not know: what is counted, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import takewhile
from math import ceil
from typing import Any, Final, Generic, TypeVar

BURST_S: Final = 2.0
MAX_KEYS: Final = 16_384
"""Keys with a bucket of their own, about 200 bytes each."""

_SHARED: Final[Any] = object()
"""The key of the bucket that keys share."""

Key = TypeVar("Key", bound=Hashable)

_SLACK_S: Final = 0.000_05
"""Sums of times are a little off, the more the longer the machine has run: that must not take the last token."""


class TokenBucket:
    """A token bucket that may be overdrawn."""

    __slots__ = ("_burst_s", "_full_at", "_step")

    def __init__(self, per_second: float, burst_s: float = BURST_S) -> None:
        self._step = 1 / per_second
        self._burst_s = burst_s
        self._full_at = 0.0

    def admit(self, now: float) -> bool:
        """Take a token. Return False if the bucket is empty."""
        full_at = (self._full_at if self._full_at > now else now) + self._step
        if full_at - now > self._burst_s + _SLACK_S:
            return False
        self._full_at = full_at
        return True

    def charge(self, cost: float, now: float) -> None:
        """Take tokens, even more than there are."""
        self._full_at = max(self._full_at, now) + cost * self._step

    def debt_s(self, now: float, cost: float = 0) -> float:
        """Return the seconds until `cost` tokens can be taken, not above 0 if they can be now."""
        return max(self._full_at, now) + cost * self._step - self._burst_s - now


class EventRate(Generic[Key]):
    """A token bucket for each key. `per_second` is 0 for no limit."""

    __slots__ = ("_burst_s", "_full_at", "_max_keys", "_most_s", "_step", "per_second")

    def __init__(self, per_second: float = 0, burst_s: float = BURST_S, max_keys: int = MAX_KEYS) -> None:
        self._full_at: dict[Key, float] = {}
        """When each bucket will be full again, the one charged last at the end. Those without an entry are full."""
        self._burst_s = burst_s
        self._most_s = burst_s + _SLACK_S
        self._max_keys = max_keys
        self.set_rate(per_second)

    def __len__(self) -> int:
        """Return the number of keys in the table."""
        return len(self._full_at)

    def __contains__(self, key: Key) -> bool:
        """Return False if the bucket of a key is full for certain."""
        return key in self._full_at

    def set_rate(self, per_second: float) -> None:
        """Apply another rate. Buckets stay as they are."""
        self.per_second = per_second
        self._step = 1 / per_second if per_second else 0.0

    def admit(self, key: Key, now: float) -> int:
        """Count an event and return 0, or return the milliseconds until one is admitted."""
        step, full_at = self._step, self._full_at
        if not step:
            return 0
        full = full_at.get(key)
        if full is None:
            key = self._new_key(key, now)
            full = full_at.get(key, now)
        full = (full if full > now else now) + step
        if full - now > self._most_s:
            return ceil((full - now - self._most_s) * 1000)
        full_at.pop(key, None)
        full_at[key] = full
        return 0

    def charge(self, key: Key, cost: int, now: float) -> None:
        """Take tokens, or all that are left."""
        if self._step:
            full = self._full_at.pop(key, None)
            if full is None:
                key = self._new_key(key, now)
                full = self._full_at.pop(key, now)
            self._full_at[key] = min(max(full, now) + cost * self._step, now + self._burst_s)

    def left(self, key: Key, now: float) -> float:
        """Return how many tokens a key has left."""
        left = (self._burst_s - max(self._full_at.get(key, now) - now, 0.0)) * self.per_second
        return round(left, 4)  # for the reason of _SLACK_S

    def drop_full(self, now: float) -> None:
        """Remove full buckets from the table, from the one charged first to one that is not full."""
        for key in [*takewhile(lambda key: self._full_at[key] <= now, self._full_at)]:
            del self._full_at[key]

    def _new_key(self, key: Key, now: float) -> Any:
        """Return the key, or that of the shared bucket if the table is full."""
        if len(self._full_at) >= self._max_keys:
            self.drop_full(now)
        return key if len(self._full_at) < self._max_keys else _SHARED
