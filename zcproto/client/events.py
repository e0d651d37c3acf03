"""Events of the server, queued until the application reads them."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NamedTuple

from zcproto.wire.message import decode_event

MAX_EVENTS: Final = 1_000
MAX_EVENT_BYTES: Final = 4_194_304


class Event(NamedTuple):
    """The name and the data of one event."""

    name: str
    data: Any


class EventStream:
    """An async iterator over events in order, which ends when the client is closed.

    It holds at most 1,000 events of together 4 MiB, or one larger event; more replace the oldest, which `dropped`
    counts. Events are decoded when they are read: decoded data can take 70 times the memory.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()  # b"" follows the last event
        self._size = 0
        self.dropped = 0

    def put(self, body: bytes) -> None:
        """Add the body of an EVENT; drop the oldest if there are too many."""
        queue = self._queue
        self._size += len(body)
        while queue.qsize() >= MAX_EVENTS or (self._size > MAX_EVENT_BYTES and queue.qsize()):
            self._size -= len(queue.get_nowait())
            self.dropped += 1
        queue.put_nowait(body)

    def close(self) -> None:
        """End the stream after the events that are queued."""
        self._queue.put_nowait(b"")

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        body = await self._queue.get()
        if not body:
            self.close()  # for other readers
            raise StopAsyncIteration
        self._size -= len(body)
        return Event(*decode_event(body))
