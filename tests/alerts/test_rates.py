"""Test rates of events with hysteresis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.alerts.center import SLOTS, RateRule, RateWatch

RULE = RateRule(threshold=10, window_s=300.0, quiet_s=900.0)


def changes(watch: RateWatch, reads: list[tuple[int, float]]) -> str:
    """Return for each reading (total, time): "+" or "-" if the alert is on or off after a change, else "."."""
    return "".join(("+" if watch.is_on else "-") if watch.read(*each) else "." for each in reads)


def test_rate_begins_at_threshold() -> None:
    watch = RateWatch(RULE)
    assert changes(watch, [(9, 0.0), (9, 10.0), (10, 20.0)]) == "..+"
    assert (watch.events, watch.in_window) == (1, 10)


def test_slow_events_do_not_begin() -> None:
    watch = RateWatch(RULE)
    assert changes(watch, [(number, number * 34.0) for number in range(1, 1_000)]) == "." * 999


def test_rate_ends_after_quiet_time() -> None:
    watch = RateWatch(RULE)
    watch.read(10, 0.0)
    # The window is empty from 306 s on.
    assert changes(watch, [(10, 299.0), (10, 306.0), (10, 306.0 + 899.0)]) == "..."
    assert changes(watch, [(10, 306.0 + 900.0), (10, 5_000.0)]) == "-."
    assert (watch.events, watch.in_window) == (0, 0)


def test_rate_around_threshold_does_not_flap() -> None:
    watch, total, seen = RateWatch(RULE), 0, ""
    for number in range(200):
        total += 9 if number % 2 else 11
        seen += changes(watch, [(total, number * 300.0)])
    assert seen.strip(".") == "+" * 200


def test_half_of_threshold_counts_as_quiet() -> None:
    watch = RateWatch(RULE)
    watch.read(10, 0.0)
    assert changes(watch, [(10 + 5 * number, 310.0 * number) for number in range(1, 6)]) == "+++-."


def test_threshold_of_one_begins_at_first_event() -> None:
    watch = RateWatch(RateRule(1, 60.0, 300.0))
    reads = [(0, 0.0), (1, 1.0), (1, 2.0), (2, 3.0), (2, 70.0), (2, 371.0)]
    assert changes(watch, reads) == ".+.+.-"


def test_reset_counter_is_handled() -> None:
    watch = RateWatch(RULE)
    watch.read(9, 0.0)
    assert watch.read(1, 1.0)
    assert (watch.is_on, watch.events, watch.in_window) == (True, 1, 10)


def test_threshold_of_zero_asserts() -> None:
    with pytest.raises(AssertionError):
        RateWatch(RateRule(0, 1.0, 1.0))


@given(
    steps=st.lists(st.tuples(st.integers(0, 30), st.floats(0.0, 400.0)), max_size=60),
    threshold=st.integers(1, 40),
)
def test_window_matches_list_of_events(steps: list[tuple[int, float]], threshold: int) -> None:
    """Compare with a list of (time, events), up to the granularity of the window."""
    rule = RateRule(threshold, 300.0, 900.0)
    watch, now, total, events, was_on = RateWatch(rule), 0.0, 0, [], False
    for count, pause in steps:
        now += pause
        total += count
        events.append((now, count))
        is_changed = watch.read(total, now)
        part = rule.window_s / SLOTS
        surely = sum(each for then, each in events if now - then < rule.window_s - part)
        at_most = sum(each for then, each in events if now - then <= rule.window_s)
        if surely >= threshold:
            assert watch.is_on
        if watch.is_on and not was_on:
            assert is_changed
            assert at_most >= threshold
            assert surely <= watch.in_window <= at_most
        if was_on and not watch.is_on:
            assert is_changed
            assert surely <= threshold // 2
        was_on = watch.is_on
