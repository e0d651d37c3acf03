"""Decides which user a client certificate names, and what identifies it in a revocation list.

Rules:
- The certificate names its user by exactly one SubjectAltName entry of the configured kind: `dns`, `email` or
  `uri`. Entries of other kinds are ignored. A certificate with no entry of the kind, or with two, names no user.
- Entries that RFC 5280 section 7 compares as equal name the same user:
  `dns`    a DNS name, in lower case; no wildcard, no address
  `email`  local@domain: the local part unchanged, the domain in lower case; no quoted local part
  `uri`    unchanged, and only in normal form: `scheme://host/path` or `urn:nid:nss`, scheme and host in lower case,
           no port, no percent sign, no empty or dot segment
- Names are printable ASCII of at most 128 characters, so each is valid in the users file.
- A certificate is identified by its issuer and its serial number (RFC 5280 section 4.1.2.2).

Must not know: the users file, who issued the certificate (TLS has verified it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final

from cryptography import x509

from zcproto.certs.pair import UNREADABLE
from zcproto.errors import CertificateError

CertificateId = tuple[bytes, int]
"""The DER of the issuer's name, and the serial number."""

MAX_USER: Final = 128
"""Longest user name in characters; the limit of the users file."""

MAX_CERTIFICATE_BYTES: Final = 1 << 16
"""A certificate has about a kilobyte; one near this limit is meant to exhaust the server."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_LAST_LABEL = rf"(?![0-9]+(?![a-z0-9-])|0x[0-9a-f]*(?![a-z0-9-])){_LABEL}"  # not the end of an IPv4 address
_HOST = rf"(?:{_LABEL}\.)*{_LAST_LABEL}"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_SEGMENT = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~!$&'()*+,;=:@-]+"
_DNS_NAME: Final = re.compile(_HOST)
_EMAIL: Final = re.compile(rf"(?P<local>{_ATOM}(?:\.{_ATOM})*)@(?P<domain>{_HOST})")
_URI: Final = re.compile(
    rf"[a-z][a-z0-9+.-]*://{_HOST}(?:/{_SEGMENT})*|urn:[a-z0-9][a-z0-9-]{{0,30}}[a-z0-9]:{_SEGMENT}(?:/{_SEGMENT})*"
)


def user_of(certificate_der: bytes, kind: str, now: datetime | None = None) -> str:
    """Return the user named by the one entry of `kind` in a certificate.

    TLS checks the dates when the client connects. With `now`, an aware time, expiry is checked again, because a
    connection can outlive the certificate.

    Raises CertificateError with the reason if it names no user. The message quotes nothing from the certificate,
    which comes from the peer.
    """
    entry_type, normal = _KINDS[kind]
    values, not_after = _read(certificate_der, entry_type)
    if now is not None and now > not_after:
        raise CertificateError(f"the client's certificate expired on {not_after:%Y-%m-%d %H:%M} UTC")
    if len(values) != 1:
        raise CertificateError(
            f"the client's certificate has {len(values)} SubjectAltName entries of kind {kind};"
            " exactly one must name the user"
        )
    user = normal(values[0]) if 0 < len(values[0]) <= MAX_USER else None
    if user is None:
        raise CertificateError(
            f"the SubjectAltName entry of kind {kind} in the client's certificate is not a valid user name"
        )
    return user


def certificate_id(certificate_der: bytes) -> CertificateId:
    """Return what identifies a certificate in a revocation list."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    return certificate.issuer.public_bytes(), certificate.serial_number


def revoked_in(lists: Iterable[x509.CertificateRevocationList]) -> frozenset[CertificateId]:
    return frozenset((crl.issuer.public_bytes(), entry.serial_number) for crl in lists for entry in crl)


def is_dns_user(name: str) -> bool:
    """Return True if a certificate can name this user by a DNS name: in normal form and not too long."""
    return len(name) <= MAX_USER and _DNS_NAME.fullmatch(name) is not None


def _read(certificate_der: bytes, entry_type: _EntryType) -> tuple[list[str], datetime]:
    """Return the entries of one kind, and when the certificate expires."""
    if len(certificate_der) > MAX_CERTIFICATE_BYTES:
        raise CertificateError(f"the client's certificate is larger than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        names = [
            entry
            for extension in certificate.extensions
            if isinstance(extension.value, x509.SubjectAlternativeName)
            for entry in extension.value
        ]
        values = [entry.value for entry in names if isinstance(entry, entry_type)]
        return values, certificate.not_valid_after_utc
    except UNREADABLE as error:
        raise CertificateError("the client's certificate cannot be parsed") from error


def _dns_user(value: str) -> str | None:
    # Check for ASCII before lowering the case: the Kelvin sign lowers to `k`.
    name = value.lower() if value.isascii() else ""
    return name if is_dns_user(name) else None


def _email_user(value: str) -> str | None:
    local, at, domain = value.rpartition("@")
    address = f"{local}{at}{domain.lower()}" if value.isascii() else ""
    return address if _EMAIL.fullmatch(address) else None


def _uri_user(value: str) -> str | None:
    return value if _URI.fullmatch(value) else None


_EntryType = type[x509.DNSName] | type[x509.RFC822Name] | type[x509.UniformResourceIdentifier]
_KINDS: Final[dict[str, tuple[_EntryType, Callable[[str], str | None]]]] = {
    "dns": (x509.DNSName, _dns_user),
    "email": (x509.RFC822Name, _email_user),
    "uri": (x509.UniformResourceIdentifier, _uri_user),
}
