"""Define the settings of who may call which methods: roles, and identity providers.

Rules: as in zcproto/config/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from zcproto.config.texts import (
    CLAIM_TEXT,
    ISSUER_URL,
    METHOD_PATTERN,
    OPTIONAL_PATH,
    ROLE_NAME,
    ROLE_OF_CLAIM,
    USER_PREFIX,
)
from zcproto.config.types import (
    FLAG,
    Fault,
    Settings,
    duration,
    each_of,
    list_of,
    one_of,
    tables_of,
    whole,
)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Those of zcproto/auth/jwt.py: a test compares them."""


class RoleConfig(Settings):
    """What sessions with a role may call, besides what the application says."""

    name: Annotated[str, ROLE_NAME] = Field(examples=["billing"])
    """The role, as users, devices and tokens have it."""
    allow: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that need this role, or another one that allows them or that the application names: names, or
    beginnings with a star. "*" is all methods of the application that need a session; those of the server, such as
    "server.sessions", are meant by "server.*" only."""
    deny: Annotated[tuple[str, ...], each_of(METHOD_PATTERN, 0, 256)] = ()
    """The methods that no session with this role may call, whatever its other roles."""


def _duplicate_roles(roles: Mapping[int, RoleConfig]) -> Iterator[Fault]:
    """Yield a fault for each role that has two tables."""
    first: dict[str, int] = {}
    for index, role in roles.items():
        if first.setdefault(role.name, index) != index:
            yield Fault(f"[{index}].name", role.name, f"is the role of auth.role[{first[role.name]}] too")


class OidcConfig(Settings):
    """An identity provider whose tokens open sessions, by the scheme jwt. It needs the extra "oidc"."""

    issuer: Annotated[str, ISSUER_URL] = Field(examples=["https://login.example.com/realms/staff"])
    """The provider's address, exactly as in the claim `iss` of its tokens. Its metadata is read from
    /.well-known/openid-configuration below."""
    audience: Annotated[tuple[str, ...], list_of(CLAIM_TEXT, 1, 16, bare=True)] = Field(
        examples=[("zcproto",)]
    )
    """What this server is called in the claim `aud`. A token for another one is refused."""
    algorithms: Annotated[tuple[str, ...], list_of(one_of(*ALGORITHMS), 1, len(ALGORITHMS))] = (
        "RS256",
        "PS256",
        "ES256",
        "EdDSA",
    )
    """The algorithms of signatures to accept. All of them are asymmetric; the default has those that providers
    use."""
    types: Annotated[tuple[str, ...], list_of(one_of("JWT", "at+jwt"), 1, 2)] = ("JWT", "at+jwt")
    """The types of tokens to accept (`typ` in the header; a token without one is a JWT). ["at+jwt"] is for
    providers that mark access tokens by RFC 9068, so that no ID token is accepted."""
    user_claim: Annotated[str, CLAIM_TEXT] = "sub"
    """The claim that names the user. "sub" never changes and is never given to another person; names and email
    addresses may be."""
    user_prefix: Annotated[str, USER_PREFIX] = ""
    """What is put before the name, such as "oidc:". Without it, a user of the provider and a user of this server
    with the same name are one."""
    roles_claim: Annotated[str, CLAIM_TEXT] = "roles"
    """The claim with the roles: a list, or a text with spaces between them, such as "scope". Dots lead into
    objects: "realm_access.roles"."""
    roles: Annotated[tuple[str, ...], each_of(ROLE_OF_CLAIM, 0, 1000)] = ()
    """The values of that claim that are roles here: "billing", or "Finance Team=billing" for another name. None by
    default, so that people who name groups at the provider cannot make operators."""
    leeway: Annotated[float, duration("0s", "5m")] = 30.0
    """How far the clocks of the provider and of this server may differ."""
    outlive_token: Annotated[bool, FLAG] = False
    """Whether a session may last longer than its token, as `sessions` says. By default it ends with the token, and
    the client opens another one with a fresh token; then a user who is disabled at the provider is out when the
    token expires."""
    max_token_bytes: Annotated[int, whole(512, 16_384)] = 8_192
    """The largest token. Tokens with many groups exceed 4 KiB. `limits.max_frame_bytes_before_session` applies
    too."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the provider. Empty: those of the system."""
    timeout: Annotated[float, duration("100ms", "1m")] = 5.0
    """How long one request to the provider may take. A login may wait for two."""
    keys_refresh: Annotated[float, duration("1m", "24h")] = 3600.0
    """How often the provider's keys are fetched, in the background."""
    keys_min_interval: Annotated[float, duration("1s", "1h")] = 30.0
    """How soon they are fetched again for a token with an unknown key, or after a failure. Tokens with invented
    keys cannot make the server ask more often."""
    keys_stale: Annotated[float, duration("1m", "30d")] = 86_400.0
    """How long the last keys are used while the provider does not answer. A provider that is down for a night does
    not stop logins with the tokens it has issued."""


def _duplicate_issuers(issuers: Mapping[int, OidcConfig]) -> Iterator[Fault]:
    """Yield a fault for each issuer that has two tables."""
    first: dict[str, int] = {}
    for index, each in issuers.items():
        if first.setdefault(each.issuer, index) != index:
            yield Fault(
                f"[{index}].issuer", each.issuer, f"is the issuer of auth.oidc[{first[each.issuer]}] too"
            )


OIDC = tables_of(OidcConfig, "auth.oidc", 8, _duplicate_issuers, bare=True)


class AuthConfig(Settings):
    """Who may call which methods."""

    role: Annotated[tuple[RoleConfig, ...], tables_of(RoleConfig, "auth.role", 100, _duplicate_roles)] = ()
    """What the roles of a session allow and deny. Checked against the methods of the application when the server
    starts, and at each reload."""
    oidc: Annotated[
        tuple[OidcConfig, ...], tables_of(OidcConfig, "auth.oidc", 8, _duplicate_issuers, bare=True)
    ] = ()
    """The identity providers whose tokens open sessions. One provider may be written as [auth.oidc]."""
