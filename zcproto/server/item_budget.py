"""Bound the memory of clients' items that wait for their methods, with a share for each user.

    grant -> `promised`: bytes that clients may send, or have sent      -> how much more to grant
    item  -> `held`: bytes that have arrived and wait for their methods -> which streams to cut

Rules:
- What was granted counts from then on. Windows shrink, down to one item, as a user is promised more and the server
  has less left to promise.
- A user may hold as much as it leaves free: one user half of the memory, two a third each. Beyond it the user's own
  streams are cut and its new ones are refused. The first items of another user find room.
- Only what is held limits the number of streams: thousands that wait for their users take no memory.

It must not know: connections, streams, frames.
"""

from __future__ import annotations

from typing import Final

GRANTED_PART: Final = 8
"""At most this part of what a user may still be promised is granted to one stream."""

LEAST_ITEMS: Final = 4
"""One user's largest item always fits, and that of another."""


class ItemShare:
    """The items of one user. `streams` that take items share it."""

    __slots__ = ("budget", "held", "promised", "streams", "user")

    def __init__(self, budget: ItemBudget, user: str) -> None:
        self.budget = budget
        self.user = user
        self.held = 0
        self.promised = 0
        self.streams = 0

    def is_over(self, memory: int) -> bool:
        """Return whether the user holds more than it leaves free."""
        return self.held > memory - self.budget.held

    def window(self, memory: int, most: tuple[int, int], promised: int) -> tuple[int, int]:
        """Return the items and bytes to grant to a stream that has been `promised` some of the bytes."""
        budget, (items, size) = self.budget, most
        left = (memory - (budget.promised - promised) - (self.promised - promised)) // GRANTED_PART
        return most if left >= size else (max(1, items * left // size), max(1, left))

    def count(self, held: int, promised: int) -> None:
        """Count more bytes, or fewer."""
        self.held += held
        self.promised += promised
        self.budget.held += held
        self.budget.promised += promised

    def leave(self) -> None:
        """Remove a stream, which holds nothing any more."""
        self.streams -= 1
        if not self.streams:
            del self.budget.shares[self.user]


class ItemBudget:
    """The items of all users of one server."""

    def __init__(self) -> None:
        self.held = 0
        self.promised = 0
        self.shares: dict[str, ItemShare] = {}

    def join(self, user: str) -> ItemShare:
        """Add a stream of a user."""
        share = self.shares.get(user)
        if share is None:
            share = self.shares[user] = ItemShare(self, user)
        share.streams += 1
        return share
