"""How a series grows: fits of known points, and the words for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.curves.curve import Curve, Described, Series, best, number
from bench.curves.fit import growth, line, power

SIZES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
FACTORS = st.floats(0.01, 1_000)


@given(FACTORS, FACTORS)
def test_fit_recovers_line(base: float, slope: float) -> None:
    fit = line(SIZES, [base + slope * size for size in SIZES])
    assert fit is not None
    assert not fit.power
    assert fit.at(500) == pytest.approx(base + slope * 500, rel=1e-6)
    assert fit.r2 == pytest.approx(1)


@given(FACTORS, st.floats(-2, 2))
def test_fit_recovers_power(base: float, exponent: float) -> None:
    fit = power(SIZES, [base * size**exponent for size in SIZES])
    assert fit is not None
    assert fit.power
    assert fit.slope == pytest.approx(exponent, abs=1e-9)
    assert fit.at(500) == pytest.approx(base * 500**exponent, rel=1e-6)


def test_small_costs_have_same_weight_as_large_ones() -> None:
    """Plain squares would be far off at the small end, to gain a little at the large one."""
    fit = line((1, 2, 4, 1_000, 1_000_000), (10.0, 10.0, 10.0, 11.0, 1_400.0))
    assert fit is not None
    assert fit.base == pytest.approx(10, rel=0.05)


def test_two_points_have_no_fit() -> None:
    assert line((1, 2), (1, 2)) is None
    assert power((1, 2), (1, 2)) is None


def test_useless_line_has_r2_of_zero() -> None:
    fit = line((1, 2, 3, 4), (10.0, 12.0, 12.0, 10.0))
    assert fit is not None
    assert fit.r2 == pytest.approx(0, abs=0.05)


def test_equal_sizes_have_no_slope() -> None:
    fit = line((5, 5, 5), (1.0, 2.0, 3.0))
    assert fit is not None
    assert fit.slope == 0


@pytest.mark.parametrize(
    ("exponent", "words"),
    [
        (0.0, "hardly grows"),
        (0.09, "hardly grows"),
        (-0.09, "hardly grows"),
        (-0.5, "falls"),
        (0.5, "grows more slowly than in proportion"),
        (1.0, "grows in proportion"),
        (1.3, "grows faster than in proportion"),
    ],
)
def test_words_follow_exponent(exponent: float, words: str) -> None:
    fit = power(SIZES, [size**exponent for size in SIZES])
    assert fit is not None
    assert growth(fit) == words


def described(
    *values: float, inverse: bool = False, sizes: tuple[int, ...] = (1, 10, 100, 1_000)
) -> Described:
    curve = Curve("k", "title", "byte", "bytes", sizes, (Series("cost", "us", values),), "how", inverse)
    return curve.described()[0]


def test_constant_cost_hardly_grows() -> None:
    assert described(2, 2.1, 2.05, 2.1).sentence.startswith("cost hardly grows: 2 to 2.1 us (exponent 0.0")


def test_linear_cost_has_base_and_slope() -> None:
    assert (
        described(5.5, 10, 55, 505).sentence == "cost: 5 us + 0.5 us for each byte (R² 1.000); 5.5 to 505 us"
    )


def test_power_cost_has_exponent() -> None:
    assert described(1, 3.16, 10, 31.6).sentence.startswith(
        "cost grows more slowly than in proportion: 1 to 31.6 us (exponent 0.50, R² 1.000)"
    )


def test_noise_has_no_trend() -> None:
    assert "has no clear trend" in described(1, 30, 2, 9).sentence
    assert "has no clear trend" in described(2, 9, 1, 2.5).sentence
    assert "hardly grows" in described(2, 2.5, 1.5, 2.9).sentence


def test_cost_of_write_is_separated_from_cost_of_request() -> None:
    made = described(20, 11, 6.5, 4.25, inverse=True, sizes=(1, 2, 4, 8))
    assert made.sentence.startswith("cost: 2 us for each request and 18 us for each write (R² 1.0")


def test_too_few_points_are_named() -> None:
    made = described(1, 0, 0, 4)
    assert made.sentence == "cost: too few points for a fit"
    assert best(made, (1, 10, 100, 1_000)) is None


def test_better_fit_is_drawn() -> None:
    fit = best(described(5.5, 10, 55, 505), (1, 10, 100, 1_000))
    assert fit is not None
    assert not fit.power
    fit = best(described(1, 3.16, 10, 31.6), (1, 10, 100, 1_000))
    assert fit is not None
    assert fit.power


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.1234, "0.123"), (0.00012345, "1.23e-04")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text
