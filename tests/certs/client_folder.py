"""A folder of client certificates, and requests for them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from tests.certs.support import DAY, NOW, openssl
from zcproto.certs import client_ca
from zcproto.certs.client_ca import ClientCertificate
from zcproto.certs.issued import Issued

WHEN = NOW.replace(microsecond=0)


class CertificateFolder:
    """A certificate folder and the operations on it at one time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = NOW
        self.sentences: list[str] = []

    def issue(self, name: str = "ada", **options: Any) -> ClientCertificate:
        options = {"lifetime": 90 * DAY, "now": self.now, "progress": self.sentences.append, **options}
        return client_ca.issue_client(self.directory, name, **options)

    def revoke(self, name: str | None = None, **options: Any) -> tuple[Issued, ...]:
        options = {"now": self.now, "progress": self.sentences.append, **options}
        return client_ca.revoke_client(self.directory, name=name, **options)

    def refresh(self) -> datetime | None:
        return client_ca.refresh_crl(self.directory, self.now, progress=self.sentences.append)

    def ensure(self) -> tuple[Path, Path]:
        return client_ca.ensure_authority(self.directory, self.now, progress=self.sentences.append)

    @property
    def ca(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.path("client-ca.crt").read_bytes())

    @property
    def crl(self) -> x509.CertificateRevocationList:
        return x509.load_pem_x509_crl(self.path("client-ca.crl").read_bytes())

    @property
    def crl_number(self) -> int:
        return self.crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    @property
    def revoked(self) -> set[str]:
        """Serial numbers in the signed list."""
        return {f"{entry.serial_number:X}" for entry in self.crl}

    @property
    def listed(self) -> list[tuple[str, str, bool]]:
        return [
            (entry.serial, entry.name, entry.revoked_at is not None)
            for entry in client_ca.issued_clients(self.directory)
        ]

    def path(self, name: str) -> Path:
        return self.directory / name

    def files(self) -> set[str]:
        return {path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*")}

    def verify(self, certificate: Path, purpose: str = "sslclient") -> str:
        """Return what openssl reports, with the options of a server."""
        return openssl(
            "verify",
            "-x509_strict",
            *("-purpose", purpose, "-crl_check", "-attime", str(int(self.now.timestamp()))),
            *("-CAfile", self.path("client-ca.crt"), "-CRLfile", self.path("client-ca.crl"), certificate),
        )


def load(issued: ClientCertificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(issued.certificate.read_bytes())


def key_of(issued: ClientCertificate) -> Any:
    assert issued.key is not None
    return serialization.load_pem_private_key(issued.key.read_bytes(), None)


def csr_of(
    key: Any, name: str = "requested", encoding: serialization.Encoding = serialization.Encoding.PEM
) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, algorithm)
        .public_bytes(encoding)
    )


@pytest.fixture
def folder(tmp_path: Path) -> CertificateFolder:
    """Return an empty certificate folder."""
    return CertificateFolder(tmp_path / "certs")
