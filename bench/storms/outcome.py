"""What a storm and a mix have shown, held against their bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from bench.row import Row
from zcproto.load.hdr import percentiles_ms
from zcproto.load.latency import Latencies

ALL_SERVED_S: Final = 15.0
"""By when all of a crowd have to be served."""

HONEST_P99_MS: Final = 100.0
"""What those who are in may feel of it, at the 99th percentile."""

MIB: Final = 1 << 20


def figures_json(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Figures for machines, by their keys."""
    return {
        row.key: {
            "label": row.label,
            "value": row.value,
            "unit": row.unit,
            "bar": row.bar,
            "holds": row.holds,
        }
        for row in rows
    }


@dataclass(frozen=True, slots=True)
class Felt:
    """What became of the requests of those who are in."""

    sent: int
    equal: int
    lost: int
    failed: Mapping[str, int]
    connections: int
    latency: Latencies
    lag: Latencies

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Felt:
        return cls(
            told["sent"],
            told["equal"],
            told["lost"],
            told["failed"],
            told["connections"],
            Latencies.from_json(told["latency"]),
            Latencies.from_json(told["lag"]),
        )

    def ms(self, percentile: str) -> float | None:
        return percentiles_ms(self.latency).get(percentile)

    @property
    def lag_p99_ms(self) -> float | None:
        """How late this side was."""
        return percentiles_ms(self.lag).get("p99")

    @property
    def not_equal(self) -> int:
        """Requests that were not answered with what was sent."""
        return self.sent - self.equal

    def as_json(self) -> dict[str, Any]:
        return {
            "sent": self.sent,
            "equal": self.equal,
            "lost": self.lost,
            "failed": dict(self.failed),
            "connections": self.connections,
            "latency_ms": percentiles_ms(self.latency),
            "lag_ms": percentiles_ms(self.lag),
        }


@dataclass(slots=True)
class Storm:
    """A crowd that came back at once. `admission` is the bound of handshakes in progress."""

    title: str
    admission: int
    clients: int
    honest: int
    """Connections that were in before."""
    at_rest: Felt
    meanwhile: Felt
    served_s: list[float]
    """When each was served, in seconds since all came; in order."""
    answered: int
    """Of them, when all were asked once more."""
    tries: int
    wrong: int
    begun_s: float
    """How long it took this side until all had begun."""
    cpu_share: float
    """Of a processor, that the crowd has used."""
    causes: Mapping[str, int]
    memory_before: int
    memory_after: int
    memory_peak: int
    tls_failures: Mapping[str, int]
    longest_pause_s: float
    """Of the server's loop, since its start."""
    has_bars: bool = True
    """What is without admission is there to compare with."""

    def rows(self) -> list[Row]:
        def bar(value: float) -> float | None:
            return value if self.has_bars else None

        served, felt = self.served_s, self.meanwhile
        last = served[-1] if len(served) == self.clients and served else None
        return [
            Row("served", "clients served", len(served), "", bar(self.clients), exact=True),
            Row("all_served_s", "until all were", last, "s", bar(ALL_SERVED_S)),
            Row("half_served_s", "until half were", served[self.clients // 2] if last else None, "s"),
            Row("begun_s", "until all had begun to connect", self.begun_s, "s"),
            Row("crowd_cpu", "processor of the crowd, in use", self.cpu_share * 100, "%"),
            Row("verified", "of them answered once more", self.answered, "", bar(self.clients), exact=True),
            Row("tries", "tries of a client", self.tries / self.clients),
            Row("wrong", "wrong answers", self.wrong, "", 0, exact=True),
            Row("honest_lost", "requests lost by those in", felt.not_equal, "", bar(0), exact=True),
            Row("honest_p50_ms", "p50 of those in", felt.ms("p50"), "ms"),
            Row("honest_p99_ms", "p99 of those in", felt.ms("p99"), "ms", bar(HONEST_P99_MS)),
            Row("rest_p50_ms", "p50 of those in, before it", self.at_rest.ms("p50"), "ms"),
            Row("rest_p99_ms", "p99 of those in, before it", self.at_rest.ms("p99"), "ms"),
            Row("lag_p99_ms", "p99 of how late their requests were sent", felt.lag_p99_ms, "ms"),
            Row("pause_ms", "longest pause of the server's loop", self.longest_pause_s * 1000, "ms"),
            Row("memory_peak_mib", "memory of the server, peak", self.memory_peak / MIB, "MiB"),
            Row("memory_after_mib", "memory of the server, all in", self.memory_after / MIB, "MiB"),
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "max_handshakes": self.admission,
            "figures": figures_json(self.rows()),
            "served_s": [round(each, 4) for each in self.served_s],
            "causes": dict(self.causes),
            "tls_failures": dict(self.tls_failures),
            "at_rest": self.at_rest.as_json(),
            "meanwhile": self.meanwhile.as_json(),
        }


@dataclass(slots=True)
class Mix:
    """Honest connections among hostile ones of some kinds; none for what the others are compared with."""

    title: str
    kinds: tuple[str, ...]
    hostile: int
    honest: int
    felt: Felt
    memory_peak: int
    longest_pause_s: float
    """Of the server's loop, since its start."""
    counts: Mapping[str, int] = field(default_factory=dict)
    causes: Mapping[str, int] = field(default_factory=dict)
    replays_refused: int = 0
    """As the server counts them."""

    def rows(self) -> list[Row]:
        counts = self.counts
        rows = [
            Row("honest_p50_ms", "p50 of the honest", self.felt.ms("p50"), "ms"),
            Row("honest_p99_ms", "p99 of the honest", self.felt.ms("p99"), "ms", HONEST_P99_MS),
            Row("honest_lost", "requests lost by the honest", self.felt.not_equal, "", 0, exact=True),
            Row(
                "honest_open", "connections of the honest", self.felt.connections, "", self.honest, exact=True
            ),
            Row("lag_p99_ms", "p99 of how late they were sent", self.felt.lag_p99_ms, "ms"),
            Row("pause_ms", "longest pause of the server's loop", self.longest_pause_s * 1000, "ms"),
            Row("memory_peak_mib", "memory of the server, peak", self.memory_peak / MIB, "MiB"),
            Row("connected", "hostile connections made", counts.get("connected", 0)),
            Row("thrown_out", "of them thrown out", counts.get("thrown_out", 0)),
        ]
        if "garbage" in self.kinds:
            rows.append(
                Row("suffered", "garbage suffered", counts.get("garbage_suffered", 0), "", 0, exact=True)
            )
        if "replay" in self.kinds:
            sent = counts.get("replays_sent", 0)
            rows.append(Row("replays", "replays refused", self.replays_refused, "", sent, exact=True))
        return rows

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "kinds": list(self.kinds),
            "hostile": self.hostile,
            "figures": figures_json(self.rows()),
            "counts": dict(self.counts),
            "causes": dict(self.causes),
            "felt": self.felt.as_json(),
        }


def reasons(outcomes: list[Storm | Mix]) -> list[str]:
    """Why it failed, if it did."""
    found = []
    for outcome in outcomes:
        for row in outcome.rows():
            if not row.holds:
                value = "not measured" if row.value is None else f"{row.value:,.6g} {row.unit}".strip()
                found.append(f"{outcome.title}: {row.label}: {value}")
    return found
