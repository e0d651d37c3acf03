"""The points at which curves are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Sizes:
    """The points of each curve, and how much is measured at each."""

    connections: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000, 30_000)
    """Those beyond the limit of open files are replaced by the largest that fits."""
    arrival_rate: float = 450.0
    rate: float = 2_000.0
    """Requests a second over all connections: the same at each point."""
    load_s: float = 8.0
    payloads: tuple[int, ...] = (16, 64, 256, 1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
    requests: int = 6_000
    """For each point, at most; fewer of large payloads."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    sessions: tuple[int, ...] = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
    checks: int = 200_000
    """Of tokens, for each point."""


FULL: Final = Sizes()
QUICK: Final = replace(
    FULL,
    connections=(10, 20, 40),
    arrival_rate=200.0,
    rate=200.0,
    load_s=0.5,
    payloads=(16, 1_024, 65_536),
    requests=60,
    depths=(1, 4, 16),
    sessions=(1, 100, 2_000),
    checks=500,
)
