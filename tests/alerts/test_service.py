"""The alerts of a server, without one: counters that are judged, sinks that fail, floods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock
from zcproto.alerts import AlertKind
from zcproto.alerts.center import BURST, MANY_DELAY_S
from zcproto.alerts.service import ServerAlerts
from zcproto.alerts.sinks import DOWN_AFTER, Undelivered
from zcproto.config import AlertsConfig
from zcproto.runtime.alert_sources import BY_SCANNERS, SCANNERS_FACTOR
from zcproto.tls.failure import TlsFailure


class Taking:
    """A sink that takes all, or nothing while it is broken."""

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

    def told(self) -> list[tuple[str, str]]:
        return [(each["alert"]["kind"], each["phase"]) for each in self.taken]


def entropy(size: int) -> bytes:
    return bytes(size)


def desk(clock: FakeClock, *sinks: Taking, **settings: Any) -> ServerAlerts:
    return ServerAlerts(AlertsConfig(**settings), sinks, clock=clock, entropy=entropy, source="here:7443")


def open_kinds(alerts: ServerAlerts) -> list[AlertKind]:
    return [alert.kind for alert in alerts.center.open_alerts()]


def test_a_counter_that_grows_fast_is_an_alert_until_it_is_quiet(clock: FakeClock) -> None:
    alerts, count = desk(clock, rate_window=60.0, quiet=120.0), 0
    alerts.watch(AlertKind.LOGINS_THROTTLED, lambda: count, 10, lambda many: f"{many} of them", "x")
    for _ in range(10):
        count += 1
        clock.advance(1)
        alerts.tick()
    (alert,) = alerts.center.open_alerts()
    assert (alert.kind, alert.about, alert.title) == (AlertKind.LOGINS_THROTTLED, "x", "10 of them")
    assert alert.details == {"in_window": 10, "window_s": 60.0, "threshold": 10}
    for _ in range(300):
        clock.advance(1)
        alerts.tick()
    assert alerts.center.open_alerts() == []
    assert alerts.report()["over"][0]["kind"] == "login.throttled"


def test_a_threshold_of_nothing_is_no_alert(clock: FakeClock) -> None:
    alerts = desk(clock)
    alerts.watch(AlertKind.LOGINS_THROTTLED, lambda: 1_000_000, 0, str)
    alerts.tick()
    assert open_kinds(alerts) == []


async def test_that_a_sink_is_down_is_told_by_the_others(clock: FakeClock) -> None:
    webhook, command = Taking("webhook"), Taking("command")
    alerts = desk(clock, webhook, command)
    for queue in alerts.queues:
        queue._sleep = lambda seconds: _no_time()
    webhook.broken = True
    alerts.start()
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is out")
    queue = alerts.queues[0]
    await _until(lambda: queue.lost == 1 and len(command.taken) == 2)
    assert command.told() == [("store.degraded", "began"), ("alerts.undelivered", "began")]
    assert command.taken[1]["alert"]["title"] == "alerts do not reach the webhook: broken"
    assert alerts.report()["sinks"][0] == {
        **{"name": "webhook", "down": True, "waiting": 0, "delivered": 0},
        **{"failures": DOWN_AFTER, "lost": 1},
    }
    webhook.broken = False
    alerts.resolve(AlertKind.STORE_DEGRADED, "it is back")
    await _until(lambda: len(webhook.taken) == 2 and len(command.taken) == 4)
    await alerts.stop()
    assert webhook.told() == [("store.degraded", "ended"), ("alerts.undelivered", "ended")]
    assert open_kinds(alerts) == []


async def test_a_sink_that_stays_down_makes_no_more_messages(clock: FakeClock) -> None:
    webhook, command = Taking("webhook"), Taking("command")
    alerts = desk(clock, webhook, command)
    alerts.queues[0]._sleep = lambda seconds: _no_time()
    webhook.broken = True
    alerts.start()
    for number in range(5):
        alerts.raise_(AlertKind.CERTIFICATE_FILES, "it is bad", about=str(number))
    await _until(lambda: alerts.queues[0].lost == 5)
    await _until(lambda: len(command.taken) == 6)
    await alerts.stop()
    assert [kind for kind, _ in command.told()].count("alerts.undelivered") == 1


async def _no_time() -> None:
    return None


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def test_messages_have_ids_of_their_own_and_say_where_they_are_from(clock: FakeClock) -> None:
    alerts = desk(clock, sink := Taking("webhook"))
    alerts.raise_(AlertKind.TEST, "one")
    alerts.raise_(AlertKind.STORE_DEGRADED, "two")
    bodies = [json.loads(waiting.body) for waiting in alerts.queues[0]._queue]
    assert sink.taken == []
    assert [each["id"] for each in bodies] == ["0000000000000000-1", "0000000000000000-2"]
    assert {each["source"] for each in bodies} == {"here:7443"}


def test_alerts_are_in_the_log(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    alerts = desk(clock)
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is out\x1b[31m", details={"session_token": "hunter2"})
    alerts.raise_(AlertKind.STORE_DEGRADED, "it is worse", changed=True)
    clock.advance(86_400)
    alerts.tick()
    alerts.resolve(AlertKind.STORE_DEGRADED)
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        *(("alert.began", "warning"), ("alert.changed", "warning"), ("alert.reminder", "warning"))
    ]
    assert (lines[0]["kind"], lines[0]["severity"], lines[0]["count"]) == ("store.degraded", "error", 1)
    assert "hunter2" not in err
    assert "\\u001b" not in err


def test_a_flood_of_ten_thousand_is_few_messages(clock: FakeClock) -> None:
    alerts = desk(clock, Taking("webhook"))
    for number in range(10_000):
        alerts.raise_(AlertKind.REFRESH_REUSED, "stolen", about=f"session {number}")
    clock.advance(MANY_DELAY_S)
    alerts.tick()
    assert len(alerts.queues[0]) == BURST + 1
    assert len(json.dumps(alerts.report())) < 100_000


def test_what_scanners_do_has_to_be_more_often() -> None:
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
def test_whatever_is_raised_is_a_message_and_never_a_fault(
    raised: list[tuple[AlertKind, str, str, dict[str, Any]]],
) -> None:
    alerts = desk(FakeClock(), Taking("webhook"))
    for kind, title, about, details in raised:
        alerts.raise_(kind, title, about=about, details=details)
        alerts.resolve(kind, title, about=about, details=details)
    for waiting in alerts.queues[0]._queue:
        alert = json.loads(waiting.body)["alert"]
        assert (alert["title"] + alert["about"]).isprintable()
    json.dumps(alerts.report())
