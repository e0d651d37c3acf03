"""Decides which of the own certificates must be made or renewed at a start, and does it.

Rules:
- One private authority (ca.crt, ca.key), and one certificate a key family: server.crt for RSA and
  server-ecdsa.crt for ECDSA, each with its key beside it.
- A certificate in these places that the own authority did not issue is never overwritten.
- A renewal keeps the key, so that pins stay good, unless a new one is asked for or its type changes.
- A certificate is issued at once if it is missing, damaged, not its key's, expired, not yet valid, of
  another key type, or lacks a configured name. If that fails there is no server.
- It is renewed when it is due, or lacks one of the host's own names. If that fails, the certificate in
  place goes on being served, and the failure is told.

Must not know: connections, contexts, configuration files, what time it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import authority, files, issue, keys, pair
from zcproto.certs.authority import Authority
from zcproto.certs.host import found_names
from zcproto.certs.names import MAX_NAMES, check_names
from zcproto.certs.pair import CertificatePair, load_pair
from zcproto.errors import CertificateError

FILE_NAMES = {"rsa": "server", "ecdsa": "server-ecdsa"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the own certificates shall be like."""

    names: tuple[str, ...]
    """Configured names; a certificate without one of them is wrong."""
    host_names: tuple[str, ...]
    """Names of the machine, which come and go with its networks."""
    lifetime: timedelta
    renew_before: timedelta
    """The time left at which a certificate is renewed; at most a third of the lifetime."""
    renew_key: bool

    @property
    def all_names(self) -> tuple[str, ...]:
        """All names, the configured ones first; if there are too many, the host's last ones are left out."""
        return tuple(dict.fromkeys((*self.names, *self.host_names)))[:MAX_NAMES]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One of the own certificates as it was found."""

    key_type: str
    certificate_path: Path
    key_path: Path
    certificate: x509.Certificate | None
    key: keys.PrivateKey | None


@dataclass(frozen=True, slots=True)
class Due:
    """A certificate has to be issued."""

    why: str
    must: bool
    """False if the certificate in place can still be served."""


def ensure_own_certificates(
    directory: Path,
    *,
    names: Sequence[str],
    key_types: Sequence[str],
    lifetime: timedelta,
    renew_before: timedelta,
    renew_key: bool,
    now: datetime,
    host_names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda sentence: None,
) -> list[CertificatePair]:
    """The own certificates in `directory`, one for each of `key_types`, made or renewed where needed.

    `names` are added to `host_names`, which are found here if None. `lifetime` is at most 397 days;
    `renew_before` counts for at most a third of it. `now` is an aware time. `progress` gets plain sentences
    about what is done, before what takes long; they hold no secret. Takes seconds when RSA keys are made,
    up to 30 more if another process is at it, milliseconds otherwise.

    Raises CertificateError, which names the file, what is wrong and what to do.
    """
    moment = pair.utc(now)
    keys.check_own_key_types(key_types)
    wanted = _wanted(names, host_names, lifetime, renew_before, renew_key)
    files.make_folder(directory)

    def tell_of_waiting() -> None:
        progress(f"Waiting for another process that is making the certificates in {directory}.")

    with files.translated(directory, "used"), files.locked(directory, on_wait=tell_of_waiting):
        own = authority.load(directory, moment, lifetime, progress)
        leaves = [_find(directory, key_type, own, progress) for key_type in key_types]
        _issue_due(directory, own, leaves, wanted, moment, progress)
        return [load_pair(leaf.certificate_path, leaf.key_path, moment) for leaf in leaves]


def reason_to_issue(leaf: Leaf, wanted: Wanted, now: datetime) -> Due | None:
    """Why a certificate has to be issued in place of this one, or None."""
    if leaf.certificate is None:
        return Due("it is missing", must=True)
    if leaf.key is None:
        return Due("its key is missing", must=True)
    if not keys.belongs(leaf.key, leaf.certificate.public_key()):
        return Due("its key is another one's", must=True)
    if keys.key_type_of(leaf.key) != leaf.key_type:
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
    if not_after - now <= min(wanted.renew_before, wanted.lifetime / 3):
        return Due(f"it expires on {_day(not_after)}", must=False)
    for name in wanted.all_names:
        if name not in present:
            return Due(f"it lacks the name {name}", must=False)
    return None


def _wanted(
    names: Sequence[str],
    host_names: Sequence[str] | None,
    lifetime: timedelta,
    renew_before: timedelta,
    renew_key: bool,
) -> Wanted:
    if not timedelta(seconds=1) <= lifetime <= issue.MAX_LIFETIME:
        raise CertificateError(
            f"a certificate cannot be valid for {lifetime}; give 1 second to {issue.MAX_LIFETIME.days} days"
        )
    if renew_before < timedelta(0):
        raise CertificateError(f"certificates must be renewed before they expire, not {-renew_before} after")
    host = found_names() if host_names is None else check_names(host_names)
    wanted = Wanted(check_names(names), host, lifetime, renew_before, renew_key)
    if not wanted.all_names:
        raise CertificateError("a certificate needs a name; give one")
    return wanted


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


def _issue_due(
    directory: Path,
    own: Authority | None,
    leaves: list[Leaf],
    wanted: Wanted,
    now: datetime,
    progress: Callable[[str], None],
) -> None:
    due = [(leaf, reason) for leaf in leaves if (reason := reason_to_issue(leaf, wanted, now))]
    if own is not None and own.key is None:
        for leaf, reason in due:
            _failed(leaf, reason, CertificateError(own.problem), progress)
        return
    to_make = [] if own is not None else [authority.KEY_TYPE]
    to_make += [leaf.key_type for leaf, _ in due if _needs_new_key(leaf, wanted)]
    made = iter(_generate(to_make, progress))
    if own is None:
        own = authority.make(directory, next(made), now, progress)
    for leaf, reason in due:
        new_key = next(made) if _needs_new_key(leaf, wanted) else None
        try:
            _issue(own, leaf, new_key, reason, wanted, now, progress)
        except CertificateError as error:
            _failed(leaf, reason, error, progress)


def _needs_new_key(leaf: Leaf, wanted: Wanted) -> bool:
    return leaf.key is None or wanted.renew_key or keys.key_type_of(leaf.key) != leaf.key_type


def _generate(key_types: list[str], progress: Callable[[str], None]) -> list[keys.PrivateKey]:
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
    progress: Callable[[str], None],
) -> None:
    key = leaf.key if new_key is None else new_key
    assert key is not None
    assert own.key is not None
    names = wanted.all_names
    certificate = issue.leaf_certificate(key, names, own.certificate, own.key, wanted.lifetime, now)
    new_key_pem = None if new_key is None else keys.key_pem(new_key)
    files.install(leaf.certificate_path, authority.pem(certificate), leaf.key_path, new_key_pem)
    der = certificate.public_bytes(serialization.Encoding.DER)
    progress(
        f"Made {leaf.certificate_path} ({reason.why}): {leaf.key_type} for {', '.join(names)};"
        f" valid until {_day(certificate.not_valid_after_utc)}; SHA-256 {hashlib.sha256(der).hexdigest()};"
        f" pin {pair.spki_pin(der)}."
    )


def _failed(leaf: Leaf, reason: Due, error: CertificateError, progress: Callable[[str], None]) -> None:
    """Tells of a certificate that could not be issued, and gives up where nothing can be served."""
    if reason.must:
        raise CertificateError(f"{leaf.certificate_path} must be made ({reason.why}): {error}") from error
    progress(
        f"{leaf.certificate_path} could not be renewed ({reason.why}): {error}. The old one is served on."
    )


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
