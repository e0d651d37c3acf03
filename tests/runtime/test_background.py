"""Background work of a server."""

from __future__ import annotations

import pytest

from zcproto.runtime.background import (
    LONGEST_BURST,
    TRIM_AFTER,
    TRIM_FROM,
    TRIM_FROM_BYTES,
    return_memory,
)

MANY = 2 * TRIM_FROM
BURST = TRIM_FROM_BYTES


@pytest.mark.parametrize(
    ("counts", "trims"),
    [
        ([MANY, MANY // 2 + 1, *[MANY // 2] * TRIM_AFTER], 1),
        ([MANY, *[0] * 3 * TRIM_AFTER], 1),
        ([MANY, *[0] * TRIM_AFTER, MANY, *[0] * TRIM_AFTER], 2),
        ([MANY, *[0] * (TRIM_AFTER - 1), MANY, *[0] * (TRIM_AFTER - 1)], 0),
        ([MANY, *range(2 * TRIM_AFTER)], 0),
        ([TRIM_FROM - 1, *[0] * TRIM_AFTER], 0),
        ([MANY, *[MANY // 2 + 1] * TRIM_AFTER], 0),
    ],
)
async def test_memory_is_returned_when_half_of_many_connections_stay_away(
    counts: list[int], trims: int
) -> None:
    waiting = [*counts]
    trimmed = list[int]()

    async def sleep(seconds: float) -> None:
        current.append(waiting.pop(0))  # an IndexError ends the test

    current = [0]
    with pytest.raises(IndexError):
        await return_memory(lambda: current[-1], lambda: 0, lambda: trimmed.append(current[-1]), sleep)
    assert len(trimmed) == trims


@pytest.mark.parametrize(
    ("moved", "trims"),
    [
        ([BURST, BURST], [2]),
        ([BURST, BURST, BURST, BURST + 1, BURST + 1], [2]),
        ([BURST // 2, BURST // 2, BURST, BURST], [4]),
        ([BURST - 1] * 3, []),
        ([BURST, BURST, 2 * BURST, 2 * BURST], [2, 4]),
        ([*range(BURST, BURST + 2 * LONGEST_BURST)], [LONGEST_BURST]),
    ],
)
async def test_memory_is_returned_after_a_burst_of_large_bodies(moved: list[int], trims: list[int]) -> None:
    seen = list[int]()
    trimmed = list[int]()

    async def sleep(seconds: float) -> None:
        seen.append(moved[len(seen)])  # an IndexError ends the test

    with pytest.raises(IndexError):
        await return_memory(lambda: 1, lambda: seen[-1], lambda: trimmed.append(len(seen)), sleep)
    assert trimmed == trims
