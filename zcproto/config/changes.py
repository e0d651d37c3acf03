"""Compare a new configuration with the active one, and decide which changes a running server can apply.

Rules: every key is listed in TAKES_EFFECT; a test checks that. The keys of one check (checks.py) take effect
together, so that the active configuration never contradicts itself.

Must not know: how a change is applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from zcproto.config.checks import split_key, value_of
from zcproto.config.model import Config, settings


class Effect(Enum):
    """When a changed key takes effect."""

    NOW = "live"
    """For all connections and sessions, from the reload on."""
    NEW_CONNECTIONS = "new connections"
    """Open connections keep the old value."""
    NEW_SESSIONS = "new sessions"
    """Open sessions keep the old value."""
    RESTART = "restart"
    """At the next start of the server."""


_BY_SECTION: Final[dict[str, dict[Effect, str]]] = {
    "server": {
        Effect.NOW: "drain_timeout lifespan_timeout upgrade_timeout",
        Effect.NEW_CONNECTIONS: "proxy_protocol_from",
        Effect.RESTART: "host port workers hang_timeout",
    },
    "tls": {
        Effect.NEW_CONNECTIONS: (
            "handshake_timeout max_handshakes max_pending client_name client_ca_file client_crl_file client_pins"
        ),
        Effect.RESTART: "client_auth",
    },
    "certificates": {
        Effect.NEW_CONNECTIONS: (
            "directory mode key_types names lifetime renew_before renew_key announce_key repair certificate key"
            " key_passphrase_file key_passphrase_variable watch_interval alert_days site"
        ),
    },
    "acme": {
        Effect.NEW_CONNECTIONS: "directory terms_agreed contact challenge ca_file eab_kid eab_key_file",
    },
    "sessions": {
        Effect.NOW: "idle_timeout per_user when_full refresh_grace bind_client",
        Effect.NEW_SESSIONS: "lifetime refresh refresh_lifetime",
        Effect.NEW_CONNECTIONS: "open_timeout bind_address",
    },
    "store": {
        Effect.RESTART: ("url password_file ca_file certificate_file key_file timeout grace"),
    },
    "idempotency": {Effect.RESTART: "keep max_bytes per_user running_per_user"},
    "freshness": {Effect.NEW_CONNECTIONS: "tolerance"},
    "limits": {
        Effect.NOW: (
            "write_timeout login_failures login_timeout logins_pending requests_per_user requests_per_address"
            " public_requests_per_address running_per_user running_per_address threads waiting_for_thread"
            " partial_frame_bytes"
            " partial_frame_bytes_per_user"
        ),
        Effect.NEW_CONNECTIONS: (
            "max_connections connections_per_address failed_handshakes_per_network"
            " max_frame_bytes max_frame_bytes_before_session max_streams idle_timeout"
            " frame_timeout write_buffer_bytes"
        ),
    },
    "streams": {
        Effect.NOW: "durable_per_user durable_bytes durable_keep durable_abandon_after durable_drain",
        Effect.NEW_CONNECTIONS: (
            "max_open max_item_bytes window_items window_bytes memory_bytes stall_timeout"
        ),
    },
    "calls": {Effect.NOW: "per_user total pending_per_user pending_total", Effect.NEW_CONNECTIONS: "max"},
    "http": {
        Effect.NOW: "metrics allow",
        Effect.RESTART: "enabled redirect_port",
    },
    "auth": {Effect.NOW: "role", Effect.RESTART: "oidc"},
    "alerts": {
        Effect.NOW: (
            "webhook webhook_secret_file webhook_ca_file command repeat"
            " tls_failures internal_errors throttled_logins stale_frames revocation_rate"
            " refused_connections revocations"
        ),
    },
    "log": {Effect.NOW: "level format exceptions file audit_file"},
    "telemetry": {
        Effect.RESTART: (
            "traces metrics logs endpoint headers_file ca_file service_name sample_ratio trust metrics_interval"
        ),
    },
}

TAKES_EFFECT: Final[dict[str, Effect]] = {
    f"{section}.{name}": effect
    for section, effects in _BY_SECTION.items()
    for effect, names in effects.items()
    for name in names.split()
}
"""When a change of each key takes effect."""

WAIT_FOR: Final[dict[str, tuple[str, ...]]] = {
    "tls.client_auth": ("tls.client_ca_file", "tls.client_crl_file", "tls.client_pins"),
    "http.redirect_port": ("acme.challenge",),
}
"""If the first key has changed, which takes a restart, the others take one too."""

_NOT_SHOWN: Final = frozenset({"store.url", "alerts.webhook", "alerts.command", "telemetry.endpoint"})
"""Keys whose values may be secrets or contain one."""

MAX_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """A changed key. `old` and `new` are as in the TOML file, or empty where they are not shown."""

    key: str
    old: str
    new: str
    effect: Effect

    def as_dict(self) -> dict[str, str]:
        return {"key": self.key, "old": self.old, "new": self.new, "effect": self.effect.value}


def changes_between(old: Config, new: Config, fixed: frozenset[str] = frozenset()) -> list[ConfigChange]:
    """Return every changed key, in the order of the file. `fixed` are further keys that take a restart."""
    found = []
    kept = _kept(old, new) | fixed
    for key, accepts in settings().items():
        before, after = value_of(old, key), value_of(new, key)
        if before != after:
            shown = (
                ("", "")
                if key in _NOT_SHOWN
                else (_shown(accepts.write(before)), _shown(accepts.write(after)))
            )
            effect = Effect.RESTART if key in kept else TAKES_EFFECT[key]
            found.append(ConfigChange(key, *shown, effect))
    return found


def effective(old: Config, new: Config, fixed: frozenset[str] = frozenset()) -> Config:
    """Return the new configuration with the old values of keys that take a restart, and of those in `fixed`."""
    updates: dict[str, dict[str, object]] = {}
    for key in _kept(old, new) | fixed:
        section, name = split_key(key)
        updates.setdefault(section, {})[name] = value_of(old, key)
    sections = {
        section: getattr(new, section).model_copy(update=values) for section, values in updates.items()
    }
    return new.model_copy(update=sections)


def _kept(old: Config, new: Config) -> set[str]:
    """Return the keys that keep their values until a restart."""
    kept = {key for key, effect in TAKES_EFFECT.items() if effect is Effect.RESTART}
    for key, waiting in WAIT_FOR.items():
        if value_of(old, key) != value_of(new, key):
            kept.update(waiting)
    return kept


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
