"""Metrics, as Prometheus reads them: what one is, and how all of them are written down.

    server objects count in plain integers  ->  at a scrape, sources read them  ->  Metrics.render writes them

What this file decides: nothing about what is measured (that is metric_table.py), and nothing is counted here. All
work is done at a scrape, none where something happens.

Rules:
- A metric has a fixed set of labels, and whoever reads it sees to it that their values are few: names of causes,
  methods and files, never of users or peers.
- A series is there once. Of two readings of one, the later holds.
- Everything is in a registry of our own: what other parts of a process do with prometheus_client is theirs.
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
"""The second is for what is known of any process, by the names that are usual for it."""

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

MAX_LABEL: Final = 200
"""Characters of a label's value: paths may be long."""

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_UNITS: Final = ("seconds", "bytes")
_OPENMETRICS_VERSIONS: Final = ("0.0.1", "1.0.0")
_generate_openmetrics: Final[Callable[[CollectorRegistry], bytes]] = openmetrics.generate_latest
_NEVER: Final = re.compile(r"0(\.0{0,3})?")


class Kind(Enum):
    """What may be done with a metric's values."""

    COUNTER = "counter"
    """It grows, and begins anew with the process."""
    GAUGE = "gauge"
    """It goes up and down."""
    HISTOGRAM = "histogram"
    """Values counted by size."""


class Reading(NamedTuple):
    """One series of a metric as it is now."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Histogram


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A metric by its whole name. `help` is a sentence for people, `labels` are names.

    It is equal to itself alone, as each scrape looks for it some hundred times.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.name.startswith(PREFIXES), self.name
        assert all(map(_NAME.fullmatch, (self.name, *self.labels))), self.name
        assert self.name.endswith("_total") == (self.kind is Kind.COUNTER), self.name
        assert self.help.endswith("."), self.name
        assert "le" not in self.labels, self.name

    @property
    def unit(self) -> str:
        """What the name ends in, if that is a unit: seconds or bytes. Else it counts things."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in _UNITS else ""

    def at(self, value: float | Histogram, *labels: str) -> Reading:
        """A reading: the value of the series with these values of its labels."""
        assert len(labels) == len(self.labels), self.name
        assert isinstance(value, Histogram) == (self.kind is Kind.HISTOGRAM), self.name
        return Reading(self, labels, value)


Source = Callable[[], Iterable[Reading]]
"""Reads some metrics. It is called at each scrape, in the thread of `Metrics.render`."""


class Metrics:
    """All metrics of a process: those of its sources, and those of the interpreter."""

    def __init__(self, *sources: Source) -> None:
        self._sources = list(sources)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        GCCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def add(self, source: Source) -> None:
        """Have further metrics read."""
        self._sources.append(source)

    def render(self, accept: str) -> tuple[str, bytes]:
        """The content type, and the text: OpenMetrics if an `Accept` header asks for it, else Prometheus's."""
        if _wants_openmetrics(accept):
            return OPENMETRICS, _generate_openmetrics(self._registry)
        return TEXT, generate_latest(self._registry)

    def describe(self) -> Iterator[Family]:
        """Nothing: the registry shall not scrape to learn names."""
        return iter(())

    def collect(self) -> Iterator[Family]:
        """What prometheus_client's registry asks for."""
        found: dict[Metric, dict[tuple[str, ...], float | Histogram]] = {}
        for source in self._sources:
            for metric, labels, value in source():
                found.setdefault(metric, {})[tuple(map(_label, labels))] = value
        for metric, series in found.items():
            yield _family(metric, series)


def _wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics (RFC 9110 section 12.5.1), in a version that is written here.

    Who takes it at all gets it: a scraper that names both forms can read both. prometheus_client's own choice ends
    in an exception for a version that is no number.
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
    if metric.kind is Kind.HISTOGRAM:
        histograms = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
        for labels, histogram in series.items():
            assert isinstance(histogram, Histogram)
            histograms.add_metric(labels, _buckets(histogram), histogram.total)
        return histograms
    kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.labels, unit=metric.unit)
    for labels, number in series.items():
        assert not isinstance(number, Histogram)
        family.add_metric(labels, number)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Counts up to each bound, as Prometheus has them."""
    sums, below = [], 0
    for bound, count in zip((*map(_bound, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        sums.append((bound, float(below)))
    return sums


def _bound(bound: float) -> str:
    """A bound as both forms of text have it: as a float."""
    return repr(float(bound))
