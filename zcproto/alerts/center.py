"""Decide what is an alert, which alerts are open and which messages are sent about them (sans-IO).

    raise_ / resolve / handle_time, each with `wall` and `now` -> messages, returned by `take_messages`
    counters, read periodically -> RateWatch: sums over a sliding window -> is_on

Rules:
- An alert is identified by its kind and subject. Raised again while open, it is only counted, unless its severity
  increased or the caller marks it as changed.
- An open alert of sufficient severity is repeated every `repeat_s` (REMINDER); its end is sent too (ENDED). An
  alert about an event ends when the event has not recurred for `quiet_s`; that is sent only if the count has
  grown.
- At most `BURST` alerts of a kind are sent one by one, and one more every `REFILL_S`. Further ones are
  summarised in one alert (`is_many`), sent `MANY_DELAY_S` after the first of them and then at most every
  `MANY_REPEAT_S`. While it is open, no alert of this kind is sent separately. It ends when none of them is open
  and there was none for `quiet_s`.
- Frequent events are counted where they happen. A counter that grows fast within a window is an alert.
- A kind keeps at most `MAX_OPEN` open alerts, and `MAX_HISTORY` ended ones for a day, so a flood of one kind
  does not displace another. Alerts without room are counted in the summary.

`wall` is milliseconds since the Unix epoch, for display only; `now` is monotonic seconds. It must not know:
receivers and delivery, what is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from zcproto.alerts.alert import (
    CATALOGUE,
    MAX_ABOUT,
    MAX_TITLE,
    Alert,
    AlertKind,
    Ending,
    Message,
    Phase,
    Severity,
    clean_details,
    clean_text,
)
from zcproto.common.rates import TokenBucket

MAX_OPEN: Final = 256
"""Open alerts per kind: more than the certificates of a configuration."""

MAX_HISTORY: Final = 64
HISTORY_S: Final = 86_400.0
BURST: Final = 10
REFILL_S: Final = 360.0
MANY_DELAY_S: Final = 10.0
MANY_REPEAT_S: Final = 3600.0
SLOTS: Final = 60
"""Parts of a window of a rate: a sum covers up to one part more than the window."""

_NOTHING: Final[Mapping[str, object]] = {}


@dataclass(slots=True)
class _Row:
    """An open alert. `sent_at` is the time of its last message, None without any; `sent_count` is its count at
    that time."""

    alert: Alert
    began_now: float
    last_now: float = 0.0
    sent_at: float | None = None
    sent_count: int = 0

    def update(
        self, severity: Severity, title: str, details: Mapping[str, object], count: int, wall: int, now: float
    ) -> None:
        self.last_now = now
        self.alert = replace(
            self.alert,
            severity=severity,
            title=clean_text(title, MAX_TITLE),
            details=clean_details(details),
            last_at=wall,
            count=self.alert.count + count,
        )


@dataclass(slots=True)
class _KindState:
    """The alerts of one kind."""

    rows: dict[str, _Row] = field(default_factory=dict)
    many: _Row | None = None
    summarised: int = 0  # open alerts that were not sent separately
    messages: TokenBucket = field(default_factory=lambda: TokenBucket(1 / REFILL_S, BURST * REFILL_S))
    history: deque[tuple[float, Alert]] = field(default_factory=lambda: deque(maxlen=MAX_HISTORY))


class AlertCenter:
    """All alerts of one server.

    Args:
        repeat_s: interval of reminders about an open alert; None for no reminders.
        quiet_s: time without recurrence after which an event ends.

    Both may be changed at any time, which applies to open alerts too.
    `raised` and `sent` count by kind the alerts raised and the messages about them.
    """

    def __init__(self, *, repeat_s: float | None, quiet_s: float) -> None:
        self.repeat_s = repeat_s
        self.quiet_s = quiet_s
        self._kinds = {kind: _KindState() for kind in AlertKind}
        self._messages: list[Message] = []
        self._number = 0
        self.raised = dict.fromkeys(AlertKind, 0)
        self.sent = dict.fromkeys(AlertKind, 0)

    # --- input ---------------------------------------------------------------------------------------

    def raise_(
        self,
        kind: AlertKind,
        title: str,
        *,
        wall: int,
        now: float,
        about: str = "",
        details: Mapping[str, object] = _NOTHING,
        severity: Severity | None = None,
        changed: bool = False,
        count: int = 1,
    ) -> None:
        """Raise an alert, `count` times.

        `title` is a sentence for people, `details` values for machines. `severity` defaults to that of the kind.
        With `changed`, a message is sent even if the alert is already open.
        """
        self.raised[kind] += count
        state = self._kinds[kind]
        about = clean_text(about, MAX_ABOUT)
        severity = CATALOGUE[kind].severity if severity is None else severity
        row = state.rows.get(about)
        if row is None:
            row, is_new, is_reported = _new_row(kind, about, severity, wall, now), True, True
        else:
            is_new, is_reported = False, row.sent_at is None or changed or severity > row.alert.severity
        row.update(severity, title, details, count, wall, now)
        if not is_reported:
            return
        has_room = not is_new or len(state.rows) < MAX_OPEN
        if is_new and has_room:
            state.rows[about] = row
        is_separate = has_room and (is_new or row.sent_at is not None)
        if is_separate and state.many is None and state.messages.admit(now):
            self._send(row, Phase.BEGAN if is_new else Phase.CHANGED, wall, now)
        else:
            state.summarised += is_new and has_room
            self._summarise(state, row, count, wall, now)

    def resolve(
        self,
        kind: AlertKind,
        *,
        wall: int,
        now: float,
        about: str = "",
        title: str = "",
        details: Mapping[str, object] = _NOTHING,
    ) -> None:
        """End an alert; does nothing if it is not open. Without a title the alert keeps its own."""
        state = self._kinds[kind]
        row = state.rows.get(clean_text(about, MAX_ABOUT))
        if row is None:
            return
        if title:
            row.update(row.alert.severity, title, details, 0, row.alert.last_at, row.last_now)
        self._end(state, row, wall, now, is_sent=True)

    def handle_time(self, wall: int, now: float) -> None:
        """End quiet alerts, send reminders and summaries, and expire the history. Call it about once a second."""
        for kind, state in self._kinds.items():
            if state.rows:
                self._handle_rows(kind, state, wall, now)
            if state.many is not None:
                self._handle_many(state, state.many, wall, now)
            while state.history and now - state.history[0][0] > HISTORY_S:
                state.history.popleft()

    def _handle_rows(self, kind: AlertKind, state: _KindState, wall: int, now: float) -> None:
        entry = CATALOGUE[kind]
        for row in list(state.rows.values()):
            if entry.ending is Ending.QUIET:
                if now - row.last_now >= self.quiet_s:
                    self._end(state, row, wall, now, is_sent=row.alert.count > row.sent_count)
            elif row.alert.severity >= entry.reminds_from and self._is_due(row.sent_at, now):
                self._send(row, Phase.REMINDER, wall, now)

    def _handle_many(self, state: _KindState, many: _Row, wall: int, now: float) -> None:
        if many.sent_at is None:
            if now - many.began_now >= MANY_DELAY_S:
                self._send(many, Phase.BEGAN, wall, now)
        elif many.alert.count > many.sent_count and now - many.sent_at >= MANY_REPEAT_S:
            self._send(many, Phase.CHANGED, wall, now)
        elif state.summarised and self._is_due(many.sent_at, now):
            self._send(many, Phase.REMINDER, wall, now)
        if many.sent_at is not None and not state.summarised and now - many.last_now >= self.quiet_s:
            state.many = None
            self._close(state, many, wall, now, is_sent=True)

    def _is_due(self, sent_at: float | None, now: float) -> bool:
        return sent_at is not None and self.repeat_s is not None and now - sent_at >= self.repeat_s

    def _summarise(self, state: _KindState, row: _Row, count: int, wall: int, now: float) -> None:
        last, many = row.alert, state.many
        if many is None:
            many = state.many = _new_row(last.kind, "", last.severity, wall, now, is_many=True)
        severity = max(many.alert.severity, last.severity)
        title = f"{many.alert.count + count} more alerts of this kind, summarised; the last: {last.title}"
        many.update(severity, title, {**last.details, "last_about": last.about}, count, wall, now)

    def _end(self, state: _KindState, row: _Row, wall: int, now: float, *, is_sent: bool) -> None:
        del state.rows[row.alert.about]
        if row.sent_at is None:
            state.summarised -= 1
        else:
            self._close(state, row, wall, now, is_sent=is_sent)

    def _close(self, state: _KindState, row: _Row, wall: int, now: float, *, is_sent: bool) -> None:
        if is_sent:
            self._send(row, Phase.ENDED, wall, now)
        state.history.append((now, replace(row.alert, ended_at=wall)))

    def _send(self, row: _Row, phase: Phase, wall: int, now: float) -> None:
        self._number += 1
        self.sent[row.alert.kind] += 1
        row.sent_at, row.sent_count = now, row.alert.count
        alert = replace(row.alert, ended_at=wall) if phase is Phase.ENDED else row.alert
        self._messages.append(Message(self._number, phase, alert))

    # --- output --------------------------------------------------------------------------------------

    def take_messages(self) -> list[Message]:
        """Return and clear the pending messages."""
        messages, self._messages = self._messages, []
        return messages

    def open_alerts(self) -> list[Alert]:
        """Return the open alerts that were sent, most severe and then newest first."""
        rows = [
            row.alert
            for state in self._kinds.values()
            for row in [*state.rows.values(), *([] if state.many is None else [state.many])]
            if row.sent_at is not None
        ]
        return sorted(rows, key=lambda alert: (-alert.severity, -alert.began_at))

    def history(self) -> list[Alert]:
        """Return the alerts that ended within the last day, newest first."""
        ended = [each for state in self._kinds.values() for each in state.history]
        return [alert for _, alert in sorted(ended, key=lambda each: each[0], reverse=True)]

    def __len__(self) -> int:
        """Return the number of alerts kept, open or ended, which is bounded."""
        return sum(
            len(state.rows) + (state.many is not None) + len(state.history) for state in self._kinds.values()
        )


def _new_row(
    kind: AlertKind, about: str, severity: Severity, wall: int, now: float, *, is_many: bool = False
) -> _Row:
    return _Row(Alert(kind, about, severity, "", {}, wall, wall, None, 0, is_many), now)


# --- rates of counters -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RateRule:
    """The threshold of events within `window_s`, and the quiet time before the end."""

    threshold: int
    window_s: float
    quiet_s: float


class RateWatch:
    """Decide when the growth of one counter, which starts at `total`, begins and ends to be an alert.

    It begins when the window holds `threshold` events, and ends when the window has held at most half of them for
    `quiet_s`. This hysteresis prevents flapping around the threshold. A counter that decreases has been reset.

    `is_on` is True while the rate is an alert. `events` counts those since the previous reading, `in_window` those
    of the window.
    """

    def __init__(self, rule: RateRule, total: int = 0) -> None:
        assert rule.threshold >= 1, "a threshold below 1 would always alert"
        self.rule = rule
        self.is_on = False
        self.events = 0
        self.in_window = 0
        self._slots: dict[int, int] = {}  # events by part of time, oldest first
        self._total = total
        self._low_since: float | None = None

    def read(self, total: int, now: float) -> bool:
        """Process the current value of the counter. Return True if an alert begins, has more events, or ends."""
        rule = self.rule
        self.events = total - self._total if total >= self._total else total
        self._total = total
        part = int(now * SLOTS // rule.window_s)
        for old in [each for each in self._slots if each <= part - SLOTS]:
            self.in_window -= self._slots.pop(old)
        if self.events:
            self._slots[part] = self._slots.get(part, 0) + self.events
            self.in_window += self.events
        if not self.is_on:
            self.is_on, self._low_since = self.in_window >= rule.threshold, None
            return self.is_on
        if self.in_window > rule.threshold // 2:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = now
        elif now - self._low_since >= rule.quiet_s:
            self.is_on = False
            return True
        return self.events > 0
