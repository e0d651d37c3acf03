"""Tests of the scheme jwt: from a token to a user, roles and the end of the session."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tests.auth.issuer import ISSUER, RULES, WALL_S, Published, jwk, part, private_key, token
from zcproto.auth.identity import NO_CHANNEL, Channel, Identity
from zcproto.auth.login import ApplicationAuthenticator, Login
from zcproto.auth.oidc import JwtAuthenticator, TrustedIssuer, claim_at
from zcproto.auth.schemes import certificate_key
from zcproto.auth.throttle import Throttle
from zcproto.errors import InvalidArgument, ResourceExhausted, Unauthenticated, Unavailable

ADDRESS = "192.0.2.7"


class Scheme:
    """The scheme with its issuers, within a login."""

    def __init__(self, *issuers: TrustedIssuer) -> None:
        self.wall_s = float(WALL_S)
        self.refused: list[str] = []
        own = JwtAuthenticator(issuers, lambda: round(self.wall_s * 1000))
        wrapped = ApplicationAuthenticator(
            own,
            lambda: 8.0,
            lambda scheme, reason, address: self.refused.append(reason),
            lambda scheme, address: None,
        )
        self.login = Login([wrapped], Throttle())

    async def ask(self, text: object, channel: Channel = NO_CHANNEL, **more: Any) -> Identity:
        answer = self.login.open({"scheme": "jwt", "token": text, **more}, ADDRESS, 0.0, channel)
        assert not isinstance(answer, Identity)
        return await answer


@pytest.fixture
def published() -> Published:
    return Published()


async def test_token_opens_a_session_that_ends_with_it(published: Published) -> None:
    scheme = Scheme(published.trusted())
    ends_at = (WALL_S + 630) * 1000
    assert await scheme.ask(token()) == Identity("ada", frozenset({"billing"}), "", ends_at)
    assert await scheme.ask(token(), client="zc/1") == await scheme.ask(token())  # until it expires
    assert "jwt" in scheme.login.external


async def test_session_may_outlive_its_token_if_configured(published: Published) -> None:
    scheme = Scheme(published.trusted(may_outlive=True))
    assert (await scheme.ask(token())).ends_at is None


@pytest.mark.parametrize(
    ("claims", "roles"),
    [
        ({"roles": ["Finance", "x"]}, {"billing"}),
        ({"roles": "billing offline_access"}, {"billing"}),
        ({"roles": [5, None, ["billing"]]}, set()),
        ({"roles": []}, set()),
        ({"roles": None}, set()),
    ],
)
async def test_roles_are_the_configured_values_of_the_claim(
    published: Published, claims: dict[str, Any], roles: set[str]
) -> None:
    assert (await Scheme(published.trusted()).ask(token(**claims))).roles == roles


async def test_user_and_roles_come_from_the_configured_claims(published: Published) -> None:
    issuer = published.trusted(user_claim="email", user_prefix="oidc:", roles_claim="realm_access.roles")
    found = await Scheme(issuer).ask(token(email="ada@example.com", realm_access={"roles": ["billing"]}))
    assert (found.user, found.roles) == ("oidc:ada@example.com", {"billing"})


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": None},
        {"sub": ""},
        {"sub": 5},
        {"sub": "x" * 129},
        {"sub": "a\nb"},
        {"sub": " ada"},
        {"roles": 5},
        {"roles": {"billing": True}},
        {"cnf": {"jkt": "x"}},
        {"iss": "https://evil.example"},
        {"iss": 5},
    ],
)
async def test_token_with_unusable_claims_is_refused(published: Published, claims: dict[str, Any]) -> None:
    scheme = Scheme(published.trusted())
    with pytest.raises(Unauthenticated, match="the login was not accepted"):
        await scheme.ask(token(**claims))
    assert len(scheme.refused) == 1


async def test_prefix_alone_is_not_the_name_of_a_user(published: Published) -> None:
    with pytest.raises(Unauthenticated):
        await Scheme(published.trusted(user_prefix="oidc:")).ask(token(sub=""))


async def test_refused_tokens_get_one_answer_and_count_for_the_address(published: Published) -> None:
    scheme = Scheme(published.trusted())
    answers = set()
    for text in (token(aud="x"), token(exp=WALL_S - 60), "nonsense", token(iss=5), token(number=1)):
        with pytest.raises(Unauthenticated) as error:
            await scheme.ask(text)
        answers.add((str(error.value), str(error.value.details)))
    assert len(answers) == 1
    with pytest.raises(ResourceExhausted):
        await scheme.ask(token())
    assert published.fetches == 1


@pytest.mark.parametrize("fields", [{"token": 5}, {"token": None}, {"token": "a.b.c", "user": "root"}])
async def test_malformed_fields_are_the_mistake_of_the_client(
    published: Published, fields: dict[str, Any]
) -> None:
    scheme = Scheme(published.trusted())
    with pytest.raises(InvalidArgument):
        await scheme.ask(**{"text": fields.pop("token"), **fields})
    assert scheme.refused == []


async def test_unknown_key_soon_after_a_fetch_counts_no_failed_login(published: Published) -> None:
    scheme = Scheme(published.trusted())
    await scheme.ask(token())
    for _ in range(10):
        with pytest.raises(Unavailable) as error:
            await scheme.ask(token(kid="two"))
        assert error.value.details == {"retry_after_ms": 30_000}
    assert scheme.login.refused["jwt"] == 0
    await scheme.ask(token())


async def test_provider_that_is_down_counts_no_failed_login(published: Published) -> None:
    published.is_down = True
    scheme = Scheme(published.trusted())
    with pytest.raises(Unavailable):
        await scheme.ask(token())
    assert scheme.login.refused["jwt"] == 0


async def test_each_issuer_verifies_its_own_tokens_only(published: Published) -> None:
    other = Published(jwk("ES256", "one"))
    rules = replace(RULES, issuer="https://ci.example.com", audience=frozenset({"ci"}))
    scheme = Scheme(published.trusted(), other.trusted(rules, user_prefix="ci:"))
    assert (await scheme.ask(token())).user == "ada"
    of_ci = {"iss": "https://ci.example.com", "aud": "ci"}
    assert (await scheme.ask(token("ES256", **of_ci))).user == "ci:ada"
    for wrong in (token(**of_ci), token("ES256"), token("ES256", iss="https://ci.example.com")):
        with pytest.raises(Unauthenticated):
            await scheme.ask(wrong)


async def test_clock_skew_within_the_leeway_is_accepted(published: Published) -> None:
    scheme = Scheme(published.trusted())
    for skew, is_good in ((629, True), (-89, True), (630, False)):
        scheme.wall_s = WALL_S + skew
        if is_good:
            assert (await scheme.ask(token())).ends_at == (WALL_S + 630) * 1000
        else:
            with pytest.raises(Unauthenticated):
                await scheme.ask(token())
    scheme.wall_s = WALL_S - 91
    with pytest.raises(Unauthenticated):
        await scheme.ask(token())


def own_certificate() -> bytes:
    key = private_key("EC")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client")])
    day = datetime(2026, 1, 1, tzinfo=UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    dated = builder.serial_number(1).not_valid_before(day).not_valid_after(day + timedelta(days=1))
    return dated.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


async def test_session_of_a_token_bound_to_a_certificate_is_bound_too(published: Published) -> None:
    scheme, certificate = Scheme(published.trusted()), own_certificate()
    bound = token(cnf={"x5t#S256": part(sha256(certificate).digest())})
    channel = Channel(certificate=lambda: certificate)
    assert (await scheme.ask(bound, channel)).key == certificate_key(certificate)
    with pytest.raises(Unauthenticated):
        await scheme.ask(bound)
    odd = token(cnf={"x5t#S256": part(sha256(b"odd").digest())})
    with pytest.raises(Unauthenticated):
        await scheme.ask(odd, Channel(certificate=lambda: b"odd"))


def test_claim_is_found_by_its_name_or_by_a_path() -> None:
    claims = {"a.b": 1, "a": {"b": 2, "c": {"d": 3}}, "https://x/roles": 4}
    assert [claim_at(claims, name) for name in ("a.b", "a.c.d", "https://x/roles")] == [1, 3, 4]
    assert [claim_at(claims, name) for name in ("b", "a.x", "a.b.c", "a.c.d.e")] == [None] * 4


def test_issuer_is_the_configured_one() -> None:
    assert RULES.issuer == ISSUER
