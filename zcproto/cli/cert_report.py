"""What `certs.examine` finds in the files of a configuration, as text and as JSON.

Every text from a certificate is escaped for a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import pair
from zcproto.certs.examine import FileState, Survey, SurveyedCertificate, is_self_signed, type_of
from zcproto.certs.notices import day
from zcproto.common.text import aligned, escape_text
from zcproto.tls import pins

MAX_SHOWN_NAMES = 8
MAX_SHOWN_NAME = 200
SHORT_LIFE = timedelta(days=7)
"""The times of certificates with a shorter lifetime are shown with hours."""

_DAY = timedelta(days=1)


# --- text --------------------------------------------------------------------------------------------------


def as_text(found: Survey, now: datetime) -> str:
    """Return tables of about 100 columns."""
    issuer = {"own": "its own CA", "acme": "the CA of acme.directory", "files": "other programs"}[found.mode]
    parts = [f"Issued by {issuer}; the folder is {escape_text(str(found.directory))}."]
    head = ("site", "key", "from", "until", "days left", "renewal due", "status", "file")
    parts.append(aligned([head, *(_summary(row, found, now) for row in found.certificates)], right=(4,)))
    served = [(_file(row, found), row.leaf) for row in found.certificates if row.use == "server" and row.leaf]
    if served:
        parts.append(aligned([("file", "pin"), *((file, key_pin(leaf)) for file, leaf in served)]))
        details = [
            (file, "itself" if is_self_signed(leaf) else issuer_of(leaf), shown_names(names_of(leaf)) or "-")
            for file, leaf in served
        ]
        parts.append(aligned([("file", "issuer", "names"), *details]))
    if found.next_pins is not None:
        title = f"Next pins, announced to clients and used from {day(found.next_pins.use_from)}:"
        parts.append("\n".join((title, *found.next_pins.pins)))
    if found.clients or found.crls:
        parts.append(_clients(found, now))
    if any(row.state is FileState.NOT_MADE for row in found.certificates):
        parts.append("Certificates that are not made yet are issued when the server starts.")
    problems = [row.problem for row in found.certificates if row.problem] + list(found.problems)
    parts += [f"PROBLEM: {escape_text(problem)}" for problem in problems]
    parts += [f"NOTE: {escape_text(row.note)}" for row in found.certificates if row.note]
    return "\n\n".join(parts)


def days_left(certificate: x509.Certificate, now: datetime) -> int:
    """Return the whole days until expiry; negative after it."""
    return (certificate.not_valid_after_utc - now) // _DAY


def key_pin(certificate: x509.Certificate) -> str:
    """Return the pin of its key; "unreadable" if that cannot be parsed, which is reported as a problem."""
    try:
        return pins.key_pin(certificate.public_key())
    except pair.UNREADABLE:
        return "unreadable"


def certificate_pin(certificate: x509.Certificate) -> str:
    return pins.certificate_pin(certificate.public_bytes(serialization.Encoding.DER))


def shown_names(names: Sequence[str]) -> str:
    more = len(names) - MAX_SHOWN_NAMES
    text = ", ".join(escape_text(name, MAX_SHOWN_NAME) for name in names[:MAX_SHOWN_NAMES])
    return f"{text} and {more} more" if more > 0 else text


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return its names; none if they cannot be parsed, which is reported as a problem."""
    try:
        return pair.names_of(certificate)
    except pair.UNREADABLE:
        return ()


def issuer_of(certificate: x509.Certificate) -> str:
    return escape_text(certificate.issuer.rfc4514_string(), MAX_SHOWN_NAME)


def _summary(row: SurveyedCertificate, found: Survey, now: datetime) -> tuple[str, ...]:
    site = {"server": shown_names(row.site) or "default", "ca": "own CA", "client-ca": "client CA"}[row.use]
    begin = end = days = due = "-"
    form = "%Y-%m-%d"
    if row.leaf is not None:
        first, last = row.leaf.not_valid_before_utc, row.leaf.not_valid_after_utc
        if last - first < SHORT_LIFE:
            form += " %H:%M"
        begin, end, days = f"{first:{form}}", f"{last:{form}}", str(days_left(row.leaf, now))
    if row.renewal_due is not None:
        due = f"{row.renewal_due:{form}}"
    return (site, row.key_type or "-", begin, end, days, due, row.state.value, _file(row, found))


def _file(row: SurveyedCertificate, found: Survey) -> str:
    is_inside = row.certificate.parent == found.directory
    return escape_text(row.certificate.name if is_inside else str(row.certificate))


def _clients(found: Survey, now: datetime) -> str:
    lines = []
    if found.clients:
        valid = sum(entry.revoked_at is None and entry.not_after >= now for entry in found.clients)
        revoked = sum(entry.revoked_at is not None for entry in found.clients)
        lines.append(f"Client certificates: {valid} valid, {revoked} revoked; --json lists them.")
    for path, crl in found.crls:
        end = crl.next_update_utc
        validity = "without expiry" if end is None else f"valid until {day(end)}"
        name = escape_text(path.name)
        lines.append(f"{name} has {len(crl)} revoked; signed {day(crl.last_update_utc)}, {validity}.")
    return "\n".join(lines)


# --- JSON --------------------------------------------------------------------------------------------------


def as_data(found: Survey, now: datetime) -> dict[str, Any]:
    """Return everything as data for JSON. Times are RFC 3339 in UTC; missing values are null."""
    following = found.next_pins
    return {
        "good": found.is_good,
        "mode": found.mode,
        "directory": str(found.directory),
        "certificates": [_row_data(row, now) for row in found.certificates],
        "next_pins": following and {"pins": list(following.pins), "use_from": timestamp(following.use_from)},
        "clients": [
            {
                "name": entry.name,
                "serial": entry.serial,
                "not_after": timestamp(entry.not_after),
                "revoked_at": entry.revoked_at and timestamp(entry.revoked_at),
                "reason": entry.reason or None,
            }
            for entry in found.clients
        ],
        "client_crl": [
            {
                "file": str(path),
                "signed_at": timestamp(crl.last_update_utc),
                "not_after": crl.next_update_utc and timestamp(crl.next_update_utc),
                "revoked": len(crl),
            }
            for path, crl in found.crls
        ],
        "problems": list(found.problems),
    }


def certificate_data(certificate: x509.Certificate, now: datetime) -> dict[str, Any]:
    """Return what is in a certificate."""
    return {
        "key_type": type_of(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:X}",
        "names": list(names_of(certificate)),
        "not_before": timestamp(certificate.not_valid_before_utc),
        "not_after": timestamp(certificate.not_valid_after_utc),
        "days_left": days_left(certificate, now),
        "pin": key_pin(certificate),
        "certificate_pin": certificate_pin(certificate),
    }


def timestamp(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"


def _row_data(row: SurveyedCertificate, now: datetime) -> dict[str, Any]:
    return {
        "use": row.use,
        "site": list(row.site),
        **(dict.fromkeys(_CERTIFICATE_KEYS) if row.leaf is None else certificate_data(row.leaf, now)),
        "key_type": row.key_type or None,
        "renewal_due": row.renewal_due and timestamp(row.renewal_due),
        "certificate": str(row.certificate),
        "key": row.key and str(row.key),
        "status": row.state.value,
        "problem": row.problem or None,
        "note": row.note or None,
    }


_CERTIFICATE_KEYS = (
    "key_type", "subject", "issuer", "serial", "names", "not_before", "not_after", "days_left", "pin",
    "certificate_pin",
)  # fmt: skip
