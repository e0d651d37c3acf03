"""Test histograms."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from zcproto.observe.histogram import QUICK_S, WAITED_S, Histogram


def test_value_equal_to_bound_counts_below_it() -> None:
    histogram = Histogram([0.5, 1.0])
    for value in (0.0, 0.5, 0.500001, 1.0, 1.5, 1000.0):
        histogram.add(value)
    assert histogram.counts == [2, 2, 2]
    assert math.isclose(histogram.total, 1003.500001)


@given(st.lists(st.floats(0, 200)))
def test_each_value_is_counted_once(values: list[float]) -> None:
    histogram = Histogram(WAITED_S)
    for value in values:
        histogram.add(value)
    below = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        below += count
        assert below == sum(value <= bound for value in values)
    assert below + histogram.counts[-1] == len(values)


def test_bounds_are_ascending() -> None:
    for bounds in (QUICK_S, WAITED_S):
        assert list(bounds) == sorted(set(bounds))
