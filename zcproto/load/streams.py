"""A stream of the load: what its items must be, and when each was due."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from zcproto.connection.client_streams import ClientStream
from zcproto.load.pacer import uniform_times
from zcproto.load.plan import Share

MAX_OPENED_PER_SECOND: Final = 2_500
"""By all processes. Opening a stream costs a server more than an item, and a late stream has only late items."""


def opening_times(share: Share, streams: int) -> Iterator[float]:
    """Yield when to open each stream, in seconds, over whole intervals: so their items are due evenly."""
    intervals = math.ceil(share.rate * share.processes / MAX_OPENED_PER_SECOND)
    return uniform_times(share.rate / intervals, streams)


class LoadStream:
    """The items of one stream. `half` is its state in the connection, once it is open."""

    __slots__ = ("_data", "_interval", "_number", "_planned", "due", "half", "last_at", "received", "wrong")

    def __init__(self, share: Share, number: int, data: bytes, due: float) -> None:
        self._planned = share.items_per_stream
        self._interval = share.interval_s
        self._number = number * share.items_per_stream  # no number occurs in two streams
        self._data = data
        self.due = due
        """When it should open, and so when its first item is due."""
        self.last_at = due
        self.half: ClientStream | None = None
        self.received = 0
        self.wrong = 0

    @property
    def params(self) -> dict[str, Any]:
        return {"n": self._number, "data": self._data, "count": self._planned, "interval": self._interval}

    @property
    def next_due(self) -> float:
        """When the next item is due."""
        return self.due + self.received * self._interval

    @property
    def missing(self) -> int:
        """The number of items that have not arrived."""
        return max(self._planned - self.received, 0)

    def take(self, value: Any) -> bool:
        """Compare the next item. Return whether it is the expected one."""
        is_right = self.missing > 0 and value == {"n": self._number + self.received, "data": self._data}
        self.received += 1
        self.wrong += not is_right
        return is_right

    def is_complete(self, result: Any) -> bool:
        """Return whether all items have arrived in order, and the result is right."""
        return not self.wrong and self.received == self._planned and result == {"items": self._planned}
