"""Test invariants of alerts for any order of operations."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.helpers import FakeClock, machine_settings
from zcproto.alerts import AlertCenter, AlertKind, Message, Phase, Severity
from zcproto.alerts.center import BURST, MAX_HISTORY, MAX_OPEN, REFILL_S

KINDS = st.sampled_from([AlertKind.CERTIFICATE_FILES, AlertKind.REFRESH_REUSED, AlertKind.TLS_FAILURES])
ABOUT = st.sampled_from([f"n{number}" for number in range(20)])


class Alerts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.center = AlertCenter(repeat_s=3_600.0, quiet_s=900.0)
        self.raised = dict.fromkeys(AlertKind, 0)
        self.messages: dict[tuple[AlertKind, str, bool], Message] = {}
        self.number = 0
        self.began = self.clock.now()

    @rule(kind=KINDS, about=ABOUT, severity=st.sampled_from(Severity), changed=st.booleans())
    def raise_(self, kind: AlertKind, about: str, severity: Severity, changed: bool) -> None:
        wall, now = self.clock.wall(), self.clock.now()
        self.center.raise_(kind, "so", about=about, severity=severity, changed=changed, wall=wall, now=now)
        self.raised[kind] += 1

    @rule(kind=KINDS, about=ABOUT)
    def resolve(self, kind: AlertKind, about: str) -> None:
        self.center.resolve(kind, about=about, wall=self.clock.wall(), now=self.clock.now())

    @rule(seconds=st.floats(0.0, 4_000.0))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.center.handle_time(self.clock.wall(), self.clock.now())

    @invariant()
    def all_holds(self) -> None:
        self.messages_are_consistent()
        self.open_alerts_match_messages()
        self.size_and_counts_are_bounded()

    def messages_are_consistent(self) -> None:
        for message in self.center.take_messages():
            assert message.number == self.number + 1
            self.number = message.number
            alert = message.alert
            name = (alert.kind, alert.about, alert.is_many)
            before = self.messages.pop(name, None)
            if message.phase is Phase.BEGAN:
                assert before is None, "it begins when it is not open"
            else:
                assert before is not None, "what goes on or ends has begun"
                assert before.alert.began_at == alert.began_at
                assert before.alert.count <= alert.count
            if message.phase is not Phase.ENDED:
                self.messages[name] = message
            assert (alert.ended_at is not None) == (message.phase is Phase.ENDED)

    def open_alerts_match_messages(self) -> None:
        shown = {(each.kind, each.about, each.is_many) for each in self.center.open_alerts()}
        quiet = {name for name in self.messages if name[0] is AlertKind.REFRESH_REUSED}
        assert set(self.messages) - quiet <= shown <= set(self.messages)
        # An event may end silently; its next beginning is then a new message.
        for name in quiet - shown:
            del self.messages[name]

    def size_and_counts_are_bounded(self) -> None:
        assert len(self.center) <= 3 * (MAX_OPEN + 1 + MAX_HISTORY)
        assert self.center.raised == self.raised
        hours = (self.clock.now() - self.began) / 3600
        for kind in AlertKind:
            # Beginnings and changes are limited; each can have an end; reminders come once an hour.
            allowed = BURST + hours * 3600 / REFILL_S + hours + 2
            assert self.center.sent[kind] <= 2 * allowed + 21 * hours


Alerts.TestCase.settings = machine_settings(max_examples=40, steps=50)
TestAlerts = Alerts.TestCase
