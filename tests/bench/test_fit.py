"""How a series grows: fits of known points, and the words for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.curves.curve import Curve, Described, Series, best
from bench.curves.fit import line, power

SIZES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
FACTORS = st.floats(0.01, 1_000)


@given(FACTORS, FACTORS, st.floats(-2, 2))
def test_fit_recovers_line_and_power(base: float, slope: float, exponent: float) -> None:
    straight = line(SIZES, [base + slope * size for size in SIZES])
    curved = power(SIZES, [base * size**exponent for size in SIZES])
    assert straight is not None
    assert curved is not None
    assert (straight.power, curved.power) == (False, True)
    assert straight.at(500) == pytest.approx(base + slope * 500, rel=1e-6)
    assert curved.at(500) == pytest.approx(base * 500**exponent, rel=1e-6)


def test_small_costs_have_same_weight_as_large_ones() -> None:
    """Plain squares would be far off at the small end, to gain a little at the large one."""
    fit = line((1, 2, 4, 1_000, 1_000_000), (10.0, 10.0, 10.0, 11.0, 1_400.0))
    assert fit is not None
    assert fit.base == pytest.approx(10, rel=0.05)


def test_points_without_a_trend_have_no_fit_or_a_useless_one() -> None:
    assert line((1, 2), (1, 2)) is power((1, 2), (1, 2)) is None
    level, useless = line((5, 5, 5), (1.0, 2.0, 3.0)), line((1, 2, 3, 4), (10.0, 12.0, 12.0, 10.0))
    assert level is not None
    assert useless is not None
    assert level.slope == 0
    assert useless.r2 == pytest.approx(0, abs=0.05)


def described(
    *values: float, inverse: bool = False, sizes: tuple[int, ...] = (1, 10, 100, 1_000)
) -> Described:
    curve = Curve("k", "title", "byte", "bytes", sizes, (Series("cost", "us", values),), "how", inverse)
    return curve.described()[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((2, 2.1, 2.05, 2.1), "cost hardly grows: 2 to 2.1 us (exponent 0.0"),
        ((5.5, 10, 55, 505), "cost: 5 us + 0.5 us for each byte (R² 1.000); 5.5 to 505 us"),
        ((10, 3.16, 1, 0.316), "cost falls: 0.316 to 10 us (exponent -0.50"),
        ((1, 20, 400, 8_000), "cost grows faster than in proportion"),
        ((1, 3.16, 10, 31.6), "cost grows more slowly than in proportion: 1 to 31.6 us (exponent 0.50, R² 1"),
        ((1, 30, 2, 9), "cost has no clear trend"),
        ((2, 9, 1, 2.5), "cost has no clear trend"),
        ((2, 2.5, 1.5, 2.9), "cost hardly grows"),
        ((1, 0, 0, 4), "cost: too few points for a fit"),
    ],
)
def test_series_is_described_by_a_sentence(values: tuple[float, ...], words: str) -> None:
    assert described(*values).sentence.startswith(words)


@pytest.mark.parametrize(
    ("values", "is_power"), [((5.5, 10, 55, 505), False), ((1, 3.16, 10, 31.6), True), ((1, 0, 0, 4), None)]
)
def test_better_fit_is_drawn(values: tuple[float, ...], is_power: bool | None) -> None:
    fit = best(described(*values), (1, 10, 100, 1_000))
    assert (fit and fit.power) is is_power
