"""What a soak has shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bench.row import Row
from bench.soak.clients import Seen
from bench.soak.plan import SoakPlan
from bench.soak.watch import WARM_UP, Sample, growth, per_minute
from bench.storms.outcome import figures_json
from zcproto.errors import Code

MEMORY_GROWTH_MIB: Final = 4.0
"""The bound on growth once all is full. Resident memory moves by one or two with the allocator's arenas."""

KEPT_MINUTES: Final = 10.0
"""For which ended sessions are remembered, so that their holders learn why: until then that memory fills."""

KEPT_MIB: Final = 10.0
"""What that takes at most: 2.6 MB of the process's own tables, and 8 MB of the cache of the store's file."""

COUNT_GROWTH: Final = 2.0
"""The bound for descriptors and tasks: a timer of the store may or may not be under way."""

INTERNAL: Final = str(int(Code.INTERNAL))


@dataclass(slots=True)
class SoakOutcome:
    """Of one soak. `done` and `failed` are the rotations, reloads and outages, by name."""

    plan: SoakPlan
    seen: Seen
    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    """What did not go as it should, by what it was, with the last reason."""
    outage_spans: list[tuple[float, float]] = field(default_factory=list)
    errors: Mapping[str, int] = field(default_factory=dict)
    """That the server answered with, by code."""
    log_events: Counter[str] = field(default_factory=Counter)
    """Of the server's log, warnings and errors, by name."""
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def memory_bound_mib(self) -> float:
        """By how much memory may grow. In under half an hour some of what is kept fills after the warm-up."""
        minutes = self.plan.minutes
        filling = max(0.0, min(minutes, KEPT_MINUTES) - minutes * WARM_UP)
        return MEMORY_GROWTH_MIB + KEPT_MIB * filling / KEPT_MINUTES

    def rows(self) -> list[Row]:
        seen, samples, done = self.seen, self.samples, self.done
        kib = per_minute(samples, "memory_mib")
        return [
            Row("minutes", "minutes", self.seconds / 60, "min"),
            Row("samples", "samples at rest", len(samples)),
            Row("answers", "answers judged", seen.judged),
            Row("wrong", "of them wrong", seen.wrong.total(), "", 0, exact=True),
            Row("lost", "connections lost", seen.lost.total(), "", 0, exact=True),
            Row("later", "calls put off", seen.later.total()),
            Row("internal", "faults of the server itself", self.errors.get(INTERNAL, 0), "", 0, exact=True),
            Row("connects", "connections made", seen.done["connect"]),
            Row("opened", "sessions opened", seen.done["open"]),
            Row("refreshed", "refreshed", seen.done["refresh"]),
            Row("ended", "ended", seen.done["end"]),
            Row("refused", "ended ones refused", seen.done["refused"]),
            Row("thrown_out", "senders of garbage thrown out", seen.done["thrown out"]),
            Row("rotations", "certificates rotated", done["rotation"]),
            Row("reloads", "configurations reloaded", done["reload"]),
            Row("outages", "times the disk was full", done["outage"]),
            Row("not_done", "of these gone wrong", len(self.failed), "", 0, exact=True),
            Row("memory", "memory at the end", samples[-1].memory_mib if samples else None, "MiB"),
            Row(
                "memory_growth",
                "memory growth after the warm-up",
                growth(samples, "memory_mib"),
                "MiB",
                self.memory_bound_mib,
            ),
            Row("memory_slope", "that is", None if kib is None else kib * 1024, "KiB/min"),
            Row(
                "descriptor_growth",
                "descriptor growth",
                growth(samples, "descriptors"),
                "",
                COUNT_GROWTH,
            ),
            Row("task_growth", "task growth", growth(samples, "tasks"), "", COUNT_GROWTH),
            Row("thread_growth", "thread growth", growth(samples, "threads"), "", COUNT_GROWTH),
        ]

    def reasons(self) -> list[str]:
        """Why it failed, if it did."""
        found = []
        for row in self.rows():
            if not row.holds:
                value = "not measured" if row.value is None else f"{row.value:,.2f} {row.unit}".strip()
                found.append(f"{row.label}: {value}")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "plan": {name: getattr(self.plan, name) for name in self.plan.__slots__},
            "interrupted": self.interrupted,
            "reasons": self.reasons(),
            "figures": figures_json(self.rows()),
            "answers": {
                "right": dict(self.seen.done),
                "wrong": dict(self.seen.wrong),
                "later": dict(self.seen.later),
                "lost": dict(self.seen.lost),
            },
            "failed": self.failed,
            "errors": dict(self.errors),
            "log": dict(self.log_events),
            "outages": self.outage_spans,
            "samples": [sample._asdict() for sample in self.samples],
        }
