from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zcproto.observe.events import EVENTS, LogEvent
from zcproto.observe.limits import EventLimits, LineLimiter


def test_lines_of_a_key_are_admitted_up_to_its_rate() -> None:
    lines = LineLimiter(2, 10)
    assert [lines.admit("peer", now) for now in (0.0, 1.0, 2.0, 29.9, 30.0)] == [0, 0, None, None, 2]


def test_next_line_reports_suppressed_count() -> None:
    lines = LineLimiter(1, 10)
    assert [lines.admit("peer", now) for now in (0.0, 1.0, 2.0, 60.0, 61.0, 120.0)] == [
        0,
        None,
        None,
        2,
        None,
        1,
    ]


def test_keys_are_limited_separately_and_together() -> None:
    lines = LineLimiter(1, 10, total=2)
    assert [lines.admit(key, 0.0) for key in (1, 1, 2, 3)] == [0, None, 0, None]
    assert [lines.admit(key, 30.0) for key in (2, 4, 5)] == [None, 0, None]


def test_keys_above_the_bound_share_an_entry() -> None:
    lines = LineLimiter(2, 10)
    admitted = [number for number in range(1000) if lines.admit(number, 0.0) is not None]
    assert admitted == [*range(10), 10, 11]
    assert len(lines.expired(60.0)) == 10 + 1


def test_unreported_suppressions_expire_after_a_minute() -> None:
    lines = LineLimiter(1, 2)
    for key in ("a", "a", "b", "b", "b"):
        lines.admit(key, 0.0)
    assert lines.expired(59.0) == []
    assert lines.expired(60.0) == [1, 2]
    assert lines.expired(60.0) == []


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 40)), max_size=60))
def test_every_line_is_admitted_or_counted_once(steps: list[tuple[str, float]]) -> None:
    lines = LineLimiter(1, 3)
    now = 0.0
    outcome: Counter[str] = Counter()
    for key, pause in steps:
        now += pause
        suppressed = lines.admit(key, now)
        outcome["counted"] += 0 if suppressed is None else 1 + suppressed
    outcome["counted"] += sum(lines.expired(now + 61))
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
