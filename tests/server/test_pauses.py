"""The meter of the loop's pauses, with timers and time turned by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import FakeTimers
from zcproto.server import pauses
from zcproto.server.pauses import BOUNDS_MS, IDLE_PERIOD, PERIOD, PauseMeter


class Traffic:
    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def meter(timers: FakeTimers, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> PauseMeter:
    monkeypatch.setattr(pauses.time, "perf_counter", timers.time)
    loop: Any = timers
    return PauseMeter(loop, lambda: traffic.count)


def test_each_pause_is_counted_in_its_class(meter: PauseMeter) -> None:
    for late_ms in (0.0, 1.0, 1.1, 4.0, 5.0, 6.0, 1_000.0, 1_000.1, 60_000.0):
        meter.record(late_ms / 1000)
    assert dict(zip((*BOUNDS_MS, None), meter.counts, strict=True)) == {
        1: 2,
        2: 1,
        5: 2,
        10: 1,
        20: 0,
        50: 0,
        100: 0,
        200: 0,
        500: 0,
        1_000: 1,
        None: 2,
    }
    assert meter.longest == 60.0


def test_a_timer_that_comes_early_is_no_pause(meter: PauseMeter) -> None:
    meter.record(-0.001)
    assert meter.longest == 0.0
    assert meter.counts[0] == 1


def test_a_loop_that_is_held_up_shows_as_a_pause(
    meter: PauseMeter, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    timers.advance(PERIOD)
    assert meter.longest == pytest.approx(0.0)
    timers.clock += PERIOD + 0.1  # nothing ran for so long
    timers.run()
    assert meter.longest == pytest.approx(0.1)


def test_the_timer_is_frequent_under_traffic_and_rare_without(
    meter: PauseMeter, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    timers.advance(PERIOD)  # the first look is always taken for traffic
    for _ in range(5):
        traffic.count += 1
        timers.advance(PERIOD)
        assert timers.armed == [pytest.approx(timers.clock + PERIOD)]
    timers.advance(PERIOD)
    assert timers.armed == [pytest.approx(timers.clock + IDLE_PERIOD)]
    timers.advance(IDLE_PERIOD)
    assert timers.armed == [pytest.approx(timers.clock + IDLE_PERIOD)]
    traffic.count += 1
    timers.advance(IDLE_PERIOD)
    assert timers.armed == [pytest.approx(timers.clock + PERIOD)]


def test_taking_the_longest_begins_anew_and_keeps_the_counts(meter: PauseMeter) -> None:
    meter.record(0.3)
    assert meter.take_longest() == 0.3
    assert meter.take_longest() == 0.0
    assert sum(meter.counts) == 1


def test_stopped_it_leaves_no_timer(meter: PauseMeter, timers: FakeTimers) -> None:
    meter.stop()
    meter.start()
    meter.stop()
    meter.stop()
    assert timers.armed == []
