"""Tests of the alerts raised by each event, without a server."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.helpers import WALL, FakeClock
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts.alert import CATALOGUE, Ending
from zcproto.alerts.service import ServerAlerts
from zcproto.certs.notices import Notice, NoticeKind
from zcproto.config.model import AlertsConfig
from zcproto.runtime.alert_sources import (
    on_certificate_notice,
    on_refresh_reused,
    on_revoked,
    on_store_event,
    on_topics_checked,
)
from zcproto.runtime.background import watch_topics

if TYPE_CHECKING:
    from zcproto.bus.topics import SharedTopics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def alerts(clock: FakeClock) -> ServerAlerts:
    return ServerAlerts(AlertsConfig(), [], clock=clock, entropy=bytes)


def open_now(alerts: ServerAlerts) -> list[tuple[AlertKind, str, Severity]]:
    return [(each.kind, each.about, each.severity) for each in alerts.center.open_alerts()]


def about(alerts: ServerAlerts) -> set[tuple[AlertKind, str]]:
    return {(each.kind, each.about) for each in alerts.center.open_alerts()}


# --- the store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "values", "kind", "named"),
    [
        ("store.degraded", {"reason": "it is full", "sessions": 3}, AlertKind.STORE_DEGRADED, ""),
        ("store.grace_over", {"reason": "it is full"}, AlertKind.STORE_GRACE_OVER, ""),
        ("store.emptied", {"sessions": 3}, AlertKind.STORE_EMPTIED, ""),
        ("store.flushed", {"sessions": 3}, AlertKind.STORE_EMPTIED, ""),
        ("store.misconfigured", {"faults": "it is full of text"}, AlertKind.STORE_MISCONFIGURED, ""),
        (
            "store.record_damaged",
            {"where": "zcp:s:1", "reason": "it is full of text"},
            AlertKind.STORE_RECORD_DAMAGED,
            "zcp:s:1",
        ),
        ("store.damaged", {"path": "/s.db", "aside": "/s.db.damaged-1"}, AlertKind.STORE_DAMAGED, "/s.db"),
        ("store.missing", {"path": "/s.db"}, AlertKind.STORE_DAMAGED, "/s.db"),
        ("revocations.damaged", {"copy": "/r.copy"}, AlertKind.STORE_DAMAGED, "/r.copy"),
        ("revocations.not_kept", {"reason": "it is full", "pending": 9}, AlertKind.REVOCATIONS_NOT_KEPT, ""),
    ],
)
def test_store_event_raises_alert(
    alerts: ServerAlerts, event: str, values: dict[str, Any], kind: AlertKind, named: str
) -> None:
    on_store_event(alerts, event, values)
    (alert,) = alerts.center.open_alerts()
    assert (alert.kind, alert.about, dict(alert.details)) == (kind, named, values)
    if "reason" in values:
        assert "it is full" in alert.title


async def test_process_that_stays_cut_off_from_the_others_raises_an_alert(alerts: ServerAlerts) -> None:
    topics, seen = SimpleNamespace(is_away=False), list[list[AlertKind]]()
    away = iter([True, False, True, True, False])

    async def sleep(seconds: float) -> None:
        seen.append([each.kind for each in alerts.center.open_alerts()])
        topics.is_away = next(away)

    with pytest.raises(RuntimeError):  # of the exhausted iterator
        await watch_topics(cast("SharedTopics", topics), partial(on_topics_checked, alerts), sleep)
    assert seen == [[], [], [], [], [AlertKind.TOPICS_AWAY], []]


def test_mended_configuration_of_the_store_resolves_its_alert(alerts: ServerAlerts) -> None:
    on_store_event(alerts, "store.misconfigured", {"faults": "appendonly is off"})
    (alert,) = alerts.center.open_alerts()
    assert alert.title == "the session store is not configured safely: appendonly is off"
    on_store_event(alerts, "store.misconfigured", {"faults": ""})
    assert alerts.center.open_alerts() == []


def test_store_recovery_resolves_both_alerts(alerts: ServerAlerts) -> None:
    on_store_event(alerts, "store.degraded", {"reason": "it is full"})
    on_store_event(alerts, "store.grace_over", {"reason": "it is full"})
    assert len(alerts.center.open_alerts()) == 2
    on_store_event(alerts, "store.recovered", {"seconds": 3.0, "replayed": 1})
    assert alerts.center.open_alerts() == []
    assert {alert.title for alert in alerts.center.history()} == {"the session store is available again"}


def test_harmless_store_event_raises_no_alert(alerts: ServerAlerts) -> None:
    on_store_event(alerts, "store.close_failed", {"reason": "x"})
    assert alerts.center.open_alerts() == []


# --- certificates -----------------------------------------------------------------------------------------------


def notice(kind: NoticeKind, what: str = "/c.crt", days: int | None = None) -> Notice:
    left = None if days is None else timedelta(days=days)
    return Notice(kind, what, "a sentence", days=days, left=left)


@pytest.mark.requirement("expiry_alerts")
@pytest.mark.parametrize(
    ("days", "severity"),
    [
        *((30, Severity.WARNING), (14, Severity.WARNING), (8, Severity.WARNING)),
        *((7, Severity.ERROR), (3, Severity.ERROR), (2, Severity.ERROR)),
        *((1, Severity.CRITICAL), (0, Severity.CRITICAL)),
    ],
)
def test_certificate_expiry_severity_increases(alerts: ServerAlerts, days: int, severity: Severity) -> None:
    on_certificate_notice(alerts, notice(NoticeKind.EXPIRY, days=days))
    assert open_now(alerts) == [(AlertKind.CERTIFICATE_EXPIRY, "/c.crt", severity)]
    on_certificate_notice(alerts, notice(NoticeKind.EXPIRY_ENDED, "/other.crt", days=90))
    assert len(open_now(alerts)) == 1
    on_certificate_notice(alerts, notice(NoticeKind.EXPIRY_ENDED, days=90))
    assert open_now(alerts) == []


def test_replaced_key_is_an_alert_that_ends_when_quiet(alerts: ServerAlerts) -> None:
    on_certificate_notice(alerts, notice(NoticeKind.KEY_REPLACED, "/server.key"))
    assert open_now(alerts) == [(AlertKind.CERTIFICATE_KEY_REPLACED, "/server.key", Severity.ERROR)]
    assert CATALOGUE[AlertKind.CERTIFICATE_KEY_REPLACED].ending is Ending.QUIET


@pytest.mark.requirement("expiry_alerts")
def test_each_expiry_threshold_sends_a_message(alerts: ServerAlerts) -> None:
    for days in (30, 14, 7, 3, 1, 0):
        on_certificate_notice(alerts, notice(NoticeKind.EXPIRY, days=days))
    assert alerts.center.sent[AlertKind.CERTIFICATE_EXPIRY] == 6


@pytest.mark.parametrize(
    ("begins", "ends", "kind"),
    [
        (NoticeKind.RENEWAL_FAILED, NoticeKind.RENEWAL_RECOVERED, AlertKind.CERTIFICATE_RENEWAL),
        (NoticeKind.FILES_BAD, NoticeKind.FILES_RECOVERED, AlertKind.CERTIFICATE_FILES),
    ],
)
def test_failure_alert_lasts_until_recovery(
    alerts: ServerAlerts, begins: NoticeKind, ends: NoticeKind, kind: AlertKind
) -> None:
    on_certificate_notice(alerts, notice(begins, "/a"))
    on_certificate_notice(alerts, notice(begins, "/b"))
    on_certificate_notice(alerts, notice(begins, "/a"))
    assert about(alerts) == {(kind, "/a"), (kind, "/b")}
    on_certificate_notice(alerts, notice(ends, "/a"))
    assert about(alerts) == {(kind, "/b")}


def test_every_certificate_notice_is_classified(alerts: ServerAlerts) -> None:
    is_raised = {}
    for kind in NoticeKind:
        before = sum(alerts.center.raised.values())
        on_certificate_notice(alerts, notice(kind, days=5))
        is_raised[kind] = sum(alerts.center.raised.values()) > before
    bad = {NoticeKind.EXPIRY, NoticeKind.RENEWAL_FAILED, NoticeKind.FILES_BAD, NoticeKind.KEY_REPLACED}
    assert {kind for kind, raised in is_raised.items() if raised} == bad


# --- sessions ---------------------------------------------------------------------------------------------------


def test_refresh_reuse_raises_one_alert_per_session(alerts: ServerAlerts) -> None:
    for _ in range(3):
        on_refresh_reused(alerts, "abc", "ada", "192.0.2.7")
    on_refresh_reused(alerts, "def", "ada", "192.0.2.8")
    found = {each.about: (each.count, each.details) for each in alerts.center.open_alerts()}
    details = {"user": "ada", "peer": "192.0.2.7"}
    assert found == {"abc": (3, details), "def": (1, {**details, "peer": "192.0.2.8"})}


def test_revocation_of_no_session_raises_no_alert(alerts: ServerAlerts) -> None:
    on_revoked(alerts, "operator ada", 0, False)
    assert alerts.center.open_alerts() == []
    on_revoked(alerts, "operator ada", 2, False)
    (alert,) = alerts.center.open_alerts()
    assert (alert.title, alert.began_at) == ("2 sessions revoked: operator ada", WALL)


# --- all of them ------------------------------------------------------------------------------------------------


def test_every_alert_kind_is_raised_in_the_code() -> None:
    """Every kind of the catalogue must be raised in the source."""
    used: set[str] = set()
    for path in sorted((ROOT / "zcproto").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"\bAlertKind\.([A-Z_]+)", source))
    assert used == {kind.name for kind in AlertKind}
