"""Decides what is in the certificates made here: the X.509 profile (RFC 5280 section 4).

Rules: version 3, SHA-256, random serial numbers of 159 bits. Valid from an hour ago, for clients whose
clock is behind. The authority is RSA: clients that know RSA only could not verify anything else. Its name
is made from its public key, so that two authorities never share one, and the same key always gives the
same one: a new certificate for the authority's key takes the old one's place without clients noticing.

An authority may issue for the names only that were known when it was made, and for any address (RFC 5280
section 4.2.1.10): whoever steals its key cannot pretend to be others to the clients that trust it. Addresses
come and go, and nobody types them; they stay free.

Must not know: files, when to issue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from ipaddress import ip_address, ip_network

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zcproto.certs.keys import PrivateKey
from zcproto.certs.names import general_names

AUTHORITY_LIFETIME = timedelta(days=3652)
"""Ten years: trust in the authority is set up by hand on every client."""

MAX_LIFETIME = timedelta(days=397)
"""The longest that strict clients take for a server (Apple's rule; the CA/B Forum has since gone lower)."""

CLOCK_SKEW = timedelta(hours=1)

MAX_PERMITTED = 200
"""Names in the constraints of an authority: twice as many as a certificate holds."""

_ANY_ADDRESS = tuple(x509.IPAddress(ip_network(network)) for network in ("0.0.0.0/0", "::/0"))
_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name
_NO_USAGE = {
    "digital_signature": False,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


def authority_name(public_key: CertificatePublicKeyTypes) -> x509.Name:
    """The subject of the authority with this key."""
    info = public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return _name(f"zcproto own CA {hashlib.sha256(info).hexdigest()[:16]}")


def authority_certificate(
    key: rsa.RSAPrivateKey, now: datetime, permitted: Sequence[str] | None = None
) -> x509.Certificate:
    """A root certificate that may issue leaves only, and for the DNS names in and below `permitted` only.

    Without `permitted` it may issue for any name.
    """
    public_key = key.public_key()
    name = authority_name(public_key)
    start = now.replace(microsecond=0)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "key_cert_sign": True, "crl_sign": True}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
    if permitted is not None:
        constraints = x509.NameConstraints([*map(x509.DNSName, permitted), *_ANY_ADDRESS], None)
        builder = builder.add_extension(constraints, critical=True)
    return builder.sign(key, hashes.SHA256())


def permitted_for(names: Sequence[str]) -> tuple[str, ...]:
    """The DNS names that an authority must permit so that it can issue for `names`, each once."""
    bases = (name.removeprefix("*.") for name in names if not _is_address(name))
    return tuple(dict.fromkeys(("localhost", *bases)))[:MAX_PERMITTED]


@lru_cache(maxsize=8)
def permitted_names(authority: x509.Certificate) -> tuple[str, ...] | None:
    """The DNS names in and below which this authority may issue; None if it may for all."""
    try:
        constraints = authority.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None
    subtrees = constraints.permitted_subtrees or ()
    return tuple(one.value for one in subtrees if isinstance(one, x509.DNSName)) or None


def permits(authority: x509.Certificate, name: str) -> bool:
    """Whether this authority may issue for this (checked) name."""
    permitted = permitted_names(authority)
    if permitted is None or _is_address(name):
        return True
    base = name.removeprefix("*.")  # all that a wildcard stands for is below it
    return any(base == subtree or base.endswith("." + subtree) for subtree in permitted)


def leaf_certificate(
    key: PrivateKey,
    names: Sequence[str],
    authority: x509.Certificate,
    authority_key: rsa.RSAPrivateKey,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """A server's certificate for `key` with these (checked) names, which ends `lifetime` after `now`.

    It never outlives the authority, and is never valid for more than MAX_LIFETIME.
    """
    public_key = key.public_key()
    start = now.replace(microsecond=0)
    not_before = start - CLOCK_SKEW
    not_after = min(start + lifetime, not_before + MAX_LIFETIME, authority.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(_leaf_name(names))
        .issuer_name(authority.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectAlternativeName(general_names(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # In TLS 1.3 keys only sign, RSA ones too (RFC 8446 section 4.4.2.2).
        .add_extension(x509.KeyUsage(**{**_NO_USAGE, "digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )


@lru_cache(maxsize=256)
def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _leaf_name(names: Sequence[str]) -> x509.Name:
    if all(map(_is_address, names)):
        # Without a DNS name in the SubjectAltName, OpenSSL and GnuTLS take the common name for one, and an
        # address there would break the constraints of the authority.
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "zcproto")])
    return _name(next((name for name in names if len(name) <= _MAX_COMMON_NAME), "zcproto"))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
