"""What a generator saw, in a form that can travel and be added up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Self

from zcproto.load.latency import Latencies
from zcproto.load.tally import Kind, Tally, count, total

LATENCIES: Final = ("handshake", "session_open", "request", "from_send", "last_request", "arrival_lag", "lag")
"""Names of what is timed, from when it was due:

handshake     TCP connect to the end of the TLS handshake
session_open  session.open, from WELCOME to its answer
request       a request of the load
from_send     the same, from when it was sent: without what this side was late
last_request  the one last request on each connection
arrival_lag   how late a connection was begun
lag           how late a request was sent
"""

TICKS_PER_SECOND: Final = 4
"""Of what is counted over time; a tick's number is the time since the run's origin in this unit."""


class Record:
    """One process's record, or the sum of several. Seconds are those since the run's origin."""

    __slots__ = (
        "answered_over_time",
        "connected_over_time",
        "cpu_share",
        "latencies",
        "load_ended",
        "load_started",
        "lost_links",
        "ready",
        "request_by_second",
        "sessions",
        "tallies",
    )

    def __init__(self) -> None:
        self.tallies = {kind: Tally() for kind in Kind}
        self.latencies = {name: Latencies() for name in LATENCIES}
        self.request_by_second: dict[int, Latencies] = {}
        """Latency of the load's requests by the second in which the answer came."""
        self.answered_over_time: dict[int, int] = {}
        """Requests answered with what had been sent, by tick."""
        self.connected_over_time: dict[int, int] = {}
        """Connections that got their session in a tick, less those that were lost in it."""
        self.lost_links: dict[str, int] = {}
        """Connections that could not be made or did not last, by cause."""
        self.ready = 0
        """Connections that have their session, and have not been lost."""
        self.sessions = 0
        self.load_started = 0.0
        """Monotonic seconds; 0 before it began."""
        self.load_ended = 0.0
        """When the last answer of the load came."""
        self.cpu_share = 0.0
        """Of a core, used by this process while it sent the load; of the busiest, if there are several."""

    @property
    def requests_sent(self) -> int:
        """All that the server should have counted."""
        return sum(tally.sent for tally in self.tallies.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "tallies": {kind.value: tally.as_json() for kind, tally in self.tallies.items()},
            "latencies": {name: each.as_json() for name, each in self.latencies.items()},
            "request_by_second": {str(at): each.as_json() for at, each in self.request_by_second.items()},
            "answered_over_time": {str(at): count for at, count in self.answered_over_time.items()},
            "connected_over_time": {str(at): count for at, count in self.connected_over_time.items()},
            "lost_links": self.lost_links,
            "ready": self.ready,
            "sessions": self.sessions,
            "load_started": self.load_started,
            "load_ended": self.load_ended,
            "cpu_share": self.cpu_share,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        record = cls()
        record.tallies = {kind: Tally.from_json(value["tallies"][kind.value]) for kind in Kind}
        record.latencies = {name: Latencies.from_json(value["latencies"][name]) for name in LATENCIES}
        record.request_by_second = {
            int(at): Latencies.from_json(each) for at, each in value["request_by_second"].items()
        }
        record.answered_over_time = {int(at): count for at, count in value["answered_over_time"].items()}
        record.connected_over_time = {int(at): count for at, count in value["connected_over_time"].items()}
        for name in ("lost_links", "ready", "sessions", "load_started", "load_ended", "cpu_share"):
            setattr(record, name, value[name])
        return record


def merged(records: Iterable[Record]) -> Record:
    """The sum of several processes' records."""
    whole = Record()
    parts = list(records)
    for kind in Kind:
        whole.tallies[kind] = total(each.tallies[kind] for each in parts)
    for each in parts:
        for name, latencies in each.latencies.items():
            whole.latencies[name].merge(latencies)
        for at, latencies in each.request_by_second.items():
            whole.request_by_second.setdefault(at, Latencies()).merge(latencies)
        _add(whole.answered_over_time, each.answered_over_time)
        _add(whole.connected_over_time, each.connected_over_time)
        for cause, links in each.lost_links.items():
            count(whole.lost_links, cause, links)
        whole.ready += each.ready
        whole.sessions += each.sessions
    started = [each.load_started for each in parts if each.load_started]
    whole.load_started = min(started, default=0.0)
    whole.load_ended = max((each.load_ended for each in parts), default=0.0)
    whole.cpu_share = max((each.cpu_share for each in parts), default=0.0)
    return whole


def _add(series: dict[int, int], other: dict[int, int]) -> None:
    for at, number in other.items():
        series[at] = series.get(at, 0) + number
