"""A PING that waits behind other bytes: a peer that still receives them is not silent."""

from __future__ import annotations

from typing import Final


class SentPing:
    """A PING behind the bytes of a connection up to number `end`, of which the transport had sent `taken`."""

    __slots__ = ("_end", "_taken")

    def __init__(self, end: int, taken: int) -> None:
        self._end = end
        self._taken = taken

    def has_advanced(self, taken: int) -> bool:
        """Return whether the transport has sent bytes before the PING since the last call."""
        before, self._taken = self._taken, max(self._taken, min(taken, self._end))
        return self._taken > before


NO_PING: Final = SentPing(0, 0)
