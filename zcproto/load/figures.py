"""The figures of a report: each with its unit, and with a bar where one is set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from zcproto.load.hdr import percentiles_ms
from zcproto.load.result import Moment, Result

SATURATED_LAG_MS: Final = 5.0
SATURATED_CPU_SHARE: Final = 0.95


class Figure(NamedTuple):
    """One measured number. `value` is None if it could not be measured; `bar` is the most it may be."""

    key: str
    label: str
    unit: str
    value: float | None
    bar: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it was measured and is below its bar. Without a bar, it holds."""
        return self.bar is None or (self.value is not None and self.value < self.bar)

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 6)
        return {"value": value, "unit": self.unit, "bar": self.bar, "holds": self.holds}


def _percentile(name: str, percentile: str) -> Callable[[Result], float | None]:
    return lambda result: percentiles_ms(result.record.latencies[name]).get(percentile)


_FIGURES: Final[tuple[tuple[str, str, str, Callable[[Result], float | None]], ...]] = (
    ("handshake_p99_ms", "TLS handshake while they arrive, p99", "ms", _percentile("handshake", "p99")),
    ("request_p99_ms", "request under load, p99", "ms", _percentile("request", "p99")),
    (
        "pause_connecting_ms",
        "longest pause of the server's loop, connecting",
        "ms",
        lambda result: result.longest_pause_ms(Moment.CONNECTED),
    ),
    (
        "pause_loading_ms",
        "longest pause of the server's loop, under load",
        "ms",
        lambda result: result.longest_pause_ms(Moment.LOADED),
    ),
    (
        "memory_per_connection_kib",
        "server memory per connection with its session",
        "KiB",
        lambda result: result.kib_per_connection,
    ),
    (
        "connect_cpu_s",
        "server CPU to connect all, sessions included",
        "s",
        lambda result: result.connect_cpu_s,
    ),
    (
        "request_cpu_us",
        "server CPU per request, at this rate",
        "us",
        lambda result: result.cpu_per_request_us,
    ),
    (
        "generator_arrival_lag_p99_ms",
        "lateness of the generator, connecting, p99",
        "ms",
        _percentile("arrival_lag", "p99"),
    ),
    ("generator_lag_p99_ms", "lateness of the generator, under load, p99", "ms", _percentile("lag", "p99")),
    (
        "generator_cpu_percent",
        "CPU of the busiest generator, of one core",
        "%",
        lambda result: result.record.cpu_share * 100,
    ),
)


def figures(result: Result, bars: Mapping[str, float]) -> list[Figure]:
    """All figures of a run. `bars` are by key."""
    return [
        Figure(key, label, unit, measure(result), bars.get(key)) for key, label, unit, measure in _FIGURES
    ]


def generator_saturated(result: Result) -> bool:
    """Whether the generator was the bottleneck: then latencies say more about it than about the server."""
    latencies = result.record.latencies
    late_ms = [percentiles_ms(latencies[name]).get("p99", 0.0) for name in ("arrival_lag", "lag")]
    return max(late_ms) > SATURATED_LAG_MS or result.record.cpu_share > SATURATED_CPU_SHARE
