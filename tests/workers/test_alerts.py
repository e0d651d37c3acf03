"""Alerts of several workers, raised as those of one server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import FakeClock
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.service import ServerAlerts
from zcproto.config.model import AlertsConfig
from zcproto.workers.alerts import MAX_WAITING, WorkerAlerts, WorkerReports

QUIET = AlertKind.REFRESH_REUSED
CONDITION = AlertKind.STORE_DEGRADED
RATE = AlertKind.LOGINS_THROTTLED


class Reporting:
    """Two workers, and the process that raises their alerts."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.is_away = False
        self.replace()
        self.workers = [
            WorkerAlerts(AlertsConfig(), self.notify_of(name), clock=clock, entropy=bytes) for name in "ab"
        ]

    def replace(self) -> None:
        """Start another process that raises the alerts."""
        self.alerts = ServerAlerts(AlertsConfig(), [], clock=self.clock, entropy=bytes)
        self.reports = WorkerReports(self.alerts)
        self.alerts.watch(RATE, lambda: 0, 10, lambda count: f"{count} logins were throttled")

    def notify_of(self, name: str) -> Any:
        def notify(topic: str, *arguments: Any) -> bool:
            if not self.is_away:
                self.reports.topics[topic](name, *arguments)
            return not self.is_away

        return notify

    @property
    def open(self) -> list[tuple[AlertKind, str, int]]:
        return [(each.kind, each.about, each.count) for each in self.alerts.center.open_alerts()]


@pytest.fixture
def reporting(clock: FakeClock) -> Reporting:
    return Reporting(clock)


def test_alert_of_a_worker_is_raised_with_all_its_values(reporting: Reporting) -> None:
    reporting.workers[0].raise_(
        CONDITION, "out\nof order", about="x", severity=Severity.CRITICAL, count=3, details={"reason": "full"}
    )
    (alert,) = reporting.alerts.center.open_alerts()
    assert (alert.title, alert.about, alert.severity, alert.count) == (
        "out\\nof order",
        "x",
        Severity.CRITICAL,
        3,
    )
    assert alert.details == {"reason": "full"}
    assert reporting.workers[0].report()["open"] == []


def test_alerts_of_one_event_in_several_workers_are_one_alert(reporting: Reporting) -> None:
    for worker in reporting.workers:
        worker.raise_(QUIET, "reused", about="session")
    assert reporting.open == [(QUIET, "session", 2)]


def test_condition_ends_when_the_last_worker_has_resolved_it(reporting: Reporting) -> None:
    one, other = reporting.workers
    one.raise_(CONDITION, "out")
    other.raise_(CONDITION, "out")
    one.resolve(CONDITION, "back")
    assert reporting.open == [(CONDITION, "", 2)]
    other.resolve(CONDITION, "back")
    assert reporting.open == []
    one.resolve(CONDITION)  # was not open
    assert reporting.open == []


def test_condition_of_a_worker_that_has_ended_is_over(reporting: Reporting) -> None:
    for worker in reporting.workers:
        worker.raise_(CONDITION, "out")
    reporting.workers[0].raise_(QUIET, "reused", about="session")
    reporting.reports.link_lost("a")
    assert reporting.open == [(QUIET, "session", 1), (CONDITION, "", 2)]
    reporting.reports.link_lost("b")
    assert reporting.open == [(QUIET, "session", 1)]


def test_conditions_and_waiting_events_reach_a_process_that_replaces_another(reporting: Reporting) -> None:
    worker = reporting.workers[0]
    worker.raise_(CONDITION, "out")
    worker.raise_(CONDITION, "out", about="over soon")
    reporting.is_away = True
    worker.resolve(CONDITION, about="over soon")
    worker.raise_(QUIET, "reused", about="session")
    reporting.replace()
    reporting.is_away = False
    worker.link_made()
    worker.link_made()
    assert reporting.open == [(QUIET, "session", 1), (CONDITION, "", 2)]


def test_what_waits_is_bounded(reporting: Reporting) -> None:
    worker = reporting.workers[0]
    reporting.is_away = True
    for number in range(2 * MAX_WAITING):
        worker.raise_(QUIET, "reused", about=str(number))
        worker.raise_(CONDITION, "out", about=str(number))
    assert (len(worker._waiting), len(worker._conditions)) == (MAX_WAITING, MAX_WAITING)


def test_conditions_of_all_workers_are_bounded(reporting: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.workers.alerts.MAX_CONDITIONS", 1)
    one, other = reporting.workers
    for worker in (one, other):
        worker.raise_(CONDITION, "out", about="tracked")
        worker.raise_(CONDITION, "out", about="too many")
    for about in ("tracked", "too many"):
        one.resolve(CONDITION, about=about)
    assert reporting.open == [(CONDITION, "tracked", 2)]


def test_growth_of_a_counter_is_added_up_over_workers(reporting: Reporting) -> None:
    counts = [0, 0]
    for number, worker in enumerate(reporting.workers):
        worker.watch(RATE, lambda number=number: counts[number], 10, str)  # type: ignore[misc]
    for counts[0], counts[1] in ((4, 0), (4, 5), (5, 5)):
        for worker in reporting.workers:
            worker.tick()
        assert reporting.open == []
        reporting.alerts.tick()
        reporting.clock.advance(1)
    assert [(kind, count) for kind, _, count in reporting.open] == [(RATE, 1)]
    assert reporting.alerts.center.open_alerts()[0].title == "10 logins were throttled"


def test_growth_while_the_other_process_is_away_is_reported_later(reporting: Reporting) -> None:
    worker, count = reporting.workers[0], 7
    worker.watch(RATE, lambda: count, 10, str)
    reporting.is_away = True
    worker.tick()
    reporting.is_away = False
    count = 12
    worker.tick()
    worker.tick()
    reporting.alerts.tick()
    assert reporting.alerts.center.open_alerts()[0].title == "12 logins were throttled"


def test_growth_before_another_threshold_is_of_another_window(reporting: Reporting) -> None:
    reporting.alerts.reported[RATE, ""] = 9
    reporting.alerts.watch(RATE, lambda: 0, 5, str)
    reporting.alerts.tick()
    assert reporting.open == []


def test_worker_takes_another_configuration_and_no_sinks(reporting: Reporting) -> None:
    worker = reporting.workers[0]
    worker.reconfigure(AlertsConfig(revocations="any"), [object()])
    assert (worker.config.revocations, worker.queues) == ("any", [])


def test_kinds_and_severities_of_a_newer_worker_are_ignored(reporting: Reporting) -> None:
    topics = reporting.reports.topics
    topics["alerts.raised"]("a", "of tomorrow", "new", "", None, False, 1, {})
    topics["alerts.grew"]("a", [["of tomorrow", "", 100], [RATE.value, "", 1]])
    topics["alerts.resolved"]("a", "of tomorrow")
    assert reporting.open == []
    assert reporting.alerts.reported == {(RATE, ""): 1}
    topics["alerts.raised"]("a", CONDITION.value, "out", "", 99, False, 1, {})
    assert reporting.open == [(CONDITION, "", 1)]
