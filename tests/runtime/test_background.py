"""Background work of a server."""

from __future__ import annotations

import pytest

from zcproto.runtime.background import TRIM_FROM, return_memory

MANY = 2 * TRIM_FROM


@pytest.mark.parametrize(
    ("counts", "trims"),
    [
        ([MANY, MANY // 2 + 1, MANY // 2], 1),
        ([MANY, 0, 0, 0], 1),
        ([MANY, 0, MANY, 0], 2),
        ([TRIM_FROM - 1, 0], 0),
        ([MANY, MANY - 1, MANY + 1], 0),
    ],
)
async def test_memory_is_returned_when_half_of_many_connections_have_ended(
    counts: list[int], trims: int
) -> None:
    waiting = [*counts]
    trimmed = list[int]()

    async def sleep(seconds: float) -> None:
        current.append(waiting.pop(0))  # an IndexError ends the test

    current = [0]
    with pytest.raises(IndexError):
        await return_memory(lambda: current[-1], lambda: trimmed.append(current[-1]), sleep)
    assert len(trimmed) == trims
