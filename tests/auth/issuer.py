"""An identity provider in the test: it signs tokens, and publishes its keys without a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from zcproto.auth.jwt import IssuerKey, TokenRules, read_keys
from zcproto.auth.oidc import IssuerKeys, KeysFailed, TrustedIssuer

ISSUER, AUDIENCE = "https://login.example.com/staff", "zcproto"
WALL_S = 1_800_000_000
RULES = TokenRules(
    issuer=ISSUER,
    audience=frozenset({AUDIENCE, "other-name"}),
    algorithms=frozenset({"RS256", "PS256", "ES256", "EdDSA"}),
)


def private_key(kind: str, number: int = 0) -> Any:
    """Return one of any number of keys of a kind: RSA, EC, P-384 or OKP."""
    return _private_key(kind, number)


@cache
def _private_key(kind: str, number: int) -> Any:
    if kind == "RSA":
        return rsa.generate_private_key(65_537, 2048)
    if kind == "OKP":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP384R1() if kind == "P-384" else ec.SECP256R1())


KIND_OF = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC", "ES384": "P-384", "EdDSA": "OKP"}


def jwk(algorithm: str, kid: str = "one", number: int = 0, **members: Any) -> dict[str, Any]:
    """Return a public key of the provider as its key set has it."""
    key = private_key(KIND_OF[algorithm], number).public_key()
    found = get_default_algorithms()[algorithm].to_jwk(key, as_dict=True)
    found.pop("key_ops", None)
    return {**found, "kid": kid, "use": "sig", "alg": algorithm, **members}


def key_set(*keys: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of a valid token. A claim that is changed to None is left out."""
    found = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ada",
        "iat": WALL_S - 60,
        "exp": WALL_S + 600,
        "roles": ["billing", "operator"],
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def token(algorithm: str = "RS256", kid: str | None = "one", number: int = 0, **changes: Any) -> str:
    """Return a token that the provider has signed. `header` adds to its header."""
    header = {**({} if kid is None else {"kid": kid}), **changes.pop("header", {})}
    key = private_key(KIND_OF[algorithm], number)
    return jwt.api_jws.encode(json.dumps(claims(**changes)).encode(), key, algorithm, header)


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: object, payload: object, sign: Callable[[bytes], bytes] = lambda signed: b"x" * 64) -> str:
    signed = f"{part(header)}.{part(payload)}"
    return f"{signed}.{part(sign(signed.encode()))}"


def public_pem(kind: str = "RSA") -> bytes:
    public: bytes = (
        private_key(kind).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return public


class Published:
    """What the provider publishes, and what the server reports."""

    def __init__(self, *keys: Mapping[str, Any]) -> None:
        self.keys = [*(keys or (jwk("RS256"),))]
        self.is_down = False
        self.fetches = 0
        self.events: list[str] = []
        self.now = 1_000.0

    async def fetch(self) -> list[IssuerKey]:
        self.fetches += 1
        if self.is_down:
            raise KeysFailed("the provider is down")
        return read_keys(key_set(*self.keys))

    def loaded(self, keys: Sequence[IssuerKey]) -> None:
        self.events.append(f"loaded {' '.join(key.kid for key in keys)}")

    def failed(self, reason: str, can_serve: bool) -> None:
        self.events.append(f"{reason}; the last keys {'serve' if can_serve else 'do not serve'}")

    def issuer_keys(self) -> IssuerKeys:
        return IssuerKeys(
            fetch=self.fetch,
            now=lambda: self.now,
            events=self,
            refresh_s=3600.0,
            min_interval_s=30.0,
            stale_s=86_400.0,
        )

    def trusted(self, rules: TokenRules = RULES, **changes: Any) -> TrustedIssuer:
        settings = {
            "user_claim": "sub",
            "user_prefix": "",
            "roles_claim": "roles",
            "roles": {"billing": "billing", "Finance": "billing"},
            "may_outlive": False,
        }
        return TrustedIssuer(rules=rules, keys=self.issuer_keys(), **{**settings, **changes})
