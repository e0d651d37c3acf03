"""Events of the server, queued until the application reads them."""

from __future__ import annotations

import asyncio
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

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()  # None follows the last event
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Add an event; drop the oldest if there are too many."""
        if self._queue.qsize() >= MAX_EVENTS:
            self._queue.get_nowait()
            self.dropped += 1
        self._queue.put_nowait(event)

    def close(self) -> None:
        """End the stream after the events that are queued."""
        self._queue.put_nowait(None)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None:
            self.close()  # for other readers
            raise StopAsyncIteration
        return event
