"""Decides which managed certificates have to be issued or renewed, and with which key, and does it.

Managed certificates are those that the server issues itself, from an authority in the same folder.

Rules:
- There is one private authority (ca.crt, ca.key) and one certificate for each key family: server.crt for RSA and
  server-ecdsa.crt for ECDSA, each with its key beside it.
- A certificate in these places that the authority did not issue is never overwritten.
- A certificate is issued at once if it is missing, damaged, expired, not yet valid, without a configured name, does
  not match its key or the configured key type, or has a name for which the authority may not issue. If that fails,
  the server does not start.
- It is renewed when it is due or lacks a host name. If that fails, the old certificate remains in use and the
  failure is reported.
- A key that is damaged, lost or of another certificate is replaced. That changes the pin, so both are reported.
  Without `repair` it is a CertificateError, and the files remain unchanged.
- A renewal keeps the key, so that pins remain valid. With `renew_key` the next key is announced before the renewal
  and used at it. A certificate never expires while it waits for a key: if it is too late to announce one before the
  renewal, the renewal keeps the old key, and the new key follows after its full announcement.
- An announced key is used as soon as its time has come. It is used early if the current key is lost or of another
  type, because clients may already have its pin.
- Certificates issued while the clock was wrong are replaced when it is correct again.

Must not know: connections, contexts, configuration files, the current time.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from zcproto.certs import authority, files, keys, lifecycle, pair, profile, rollover
from zcproto.certs.authority import Authority, AuthorityFolder, Leaf, Progress
from zcproto.certs.names import MAX_NAMES, check_names, found_names
from zcproto.certs.notices import day
from zcproto.certs.pair import CertificatePair, load_pair
from zcproto.certs.rollover import STEMS, NextKey, NextPins
from zcproto.common.files import staging_path
from zcproto.errors import CertificateError
from zcproto.tls.pins import key_pin

ANNOUNCE_KEY = timedelta(days=7)

_RESTORE = "restore the key from a backup, or set certificates.repair = true to replace it with a new one"

_FIRST_YEAR, _LAST_YEAR = 1951, 9900  # what X.509 can express, with room for the lifetime of an authority


@dataclass(frozen=True, slots=True)
class ManagedSettings:
    """The configuration of managed certificates."""

    names: Sequence[str]
    """Configured names; a certificate without one of them is replaced."""
    key_types: Sequence[str]
    """Types that the configuration allows, at most one of each family."""
    lifetime: timedelta
    """At most 397 days."""
    renew_before: timedelta
    """Time left at which a certificate is renewed; at most a third of its lifetime counts."""
    renew_key: bool
    """Whether a renewal uses a new key."""
    announce_key: timedelta = ANNOUNCE_KEY
    """How long a new key is announced before it is used."""
    repair: bool = True
    """Whether a damaged or lost key is replaced."""
    host_names: Sequence[str] | None = None
    """Names of the machine, which change with its networks; None to detect them."""

    def checked(self) -> ManagedSettings:
        """Return these settings with all names in normal form. Raises CertificateError if one is invalid."""
        host_names = found_names() if self.host_names is None else check_names(self.host_names)
        checked = replace(self, names=check_names(self.names), host_names=host_names)
        if not checked.names and not host_names:
            raise CertificateError("a certificate needs a name; configure certificates.names")
        return checked

    def names_for(self, issuer: x509.Certificate) -> tuple[str, ...]:
        """Return the names of a certificate from this authority, without the last host names if too many."""
        names = dict.fromkeys((*self.names, *(self.host_names or ())))
        return tuple(name for name in names if profile.permits(issuer, name))[:MAX_NAMES]


@dataclass(frozen=True, slots=True)
class ReplacedKey:
    """A key that was damaged, lost or of another certificate, and was replaced."""

    path: Path
    old_pin: str
    """Empty if the certificate was damaged or lost as well."""
    new_pin: str


@dataclass(frozen=True, slots=True)
class ManagedCertificates:
    """The managed certificates after a renewal run."""

    pairs: tuple[CertificatePair, ...]
    """In the order of the key types; all can be served."""
    next_pins: NextPins | None
    """The keys that are announced."""
    new_pins: tuple[str, ...]
    """The pins of new keys that this run put into use."""
    problems: tuple[str, ...]
    """What failed and has to be retried, as sentences. The certificates can be served nevertheless."""
    next_change: datetime
    """When the next run is due, if nothing else happens."""
    replaced_keys: tuple[ReplacedKey, ...] = ()

    def report(self) -> dict[str, Any]:
        """Return the result as data for JSON, with times as RFC 3339 in UTC."""
        following = self.next_pins
        return {
            "certificates": [
                {
                    "certificate": str(one.certificate),
                    "key_type": one.key_type,
                    "names": list(one.names),
                    "not_after": _stamp(one.not_after),
                    "pin": one.pin,
                    "new_key": one.pin in self.new_pins,
                }
                for one in self.pairs
            ],
            "next_pins": None
            if following is None
            else {"pins": list(following.pins), "use_from": _stamp(following.use_from)},
        }


def ensure(
    directory: Path, settings: ManagedSettings, now: datetime, progress: Progress = lambda sentence: None
) -> ManagedCertificates:
    """Issue and renew the managed certificates in `directory` as far as due.

    `now` is an aware time. Takes seconds if RSA keys are generated, up to 30 more if another process holds the
    lock, otherwise milliseconds. Raises CertificateError, which names the file, the problem and the remedy.
    """
    return RenewalRun(directory, settings, now, progress, _Task.ENSURE).result()


def renew(
    directory: Path,
    settings: ManagedSettings,
    now: datetime,
    progress: Progress = lambda sentence: None,
    *,
    families: Collection[str] = tuple(STEMS),
) -> ManagedCertificates:
    """Renew the managed certificates of these families now with their current keys, and do what else is due.

    A next key is used instead only if its time has come. Raises CertificateError if a renewal fails.
    """
    return RenewalRun(directory, settings, now, progress, _Task.RENEW, families=families).result()


def rotate(
    directory: Path,
    settings: ManagedSettings,
    now: datetime,
    progress: Progress = lambda sentence: None,
    *,
    at_once: bool = False,
) -> ManagedCertificates:
    """Generate and announce the next key of every managed certificate; `ensure` uses it after `announce_key`.

    Keys that are already announced remain the next ones. With `at_once`, all certificates are issued with new keys
    now, preferably with announced ones because clients may have their pins.

    Raises CertificateError if any step fails.
    """
    task = _Task.ROTATE if at_once else _Task.ANNOUNCE
    return RenewalRun(directory, settings, now, progress, task).result()


def check(directory: Path, settings: ManagedSettings, now: datetime) -> None:
    """Raise the CertificateError with which `ensure` would fail. Changes nothing."""
    RenewalRun(directory, settings, now, lambda sentence: None, _Task.CHECK).check()


# --- decisions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a certificate has to be issued."""

    why: str
    is_required: bool = True
    """False if the current certificate can still be served."""
    waits_until: datetime | None = None
    """How long to wait for an announced key; None if not at all."""


def _reason_to_issue(
    plan: _Plan, settings: ManagedSettings, issuer: x509.Certificate, now: datetime
) -> Reason | None:
    """Return why a certificate has to be issued in place of this one, or None. The settings have been checked."""
    leaf = plan.leaf
    if leaf.certificate is None:
        return Reason("it is missing")
    if leaf.key is None:
        return Reason("its key is missing")
    if not leaf.is_matching:
        return Reason("it does not match its key")
    if not plan.has_usable_key:
        return Reason("another key type is configured")
    not_before, not_after = leaf.certificate.not_valid_before_utc, leaf.certificate.not_valid_after_utc
    if now > not_after:
        return Reason(f"it expired on {day(not_after)}")
    if now < not_before:
        return Reason(f"it is not valid before {day(not_before)}")
    present = pair.names_of(leaf.certificate)
    for name in settings.names:
        if name not in present:
            return Reason(f"it lacks the name {name}")
    for name in present:
        if not profile.permits(issuer, name):
            return Reason(f"the authority may not issue for its name {name}")
    if now >= lifecycle.renewal_due(not_before, not_after, settings.renew_before):
        waits_until = lifecycle.renewal_waits_until(not_before, not_after, settings.renew_before)
        return Reason(f"it expires on {day(not_after)}", is_required=False, waits_until=waits_until)
    for name in settings.names_for(issuer):
        if name not in present:
            return Reason(f"it lacks the name {name}", is_required=False)
    return None


# --- one run, under the folder's lock ----------------------------------------------------------------------


class _Task(enum.Enum):
    CHECK = enum.auto()
    ENSURE = enum.auto()
    RENEW = enum.auto()
    ANNOUNCE = enum.auto()
    ROTATE = enum.auto()


_REQUESTED = {
    _Task.RENEW: Reason("a renewal was requested"),
    _Task.ROTATE: Reason("a new key was requested"),
}


@dataclass(slots=True)
class _Plan:
    """What to do for one certificate."""

    key_type: str
    leaf: Leaf
    is_key_lost: bool = False
    """Whether there was a key that cannot be used any more."""
    next_key: NextKey | None = None
    """The key that is announced."""
    announce_from: datetime | None = None
    """From when the next key may be used, if it has to be announced now."""
    needs_new_key: bool = False
    """Whether the certificate is issued with a key that was not announced."""
    key_to_announce: keys.PrivateKey | None = None
    new_key: keys.PrivateKey | None = None

    @property
    def has_usable_key(self) -> bool:
        """Whether the current key can remain in use."""
        return self.leaf.key is not None and keys.key_type_of(self.leaf.key) == self.key_type


class RenewalRun:
    """Generates keys, announces next keys, issues certificates and deletes next keys in use, in this order: an
    interruption loses nothing."""

    def __init__(
        self,
        directory: Path,
        settings: ManagedSettings,
        now: datetime,
        progress: Progress,
        task: _Task,
        families: Collection[str] = tuple(STEMS),
    ) -> None:
        self._directory = directory
        self._families = families
        self._now = pair.utc(now)
        if not _FIRST_YEAR <= self._now.year <= _LAST_YEAR:
            raise CertificateError(
                f"no certificate can be issued in the year {self._now.year}; correct the clock"
            )
        self._settings = settings.checked()
        names = authority.Names(tuple(self._settings.names), tuple(self._settings.host_names or ()))
        self._folder = AuthorityFolder(
            authority.SERVER, directory, self._now, progress, names, changes=task is not _Task.CHECK
        )
        self._progress = progress
        self._task = task
        self._new_pins: list[str] = []
        self._replaced_keys: list[ReplacedKey] = []
        self._problems: list[str] = []

    def result(self) -> ManagedCertificates:
        settings = self._settings
        files.make_folder(self._directory)
        with files.locked(self._directory, self._progress):
            found = self._folder.load(settings.lifetime)
            plans = [self._find(key_type, found) for key_type in settings.key_types]
            next_keys = rollover.find(self._directory, settings.key_types, self._now, self._progress)
            for plan in plans:
                self._decide(plan, next_keys.get(plan.key_type), found)
            issuer = self._generate_keys(plans, found)
            for plan in plans:
                self._announce(plan)
            for plan in plans:
                self._issue_if_due(plan, issuer)
            leaves = [plan.leaf for plan in plans]
            pairs = tuple(load_pair(leaf.certificate_path, leaf.key_path, self._now) for leaf in leaves)
        if issuer.not_renewed:
            self._problems.append(issuer.not_renewed)
        return ManagedCertificates(
            pairs=pairs,
            next_pins=rollover.pins_of(plan.next_key for plan in plans if plan.next_key is not None),
            new_pins=tuple(self._new_pins),
            problems=tuple(self._problems),
            next_change=min(
                self._next_change(one, plan, issuer) for one, plan in zip(pairs, plans, strict=True)
            ),
            replaced_keys=tuple(self._replaced_keys),
        )

    def check(self) -> None:
        """Raise CertificateError for what `result` neither repairs nor tolerates."""
        ca, _ = authority.SERVER.paths(self._directory)
        if not self._directory.exists():
            files.check_writable(ca)
            return
        files.check_folder(self._directory)
        files.check_writable(self._directory, needs_space=False)  # for the lock
        if any(self._directory.glob(str(staging_path(Path("*"))))):
            return  # another process is installing them, or was interrupted and `result` finishes it
        found = self._folder.load(self._settings.lifetime)
        for key_type in self._settings.key_types:
            plan = self._find(key_type, found)
            path = plan.leaf.certificate_path
            if found is None:
                files.check_writable(ca)
                continue
            reason = _reason_to_issue(plan, self._settings, found.certificate, self._now)
            if reason is None or not reason.is_required:
                load_pair(path, plan.leaf.key_path, self._now)
            elif found.key is None:
                raise CertificateError(f"{path} must be issued ({reason.why}): {found.problem}")
            else:
                files.check_writable(path)

    # --- what exists

    def _find(self, key_type: str, issuer: Authority | None) -> _Plan:
        """Return the plan for the certificate of this type, after repairing what an interruption left."""
        paths = rollover.pair_paths(self._directory, key_type)
        existed = any(path.exists() for path in paths)
        if not self._settings.repair and paths[1].exists():
            try:
                pair.read_private_key(paths[1])
            except files.DamagedFileError as error:
                raise CertificateError(f"{error}; {_RESTORE}") from error
        remedy = 'move it away, or set certificates.mode = "files" to use it'
        leaf = self._folder.find_leaf(*paths, issuer, remedy)
        is_key_lost = existed and (
            leaf.key is None or (leaf.certificate is not None and not leaf.is_matching)
        )
        if is_key_lost and not self._settings.repair:
            raise CertificateError(
                f"{leaf.key_path}: is missing or does not belong to {leaf.certificate_path}; {_RESTORE}"
            )
        is_kept = leaf.key is None or leaf.is_matching or keys.key_type_of(leaf.key) == key_type
        if is_kept or self._task is _Task.CHECK:
            return _Plan(key_type, leaf, is_key_lost)
        # The key would be overwritten, and may be needed elsewhere.
        aside = files.set_aside(leaf.key_path)
        self._progress(f"{leaf.key_path} is a key of another type. It was set aside as {aside}.")
        return _Plan(key_type, replace(leaf, key=None), is_key_lost)

    # --- what to do

    def _decide(self, plan: _Plan, next_key: NextKey | None, issuer: Authority | None) -> None:
        leaf = plan.leaf
        can_issue = issuer is None or issuer.key is not None
        if not can_issue and self._task is not _Task.ENSURE:
            assert issuer is not None
            raise CertificateError(issuer.problem)
        if next_key is not None and leaf.key is not None and key_pin(leaf.key.public_key()) == next_key.pin:
            self._delete(next_key)  # it is in use: a run was interrupted before the deletion
            next_key = None
        plan.next_key = next_key
        if next_key is not None or not can_issue:
            return
        if self._task is _Task.ANNOUNCE:
            plan.announce_from = self._now + self._settings.announce_key
        elif self._task is _Task.ENSURE:
            plan.announce_from = self._announcement_due(plan)
        if plan.announce_from is not None and plan.announce_from <= self._now:
            plan.announce_from, plan.needs_new_key = None, True  # use it without an announcement
        else:
            plan.needs_new_key = not plan.has_usable_key or self._task is _Task.ROTATE

    def _announcement_due(self, plan: _Plan) -> datetime | None:
        """Return from when the next key may be used, if it is time to announce one."""
        certificate = plan.leaf.certificate
        if not self._settings.renew_key or certificate is None or not plan.has_usable_key:
            return None
        due, length = self._renewal(certificate.not_valid_before_utc, certificate.not_valid_after_utc)
        return max(due, self._now + length) if self._now >= due - length else None

    def _renewal(self, not_before: datetime, not_after: datetime) -> tuple[datetime, timedelta]:
        """Return when a certificate is renewed, and how long before that its next key is announced."""
        before, announce = self._settings.renew_before, self._settings.announce_key
        return (
            lifecycle.renewal_due(not_before, not_after, before),
            lifecycle.announcement(not_before, not_after, before, announce),
        )

    def _reason(self, plan: _Plan, issuer: Authority) -> Reason | None:
        reason = _reason_to_issue(plan, self._settings, issuer.certificate, self._now)
        if reason is not None and reason.is_required:
            return reason
        if self._task in _REQUESTED and keys.family(plan.key_type) in self._families:
            return _REQUESTED[self._task]
        if plan.next_key is not None and self._is_time_of(plan.next_key):
            return Reason("the time of its next key has come", is_required=False)
        if plan.needs_new_key:
            return reason or _REQUESTED[_Task.ROTATE]
        if reason is not None and reason.waits_until is not None and plan.next_key is not None:
            return None if plan.next_key.use_from <= reason.waits_until else reason
        return reason

    def _is_time_of(self, next_key: NextKey) -> bool:
        return next_key.use_from <= self._now or self._task is _Task.ROTATE

    def _next_change(self, one: CertificatePair, plan: _Plan, issuer: Authority) -> datetime:
        due, length = self._renewal(one.not_before, one.not_after)
        if plan.next_key is None:
            announces = self._settings.renew_key and issuer.key is not None
            return due - length if announces else due
        use_from = plan.next_key.use_from
        until = lifecycle.renewal_waits_until(one.not_before, one.not_after, self._settings.renew_before)
        return use_from if use_from <= until else min(due, use_from)

    # --- doing it

    def _generate_keys(self, plans: list[_Plan], issuer: Authority | None) -> Authority:
        """Generate all keys that are needed in parallel, and create the authority if it does not exist."""
        new = [plan for plan in plans if plan.needs_new_key]
        announced = [plan for plan in plans if plan.announce_from is not None]
        key_types = [] if issuer is not None else [authority.key_type_for(self._settings.key_types)]
        key_types += [plan.key_type for plan in (*new, *announced)]
        generated = iter(_generate(key_types, self._progress))
        if issuer is None:
            issuer = self._folder.create(next(generated))
        for plan in new:
            plan.new_key = next(generated)
        for plan in announced:
            plan.key_to_announce = next(generated)
        return issuer

    def _announce(self, plan: _Plan) -> None:
        if plan.announce_from is None:
            return
        assert plan.key_to_announce is not None
        try:
            plan.next_key = rollover.announce(
                self._directory, plan.key_to_announce, plan.announce_from, self._now, self._progress
            )
        except CertificateError as error:
            if self._task is _Task.ANNOUNCE:
                raise
            self._add_problem(
                f"The next key of {plan.leaf.certificate_path} could not be announced: {error}."
            )

    def _issue_if_due(self, plan: _Plan, issuer: Authority) -> None:
        leaf, next_key = plan.leaf, plan.next_key
        reason = self._reason(plan, issuer)
        if reason is None:
            return
        new_key = plan.new_key
        if new_key is None and next_key is not None:
            new_key = next_key.key if self._is_time_of(next_key) or not plan.has_usable_key else None
        try:
            self._issue(plan, issuer, new_key, reason)
        except CertificateError as error:
            if reason.is_required:
                raise CertificateError(
                    f"{leaf.certificate_path} must be issued ({reason.why}): {error}"
                ) from error
            self._add_problem(
                f"{leaf.certificate_path} could not be renewed ({reason.why}): {error}."
                " The old one remains in use."
            )
            return
        if new_key is not None:
            self._new_pins.append(key_pin(new_key.public_key()))
        if next_key is not None and new_key is next_key.key:
            self._delete(next_key)
            plan.next_key = None

    def _issue(self, plan: _Plan, issuer: Authority, new_key: keys.PrivateKey | None, reason: Reason) -> None:
        signing_key = issuer.signing_key()
        leaf = plan.leaf
        key = leaf.key if new_key is None else new_key
        assert key is not None
        names = self._settings.names_for(issuer.certificate)
        certificate = profile.server_certificate(
            key, names, issuer.certificate, signing_key, self._settings.lifetime, self._now
        )
        authority.install(certificate, leaf.certificate_path, new_key, leaf.key_path)
        self._progress(
            f"Issued {leaf.certificate_path} ({reason.why}): {plan.key_type} for {', '.join(names)};"
            f" valid until {day(certificate.not_valid_after_utc)};"
            f" SHA-256 {certificate.fingerprint(hashes.SHA256()).hex()};"
            f" pin {key_pin(key.public_key())}."
        )
        if plan.is_key_lost:
            old_pin = "" if leaf.certificate is None else key_pin(leaf.certificate.public_key())
            self._replaced_keys.append(ReplacedKey(leaf.key_path, old_pin, key_pin(key.public_key())))
        if keys.family(plan.key_type) == "rsa" and keys.family(keys.key_type_of(signing_key)) == "ecdsa":
            self._progress(
                f"ATTENTION: {leaf.certificate_path} is for clients that support only RSA, but they cannot verify"
                " it: ca.crt has an ECDSA key. To create an RSA authority, which every client then has to trust,"
                " move ca.* and server* away."
            )
        host_names = self._settings.host_names or ()
        left_out = [name for name in host_names if not profile.permits(issuer.certificate, name)]
        if left_out:
            self._progress(
                f"{leaf.certificate_path} leaves out {', '.join(left_out)}: ca.crt may not issue for it."
                " Add it to certificates.names if clients use it; they will then need a new ca.crt."
            )

    def _delete(self, next_key: NextKey) -> None:
        try:
            rollover.delete(next_key)
        except OSError as error:
            self._add_problem(
                f"{next_key.path} is in use and could not be deleted: {error.strerror or error}."
            )

    def _add_problem(self, problem: str) -> None:
        self._problems.append(problem)
        self._progress(problem)


def _generate(key_types: Sequence[str], progress: Progress) -> list[keys.PrivateKey]:
    """Generate keys in parallel threads: the GIL is released meanwhile."""
    if not key_types:
        return []
    duration = " RSA takes some seconds." if "rsa" in map(keys.family, key_types) else ""
    progress(f"Generating keys: {', '.join(key_types)}.{duration}")
    with ThreadPoolExecutor(len(key_types)) as threads:
        return list(threads.map(keys.generate, key_types))


def _stamp(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
