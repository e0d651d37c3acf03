"""The result of a run: the counts of both sides, and whether everything was verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from zcproto.common.text import counted
from zcproto.errors import Code
from zcproto.load.caller import ServerStats
from zcproto.load.plan import Plan
from zcproto.load.record import Record, RequestKind

KIB: Final = 1024
FRESH_HANDSHAKES: Final = 10
"""Handshakes that a fresh server may have completed already, such as the operator's, beside 1% of the load's."""


class Verdict(StrEnum):
    VERIFIED = "verified"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Moment(StrEnum):
    """When the server's counters were read."""

    IDLE = "idle"  # before the load's first connection, after the operator's
    CONNECTED = "connected"
    LOADED = "loaded"
    VERIFIED = "verified"  # before anything is closed
    CLOSED = "closed"


class StatsReading(NamedTuple):
    """The server's counters at a moment."""

    stats: ServerStats
    operator_requests: int
    """Requests of the operator so far, including the one that read these counters."""
    at: float
    """Seconds since the run's origin."""


class Counted(NamedTuple):
    """A number that must be the same in the plan, the client and the server. None if it was not read."""

    what: str
    asked: int
    client: int
    server: int | None

    is_read: bool = True
    """Whether the server's count belongs to the plan."""

    @property
    def agree(self) -> bool:
        return self.asked == self.client and (self.client == self.server or not self.is_read)


@dataclass(slots=True)
class Result:
    """The result of a run, which may be incomplete."""

    plan: Plan
    record: Record = field(default_factory=Record)
    readings: dict[Moment, StatsReading] = field(default_factory=dict)
    unread: str = ""
    """Why the server's counters could not be read, or empty."""
    interrupted: bool = False
    connected: int = 0
    """Connections with a session at the end of the connect phase."""
    connect_s: float = 0.0
    load_s: float = 0.0
    """From the first request to the last answer or item."""
    total_s: float = 0.0

    # --- verification --------------------------------------------------------------------------------

    def counted(self) -> list[Counted]:
        """Compare the counts of connections, sessions, requests and items of both sides, read while all are open.

        The operator's connection and session are in both readings and cancel out; its requests are subtracted.
        """
        plan = self.plan
        idle, last = self.readings.get(Moment.IDLE), self.readings.get(Moment.VERIFIED)
        requests = sum(
            self.record.tallies[kind].planned for kind in RequestKind if kind is not RequestKind.CLOSE
        )
        sent = sum(self.record.tallies[kind].sent for kind in RequestKind if kind is not RequestKind.CLOSE)
        if idle is None or last is None:
            server: tuple[int | None, ...] = (None, None, None, None)
        else:
            before, after = idle.stats, last.stats
            server = (
                after.connections - before.connections,
                after.sessions - before.sessions,
                after.requests - before.requests - (last.operator_requests - idle.operator_requests),
                after.items - before.items,
            )
        items, is_read = self.record.items, plan.operator is not None
        received = items.equal + items.unequal
        of_streams = [Counted("items", items.planned, received, server[3], is_read)] if plan.stream else []
        return [
            Counted("connections", plan.connections, self.record.ready, server[0], is_read),
            Counted("sessions", plan.sessions, self.record.sessions, server[1], is_read),
            Counted("requests", requests, sent, server[2], is_read),
            *of_streams,
        ]

    @property
    def verified_connections(self) -> int:
        """Connections whose last request got the expected answer."""
        return self.record.tallies[RequestKind.LAST].equal

    @property
    def verdict(self) -> Verdict:
        if self.interrupted:
            return Verdict.INTERRUPTED
        return Verdict.FAILED if self.reasons() else Verdict.VERIFIED

    def reasons(self) -> list[str]:
        """Return why the run failed, or nothing if everything is verified."""
        reasons = []
        record = self.record
        lost_connections = sum(record.lost_connections.values())
        if lost_connections:
            reasons.append(f"{counted(lost_connections, 'connection')} failed or got lost")
        unverified = self.plan.connections - self.verified_connections
        if unverified:
            reasons.append(f"{unverified:,} of {counted(self.plan.connections, 'connection')} not verified")
        for kind, (noun, which) in _NAMES.items():
            if kind is RequestKind.LOAD and self.plan.stream:
                noun, which = "stream", ""  # noqa: PLW2901
            tally = record.tallies[kind]
            results = {
                "got a wrong answer": tally.unequal,
                "got no answer": tally.lost,
                "got an error": sum(tally.errors.values()),
                "could not be sent": sum(tally.not_sent.values()),
            }
            reasons += [f"{counted(n, noun)}{which} {result}" for result, n in results.items() if n]
        if any(Code.UNIMPLEMENTED.name in tally.errors for tally in record.tallies.values()):
            called = self.plan.stream or (self.plan.target.method if self.plan.target else "echo")
            reasons.append(
                f"the server has no method `{called}`; name one of its own by --method or --stream"
            )
        items = record.items
        if items.unequal:
            reasons.append(f"{counted(items.unequal, 'item')} wrong or out of order")
        if items.lost:
            reasons.append(f"{counted(items.lost, 'item')} did not arrive")
        for each in self.counted():
            if not each.is_read:
                continue
            if each.server is None:
                reasons.append(f"the server's count of {each.what} could not be read")
            elif each.server != each.client:
                reasons.append(
                    f"the server counts {each.server:,} {each.what}, the client {each.client:,}; run the"
                    " benchmark without other clients of the server"
                )
        if self.unread:
            reasons.append(self.unread)
        return reasons

    # --- figures -------------------------------------------------------------------------------------

    def between(self, first: Moment, last: Moment) -> tuple[ServerStats, ServerStats] | None:
        """Return the server's counters at two moments, or None unless both were read."""
        if first in self.readings and last in self.readings:
            return self.readings[first].stats, self.readings[last].stats
        return None

    @property
    def connect_cpu_s(self) -> float | None:
        """Server CPU to open all connections and sessions."""
        stats = self.between(Moment.IDLE, Moment.CONNECTED)
        return None if stats is None else stats[1].cpu_s - stats[0].cpu_s

    @property
    def cpu_per_request_us(self) -> float | None:
        return self._cpu_us(self.record.tallies[RequestKind.LOAD].sent)

    @property
    def cpu_per_item_us(self) -> float | None:
        return self._cpu_us(self.record.items.equal)

    def _cpu_us(self, count: int) -> float | None:
        """Return the server CPU of the load divided by a count."""
        stats = self.between(Moment.CONNECTED, Moment.LOADED)
        return None if stats is None or not count else (stats[1].cpu_s - stats[0].cpu_s) / count * 1e6

    @property
    def kib_per_connection(self) -> float | None:
        """Server memory per connection with a session, above the idle server. None unless the server is fresh."""
        stats = self.between(Moment.IDLE, Moment.CONNECTED)
        if stats is None or not self.connected or self.server_was_used:
            return None
        return (stats[1].rss_bytes - stats[0].rss_bytes) / KIB / self.connected

    @property
    def server_was_used(self) -> bool:
        """Whether the server has had connections before, whose freed memory new ones reuse."""
        idle = self.readings.get(Moment.IDLE)
        return idle is not None and idle.stats.handshakes > FRESH_HANDSHAKES + self.plan.connections // 100

    def longest_pause_ms(self, moment: Moment) -> float | None:
        """Return the peak lag of the server's event loop between the previous reading and this one."""
        reading = self.readings.get(moment)
        return None if reading is None else reading.stats.longest_pause_s * 1000

    @property
    def connect_rate(self) -> float:
        """Connections with a session per second."""
        return self.connected / self.connect_s if self.connect_s else 0.0

    @property
    def request_rate(self) -> float:
        """Requests of the load with the expected answer per second."""
        return self.record.tallies[RequestKind.LOAD].equal / self.load_s if self.load_s else 0.0

    @property
    def item_rate(self) -> float:
        """Expected items of streams per second."""
        return self.record.items.equal / self.load_s if self.load_s else 0.0


_NAMES: Final = {
    RequestKind.OPEN: ("session.open request", ""),
    RequestKind.JOIN: ("first use", " of a shared session"),
    RequestKind.LOAD: ("request", " of the load"),
    RequestKind.LAST: ("last request", ""),
    RequestKind.CLOSE: ("session.close request", ""),
}
