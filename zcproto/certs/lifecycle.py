"""Decides when a certificate is renewed, when its next key is announced, when a failure is tried again, and
when somebody is told that a certificate is about to expire.

Rules:
- A certificate is renewed when the time left is at most `renew_before`, and at most a third of its own
  lifetime: so a short-lived one is not renewed again as soon as it is made. The hour by which certificates
  are dated back is no part of that lifetime.
- A next key is announced so long before the renewal that it is used at the renewal. Where a certificate does
  not live that long, the announcement is as long as its life until the renewal.
- A failure is tried again after a minute, then after twice that, up to six hours, but never after more than
  a tenth of the time left. Delays are counted on the monotonic clock, which never jumps; when the wall clock
  is set, what is due may have changed, and the next try is at once.
- Each threshold of an alert is told once for each certificate, and only the tightest that has become true.
  Thresholds that come before a certificate is usually renewed mean nothing for it.

Pure: time and chance are arguments. Must not know: files, keys, how an alert is delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from zcproto.certs.issue import CLOCK_SKEW

Random = Callable[[], float]
"""A number from 0 up to, but not including, 1."""

FIRST_DELAY_S: Final = 60.0
MAX_DELAY_S: Final = 6 * 3600.0
MIN_DELAY_S: Final = 1.0
"""Even in the last seconds of a certificate."""

PART_OF_TIME_LEFT: Final = 10
CLOCK_JUMP_S: Final = 30.0
"""The wall clock was set if it moved by this much more or less than the monotonic one."""

EXPIRED: Final = 0
"""The threshold of an alert that comes too late."""

_DAY: Final = timedelta(days=1)
_USUAL: Final = 1.05 / 3
"""The part of a life in which a certificate is usually renewed, and a little more as others count otherwise."""
_PATIENCE: Final = 4


# --- when -------------------------------------------------------------------------------------------------


def issued_at(not_before: datetime, not_after: datetime) -> datetime:
    """When a certificate was made, which is not when it says that it begins."""
    dated_back = not_after - not_before > CLOCK_SKEW
    return not_before + CLOCK_SKEW if dated_back else not_before


def renewal_due(not_before: datetime, not_after: datetime, renew_before: timedelta) -> datetime:
    """When a certificate is to be renewed."""
    lifetime = not_after - issued_at(not_before, not_after)
    return not_after - min(renew_before, lifetime / 3)


def announcement(
    not_before: datetime, not_after: datetime, renew_before: timedelta, announce_key: timedelta
) -> timedelta:
    """How long before its use the next key of a certificate is announced."""
    due = renewal_due(not_before, not_after, renew_before)
    return min(announce_key, due - issued_at(not_before, not_after))


def renewal_waits_until(not_before: datetime, not_after: datetime, renew_before: timedelta) -> datetime:
    """How long a due renewal waits for an announced key, rather than to make two certificates in a row."""
    due = renewal_due(not_before, not_after, renew_before)
    return due + (not_after - due) / _PATIENCE


# --- failures ---------------------------------------------------------------------------------------------


class Retry:
    """When to try again what has failed."""

    __slots__ = ("_at", "_ceiling", "_failed_at", "_failed_wall", "_random")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._ceiling = FIRST_DELAY_S
        self._at: float | None = None
        self._failed_at = 0.0
        self._failed_wall = datetime.min

    def failed(self, now: float, wall: datetime, left: timedelta) -> float:
        """Notes a failure; `left` is the time until the certificate expires. Returns the delay in seconds."""
        longest = FIRST_DELAY_S
        if left > timedelta(0):
            longest = max(left.total_seconds() / PART_OF_TIME_LEFT, MIN_DELAY_S)
        delay = min(self._ceiling, longest) * (1 + self._random()) / 2
        self._ceiling = min(self._ceiling * 2, MAX_DELAY_S)
        self._at = now + delay
        self._failed_at, self._failed_wall = now, wall
        return delay

    def succeeded(self) -> None:
        """The next failure begins with the first delay."""
        self._ceiling = FIRST_DELAY_S
        self._at = None

    def due(self, now: float, wall: datetime) -> bool:
        """Whether nothing has failed, or it is time to try again."""
        if self._at is None or now >= self._at:
            return True
        moved = (wall - self._failed_wall).total_seconds()
        return abs(moved - (now - self._failed_at)) > CLOCK_JUMP_S

    @property
    def waiting(self) -> bool:
        """Whether the last try failed."""
        return self._at is not None


# --- alerts -----------------------------------------------------------------------------------------------


class Expiring(NamedTuple):
    """A certificate that is served."""

    key: bytes
    """SHA-256 of the certificate."""
    what: str
    """What the operator knows it by: its file."""
    not_after: datetime
    not_before: datetime | None = None
    """With it, thresholds are left out that come before the last third of a certificate's life: one of a week
    would be told of as soon as it is made, every time."""


@dataclass(frozen=True, slots=True)
class ExpiryAlert:
    """Something to tell about the end of a certificate."""

    key: bytes
    """SHA-256 of the certificate."""
    what: str
    """What the operator knows it by: its file."""
    not_after: datetime
    days: int
    """The threshold that was reached; `EXPIRED` if the certificate has expired."""
    left: timedelta
    """Negative if it has expired."""
    ended: bool = False
    """True where the alert about `what` is over: the certificate there is not about to expire, or `what` is no
    longer served. `days` is that of the alert; the rest is of the certificate that is there now, or was last."""


@dataclass(slots=True)
class _Told:
    """What was told of one certificate."""

    days: set[int]
    passed_over: set[int]
    """Wider thresholds that were true, too, when a tighter one was told."""


class ExpiryAlerts:
    """Tells of certificates that come to their end, each threshold once.

    What was told is kept in memory and only for certificates that are served: after a restart it is told
    again if it is still true.
    """

    __slots__ = ("_open", "_thresholds", "_told")

    def __init__(self, alert_days: Iterable[int]) -> None:
        self._thresholds = sorted({EXPIRED, *alert_days})
        self._told: dict[bytes, _Told] = {}
        self._open: dict[str, ExpiryAlert] = {}

    def due(
        self, items: Iterable[Expiring | tuple[bytes, str, datetime]], now: datetime
    ) -> list[ExpiryAlert]:
        """What is to be told now. `items` are all certificates that are served."""
        served: dict[bytes, Expiring] = {}
        for item in items:
            served.setdefault(item[0], Expiring(*item))
        self._told = {key: told for key, told in self._told.items() if key in served}
        alerts = []
        over = dict(self._open)  # those for which no reason is found below
        for key, one in served.items():
            left = one.not_after - now
            days = self._reached(one, left)
            if self._is_new(key, days, left):
                assert days is not None
                self._open[one.what] = ExpiryAlert(key, one.what, one.not_after, days, left)
                alerts.append(self._open[one.what])
            if days is not None:
                over.pop(one.what, None)
            elif one.what in over:
                over[one.what] = ExpiryAlert(key, one.what, one.not_after, over[one.what].days, left)
        for what, alert in over.items():
            del self._open[what]
            alerts.append(replace(alert, left=alert.not_after - now, ended=True))
        return alerts

    def _reached(self, one: Expiring, left: timedelta) -> int | None:
        """The tightest threshold that is true."""
        if left < timedelta(0):
            return EXPIRED
        widest = timedelta.max
        if one.not_before is not None:
            widest = (one.not_after - issued_at(one.not_before, one.not_after)) * _USUAL
        true = (days for days in self._thresholds if days != EXPIRED and left <= days * _DAY <= widest)
        return next(true, None)

    def _is_new(self, key: bytes, days: int | None, left: timedelta) -> bool:
        """Whether this threshold is to be told; notes that it was."""
        told = self._told.setdefault(key, _Told(set(), set()))
        # A clock that was far ahead passes over thresholds that are still to come. One that is set back by
        # less than a day is no reason to tell of a wider threshold after a tighter one.
        told.passed_over = {wider for wider in told.passed_over if left <= (wider + 1) * _DAY}
        if days is None or days in told.days or days in told.passed_over:
            return False
        told.days.add(days)
        told.passed_over.update(wider for wider in self._thresholds if wider > days)
        return True
