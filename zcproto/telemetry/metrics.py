"""The metrics of a server in OpenTelemetry's form: the same series as /metrics, from the same readings.

Decides: names and units. A metric is called as in docs/reference/metrics.md, without `_total` and without its unit,
which exporters to Prometheus append.

Must not know: when metrics are read and sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import METRICS, Series
from zcproto.observe.metrics import Metric as ServerMetric
from zcproto.telemetry.spans import SCHEMA, SCOPE

UNITS: Final = {"seconds": "s", "bytes": "By"}
"""The units of UCUM by those in names."""

_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE

ReadSeries = Callable[[], Series]


def name_and_unit(metric: ServerMetric) -> tuple[str, str]:
    """Return the name and the unit that a metric has in OpenTelemetry."""
    name = metric.name.removesuffix("_total")
    return name.removesuffix(f"_{metric.unit}") if metric.unit else name, UNITS.get(metric.unit, "1")


def metrics_data(series: Series, resource: Resource, began_ns: int, now_ns: int) -> MetricsData:
    """Return the series of one process as data to export. They have been counted since `began_ns`."""
    metrics = list(_metrics(series, began_ns, now_ns))
    scope = ScopeMetrics(InstrumentationScope(SCOPE, schema_url=SCHEMA), metrics, SCHEMA)
    return MetricsData([ResourceMetrics(resource, [scope], resource.schema_url)])


def _metrics(series: Series, began_ns: int, now_ns: int) -> Iterator[Metric]:
    for known, values in series.items():
        metric = METRICS[known]
        name, unit = name_and_unit(metric)
        numbers: list[NumberDataPoint] = []
        histograms: list[HistogramDataPoint] = []
        for labels, value in values.items():
            attributes = dict(zip(metric.labels, labels, strict=True))
            if isinstance(value, Histogram):
                histograms.append(_histogram(value, attributes, began_ns, now_ns))
            else:
                number = value if isinstance(value, float) else int(value)
                numbers.append(NumberDataPoint(attributes, began_ns, now_ns, number))
        data: Sum | Gauge | HistogramData
        if metric.kind == "histogram":
            data = HistogramData(histograms, _CUMULATIVE)
        elif metric.kind == "counter":
            data = Sum(numbers, _CUMULATIVE, is_monotonic=True)
        else:
            data = Gauge(numbers)
        yield Metric(name, metric.help, unit, data)


def _histogram(
    value: Histogram, attributes: dict[str, str], began_ns: int, now_ns: int
) -> HistogramDataPoint:
    extremes: dict[str, None] = {"min": None, "max": None}  # unknown
    return HistogramDataPoint(
        attributes,
        began_ns,
        now_ns,
        sum(value.counts),
        value.total,
        list(value.counts),
        list(value.bounds),
        **extremes,  # type: ignore[arg-type]  # optional in the protocol
    )
