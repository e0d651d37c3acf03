"""What `zcproto cert show` finds in the files of a configuration, and how it is written for people and as JSON.

Rules: nothing is changed, made or repaired. What cannot be served is told in the words in which a server
refuses it. Every text that comes from a certificate is made printable.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import NextPins, authority, client_ca, keys, lifecycle, pair, rollover
from zcproto.certs.crl import read_lists
from zcproto.certs.external import ExternalSite, load_site
from zcproto.certs.issued import Issued
from zcproto.certs.settings import certificate_settings
from zcproto.certs.sources import MAX_AUTHORITIES
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError

if TYPE_CHECKING:
    from zcproto.config import Config

OK = "ok"
DUE = "renewal due"
EXPIRED = "expired"
PROBLEM = "problem"
NOT_MADE = "not made yet"
BAD = (EXPIRED, PROBLEM)

MAX_SHOWN_NAMES = 8
MAX_SHOWN_NAME = 200
SHORT_LIFE = timedelta(days=7)
"""Of certificates that live shorter the hours are shown."""

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One certificate of the configuration."""

    use: str
    """`server`, `ca` or `client-ca`."""
    site: tuple[str, ...]
    """The names for which it is served; empty for the default site."""
    certificate: Path
    key: Path | None
    leaf: x509.Certificate | None
    """None if it is missing or cannot be read."""
    key_type: str
    renewal_due: datetime | None
    status: str
    problem: str = ""
    """Why it cannot be used, and the cure."""


@dataclass(frozen=True, slots=True)
class RevokedList:
    """A list of revoked client certificates."""

    path: Path
    signed_at: datetime
    not_after: datetime | None
    """From then on a server that has no newer one refuses every client."""
    count: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `show` shows."""

    mode: str
    directory: Path
    rows: tuple[Row, ...]
    next_pins: NextPins | None
    clients: tuple[Issued, ...]
    revoked: tuple[RevokedList, ...]
    problems: tuple[str, ...]
    """What is wrong beside the certificates."""

    @property
    def is_good(self) -> bool:
        return not self.problems and all(row.status not in BAD for row in self.rows)


def report(config: Config, now: datetime, environ: Mapping[str, str]) -> Report:
    """What is in the files of this configuration at `now`."""
    certificates = config.certificates
    directory = certificates.directory
    problems: list[str] = []
    rows = [*_served(config, now, environ), *_authorities(config, now)]
    issued: tuple[Issued, ...] = ()
    revoked: tuple[RevokedList, ...] = ()
    try:
        issued = client_ca.issued_clients(directory)
        revoked = tuple(_revoked_lists(config))
    except CertificateError as error:
        problems.append(str(error))
    problems += [
        f"{one.path}: ended on {moment(one.not_after)}, so every client is refused; get it signed anew"
        for one in revoked
        if one.not_after is not None and now > one.not_after
    ]
    next_pins = rollover.announced(directory, problems.append) if certificates.mode == "own" else None
    return Report(certificates.mode, directory, tuple(rows), next_pins, issued, revoked, tuple(problems))


def rows_of_site(found: Report, name: str | None) -> list[Row]:
    """What a client gets that asks for `name`: an exact name goes before a wildcard, then the default site."""
    served = [row for row in found.rows if row.use == "server"]
    if name is not None:
        lower = name.lower()
        for wanted in (lower, "*." + lower.partition(".")[2]):
            if rows := [row for row in served if wanted in row.site]:
                return rows
    return [row for row in served if not row.site]


def external_sites(config: Config) -> Iterator[ExternalSite]:
    """The sites whose certificates others make; the default one, if it is one of them, comes first."""
    settings = certificate_settings(config)
    if isinstance(settings.default, ExternalSite):
        yield settings.default
    yield from settings.sites


def managed_files(config: Config) -> Iterator[tuple[str, Path, Path]]:
    """The own certificates of this configuration: type of key, certificate, key."""
    for key_type in config.certificates.key_types:
        yield key_type, *rollover.pair_paths(config.certificates.directory, key_type)


# --- what there is ---------------------------------------------------------------------------------------


def _served(config: Config, now: datetime, environ: Mapping[str, str]) -> Iterator[Row]:
    renew_before = timedelta(seconds=config.certificates.renew_before)
    if config.certificates.mode == "own":
        for key_type, certificate, key in managed_files(config):
            if certificate.exists():
                yield _own_row(config.certificates.directory, certificate, key, now, renew_before)
            else:
                yield Row("server", (), certificate, key, None, key_type, None, NOT_MADE)
    for site in external_sites(config):
        yield from _foreign_rows(site, now, renew_before, environ)


def _own_row(directory: Path, certificate: Path, key: Path, now: datetime, renew_before: timedelta) -> Row:
    row = _row((), certificate, key, now, renew_before, None)
    ca, _ = authority.SERVER.paths(directory)
    if row.leaf is None or row.problem or not ca.exists():
        return row
    try:
        issued = pair.is_issued_by(row.leaf, pair.read_certificates(ca)[0])
    except CertificateError:
        return row  # it has a row of its own
    problem = f"{certificate}: was not issued by the own authority ({ca}); move it away to have one made"
    return row if issued else replace(row, status=PROBLEM, problem=problem)


def _foreign_rows(
    site: ExternalSite, now: datetime, renew_before: timedelta, environ: Mapping[str, str]
) -> Iterator[Row]:
    passphrase, trouble = None, ""
    try:
        passphrase = site.passphrase.read(environ)
    except CertificateError as error:
        trouble = str(error)
    rows = [
        _row(site.names, certificate, key, now, renew_before, passphrase, trouble)
        for certificate, key in zip(site.certificates, site.keys or site.certificates, strict=True)
    ]
    if all(row.status not in BAD for row in rows):
        try:
            load_site(site, now, environ)
        except CertificateError as error:  # what is wrong with all of them together
            rows[0] = replace(rows[0], status=PROBLEM, problem=str(error))
    yield from rows


def _row(
    site: tuple[str, ...],
    certificate: Path,
    key: Path,
    now: datetime,
    renew_before: timedelta,
    passphrase: bytes | None,
    problem: str = "",
) -> Row:
    try:
        pair.load_pair(certificate, key, now, passphrase)
    except CertificateError as error:
        problem = problem or str(error)
    leaf, key_type, due = None, "", None
    try:
        leaf = pair.read_certificates(certificate)[0]
        key_type = keys.key_type_of(leaf.public_key())
        due = lifecycle.renewal_due(leaf.not_valid_before_utc, leaf.not_valid_after_utc, renew_before)
    except (CertificateError, *pair.UNREADABLE) as error:
        problem = problem or str(error)
    return Row(
        "server", site, certificate, key, leaf, key_type, due, _status(leaf, due, problem, now), problem
    )


def _authorities(config: Config, now: datetime) -> Iterator[Row]:
    directory = config.certificates.directory
    lifetime = timedelta(seconds=config.certificates.lifetime)
    if config.certificates.mode == "own":
        yield from _authority("ca", *authority.SERVER.paths(directory), now, lifetime)
    if config.tls.client_ca_file is not None:
        yield from _authority("client-ca", config.tls.client_ca_file, None, now, None)
    else:
        yield from _authority("client-ca", *authority.CLIENT.paths(directory), now, None)


def _authority(
    use: str, certificate: Path, key: Path | None, now: datetime, lifetime: timedelta | None
) -> Iterator[Row]:
    if key is not None and not certificate.exists() and not key.exists():
        return
    try:
        found = pair.read_certificates(certificate, MAX_AUTHORITIES)
    except CertificateError as error:
        yield Row(use, (), certificate, key, None, "", None, PROBLEM, str(error))
        return
    for each in found:
        problem = "" if key is None else _key_problem(each, certificate, key)
        due = None if lifetime is None else each.not_valid_after_utc - lifetime
        status = _status(each, due, problem, now)
        yield Row(use, (), certificate, key, each, type_of(each), due, status, problem)


def _key_problem(certificate: x509.Certificate, path: Path, key: Path) -> str:
    try:
        mine = keys.belongs(pair.read_private_key(key), certificate.public_key())
    except (CertificateError, *pair.UNREADABLE) as error:
        return f"{error}; until then nothing can be issued"
    return (
        "" if mine else f"{key}: does not belong to {path}, so nothing can be issued; restore the right key"
    )


def _revoked_lists(config: Config) -> Iterator[RevokedList]:
    path = config.tls.client_crl_file
    if path is None:
        path = config.certificates.directory / "client-ca.crl"
        if config.tls.client_ca_file is not None or not path.exists():
            return
    with pair.parsing(path, "revocation list"):
        for crl in read_lists(path):
            yield RevokedList(path, crl.last_update_utc, crl.next_update_utc, len(crl))


def type_of(certificate: x509.Certificate) -> str:
    try:
        return keys.key_type_of(certificate.public_key())
    except pair.UNREADABLE:
        return "unreadable"


def _status(leaf: x509.Certificate | None, due: datetime | None, problem: str, now: datetime) -> str:
    if leaf is not None and now > leaf.not_valid_after_utc:
        return EXPIRED
    if problem:
        return PROBLEM
    return DUE if due is not None and now >= due else OK


# --- how it is shown -------------------------------------------------------------------------------------


def as_text(found: Report, now: datetime) -> str:
    """Tables for people, of about 100 columns."""
    made_by = "its own CA" if found.mode == "own" else "others"
    parts = [f"Made by {made_by}; the folder is {escape_text(str(found.directory))}."]
    head = ("site", "key", "from", "until", "days left", "renewal due", "status", "file")
    parts.append(table([head, *(_summary(row, found, now) for row in found.rows)], right=(4,)))
    served = [(_file(row, found), row.leaf) for row in found.rows if row.use == "server" and row.leaf]
    if served:
        parts.append(table([("file", "pin"), *((file, key_pin(leaf)) for file, leaf in served)]))
        details = [(file, _issuer(leaf), shown_names(names_of(leaf)) or "-") for file, leaf in served]
        parts.append(table([("file", "issuer", "names"), *details]))
    if found.next_pins is not None:
        use_from = moment(found.next_pins.use_from)
        parts.append(
            f"Next pins, announced to clients and used from {use_from}:\n" + "\n".join(found.next_pins.pins)
        )
    if found.clients or found.revoked:
        parts.append(_clients(found, now))
    if any(row.status == NOT_MADE for row in found.rows):
        parts.append("What is not made yet is made when the server starts.")
    problems = [row.problem for row in found.rows if row.problem] + list(found.problems)
    parts += [f"PROBLEM: {escape_text(problem)}" for problem in problems]
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns; those named in `right` by their right edge."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(row: Sequence[str], column: int) -> str:
        text = row[column]
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return "\n".join("  ".join(cell(row, column) for column in range(len(row))).rstrip() for row in rows)


def moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def days_left(certificate: x509.Certificate, now: datetime) -> int:
    """Whole days until the end; negative after it."""
    return (certificate.not_valid_after_utc - now) // _DAY


def key_pin(certificate: x509.Certificate) -> str:
    return pair.spki_pin(certificate.public_bytes(serialization.Encoding.DER))


def certificate_pin(certificate: x509.Certificate) -> str:
    """The pin of the whole certificate, as clients take it: good until the certificate is renewed."""
    digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
    return "cert-sha256/" + base64.b64encode(digest).decode("ascii")


def shown_names(names: Sequence[str]) -> str:
    more = len(names) - MAX_SHOWN_NAMES
    text = ", ".join(escape_text(name, MAX_SHOWN_NAME) for name in names[:MAX_SHOWN_NAMES])
    return f"{text} and {more} more" if more > 0 else text


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Its names; none if they cannot be read, which is told as a problem."""
    try:
        return pair.names_of(certificate)
    except pair.UNREADABLE:
        return ()


def issuer_of(certificate: x509.Certificate) -> str:
    return escape_text(certificate.issuer.rfc4514_string(), MAX_SHOWN_NAME)


def _summary(row: Row, found: Report, now: datetime) -> tuple[str, ...]:
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
    return (site, row.key_type or "-", begin, end, days, due, row.status, _file(row, found))


def _file(row: Row, found: Report) -> str:
    inside = row.certificate.parent == found.directory
    return escape_text(row.certificate.name if inside else str(row.certificate))


def _issuer(certificate: x509.Certificate) -> str:
    return "itself" if certificate.subject == certificate.issuer else issuer_of(certificate)


def _clients(found: Report, now: datetime) -> str:
    good = sum(entry.revoked_at is None and entry.not_after >= now for entry in found.clients)
    revoked = sum(entry.revoked_at is not None for entry in found.clients)
    lines = (
        [f"Client certificates: {good} good, {revoked} revoked; --json lists them."] if found.clients else []
    )
    for one in found.revoked:
        end = "for ever" if one.not_after is None else f"until {moment(one.not_after)}"
        name = escape_text(one.path.name)
        lines.append(f"{name} has {one.count} revoked; signed {moment(one.signed_at)}, good {end}.")
    return "\n".join(lines)


def as_data(found: Report, now: datetime) -> dict[str, Any]:
    """Everything, for JSON. Times are RFC 3339 in UTC; what there is not is null."""
    return {
        "good": found.is_good,
        "mode": found.mode,
        "directory": str(found.directory),
        "certificates": [_row_data(row, now) for row in found.rows],
        "next_pins": next_pins_data(found.next_pins),
        "clients": [
            {
                "name": entry.name,
                "serial": entry.serial,
                "not_after": stamp(entry.not_after),
                "revoked_at": None if entry.revoked_at is None else stamp(entry.revoked_at),
                "reason": entry.reason or None,
            }
            for entry in found.clients
        ],
        "client_crl": [
            {
                "file": str(one.path),
                "signed_at": stamp(one.signed_at),
                "not_after": None if one.not_after is None else stamp(one.not_after),
                "revoked": one.count,
            }
            for one in found.revoked
        ],
        "problems": list(found.problems),
    }


def next_pins_data(pins: NextPins | None) -> dict[str, Any] | None:
    return None if pins is None else {"pins": list(pins.pins), "use_from": stamp(pins.use_from)}


def certificate_data(certificate: x509.Certificate, now: datetime) -> dict[str, Any]:
    """What is in a certificate."""
    return {
        "key_type": type_of(certificate),
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:X}",
        "names": list(names_of(certificate)),
        "not_before": stamp(certificate.not_valid_before_utc),
        "not_after": stamp(certificate.not_valid_after_utc),
        "days_left": days_left(certificate, now),
        "pin": key_pin(certificate),
        "certificate_pin": certificate_pin(certificate),
    }


def stamp(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"


def _row_data(row: Row, now: datetime) -> dict[str, Any]:
    empty = dict.fromkeys(_CERTIFICATE_KEYS)
    found = empty if row.leaf is None else certificate_data(row.leaf, now)
    return {
        "use": row.use,
        "site": list(row.site),
        **found,
        "key_type": row.key_type or None,
        "renewal_due": None if row.renewal_due is None else stamp(row.renewal_due),
        "certificate": str(row.certificate),
        "key": None if row.key is None else str(row.key),
        "status": row.status,
        "problem": row.problem or None,
    }


_CERTIFICATE_KEYS = (
    "key_type", "subject", "issuer", "serial", "names", "not_before", "not_after", "days_left", "pin",
    "certificate_pin",
)  # fmt: skip
