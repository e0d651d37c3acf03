"""Outages are reported, unless the store is away by order and comes back soon."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stores.service.harness import Log
from zcproto.sessions.health import NEVER, HealthAlert
from zcproto.stores.sync import HOLD_S, OutageFigures, OutageReport


class Reported(OutageReport):
    """A report of an outage, with the events that it has reported and the lines that it has logged."""

    def __init__(self, log: Log) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._lines = log
        super().__init__(
            lambda: OutageFigures("it is gone", 7, 2),
            lambda event, values: self.events.append((event, dict(values))),
        )

    @property
    def reported(self) -> list[str]:
        return [name for name, _ in self.events]

    @property
    def logged(self) -> list[str]:
        return self._lines.events


@pytest.fixture
def report(log: Log) -> Reported:
    return Reported(log)


def test_outage_is_logged_at_once_and_raises_an_alert_if_it_lasts(report: Reported) -> None:
    report.handle(HealthAlert.BEGAN, 10.0)
    assert (report.reported, report.logged) == ([], ["store.degraded"])
    assert report.next_deadline() == 10.0 + HOLD_S
    report.handle_time(10.0 + HOLD_S)
    assert report.events == [("store.degraded", {"reason": "it is gone", "sessions": 7})]
    report.handle(HealthAlert.GRACE_OVER, 20.0)
    assert report.next_deadline() == NEVER
    report.end(22.5, 12.5, 3)
    assert len(report.events) == 2
    report.handle_time(22.5 + HOLD_S)
    assert report.events[1:] == [
        ("store.grace_over", {"reason": "it is gone"}),
        ("store.recovered", {"seconds": 12.5, "replayed": 3}),
    ]
    assert report.reported == report.logged


@pytest.mark.parametrize(("is_slow", "name"), [(True, "store.slow"), (False, "store.degraded")])
def test_short_outage_raises_no_alert(report: Reported, is_slow: bool, name: str) -> None:
    for now in (10.0, 100.0, 200.0):
        report.handle(HealthAlert.BEGAN, now, is_slow=is_slow)
        report.handle(HealthAlert.GRACE_OVER, now, is_slow=is_slow)
        report.handle_time(now + HOLD_S - 0.1)
        report.end(now + HOLD_S - 0.1, HOLD_S - 0.1, 0)
    assert (report.reported, report.logged) == ([], [name, "store.grace_over", "store.recovered"] * 3)


def test_slow_store_is_degraded_after_a_while(report: Reported) -> None:
    report.handle(HealthAlert.BEGAN, 10.0, is_slow=True)
    report.handle_time(10.0 + HOLD_S)
    report.end(10.0 + HOLD_S, HOLD_S, 0)
    report.handle_time(10.0 + 2 * HOLD_S)
    assert (report.reported, report.logged) == (
        ["store.degraded", "store.recovered"],
        ["store.slow", "store.degraded", "store.recovered"],
    )


@pytest.mark.parametrize("is_slow", [True, False])
def test_store_that_fails_again_and_again_raises_an_alert(report: Reported, is_slow: bool) -> None:
    for now in (10.0, 30.0, 69.0):
        report.handle(HealthAlert.BEGAN, now, is_slow=is_slow)
        report.end(now, 1.0, 0)
    assert report.reported == ([] if is_slow else ["store.degraded"])


def test_alert_of_a_store_that_comes_and_goes_stays_open(report: Reported) -> None:
    now = 10.0
    report.handle(HealthAlert.BEGAN, now)
    for _ in range(20):
        report.handle_time(now + HOLD_S)
        now += HOLD_S + 0.2
        report.end(now, HOLD_S, 0)
        assert report.next_deadline() == now + HOLD_S
        now += HOLD_S - 0.1
        report.handle_time(now)
        report.handle(HealthAlert.BEGAN, now)
    assert {*report.reported} == {"store.degraded"}
    report.end(now + 0.2, 0.2, 0)  # shorter than what raises an alert
    report.handle_time(now + 0.2 + HOLD_S)
    assert report.events[-1] == ("store.recovered", {"seconds": 0.2, "replayed": 0})
    assert report.next_deadline() == NEVER


def test_store_that_is_away_by_order_raises_no_alert(report: Reported) -> None:
    report.expect(10.0)
    assert report.next_deadline() == NEVER
    report.handle(HealthAlert.BEGAN, 10.1)
    report.handle(HealthAlert.GRACE_OVER, 10.2)
    assert report.next_deadline() == 10.1 + HOLD_S
    report.handle_time(10.0 + HOLD_S)
    report.end(10.5, 0.4, 0)
    assert (report.reported, report.logged) == ([], ["store.moved"])
    assert report.next_deadline() == NEVER
    report.handle(HealthAlert.BEGAN, 11.0)  # it is still busy with its start
    report.handle_time(10.5 + HOLD_S)
    assert report.events == []
    report.handle_time(11.0 + HOLD_S)
    assert report.reported == ["store.degraded"]
    report.end(11.0 + HOLD_S, 5.0, 0)
    report.handle_time(11.0 + 2 * HOLD_S)
    report.handle(HealthAlert.BEGAN, 12.0 + 2 * HOLD_S)
    report.handle_time(12.0 + 3 * HOLD_S)
    assert report.reported == ["store.degraded", "store.recovered", "store.degraded"]


def test_order_that_is_repeated_does_not_extend_an_outage(report: Reported) -> None:
    for second in range(10):
        report.expect(10.0 + second)
    report.handle(HealthAlert.BEGAN, 19.5)
    report.expect(20.0)
    assert report.next_deadline() == 19.5 + HOLD_S
    report.handle_time(19.5 + HOLD_S)
    assert report.reported == ["store.degraded"]
    report.handle(HealthAlert.GRACE_OVER, 25.0)
    assert report.reported == ["store.degraded", "store.grace_over"]


def test_store_that_is_away_for_too_long_is_an_outage(report: Reported) -> None:
    report.expect(10.0)
    report.handle(HealthAlert.BEGAN, 10.1)
    report.handle(HealthAlert.GRACE_OVER, 12.0)
    report.handle_time(10.1 + HOLD_S)
    report.handle_time(11.0 + HOLD_S)
    report.end(19.1, 9.0, 0)
    report.handle_time(19.1 + HOLD_S)
    expected = ["store.degraded", "store.grace_over", "store.recovered"]
    assert (report.reported, report.logged) == (expected, expected)
