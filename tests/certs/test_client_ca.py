"""Client certificates: issued, renewed, revoked, in a folder that may have seen a crash."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.certs.support import DAY, NOW, build, der, openssl, pem, pem_of_key
from zcproto.certs import client_ca, client_user, files, spki_pin
from zcproto.certs.client_ca import ClientCertificate
from zcproto.certs.issued import REASONS, UNKNOWN_NAME, Issued, render_list
from zcproto.errors import CertificateError

WHEN = NOW.replace(microsecond=0)


class Desk:
    """A folder of certificates, and what is done there at a time."""

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
        """What openssl says, as a server would ask it."""
        return openssl(
            "verify",
            "-x509_strict",
            *("-purpose", purpose, "-crl_check", "-attime", str(int(self.now.timestamp()))),
            *("-CAfile", self.path("client-ca.crt"), "-CRLfile", self.path("client-ca.crl"), certificate),
        )


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "certs")


def load(issued: ClientCertificate) -> x509.Certificate:
    return x509.load_pem_x509_certificate(issued.certificate.read_bytes())


def key_of(issued: ClientCertificate) -> Any:
    assert issued.key is not None
    return serialization.load_pem_private_key(issued.key.read_bytes(), None)


def csr_of(
    key: Any, name: str = "whoever", encoding: serialization.Encoding = serialization.Encoding.PEM
) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, algorithm)
        .public_bytes(encoding)
    )


# --- what is in them -------------------------------------------------------------------------------------


def test_the_first_certificate_makes_the_authority(desk: Desk) -> None:
    issued = desk.issue("ada.example")
    assert desk.files() == {
        *(".lock", "client-ca.crt", "client-ca.key", "client-ca.crl", "client-ca.issued"),
        *("clients", "clients/ada.example.crt", "clients/ada.example.key"),
    }
    for name in desk.files():
        assert desk.path(name).stat().st_mode & 0o777 == (0o700 if name == "clients" else 0o600)
    assert issued == ClientCertificate(
        name="ada.example",
        certificate=desk.path("clients/ada.example.crt"),
        key=desk.path("clients/ada.example.key"),
        serial=f"{load(issued).serial_number:X}",
        not_after=WHEN + 90 * DAY,
        leaf_sha256=load(issued).fingerprint(hashes.SHA256()),
        pin=spki_pin(der(load(issued))),
    )
    assert key_of(issued).public_key() == load(issued).public_key()
    assert client_user.user_of(der(load(issued)), "dns") == "ada.example"
    (sentence,) = desk.sentences
    assert sentence.startswith("Created the certificate authority")


def test_a_client_certificate_is_good_for_nothing_else(desk: Desk) -> None:
    certificate = load(desk.issue())
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


def test_the_authority_issues_leaves_only_and_is_apart(desk: Desk) -> None:
    desk.ensure()
    ca = desk.ca
    values = [extension.value for extension in ca.extensions]
    assert x509.BasicConstraints(ca=True, path_length=0) in values
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert isinstance(ca.public_key(), ec.EllipticCurvePublicKey)
    assert ca.not_valid_after_utc - WHEN == 3652 * DAY
    assert not desk.path("ca.crt").exists()


def test_openssl_takes_it_for_a_client_and_not_for_a_server(desk: Desk) -> None:
    issued = desk.issue()
    assert desk.verify(issued.certificate).endswith(": OK\n")
    with pytest.raises(AssertionError, match="unsuitable certificate purpose"):
        desk.verify(issued.certificate, "sslserver")


def test_openssl_refuses_it_once_it_is_revoked(desk: Desk) -> None:
    ada, bob = desk.issue("ada"), desk.issue("bob")
    desk.revoke("ada")
    assert desk.verify(bob.certificate).endswith(": OK\n")
    with pytest.raises(AssertionError, match="certificate revoked"):
        desk.verify(ada.certificate)


def test_a_server_certificate_that_leaks_is_no_client(desk: Desk, made: Path) -> None:
    desk.ensure()
    with pytest.raises(AssertionError, match="unable to get local issuer certificate"):
        desk.verify(made / "server.crt")


def test_a_long_name_is_in_the_alternative_name_alone(desk: Desk) -> None:
    name = f"{'a' * 63}.{'b' * 63}"
    certificate = load(desk.issue(name))
    assert certificate.subject.rfc4514_string() == "CN=zcproto client"
    assert client_user.user_of(der(certificate), "dns") == name
    assert desk.verify(desk.path(f"clients/{name}.crt")).endswith(": OK\n")


def test_no_certificate_outlives_the_authority(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.certs.profile.AUTHORITY_LIFETIME", 10 * DAY)
    assert load(desk.issue()).not_valid_after_utc == WHEN + 10 * DAY


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
def test_a_name_that_is_no_users_in_the_form_of_dns_is_refused(desk: Desk, name: str, said: str) -> None:
    with pytest.raises(CertificateError, match=r"cannot|not a valid name") as caught:
        desk.issue(name)
    assert said in str(caught.value)
    assert not desk.directory.exists()


@pytest.mark.parametrize("lifetime", [timedelta(0), -DAY, timedelta(milliseconds=999), 1827 * DAY])
def test_a_lifetime_out_of_bounds_is_refused(desk: Desk, lifetime: timedelta) -> None:
    with pytest.raises(CertificateError, match="give 1 second to 1826 days"):
        desk.issue(lifetime=lifetime)


def test_the_bounds_of_the_lifetime(desk: Desk) -> None:
    assert desk.issue("a", lifetime=timedelta(seconds=1)).not_after == WHEN + timedelta(seconds=1)
    assert desk.issue("b", lifetime=1826 * DAY).not_after == WHEN + 1826 * DAY


def test_a_time_without_a_zone_is_a_mistake(desk: Desk) -> None:
    with pytest.raises(ValueError, match="aware"):
        desk.issue(now=NOW.replace(tzinfo=None))


def test_any_zone_will_do(desk: Desk) -> None:
    elsewhere = NOW.astimezone(tz=datetime.fromisoformat("2026-01-01T00:00+09:00").tzinfo)
    assert desk.issue(now=elsewhere).not_after == WHEN + 90 * DAY
    assert client_ca.issued_clients(desk.directory)[0].not_after == WHEN + 90 * DAY


# --- again -----------------------------------------------------------------------------------------------


def test_a_good_certificate_is_not_overwritten(desk: Desk) -> None:
    desk.issue()
    before = {name: desk.path(name).read_bytes() for name in desk.files() if desk.path(name).is_file()}
    with pytest.raises(CertificateError, match=r"ada\.crt: is valid until 2026-08-30 12:30 UTC; renew it"):
        desk.issue()
    assert {name: desk.path(name).read_bytes() for name in before} == before


def test_a_renewal_keeps_the_key_and_so_the_pin(desk: Desk) -> None:
    first = desk.issue()
    key = first.key and first.key.read_bytes()
    desk.now += 60 * DAY
    second = desk.issue(renew=True)
    assert second.key is not None
    assert second.key.read_bytes() == key
    assert (second.pin, second.not_after) == (first.pin, WHEN + 150 * DAY)
    assert second.serial != first.serial
    assert [serial for serial, *_ in desk.listed] == [first.serial, second.serial]


def test_renewing_what_is_not_there_issues_it(desk: Desk) -> None:
    assert desk.issue(renew=True).name == "ada"


@pytest.mark.parametrize("renew", [False, True])
def test_after_its_end_there_is_a_new_key(desk: Desk, renew: bool) -> None:
    first = desk.issue()
    desk.now = first.not_after + timedelta(seconds=1)
    second = desk.issue(renew=renew)
    assert second.pin != first.pin
    assert key_of(second).public_key() == load(second).public_key()
    assert not list(desk.path("clients").glob("*.aside"))


@pytest.mark.parametrize("renew", [False, True])
def test_after_a_revocation_there_is_a_new_key(desk: Desk, renew: bool) -> None:
    first = desk.issue()
    desk.revoke("ada")
    second = desk.issue(renew=renew)
    assert second.pin != first.pin
    assert desk.verify(second.certificate).endswith(": OK\n")


def test_to_the_second_it_is_good_at_its_end(desk: Desk) -> None:
    desk.now = desk.issue().not_after
    with pytest.raises(CertificateError, match="is valid until"):
        desk.issue()


def test_what_was_not_issued_here_is_never_overwritten(
    desk: Desk, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    desk.ensure()
    files.make_folder(desk.path("clients"))
    path = desk.path("clients/ada.crt")
    foreign = pem(build(ec_key))
    path.touch(0o600)
    path.write_bytes(foreign)
    with pytest.raises(CertificateError, match=r"ada\.crt: was not issued by .*client-ca\.crt and is never"):
        desk.issue(renew=True)
    assert path.read_bytes() == foreign


def test_a_key_of_nobodys_is_set_aside(desk: Desk, ec_key: ec.EllipticCurvePrivateKey) -> None:
    desk.ensure()
    files.make_folder(desk.path("clients"))
    path = desk.path("clients/ada.key")
    path.touch(0o600)
    path.write_bytes(pem_of_key(ec_key))
    issued = desk.issue()
    assert key_of(issued).public_key() == load(issued).public_key()
    assert desk.path("clients/ada.key.aside").read_bytes() == pem_of_key(ec_key)
    assert "set aside" in desk.sentences[-1]


def test_damaged_files_are_set_aside(desk: Desk) -> None:
    first = desk.issue()
    assert first.key is not None
    first.certificate.write_bytes(b"damaged")
    first.key.write_bytes(b"damaged")
    second = desk.issue()
    assert key_of(second).public_key() == load(second).public_key()
    assert {name for name in desk.files() if name.endswith(".aside")} == {
        "clients/ada.crt.aside",
        "clients/ada.key.aside",
    }


@pytest.mark.parametrize("damage", ["lost", "another"])
def test_a_renewal_needs_the_key(desk: Desk, damage: str, ec_key: ec.EllipticCurvePrivateKey) -> None:
    first = desk.issue()
    assert first.key is not None
    if damage == "lost":
        first.key.unlink()
    else:
        first.key.write_bytes(pem_of_key(ec_key))
    with pytest.raises(CertificateError, match=r"the key of .*ada\.crt is not here; renew it with a CSR"):
        desk.issue(renew=True)
    assert len(desk.listed) == 1


# --- a device that keeps its key -------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
def test_a_request_gets_a_certificate_for_its_key_and_nothing_more(
    desk: Desk, encoding: serialization.Encoding, rsa_key: rsa.RSAPrivateKey
) -> None:
    issued = desk.issue(csr=csr_of(rsa_key, "root", encoding))
    certificate = load(issued)
    assert issued.key is None
    assert desk.files().isdisjoint({"clients/ada.key"})
    assert certificate.public_key() == rsa_key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=ada"
    assert client_user.user_of(der(certificate), "dns") == "ada"
    assert desk.verify(issued.certificate).endswith(": OK\n")


def test_a_request_is_renewed_by_a_request(desk: Desk, ec_key: ec.EllipticCurvePrivateKey) -> None:
    first = desk.issue(csr=csr_of(ec_key))
    with pytest.raises(CertificateError, match="is valid until"):
        desk.issue(csr=csr_of(ec_key))
    with pytest.raises(CertificateError, match="renew it with a CSR"):
        desk.issue(renew=True)
    assert desk.issue(csr=csr_of(ec_key), renew=True).pin == first.pin


def test_a_key_that_was_created_here_does_not_stay_beside_a_requests_certificate(
    desk: Desk, ec_key: ec.EllipticCurvePrivateKey
) -> None:
    first = desk.issue()
    assert first.key is not None
    key = first.key.read_bytes()
    desk.issue(csr=csr_of(ec_key), renew=True)
    assert not first.key.exists()
    assert desk.path("clients/ada.key.aside").read_bytes() == key


def test_a_request_for_the_key_that_is_here_leaves_it_here(desk: Desk) -> None:
    first = desk.issue()
    assert first.key is not None
    second = desk.issue(csr=csr_of(key_of(first)), renew=True)
    assert second.pin == first.pin
    assert first.key.exists()


@pytest.mark.parametrize(
    "data", [b"", b"x", b"-----BEGIN CERTIFICATE REQUEST-----\n", b"\x30\x03\x02\x01\x00"]
)
def test_what_is_no_request_is_refused(desk: Desk, data: bytes) -> None:
    with pytest.raises(CertificateError, match="the CSR cannot be parsed"):
        desk.issue(csr=data)


def test_a_certificate_is_no_request(desk: Desk, ec_key: ec.EllipticCurvePrivateKey) -> None:
    for data in (pem(build(ec_key)), der(build(ec_key))):
        with pytest.raises(CertificateError, match="the CSR cannot be parsed"):
            desk.issue(csr=data)


def test_a_request_without_end_is_refused(desk: Desk) -> None:
    with pytest.raises(CertificateError, match="larger than 65536 bytes"):
        desk.issue(csr=bytes(65_537))


def test_a_request_that_its_key_did_not_sign_is_refused(desk: Desk, ec_key: Any) -> None:
    request = csr_of(ec_key, encoding=serialization.Encoding.DER)
    assert request.count(b"whoever") == 1
    with pytest.raises(CertificateError, match="not signed with its own key"):
        desk.issue(csr=request.replace(b"whoever", b"whatnot"))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (rsa.generate_private_key(65537, 1024), "1024 bits"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
)
def test_a_request_for_a_weak_key_is_refused(desk: Desk, key: Any, said: str) -> None:
    with pytest.raises(CertificateError, match=said):
        desk.issue(csr=csr_of(key))


# --- revoking --------------------------------------------------------------------------------------------


def test_a_name_revokes_every_certificate_it_ever_had(desk: Desk) -> None:
    first, bob = desk.issue(), desk.issue("bob")
    second = desk.issue(renew=True)
    desk.now += DAY
    revoked = desk.revoke("ada", reason="keyCompromise")
    assert [(entry.serial, entry.revoked_at, entry.reason) for entry in revoked] == [
        (serial, WHEN + DAY, "keyCompromise") for serial in (first.serial, second.serial)
    ]
    assert desk.revoked == {first.serial, second.serial}
    assert desk.listed == [
        (first.serial, "ada", True),
        (bob.serial, "bob", False),
        (second.serial, "ada", True),
    ]
    assert not list(client_ca.revoke_client(desk.directory, name="ada", now=desk.now))


def test_a_serial_number_revokes_one(desk: Desk) -> None:
    first = desk.issue()
    second = desk.issue(renew=True)
    (revoked,) = desk.revoke(serial=first.serial.lower())
    assert (revoked.serial, revoked.name) == (first.serial, "ada")
    assert desk.revoked == {first.serial}
    assert desk.verify(second.certificate).endswith(": OK\n")


def test_the_first_reason_and_date_stay(desk: Desk) -> None:
    desk.issue()
    desk.revoke("ada", reason="superseded")
    number = desk.crl_number
    desk.now += DAY
    assert desk.revoke("ada", reason="keyCompromise") == ()
    (entry,) = desk.crl
    assert entry.revocation_date_utc == WHEN
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == "superseded"
    assert desk.crl_number == number


def test_no_reason_is_said_by_leaving_it_out(desk: Desk) -> None:
    desk.issue()
    (revoked,) = desk.revoke("ada")
    assert revoked.reason == "unspecified"
    (entry,) = desk.crl
    assert list(entry.extensions) == []


@pytest.mark.parametrize("reason", REASONS)
def test_openssl_reads_the_signed_list(desk: Desk, reason: str) -> None:
    issued = desk.issue()
    desk.revoke("ada", reason=reason)
    crl, ca = desk.path("client-ca.crl"), desk.path("client-ca.crt")
    text = openssl("crl", "-in", crl, "-noout", "-text", "-CAfile", ca)
    octets = issued.serial.zfill(len(issued.serial) + len(issued.serial) % 2)
    for part in ("Version 2", "CRL Number", "Authority Key Identifier", f"Serial Number: {octets}"):
        assert part in text


def test_revoking_what_was_never_issued_is_an_error(desk: Desk) -> None:
    desk.issue()
    with pytest.raises(
        CertificateError, match=r"client-ca\.issued: has no certificate of 'bob'; check the name"
    ):
        desk.revoke("bob")
    with pytest.raises(CertificateError, match="hexadecimal digits"):
        desk.revoke(serial="bob!")


def test_one_thing_at_a_time(desk: Desk) -> None:
    desk.issue()
    for options in ({}, {"name": "ada", "serial": "1"}):
        with pytest.raises(CertificateError, match="either the name of a user or a serial number"):
            desk.revoke(**options)
    for reason in ("", "certificateHold", "removeFromCRL", "key_compromise"):
        with pytest.raises(CertificateError, match="one of: unspecified, keyCompromise"):
            desk.revoke("ada", reason=reason)


def test_there_is_nothing_to_revoke_without_an_authority(desk: Desk) -> None:
    with pytest.raises(CertificateError, match="No such file or directory"):
        desk.revoke("ada")
    files.make_folder(desk.directory)
    with pytest.raises(CertificateError, match="no client certificate was ever issued here"):
        desk.revoke("ada")
    assert desk.files() == {".lock"}


def test_a_serial_number_that_no_list_has_is_revoked_all_the_same(desk: Desk) -> None:
    desk.ensure()
    (revoked,) = desk.revoke(serial="4D:2A")
    assert (revoked.serial, revoked.name) == ("4D2A", UNKNOWN_NAME)
    assert desk.revoked == {"4D2A"}
    assert "It is revoked nevertheless." in desk.sentences[-1]
    assert desk.listed == [("4D2A", "?", True)]


# --- the signed list, and when it is signed anew ---------------------------------------------------------


def test_without_an_authority_there_is_nothing_to_refresh(desk: Desk) -> None:
    assert desk.refresh() is None
    files.make_folder(desk.directory)
    assert desk.refresh() is None
    assert desk.files() == set()


def test_an_authority_that_goes_while_the_lock_is_waited_for_is_none(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.ensure()
    real = files.locked

    def locked(directory: Path, *arguments: Any) -> Any:
        for path in directory.glob("client-ca.*"):
            path.unlink()
        return real(directory, *arguments)

    monkeypatch.setattr(files, "locked", locked)
    assert desk.refresh() is None


def test_the_signed_list_is_there_from_the_start(desk: Desk) -> None:
    assert desk.ensure() == (desk.path("client-ca.crt"), desk.path("client-ca.crl"))
    assert list(desk.crl) == []
    assert desk.crl.last_update_utc == WHEN - timedelta(hours=1)
    assert desk.crl.next_update_utc == WHEN + 365 * DAY
    assert desk.crl_number == int(WHEN.timestamp())
    again = {name: desk.path(name).stat().st_ino for name in desk.files()}
    desk.ensure()
    assert {name: desk.path(name).stat().st_ino for name in desk.files()} == again


def test_it_is_signed_again_after_a_month(desk: Desk) -> None:
    desk.ensure()
    first = desk.crl
    due = desk.refresh()
    assert due == WHEN - timedelta(hours=1) + 30 * DAY
    desk.now = due - timedelta(seconds=1)
    assert desk.refresh() == due
    assert desk.crl == first
    desk.now = due
    assert desk.refresh() == due + 30 * DAY - timedelta(hours=1)
    assert desk.crl.next_update_utc == due + 365 * DAY
    assert desk.crl_number > first.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_the_numbers_rise_within_a_second_and_when_the_clock_is_set_back(desk: Desk) -> None:
    desk.issue("ada"), desk.issue("bob")
    desk.revoke("ada")
    number = desk.crl_number
    desk.revoke("bob")
    assert desk.crl_number == number + 1
    desk.now -= 10 * DAY
    desk.refresh()
    assert desk.crl_number == number + 2
    assert desk.crl.last_update_utc < desk.now
    assert len(desk.revoked) == 2


def test_a_signed_list_that_is_lost_or_damaged_is_made_again(desk: Desk, ec_key: Any) -> None:
    issued = desk.issue()
    desk.revoke("ada", reason="keyCompromise")
    path = desk.path("client-ca.crl")
    good = path.read_bytes()
    foreign = x509.CertificateRevocationListBuilder(desk.ca.subject, WHEN - DAY, WHEN + DAY)
    for damage in (
        None,
        b"",
        good[: len(good) // 2],
        pem(desk.ca),
        foreign.sign(ec_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
    ):
        path.unlink()
        if damage is not None:
            path.touch(0o600)
            path.write_bytes(damage)
        desk.sentences.clear()
        desk.refresh()
        assert desk.revoked == {issued.serial}
        assert len(desk.sentences) == (damage is not None)
        (entry,) = desk.crl
        assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == "keyCompromise"


def test_expired_certificates_leave_both_lists(desk: Desk) -> None:
    ada = desk.issue("ada")
    bob = desk.issue("bob", lifetime=365 * DAY)
    desk.revoke("ada"), desk.revoke("bob")
    desk.now = ada.not_after + 7 * DAY
    desk.refresh()
    assert desk.revoked == {ada.serial, bob.serial}
    desk.now += timedelta(seconds=1)
    desk.issue("carol")
    assert len(desk.listed) == 3  # until the next signed list is without it
    desk.now += 30 * DAY
    desk.refresh()
    assert desk.revoked == {bob.serial}
    desk.revoke("carol")
    assert [(name, revoked) for _, name, revoked in desk.listed] == [("bob", True), ("carol", True)]


def test_what_was_revoked_once_stays_so_when_an_old_list_is_put_back(desk: Desk) -> None:
    ada = desk.issue("ada")
    backup = desk.path("client-ca.issued").read_bytes()
    bob = desk.issue("bob")
    desk.revoke("ada", reason="keyCompromise"), desk.revoke("bob", reason="superseded")
    desk.path("client-ca.issued").write_bytes(backup)
    desk.now += 40 * DAY
    desk.refresh()
    assert desk.revoked == {ada.serial, bob.serial}
    desk.issue("carol")
    assert [(name, revoked) for _, name, revoked in desk.listed] == [
        ("ada", True),
        ("?", True),
        ("carol", False),
    ]
    assert {entry.reason for entry in client_ca.issued_clients(desk.directory)} == {
        "keyCompromise",
        "superseded",
        "",
    }


def test_a_lost_list_is_said_and_not_taken_for_an_empty_one(desk: Desk) -> None:
    ada = desk.issue("ada")
    desk.revoke("ada")
    path = desk.path("client-ca.issued")
    path.unlink()
    for act in (lambda: desk.issue("bob"), lambda: desk.revoke("ada")):
        with pytest.raises(
            CertificateError, match=r"client-ca\.issued: is missing.* create an empty file there"
        ):
            act()
    assert client_ca.issued_clients(desk.directory) == ()
    desk.now += 40 * DAY
    assert desk.refresh() == desk.now + DAY  # the signed list goes on with what it has
    assert desk.revoked == {ada.serial}
    assert "Until then" in desk.sentences[-1]
    path.touch(0o600)
    desk.issue("bob")
    assert [(name, revoked) for _, name, revoked in desk.listed] == [("?", True), ("bob", False)]


@pytest.mark.parametrize("damage", [b"damaged\n", None])
def test_with_both_lists_gone_nothing_is_signed(desk: Desk, damage: bytes | None) -> None:
    desk.issue("ada")
    desk.path("client-ca.crl").unlink()
    desk.path("client-ca.issued").unlink()
    if damage is not None:
        desk.path("client-ca.issued").touch(0o600)
        desk.path("client-ca.issued").write_bytes(damage)
    for act in (desk.refresh, desk.ensure):
        with pytest.raises(CertificateError, match=r"client-ca\.issued: is "):
            act()
    assert not desk.path("client-ca.crl").exists()


def test_the_list_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.issue("ada", lifetime=DAY)
    desk.issue("bob")
    monkeypatch.setattr(client_ca, "MAX_LIST_BYTES", 350)
    with pytest.raises(CertificateError, match=r"client-ca\.issued: is full with 3 certificates"):
        desk.issue("carol")
    assert not desk.path("clients/carol.crt").exists()
    desk.revoke("ada"), desk.revoke("bob")
    desk.now += 31 * DAY  # ada's is over
    assert desk.issue("carol").name == "carol"


# --- the authority over the years, and its loss ----------------------------------------------------------


def test_the_authority_is_renewed_with_its_key_before_a_certificate_could_outlive_it(desk: Desk) -> None:
    old = desk.issue("ada", lifetime=1826 * DAY)
    first = desk.ca
    desk.now = first.not_valid_after_utc - 1826 * DAY
    desk.issue("bob", lifetime=1826 * DAY)
    assert desk.ca == first
    desk.now += timedelta(seconds=1)
    new = desk.issue("carol", lifetime=1826 * DAY)
    assert desk.ca != first
    assert (desk.ca.subject, desk.ca.public_key()) == (first.subject, first.public_key())
    assert desk.verify(new.certificate).endswith(": OK\n")
    desk.now = old.not_after - timedelta(seconds=1)
    desk.refresh()
    assert desk.verify(old.certificate).endswith(": OK\n")


def test_a_lost_certificate_of_the_authority_is_made_again(desk: Desk) -> None:
    issued = desk.issue()
    for damage in (None, b"damaged"):
        desk.path("client-ca.crt").unlink()
        if damage is not None:
            desk.path("client-ca.crt").touch(0o600)
            desk.path("client-ca.crt").write_bytes(damage)
        desk.refresh()
        assert desk.verify(issued.certificate).endswith(": OK\n")


def test_without_the_key_nothing_is_issued_or_revoked_and_the_signed_list_goes_on(desk: Desk) -> None:
    issued = desk.issue()
    desk.path("client-ca.key").unlink()
    for act in (lambda: desk.issue("bob"), lambda: desk.revoke("ada")):
        with pytest.raises(
            CertificateError, match=r"client-ca\.key: does not exist, so no client certificate can be issued"
        ):
            act()
    due = desk.refresh()
    assert due is not None
    desk.now = due
    assert desk.refresh() == due + DAY
    assert "could not be signed again" in desk.sentences[-1]
    assert desk.verify(issued.certificate).endswith(": OK\n")
    end = desk.crl.next_update_utc
    assert end is not None
    desk.now = end + timedelta(seconds=1)
    with pytest.raises(
        CertificateError, match=r"client-ca\.crl: must be signed again: .*client-ca\.key: does not"
    ):
        desk.refresh()
    desk.path("client-ca.crl").unlink()
    with pytest.raises(CertificateError, match="must be signed again"):
        desk.refresh()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (b"damaged", "contains no PEM key"),
        (pem_of_key(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (pem_of_key(ec.generate_private_key(ec.SECP256R1())), "does not belong to"),
    ],
)
def test_a_wrong_key_of_the_authority_is_said(desk: Desk, key: bytes, said: str) -> None:
    desk.issue()
    desk.path("client-ca.key").write_bytes(key)
    with pytest.raises(CertificateError, match=said) as caught:
        desk.issue("bob")
    assert "move all client-ca.* files away" in str(caught.value)


def test_with_neither_its_certificate_nor_a_good_key_there_is_no_authority(desk: Desk) -> None:
    desk.issue()
    desk.path("client-ca.crt").unlink()
    desk.path("client-ca.key").write_bytes(b"damaged")
    with pytest.raises(CertificateError, match="contains no PEM key"):
        desk.issue("bob")


@pytest.mark.parametrize("kind", ["foreign", "unreadable"])
def test_an_authority_that_was_not_created_here_is_never_used(desk: Desk, ec_key: Any, kind: str) -> None:
    files.make_folder(desk.directory)
    key = ec_key if kind == "foreign" else ed25519.Ed25519PrivateKey.generate()
    certificate = build(key, algorithm=hashes.SHA256() if kind == "foreign" else None)
    data = pem(certificate)
    if kind == "unreadable":  # a key of an algorithm that nobody knows
        changed = der(certificate).replace(b"\x06\x03\x2b\x65\x70", b"\x06\x03\x2b\x65\x7f")
        data = pem(x509.load_der_x509_certificate(changed))
    desk.path("client-ca.crt").touch(0o600)
    desk.path("client-ca.crt").write_bytes(data)
    with pytest.raises(
        CertificateError, match=r"was not created here and is never replaced.*tls\.client_ca_file"
    ):
        desk.ensure()
    assert desk.path("client-ca.crt").read_bytes() == data


def test_a_new_authority_puts_the_old_ones_signed_list_aside(desk: Desk) -> None:
    issued = desk.issue()
    desk.revoke("ada")
    desk.path("client-ca.crt").unlink()
    desk.path("client-ca.key").unlink()
    desk.ensure()
    assert desk.path("client-ca.crl.aside").exists()
    assert desk.revoked == {issued.serial}
    with pytest.raises(CertificateError, match="was not issued by"):
        desk.issue()


# --- files that are not safe -----------------------------------------------------------------------------


def test_what_others_could_change_or_read_is_not_used(desk: Desk) -> None:
    desk.issue()
    for name, mode in (("client-ca.key", 0o640), ("client-ca.issued", 0o622), ("client-ca.crl", 0o622)):
        desk.path(name).chmod(mode)
        with pytest.raises(CertificateError, match=rf"{name}: .*chmod"):
            desk.issue("bob")
        desk.path(name).chmod(0o600)
    desk.directory.chmod(0o755)
    for act in (lambda: desk.issue("bob"), lambda: desk.revoke("ada"), desk.refresh, desk.ensure):
        with pytest.raises(CertificateError, match="chmod 700"):
            act()


def test_wait_for_the_lock_is_reported(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ensure()
    tries = iter([BlockingIOError(), None])

    def flock(descriptor: int, how: int) -> None:
        error = next(tries)
        if error is not None:
            raise error

    monkeypatch.setattr(fcntl, "flock", flock)
    desk.refresh()
    assert (
        desk.sentences[-1]
        == f"Waiting for another process that is changing the certificates in {desk.directory}."
    )


def test_what_the_system_says_becomes_an_error_of_ours(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ensure()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_stage", full)
    with pytest.raises(CertificateError, match="No space left on device"):
        desk.issue()
    assert client_ca.issued_clients(desk.directory) == ()


# --- a crash at any moment -------------------------------------------------------------------------------


class Stopped(BaseException):
    """The process ends here; nothing of it runs on."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends everything at the step of that number: before a file is staged, or renamed into its place."""
    left = [-1]

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            step(*arguments)

        return run

    def set_left(count: int) -> None:
        left[0] = count

    monkeypatch.setattr(files, "_stage", counted(files._stage))
    monkeypatch.setattr(files, "_promote", counted(files._promote))
    yield set_left
    left[0] = -1


def acts(kind: str) -> tuple[Callable[[Desk], None], Callable[[Desk], object]]:
    """What was there before, and what is stopped in the middle."""
    prepare: dict[str, Callable[[Desk], None]] = {
        "first": lambda desk: None,
        "issue": lambda desk: desk.issue("bob") and None,
        "renew": lambda desk: desk.issue("ada") and None,
        "revoke": lambda desk: desk.issue("ada") and None,
    }
    act: dict[str, Callable[[Desk], object]] = {
        "first": lambda desk: desk.issue("ada"),
        "issue": lambda desk: desk.issue("ada"),
        "renew": lambda desk: desk.issue("ada", renew=True),
        "revoke": lambda desk: desk.revoke("ada"),
    }
    return prepare[kind], act[kind]


@pytest.mark.parametrize(("kind", "steps"), [("first", 14), ("issue", 6), ("renew", 4), ("revoke", 4)])
def test_a_crash_at_any_step_leaves_nothing_that_cannot_go_on(
    tmp_path: Path, stop_after: Callable[[int], None], kind: str, steps: int
) -> None:
    prepare, act = acts(kind)
    for step in range(steps + 1):
        desk = Desk(tmp_path / str(step))
        prepare(desk)
        stop_after(step)
        if step == steps:
            act(desk)  # so many steps it has, and no more
            break
        with pytest.raises(Stopped):
            act(desk)
        stop_after(-1)
        written = {path.name: path for path in desk.directory.rglob("ada.crt")}
        if "ada.crt" in written and kind != "revoke":  # whoever has a certificate is in the list
            serial = f"{x509.load_pem_x509_certificate(written['ada.crt'].read_bytes()).serial_number:X}"
            assert serial in [serial for serial, *_ in desk.listed]
        desk.refresh()
        desk.issue("ada", renew=True) if kind != "revoke" else desk.revoke("ada")
        certificate = x509.load_pem_x509_certificate(desk.path("clients/ada.crt").read_bytes())
        key = serialization.load_pem_private_key(desk.path("clients/ada.key").read_bytes(), None)
        assert key.public_key() == certificate.public_key()
        assert certificate.issuer == desk.ca.subject
        assert (f"{certificate.serial_number:X}" in desk.revoked) == (kind == "revoke")
        assert not [name for name in desk.files() if name.endswith((".new", ".aside"))]


def test_a_revocation_that_stopped_half_way_is_finished_by_the_next_refresh(
    desk: Desk, stop_after: Callable[[int], None]
) -> None:
    issued = desk.issue()
    stop_after(2)  # the list is in place, the signed one is not
    with pytest.raises(Stopped):
        desk.revoke("ada")
    stop_after(-1)
    assert desk.revoked == set()
    desk.refresh()
    assert desk.revoked == {issued.serial}


def test_a_whole_fleet_fits(desk: Desk) -> None:
    desk.ensure()
    count = 8_000
    fleet = [Issued(number + 1, f"device-{number:05}.fleet", WHEN + DAY) for number in range(count)]
    path = desk.path("client-ca.issued")
    path.write_bytes(render_list(fleet))
    desk.issue("ada")
    desk.revoke("ada")
    assert len(client_ca.issued_clients(desk.directory)) == count + 1


def test_the_folder_can_be_copied(desk: Desk, tmp_path: Path) -> None:
    issued = desk.issue()
    copy = Desk(tmp_path / "copy")
    shutil.copytree(desk.directory, copy.directory)
    copy.revoke("ada")
    assert copy.revoked == {issued.serial}
    assert desk.revoked == set()
