"""Logs the outages of a store and raises their alerts.

Rule: an outage that begins soon after an order to be away (ChangeKind.AWAY), as in an upgrade, is reported only if
it lasts too long. The store may come back in several attempts, since its new process is busy with its start.

It must not know: the store, what an outage means for sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from zcproto.observe.log import get_logger
from zcproto.sessions.health import NEVER, HealthAlert

AWAY_S: Final = 5.0
"""How soon after the order, and how long. A new process opens the store in less than a second."""

log = get_logger("zcproto.store")


class OutageFigures(NamedTuple):
    """Why the store fails, the sessions that are known, and the revocations that wait for it."""

    reason: str
    sessions: int
    pending: int


class OutageReport:
    """The report of one store's outages. Times are monotonic seconds; `read` returns the figures of a report.

    `on_event` is called with the name and the values of a log event that may raise an alert.
    """

    def __init__(
        self, read: Callable[[], OutageFigures], on_event: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._read = read
        self._on_event = on_event
        self._away_until = self._report_at = 0.0
        self._held: list[HealthAlert] = []

    def expect(self, now: float) -> None:
        """Note that the store will be away, or busy, by order."""
        self._away_until = now + AWAY_S

    def handle(self, alert: HealthAlert, now: float) -> None:
        """Report that an outage has begun, or that its grace is over; or hold that back."""
        if not self._held:
            self._report_at = now + AWAY_S if now < self._away_until else now
        self._held.append(alert)
        self.handle_time(now)

    def handle_time(self, now: float) -> None:
        """Report what was held back, if the store has been away for too long."""
        if now < self._report_at:
            return
        held, self._held = self._held, []
        for alert in held:
            reason, sessions, pending = self._read()
            if alert is HealthAlert.BEGAN:
                log.error("store.degraded", reason=reason, sessions=sessions, pending=pending)
                self._on_event("store.degraded", {"reason": reason, "sessions": sessions})
            else:
                log.error("store.grace_over", reason=reason)
                self._on_event("store.grace_over", {"reason": reason})

    def next_deadline(self) -> float:
        """Return the latest time for the next call of `handle_time`, or NEVER."""
        return self._report_at if self._held else NEVER

    def end(self, seconds: float, replayed: int) -> None:
        """Report that an outage has ended after so many seconds, with so many revocations that waited."""
        was_reported = not self._held
        self._held.clear()
        if was_reported:
            log.warning("store.recovered", seconds=seconds, replayed=replayed)
            self._on_event("store.recovered", {"seconds": seconds, "replayed": replayed})
        else:
            log.info("store.moved", seconds=seconds)
