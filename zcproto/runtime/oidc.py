"""Builds the scheme jwt from `auth.oidc`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zcproto.auth.issuer_keys import IssuerKeys
from zcproto.auth.jwt import IssuerKey, TokenRules
from zcproto.auth.oidc import JwtAuthenticator, TrustedIssuer
from zcproto.auth.provider import Provider
from zcproto.common.clock import Clock
from zcproto.common.https import verifying_context
from zcproto.config import AuthConfig, OidcConfig
from zcproto.errors import ConfigError
from zcproto.server.state import log


def build_jwt(config: AuthConfig, clock: Clock) -> JwtAuthenticator | None:
    """Return the authenticator of tokens, or None without an issuer. Reads files of CA certificates.

    Raises ConfigError for an unusable file, and without the packages of the extra.
    """
    if not config.oidc:
        return None
    try:
        import jwt  # noqa: F401, PLC0415 - it comes with an extra
    except ImportError:
        raise ConfigError(['auth.oidc: PyJWT is not installed; run: pip install "zcproto[oidc]"']) from None
    issuers = [_issuer(each, f"auth.oidc[{number}]", clock) for number, each in enumerate(config.oidc)]
    return JwtAuthenticator(issuers, clock.wall)


def _issuer(config: OidcConfig, key: str, clock: Clock) -> TrustedIssuer:
    provider = Provider(config.issuer, verifying_context(config.ca_file, f"{key}.ca_file"), config.timeout)
    return TrustedIssuer(
        rules=TokenRules(
            issuer=config.issuer,
            audience=frozenset(config.audience),
            algorithms=frozenset(config.algorithms),
            types=frozenset(each.lower() for each in config.types),
            leeway_s=config.leeway,
            max_bytes=config.max_token_bytes,
        ),
        keys=IssuerKeys(
            fetch=provider.keys,
            now=clock.now,
            events=_LoggedKeys(config.issuer),
            refresh_s=config.keys_refresh,
            min_interval_s=config.keys_min_interval,
            stale_s=config.keys_stale,
        ),
        user_claim=config.user_claim,
        user_prefix=config.user_prefix,
        roles_claim=config.roles_claim,
        roles={each.rpartition("=")[0] or each: each.rpartition("=")[2] for each in config.roles},
        may_outlive=config.outlive_token,
    )


@dataclass(frozen=True, slots=True)
class _LoggedKeys:
    """Logs what becomes of the keys of an issuer."""

    issuer: str

    def loaded(self, keys: Sequence[IssuerKey]) -> None:
        log.info("oidc.keys_loaded", issuer=self.issuer, count=len(keys))

    def failed(self, reason: str) -> None:
        log.warning("oidc.keys_failed", issuer=self.issuer, reason=reason)
