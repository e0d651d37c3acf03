"""Which certificates a list of revoked ones names."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from zcproto.certs import client_ca
from zcproto.certs.crl import certificate_id, revoked_in
from zcproto.errors import CertificateError

NOW = datetime(2026, 6, 1, tzinfo=UTC)
MONTH = timedelta(days=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ada", "bob"):
        client_ca.issue_client(tmp_path / "certs", name, lifetime=MONTH, now=NOW)
    client_ca.revoke_client(tmp_path / "certs", name="ada", now=NOW)
    return tmp_path / "certs"


def der(folder: Path, name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / "clients" / f"{name}.crt").read_text())


def test_crl_contains_the_revoked_certificate_only(folder: Path) -> None:
    revoked = revoked_in(folder / "client-ca.crl")
    assert [name for name in ("ada", "bob") if certificate_id(der(folder, name)) in revoked] == ["ada"]


def test_same_serial_number_of_another_issuer_is_another_certificate(folder: Path, tmp_path: Path) -> None:
    issuer, serial = certificate_id(der(folder, "ada"))
    assert (issuer + b"x", serial) not in revoked_in(folder / "client-ca.crl")


def test_several_crls_in_one_file_are_combined(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    client_ca.issue_client(other, "cleo", lifetime=MONTH, now=NOW)
    client_ca.revoke_client(other, name="cleo", now=NOW)
    both = folder / "both.crl"
    both.write_bytes((folder / "client-ca.crl").read_bytes() + (other / "client-ca.crl").read_bytes())
    both.chmod(0o600)
    assert len(revoked_in(both)) == 2
    assert certificate_id(der(other, "cleo")) in revoked_in(both)


def test_damaged_crl_is_an_error_that_names_the_file(folder: Path) -> None:
    path = folder / "client-ca.crl"
    path.write_bytes(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    with pytest.raises(CertificateError, match=r"client-ca\.crl"):
        revoked_in(path)
