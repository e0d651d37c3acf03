"""Test the monotonic clock."""

from __future__ import annotations

from tests.helpers import NOW, WALL, FakeClock
from zcproto.common.clock import MonotonicClock


def test_wall_time_follows_monotonic_time_when_the_clock_is_set() -> None:
    clock = FakeClock()
    steady = MonotonicClock(clock)
    assert (steady.wall(), steady.now()) == (WALL, NOW)
    clock.wall_ms -= 10**9
    clock.now_s += 1.5
    assert (steady.wall(), steady.now()) == (WALL + 1_500, NOW + 1.5)
