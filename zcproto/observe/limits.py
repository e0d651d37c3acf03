"""Limit how often each log event is written, so that an attack cannot fill a disk.

Rules:
- Each event has a number of lines per minute and key (a peer, a user, a cause), and one for all keys together,
  because an attacker may have many addresses.
- The next line of a key carries the number of suppressed ones.
- The table is bounded: when it is full of keys of the last minute, further keys of an event share one entry.

Must not know: how a line is written, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from zcproto.common.network import network_of
from zcproto.observe.events import EVENTS, Limit, LogEvent

WINDOW_S: Final = 60.0
MAX_KEYS: Final = 16_384
"""Peers, users or causes counted separately, about 250 bytes each."""

KEYS_PER_LINE: Final = 4

TRACEBACKS: Final = 6
"""Tracebacks a minute of one event, method and type of exception; further lines have the frames alone."""

MAX_TRACEBACKS: Final = 30
"""Tracebacks a minute of one event: at 2 KiB each about 100 MB a day, if a peer can cause exceptions at will."""

_KEY_MAX: Final = 128


class EventLimits:
    """Decide for each event whether it may be written now. Thread-safe.

    Each of so many `processes` that write one log has its share of the lines of all keys together.
    """

    def __init__(self, processes: int = 1) -> None:
        self._lock = threading.Lock()
        limits = {event.name: event.limit for event in EVENTS.values() if event.limit is not None}
        rates: dict[Limit, RateLimiter] = {}
        for limit in limits.values():
            lines = limit.lines if limit.by else ceil(limit.lines / processes)
            total = None if limit.total is None else ceil(limit.total / processes)
            rates.setdefault(limit, RateLimiter(lines, _keys_of(limit), total))
        self._all = list(rates.values())
        self._rates = {event: rates[limit] for event, limit in limits.items()}  # hashing a limit takes longer
        self._tracebacks = RateLimiter(TRACEBACKS, total=ceil(MAX_TRACEBACKS / processes))

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
            return self._rates[event.name].admit(event.name, key, now)

    def admit_traceback(self, event: str, what: object, error: BaseException, now: float) -> bool:
        """Return whether a line has the traceback of its exception."""
        with self._lock:
            key = _key("what", what), type(error).__name__
            return self._tracebacks.admit(event, key, now) is not None

    def expired(self, now: float) -> list[tuple[str, int, int]]:
        """Return the suppressed lines that no later line has reported, each once: event, lines, and keys."""
        with self._lock:
            expired = [each for rate in self._all for each in rate.expired(now)]
        lines: dict[str, list[int]] = {}
        for event, count in expired:
            lines.setdefault(event, []).append(count)
        return [(event, sum(counts), len(counts)) for event, counts in sorted(lines.items())]


def _keys_of(limit: Limit) -> int:
    # Keys beyond those that can get a line only need an entry to be counted separately.
    return MAX_KEYS if limit.total is None else min(MAX_KEYS, KEYS_PER_LINE * limit.total)


def _key(name: str, value: Any) -> str:
    """Return a bounded key. Addresses of one IPv6 site share a key; separately they would evade the limit."""
    if not isinstance(value, str):
        return ""
    return network_of(value[:_KEY_MAX]) if name == "peer" else value[:_KEY_MAX]


@dataclass(slots=True)
class _Window:
    since: float
    admitted: int = 0
    suppressed: int = 0


class RateLimiter:
    """Admit an event `per_minute` times per minute and key, for at most `max_keys` keys.

    `total` limits an event per minute for all keys together; None for no such limit.
    """

    def __init__(self, per_minute: int, max_keys: int = 1024, total: int | None = None) -> None:
        self._per_minute = per_minute
        self._max_keys = max_keys
        self._total = total
        self._windows: dict[tuple[str, Hashable], _Window] = {}
        # The names of events are a fixed set, so these two need no bound.
        self._totals: dict[str, _Window] = {}
        self._shared: dict[str, _Window] = {}

    def __len__(self) -> int:
        return len(self._windows)

    def admit(self, event: str, key: Hashable, now: float) -> int | None:
        """Return the number suppressed since the last admitted one, or None if this one must be suppressed."""
        window = self._windows.get((event, key)) or self._new_window(event, key, now)
        if now - window.since >= WINDOW_S:
            window.since = now
            window.admitted = 0
            if (event, key) in self._windows:
                # Ordered by the start of the windows, so that the oldest come first.
                self._windows[event, key] = self._windows.pop((event, key))
        if window.admitted >= self._per_minute or not self._is_within_total(event, now):
            window.suppressed += 1
            return None
        window.admitted += 1
        suppressed, window.suppressed = window.suppressed, 0
        return suppressed

    def expired(self, now: float) -> list[tuple[str, int]]:
        """Return event and suppressed count of the windows that are over, each once."""
        expired: list[tuple[str, int]] = []
        while self._windows:
            (event, key), window = next(iter(self._windows.items()))
            if now - window.since < WINDOW_S:
                break
            del self._windows[event, key]
            if window.suppressed:
                expired.append((event, window.suppressed))
        for event, window in self._shared.items():
            if window.suppressed and now - window.since >= WINDOW_S:
                expired.append((event, window.suppressed))
                window.suppressed = 0
        return expired

    def _is_within_total(self, event: str, now: float) -> bool:
        if self._total is None:
            return True
        window = self._totals.get(event)
        if window is None or now - window.since >= WINDOW_S:
            window = self._totals[event] = _Window(now)
        window.admitted += 1
        return window.admitted <= self._total

    def _new_window(self, event: str, key: Hashable, now: float) -> _Window:
        if len(self._windows) >= self._max_keys:
            for old_event, suppressed in self.expired(now):
                self._shared_window(old_event, now).suppressed += suppressed
        if len(self._windows) >= self._max_keys:
            return self._shared_window(event, now)
        window = self._windows[event, key] = _Window(now)
        return window

    def _shared_window(self, event: str, now: float) -> _Window:
        return self._shared.setdefault(event, _Window(now))
