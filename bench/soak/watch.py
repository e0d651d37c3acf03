"""What a server's process has, taken when its clients rest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.storms.stage import memory_bytes

MIB: Final = 1 << 20
WARM_UP: Final = 1 / 3
"""Of all samples, the first of which are not judged: caches and tables fill."""


class Sample(NamedTuple):
    """One moment at rest. `at_s` is since the start."""

    at_s: float
    memory_mib: float
    descriptors: int
    tasks: int
    """Of asyncio, in the server's loop."""
    threads: int
    connections: int
    sessions: int
    answers: int
    """Judged by then."""
    outages: int


def take(pid: int, stats: dict[str, Any], at_s: float, answers: int, outages: int) -> Sample:
    """A sample; `stats` are the server's own figures."""
    process = Path(f"/proc/{pid}")
    return Sample(
        at_s=at_s,
        memory_mib=memory_bytes(pid)[0] / MIB,
        descriptors=len(list((process / "fd").iterdir())),
        tasks=int(stats["tasks"]),
        threads=len(list((process / "task").iterdir())),
        connections=int(stats["tcp_connections"]),
        sessions=int(stats["sessions"]),
        answers=answers,
        outages=outages,
    )


def judged(samples: Sequence[Sample]) -> list[Sample]:
    """Those after the warm-up."""
    return list(samples[round(len(samples) * WARM_UP) :])


def growth(samples: Sequence[Sample], name: str) -> float | None:
    """By how much a figure is larger in the last third of those judged than in the first: the medians of both.

    None if there are too few to tell.
    """
    values = [float(getattr(each, name)) for each in judged(samples)]
    if len(values) < 3:
        return None
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def per_minute(samples: Sequence[Sample], name: str) -> float | None:
    """The slope of a figure after the warm-up: the median of the slopes between any two (Theil and Sen)."""
    some = judged(samples)
    slopes = [
        (getattr(later, name) - getattr(sooner, name)) / (later.at_s - sooner.at_s) * 60
        for number, sooner in enumerate(some)
        for later in some[number + 1 :]
    ]
    return statistics.median(slopes) if slopes else None
