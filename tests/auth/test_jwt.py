"""Tests of tokens: which ones are accepted, and that every forged or mismatched one is refused."""

from __future__ import annotations

import hmac
import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from tests.auth.issuer import (
    AUDIENCE,
    ISSUER,
    RULES,
    WALL_S,
    claims,
    forged,
    jwk,
    key_set,
    part,
    private_key,
    public_pem,
    token,
)
from zcproto.auth.jwt import (
    KINDS,
    MAX_KEYS,
    MAX_TRIED,
    TokenRefused,
    check_claims,
    check_confirmation,
    check_token,
    read_json,
    read_keys,
    read_token,
)
from zcproto.config.model import ALGORITHMS


def accepted(text: str, *keys: dict[str, Any], rules: Any = RULES, now_s: float = WALL_S) -> dict[str, Any]:
    """Return the claims of a token after all checks. Raises TokenRefused."""
    found = read_token(text, rules.max_bytes)
    check_token(found, rules)
    found.verify(found.keys_of(read_keys(key_set(*(keys or (jwk("RS256"),))))))
    check_claims(found.claims, rules, now_s)
    return dict(found.claims)


# --- accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_token_of_each_allowed_algorithm_is_accepted(algorithm: str) -> None:
    assert accepted(token(algorithm), jwk(algorithm)) == claims()


@pytest.mark.parametrize(
    "changes",
    [
        {"header": {"typ": "at+jwt"}},
        {"header": {"typ": "application/at+JWT"}},
        {"header": {"typ": None}},
        {"header": {"jku": "https://evil.example", "x5u": "https://evil.example"}},
        {"aud": ["a", "other-name"]},
        {"exp": WALL_S - 29},
        {"exp": WALL_S + 0.5},
        {"nbf": WALL_S + 29},
        {"iat": None},
    ],
)
def test_token_with_usual_variations_is_accepted(changes: dict[str, Any]) -> None:
    assert accepted(token(**changes))["sub"] == "ada"


def test_token_without_key_id_needs_a_single_key() -> None:
    keys = [jwk("RS256", "a"), jwk("ES256", "b")]
    assert accepted(token("ES256", kid=None), *keys)
    with pytest.raises(TokenRefused, match="no key of the issuer"):
        accepted(token(kid=None), *keys, jwk("RS256", "c", 1))


def test_keys_with_the_same_id_are_tried_in_turn() -> None:
    keys = [jwk("RS256", number=number % 2) for number in range(MAX_TRIED)]
    assert accepted(token(number=1), *keys)
    others = [jwk("RS256", number=0) for _ in range(MAX_TRIED)]
    with pytest.raises(TokenRefused, match="signature"):
        accepted(token(number=1), *others, jwk("RS256", number=1))


def test_algorithms_of_the_configuration_are_those_that_can_be_verified() -> None:
    assert set(ALGORITHMS) == set(KINDS)


# --- forged or mismatched ------------------------------------------------------------------------------------

SIGNED = token()
HEADER, PAYLOAD, SIGNATURE = SIGNED.split(".")
EVIL = rsa.generate_private_key(65_537, 2048)


def hs256(secret: bytes, header: dict[str, Any] | None = None) -> str:
    used = {"alg": "HS256", "kid": "one", "typ": "JWT", **(header or {})}
    return forged(used, claims(), lambda signed: hmac.digest(secret, signed, sha256))


HEADER_JSON = b'{"alg":"RS256","kid":"one","typ":"JWT"}'


def signed(header: bytes, payload: bytes) -> str:
    """Return a token of any bytes that the provider has signed."""
    algorithm = jwt.algorithms.get_default_algorithms()["RS256"]
    return forged(header, payload, lambda data: algorithm.sign(data, private_key("RSA")))


def by_attacker(**header: Any) -> str:
    return jwt.encode(claims(), EVIL, "RS256", headers={"kid": "one", **header})


def evil_jwk() -> dict[str, Any]:
    found: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(EVIL.public_key(), as_dict=True)
    return {**found, "kid": "one"}


FORGED = {
    "algorithm confusion: HS256 with the public key": hs256(public_pem()),
    "algorithm confusion: HS256 with the key set": hs256(key_set(jwk("RS256"))),
    "none": forged({"alg": "none", "kid": "one"}, claims(), lambda signed: b"x"),
    "none without a signature": f"{part({'alg': 'none'})}.{PAYLOAD}.",
    "None in capitals": forged({"alg": "NONE"}, claims()),
    "algorithm that is not allowed": token("ES384"),
    "algorithm of another kind of key": forged({"alg": "ES256", "kid": "one"}, claims()),
    "other algorithm than that of the key": jwt.encode(
        claims(), private_key("RSA"), "PS256", headers={"kid": "one"}
    ),
    "no algorithm": forged({"kid": "one"}, claims()),
    "algorithm is a list": forged({"alg": ["RS256"], "kid": "one"}, claims()),
    "signed by another key": by_attacker(),
    "signed by another key, in jwk": by_attacker(jwk=evil_jwk()),
    "signed by another key, in jku": by_attacker(jku="https://evil.example/keys"),
    "signed by another key, in x5u and x5c": by_attacker(x5u="https://evil.example", x5c=["AAAA"]),
    "unknown kid": token(kid="two"),
    "kid with a path": token(kid="../../../../dev/null"),
    "kid with SQL": token(kid="one' UNION SELECT 'secret"),
    "kid with a URL": token(kid="https://evil.example/keys"),
    "long kid": token(kid="k" * 257),
    "kid is a number": forged({"alg": "RS256", "kid": 1}, claims()),
    "empty signature": f"{HEADER}.{PAYLOAD}.",
    "changed payload": f"{HEADER}.{part(claims(sub='root'))}.{SIGNATURE}",
    "changed header": f"{part({'alg': 'RS256', 'kid': 'one', 'typ': 'JWT', 'x': 1})}.{PAYLOAD}.{SIGNATURE}",
    "truncated": SIGNED[:-1],
    "truncated by a part": f"{HEADER}.{PAYLOAD}",
    "with a part more": f"{SIGNED}.{SIGNATURE}",
    "with padding": f"{SIGNED}==",
    "with spaces": f" {SIGNED}",
    "with a line break": f"{SIGNED}\n",
    "in the other alphabet": f"{HEADER}.{PAYLOAD}.{SIGNATURE[:-4]}+/+/",
    "not in the one form of base64": f"{HEADER}.{PAYLOAD}.{SIGNATURE[:-1]}{'B' if SIGNATURE[-1] == 'A' else 'A'}",
    "oversized": token(groups=["g" * 100] * 100),
    "wrong audience": token(aud="another"),
    "no audience": token(aud=None),
    "audience is an object": token(aud={AUDIENCE: True}),
    "audience of numbers": token(aud=[1, 2]),
    "wrong issuer": token(iss="https://evil.example"),
    "issuer with a slash": token(iss=f"{ISSUER}/"),
    "no issuer": token(iss=None),
    "expired": token(exp=WALL_S - 31),
    "no expiry": token(exp=None),
    "expiry is a text": forged({"alg": "RS256", "kid": "one"}, claims(exp="4102444800")),
    "not yet valid": token(nbf=WALL_S + 31),
    "issued in the future": token(iat=WALL_S + 31),
    "another type": token(header={"typ": "logout+jwt"}),
    "type is a number": forged({"alg": "RS256", "kid": "one", "typ": 1}, claims()),
    "critical extension": token(header={"crit": ["exp"]}),
    "payload that is not encoded": token(header={"b64": False}),
    "payload that is said to be not encoded": signed(
        b'{"alg":"RS256","kid":"one","b64":false}', json.dumps(claims()).encode()
    ),
    "repeated claim": forged({"alg": "RS256", "kid": "one"}, b'{"sub":"ada","sub":"root"}'),
    "repeated header": forged(b'{"alg":"RS256","alg":"none"}', claims()),
    "payload is a list": forged({"alg": "RS256", "kid": "one"}, [1]),
    "nested payload": forged({"alg": "RS256"}, b"[" * 3000),
    "NaN": forged({"alg": "RS256"}, b'{"exp": NaN}'),
    "not UTF-8": forged({"alg": "RS256"}, b'{"\xff": 1}'),
    **{
        f"{what} in {name}": signed(header, payload)
        for name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        for what, header, payload in (
            ("payload", HEADER_JSON, json.dumps(claims()).encode(name)),
            ("header", HEADER_JSON.decode().encode(name), json.dumps(claims()).encode()),
        )
    },
    "surrogate in UTF-8": signed(HEADER_JSON, json.dumps(claims()).encode() + b"\xed\xa0\x80"),
    "encrypted": "a.b.c.d.e",
    "empty": "",
    "dots": "..",
}


@pytest.mark.parametrize("header", [HEADER_JSON, b'{"alg":"RS256","kid":"one","b64":true}'])
def test_signed_token_of_usual_bytes_is_accepted(header: bytes) -> None:
    assert accepted(signed(header, json.dumps(claims()).encode())) == claims()


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_forged_or_mismatched_token_is_refused(text: str) -> None:
    with pytest.raises(TokenRefused) as refused:
        accepted(text)
    reason = str(refused.value)
    parts = {each for each in text.split(".") if len(each) > 8}
    assert not any(each in reason for each in parts)
    assert "evil" not in reason
    assert "root" not in reason


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", [True, "soon", [], {}, 1e400, float("nan"), 10**400])
def test_malformed_time_is_refused(name: str, value: object) -> None:
    with pytest.raises(TokenRefused, match="malformed time"):
        check_claims({**claims(), name: value}, RULES, WALL_S)


@pytest.mark.parametrize("signature", ["AB", "A", "AA=", "A+", ""])
def test_base64url_has_one_form(signature: str) -> None:
    assert read_token("eyJhbGciOiJSUzI1NiJ9.e30.AA", 100).signature == b"\0"
    with pytest.raises(TokenRefused, match="one form"):
        read_token(f"eyJhbGciOiJSUzI1NiJ9.e30.{signature}", 100)


def test_types_and_algorithms_are_those_of_the_rules() -> None:
    strict = replace(RULES, types=frozenset({"at+jwt"}), algorithms=frozenset({"ES256"}))
    assert accepted(token("ES256", header={"typ": "at+jwt"}), jwk("ES256"), rules=strict)
    with pytest.raises(TokenRefused, match="another type"):
        accepted(token("ES256"), jwk("ES256"), rules=strict)
    with pytest.raises(TokenRefused, match="algorithm is not allowed"):
        accepted(token(header={"typ": "at+jwt"}), rules=strict)


@given(text=st.text(max_size=100))
def test_any_text_is_a_token_or_refused(text: str) -> None:
    with pytest.raises(TokenRefused):
        accepted(text)


@given(data=st.data())
def test_any_change_of_a_token_is_refused(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(SIGNED) - 1))
    changed = data.draw(st.characters(codec="ascii").filter(lambda each: each != SIGNED[place]))
    with pytest.raises(TokenRefused):
        accepted(SIGNED[:place] + changed + SIGNED[place + 1 :])


# --- bound to a certificate ----------------------------------------------------------------------------------


def test_token_bound_to_the_certificate_of_the_client_is_accepted_there_only() -> None:
    digest = part(sha256(b"certificate").digest())
    bound = claims(cnf={"x5t#S256": digest})
    assert check_confirmation(bound, b"certificate")
    assert not check_confirmation(claims(), b"certificate")
    for certificate in (None, b"another"):
        with pytest.raises(TokenRefused, match="another client certificate"):
            check_confirmation(bound, certificate)


@pytest.mark.parametrize(
    "confirmation", [{"jkt": "x"}, {}, None, "x", {"x5t#S256": "x", "jkt": "x"}, {"jwk": {}}]
)
def test_token_bound_to_what_cannot_be_proved_is_refused(confirmation: object) -> None:
    with pytest.raises(TokenRefused, match="cannot prove here"):
        check_confirmation({"cnf": confirmation}, b"certificate")


# --- key sets ------------------------------------------------------------------------------------------------


def test_key_set_has_the_usable_keys_only() -> None:
    private = jwt.algorithms.RSAAlgorithm.to_jwk(private_key("RSA"), as_dict=True)
    short = jwt.algorithms.RSAAlgorithm.to_jwk(
        rsa.generate_private_key(65_537, 1024).public_key(), as_dict=True
    )
    unusable = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "a", "alg": "HS256"},
        jwk("RS256", use="enc"),
        jwk("RS256", key_ops=["sign"]),
        jwk("RS256", key_ops="verify"),
        jwk("RS256", alg="RSA-OAEP"),
        jwk("RS256", alg="ES256"),
        jwk("RS256", kid=5),
        jwk("RS256", kid="k" * 257),
        jwk("RS256", n=None),
        jwk("RS256", n="!"),
        jwk("RS256", n=5),
        jwk("RS256", e="AA"),
        jwk("ES256", crv="secp256k1"),
        jwk("ES256", crv=None),
        jwk("ES256", crv=["P-256"]),
        jwk("ES256", x="AA"),
        jwk("ES256", y=jwk("ES256")["x"]),
        jwk("EdDSA", x="AA"),
        jwk("EdDSA", crv="X25519"),
        jwk("RS256", kty=["RSA"]),
        {**short, "kid": "short"},
        5,
        {},
    ]
    found = read_keys(
        json.dumps(
            {"keys": [*unusable, jwk("RS256"), {**private, "kid": "p", "key_ops": ["verify"]}]}
        ).encode()
    )
    assert [(key.kid, key.kind, key.algorithm) for key in found] == [
        ("one", ("RSA", ""), "RS256"),
        ("p", ("RSA", ""), ""),
    ]
    assert not hasattr(found[1].key, "private_numbers")
    with pytest.raises(ValueError, match="no key for signatures"):
        read_keys(json.dumps({"keys": unusable}).encode())


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [], "keys": []}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_malformed_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - messages differ
        read_keys(document)


def test_large_key_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 keys"):
        read_keys(key_set(*[jwk("ES256", f"k{number}") for number in range(MAX_KEYS + 1)]))


def test_json_is_an_object_without_repeated_names() -> None:
    assert read_json(b'{"a": [{"b": 1}]}') == {"a": [{"b": 1}]}
    for data in (b'{"a": {"b": 1, "b": 2}}', b"5", b'{"a": Infinity}', b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(ValueError):  # noqa: PT011 - messages differ
            read_json(data)
