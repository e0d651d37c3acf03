"""Test conventions of metrics and their rendering."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import MAX_LABEL, METRICS, TABLE, Metrics, Reading, parse_metric

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

CALLS = "zcproto_method_calls_total"
DRAINING = "zcproto_draining"
WAITS = "zcproto_method_wait_seconds"


def text_of(*readings: Reading, accept: str = "") -> str:
    return Metrics(lambda: readings).render(accept)[1].decode()


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if "zcproto_" in line]


def test_counters_and_gauges_are_rendered() -> None:
    assert ours(text_of((CALLS, 3, "a"), (CALLS, 4, "b"), (DRAINING, -1.5))) == [
        "# HELP zcproto_method_calls_total Calls of each method.",
        "# TYPE zcproto_method_calls_total counter",
        'zcproto_method_calls_total{method="a"} 3.0',
        'zcproto_method_calls_total{method="b"} 4.0',
        "# HELP zcproto_draining 1 while the server drains, else 0.",
        "# TYPE zcproto_draining gauge",
        "zcproto_draining -1.5",
    ]


def test_histogram_is_rendered_cumulatively() -> None:
    histogram = Histogram([0.01, 1.0])
    for value in (0.001, 0.01, 0.5, 3.0):
        histogram.add(value)
    assert ours(text_of((WAITS, histogram, "x")))[2:] == [
        'zcproto_method_wait_seconds_bucket{le="0.01",method="x"} 2.0',
        'zcproto_method_wait_seconds_bucket{le="1.0",method="x"} 3.0',
        'zcproto_method_wait_seconds_bucket{le="+Inf",method="x"} 4.0',
        'zcproto_method_wait_seconds_count{method="x"} 4.0',
        f'zcproto_method_wait_seconds_sum{{method="x"}} {0.001 + 0.01 + 0.5 + 3.0}',
    ]


def test_accept_header_selects_format() -> None:
    metrics = Metrics(lambda: [(CALLS, 1, "a")])
    content_type, text = metrics.render("")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert next(one.name for one in parse_text(text.decode())) == "zcproto_method_calls"
    content_type, text = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    assert next(one.name for one in parse_openmetrics(text.decode())) == "zcproto_method_calls"


def test_units_are_rendered_in_openmetrics() -> None:
    text = text_of((WAITS, Histogram([1.0]), "x"), accept=OPENMETRICS)
    assert "# UNIT zcproto_method_wait_seconds seconds" in text
    assert [METRICS[name].unit for name in (CALLS, DRAINING, WAITS)] == ["", "", "seconds"]


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=0.0.1", True),
        ("Application/OpenMetrics-Text;Version=1.0.0;charset=utf-8", True),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
            "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            True,
        ),
        ("text/plain, application/openmetrics-text;version=1.0.0", True),
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("text/plain;version=1.0.0;escaping=x", False),
        ("application/openmetrics-text;version=1.0.0;q=0", False),
        ("application/openmetrics-text;version=1.0.0;q=0.000", False),
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-text;version=99999999999999999999.0.0", False),
        ("application/openmetrics-text;version=", False),
        ("application/openmetrics-textual", False),
        (";,;,=,==;q=q;" * 100, False),
    ],
)
def test_openmetrics_is_used_when_accepted(accept: str, is_openmetrics: bool) -> None:
    content_type, text = Metrics(lambda: [(DRAINING, 1)]).render(accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0") is is_openmetrics
    assert content_type.startswith("text/plain; version=0.0.4") is not is_openmetrics
    assert text.endswith(b"# EOF\n") is is_openmetrics


PIECES = [
    *(
        "application/openmetrics-text",
        "text/plain",
        "*/*",
        "version",
        "1.0.0",
        "0.0.4",
        "abc",
        "q",
        "0",
        "0.5",
    ),
    *(";", ",", "=", " ", "escaping", "allow-utf-8", "\t", "\x00", "\u0660"),
]
ACCEPT = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@given(st.one_of(ACCEPT, st.text(max_size=300)))
def test_any_accept_header_gets_one_of_two_formats(accept: str) -> None:
    content_type, text = Metrics(lambda: [(DRAINING, 1)]).render(accept)
    assert content_type.startswith(("text/plain; version=", "application/openmetrics-text; version="))
    assert b"\nzcproto_draining 1.0\n" in text


@given(st.text(max_size=300))
def test_any_label_round_trips_on_one_line(value: str) -> None:
    text = text_of((CALLS, 1, value))
    (line,) = [line for line in text.split("\n") if line.startswith("zcproto_method_calls_total{")]
    assert line.isprintable()
    assert len(line) <= 12 * MAX_LABEL
    (family,) = [one for one in parse_text(text) if one.name == "zcproto_method_calls"]
    (sample,) = family.samples
    if value.isprintable() and len(value) <= MAX_LABEL:
        assert sample.labels == {"method": value}


def test_series_from_two_sources_appears_once() -> None:
    def first() -> Iterator[Reading]:
        yield CALLS, 1, "a"

    metrics = Metrics(first, lambda: [(CALLS, 2, "b"), (CALLS, 3, "a")])
    text = metrics.render("")[1].decode()
    assert ours(text)[2:] == [
        'zcproto_method_calls_total{method="a"} 3.0',
        'zcproto_method_calls_total{method="b"} 2.0',
    ]


def test_sources_are_read_only_at_a_scrape() -> None:
    reads = []

    def source() -> list[Reading]:
        reads.append(1)
        return []

    metrics = Metrics(source)
    assert not reads
    assert ours(metrics.render("")[1].decode()) == []
    assert reads == [1]


def test_metrics_use_a_separate_registry() -> None:
    before = {family.name for family in REGISTRY.collect()}
    for metrics in (Metrics(), Metrics()):  # two servers in one process
        assert metrics.render("")[1] == b""
    assert {family.name for family in REGISTRY.collect()} == before


@pytest.mark.parametrize(
    "entry",
    [
        "things_total counter\n    A.",
        "zcproto_things counter\n    A.",
        "zcproto_things_total gauge\n    A.",
        "zcproto_Things_total counter\n    A.",
        "zcproto_things_total counter\n    No full stop",
        "zcproto_things_total counter (le)\n    A.",
        "zcproto_things_total counter (a-b)\n    A.",
        "zcproto_things_total summary\n    A.",
    ],
)
def test_metric_violating_conventions_asserts(entry: str) -> None:
    parse_metric("zcproto_things_total counter (kind)\n    A.")
    with pytest.raises(AssertionError):
        parse_metric(entry)


@pytest.mark.parametrize(
    "reading", [(CALLS, 1), (DRAINING, 1, "a"), (DRAINING, Histogram([1.0])), (WAITS, 1, "a")]
)
def test_reading_that_does_not_fit_its_metric_asserts(reading: Reading) -> None:
    with pytest.raises(AssertionError):
        text_of(reading)


def test_metric_names_are_unique_and_do_not_clash_with_histograms() -> None:
    assert len(METRICS) == sum(map(len, TABLE.values()))
    assert all(TABLE.values())
    suffixes = ("_bucket", "_sum", "_count", "_created", "_info")
    assert [name for name in METRICS if name.endswith(suffixes)] == ["zcproto_build_info", "python_info"]


def test_no_label_identifies_users_or_peers() -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert not [
        label for label in labels if re.search("user|peer|address|client|token|session|device", label)
    ]
