"""What a generator process measures, in a form that can be sent as JSON and added up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Self, TypeVar

MICROSECONDS: Final = 1_000_000
TICKS_PER_SECOND: Final = 4
"""Resolution of counts over time. The number of a tick is the time since the run's origin in this unit."""

LATENCIES: Final = (
    "handshake",
    "session_open",
    "request",
    "from_send",
    "first_item",
    "item",
    "between_items",
    "last_request",
    "arrival_lag",
    "lag",
)
"""The names of measured latencies. Each starts when its action was due:

handshake     TCP connect to the end of the TLS handshake
session_open  session.open, from WELCOME to its answer
request       a request of the load
from_send     the same, but from when it was sent: without the generator's own delay
first_item    the first item of a stream, from when the stream should open
item          each item of a stream; those after the first are due at the planned interval
between_items an item of a stream, from the arrival of the one before
last_request  the last request on each connection
arrival_lag   the delay until a connection was started
lag           the delay until a request was sent
"""

_EXACT_BELOW: Final = 10_000

Key = TypeVar("Key", int, str)


class RequestKind(StrEnum):
    """The purpose of a request."""

    OPEN = "open"  # session.open
    JOIN = "join"  # the first use of another connection's session
    LOAD = "load"
    LAST = "last"  # one on each connection, at the end
    CLOSE = "close"  # session.close


@dataclass(slots=True)
class Tally:
    """The outcomes of the requests of one kind.

    `planned` = `sent` + all `not_sent`, and `sent` = `equal` + `unequal` + `lost` + all `errors` + in flight.

    `equal` got the expected answer, `unequal` another one, `lost` none. `errors` are counted by the names of their
    codes, `not_sent` by cause.
    """

    planned: int = 0
    sent: int = 0
    equal: int = 0
    unequal: int = 0
    lost: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    not_sent: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests that did not get and will not get the expected answer."""
        return self.unequal + self.lost + sum(self.errors.values()) + sum(self.not_sent.values())

    def merge(self, other: Tally) -> None:
        self.planned += other.planned
        self.sent += other.sent
        self.equal += other.equal
        self.unequal += other.unequal
        self.lost += other.lost
        add_counts(self.errors, other.errors)
        add_counts(self.not_sent, other.not_sent)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**value)


class Latencies:
    """Counts of durations in microseconds: exact below 10 ms, with four digits above.

    A dict instead of a histogram, because adding to it takes a seventh of the time; rounding limits its size.
    `hdr.histogram` converts it.
    """

    __slots__ = ("counts", "max_us")

    def __init__(self, counts: dict[int, int] | None = None, max_us: int = 0) -> None:
        self.counts: dict[int, int] = {} if counts is None else counts
        self.max_us = max_us

    def add(self, seconds: float) -> None:
        micros = int(seconds * MICROSECONDS)
        if micros >= _EXACT_BELOW or micros < 1:
            self.max_us = max(self.max_us, micros)
            micros = _rounded(micros)
        elif micros > self.max_us:
            self.max_us = micros
        self.counts[micros] = self.counts.get(micros, 0) + 1

    def merge(self, other: Latencies) -> None:
        add_counts(self.counts, other.counts)
        self.max_us = max(self.max_us, other.max_us)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        return {"counts": _with_text_keys(self.counts), "max_us": self.max_us}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(_with_int_keys(value["counts"]), value["max_us"])


def _rounded(micros: int) -> int:
    if micros < 1:
        return 1  # the resolution of the clock; histograms start at 1
    unit: int = 10 ** (len(str(micros)) - 4)
    return micros // unit * unit


class Record:
    """The measurements of one process, or the sum of several. Seconds count from the run's origin."""

    __slots__ = (
        "answered_over_time",
        "connected_over_time",
        "cpu_share",
        "items",
        "latencies",
        "load_ended",
        "load_started",
        "lost_connections",
        "ready",
        "request_by_second",
        "sessions",
        "tallies",
    )

    def __init__(self) -> None:
        self.tallies = {kind: Tally() for kind in RequestKind}
        self.items = Tally()
        """The items of streams: `sent` are those that were asked for."""
        self.latencies = {name: Latencies() for name in LATENCIES}
        self.request_by_second: dict[int, Latencies] = {}
        """Latencies of the load's requests or items by the second of their arrival."""
        self.answered_over_time: dict[int, int] = {}
        """Requests with the expected answer, and expected items, by tick."""
        self.connected_over_time: dict[int, int] = {}
        """Connections that got a session minus those that were lost, by tick."""
        self.lost_connections: dict[str, int] = {}
        """Connections that failed or were lost, by cause."""
        self.ready = 0
        """Connections that have a session now."""
        self.sessions = 0
        self.load_started = 0.0
        """Monotonic seconds; 0 before the load."""
        self.load_ended = 0.0
        """Time of the load's last answer or item."""
        self.cpu_share = 0.0
        """The fraction of a core that the process used during the load; in a sum, that of the busiest process."""

    @property
    def requests_sent(self) -> int:
        """All requests that the server should have counted."""
        return sum(tally.sent for tally in self.tallies.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "tallies": {kind.value: tally.as_json() for kind, tally in self.tallies.items()},
            "items": self.items.as_json(),
            "latencies": {name: each.as_json() for name, each in self.latencies.items()},
            "request_by_second": {str(at): each.as_json() for at, each in self.request_by_second.items()},
            "answered_over_time": _with_text_keys(self.answered_over_time),
            "connected_over_time": _with_text_keys(self.connected_over_time),
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        record = cls()
        record.tallies = {kind: Tally.from_json(value["tallies"][kind.value]) for kind in RequestKind}
        record.items = Tally.from_json(value["items"])
        record.latencies = {name: Latencies.from_json(value["latencies"][name]) for name in LATENCIES}
        record.request_by_second = {
            int(at): Latencies.from_json(each) for at, each in value["request_by_second"].items()
        }
        record.answered_over_time = _with_int_keys(value["answered_over_time"])
        record.connected_over_time = _with_int_keys(value["connected_over_time"])
        for name in _PLAIN:
            setattr(record, name, value[name])
        return record


_PLAIN: Final = ("lost_connections", "ready", "sessions", "load_started", "load_ended", "cpu_share")
"""Fields of a Record that are their own JSON."""


def merge_records(records: Iterable[Record]) -> Record:
    """Return the sum of the records of several processes."""
    whole = Record()
    parts = list(records)
    for each in parts:
        for kind, tally in each.tallies.items():
            whole.tallies[kind].merge(tally)
        whole.items.merge(each.items)
        for name, latencies in each.latencies.items():
            whole.latencies[name].merge(latencies)
        for at, latencies in each.request_by_second.items():
            whole.request_by_second.setdefault(at, Latencies()).merge(latencies)
        add_counts(whole.answered_over_time, each.answered_over_time)
        add_counts(whole.connected_over_time, each.connected_over_time)
        add_counts(whole.lost_connections, each.lost_connections)
        whole.ready += each.ready
        whole.sessions += each.sessions
    whole.load_started = min((each.load_started for each in parts if each.load_started), default=0.0)
    whole.load_ended = max((each.load_ended for each in parts), default=0.0)
    whole.cpu_share = max((each.cpu_share for each in parts), default=0.0)
    return whole


def count(counts: dict[Key, int], key: Key, by: int = 1) -> None:
    """Add to one count."""
    counts[key] = counts.get(key, 0) + by


def add_counts(counts: dict[Key, int], others: Mapping[Key, int]) -> None:
    """Add all counts of another map."""
    for key, number in others.items():
        count(counts, key, number)


def _with_text_keys(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(key): number for key, number in counts.items()}


def _with_int_keys(counts: Mapping[str, int]) -> dict[int, int]:
    return {int(key): number for key, number in counts.items()}
