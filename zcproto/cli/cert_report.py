"""What `zcproto cert show` finds in the files of a configuration, as text and as JSON.

Rules: nothing is changed, created or repaired. What cannot be served is reported in the words in which a server
refuses it. Every text from a certificate is escaped for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import authority, client_ca, keys, lifecycle, pair, profile, rollover
from zcproto.certs.acme.schedule import read_record
from zcproto.certs.acme.settings import AcmeSite
from zcproto.certs.examine import is_self_signed
from zcproto.certs.external import ExternalSite, load_site
from zcproto.certs.issued import Issued
from zcproto.certs.pair import read_lists
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import certificate_settings, managed_site
from zcproto.certs.sources import MAX_AUTHORITIES
from zcproto.cli.output import aligned
from zcproto.common.text import escape_text
from zcproto.config import Config
from zcproto.errors import CertificateError
from zcproto.tls import pins

OK = "ok"
DUE = "renewal due"
EXPIRED = "expired"
PROBLEM = "problem"
NOT_MADE = "not made yet"
BAD = (EXPIRED, PROBLEM)

MAX_SHOWN_NAMES = 8
MAX_SHOWN_NAME = 200
SHORT_LIFE = timedelta(days=7)
"""The times of certificates with a shorter lifetime are shown with hours."""

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """One certificate of the configuration."""

    use: str
    """`server`, `ca` or `client-ca`."""
    site: tuple[str, ...]
    """The names for which it is served; empty for the default site."""
    certificate: Path
    key: Path | None
    leaf: x509.Certificate | None
    """None if it is missing or cannot be parsed."""
    key_type: str
    renewal_due: datetime | None
    status: str
    problem: str = ""
    """Why it cannot be used, and the remedy."""
    note: str = ""
    """What some clients do not accept, and the remedy."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `show` shows."""

    mode: str
    directory: Path
    rows: tuple[CertificateRow, ...]
    next_pins: NextPins | None
    clients: tuple[Issued, ...]
    crls: tuple[tuple[Path, x509.CertificateRevocationList], ...]
    problems: tuple[str, ...]
    """Problems of other files than the certificates."""

    @property
    def is_good(self) -> bool:
        return not self.problems and all(row.status not in BAD for row in self.rows)


def report(config: Config, now: datetime, environ: Mapping[str, str]) -> Report:
    """Return what is in the files of this configuration at `now`."""
    certificates = config.certificates
    directory = certificates.directory
    problems: list[str] = []
    rows = tuple(_Reader(config, now, environ).rows())
    issued: tuple[Issued, ...] = ()
    crls: tuple[tuple[Path, x509.CertificateRevocationList], ...] = ()
    try:
        issued = client_ca.issued_clients(directory)
        crls = tuple(_crls(config))
    except CertificateError as error:
        problems.append(str(error))
    problems += [
        f"{path}: expired on {moment(crl.next_update_utc)}, so every client is refused; get a new list"
        for path, crl in crls
        if crl.next_update_utc is not None and now > crl.next_update_utc
    ]
    next_pins = None if certificates.mode == "files" else rollover.announced(directory, problems.append)
    return Report(certificates.mode, directory, rows, next_pins, issued, crls, tuple(problems))


def rows_of_site(found: Report, name: str | None) -> list[CertificateRow]:
    """Return what a client gets that requests `name`: by exact name, else by wildcard, else the default site."""
    served = [row for row in found.rows if row.use == "server"]
    if name is not None:
        lower = name.lower()
        for requested in (lower, "*." + lower.partition(".")[2]):
            if rows := [row for row in served if requested in row.site]:
                return rows
    return [row for row in served if not row.site]


# --- collecting --------------------------------------------------------------------------------------------


class _Reader:
    """Reads the files of a configuration as they are at one time."""

    def __init__(self, config: Config, now: datetime, environ: Mapping[str, str]) -> None:
        self._config = config
        self._directory = config.certificates.directory
        self._now = now
        self._environ = environ

    def rows(self) -> Iterator[CertificateRow]:
        settings = certificate_settings(self._config)
        external, managed = settings.sites, managed_site(self._config)
        if isinstance(settings.default, ExternalSite):
            external = (settings.default, *external)
        elif isinstance(settings.default, AcmeSite):
            yield from self._acme_rows(settings.default)
        else:
            yield from map(self._managed_row, settings.default.settings.key_types)
        for site in external:
            yield from self._external_rows(site)
        if managed is not None:
            lifetime = managed.settings.lifetime
            yield from self._authority_rows("ca", *authority.SERVER.paths(self._directory), lifetime)
        if (client_ca_file := self._config.tls.client_ca_file) is not None:
            yield from self._authority_rows("client-ca", client_ca_file, None)
        else:
            yield from self._authority_rows("client-ca", *authority.CLIENT.paths(self._directory))

    def _managed_row(self, key_type: str) -> CertificateRow:
        certificate, key = rollover.pair_paths(self._directory, key_type)
        if not certificate.exists():
            return CertificateRow("server", (), certificate, key, None, key_type, None, NOT_MADE)
        row = self._server_row((), certificate, key)
        ca, _ = authority.SERVER.paths(self._directory)
        try:
            if row.leaf is None or row.problem or pair.is_issued_by(row.leaf, pair.read_certificates(ca)[0]):
                return row
        except CertificateError:
            return row  # the authority's own row reports it
        problem = f"{certificate}: was not issued by {ca}; move it away to issue another"
        return replace(row, status=PROBLEM, problem=problem)

    def _acme_rows(self, site: AcmeSite) -> Iterator[CertificateRow]:
        """Yield the certificates of the CA, and managed ones in place of those that cannot be served."""
        record = read_record(site.directory)
        note = ""
        if record.problem:
            again = "" if record.retry_at is None else f" (next attempt at {moment(record.retry_at)})"
            note = f"{site.directory}: the last order has failed{again}: {record.problem}"
        for key_type in site.managed.key_types:
            certificate, key = rollover.pair_paths(site.directory, key_type)
            row = self._managed_row(key_type)
            if certificate.exists():
                ordered = self._server_row((), certificate, key)
                row = row if ordered.status in BAD and row.status not in BAD else ordered
            if row.certificate != certificate:
                note = note or (
                    f"{row.certificate}: is served until the CA has issued another, but its clients refuse it;"
                    " start the server, which orders one"
                )
            yield replace(row, note=note)
            note = ""

    def _external_rows(self, site: ExternalSite) -> Iterator[CertificateRow]:
        passphrase, problem = None, ""
        try:
            passphrase = site.passphrase.read(self._environ)
        except CertificateError as error:
            problem = str(error)
        rows = [
            self._server_row(site.names, certificate, key, passphrase, problem)
            for certificate, key in zip(site.certificates, site.keys or site.certificates, strict=True)
        ]
        if all(row.status not in BAD for row in rows):
            try:
                load_site(site, self._now, self._environ)
            except CertificateError as error:  # a problem of the site as a whole
                rows[0] = replace(rows[0], status=PROBLEM, problem=str(error))
        yield from rows

    def _server_row(
        self,
        site: tuple[str, ...],
        certificate: Path,
        key: Path,
        passphrase: bytes | None = None,
        problem: str = "",
    ) -> CertificateRow:
        leaf = due = None
        renew_before = timedelta(seconds=self._config.certificates.renew_before)
        try:
            leaf = pair.read_certificate(certificate)
            due = lifecycle.renewal_due(leaf.not_valid_before_utc, leaf.not_valid_after_utc, renew_before)
            pair.load_pair(certificate, key, self._now, passphrase)
        except CertificateError as error:
            problem = problem or str(error)
        return self._row("server", certificate, key, leaf, problem, due, site)

    def _authority_rows(
        self, use: str, certificate: Path, key: Path | None, leaf_lifetime: timedelta | None = None
    ) -> Iterator[CertificateRow]:
        if key is not None and not certificate.exists() and not key.exists():
            return
        try:
            found = pair.read_certificates(certificate, MAX_AUTHORITIES)
        except CertificateError as error:
            yield self._row(use, certificate, key, None, str(error))
            return
        for each in found:
            problem = "" if key is None else _key_problem(each, certificate, key)
            due = None if leaf_lifetime is None else each.not_valid_after_utc - leaf_lifetime
            yield self._row(use, certificate, key, each, problem, due)

    def _row(
        self,
        use: str,
        certificate: Path,
        key: Path | None,
        leaf: x509.Certificate | None,
        problem: str,
        due: datetime | None = None,
        site: tuple[str, ...] = (),
    ) -> CertificateRow:
        status = DUE if due is not None and self._now >= due else OK
        if leaf is not None and self._now > leaf.not_valid_after_utc:
            status = EXPIRED
        elif problem:
            status = PROBLEM
        key_type = "" if leaf is None else type_of(leaf)
        note = ""
        if use == "ca" and leaf is not None and not problem:
            note = _constraints_note(leaf, certificate) or self._key_note(key_type, certificate)
        return CertificateRow(use, site, certificate, key, leaf, key_type, due, status, problem, note)

    def _key_note(self, key_type: str, path: Path) -> str:
        if keys.family(key_type) == "rsa" or "rsa" not in map(
            keys.family, self._config.certificates.key_types
        ):
            return ""
        return (
            f"{path}: has an ECDSA key, so clients that support only RSA cannot verify it; if you have none, remove"
            " the RSA type from certificates.key_types, otherwise move ca.* and server* away to create another"
            " authority, which every client then has to trust"
        )


def _key_problem(certificate: x509.Certificate, path: Path, key: Path) -> str:
    try:
        if keys.belongs(pair.read_private_key(key), certificate.public_key()):
            return ""
    except (CertificateError, *pair.UNREADABLE) as error:
        return f"{error}; until then nothing can be issued"
    return f"{key}: does not belong to {path}, so nothing can be issued; restore the right key"


def _constraints_note(authority: x509.Certificate, path: Path) -> str:
    try:
        if not profile.has_constraints(authority):
            return ""
    except pair.UNREADABLE:
        return ""
    return (
        f"{path}: has name constraints, which clients with BoringSSL (gRPC, Android), Mbed TLS or wolfSSL refuse;"
        " if you have such clients, move it away (keep ca.key) and run zcproto cert renew: it is issued again with"
        " the same key, and other clients may keep the old file"
    )


def _crls(config: Config) -> Iterator[tuple[Path, x509.CertificateRevocationList]]:
    path = config.tls.client_crl_file
    if path is None:
        _, path = client_ca.paths(config.certificates.directory)
        if config.tls.client_ca_file is not None or not path.exists():
            return
    for crl in read_lists(path):
        yield path, crl


# --- text --------------------------------------------------------------------------------------------------


def as_text(found: Report, now: datetime) -> str:
    """Return tables of about 100 columns."""
    issuer = {"own": "its own CA", "acme": "the CA of acme.directory", "files": "other programs"}[found.mode]
    parts = [f"Issued by {issuer}; the folder is {escape_text(str(found.directory))}."]
    head = ("site", "key", "from", "until", "days left", "renewal due", "status", "file")
    parts.append(aligned([head, *(_summary(row, found, now) for row in found.rows)], right=(4,)))
    served = [(_file(row, found), row.leaf) for row in found.rows if row.use == "server" and row.leaf]
    if served:
        parts.append(aligned([("file", "pin"), *((file, key_pin(leaf)) for file, leaf in served)]))
        details = [
            (file, "itself" if is_self_signed(leaf) else issuer_of(leaf), shown_names(names_of(leaf)) or "-")
            for file, leaf in served
        ]
        parts.append(aligned([("file", "issuer", "names"), *details]))
    if found.next_pins is not None:
        title = f"Next pins, announced to clients and used from {moment(found.next_pins.use_from)}:"
        parts.append("\n".join((title, *found.next_pins.pins)))
    if found.clients or found.crls:
        parts.append(_clients(found, now))
    if any(row.status == NOT_MADE for row in found.rows):
        parts.append("Certificates that are not made yet are issued when the server starts.")
    problems = [row.problem for row in found.rows if row.problem] + list(found.problems)
    parts += [f"PROBLEM: {escape_text(problem)}" for problem in problems]
    parts += [f"NOTE: {escape_text(row.note)}" for row in found.rows if row.note]
    return "\n\n".join(parts)


def moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


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


def type_of(certificate: x509.Certificate) -> str:
    try:
        return keys.key_type_of(certificate.public_key())
    except pair.UNREADABLE:
        return "unreadable"


def issuer_of(certificate: x509.Certificate) -> str:
    return escape_text(certificate.issuer.rfc4514_string(), MAX_SHOWN_NAME)


def _summary(row: CertificateRow, found: Report, now: datetime) -> tuple[str, ...]:
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


def _file(row: CertificateRow, found: Report) -> str:
    is_inside = row.certificate.parent == found.directory
    return escape_text(row.certificate.name if is_inside else str(row.certificate))


def _clients(found: Report, now: datetime) -> str:
    lines = []
    if found.clients:
        valid = sum(entry.revoked_at is None and entry.not_after >= now for entry in found.clients)
        revoked = sum(entry.revoked_at is not None for entry in found.clients)
        lines.append(f"Client certificates: {valid} valid, {revoked} revoked; --json lists them.")
    for path, crl in found.crls:
        end = crl.next_update_utc
        validity = "without expiry" if end is None else f"valid until {moment(end)}"
        name = escape_text(path.name)
        lines.append(f"{name} has {len(crl)} revoked; signed {moment(crl.last_update_utc)}, {validity}.")
    return "\n".join(lines)


# --- JSON --------------------------------------------------------------------------------------------------


def as_data(found: Report, now: datetime) -> dict[str, Any]:
    """Return everything as data for JSON. Times are RFC 3339 in UTC; missing values are null."""
    following = found.next_pins
    return {
        "good": found.is_good,
        "mode": found.mode,
        "directory": str(found.directory),
        "certificates": [_row_data(row, now) for row in found.rows],
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


def _row_data(row: CertificateRow, now: datetime) -> dict[str, Any]:
    return {
        "use": row.use,
        "site": list(row.site),
        **(dict.fromkeys(_CERTIFICATE_KEYS) if row.leaf is None else certificate_data(row.leaf, now)),
        "key_type": row.key_type or None,
        "renewal_due": row.renewal_due and timestamp(row.renewal_due),
        "certificate": str(row.certificate),
        "key": row.key and str(row.key),
        "status": row.status,
        "problem": row.problem or None,
        "note": row.note or None,
    }


_CERTIFICATE_KEYS = (
    "key_type", "subject", "issuer", "serial", "names", "not_before", "not_after", "days_left", "pin",
    "certificate_pin",
)  # fmt: skip
