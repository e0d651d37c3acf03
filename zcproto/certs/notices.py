"""What happens to certificates, as values: notices to be logged and counted, some of which raise alerts.

Must not know: the log, alerts, how certificates are issued or loaded.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from zcproto.certs.pair import CertificatePair
from zcproto.common.text import escape_text

MAX_SUBJECT = 200
"""Characters of a name from a certificate in a notice."""


class NoticeKind(enum.Enum):
    """What a notice is about."""

    LOADED = "loaded"
    """A certificate that was found in its place is served."""
    RENEWED = "renewed"
    """A certificate that was issued just now is served."""
    KEY_ROTATED = "key_rotated"
    """A certificate that was issued just now has another key than the one before it."""
    KEY_REPLACED = "key_replaced"
    """A key that was damaged or lost has been replaced."""
    NEXT_PINS = "next_pins"
    """The pins of next keys are announced, or their time has changed."""
    RENEWAL_FAILED = "renewal_failed"
    RENEWAL_RECOVERED = "renewal_recovered"
    FILES_BAD = "files_bad"
    """Files of other programs cannot be used; the last valid ones remain in use."""
    FILES_RECOVERED = "files_recovered"
    CLIENT_TRUST_LOADED = "client_trust_loaded"
    """The authorities for clients, or their revocation lists, have changed."""
    EXPIRY = "expiry"
    """A certificate or a revocation list is about to expire, or has expired."""
    EXPIRY_ENDED = "expiry_ended"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened. It contains no secret."""

    kind: NoticeKind
    path: str
    """The file or folder that it is about."""
    message: str
    """A sentence."""
    pins: tuple[str, ...] = ()
    """LOADED, RENEWED, KEY_ROTATED, NEXT_PINS: the pins of the keys. KEY_REPLACED: the old one, if known, and the
    new one."""
    not_after: datetime | None = None
    """LOADED, RENEWED, EXPIRY, EXPIRY_ENDED: the expiry, aware, in UTC."""
    days: int | None = None
    """EXPIRY, EXPIRY_ENDED: the threshold that was reached; 0 after the expiry."""
    left: timedelta | None = None
    """EXPIRY, EXPIRY_ENDED: the time left; negative after the expiry."""


def loaded(before: Iterable[CertificatePair], after: Iterable[CertificatePair]) -> list[Notice]:
    """Return a notice for each pair that was not there before."""
    known = set(before)
    return [_about(NoticeKind.LOADED, "Loaded", one) for one in after if one not in known]


def renewed(one: CertificatePair) -> Notice:
    return _about(NoticeKind.RENEWED, "Issued", one)


def rotated(one: CertificatePair) -> Notice:
    message = f"{one.certificate} has a new key, pin {one.pin}."
    return Notice(NoticeKind.KEY_ROTATED, str(one.certificate), message, pins=(one.pin,))


def key_replaced(path: str, old_pin: str, new_pin: str) -> Notice:
    message = (
        f"{path} was damaged or lost and has been replaced:"
        f" its pin was {old_pin or 'not readable'} and is now {new_pin}."
        " Clients that pin the old key refuse this server: give them the new pin, or restore the old key."
    )
    return Notice(NoticeKind.KEY_REPLACED, path, message, pins=(*filter(None, [old_pin]), new_pin))


def expiry(path: str, not_after: datetime, left: timedelta, days: int, *, ended: bool = False) -> Notice:
    """Return the notice of an alert about an approaching expiry, or of its end."""
    kind, message = (
        NoticeKind.EXPIRY,
        f"{path} expires on {day(not_after)}, in {left // timedelta(days=1)} days.",
    )
    if ended:
        kind, message = NoticeKind.EXPIRY_ENDED, f"{path} is no longer about to expire."
    elif left < timedelta(0):
        message = f"{path} expired on {day(not_after)}."
    return Notice(kind, path, message, not_after=not_after, days=days, left=left)


def _about(kind: NoticeKind, verb: str, one: CertificatePair) -> Notice:
    names = escape_text(", ".join(one.names), MAX_SUBJECT) or "no names"
    message = (
        f"{verb} {one.certificate}: {one.key_type} for {names}; valid until {day(one.not_after)};"
        f" SHA-256 {one.leaf_sha256.hex()}; pin {one.pin}."
    )
    return Notice(kind, str(one.certificate), message, pins=(one.pin,), not_after=one.not_after)


def day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
