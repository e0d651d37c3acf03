"""How the server's loop fared over a time, from its figures before and after. Pure.

What counts is the difference between a time without rotations and one with them, under the same load: what the
machine and the load do to the loop is in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from zcproto.errors import ZcprotoError
from zcproto.observe.loop_lag import BOUNDS_MS

MINUTE: Final = 60.0
FEW_MS: Final = 5
MANY_MS: Final = 10


class Figures(NamedTuple):
    """What `server.stats` says of its loop at a moment."""

    at: float
    """Monotonic seconds."""
    cpu_s: float
    longest_s: float
    """Since these figures were asked for before."""
    longest_own_s: float
    """The same, less the time in which other programs had the processor."""
    counts: tuple[int, ...]
    """Pauses since the server's start, by length: bounds in BOUNDS_MS, then all that is longer."""

    @classmethod
    def of(cls, stats: Mapping[str, Any], at: float) -> Self:
        """Raises ZcprotoError if something is missing."""
        try:
            return cls(
                at,
                float(stats["cpu_s"]),
                float(stats["longest_pause_s"]),
                float(stats["longest_own_pause_s"]),
                tuple(map(int, stats["pauses"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ZcprotoError("this server's server.stats does not tell of pauses") from error


class Span(NamedTuple):
    """The time between two readings of the figures, with none in between."""

    before: Figures
    after: Figures

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    @property
    def cpu_percent(self) -> float:
        """CPU of the whole server, of one core."""
        return (self.after.cpu_s - self.before.cpu_s) / self.seconds * 100

    @property
    def longest_ms(self) -> float:
        return self.after.longest_s * 1000

    @property
    def longest_own_ms(self) -> float:
        return self.after.longest_own_s * 1000

    def over_a_minute(self, bound_ms: int) -> float:
        """Pauses longer than one of BOUNDS_MS, a minute."""
        longer = slice(BOUNDS_MS.index(bound_ms) + 1, None)
        return (sum(self.after.counts[longer]) - sum(self.before.counts[longer])) / self.seconds * MINUTE
