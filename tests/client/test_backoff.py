"""Delays before trying again."""

from __future__ import annotations

import random

import pytest

from zcproto.client.retry import FIRST_DELAY, MAX_DELAY, Backoff


def test_the_ceiling_doubles_from_100_ms_to_30_s_and_stays() -> None:
    backoff = Backoff(lambda: 1.0)
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert [backoff.next() for _ in expected] == pytest.approx(expected)


def test_the_jitter_is_full_and_even() -> None:
    chance = random.Random(7)
    delays = []
    for _ in range(10_000):
        backoff = Backoff(chance.random)
        delays.append(backoff.next())
    assert min(delays) < FIRST_DELAY * 0.01
    assert max(delays) > FIRST_DELAY * 0.99
    assert sum(delays) / len(delays) == pytest.approx(FIRST_DELAY / 2, rel=0.05)


def test_a_reset_begins_anew() -> None:
    backoff = Backoff(lambda: 1.0)
    for _ in range(20):
        backoff.next()
    assert backoff.next() == MAX_DELAY
    backoff.reset()
    assert backoff.next() == FIRST_DELAY


def test_what_the_server_asks_for_is_waited_in_full_before_the_jitter() -> None:
    assert Backoff(lambda: 0.0).next(1_500) == 1.5
    assert Backoff(lambda: 0.5).next(1_500) == pytest.approx(1.55)
