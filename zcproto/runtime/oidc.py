"""Builds the scheme jwt from `auth.oidc`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zcproto.alerts.service import ServerAlerts
from zcproto.auth.jwt import IssuerKey, TokenRules
from zcproto.auth.oidc import IssuerKeys, JwtAuthenticator, Provider, TrustedIssuer
from zcproto.common.clock import Clock
from zcproto.common.https import verifying_context
from zcproto.config import AuthConfig, OidcConfig
from zcproto.errors import ConfigError
from zcproto.runtime.alert_sources import on_issuer_answered, on_issuer_failed
from zcproto.server.state import log


def build_jwt(config: AuthConfig, clock: Clock, alerts: ServerAlerts) -> JwtAuthenticator | None:
    """Return the authenticator of tokens, or None without an issuer. Reads files of CA certificates.

    Raises ConfigError for an unusable file, and without the packages of the extra.
    """
    if not config.oidc:
        return None
    try:
        import jwt  # noqa: F401, PLC0415 - it comes with an extra
    except ImportError:
        raise ConfigError(['auth.oidc: PyJWT is not installed; run: pip install "zcproto[oidc]"']) from None
    issuers = [
        _issuer(each, f"auth.oidc[{number}]", clock, alerts) for number, each in enumerate(config.oidc)
    ]
    return JwtAuthenticator(issuers, clock.wall)


def provider_of(config: OidcConfig, key: str) -> Provider:
    """Return the provider of a table, whose key is `key`. Raises ConfigError for an unusable file."""
    return Provider(config.issuer, verifying_context(config.ca_file, f"{key}.ca_file"), config.timeout)


def _issuer(config: OidcConfig, key: str, clock: Clock, alerts: ServerAlerts) -> TrustedIssuer:
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
            fetch=provider_of(config, key).keys,
            now=clock.now,
            events=_ReportedKeys(config.issuer, alerts),
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
class _ReportedKeys:
    """Reports what becomes of the keys of an issuer to the log and the alerts."""

    issuer: str
    alerts: ServerAlerts

    def loaded(self, keys: Sequence[IssuerKey]) -> None:
        log.info("oidc.keys_loaded", issuer=self.issuer, count=len(keys))
        on_issuer_answered(self.alerts, self.issuer)

    def failed(self, reason: str, can_serve: bool) -> None:
        log.warning("oidc.keys_failed", issuer=self.issuer, reason=reason, can_serve=can_serve)
        on_issuer_failed(self.alerts, self.issuer, reason, can_serve)
