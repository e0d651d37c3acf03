"""Decides what to report about certificates that no server is using: one file (`examine`), or all files of a
configuration (`survey`).

Rules:
- Everything that a server would refuse is reported at once, in the words in which a server refuses it.
- What a server accepts, but its clients or its operator may regret, is a warning or a note.
- Nothing is changed, created or repaired. `examine` reads a file with wrong permissions nevertheless, to report its
  other problems.

Must not know: where the result is printed.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import AuthorityInformationAccessOID

from zcproto.certs import authority, client_ca, files, keys, lifecycle, pair, profile, rollover
from zcproto.certs.acme.schedule import read_record
from zcproto.certs.authority import AuthorityKind
from zcproto.certs.external import ExternalSite, load_site
from zcproto.certs.issued import Issued
from zcproto.certs.names import check_name, covers
from zcproto.certs.notices import day
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import AcmeSite, certificate_settings, managed_site
from zcproto.certs.sources import MAX_AUTHORITIES
from zcproto.common.text import escape_text
from zcproto.config import Config
from zcproto.errors import CertificateError

_MAX_SHOWN = 300
"""Characters of a certificate's names in a message."""

EXPIRY_WARNING = timedelta(days=30)
"""Time left at which an expiry is reported as near; a third of the lifetime if that is less."""


@dataclass(slots=True)
class Examination:
    """What was found in the files, and its problems."""

    chain: list[x509.Certificate] = field(default_factory=list)
    """The leaf, then its issuers; empty if there is no certificate that can be parsed."""
    key: keys.PrivateKey | None = field(default=None, repr=False)
    refused: list[str] = field(default_factory=list)
    """Why a server would not serve this, each with the remedy."""
    warnings: list[str] = field(default_factory=list)

    def passes(self, check: Callable[[], object], path: Path) -> bool:
        """Make a check. If it raises, refuse the files and return False."""
        try:
            with pair.parsing(path):
                check()
        except CertificateError as error:
            self.refuse(str(error))
            return False
        return True

    def refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.append(reason)


def examine(
    path: Path,
    key_path: Path | None,
    now: datetime,
    *,
    passphrase: bytes | None = None,
    host: str | None = None,
) -> Examination:
    """Return all findings about the PEM file `path` at `now`, an aware time.

    The file may contain a certificate with its chain, a key, or both; `key_path` is a key in another file. `host`
    is a name or address that clients connect to; a certificate without it is refused. Raises CertificateError if
    the file cannot be read at all, or if `host` is invalid.
    """
    moment = pair.utc(now)
    wanted = None if host is None else check_name(host)
    found = Examination()
    data = _read(path, found, secret=False)
    holds_key, holds_certificate = b"PRIVATE KEY-----" in data, b"CERTIFICATE-----" in data
    if holds_certificate or not holds_key:
        found.passes(lambda: found.chain.extend(pair.parse_certificates(data, path)), path)
    if key_path is not None and not _is_same(key_path, path):
        _load_key(found, _read(key_path, found, secret=True), key_path, passphrase)
    elif holds_key or key_path is not None:
        key_path = path
        _check_folder(path, found)
        _load_key(found, data, path, passphrase)
    if found.chain:
        for check in pair.checks(found.chain, path, moment, found.key, key_path):
            found.passes(check, path)
        found.passes(lambda: _warn(found, path, moment), path)
        if wanted is not None:
            _check_host(found, path, wanted)
    return found


def is_self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer


# --- reading ---------------------------------------------------------------------------------------------


def _read(path: Path, found: Examination, *, secret: bool) -> bytes:
    read = files.read_key_file if secret else files.read_certificate_file
    try:
        return read(path)
    except CertificateError as error:
        data = _read_anyhow(path, error)
        found.refuse(str(error))
    if secret:
        _check_folder(path, found)  # the error above came first
    return data


def _read_anyhow(path: Path, refusal: CertificateError) -> bytes:
    """Return the bytes of a file that a server would not read. Raises `refusal` if they cannot be read at all."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(files.MAX_FILE_BYTES + 1)
    except (OSError, ValueError):
        raise refusal from None
    if not data or len(data) > files.MAX_FILE_BYTES:
        raise refusal
    return data


def _check_folder(path: Path, found: Examination) -> None:
    found.passes(lambda: files.check_folder(Path(os.path.realpath(path)).parent), path)


def _is_same(key_path: Path, path: Path) -> bool:
    try:
        return os.path.samefile(key_path, path)
    except OSError:
        return False


def _load_key(found: Examination, data: bytes, path: Path, passphrase: bytes | None) -> None:
    def load() -> None:
        found.key, _ = pair.decrypt_key(data, path, passphrase)

    if found.passes(load, path):
        weak = keys.weakness(found.key)
        if weak is not None and not found.chain:  # otherwise the check of the chain reports it
            found.refuse(f"{path}: the key is too weak: {weak}; generate a new one")


# --- judging ---------------------------------------------------------------------------------------------


def _warn(found: Examination, path: Path, now: datetime) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    if timedelta(0) <= leaf.not_valid_after_utc - now <= min(EXPIRY_WARNING, lifetime / 3):
        warn(f"{path}: expires on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; replace it soon")
    for position, certificate in enumerate(found.chain[1:], 2):
        if certificate.not_valid_after_utc < leaf.not_valid_after_utc:
            warn(
                f"{path}: certificate {position} of the chain expires before the server's, on"
                f" {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; use a chain that lasts longer"
            )
    if found.passes(lambda: pair.names_of(leaf), path):
        _warn_of_extensions(found, path)
    root = found.chain[-1]
    if len(found.chain) > 1 and is_self_signed(root):
        size = len(root.public_bytes(serialization.Encoding.DER))
        warn(
            f"{path}: contains the root, which adds {size / 1024:.1f} KiB to each handshake; remove it,"
            " because clients that trust it have it"
        )
    elif is_self_signed(leaf):
        warn(f"{path}: is self-signed, so clients can trust only this certificate or its pin")


def _warn_of_extensions(found: Examination, path: Path) -> None:
    leaf = found.chain[0]
    warn = found.warnings.append
    if not pair.names_of(leaf):
        warn(
            f"{path}: names no host (SubjectAltName), so clients refuse it; use one with the names that they"
            " connect to"
        )
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.TLSFeature):
            warn(f"{path}: requires a stapled OCSP response, which is not sent; use one without must-staple")
        elif isinstance(extension.value, x509.AuthorityInformationAccess):
            hints = [each.access_method for each in extension.value]
            if AuthorityInformationAccessOID.CA_ISSUERS in hints and len(found.chain) == 1:
                warn(
                    f"{path}: contains the certificate without its issuer, which most clients need;"
                    " use the file with the full chain"
                )


def _check_host(found: Examination, path: Path, host: str) -> None:
    def check() -> None:
        names = pair.names_of(found.chain[0])
        if not any(covers(name, host) for name in names):
            shown = escape_text(", ".join(names[:10]), _MAX_SHOWN)
            others = f"; it is valid for {shown}" if names else ""
            raise CertificateError(f"{path}: is not valid for {host}, so clients refuse it{others}")

    found.passes(check, path)


# --- all files of a configuration --------------------------------------------------------------------------


class FileState(enum.Enum):
    """Whether a certificate can be served, or used to verify clients."""

    OK = "ok"
    DUE = "renewal due"
    EXPIRED = "expired"
    PROBLEM = "problem"
    NOT_MADE = "not made yet"

    @property
    def is_bad(self) -> bool:
        return self in (FileState.EXPIRED, FileState.PROBLEM)


@dataclass(frozen=True, slots=True)
class SurveyedCertificate:
    """One certificate of a configuration."""

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
    state: FileState
    problem: str = ""
    """Why it cannot be used, and the remedy."""
    note: str = ""
    """What some clients do not accept, and the remedy."""
    is_managed: bool = False
    """Whether a start of the server replaces what cannot be used."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What is in the files of a configuration."""

    mode: str
    directory: Path
    certificates: tuple[SurveyedCertificate, ...]
    next_pins: NextPins | None
    clients: tuple[Issued, ...]
    crls: tuple[tuple[Path, x509.CertificateRevocationList], ...]
    problems: tuple[str, ...]
    """Problems of other files than the certificates."""

    @property
    def is_good(self) -> bool:
        return not self.problems and not any(one.state.is_bad for one in self.certificates)

    def of_site(self, name: str | None) -> list[SurveyedCertificate]:
        """Return what a client gets that requests `name`: by exact name, by wildcard, else the default site."""
        served = [one for one in self.certificates if one.use == "server"]
        if name is not None:
            lower = name.lower()
            for requested in (lower, "*." + lower.partition(".")[2]):
                if found := [one for one in served if requested in one.site]:
                    return found
        return [one for one in served if not one.site]


def survey(config: Config, now: datetime, environ: Mapping[str, str]) -> Survey:
    """Return what is in the files of this configuration at `now`. `environ` may contain passphrases."""
    mode, directory = config.certificates.mode, config.certificates.directory
    problems: list[str] = []
    found = tuple(_Surveyor(config, now, environ).certificates())
    issued: tuple[Issued, ...] = ()
    crls: tuple[tuple[Path, x509.CertificateRevocationList], ...] = ()
    try:
        issued = client_ca.issued_clients(directory)
        crls = tuple(_crls(config))
    except CertificateError as error:
        problems.append(str(error))
    problems += [
        f"{path}: expired on {day(crl.next_update_utc)}, so every client is refused; get a new list"
        for path, crl in crls
        if crl.next_update_utc is not None and now > crl.next_update_utc
    ]
    next_pins = None if mode == "files" else rollover.announced(directory, problems.append)
    return Survey(mode, directory, found, next_pins, issued, crls, tuple(problems))


class _Surveyor:
    """Reads the files of a configuration as they are at one time."""

    def __init__(self, config: Config, now: datetime, environ: Mapping[str, str]) -> None:
        self._config = config
        self._directory = config.certificates.directory
        self._now = now
        self._environ = environ

    def certificates(self) -> Iterator[SurveyedCertificate]:
        settings = certificate_settings(self._config)
        external, managed = settings.sites, managed_site(self._config)
        if isinstance(settings.default, ExternalSite):
            external = (settings.default, *external)
        elif isinstance(settings.default, AcmeSite):
            yield from self._of_public_ca(settings.default)
        else:
            yield from map(self._managed, settings.default.settings.key_types)
        for site in external:
            yield from self._external(site)
        if managed is not None:
            yield from self._authority("ca", authority.SERVER, managed.settings.lifetime)
        if (client_ca_file := self._config.tls.client_ca_file) is not None:
            yield from self._authorities("client-ca", client_ca_file)
        else:
            yield from self._authority("client-ca", authority.CLIENT)

    def _managed(self, key_type: str) -> SurveyedCertificate:
        certificate, key = rollover.pair_paths(self._directory, key_type)
        if not certificate.exists():
            state = FileState.NOT_MADE
            return SurveyedCertificate("server", (), certificate, key, None, key_type, None, state)
        found = replace(self._served((), certificate, key), is_managed=True)
        ca, _ = authority.SERVER.paths(self._directory)
        try:
            is_ours = found.leaf is None or pair.is_issued_by(found.leaf, pair.read_certificate(ca))
        except CertificateError:
            return found  # reported about the authority
        if is_ours or found.problem:
            return found
        problem = f"{certificate}: was not issued by {ca}; move it away to issue another"
        return replace(found, state=FileState.PROBLEM, problem=problem)

    def _of_public_ca(self, site: AcmeSite) -> Iterator[SurveyedCertificate]:
        """Yield the certificates of the CA, and managed ones in place of those that cannot be served."""
        record = read_record(site.directory)
        note = ""
        if record.problem:
            again = "" if record.retry_at is None else f" (next attempt at {day(record.retry_at)})"
            note = f"{site.directory}: the last order has failed{again}: {record.problem}"
        for key_type in site.managed.key_types:
            certificate, key = rollover.pair_paths(site.directory, key_type)
            found = self._managed(key_type)
            if certificate.exists():
                ordered = replace(self._served((), certificate, key), is_managed=True)
                found = found if ordered.state.is_bad and not found.state.is_bad else ordered
            if found.certificate != certificate:
                note = note or (
                    f"{found.certificate}: is served until the CA has issued another, but its clients refuse it;"
                    " start the server, which orders one"
                )
            yield replace(found, note=note)
            note = ""

    def _external(self, site: ExternalSite) -> Iterator[SurveyedCertificate]:
        passphrase, problem = None, ""
        try:
            passphrase = site.passphrase.read(self._environ)
        except CertificateError as error:
            problem = str(error)
        found = [
            self._served(site.names, certificate, key, passphrase, problem)
            for certificate, key in zip(site.certificates, site.keys or site.certificates, strict=True)
        ]
        if not any(one.state.is_bad for one in found):
            try:
                load_site(site, self._now, self._environ)
            except CertificateError as error:  # a problem of the site as a whole
                found[0] = replace(found[0], state=FileState.PROBLEM, problem=str(error))
        yield from found

    def _served(
        self,
        site: tuple[str, ...],
        certificate: Path,
        key: Path,
        passphrase: bytes | None = None,
        problem: str = "",
    ) -> SurveyedCertificate:
        leaf = due = None
        renew_before = timedelta(seconds=self._config.certificates.renew_before)
        try:
            leaf = pair.read_certificate(certificate)
            due = lifecycle.renewal_due(leaf.not_valid_before_utc, leaf.not_valid_after_utc, renew_before)
            pair.load_pair(certificate, key, self._now, passphrase)
        except CertificateError as error:
            problem = problem or str(error)
        return self._result("server", certificate, key, leaf, problem, due, site)

    def _authority(
        self, use: str, kind: AuthorityKind, leaf_lifetime: timedelta | None = None
    ) -> Iterator[SurveyedCertificate]:
        certificate, key = kind.paths(self._directory)
        if certificate.exists() or key.exists():
            yield from self._authorities(use, certificate, kind, leaf_lifetime)

    def _authorities(
        self,
        use: str,
        path: Path,
        kind: AuthorityKind | None = None,
        leaf_lifetime: timedelta | None = None,
    ) -> Iterator[SurveyedCertificate]:
        """Yield what is in a file of authorities: of one that issues here, or of several of other programs."""
        key = None if kind is None else kind.paths(self._directory)[1]
        try:
            found = pair.read_certificates(path, MAX_AUTHORITIES)
        except CertificateError as error:
            yield self._result(use, path, key, None, str(error))
            return
        for each in found:
            problem = "" if kind is None else _key_problem(kind, self._directory, each)
            due = None if leaf_lifetime is None else each.not_valid_after_utc - leaf_lifetime
            yield self._result(use, path, key, each, problem, due)

    def _result(
        self,
        use: str,
        certificate: Path,
        key: Path | None,
        leaf: x509.Certificate | None,
        problem: str,
        due: datetime | None = None,
        site: tuple[str, ...] = (),
    ) -> SurveyedCertificate:
        state = FileState.DUE if due is not None and self._now >= due else FileState.OK
        if leaf is not None and self._now > leaf.not_valid_after_utc:
            state = FileState.EXPIRED
        elif problem:
            state = FileState.PROBLEM
        key_type = "" if leaf is None else type_of(leaf)
        note = ""
        if use == "ca" and leaf is not None and not problem:
            note = _constraints_note(leaf, certificate) or self._key_note(key_type, certificate)
        return SurveyedCertificate(use, site, certificate, key, leaf, key_type, due, state, problem, note)

    def _key_note(self, key_type: str, path: Path) -> str:
        families = set(map(keys.family, self._config.certificates.key_types))
        if keys.family(key_type) == "rsa" or "rsa" not in families:
            return ""
        return (
            f"{path}: has an ECDSA key, so clients that support only RSA cannot verify it; if you have none, remove"
            " the RSA type from certificates.key_types, otherwise move ca.* and server* away to create another"
            " authority, which every client then has to trust"
        )


def type_of(certificate: x509.Certificate) -> str:
    try:
        return keys.key_type_of(certificate.public_key())
    except pair.UNREADABLE:
        return "unreadable"


def _key_problem(kind: AuthorityKind, directory: Path, certificate: x509.Certificate) -> str:
    try:
        _, problem = kind.read_key(directory, certificate)
    except (CertificateError, *pair.UNREADABLE) as error:
        return f"{error}; until then nothing can be issued"
    return problem


def _constraints_note(certificate: x509.Certificate, path: Path) -> str:
    try:
        if not profile.has_constraints(certificate):
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
    for crl in pair.read_lists(path):
        yield path, crl
