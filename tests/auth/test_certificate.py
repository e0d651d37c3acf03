"""Client certificates against the file of users, which may change at any time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.auth.helpers import drive, identified, write
from zcproto.auth import (
    ApiKeyAuthenticator,
    CertificateAuthenticator,
    Channel,
    CurrentUsers,
    Identity,
    Login,
    Throttle,
    UserFile,
)
from zcproto.auth.certificate import certificate_key
from zcproto.errors import CertificateError, ConfigError, InvalidArgument, ResourceExhausted, Unauthenticated

ADDRESS, ELSEWHERE = "192.0.2.1", "198.51.100.7"
NOW = 50.0


def user_of(certificate: bytes) -> str:
    """Stands for what reads certificates: here the name is all there is."""
    if certificate == b"unreadable":
        raise CertificateError("the client's certificate cannot be read")
    return certificate.decode()


def key_of(certificate: bytes) -> str:
    """Stands for what hashes keys."""
    return f"tls:{certificate.decode()}"


class Door:
    """The scheme with its users, and what it reported."""

    def __init__(self, path: Path) -> None:
        self.file = UserFile(path)
        self.file.add("ada")
        self.file.add("root", operator=True)
        self.faults: list[ConfigError] = []
        self.refused: list[tuple[str, str]] = []
        self.authenticator = CertificateAuthenticator(
            CurrentUsers(self.file, on_fault=self.faults.append),
            user_of,
            key_of=key_of,
            on_refused=lambda reason, address: self.refused.append((reason, address)),
        )
        self.login = Login([self.authenticator], Throttle())

    def ask(
        self, certificate: bytes | None, address: str = ADDRESS, now: float = NOW, **fields: Any
    ) -> Identity:
        return drive(
            identified(self.login, {"scheme": "tls", **fields}, address, now, Channel(lambda: certificate))
        )


@pytest.fixture
def door(path: Path) -> Door:
    return Door(path)


@pytest.mark.parametrize("fields", [{}, {"user": "ada"}, {"user": None}, {"client": "zc/1"}])
def test_the_certificate_names_the_user(door: Door, fields: dict[str, Any]) -> None:
    assert door.ask(b"ada", **fields) == Identity("ada", operator=False, key="tls:ada")
    assert door.refused == []


def test_operators_are_known_by_the_file(door: Door) -> None:
    assert door.ask(b"root") == Identity("root", operator=True, key="tls:root")


@pytest.mark.parametrize(
    ("certificate", "fields", "reason"),
    [
        (None, {}, "the client has shown no certificate"),
        (None, {"user": "ada"}, "the client has shown no certificate"),
        (b"unreadable", {}, "the client's certificate cannot be read"),
        (b"", {}, "the client's certificate names no user of 1 to 128 characters"),
        (b"a" * 129, {}, "the client's certificate names no user of 1 to 128 characters"),
        (b"bob", {}, "the client's certificate names 'bob', who is no user here"),
        (b"Ada", {}, "the client's certificate names 'Ada', who is no user here"),
        (b"bob", {"user": "ada"}, "the client's certificate names 'bob', who is no user here"),
        (b"ada", {"user": "root"}, "the client's certificate names 'ada', and the client means another"),
        (
            b"ada",
            {"user": "nobody"},
            "the client's certificate names 'ada', and the client means another",
        ),
    ],
)
def test_everyone_else_gets_one_answer_and_the_operator_the_reason(
    door: Door, certificate: bytes | None, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        door.ask(certificate, **fields)
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"
    assert caught.value.details == {}
    assert door.refused == [(reason, ADDRESS)]


def test_a_login_without_word_of_a_certificate_has_none(door: Door) -> None:
    with pytest.raises(Unauthenticated):
        drive(identified(door.login, {"scheme": "tls"}, ADDRESS, NOW))
    assert drive(door.authenticator.authenticate({"scheme": "tls"}, ADDRESS)) is None


def test_the_operator_need_not_be_told(path: Path) -> None:
    file = UserFile(path)
    file.load()
    authenticator = CertificateAuthenticator(CurrentUsers(file, on_fault=pytest.fail), user_of, key_of=key_of)
    assert drive(authenticator.authenticate({"scheme": "tls"}, ADDRESS, Channel(lambda: b"ada"))) is None


@pytest.mark.parametrize("user", [5, b"ada", ["ada"], "", "x" * 129])
def test_a_bad_user_field_is_named_before_the_certificate_is_looked_at(door: Door, user: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^INVALID_ARGUMENT: user: the scheme tls"):
        door.ask(b"ada", user=user)
    assert door.refused == []


@pytest.mark.parametrize("field", ["key", "device", "signature"])
def test_other_fields_are_refused(door: Door, field: str) -> None:
    with pytest.raises(InvalidArgument, match="takes user, and nothing else"):
        door.ask(b"ada", **{field: "secret"})


async def test_users_come_and_go_with_their_file(door: Door, path: Path) -> None:
    def ask() -> Any:
        return identified(door.login, {"scheme": "tls"}, ADDRESS, NOW, Channel(lambda: b"ada"))

    write(path, "")
    with pytest.raises(Unauthenticated):
        await ask()
    UserFile(path).add("ada")
    assert await ask() == Identity("ada", key="tls:ada")
    write(path, "nonsense")
    for _ in range(2):
        assert await ask() == Identity("ada", key="tls:ada")
    assert len(door.faults) == 1


async def test_two_schemes_can_share_the_users(path: Path) -> None:
    file = UserFile(path)
    key = file.add("ada")
    faults: list[ConfigError] = []
    by_key = ApiKeyAuthenticator(file, on_fault=faults.append)
    login = Login([by_key, CertificateAuthenticator(by_key.users, user_of, key_of=key_of)], Throttle())
    write(path, "nonsense")
    by_certificate = await identified(login, {"scheme": "tls"}, ADDRESS, NOW, Channel(lambda: b"ada"))
    by_api_key = await identified(login, {"scheme": "api_key", "user": "ada", "key": key}, ADDRESS, NOW)
    assert (by_certificate.user, by_api_key) == ("ada", Identity("ada"))
    assert len(faults) == 1


# What the session is bound to


def test_it_is_bound_to_the_public_key_of_the_certificate(ca: trustme.CA) -> None:
    for _ in range(2):
        pem = ca.issue_cert("ada").cert_chain_pems[0].bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        info = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        key = certificate_key(certificate.public_bytes(Encoding.DER))
        assert key == f"tls:{hashlib.sha256(info).hexdigest()}"


def test_a_certificate_whose_key_cannot_be_read_opens_nothing(door: Door) -> None:
    authenticator = CertificateAuthenticator(
        CurrentUsers(door.file, on_fault=pytest.fail),
        user_of,
        on_refused=lambda reason, address: door.refused.append((reason, address)),
    )
    assert drive(authenticator.authenticate({"scheme": "tls"}, ADDRESS, Channel(lambda: b"ada"))) is None
    assert door.refused == [("the client's certificate has a key that cannot be read", ADDRESS)]


# Throttling


def fail(door: Door, certificate: bytes | None, **options: Any) -> None:
    with pytest.raises(Unauthenticated):
        door.ask(certificate, **options)


def test_failures_are_counted_for_the_user_whom_the_certificate_names(door: Door) -> None:
    for _ in range(5):
        fail(door, b"ada", user="root")
    with pytest.raises(ResourceExhausted):
        door.ask(b"ada", user="root")
    with pytest.raises(ResourceExhausted):
        door.ask(b"ada")
    assert door.ask(b"root") == Identity("root", operator=True, key="tls:root")
    assert door.ask(b"ada", now=NOW + 1.0) == Identity("ada", key="tls:ada")


def test_who_shows_no_certificate_shuts_nobody_out_who_is_at_home_there(door: Door) -> None:
    assert door.ask(b"ada") == Identity("ada", key="tls:ada")
    for _ in range(5):
        fail(door, None)
    with pytest.raises(ResourceExhausted):
        door.ask(None)
    assert door.ask(b"ada") == Identity("ada", key="tls:ada")
    fail(door, None, address=ELSEWHERE)


def test_whoever_is_known_as_nobody_gains_nothing(door: Door) -> None:
    """Logins without a certificate never succeed, so no address is at home with them."""
    for second in range(30):
        try:
            door.ask(None, now=NOW + second / 100)
        except Unauthenticated:
            continue
        except ResourceExhausted:
            break
    with pytest.raises(ResourceExhausted) as caught:
        door.ask(None, now=NOW + 1)
    assert caught.value.details["retry_after_ms"] > 0
