"""What several of these tests need. The certificates built here are built without the code under test."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from zcproto.certs import managed
from zcproto.certs.authority import Progress
from zcproto.certs.managed import ManagedSettings
from zcproto.certs.pair import CertificatePair
from zcproto.tls.pins import key_pin

NOW = datetime(2026, 6, 1, 12, 30, 15, 250_000, tzinfo=UTC)
DAY = timedelta(days=1)


def settings(**changes: Any) -> ManagedSettings:
    """Return settings with quick keys."""
    arguments: dict[str, Any] = {
        "names": ("zcp.example.com", "192.0.2.7"),
        "host_names": ("localhost", "127.0.0.1"),
        "key_types": ("rsa-2048", "ecdsa-p256"),
        "lifetime": 90 * DAY,
        "renew_before": 30 * DAY,
        "renew_key": False,
    }
    return ManagedSettings(**{**arguments, **changes})


def ensure(
    directory: Path, now: datetime = NOW, progress: Progress = lambda sentence: None, **changes: Any
) -> list[CertificatePair]:
    """Return the managed certificates in a folder with these changes of `settings`."""
    return list(managed.ensure(directory, settings(**changes), now, progress).pairs)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pins(pairs: Iterable[CertificatePair]) -> list[str]:
    return [pair.pin for pair in pairs]


def openssl(*arguments: str | Path, data: bytes | None = None) -> str:
    """What the openssl command prints; a failure of it is a failed test."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command to be the witness")
    done = subprocess.run(["openssl", *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done.stdout.decode()


def build(
    key: Any,
    *,
    signer: Any = None,
    subject: str = "server",
    issuer: str | x509.Name | None = None,
    not_before: datetime = NOW - DAY,
    not_after: datetime = NOW + DAY,
    extensions: Sequence[x509.ExtensionType] = (),
    algorithm: Any = hashes.SHA256(),  # noqa: B008 - a constant
) -> x509.Certificate:
    """A certificate for `key` as another issuer would issue it; self-signed without `signer`."""
    if not isinstance(issuer, x509.Name):
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer or subject)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer or key, algorithm)


def constrained(authority: x509.Certificate, key: Any, names: Sequence[str]) -> x509.Certificate:
    """Return this authority as earlier versions issued it: constrained to DNS names, for any address."""
    builder = x509.CertificateBuilder(
        authority.issuer,
        authority.subject,
        authority.public_key(),
        x509.random_serial_number(),
        authority.not_valid_before_utc,
        authority.not_valid_after_utc,
    )
    for extension in authority.extensions:
        if not isinstance(extension.value, x509.NameConstraints):
            builder = builder.add_extension(extension.value, extension.critical)
    addresses = [x509.IPAddress(ip_network(network)) for network in ("0.0.0.0/0", "::/0")]
    constraints = x509.NameConstraints([*map(x509.DNSName, names), *addresses], None)
    return builder.add_extension(constraints, critical=True).sign(key, hashes.SHA256())


def constrain(folder: Path, *names: str) -> x509.Certificate:
    """Replace the authority of a folder by one that is constrained to these DNS names."""
    path = folder / "ca.crt"
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    certificate = constrained(x509.load_pem_x509_certificate(path.read_bytes()), key, names)
    path.write_bytes(pem(certificate))
    return certificate


def pin_of(certificate: x509.Certificate) -> str:
    return key_pin(certificate.public_key())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def pem_of(data: bytes, label: str = "CERTIFICATE") -> bytes:
    """Any bytes in the form of PEM."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(data).decode()}-----END {label}-----\n".encode()


def pem_of_key(
    key: Any,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    encryption: serialization.KeySerializationEncryption | None = None,
) -> bytes:
    encryption = encryption or serialization.NoEncryption()
    data: bytes = key.private_bytes(serialization.Encoding.PEM, form, encryption)
    return data


def write_pair(folder: Path, chain: Sequence[x509.Certificate] | bytes, key: Any) -> tuple[Path, Path]:
    """Writes `site.crt` (0644) and `site.key` (0600); either may be given as bytes."""
    certificate_path, key_path = folder / "site.crt", folder / "site.key"
    certificate_path.write_bytes(chain if isinstance(chain, bytes) else b"".join(map(pem, chain)))
    certificate_path.chmod(0o644)
    key_path.touch(0o600)
    key_path.write_bytes(key if isinstance(key, bytes) else pem_of_key(key))
    return certificate_path, key_path
