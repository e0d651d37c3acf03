"""Count durations in buckets of plain integers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

QUICK_S: Final = (
    *(0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025),
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
"""Bounds for work within one turn of a loop, in seconds."""

WAITED_S: Final = (
    *(0.000_1, 0.000_25, 0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Bounds for durations that include waiting, in seconds."""


class Histogram:
    """Count values by size. The last of `counts` is for values above all `bounds`.

    A value equal to a bound counts below it, as in Prometheus. `total` is the sum of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """Estimate the quantile `part` (0 to 1) of the counted values; None without any.

    Values are assumed to be evenly distributed between two bounds. Above the last bound the result is that bound.
    """
    rank = part * sum(counts)
    below, lower = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
        lower = bound
    return bounds[-1] if sum(counts) else None
