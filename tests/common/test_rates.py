"""Token buckets."""

from __future__ import annotations

import pytest

from zcproto.common.rates import BURST_S, EventRate, TokenBucket

RATE = 4
BURST = int(RATE * BURST_S)
"""Events that a full bucket admits at once."""


@pytest.mark.parametrize("now", [0.0, 66_206.455176598, 1e8 + 0.1])
@pytest.mark.parametrize(("tokens", "seconds"), [(BURST, BURST_S), (1, 60.0), (10, 60.0), (7, 3_600.0)])
def test_bucket_admits_its_tokens_at_once_then_one_in_each_part_of_the_time(
    tokens: int, seconds: float, now: float
) -> None:
    bucket, rate = TokenBucket(tokens / seconds, seconds), EventRate(tokens / seconds, seconds)
    step = seconds / tokens
    times = [now + passed for passed in [*[0.0] * (tokens + 1), 0.9 * step, step, step, 3 * seconds]]
    expected = [*[True] * tokens, False, False, True, False, True]
    assert [bucket.admit(at) for at in times] == expected
    assert [rate.admit("ada", at) == 0 for at in times] == expected


def test_bucket_may_be_overdrawn() -> None:
    bucket = TokenBucket(RATE)
    bucket.charge(BURST, 100.0)
    assert bucket.debt_s(100.0) == 0
    bucket.charge(6, 100.0)
    assert bucket.debt_s(100.0) == 1.5
    assert bucket.debt_s(101.0, cost=1) == 0.75


@pytest.mark.parametrize("now", [0.0, 66_206.455176598, 1e8 + 0.1])
def test_rounding_takes_no_token(now: float) -> None:
    rate = EventRate(10)
    for taken in range(20):
        assert rate.left("ada", now) == 20 - taken
        rate.charge("ada", 1, now)
    rate = EventRate(10)
    assert [rate.admit("ada", now) for _ in range(21)] == [*(20 * [0]), 100]


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


def test_full_buckets_are_dropped_from_the_table() -> None:
    rate = EventRate(RATE)
    for key in ("ada", "bob", "ada"):
        rate.admit(key, 100.0)
    rate.drop_full(100.0 + 1 / RATE)
    assert ("bob" in rate, "ada" in rate) == (False, True)
    rate.drop_full(100.0 + 2 / RATE)
    assert len(rate) == 0
