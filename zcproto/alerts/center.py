"""Which alerts are open, what is told of them and when, and what is told no more.

    raise_ / resolve / handle_time, each with `wall` and `now` -> messages, taken by `take`

Rules:
- An alert is named by its kind and what it is about. Raised again while it is open, it is counted and not told,
  unless it has become graver or its caller says that there is something new.
- What was told is told of again: every `repeat_s` while it lasts, if it is grave enough (REMINDER), and when it is
  over (ENDED). An event
  does not last: it is over when it has not come for `quiet_s`, and that is told only if it came more often than
  was told.
- Of one kind at most `BURST` alerts in a row are told one by one, and one more every `REFILL_S`. Those beyond are
  told of together, in one alert (`is_many`) that is told once `MANY_DELAY_S` after the first of them, and then at
  most every `MANY_REPEAT_S`. While it is open no alert of this kind is told alone. It ends when none of them is
  open, and there was none for `quiet_s`.
- A kind keeps at most `MAX_OPEN` open alerts, and `MAX_HISTORY` that are over, for a day: an attacker who can
  raise one kind pushes out none of another. What finds no room is counted among the many.

Pure: `wall` is milliseconds since the Unix epoch and only shown; `now` is monotonic seconds and what is reckoned
with. It must not know: who is told, and how.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from zcproto.alerts.alert import MAX_ABOUT, MAX_TITLE, Alert, Message, Phase, clean_details, clean_text
from zcproto.alerts.kinds import CATALOGUE, AlertKind, Ending, Severity
from zcproto.observe.values import Loggable

MAX_OPEN: Final = 256
"""Alerts of one kind: more than there can be certificates in a configuration."""

MAX_HISTORY: Final = 64
HISTORY_S: Final = 86_400.0
BURST: Final = 10
REFILL_S: Final = 360.0
MANY_DELAY_S: Final = 10.0
MANY_REPEAT_S: Final = 3600.0

_NOTHING: Final[Mapping[str, object]] = {}


class _Row:
    """An open alert. `told_at` is when it was last told of, None if never; `told_count` is its `count` of then."""

    __slots__ = (
        "about",
        "began_at",
        "began_now",
        "count",
        "details",
        "is_many",
        "last_at",
        "last_now",
        "severity",
        "title",
        "told_at",
        "told_count",
    )

    def __init__(
        self, about: str, severity: Severity, wall: int, now: float, *, is_many: bool = False
    ) -> None:
        self.about = about
        self.is_many = is_many
        self.severity = severity
        self.title = ""
        self.details: dict[str, Loggable] = {}
        self.began_at = self.last_at = wall
        self.began_now = self.last_now = now
        self.count = 0
        self.told_at: float | None = None
        self.told_count = 0

    def came(self, title: str, details: Mapping[str, object], count: int, wall: int, now: float) -> None:
        self.title = clean_text(title, MAX_TITLE)
        self.details = clean_details(details)
        self.count += count
        self.last_at = wall
        self.last_now = now


class _Shelf:
    """All of one kind."""

    __slots__ = ("filled_at", "history", "many", "rows", "tokens", "untold")

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self.many: _Row | None = None
        self.untold = 0  # open rows that were not told one by one
        self.tokens = float(BURST)
        self.filled_at = 0.0
        self.history: deque[tuple[float, Alert]] = deque(maxlen=MAX_HISTORY)

    def admits(self, now: float) -> bool:
        """Whether one more message of this kind may be sent; if so it counts as sent."""
        self.tokens = min(BURST, self.tokens + max(0.0, now - self.filled_at) / REFILL_S)
        self.filled_at = now
        if self.many is not None or self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class AlertCenter:
    """All alerts of one server.

    `repeat_s`: after so long an open alert is told again; None: never. `quiet_s`: so long an event must not have
    come again to be over. `raised` and `told` count, by kind, what was raised and the messages about it.
    """

    def __init__(self, *, repeat_s: float | None, quiet_s: float) -> None:
        self._repeat_s = repeat_s
        self._quiet_s = quiet_s
        self._shelves = {kind: _Shelf() for kind in AlertKind}
        self._messages: list[Message] = []
        self._number = 0
        self.raised = dict.fromkeys(AlertKind, 0)
        self.told = dict.fromkeys(AlertKind, 0)

    def reconfigure(self, *, repeat_s: float | None, quiet_s: float) -> None:
        """Go by other times, for what is open too."""
        self._repeat_s = repeat_s
        self._quiet_s = quiet_s

    # --- what happens --------------------------------------------------------------------------------

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
        """Something is wrong, or has happened `count` times.

        `title` is a sentence for people, `details` values for machines. `severity` is that of the kind if none is
        given. `changed` says that it is worth another message though it is open already.
        """
        self.raised[kind] += count
        shelf = self._shelves[kind]
        about = clean_text(about, MAX_ABOUT)
        severity = CATALOGUE[kind].severity if severity is None else severity
        row = shelf.rows.get(about)
        if row is not None:
            graver = severity > row.severity
            row.severity = severity
            row.came(title, details, count, wall, now)
            if row.told_at is None:
                self._count_among_many(shelf, row, severity, count, wall, now)
            elif graver or changed:
                if shelf.admits(now):
                    self._tell(kind, row, Phase.CHANGED, wall, now)
                else:
                    self._count_among_many(shelf, row, severity, count, wall, now)
            return
        row = _Row(about, severity, wall, now)
        row.came(title, details, count, wall, now)
        if len(shelf.rows) >= MAX_OPEN:
            self._count_among_many(shelf, row, severity, count, wall, now)
            return
        shelf.rows[about] = row
        if shelf.admits(now):
            self._tell(kind, row, Phase.BEGAN, wall, now)
        else:
            shelf.untold += 1
            self._count_among_many(shelf, row, severity, count, wall, now)

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
        """It is over. Without a title the alert keeps what it has. Nothing happens if it was not open."""
        shelf = self._shelves[kind]
        row = shelf.rows.get(clean_text(about, MAX_ABOUT))
        if row is None:
            return
        if title:
            row.came(title, details, 0, row.last_at, row.last_now)
        self._end(kind, shelf, row, wall, now, tells=True)

    def handle_time(self, wall: int, now: float) -> None:
        """Do what is due: end what is quiet, remind, tell of the many, forget what is over. Call it about once a
        second."""
        for kind, shelf in self._shelves.items():
            if shelf.rows:
                self._handle_rows(kind, shelf, wall, now)
            if shelf.many is not None:
                self._handle_many(kind, shelf, shelf.many, wall, now)
            while shelf.history and now - shelf.history[0][0] > HISTORY_S:
                shelf.history.popleft()

    def _handle_rows(self, kind: AlertKind, shelf: _Shelf, wall: int, now: float) -> None:
        entry = CATALOGUE[kind]
        for row in list(shelf.rows.values()):
            if entry.ending is Ending.QUIET:
                if now - row.last_now >= self._quiet_s:
                    self._end(kind, shelf, row, wall, now, tells=row.count > row.told_count)
            elif row.severity >= entry.reminds_from and self._is_due(row.told_at, now):
                self._tell(kind, row, Phase.REMINDER, wall, now)

    def _handle_many(self, kind: AlertKind, shelf: _Shelf, many: _Row, wall: int, now: float) -> None:
        if many.told_at is None:
            if now - many.began_now >= MANY_DELAY_S:
                self._tell(kind, many, Phase.BEGAN, wall, now)
        elif many.count > many.told_count and now - many.told_at >= MANY_REPEAT_S:
            self._tell(kind, many, Phase.CHANGED, wall, now)
        elif shelf.untold and self._is_due(many.told_at, now):
            self._tell(kind, many, Phase.REMINDER, wall, now)
        if many.told_at is not None and not shelf.untold and now - many.last_now >= self._quiet_s:
            shelf.many = None
            self._close(kind, shelf, many, wall, now, tells=True)

    def _is_due(self, told_at: float | None, now: float) -> bool:
        return told_at is not None and self._repeat_s is not None and now - told_at >= self._repeat_s

    def _count_among_many(
        self, shelf: _Shelf, row: _Row, severity: Severity, count: int, wall: int, now: float
    ) -> None:
        many = shelf.many
        if many is None:
            many = shelf.many = _Row("", severity, wall, now, is_many=True)
        many.severity = max(many.severity, severity)
        many.came(
            f"{many.count + count} more of this kind, not told one by one; the last: {row.title}",
            {**row.details, "last_about": row.about},
            count,
            wall,
            now,
        )

    def _end(self, kind: AlertKind, shelf: _Shelf, row: _Row, wall: int, now: float, *, tells: bool) -> None:
        del shelf.rows[row.about]
        if row.told_at is None:
            shelf.untold -= 1
        else:
            self._close(kind, shelf, row, wall, now, tells=tells)

    def _close(
        self, kind: AlertKind, shelf: _Shelf, row: _Row, wall: int, now: float, *, tells: bool
    ) -> None:
        if tells:
            self._tell(kind, row, Phase.ENDED, wall, now)
        shelf.history.append((now, _alert(kind, row, wall)))

    def _tell(self, kind: AlertKind, row: _Row, phase: Phase, wall: int, now: float) -> None:
        self._number += 1
        self.told[kind] += 1
        row.told_at, row.told_count = now, row.count
        ended_at = wall if phase is Phase.ENDED else None
        self._messages.append(Message(self._number, phase, _alert(kind, row, ended_at)))

    # --- what comes out ------------------------------------------------------------------------------

    def take(self) -> list[Message]:
        """The messages since the last time."""
        messages, self._messages = self._messages, []
        return messages

    def open_alerts(self) -> list[Alert]:
        """What was told of and is not over, the gravest first, and of these the newest."""
        rows = [
            _alert(kind, row, None)
            for kind, shelf in self._shelves.items()
            for row in [*shelf.rows.values(), *([] if shelf.many is None else [shelf.many])]
            if row.told_at is not None
        ]
        return sorted(rows, key=lambda alert: (-alert.severity, -alert.began_at))

    def history(self) -> list[Alert]:
        """What was told of and ended within the last day, the newest first."""
        ended = [each for shelf in self._shelves.values() for each in shelf.history]
        return [alert for _, alert in sorted(ended, key=lambda each: each[0], reverse=True)]

    def __len__(self) -> int:
        """Alerts that are kept, open or over: it has a bound, whatever happens."""
        return sum(
            len(shelf.rows) + (shelf.many is not None) + len(shelf.history)
            for shelf in self._shelves.values()
        )


def _alert(kind: AlertKind, row: _Row, ended_at: int | None) -> Alert:
    return Alert(
        kind,
        row.about,
        row.severity,
        row.title,
        row.details,
        row.began_at,
        row.last_at,
        ended_at,
        row.count,
        row.is_many,
    )
