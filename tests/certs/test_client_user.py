"""Which user a client certificate names, however its SubjectAltName is made."""

from __future__ import annotations

import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.certs.support import DAY, NOW, build, der
from zcproto.auth import UserFile
from zcproto.auth.identity import MAX_USER
from zcproto.certs import client_ca, client_user
from zcproto.certs.client_user import certificate_id, revoked_in, user_of
from zcproto.certs.pair import read_lists
from zcproto.errors import CertificateError

SAN_OID = x509.ObjectIdentifier("2.5.29.17")
KEY = ec.generate_private_key(ec.SECP256R1())
LABEL = "a" * 63


def named(*entries: x509.GeneralName) -> bytes:
    return der(build(KEY, extensions=[x509.SubjectAlternativeName(entries)]))


def raw(tag: int, *values: bytes) -> bytes:
    """A certificate with entries of any bytes: 0x82 dNSName, 0x81 rfc822Name, 0x86 URI."""
    return der(build(KEY, extensions=[x509.UnrecognizedExtension(SAN_OID, general_names(tag, *values))]))


def general_names(tag: int, *values: bytes) -> bytes:
    return tlv(0x30, b"".join(tlv(tag, value) for value in values))


def tlv(tag: int, value: bytes) -> bytes:
    """One value in DER (X.690 section 8.1.3)."""
    size = len(value)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, *([size] if size < 0x80 else [0x80 | len(octets), *octets])]) + value


TAGS = {"email": 0x81, "dns": 0x82, "uri": 0x86}


@pytest.mark.parametrize(
    ("kind", "entry", "user"),
    [
        ("dns", "ada", "ada"),
        ("dns", "a", "a"),
        ("dns", "device-7.example.com", "device-7.example.com"),
        ("dns", "ADA.Example.COM", "ada.example.com"),
        ("dns", "xn--jrg-tna.example", "xn--jrg-tna.example"),
        ("dns", "7up", "7up"),
        ("dns", "1.2.3.a4", "1.2.3.a4"),
        ("dns", f"{LABEL}.{LABEL}", f"{LABEL}.{LABEL}"),
        ("email", "ada@example.com", "ada@example.com"),
        ("email", "Ada.L@EXAMPLE.com", "Ada.L@example.com"),
        ("email", "a+b_c'd@localhost", "a+b_c'd@localhost"),
        ("uri", "spiffe://example.org/agents/Ada_7", "spiffe://example.org/agents/Ada_7"),
        ("uri", "spiffe://example.org", "spiffe://example.org"),
        ("uri", "urn:uuid:f81d4fae-7dec-11d0", "urn:uuid:f81d4fae-7dec-11d0"),
        ("uri", "urn:dev:ops:32473-a/b", "urn:dev:ops:32473-a/b"),
    ],
)
def test_single_entry_names_the_user(kind: str, entry: str, user: str) -> None:
    assert user_of(raw(TAGS[kind], entry.encode()), kind) == user


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(
            ("dns", value)
            for value in (
                b"",
                b".",
                b"ada.",
                b".ada",
                b"a..b",
                b"*",
                b"*.example.com",
                b"-ada",
                b"ada-",
                b"a_b",
                b" ada",
                b"ada ",
                b"ada\n",
                b"ada\0",
                b"ada\0.example.com",
                b"ada\x1b[2J",
                b"ada,dns:bob",
                b"7",
                b"10.0.0.1",
                b"a.0x1f",
                b"a.0x",
                b"::1",
                b"a" * 64,
                b"a." * 63 + b"abc",
                b"a." * 15_000 + b"a",
                "jörg".encode(),
                "jörg".encode("latin-1"),
                "\u212aay".encode(),  # the Kelvin sign, whose lower case is k
                "ad\u0430".encode(),  # a letter that looks like an a
                b"\xff\xfe",
                b"\x80",
            )
        ),
        *(
            ("email", value)
            for value in (
                b"",
                b"@",
                b"ada",
                b"ada@",
                b"@example.com",
                b"a@b@example.com",
                b"ada@example.com.",
                b"ada@[10.0.0.1]",
                b"ada@10.0.0.1",
                b'"ada"@example.com',
                b".ada@example.com",
                b"ada.@example.com",
                b"a..b@example.com",
                b"ada@example.com\0.evil.example",
                b"ada\0@example.com",
                b"ada @example.com",
                b"<ada@example.com>",
                b"ada@ex\xc3\xa4mple.com",
                b"ada@example.com\r\nbcc: bob",
                b"a" * 117 + b"@example.com",
            )
        ),
        *(
            ("uri", value)
            for value in (
                b"",
                b"ada",
                b"SPIFFE://example.org/ada",
                b"spiffe://Example.org/ada",
                b"spiffe://example.org/",
                b"spiffe://example.org//ada",
                b"spiffe://example.org/a/../ada",
                b"spiffe://example.org/./ada",
                b"spiffe://example.org/ada/..",
                b"spiffe://example.org/%61da",
                b"spiffe://example.org/ada?x=1",
                b"spiffe://example.org/ada#x",
                b"spiffe://example.org:443/ada",
                b"spiffe://bob@example.org/ada",
                b"spiffe://example.org./ada",
                b"spiffe:///ada",
                b"spiffe://10.0.0.1/ada",
                b"spiffe://example.org/a b",
                b"spiffe://example.org/ada\n",
                b"spiffe://example.org/ada\0",
                b"spiffe://example.org/\xc3\xa4",
                b"mailto:ada@example.org",
                b"urn:UUID:f81d4fae",
                b"URN:uuid:f81d4fae",
                b"urn:x:f81d4fae",
                b"urn:uuid:",
                b"urn:uuid:%41",
                b"javascript:alert(1)",
                b"spiffe://example.org/" + b"a" * 128,
            )
        ),
    ],
)
def test_name_not_in_normal_form_is_refused(kind: str, value: bytes) -> None:
    with pytest.raises(CertificateError) as caught:
        user_of(raw(TAGS[kind], value), kind)
    shown = str(caught.value)
    assert not value.isascii() or f"entry of kind {kind} in the client's certificate is not" in shown
    assert shown.isprintable()
    assert len(shown) < 200
    assert len(value) < 4 or value.decode("latin-1") not in shown


@pytest.mark.parametrize("kind", ["dns", "email", "uri"])
def test_entries_of_other_kinds_are_ignored(kind: str) -> None:
    entries: dict[str, x509.GeneralName] = {
        "dns": x509.DNSName("ada"),
        "email": x509.RFC822Name("ada@example.com"),
        "uri": x509.UniformResourceIdentifier("urn:example:ada"),
    }
    assert user_of(named(*entries.values()), kind) == entries[kind].value
    others = [entry for other, entry in entries.items() if other != kind]
    with pytest.raises(CertificateError, match=f"has 0 .* of kind {kind}"):
        user_of(named(*others), kind)


@pytest.mark.parametrize(
    "entries",
    [
        [x509.DNSName("ada"), x509.DNSName("bob")],
        [x509.DNSName("ada"), x509.DNSName("ada")],
        [x509.DNSName("ada"), x509.RFC822Name("a@b.c"), x509.DNSName("*")],
        [x509.DNSName("ada")] * 1000,
    ],
)
def test_two_entries_name_no_user(entries: list[x509.GeneralName]) -> None:
    with pytest.raises(CertificateError, match=r"has [0-9]+ SubjectAltName entries"):
        user_of(named(*entries), "dns")


def test_subject_names_no_user() -> None:
    with pytest.raises(CertificateError, match="has 0 SubjectAltName entries"):
        user_of(der(build(KEY, subject="ada")), "dns")


@pytest.mark.parametrize(
    "extension",
    [
        b"",
        b"\x30",
        b"\x30\x05\x82\x03a",
        b"\x04\x00",
        tlv(0x30, tlv(0x9F, b"x")),  # a kind that does not exist
        tlv(0x30, tlv(0xA3, b"")),  # x400Address, which is not supported
        tlv(0x30, tlv(0x82, b"ada")) + b"more",
    ],
    ids=["nothing", "cut", "short", "no_sequence", "unknown", "x400", "trailing"],
)
def test_unparsable_extension_names_no_user(extension: bytes) -> None:
    certificate = der(build(KEY, extensions=[x509.UnrecognizedExtension(SAN_OID, extension)]))
    with pytest.raises(CertificateError):
        user_of(certificate, "dns")


def test_expiry_is_checked_if_a_time_is_given() -> None:
    certificate = named(x509.DNSName("ada"))
    end = NOW.replace(microsecond=0) + DAY
    assert user_of(certificate, "dns", end) == "ada"
    with pytest.raises(CertificateError, match="expired on 2026-06-02 12:30 UTC"):
        user_of(certificate, "dns", end + timedelta(seconds=1))


def test_malformed_certificate_names_no_user() -> None:
    good = named(x509.DNSName("ada"))
    for data in (b"", b"\x30", good[:-1], good[1:], good + b"x", bytes(100), b"\xff" * 65_536):
        with pytest.raises(CertificateError, match="cannot be parsed"):
            user_of(data, "dns")
    with pytest.raises(CertificateError, match="larger than 65536 bytes"):
        user_of(bytes(65_537), "dns")


@pytest.mark.parametrize(
    ("kind", "entry"),
    [
        ("dns", f"{LABEL}.{LABEL}"),
        ("email", f"{'a' * 60}!#$%&'*+/=?^_`{{|}}~-@{LABEL[:40]}.de"),
        ("uri", "x+y.z-1://a.b/!$&'()*+,;=:@-._~"),
    ],
)
def test_every_accepted_name_is_valid_in_the_users_file(tmp_path: Any, kind: str, entry: str) -> None:
    assert client_user.MAX_USER == MAX_USER
    user = user_of(raw(TAGS[kind], entry.encode()), kind)
    users = UserFile(tmp_path / "home" / "users.toml")
    users.add(user)
    users.load()
    assert list(users.entries) == [user]


# --- revocation lists


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ada", "bob"):
        client_ca.issue_client(tmp_path / "certs", name, lifetime=30 * DAY, now=NOW)
    client_ca.revoke_client(tmp_path / "certs", name="ada", now=NOW)
    return tmp_path / "certs"


def der_of(folder: Path, name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / "clients" / f"{name}.crt").read_text())


def test_crl_contains_the_revoked_certificate_only(folder: Path) -> None:
    revoked = revoked_in(read_lists(folder / "client-ca.crl"))
    assert [name for name in ("ada", "bob") if certificate_id(der_of(folder, name)) in revoked] == ["ada"]


def test_same_serial_number_of_another_issuer_is_another_certificate(folder: Path, tmp_path: Path) -> None:
    issuer, serial = certificate_id(der_of(folder, "ada"))
    assert (issuer + b"x", serial) not in revoked_in(read_lists(folder / "client-ca.crl"))


def test_several_crls_in_one_file_are_combined(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    client_ca.issue_client(other, "cleo", lifetime=30 * DAY, now=NOW)
    client_ca.revoke_client(other, name="cleo", now=NOW)
    both = folder / "both.crl"
    both.write_bytes((folder / "client-ca.crl").read_bytes() + (other / "client-ca.crl").read_bytes())
    both.chmod(0o600)
    assert len(revoked_in(read_lists(both))) == 2
    assert certificate_id(der_of(other, "cleo")) in revoked_in(read_lists(both))


def test_damaged_crl_is_an_error_that_names_the_file(folder: Path) -> None:
    path = folder / "client-ca.crl"
    path.write_bytes(b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")
    with pytest.raises(CertificateError, match=r"client-ca\.crl"):
        read_lists(path)
