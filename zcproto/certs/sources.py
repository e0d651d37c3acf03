"""Decides what each source of certificates provides now: managed certificates, files of other programs, and the
files with which clients are verified.

A source is checked once a second. A check returns at once if nothing has changed, and may take seconds when keys
are generated.

Rules:
- `start` provides something valid or raises CertificateError. `check` never raises because of files or disks: the
  last valid state remains in use, the problem is reported, and the attempt is repeated.
- A renewal run for managed certificates starts when one is due, when their files change, when the clock was
  changed, and every hour. Certificates that the command line or another process has installed are served after one
  check.
- Managed files that another program overwrites without the lock, as when a backup is restored, are repaired only
  after they have been unchanged for a while: otherwise half of a pair would cause the other half to be overwritten.
- If the disk fails, valid certificates on it are served nevertheless.

Must not know: TLS contexts, connections, logs, the current time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from zcproto.certs import authority, client_ca, files, lifecycle, managed, notices, pair, rollover
from zcproto.certs.authority import Progress
from zcproto.certs.client_user import CertificateId, revoked_in
from zcproto.certs.external import LONGEST_SETTLE_S, SETTLE_S, ExternalSite, WatchedFiles, load_site
from zcproto.certs.lifecycle import Expiring, Random, Retry
from zcproto.certs.managed import ManagedCertificates
from zcproto.certs.names import check_names
from zcproto.certs.notices import MAX_SUBJECT, Notice, NoticeKind, day
from zcproto.certs.pair import CertificatePair, Site, load_pair
from zcproto.certs.rollover import NextPins
from zcproto.certs.settings import CertificateSettings, ManagedSite
from zcproto.common.text import escape_text
from zcproto.common.watcher import FileWatcher
from zcproto.errors import CertificateError
from zcproto.tls.context import ClientTrust

ROUTINE_S = 3600.0
"""Between renewal runs without another reason: host names change."""

REMIND_S = 86_400.0
"""After this time a failure that persists is reported again."""

MAX_AUTHORITIES = 1000
"""Certificates in a file of client authorities; the trust store of a system has about 150."""

_IDLE = timedelta(minutes=1)
_NEVER = datetime.max.replace(tzinfo=UTC)
_FAILURES = (CertificateError, OSError, RuntimeError)
"""What a folder, a disk or a lack of threads can cause."""


class Origin(enum.Enum):
    """Where a certificate comes from."""

    OWN = "own"
    ACME = "acme"
    FILES = "files"
    AUTHORITY = "authority"
    CLIENT_AUTHORITY = "client_authority"


@dataclass(frozen=True, slots=True)
class Renewal:
    """The outcome of the last renewal of managed certificates."""

    at: datetime
    ok: bool


class Source(Protocol):
    """Provides a site, or the files with which clients are verified."""

    authorities: tuple[Expiring, ...] = ()
    lists: tuple[Expiring, ...] = ()
    """Revocation lists."""

    @property
    def is_incomplete(self) -> bool:
        """Return True if files have just changed and are not valid together yet."""
        return False

    def start(self, now: datetime, monotonic: float) -> list[Notice]: ...

    def check_start(self, now: datetime) -> None:
        """Raise the CertificateError with which `start` would fail. Changes nothing."""
        ...

    def check(self, now: datetime, monotonic: float, force: bool) -> list[Notice]: ...


class SiteSource(Source, Protocol):
    origin: Origin
    next_pins: NextPins | None = None
    last_renewal: Renewal | None = None

    @property
    def site(self) -> Site: ...

    def overdue(self, now: datetime) -> list[CertificatePair]:
        """Return the pairs whose approaching expiry is worth an alert."""
        ...


# --- managed certificates ----------------------------------------------------------------------------------


class ManagedSource(SiteSource):
    """The default site, with managed certificates. Without `maintains`, those that another process issues."""

    origin = Origin.OWN

    def __init__(
        self,
        site: ManagedSite,
        random: Random,
        progress: Progress,
        rest: Callable[[], None],
        *,
        maintains: bool = True,
    ) -> None:
        self._maintains = maintains
        self._directory = site.directory
        self._settings = site.settings
        self._progress = progress
        self._rest = rest
        self._schedule = RenewalSchedule(site.directory, site.directory, random)
        self._pairs: dict[str, CertificatePair] = {}  # by key type
        self._watcher = FileWatcher(
            [
                *authority.SERVER.paths(site.directory),
                *(
                    path
                    for key_type in site.settings.key_types
                    for path in rollover.pair_paths(site.directory, key_type)
                ),
                *rollover.paths(site.directory),
            ],
            files.MAX_FILE_BYTES,
        )
        self._touched_since: float | None = None
        self._settled_at = 0.0

    @property
    def site(self) -> Site:
        return Site((), tuple(self._pairs.values()))

    def overdue(self, now: datetime) -> list[CertificatePair]:
        """Return the pairs that should have been renewed: before that, the operator has nothing to do."""
        before = self._settings.renew_before
        return [
            one
            for one in self._pairs.values()
            if now >= lifecycle.renewal_due(one.not_before, one.not_after, before)
        ]

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        self._pairs = {}  # an earlier start may have succeeded here and failed elsewhere
        self._watcher.look()
        known = self._on_disk(now)
        if not self._maintains:
            if len(known) < len(self._settings.key_types):
                raise CertificateError(
                    f"{self._directory}: the process that issues certificates has left none that can be served;"
                    " look for its errors in the log"
                )
            return self._take(known)
        try:
            found = managed.ensure(self._directory, self._settings, now, self._progress)
        except _FAILURES as error:
            on_disk = self._on_disk(now)
            if not on_disk or not _is_disk_failure(error):
                raise _as_certificate_error(error, self._directory) from error
            return [*self._take(on_disk), *self._failed(error, now, monotonic)]
        return self._ensured(found, known, now, monotonic)

    def check_start(self, now: datetime) -> None:
        try:
            managed.check(self._directory, self._settings, now)
        except _FAILURES as error:
            if not (_is_disk_failure(error) and self._on_disk(now)):
                raise _as_certificate_error(error, self._directory) from error

    def check(self, now: datetime, monotonic: float, force: bool) -> list[Notice]:
        found: list[Notice] = []
        if self._watcher.look():
            found = self._touched(now, monotonic)
            self._rest()
        if not (self._maintains and self._is_due(now, monotonic, force)):
            return found
        known = self._pairs
        try:
            ensured = managed.ensure(self._directory, self._settings, now, self._progress)
        except _FAILURES as error:
            # What was issued before the failure is found as a change by the next check.
            return found + self._failed(error, now, monotonic)
        return found + self._ensured(ensured, known, now, monotonic)

    def _touched(self, now: datetime, monotonic: float) -> list[Notice]:
        """Take what another process has installed. If it is incomplete, wait until the files settle."""
        if self._touched_since is None:
            self._touched_since = monotonic
        on_disk = self._on_disk(now)
        self._settled_at = monotonic
        if len(on_disk) < len(self._settings.key_types):
            self._settled_at = min(monotonic + SETTLE_S, self._touched_since + LONGEST_SETTLE_S)
        return self._take(on_disk)

    def _is_due(self, now: datetime, monotonic: float, force: bool) -> bool:
        if self._touched_since is not None:
            is_valid = all(one.not_before <= now <= one.not_after for one in self._pairs.values())
            return monotonic >= self._settled_at or not is_valid
        return self._schedule.is_due(now, monotonic, force)

    def _ensured(
        self,
        found: ManagedCertificates,
        known: Mapping[str, CertificatePair],
        now: datetime,
        monotonic: float,
    ) -> list[Notice]:
        """Take the result of a renewal run; `known` is what existed before it."""
        self._touched_since = None
        # If a run finds nothing to do although its time has come, do not repeat it each second.
        self._schedule.plan(found.next_change if found.next_change > now else now + _IDLE, monotonic)
        existing = {one.leaf_sha256 for one in known.values()}
        issued = [one for one in found.pairs if one.leaf_sha256 not in existing]
        happened = [notices.renewed(one) for one in issued]
        happened += [notices.rotated(one) for one in issued if one.pin != known.get(one.key_type, one).pin]
        happened += [notices.key_replaced(str(it.path), it.old_pin, it.new_pin) for it in found.replaced_keys]
        happened += self._take({one.key_type: one for one in found.pairs}, issued=issued)
        self._read_authority()
        happened += self._announced(found.next_pins)
        if found.problems:
            return happened + self._failed(CertificateError(" ".join(found.problems)), now, monotonic)
        recovered = self._schedule.succeeded()
        if issued or recovered:
            self.last_renewal = Renewal(now, ok=True)
        return happened + recovered

    def _failed(self, error: Exception, now: datetime, monotonic: float) -> list[Notice]:
        self._touched_since = None
        self.last_renewal = Renewal(now, ok=False)
        # A certificate that is not valid yet, after the clock was set back, is as bad as an expired one.
        ends = [one.not_after if one.not_before <= now else now for one in self._pairs.values()]
        left = min(ends, default=now) - now
        return self._schedule.failed(error, left, now, monotonic)

    def _announced(self, next_pins: NextPins | None) -> list[Notice]:
        if next_pins == self.next_pins:
            return []
        self.next_pins = next_pins
        if next_pins is None:
            return []
        message = f"The next keys will be used from {day(next_pins.use_from)}: {', '.join(next_pins.pins)}."
        return [Notice(NoticeKind.NEXT_PINS, str(self._directory), message, pins=next_pins.pins)]

    def _take(
        self, found: Mapping[str, CertificatePair], issued: Sequence[CertificatePair] = ()
    ) -> list[Notice]:
        """Serve what was found, and for other key types what was served before."""
        before = self._pairs
        both = {kind: found.get(kind) or before.get(kind) for kind in self._settings.key_types}
        self._pairs = {kind: one for kind, one in both.items() if one is not None}
        return notices.loaded(before.values(), [one for one in self._pairs.values() if one not in issued])

    def _on_disk(self, now: datetime) -> dict[str, CertificatePair]:
        """Return those pairs in the folder that can be served unchanged, by key type."""
        if not self._maintains:
            self.next_pins = rollover.announced(self._directory)
        issuer = self._read_authority()
        return {
            kind: one
            for kind in self._settings.key_types
            if issuer is not None and (one := self._load(kind, issuer, now)) is not None
        }

    def _load(self, kind: str, issuer: x509.Certificate, now: datetime) -> CertificatePair | None:
        certificate, key = rollover.pair_paths(self._directory, kind)
        try:
            one = load_pair(certificate, key, now)
            leaf = pair.read_certificate(certificate)
            configured = check_names(self._settings.names)
        except (CertificateError, OSError):
            return None  # `managed.ensure` reports the reason
        is_configured = one.key_type == kind and set(configured) <= set(one.names)
        is_same = leaf.fingerprint(hashes.SHA256()) == one.leaf_sha256
        return one if is_configured and is_same and pair.is_issued_by(leaf, issuer) else None

    def _read_authority(self) -> x509.Certificate | None:
        path, _ = authority.SERVER.paths(self._directory)
        try:
            certificate = pair.read_certificate(path)
            self.authorities = (_expiring(certificate, path),)
        except (CertificateError, OSError, *pair.UNREADABLE):
            return None  # keep what was read before
        return certificate


class RenewalSchedule:
    """When a renewal runs and is retried, and what is reported about its failures."""

    def __init__(self, path: Path, directory: Path, random: Random) -> None:
        self._retry = Retry(random)
        self._next_change = _NEVER
        self._routine_at = 0.0
        self._path = str(path)
        self._directory = directory
        self._reported = ""
        self._reported_at = 0.0
        self.retry_delay_s = 0.0
        """Of the last failure."""

    def is_due(self, now: datetime, monotonic: float, force: bool) -> bool:
        if self._retry.is_waiting:
            return self._retry.due(monotonic, now)
        return force or now >= self._next_change or monotonic >= self._routine_at

    def plan(self, next_change: datetime, monotonic: float) -> None:
        """Plan the run after this one."""
        self._next_change = next_change
        self._routine_at = monotonic + ROUTINE_S

    def failed(self, error: Exception, left: timedelta, now: datetime, monotonic: float) -> list[Notice]:
        """Record a failure. The same problem is reported once a day. `left` is the time until it is too late."""
        problem = str(_as_certificate_error(error, self._directory))
        self.retry_delay_s = self._retry.failed(monotonic, now, left)
        if problem == self._reported and monotonic < self._reported_at + REMIND_S:
            return []
        self._reported, self._reported_at = problem, monotonic
        return [Notice(NoticeKind.RENEWAL_FAILED, self._path, problem)]

    def succeeded(self) -> list[Notice]:
        if not self._retry.is_waiting:
            return []
        self._retry.succeeded()
        self._reported = ""
        message = f"{self._path}: the renewal that failed before has succeeded."
        return [Notice(NoticeKind.RENEWAL_RECOVERED, self._path, message)]


# --- certificates of other programs ------------------------------------------------------------------------


class ExternalSource(SiteSource):
    """A site with certificates that other programs provide."""

    origin = Origin.FILES

    def __init__(self, spec: ExternalSite, environ: Mapping[str, str]) -> None:
        self._spec, self._environ = spec, environ
        self._files = WatchedFiles(spec.paths, lambda now, before: load_site(spec, now, environ, before))

    @property
    def is_incomplete(self) -> bool:
        return self._files.is_incomplete

    @property
    def site(self) -> Site:
        return self._files.value

    def overdue(self, now: datetime) -> list[CertificatePair]:
        """Return the pairs in the last third of their lives: it is unknown when other programs renew."""
        return [
            one
            for one in self.site.pairs
            if now >= lifecycle.renewal_due(one.not_before, one.not_after, timedelta.max)
        ]

    def check_start(self, now: datetime) -> None:
        load_site(self._spec, now, self._environ)

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        self._files.start(now, monotonic)
        return notices.loaded((), self.site.pairs)

    def check(self, now: datetime, monotonic: float, force: bool) -> list[Notice]:
        before = self.site.pairs
        happened = self._files.check(now, monotonic, force=force)
        return [*notices.loaded(before, self.site.pairs), *happened]


# --- certificates of clients -------------------------------------------------------------------------------


class ClientTrustSource(Source):
    """The authorities for clients and their revocation lists. The managed ones are kept up to date.

    Without `maintains`, another process does that.
    """

    def __init__(
        self, settings: CertificateSettings, random: Random, progress: Progress, *, maintains: bool = True
    ) -> None:
        assert settings.clients is not None
        trust = self._trust = settings.clients
        directory = self._directory = settings.client_directory if maintains else None
        self._progress = progress
        self._schedule = RenewalSchedule(trust.crl or trust.ca, directory or trust.ca.parent, random)
        paths = (trust.ca,) if trust.crl is None else (trust.ca, trust.crl)
        self._files = WatchedFiles(paths, lambda now, before: _load_trust(trust))
        self.revoked: frozenset[CertificateId] = frozenset()
        self._loaded_message = f"Loaded {' and '.join(map(str, paths))} for clients' certificates."

    @property
    def is_incomplete(self) -> bool:
        return self._files.is_incomplete

    def check_start(self, now: datetime) -> None:
        if self._directory is not None:
            try:
                client_ca.check_authority(self._directory, now)
            except _FAILURES as error:
                if not _is_disk_failure(error):
                    raise _as_certificate_error(error, self._directory) from error
        if self._directory is None or self._trust.ca.exists():
            _load_trust(self._trust)

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        happened: list[Notice] = []
        directory = self._directory
        if directory is not None:
            try:
                client_ca.ensure_authority(directory, now, progress=self._progress)
            except _FAILURES as error:
                if not _is_disk_failure(error):
                    raise _as_certificate_error(error, directory) from error
                # The existing files may suffice.
                happened = self._schedule.failed(error, timedelta(0), now, monotonic)
        self._files.start(now, monotonic)
        self.authorities, self.lists, self.revoked = self._files.value
        return happened

    def check(self, now: datetime, monotonic: float, force: bool) -> list[Notice]:
        happened = self._refresh(now, monotonic, force)
        before = self._files.value
        of_files = self._files.check(now, monotonic, force=force)
        if self._files.value != before:
            self.authorities, self.lists, self.revoked = self._files.value
            happened.append(Notice(NoticeKind.CLIENT_TRUST_LOADED, str(self._trust.ca), self._loaded_message))
        return [*happened, *of_files]

    def _refresh(self, now: datetime, monotonic: float, force: bool) -> list[Notice]:
        """Sign the managed list again if due."""
        directory = self._directory
        if directory is None or not self._schedule.is_due(now, monotonic, force):
            return []
        try:
            next_change = client_ca.refresh_crl(directory, now, progress=self._progress)
        except _FAILURES as error:
            left = min(one.not_after for one in (*self.authorities, *self.lists)) - now
            return self._schedule.failed(error, left, now, monotonic)
        self._schedule.plan(next_change or _NEVER, monotonic)
        return self._schedule.succeeded()


def _load_trust(
    trust: ClientTrust,
) -> tuple[tuple[Expiring, ...], tuple[Expiring, ...], frozenset[CertificateId]]:
    """Return the authorities, the lists and what they revoke. Raises CertificateError if a file cannot be used."""
    with pair.parsing(trust.ca):
        found = pair.read_certificates(trust.ca, MAX_AUTHORITIES)
        authorities = tuple(_expiring(certificate, trust.ca) for certificate in found)
    if trust.crl is None:
        return authorities, (), frozenset()
    lists = pair.read_lists(trust.crl)
    with pair.parsing(trust.crl, "revocation list"):
        return authorities, tuple(_expiring_list(crl, trust.crl) for crl in lists), revoked_in(lists)


def _expiring(certificate: x509.Certificate, path: Path) -> Expiring:
    subject = escape_text(certificate.subject.rfc4514_string(), MAX_SUBJECT)
    return Expiring(
        certificate.fingerprint(hashes.SHA256()), str(path), certificate.not_valid_after_utc, subject
    )


def _expiring_list(crl: x509.CertificateRevocationList, path: Path) -> Expiring:
    if crl.next_update_utc is None:
        raise CertificateError(f"{path}: contains a revocation list without an expiry; use another list")
    crl.issuer.rfc4514_string()  # fails if it cannot be parsed
    return Expiring(crl.fingerprint(hashes.SHA256()), str(path), crl.next_update_utc)


def _is_disk_failure(error: BaseException | None) -> bool:
    """Return True if the system caused the error, rather than the content of a file or a setting."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False


def _as_certificate_error(error: Exception, directory: Path) -> CertificateError:
    if isinstance(error, CertificateError):
        return error
    why = getattr(error, "strerror", None) or error
    return CertificateError(f"{directory}: the certificates could not be checked: {why}")
