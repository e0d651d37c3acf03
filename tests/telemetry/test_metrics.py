"""Metrics in OpenTelemetry's form, beside the text for Prometheus."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import Gauge, Metric, Sum
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource

from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import METRICS, Metrics, series_of
from zcproto.telemetry.export import metrics_data, name_and_unit

BEGAN, NOW = 1_000, 2_000


def exported(*readings: Any) -> list[Metric]:
    data = metrics_data(series_of(readings), Resource({}), BEGAN, NOW)
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    return list(scope.metrics)


def test_names_are_unique_and_without_units() -> None:
    names = {name_and_unit(metric)[0]: metric.name for metric in METRICS.values()}
    assert len(names) == len(METRICS)
    assert not [name for name in names if name.endswith(("_total", "_bytes", "_seconds"))]
    assert name_and_unit(METRICS["zcproto_method_duration_seconds"]) == ("zcproto_method_duration", "s")
    assert name_and_unit(METRICS["zcproto_requests_total"]) == ("zcproto_requests", "1")
    assert name_and_unit(METRICS["process_resident_memory_bytes"]) == ("process_resident_memory", "By")


def test_counter_is_a_monotonic_sum_since_the_start() -> None:
    (metric,) = exported(
        ("zcproto_method_calls_total", 3, "echo"), ("zcproto_method_calls_total", 4, "sleep")
    )
    assert isinstance(metric.data, Sum)
    assert metric.data.is_monotonic
    assert metric.description == METRICS["zcproto_method_calls_total"].help
    points = {str(point.attributes): point for point in metric.data.data_points}
    assert {key: point.value for key, point in points.items()} == {
        "{'method': 'echo'}": 3,
        "{'method': 'sleep'}": 4,
    }
    assert {(point.start_time_unix_nano, point.time_unix_nano) for point in points.values()} == {(BEGAN, NOW)}


@pytest.mark.parametrize(("value", "expected"), [(True, 1), (2.5, 2.5), (float("inf"), float("inf"))])
def test_gauge(value: float, expected: float) -> None:
    (metric,) = exported(("zcproto_draining", value))
    assert isinstance(metric.data, Gauge)
    (point,) = metric.data.data_points
    assert point.value == expected
    assert not isinstance(point.value, bool)


def test_histogram_keeps_its_bounds_and_counts() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.5, 0.5, 3.0):
        histogram.add(seconds)
    (metric,) = exported(("zcproto_loop_lag_seconds", histogram))
    assert isinstance(metric.data, HistogramData)
    (point,) = metric.data.data_points
    assert (point.count, point.bucket_counts, point.explicit_bounds) == (4, [1, 2, 1], [0.1, 1.0])
    assert point.sum == pytest.approx(4.05)
    assert (point.start_time_unix_nano, point.time_unix_nano) == (BEGAN, NOW)


def test_both_forms_come_from_one_reading() -> None:
    metrics = Metrics(lambda: [("zcproto_requests_total", 7)])
    text = metrics.render("")[1].decode()
    (metric,) = exported(("zcproto_requests_total", 7))
    assert "zcproto_requests_total 7.0" in text
    assert metrics.series() == {"zcproto_requests_total": {(): 7}}
    assert isinstance(metric.data, Sum)
    assert metric.data.data_points[0].value == 7
