"""What the callers share: slices of calls on the command of the parent, and the CPU that they cost.

A line on standard input has the number of calls and how many are in flight; the line on standard output that
answers it has the CPU time of this process for each call, in microseconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import uvloop

WARM_UP: Final = 300

Calls = Callable[[int, int], Awaitable[None]]
"""Makes so many calls, so many of them in flight."""


async def run_slices(calls: Calls) -> None:
    """Make the calls of each line until standard input ends."""
    await calls(WARM_UP, 1)
    print("ready", flush=True)
    while line := sys.stdin.readline():  # nothing else runs in this loop
        count, depth = map(int, line.split())
        before = time.process_time()
        await calls(count, depth)
        print((time.process_time() - before) * 1e6 / count, flush=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
