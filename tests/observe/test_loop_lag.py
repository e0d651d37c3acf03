"""Test the measurement of loop lag with fake timers and a manual clock."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeTimers
from zcproto.common.deadlines import next_multiple
from zcproto.observe.loop_lag import (
    BOUNDS_MS,
    DETAIL_TIME,
    HEAVY,
    IDLE_PERIOD,
    LIGHT_PERIOD,
    PERIOD,
    WAITING_PERIOD,
    LoopLag,
    WaitingTime,
)


def advance_to_next(timers: FakeTimers) -> None:
    """Let the time pass until the timer of an idle loop."""
    timers.advance(timers.armed[0] - timers.clock)


class Traffic:
    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


class FakeWaitingTime:
    """A time set by the test."""

    def __init__(self) -> None:
        self.now = 0.0
        self.closed = False

    def read(self) -> float:
        return self.now

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def waiting() -> FakeWaitingTime:
    return FakeWaitingTime()


@pytest.fixture
def meter(
    timers: FakeTimers, traffic: Traffic, waiting: FakeWaitingTime, monkeypatch: pytest.MonkeyPatch
) -> LoopLag:
    monkeypatch.setattr(time, "perf_counter", timers.time)
    loop: Any = timers
    read: Any = waiting
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
    timers.clock += LIGHT_PERIOD + 0.1  # blocks the loop
    timers.run()
    assert meter.longest == pytest.approx(0.1)


def test_timer_is_frequent_under_heavy_traffic_and_rare_without_traffic(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    for _ in range(5):
        traffic.count += round(HEAVY * PERIOD * 1.01) + 1
        timers.advance(PERIOD)
        assert timers.armed == [pytest.approx(timers.clock + PERIOD)]
    timers.advance(PERIOD)
    assert timers.armed == [pytest.approx(next_multiple(IDLE_PERIOD, timers.clock))]
    advance_to_next(timers)
    assert timers.armed == [pytest.approx(next_multiple(IDLE_PERIOD, timers.clock))]
    traffic.count += round(HEAVY * IDLE_PERIOD * 1.01)
    advance_to_next(timers)
    assert timers.armed == [pytest.approx(timers.clock + PERIOD)]


def test_timer_is_less_frequent_under_light_traffic_unless_the_loop_lags(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    timers.advance(PERIOD)  # the first reading always counts as traffic
    assert timers.armed == [pytest.approx(timers.clock + LIGHT_PERIOD)]
    traffic.count += round(HEAVY * LIGHT_PERIOD * 0.9)
    timers.advance(LIGHT_PERIOD)
    meter.traffic_begins()  # a timed request
    assert timers.armed == [pytest.approx(timers.clock + LIGHT_PERIOD)]
    traffic.count += 1
    timers.clock += LIGHT_PERIOD + PERIOD + 0.001
    timers.run()
    assert timers.armed == [pytest.approx(timers.clock + PERIOD)]
    traffic.count += 1
    timers.advance(PERIOD)
    assert timers.armed == [pytest.approx(timers.clock + LIGHT_PERIOD)]
    timers.advance(LIGHT_PERIOD)
    assert timers.armed == [pytest.approx(next_multiple(IDLE_PERIOD, timers.clock))]


def test_timer_is_less_rare_while_requests_wait(
    timers: FakeTimers, waiting: FakeWaitingTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", timers.time)
    loop: Any = timers
    read: Any = waiting
    waits: list[int] = [1]
    meter = LoopLag(loop, lambda: 0, lambda: read, is_waiting=lambda: waits)
    meter.start()
    timers.advance(PERIOD)
    timers.advance(LIGHT_PERIOD)
    assert timers.armed == [pytest.approx(timers.clock + WAITING_PERIOD)]
    waits.clear()
    timers.advance(WAITING_PERIOD)
    assert timers.armed == [pytest.approx(next_multiple(IDLE_PERIOD, timers.clock))]


class FakeHolds:
    """Records what the meter asks for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def start(self) -> None:
        self.seen.append("start")

    def stop(self) -> None:
        self.seen.append("stop")

    def wake(self) -> None:
        self.seen.append("wake")

    def sleep(self) -> None:
        self.seen.append("sleep")

    def timer_ran(self, late: float) -> None:
        self.seen.append(round(late, 3))


def test_holds_are_watched_from_the_first_request_after_a_silence(meter: LoopLag, timers: FakeTimers) -> None:
    holds = FakeHolds()
    meter.holds = holds  # type: ignore[assignment]
    meter.start()
    timers.advance(PERIOD)
    timers.advance(LIGHT_PERIOD)
    assert holds.seen == ["start", 0.0, 0.0, "sleep"]
    due = next_multiple(IDLE_PERIOD, timers.clock)
    timers.clock += 0.1
    assert meter.overdue() == pytest.approx(timers.clock - due)
    meter.traffic_begins()
    meter.traffic_begins()
    assert timers.armed == [pytest.approx(timers.clock + PERIOD)]
    timers.clock += PERIOD + 0.3
    assert meter.overdue() == pytest.approx(0.3)
    timers.run()
    assert holds.seen[4:] == ["wake", 0.3, "sleep"]
    meter.stop()
    meter.traffic_begins()
    assert holds.seen[7:] == ["stop"]
    assert timers.armed == []


def test_take_longest_resets_it_and_keeps_counts(meter: LoopLag) -> None:
    meter.record(0.3)
    assert meter.take_longest() == 0.3
    assert meter.take_longest() == 0.0
    assert sum(meter.lags.counts) == 1
    assert meter.take_longest_own() == 0.3
    assert meter.take_longest_own() == 0.0


def test_stop_leaves_no_timer_and_no_file(
    meter: LoopLag, timers: FakeTimers, waiting: FakeWaitingTime
) -> None:
    meter.stop()
    meter.start()
    meter.stop()
    meter.stop()
    assert timers.armed == []
    assert waiting.closed


# --- time of other programs ---------------------------------------------------------------------------------


def test_time_of_other_programs_is_subtracted(
    meter: LoopLag, timers: FakeTimers, waiting: FakeWaitingTime
) -> None:
    waiting.now = 4.0  # before the measurement
    meter.start()
    meter.take_longest_own()
    waiting.now = 4.08
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest == pytest.approx(0.1)
    assert meter.longest_own == pytest.approx(0.02)


def test_nothing_is_subtracted_before_and_long_after_reading(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic, waiting: FakeWaitingTime
) -> None:
    def pause() -> float:
        traffic.count += 1
        advance_to_next(timers)  # from here on it is read
        waiting.now += 0.08
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


def test_time_of_own_threads_is_not_subtracted(
    meter: LoopLag, timers: FakeTimers, waiting: FakeWaitingTime
) -> None:
    meter.start()
    meter.take_longest_own()
    waiting.now = -5.0  # other threads worked for longer than this one waited
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest_own == pytest.approx(0.1)


def test_longest_own_lag_may_differ_from_longest(meter: LoopLag) -> None:
    meter.record(0.1, 0.09)
    meter.record(0.05)
    assert (meter.longest, meter.longest_own) == (0.1, 0.05)


def test_waiting_beyond_the_lag_is_not_negative(meter: LoopLag) -> None:
    meter.record(0.01, 0.02)  # it had also waited before the timer was due
    assert meter.longest_own == 0.0


def test_waiting_time_excludes_own_threads(tmp_path: Path) -> None:
    file = tmp_path / "schedstat"
    file.write_text("5000000000 2500000000 17\n")
    waiting = WaitingTime(str(file))
    try:
        before = waiting.read()
        assert before == pytest.approx(2.5 - (time.process_time() - time.thread_time()), abs=0.1)
        busy = threading.Thread(target=lambda: sum(range(300_000)))
        busy.start()
        busy.join()
        assert 0 < before - waiting.read() < time.process_time()
    finally:
        waiting.close()
    waiting.close()


@pytest.mark.skipif(
    not os.path.exists("/proc/thread-self/schedstat"), reason="this system does not report it"
)
def test_schedstat_has_the_expected_fields() -> None:
    waiting = WaitingTime()
    first = waiting.read()
    waiting.close()
    assert first > -time.process_time()


def test_missing_schedstat_means_no_waiting(tmp_path: Path) -> None:
    waiting = WaitingTime(str(tmp_path / "missing"))
    assert waiting.read() == 0.0
    waiting.close()
