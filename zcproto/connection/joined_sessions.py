"""The live sessions of one connection, and when they are about to expire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from zcproto.connection.events import NEVER


class JoinedSession(NamedTuple):
    """A live session used on a connection. `expiring_at` is monotonic seconds, NEVER after its event."""

    token: bytes
    user: str
    expires_at: int
    expiring_at: float

    def __repr__(self) -> str:
        return f"JoinedSession(expires_at={self.expires_at})"


class JoinedSessions(dict[str, JoinedSession]):
    """The live sessions of a connection by id. `expiring_at` is the earliest of theirs."""

    __slots__ = ("expiring_at",)

    def __init__(self) -> None:
        self.expiring_at = NEVER

    def take_expiring(self, now: float) -> Iterator[JoinedSession]:
        """Yield the sessions that are about to expire, each once."""
        self.expiring_at = NEVER
        for session_id, joined in self.items():
            if joined.expiring_at <= now:
                self[session_id] = joined._replace(expiring_at=NEVER)
                yield joined
            elif joined.expiring_at < self.expiring_at:
                self.expiring_at = joined.expiring_at
