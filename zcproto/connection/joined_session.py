"""A live session of one connection, and when it is about to expire."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False, repr=False)
class JoinedSession:
    """A live session used on a connection. `expiring_at` is monotonic seconds, NEVER after its event."""

    token: bytes
    user: str
    expires_at: int
    expiring_at: float

    def __repr__(self) -> str:
        return f"JoinedSession(expires_at={self.expires_at})"
