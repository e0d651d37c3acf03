"""How long to wait before trying again: exponential backoff with full jitter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_DELAY: Final = 0.1
MAX_DELAY: Final = 30.0
_MS: Final = 1000

Random = Callable[[], float]
"""A number from 0 up to, but not including, 1."""


class Backoff:
    """Delays in seconds, each random between 0 and a ceiling: 100 ms, doubling to at most 30 s.

    Full jitter spreads the clients of a server that went down evenly, however many come back at once.
    """

    __slots__ = ("_ceiling", "_random")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._ceiling = FIRST_DELAY

    def next(self, retry_after_ms: int = 0) -> float:
        """The next delay. What the server asked for (`retry_after_ms`) is waited in full before it."""
        delay = retry_after_ms / _MS + self._random() * self._ceiling
        self._ceiling = min(self._ceiling * 2, MAX_DELAY)
        return delay

    def reset(self) -> None:
        """After a success: begin with 100 ms again."""
        self._ceiling = FIRST_DELAY
