"""What a run has shown: both sides' counts beside each other, and whether everything was verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from zcproto.load.plan import Plan
from zcproto.load.record import Record
from zcproto.load.stats import Stats
from zcproto.load.tally import Kind

KIB: Final = 1024
FEW: Final = 10
"""Connections that a fresh server may have held already: the operator's, somebody's look at it."""


class Verdict(StrEnum):
    VERIFIED = "verified"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Moment(StrEnum):
    """When the server's figures were read."""

    IDLE = "idle"  # before the first connection of the load; the operator's own is there
    CONNECTED = "connected"
    LOADED = "loaded"
    VERIFIED = "verified"  # before anything is closed
    CLOSED = "closed"


class Reading(NamedTuple):
    """The server's figures at a moment."""

    stats: Stats
    operator_requests: int
    """Sent by the operator so far, the one that read these figures included."""
    at: float
    """Seconds since the run's origin."""


class Counted(NamedTuple):
    """One number that must be the same thrice. None is 'could not be read'."""

    what: str
    asked: int
    client: int
    server: int | None

    @property
    def agree(self) -> bool:
        return self.asked == self.client == self.server


@dataclass(slots=True)
class Result:
    """A run, whole or broken off."""

    plan: Plan
    record: Record = field(default_factory=Record)
    readings: dict[Moment, Reading] = field(default_factory=dict)
    unread: str = ""
    """Why the server's figures could not be read at some moment, if so."""
    interrupted: bool = False
    connected: int = 0
    """Connections that had their session when all had arrived."""
    connect_s: float = 0.0
    load_s: float = 0.0
    """From the first request's time to the last answer."""
    total_s: float = 0.0

    # --- what must agree -----------------------------------------------------------------------------

    def counted(self) -> list[Counted]:
        """The server's count of connections, sessions and requests beside ours, read while all are open.

        The operator's connection and session were there at the first reading and at the last, so they do not
        show in the difference; its requests are known and taken off.
        """
        plan = self.plan
        idle, last = self.readings.get(Moment.IDLE), self.readings.get(Moment.VERIFIED)
        requests = sum(self.record.tallies[kind].planned for kind in Kind if kind is not Kind.CLOSE)
        sent = sum(self.record.tallies[kind].sent for kind in Kind if kind is not Kind.CLOSE)
        if idle is None or last is None:
            server: tuple[int | None, ...] = (None, None, None)
        else:
            before, after = idle.stats, last.stats
            server = (
                after.connections - before.connections,
                after.sessions - before.sessions,
                after.requests - before.requests - (last.operator_requests - idle.operator_requests),
            )
        return [
            Counted("connections", plan.connections, self.record.ready, server[0]),
            Counted("sessions", plan.sessions, self.record.sessions, server[1]),
            Counted("requests", requests, sent, server[2]),
        ]

    @property
    def verified_connections(self) -> int:
        """Connections whose last request was answered with what it had sent."""
        return self.record.tallies[Kind.LAST].equal

    @property
    def verdict(self) -> Verdict:
        if self.interrupted:
            return Verdict.INTERRUPTED
        return Verdict.FAILED if self.reasons() else Verdict.VERIFIED

    def reasons(self) -> list[str]:
        """Why not everything is verified; empty if it is."""
        reasons = []
        record = self.record
        lost_links = sum(record.lost_links.values())
        if lost_links:
            reasons.append(f"{lost_links:,} connections were not made or did not last")
        unverified = self.plan.connections - self.verified_connections
        if unverified:
            reasons.append(f"{unverified:,} of {self.plan.connections:,} connections are unverified")
        for kind, name in _NAMES.items():
            tally = record.tallies[kind]
            if tally.unequal:
                reasons.append(f"{tally.unequal:,} {name} were answered with something else than was sent")
            if tally.lost:
                reasons.append(f"{tally.lost:,} {name} got no answer")
            if tally.errors:
                reasons.append(f"{sum(tally.errors.values()):,} {name} were answered with an error")
            if tally.not_sent:
                reasons.append(f"{sum(tally.not_sent.values()):,} {name} could not be sent")
        for each in self.counted():
            if each.server is None:
                reasons.append(f"the server's count of {each.what} could not be read")
            elif each.server != each.client:
                reasons.append(
                    f"the server counts {each.server:,} {each.what}, this side {each.client:,}: does anybody "
                    "else use this server?"
                )
        if self.unread:
            reasons.append(self.unread)
        return reasons

    # --- figures -------------------------------------------------------------------------------------

    def between(self, first: Moment, last: Moment) -> tuple[Stats, Stats] | None:
        """The server's figures at two moments, if both were read."""
        if first in self.readings and last in self.readings:
            return self.readings[first].stats, self.readings[last].stats
        return None

    @property
    def connect_cpu_s(self) -> float | None:
        """Server CPU for all connections, with their sessions."""
        stats = self.between(Moment.IDLE, Moment.CONNECTED)
        return None if stats is None else stats[1].cpu_s - stats[0].cpu_s

    @property
    def cpu_per_request_us(self) -> float | None:
        stats = self.between(Moment.CONNECTED, Moment.LOADED)
        sent = self.record.tallies[Kind.LOAD].sent
        return None if stats is None or not sent else (stats[1].cpu_s - stats[0].cpu_s) / sent * 1e6

    @property
    def kib_per_connection(self) -> float | None:
        """Server memory of a connection with its session, above the idle server. Of a fresh server only."""
        stats = self.between(Moment.IDLE, Moment.CONNECTED)
        if stats is None or not self.connected or self.server_was_used:
            return None
        return (stats[1].rss_bytes - stats[0].rss_bytes) / KIB / self.connected

    @property
    def server_was_used(self) -> bool:
        """Whether the server had held connections before.

        If so, its allocator still has their memory for ours, and the difference says nothing.
        """
        idle = self.readings.get(Moment.IDLE)
        return idle is not None and idle.stats.handshakes > max(FEW, self.plan.connections // 100)

    def longest_pause_ms(self, moment: Moment) -> float | None:
        """Of the server's loop, from the reading before `moment` to it."""
        reading = self.readings.get(moment)
        return None if reading is None else reading.stats.longest_pause_s * 1000

    @property
    def connect_rate(self) -> float:
        """Connections a second that got their session."""
        return self.connected / self.connect_s if self.connect_s else 0.0

    @property
    def request_rate(self) -> float:
        """Requests of the load a second that were answered with what had been sent."""
        return self.record.tallies[Kind.LOAD].equal / self.load_s if self.load_s else 0.0


_NAMES: Final = {
    Kind.OPEN: "requests for a session",
    Kind.JOIN: "first uses of a shared session",
    Kind.LOAD: "requests of the load",
    Kind.LAST: "last requests",
    Kind.CLOSE: "requests to close a session",
}
