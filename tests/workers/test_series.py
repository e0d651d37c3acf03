"""Series of several processes: their sum, and the form in which they are sent."""

from __future__ import annotations

import functools
import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.observe.histogram import Histogram
from zcproto.observe.metrics import MAX_LABEL, METRICS, Metric, Metrics, Series, series_of
from zcproto.workers.merge import (
    lasting_series,
    merge_series,
    pack_series,
    readings_of,
    unpack_series,
)

CALLS, DRAINING, LEFT = "zcproto_method_calls_total", "zcproto_draining", "zcproto_store_outage_seconds"
WAITS, LIMIT_USE = "zcproto_method_wait_seconds", "zcproto_limit_use"
BOUNDS = (0.5, 1.0)

numbers = st.integers(0, 1 << 40) | st.integers(0, 1 << 20).map(lambda number: number / 1024)
"""Values whose sums are exact in any order."""


@st.composite
def histograms(draw: st.DrawFn) -> Histogram:
    histogram = Histogram(BOUNDS)
    histogram.counts = draw(st.lists(st.integers(0, 1 << 40), min_size=3, max_size=3))
    histogram.total = draw(numbers)
    return histogram


@st.composite
def series_of_metric(draw: st.DrawFn, metric: Metric) -> dict[tuple[str, ...], Any]:
    labels = st.tuples(*[st.sampled_from(["a", "b", "limits.max_connections"]) for _ in metric.labels])
    values = histograms() if metric.kind == "histogram" else numbers
    return draw(st.dictionaries(labels, values, min_size=1, max_size=3))


@st.composite
def parts(draw: st.DrawFn) -> Series:
    names = draw(
        st.sets(st.sampled_from([CALLS, DRAINING, LEFT, WAITS, LIMIT_USE, "zcproto_requests_total"]))
    )
    return {name: draw(series_of_metric(METRICS[name])) for name in sorted(names)}


def plain(series: Series) -> Any:
    """Return series that can be compared."""
    return {
        name: {
            labels: (value.bounds, value.counts, value.total) if isinstance(value, Histogram) else value
            for labels, value in values.items()
        }
        for name, values in series.items()
    }


@given(st.lists(parts(), max_size=5), st.randoms(use_true_random=False))
def test_order_of_merging_does_not_matter(given_parts: list[Series], random: Any) -> None:
    whole = plain(merge_series(given_parts))
    shuffled = random.sample(given_parts, len(given_parts))
    assert plain(merge_series(shuffled)) == whole
    assert plain(functools.reduce(lambda one, other: merge_series([one, other]), shuffled, {})) == whole


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from((0.2, 0.7, 3.0)))), max_size=4))
def test_merge_of_parts_equals_the_whole(calls: list[list[tuple[str, float]]]) -> None:
    """Calls that are counted by several processes, or all by one."""

    def count(calls: list[tuple[str, float]]) -> Series:
        waits = {method: Histogram(BOUNDS) for method, _ in calls}
        for method, seconds in calls:
            waits[method].add(seconds)
        readings = [(WAITS, histogram, method) for method, histogram in waits.items()]
        return series_of([*readings, *((CALLS, sum(each.counts), method) for _, each, method in readings)])

    merged = plain(merge_series(map(count, calls)))
    whole = plain(count([call for each in calls for call in each]))
    assert merged.get(CALLS) == whole.get(CALLS)
    for labels, (bounds, counts, total) in merged.get(WAITS, {}).items():
        assert whole[WAITS][labels] == (bounds, counts, pytest.approx(total))


def test_merging_changes_no_part() -> None:
    histogram = Histogram(BOUNDS)
    histogram.add(0.7)
    part: Series = {WAITS: {("a",): histogram}, CALLS: {("a",): 1}}
    merged = merge_series([part, part])
    assert plain(part) == {WAITS: {("a",): (BOUNDS, [0, 1, 0], 0.7)}, CALLS: {("a",): 1}}
    assert plain(merged) == {WAITS: {("a",): (BOUNDS, [0, 2, 0], 1.4)}, CALLS: {("a",): 2}}
    histogram.add(0.7)
    assert plain(merged)[WAITS]["a",][1] == [0, 2, 0]


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        (CALLS, ("a",), 5),
        ("zcproto_connections", (), 5),
        (LEFT, (), 3),
        (DRAINING, (), 2),
        ("zcproto_certificate_left_seconds", ("p", "own", "", "rsa"), 2),
        ("process_open_fds", (), 3),
        ("process_resident_memory_bytes", (), 5),
        (LIMIT_USE, ("limits.max_streams",), 3),
    ],
)
def test_values_are_combined_as_the_table_says(name: str, labels: tuple[str, ...], expected: float) -> None:
    assert merge_series([{name: {labels: 2}}, {name: {labels: 3}}]) == {name: {labels: expected}}


def test_histograms_with_different_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="bounds"):
        merge_series([{WAITS: {("a",): Histogram((1.0,))}}, {WAITS: {("a",): Histogram((2.0,))}}])


@given(parts())
def test_packed_series_survive_msgpack(series: Series) -> None:
    packed = msgpack.unpackb(msgpack.packb(pack_series(series)))
    assert plain(unpack_series(packed)) == plain(series)


@given(st.text())
def test_label_is_rendered_the_same_after_it_was_sent(label: str) -> None:
    readings = [(CALLS, 1, label)]
    here = Metrics(lambda: readings).render("")
    sent = unpack_series(pack_series(series_of(readings)))  # type: ignore[arg-type]
    assert Metrics(lambda: readings_of(sent)).render("") == here


def test_counters_and_histograms_outlive_their_process() -> None:
    used = Histogram(BOUNDS)
    used.add(0.1)
    lasting = lasting_series(
        {
            CALLS: {("a",): 1, ("b",): 0},
            DRAINING: {(): 1},
            WAITS: {("a",): used, ("b",): Histogram(BOUNDS)},
            "zcproto_requests_total": {(): 0},
        }
    )
    assert lasting == {CALLS: {("a",): 1}, WAITS: {("a",): used}}


def test_thousand_methods_fit_in_half_a_mebibyte() -> None:
    def readings() -> Any:
        histogram = Histogram([number / 1024 for number in range(17)])
        histogram.counts = [100_000] * 18
        for number in range(1_000):
            for name in (CALLS, WAITS, "zcproto_method_duration_seconds"):
                yield name, 1_000_000 if name == CALLS else histogram, f"billing.invoices.method_{number}"

    assert len(msgpack.packb(pack_series(series_of(readings())))) < 1 << 18


GOOD: Any = [["a"], [[0.5, 1.0]], {CALLS: [[[0], 1]], WAITS: [[[0], [0, 1.5, [1, 2, 3]]]]}]


@pytest.mark.parametrize(
    "change",
    [
        lambda value: None,
        lambda value: value[:2],
        lambda value: [value[0], value[1], []],
        lambda value: [[1], *value[1:]],
        lambda value: [["a" * (MAX_LABEL + 1)], *value[1:]],
        lambda value: [[], *value[1:]],
        lambda value: [value[0], [], value[2]],
        lambda value: [value[0], [["x"]], value[2]],
        lambda value: [value[0], [[1.0]] * (len(METRICS) + 1), value[2]],
        lambda value: [value[0], value[1], {"zcproto_other": []}],
        lambda value: [value[0], value[1], {CALLS: [[[0, 0], 1]]}],
        lambda value: [value[0], value[1], {CALLS: [[[0], "1"]]}],
        lambda value: [value[0], value[1], {CALLS: [[[0], 1]] * 100_001}],
        lambda value: [value[0], value[1], {WAITS: [[[0], 1]]}],
        lambda value: [value[0], value[1], {WAITS: [[[0], [0, 1.5, [1, 2]]]]}],
        lambda value: [value[0], value[1], {WAITS: [[[0], [0, 1.5, [1, 2, "3"]]]]}],
        lambda value: [value[0], value[1], {WAITS: [[[0], [0, 1.5, {1: 1, 2: 2, 3: 3}]]]}],
        lambda value: [value[0], value[1], {WAITS: [[[0], [0, None, [1, 2, 3]]]]}],
    ],
)
def test_unreadable_series_are_refused(change: Any) -> None:
    assert unpack_series(GOOD)
    with pytest.raises(ValueError, match="these are not series of metrics"):
        unpack_series(change(json.loads(json.dumps(GOOD))))
