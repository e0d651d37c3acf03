"""Schedules, and the pacer that acts on them."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable
from itertools import islice, pairwise

import pytest

from zcproto.load.pacer import (
    ACTS_PER_TURN,
    LoopAlarm,
    Pacer,
    TimerfdAlarm,
    new_alarm,
    poisson_times,
    shuffled_rounds,
    uniform_times,
)


class HandAlarm:
    """An alarm that tests fire."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.at: float | None = None
        self.closed = False

    def set(self, when: float) -> None:
        self.at = when

    def close(self) -> None:
        self.closed = True


class Pacing:
    """A pacer with a fake clock, and its actions."""

    def __init__(self) -> None:
        self.now = 100.0
        self.acted: list[float] = []
        self.alarms: list[HandAlarm] = []
        self.pacer = Pacer(asyncio.get_running_loop(), self._alarm, lambda: self.now)

    def _alarm(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> HandAlarm:
        self.alarms.append(HandAlarm(callback))
        return self.alarms[-1]

    @property
    def alarm(self) -> HandAlarm:
        (alarm,) = self.alarms
        return alarm

    def start(self, *times: float) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.pacer.run(iter(times), self.acted.append))

    async def ring(self, at: float) -> None:
        self.now = at
        self.alarm.callback()
        await asyncio.sleep(0)


async def test_pacer_never_acts_early() -> None:
    pacing = Pacing()
    run = pacing.start(1.0, 2.0)
    await asyncio.sleep(0)
    assert (pacing.acted, pacing.alarm.at) == ([], 101.0)
    await pacing.ring(100.9)  # early, like some timers
    assert (pacing.acted, pacing.alarm.at) == ([], 101.0)
    await pacing.ring(101.0)
    assert (pacing.acted, pacing.alarm.at) == ([101.0], 102.0)
    await pacing.ring(102.0)
    await run
    assert pacing.acted == [101.0, 102.0]
    await pacing.start()  # a schedule of nothing
    await pacing.start(0.0)
    assert pacing.acted == [101.0, 102.0, 102.0]
    pacing.pacer.close()
    assert pacing.alarm.closed


async def test_late_action_gets_its_due_time() -> None:
    pacing = Pacing()
    run = pacing.start(1.0, 1.5, 2.0, 9.0)
    await asyncio.sleep(0)
    await pacing.ring(105.0)
    assert pacing.acted == [101.0, 101.5, 102.0]
    await pacing.ring(109.0)
    await run


async def test_loop_runs_between_many_due_actions() -> None:
    pacing = Pacing()
    run = pacing.start(*[0.0] * (2 * ACTS_PER_TURN))
    await asyncio.sleep(0)
    assert len(pacing.acted) == ACTS_PER_TURN
    await run
    assert len(pacing.acted) == 2 * ACTS_PER_TURN


async def test_stop_skips_remaining_actions() -> None:
    pacing = Pacing()
    run = pacing.start(0.0, 5.0)
    await asyncio.sleep(0)
    pacing.pacer.stop()
    await run
    await pacing.ring(200.0)
    assert pacing.acted == [100.0]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            TimerfdAlarm, marks=pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
        ),
        LoopAlarm,
    ],
)
async def test_alarm_fires_once_at_its_time(make: Callable[..., TimerfdAlarm | LoopAlarm]) -> None:
    loop = asyncio.get_running_loop()
    rang = asyncio.Event()
    times: list[float] = []

    def ring() -> None:
        times.append(time.monotonic())
        rang.set()

    alarm = make(loop, ring)
    due = time.monotonic() + 0.01
    alarm.set(due)
    await rang.wait()
    assert times[0] >= due - 0.001
    rang.clear()
    alarm.set(0.0)  # past: fires at once
    await rang.wait()
    assert len(times) == 2
    alarm.close()
    alarm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
async def test_alarm_set_again_before_its_callback_does_not_fire_early() -> None:
    rings: list[float] = []
    alarm = TimerfdAlarm(asyncio.get_running_loop(), lambda: rings.append(time.monotonic()))
    alarm.set(0.0)
    alarm.set(time.monotonic() + 1000)
    alarm._expired()
    assert rings == []
    alarm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
async def test_exhausted_timerfds_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def timerfd_create(self, clock: int, flags: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    with pytest.raises(OSError):  # noqa: PT011 - the number varies
        TimerfdAlarm(asyncio.get_running_loop(), lambda: None)


async def test_most_precise_alarm_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("sys.platform", "linux")
    exact = new_alarm(loop, lambda: None)
    assert isinstance(exact, TimerfdAlarm)
    exact.close()
    monkeypatch.setattr("sys.platform", "darwin")
    assert isinstance(new_alarm(loop, lambda: None), LoopAlarm)


# --- schedules --------------------------------------------------------------------------------------


def test_uniform_times_are_evenly_spaced() -> None:
    assert [*uniform_times(4.0, 5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("rate", "seconds", "total"), [(1000, 3, 3000), (0.4, 10, 4), (7.3, 2.5, 18), (10, 0.25, 2), (0.1, 1, 0)]
)
def test_poisson_times_have_the_exact_total(rate: float, seconds: float, total: int) -> None:
    times = [*poisson_times(rate, seconds, random.Random(7))]
    assert len(times) == total == round(rate * seconds)
    assert all(earlier <= later for earlier, later in pairwise(times))
    assert all(0 <= time < seconds for time in times)
    whole = [sum(int(time) == second for time in times) for second in range(int(seconds))]
    assert rate % 1 or set(whole) <= {rate}


def test_poisson_times_are_random_and_repeatable() -> None:
    times = [*poisson_times(1000, 1, random.Random(7))]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # Of exponential gaps, 37 % are above their mean and 5 % above three times it.
    assert 0.30 < sum(gap > 0.001 for gap in gaps) / len(gaps) < 0.44
    assert 0.02 < sum(gap > 0.003 for gap in gaps) / len(gaps) < 0.08
    assert times == [*poisson_times(1000, 1, random.Random(7))]
    assert times != [*poisson_times(1000, 1, random.Random(8))]


def test_each_round_has_every_item_once() -> None:
    turns = shuffled_rounds(range(20), random.Random(7))
    first, second = [*islice(turns, 20)], [*islice(turns, 20)]
    assert sorted(first) == sorted(second) == [*range(20)]
    assert first != second
    assert [*shuffled_rounds([], random.Random(7))] == []
