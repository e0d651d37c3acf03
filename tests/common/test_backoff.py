"""The delays of repeated failures."""

from __future__ import annotations

import pytest

from zcproto.common.backoff import FULL, HALF, backoff_s


def test_delay_doubles_with_each_failure_up_to_the_longest() -> None:
    assert [backoff_s(failures, 0.25, 3) for failures in range(1, 7)] == [0.25, 0.5, 1, 2, 3, 3]
    assert backoff_s(10**9, 0.25, 3) == 3
    assert backoff_s(1, 5, 3) == 3


@pytest.mark.parametrize(
    ("jitter", "fraction", "delay"),
    [(0, 0, 2), (HALF, 0, 1), (HALF, 0.5, 1.5), (HALF, 1, 2), (FULL, 0, 0), (FULL, 0.25, 0.5), (FULL, 1, 2)],
)
def test_jitter_makes_a_part_of_the_delay_random(jitter: float, fraction: float, delay: float) -> None:
    assert backoff_s(2, 1, 9, jitter, fraction) == delay
