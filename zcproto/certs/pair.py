"""Decides whether a certificate and a key may be served, and says what is in them.

Rules:
- The first certificate of the file is the leaf, those after it are its chain: each issued the one before it.
- Keys may be PKCS#8 or of the older forms, and encrypted if the passphrase is at hand.
- Refused are: what others than the owner can read or change, what is expired or not yet valid, a key that is
  not the certificate's, weak keys and signatures, a certificate for another purpose, a chain out of order,
  what is cut off or cannot be parsed.
- Each file is read once, so what was checked is one state of it. A file may change before TLS reads it again:
  `leaf_sha256` tells whether that was the same certificate.

Must not know: who made the certificate, when it should be renewed, where a passphrase comes from, TLS
contexts. A passphrase is in no message and in no repr.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
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
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError

MAX_PASSPHRASE_BYTES = 1024
"""What OpenSSL takes from a callback for a passphrase (PEM_BUFSIZE)."""

MAX_CHAIN = 10
"""Certificates in one file. Each costs a kilobyte in every handshake; public chains have two to four."""

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises when it meets an encoding, extension or algorithm that it cannot read."""

_MAX_ISSUER = 200
_PEM_BEGIN = b"-----BEGIN "
_PEM_END = b"-----END "
_STRONG_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_HASHLESS_SIGNATURES = (SignatureAlgorithmOID.ED25519, SignatureAlgorithmOID.ED448)
_SERVER_PURPOSES = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})


@dataclass(frozen=True, slots=True)
class CertificatePair:
    """A certificate and its key, checked at the time they were loaded."""

    certificate: Path
    """PEM: the leaf, then its chain. Certificates made here never bring the root: clients have it."""
    key: Path
    """PEM, its owner's alone."""
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
    """The pin of the leaf's public key, as `spki_pin` gives it."""
    issuer: str
    """Who issued the leaf, as RFC 4514 writes names, at most 200 characters."""
    serial: str
    """The leaf's serial number in hexadecimal."""
    chain_length: int
    """How many certificates are in the file, with the leaf."""
    passphrase: bytes | None = field(default=None, repr=False)
    """What decrypts the key; None if it is not encrypted."""


def load_pair(
    certificate: Path, key: Path, now: datetime, passphrase: bytes | None = None
) -> CertificatePair:
    """The pair in these two files (which may be one), fit to be served at `now`, an aware time.

    `passphrase` is for a key that is encrypted; another one is taken without it. Raises CertificateError,
    which names the file, what is wrong and what to do.
    """
    one_file = certificate == key  # then certificate and key are of one state of it
    certificate_data = files.read_key_file(key) if one_file else files.read_certificate_file(certificate)
    chain = _parse_certificates(certificate_data, certificate)
    key_data = certificate_data if one_file else files.read_key_file(key)
    private_key, used_passphrase = _decrypt_key(key_data, key, passphrase)
    leaf = chain[0]
    try:
        _check_strength(chain, certificate)
        if not belongs(private_key, leaf.public_key()):
            raise CertificateError(_mismatch(chain, certificate, private_key, key))
        _check_purpose(leaf, certificate)
        _check_order(chain, certificate)
        names = names_of(leaf)
        issuer = escape_text(leaf.issuer.rfc4514_string(), _MAX_ISSUER)
    except UNREADABLE as error:
        raise DamagedFileError(
            f"{certificate}: holds a certificate that cannot be read; get it anew"
        ) from error
    _check_validity(leaf, certificate, now)
    der = leaf.public_bytes(serialization.Encoding.DER)
    return CertificatePair(
        certificate=certificate,
        key=key,
        key_type=key_type_of(private_key),
        names=names,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        leaf_sha256=hashlib.sha256(der).digest(),
        pin=spki_pin(der),
        issuer=issuer,
        serial=f"{leaf.serial_number:X}",
        chain_length=len(chain),
        passphrase=used_passphrase,
    )


def spki_pin(certificate_der: bytes) -> str:
    """`sha256/` and the Base64 of the SHA-256 of the certificate's SubjectPublicKeyInfo (RFC 7469 2.4).

    Raises CertificateError if these bytes are no certificate.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
    except UNREADABLE as error:
        raise CertificateError("these bytes are no certificate in DER form") from error
    digest = hashlib.sha256(_subject_public_key_info(certificate.tbs_certificate_bytes)).digest()
    return "sha256/" + base64.b64encode(digest).decode("ascii")


def _subject_public_key_info(tbs_certificate: bytes) -> bytes:
    """The SubjectPublicKeyInfo exactly as it was signed.

    A key that was read and written again could come out with other bytes, and its pin would not be that of
    other programs. The certificate has been parsed, so its DER lengths are sound.
    """
    position, _ = _header(tbs_certificate, 0)
    if tbs_certificate[position] == 0xA0:  # [0] version, absent from version 1 (RFC 5280 section 4.1)
        position = _end(tbs_certificate, position)
    for _field in ("serialNumber", "signature", "issuer", "validity", "subject"):
        position = _end(tbs_certificate, position)
    return tbs_certificate[position : _end(tbs_certificate, position)]


def _header(der: bytes, position: int) -> tuple[int, int]:
    """Where the content of the DER value at `position` begins, and its length (X.690 section 8.1.3)."""
    first = der[position + 1]
    if first < 0x80:
        return position + 2, first
    start = position + 2 + (first & 0x7F)
    return start, int.from_bytes(der[position + 2 : start], "big")


def _end(der: bytes, position: int) -> int:
    start, length = _header(der, position)
    return start + length


# --- parts, which the making of certificates uses too ----------------------------------------------------


def read_certificates(path: Path, at_most: int = MAX_CHAIN) -> list[x509.Certificate]:
    """The certificates in a PEM file, at least one. Raises DamagedFileError if there is none."""
    return _parse_certificates(files.read_certificate_file(path), path, at_most)


def read_private_key(path: Path) -> PrivateKey:
    """The key in a PEM file, of whatever strength. Raises DamagedFileError if there is none."""
    key, _ = _decrypt_key(files.read_key_file(path), path, None)
    return key


def parse_key(data: bytes, passphrase: bytes | None = None) -> object:
    # OpenSSL's check of an RSA key takes 250 ms at 4096 bits; `belongs` shows more, and in 2 ms.
    return serialization.load_pem_private_key(data, passphrase, unsafe_skip_rsa_key_validation=True)


def match(certificate_pem: bytes, key_pem: bytes) -> bool:
    """Whether these bytes are a certificate and its key."""
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
        key = parse_key(key_pem)
        public_key = certificate.public_key()
    except UNREADABLE:
        return False
    return isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) and belongs(key, public_key)


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and addresses in the SubjectAltName, as text, in its order."""
    try:
        entries = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(entry.value) for entry in entries if isinstance(entry, x509.DNSName | x509.IPAddress))


def utc(now: datetime) -> datetime:
    """`now` in UTC. A time without a zone is a mistake of the caller."""
    if now.tzinfo is None:
        raise ValueError("`now` must be an aware datetime")
    return now.astimezone(UTC)


def _parse_certificates(data: bytes, path: Path, at_most: int = MAX_CHAIN) -> list[x509.Certificate]:
    if _is_cut_off(data):
        # What is left would be read as a shorter chain without a word.
        raise DamagedFileError(f"{path}: is cut off in the middle of a PEM block; get it anew")
    try:
        chain = x509.load_pem_x509_certificates(data)
    except UNREADABLE as error:
        raise DamagedFileError(f"{path}: holds no PEM certificate that can be read; get it anew") from error
    if len(chain) > at_most:
        raise CertificateError(
            f"{path}: holds {len(chain)} certificates; leave those that are needed, {at_most} at most"
        )
    return chain


def _is_cut_off(data: bytes) -> bool:
    """Whether a PEM block begins and does not end, as in a file that is being written."""
    if data.count(_PEM_BEGIN) != data.count(_PEM_END):
        return True
    _, end, rest = data.rpartition(_PEM_END)
    _, dashes, rest = rest.partition(b"-----")  # after the label of the last block
    return bool(end) and (not dashes or rest.lstrip().startswith(b"-"))


def _decrypt_key(data: bytes, path: Path, passphrase: bytes | None) -> tuple[PrivateKey, bytes | None]:
    """The key in the bytes of a file, and the passphrase if it took that."""
    if passphrase is not None and not 1 <= len(passphrase) <= MAX_PASSPHRASE_BYTES:
        raise CertificateError(f"{path}: its passphrase must have 1 to {MAX_PASSPHRASE_BYTES} bytes")
    used: bytes | None = None
    try:
        try:
            key = parse_key(data)
        except TypeError as error:  # what cryptography raises for a key that is encrypted
            key, used = _parse_encrypted_key(data, path, passphrase, error), passphrase
    except UNREADABLE as error:
        raise DamagedFileError(f"{path}: holds no PEM key that can be read; restore it") from error
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
            f" the key anew with `openssl pkey -in {quoted} -aes256 -out NEW_FILE` if this takes it"
        ) from refused


def _check_order(chain: list[x509.Certificate], path: Path) -> None:
    """Each certificate is issued by the next (RFC 8446 section 4.4.2); some clients take no other order."""
    # All names are read here, as whoever shows a certificate later reads them: one may not be readable.
    names = [(_comparable(each.subject), _comparable(each.issuer)) for each in chain]
    for position, (issued, issuer) in enumerate(pairwise(chain), 1):
        if names[position - 1][1] != names[position][0]:
            raise CertificateError(
                f"{path}: certificate {position + 1} is not the issuer of certificate {position};"
                " put the server's first, after each the one that issued it, and no other"
            )
        try:
            issued.verify_directly_issued_by(issuer)
        except InvalidSignature as error:
            raise CertificateError(
                f"{path}: certificate {position + 1} has the name of the issuer of certificate {position}"
                " but did not sign it; get the chain anew"
            ) from error
        except UNREADABLE:
            continue  # the names are one in another encoding, or a signature that only others know


def _comparable(name: x509.Name) -> list[frozenset[tuple[str, str | bytes]]]:
    """A name as RFC 5280 section 7.1 compares it: without regard to case, repeated spaces and encoding."""
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


def _check_strength(chain: list[x509.Certificate], path: Path) -> None:
    for position, certificate in enumerate(chain):
        what = "the certificate" if position == 0 else f"certificate {position + 1} of the chain"
        weak = weakness(certificate.public_key())
        if weak is not None:
            raise CertificateError(f"{path}: {what} is too weak: {weak}; get a new one")
        if position > 0 and certificate.subject == certificate.issuer:
            continue  # a root; nobody relies on its signature, those who trust it have it
        weak = _weak_signature(certificate)
        if weak is not None:
            raise CertificateError(
                f"{path}: {what} is signed with {weak}, which is not safe; get one signed with SHA-256"
            )


def _weak_signature(certificate: x509.Certificate) -> str | None:
    """The algorithm of the signature if it is not one of the strong ones."""
    oid = certificate.signature_algorithm_oid
    if oid in _HASHLESS_SIGNATURES:
        return None
    try:
        algorithm = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return oid.dotted_string
    return None if isinstance(algorithm, _STRONG_HASHES) else getattr(algorithm, "name", oid.dotted_string)


def _check_purpose(leaf: x509.Certificate, path: Path) -> None:
    """Every client refuses a certificate whose extensions say that it is not for a TLS 1.3 server."""
    for extension in leaf.extensions:
        value = extension.value
        if isinstance(value, x509.KeyUsage) and not value.digital_signature:
            raise CertificateError(f"{path}: its key usage lacks digitalSignature; get one for a TLS server")
        if isinstance(value, x509.ExtendedKeyUsage) and _SERVER_PURPOSES.isdisjoint(value):
            raise CertificateError(
                f"{path}: its extended key usage lacks serverAuth; get one for a TLS server"
            )


def _check_validity(leaf: x509.Certificate, path: Path, now: datetime) -> None:
    moment = utc(now)
    if moment > leaf.not_valid_after_utc:
        raise CertificateError(
            f"{path}: expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; get a new certificate"
        )
    if moment < leaf.not_valid_before_utc:
        raise CertificateError(
            f"{path}: is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC;"
            " wait until then, or set this machine's clock right"
        )


def _mismatch(chain: list[x509.Certificate], path: Path, key: PrivateKey, key_path: Path) -> str:
    if any(belongs(key, other.public_key()) for other in chain[1:]):
        return f"{path}: the server's certificate is not the first one in the file; put it first"
    return f"{key_path}: is not the key of {path}; configure the two that belong together"
