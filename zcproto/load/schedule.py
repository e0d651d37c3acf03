"""When requests are due, and on which connection.

Arrivals are random and exact at once: of the requests that fall into a second, each is due at a moment of its
own, uniform over that second. Within a second that is a Poisson process, as many independent clients make it;
over seconds the rate is what was asked for, to the request. Nothing waits for an answer: the loop is open.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def steady(rate: float, count: int) -> Iterator[float]:
    """Times in seconds from the start, evenly spaced."""
    for number in range(count):
        yield number / rate


def arrivals(rate: float, duration_s: float, source: random.Random) -> Iterator[float]:
    """Times in seconds from the start, in order: `round(rate * duration_s)` of them."""
    total = round(rate * duration_s)
    done = 0
    start = 0.0
    while start < duration_s:
        length = min(1.0, duration_s - start)
        # By the running total, so that fractions of a request are never lost.
        until = total if start + length >= duration_s else round(rate * (start + length))
        yield from sorted(start + length * source.random() for _ in range(until - done))
        done = until
        start += length


def rounds(items: Sequence[Item], source: random.Random) -> Iterator[Item]:
    """All items in random order, then all again in another, without end."""
    order = list(items)
    while order:
        source.shuffle(order)
        yield from order
