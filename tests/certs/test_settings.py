"""Test the certificate settings of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from zcproto.certs.external import ExternalSite
from zcproto.certs.settings import certificate_settings
from zcproto.config.model import CertificatesConfig, Config, TlsConfig
from zcproto.tls.context import ClientTrust

CERTS, CA, CRL = Path("/certs"), Path("/etc/ca.pem"), Path("/etc/crl.pem")
MANAGED_CA, MANAGED_CRL = CERTS / "client-ca.crt", CERTS / "client-ca.crl"


@pytest.mark.parametrize(
    ("client_auth", "ca", "crl", "trust", "directory"),
    [
        ("off", None, None, None, CERTS),
        ("optional", None, None, ClientTrust(MANAGED_CA, MANAGED_CRL), CERTS),
        ("required", None, CRL, ClientTrust(MANAGED_CA, CRL, is_required=True), CERTS),
        ("optional", CA, None, ClientTrust(CA), None),
        ("required", CA, CRL, ClientTrust(CA, CRL, is_required=True), None),
    ],
)
def test_client_trust_is_managed_unless_a_client_ca_is_configured(
    client_auth: str, ca: Path | None, crl: Path | None, trust: ClientTrust | None, directory: Path | None
) -> None:
    tls = TlsConfig(client_auth=client_auth, client_ca_file=ca, client_crl_file=crl)
    found = certificate_settings(Config(tls=tls, certificates=CertificatesConfig(directory=CERTS)))
    assert (found.clients, found.client_directory) == (trust, directory)


def test_names_are_required_of_external_certificates() -> None:
    certificates = CertificatesConfig(mode="files", certificate=(CA,), names=("B.example", "a.example"))
    default = certificate_settings(Config(certificates=certificates)).default
    assert isinstance(default, ExternalSite)
    assert (default.names, default.required) == ((), ("b.example", "a.example"))
