"""Bounds how often an event is written, so that an attack cannot fill a disk.

Rules: at most so many lines a minute for each event and key (a peer, a cause), and so many of an event for all
keys together, as an attacker may have many addresses; the next line that is written tells how many were not. The
table is bounded: when it is full of keys seen within the minute, further keys of an event share one entry.

Must not know: what is logged, the clock; `now` is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Hashable

WINDOW_S = 60.0


class _Entry:
    __slots__ = ("admitted", "since", "suppressed")

    def __init__(self, since: float) -> None:
        self.since = since
        self.admitted = 0
        self.suppressed = 0


class RateLimited:
    """Admits an event for a key at most `per_minute` times a minute. Holds at most `max_keys` keys.

    `total` is how often a minute an event is admitted for all keys together; None is no such limit.
    """

    __slots__ = ("_entries", "_max_keys", "_per_minute", "_shared", "_total", "_totals")

    def __init__(self, per_minute: int, max_keys: int = 1024, total: int | None = None) -> None:
        self._per_minute = per_minute
        self._max_keys = max_keys
        self._total = total
        self._totals: dict[str, _Entry] = {}
        self._entries: dict[tuple[str, Hashable], _Entry] = {}
        self._shared: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def admit(self, event: str, key: Hashable, now: float) -> int | None:
        """None if the event is not to be written, else how many were not since the last one that was."""
        entry = self._entries.get((event, key)) or self._new_entry(event, key, now)
        if now - entry.since >= WINDOW_S:
            entry.since = now
            entry.admitted = 0
            if (event, key) in self._entries:
                # The table stays in the order of the windows, so that the oldest are found at its front.
                self._entries[event, key] = self._entries.pop((event, key))
        if entry.admitted >= self._per_minute or not self._within_total(event, now):
            entry.suppressed += 1
            return None
        entry.admitted += 1
        suppressed, entry.suppressed = entry.suppressed, 0
        return suppressed

    def _within_total(self, event: str, now: float) -> bool:
        if self._total is None:
            return True
        of_all = self._totals.get(event)
        if of_all is None or now - of_all.since >= WINDOW_S:
            of_all = self._totals[event] = _Entry(now)  # events are a fixed set of names
        of_all.admitted += 1
        return of_all.admitted <= self._total

    def ended(self, now: float) -> list[tuple[str, Hashable, int]]:
        """What was suppressed of keys whose minute is over: event, key (None where keys shared an entry), count.

        Each is told once; called now and then, it gives the numbers that no later line of the key would tell.
        """
        told: list[tuple[str, Hashable, int]] = []
        while self._entries:
            (event, key), entry = next(iter(self._entries.items()))
            if now - entry.since < WINDOW_S:
                break
            del self._entries[event, key]
            if entry.suppressed:
                told.append((event, key, entry.suppressed))
        for event, entry in self._shared.items():
            if entry.suppressed and now - entry.since >= WINDOW_S:
                told.append((event, None, entry.suppressed))
                entry.suppressed = 0
        return told

    def _new_entry(self, event: str, key: Hashable, now: float) -> _Entry:
        if len(self._entries) >= self._max_keys:
            for old_event, _, suppressed in self.ended(now):
                self._shared_entry(old_event, now).suppressed += suppressed
        if len(self._entries) >= self._max_keys:
            return self._shared_entry(event, now)
        entry = self._entries[event, key] = _Entry(now)
        return entry

    def _shared_entry(self, event: str, now: float) -> _Entry:
        # Events are a fixed set of names, so this table needs no bound of its own.
        return self._shared.setdefault(event, _Entry(now))
