"""What others' checkers say of the certificates made here: OpenSSL, GnuTLS, and a linter for X.509."""

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
from tests.interop.conftest import CERTIFICATES, NAMES
from tests.interop.support import is_address, needs, run_command

OTHER_NAMES = ["other.example", "com", "sub.zcp.example.com", "192.0.2.8", "2001:db8::8"]
SERVER_AUTH = "1.3.6.1.5.5.7.3.1"

files = pytest.mark.parametrize("file", CERTIFICATES.values(), ids=CERTIFICATES)


def names_in(path: Path) -> list[str]:
    """All names of a certificate, those of this machine among them."""
    leaf = x509.load_pem_x509_certificate(path.read_bytes())
    entries = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(entry.value) for entry in entries]


# --- OpenSSL ---------------------------------------------------------------------------------------------


def openssl_verifies(ca_file: Path, certificate: Path, name: str) -> tuple[bool, str]:
    option = "-verify_ip" if is_address(name) else "-verify_hostname"
    strict = ["-x509_strict", "-check_ss_sig", "-auth_level", "3", "-purpose", "sslserver"]
    code, said = run_command(
        ["openssl", "verify", *strict, "-no-CApath", "-CAfile", ca_file, option, name, certificate]
    )
    return code == 0, said


@pytest.mark.requirement("profile")
@needs("openssl")
@files
def test_openssl_verifies_every_name_strictly(own: Path, file: str) -> None:
    names = names_in(own / file)
    assert {*NAMES, "localhost", "127.0.0.1", "::1"} <= {*names}
    for name in names:
        verified, said = openssl_verifies(own / "ca.crt", own / file, name)
        assert verified, said


@needs("openssl")
@files
def test_openssl_refuses_other_names_and_another_authority(own: Path, stranger: Path, file: str) -> None:
    for name in OTHER_NAMES:
        verified, said = openssl_verifies(own / "ca.crt", own / file, name)
        assert not verified
        assert "mismatch" in said
    verified, said = openssl_verifies(stranger, own / file, "localhost")
    assert not verified
    assert "unable to get local issuer certificate" in said


@needs("openssl")
def test_openssl_accepts_the_authority_only_for_issuing_server_leaves(own: Path) -> None:
    strict = ["-x509_strict", "-check_ss_sig", "-auth_level", "3", "-no-CApath"]
    code, said = run_command(["openssl", "verify", *strict, "-CAfile", own / "ca.crt", own / "ca.crt"])
    assert code == 0, said
    _, purposes = run_command(["openssl", "x509", "-in", own / "ca.crt", "-noout", "-purpose"])
    assert "SSL server CA : Yes" in purposes
    assert "SSL server : No" in purposes


# --- GnuTLS ----------------------------------------------------------------------------------------------


def gnutls_verifies(ca_file: Path, certificate: Path, name: str) -> tuple[bool, str]:
    """With a profile of 128 bits, which GnuTLS calls high."""
    wanted = ["--verify-hostname", name, "--verify-purpose", SERVER_AUTH, "--verify-profile", "high"]
    code, said = run_command(
        ["certtool", "--verify", "--load-ca-certificate", ca_file, *wanted, "--infile", certificate]
    )
    return code == 0 and "Chain verification output: Verified. The certificate is trusted." in said, said


@needs("certtool")
@files
def test_gnutls_verifies_every_name(own: Path, file: str) -> None:
    for name in names_in(own / file):
        verified, said = gnutls_verifies(own / "ca.crt", own / file, name)
        assert verified, said


@needs("certtool")
@files
def test_gnutls_refuses_other_names_and_another_authority(own: Path, stranger: Path, file: str) -> None:
    for name in OTHER_NAMES:
        verified, said = gnutls_verifies(own / "ca.crt", own / file, name)
        assert not verified
        assert "The name in the certificate does not match the expected" in said
    verified, said = gnutls_verifies(stranger, own / file, "localhost")
    assert not verified
    assert "The certificate issuer is unknown" in said


# --- pkilint ---------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """What the linter has against a certificate. The name is the linter's own."""

    name: str
    severity: str
    message: str


EXCEPTED = "pkix.invalid_domain_name_syntax"
"""pkilint asks for a dot in every DNS name. RFC 5280 section 4.2.1.6 asks for the preferred name syntax of RFC
1034 section 3.5, of which one label is a name, too; clients connect by `localhost` and by a host's bare name.
Nothing else of what it finds is excepted."""


def lint(profile: str, *certificates: Path) -> list[Finding]:
    """What pkilint finds by one of its profiles, from its notices upwards."""
    command = [sys.executable, "-m", f"pkilint.bin.{profile}", "lint", "-f", "JSON", "-s", "NOTICE"]
    code, said = run_command([*command, *certificates])
    found = [
        Finding(each["code"], each["severity"], each["message"])
        for result in json.loads(said)["results"]
        for each in result["finding_descriptions"]
    ]
    assert code == len(found), said
    return found


def excepted(certificate: Path) -> list[Finding]:
    """What it has against the bare host names that a certificate is for, or may issue for."""
    parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    names: list[x509.GeneralName] = []
    for extension in parsed.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names += extension.value
        elif isinstance(extension.value, x509.NameConstraints):
            names += extension.value.permitted_subtrees or ()
    bare = [name.value for name in names if isinstance(name, x509.DNSName) and "." not in name.value]
    return [Finding(EXCEPTED, "ERROR", f'Invalid domain name syntax: "{name}"') for name in bare]


@pytest.mark.requirement("profile")
@files
def test_linter_finds_only_bare_host_names_in_a_leaf(own: Path, file: str) -> None:
    assert "localhost" in names_in(own / file)
    assert lint("lint_pkix_cert", own / file) == excepted(own / file)


def test_linter_finds_only_bare_host_names_in_the_authority(own: Path) -> None:
    """They are in its constraints, if it has any."""
    assert lint("lint_pkix_cert", own / "ca.crt") == excepted(own / "ca.crt")


@pytest.mark.requirement("profile")
@files
def test_linter_finds_nothing_between_authority_and_leaf(own: Path, file: str) -> None:
    assert lint("lint_pkix_signer_signee_cert_chain", own / "ca.crt", own / file) == []


def test_linter_would_find_something(own: Path, tmp_path: Path) -> None:
    """A root whose basicConstraints are not critical, and a leaf that is not of this authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    careless = tmp_path / "careless.crt"
    careless.write_bytes(
        pem(build(key, extensions=[x509.BasicConstraints(True, None)], algorithm=hashes.SHA256()))
    )
    assert "pkix.basic_constraints_extension_not_critical" in {
        finding.name for finding in lint("lint_pkix_cert", careless)
    }
    assert {
        finding.severity for finding in lint("lint_pkix_signer_signee_cert_chain", own / "ca.crt", careless)
    } & {
        "ERROR",
        "FATAL",
    }
