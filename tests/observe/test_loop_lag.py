"""Test the measurement of loop lag with fake timers and a manual clock."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeTimers
from zcproto.observe.loop_lag import (
    BOUNDS_MS,
    DETAIL_TIME,
    IDLE_PERIOD,
    PERIOD,
    LoopLag,
    ThreadUsage,
    Usage,
    taken_by_others,
)


class Traffic:
    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


class FakeUsage:
    """A usage set by the test."""

    def __init__(self) -> None:
        self.now = Usage(0.0, 0.0)
        self.closed = False

    def read(self) -> Usage:
        return self.now

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def usage() -> FakeUsage:
    return FakeUsage()


@pytest.fixture
def meter(timers: FakeTimers, traffic: Traffic, usage: FakeUsage, monkeypatch: pytest.MonkeyPatch) -> LoopLag:
    monkeypatch.setattr(time, "perf_counter", timers.time)
    loop: Any = timers
    read: Any = usage
    return LoopLag(loop, lambda: traffic.count, lambda: read)


def test_each_lag_is_counted_in_its_bucket(meter: LoopLag) -> None:
    for late_ms in (0.0, 1.0, 1.1, 4.0, 5.0, 6.0, 1_000.0, 1_000.1, 60_000.0):
        meter.record(late_ms / 1000)
    assert dict(zip((*BOUNDS_MS, None), meter.lags.counts, strict=True)) == {
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


def test_early_timer_is_not_a_lag(meter: LoopLag) -> None:
    meter.record(-0.001)
    assert meter.lags.total == 0
    assert meter.longest == 0.0
    assert meter.lags.counts[0] == 1


def test_blocked_loop_is_measured_as_lag(meter: LoopLag, timers: FakeTimers, traffic: Traffic) -> None:
    meter.start()
    timers.advance(PERIOD)
    assert meter.longest == pytest.approx(0.0)
    timers.clock += PERIOD + 0.1  # blocks the loop
    timers.run()
    assert meter.longest == pytest.approx(0.1)


def test_timer_is_frequent_under_traffic_and_rare_without(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    timers.advance(PERIOD)  # the first reading always counts as traffic
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


def test_take_longest_resets_it_and_keeps_counts(meter: LoopLag) -> None:
    meter.record(0.3)
    assert meter.take_longest() == 0.3
    assert meter.take_longest() == 0.0
    assert sum(meter.lags.counts) == 1
    assert meter.take_longest_own() == 0.3
    assert meter.take_longest_own() == 0.0


def test_stop_leaves_no_timer_and_no_file(meter: LoopLag, timers: FakeTimers, usage: FakeUsage) -> None:
    meter.stop()
    meter.start()
    meter.stop()
    meter.stop()
    assert timers.armed == []
    assert usage.closed


# --- time of other programs ---------------------------------------------------------------------------------


def test_time_of_other_programs_is_subtracted(meter: LoopLag, timers: FakeTimers, usage: FakeUsage) -> None:
    usage.now = Usage(7.0, 3.0)  # before the measurement
    meter.start()
    meter.take_longest_own()
    usage.now = Usage(7.08, 3.0)
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest == pytest.approx(0.1)
    assert meter.longest_own == pytest.approx(0.02)


def test_nothing_is_subtracted_before_and_long_after_reading(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic, usage: FakeUsage
) -> None:
    def pause() -> float:
        traffic.count += 1
        timers.advance(IDLE_PERIOD)  # from here on usage is read
        usage.now = usage.now._replace(waited=usage.now.waited + 0.08)
        timers.clock = timers.armed[0] + 0.1
        timers.run()
        return meter.take_longest_own()

    meter.start()
    assert pause() == pytest.approx(0.1)
    assert pause() == pytest.approx(0.02)
    timers.advance(DETAIL_TIME + IDLE_PERIOD)
    assert meter.take_longest_own() == pytest.approx(0.0)
    timers.advance(DETAIL_TIME - 1)
    assert pause() == pytest.approx(0.02)
    timers.advance(2 * DETAIL_TIME)
    assert pause() == pytest.approx(0.1)


def test_time_of_own_threads_is_not_subtracted(meter: LoopLag, timers: FakeTimers, usage: FakeUsage) -> None:
    meter.start()
    meter.take_longest_own()
    usage.now = Usage(0.08, 0.05)
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest_own == pytest.approx(0.07)


def test_longest_own_lag_may_differ_from_longest(meter: LoopLag) -> None:
    meter.record(0.1, 0.09)
    meter.record(0.05)
    assert (meter.longest, meter.longest_own) == (0.1, 0.05)


def test_waiting_beyond_the_lag_is_not_negative(meter: LoopLag) -> None:
    meter.record(0.01, 0.02)  # it had also waited before the timer was due
    assert meter.longest_own == 0.0


def test_busy_own_threads_subtract_nothing() -> None:
    assert taken_by_others(Usage(1.0, 1.0), Usage(1.1, 5.0)) == 0.0


def test_usage_is_read_for_the_calling_thread(tmp_path: Path) -> None:
    file = tmp_path / "schedstat"
    file.write_text("5000000000 2500000000 17\n")
    usage = ThreadUsage(str(file))
    try:
        before = usage.read()
        assert before.waited == 2.5
        busy = threading.Thread(target=lambda: sum(range(300_000)))
        busy.start()
        busy.join()
        grown = usage.read().beside - before.beside
        assert 0 < grown < time.process_time()
    finally:
        usage.close()
    usage.close()


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="this system does not tell")
def test_schedstat_has_the_expected_fields() -> None:
    usage = ThreadUsage()
    first, second = usage.read(), usage.read()
    usage.close()
    assert 0 <= first.waited <= second.waited


def test_missing_schedstat_subtracts_nothing(tmp_path: Path) -> None:
    usage = ThreadUsage(str(tmp_path / "missing"))
    assert taken_by_others(usage.read(), usage.read()) == 0.0
    usage.close()
