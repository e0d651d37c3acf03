"""Decides whether a folder has a certificate authority, creates it and keeps its certificate valid.

There are two kinds: the server authority (ca.crt, ca.key) and the client authority (client-ca.crt, client-ca.key).

Rules:
- Certificate and key are created once. A lost certificate is reissued from the key with the same name, so
  certificates issued before still verify. A lost key stops issuing but not serving: leaves remain usable until
  they expire, and the error explains how to recover.
- The certificate is renewed with the same key before a leaf could outlive it. Clients that have the old file trust
  it until it expires.
- A server authority of an earlier version can issue only for the names known when it was created. A configured name
  beyond them requires a new certificate for the same key, and every client needs the new file; this is reported
  prominently. A host name beyond them does not justify that, and the caller leaves it out. New certificates have no
  such constraints.
- A certificate that was not created here is never replaced.

Must not know: leaves. The caller holds the folder's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zcproto.certs import files, keys, pair, profile
from zcproto.errors import CertificateError

T = TypeVar("T")

KEY_TYPE = "rsa-4096"
"""Key type of a server authority that issues for RSA keys. It signs a few times a year and is trusted for ten."""

KEY_TYPE_WITHOUT_RSA = "ecdsa-p384"
"""Key type of a server authority for ECDSA keys alone: stronger, and made in a millisecond instead of a second."""

Progress = Callable[[str], None]
"""Receives sentences about what is being done, before slow steps. They contain no secret."""


def key_type_for(key_types: Sequence[str]) -> str:
    """Return the key type of a new server authority that issues for keys of these types.

    Clients that support only RSA could not verify anything else.
    """
    return KEY_TYPE if "rsa" in map(keys.family, key_types) else KEY_TYPE_WITHOUT_RSA


@dataclass(frozen=True, slots=True)
class AuthorityKind:
    """What distinguishes the two authorities."""

    stem: str
    """Name of its files, without their suffix."""
    title: str
    """Start of its common name."""
    key_families: tuple[str, ...]
    created: str
    """What its certificate is for."""
    key_lost: str
    """What is impossible without its key, and how to recover."""
    use_another: str
    """How to use an authority that was not created here."""

    def paths(self, directory: Path) -> tuple[Path, Path]:
        """Return the paths of the certificate and the key."""
        return directory / f"{self.stem}.crt", directory / f"{self.stem}.key"

    def read_key(
        self, directory: Path, certificate: x509.Certificate | None
    ) -> tuple[keys.PrivateKey | None, str]:
        """Return the key that belongs to the certificate, or None and why nothing can be issued."""
        certificate_path, path = self.paths(directory)
        if not path.exists():
            return None, f"{path}: does not exist, so {self.key_lost}"
        try:
            key = pair.read_private_key(path)
        except files.DamagedFileError as error:
            return None, f"{error}; {self.key_lost}"
        problem = keys.weakness(key)
        if problem is None and keys.family(keys.key_type_of(key)) not in self.key_families:
            problem = f"the key is {keys.key_type_of(key)} instead of {' or '.join(self.key_families)}"
        if problem is None and certificate is not None and not keys.belongs(key, certificate.public_key()):
            problem = f"does not belong to {certificate_path}"
        return (key, "") if problem is None else (None, f"{path}: {problem}; {self.key_lost}")


SERVER: Final = AuthorityKind(
    stem="ca",
    title="zcproto own CA",
    key_families=("rsa", "ecdsa"),
    created="Clients verify the server with this file.",
    key_lost="no certificate can be issued; restore the key, or move ca.crt and the server's certificates away to"
    " create a new authority, which every client then has to trust",
    use_another='set certificates.mode = "files" to use certificates of another authority',
)

CLIENT: Final = AuthorityKind(
    stem="client-ca",
    title="zcproto client CA",
    key_families=("ecdsa",),
    created="The server verifies clients with this file.",
    key_lost="no client certificate can be issued or revoked; restore the key, or move all client-ca.* files away"
    " to create a new authority, from which every client then needs a new certificate",
    use_another="set tls.client_ca_file to accept the clients of another authority",
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names for which a server authority has to be able to issue."""

    configured: tuple[str, ...]
    """The authority is reissued if it does not permit them."""
    host: tuple[str, ...]
    """Not worth reissuing the authority."""

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.configured, *self.host)

    def missing_from(self, certificate: x509.Certificate) -> tuple[str, ...]:
        """Return the names that require this authority to be reissued."""
        if not any(profile.permits(certificate, name) for name in self.all):
            return self.all  # otherwise it could issue for no name at all
        return tuple(name for name in self.configured if not profile.permits(certificate, name))


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority as found in its folder."""

    certificate: x509.Certificate
    key: keys.PrivateKey | None
    problem: str = ""
    """Why there is no key and how to recover."""
    not_renewed: str = ""
    """Why its certificate could not be renewed although it was due."""

    def signing_key(self) -> keys.PrivateKey:
        """Return the key. Raises CertificateError if it is missing."""
        if self.key is None:
            raise CertificateError(self.problem)
        return self.key


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where a certificate and its key are or will be, and what was found there."""

    certificate_path: Path
    key_path: Path
    certificate: x509.Certificate | None
    key: keys.PrivateKey | None

    @property
    def is_matching(self) -> bool:
        """Whether the key belongs to the certificate."""
        return (
            self.certificate is not None
            and self.key is not None
            and keys.belongs(self.key, self.certificate.public_key())
        )


class AuthorityFolder:
    """The files of one authority in a folder."""

    def __init__(
        self,
        kind: AuthorityKind,
        directory: Path,
        now: datetime,
        progress: Progress,
        names: Names | None = None,
        *,
        changes: bool = True,
    ) -> None:
        """`names` are the names that a server authority has to permit; None permits all.

        Without `changes` nothing is written: what can be repaired is returned as repaired, or counts as missing.
        """
        self._kind = kind
        self._directory = directory
        self._certificate_path, self._key_path = kind.paths(directory)
        self._now = now
        self._progress = progress
        self._names = names
        self._changes = changes

    def load(self, leaf_lifetime: timedelta = timedelta(0)) -> Authority | None:
        """Return the authority, repaired, and renewed if a leaf of `leaf_lifetime` would outlive it; or None."""
        self._recover(self._certificate_path, self._key_path, pair.match)
        certificate = self._read_certificate()
        if certificate is None and not self._key_path.exists():
            return None
        if certificate is not None:
            self._check_created_here(certificate)
        key, problem = self._kind.read_key(self._directory, certificate)
        if certificate is None:
            if key is None:
                raise CertificateError(problem)
            return self._renew(key)
        if key is None:
            return Authority(certificate, None, problem)
        missing = () if self._names is None else self._names.missing_from(certificate)
        if missing:
            extended = self._renew(key)
            self._progress(
                f"ATTENTION: {self._certificate_path} was reissued because the old one is not valid for"
                f" {', '.join(missing)}. Clients that have the old file refuse this server from now on: give them"
                " the new one."
            )
            return extended
        if certificate.not_valid_before_utc <= self._now <= certificate.not_valid_after_utc - leaf_lifetime:
            return Authority(certificate, key)
        try:
            return self._renew(key)
        except CertificateError as error:
            if self._now > certificate.not_valid_after_utc:
                raise
            not_renewed = f"{self._certificate_path} could not be renewed: {error}. The old one is kept."
            self._progress(not_renewed)
            return Authority(certificate, key, not_renewed=not_renewed)

    def create(self, key: keys.PrivateKey) -> Authority:
        """Create the authority with this key."""
        certificate = self._issue(key, key)
        self._progress(f"Created the certificate authority {self._certificate_path}. {self._kind.created}")
        return Authority(certificate, key)

    def find_leaf(
        self, certificate_path: Path, key_path: Path, issuer: Authority | None, remedy: str
    ) -> Leaf:
        """Return a leaf and its key, after repairing what an interruption left. Set damaged files aside.

        Raises CertificateError with the `remedy` if `issuer` did not issue the leaf.
        """

        def is_issued_here(certificate: x509.Certificate) -> bool:
            return issuer is not None and pair.is_issued_by(certificate, issuer.certificate)

        def can_be_installed(certificate_pem: bytes, key_pem: bytes) -> bool:
            return pair.match(certificate_pem, key_pem) and is_issued_here(
                x509.load_pem_x509_certificate(certificate_pem)
            )

        certificate = self._read(certificate_path, pair.read_certificate)
        if certificate is not None and not is_issued_here(certificate):
            raise CertificateError(
                f"{certificate_path}: was not issued by {self._certificate_path} and is never replaced; {remedy}"
            )
        self._recover(certificate_path, key_path, can_be_installed)
        certificate = self._read(certificate_path, pair.read_certificate)
        return Leaf(certificate_path, key_path, certificate, self._read(key_path, pair.read_private_key))

    def _recover(
        self, certificate_path: Path, key_path: Path, matches: Callable[[bytes, bytes], bool]
    ) -> None:
        if self._changes:
            files.recover(certificate_path, key_path, matches)

    def _read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Return the content of the file. Return None if the file is missing or damaged; set the latter aside."""
        if not path.exists():
            return None
        try:
            return read(path)
        except files.DamagedFileError as error:
            if self._changes:
                self._progress(f"{error}. It was set aside as {files.set_aside(path)}.")
            return None

    def _read_certificate(self) -> x509.Certificate | None:
        if self._key_path.exists():
            return self._read(self._certificate_path, pair.read_certificate)  # it can be reissued
        return pair.read_certificate(self._certificate_path) if self._certificate_path.exists() else None

    def _check_created_here(self, certificate: x509.Certificate) -> None:
        try:
            name = profile.authority_name(certificate.public_key(), self._kind.title)
            created_here = certificate.subject == certificate.issuer == name
            profile.permitted_names(certificate)  # fails if the extensions cannot be parsed
        except pair.UNREADABLE:
            created_here = False
        if not created_here:
            raise CertificateError(
                f"{self._certificate_path}: was not created here and is never replaced; move it away with its key,"
                f" or {self._kind.use_another}"
            )

    def _renew(self, key: keys.PrivateKey) -> Authority:
        certificate = self._issue(key, None)
        self._progress(
            f"Renewed {self._certificate_path} with its key, until {certificate.not_valid_after_utc:%Y-%m-%d}."
        )
        return Authority(certificate, key)

    def _issue(self, key: keys.PrivateKey, new_key: keys.PrivateKey | None) -> x509.Certificate:
        certificate = profile.authority_certificate(key, self._kind.title, self._now)
        if self._changes:
            install(certificate, self._certificate_path, new_key, self._key_path)
        else:
            files.check_writable(self._certificate_path)
        return certificate


def install(
    certificate: x509.Certificate, path: Path, new_key: keys.PrivateKey | None, key_path: Path
) -> None:
    """Install a certificate, together with its key if that is new."""
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    files.install(path, pem, key_path, None if new_key is None else keys.key_pem(new_key))
