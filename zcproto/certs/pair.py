"""Decides whether a certificate and a key can be served, and describes what is in them.

Rules:
- The first certificate of the file is the leaf. Those after it are its chain: each issued the one before it.
- Keys may be PKCS#8 or of the older forms, and encrypted if the passphrase is configured.
- Refused are: files that others can read or change, expired and not yet valid certificates, a key that does not
  belong to the certificate, weak keys and signatures, a certificate for another purpose, a chain out of order,
  truncated and unparsable files.
- Each file is read once, so all checks apply to one state of it. A file may change before TLS reads it again:
  `leaf_sha256` shows whether it was the same certificate.

Must not know: who issued the certificate, when to renew it, where a passphrase comes from, TLS contexts. No message
and no repr contains a passphrase.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, SignatureAlgorithmOID

from zcproto.certs import files
from zcproto.certs.files import DamagedFileError
from zcproto.certs.keys import PrivateKey, belongs, key_type_of, weakness
from zcproto.errors import CertificateError
from zcproto.tls.pins import key_pin

MAX_CHAIN = 10
"""Certificates in one file. Each adds a kilobyte to every handshake; public chains have two to four."""

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises for an encoding, extension or algorithm that it cannot parse."""

_PEM_BEGIN = b"-----BEGIN "
_PEM_END = b"-----END "
_CRL_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)
_STRONG_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_HASHLESS_SIGNATURES = (SignatureAlgorithmOID.ED25519, SignatureAlgorithmOID.ED448)
_SERVER_PURPOSES = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A certificate and its key, checked at the time they were loaded."""

    certificate: Path
    """PEM: the leaf, then its chain. Managed certificates never include the root, which clients have."""
    key: Path
    """PEM, readable only by its owner."""
    key_type: str
    """`rsa-BITS`, `ecdsa-p256`, `ecdsa-p384` or `ecdsa-p521`."""
    names: tuple[str, ...]
    """The DNS names and addresses of the SubjectAltName."""
    not_before: datetime
    not_after: datetime
    """Both aware, in UTC."""
    leaf_sha256: bytes
    """SHA-256 of the leaf's DER."""
    pin: str
    """The pin of the leaf's public key (`tls.pins.key_pin`)."""
    passphrase: bytes | None = field(default=None, repr=False)
    """Decrypts the key; None if it is not encrypted."""


@dataclass(frozen=True, slots=True)
class Site:
    """What is served for some names."""

    names: tuple[str, ...]
    """Exact (`a.example`) or wildcard (`*.example`), in lower case; empty for the default site."""
    pairs: tuple[CertificatePair, ...]
    """At least one, and at most one of each key family."""


def load_pair(
    certificate: Path, key: Path, now: datetime, passphrase: bytes | None = None
) -> CertificatePair:
    """Return the pair in these two files (or one), valid to be served at `now`, an aware time.

    `passphrase` decrypts the key if it is encrypted. Raises CertificateError with file, problem and remedy.
    """
    moment = utc(now)
    one_file = certificate == key  # then both are parsed from the same bytes
    certificate_data = files.read_key_file(key) if one_file else files.read_certificate_file(certificate)
    chain = parse_certificates(certificate_data, certificate)
    key_data = certificate_data if one_file else files.read_key_file(key)
    private_key, used_passphrase = decrypt_key(key_data, key, passphrase)
    leaf = chain[0]
    with parsing(certificate):
        for check in checks(chain, certificate, moment, private_key, key):
            check()
        names = names_of(leaf)
    return CertificatePair(
        certificate=certificate,
        key=key,
        key_type=key_type_of(private_key),
        names=names,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        leaf_sha256=leaf.fingerprint(hashes.SHA256()),
        pin=key_pin(leaf.public_key()),
        passphrase=used_passphrase,
    )


def checks(
    chain: Sequence[x509.Certificate],
    path: Path,
    now: datetime,
    key: PrivateKey | None = None,
    key_path: Path | None = None,
) -> Iterator[Callable[[], None]]:
    """Yield the checks that a pair has to pass. Each raises CertificateError, or one of UNREADABLE, if it fails."""
    leaf = chain[0]
    yield lambda: _check_strength(chain, path)
    if key is not None and key_path is not None:
        yield lambda: _check_key(chain, path, key, key_path)
    yield lambda: _check_purpose(leaf, path)
    yield lambda: _check_order(chain, path)
    yield lambda: _check_validity(leaf, path, now)


# --- parsing -----------------------------------------------------------------------------------------------


@contextmanager
def parsing(path: Path, what: str = "certificate") -> Iterator[None]:
    """Raise DamagedFileError if a certificate or list in this file turns out to be unreadable."""
    try:
        yield
    except UNREADABLE as error:
        raise DamagedFileError(
            f"{path}: contains a {what} that cannot be parsed; replace the file"
        ) from error


def read_certificates(path: Path, at_most: int = MAX_CHAIN) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, at least one. Raises DamagedFileError if it has none."""
    return parse_certificates(files.read_certificate_file(path), path, at_most)


def read_certificate(path: Path) -> x509.Certificate:
    """Return the first certificate in a PEM file. Raises DamagedFileError if it has none."""
    return read_certificates(path)[0]


def read_lists(path: Path) -> list[x509.CertificateRevocationList]:
    """Return the revocation lists in a PEM file, at least one. Their signatures are checked by OpenSSL."""
    blocks = _CRL_BLOCK.findall(files.read_certificate_file(path))
    if not blocks:
        raise CertificateError(f"{path}: contains no revocation list in PEM; replace the file")
    with parsing(path, "revocation list"):
        return list(map(x509.load_pem_x509_crl, blocks))


def read_private_key(path: Path) -> PrivateKey:
    """Return the key in a PEM file, of any strength. Raises DamagedFileError if it has none."""
    key, _ = decrypt_key(files.read_key_file(path), path, None)
    return key


def parse_key(data: bytes, passphrase: bytes | None = None) -> object:
    # OpenSSL's check of an RSA key takes 250 ms at 4096 bits; `belongs` detects more, in 2 ms.
    return serialization.load_pem_private_key(data, passphrase, unsafe_skip_rsa_key_validation=True)


def match(certificate_pem: bytes, key_pem: bytes) -> bool:
    """Return True if these bytes are a certificate and its key."""
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
        key = parse_key(key_pem)
        public_key = certificate.public_key()
    except UNREADABLE:
        return False
    return belongs(key, public_key)


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Return True if `issuer` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names and addresses in the SubjectAltName, as text, in their order."""
    try:
        entries = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(entry.value) for entry in entries if isinstance(entry, x509.DNSName | x509.IPAddress))


def utc(now: datetime) -> datetime:
    """Return `now` in UTC. Raises ValueError for a naive time."""
    if now.tzinfo is None:
        raise ValueError("`now` must be an aware datetime")
    return now.astimezone(UTC)


def parse_certificates(data: bytes, path: Path, at_most: int = MAX_CHAIN) -> list[x509.Certificate]:
    if _is_cut_off(data):
        # The rest would silently be accepted as a shorter chain.
        raise DamagedFileError(f"{path}: is truncated in the middle of a PEM block; replace the file")
    try:
        chain = x509.load_pem_x509_certificates(data)
    except UNREADABLE as error:
        raise DamagedFileError(
            f"{path}: contains no PEM certificate that can be parsed; replace the file"
        ) from error
    if len(chain) > at_most:
        raise CertificateError(
            f"{path}: contains {len(chain)} certificates; keep only those that are needed, at most {at_most}"
        )
    return chain


def _is_cut_off(data: bytes) -> bool:
    """Return True if a PEM block begins and does not end, as in a file that is being written."""
    if data.count(_PEM_BEGIN) != data.count(_PEM_END):
        return True
    _, end, rest = data.rpartition(_PEM_END)
    _, dashes, rest = rest.partition(b"-----")  # after the label of the last block
    return bool(end) and (not dashes or rest.lstrip().startswith(b"-"))


def decrypt_key(data: bytes, path: Path, passphrase: bytes | None) -> tuple[PrivateKey, bytes | None]:
    """Return the key in a file's bytes, and the passphrase if it was needed."""
    used: bytes | None = None
    try:
        try:
            key = parse_key(data)
        except TypeError as error:  # what cryptography raises for an encrypted key
            key, used = _parse_encrypted_key(data, path, passphrase, error), passphrase
    except UNREADABLE as error:
        raise DamagedFileError(f"{path}: contains no PEM key that can be parsed; restore the file") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: {weakness(key)}")
    return key, used


def _parse_encrypted_key(data: bytes, path: Path, passphrase: bytes | None, error: TypeError) -> object:
    quoted = shlex.quote(str(path))
    if passphrase is None:
        raise CertificateError(
            f"{path}: the key is encrypted and no passphrase is configured; set key_passphrase_file or"
            f" key_passphrase_variable, or decrypt it with `openssl pkey -in {quoted} -out NEW_FILE`"
        ) from error
    try:
        return parse_key(data, passphrase)
    except UNREADABLE as refused:
        raise CertificateError(
            f"{path}: the configured passphrase does not decrypt the key; configure the right one, or encrypt"
            f" the key again with `openssl pkey -in {quoted} -aes256 -out NEW_FILE`"
        ) from refused


# --- checks ------------------------------------------------------------------------------------------------


def _check_order(chain: Sequence[x509.Certificate], path: Path) -> None:
    """Check the order that some clients require: the next one issued each (RFC 8446 section 4.4.2)."""
    # Parse all names here, because they are displayed later and one may not be readable.
    names = [(_comparable(each.subject), _comparable(each.issuer)) for each in chain]
    for position, (issued, issuer) in enumerate(pairwise(chain), 1):
        if names[position - 1][1] != names[position][0]:
            raise CertificateError(
                f"{path}: certificate {position + 1} is not the issuer of certificate {position};"
                " put the server's certificate first, and after each certificate only its issuer"
            )
        try:
            issued.verify_directly_issued_by(issuer)
        except InvalidSignature as error:
            raise CertificateError(
                f"{path}: certificate {position + 1} has the name of the issuer of certificate {position}"
                " but did not sign it; replace the chain"
            ) from error
        except UNREADABLE:
            continue  # an encoding or signature algorithm that only clients support


def _comparable(name: x509.Name) -> list[frozenset[tuple[str, str | bytes]]]:
    """Return a name for comparison by RFC 5280 section 7.1: case, repeated spaces and encoding do not matter."""
    return [
        frozenset(
            (
                attribute.oid.dotted_string,
                " ".join(attribute.value.casefold().split())
                if isinstance(attribute.value, str)
                else attribute.value,
            )
            for attribute in part
        )
        for part in name.rdns
    ]


def _check_strength(chain: Sequence[x509.Certificate], path: Path) -> None:
    for position, certificate in enumerate(chain):
        what = "the certificate" if position == 0 else f"certificate {position + 1} of the chain"
        weak = weakness(certificate.public_key())
        if weak is not None:
            raise CertificateError(f"{path}: {what} is too weak: {weak}; use a stronger one")
        if position > 0 and certificate.subject == certificate.issuer:
            continue  # a root is trusted for being known, not for its signature
        weak = _weak_signature(certificate)
        if weak is not None:
            raise CertificateError(
                f"{path}: {what} is signed with {weak}, which is insecure; use one signed with SHA-256"
            )


def _weak_signature(certificate: x509.Certificate) -> str | None:
    """Return the signature algorithm if it is not one of the strong ones."""
    oid = certificate.signature_algorithm_oid
    if oid in _HASHLESS_SIGNATURES:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return oid.dotted_string
    return None if isinstance(algorithm, _STRONG_HASHES) else getattr(algorithm, "name", oid.dotted_string)


def _check_purpose(leaf: x509.Certificate, path: Path) -> None:
    """Check that the extensions allow use by a TLS 1.3 server: clients refuse others."""
    for extension in leaf.extensions:
        value = extension.value
        if isinstance(value, x509.KeyUsage) and not value.digital_signature:
            raise CertificateError(
                f"{path}: its key usage lacks digitalSignature; use a certificate for a TLS server"
            )
        if isinstance(value, x509.ExtendedKeyUsage) and _SERVER_PURPOSES.isdisjoint(value):
            raise CertificateError(
                f"{path}: its extended key usage lacks serverAuth; use a certificate for a TLS server"
            )


def _check_validity(leaf: x509.Certificate, path: Path, now: datetime) -> None:
    if now > leaf.not_valid_after_utc:
        raise CertificateError(
            f"{path}: expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; replace the certificate"
        )
    if now < leaf.not_valid_before_utc:
        raise CertificateError(
            f"{path}: is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC;"
            " wait until then, or correct this machine's clock"
        )


def _check_key(chain: Sequence[x509.Certificate], path: Path, key: PrivateKey, key_path: Path) -> None:
    if belongs(key, chain[0].public_key()):
        return
    if any(belongs(key, other.public_key()) for other in chain[1:]):
        raise CertificateError(
            f"{path}: the server's certificate is not the first one in the file; put it first"
        )
    raise CertificateError(f"{key_path}: does not belong to {path}; configure a matching certificate and key")
