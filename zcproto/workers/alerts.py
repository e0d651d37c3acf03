"""Alerts of several workers, raised as those of one server.

    WorkerAlerts.raise_, resolve, tick -> notices -> WorkerReports -> ServerAlerts of one process -> log, sinks

Rules:
- An alert about a condition ends when no worker has the condition any more, or when the worker has ended.
- Counters are read once a second in each worker; the alerts evaluate the sum of their growth.
- While the other process is away, the last events wait. Conditions are reported again when it is back, because
  another process may have replaced it.
- A kind that this version does not know is ignored: during an upgrade a newer worker may report one.

It must not know: the link between the processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from zcproto.alerts import CATALOGUE, AlertKind, Ending, Severity
from zcproto.alerts.alert import MAX_ABOUT, MAX_TITLE, clean_details, clean_text
from zcproto.alerts.service import NO_DETAILS, ServerAlerts
from zcproto.common.clock import Clock, Entropy
from zcproto.config.model import AlertsConfig

RAISED: Final = "alerts.raised"
RESOLVED: Final = "alerts.resolved"
GREW: Final = "alerts.grew"

MAX_WAITING: Final = 256
"""Events that wait for the other process, and conditions of one worker that are reported again."""

MAX_CONDITIONS: Final = 4_096
"""Conditions of all workers; further ones end when one worker says so."""

_SEVERITIES: Final = frozenset(Severity)

Notify = Callable[..., bool]
"""Sends a topic and its arguments; returns False if that is not possible now."""


class WorkerAlerts(ServerAlerts):
    """The alerts of a worker, which another process logs and delivers."""

    def __init__(self, config: AlertsConfig, notify: Notify, *, clock: Clock, entropy: Entropy) -> None:
        super().__init__(config, [], clock=clock, entropy=entropy)
        self._notify = notify
        self._waiting: deque[list[Any]] = deque(maxlen=MAX_WAITING)
        self._conditions: dict[tuple[AlertKind, str], list[Any]] = {}
        self._counters: dict[tuple[AlertKind, str], Callable[[], int]] = {}
        self._reported: dict[tuple[AlertKind, str], int] = {}

    def link_made(self, *_: object) -> None:
        """Report what waits, and the conditions that hold, to a process that can be reached again."""
        waiting = [*self._waiting, *self._conditions.values()]
        self._waiting.clear()
        for arguments in waiting:
            self._notify(RAISED, *arguments)

    def reconfigure(self, config: AlertsConfig, sinks: object = ()) -> None:
        """Apply another configuration. The sinks are those of the other process."""
        self.config = config

    def raise_(
        self,
        kind: AlertKind,
        title: str,
        *,
        about: str = "",
        severity: Severity | None = None,
        changed: bool = False,
        count: int = 1,
        details: Mapping[str, object] = NO_DETAILS,
    ) -> None:
        about = clean_text(about, MAX_ABOUT)
        level = None if severity is None else int(severity)
        shown = clean_text(title, MAX_TITLE), clean_details(details)
        arguments: list[Any] = [kind.value, shown[0], about, level, changed, count, shown[1]]
        if CATALOGUE[kind].ending is Ending.RESOLVED:
            if len(self._conditions) < MAX_WAITING:
                self._conditions[kind, about] = arguments
            self._notify(RAISED, *arguments)
        elif not self._notify(RAISED, *arguments):
            self._waiting.append(arguments)

    def resolve(
        self, kind: AlertKind, title: str = "", *, about: str = "", details: Mapping[str, object] = NO_DETAILS
    ) -> None:
        about = clean_text(about, MAX_ABOUT)
        self._conditions.pop((kind, about), None)
        self._notify(RESOLVED, kind.value, clean_text(title, MAX_TITLE), about, clean_details(details))

    def watch(
        self,
        kind: AlertKind,
        read: Callable[[], int],
        threshold: int,
        title: Callable[[int], str],
        about: str = "",
    ) -> None:
        """Report the growth of a counter; the other process has the threshold."""
        self._counters[kind, about] = read
        self._reported.setdefault((kind, about), 0)

    def tick(self) -> None:
        """Report how much the counters have grown."""
        totals = {key: read() for key, read in self._counters.items()}
        grown = [
            [kind.value, about, total - self._reported[kind, about]]
            for (kind, about), total in totals.items()
            if total > self._reported[kind, about]
        ]
        if grown and self._notify(GREW, grown):
            self._reported = totals


class WorkerReports:
    """What workers report to the alerts of their server. Its methods are handlers of notices by `topics`."""

    def __init__(self, alerts: ServerAlerts) -> None:
        self._alerts = alerts
        self._conditions: dict[tuple[AlertKind, str], set[object]] = {}
        self.topics: dict[str, Callable[..., None]] = {
            RAISED: self.raised,
            RESOLVED: self.resolved,
            GREW: self.grew,
        }

    def raised(
        self,
        link: object,
        kind: str,
        title: str,
        about: str,
        severity: int | None,
        changed: bool,
        count: int,
        details: Mapping[str, object],
    ) -> None:
        """Raise an alert of the worker behind `link`."""
        which = _known(kind)
        if which is None:
            return
        key = which, about
        if CATALOGUE[which].ending is Ending.RESOLVED:
            if key in self._conditions:
                self._conditions[key].add(link)
            elif len(self._conditions) < MAX_CONDITIONS:
                self._conditions[key] = {link}
        self._alerts.raise_(
            which,
            title,
            about=about,
            severity=Severity(severity) if severity in _SEVERITIES else None,
            changed=changed,
            count=count,
            details=details,
        )

    def resolved(
        self,
        link: object,
        kind: str,
        title: str = "",
        about: str = "",
        details: Mapping[str, object] = NO_DETAILS,
    ) -> None:
        """End an alert, unless another worker still has its condition."""
        which = _known(kind)
        if which is None:
            return
        key = which, about
        workers = self._conditions.get(key)
        if workers is not None:
            workers.discard(link)
            if workers:
                return
            del self._conditions[key]
        self._alerts.resolve(which, title, about=about, details=details)

    def grew(self, link: object, counts: list[list[Any]]) -> None:
        """Add to the counters whose growth is watched."""
        for kind, about, count in counts:
            which = _known(kind)
            if which is not None:
                self._alerts.reported[which, about] += count

    def link_lost(self, link: object) -> None:
        """End the conditions of a worker that has ended."""
        for (kind, about), workers in list(self._conditions.items()):
            if link in workers:
                self.resolved(link, kind.value, about=about)


def _known(kind: str) -> AlertKind | None:
    try:
        return AlertKind(kind)
    except ValueError:
        return None


def on_process_ended(alerts: ServerAlerts, name: str, reason: str) -> None:
    """Raise the alert of a process of a server with workers that ended unexpectedly."""
    process = name if name == "coordinator" else f"worker {name}"
    title = f"a process of the server, {process}, has ended and was started again: {reason}"
    alerts.raise_(AlertKind.WORKER_ENDED, title, about=process)
