"""Decides when a certificate is renewed, when its next key is announced, when a failed renewal is retried, and when
an alert about an approaching expiry is raised.

Rules:
- A certificate is renewed when the time left is at most `renew_before`, and at most a third of its own lifetime, so
  that a short-lived one is not renewed as soon as it is issued. The hour of backdating does not count as lifetime.
- A next key is announced early enough to be used at the renewal. If a certificate does not live that long, the
  announcement lasts from its issue until its renewal.
- A failure is retried after a minute, then after twice the delay, up to six hours, but never after more than a
  tenth of the time left. Delays use the monotonic clock. If the wall clock is changed, the set of due work may
  change too, so the retry is immediate.
- Each alert threshold is reported once for each certificate, and only the tightest one that applies.

Pure: time and randomness are arguments. Must not know: files, keys, how an alert is delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from zcproto.certs.notices import Notice, expiry
from zcproto.common.backoff import HALF, backoff_s

CLOCK_SKEW: Final = timedelta(hours=1)
"""How far certificates are backdated."""

Random = Callable[[], float]
"""Returns a number from 0 up to, but not including, 1."""

FIRST_DELAY_S: Final = 60.0
MAX_DELAY_S: Final = 6 * 3600.0
MIN_DELAY_S: Final = 1.0
"""Applies even in the last seconds of a certificate."""

PART_OF_TIME_LEFT: Final = 10
CLOCK_JUMP_S: Final = 30.0
"""The wall clock was changed if it differs by this much from the monotonic one."""

EXPIRED: Final = 0
"""The threshold of a certificate that has expired."""

_DAY: Final = timedelta(days=1)
_PATIENCE: Final = 4


# --- schedule ----------------------------------------------------------------------------------------------


def issued_at(not_before: datetime, not_after: datetime) -> datetime:
    """Return when a certificate was issued: later than the start of its validity if it was backdated."""
    is_backdated = not_after - not_before > CLOCK_SKEW
    return not_before + CLOCK_SKEW if is_backdated else not_before


def renewal_due(not_before: datetime, not_after: datetime, renew_before: timedelta) -> datetime:
    """Return when to renew a certificate."""
    lifetime = not_after - issued_at(not_before, not_after)
    return not_after - min(renew_before, lifetime / 3)


def announcement(
    not_before: datetime, not_after: datetime, renew_before: timedelta, announce_key: timedelta
) -> timedelta:
    """Return how long before its use to announce the next key of a certificate."""
    due = renewal_due(not_before, not_after, renew_before)
    return min(announce_key, due - issued_at(not_before, not_after))


def renewal_waits_until(not_before: datetime, not_after: datetime, renew_before: timedelta) -> datetime:
    """Return how long a due renewal waits for an announced key, which avoids two renewals in a row."""
    due = renewal_due(not_before, not_after, renew_before)
    return due + (not_after - due) / _PATIENCE


# --- retries -----------------------------------------------------------------------------------------------


class Retry:
    """Schedules the retries of a failed renewal."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._failures = 0
        self._at: float | None = None
        self._failed_at = 0.0
        self._failed_wall = datetime.min

    def failed(self, now: float, wall: datetime, left: timedelta) -> float:
        """Record a failure; `left` is the time until expiry. Return the delay in seconds."""
        longest = FIRST_DELAY_S
        if left > timedelta(0):
            longest = min(max(left.total_seconds() / PART_OF_TIME_LEFT, MIN_DELAY_S), MAX_DELAY_S)
        self._failures += 1
        delay = backoff_s(self._failures, FIRST_DELAY_S, longest, HALF, self._random())
        self._at = now + delay
        self._failed_at, self._failed_wall = now, wall
        return delay

    def succeeded(self) -> None:
        self._failures = 0
        self._at = None

    def due(self, now: float, wall: datetime) -> bool:
        """Return True if nothing has failed, or a retry is due."""
        if self._at is None or now >= self._at:
            return True
        moved = (wall - self._failed_wall).total_seconds()
        return abs(moved - (now - self._failed_at)) > CLOCK_JUMP_S

    @property
    def is_waiting(self) -> bool:
        """Whether the last attempt failed."""
        return self._at is not None


# --- expiry alerts -----------------------------------------------------------------------------------------


class Expiring(NamedTuple):
    """Something in use that expires: a certificate or a revocation list."""

    sha256: bytes
    path: str
    """Its file, by which the operator identifies it."""
    not_after: datetime
    subject: str = ""
    """Of an authority."""


@dataclass(slots=True)
class _ReportedThresholds:
    """What was reported about one certificate."""

    days: set[int]
    passed_over: set[int]
    """Wider thresholds that also applied when a tighter one was reported."""


class ExpiryAlerts:
    """Reports each threshold of an approaching expiry once.

    State is kept in memory and only for certificates in use: after a restart, a threshold that still applies is
    reported again.
    """

    def __init__(self, alert_days: Iterable[int]) -> None:
        self._thresholds = sorted({EXPIRED, *alert_days})
        self._reported: dict[bytes, _ReportedThresholds] = {}
        self._open: dict[str, tuple[datetime, int]] = {}  # path: expiry and threshold

    def due(self, items: Iterable[Expiring], now: datetime) -> list[Notice]:
        """Return the alerts to raise or to end now. `items` are all certificates and lists in use.

        An alert about a path ends if the certificate there is not about to expire, or if the path is not in use.
        """
        current: dict[bytes, Expiring] = {}
        for item in items:
            current.setdefault(item.sha256, item)
        self._reported = {key: seen for key, seen in self._reported.items() if key in current}
        alerts = []
        ended = dict(self._open)  # reduced below to the alerts that no longer have a reason
        for key, one in current.items():
            left = one.not_after - now
            days = self._reached(left)
            if self._is_new(key, days, left):
                assert days is not None
                self._open[one.path] = one.not_after, days
                alerts.append(expiry(one.path, one.not_after, left, days))
            if days is not None:
                ended.pop(one.path, None)
            elif one.path in ended:
                ended[one.path] = one.not_after, ended[one.path][1]
        for path, (not_after, threshold) in ended.items():
            del self._open[path]
            alerts.append(expiry(path, not_after, not_after - now, threshold, ended=True))
        return alerts

    def _reached(self, left: timedelta) -> int | None:
        """Return the tightest threshold that applies."""
        if left < timedelta(0):
            return EXPIRED
        return next((days for days in self._thresholds if days != EXPIRED and left <= days * _DAY), None)

    def _is_new(self, key: bytes, days: int | None, left: timedelta) -> bool:
        """Return True if this threshold has not been reported yet, and record it."""
        reported = self._reported.setdefault(key, _ReportedThresholds(set(), set()))
        # A clock that was far ahead passes over thresholds that are still to come. A clock that is set back by less
        # than a day must not report a wider threshold after a tighter one.
        reported.passed_over = {wider for wider in reported.passed_over if left <= (wider + 1) * _DAY}
        if days is None or days in reported.days or days in reported.passed_over:
            return False
        reported.days.add(days)
        reported.passed_over.update(wider for wider in self._thresholds if wider > days)
        return True
