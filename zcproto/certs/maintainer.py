"""Decides what is served now: own certificates kept good, and what others have put in place.

One object that a server asks once a second. It answers at once if nothing has changed; it may take seconds
when keys are made, so it is asked in a thread.

Rules:
- The first answer is a whole set of certificates, or CertificateError: without one there is no server.
- Later answers never raise for anything that is in files or done by a disk. What was good stays, what is wrong
  is told, and it is tried again.
- Own certificates are seen to when their time has come, when their files change, when the clock was set, and
  every hour. What the command line or another process has put there is served within one look.
- Files of own certificates that somebody writes over without holding the lock, as a restored backup does, are
  repaired only when they have been quiet for a while: half of a pair is no reason to overwrite the other.
- If the disk fails, what is on it and good is served all the same.
- The end of an own certificate is told only from the time on when it should have been renewed: before that
  there is nothing for anybody to do.

Must not know: TLS contexts, connections, logs, what time it is.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from zcproto.certs import authority, clients, files, lifecycle, own, pair, rotation
from zcproto.certs.authority import Authority
from zcproto.certs.certificates import CertificateSet, NextPins, Site
from zcproto.certs.foreign import (
    LONGEST_SETTLE_S,
    SETTLE_S,
    ForeignSite,
    Look,
    Watched,
    check_sites,
    watched_site,
)
from zcproto.certs.keys import family
from zcproto.certs.lifecycle import ExpiryAlerts, Random, Retry
from zcproto.certs.names import check_names
from zcproto.certs.own import OwnSettings, Progress
from zcproto.certs.pair import CertificatePair, load_pair
from zcproto.certs.revoked import crl_blocks
from zcproto.common.text import escape_text
from zcproto.common.watcher import FileWatcher
from zcproto.errors import CertificateError

ROUTINE_S = 3600.0
"""Between visits to the folder of own certificates that nothing calls for: a host's names come and go."""

REMIND_S = 86_400.0
"""After which a failure that lasts is told again."""

MAX_AUTHORITIES = 1000
"""Certificates in a file of authorities for clients; a system's whole store has about 150."""

Rest = Callable[[], None]

_IDLE = timedelta(minutes=1)
_NEVER = datetime.max.replace(tzinfo=UTC)
_TROUBLE = (CertificateError, OSError, RuntimeError)
"""What a folder, a disk or a lack of threads can cause."""

_SUBJECT = 200


# --- what is asked for ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnSource:
    """The default site has own certificates."""

    directory: Path
    settings: OwnSettings


@dataclass(frozen=True, slots=True)
class ClientTrust:
    """The files by which clients' certificates are believed."""

    ca: Path
    crl: Path | None = None
    """PEM, one list or several; it must be there."""
    directory: Path | None = None
    """The folder of the own authority for clients, if this is it: it is made, and its list is signed anew."""


@dataclass(frozen=True, slots=True)
class MaintainerSettings:
    """What is to be served, and what is to be told."""

    default: OwnSource | ForeignSite
    sites: tuple[ForeignSite, ...] = ()
    """Beside the default one."""
    alert_days: tuple[int, ...] = (30, 14, 7, 3, 1)
    clients: ClientTrust | None = None
    """None if clients show no certificates."""


# --- what is answered -------------------------------------------------------------------------------------


class NoticeKind(enum.Enum):
    """What a notice is about."""

    LOADED = "loaded"
    """A certificate is served that was found in its place."""
    RENEWED = "renewed"
    """A certificate is served that was made just now."""
    KEY_ROTATED = "key_rotated"
    """A certificate that was made just now has another key than the one before it."""
    NEXT_PINS = "next_pins"
    """The pins of next keys are announced, or for another time."""
    RENEWAL_FAILED = "renewal_failed"
    RENEWAL_RECOVERED = "renewal_recovered"
    FILES_BAD = "files_bad"
    """Files that others make cannot be used; what was good before is used on."""
    FILES_RECOVERED = "files_recovered"
    CLIENT_TRUST_LOADED = "client_trust_loaded"
    """The authorities for clients, or what they have revoked, are other ones than before."""
    EXPIRY = "expiry"
    """A certificate or a list of revoked ones is about to end, or has ended."""
    EXPIRY_ENDED = "expiry_ended"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something to log, and perhaps to alert somebody of. It holds no secret."""

    kind: NoticeKind
    what: str
    """The file or folder it is about."""
    message: str
    """A sentence."""
    pins: tuple[str, ...] = ()
    """LOADED, RENEWED, KEY_ROTATED, NEXT_PINS: the pins of the keys."""
    not_after: datetime | None = None
    """LOADED, RENEWED, EXPIRY, EXPIRY_ENDED: the end, aware, in UTC."""
    days: int | None = None
    """EXPIRY, EXPIRY_ENDED: the threshold that was reached; 0 if it is over."""
    left: timedelta | None = None
    """EXPIRY, EXPIRY_ENDED: the time left; negative if it is over."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """How the last renewal of own certificates went."""

    at: datetime
    ok: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found."""

    certificates: CertificateSet | None
    """What is to be served from now on; None if that is what it was before."""
    client_trust_changed: bool
    """The files of ClientTrust are to be loaded anew."""
    notices: tuple[Notice, ...]
    """What happened since the check before."""
    next_pins: NextPins | None
    """What is announced now; None if nothing is."""
    last_renewal: Renewal | None
    """None if there was none since the start."""


class Source(enum.Enum):
    """Where a certificate comes from."""

    OWN = "own"
    FILES = "files"
    AUTHORITY = "authority"
    CLIENT_AUTHORITY = "client_authority"


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """One certificate that is in use, for metrics and for people."""

    source: Source
    path: Path
    names: tuple[str, ...]
    """What is in the certificate; for an authority its subject."""
    site: tuple[str, ...]
    """The names for which it is served; empty for the default site and for authorities."""
    key_type: str
    """Empty for authorities."""
    pin: str
    """Empty for authorities."""
    sha256: bytes
    not_after: datetime
    seconds_left: float
    """Negative if it has expired."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """Something with an end that is told in time: an authority or a list."""

    sha256: bytes
    path: Path
    subject: str
    not_after: datetime


# --- the maintainer ---------------------------------------------------------------------------------------


class _Origin(Protocol):
    """Where the default site comes from."""

    source: Source
    announced: NextPins | None
    last_renewal: Renewal | None
    endings: tuple[_Ending, ...]

    @property
    def site(self) -> Site: ...

    def start(self, now: datetime, monotonic: float) -> list[Notice]: ...

    def look(self, now: datetime, monotonic: float, again: bool) -> list[Notice]: ...

    def is_overdue(self, one: CertificatePair, now: datetime) -> bool:
        """Whether its end is worth an alert if it is near."""
        ...


class Maintainer:
    """All certificates of a server. One thread at a time may ask it; `status` may be asked in any other."""

    def __init__(
        self,
        settings: MaintainerSettings,
        *,
        random: Random,
        environ: Mapping[str, str],
        progress: Progress = lambda sentence: None,
        rest: Rest = lambda: None,
    ) -> None:
        """`random` gives numbers from 0 to below 1, for the delays of retries; `environ` may hold passphrases.

        `progress` gets plain sentences before what takes long. `rest` is called between what takes some
        milliseconds, to leave the processor to others. Raises CertificateError if the sites contradict one another.
        """
        check_sites(settings.sites)
        self._origin: _Origin
        if isinstance(settings.default, OwnSource):
            self._origin = _Own(settings.default, random, progress, rest)
        else:
            self._origin = _Files(watched_site(settings.default, environ))
        self._sites = [_Files(watched_site(spec, environ)) for spec in settings.sites]
        self._clients = None if settings.clients is None else _Clients(settings.clients, random, progress)
        self._alerts = ExpiryAlerts(settings.alert_days)
        self._set: CertificateSet | None = None
        self._clock = (datetime.min, 0.0)

    @property
    def certificates(self) -> CertificateSet:
        """What is to be served; there is something after the first check."""
        assert self._set is not None
        return self._set

    def check(self, now: datetime, monotonic: float) -> Outcome:
        """Sees to everything. `now` is an aware time, `monotonic` seconds that only grow.

        Raises CertificateError only as long as there has been nothing to serve.
        """
        moment = pair.utc(now)
        before, notices, trust_changed = self._set, [], False
        if before is None:
            self._clock = (moment, monotonic)
            for part in self._parts:
                notices += part.start(moment, monotonic)
        else:
            again = self._was_set(moment, monotonic)
            for part in self._parts:
                notices += part.look(moment, monotonic, again)
            trust_changed = any(notice.kind is NoticeKind.CLIENT_TRUST_LOADED for notice in notices)
        current = CertificateSet((self._origin.site, *(site.site for site in self._sites)))
        if current != before:
            self._set = current
        notices += self._expiry_notices(moment)
        return Outcome(
            certificates=None if current == before else current,
            client_trust_changed=trust_changed,
            notices=tuple(notices),
            next_pins=self._origin.announced,
            last_renewal=self._origin.last_renewal,
        )

    def status(self, now: datetime) -> tuple[CertificateStatus, ...]:
        """All certificates in use: those served, then the authorities. Empty before the first check."""
        moment = pair.utc(now)
        if self._set is None:
            return ()
        found = []
        for position, site in enumerate(self._set.sites):
            source = self._origin.source if position == 0 else Source.FILES
            found += [_status_of_pair(source, site, one, moment) for one in site.pairs]
        for one in self._origin.endings:
            found.append(_status_of_authority(Source.AUTHORITY, one, moment))
        if self._clients is not None:
            for one in self._clients.authorities:
                found.append(_status_of_authority(Source.CLIENT_AUTHORITY, one, moment))
        return tuple(found)

    @property
    def _parts(self) -> list[_Origin | _Files | _Clients]:
        return [self._origin, *self._sites, *(() if self._clients is None else (self._clients,))]

    def _was_set(self, now: datetime, monotonic: float) -> bool:
        """Whether the clock was set, or the machine slept, since this was last true."""
        wall, then = self._clock
        if abs((now - wall).total_seconds() - (monotonic - then)) <= lifecycle.CLOCK_JUMP_S:
            return False
        self._clock = (now, monotonic)
        return True

    def _expiry_notices(self, now: datetime) -> list[Notice]:
        origins: list[_Origin] = [self._origin, *self._sites]
        items = [
            (one.leaf_sha256, str(one.certificate), one.not_after)
            for part in origins
            for one in part.site.pairs
            if part.is_overdue(one, now)
        ]
        endings = [*self._origin.endings, *(() if self._clients is None else self._clients.endings)]
        items += [(one.sha256, str(one.path), one.not_after) for one in endings]
        return [_expiry_notice(alert) for alert in self._alerts.due(items, now)]


# --- own certificates -------------------------------------------------------------------------------------


class _Own:
    """The default site, of certificates that are made here."""

    source = Source.OWN

    def __init__(self, origin: OwnSource, random: Random, progress: Progress, rest: Rest) -> None:
        self.announced: NextPins | None = None
        self.last_renewal: Renewal | None = None
        self.endings: tuple[_Ending, ...] = ()
        self._directory = origin.directory
        self._settings = origin.settings
        self._progress = progress
        self._rest = rest
        self._failures = _Failures(origin.directory, random)
        self._pairs: dict[str, CertificatePair] = {}  # by key type
        self._watch = FileWatcher(
            [
                *authority.paths(origin.directory),
                *(path for kind in origin.settings.key_types for path in self._paths(kind)),
                *rotation.paths(origin.directory),
            ],
            files.MAX_FILE_BYTES,
        )
        self._next_change = _NEVER
        self._routine_at = 0.0
        self._touched_since: float | None = None
        self._settled_at = 0.0

    @property
    def site(self) -> Site:
        return Site((), tuple(self._pairs.values()))

    def is_overdue(self, one: CertificatePair, now: datetime) -> bool:
        return now >= lifecycle.renewal_due(one.not_before, one.not_after, self._settings.renew_before)

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        self._pairs = {}
        self._watch.look()
        known = self._on_disk(now)
        try:
            found = own.keep(self._directory, self._settings, now, self._progress)
        except _TROUBLE as error:
            on_disk = self._on_disk(now)
            if not on_disk or not _is_of_the_disk(error):
                raise _as_certificate_error(error, self._directory) from error
            return [*self._take(on_disk), *self._failed(error, now, monotonic)]
        return self._kept(found, known, now, monotonic)

    def look(self, now: datetime, monotonic: float, again: bool) -> list[Notice]:
        notices: list[Notice] = []
        if self._watch.look():
            notices = self._touched(now, monotonic)
            self._rest()
        if not self._is_due(now, monotonic, again):
            return notices
        known = self._pairs
        try:
            found = own.keep(self._directory, self._settings, now, self._progress)
        except _TROUBLE as error:
            # What has been made before it failed is seen as a change at the next look.
            return notices + self._failed(error, now, monotonic)
        return notices + self._kept(found, known, now, monotonic)

    def _touched(self, now: datetime, monotonic: float) -> list[Notice]:
        """Takes what somebody has put there; if that is not whole, it is given time."""
        if self._touched_since is None:
            self._touched_since = monotonic
        on_disk = self._on_disk(now)
        self._settled_at = monotonic
        if len(on_disk) < len(self._settings.key_types):
            self._settled_at = min(monotonic + SETTLE_S, self._touched_since + LONGEST_SETTLE_S)
        return self._take(on_disk)

    def _is_due(self, now: datetime, monotonic: float, again: bool) -> bool:
        if self._touched_since is not None:
            served_is_good = all(one.not_before <= now <= one.not_after for one in self._pairs.values())
            return monotonic >= self._settled_at or not served_is_good
        if self._failures.retry.waiting:
            return self._failures.retry.due(monotonic, now)
        return again or now >= self._next_change or monotonic >= self._routine_at

    def _kept(
        self,
        found: own.OwnCertificates,
        known: Mapping[str, CertificatePair],
        now: datetime,
        monotonic: float,
    ) -> list[Notice]:
        """Takes what a visit has left; `known` is what was there before it."""
        self._touched_since = None
        self._routine_at = monotonic + ROUTINE_S
        # If there is nothing to do although its time has come, it is not asked each second what it is.
        self._next_change = found.next_change if found.next_change > now else now + _IDLE
        there = {one.leaf_sha256 for one in known.values()}
        made = [one for one in found.pairs if one.leaf_sha256 not in there]
        notices = [_renewed(one) for one in made]
        notices += [_rotated(one) for one in made if one.pin != known.get(one.key_type, one).pin]
        notices += self._take({one.key_type: one for one in found.pairs}, made=made)
        self._read_authority()
        notices += self._announce(found.announced)
        if found.problems:
            return notices + self._failed(CertificateError(" ".join(found.problems)), now, monotonic)
        recovered = self._failures.succeeded()
        if made or recovered:
            self.last_renewal = Renewal(now, ok=True)
        return notices + recovered

    def _failed(self, error: Exception, now: datetime, monotonic: float) -> list[Notice]:
        self._touched_since = None
        self.last_renewal = Renewal(now, ok=False)
        # What is not valid yet, after the clock was set back, is as bad as what has expired.
        ends = [one.not_after if one.not_before <= now else now for one in self._pairs.values()]
        left = min(ends, default=now) - now
        return self._failures.failed(str(_as_certificate_error(error, self._directory)), left, now, monotonic)

    def _announce(self, announced: NextPins | None) -> list[Notice]:
        if announced == self.announced:
            return []
        self.announced = announced
        if announced is None:
            return []
        message = f"The next keys will be used from {_day(announced.use_from)}: {', '.join(announced.pins)}."
        return [Notice(NoticeKind.NEXT_PINS, str(self._directory), message, pins=announced.pins)]

    def _take(
        self, found: Mapping[str, CertificatePair], made: Sequence[CertificatePair] = ()
    ) -> list[Notice]:
        """Serves what was found, and of the other key types what was served before."""
        before = self._pairs
        both = {kind: found.get(kind) or before.get(kind) for kind in self._settings.key_types}
        self._pairs = {kind: one for kind, one in both.items() if one is not None}
        return _loaded(before.values(), [one for one in self._pairs.values() if one not in made])

    def _on_disk(self, now: datetime) -> dict[str, CertificatePair]:
        """Those pairs in the folder that can be served as they are, by key type. Nothing is written."""
        own_authority = self._read_authority()
        return {
            kind: one
            for kind in self._settings.key_types
            if own_authority is not None and (one := self._load(kind, own_authority, now)) is not None
        }

    def _load(self, kind: str, own_authority: Authority, now: datetime) -> CertificatePair | None:
        certificate, key = self._paths(kind)
        try:
            one = load_pair(certificate, key, now)
            leaf = pair.read_certificates(certificate)[0]
            wanted = check_names(self._settings.names)
        except (CertificateError, OSError):
            return None  # it is not to be served; `keep` says why
        is_wanted = one.key_type == kind and set(wanted) <= set(one.names)
        is_same = leaf.fingerprint(hashes.SHA256()) == one.leaf_sha256
        return one if is_wanted and is_same and own_authority.issued(leaf) else None

    def _read_authority(self) -> Authority | None:
        path, _ = authority.paths(self._directory)
        try:
            certificate = pair.read_certificates(path)[0]
            self.endings = (_ending(certificate, path),)
        except (CertificateError, OSError, *pair.UNREADABLE):
            return None  # what was read before stands
        return Authority(certificate, None, "")

    def _paths(self, kind: str) -> tuple[Path, Path]:
        stem = rotation.FILE_NAMES[family(kind)]
        return self._directory / f"{stem}.crt", self._directory / f"{stem}.key"


class _Failures:
    """What fails and is tried again: when, and what is told of it."""

    def __init__(self, what: Path, random: Random) -> None:
        self.retry = Retry(random)
        self._what = what
        self._told = ""
        self._told_at = 0.0

    def failed(self, problem: str, left: timedelta, now: datetime, monotonic: float) -> list[Notice]:
        """`left` is the time until it is too late. The same failure is told once a day."""
        self.retry.failed(monotonic, now, left)
        if problem == self._told and monotonic < self._told_at + REMIND_S:
            return []
        self._told, self._told_at = problem, monotonic
        return [Notice(NoticeKind.RENEWAL_FAILED, str(self._what), problem)]

    def succeeded(self) -> list[Notice]:
        if not self.retry.waiting:
            return []
        self.retry.succeeded()
        self._told = ""
        message = f"{self._what}: what could not be renewed is good again."
        return [Notice(NoticeKind.RENEWAL_RECOVERED, str(self._what), message)]


# --- certificates of others -------------------------------------------------------------------------------


class _Files:
    """A site of certificates that others make."""

    source = Source.FILES
    announced: NextPins | None = None
    last_renewal: Renewal | None = None
    endings: tuple[_Ending, ...] = ()

    def __init__(self, watched: Watched[Site]) -> None:
        self._watched = watched

    @property
    def site(self) -> Site:
        assert self._watched.value is not None
        return self._watched.value

    def is_overdue(self, one: CertificatePair, now: datetime) -> bool:
        return True  # nobody knows when others renew

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        return _loaded((), self._watched.start(now, monotonic).pairs)

    def look(self, now: datetime, monotonic: float, again: bool) -> list[Notice]:
        before = self.site
        look = self._watched.look(now, monotonic, again=again)
        return [*_loaded(before.pairs, self.site.pairs), *_look_notices(look, before.pairs[0].certificate)]


# --- certificates of clients ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trust:
    """What is in the files by which clients are believed."""

    authorities: tuple[_Ending, ...]
    lists: tuple[_Ending, ...]


class _Clients:
    """The authorities for clients and what they have revoked; the own ones are kept good."""

    def __init__(self, trust: ClientTrust, random: Random, progress: Progress) -> None:
        self._files = trust
        self._progress = progress
        self._failures = _Failures(trust.ca if trust.crl is None else trust.crl, random)
        self._watched = Watched(self._paths, lambda now: _load_trust(trust))
        self._next_change = _NEVER
        self._routine_at = 0.0

    @property
    def authorities(self) -> tuple[_Ending, ...]:
        return self._trust.authorities

    @property
    def endings(self) -> tuple[_Ending, ...]:
        return (*self._trust.authorities, *self._trust.lists)

    @property
    def _trust(self) -> _Trust:
        assert self._watched.value is not None
        return self._watched.value

    def start(self, now: datetime, monotonic: float) -> list[Notice]:
        notices: list[Notice] = []
        if self._files.directory is not None:
            try:
                clients.ensure_client_authority(self._files.directory, now, progress=self._progress)
            except _TROUBLE as error:
                if not _is_of_the_disk(error):
                    raise _as_certificate_error(error, self._files.directory) from error
                # What is there already may do.
                problem = str(_as_certificate_error(error, self._files.directory))
                notices = self._failures.failed(problem, timedelta(0), now, monotonic)
        self._watched.start(now, monotonic)
        return notices

    def look(self, now: datetime, monotonic: float, again: bool) -> list[Notice]:
        notices = self._refresh(now, monotonic, again)
        look = self._watched.look(now, monotonic, again=again)
        if look.changed:
            message = f"Loaded {' and '.join(map(str, self._paths))} for clients' certificates."
            notices.append(Notice(NoticeKind.CLIENT_TRUST_LOADED, str(self._files.ca), message))
        return [*notices, *_look_notices(look, self._files.ca)]

    @property
    def _paths(self) -> tuple[Path, ...]:
        return (self._files.ca,) if self._files.crl is None else (self._files.ca, self._files.crl)

    def _refresh(self, now: datetime, monotonic: float, again: bool) -> list[Notice]:
        """Has the own list signed anew when that is due."""
        if self._files.directory is None:
            return []
        if self._failures.retry.waiting:
            due = self._failures.retry.due(monotonic, now)
        else:
            due = again or now >= self._next_change or monotonic >= self._routine_at
        if not due:
            return []
        try:
            next_change = clients.refresh_crl(self._files.directory, now, progress=self._progress)
        except _TROUBLE as error:
            left = min((one.not_after for one in self.endings), default=now) - now
            problem = str(_as_certificate_error(error, self._files.directory))
            return self._failures.failed(problem, left, now, monotonic)
        self._next_change = next_change or _NEVER
        self._routine_at = monotonic + ROUTINE_S
        return self._failures.succeeded()


def _load_trust(trust: ClientTrust) -> _Trust:
    """Raises CertificateError if a file cannot be used."""
    with _readable(trust.ca):
        found = pair.read_certificates(trust.ca, MAX_AUTHORITIES)
        authorities = tuple(_ending(certificate, trust.ca) for certificate in found)
    if trust.crl is None:
        return _Trust(authorities, ())
    with _readable(trust.crl):
        lists = tuple(_list_ending(block, trust.crl) for block in _crl_blocks(trust.crl))
    return _Trust(authorities, lists)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except pair.UNREADABLE as error:
        raise CertificateError(f"{path}: holds what cannot be read; get it anew") from error


def _crl_blocks(path: Path) -> list[bytes]:
    blocks = crl_blocks(path)
    if not blocks:
        raise CertificateError(f"{path}: holds no list of revoked certificates in PEM; get it anew")
    return blocks


def _list_ending(data: bytes, path: Path) -> _Ending:
    revoked = x509.load_pem_x509_crl(data)
    end = revoked.next_update_utc
    if end is None:
        raise CertificateError(f"{path}: holds a list of revoked certificates without an end; get another")
    return _Ending(hashlib.sha256(data).digest(), path, _name_of(revoked.issuer), end)


# --- words ------------------------------------------------------------------------------------------------


def _ending(certificate: x509.Certificate, path: Path) -> _Ending:
    return _Ending(
        certificate.fingerprint(hashes.SHA256()),
        path,
        _name_of(certificate.subject),
        certificate.not_valid_after_utc,
    )


def _name_of(name: x509.Name) -> str:
    return escape_text(name.rfc4514_string(), _SUBJECT)


def _loaded(before: Iterable[CertificatePair], now: Iterable[CertificatePair]) -> list[Notice]:
    known = set(before)
    return [
        Notice(
            NoticeKind.LOADED,
            str(one.certificate),
            f"Loaded {_described(one)}",
            pins=(one.pin,),
            not_after=one.not_after,
        )
        for one in now
        if one not in known
    ]


def _renewed(one: CertificatePair) -> Notice:
    message = f"Made {_described(one)}"
    return Notice(NoticeKind.RENEWED, str(one.certificate), message, pins=(one.pin,), not_after=one.not_after)


def _rotated(one: CertificatePair) -> Notice:
    message = f"{one.certificate} has a new key, pin {one.pin}."
    return Notice(NoticeKind.KEY_ROTATED, str(one.certificate), message, pins=(one.pin,))


def _described(one: CertificatePair) -> str:
    names = escape_text(", ".join(one.names), _SUBJECT) or "no names"
    return (
        f"{one.certificate}: {one.key_type} for {names}; valid until {_day(one.not_after)};"
        f" SHA-256 {one.leaf_sha256.hex()}; pin {one.pin}."
    )


def _look_notices(look: Look, path: Path) -> list[Notice]:
    if look.bad:
        return [Notice(NoticeKind.FILES_BAD, str(path), f"{look.bad}. What was good before is used on.")]
    if look.recovered:
        return [Notice(NoticeKind.FILES_RECOVERED, str(path), f"{path} is good again.")]
    return []


def _expiry_notice(alert: lifecycle.ExpiryAlert) -> Notice:
    if alert.ended:
        kind, message = NoticeKind.EXPIRY_ENDED, f"{alert.what} is not about to expire any more."
    elif alert.left < timedelta(0):
        kind, message = NoticeKind.EXPIRY, f"{alert.what} expired on {_day(alert.not_after)}."
    else:
        days = alert.left // timedelta(days=1)
        kind = NoticeKind.EXPIRY
        message = f"{alert.what} expires on {_day(alert.not_after)}, in {days} days."
    return Notice(kind, alert.what, message, not_after=alert.not_after, days=alert.days, left=alert.left)


def _status_of_pair(source: Source, site: Site, one: CertificatePair, now: datetime) -> CertificateStatus:
    return CertificateStatus(
        source=source,
        path=one.certificate,
        names=one.names,
        site=site.names,
        key_type=one.key_type,
        pin=one.pin,
        sha256=one.leaf_sha256,
        not_after=one.not_after,
        seconds_left=(one.not_after - now).total_seconds(),
    )


def _status_of_authority(source: Source, one: _Ending, now: datetime) -> CertificateStatus:
    return CertificateStatus(
        source=source,
        path=one.path,
        names=(one.subject,),
        site=(),
        key_type="",
        pin="",
        sha256=one.sha256,
        not_after=one.not_after,
        seconds_left=(one.not_after - now).total_seconds(),
    )


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether the system refused something, rather than that a file or a setting is wrong."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False


def _as_certificate_error(error: Exception, directory: Path) -> CertificateError:
    if isinstance(error, CertificateError):
        return error
    why = getattr(error, "strerror", None) or error
    return CertificateError(f"{directory}: the certificates could not be seen to: {why}")


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
