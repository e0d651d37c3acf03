"""Client certificates, checked against a file of users that may change at any time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.auth.helpers import FakeLog, directory, identified, write
from tests.helpers import drive
from zcproto.auth import Identity, Login, Throttle, UserFile
from zcproto.auth.identity import Channel
from zcproto.auth.schemes import ApiKeyAuthenticator, CertificateAuthenticator, certificate_key
from zcproto.common.roles import OPERATORS
from zcproto.errors import CertificateError, InvalidArgument, ResourceExhausted, Unauthenticated

ADDRESS, ELSEWHERE = "192.0.2.1", "198.51.100.7"
NOW = 50.0


def user_of(certificate: bytes) -> str:
    """Fake a certificate reader: the certificate is the name."""
    if certificate == b"unreadable":
        raise CertificateError("the client's certificate cannot be read")
    return certificate.decode()


def key_of(certificate: bytes) -> str:
    """Fake the digest of a certificate's key."""
    return f"tls:{certificate.decode()}"


class Scheme:
    """The scheme with its users, and its reports."""

    def __init__(self, path: Path) -> None:
        self.file = UserFile(path)
        self.file.add("ada")
        self.file.add("root", roles=OPERATORS)
        self.refused: list[tuple[str, str]] = []
        self.authenticator = CertificateAuthenticator(
            directory(self.file),
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
def scheme(path: Path) -> Scheme:
    return Scheme(path)


@pytest.mark.parametrize("fields", [{}, {"user": "ada"}, {"user": None}, {"client": "zc/1"}])
def test_certificate_names_the_user(scheme: Scheme, fields: dict[str, Any]) -> None:
    assert scheme.ask(b"ada", **fields) == Identity("ada", key="tls:ada")
    assert scheme.refused == []


def test_operator_role_comes_from_the_file(scheme: Scheme) -> None:
    assert scheme.ask(b"root") == Identity("root", roles=OPERATORS, key="tls:root")


@pytest.mark.parametrize(
    ("certificate", "fields", "reason"),
    [
        (None, {}, "the client sent no certificate"),
        (None, {"user": "ada"}, "the client sent no certificate"),
        (b"unreadable", {}, "the client's certificate cannot be read"),
        (b"", {}, "the client's certificate names no user of 1 to 128 characters"),
        (b"a" * 129, {}, "the client's certificate names no user of 1 to 128 characters"),
        (b"bob", {}, "the client's certificate names 'bob', who is not a user here"),
        (b"Ada", {}, "the client's certificate names 'Ada', who is not a user here"),
        (b"bob", {"user": "ada"}, "the client's certificate names 'bob', who is not a user here"),
        (
            b"ada",
            {"user": "root"},
            "the client's certificate names 'ada', but the client expects another user",
        ),
        (
            b"ada",
            {"user": "unknown"},
            "the client's certificate names 'ada', but the client expects another user",
        ),
    ],
)
def test_all_failed_logins_get_one_answer_and_the_operator_the_reason(
    scheme: Scheme, certificate: bytes | None, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        scheme.ask(certificate, **fields)
    assert caught.value.message == "the login was not accepted; check the name, and the key or certificate"
    assert caught.value.details == {}
    assert scheme.refused == [(reason, ADDRESS)]


def test_login_without_a_channel_has_no_certificate(scheme: Scheme) -> None:
    with pytest.raises(Unauthenticated):
        drive(identified(scheme.login, {"scheme": "tls"}, ADDRESS, NOW))
    assert drive(scheme.authenticator.authenticate({"scheme": "tls"}, ADDRESS)) is None


def test_refusal_callback_is_optional(path: Path) -> None:
    file = UserFile(path)
    file.load()
    authenticator = CertificateAuthenticator(directory(file), user_of, key_of=key_of)
    assert drive(authenticator.authenticate({"scheme": "tls"}, ADDRESS, Channel(lambda: b"ada"))) is None


@pytest.mark.parametrize("user", [5, b"ada", ["ada"], "", "x" * 129])
def test_invalid_user_field_is_named_before_the_certificate_is_read(scheme: Scheme, user: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^INVALID_ARGUMENT: user: the scheme tls"):
        scheme.ask(b"ada", user=user)
    assert scheme.refused == []


@pytest.mark.parametrize("field", ["key", "device", "signature"])
def test_unknown_fields_are_refused(scheme: Scheme, field: str) -> None:
    with pytest.raises(InvalidArgument, match="takes user, and nothing else"):
        scheme.ask(b"ada", **{field: "secret"})


async def test_users_follow_changes_of_their_file(scheme: Scheme, path: Path, log: FakeLog) -> None:
    def ask() -> Any:
        return identified(scheme.login, {"scheme": "tls"}, ADDRESS, NOW, Channel(lambda: b"ada"))

    write(path, "")
    with pytest.raises(Unauthenticated):
        await ask()
    UserFile(path).add("ada")
    assert await ask() == Identity("ada", key="tls:ada")
    write(path, "nonsense")
    for _ in range(2):
        assert await ask() == Identity("ada", key="tls:ada")
    assert log.events == ["users.changed", "users.changed", "users.unreadable"]


async def test_two_schemes_can_share_the_users(path: Path, log: FakeLog) -> None:
    file = UserFile(path)
    key = file.add("ada")
    users = directory(file)
    authenticators = [ApiKeyAuthenticator(users), CertificateAuthenticator(users, user_of, key_of=key_of)]
    login = Login(authenticators, Throttle())
    write(path, "nonsense")
    by_certificate = await identified(login, {"scheme": "tls"}, ADDRESS, NOW, Channel(lambda: b"ada"))
    by_api_key = await identified(login, {"scheme": "api_key", "user": "ada", "key": key}, ADDRESS, NOW)
    assert (by_certificate.user, by_api_key) == ("ada", Identity("ada"))
    assert log.events == ["users.unreadable"]


# What the session is bound to


def test_session_is_bound_to_the_public_key_of_the_certificate(ca: trustme.CA) -> None:
    for _ in range(2):
        pem = ca.issue_cert("ada").cert_chain_pems[0].bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        info = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        key = certificate_key(certificate.public_bytes(Encoding.DER))
        assert key == f"tls:{hashlib.sha256(info).hexdigest()}"


def test_certificate_with_unreadable_key_is_refused(scheme: Scheme) -> None:
    authenticator = CertificateAuthenticator(
        directory(scheme.file),
        user_of,
        on_refused=lambda reason, address: scheme.refused.append((reason, address)),
    )
    assert drive(authenticator.authenticate({"scheme": "tls"}, ADDRESS, Channel(lambda: b"ada"))) is None
    assert scheme.refused == [("the client's certificate has a key that cannot be read", ADDRESS)]


# Throttling


def fail(scheme: Scheme, certificate: bytes | None, **options: Any) -> None:
    with pytest.raises(Unauthenticated):
        scheme.ask(certificate, **options)


def test_failures_are_counted_for_the_user_of_the_certificate(scheme: Scheme) -> None:
    for _ in range(5):
        fail(scheme, b"ada", user="root")
    with pytest.raises(ResourceExhausted):
        scheme.ask(b"ada", user="root")
    with pytest.raises(ResourceExhausted):
        scheme.ask(b"ada")
    assert scheme.ask(b"root") == Identity("root", roles=OPERATORS, key="tls:root")
    assert scheme.ask(b"ada", now=NOW + 1.0) == Identity("ada", key="tls:ada")


def test_missing_certificate_does_not_throttle_known_users_at_the_address(scheme: Scheme) -> None:
    assert scheme.ask(b"ada") == Identity("ada", key="tls:ada")
    for _ in range(5):
        fail(scheme, None)
    with pytest.raises(ResourceExhausted):
        scheme.ask(None)
    assert scheme.ask(b"ada") == Identity("ada", key="tls:ada")
    fail(scheme, None, address=ELSEWHERE)


def test_certificate_without_a_user_is_refused_even_if_known(scheme: Scheme) -> None:
    """Logins without a certificate never succeed, so no address is at home with them."""
    for second in range(30):
        try:
            scheme.ask(None, now=NOW + second / 100)
        except Unauthenticated:
            continue
        except ResourceExhausted:
            break
    with pytest.raises(ResourceExhausted) as caught:
        scheme.ask(None, now=NOW + 1)
    assert caught.value.details["retry_after_ms"] > 0
