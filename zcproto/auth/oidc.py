"""Authenticate the scheme `jwt`: a token that an identity provider has issued opens a session.

Decides: which user and which roles a token stands for, and when its session ends.

Rules:
- The claim `iss` chooses among the configured issuers; only the keys of that one verify the token.
- Every token that is not accepted gets the answer of all failed logins; the log gets the reason, without the token.
- Roles are those values of a claim that the configuration names: an identity provider does not make operators by
  itself.
- A session ends with its token unless the configuration lets it outlive it. A token may open several sessions until
  it expires, as a client that reconnects does.

Must not know: HTTP, how keys are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zcproto.auth.files import name_faults
from zcproto.auth.identity import NO_CHANNEL, Channel, Identity
from zcproto.auth.issuer_keys import IssuerKeys
from zcproto.auth.jwt import (
    TokenRefused,
    TokenRules,
    check_claims,
    check_confirmation,
    check_token,
    read_token,
)
from zcproto.auth.schemes import certificate_key
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.roles import Roles
from zcproto.errors import CertificateError, InvalidArgument, Unauthenticated


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedIssuer:
    """An identity provider and what its claims mean."""

    rules: TokenRules
    keys: IssuerKeys
    user_claim: str
    user_prefix: str
    roles_claim: str
    roles: Mapping[str, str]
    """The roles by the values of the claim."""
    may_outlive: bool
    """Whether a session may last longer than its token."""

    def user_of(self, claims: Mapping[str, Any]) -> str:
        """Return the name of the user. Raises TokenRefused."""
        found = claim_at(claims, self.user_claim)
        if not isinstance(found, str) or not found or name_faults(self.user_prefix + found):
            raise TokenRefused(f"its claim {self.user_claim!r} is not the name of a user")
        return self.user_prefix + found

    def roles_of(self, claims: Mapping[str, Any]) -> Roles:
        """Return the roles of the user. Raises TokenRefused for a claim that is neither a list nor a text."""
        found = claim_at(claims, self.roles_claim)
        if isinstance(found, str):
            found = found.split()
        if found is not None and not isinstance(found, list):
            raise TokenRefused(f"its claim {self.roles_claim!r} is not a list of roles")
        return frozenset(
            self.roles[each] for each in found or () if isinstance(each, str) and each in self.roles
        )


class JwtAuthenticator:
    """The scheme `jwt`: the field `token` has a JWT. `wall` is milliseconds since the epoch."""

    scheme: ClassVar[str] = "jwt"

    def __init__(self, issuers: Sequence[TrustedIssuer], wall: Callable[[], int]) -> None:
        self.issuers = {each.rules.issuer: each for each in issuers}
        self._max_bytes = max(each.rules.max_bytes for each in issuers)
        self._wall = wall

    def user_named(self, params: Mapping[str, Any], channel: Channel) -> str:
        """Return an empty text: what a token says is not proved yet, so that failures count for the address."""
        return ""

    async def authenticate(
        self, params: Mapping[str, Any], address: str, channel: Channel = NO_CHANNEL
    ) -> Identity | None:
        token = params.get("token")
        if not isinstance(token, str):
            raise InvalidArgument("token: the scheme jwt needs a str")
        if not {"scheme", "client", "token"}.issuperset(params):
            raise InvalidArgument("the scheme jwt takes token, and nothing else")
        try:
            return await self._identity(token, channel)
        except TokenRefused as refused:
            raise Unauthenticated(str(refused)) from None  # for the log

    async def _identity(self, text: str, channel: Channel) -> Identity:
        token = read_token(text, self._max_bytes)
        name = token.claims.get("iss")
        issuer = self.issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise TokenRefused("it is by another issuer")
        rules = issuer.rules
        check_token(token, rules)
        token.verify(await issuer.keys.find(token.keys_of))
        expires_s = check_claims(token.claims, rules, self._wall() / MS_PER_SECOND)
        certificate = channel.certificate()
        key = ""
        if check_confirmation(token.claims, certificate):
            assert certificate is not None, "check_confirmation compared it"
            key = _key_of(certificate)
        ends_at = None if issuer.may_outlive else round((expires_s + rules.leeway_s) * MS_PER_SECOND)
        return Identity(issuer.user_of(token.claims), issuer.roles_of(token.claims), key, ends_at)


def claim_at(claims: Mapping[str, Any], name: str) -> Any:
    """Return the claim of a name, or else the one at a path of names with dots between them; None without it."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def _key_of(certificate: bytes) -> str:
    try:
        return certificate_key(certificate)
    except CertificateError as error:
        raise TokenRefused(str(error)) from None
