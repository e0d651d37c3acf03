"""Which alerts are open, and what is told of them: in steps of time that are given by hand."""

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


class Desk:
    """A center with a clock; what it tells is (phase, about, count)."""

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

    def pass_(self, seconds: float) -> None:
        """Let time go by, with a look at the end."""
        self.clock.advance(seconds)
        self.center.handle_time(**self.times)

    def taken(self) -> list[Message]:
        return self.center.take()

    def told(self) -> list[tuple[str, str, int]]:
        return [(each.phase.value, each.alert.about, each.alert.count) for each in self.taken()]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_an_alert_begins_once_and_ends_once(desk: Desk) -> None:
    desk.raise_(about="a.pem")
    began = desk.clock.wall()
    desk.clock.advance(5)
    desk.raise_(about="a.pem", title="it is still so")
    desk.clock.advance(5)
    desk.resolve(about="a.pem")
    first, last = desk.taken()
    assert (first.phase, first.alert.count, first.alert.ended_at) == (Phase.BEGAN, 1, None)
    assert (last.phase, last.alert.count, last.alert.title) == (Phase.ENDED, 2, "it is still so")
    assert (last.alert.began_at, last.alert.last_at) == (began, began + 5_000)
    assert last.alert.ended_at == began + 10_000
    assert last.number == first.number + 1
    desk.resolve(about="a.pem")
    desk.pass_(2 * REPEAT_S)
    assert desk.told() == []


def test_what_it_is_about_tells_alerts_of_a_kind_apart(desk: Desk) -> None:
    desk.raise_(about="a")
    desk.raise_(about="b")
    desk.raise_(AlertKind.CERTIFICATE_RENEWAL, about="a")
    desk.resolve(about="a")
    assert desk.told() == [("began", "a", 1), ("began", "b", 1), ("began", "a", 1), ("ended", "a", 1)]
    open_ones = {(each.kind, each.about) for each in desk.center.open_alerts()}
    assert open_ones == {(STATE, "b"), (AlertKind.CERTIFICATE_RENEWAL, "a")}


def test_graver_or_changed_is_told_at_once_and_less_grave_is_not(desk: Desk) -> None:
    desk.raise_(severity=Severity.WARNING)
    desk.raise_(severity=Severity.CRITICAL)
    desk.raise_(severity=Severity.WARNING)
    desk.raise_(severity=Severity.WARNING, changed=True)
    assert [(each.phase, each.alert.severity) for each in desk.taken()] == [
        (Phase.BEGAN, Severity.WARNING),
        (Phase.CHANGED, Severity.CRITICAL),
        (Phase.CHANGED, Severity.WARNING),
    ]


def test_what_lasts_is_told_again_after_the_interval(desk: Desk) -> None:
    desk.raise_()
    desk.taken()
    desk.pass_(REPEAT_S - 1)
    assert desk.told() == []
    desk.pass_(1)
    assert desk.told() == [("reminder", "", 1)]
    desk.pass_(REPEAT_S / 2)
    desk.raise_(changed=True)
    assert desk.told() == [("changed", "", 2)]
    desk.pass_(REPEAT_S - 1)  # counted from the last message, whatever that was
    assert desk.told() == []


def test_a_certificate_with_weeks_left_is_told_of_by_its_thresholds_alone(desk: Desk) -> None:
    desk.raise_(AlertKind.CERTIFICATE_EXPIRY)
    desk.taken()
    desk.pass_(10 * REPEAT_S)
    assert desk.told() == []
    desk.raise_(AlertKind.CERTIFICATE_EXPIRY, severity=Severity.ERROR)
    desk.pass_(REPEAT_S)
    assert desk.told() == [("changed", "", 2), ("reminder", "", 2)]


def test_nothing_is_told_again_where_that_is_off() -> None:
    desk = Desk(repeat_s=None)
    desk.raise_()
    desk.taken()
    desk.pass_(100 * REPEAT_S)
    assert desk.told() == []
    assert len(desk.center.open_alerts()) == 1


def test_an_event_is_over_by_itself_and_says_so_only_if_it_came_again(desk: Desk) -> None:
    desk.raise_(EVENT, "once")
    desk.raise_(EVENT, "twice")
    desk.raise_(EVENT, "twice", count=3)
    assert desk.told() == [("began", "once", 1), ("began", "twice", 1)]
    desk.pass_(QUIET_S - 1)
    assert len(desk.center.open_alerts()) == 2
    desk.pass_(1)
    assert desk.told() == [("ended", "twice", 4)]
    assert desk.center.open_alerts() == []
    assert {each.about for each in desk.center.history()} == {"twice", "once"}
    desk.raise_(EVENT, "once")
    assert desk.told() == [("began", "once", 1)]


def test_an_event_that_goes_on_stays_open(desk: Desk) -> None:
    desk.raise_(EVENT)
    desk.taken()
    for _ in range(10):
        desk.pass_(QUIET_S - 1)
        desk.raise_(EVENT)
    assert desk.told() == []
    assert desk.center.open_alerts()[0].count == 11


@pytest.mark.parametrize("kind", [kind for kind in AlertKind if CATALOGUE[kind].ending is not Ending.QUIET])
def test_what_is_no_event_never_ends_by_itself(desk: Desk, kind: AlertKind) -> None:
    desk.raise_(kind)
    desk.pass_(10 * QUIET_S)
    assert [each.kind for each in desk.center.open_alerts()] == [kind]


def test_the_end_may_have_words_of_its_own(desk: Desk) -> None:
    desk.raise_(title="out", details={"reason": "refused"})
    desk.resolve(title="back", details={"seconds": 3.5})
    began, ended = desk.taken()
    assert (began.alert.title, began.alert.details) == ("out", {"reason": "refused"})
    assert (ended.alert.title, ended.alert.details, ended.alert.count) == ("back", {"seconds": 3.5}, 1)
    desk.raise_(title="out", details={"reason": "refused"})
    desk.resolve()
    assert desk.taken()[-1].alert.title == "out"


# --- many -----------------------------------------------------------------------------------------------------


def test_beyond_a_burst_they_are_told_of_together(desk: Desk) -> None:
    for number in range(BURST + 3):
        desk.raise_(EVENT, f"s{number}")
    assert desk.told() == [("began", f"s{number}", 1) for number in range(BURST)]
    desk.pass_(MANY_DELAY_S - 1)
    assert desk.told() == []
    desk.pass_(1)
    (many,) = desk.taken()
    assert (many.phase, many.alert.is_many, many.alert.about, many.alert.count) == (Phase.BEGAN, True, "", 3)
    assert many.alert.title == "3 more of this kind, not told one by one; the last: it is so"
    assert many.alert.details["last_about"] == f"s{BURST + 2}"


def test_while_many_come_each_hour_one_message_tells_of_them(desk: Desk) -> None:
    for number in range(BURST + 1):
        desk.raise_(EVENT, f"s{number}")
    desk.pass_(MANY_DELAY_S)
    desk.taken()
    for number in range(int(MANY_REPEAT_S / 60)):
        desk.raise_(EVENT, f"t{number}")
        desk.pass_(60)
    told = desk.taken()
    assert [(each.phase, each.alert.is_many) for each in told] == [(Phase.CHANGED, True)]
    assert told[0].alert.count == 1 + MANY_REPEAT_S / 60


def test_many_end_when_none_is_open_and_all_is_quiet(desk: Desk) -> None:
    for number in range(BURST + 2):
        desk.raise_(about=f"s{number}")
    desk.pass_(MANY_DELAY_S)
    desk.taken()
    desk.pass_(2 * QUIET_S)
    assert desk.told() == []
    desk.resolve(about=f"s{BURST}")
    desk.pass_(2 * QUIET_S)
    assert desk.told() == [], "one is still open"
    desk.resolve(about=f"s{BURST + 1}")
    assert desk.told() == [], "it was never told alone, so its end is not either"
    desk.pass_(1)
    assert desk.told() == [("ended", "", 2)]
    assert len(desk.center.open_alerts()) == BURST


def test_many_that_last_are_told_again(desk: Desk) -> None:
    for number in range(BURST + 2):
        desk.raise_(about=f"s{number}")
    desk.pass_(MANY_DELAY_S)
    desk.taken()
    desk.pass_(REPEAT_S)
    reminders = desk.taken()
    assert {each.phase for each in reminders} == {Phase.REMINDER}
    assert sum(each.alert.is_many for each in reminders) == 1
    assert len(reminders) == BURST + 1


def test_what_comes_and_goes_is_not_told_for_ever(desk: Desk) -> None:
    """Ten seconds out, ten seconds back, for a day."""
    told = []
    for _ in range(4_320):
        desk.raise_(AlertKind.STORE_DEGRADED)
        desk.pass_(10)
        desk.resolve(AlertKind.STORE_DEGRADED)
        desk.pass_(10)
        told += desk.told()
    assert len(told) <= 2 * BURST + 24 + 2
    desk.pass_(QUIET_S)
    assert desk.told()[-1][0] == "ended"
    assert desk.center.open_alerts() == []


def test_after_a_rest_alerts_are_told_alone_again(desk: Desk) -> None:
    for number in range(BURST):
        desk.raise_(EVENT, f"s{number}")
    desk.taken()
    desk.pass_(REFILL_S * 2)
    desk.raise_(EVENT, "late")
    desk.raise_(EVENT, "later")
    desk.raise_(EVENT, "too late")
    assert [about for _, about, _ in desk.told()] == ["late", "later"]


def test_a_change_beyond_the_burst_is_among_the_many(desk: Desk) -> None:
    desk.raise_(about="x")
    for _ in range(BURST):
        desk.raise_(about="x", changed=True)
    assert len(desk.taken()) == BURST
    desk.pass_(MANY_DELAY_S)
    assert [each.alert.is_many for each in desk.taken()] == [True]
    desk.resolve(about="x")
    assert desk.told() == [("ended", "x", BURST + 1)], "its beginning was told, so its end is"


def test_ten_thousand_of_one_kind_are_few_messages_and_little_memory(desk: Desk) -> None:
    for number in range(10_000):
        desk.raise_(EVENT, f"session {number}")
        desk.clock.advance(0.01)
        desk.center.handle_time(**desk.times)
    desk.pass_(MANY_DELAY_S)
    told = desk.taken()
    assert len(told) == BURST + 1
    assert told[-1].alert.is_many
    assert sum(each.count for each in desk.center.open_alerts()) == 10_000
    assert len(desk.center) <= MAX_OPEN + 1 + MAX_HISTORY
    assert desk.center.raised[EVENT] == 10_000
    assert desk.center.told[EVENT] == BURST + 1
    # Nobody else is kept out by it.
    desk.raise_(AlertKind.STORE_DEGRADED)
    assert desk.told() == [("began", "", 1)]
    for _ in range(10):
        desk.pass_(QUIET_S)
    assert desk.told() == [("ended", "", 10_000 - BURST)]
    assert len(desk.center) <= 1 + MAX_HISTORY


def test_a_flood_that_never_ends_keeps_its_bounds(desk: Desk) -> None:
    messages = 0
    for number in range(8_000):
        desk.raise_(EVENT, f"session {number}")
        desk.pass_(7)
        messages += len(desk.taken())
        assert len(desk.center) <= MAX_OPEN + 1 + MAX_HISTORY
    hours = 8_000 * 7 / 3600
    assert messages <= 2 * BURST + hours + 1


# --- what is kept -----------------------------------------------------------------------------------------------


def test_what_is_over_is_kept_for_a_day(desk: Desk) -> None:
    desk.raise_()
    desk.resolve()
    desk.pass_(HISTORY_S)
    assert len(desk.center.history()) == 1
    desk.pass_(1)
    assert desk.center.history() == []
    assert len(desk.center) == 0


def test_open_ones_are_the_gravest_first(desk: Desk) -> None:
    desk.raise_(AlertKind.LOGINS_THROTTLED)
    desk.clock.advance(1)
    desk.raise_(AlertKind.STORE_GRACE_OVER)
    desk.clock.advance(1)
    desk.raise_(AlertKind.TLS_FAILURES, "not_tls")
    kinds = [each.kind for each in desk.center.open_alerts()]
    assert kinds == [AlertKind.STORE_GRACE_OVER, AlertKind.TLS_FAILURES, AlertKind.LOGINS_THROTTLED]


def test_texts_are_bounded_and_of_one_line(desk: Desk) -> None:
    desk.raise_(
        about="a\r\n\x1b[31m\u2028" + "b" * 10_000,
        title="c\n" + "d" * 10_000,
        details={
            "session_token": "t" * 32,
            "body": b"x" * 50,
            **{f"n{number}": number for number in range(99)},
        },
    )
    (message,) = desk.taken()
    alert = message.alert
    assert len(alert.about) == 200
    assert len(alert.title) == 300
    assert (alert.about + alert.title).isprintable()
    assert (alert.details["session_token"], alert.details["body"]) == ("(hidden)", "(50 bytes)")
    assert len(alert.details) == 16
    text = message.as_json("f00d", "host:7443")
    assert len(text) < 8_192
    assert b"\n" not in text
    desk.resolve(about="a\r\n\x1b[31m\u2028" + "b" * 10_000)
    assert desk.center.open_alerts() == []


def test_a_clock_that_is_set_back_moves_nothing_but_what_is_shown(desk: Desk) -> None:
    desk.raise_()
    desk.clock.wall_ms -= 86_400_000
    desk.pass_(REPEAT_S - 1)
    assert [each[0] for each in desk.told()] == ["began"]
    desk.pass_(1)
    assert [each[0] for each in desk.told()] == ["reminder"]
