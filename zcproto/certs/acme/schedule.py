"""Decides why and when a certificate of a public CA is ordered, and keeps the last failure in a file.

Rules:
- It is ordered if it does not exist, if it lacks a configured name, if it has another key than the managed
  certificate of its type, if it is of another directory, and when its renewal is due.
- Its renewal is due at a random time of the window that the CA suggests (RFC 9773), otherwise like that of a
  managed one. The window can only defer it until half of the usual time before the expiry is left, and bring it
  forward only to MIN_BETWEEN_ORDERS after the last order: a CA may suggest a time in the past for each new one.
- After a failure the next attempt is made when the delay of both sides is over: that of the CA and that of
  `lifecycle.Retry`. A restart does not shorten it, so that a server which is restarted again and again does not use
  up the limits of the CA. Other settings end it.

Must not know: the network, threads. Time and randomness are arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from zcproto.certs import files, lifecycle
from zcproto.certs.names import covers
from zcproto.certs.notices import day
from zcproto.certs.pair import CertificatePair
from zcproto.certs.settings import AcmeSettings
from zcproto.common.files import UnusableFileError, read_file

MAX_RECORD: Final = 16_384
MAX_WAIT: Final = timedelta(days=1)
"""The longest wait that is continued after a restart: a later time was written with a wrong clock."""

LEAST_LEFT: Final = timedelta(minutes=10)
"""Keeps the delay after a failure at half a minute or more, although the certificate is about to expire."""

MIN_BETWEEN_ORDERS: Final = timedelta(hours=1)
"""The least time from one order to a renewal that the CA suggests. A restart does not shorten it."""

_TEXTS: Final = ("directory", "problem", "settings")
_TIMES: Final = ("failed_at", "retry_at", "ordered_at")

NO_HURRY: Final = timedelta(days=365)
"""What counts as the time left if there is no certificate of the CA: the managed one serves."""


@dataclass(frozen=True, slots=True)
class RenewalWindow:
    """When the CA wants a certificate to be renewed (RFC 9773 section 4.2)."""

    start: datetime
    end: datetime
    """Both aware, in UTC."""
    ask_again_s: float
    """Seconds until the CA wants to be asked again."""


def reason_to_order(
    pair: CertificatePair | None,
    managed_pin: str,
    settings: AcmeSettings,
    directory: str,
    due: datetime,
    now: datetime,
) -> str:
    """Return why to order a certificate in place of this one; empty if it is good.

    `managed_pin` is that of the managed certificate of its type, `directory` the CA that issued it.
    """
    if pair is None:
        return "the first one"
    if pair.pin != managed_pin:
        return "its key was replaced"
    for name in settings.names:
        if not any(covers(entry, name) for entry in pair.names):
            return f"it lacks the name {name}"
    if directory != settings.directory:
        return "another directory is configured"
    return f"it expires on {day(pair.not_after)}" if now >= due else ""


def renewal_time(
    pair: CertificatePair,
    renew_before: timedelta,
    window: RenewalWindow | None,
    fraction: float,
    ordered_at: datetime | None,
) -> datetime:
    """Return when to renew a certificate. `fraction`, from 0 to 1, is the place in the window.

    `ordered_at`: when the last order was made, unless it has failed.
    """
    if window is None:
        return lifecycle.renewal_due(pair.not_before, pair.not_after, renew_before)
    suggested = window.start + (window.end - window.start) * fraction
    if ordered_at is not None:
        suggested = max(suggested, ordered_at + MIN_BETWEEN_ORDERS)
    return min(suggested, latest_renewal(pair, renew_before))


def latest_renewal(pair: CertificatePair, renew_before: timedelta) -> datetime:
    """Return until when a certificate should have been renewed."""
    usual = lifecycle.renewal_due(pair.not_before, pair.not_after, renew_before)
    return pair.not_after - (pair.not_after - usual) / 2


def time_left(pair: CertificatePair | None, now: datetime) -> timedelta:
    """Return the time left, by which the delay after a failure is limited."""
    if pair is None or pair.not_after <= now:
        return NO_HURRY
    return max(pair.not_after - now, LEAST_LEFT)


# --- the record --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """What is kept about orders. Times are aware, in UTC, or None."""

    directory: str = ""
    """The CA of the certificates in the folder; empty if unknown."""
    problem: str = ""
    """Why the last order has failed; empty after a success."""
    failed_at: datetime | None = None
    retry_at: datetime | None = None
    settings: str = ""
    """The digest of the settings with which it has failed."""
    ordered_at: datetime | None = None
    """When the last order was made; after a failure, that before it."""

    def waits_until(self, settings: AcmeSettings, now: datetime) -> datetime | None:
        """Return until when no order may be made with these settings; None if one may be made now."""
        is_same = bool(self.problem) and self.settings == digest_of(settings)
        if not is_same or self.retry_at is None or not now < self.retry_at <= now + MAX_WAIT:
            return None
        return self.retry_at


def digest_of(settings: AcmeSettings) -> str:
    """Return a digest that differs between settings."""
    return hashlib.sha256(repr(sorted(asdict(settings).items())).encode()).hexdigest()


def record_path(directory: Path) -> Path:
    return directory / "orders.json"


def read_record(directory: Path) -> OrderRecord:
    """Return the record of a folder; an empty one if it cannot be read."""
    with contextlib.suppress(
        OSError, UnusableFileError, ValueError, TypeError, RecursionError, AttributeError
    ):
        data, _ = read_file(record_path(directory), MAX_RECORD)
        found = json.loads(data)
        issuer, problem, settings = (str(found.get(name, "")) for name in _TEXTS)
        failed_at, retry_at, ordered_at = (_time(found.get(name)) for name in _TIMES)
        return OrderRecord(issuer, problem, failed_at, retry_at, settings, ordered_at)
    return OrderRecord()


def write_record(directory: Path, record: OrderRecord) -> None:
    """Replace the record. Raises CertificateError."""
    found = asdict(record)
    found |= {name: found[name] and found[name].isoformat() for name in _TIMES}
    files.replace(record_path(directory), json.dumps(found, indent=1).encode() + b"\n")


def _time(text: object) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if isinstance(text, str) else None
