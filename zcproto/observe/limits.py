"""Limit how often each log event is written, so that an attack cannot fill a disk.

Rules:
- Each event has a number of lines per minute and key (a peer, a user, a cause), and one for all keys together,
  because an attacker may have many addresses. Both are token buckets: so many lines at once, then as they return.
- The next line of a key carries the number of suppressed ones.
- The tables are bounded: when one is full of keys in use, further keys of the event share an entry.

Must not know: how a line is written, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from itertools import takewhile
from math import ceil
from typing import Any, Final

from zcproto.common.network import network_of
from zcproto.common.rates import MAX_KEYS, EventRate, TokenBucket
from zcproto.observe.events import EVENTS, Limit, LogEvent

MINUTE_S: Final = 60.0
KEYS_PER_LINE: Final = 4

TRACEBACKS: Final = Limit(6, ("what", "type"), 30)
"""Tracebacks a minute of one event, method and type of exception, and of one event: at 2 KiB each about 100 MB a
day, if a peer can cause exceptions at will. Further lines have the frames alone."""

_KEY_MAX: Final = 128
_OTHERS: Final = object()


class EventLimits:
    """Decide for each event whether it may be written now. Thread-safe.

    Each of so many `processes` that write one log has its share of the lines of all keys together.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._lock = threading.Lock()
        self._lines = {
            event.name: self._limiter(event.limit) for event in EVENTS.values() if event.limit is not None
        }
        self._tracebacks: dict[str, LineLimiter] = {}  # the names of events are a fixed set

    def _limiter(self, limit: Limit) -> LineLimiter:
        lines = limit.lines if limit.by else ceil(limit.lines / self._processes)
        total = None if limit.total is None else ceil(limit.total / self._processes)
        # Keys beyond those that can get a line only need an entry to be counted separately.
        keys = MAX_KEYS if limit.total is None else min(MAX_KEYS, KEYS_PER_LINE * limit.total)
        return LineLimiter(lines, keys, total)

    def admit(
        self, event: LogEvent, values: Mapping[str, Any], bound: Mapping[str, Any], now: float
    ) -> int | None:
        """Return the lines of this key suppressed before this one, or None if it must be suppressed too.

        The key is made of the fields of the limit, from `values` or else from `bound`.
        """
        limit = event.limit
        if limit is None:
            return 0
        key = tuple([_key(name, values[name] if name in values else bound.get(name)) for name in limit.by])
        with self._lock:
            return self._lines[event.name].admit(key, now)

    def admit_traceback(self, event: str, what: object, error: BaseException, now: float) -> bool:
        """Return whether a line has the traceback of its exception."""
        with self._lock:
            if event not in self._tracebacks:
                self._tracebacks[event] = self._limiter(TRACEBACKS)
            return self._tracebacks[event].admit((_key("what", what), type(error).__name__), now) is not None

    def expired(self, now: float) -> list[tuple[str, int, int]]:
        """Return the suppressed lines that no later line has reported, each once: event, lines, and keys."""
        with self._lock:
            expired = [(event, limiter.expired(now)) for event, limiter in sorted(self._lines.items())]
        return [(event, sum(counts), len(counts)) for event, counts in expired if counts]


def _key(name: str, value: Any) -> str:
    """Return a bounded key. Addresses of one IPv6 site share a key; separately they would evade the limit."""
    if not isinstance(value, str):
        return ""
    return network_of(value[:_KEY_MAX]) if name == "peer" else value[:_KEY_MAX]


class LineLimiter:
    """Admit `lines` per minute of each of `max_keys` keys, and `total` of all keys; None for no such limit."""

    def __init__(self, lines: int, max_keys: int, total: int | None = None) -> None:
        self._max_keys = max_keys
        self._keys: EventRate[Hashable] = EventRate(lines / MINUTE_S, MINUTE_S, max_keys)
        self._all = None if total is None else TokenBucket(total / MINUTE_S, MINUTE_S)
        self._suppressed: dict[Hashable, tuple[int, float]] = {}
        """The suppressed lines of a key since its last line, and when the first of them was. In this order."""

    def admit(self, key: Hashable, now: float) -> int | None:
        """Return the number suppressed since the last admitted line, or None if this one must be suppressed."""
        if self._keys.admit(key, now) or not (self._all is None or self._all.admit(now)):
            if key not in self._suppressed and len(self._suppressed) >= self._max_keys:
                key = _OTHERS
            count, since = self._suppressed.get(key, (0, now))
            self._suppressed[key] = count + 1, since
            return None
        return self._suppressed.pop(key)[0] if key in self._suppressed else 0

    def expired(self, now: float) -> list[int]:
        """Return the suppressed lines of each key that had no line for a minute, once. Removes keys out of use."""
        self._keys.drop_full(now)
        suppressed = self._suppressed
        expired = [*takewhile(lambda key: now - suppressed[key][1] >= MINUTE_S, suppressed)]
        return [suppressed.pop(key)[0] for key in expired]
