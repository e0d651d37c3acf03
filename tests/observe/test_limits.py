from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zcproto.observe.events import EVENTS, LogEvent
from zcproto.observe.limits import EventLimits, RateLimiter


def test_event_is_admitted_up_to_its_rate() -> None:
    rate = RateLimiter(2)
    assert [rate.admit("a.b", "peer", now) for now in (0.0, 1.0, 2.0, 59.9)] == [0, 0, None, None]


def test_next_line_reports_suppressed_count() -> None:
    rate = RateLimiter(1)
    assert [rate.admit("a.b", "peer", now) for now in (0.0, 1.0, 2.0, 60.0, 61.0, 120.0)] == [
        0,
        None,
        None,
        2,
        None,
        1,
    ]


def test_events_and_keys_are_counted_separately() -> None:
    rate = RateLimiter(1)
    assert [rate.admit(*pair, 0.0) for pair in (("a.b", 1), ("a.b", 2), ("a.c", 1), ("a.b", 1))] == [
        0,
        0,
        0,
        None,
    ]


def test_keys_above_the_bound_share_an_entry() -> None:
    rate = RateLimiter(2, max_keys=10)
    admitted = [number for number in range(1000) if rate.admit("a.b", number, 0.0) is not None]
    assert admitted == [*range(10), 10, 11]
    assert len(rate) == 10


def test_keys_quiet_for_a_minute_are_evicted() -> None:
    rate = RateLimiter(1, max_keys=2)
    for now in (0.0, 1.0):
        rate.admit("a.b", "old", now)
    rate.admit("a.b", "young", 30.0)
    assert rate.admit("a.b", "new", 60.0) == 0
    assert len(rate) == 2
    # Suppressions of the evicted key are reported by the first shared line.
    assert rate.admit("a.b", "newer", 60.0) == 1


def test_active_key_is_not_evicted() -> None:
    rate = RateLimiter(1, max_keys=2)
    for key, now in (("busy", 0.0), ("quiet", 1.0), ("busy", 60.0), ("new", 61.0)):
        assert rate.admit("a.b", key, now) == 0
    assert rate.admit("a.b", "busy", 62.0) is None


def test_unreported_suppressions_expire_after_a_minute() -> None:
    rate = RateLimiter(1, max_keys=2)
    for key in ("a", "a", "b", "c", "c", "c"):
        rate.admit("x.y", key, 0.0)
    assert rate.expired(59.0) == []
    assert rate.expired(60.0) == [("x.y", 1), ("x.y", 2)]
    assert rate.expired(60.0) == []
    assert len(rate) == 0


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 40)), max_size=60))
def test_every_event_is_admitted_or_counted_once(steps: list[tuple[str, float]]) -> None:
    rate = RateLimiter(1, max_keys=3)
    now = 0.0
    outcome: Counter[str] = Counter()
    for key, pause in steps:
        now += pause
        suppressed = rate.admit("x.y", key, now)
        outcome["counted"] += 0 if suppressed is None else 1 + suppressed
        assert len(rate) <= 3
    outcome["counted"] += sum(count for _, count in rate.expired(now + 61))
    assert outcome["counted"] == len(steps)


def lines_of(event: LogEvent, peers: int, processes: int) -> int:
    """Return how many lines one of some processes writes for so many peers."""
    limits = EventLimits(processes)
    found = (limits.admit(event, {"peer": f"192.0.2.{number}"}, {}, 100.0) for number in range(peers))
    return sum(each is not None for each in found)


def test_processes_of_one_log_share_the_lines_of_all_keys() -> None:
    event = EVENTS["connection.refused_per_address"]
    assert event.limit is not None
    assert event.limit.total is not None
    assert lines_of(event, 1_000, 1) == event.limit.total
    assert lines_of(event, 1_000, 4) == event.limit.total // 4
    assert lines_of(event, 1, 4) == 1
