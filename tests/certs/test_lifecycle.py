from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from tests.certs.support import DAY, NOW
from zcproto.certs import lifecycle
from zcproto.certs.lifecycle import CLOCK_SKEW, EXPIRED, Expiring, ExpiryAlerts, Retry
from zcproto.certs.notices import Notice, NoticeKind

HOUR, MINUTE, SECOND = timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)
ALERT_DAYS = (30, 14, 7, 3, 1)


def made(lifetime: timedelta) -> tuple[datetime, datetime]:
    """The times in a certificate that is made here at NOW."""
    return NOW - CLOCK_SKEW, NOW + lifetime


# --- renewals


@pytest.mark.parametrize(
    ("lifetime", "renew_before", "left"),
    [
        (90 * DAY, 30 * DAY, 30 * DAY),
        (90 * DAY, 10 * DAY, 10 * DAY),
        (90 * DAY, 89 * DAY, 30 * DAY),
        (9 * DAY, 30 * DAY, 3 * DAY),
        (3 * HOUR, 30 * DAY, HOUR),
        (3 * MINUTE, 30 * DAY, MINUTE),  # the hour before is twenty times as long
        (3 * SECOND, 30 * DAY, SECOND),
    ],
)
def test_renewal_is_due_in_time_and_within_the_last_third_of_the_lifetime(
    lifetime: timedelta, renew_before: timedelta, left: timedelta
) -> None:
    assert lifecycle.renewal_due(*made(lifetime), renew_before) == NOW + lifetime - left


@pytest.mark.parametrize("total", [HOUR, 30 * MINUTE, SECOND])
def test_certificate_shorter_than_an_hour_was_not_backdated(total: timedelta) -> None:
    assert lifecycle.renewal_due(NOW, NOW + total, DAY) == NOW + total - total / 3


def test_renewal_is_never_due_at_issue() -> None:
    for seconds in (1, 2, 59, 60, 3600, 3601, 86_400, 397 * 86_400):
        assert lifecycle.renewal_due(*made(seconds * SECOND), 396 * DAY) > NOW


@pytest.mark.parametrize(
    ("lifetime", "announce_key", "length"),
    [
        (90 * DAY, 7 * DAY, 7 * DAY),
        (90 * DAY, timedelta(0), timedelta(0)),
        (6 * DAY, 7 * DAY, 4 * DAY),  # all its life until it is renewed
        (90 * DAY, 80 * DAY, 60 * DAY),
    ],
)
def test_announcement_has_the_configured_length_or_fits_the_lifetime(
    lifetime: timedelta, announce_key: timedelta, length: timedelta
) -> None:
    assert lifecycle.announcement(*made(lifetime), 30 * DAY, announce_key) == length


def test_renewal_waits_for_a_key_for_a_quarter_of_the_time_left() -> None:
    assert lifecycle.renewal_waits_until(*made(90 * DAY), 30 * DAY) == NOW + 67.5 * DAY


# --- retries


def fails(retry: Retry, left: timedelta, times: int) -> list[float]:
    """The delays of failures one after the other, each when the delay before is over."""
    now, delays = 0.0, []
    for _ in range(times):
        delays.append(retry.failed(now, NOW + now * SECOND, left))
        now += delays[-1]
    return delays


def test_retry_delay_doubles_from_a_minute_to_six_hours() -> None:
    delays = fails(Retry(lambda: 1.0), 90 * DAY, 12)
    assert delays == [60.0 * 2**step for step in range(9)] + [6 * 3600.0] * 3


def test_half_of_a_retry_delay_is_random() -> None:
    assert fails(Retry(lambda: 0.0), 90 * DAY, 2) == [30.0, 60.0]


@pytest.mark.parametrize("lifetime", [20 * SECOND, 3 * MINUTE, HOUR, 30 * DAY])
def test_renewal_is_retried_often_before_expiry(lifetime: timedelta) -> None:
    """However short the time that is left: a renewal that can succeed again has many chances."""
    retry, elapsed, tries = Retry(lambda: 1.0), 0.0, 0
    while (left := lifetime - elapsed * SECOND) > timedelta(0):
        delay = retry.failed(elapsed, NOW + elapsed * SECOND, left)
        assert delay <= max(left.total_seconds() / 10, 1.0)
        elapsed, tries = elapsed + delay, tries + 1
    assert 15 <= tries < 300
    assert elapsed - lifetime.total_seconds() <= 1.0


def test_renewal_is_retried_every_minute_after_expiry() -> None:
    assert fails(Retry(lambda: 1.0), -DAY, 6) == [60.0] * 6


def test_retry_is_due_without_a_failure_or_after_the_delay() -> None:
    retry = Retry(lambda: 1.0)
    assert retry.due(0.0, NOW)
    assert not retry.is_waiting
    retry.failed(100.0, NOW, 30 * DAY)
    assert retry.is_waiting
    assert not retry.due(159.9, NOW + 59.9 * SECOND)
    assert retry.due(160.0, NOW + 60 * SECOND)
    retry.failed(160.0, NOW + 60 * SECOND, 30 * DAY)
    assert not retry.due(279.0, NOW + 179 * SECOND)
    retry.succeeded()
    assert not retry.is_waiting
    assert retry.due(160.0, NOW + 60 * SECOND)
    assert retry.failed(161.0, NOW, 30 * DAY) == 60.0


@pytest.mark.parametrize("jump", [-3650 * DAY, -MINUTE, MINUTE, 3650 * DAY])
def test_clock_change_makes_a_retry_due_at_once(jump: timedelta) -> None:
    retry = Retry(lambda: 1.0)
    fails(retry, 90 * DAY, 8)
    retry.failed(1e6, NOW, 90 * DAY)
    assert not retry.due(1e6 + 10, NOW + 10 * SECOND)
    assert not retry.due(1e6 + 10, NOW + 30 * SECOND)  # slewed, not set
    assert retry.due(1e6 + 10, NOW + 10 * SECOND + jump)
    retry.failed(1e6 + 10, NOW + jump, 90 * DAY)  # it is not tried again and again
    assert not retry.due(1e6 + 11, NOW + jump + SECOND)


def test_wrong_clock_does_not_stop_retries() -> None:
    retry = Retry(lambda: 1.0)
    retry.failed(0.0, NOW, 90 * DAY)
    assert retry.due(60.0, NOW)


# --- alerts


def has_ended(alert: Notice) -> bool:
    return alert.kind is NoticeKind.EXPIRY_ENDED


class ServedCertificates:
    """The certificates that a server serves, and the alerts about them."""

    def __init__(self, alert_days: Sequence[int] = ALERT_DAYS) -> None:
        self.alerts = ExpiryAlerts(alert_days)
        self.items = {"server.crt": (b"a", NOW + 90 * DAY)}

    def due(self, now: datetime) -> list[Notice]:
        return self.alerts.due([Expiring(key, path, end) for path, (key, end) in self.items.items()], now)

    def days(self, left: timedelta) -> list[int]:
        """Return the thresholds reported with this much time left for the first certificate."""
        alerts = self.due(NOW + 90 * DAY - left)
        assert not any(has_ended(alert) for alert in alerts)
        return [alert.days for alert in alerts]


def test_each_threshold_is_reported_once_at_its_time() -> None:
    served, reported = ServedCertificates(), list[tuple[timedelta, int]]()
    left = 40 * DAY
    while left > -5 * DAY:
        reported += [(left, days) for days in served.days(left)]
        left -= HOUR
    assert reported == [*((days * DAY, days) for days in ALERT_DAYS), (-HOUR, EXPIRED)]


def test_alert_has_path_threshold_and_expiry() -> None:
    served = ServedCertificates()
    now = NOW + 84 * DAY
    (soon,) = served.due(now)
    assert (soon.path, soon.not_after, soon.days, soon.left) == ("server.crt", NOW + 90 * DAY, 7, 6 * DAY)
    (expired,) = served.due(NOW + 91 * DAY)
    assert (expired.days, expired.left) == (EXPIRED, -DAY)


def test_last_second_of_a_certificate_is_before_its_expiry() -> None:
    assert ServedCertificates().days(timedelta(0)) == [1]
    assert ServedCertificates().days(-SECOND) == [EXPIRED]


@pytest.mark.parametrize(("left", "days"), [(5 * DAY, 7), (30 * DAY, 30), (HOUR, 1), (-DAY, EXPIRED)])
def test_late_start_reports_only_the_tightest_threshold(left: timedelta, days: int) -> None:
    served = ServedCertificates()
    assert served.days(left) == [days]
    assert served.days(left) == []
    assert ServedCertificates().days(left) == [days]  # after a restart it is still true


def test_only_expiry_is_reported_without_thresholds() -> None:
    served = ServedCertificates(())
    assert served.days(HOUR) == []
    assert served.days(-HOUR) == [EXPIRED]


def test_every_certificate_has_separate_alerts() -> None:
    served = ServedCertificates()
    served.items["b.crt"] = (b"b", NOW + 70 * DAY)
    served.items["copy of a.crt"] = (b"a", NOW + 90 * DAY)
    assert [alert.path for alert in served.due(NOW + 41 * DAY)] == ["b.crt"]
    assert [(alert.path, alert.days) for alert in served.due(NOW + 60 * DAY)] == [
        ("server.crt", 30),
        ("b.crt", 14),
    ]


def test_swinging_clock_repeats_no_alert() -> None:
    served, chance = ServedCertificates(), random.Random(3)
    reported: list[int] = []
    for _ in range(3000):
        alerts = served.due(NOW + 90 * DAY - chance.uniform(-10, 60) * DAY)
        reported += [alert.days for alert in alerts if not has_ended(alert)]
    assert sorted(reported) == sorted({EXPIRED, *ALERT_DAYS})


def test_clock_set_back_slightly_reports_no_wider_threshold() -> None:
    served = ServedCertificates()
    assert served.days(6.99 * DAY) == [7]
    assert served.days(7.01 * DAY) == []
    assert served.days(6.99 * DAY) == []
    assert served.days(3 * DAY) == [3]


def test_clock_far_ahead_suppresses_no_later_threshold() -> None:
    served = ServedCertificates()
    assert served.days(5 * DAY) == [7]
    (over,) = served.due(NOW)
    assert has_ended(over)
    assert served.days(30 * DAY) == [30]
    assert served.days(14 * DAY) == [14]
    assert served.days(7 * DAY) == []  # reported before
    assert served.days(3 * DAY) == [3]


def test_alert_ends_when_the_certificate_is_replaced() -> None:
    served = ServedCertificates()
    now = NOW + 86 * DAY
    assert [alert.days for alert in served.due(now)] == [7]
    served.items["server.crt"] = (b"new", now + 90 * DAY)
    (over,) = served.due(now)
    assert has_ended(over)
    assert (over.path, over.not_after, over.days, over.left) == ("server.crt", now + 90 * DAY, 7, 90 * DAY)
    assert served.due(now) == []


def test_alert_does_not_end_if_the_replacement_expires_soon_too() -> None:
    served = ServedCertificates()
    now = NOW + 84 * DAY
    served.due(now)
    served.items["server.crt"] = (b"b", now + 10 * DAY)
    assert [(alert.days, has_ended(alert)) for alert in served.due(now)] == [(14, False)]
    served.items["server.crt"] = (b"c", now + 90 * DAY)
    assert [has_ended(alert) for alert in served.due(now)] == [True]


def test_certificate_without_an_alert_ends_silently() -> None:
    served = ServedCertificates()
    assert served.due(NOW) == []
    served.items["server.crt"] = (b"b", NOW + 80 * DAY)
    assert served.due(NOW) == []


def test_certificate_no_longer_served_is_forgotten() -> None:
    served = ServedCertificates()
    served.items |= {f"{number}.crt": (b"%d" % number, NOW + DAY) for number in range(1000)}
    assert len(served.due(NOW)) == 1000
    only = {"server.crt": served.items["server.crt"]}
    gone, served.items = served.items, only
    over = served.due(NOW)
    assert len(over) == 1000
    assert all(has_ended(alert) and alert.days == 1 and alert.left == DAY for alert in over)
    served.items = gone
    assert len(served.due(NOW)) == 1000


def test_thresholds_can_be_in_any_order() -> None:
    served = ServedCertificates((1, 30, 7))
    assert [served.days(left * DAY) for left in (31, 29, 6, 0.5)] == [[], [30], [7], [1]]


def test_alerts_of_one_certificate_get_tighter() -> None:
    served = ServedCertificates((5, 4, 3, 2, 1))
    reported = [days for left in range(10, -3, -1) for days in served.days(left * DAY)]
    assert all(wide > tight for wide, tight in pairwise(reported))
