from __future__ import annotations

import random
from itertools import islice, pairwise

import pytest

from zcproto.load.schedule import arrivals, rounds, steady


def test_steady_times_are_evenly_spaced() -> None:
    assert [*steady(4.0, 5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("rate", "seconds", "total"), [(1000, 3, 3000), (0.4, 10, 4), (7.3, 2.5, 18), (10, 0.25, 2), (0.1, 1, 0)]
)
def test_arrivals_are_as_many_as_asked_for(rate: float, seconds: float, total: int) -> None:
    times = [*arrivals(rate, seconds, random.Random(7))]
    assert len(times) == total == round(rate * seconds)
    assert all(earlier <= later for earlier, later in pairwise(times))
    assert all(0 <= time < seconds for time in times)


def test_each_second_has_its_part_of_the_arrivals() -> None:
    times = [*arrivals(500, 4, random.Random(7))]
    assert [sum(int(time) == second for time in times) for second in range(4)] == [500] * 4


def test_arrivals_within_a_second_are_random_and_repeatable() -> None:
    times = [*arrivals(1000, 1, random.Random(7))]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # Of exponential gaps, 37 % are above their mean and 5 % above three times it.
    assert 0.30 < sum(gap > 0.001 for gap in gaps) / len(gaps) < 0.44
    assert 0.02 < sum(gap > 0.003 for gap in gaps) / len(gaps) < 0.08
    assert times == [*arrivals(1000, 1, random.Random(7))]
    assert times != [*arrivals(1000, 1, random.Random(8))]


def test_rounds_give_each_its_turn_before_any_again() -> None:
    turns = rounds(range(20), random.Random(7))
    first, second = [*islice(turns, 20)], [*islice(turns, 20)]
    assert sorted(first) == sorted(second) == [*range(20)]
    assert first != second


def test_rounds_of_nothing_end() -> None:
    assert [*rounds([], random.Random(7))] == []
