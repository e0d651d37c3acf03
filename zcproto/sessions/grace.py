"""Keep the most recent token pairs for clients whose response to a refresh was lost (zcp1.md, section 9.6).

Decides how long and how many. This is the only place that holds tokens in memory beyond a call, for seconds.

It must not know: callers. The registry checks that the client is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from hmac import compare_digest
from typing import NamedTuple


class Spent(NamedTuple):
    """The digest of the last spent refresh token of a session, and the pair issued for it."""

    digest: bytes
    token: bytes
    refresh_token: bytes
    until: int

    def __repr__(self) -> str:
        return f"Spent(token=***, refresh_token=***, until={self.until})"


class GraceTable:
    """Keep one pair per session id for the last `limit` refreshes, each for `grace_ms`."""

    def __init__(self, grace_ms: int, limit: int) -> None:
        self.grace_ms = grace_ms
        self._limit = limit
        self._spent: OrderedDict[bytes, Spent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._spent)

    def keep(self, session_id: bytes, digest: bytes, token: bytes, refresh_token: bytes, wall: int) -> None:
        """Store the pair issued for the refresh token with this digest, replacing the previous one."""
        self._spent.pop(session_id, None)
        self._spent[session_id] = Spent(digest, token, refresh_token, wall + self.grace_ms)
        self.expire(wall)

    def find(self, session_id: bytes, digest: bytes, wall: int) -> Spent | None:
        """Return the issued pair if the digest is that of the last spent token and the grace is not over."""
        spent = self._spent.get(session_id)
        if spent is None or wall >= spent.until or not compare_digest(digest, spent.digest):
            return None
        return spent

    def drop(self, session_id: bytes) -> None:
        """Remove the pair of a session that has ended."""
        if self._spent:
            self._spent.pop(session_id, None)

    def expire(self, wall: int) -> None:
        """Remove expired pairs, and the oldest ones above the limit."""
        spent = self._spent
        while spent:
            session_id = next(iter(spent))
            if len(spent) <= self._limit and wall < spent[session_id].until:
                return
            del spent[session_id]
