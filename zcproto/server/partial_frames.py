"""Bound the memory of incomplete frames, per owner and in total.

Decides which connections are closed when too many bytes of incomplete frames are held.

Rules:
- An owner is the user of a connection's session, or the address of a connection without one.
- An owner over its bound loses its own frames. If only the total is over, the owner that holds the most loses one.
- Of an owner's frames the slowest goes first: the one with the fewest bytes received per second of its age.
- One frame of the largest allowed size always fits.

It must not know: connections, sessions, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

C = TypeVar("C")

_LEAST_AGE: Final = 0.001


@dataclass(frozen=True, slots=True)
class PartialFrameLimits:
    """Bounds of the bytes of incomplete frames."""

    bytes: int = 50_331_648
    owner_bytes: int = 16_777_216


@dataclass(slots=True)
class _Frame:
    size: int
    began: float

    def speed(self, now: float) -> float:
        return self.size / max(now - self.began, _LEAST_AGE)


class _Share(dict[C, _Frame]):
    """The incomplete frames of one owner."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class PartialFrames(Generic[C]):
    """The incomplete frames of all connections `C`. `bytes` is their sum."""

    def __init__(self, limits: PartialFrameLimits) -> None:
        self.limits = limits
        self.bytes = 0
        self._owners: dict[C, str] = {}
        self._shares: dict[str, _Share[C]] = {}

    @property
    def most(self) -> int:
        """Return the bytes of the owner that holds the most."""
        return max((share.bytes for share in self._shares.values()), default=0)

    def hold(self, connection: C, owner: str, size: int, began: float, now: float) -> list[C]:
        """Record the incomplete frame of a connection; `size` 0 if it has no more.

        Return the connections to close. Their frames are no longer counted.
        """
        self.release(connection)
        if not size:
            return []
        self._owners[connection] = owner
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share()
        share[connection] = _Frame(size, began)
        share.bytes += size
        self.bytes += size
        closing: list[C] = []
        while share.bytes > self.limits.owner_bytes:
            closing.append(self._remove_slowest(share, now))
        while self.bytes > self.limits.bytes:
            largest = max(self._shares.values(), key=lambda share: share.bytes)
            closing.append(self._remove_slowest(largest, now))
        return closing

    def release(self, connection: C) -> None:
        """Forget the incomplete frame of a connection, if it has one."""
        owner = self._owners.pop(connection, None)
        if owner is None:
            return
        share = self._shares[owner]
        size = share.pop(connection).size
        share.bytes -= size
        self.bytes -= size
        if not share:
            del self._shares[owner]

    def _remove_slowest(self, share: _Share[C], now: float) -> C:
        slowest = min(share, key=lambda connection: share[connection].speed(now))
        self.release(slowest)
        return slowest
