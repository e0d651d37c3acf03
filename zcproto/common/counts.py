"""Count what the limits limit: how many of something each key has now, and how often something happens to it.

    Counts     connections of a network, running requests of a user
    EventRate  requests a second of a user, failed handshakes a second of a network
    Counting   makes both

These count for one process; several replace them by shared ones. It must not know: what is counted.
"""

from __future__ import annotations

from typing import Final

from zcproto.common.rates import EventRate


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


class Counting:
    """Makes the counts and rates of a server. The names tell those of several processes which belong together."""

    def counts(self, name: str) -> Counts:
        return Counts()

    def rate(self, name: str, per_second: int = 0) -> EventRate[str]:
        return EventRate(per_second)


ALONE: Final = Counting()
"""For one process."""
