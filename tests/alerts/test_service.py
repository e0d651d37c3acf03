"""Test the alert service: counters, failing sinks, floods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from zcproto.alerts import AlertKind, Severity
from zcproto.alerts import sinks as sinks_module
from zcproto.alerts.center import BURST, MANY_DELAY_S
from zcproto.alerts.service import ServerAlerts
from zcproto.alerts.sinks import DOWN_AFTER, Undelivered
from zcproto.config.model import AlertsConfig
from zcproto.runtime.alert_sources import BY_SCANNERS, SCANNERS_FACTOR
from zcproto.tls.failure import TlsFailure


class FakeSink:
    """A sink that accepts every message, or none while it is broken."""

    where = "nowhere"

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken = False
        self.taken: list[dict[str, Any]] = []

    async def deliver(self, body: bytes) -> str:
        if self.broken:
            raise Undelivered("broken", tries=DOWN_AFTER)
        self.taken.append(json.loads(body))
        return ""

    def messages(self) -> list[tuple[str, str]]:
        return [(each["alert"]["kind"], each["phase"]) for each in self.taken]


def entropy(size: int) -> bytes:
    return bytes(size)


def harness(clock: FakeClock, *sinks: FakeSink, **settings: Any) -> ServerAlerts:
    return ServerAlerts(AlertsConfig(**settings), sinks, clock=clock, entropy=entropy, source="here:7443")


def open_kinds(alerts: ServerAlerts) -> list[AlertKind]:
    return [alert.kind for alert in alerts.center.open_alerts()]


def test_fast_growing_counter_is_an_alert_until_quiet(clock: FakeClock) -> None:
    alerts, count = harness(clock), 0
    alerts.watch(AlertKind.LOGINS_THROTTLED, lambda: count, 10, lambda many: f"{many} of them", "x")
    for _ in range(10):
        count += 1
        clock.advance(1)
        alerts.tick()
    (alert,) = alerts.center.open_alerts()
    assert (alert.kind, alert.about, alert.title) == (AlertKind.LOGINS_THROTTLED, "x", "10 of them")
    assert alert.details == {"in_window": 10, "window_s": 300.0, "threshold": 10}
    for _ in range(1_300):
        clock.advance(1)
        alerts.tick()
    assert alerts.center.open_alerts() == []
    assert alerts.report()["over"][0]["kind"] == "login.throttled"


def test_threshold_of_zero_disables_alert(clock: FakeClock) -> None:
    alerts = harness(clock)
    alerts.watch(AlertKind.LOGINS_THROTTLED, lambda: 1_000_000, 0, str)
    alerts.tick()
    assert open_kinds(alerts) == []


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks_module, "FIRST_DELAY_S", 0.0)


@pytest.mark.usefixtures("no_backoff")
async def test_failing_sink_is_reported_by_others(clock: FakeClock) -> None:
    webhook, command = FakeSink("webhook"), FakeSink("command")
    alerts = harness(clock, webhook, command)
    webhook.broken = True
    alerts.start()
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is out")
    queue = alerts.queues[0]
    await _until(lambda: queue.lost == 1 and len(command.taken) == 2)
    assert command.messages() == [("store.degraded", "began"), ("alerts.undelivered", "began")]
    assert command.taken[1]["alert"]["title"] == "alerts do not reach the webhook: broken"
    assert alerts.report()["sinks"][0] == {
        **{"name": "webhook", "down": True, "waiting": 0, "delivered": 0},
        **{"failures": DOWN_AFTER, "lost": 1},
    }
    webhook.broken = False
    alerts.resolve(AlertKind.STORE_DEGRADED, "it is back")
    await _until(lambda: len(webhook.taken) == 2 and len(command.taken) == 4)
    await alerts.stop()
    assert webhook.messages() == [("store.degraded", "ended"), ("alerts.undelivered", "ended")]
    assert open_kinds(alerts) == []


@pytest.mark.usefixtures("no_backoff")
async def test_sink_that_stays_down_is_reported_once(clock: FakeClock) -> None:
    webhook, command = FakeSink("webhook"), FakeSink("command")
    alerts = harness(clock, webhook, command)
    webhook.broken = True
    alerts.start()
    for number in range(5):
        alerts.raise_(AlertKind.CERTIFICATE_FILES, "it is bad", about=str(number))
    await _until(lambda: alerts.queues[0].lost == 5)
    await _until(lambda: len(command.taken) == 6)
    await alerts.stop()
    assert [kind for kind, _ in command.messages()].count("alerts.undelivered") == 1


async def deliver_all(alerts: ServerAlerts) -> None:
    """Deliver every queued message."""
    alerts.start()
    await _until(lambda: not any(map(len, alerts.queues)))
    await alerts.stop()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_messages_have_unique_ids_and_source(clock: FakeClock) -> None:
    alerts = harness(clock, sink := FakeSink("webhook"))
    alerts.raise_(AlertKind.TEST, "one")
    alerts.raise_(AlertKind.STORE_DEGRADED, "two")
    assert sink.taken == []
    await deliver_all(alerts)
    assert [each["id"] for each in sink.taken] == ["0000000000000000-1", "0000000000000000-2"]
    assert {each["source"] for each in sink.taken} == {"here:7443"}


def test_alerts_are_logged(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    alerts = harness(clock)
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is out\x1b[31m", details={"session_token": "hunter2"})
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is worse", changed=True)
    clock.advance(86_400)
    alerts.tick()
    alerts.resolve(AlertKind.STORE_DEGRADED)
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        *(("alert.began", "error"), ("alert.changed", "error"), ("alert.reminder", "error"))
    ]
    assert (lines[0]["kind"], lines[0]["severity"], lines[0]["count"]) == ("store.degraded", "error", 1)
    assert "hunter2" not in err
    assert "\\u001b" not in err


@pytest.mark.parametrize(
    ("severity", "level"),
    [(Severity.WARNING, "warning"), (Severity.ERROR, "error"), (Severity.CRITICAL, "error")],
)
def test_level_in_the_log_follows_the_severity(
    severity: Severity, level: str, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    alerts = harness(clock)
    alerts.raise_(AlertKind.ISSUER_KEYS, "they cannot be fetched", severity=severity)
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["event"], line["level"]) == ("alert.began", level)


def test_flood_of_alerts_is_few_messages(clock: FakeClock) -> None:
    alerts = harness(clock, FakeSink("webhook"))
    for number in range(10_000):
        alerts.raise_(AlertKind.REFRESH_REUSED, "stolen", about=f"session {number}")
    clock.advance(MANY_DELAY_S)
    alerts.tick()
    assert len(alerts.queues[0]) == BURST + 1
    assert len(json.dumps(alerts.report())) < 100_000


def test_causes_of_scanners_have_higher_threshold() -> None:
    assert SCANNERS_FACTOR > 1
    assert TlsFailure.NOT_TLS in BY_SCANNERS
    assert not BY_SCANNERS & {
        *(TlsFailure.PEER_REJECTED_CERTIFICATE, TlsFailure.CERTIFICATE_EXPIRED, TlsFailure.PIN_MISMATCH)
    }


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(
    st.lists(
        st.tuples(st.sampled_from(AlertKind), st.text(), st.text(), st.dictionaries(st.text(), ANYTHING))
    )
)
@settings(max_examples=50, deadline=None)
def test_raising_any_alert_never_fails(
    raised: list[tuple[AlertKind, str, str, dict[str, Any]]],
) -> None:
    alerts = harness(FakeClock(), sink := FakeSink("webhook"))
    for kind, title, about, details in raised:
        alerts.raise_(kind, title, about=about, details=details)
        alerts.resolve(kind, title, about=about, details=details)
    asyncio.run(deliver_all(alerts))
    assert bool(sink.taken) is bool(raised)
    for alert in (each["alert"] for each in sink.taken):
        assert (alert["title"] + alert["about"]).isprintable()
    json.dumps(alerts.report())
