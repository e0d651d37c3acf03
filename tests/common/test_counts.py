"""Counts of one process."""

from __future__ import annotations

import pytest

from zcproto.common.counts import BURST_S, Counts, EventRate

RATE = 4
BURST = int(RATE * BURST_S)
"""Events that a full bucket admits at once."""


def test_count_is_admitted_up_to_the_limit_of_its_key() -> None:
    counts = Counts()
    assert [counts.add("ada", 2) for _ in range(3)] == [True, True, False]
    assert counts.add("bob", 2)
    assert (counts["ada"], counts["bob"], counts["carol"], counts.most) == (2, 1, 0, 2)
    counts.remove("ada")
    assert counts.add("ada", 2)


def test_count_without_a_limit_is_always_admitted() -> None:
    counts = Counts()
    assert all(counts.add("ada") for _ in range(100))
    assert counts["ada"] == 100


@pytest.mark.parametrize("now", [0.0, 66_206.455176598, 1e8 + 0.1])
def test_rounding_takes_no_token(now: float) -> None:
    rate = EventRate(10)
    for taken in range(20):
        assert rate.left("ada", now) == 20 - taken
        rate.charge("ada", 1, now)
    rate = EventRate(10)
    assert [rate.admit("ada", now) for _ in range(21)] == [*(20 * [0]), 100]


def test_removed_counts_leave_nothing_behind() -> None:
    counts = Counts()
    counts.add("ada")
    counts.remove("ada")
    assert counts.most == 0


def test_bucket_admits_a_burst_then_the_rate() -> None:
    rate = EventRate(RATE)
    assert [rate.admit("ada", 100.0) for _ in range(BURST + 1)] == [*(BURST * [0]), 250]
    assert rate.admit("bob", 100.0) == 0
    assert rate.admit("ada", 100.125) == 125
    assert rate.admit("ada", 100.25) == 0
    assert rate.admit("ada", 100.25) == 250


def test_bucket_is_full_again_after_the_time_of_a_burst() -> None:
    rate = EventRate(RATE)
    for now in (100.0, 100.0 + BURST_S, 1_000.0):
        assert [rate.admit("ada", now) for _ in range(BURST + 1)] == [*(BURST * [0]), 250]


def test_rate_of_zero_admits_everything_and_counts_nothing() -> None:
    rate = EventRate(0)
    assert not any(rate.admit("ada", 100.0) for _ in range(10_000))
    assert len(rate) == 0


def test_charge_takes_tokens_that_return_with_time() -> None:
    rate = EventRate(RATE)
    assert rate.left("ada", 100.0) == BURST
    rate.charge("ada", 3, 100.0)
    assert rate.left("ada", 100.0) == BURST - 3
    rate.charge("ada", 1_000, 100.0)
    assert [rate.left("ada", now) for now in (100.0, 100.25, 1_000.0)] == [0, 1, BURST]
    assert rate.left("bob", 100.0) == BURST
    unlimited = EventRate(0)
    unlimited.charge("ada", 1_000, 100.0)
    assert len(unlimited) == 0


def test_charge_counts_in_a_full_table() -> None:
    rate = EventRate(RATE, max_keys=1)
    for _ in range(BURST):
        rate.charge("ada", 1, 100.0)
        rate.charge("bob", 1, 100.0)
    assert rate.left("ada", 100.0) == 0
    assert len(rate) == 2


def test_full_table_drops_full_buckets_and_then_shares_one() -> None:
    rate = EventRate(RATE, max_keys=2)
    for key in ("ada", "bob"):
        assert rate.admit(key, 100.0) == 0
    shared = [rate.admit(f"user{number}", 100.0) for number in range(BURST + 1)]
    assert shared == [*(BURST * [0]), 250]
    assert [rate.admit("ada", 100.0) for _ in range(BURST)] == [*((BURST - 1) * [0]), 250]
    assert rate.admit("carol", 100.0 + BURST_S) == 0
    assert len(rate) <= 3
