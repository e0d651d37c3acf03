"""Decides what is in the certificates and revocation lists issued here: the X.509 profile (RFC 5280).

Rules: certificates of version 3, lists of version 2, the hash that belongs to the key (RFC 8446 section 4.2.3),
random serial numbers of 159 bits. Validity starts an hour ago, because the peer's clock may be behind.

Server authority: RSA if it issues for RSA keys, because clients that support only RSA could not verify anything
else; otherwise ECDSA P-384. It has no name constraints (RFC 5280 section 4.2.1.10), because many verifiers cannot
read them: Mbed TLS refuses the critical extension, BoringSSL refuses constraints on addresses, and wolfSSL applies
constraints on DNS names to addresses. Authorities of earlier versions have them; `permits` respects them, and
clients keep trusting such an authority.

Client authority: ECDSA P-256, because only this server verifies what it signs, a device signs with such a key in a
millisecond, and a certificate, sent in each handshake, takes half the bytes of an RSA one. It is separate from the
server authority: a leaked server certificate cannot authenticate a client, and this key, which is used often,
cannot issue for a server.

The subject of an authority is derived from its public key. Two authorities never share a name, and a new
certificate for the same key replaces the old one without clients noticing.

Must not know: files, when to issue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, ObjectIdentifier

from zcproto.certs.issued import UNSPECIFIED, Issued
from zcproto.certs.keys import PrivateKey
from zcproto.certs.lifecycle import CLOCK_SKEW
from zcproto.certs.names import general_names, is_address

AUTHORITY_LIFETIME = timedelta(days=3652)
"""Ten years, because every client's trust in the authority is set up by hand."""

MAX_SERVER_LIFETIME = timedelta(days=397)
"""The longest that strict clients accept for a server (Apple's rule; the CA/B Forum has since lowered it)."""

MAX_CLIENT_LIFETIME = timedelta(days=1826)
"""Five years: half of the authority's lifetime, so that the authority is renewed in time."""

CRL_LIFETIME = timedelta(days=365)
"""A server refuses every client once the list has expired. Only servers that already have the list use it, so it
may live long enough for a folder that was not writable for months, or for a copy on another machine."""

_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name


# --- authorities -------------------------------------------------------------------------------------------


def authority_name(public_key: CertificatePublicKeyTypes, title: str) -> x509.Name:
    """Return the subject of the authority with this key."""
    info = public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return _common_name(f"{title} {hashlib.sha256(info).hexdigest()[:16]}")


def authority_certificate(key: PrivateKey, title: str, now: datetime) -> x509.Certificate:
    """Issue a root certificate that can sign only leaves and revocation lists."""
    public_key = key.public_key()
    name, start = authority_name(public_key, title), now.replace(microsecond=0)
    return (
        _builder(name, name, public_key, start, start + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(key, _hash_of(key))
    )


def has_constraints(authority: x509.Certificate) -> bool:
    """Return True if this authority has name constraints, which some verifiers cannot read."""
    return any(extension.oid == ExtensionOID.NAME_CONSTRAINTS for extension in authority.extensions)


@lru_cache(maxsize=8)
def permitted_names(authority: x509.Certificate) -> tuple[str, ...] | None:
    """Return the DNS names for which, and below which, this authority can issue; None if all are permitted."""
    try:
        constraints = authority.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None
    subtrees = constraints.permitted_subtrees or ()
    return tuple(one.value for one in subtrees if isinstance(one, x509.DNSName)) or None


def permits(authority: x509.Certificate, name: str) -> bool:
    """Return True if this authority can issue for a checked name."""
    permitted = permitted_names(authority)
    if permitted is None or is_address(name):
        return True
    base = name.removeprefix("*.")  # all names that a wildcard covers are below it
    return any(base == subtree or base.endswith("." + subtree) for subtree in permitted)


# --- leaves ------------------------------------------------------------------------------------------------


def server_certificate(
    key: PrivateKey,
    names: Sequence[str],
    authority: x509.Certificate,
    authority_key: PrivateKey,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """Issue a server certificate for checked names. It ends after `lifetime`, or earlier with its authority."""
    start = now.replace(microsecond=0)
    end = min(start + lifetime, start - CLOCK_SKEW + MAX_SERVER_LIFETIME, authority.not_valid_after_utc)
    builder = _builder(_server_subject(names), authority.subject, key.public_key(), start, end)
    return _sign_leaf(
        builder, key.public_key(), general_names(names), ExtendedKeyUsageOID.SERVER_AUTH, authority_key
    )


def client_certificate(
    public_key: CertificatePublicKeyTypes,
    name: str,
    authority: x509.Certificate,
    authority_key: PrivateKey,
    lifetime: timedelta,
    now: datetime,
) -> x509.Certificate:
    """Issue a client certificate for the user `name`. It ends after `lifetime`, or earlier with its authority."""
    start = now.replace(microsecond=0)
    end = min(start + lifetime, authority.not_valid_after_utc)
    subject = _common_name(name if len(name) <= _MAX_COMMON_NAME else "zcproto client")
    builder = _builder(subject, authority.subject, public_key, start, end)
    return _sign_leaf(
        builder, public_key, [x509.DNSName(name)], ExtendedKeyUsageOID.CLIENT_AUTH, authority_key
    )


def _server_subject(names: Sequence[str]) -> x509.Name:
    if all(map(is_address, names)):
        # Without a DNS name in the SubjectAltName, OpenSSL and GnuTLS treat the common name as one, and an
        # address there would violate the constraints of an authority that has them.
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "zcproto")])
    return _common_name(next((name for name in names if len(name) <= _MAX_COMMON_NAME), "zcproto"))


def _sign_leaf(
    builder: x509.CertificateBuilder,
    public_key: CertificatePublicKeyTypes,
    names: Sequence[x509.GeneralName],
    purpose: ObjectIdentifier,
    authority_key: PrivateKey,
) -> x509.Certificate:
    is_rsa_server = purpose == ExtendedKeyUsageOID.SERVER_AUTH and isinstance(public_key, rsa.RSAPublicKey)
    return (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        # In TLS 1.3 all keys only sign (RFC 8446 section 4.4.2.2), but NSS requires keyEncipherment of RSA servers.
        .add_extension(_usage(digital_signature=True, key_encipherment=is_rsa_server), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority_key_identifier(authority_key), critical=False)
        .sign(authority_key, _hash_of(authority_key))
    )


# --- revocation lists --------------------------------------------------------------------------------------


def revocation_list(
    revoked: Iterable[Issued], number: int, authority: x509.Certificate, key: PrivateKey, now: datetime
) -> x509.CertificateRevocationList:
    """Sign the list of these certificates. Each list needs a higher `number` than the lists before it."""
    start = now.replace(microsecond=0)
    builder = x509.CertificateRevocationListBuilder(
        authority.subject,
        start - CLOCK_SKEW,
        start + CRL_LIFETIME,
        # Pass all entries at once: the builder copies its list for each entry added later.
        revoked_certificates=[_revoked_entry(entry) for entry in revoked],
    )
    return (
        builder.add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key_identifier(key), critical=False)
        .sign(key, _hash_of(key))
    )


def _revoked_entry(entry: Issued) -> x509.RevokedCertificate:
    assert entry.revoked_at is not None
    builder = (
        x509.RevokedCertificateBuilder().serial_number(entry.serial_number).revocation_date(entry.revoked_at)
    )
    if entry.reason != UNSPECIFIED:  # the default, expressed by its absence (RFC 5280 section 5.3.1)
        builder = builder.add_extension(x509.CRLReason(x509.ReasonFlags(entry.reason)), critical=False)
    return builder.build()


# --- shared parts ------------------------------------------------------------------------------------------


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: CertificatePublicKeyTypes,
    start: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SKEW)
        .not_valid_after(not_after)
    )


def _usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _hash_of(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384:
    """Return the hash for signatures of this key: TLS 1.3 has one for each curve."""
    is_p384 = isinstance(key, ec.EllipticCurvePrivateKey) and key.key_size == 384
    return hashes.SHA384() if is_p384 else hashes.SHA256()


def _authority_key_identifier(key: PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
