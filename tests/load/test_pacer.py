from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import pytest

from zcproto.load.pacer import ACTS_PER_TURN, LoopAlarm, Pacer, TimerfdAlarm, new_alarm


class HandAlarm:
    """An alarm that rings when the test says so."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.at: float | None = None
        self.closed = False

    def set(self, when: float) -> None:
        self.at = when

    def close(self) -> None:
        self.closed = True


class Pacing:
    """A pacer on a clock that is turned by hand, and what it did."""

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


async def test_nothing_is_done_before_its_time() -> None:
    pacing = Pacing()
    run = pacing.start(1.0, 2.0)
    await asyncio.sleep(0)
    assert (pacing.acted, pacing.alarm.at) == ([], 101.0)
    await pacing.ring(100.9)  # early, as timers may be
    assert (pacing.acted, pacing.alarm.at) == ([], 101.0)
    await pacing.ring(101.0)
    assert (pacing.acted, pacing.alarm.at) == ([101.0], 102.0)
    await pacing.ring(102.0)
    await run
    assert pacing.acted == [101.0, 102.0]


async def test_what_is_late_is_done_with_the_time_that_was_meant() -> None:
    pacing = Pacing()
    run = pacing.start(1.0, 1.5, 2.0, 9.0)
    await asyncio.sleep(0)
    await pacing.ring(105.0)
    assert pacing.acted == [101.0, 101.5, 102.0]
    await pacing.ring(109.0)
    await run


async def test_the_loop_has_its_turn_when_many_are_due() -> None:
    pacing = Pacing()
    run = pacing.start(*[0.0] * (2 * ACTS_PER_TURN))
    await asyncio.sleep(0)
    assert len(pacing.acted) == ACTS_PER_TURN
    await run
    assert len(pacing.acted) == 2 * ACTS_PER_TURN


async def test_a_schedule_of_nothing_is_over_at_once() -> None:
    pacing = Pacing()
    await pacing.start()
    assert pacing.acted == []


async def test_stopping_leaves_out_the_rest() -> None:
    pacing = Pacing()
    run = pacing.start(0.0, 5.0)
    await asyncio.sleep(0)
    pacing.pacer.stop()
    await run
    await pacing.ring(200.0)
    assert pacing.acted == [100.0]


async def test_a_pacer_may_run_again_and_is_closed_with_its_alarm() -> None:
    pacing = Pacing()
    await pacing.start(0.0)
    await pacing.start(0.0, 0.0)
    assert len(pacing.acted) == 3
    pacing.pacer.close()
    assert pacing.alarm.closed


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            TimerfdAlarm, marks=pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
        ),
        LoopAlarm,
    ],
)
async def test_an_alarm_rings_once_at_its_time(make: Callable[..., TimerfdAlarm | LoopAlarm]) -> None:
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
    alarm.set(0.0)  # long past: at once
    await rang.wait()
    assert len(times) == 2
    alarm.close()
    alarm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
async def test_an_alarm_set_anew_before_it_was_heard_does_not_ring_early() -> None:
    rings: list[float] = []
    alarm = TimerfdAlarm(asyncio.get_running_loop(), lambda: rings.append(time.monotonic()))
    alarm.set(0.0)
    alarm.set(time.monotonic() + 1000)
    alarm._rang()
    assert rings == []
    alarm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="timerfd is Linux's")
async def test_a_system_without_timers_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def timerfd_create(self, clock: int, flags: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    with pytest.raises(OSError):  # noqa: PT011  its number is whatever failed last
        TimerfdAlarm(asyncio.get_running_loop(), lambda: None)


async def test_the_alarm_is_the_most_exact_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("sys.platform", "linux")
    exact = new_alarm(loop, lambda: None)
    assert isinstance(exact, TimerfdAlarm)
    exact.close()
    monkeypatch.setattr("sys.platform", "darwin")
    assert isinstance(new_alarm(loop, lambda: None), LoopAlarm)
