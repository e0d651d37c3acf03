"""Test managed certificates with other checkers: OpenSSL, GnuTLS, and an X.509 linter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.certs.support import build, pem
from tests.interop.conftest import CERTIFICATES, NAMES, ca_of
from tests.interop.support import SOURCES, is_address, needs, run_command

OTHER_NAMES = ["other.example", "com", "sub.zcp.example.com", "192.0.2.8", "2001:db8::8"]
SERVER_AUTH = "1.3.6.1.5.5.7.3.1"

files = pytest.mark.parametrize("file", CERTIFICATES.values(), ids=CERTIFICATES)


def names_in(path: Path) -> list[str]:
    """Return all names of a certificate, including those of the machine."""
    leaf = x509.load_pem_x509_certificate(path.read_bytes())
    entries = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in entries]


# --- OpenSSL ---------------------------------------------------------------------------------------------


def openssl_verifies(ca_file: Path, certificate: Path, name: str) -> tuple[bool, str]:
    option = "-verify_ip" if is_address(name) else "-verify_hostname"
    strict = ["-x509_strict", "-check_ss_sig", "-auth_level", "3", "-purpose", "sslserver"]
    code, output = run_command(
        ["openssl", "verify", *strict, "-no-CApath", "-CAfile", ca_file, option, name, certificate]
    )
    return code == 0, output


@pytest.mark.requirement("profile")
@needs("openssl")
@files
def test_openssl_strict_verification_accepts_every_name(managed_certs: Path, file: str) -> None:
    names = names_in(managed_certs / file)
    assert {*NAMES, "localhost", "127.0.0.1", "::1"} <= {*names}
    for name in names:
        verified, output = openssl_verifies(ca_of(managed_certs / file), managed_certs / file, name)
        assert verified, output


@needs("openssl")
@files
def test_openssl_refuses_wrong_name_and_untrusted_authority(
    managed_certs: Path, other_ca: Path, file: str
) -> None:
    for name in OTHER_NAMES:
        verified, output = openssl_verifies(ca_of(managed_certs / file), managed_certs / file, name)
        assert not verified
        assert "mismatch" in output
    verified, output = openssl_verifies(other_ca, managed_certs / file, "localhost")
    assert not verified
    assert "unable to get local issuer certificate" in output


@needs("openssl")
@files
def test_openssl_accepts_authority_as_server_ca_only(managed_certs: Path, file: str) -> None:
    strict = ["-x509_strict", "-check_ss_sig", "-auth_level", "3", "-no-CApath"]
    ca_file = ca_of(managed_certs / file)
    code, output = run_command(["openssl", "verify", *strict, "-CAfile", ca_file, ca_file])
    assert code == 0, output
    _, purposes = run_command(["openssl", "x509", "-in", ca_file, "-noout", "-purpose"])
    assert "SSL server CA : Yes" in purposes
    assert "SSL server : No" in purposes


# --- GnuTLS ----------------------------------------------------------------------------------------------


def gnutls_verifies(ca_file: Path, certificate: Path, name: str) -> tuple[bool, str]:
    """Verify with GnuTLS's profile `high`, which requires 128 bits of security."""
    options = ["--verify-hostname", name, "--verify-purpose", SERVER_AUTH, "--verify-profile", "high"]
    code, output = run_command(
        ["certtool", "--verify", "--load-ca-certificate", ca_file, *options, "--infile", certificate]
    )
    return code == 0 and "Chain verification output: Verified. The certificate is trusted." in output, output


@needs("certtool")
@files
def test_gnutls_accepts_every_name(managed_certs: Path, file: str) -> None:
    for name in names_in(managed_certs / file):
        verified, output = gnutls_verifies(ca_of(managed_certs / file), managed_certs / file, name)
        assert verified, output


@needs("certtool")
@files
def test_gnutls_refuses_wrong_name_and_untrusted_authority(
    managed_certs: Path, other_ca: Path, file: str
) -> None:
    for name in OTHER_NAMES:
        verified, output = gnutls_verifies(ca_of(managed_certs / file), managed_certs / file, name)
        assert not verified
        assert "The name in the certificate does not match the expected" in output
    verified, output = gnutls_verifies(other_ca, managed_certs / file, "localhost")
    assert not verified
    assert "The certificate issuer is unknown" in output


# --- Botan -----------------------------------------------------------------------------------------------


@needs("botan")
@files
def test_botan_accepts_chain_and_refuses_untrusted_authority(
    managed_certs: Path, other_ca: Path, file: str
) -> None:
    code, output = run_command(["botan", "cert_verify", managed_certs / file, ca_of(managed_certs / file)])
    assert (code, output.strip()) == (0, "Certificate passes validation checks")
    _, output = run_command(["botan", "cert_verify", managed_certs / file, other_ca])
    assert "Certificate issuer not found" in output


# --- NSS -------------------------------------------------------------------------------------------------


def nss_verifies(ca_file: Path, certificate: Path, database: Path) -> tuple[bool, str]:
    """Verify as a client of a server does (usage 1), which requires keyEncipherment of an RSA certificate."""
    database.mkdir()
    code, output = run_command(["certutil", "-N", "-d", database, "--empty-password"])
    assert code == 0, output
    code, output = run_command(
        ["certutil", "-A", "-d", database, "-n", "ca", "-t", "C,,", "-a", "-i", ca_file]
    )
    assert code == 0, output
    code, output = run_command(["vfychain", "-d", database, "-u", "1", "-pp", "-a", certificate])
    return code == 0 and "Chain is good!" in output, output


@needs("certutil", "vfychain")
@files
def test_nss_accepts_chain_and_refuses_untrusted_authority(
    managed_certs: Path, other_ca: Path, file: str, tmp_path: Path
) -> None:
    verified, output = nss_verifies(ca_of(managed_certs / file), managed_certs / file, tmp_path / "trusted")
    assert verified, output
    verified, output = nss_verifies(other_ca, managed_certs / file, tmp_path / "other")
    assert not verified
    assert "Peer's Certificate issuer is not recognized" in output


# --- BoringSSL -------------------------------------------------------------------------------------------


def grpc_call(ca_file: Path, certificate: Path, name: str) -> tuple[int, str]:
    program = SOURCES / "grpc_call.py"
    return run_command([sys.executable, program, certificate, certificate.with_suffix(".key"), name, ca_file])


@files
def test_grpc_accepts_names_and_refuses_wrong_name_and_untrusted_authority(
    managed_certs: Path, other_ca: Path, file: str
) -> None:
    for name in names_in(managed_certs / file):
        assert grpc_call(ca_of(managed_certs / file), managed_certs / file, name) == (0, "accepted")
    code, output = grpc_call(ca_of(managed_certs / file), managed_certs / file, "other.example")
    assert code == 3
    assert "Hostname Verification Check failed" in output
    code, output = grpc_call(other_ca, managed_certs / file, "localhost")
    assert code == 3
    assert "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate" in output


# --- pkilint ---------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """A finding of the linter, with the linter's name for it."""

    name: str
    severity: str
    message: str


ALLOWED_FINDING = "pkix.invalid_domain_name_syntax"
"""pkilint requires a dot in every DNS name. RFC 5280, section 4.2.1.6, requires the preferred name syntax of RFC
1034, section 3.5, which allows a single label; clients connect to `localhost` and to bare host names. No other
finding is allowed."""


def lint(profile: str, *certificates: Path) -> list[Finding]:
    """Return pkilint's findings for one of its profiles, with severity NOTICE or higher."""
    command = [sys.executable, "-m", f"pkilint.bin.{profile}", "lint", "-f", "JSON", "-s", "NOTICE"]
    code, output = run_command([*command, *certificates])
    found = [
        Finding(each["code"], each["severity"], each["message"])
        for result in json.loads(output)["results"]
        for each in result["finding_descriptions"]
    ]
    assert code == len(found), output
    return found


def allowed_findings(certificate: Path) -> list[Finding]:
    """Return the allowed findings for bare host names in a certificate or in its name constraints."""
    parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    names: list[x509.GeneralName] = []
    for extension in parsed.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names += extension.value
        elif isinstance(extension.value, x509.NameConstraints):
            names += extension.value.permitted_subtrees or ()
    bare = [name.value for name in names if isinstance(name, x509.DNSName) and "." not in name.value]
    return [Finding(ALLOWED_FINDING, "ERROR", f'Invalid domain name syntax: "{name}"') for name in bare]


@pytest.mark.requirement("profile")
@files
def test_linter_finds_only_bare_host_names_in_leaf(managed_certs: Path, file: str) -> None:
    assert "localhost" in names_in(managed_certs / file)
    assert lint("lint_pkix_cert", managed_certs / file) == allowed_findings(managed_certs / file)


@files
def test_linter_finds_only_bare_host_names_in_authority(managed_certs: Path, file: str) -> None:
    ca_file = ca_of(managed_certs / file)
    assert lint("lint_pkix_cert", ca_file) == allowed_findings(ca_file)


@pytest.mark.requirement("profile")
@files
def test_linter_finds_nothing_in_chain(managed_certs: Path, file: str) -> None:
    assert lint("lint_pkix_signer_signee_cert_chain", ca_of(managed_certs / file), managed_certs / file) == []


def test_linter_detects_invalid_certificates(managed_certs: Path, tmp_path: Path) -> None:
    """The root has non-critical basicConstraints, and the leaf is from another authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    invalid = tmp_path / "invalid.crt"
    invalid.write_bytes(
        pem(build(key, extensions=[x509.BasicConstraints(True, None)], algorithm=hashes.SHA256()))
    )
    assert "pkix.basic_constraints_extension_not_critical" in {
        finding.name for finding in lint("lint_pkix_cert", invalid)
    }
    assert {
        finding.severity
        for finding in lint("lint_pkix_signer_signee_cert_chain", managed_certs / "ca.crt", invalid)
    } & {
        "ERROR",
        "FATAL",
    }
