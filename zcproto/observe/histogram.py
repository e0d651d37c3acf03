"""How often something took how long: plain integers, for whoever reports them."""

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
"""Bounds for what waits for others, in seconds."""


class Histogram:
    """Values by size. `counts` has one more number than `bounds`: what is larger than all of them.

    A value that is equal to a bound counts below it, as Prometheus has it. `total` is the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """The value that this part of all values (0 to 1) is at most, as far as their sizes tell; None without any.

    Within two bounds the values are taken to be spread evenly. Beyond the last one it is that bound.
    """
    rank = part * sum(counts)
    below, lower = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below += count
        lower = bound
    return bounds[-1] if sum(counts) else None
