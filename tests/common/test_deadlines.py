"""The wheel of deadlines, with timers turned by hand."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import NOW, FakeTimers
from zcproto.common.deadlines import ENTRIES_PER_TURN, TICKS_PER_SECOND, DeadlineWheel, next_multiple


@pytest.mark.parametrize(
    ("interval", "now", "due"),
    [
        (0.5, 100.0, 100.5),
        (0.5, 100.3, 100.5),
        (0.5, 100.499, 101.0),
        (0.25, 100.1, 100.25),
        (2.0, 7.9, 10.0),
    ],
)
def test_regular_work_is_due_at_multiples_of_its_interval(interval: float, now: float, due: float) -> None:
    assert next_multiple(interval, now) == due


class Entry:
    """Notes when its deadline came, and then does what the test wants."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.deadline_tick = 0
        self.fired: list[float] = []
        self.then = then

    def handle_deadline(self, now: float) -> None:
        self.fired.append(now)
        self.then()


@pytest.fixture
def wheel(timers: FakeTimers) -> DeadlineWheel:
    return DeadlineWheel(timers)


@pytest.mark.parametrize(
    ("ahead", "slack"),
    [
        (0.0, 1 / 64),
        (0.001, 1 / 64),
        (0.99, 1 / 64),
        (1.0, 1 / 8),
        (9.99, 1 / 8),
        (10.0, 1.0),
        (300.3, 1.0),
        (86_400.5, 1.0),
    ],
)
def test_deadline_fires_on_time_or_slightly_late(
    wheel: DeadlineWheel, timers: FakeTimers, ahead: float, slack: float
) -> None:
    entry = Entry()
    deadline = NOW + 0.003 + ahead
    wheel.set(entry, deadline)
    timers.advance(0.002 + ahead)
    assert entry.fired == []
    timers.advance(0.001 + slack)
    (at,) = entry.fired
    assert deadline <= at <= deadline + slack
    assert entry.deadline_tick == 0


@settings(max_examples=60)
@given(now=st.floats(0, 1e9), ahead=st.floats(-10, 1e6))
def test_no_deadline_fires_early_or_more_than_a_second_late(now: float, ahead: float) -> None:
    timers = FakeTimers(now)
    wheel = DeadlineWheel(timers)
    entry = Entry()
    wheel.set(entry, now + ahead)
    (armed,) = timers.armed
    assert armed >= now + ahead
    assert armed <= max(now + ahead, 0) + 1 + 1 / 64


def test_past_deadline_fires_in_the_next_turn(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    wheel.set(entry, NOW - 5)
    assert entry.fired == []
    timers.run()
    assert entry.fired == [NOW]


@pytest.mark.parametrize("deadline", [-3.0, 0.0, 1e-9])
def test_clock_may_start_at_zero(deadline: float) -> None:
    timers = FakeTimers(0.0)
    wheel = DeadlineWheel(timers)
    entry = Entry()
    wheel.set(entry, deadline)
    assert entry.deadline_tick != 0
    wheel.discard(entry)
    assert len(wheel) == 0
    wheel.set(entry, deadline)
    timers.advance(1 / 64)
    assert len(entry.fired) == 1


def test_later_set_replaces_an_earlier_one(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    wheel.set(entry, NOW + 1)
    wheel.set(entry, NOW + 3)
    timers.advance(2)
    assert entry.fired == []
    wheel.set(entry, NOW + 2.5)
    timers.advance(0.5)
    assert entry.fired == [NOW + 2.5]
    timers.advance(10)
    assert len(entry.fired) == 1


def test_setting_the_same_deadline_again_arms_no_timer(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    wheel.set(entry, NOW + 1)
    armed = timers.armed
    wheel.set(entry, NOW + 1)
    assert timers.armed == armed
    assert len(wheel) == 1


def test_infinite_deadline_removes_the_entry(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    wheel.set(entry, math.inf)
    assert timers.armed == []
    wheel.set(entry, NOW + 1)
    wheel.set(entry, math.inf)
    timers.advance(5)
    assert entry.fired == []
    assert len(wheel) == 0


def test_discarding_an_unknown_entry_does_nothing(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    wheel.discard(entry)
    wheel.set(entry, NOW + 1)
    wheel.discard(entry)
    wheel.discard(entry)
    timers.advance(5)
    assert entry.fired == []


def test_discarded_entry_is_not_kept_alive(wheel: DeadlineWheel) -> None:
    entry = Entry()
    gone = weakref.ref(entry)
    wheel.set(entry, NOW + 100)
    wheel.discard(entry)
    gc.disable()
    try:
        del entry
        assert gone() is None
    finally:
        gc.enable()


def test_only_the_earliest_bucket_has_a_timer(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entries = [Entry() for _ in range(5)]
    for seconds, entry in zip((50, 40, 60, 30, 70), entries, strict=True):
        wheel.set(entry, NOW + seconds)
    assert timers.armed == [NOW + 30]
    timers.advance(30)
    assert timers.armed == [NOW + 40]
    wheel.discard(entries[1])
    timers.advance(10)
    assert timers.armed == [NOW + 50]


def test_entries_of_one_tick_share_a_timer(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entries = [Entry() for _ in range(5)]
    for entry in entries:
        wheel.set(entry, NOW + 300)
    assert len(wheel) == 5
    assert len(timers.armed) == 1
    timers.advance(300)
    assert [entry.fired for entry in entries] == [[NOW + 300]] * 5


def test_moving_a_deadline_repeatedly_leaves_no_entry_behind(
    wheel: DeadlineWheel, timers: FakeTimers
) -> None:
    entry = Entry()
    for _ in range(1_000):
        wheel.set(entry, NOW + 300)
        wheel.set(entry, NOW + 30)
    assert len(wheel._heap) == len(wheel._buckets) == 2
    assert len(timers.armed) == 1


def test_number_of_buckets_is_bounded(wheel: DeadlineWheel) -> None:
    entry = Entry()
    for step in range(20_000):
        wheel.set(entry, NOW + step % 9_973 / 997)
    assert len(wheel._heap) <= 2 * TICKS_PER_SECOND + 9 * 8 + 2


def test_thousands_due_at_once_do_not_block_the_loop(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entries = [Entry() for _ in range(10 * ENTRIES_PER_TURN)]
    for entry in entries:
        wheel.set(entry, NOW + 20)
    timers.clock = NOW + 20
    fired: list[int] = []
    while sum(fired) < len(entries):
        timers.turn()
        fired.append(sum(len(entry.fired) for entry in entries) - sum(fired))
    assert fired == [ENTRIES_PER_TURN] * 10


@pytest.mark.parametrize("count", [ENTRIES_PER_TURN, ENTRIES_PER_TURN + 1, 3 * ENTRIES_PER_TURN])
def test_handlers_that_set_new_deadlines_leave_one_timer(
    wheel: DeadlineWheel, timers: FakeTimers, count: int
) -> None:
    """A timer left over would take the next deadline for due."""
    entries = [Entry() for _ in range(count)]
    for entry in entries:
        entry.then = lambda entry=entry: wheel.set(entry, NOW + 320)  # type: ignore[misc]
        wheel.set(entry, NOW + 20)
    other = Entry()
    wheel.set(other, NOW + 300)
    timers.advance(20)
    timers.advance(200)
    assert all(entry.fired == [NOW + 20] for entry in entries)
    assert other.fired == []
    assert timers.armed == [NOW + 300]


def test_timer_that_fires_slightly_early_is_accepted(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    """asyncio calls a timer up to its clock's resolution before its time."""
    entry = Entry()
    wheel.set(entry, NOW + 20)
    timers.early = 0.001
    timers.advance(19.999)
    assert entry.fired == [NOW + 20]


def test_handler_may_set_its_own_deadline_again(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entry = Entry()
    entry.then = lambda: wheel.set(entry, timers.time() + 5)
    wheel.set(entry, NOW + 5)
    timers.advance(21)
    assert entry.fired == [NOW + 5, NOW + 10, NOW + 15, NOW + 20]


def test_handler_may_discard_an_entry_due_with_it(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entries = [Entry(), Entry()]
    for entry, other in (entries, entries[::-1]):
        entry.then = lambda other=other: wheel.discard(other)  # type: ignore[misc]
        wheel.set(entry, NOW + 5)
    timers.advance(10)
    assert sorted(len(entry.fired) for entry in entries) == [0, 1]


def test_handler_that_raises_does_not_stop_other_deadlines(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    def fail() -> None:
        raise RuntimeError("a fault of ours")

    first, second = Entry(fail), Entry()
    wheel.set(first, NOW + 5)
    wheel.set(second, NOW + 6)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        timers.advance(5)
    timers.advance(1)
    assert second.fired == [NOW + 6]
    wheel.set(first, NOW + 7)
    with pytest.raises(RuntimeError):
        timers.advance(1)


def test_the_end_of_one_deadline_arms_the_next(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    entries = [Entry() for _ in range(50)]
    for number, entry in enumerate(entries):
        wheel.set(entry, NOW + number)
    timers.advance(100)
    assert all(len(entry.fired) == 1 for entry in entries)
    assert timers.armed == []
    assert len(wheel) == 0


def test_closed_wheel_is_empty_and_reusable(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    wheel.close()
    entries = [Entry(), Entry()]
    for entry in entries:
        wheel.set(entry, NOW + 5)
    wheel.close()
    assert timers.armed == []
    assert [entry.deadline_tick for entry in entries] == [0, 0]
    timers.advance(10)
    wheel.set(entries[0], NOW + 15)
    timers.advance(5)
    assert [len(entry.fired) for entry in entries] == [1, 0]


def test_now_is_the_time_of_the_timers(wheel: DeadlineWheel, timers: FakeTimers) -> None:
    timers.advance(3)
    assert wheel.now() == NOW + 3


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 7),
            st.one_of(st.none(), st.floats(-1, 400)),
            st.floats(0, 50),
        ),
        max_size=40,
    )
)
def test_any_sequence_fires_each_deadline_once_and_on_time(
    steps: list[tuple[int, float | None, float]],
) -> None:
    timers = FakeTimers()
    wheel = DeadlineWheel(timers)
    due: dict[int, float] = {}
    entries = [Entry() for _ in range(8)]

    def fired(number: int) -> Callable[[], None]:
        def check() -> None:
            deadline = due.pop(number)
            assert deadline <= entries[number].fired[-1] <= max(deadline, timers.time()) + 1

        return check

    for number, entry in enumerate(entries):
        entry.then = fired(number)
    for number, ahead, pause in steps:
        if ahead is None:
            due.pop(number, None)
            wheel.discard(entries[number])
        else:
            due[number] = timers.time() + ahead
            wheel.set(entries[number], due[number])
        timers.advance(pause)
        assert len(wheel) == len(due)
        assert all(deadline > timers.time() - 1 - 1 / 64 for deadline in due.values())
        assert len(timers.armed) <= 1
    timers.advance(500)
    assert due == {}
