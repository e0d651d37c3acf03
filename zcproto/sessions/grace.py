"""The pairs of tokens given last, kept for a client whose answer was lost.

What this file decides: how long, and how many. This is the one place where tokens themselves are in
memory for longer than a call, and it is for seconds (wire.md section 6: in memory only).

It must not know: who asks. The registry checks that it is the same client.
"""

from __future__ import annotations

from collections import OrderedDict
from hmac import compare_digest
from typing import NamedTuple


class Spent(NamedTuple):
    """The refresh token that a session spent last, as its digest, and the pair that was given for it."""

    digest: bytes
    token: bytes
    refresh_token: bytes
    until: int

    def __repr__(self) -> str:
        return f"Spent(token=***, refresh_token=***, until={self.until})"


class GraceTable:
    """One pair for each session id, of the last `limit` refreshes. `grace_ms`: how long those to come are kept."""

    __slots__ = ("_limit", "_spent", "grace_ms")

    def __init__(self, grace_ms: int, limit: int) -> None:
        self.grace_ms = grace_ms
        self._limit = limit
        self._spent: OrderedDict[bytes, Spent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spent)

    def keep(self, session_id: bytes, digest: bytes, token: bytes, refresh_token: bytes, wall: int) -> None:
        """Note what was given for the refresh token of this digest, instead of what was noted before."""
        self._spent.pop(session_id, None)
        self._spent[session_id] = Spent(digest, token, refresh_token, wall + self.grace_ms)
        self.expire(wall)

    def find(self, session_id: bytes, digest: bytes, wall: int) -> Spent | None:
        """What was given, if this is the refresh token that the session spent last, and spent just now."""
        spent = self._spent.get(session_id)
        if spent is None or wall >= spent.until or not compare_digest(digest, spent.digest):
            return None
        return spent

    def drop(self, session_id: bytes) -> None:
        """Give up the pair of a session that has ended."""
        if self._spent:
            self._spent.pop(session_id, None)

    def expire(self, wall: int) -> None:
        """Give up the pairs whose time is over, and the oldest of too many."""
        spent = self._spent
        while spent:
            session_id = next(iter(spent))
            if len(spent) <= self._limit and wall < spent[session_id].until:
                return
            del spent[session_id]
