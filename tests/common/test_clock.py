"""The clock that does not jump."""

from __future__ import annotations

from tests.helpers import NOW, WALL, FakeClock
from zcproto.common.clock import MonotonicClock


def test_wall_time_goes_on_with_monotonic_time_when_somebody_sets_the_clock() -> None:
    clock = FakeClock()
    steady = MonotonicClock(clock)
    assert (steady.wall(), steady.now()) == (WALL, NOW)
    clock.wall_ms -= 10**9
    clock.now_s += 1.5
    assert (steady.wall(), steady.now()) == (WALL + 1_500, NOW + 1.5)
