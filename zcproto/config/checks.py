"""Define what must hold between settings, of one section or of two.

Rules: combinations that cannot work are refused. A setting that has no effect beside another is refused if it
suggests protection, and accepted otherwise.

Must not know: what a single key accepts, where a value came from, anything on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Check:
    """A relation between the settings in `names`. A fault is reported for the first, compared with the second.

    `fix` is what to do, where that does not follow.
    """

    names: str
    demand: str
    holds: Callable[..., object]
    fix: str = ""

    @property
    def keys(self) -> list[str]:
        return self.names.split()


def _key_checks(prefix: str = "") -> tuple[Check, ...]:
    return (
        Check(
            f"{prefix}key {prefix}certificate",
            "must be empty, if the files of certificates hold the keys too, or have as many paths as",
            lambda keys, certificates: not keys or not certificates or len(keys) == len(certificates),
        ),
        Check(
            f"{prefix}key_passphrase_file {prefix}key_passphrase_variable",
            "must be empty, since the passphrase comes from one place, with",
            lambda file, variable: file is None or variable is None,
        ),
    )


SITE_CHECKS: Final = _key_checks()
"""Checks between the keys of a site. Those of [certificates] have the same names and checks."""

CHECKS: Final = (
    Check(
        "limits.max_frame_bytes_before_session limits.max_frame_bytes",
        "must be at most",
        lambda before, after: before <= after,
    ),
    Check(
        "sessions.lifetime sessions.refresh_lifetime sessions.refresh",
        "must, while sessions.refresh is true, be at most",
        lambda lifetime, refresh_lifetime, refresh: lifetime <= refresh_lifetime or not refresh,
    ),
    *_key_checks("certificates."),
    Check(
        "certificates.certificate certificates.mode",
        "must not be empty with",
        lambda certificate, mode: certificate or mode != "files",
        "name the files of the certificates to serve",
    ),
    *(
        Check(
            f"certificates.{key} certificates.mode",
            "must be empty with",
            lambda value, mode: not value or mode == "files",
            fix,
        )
        for key, fix in (
            ("certificate", 'set mode = "files" to serve it, or list its names in [[certificates.site]]'),
            ("key", 'set mode = "files" to use it'),
            ("key_passphrase_file", "the server's own keys are not encrypted"),
            ("key_passphrase_variable", "the server's own keys are not encrypted"),
        )
    ),
    Check(
        "certificates.names certificates.mode",
        "must hold the names of this server on the internet, without a wildcard, with",
        lambda names, mode: mode != "acme" or (names and not any(name.startswith("*") for name in names)),
        "a wildcard needs the challenge dns-01: get it with another tool",
    ),
    Check(
        "acme.terms_agreed certificates.mode",
        "must be true with",
        lambda agreed, mode: agreed or mode != "acme",
        "read the terms of the CA and agree to them",
    ),
    Check(
        "acme.challenge http.redirect_port",
        'must be "tls-alpn-01" with',
        lambda challenge, port: port or challenge != "http-01",
        "set the port on which the CA checks the names",
    ),
    Check(
        "acme.eab_kid acme.eab_key_file",
        "must be set together with",
        lambda kid, key: bool(kid) == bool(key),
        "the CA gives both, or none",
    ),
    *(
        Check(
            f"alerts.{key} alerts.webhook",
            "must be empty with",
            lambda value, webhook: value is None or webhook,
            "set the webhook that it belongs to",
        )
        for key in ("webhook_secret_file", "webhook_ca_file")
    ),
    Check(
        "alerts.webhook_ca_file alerts.webhook",
        "must be empty with",
        lambda ca_file, webhook: ca_file is None or not webhook.startswith("http:"),
        "http:// has no certificate",
    ),
    *(
        Check(
            f"tls.{key} tls.client_auth",
            "must be empty with",
            lambda value, client_auth: not value or client_auth != "off",
            'set client_auth = "optional" or "required" to check clients with it',
        )
        for key in ("client_ca_file", "client_crl_file", "client_pins")
    ),
    Check(
        "telemetry.endpoint telemetry.traces telemetry.metrics telemetry.logs",
        "must be empty with",
        lambda endpoint, *signals: not endpoint or any(signals),
        "nothing would be sent: set traces, metrics or logs to true",
    ),
    Check(
        "http.redirect_port http.enabled",
        "must be 0 with",
        lambda port, enabled: enabled or not port,
        "there would be no HTTPS to redirect to",
    ),
    Check(
        "http.redirect_port server.port", "must not be", lambda port, tls_port: not port or port != tls_port
    ),
)


def contradictions(config: object) -> list[Check]:
    """Return the checks that a configuration fails."""
    return [check for check in CHECKS if not check.holds(*(value_of(config, key) for key in check.keys))]


def value_of(config: object, key: str) -> Any:
    """Return the value of a key."""
    section, name = split_key(key)
    return getattr(getattr(config, section), name)


def split_key(key: str) -> tuple[str, str]:
    """Split "server.port" into ("server", "port")."""
    section, _, name = key.partition(".")
    return section, name
