"""Events of the server, queued until the application reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final, NamedTuple

MAX_EVENTS: Final = 1_000


class Event(NamedTuple):
    """The name and the data of one event."""

    name: str
    data: Any


class EventStream:
    """An async iterator over events in order, which ends when the client is closed.

    It holds at most 1,000 events; more replace the oldest, which `dropped` counts.
    """

    __slots__ = ("_closed", "_events", "_waiters", "dropped")

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Add an event; drop the oldest if there are too many."""
        if len(self._events) >= MAX_EVENTS:
            self._events.popleft()
            self.dropped += 1
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """End the stream after the events that are queued."""
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
                    self._wake()  # pass the event on to the next reader
                raise
        return self._events.popleft()
