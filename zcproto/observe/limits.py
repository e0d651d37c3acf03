"""Keeps each event to the limit that the catalogue gives it, and knows what was left out.

Must not know: how a line is written, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from zcproto.common.network import network_of
from zcproto.observe.events import EVENTS, Event, Limit
from zcproto.observe.rate import RateLimited

MAX_KEYS: Final = 16_384
"""Peers, users or causes that are counted for themselves, about 250 bytes each."""

KEYS_PER_LINE: Final = 4

_KEY_MAX: Final = 128


class LeftOut(NamedTuple):
    """Lines of an event that were not written, and of how many keys they were."""

    event: str
    lines: int
    keys: int


class EventLimits:
    """Says of each event whether it may be written now. For all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        limits = {event.limit for event in EVENTS.values() if event.limit is not None}
        self._rates: dict[Limit, RateLimited] = {
            limit: RateLimited(limit.lines, _keys_of(limit), limit.total) for limit in limits
        }

    def admit(
        self, event: Event, values: Mapping[str, Any], bound: Mapping[str, Any], now: float
    ) -> int | None:
        """None if the event is not to be written, else how many of this key were not since the last that was.

        The key is what the line has in the fields of the limit: of `values`, or else of what is `bound`.
        """
        limit = event.limit
        if limit is None:
            return 0
        key = tuple([_key(name, values[name] if name in values else bound.get(name)) for name in limit.by])
        with self._lock:
            return self._rates[limit].admit(event.name, key, now)

    def ended(self, now: float) -> list[LeftOut]:
        """What was left out and no later line has told. Each is told once."""
        with self._lock:
            ended = [each for rate in self._rates.values() for each in rate.ended(now)]
        lines: dict[str, list[int]] = {}
        for event, _, count in ended:
            lines.setdefault(event, []).append(count)
        return [LeftOut(event, sum(counts), len(counts)) for event, counts in sorted(lines.items())]


def _keys_of(limit: Limit) -> int:
    # Beyond as many keys as get a line, an entry is worth only that its key is counted for itself.
    return MAX_KEYS if limit.total is None else min(MAX_KEYS, KEYS_PER_LINE * limit.total)


def _key(name: str, value: Any) -> str:
    """A bounded key. Addresses of one IPv6 site are one: counting them singly would limit nothing."""
    if not isinstance(value, str):
        return ""
    return network_of(value[:_KEY_MAX]) if name == "peer" else value[:_KEY_MAX]
