"""Logs the outages of a store and raises their alerts.

Rules:
- An alert is raised for an outage that lasts longer than HOLD_S. A shorter one is in the log: as `store.slow` if it
  began with an answer that was late, as on a busy machine, else as `store.degraded`. The third of those within a
  minute raises the alert at once: the store answers probes and nothing else, as on a full disk.
- An outage that begins soon after an order to be away (ChangeKind.AWAY), as in an upgrade, is logged only if it
  lasts longer, too. The store may come back in several attempts, since its new process is busy with its start.

It must not know: the store, what an outage means for sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from zcproto.observe.log import get_logger
from zcproto.sessions.health import NEVER, STEADY_S, HealthAlert

HOLD_S: Final = 5.0
"""Seconds after which an outage is an alert, and after an order in which it may begin. A new process opens the
store in less than a second."""

REPEATED: Final = 3

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
        self._away_until = self._alert_at = 0.0
        self._is_ordered = False
        self._is_logged = False
        self._has_alert = False
        self._held: list[HealthAlert] = []
        self._recent: deque[float] = deque(maxlen=REPEATED)
        self._unlogged: set[HealthAlert] = set()

    def expect(self, now: float) -> None:
        """Note that the store will be away, or busy, by order."""
        self._away_until = now + HOLD_S

    def handle(self, alert: HealthAlert, now: float, *, is_slow: bool = False) -> None:
        """Log that an outage has begun, by a late answer or otherwise, or that its grace is over."""
        if alert is HealthAlert.BEGAN:
            self._is_ordered = now < self._away_until
            self._is_logged = self._has_alert = False
            self._alert_at = now + HOLD_S
            if not is_slow and not self._is_ordered:
                self._recent.append(now)
                if len(self._recent) == REPEATED and now - self._recent[0] <= STEADY_S:
                    self._alert_at = now
        self._held.append(alert)
        self._unlogged.add(alert)
        if not self._is_ordered or now >= self._alert_at:
            if is_slow and alert is HealthAlert.BEGAN:
                reason, sessions, pending = self._read()
                log.warning("store.slow", reason=reason, sessions=sessions, pending=pending)
                self._is_logged = True
            else:
                self._log(alert)
        self.handle_time(now)

    def handle_time(self, now: float) -> None:
        """Raise the alerts that were held back, if the outage has lasted for long enough."""
        if now < self._alert_at:
            return
        held, self._held = self._held, []
        for alert in held:
            self._log(alert)
            reason, sessions, _ = self._read()
            self._has_alert = True
            if alert is HealthAlert.BEGAN:
                self._on_event("store.degraded", {"reason": reason, "sessions": sessions})
            else:
                self._on_event("store.grace_over", {"reason": reason})

    def _log(self, alert: HealthAlert) -> None:
        if alert not in self._unlogged:
            return
        self._unlogged.discard(alert)
        self._is_logged = True
        reason, sessions, pending = self._read()
        if alert is HealthAlert.BEGAN:
            log.error("store.degraded", reason=reason, sessions=sessions, pending=pending)
        else:
            log.error("store.grace_over", reason=reason)

    def next_deadline(self) -> float:
        """Return the latest time for the next call of `handle_time`, or NEVER."""
        return self._alert_at if self._held else NEVER

    def end(self, seconds: float, replayed: int) -> None:
        """Report that an outage has ended after so many seconds, with so many revocations that waited."""
        self._held.clear()
        self._unlogged.clear()
        if self._is_logged:
            log.warning("store.recovered", seconds=seconds, replayed=replayed)
        else:
            log.info("store.moved", seconds=seconds)
        if self._has_alert:
            self._on_event("store.recovered", {"seconds": seconds, "replayed": replayed})
