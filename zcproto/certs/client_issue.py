"""Decides what is in the certificates for clients, in their authority's and in its list of revoked ones.

Rules (RFC 5280 sections 4 and 5): certificates of version 3, lists of version 2, SHA-256, random serial
numbers. Valid from an hour ago, as the clocks of a client and of the server that checks it may differ. The
authority is of its own, apart from the server's: a server's certificate that leaks is no client, and this
key, which is used often, can make no server. It is ECDSA P-256: only servers of this kind verify what it
signs, a device signs with such a key in a millisecond, and the certificate, which travels in each handshake,
takes half the bytes of one with RSA.

Must not know: files, when to issue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zcproto.certs.client_list import UNSPECIFIED, Issued
from zcproto.certs.issue import AUTHORITY_LIFETIME, CLOCK_SKEW
from zcproto.certs.keys import PrivateKey

MAX_CLIENT_LIFETIME = timedelta(days=1826)
"""Five years: half of the authority's own, so that it is renewed in time."""

CRL_LIFETIME = timedelta(days=365)
"""A server past this end takes no client at all, and nobody waits for the list but servers that have it
already: so it is far away, for a folder that was not writable for months, or a copy on another machine."""

_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name


def client_authority_name(public_key: CertificatePublicKeyTypes) -> x509.Name:
    """The subject of the authority with this key: the same key always has the same."""
    info = public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return _name(f"zcproto client CA {hashlib.sha256(info).hexdigest()[:16]}")


def client_authority_certificate(key: PrivateKey, now: datetime) -> x509.Certificate:
    """A root certificate that may issue leaves and lists of revoked ones."""
    public_key = key.public_key()
    name = client_authority_name(public_key)
    start = now.replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(start + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(key, hashes.SHA256())
    )


def client_certificate(
    public_key: CertificatePublicKeyTypes,
    name: str,
    authority: x509.Certificate,
    authority_key: PrivateKey,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """A certificate that names the user `name`, and can be nothing but a client's.

    It ends `lifetime` after `now`, or with the authority if that is earlier.
    """
    start = now.replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name if len(name) <= _MAX_COMMON_NAME else "zcproto client"))
        .issuer_name(authority.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(min(start + lifetime, authority.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority_key(authority_key), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def revocation_list(
    revoked: Iterable[Issued], number: int, authority: x509.Certificate, key: PrivateKey, now: datetime
) -> x509.CertificateRevocationList:
    """The signed list of these certificates. Each list has a higher `number` than those before it."""
    start = now.replace(microsecond=0)
    builder = x509.CertificateRevocationListBuilder(
        authority.subject,
        start - CLOCK_SKEW,
        start + CRL_LIFETIME,
        # All at once: the builder copies its list for each one that is added.
        revoked_certificates=[_entry(issued) for issued in revoked],
    )
    return (
        builder.add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(key), critical=False)
        .sign(key, hashes.SHA256())
    )


def _entry(issued: Issued) -> x509.RevokedCertificate:
    assert issued.revoked_at is not None
    builder = (
        x509.RevokedCertificateBuilder()
        .serial_number(issued.serial_number)
        .revocation_date(issued.revoked_at)
    )
    if issued.reason != UNSPECIFIED:  # which RFC 5280 section 5.3.1 says by leaving it out
        builder = builder.add_extension(x509.CRLReason(x509.ReasonFlags(issued.reason)), critical=False)
    return builder.build()


def _authority_key(key: PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
