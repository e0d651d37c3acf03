"""What the server says without being asked, for the application to read."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, NamedTuple

MAX_EVENTS: Final = 1_000


class Event(NamedTuple):
    """One event: its name, and whatever data comes with it."""

    name: str
    data: Any


class EventStream:
    """Events in their order, as an async iterator that ends when the client is closed.

    At most 1,000 wait to be read; then the oldest make room, and `dropped` counts them.
    """

    __slots__ = ("_closed", "_events", "_waiters", "dropped")

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Add an event; the oldest goes if there are too many."""
        if len(self._events) >= MAX_EVENTS:
            self._events.popleft()
            self.dropped += 1
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Nothing more comes; what waits can still be read."""
        self._closed = True
        while self._waiters:
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if self._events and waiter.done() and not waiter.cancelled():
                    self._wake()  # it was woken for an event that another may read now
                raise
        return self._events.popleft()
