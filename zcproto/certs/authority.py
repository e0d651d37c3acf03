"""Decides whether there is an own certificate authority in a folder, makes it and keeps it valid.

Rules:
- ca.crt and ca.key are made once. A lost ca.crt is made again from ca.key, with the same name and key, so
  that certificates issued before still verify. A lost ca.key ends the issuing, not the serving: the leaves
  go on until they expire, and the error says what to do.
- The certificate is renewed with the same key before a leaf could outlive it. Clients that have the old
  file trust it until its own end.
- It may issue only for the names known when it was made. A configured name beyond them needs a new
  certificate for it, with the same key, and every client that holds the old one needs the new one: that is
  told loudly. A name of the machine beyond them is not worth that; it is for the caller to leave out.
- A certificate that was made without such constraints is renewed without them.
- A ca.crt that was not made here is never replaced.

Must not know: leaves. The caller holds the folder's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from zcproto.certs import files, issue, keys, pair
from zcproto.errors import CertificateError

KEY_TYPE = "rsa-4096"
"""Used a few times a year, and trusted for ten: there is nothing to save here."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The own certificate authority as it is in its folder."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey | None
    problem: str
    """Why there is no key, as a sentence with the cure; empty if there is one."""
    not_renewed: str = ""
    """Why its certificate could not be renewed although that was due; empty if it is good."""

    def issued(self, certificate: x509.Certificate) -> bool:
        """Whether this authority signed `certificate`."""
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (InvalidSignature, *pair.UNREADABLE):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Names:
    """What an authority shall be able to issue for."""

    configured: tuple[str, ...]
    """It must be made anew if it cannot."""
    host: tuple[str, ...]
    """They are permitted when it is made, and no reason to make it anew."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.configured, *self.host)

    def beyond(self, certificate: x509.Certificate) -> tuple[str, ...]:
        """The names for which this authority must be made anew."""
        if not any(issue.permits(certificate, name) for name in self.all):
            return self.all  # or there would be nothing to issue for
        return tuple(name for name in self.configured if not issue.permits(certificate, name))


def paths(directory: Path) -> tuple[Path, Path]:
    return directory / "ca.crt", directory / "ca.key"


def load(
    directory: Path, now: datetime, leaf_lifetime: timedelta, names: Names, progress: Callable[[str], None]
) -> Authority | None:
    """The authority in `directory`, repaired and renewed where that is due; None if there is none yet."""
    certificate_path, key_path = paths(directory)
    files.recover(certificate_path, key_path, pair.match)
    if key_path.exists():
        certificate = read_or_set_aside(certificate_path, progress)  # it can be made again
    elif certificate_path.exists():
        certificate = pair.read_certificates(certificate_path)[0]
    else:
        return None
    if certificate is not None:
        _check_made_here(certificate, certificate_path)
    key, problem = _read_key(certificate_path, key_path, certificate)
    if certificate is None:
        if key is None:
            raise CertificateError(problem)
        return _renew(directory, key, issue.permitted_for(names.all), now, progress)
    found = Authority(certificate, key, problem)
    beyond = names.beyond(certificate)
    if key is not None and beyond:
        return _widen(directory, key, certificate, names, now, progress)
    last_use = certificate.not_valid_after_utc - leaf_lifetime  # or the leaf would outlive its authority
    if key is None or certificate.not_valid_before_utc <= now <= last_use:
        return found
    try:
        return _renew(directory, key, _permitted(certificate, names), now, progress)
    except CertificateError as error:
        if now > certificate.not_valid_after_utc:
            raise
        not_renewed = f"{certificate_path} could not be renewed: {error}. The old one is kept."
        progress(not_renewed)
        return replace(found, not_renewed=not_renewed)


def make(
    directory: Path, key: keys.PrivateKey, names: Names, now: datetime, progress: Callable[[str], None]
) -> Authority:
    """A new authority in `directory`."""
    assert isinstance(key, rsa.RSAPrivateKey)
    certificate_path, key_path = paths(directory)
    certificate = issue.authority_certificate(key, now, issue.permitted_for(names.all))
    files.install(certificate_path, pem(certificate), key_path, keys.key_pem(key))
    progress(f"Made the certificate authority {certificate_path}. Clients trust the server by this file.")
    return Authority(certificate, key, "")


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_or_set_aside(path: Path, progress: Callable[[str], None]) -> x509.Certificate | None:
    """The first certificate in the file; None if there is no file, or a damaged one, which is put aside."""
    if not path.exists():
        return None
    try:
        return pair.read_certificates(path)[0]
    except files.DamagedFileError as error:
        progress(f"{error}. It is put aside as {files.set_aside(path)}.")
        return None


def _permitted(old: x509.Certificate, names: Names) -> tuple[str, ...] | None:
    """What a new certificate permits: what is wanted now, and what the old one did if there is room."""
    permitted = issue.permitted_names(old)
    return None if permitted is None else issue.permitted_for((*names.all, *permitted))


def _widen(
    directory: Path,
    key: rsa.RSAPrivateKey,
    old: x509.Certificate,
    names: Names,
    now: datetime,
    progress: Callable[[str], None],
) -> Authority:
    widened = _renew(directory, key, _permitted(old, names), now, progress)
    progress(
        f"ATTENTION: {paths(directory)[0]} had to be made anew, as the old one is not good for"
        f" {', '.join(names.beyond(old))}. Clients that hold the old file refuse this server from now on:"
        " give them the new one."
    )
    return widened


def _renew(
    directory: Path,
    key: rsa.RSAPrivateKey,
    permitted: Sequence[str] | None,
    now: datetime,
    progress: Callable[[str], None],
) -> Authority:
    certificate_path, key_path = paths(directory)
    certificate = issue.authority_certificate(key, now, permitted)
    files.install(certificate_path, pem(certificate), key_path, None)
    progress(f"Renewed {certificate_path} with its key, until {certificate.not_valid_after_utc:%Y-%m-%d}.")
    return Authority(certificate, key, "")


def _read_key(
    certificate_path: Path, key_path: Path, certificate: x509.Certificate | None
) -> tuple[rsa.RSAPrivateKey | None, str]:
    """The authority's key, or why it cannot be used."""
    cure = (
        f"; put the right one back, or move {certificate_path.name} and the server's certificates away"
        " to have a new authority made, which clients then have to trust"
    )
    if not key_path.exists():
        return None, f"{key_path}: does not exist, so no certificate can be issued{cure}"
    try:
        key = pair.read_private_key(key_path)
    except files.DamagedFileError as error:
        return None, f"{error}{cure}"
    if not isinstance(key, rsa.RSAPrivateKey) or keys.weakness(key) is not None:
        return None, f"{key_path}: is no RSA key of at least {keys.MIN_RSA_BITS} bits{cure}"
    if certificate is not None and not keys.belongs(key, certificate.public_key()):
        return None, f"{key_path}: is not the key of {certificate_path}{cure}"
    return key, ""


def _check_made_here(certificate: x509.Certificate, path: Path) -> None:
    try:
        public_key = certificate.public_key()
        named = certificate.subject == certificate.issuer
        made_here = named and certificate.subject == issue.authority_name(public_key)
        issue.permitted_names(certificate)  # fails if the extensions cannot be read
    except pair.UNREADABLE:
        made_here = False
    if not made_here:
        raise CertificateError(
            f"{path}: was not made here and is never replaced; move it away with its key,"
            ' or set certificates.mode = "files" to use certificates of another authority'
        )
