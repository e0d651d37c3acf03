"""Certificates for the scripted server: valid ones, and each kind of invalid one."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HOST: Final = "localhost"
_MS: Final = 1000
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate and its key in one PEM file."""

    file: Path
    der: bytes
    pin: str

    @property
    def sha256(self) -> bytes:
        """The SHA-256 of the DER, which devices sign."""
        return hashlib.sha256(self.der).digest()


class Authority:
    """A CA. `file` has its certificate; `wall` is milliseconds since the Unix epoch."""

    def __init__(self, folder: Path, name: str, wall: int) -> None:
        self._folder = folder
        self._name = name
        self._now = datetime.fromtimestamp(wall / _MS, UTC).replace(microsecond=0)
        self._key = generate_private_key(SECP256R1())
        self._subject = _name(f"conformance {name}")
        self._issued = 0
        builder = _builder(self._subject, self._subject, self._key, self._now - _DAY, self._now + 30 * _DAY)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def leaf(self, host: str = HOST, *, days_ago: int = 1, days_left: float = 7) -> Leaf:
        """Issue a server certificate with a new key. With a negative `days_left` it has expired."""
        key = generate_private_key(SECP256R1())
        begin, end = self._now - days_ago * _DAY, self._now + days_left * _DAY
        certificate = (
            _builder(_name(host), self._subject, key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                    if host == HOST
                    else [x509.DNSName(host)]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, SHA256())
        )
        self._issued += 1
        file = self._folder / f"{self._name}-{self._issued}.pem"
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.touch(mode=0o600)
        file.write_bytes(pem + certificate.public_bytes(Encoding.PEM))
        return Leaf(file, certificate.public_bytes(Encoding.DER), _pin(key))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _pin(key: EllipticCurvePrivateKey) -> str:
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256/" + base64.b64encode(hashlib.sha256(spki).digest()).decode()
