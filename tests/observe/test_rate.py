from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zcproto.observe.rate import RateLimited


def test_an_event_is_admitted_so_many_times_a_minute() -> None:
    rate = RateLimited(2)
    assert [rate.admit("a.b", "peer", now) for now in (0.0, 1.0, 2.0, 59.9)] == [0, 0, None, None]


def test_the_next_line_tells_how_many_were_suppressed() -> None:
    rate = RateLimited(1)
    assert [rate.admit("a.b", "peer", now) for now in (0.0, 1.0, 2.0, 60.0, 61.0, 120.0)] == [
        0,
        None,
        None,
        2,
        None,
        1,
    ]


def test_each_event_and_each_key_is_counted_for_itself() -> None:
    rate = RateLimited(1)
    assert [rate.admit(*pair, 0.0) for pair in (("a.b", 1), ("a.b", 2), ("a.c", 1), ("a.b", 1))] == [
        0,
        0,
        0,
        None,
    ]


def test_many_keys_do_not_grow_the_table_and_share_what_is_left() -> None:
    rate = RateLimited(2, max_keys=10)
    admitted = [number for number in range(1000) if rate.admit("a.b", number, 0.0) is not None]
    assert admitted == [*range(10), 10, 11]
    assert len(rate) == 10


def test_keys_that_were_quiet_for_a_minute_make_room() -> None:
    rate = RateLimited(1, max_keys=2)
    for now in (0.0, 1.0):
        rate.admit("a.b", "old", now)
    rate.admit("a.b", "young", 30.0)
    assert rate.admit("a.b", "new", 60.0) == 0
    assert len(rate) == 2
    # What was suppressed of the one that left is told by the first line that is shared.
    assert rate.admit("a.b", "newer", 60.0) == 1


def test_a_key_that_goes_on_is_not_the_one_to_leave() -> None:
    rate = RateLimited(1, max_keys=2)
    for key, now in (("busy", 0.0), ("quiet", 1.0), ("busy", 60.0), ("new", 61.0)):
        assert rate.admit("a.b", key, now) == 0
    assert rate.admit("a.b", "busy", 62.0) is None


def test_what_no_later_line_tells_is_told_at_the_end_of_the_minute() -> None:
    rate = RateLimited(1, max_keys=2)
    for key in ("a", "a", "b", "c", "c", "c"):
        rate.admit("x.y", key, 0.0)
    assert rate.ended(59.0) == []
    assert rate.ended(60.0) == [("x.y", "a", 1), ("x.y", None, 2)]
    assert rate.ended(60.0) == []
    assert len(rate) == 0


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 40)), max_size=60))
def test_every_event_is_written_or_counted_once(steps: list[tuple[str, float]]) -> None:
    rate = RateLimited(1, max_keys=3)
    now = 0.0
    outcome: Counter[str] = Counter()
    for key, pause in steps:
        now += pause
        suppressed = rate.admit("x.y", key, now)
        outcome["told"] += 0 if suppressed is None else 1 + suppressed
        assert len(rate) <= 3
    outcome["told"] += sum(count for _, _, count in rate.ended(now + 61))
    assert outcome["told"] == len(steps)
