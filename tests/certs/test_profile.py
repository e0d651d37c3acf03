from __future__ import annotations

import shutil
import subprocess
from datetime import timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.certs.support import DAY, NOW, build, constrained, openssl, pem
from zcproto.certs import profile
from zcproto.certs.authority import SERVER

SECOND = timedelta(seconds=1)
NAMES = ("localhost", "*.b.example", "192.0.2.7", "2001:db8::7")
START = NOW.replace(microsecond=0)


@pytest.fixture(scope="module")
def authority(rsa_key: Any) -> x509.Certificate:
    return profile.authority_certificate(rsa_key, SERVER.title, NOW)


@pytest.fixture(scope="module")
def old_authority(authority: x509.Certificate, rsa_key: Any) -> x509.Certificate:
    return constrained(authority, rsa_key, ["localhost", "b.example"])


@pytest.fixture(scope="module", params=["rsa", "ecdsa"])
def leaf(
    request: Any, authority: x509.Certificate, rsa_key: Any, other_rsa_key: Any, ec_key: Any
) -> x509.Certificate:
    key = {"rsa": other_rsa_key, "ecdsa": ec_key}[request.param]
    return profile.server_certificate(key, NAMES, authority, rsa_key, 90 * DAY, NOW)


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> tuple[Any, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


def usages(certificate: x509.Certificate) -> tuple[set[str], bool]:
    value, critical = extension(certificate, x509.KeyUsage)
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
    )
    return {name for name in (*names, "key_cert_sign", "crl_sign") if getattr(value, name)}, critical


def test_authority_signs_only_leaves_and_crls(
    authority: x509.Certificate,
) -> None:
    assert authority.version is x509.Version.v3
    assert extension(authority, x509.BasicConstraints) == (
        x509.BasicConstraints(ca=True, path_length=0),
        True,
    )
    assert usages(authority) == ({"key_cert_sign", "crl_sign"}, True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    assert extension(authority, x509.SubjectKeyIdentifier) == (identifier, False)
    assert len(authority.extensions) == 3  # name constraints would be a fourth, which many verifiers refuse


def test_constrained_authority_permits_exactly_its_names(old_authority: x509.Certificate) -> None:
    assert profile.has_constraints(old_authority)
    assert profile.permitted_names(old_authority) == ("localhost", "b.example")
    for name in ("localhost", "b.example", "*.b.example", "x.y.b.example", "192.0.2.7", "2001:db8::8"):
        assert profile.permits(old_authority, name)
    for name in ("example", "*.example", "ab.example", "c.example", "b.example.com"):
        assert not profile.permits(old_authority, name)


def test_authority_without_constraints_permits_everything(authority: x509.Certificate, rsa_key: Any) -> None:
    assert not profile.has_constraints(authority)
    for certificate in (authority, only_addresses_constrained(rsa_key)):
        assert profile.permitted_names(certificate) is None
        assert profile.permits(certificate, "any.example")


def only_addresses_constrained(key: Any) -> x509.Certificate:
    constraints = x509.NameConstraints([x509.IPAddress(ip_network("0.0.0.0/0"))], None)
    return build(key, extensions=[constraints])


def test_authority_is_self_signed_for_ten_years(authority: x509.Certificate, rsa_key: Any) -> None:
    assert authority.issuer == authority.subject
    assert authority.not_valid_before_utc == START - timedelta(hours=1)
    assert authority.not_valid_after_utc == START + 3652 * DAY
    assert isinstance(authority.signature_hash_algorithm, hashes.SHA256)
    rsa_key.public_key().verify(
        authority.signature, authority.tbs_certificate_bytes, padding.PKCS1v15(), hashes.SHA256()
    )


def test_authority_names_are_derived_from_their_keys(rsa_key: Any, other_rsa_key: Any) -> None:
    one = profile.authority_certificate(rsa_key, SERVER.title, NOW)
    again = profile.authority_certificate(rsa_key, SERVER.title, NOW + DAY)
    other = profile.authority_certificate(other_rsa_key, SERVER.title, NOW)
    assert one.subject == again.subject != other.subject
    assert one.serial_number != again.serial_number
    (name,) = (attribute.value for attribute in one.subject)
    assert isinstance(name, str)
    assert name.startswith("zcproto own CA ")
    assert len(name) <= 64
    assert len(bytes.fromhex(name.rpartition(" ")[2])) == 8


@pytest.mark.requirement("profile")
def test_leaf_is_valid_only_for_a_tls_server(leaf: x509.Certificate) -> None:
    assert leaf.version is x509.Version.v3
    assert extension(leaf, x509.BasicConstraints) == (x509.BasicConstraints(ca=False, path_length=None), True)
    is_rsa = isinstance(leaf.public_key(), rsa.RSAPublicKey)
    assert usages(leaf) == ({"digital_signature", *(["key_encipherment"] if is_rsa else [])}, True)
    assert extension(leaf, x509.ExtendedKeyUsage) == (
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        False,
    )
    assert len(leaf.extensions) == 6


@pytest.mark.requirement("profile")
def test_leaf_has_hosts_and_addresses_as_their_kinds_of_entries(leaf: x509.Certificate) -> None:
    names, critical = extension(leaf, x509.SubjectAlternativeName)
    assert list(names) == [
        x509.DNSName("localhost"),
        x509.DNSName("*.b.example"),
        x509.IPAddress(ip_address("192.0.2.7")),
        x509.IPAddress(ip_address("2001:db8::7")),
    ]
    assert not critical


@pytest.mark.requirement("profile")
def test_leaf_refers_to_its_authority(leaf: x509.Certificate, authority: x509.Certificate) -> None:
    assert leaf.issuer == authority.subject
    leaf.verify_directly_issued_by(authority)
    own, _ = extension(leaf, x509.SubjectKeyIdentifier)
    above, critical = extension(leaf, x509.AuthorityKeyIdentifier)
    assert own == x509.SubjectKeyIdentifier.from_public_key(leaf.public_key())
    assert above.key_identifier == extension(authority, x509.SubjectKeyIdentifier)[0].digest
    assert above.authority_cert_serial_number is None  # the authority's certificate may be renewed
    assert not critical
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)


def test_serial_numbers_are_long_random_and_positive(
    authority: x509.Certificate, rsa_key: Any, ec_key: Any
) -> None:
    serials = {
        profile.server_certificate(ec_key, NAMES, authority, rsa_key, DAY, NOW).serial_number
        for _ in range(20)
    }
    assert len(serials) == 20
    assert all(0 < serial < 1 << 159 for serial in serials)
    assert max(serials).bit_length() > 150


def test_leaf_is_valid_from_an_hour_ago_for_its_lifetime(leaf: x509.Certificate) -> None:
    assert leaf.not_valid_before_utc == START - timedelta(hours=1)
    assert leaf.not_valid_after_utc == START + 90 * DAY


def test_leaf_is_never_valid_for_more_than_397_days(
    authority: x509.Certificate, rsa_key: Any, ec_key: Any
) -> None:
    leaf = profile.server_certificate(ec_key, NAMES, authority, rsa_key, 397 * DAY, NOW)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == 397 * DAY


def test_leaf_never_outlives_its_authority(authority: x509.Certificate, rsa_key: Any, ec_key: Any) -> None:
    late = authority.not_valid_after_utc - 10 * DAY
    leaf = profile.server_certificate(ec_key, NAMES, authority, rsa_key, 90 * DAY, late)
    assert leaf.not_valid_after_utc == authority.not_valid_after_utc


@pytest.mark.parametrize(
    ("names", "common_name"),
    [
        (("a.example", "b.example"), "a.example"),
        (("x" * 60 + ".example", "b.example"), "b.example"),
        (("x" * 60 + ".example",), "zcproto"),
        (("2001:db8::7", "b.example"), "2001:db8::7"),
        (("x" * 56 + ".example",), "x" * 56 + ".example"),
    ],
)
def test_common_name_is_the_first_name_that_fits(
    authority: x509.Certificate, rsa_key: Any, ec_key: Any, names: tuple[str, ...], common_name: str
) -> None:
    leaf = profile.server_certificate(ec_key, names, authority, rsa_key, DAY, NOW)
    assert [(one.oid, one.value) for one in leaf.subject] == [(NameOID.COMMON_NAME, common_name)]


def test_leaf_for_addresses_has_no_common_name(
    authority: x509.Certificate, rsa_key: Any, ec_key: Any
) -> None:
    leaf = profile.server_certificate(ec_key, ["192.0.2.7", "2001:db8::7"], authority, rsa_key, DAY, NOW)
    assert [(one.oid, one.value) for one in leaf.subject] == [(NameOID.ORGANIZATION_NAME, "zcproto")]


@pytest.mark.requirement("profile")
def test_openssl_verifies_the_leaf_strictly_for_every_name(
    tmp_path: Path, authority: x509.Certificate, leaf: x509.Certificate
) -> None:
    ca, server = tmp_path / "ca.crt", tmp_path / "server.crt"
    ca.write_bytes(pem(authority))
    server.write_bytes(pem(leaf))
    at = ("-attime", str(int(NOW.timestamp())))
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-auth_level", "2", "-CAfile", ca, *at)
    for name in ("localhost", "www.b.example"):
        assert openssl(*strict, "-verify_hostname", name, server) == f"{server}: OK\n"
    for address in ("192.0.2.7", "2001:db8::7"):
        assert openssl(*strict, "-verify_ip", address, server) == f"{server}: OK\n"
    assert ", critical" not in openssl("x509", "-noout", "-ext", "subjectAltName", "-in", server)
    with pytest.raises(AssertionError, match="hostname mismatch"):
        openssl(*strict, "-verify_hostname", "c.example", server)
    with pytest.raises(AssertionError, match="purpose"):
        openssl("verify", "-purpose", "sslclient", "-CAfile", ca, *at, server)


@pytest.mark.parametrize(
    ("names", "good"),
    [
        (["a.b.example"], True),
        (["*.a.b.example", "localhost"], True),
        (["192.0.2.7"], True),
        (["2001:db8::7"], True),
        (["10.0.0.1", "b.example"], True),
        (["x" * 62 + ".b.example", "10.0.0.1"], True),
        (["c.example"], False),
        (["*.example", "b.example"], False),
        (["localhost", "192.0.2.7", "c.example"], False),
    ],
)
def test_openssl_and_gnutls_agree_on_what_a_constrained_authority_permits(
    tmp_path: Path, old_authority: x509.Certificate, rsa_key: Any, ec_key: Any, names: list[str], good: bool
) -> None:
    """One name beyond the constraints breaks the whole certificate."""
    assert all(profile.permits(old_authority, name) for name in names) is good
    ca, server = tmp_path / "ca.crt", tmp_path / "server.crt"
    ca.write_bytes(pem(old_authority))
    leaf = profile.server_certificate(ec_key, names, old_authority, rsa_key, 90 * DAY, NOW)
    server.write_bytes(pem(leaf))
    at = str(int(NOW.timestamp()))
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", ca, "-attime", at, server)
    if good:
        assert openssl(*strict) == f"{server}: OK\n"
    else:
        with pytest.raises(AssertionError, match="permitted subtree violation"):
            openssl(*strict)
    if shutil.which("certtool") is None:
        pytest.skip("there is no certtool to be the second witness")
    command = ["certtool", "--verify", "--load-ca-certificate", ca, "--infile", server]
    command += ["--attime", f"{NOW:%Y-%m-%d %H:%M:%S} UTC"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert ("The certificate is trusted" in done.stdout) is good, done.stdout + done.stderr
    assert ("violates the signer's constraints" in done.stdout) is not good


def test_constrained_and_renewed_authority_verify_each_others_leaves(
    tmp_path: Path, old_authority: x509.Certificate, rsa_key: Any, ec_key: Any
) -> None:
    leaf = profile.server_certificate(ec_key, NAMES, old_authority, rsa_key, 90 * DAY, NOW)
    renewed = profile.authority_certificate(rsa_key, SERVER.title, NOW + 30 * DAY)
    newer = profile.server_certificate(ec_key, NAMES, renewed, rsa_key, 90 * DAY, NOW + 31 * DAY)
    old_ca, new_ca, old_leaf, new_leaf = (tmp_path / name for name in ("old_ca", "new_ca", "old", "new"))
    for path, certificate in (
        (old_ca, old_authority),
        (new_ca, renewed),
        (old_leaf, leaf),
        (new_leaf, newer),
    ):
        path.write_bytes(pem(certificate))
    at = str(int((NOW + 31 * DAY).timestamp()))
    strict = ("verify", "-x509_strict", "-purpose", "sslserver", "-attime", at)
    openssl(*strict, "-CAfile", old_ca, new_leaf)
    openssl(*strict, "-CAfile", new_ca, old_leaf)
