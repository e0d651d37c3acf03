"""Durations, counted: exact to a microsecond below 10 ms, to four digits above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

MICROSECONDS: Final = 1_000_000
_EXACT_BELOW: Final = 10_000


class Latencies:
    """How often each duration came, in microseconds.

    A dict and not a histogram, because adding to it costs a seventh; the number of keys is bounded by the
    rounding. `hdr.histogram` makes an HdrHistogram of it.
    """

    __slots__ = ("counts", "max_us")

    def __init__(self, counts: dict[int, int] | None = None, max_us: int = 0) -> None:
        self.counts: dict[int, int] = {} if counts is None else counts
        self.max_us = max_us

    def add(self, seconds: float) -> None:
        micros = int(seconds * MICROSECONDS)
        if micros >= _EXACT_BELOW or micros < 1:
            self.max_us = max(self.max_us, micros)
            micros = _rounded(micros)
        elif micros > self.max_us:
            self.max_us = micros
        self.counts[micros] = self.counts.get(micros, 0) + 1

    def merge(self, other: Latencies) -> None:
        for micros, count in other.counts.items():
            self.counts[micros] = self.counts.get(micros, 0) + count
        self.max_us = max(self.max_us, other.max_us)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": {str(micros): count for micros, count in self.counts.items()},
            "max_us": self.max_us,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls({int(micros): count for micros, count in value["counts"].items()}, value["max_us"])


def _rounded(micros: int) -> int:
    if micros < 1:
        return 1  # a clock's grain; a histogram starts at one
    grain: int = 10 ** (len(str(micros)) - 4)
    return micros // grain * grain
