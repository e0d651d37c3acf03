"""Count what the limits limit: how many of something each key has now, and how often something happens to it.

    Counts     connections of a network, running requests of a user
    EventRate  requests a second of a user, failed handshakes a second of a network
    Counting   makes both

Decides: what is admitted under a limit.

Rules:
- A rate is a token bucket that holds the events of BURST_S seconds. A refused event takes nothing from it.
- The table of a rate is bounded. When it is full of keys in use, further keys share a bucket.

These count for one process; several replace them by shared ones. It must not know: what is counted,
the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from math import ceil
from typing import Final

BURST_S: Final = 2.0
MAX_KEYS: Final = 16_384
"""Users or addresses of a rate counted separately, about 200 bytes each."""

_SHARED: Final = ""


class Counts:
    """How many of something each key has now."""

    __slots__ = ("_own",)

    def __init__(self) -> None:
        self._own: dict[str, int] = {}

    def __getitem__(self, key: str) -> int:
        """Return the count of a key."""
        return self.own(key)

    def own(self, key: str) -> int:
        """Return how many of a key's count were added here."""
        return self._own.get(key, 0)

    @property
    def most(self) -> int:
        """The count of the key with most."""
        return max(self._own.values(), default=0)

    def surplus(self, key: str) -> int:
        """Return how many more than the mean of all processes this one has."""
        return 0

    def add(self, key: str, limit: int = 0) -> bool:
        """Count one more. Return False, having done nothing, if the key is at the limit; 0 means unlimited."""
        count = self._own.get(key, 0)
        if limit and count >= limit:
            return False
        self._own[key] = count + 1
        return True

    def remove(self, key: str) -> None:
        """Count one less of those that were added here."""
        own = self._own
        own[key] -= 1
        if not own[key]:
            del own[key]


_DIGITS: Final = 4
"""Sums of times are a little off, the more the longer the machine has run: that must not take the last token."""


class EventRate:
    """A token bucket for each key. `per_second` is 0 for no limit."""

    __slots__ = ("_full_at", "_max_keys", "_step", "per_second")

    def __init__(self, per_second: int = 0, max_keys: int = MAX_KEYS) -> None:
        self._full_at: dict[str, float] = {}
        """When each bucket will be full again, the last used one last. Those without an entry are full."""
        self._max_keys = max_keys
        self.set_rate(per_second)

    def __len__(self) -> int:
        """Return the number of keys in the table."""
        return len(self._full_at)

    def __contains__(self, key: str) -> bool:
        """Return False if the bucket of a key is full for certain."""
        return key in self._full_at

    def set_rate(self, per_second: int) -> None:
        """Apply another rate. Buckets stay as they are."""
        self.per_second = per_second
        self._step = 1 / per_second if per_second else 0.0

    def admit(self, key: str, now: float) -> int:
        """Count an event and return 0, or return the milliseconds until one is admitted."""
        step, full_at = self._step, self._full_at
        if not step:
            return 0
        full = full_at.pop(key, None)
        if full is None:
            key = self._new_key(key, now)
            full = full_at.pop(key, now)
        full = max(full, now)
        wait = round(full + step - now - max(BURST_S, step), _DIGITS)
        full_at[key] = full if wait > 0 else full + step
        return ceil(wait * 1000) if wait > 0 else 0

    def charge(self, key: str, cost: int, now: float) -> None:
        """Take tokens, or all that are left."""
        step = self._step
        if step:
            full = self._full_at.pop(key, None)
            if full is None:
                key = self._new_key(key, now)
                full = self._full_at.pop(key, now)
            self._full_at[key] = min(max(full, now) + cost * step, now + max(BURST_S, step))

    def left(self, key: str, now: float) -> float:
        """Return how many of the tokens of BURST_S a key has left."""
        left = (BURST_S - max(self._full_at.get(key, now) - now, 0.0)) * self.per_second
        return round(left, _DIGITS)

    def _new_key(self, key: str, now: float) -> str:
        while len(self._full_at) >= self._max_keys:
            oldest, full = next(iter(self._full_at.items()))
            if full > now:
                return _SHARED
            del self._full_at[oldest]
        return key


class Counting:
    """Makes the counts and rates of a server. The names tell those of several processes which belong together."""

    def counts(self, name: str) -> Counts:
        return Counts()

    def rate(self, name: str, per_second: int = 0) -> EventRate:
        return EventRate(per_second)


ALONE: Final = Counting()
"""For one process."""
