"""How a series grows: fits of points that are known, and the words for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.curves.curve import Curve, Described, Series, best, number
from bench.curves.fit import growth, line, power

SIZES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
FACTORS = st.floats(0.01, 1_000)


@given(FACTORS, FACTORS)
def test_a_line_is_found_again(base: float, slope: float) -> None:
    fit = line(SIZES, [base + slope * size for size in SIZES])
    assert fit is not None
    assert not fit.power
    assert fit.at(500) == pytest.approx(base + slope * 500, rel=1e-6)
    assert fit.r2 == pytest.approx(1)


@given(FACTORS, st.floats(-2, 2))
def test_a_power_is_found_again(base: float, exponent: float) -> None:
    fit = power(SIZES, [base * size**exponent for size in SIZES])
    assert fit is not None
    assert fit.power
    assert fit.slope == pytest.approx(exponent, abs=1e-9)
    assert fit.at(500) == pytest.approx(base * 500**exponent, rel=1e-6)


def test_small_costs_count_as_much_as_large_ones() -> None:
    """A fit of plain squares would be wrong by far at the small end, as it saves a little at the large one."""
    fit = line((1, 2, 4, 1_000, 1_000_000), (10.0, 10.0, 10.0, 11.0, 1_400.0))
    assert fit is not None
    assert fit.base == pytest.approx(10, rel=0.05)


def test_two_points_are_no_fit() -> None:
    assert line((1, 2), (1, 2)) is None
    assert power((1, 2), (1, 2)) is None


def test_a_line_that_explains_nothing_has_no_r2() -> None:
    fit = line((1, 2, 3, 4), (10.0, 12.0, 12.0, 10.0))
    assert fit is not None
    assert fit.r2 == pytest.approx(0, abs=0.05)


def test_the_same_size_throughout_has_no_slope() -> None:
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
def test_the_words_are_those_of_the_exponent(exponent: float, words: str) -> None:
    fit = power(SIZES, [size**exponent for size in SIZES])
    assert fit is not None
    assert growth(fit) == words


def described(
    *values: float, inverse: bool = False, sizes: tuple[int, ...] = (1, 10, 100, 1_000)
) -> Described:
    curve = Curve("k", "title", "byte", "bytes", sizes, (Series("cost", "us", values),), "how", inverse)
    return curve.described()[0]


def test_a_cost_that_stays_is_said_to() -> None:
    assert described(2, 2.1, 2.05, 2.1).sentence.startswith("cost hardly grows: 2 to 2.1 us (exponent 0.0")


def test_a_cost_that_is_a_line_is_told_by_its_base_and_its_slope() -> None:
    assert (
        described(5.5, 10, 55, 505).sentence == "cost: 5 us + 0.5 us for each byte (R² 1.000); 5.5 to 505 us"
    )


def test_a_cost_that_is_a_power_is_told_by_its_exponent() -> None:
    assert described(1, 3.16, 10, 31.6).sentence.startswith(
        "cost grows more slowly than in proportion: 1 to 31.6 us (exponent 0.50, R² 1.000)"
    )


def test_noise_is_no_growth() -> None:
    assert "has no clear trend" in described(1, 30, 2, 9).sentence
    assert "has no clear trend" in described(2, 9, 1, 2.5).sentence
    assert "hardly grows" in described(2, 2.5, 1.5, 2.9).sentence


def test_what_a_write_shares_is_told_apart_from_what_each_request_costs() -> None:
    made = described(20, 11, 6.5, 4.25, inverse=True, sizes=(1, 2, 4, 8))
    assert made.sentence.startswith(
        "cost: 2 us are a request's own, 18 us the write's, which all in it share (R² 1.0"
    )


def test_too_few_points_are_said_to_be() -> None:
    made = described(1, 0, 0, 4)
    assert made.sentence == "cost: too few points for a fit"
    assert best(made, (1, 10, 100, 1_000)) is None


def test_the_better_fit_is_drawn() -> None:
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
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
