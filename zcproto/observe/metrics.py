"""Define metrics and render them for Prometheus.

    server objects count in plain integers  ->  at a scrape, sources read them  ->  Metrics.render writes them

All work happens at a scrape. What is measured is in metric_table.py.

Rules:
- A metric has a fixed set of labels with few values: names of causes, methods and files, never of users or peers.
- Each series appears once; of two readings the later one counts.
- The registry is separate from the global one of prometheus_client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from zcproto.common.text import escape_text
from zcproto.observe.histogram import Histogram

PREFIXES: Final = ("zcproto_", "process_")
"""The second is the usual prefix for metrics of any process."""

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

MAX_LABEL: Final = 200
"""Maximum characters of a label value: paths may be long."""

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_UNITS: Final = ("seconds", "bytes")
_OPENMETRICS_VERSIONS: Final = ("0.0.1", "1.0.0")
_generate_openmetrics: Final[Callable[[CollectorRegistry], bytes]] = openmetrics.generate_latest
_NEVER: Final = re.compile(r"0(\.0{0,3})?")


class MetricKind(Enum):
    """Types of metrics, as in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Reading(NamedTuple):
    """The current value of one series of a metric."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Histogram


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A metric with its full name. `help` is a sentence for people, `labels` are names.

    Compared by identity, because each scrape looks it up some hundred times.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.name.startswith(PREFIXES), self.name
        assert all(map(_NAME.fullmatch, (self.name, *self.labels))), self.name
        assert self.name.endswith("_total") == (self.kind is MetricKind.COUNTER), self.name
        assert self.help.endswith("."), self.name
        assert "le" not in self.labels, self.name

    @property
    def unit(self) -> str:
        """Return the unit in the name: seconds, bytes, or empty."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in _UNITS else ""

    def at(self, value: float | Histogram, *labels: str) -> Reading:
        """Return a reading of the series with these label values."""
        assert len(labels) == len(self.labels), self.name
        assert isinstance(value, Histogram) == (self.kind is MetricKind.HISTOGRAM), self.name
        return Reading(self, labels, value)


Source = Callable[[], Iterable[Reading]]
"""Reads some metrics. Called at each scrape, in the thread of `Metrics.render`."""


class Metrics:
    """All metrics of a process: those of its sources and those of the interpreter."""

    def __init__(self, *sources: Source) -> None:
        self._sources = list(sources)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        GCCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def add(self, source: Source) -> None:
        """Add a source."""
        self._sources.append(source)

    def render(self, accept: str) -> tuple[str, bytes]:
        """Return content type and text: OpenMetrics if the `Accept` header requests it, else Prometheus's
        format."""
        if _wants_openmetrics(accept):
            return OPENMETRICS, _generate_openmetrics(self._registry)
        return TEXT, generate_latest(self._registry)

    def describe(self) -> Iterator[Family]:
        """Return nothing, so that the registry does not scrape to learn names."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """Read all sources for prometheus_client's registry."""
        found: dict[Metric, dict[tuple[str, ...], float | Histogram]] = {}
        for source in self._sources:
            for metric, labels, value in source():
                found.setdefault(metric, {})[tuple(map(_label, labels))] = value
        for metric, series in found.items():
            yield _family(metric, series)


def _wants_openmetrics(accept: str) -> bool:
    """Return True if an Accept header (RFC 9110 section 12.5.1) names OpenMetrics in a supported version.

    OpenMetrics is preferred whenever accepted. prometheus_client's own negotiation raises for an invalid version.
    """
    for choice in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in choice.split(";"))
        if media_type != "application/openmetrics-text":
            continue
        named = dict(parameter.partition("=")[::2] for parameter in parameters)
        if named.get("version", "1.0.0") in _OPENMETRICS_VERSIONS and not _NEVER.fullmatch(
            named.get("q", "1")
        ):
            return True
    return False


@lru_cache(maxsize=4_096)
def _label(value: str) -> str:
    return escape_text(value[:MAX_LABEL])


def _family(metric: Metric, series: dict[tuple[str, ...], float | Histogram]) -> Family:
    if metric.kind is MetricKind.HISTOGRAM:
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
        for labels, histogram in series.items():
            assert isinstance(histogram, Histogram)
            histograms.add_metric(labels, _buckets(histogram), histogram.total)
        return histograms
    kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, number in series.items():
        assert not isinstance(number, Histogram)
        family.add_metric(labels, number)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return cumulative counts per bound, as in Prometheus."""
    sums, below = [], 0
    for bound, count in zip((*map(_bound, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        sums.append((bound, float(below)))
    return sums


def _bound(bound: float) -> str:
    """Return a bound as both text formats write it: as a float."""
    return repr(float(bound))
