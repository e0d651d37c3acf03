"""Client certificates: issue, names, lifetimes, renewal and requests (CSR)."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.certs.client_folder import WHEN, CertificateFolder, csr_of, folder, key_of, load
from tests.certs.support import DAY, NOW, build, der, pem, pem_of_key, pin_of
from zcproto.certs import client_ca, client_user, files
from zcproto.certs.client_ca import ClientCertificate
from zcproto.errors import CertificateError

__all__ = ["folder"]


# --- what is in them -------------------------------------------------------------------------------------


def test_first_client_certificate_creates_the_authority(folder: CertificateFolder) -> None:
    issued = folder.issue("ada.example")
    assert folder.files() == {
        *(".lock", "client-ca.crt", "client-ca.key", "client-ca.crl", "client-ca.issued"),
        *("clients", "clients/ada.example.crt", "clients/ada.example.key"),
    }
    for name in folder.files():
        assert folder.path(name).stat().st_mode & 0o777 == (0o700 if name == "clients" else 0o600)
    assert issued == ClientCertificate(
        certificate=folder.path("clients/ada.example.crt"),
        key=folder.path("clients/ada.example.key"),
        serial=f"{load(issued).serial_number:X}",
        not_after=WHEN + 90 * DAY,
        pin=pin_of(load(issued)),
    )
    assert key_of(issued).public_key() == load(issued).public_key()
    assert client_user.user_of(der(load(issued)), "dns") == "ada.example"
    (sentence,) = folder.sentences
    assert sentence.startswith("Created the certificate authority")


def test_client_certificate_is_valid_only_for_clients(folder: CertificateFolder) -> None:
    certificate = load(folder.issue())
    found = {type(extension.value): extension for extension in certificate.extensions}
    assert {kind.__name__: extension.critical for kind, extension in found.items()} == {
        "SubjectAlternativeName": False,
        "BasicConstraints": True,
        "KeyUsage": True,
        "ExtendedKeyUsage": False,
        "SubjectKeyIdentifier": False,
        "AuthorityKeyIdentifier": False,
    }
    values = [extension.value for extension in certificate.extensions]
    assert x509.SubjectAlternativeName([x509.DNSName("ada")]) in values
    assert x509.BasicConstraints(ca=False, path_length=None) in values
    assert x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]) in values
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    others = (usage.key_cert_sign, usage.key_encipherment, usage.key_agreement, usage.crl_sign)
    assert not any(others)
    assert certificate.version is x509.Version.v3
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert certificate.not_valid_before_utc == WHEN - timedelta(hours=1)
    assert certificate.not_valid_after_utc == WHEN + 90 * DAY


def test_client_authority_issues_only_leaves_and_is_separate(folder: CertificateFolder) -> None:
    folder.ensure()
    ca = folder.ca
    values = [extension.value for extension in ca.extensions]
    assert x509.BasicConstraints(ca=True, path_length=0) in values
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert isinstance(ca.public_key(), ec.EllipticCurvePublicKey)
    assert ca.not_valid_after_utc - WHEN == 3652 * DAY
    assert not folder.path("ca.crt").exists()


def test_openssl_accepts_it_for_a_client_and_not_for_a_server(folder: CertificateFolder) -> None:
    issued = folder.issue()
    assert folder.verify(issued.certificate).endswith(": OK\n")
    with pytest.raises(AssertionError, match="unsuitable certificate purpose"):
        folder.verify(issued.certificate, "sslserver")


def test_openssl_refuses_a_revoked_certificate(folder: CertificateFolder) -> None:
    ada, bob = folder.issue("ada"), folder.issue("bob")
    folder.revoke("ada")
    assert folder.verify(bob.certificate).endswith(": OK\n")
    with pytest.raises(AssertionError, match="certificate revoked"):
        folder.verify(ada.certificate)


def test_leaked_server_certificate_does_not_authenticate_a_client(
    folder: CertificateFolder, made: Path
) -> None:
    folder.ensure()
    with pytest.raises(AssertionError, match="unable to get local issuer certificate"):
        folder.verify(made / "server.crt")


def test_long_name_is_only_in_the_alternative_name(folder: CertificateFolder) -> None:
    name = f"{'a' * 63}.{'b' * 63}"
    certificate = load(folder.issue(name))
    assert certificate.subject.rfc4514_string() == "CN=zcproto client"
    assert client_user.user_of(der(certificate), "dns") == name
    assert folder.verify(folder.path(f"clients/{name}.crt")).endswith(": OK\n")


def test_client_certificate_does_not_outlive_the_authority(
    folder: CertificateFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.certs.profile.AUTHORITY_LIFETIME", 10 * DAY)
    assert load(folder.issue()).not_valid_after_utc == WHEN + 10 * DAY


# --- names and lifetimes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "1 to 253 characters"),
        ("Ada", "write it as 'ada', and rename the user accordingly"),
        ("ada.", "write it as 'ada', and rename the user accordingly"),
        ("jörg", "write it as 'xn--jrg-sna', and rename the user accordingly"),
        ("10.0.0.1", "an address or a wildcard"),
        ("::1", "an address or a wildcard"),
        ("*.example.com", "an address or a wildcard"),
        ("7", "ends in a number"),
        ("..", "a label has"),
        ("../ada", "a label has"),
        ("a/b", "a label has"),
        ("ada\n", "a label has"),
        ("ada\0", "a label has"),
        ("a b", "a label has"),
        (f"{'a' * 63}.{'b' * 63}.c", "more than 128 characters"),
    ],
)
def test_invalid_client_name_is_refused(folder: CertificateFolder, name: str, said: str) -> None:
    with pytest.raises(CertificateError, match=r"cannot|not a valid name") as caught:
        folder.issue(name)
    assert said in str(caught.value)
    assert not folder.directory.exists()


def test_lifetime_limits_are_accepted(folder: CertificateFolder) -> None:
    assert folder.issue("a", lifetime=timedelta(seconds=1)).not_after == WHEN + timedelta(seconds=1)
    assert folder.issue("b", lifetime=1826 * DAY).not_after == WHEN + 1826 * DAY


def test_naive_time_is_refused(folder: CertificateFolder) -> None:
    with pytest.raises(ValueError, match="aware"):
        folder.issue(now=NOW.replace(tzinfo=None))


def test_time_in_any_zone_is_accepted(folder: CertificateFolder) -> None:
    elsewhere = NOW.astimezone(tz=datetime.fromisoformat("2026-01-01T00:00+09:00").tzinfo)
    assert folder.issue(now=elsewhere).not_after == WHEN + 90 * DAY
    assert client_ca.issued_clients(folder.directory)[0].not_after == WHEN + 90 * DAY


# --- again -----------------------------------------------------------------------------------------------


def test_valid_certificate_is_not_overwritten(folder: CertificateFolder) -> None:
    folder.issue()
    before = {name: folder.path(name).read_bytes() for name in folder.files() if folder.path(name).is_file()}
    with pytest.raises(CertificateError, match=r"ada\.crt: is valid until 2026-08-30 12:30 UTC; renew it"):
        folder.issue()
    assert {name: folder.path(name).read_bytes() for name in before} == before


def test_renewal_keeps_the_key_and_its_pin(folder: CertificateFolder) -> None:
    first = folder.issue()
    key = first.key and first.key.read_bytes()
    folder.now += 60 * DAY
    second = folder.issue(renew=True)
    assert second.key is not None
    assert second.key.read_bytes() == key
    assert (second.pin, second.not_after) == (first.pin, WHEN + 150 * DAY)
    assert second.serial != first.serial
    assert [serial for serial, *_ in folder.listed] == [first.serial, second.serial]


def test_renewal_of_a_missing_certificate_issues_one(folder: CertificateFolder) -> None:
    assert folder.issue(renew=True).certificate.name == "ada.crt"


@pytest.mark.parametrize("renew", [False, True])
def test_expired_certificate_gets_a_new_key(folder: CertificateFolder, renew: bool) -> None:
    first = folder.issue()
    folder.now = first.not_after + timedelta(seconds=1)
    second = folder.issue(renew=renew)
    assert second.pin != first.pin
    assert key_of(second).public_key() == load(second).public_key()
    assert not list(folder.path("clients").glob("*.aside"))


@pytest.mark.parametrize("renew", [False, True])
def test_revoked_certificate_gets_a_new_key(folder: CertificateFolder, renew: bool) -> None:
    first = folder.issue()
    folder.revoke("ada")
    second = folder.issue(renew=renew)
    assert second.pin != first.pin
    assert folder.verify(second.certificate).endswith(": OK\n")


def test_certificate_is_valid_up_to_its_last_second(folder: CertificateFolder) -> None:
    folder.now = folder.issue().not_after
    with pytest.raises(CertificateError, match="is valid until"):
        folder.issue()


def test_certificate_of_another_issuer_is_never_overwritten(
    folder: CertificateFolder, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    folder.ensure()
    files.make_folder(folder.path("clients"))
    path = folder.path("clients/ada.crt")
    foreign = pem(build(ec_key))
    path.touch(0o600)
    path.write_bytes(foreign)
    with pytest.raises(CertificateError, match=r"ada\.crt: was not issued by .*client-ca\.crt and is never"):
        folder.issue(renew=True)
    assert path.read_bytes() == foreign


def test_unrelated_key_is_set_aside(folder: CertificateFolder, ec_key: ec.EllipticCurvePrivateKey) -> None:
    folder.ensure()
    files.make_folder(folder.path("clients"))
    path = folder.path("clients/ada.key")
    path.touch(0o600)
    path.write_bytes(pem_of_key(ec_key))
    issued = folder.issue()
    assert key_of(issued).public_key() == load(issued).public_key()
    assert folder.path("clients/ada.key.aside").read_bytes() == pem_of_key(ec_key)
    assert "set aside" in folder.sentences[-1]


def test_damaged_client_files_are_set_aside(folder: CertificateFolder) -> None:
    first = folder.issue()
    assert first.key is not None
    first.certificate.write_bytes(b"damaged")
    first.key.write_bytes(b"damaged")
    second = folder.issue()
    assert key_of(second).public_key() == load(second).public_key()
    assert {name for name in folder.files() if name.endswith(".aside")} == {
        "clients/ada.crt.aside",
        "clients/ada.key.aside",
    }


@pytest.mark.parametrize("damage", ["lost", "another"])
def test_renewal_without_the_key_is_refused(
    folder: CertificateFolder, damage: str, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    first = folder.issue()
    assert first.key is not None
    if damage == "lost":
        first.key.unlink()
    else:
        first.key.write_bytes(pem_of_key(ec_key))
    with pytest.raises(CertificateError, match=r"the key of .*ada\.crt is not here; renew it with a CSR"):
        folder.issue(renew=True)
    assert len(folder.listed) == 1


# --- a device that keeps its key -------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
def test_csr_gets_a_certificate_for_its_key_and_nothing_else(
    folder: CertificateFolder, encoding: serialization.Encoding, rsa_key: rsa.RSAPrivateKey
) -> None:
    issued = folder.issue(csr=csr_of(rsa_key, "root", encoding))
    certificate = load(issued)
    assert issued.key is None
    assert folder.files().isdisjoint({"clients/ada.key"})
    assert certificate.public_key() == rsa_key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=ada"
    assert client_user.user_of(der(certificate), "dns") == "ada"
    assert folder.verify(issued.certificate).endswith(": OK\n")


def test_csr_certificate_is_renewed_by_a_csr(
    folder: CertificateFolder, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    first = folder.issue(csr=csr_of(ec_key))
    with pytest.raises(CertificateError, match="is valid until"):
        folder.issue(csr=csr_of(ec_key))
    with pytest.raises(CertificateError, match="renew it with a CSR"):
        folder.issue(renew=True)
    assert folder.issue(csr=csr_of(ec_key), renew=True).pin == first.pin


def test_generated_key_is_set_aside_when_a_csr_has_another_key(
    folder: CertificateFolder, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    first = folder.issue()
    assert first.key is not None
    key = first.key.read_bytes()
    folder.issue(csr=csr_of(ec_key), renew=True)
    assert not first.key.exists()
    assert folder.path("clients/ada.key.aside").read_bytes() == key


def test_csr_for_the_existing_key_keeps_the_key_file(folder: CertificateFolder) -> None:
    first = folder.issue()
    assert first.key is not None
    second = folder.issue(csr=csr_of(key_of(first)), renew=True)
    assert second.pin == first.pin
    assert first.key.exists()


@pytest.mark.parametrize(
    "data", [b"", b"x", b"-----BEGIN CERTIFICATE REQUEST-----\n", b"\x30\x03\x02\x01\x00"]
)
def test_malformed_csr_is_refused(folder: CertificateFolder, data: bytes) -> None:
    with pytest.raises(CertificateError, match="the CSR cannot be parsed"):
        folder.issue(csr=data)


def test_certificate_instead_of_a_csr_is_refused(
    folder: CertificateFolder, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    for data in (pem(build(ec_key)), der(build(ec_key))):
        with pytest.raises(CertificateError, match="the CSR cannot be parsed"):
            folder.issue(csr=data)


def test_oversized_csr_is_refused(folder: CertificateFolder) -> None:
    with pytest.raises(CertificateError, match="larger than 65536 bytes"):
        folder.issue(csr=bytes(65_537))


def test_csr_with_a_wrong_signature_is_refused(folder: CertificateFolder, ec_key: Any) -> None:
    request = csr_of(ec_key, encoding=serialization.Encoding.DER)
    assert request.count(b"requested") == 1
    with pytest.raises(CertificateError, match="not signed with its own key"):
        folder.issue(csr=request.replace(b"requested", b"falsified"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (rsa.generate_private_key(65537, 1024), "1024 bits"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
)
def test_csr_with_a_weak_key_is_refused(folder: CertificateFolder, key: Any, said: str) -> None:
    with pytest.raises(CertificateError, match=said):
        folder.issue(csr=csr_of(key))
