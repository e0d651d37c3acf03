"""The delay until a process is started again."""

from __future__ import annotations

from zcproto.workers.supervisor import FREE, LONGEST_DELAY, LONGEST_READY_DELAY, SOON, RestartPacer


def test_process_that_served_is_started_again_at_once() -> None:
    pacer = RestartPacer()
    assert [pacer.ended(SOON) for _ in range(100)] == [0.0] * 100


def test_delay_grows_with_failed_starts_up_to_a_limit() -> None:
    pacer = RestartPacer()
    delays = [pacer.ended(None) for _ in range(FREE + 8)]
    assert delays == [0, 0, 0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_DELAY, LONGEST_DELAY]
    assert [pacer.ended(None) for _ in range(2_000)][-1] == LONGEST_DELAY


def test_process_that_was_ready_is_missing_for_a_short_time() -> None:
    pacer = RestartPacer()
    delays = [pacer.ended(0.1) for _ in range(FREE + 5)]
    assert delays == [0, 0, 0, 0.25, *[LONGEST_READY_DELAY] * 4]


def test_delay_is_reset_by_a_successful_start() -> None:
    pacer = RestartPacer()
    for _ in range(10):
        pacer.ended(0.0)
    assert pacer.ended(60.0) == 0.0
    assert pacer.ended(None) == 0.0
