"""Test which alerts are open and which messages are sent, with a manual clock."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import FakeClock
from zcproto.alerts import CATALOGUE, AlertCenter, AlertKind, Ending, Message, Phase, Severity
from zcproto.alerts.center import (
    BURST,
    HISTORY_S,
    MANY_DELAY_S,
    MANY_REPEAT_S,
    MAX_HISTORY,
    MAX_OPEN,
    REFILL_S,
)

STATE = AlertKind.CERTIFICATE_FILES
EVENT = AlertKind.REFRESH_REUSED
REPEAT_S = 86_400.0
QUIET_S = 900.0


class CenterHarness:
    """A center with a manual clock; sent messages as (phase, about, count)."""

    def __init__(self, repeat_s: float | None = REPEAT_S) -> None:
        self.clock = FakeClock()
        self.center = AlertCenter(repeat_s=repeat_s, quiet_s=QUIET_S)

    @property
    def times(self) -> dict[str, Any]:
        return {"wall": self.clock.wall(), "now": self.clock.now()}

    def raise_(
        self, kind: AlertKind = STATE, about: str = "", title: str = "it is so", **options: Any
    ) -> None:
        self.center.raise_(kind, title, about=about, **options, **self.times)

    def resolve(self, kind: AlertKind = STATE, about: str = "", **options: Any) -> None:
        self.center.resolve(kind, about=about, **options, **self.times)

    def advance(self, seconds: float) -> None:
        """Advance the clock and handle timers."""
        self.clock.advance(seconds)
        self.center.handle_time(**self.times)

    def taken(self) -> list[Message]:
        return self.center.take_messages()

    def sent(self) -> list[tuple[str, str, int]]:
        return [(each.phase.value, each.alert.about, each.alert.count) for each in self.taken()]


@pytest.fixture
def harness() -> CenterHarness:
    return CenterHarness()


def test_alert_begins_and_ends_once(harness: CenterHarness) -> None:
    harness.raise_(about="a.pem")
    began = harness.clock.wall()
    harness.clock.advance(5)
    harness.raise_(about="a.pem", title="it is still so")
    harness.clock.advance(5)
    harness.resolve(about="a.pem")
    first, last = harness.taken()
    assert (first.phase, first.alert.count, first.alert.ended_at) == (Phase.BEGAN, 1, None)
    assert (last.phase, last.alert.count, last.alert.title) == (Phase.ENDED, 2, "it is still so")
    assert (last.alert.began_at, last.alert.last_at) == (began, began + 5_000)
    assert last.alert.ended_at == began + 10_000
    assert last.number == first.number + 1
    harness.resolve(about="a.pem")
    harness.advance(2 * REPEAT_S)
    assert harness.sent() == []


def test_alerts_of_a_kind_are_distinguished_by_subject(harness: CenterHarness) -> None:
    harness.raise_(about="a")
    harness.raise_(about="b")
    harness.raise_(AlertKind.CERTIFICATE_RENEWAL, about="a")
    harness.resolve(about="a")
    assert harness.sent() == [("began", "a", 1), ("began", "b", 1), ("began", "a", 1), ("ended", "a", 1)]
    open_ones = {(each.kind, each.about) for each in harness.center.open_alerts()}
    assert open_ones == {(STATE, "b"), (AlertKind.CERTIFICATE_RENEWAL, "a")}


def test_more_severe_or_changed_alert_is_sent_at_once(harness: CenterHarness) -> None:
    harness.raise_(severity=Severity.WARNING)
    harness.raise_(severity=Severity.CRITICAL)
    harness.raise_(severity=Severity.WARNING)
    harness.raise_(severity=Severity.WARNING, changed=True)
    assert [(each.phase, each.alert.severity) for each in harness.taken()] == [
        (Phase.BEGAN, Severity.WARNING),
        (Phase.CHANGED, Severity.CRITICAL),
        (Phase.CHANGED, Severity.WARNING),
    ]


def test_open_alert_is_repeated_after_the_interval(harness: CenterHarness) -> None:
    harness.raise_()
    harness.taken()
    harness.advance(REPEAT_S - 1)
    assert harness.sent() == []
    harness.advance(1)
    assert harness.sent() == [("reminder", "", 1)]
    harness.advance(REPEAT_S / 2)
    harness.raise_(changed=True)
    assert harness.sent() == [("changed", "", 2)]
    harness.advance(REPEAT_S - 1)  # counted from the last message of any phase
    assert harness.sent() == []


def test_expiry_in_weeks_is_sent_only_at_thresholds(harness: CenterHarness) -> None:
    harness.raise_(AlertKind.CERTIFICATE_EXPIRY)
    harness.taken()
    harness.advance(10 * REPEAT_S)
    assert harness.sent() == []
    harness.raise_(AlertKind.CERTIFICATE_EXPIRY, severity=Severity.ERROR)
    harness.advance(REPEAT_S)
    assert harness.sent() == [("changed", "", 2), ("reminder", "", 2)]


def test_no_reminders_when_off() -> None:
    harness = CenterHarness(repeat_s=None)
    harness.raise_()
    harness.taken()
    harness.advance(100 * REPEAT_S)
    assert harness.sent() == []
    assert len(harness.center.open_alerts()) == 1


def test_event_ends_silently_unless_it_recurred(harness: CenterHarness) -> None:
    harness.raise_(EVENT, "once")
    harness.raise_(EVENT, "twice")
    harness.raise_(EVENT, "twice", count=3)
    assert harness.sent() == [("began", "once", 1), ("began", "twice", 1)]
    harness.advance(QUIET_S - 1)
    assert len(harness.center.open_alerts()) == 2
    harness.advance(1)
    assert harness.sent() == [("ended", "twice", 4)]
    assert harness.center.open_alerts() == []
    assert {each.about for each in harness.center.history()} == {"twice", "once"}
    harness.raise_(EVENT, "once")
    assert harness.sent() == [("began", "once", 1)]


def test_recurring_event_stays_open(harness: CenterHarness) -> None:
    harness.raise_(EVENT)
    harness.taken()
    for _ in range(10):
        harness.advance(QUIET_S - 1)
        harness.raise_(EVENT)
    assert harness.sent() == []
    assert harness.center.open_alerts()[0].count == 11


@pytest.mark.parametrize("kind", [kind for kind in AlertKind if CATALOGUE[kind].ending is not Ending.QUIET])
def test_condition_never_ends_without_resolve(harness: CenterHarness, kind: AlertKind) -> None:
    harness.raise_(kind)
    harness.advance(10 * QUIET_S)
    assert [each.kind for each in harness.center.open_alerts()] == [kind]


def test_end_may_have_its_own_title(harness: CenterHarness) -> None:
    harness.raise_(title="out", details={"reason": "refused"})
    harness.resolve(title="back", details={"seconds": 3.5})
    began, ended = harness.taken()
    assert (began.alert.title, began.alert.details) == ("out", {"reason": "refused"})
    assert (ended.alert.title, ended.alert.details, ended.alert.count) == ("back", {"seconds": 3.5}, 1)
    harness.raise_(title="out", details={"reason": "refused"})
    harness.resolve()
    assert harness.taken()[-1].alert.title == "out"


# --- summaries ---


def test_alerts_beyond_a_burst_are_summarised(harness: CenterHarness) -> None:
    for number in range(BURST + 3):
        harness.raise_(EVENT, f"s{number}")
    assert harness.sent() == [("began", f"s{number}", 1) for number in range(BURST)]
    harness.advance(MANY_DELAY_S - 1)
    assert harness.sent() == []
    harness.advance(1)
    (many,) = harness.taken()
    assert (many.phase, many.alert.is_many, many.alert.about, many.alert.count) == (Phase.BEGAN, True, "", 3)
    assert many.alert.title == "3 more alerts of this kind, summarised; the last: it is so"
    assert many.alert.details["last_about"] == f"s{BURST + 2}"


def test_summary_is_sent_once_an_hour(harness: CenterHarness) -> None:
    for number in range(BURST + 1):
        harness.raise_(EVENT, f"s{number}")
    harness.advance(MANY_DELAY_S)
    harness.taken()
    for number in range(int(MANY_REPEAT_S / 60)):
        harness.raise_(EVENT, f"t{number}")
        harness.advance(60)
    sent = harness.taken()
    assert [(each.phase, each.alert.is_many) for each in sent] == [(Phase.CHANGED, True)]
    assert sent[0].alert.count == 1 + MANY_REPEAT_S / 60


def test_summary_ends_when_all_are_quiet(harness: CenterHarness) -> None:
    for number in range(BURST + 2):
        harness.raise_(about=f"s{number}")
    harness.advance(MANY_DELAY_S)
    harness.taken()
    harness.advance(2 * QUIET_S)
    assert harness.sent() == []
    harness.resolve(about=f"s{BURST}")
    harness.advance(2 * QUIET_S)
    assert harness.sent() == [], "one is still open"
    harness.resolve(about=f"s{BURST + 1}")
    assert harness.sent() == [], "it was not sent separately, so its end is not either"
    harness.advance(1)
    assert harness.sent() == [("ended", "", 2)]
    assert len(harness.center.open_alerts()) == BURST


def test_summary_of_open_alerts_is_repeated(harness: CenterHarness) -> None:
    for number in range(BURST + 2):
        harness.raise_(about=f"s{number}")
    harness.advance(MANY_DELAY_S)
    harness.taken()
    harness.advance(REPEAT_S)
    reminders = harness.taken()
    assert {each.phase for each in reminders} == {Phase.REMINDER}
    assert sum(each.alert.is_many for each in reminders) == 1
    assert len(reminders) == BURST + 1


def test_flapping_alert_is_rate_limited(harness: CenterHarness) -> None:
    """An alert that is open and closed for ten seconds each, for a day."""
    sent = []
    for _ in range(4_320):
        harness.raise_(AlertKind.STORE_DEGRADED)
        harness.advance(10)
        harness.resolve(AlertKind.STORE_DEGRADED)
        harness.advance(10)
        sent += harness.sent()
    assert len(sent) <= 2 * BURST + 24 + 2
    harness.advance(QUIET_S)
    assert harness.sent()[-1][0] == "ended"
    assert harness.center.open_alerts() == []


def test_alerts_are_sent_separately_again_after_a_pause(harness: CenterHarness) -> None:
    for number in range(BURST):
        harness.raise_(EVENT, f"s{number}")
    harness.taken()
    harness.advance(REFILL_S * 2)
    harness.raise_(EVENT, "late")
    harness.raise_(EVENT, "later")
    harness.raise_(EVENT, "too late")
    assert [about for _, about, _ in harness.sent()] == ["late", "later"]


def test_change_beyond_the_burst_is_summarised(harness: CenterHarness) -> None:
    harness.raise_(about="x")
    for _ in range(BURST):
        harness.raise_(about="x", changed=True)
    assert len(harness.taken()) == BURST
    harness.advance(MANY_DELAY_S)
    assert [each.alert.is_many for each in harness.taken()] == [True]
    harness.resolve(about="x")
    assert harness.sent() == [("ended", "x", BURST + 1)], "its beginning was sent, so its end is too"


def test_flood_of_one_kind_is_few_messages_and_bounded_memory(harness: CenterHarness) -> None:
    for number in range(10_000):
        harness.raise_(EVENT, f"session {number}")
        harness.clock.advance(0.01)
        harness.center.handle_time(**harness.times)
    harness.advance(MANY_DELAY_S)
    sent = harness.taken()
    assert len(sent) == BURST + 1
    assert sent[-1].alert.is_many
    assert sum(each.count for each in harness.center.open_alerts()) == 10_000
    assert len(harness.center) <= MAX_OPEN + 1 + MAX_HISTORY
    assert harness.center.raised[EVENT] == 10_000
    assert harness.center.sent[EVENT] == BURST + 1
    # Other kinds are not affected.
    harness.raise_(AlertKind.STORE_DEGRADED)
    assert harness.sent() == [("began", "", 1)]
    for _ in range(10):
        harness.advance(QUIET_S)
    assert harness.sent() == [("ended", "", 10_000 - BURST)]
    assert len(harness.center) <= 1 + MAX_HISTORY


def test_endless_flood_stays_bounded(harness: CenterHarness) -> None:
    messages = 0
    for number in range(8_000):
        harness.raise_(EVENT, f"session {number}")
        harness.advance(7)
        messages += len(harness.taken())
        assert len(harness.center) <= MAX_OPEN + 1 + MAX_HISTORY
    hours = 8_000 * 7 / 3600
    assert messages <= 2 * BURST + hours + 1


# --- history -----------------------------------------------------------------------------------------------


def test_ended_alerts_are_kept_for_a_day(harness: CenterHarness) -> None:
    harness.raise_()
    harness.resolve()
    harness.advance(HISTORY_S)
    assert len(harness.center.history()) == 1
    harness.advance(1)
    assert harness.center.history() == []
    assert len(harness.center) == 0


def test_open_alerts_are_sorted_by_severity(harness: CenterHarness) -> None:
    harness.raise_(AlertKind.LOGINS_THROTTLED)
    harness.clock.advance(1)
    harness.raise_(AlertKind.STORE_GRACE_OVER)
    harness.clock.advance(1)
    harness.raise_(AlertKind.TLS_FAILURES, "not_tls")
    kinds = [each.kind for each in harness.center.open_alerts()]
    assert kinds == [AlertKind.STORE_GRACE_OVER, AlertKind.TLS_FAILURES, AlertKind.LOGINS_THROTTLED]


def test_texts_are_bounded_and_on_one_line(harness: CenterHarness) -> None:
    harness.raise_(
        about="a\r\n\x1b[31m\u2028" + "b" * 10_000,
        title="c\n" + "d" * 10_000,
        details={
            "session_token": "t" * 32,
            "body": b"x" * 50,
            **{f"n{number}": number for number in range(99)},
        },
    )
    (message,) = harness.taken()
    alert = message.alert
    assert len(alert.about) == 200
    assert len(alert.title) == 300
    assert (alert.about + alert.title).isprintable()
    assert (alert.details["session_token"], alert.details["body"]) == ("(hidden)", "(50 bytes)")
    assert len(alert.details) == 16
    text = message.as_json("f00d", "host:7443")
    assert len(text) < 8_192
    assert b"\n" not in text
    harness.resolve(about="a\r\n\x1b[31m\u2028" + "b" * 10_000)
    assert harness.center.open_alerts() == []


def test_clock_going_back_affects_only_displayed_times(harness: CenterHarness) -> None:
    harness.raise_()
    harness.clock.wall_ms -= 86_400_000
    harness.advance(REPEAT_S - 1)
    assert [each[0] for each in harness.sent()] == ["began"]
    harness.advance(1)
    assert [each[0] for each in harness.sent()] == ["reminder"]
