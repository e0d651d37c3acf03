"""Verify a JWT with the keys of its issuer (RFC 7515, RFC 7519, RFC 8725).

    header.payload.signature -> read_token -> keys of the issuer -> verify -> check_claims

Decides: which tokens and keys are accepted.

Rules:
- Algorithms are asymmetric, on the list of the issuer, and fit the type of the key: a public key is never the
  secret of an HMAC, and there is no `none`.
- Keys come from the issuer's key set. What a token says of keys (`jwk`, `jku`, `x5u`, `x5c`) is ignored; `kid`
  chooses among the keys of the set, and nothing else.
- A token has one form: base64url without padding, JSON in UTF-8 without a byte order mark and without repeated
  names, no `crit`.
- A reason never has a part of the token.

Must not know: where keys come from, users, the time. PyJWT is imported with the first key.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, NamedTuple

KINDS: Final[dict[str, tuple[str, str]]] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("RSA", "")),
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
"""The type and the curve of the keys of each algorithm that can be allowed."""

LEEWAY_S: Final = 30.0
"""How far the clocks of the provider and of this server may differ."""

MAX_KEYS: Final = 64
MAX_KID: Final = 256
MAX_TRIED: Final = 4
"""Keys with one `kid` that are tried: while keys rotate there may be two."""

RSA_BITS: Final = range(2048, 8193)
"""Shorter keys are forged, longer ones take too long."""

MAX_TIME_S: Final = 1 << 53
"""Integers above it may not fit into a float."""

_PUBLIC: Final = {"RSA": ("kty", "n", "e"), "EC": ("kty", "crv", "x", "y"), "OKP": ("kty", "crv", "x")}
"""The members of public keys by type. Others, such as those of a private key, are not read."""

_PART: Final = re.compile(r"[A-Za-z0-9_-]+")


class TokenRefused(Exception):
    """A token is not accepted. `str()` is the reason, for the log."""


class IssuerKey(NamedTuple):
    """A public key of an issuer."""

    kid: str
    kind: tuple[str, str]
    algorithm: str
    """The only algorithm that it is for; empty for every one of its kind."""
    key: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What the tokens of an issuer must be."""

    issuer: str
    audience: frozenset[str]
    algorithms: frozenset[str]
    types: frozenset[str] = frozenset({"jwt", "at+jwt"})
    """The values of the header `typ`, in lower case; a token without one is a "jwt"."""
    leeway_s: float = LEEWAY_S
    max_bytes: int = 8_192
    """Tokens with many groups exceed 4 KiB."""


def fits(key: IssuerKey, algorithm: str) -> bool:
    """Return whether a key may verify signatures by an algorithm."""
    return key.kind == KINDS.get(algorithm) and key.algorithm in ("", algorithm)


class UnverifiedToken(NamedTuple):
    """A token that has the right form. Nothing in it is proved."""

    algorithm: str
    kid: str | None
    type: str
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes

    def keys_of(self, keys: Sequence[IssuerKey]) -> list[IssuerKey]:
        """Return the keys that may have signed this token. Without a `kid` only one may fit."""
        found = [key for key in keys if fits(key, self.algorithm) and self.kid in (None, key.kid)]
        return found[: MAX_TRIED if self.kid is not None or len(found) == 1 else 0]

    def verify(self, keys: Sequence[IssuerKey]) -> None:
        """Raise TokenRefused unless one of the keys has signed the token."""
        if not keys:
            raise TokenRefused("no key of the issuer has its key id and algorithm")
        algorithm = _algorithms()[self.algorithm]
        if not any(algorithm.verify(self.signed, key.key, self.signature) for key in keys):
            raise TokenRefused("the signature is not by the issuer's key")


def read_token(token: str, max_bytes: int) -> UnverifiedToken:
    """Return the parts of a token. Raises TokenRefused for any other text."""
    if len(token) > max_bytes:
        raise TokenRefused(f"the token is longer than {max_bytes} bytes")
    parts = token.split(".")
    if len(parts) != 3:
        raise TokenRefused("the token does not have three parts")
    try:
        header_, payload, signature = map(_decoded, parts)
        header, claims = read_json(header_), read_json(payload)
    except ValueError:
        raise TokenRefused("the token is not base64url and JSON in their one form") from None
    algorithm, kid, type_ = header.get("alg"), header.get("kid"), header.get("typ", "jwt")
    if not isinstance(algorithm, str) or not isinstance(type_, str):
        raise TokenRefused("the header has no alg, or a wrong typ")
    if "crit" in header or header.get("b64", True) is not True:
        raise TokenRefused("the header demands extensions")
    if kid is not None and (not isinstance(kid, str) or len(kid) > MAX_KID):
        raise TokenRefused("the key id is not a short text")
    signed = token.rpartition(".")[0].encode()
    return UnverifiedToken(
        algorithm, kid, type_.lower().removeprefix("application/"), claims, signed, signature
    )


def check_token(token: UnverifiedToken, rules: TokenRules) -> None:
    """Raise TokenRefused for a header that the issuer's tokens do not have. Comes before any key is used."""
    if token.algorithm not in rules.algorithms:
        raise TokenRefused("its algorithm is not allowed")
    if token.type not in rules.types:
        raise TokenRefused("it is another type of token")


def check_claims(claims: Mapping[str, Any], rules: TokenRules, now_s: float) -> float:
    """Return the expiry of a verified token, in seconds since the epoch. Raises TokenRefused."""
    if claims.get("iss") != rules.issuer:
        raise TokenRefused("it is by another issuer")
    audience = claims.get("aud")
    given = [audience] if isinstance(audience, str) else audience
    if not isinstance(given, list) or not any(
        isinstance(each, str) and each in rules.audience for each in given
    ):
        raise TokenRefused("it is for another audience")
    expires = _time(claims, "exp")
    if expires is None:
        raise TokenRefused("it has no expiry")
    if now_s >= expires + rules.leeway_s:
        raise TokenRefused("it has expired")
    for name in ("nbf", "iat"):
        begins = _time(claims, name)
        if begins is not None and now_s < begins - rules.leeway_s:
            raise TokenRefused("it is not valid yet; compare the clocks")
    return expires


def check_confirmation(claims: Mapping[str, Any], certificate: bytes | None) -> bool:
    """Return whether a token is bound to the client's certificate (DER), which is proved (RFC 8705).

    Raises TokenRefused for a token that is bound to another certificate, or in a way that cannot be proved here.
    """
    if "cnf" not in claims:
        return False
    confirmation = claims["cnf"]
    if not isinstance(confirmation, dict) or [*confirmation] != ["x5t#S256"]:
        raise TokenRefused("it is bound to a key that the client cannot prove here")
    if certificate is None or confirmation["x5t#S256"] != _encoded(sha256(certificate).digest()):
        raise TokenRefused("it is bound to another client certificate")
    return True


def read_keys(document: bytes) -> list[IssuerKey]:
    """Return the usable keys of a key set (RFC 7517). Raises ValueError for another document, and without any."""
    keys = read_json(document).get("keys")
    if not isinstance(keys, list) or len(keys) > MAX_KEYS:
        raise ValueError(f"it is not a set of at most {MAX_KEYS} keys")
    found = [key for each in keys if isinstance(each, dict) and (key := _key(each)) is not None]
    if not found:
        raise ValueError("it has no key for signatures of the allowed kinds")
    return found


def read_json(data: bytes) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for anything else, also for repeated names."""
    try:
        # Given bytes, json.loads would also read UTF-16, UTF-32 and a byte order mark (RFC 8259, section 8.1).
        found = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is repeated")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _decoded(text: str) -> bytes:
    if not _PART.fullmatch(text):
        raise ValueError("not base64url")
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _encoded(data) != text:
        raise ValueError("not the one form of base64url")
    return data


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_TIME_S:
        raise TokenRefused("it has a malformed time")
    return float(value)


def _key(jwk: Mapping[str, Any]) -> IssuerKey | None:
    """Return a key of a set, or None if it is not for signatures, or of another kind."""
    kid, only, operations = jwk.get("kid", ""), jwk.get("alg", ""), jwk.get("key_ops", ["verify"])
    kind = next((each for each in KINDS.values() if each == (jwk.get("kty"), _curve(jwk))), None)
    names = [name for name, each in KINDS.items() if each == kind and only in ("", name)]
    if (
        kind is None
        or not names
        or not isinstance(kid, str)
        or len(kid) > MAX_KID
        or jwk.get("use", "sig") != "sig"
        or not isinstance(operations, list)
        or "verify" not in operations
    ):
        return None
    from jwt.exceptions import InvalidKeyError  # noqa: PLC0415 - it comes with an extra

    public = {name: jwk.get(name) for name in _PUBLIC[kind[0]]}
    try:
        key = _algorithms()[names[0]].from_jwk(public)
    except (
        InvalidKeyError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # of cryptography, for members of other types
        return None
    if kind[0] == "RSA" and key.key_size not in RSA_BITS:
        return None
    return IssuerKey(kid, kind, only, key)


def _curve(jwk: Mapping[str, Any]) -> Any:
    return "" if jwk.get("kty") == "RSA" else jwk.get("crv")


def _algorithms() -> dict[str, Any]:
    from jwt.algorithms import get_default_algorithms  # noqa: PLC0415 - it comes with an extra

    return get_default_algorithms()
