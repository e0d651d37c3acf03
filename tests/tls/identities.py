"""Build client certificates and revocation lists issued by a trustme CA."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from zcproto.tls.context import ClientTrust
from zcproto.tls.pins import key_pin

DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM


class Identity(NamedTuple):
    """The files of a client certificate and its key."""

    certificate: Path
    key: Path

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(
            self.certificate.read_text().split("-----END")[0] + "-----END CERTIFICATE-----"
        )


def write_identity(folder: Path, leaf: trustme.LeafCert, name: str = "client") -> Identity:
    """Write the certificate, and the key with mode 0600."""
    identity = Identity(folder / f"{name}.crt", folder / f"{name}.key")
    identity.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    identity.key.touch(0o600)
    leaf.private_key_pem.write_to_path(identity.key)
    return identity


def for_clients(
    ca: trustme.CA,
    name: str = "ada@example.org",
    *,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
) -> trustme.LeafCert:
    return ca.issue_cert(name, key_type=trustme.KeyType.ECDSA, not_before=not_before, not_after=not_after)


def _issuer(ca: trustme.CA) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(ca.cert_pem.bytes()), key


def revocation_list(
    ca: trustme.CA,
    *revoked: trustme.LeafCert,
    start: timedelta = -DAY,
    end: timedelta = DAY,
    signer: trustme.CA | None = None,
) -> bytes:
    """Return the PEM of a CRL; `signer` may differ from the named issuer."""
    now = datetime.now(UTC)
    issuer, key = _issuer(ca)
    builder = x509.CertificateRevocationListBuilder(issuer.subject, now + start, now + end)
    for leaf in revoked:
        certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
        entry = x509.RevokedCertificateBuilder(certificate.serial_number, now - DAY).build()
        builder = builder.add_revoked_certificate(entry)
    if signer is not None:
        key = _issuer(signer)[1]
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


def client_trust(
    folder: Path, ca: bytes | Path, crl: bytes | Path | None = None, *, is_required: bool = True
) -> ClientTrust:
    """Return the trust in this CA and this CRL, which are written to the folder if they are PEM."""
    paths = []
    for name, source in (("ca.pem", ca), ("crl.pem", crl)):
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        paths.append(folder / name if isinstance(source, bytes) else source)
    assert paths[0] is not None
    return ClientTrust(paths[0], paths[1], is_required)


def for_servers_only(ca: trustme.CA, folder: Path) -> Identity:
    """Return a certificate without the client purpose (RFC 5280 section 4.2.1.12)."""
    return for_purposes(ca, folder, ExtendedKeyUsageOID.SERVER_AUTH)


def for_purposes(ca: trustme.CA, folder: Path, *purposes: x509.ObjectIdentifier) -> Identity:
    """Return a certificate for these purposes; without any, it has no extended key usage."""
    issuer, issuer_key = _issuer(ca)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    identity = Identity(folder / "purpose.crt", folder / "purpose.key")
    identity.certificate.write_bytes(certificate.public_bytes(PEM))
    identity.key.touch(0o600)
    identity.key.write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return identity


def locked(key: Path, passphrase: bytes) -> Path:
    """Return a copy with the key encrypted."""
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    path = key.with_suffix(".locked.key")
    path.touch(0o600)
    encryption = serialization.BestAvailableEncryption(passphrase)
    path.write_bytes(loaded.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption))
    return path


def key_pin_of(certificate_der: bytes) -> str:
    return key_pin(x509.load_der_x509_certificate(certificate_der).public_key())
