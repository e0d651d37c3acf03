"""Samples of a server's figures (`server.stats`), and the time between two of them. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from zcproto.errors import ZcprotoError
from zcproto.observe.loop_lag import BOUNDS_MS

MINUTE_S: Final = 60.0


class Sample(NamedTuple):
    """A server's figures at one moment."""

    at: float
    """Monotonic seconds."""
    cpu_s: float
    connections: int
    sessions: int
    rss_bytes: int
    longest_s: float
    """The longest pause of its loop since the sample before."""
    longest_own_s: float
    """The same, without the time of other programs."""
    pauses: tuple[int, ...]
    """Since its start, by length: bounds in BOUNDS_MS, then all longer ones."""

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Self:
        """Raises ZcprotoError if something is missing."""
        try:
            return cls(
                time.monotonic(),
                float(stats["cpu_s"]),
                int(stats["connections"]),
                int(stats["sessions"]),
                int(stats["rss_bytes"]),
                float(stats["longest_pause_s"]),
                float(stats["longest_own_pause_s"]),
                tuple(map(int, stats["pauses"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ZcprotoError(f"server.stats of this server cannot be used: {error!r} is missing") from error


class Span(NamedTuple):
    """The time between two samples."""

    before: Sample
    after: Sample

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    @property
    def cpu_percent(self) -> float:
        """CPU of the server, of one processor."""
        return (self.after.cpu_s - self.before.cpu_s) / self.seconds * 100

    @property
    def longest_ms(self) -> float:
        """The longest pause, if there is no sample in between."""
        return self.after.longest_s * 1000

    @property
    def longest_own_ms(self) -> float:
        return self.after.longest_own_s * 1000

    def longer_per_minute(self, bound_ms: int) -> float:
        """Return how many pauses were longer than one of BOUNDS_MS, per minute."""
        longer = slice(BOUNDS_MS.index(bound_ms) + 1, None)
        count = sum(self.after.pauses[longer]) - sum(self.before.pauses[longer])
        return count / self.seconds * MINUTE_S
