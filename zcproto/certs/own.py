"""Decides which of the own certificates must be made or renewed, with which key, and does it.

Rules:
- One private authority (ca.crt, ca.key), and one certificate a key family: server.crt for RSA and
  server-ecdsa.crt for ECDSA, each with its key beside it.
- A certificate in these places that the own authority did not issue is never overwritten.
- A certificate is issued at once if it is missing, damaged, not its key's, expired, not yet valid, of
  another key type, lacks a configured name, or has one for which the authority may not issue. If that fails
  there is no server.
- It is renewed when it is due, or lacks one of the host's own names. If that fails, the certificate in
  place goes on being served, and the failure is told.
- A renewal keeps the key, so that pins stay good. Where new keys are wanted, the next key is announced before
  the renewal and used at it. No certificate comes to its end because it waits for a key: where it is too late
  to announce one before the renewal, the renewal keeps the old key, and the new one follows when it has been
  announced long enough.
- A key whose announced time has come is used at once. It is used early if the key in place is lost or of
  another type: clients may know it already.
- What was made while the clock was wrong is made anew when it is right.

Must not know: connections, contexts, configuration files, what time it is.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import authority, files, issue, keys, lifecycle, pair, rotation
from zcproto.certs.authority import Authority
from zcproto.certs.certificates import NextPins
from zcproto.certs.host import found_names
from zcproto.certs.names import MAX_NAMES, check_names
from zcproto.certs.pair import CertificatePair, load_pair
from zcproto.certs.rotation import FILE_NAMES, NextKey
from zcproto.errors import CertificateError

Progress = Callable[[str], None]
"""Gets plain sentences about what is done, before what takes long. They hold no secret."""

ANNOUNCE_KEY = timedelta(days=7)
MAX_ANNOUNCEMENT = issue.MAX_LIFETIME

_FIRST_YEAR, _LAST_YEAR = 1951, 9900  # what X.509 can write, and room for the life of an authority


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """What is configured of the own certificates."""

    names: Sequence[str]
    key_types: Sequence[str]
    """One or two, one of each family."""
    lifetime: timedelta
    """At most 397 days."""
    renew_before: timedelta
    """The time left at which a certificate is renewed; it counts for at most a third of its lifetime."""
    renew_key: bool
    """Whether a renewal brings a new key."""
    announce_key: timedelta = ANNOUNCE_KEY
    """How long a new key is announced before it is used."""
    host_names: Sequence[str] | None = None
    """Names of the machine, beside `names`; None to find them."""


@dataclass(frozen=True, slots=True)
class OwnCertificates:
    """The own certificates as a visit to their folder has left them."""

    pairs: tuple[CertificatePair, ...]
    """In the order of the key types; all are fit to be served."""
    announced: NextPins | None
    """The keys that wait for their time."""
    used: tuple[str, ...]
    """The pins of new keys that were put to use by this visit."""
    left_out: tuple[str, ...]
    """Names of the machine for which the authority may not issue."""
    problems: tuple[str, ...]
    """What failed and has to be tried again, as sentences. What is served is good none the less."""
    next_change: datetime
    """When there is something to do again, if nothing else happens."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the own certificates shall be like: the settings, checked."""

    names: tuple[str, ...]
    """Configured names; a certificate without one of them is wrong."""
    host_names: tuple[str, ...]
    """Names of the machine, which come and go with its networks."""
    key_types: tuple[str, ...]
    lifetime: timedelta
    renew_before: timedelta
    renew_key: bool
    announce_key: timedelta

    def names_for(self, own: Authority | None) -> tuple[str, ...]:
        """The names in a certificate of this authority, the configured ones first.

        If there are too many, the host's last ones are left out.
        """
        names = dict.fromkeys((*self.names, *self.host_names))
        return tuple(name for name in names if _may_issue(own, name))[:MAX_NAMES]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One of the own certificates as it was found."""

    key_type: str
    certificate_path: Path
    key_path: Path
    certificate: x509.Certificate | None
    key: keys.PrivateKey | None

    @property
    def keeps_key(self) -> bool:
        """Whether the key in place can go on being used."""
        return self.key is not None and keys.key_type_of(self.key) == self.key_type


@dataclass(frozen=True, slots=True)
class Due:
    """A certificate has to be issued."""

    why: str
    must: bool
    """False if the certificate in place can still be served."""
    waits_until: datetime | None = None
    """How long this may wait for a key that is announced; None if not at all."""


def ensure_own_certificates(
    directory: Path,
    *,
    names: Sequence[str],
    key_types: Sequence[str],
    lifetime: timedelta,
    renew_before: timedelta,
    renew_key: bool,
    now: datetime,
    announce_key: timedelta = ANNOUNCE_KEY,
    host_names: Sequence[str] | None = None,
    progress: Progress = lambda sentence: None,
) -> list[CertificatePair]:
    """The pairs that `keep` gives, with the settings one by one."""
    settings = OwnSettings(names, key_types, lifetime, renew_before, renew_key, announce_key, host_names)
    return list(keep(directory, settings, now, progress).pairs)


def keep(
    directory: Path, settings: OwnSettings, now: datetime, progress: Progress = lambda sentence: None
) -> OwnCertificates:
    """The own certificates in `directory`, one for each key type, made or renewed where that is due.

    `now` is an aware time. Takes seconds when RSA keys are made, up to 30 more if another process is at it,
    milliseconds otherwise.

    Raises CertificateError, which names the file, what is wrong and what to do.
    """
    return _Visit(directory, settings, now, progress, _Task.KEEP).result()


def renew(
    directory: Path,
    settings: OwnSettings,
    now: datetime,
    progress: Progress = lambda sentence: None,
    *,
    families: Collection[str] = tuple(FILE_NAMES),
) -> OwnCertificates:
    """Renews the own certificates of these families now, with the keys that they have, and does what is due.

    Only a key whose announced time has come is used instead. Raises CertificateError if a certificate cannot
    be renewed.
    """
    return _Visit(directory, settings, now, progress, _Task.RENEW, families=families).result()


def rotate(
    directory: Path,
    settings: OwnSettings,
    now: datetime,
    progress: Progress = lambda sentence: None,
    *,
    use_from: datetime | None = None,
    at_once: bool = False,
) -> OwnCertificates:
    """Makes the next key of every own certificate and announces it; `keep` uses it when its time has come.

    That is at `use_from`, an aware time; without it, after `announce_key`. Keys that are announced already
    stay the next ones; `use_from` then is their new time. With `at_once` all certificates are issued with
    new keys now: with those announced where there are any, as clients may know them.

    Raises CertificateError if anything of that fails.
    """
    if at_once and use_from is not None:
        raise ValueError("new keys are used either at once or from a later time on")
    task = _Task.ROTATE if at_once else _Task.ANNOUNCE
    return _Visit(directory, settings, now, progress, task, use_from).result()


def cancel(directory: Path, progress: Progress = lambda sentence: None) -> tuple[Path, ...]:
    """Takes back what is announced: the next keys are put aside. Returns where they were."""
    files.check_folder(directory)
    with _locked(directory, progress):
        return rotation.cancel(directory, progress)


def reason_to_issue(leaf: Leaf, wanted: Wanted, own: Authority | None, now: datetime) -> Due | None:
    """Why a certificate has to be issued in place of this one, or None."""
    if leaf.certificate is None:
        return Due("it is missing", must=True)
    if leaf.key is None:
        return Due("its key is missing", must=True)
    if not keys.belongs(leaf.key, leaf.certificate.public_key()):
        return Due("its key is another one's", must=True)
    if not leaf.keeps_key:
        return Due("another type of key is wanted", must=True)
    not_before, not_after = leaf.certificate.not_valid_before_utc, leaf.certificate.not_valid_after_utc
    if now > not_after:
        return Due(f"it expired on {_day(not_after)}", must=True)
    if now < not_before:
        return Due(f"it is not valid before {_day(not_before)}", must=True)
    present = pair.names_of(leaf.certificate)
    for name in wanted.names:
        if name not in present:
            return Due(f"it lacks the name {name}", must=True)
    for name in present:
        if not _may_issue(own, name):
            return Due(f"the authority may not issue for its name {name}", must=True)
    if now >= lifecycle.renewal_due(not_before, not_after, wanted.renew_before):
        waits_until = lifecycle.renewal_waits_until(not_before, not_after, wanted.renew_before)
        return Due(f"it expires on {_day(not_after)}", must=False, waits_until=waits_until)
    for name in wanted.names_for(own):
        if name not in present:
            return Due(f"it lacks the name {name}", must=False)
    return None


def _may_issue(own: Authority | None, name: str) -> bool:
    return own is None or issue.permits(own.certificate, name)


# --- what is asked for, checked ------------------------------------------------------------------------


def _checked(settings: OwnSettings) -> Wanted:
    keys.check_own_key_types(settings.key_types)
    if not timedelta(seconds=1) <= settings.lifetime <= issue.MAX_LIFETIME:
        raise CertificateError(
            f"a certificate cannot be valid for {settings.lifetime};"
            f" give 1 second to {issue.MAX_LIFETIME.days} days"
        )
    if settings.renew_before < timedelta(0):
        raise CertificateError(
            f"certificates must be renewed before they expire, not {-settings.renew_before} after"
        )
    if not timedelta(0) <= settings.announce_key <= MAX_ANNOUNCEMENT:
        raise CertificateError(
            f"a key cannot be announced for {settings.announce_key}; give 0 to {MAX_ANNOUNCEMENT.days} days"
        )
    host_names = found_names() if settings.host_names is None else check_names(settings.host_names)
    wanted = Wanted(
        names=check_names(settings.names),
        host_names=host_names,
        key_types=tuple(settings.key_types),
        lifetime=settings.lifetime,
        renew_before=settings.renew_before,
        renew_key=settings.renew_key,
        announce_key=settings.announce_key,
    )
    if not wanted.names_for(None):
        raise CertificateError("a certificate needs a name; give one")
    return wanted


def _checked_now(now: datetime) -> datetime:
    moment = pair.utc(now)
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise CertificateError(f"no certificate can be made in the year {moment.year}; set the clock right")
    return moment


def _checked_use(use_from: datetime | None, now: datetime) -> datetime | None:
    if use_from is None:
        return None
    moment = pair.utc(use_from)
    if not now < moment <= now + MAX_ANNOUNCEMENT:
        raise CertificateError(
            f"a key cannot be announced for {_day(moment)}: give a time that is still to come, and at most"
            f" {MAX_ANNOUNCEMENT.days} days away"
        )
    return moment


@contextlib.contextmanager
def _locked(directory: Path, progress: Progress) -> Iterator[None]:
    """Holds the folder's lock. What the disk refuses is a CertificateError."""

    def tell_of_waiting() -> None:
        progress(f"Waiting for another process that is making the certificates in {directory}.")

    with files.translated(directory, "used"), files.locked(directory, on_wait=tell_of_waiting):
        yield


# --- what is there -------------------------------------------------------------------------------------


def _find(directory: Path, key_type: str, own: Authority | None, progress: Callable[[str], None]) -> Leaf:
    """What is in the place of this certificate, after what a crash left has been repaired."""
    stem = FILE_NAMES[keys.family(key_type)]
    certificate_path, key_path = directory / f"{stem}.crt", directory / f"{stem}.key"
    certificate = authority.read_or_set_aside(certificate_path, progress)
    if certificate is not None and (own is None or not own.issued(certificate)):
        raise CertificateError(
            f"{certificate_path}: was not issued by the own authority ({directory / 'ca.crt'}) and is never"
            ' overwritten; move it away, or set certificates.mode = "files" to use it'
        )

    def may_be_installed(certificate_pem: bytes, key_pem: bytes) -> bool:
        return (
            own is not None
            and pair.match(certificate_pem, key_pem)
            and own.issued(x509.load_pem_x509_certificate(certificate_pem))
        )

    files.recover(certificate_path, key_path, may_be_installed)
    certificate = authority.read_or_set_aside(certificate_path, progress)
    key = _find_key(key_path, key_type, certificate, progress)
    return Leaf(key_type, certificate_path, key_path, certificate, key)


def _find_key(
    path: Path, key_type: str, certificate: x509.Certificate | None, progress: Callable[[str], None]
) -> keys.PrivateKey | None:
    if not path.exists():
        return None
    try:
        key = pair.read_private_key(path)
    except files.DamagedFileError as error:
        progress(f"{error}. It is put aside as {files.set_aside(path)}.")
        return None
    ours = certificate is not None and keys.belongs(key, certificate.public_key())
    if not ours and keys.key_type_of(key) != key_type:
        # It would be overwritten, and may be somebody's.
        progress(f"{path} is a key of another type. It is put aside as {files.set_aside(path)}.")
        return None
    return key


# --- what is done, under the folder's lock -------------------------------------------------------------


class _Task(enum.Enum):
    KEEP = enum.auto()
    RENEW = enum.auto()
    ANNOUNCE = enum.auto()
    ROTATE = enum.auto()


_ASKED_FOR = {
    _Task.RENEW: Due("a renewal was asked for", must=True),
    _Task.ROTATE: Due("a new key was asked for", must=True),
}


@dataclass(slots=True)
class _Plan:
    """What is to be done for one certificate."""

    leaf: Leaf
    next_key: NextKey | None
    """The key that is announced."""
    announce_from: datetime | None = None
    """From when the next key may be used, if that has to be announced now."""
    fresh: bool = False
    """Whether the certificate is issued with a key that nobody knows."""
    key_to_announce: keys.PrivateKey | None = None
    fresh_key: keys.PrivateKey | None = None


class _Visit:
    """Does what is due in a folder, in this order: keys are made, next keys are announced, certificates are
    issued, and a next key is deleted when it is in use. So a crash in between loses nothing."""

    __slots__ = (
        *("_directory", "_families", "_now", "_problems", "_progress", "_task", "_use_from", "_used"),
        "_wanted",
    )

    def __init__(
        self,
        directory: Path,
        settings: OwnSettings,
        now: datetime,
        progress: Progress,
        task: _Task,
        use_from: datetime | None = None,
        families: Collection[str] = tuple(FILE_NAMES),
    ) -> None:
        self._directory = directory
        self._families = families
        self._now = _checked_now(now)
        self._wanted = _checked(settings)
        self._progress = progress
        self._task = task
        self._use_from = _checked_use(use_from, self._now)
        self._used: list[str] = []
        self._problems: list[str] = []

    def result(self) -> OwnCertificates:
        wanted = self._wanted
        files.make_folder(self._directory)
        with _locked(self._directory, self._progress):
            names = authority.Names(wanted.names, wanted.host_names)
            own = authority.load(self._directory, self._now, wanted.lifetime, names, self._progress)
            leaves = [_find(self._directory, key_type, own, self._progress) for key_type in wanted.key_types]
            next_keys = rotation.find(self._directory, wanted.key_types, self._now, self._progress)
            plans = [self._plan(leaf, next_keys.get(leaf.key_type), own) for leaf in leaves]
            own = self._make_keys(plans, own, names)
            for plan in plans:
                self._announce(plan)
            for plan in plans:
                self._issue_if_due(plan, own)
            pairs = tuple(load_pair(leaf.certificate_path, leaf.key_path, self._now) for leaf in leaves)
        if own.not_renewed:
            self._problems.append(own.not_renewed)
        return OwnCertificates(
            pairs=pairs,
            announced=rotation.pins_of(plan.next_key for plan in plans if plan.next_key is not None),
            used=tuple(self._used),
            left_out=tuple(name for name in wanted.host_names if not _may_issue(own, name)),
            problems=tuple(self._problems),
            next_change=min(map(self._next_change, pairs, plans, [own] * len(plans))),
        )

    def _plan(self, leaf: Leaf, next_key: NextKey | None, own: Authority | None) -> _Plan:
        can_issue = own is None or own.key is not None
        if not can_issue and self._task is not _Task.KEEP:
            assert own is not None
            raise CertificateError(own.problem)
        if next_key is not None and leaf.key is not None and rotation.key_pin(leaf.key) == next_key.pin:
            self._delete(next_key)  # it is in use: there was a crash before it was deleted
            next_key = None
        plan = _Plan(leaf, next_key)
        if not can_issue:
            return plan
        if self._task is _Task.ANNOUNCE:
            if next_key is None or self._use_from is not None:
                plan.announce_from = self._use_from or self._now + self._wanted.announce_key
        elif self._task is _Task.KEEP and next_key is None:
            plan.announce_from = self._announcement_due(leaf)
        if plan.announce_from is not None and plan.announce_from <= self._now:
            plan.announce_from, plan.fresh = None, True  # it is not to be announced, but to be used
        elif next_key is None:
            plan.fresh = not leaf.keeps_key or self._task is _Task.ROTATE
        return plan

    def _announcement_due(self, leaf: Leaf) -> datetime | None:
        """From when the next key may be used, if it is time to announce one."""
        if not self._wanted.renew_key or leaf.certificate is None or not leaf.keeps_key:
            return None
        due, length = self._renewal(
            leaf.certificate.not_valid_before_utc, leaf.certificate.not_valid_after_utc
        )
        return max(due, self._now + length) if self._now >= due - length else None

    def _renewal(self, not_before: datetime, not_after: datetime) -> tuple[datetime, timedelta]:
        """When a certificate is renewed, and how long before that its next key is announced."""
        wanted = self._wanted
        return (
            lifecycle.renewal_due(not_before, not_after, wanted.renew_before),
            lifecycle.announcement(not_before, not_after, wanted.renew_before, wanted.announce_key),
        )

    def _make_keys(self, plans: list[_Plan], own: Authority | None, names: authority.Names) -> Authority:
        """Makes all keys that are needed at the same time, and the authority if there is none."""
        fresh = [plan for plan in plans if plan.fresh]
        announced = [plan for plan in plans if plan.announce_from is not None and plan.next_key is None]
        key_types = [] if own is not None else [authority.KEY_TYPE]
        made = iter(
            _generate([*key_types, *(plan.leaf.key_type for plan in (*fresh, *announced))], self._progress)
        )
        if own is None:
            own = authority.make(self._directory, next(made), names, self._now, self._progress)
        for plan in fresh:
            plan.fresh_key = next(made)
        for plan in announced:
            plan.key_to_announce = next(made)
        return own

    def _announce(self, plan: _Plan) -> None:
        if plan.announce_from is None:
            return
        try:
            if plan.next_key is not None:
                plan.next_key = rotation.move(plan.next_key, plan.announce_from, self._now, self._progress)
            else:
                assert plan.key_to_announce is not None
                plan.next_key = rotation.announce(
                    self._directory, plan.key_to_announce, plan.announce_from, self._now, self._progress
                )
        except CertificateError as error:
            if self._task is _Task.ANNOUNCE:
                raise
            self._tell(f"The next key of {plan.leaf.certificate_path} could not be announced: {error}.")

    def _issue_if_due(self, plan: _Plan, own: Authority) -> None:
        leaf, next_key = plan.leaf, plan.next_key
        reason = self._reason(plan, own)
        if reason is None:
            return
        new_key = plan.fresh_key
        if new_key is None and next_key is not None and (self._is_time_of(next_key) or not leaf.keeps_key):
            new_key = next_key.key
        try:
            _issue(own, leaf, new_key, reason, self._wanted, self._now, self._progress)
        except CertificateError as error:
            if reason.must:
                raise CertificateError(
                    f"{leaf.certificate_path} must be made ({reason.why}): {error}"
                ) from error
            self._tell(
                f"{leaf.certificate_path} could not be renewed ({reason.why}): {error}."
                " The old one is served on."
            )
            return
        if new_key is not None:
            self._used.append(rotation.key_pin(new_key))
        if next_key is not None and new_key is next_key.key:
            self._delete(next_key)
            plan.next_key = None

    def _reason(self, plan: _Plan, own: Authority) -> Due | None:
        """Why this certificate is issued now, or None."""
        reason = reason_to_issue(plan.leaf, self._wanted, own, self._now)
        if reason is not None and reason.must:
            return reason
        if self._task in _ASKED_FOR and keys.family(plan.leaf.key_type) in self._families:
            return _ASKED_FOR[self._task]
        if plan.next_key is not None and self._is_time_of(plan.next_key):
            return Due("the time of its next key has come", must=False)
        if plan.fresh:
            return reason or _ASKED_FOR[_Task.ROTATE]
        if reason is not None and reason.waits_until is not None and plan.next_key is not None:
            return None if plan.next_key.use_from <= reason.waits_until else reason
        return reason

    def _is_time_of(self, next_key: NextKey) -> bool:
        return next_key.use_from <= self._now or self._task is _Task.ROTATE

    def _next_change(self, one: CertificatePair, plan: _Plan, own: Authority) -> datetime:
        due, length = self._renewal(one.not_before, one.not_after)
        if plan.next_key is None:
            announces = self._wanted.renew_key and own.key is not None
            return due - length if announces else due
        use_from = plan.next_key.use_from
        until = lifecycle.renewal_waits_until(one.not_before, one.not_after, self._wanted.renew_before)
        return use_from if use_from <= until else min(due, use_from)

    def _delete(self, next_key: NextKey) -> None:
        try:
            rotation.used(next_key)
        except OSError as error:
            self._tell(f"{next_key.path} is in use and could not be deleted: {error.strerror or error}.")

    def _tell(self, problem: str) -> None:
        self._problems.append(problem)
        self._progress(problem)


def _generate(key_types: Sequence[str], progress: Progress) -> list[keys.PrivateKey]:
    """New keys, made at the same time in threads: the GIL is released meanwhile."""
    if not key_types:
        return []
    patience = " RSA takes some seconds." if "rsa" in map(keys.family, key_types) else ""
    progress(f"Making keys: {', '.join(key_types)}.{patience}")
    with ThreadPoolExecutor(len(key_types)) as threads:
        return list(threads.map(keys.generate, key_types))


def _issue(
    own: Authority,
    leaf: Leaf,
    new_key: keys.PrivateKey | None,
    reason: Due,
    wanted: Wanted,
    now: datetime,
    progress: Progress,
) -> None:
    if own.key is None:
        raise CertificateError(own.problem)
    key = leaf.key if new_key is None else new_key
    assert key is not None
    names = wanted.names_for(own)
    certificate = issue.leaf_certificate(key, names, own.certificate, own.key, wanted.lifetime, now)
    new_key_pem = None if new_key is None else keys.key_pem(new_key)
    files.install(leaf.certificate_path, authority.pem(certificate), leaf.key_path, new_key_pem)
    der = certificate.public_bytes(serialization.Encoding.DER)
    progress(
        f"Made {leaf.certificate_path} ({reason.why}): {leaf.key_type} for {', '.join(names)};"
        f" valid until {_day(certificate.not_valid_after_utc)}; SHA-256 {hashlib.sha256(der).hexdigest()};"
        f" pin {pair.spki_pin(der)}."
    )
    left_out = [name for name in wanted.host_names if not _may_issue(own, name)]
    if left_out:
        progress(
            f"{leaf.certificate_path} leaves out {', '.join(left_out)}: ca.crt may not issue for that."
            " Add it to certificates.names if clients use it; they then need a new ca.crt."
        )


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
