"""How much a run measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Sizes:
    """One run. The defaults are the sizes of the requirements, in about five minutes together."""

    handshakes: int = 1_000
    """At rest, with each key type."""
    connections: int = 10_000
    arrival_rate: float = 450.0
    """Connections a second: both ends together use about half of two cores."""
    rate: float = 5_000.0
    """Requests a second under load."""
    load_s: float = 8.0
    tokens: int = 100_000
    checks: int = 1_000_000
    loads: int = 100
    """Of certificates."""
    responses: int = 50_000
    rotations: int = 100
    rotation_interval_s: float = 1.0
    rotation_rest_s: float = 8.0
    rotation_connections: int = 500
    rotation_rate: float = 1_000.0
    payload_requests: int = 1_500
    """Requests for each payload, at most; fewer of large ones."""


FULL: Final = Sizes()
QUICK: Final = replace(
    FULL,
    handshakes=30,
    connections=60,
    arrival_rate=200.0,
    rate=200.0,
    load_s=1.0,
    tokens=2_000,
    checks=2_000,
    loads=5,
    responses=500,
    rotations=3,
    rotation_rest_s=1.0,
    rotation_connections=20,
    rotation_rate=100.0,
    payload_requests=50,
)
"""To see whether all of it works: rows that need more are marked as small."""
