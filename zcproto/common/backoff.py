"""Exponential backoff: how long to wait after a number of failures in a row.

Jitter spreads those that have failed at the same time, such as the clients of a restarted server. It must not know:
what has failed, the time, where random numbers come from.
"""

from __future__ import annotations

from typing import Final

FULL: Final = 1.0
"""The jitter of delays that are random from 0 on."""

HALF: Final = 0.5

_MAX_DOUBLINGS: Final = 64


def backoff_s(
    failures: int, first_s: float, longest_s: float, jitter: float = 0.0, fraction: float = 1.0
) -> float:
    """Return the delay in seconds after so many failures in a row, at least 1.

    It is `first_s` after the first failure and doubles with each further one, up to `longest_s`. The part `jitter`
    of it is multiplied by `fraction`, a random number from 0 to 1.
    """
    ceiling = min(first_s * 2.0 ** min(failures - 1, _MAX_DOUBLINGS), longest_s)
    return ceiling * (1 - jitter + jitter * fraction)
