"""The meter of the loop's pauses, with timers and time turned by hand."""

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
    IDLE_PERIOD,
    PERIOD,
    TOLD_FOR,
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
    """What a thread has waited for, as a test says it."""

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


def test_each_pause_is_counted_in_its_class(meter: LoopLag) -> None:
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


def test_a_timer_that_comes_early_is_no_pause(meter: LoopLag) -> None:
    meter.record(-0.001)
    assert meter.total == 0
    assert meter.longest == 0.0
    assert meter.counts[0] == 1


def test_a_loop_that_is_held_up_shows_as_a_pause(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic
) -> None:
    meter.start()
    timers.advance(PERIOD)
    assert meter.longest == pytest.approx(0.0)
    timers.clock += PERIOD + 0.1  # nothing ran for so long
    timers.run()
    assert meter.longest == pytest.approx(0.1)


def test_the_timer_is_frequent_under_traffic_and_rare_without(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic
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


def test_taking_the_longest_begins_anew_and_keeps_the_counts(meter: LoopLag) -> None:
    meter.record(0.3)
    assert meter.take_longest() == 0.3
    assert meter.take_longest() == 0.0
    assert sum(meter.counts) == 1
    assert meter.take_longest_own() == 0.3
    assert meter.take_longest_own() == 0.0


def test_stopped_it_leaves_no_timer_and_no_file(meter: LoopLag, timers: FakeTimers, usage: FakeUsage) -> None:
    meter.stop()
    meter.start()
    meter.stop()
    meter.stop()
    assert timers.armed == []
    assert usage.closed


# --- whose doing a pause is ---------------------------------------------------------------------------------


def test_what_other_programs_took_is_taken_off(meter: LoopLag, timers: FakeTimers, usage: FakeUsage) -> None:
    usage.now = Usage(7.0, 3.0)  # from before
    meter.start()
    meter.take_longest_own()
    usage.now = Usage(7.08, 3.0)
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest == pytest.approx(0.1)
    assert meter.longest_own == pytest.approx(0.02)


def test_before_anybody_looks_and_long_after_nothing_is_taken_off(
    meter: LoopLag, timers: FakeTimers, traffic: Traffic, usage: FakeUsage
) -> None:
    def pause() -> float:
        traffic.count += 1
        timers.advance(IDLE_PERIOD)  # from here on it looks often
        usage.now = usage.now._replace(waited=usage.now.waited + 0.08)
        timers.clock = timers.armed[0] + 0.1
        timers.run()
        return meter.take_longest_own()

    meter.start()
    assert pause() == pytest.approx(0.1)
    assert pause() == pytest.approx(0.02)
    timers.advance(TOLD_FOR + IDLE_PERIOD)
    assert meter.take_longest_own() == pytest.approx(0.0)
    timers.advance(TOLD_FOR - 1)
    assert pause() == pytest.approx(0.02)
    timers.advance(2 * TOLD_FOR)
    assert pause() == pytest.approx(0.1)


def test_what_our_other_threads_may_have_taken_is_not(
    meter: LoopLag, timers: FakeTimers, usage: FakeUsage
) -> None:
    meter.start()
    meter.take_longest_own()
    usage.now = Usage(0.08, 0.05)
    timers.clock += PERIOD + 0.1
    timers.run()
    assert meter.longest_own == pytest.approx(0.07)


def test_the_longest_of_our_own_may_be_another_one_than_the_longest(meter: LoopLag) -> None:
    meter.record(0.1, 0.09)
    meter.record(0.05)
    assert (meter.longest, meter.longest_own) == (0.1, 0.05)


def test_more_wait_than_pause_is_no_negative_pause(meter: LoopLag) -> None:
    meter.record(0.01, 0.02)  # it had waited before the timer was due, too
    assert meter.longest_own == 0.0


def test_other_threads_that_worked_more_than_this_one_waited_take_nothing_off() -> None:
    assert taken_by_others(Usage(1.0, 1.0), Usage(1.1, 5.0)) == 0.0


def test_the_system_is_asked_for_the_thread_that_asks(tmp_path: Path) -> None:
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
def test_the_real_file_has_what_is_read_from_it() -> None:
    usage = ThreadUsage()
    first, second = usage.read(), usage.read()
    usage.close()
    assert 0 <= first.waited <= second.waited


def test_a_system_that_does_not_tell_takes_nothing_off(tmp_path: Path) -> None:
    usage = ThreadUsage(str(tmp_path / "missing"))
    assert taken_by_others(usage.read(), usage.read()) == 0.0
    usage.close()
