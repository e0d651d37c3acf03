"""Authenticate the scheme `jwt`: a token that an identity provider has issued opens a session.

    Provider: metadata, keys -> IssuerKeys: when to fetch -> JwtAuthenticator: which user

Decides: which user and which roles a token stands for, and when its session ends; when keys are fetched, and how
long old ones serve.

Rules of tokens:
- The claim `iss` chooses among the configured issuers; only the keys of that one verify the token.
- Every token that is not accepted gets the answer of all failed logins; the log gets the reason, without the token.
- Roles are those values of a claim that the configuration names: an identity provider does not make operators by
  itself.
- A session ends with its token unless the configuration lets it outlive it. A token may open several sessions until
  it expires, as a client that reconnects does.

Rules of keys:
- They are fetched when they are first needed, and then once in `refresh_s` in the background. Concurrent logins
  share one fetch.
- An unknown key id fetches them too, but not within `min_interval_s` of the last attempt: tokens with invented key
  ids cannot make the server ask more often. A login whose key may be new then is undecided (Unavailable), and not
  counted as failed.
- While the provider does not answer, the last keys serve for `stale_s`. Logins by other keys, or without any, are
  undecided, too.

Rules of the provider (OpenID Connect Discovery 1.0):
- The metadata must be by the configured issuer. Its addresses are used over verified TLS, or without TLS only if
  the issuer is (on this machine).
- Redirects are not followed. Responses are bounded.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import urlsplit

from zcproto.auth.files import name_faults
from zcproto.auth.identity import NO_CHANNEL, Channel, Identity
from zcproto.auth.jwt import (
    IssuerKey,
    TokenRefused,
    TokenRules,
    check_claims,
    check_confirmation,
    check_token,
    read_json,
    read_keys,
    read_token,
)
from zcproto.auth.schemes import certificate_key
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.https import Endpoint, Response, Unreachable
from zcproto.common.roles import Roles
from zcproto.errors import CertificateError, InvalidArgument, Unauthenticated, Unavailable


class KeysFailed(Exception):
    """The keys cannot be fetched. `str()` is the reason in a sentence."""


class KeyEvents(Protocol):
    """Called when keys were loaded after a failure or are others than before, when an outage begins, and when the
    last keys have become too old in it."""

    def loaded(self, keys: Sequence[IssuerKey]) -> None: ...
    def failed(self, reason: str, can_serve: bool) -> None: ...


@dataclass(eq=False, slots=True, kw_only=True)
class IssuerKeys:
    """The keys of one issuer. `fetch` returns them, or raises KeysFailed; `now` is monotonic seconds.

    Counters for operators: how often keys were `fetched`, and `failures`. `is_failing`: whether the last fetch has
    failed.
    """

    fetch: Callable[[], Awaitable[list[IssuerKey]]]
    now: Callable[[], float]
    events: KeyEvents
    refresh_s: float = 3_600.0
    min_interval_s: float = 30.0
    stale_s: float = 86_400.0
    """A provider that is down for a night does not stop logins with the tokens it has issued."""
    fetched: int = 0
    failures: int = 0
    is_failing: bool = False
    _keys: list[IssuerKey] = field(default_factory=list)
    _fetched_at: float | None = None
    _tried_at: float | None = None
    _could_serve: bool = True  # at the last report of a failure
    _fetching: asyncio.Task[None] | None = None

    async def find(
        self, choose: Callable[[Sequence[IssuerKey]], list[IssuerKey]], kid: str | None
    ) -> list[IssuerKey]:
        """Return the keys that `choose` returns, fetched again if it returns an empty list; `kid` is their id.

        Raises Unavailable if another fetch might find some.
        """
        age = self.age()
        found = choose(self._keys) if self.can_serve else []
        if not found or age is None or age >= self.refresh_s:
            fetching = self._begin()
            if fetching is not None and not found:
                await asyncio.shield(fetching)
                found = choose(self._keys)
            is_unknown = kid is not None and all(kid != key.kid for key in self._keys)
            if not self.can_serve or (is_unknown and (fetching is None or self.is_failing)):
                why = "does not answer" if self.is_failing else "may have a new key"
                raise Unavailable(
                    f"the identity provider {why}; try again",
                    {"retry_after_ms": round(self._next_fetch_s() * MS_PER_SECOND)},
                )
        return found

    def _next_fetch_s(self) -> float:
        """Return the seconds until the keys may be fetched again."""
        return 0.0 if self._tried_at is None else max(0.0, self._tried_at + self.min_interval_s - self.now())

    def age(self) -> float | None:
        """Return the seconds since the keys were fetched; None without any."""
        return None if self._fetched_at is None else self.now() - self._fetched_at

    @property
    def can_serve(self) -> bool:
        """Whether there are keys that are not too old."""
        age = self.age()
        return age is not None and age < self.stale_s

    def _begin(self) -> asyncio.Task[None] | None:
        """Return the fetch that is running or may begin now."""
        if self._fetching is None:
            if self._next_fetch_s() > 0:
                return None
            self._tried_at = self.now()
            self._fetching = asyncio.get_running_loop().create_task(self._fetch(), name="zcproto-keys")
        return self._fetching

    async def _fetch(self) -> None:
        try:
            keys = await self.fetch()
        except KeysFailed as error:
            self.failures += 1
            if not self.is_failing or self._could_serve != self.can_serve:
                self.is_failing, self._could_serve = True, self.can_serve
                self.events.failed(str(error), self._could_serve)
        else:
            self.fetched += 1
            is_changed = self.is_failing or {key.kid for key in keys} != {key.kid for key in self._keys}
            self._keys, self._fetched_at, self.is_failing = keys, self.now(), False
            if is_changed:
                self.events.loaded(keys)
        finally:
            self._fetching = None


TIMEOUT_S: Final = 5.0
"""Time for one request to the provider. A login may wait for two."""

MAX_METADATA: Final = 131_072
MAX_KEY_SET: Final = 262_144
MAX_URL: Final = 2_048

_HEADERS: Final = (("Accept", "application/json"), ("User-Agent", "zcproto-oidc/1"))
_FORM: Final = ("Content-Type", "application/x-www-form-urlencoded")


class Provider:
    """An OpenID provider. `context` verifies its certificate; `timeout` is for each request."""

    def __init__(self, issuer: str, context: ssl.SSLContext, timeout: float = TIMEOUT_S) -> None:
        self.issuer = issuer
        self._context = context
        self._timeout = timeout
        self._metadata: dict[str, Any] | None = None
        self.date = ""
        """When the provider has answered last, by its own clock: the header Date."""

    async def keys(self) -> list[IssuerKey]:
        """Fetch the keys. Raises KeysFailed."""
        try:
            return read_keys(await self._get(await self.address("jwks_uri"), MAX_KEY_SET))
        except ValueError as error:
            self._metadata = None  # the keys may have moved
            raise KeysFailed(f"the key set cannot be used: {error}") from None
        except KeysFailed:
            self._metadata = None
            raise

    async def address(self, name: str) -> str:
        """Return an address of the provider's metadata. Raises KeysFailed."""
        if self._metadata is None:
            self._metadata = await self._discover()
        address = self._metadata.get(name)
        if not isinstance(address, str) or not self._is_usable(address):
            raise KeysFailed(f"the metadata has no usable {name}")
        return address

    async def post(self, address: str, form: bytes) -> Response:
        """Send a form to an address of the provider. Raises KeysFailed."""
        return await self._send("POST", address, MAX_METADATA, form)

    async def _discover(self) -> dict[str, Any]:
        data = await self._get(
            f"{self.issuer.removesuffix('/')}/.well-known/openid-configuration", MAX_METADATA
        )
        try:
            metadata = read_json(data)
        except ValueError as error:
            raise KeysFailed(f"the metadata cannot be used: {error}") from None
        if metadata.get("issuer") != self.issuer:
            raise KeysFailed("the metadata is by another issuer; the issuer must be equal, to the last slash")
        return metadata

    async def _get(self, address: str, max_body: int) -> bytes:
        response = await self._send("GET", address, max_body)
        if response.status != 200:
            why = ": redirects are not followed" if 300 <= response.status < 400 else ""
            raise KeysFailed(f"{urlsplit(address).hostname} answered {response.status}{why}")
        return response.body

    async def _send(self, method: str, address: str, max_body: int, form: bytes = b"") -> Response:
        endpoint = Endpoint(address, self._context)
        headers = [*_HEADERS, _FORM] if form else _HEADERS
        try:
            response = await endpoint.send(method, headers, form, timeout=self._timeout, max_body=max_body)
        except Unreachable as error:
            raise KeysFailed(str(error)) from error
        self.date = response.headers.get("date", "")
        return response

    def _is_usable(self, address: str) -> bool:
        try:
            parts = urlsplit(address)
            parts.port  # noqa: B018 - raises ValueError
        except ValueError:
            return False
        schemes = {"https", urlsplit(self.issuer).scheme}
        is_plain = (
            len(address) <= MAX_URL and address.isascii() and address.isprintable() and " " not in address
        )
        return is_plain and parts.scheme in schemes and bool(parts.hostname) and "@" not in parts.netloc


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
        token.verify(await issuer.keys.find(token.keys_of, token.kid))
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
