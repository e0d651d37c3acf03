"""Callers that wait for their turn, first come, first served.

Rules:
- A caller that was woken, and finds that another one was faster in this turn of the loop, keeps its place.
- A turn is not lost: a caller that is cancelled after it was woken passes it on.

Must not know: what the callers wait for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class WaitingQueue(deque[asyncio.Future[None]]):
    """A queue of callers, which is true while one waits."""

    __slots__ = ()

    async def wait(self, *, was_woken: bool, pass_on: Callable[[], object]) -> None:
        """Wait to be woken. `pass_on` is called if this caller is cancelled after it was woken."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if was_woken:
            self.appendleft(waiter)
        else:
            self.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                pass_on()
            raise

    def wake(self, count: int) -> int:
        """Wake the next callers, at most `count` of them. Return how many turns are left."""
        while self and count > 0:
            waiter = self.popleft()
            if not waiter.done():  # else it was cancelled
                waiter.set_result(None)
                count -= 1
        return count

    def wake_all(self) -> None:
        self.wake(len(self))
