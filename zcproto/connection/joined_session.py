"""A live session of one connection: the token that it has shown last, and when something is due for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


@dataclass(slots=True, eq=False, repr=False)
class JoinedSession:
    """A live session used on a connection.

    `token` is the one shown here last, and `expires_at` its expiry. `due_at` is monotonic seconds: of the event
    `session.expiring`, then of the expiry. `since` is the wall time of the first use here. `cut_at` is set while a
    newer token of the session was not shown here, which suspends it: monotonic seconds of its end here.
    """

    token: bytes
    user: str
    expires_at: int
    due_at: float
    since: int
    cut_at: float = inf

    def __repr__(self) -> str:
        return f"JoinedSession(expires_at={self.expires_at})"
