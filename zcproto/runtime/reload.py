"""Reloads the configuration of a running server: all of it applies at once, or nothing.

    read and check everything -> prepare what can fail (files, certificates) -> apply in one turn of the loop

Decides: what is prepared, and what each setting is applied to. zcproto/config/changes.py lists the
keys that can be applied.

Rules:
- A failure happens before anything is applied. Then nothing changes, and the log has the reason.
- No connection is closed. Existing ones keep the limits of their WELCOME.
- Certificates are loaded and tested again if their settings have changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from zcproto.admin.parts import Parts
from zcproto.alerts import AlertKind
from zcproto.alerts.service import sinks_of
from zcproto.config import Config
from zcproto.config.changes import TAKES_EFFECT, ConfigChange, Effect, changes_between, effective
from zcproto.errors import CertificateError, ConfigError
from zcproto.observe.log import LogChange
from zcproto.runtime.alert_sources import watch_rates
from zcproto.runtime.build import (
    call_limits,
    connection_settings,
    partial_frame_limits,
    request_settings,
    run_limits,
    session_settings,
    thread_limits,
)
from zcproto.runtime.preflight import preflight
from zcproto.server.access import access_of
from zcproto.server.state import log
from zcproto.tls.pins import parse_pins

ReadConfig = Callable[[], Config]

LOG_KEYS: Final = frozenset(key for key in TAKES_EFFECT if key.startswith("log."))

_CERTIFICATE_ALERTS: Final = (
    AlertKind.CERTIFICATE_EXPIRY,
    AlertKind.CERTIFICATE_RENEWAL,
    AlertKind.CERTIFICATE_FILES,
)
"""Raised again by a check of the certificates if the cause still exists."""


class Reloaded(NamedTuple):
    """The result of a reload."""

    applied: list[ConfigChange]
    needs_restart: list[ConfigChange]

    def as_dict(self) -> dict[str, Any]:
        return {
            "changed": [change.as_dict() for change in self.applied],
            "restart": [change.as_dict() for change in self.needs_restart],
        }


async def reload_config(
    parts: Parts, read: ReadConfig, *, on_config: Callable[[Config], None], owns_log: bool, is_first: bool
) -> Reloaded:
    """Read the configuration and apply it. Raises ConfigError; then nothing has changed.

    `on_config` is called with a configuration that is applied. `owns_log` is whether `[log]` applies to the log of
    the process. `is_first`: no other process of this server has checked the configuration and logged its values.
    Only one call may run at a time.
    """
    counters = parts.state.counters
    try:
        reloaded = await _reload(parts, read, on_config, owns_log, is_first)
    except (ConfigError, CertificateError) as error:
        faults = error.faults if isinstance(error, ConfigError) else [str(error)]
        counters.reloads_refused += 1
        log.error("config.refused", faults=faults)
        parts.alerts.raise_(
            AlertKind.CONFIG_REFUSED,
            f"the configuration was refused, a restart would fail: {faults[0]}",
            changed=True,
            details={"faults": faults},
        )
        raise ConfigError(faults) from error
    counters.reloads += 1
    log.info(
        "config.reloaded",
        changed=[change.key for change in reloaded.applied],
        restart=[change.key for change in reloaded.needs_restart],
    )
    if is_first:
        for change in (*reloaded.applied, *reloaded.needs_restart):
            log.info(
                "config.changed",
                setting=change.key,
                old=change.old,
                new=change.new,
                effect=change.effect.value,
            )
    parts.alerts.resolve(AlertKind.CONFIG_REFUSED, "the configuration was reloaded")
    return reloaded


async def preview_reload(parts: Parts, read: ReadConfig, *, owns_log: bool) -> Reloaded:
    """Return what a reload would do, or raise the ConfigError with which it would be refused."""
    found = await _checked(parts, read)
    return _as_reloaded(changes_between(parts.config, found, frozenset() if owns_log else LOG_KEYS))


async def _checked(parts: Parts, read: ReadConfig) -> Config:
    """Return the configuration. Raises ConfigError if a server could not start with it."""
    found = await asyncio.to_thread(read)
    faults = await asyncio.to_thread(
        preflight,
        found,
        parts.home,
        parts.state.methods,
        running=parts.config,
        served=parts.certificates.serving.sites[0],
        has_users=parts.users is not None,
    )
    if faults:
        raise ConfigError([fault.message for fault in faults])
    return found


async def _reload(
    parts: Parts, read: ReadConfig, on_config: Callable[[Config], None], owns_log: bool, is_first: bool
) -> Reloaded:
    _check_draining(parts)
    old = parts.config
    found = await (_checked(parts, read) if is_first else asyncio.to_thread(read))
    kept = frozenset() if owns_log else LOG_KEYS
    changes = changes_between(old, found, kept)
    new = effective(old, found, kept)
    access = access_of(parts.state.methods, new.auth.role)
    sinks = await asyncio.to_thread(sinks_of, new.alerts, parts.clock)
    log_change = await asyncio.to_thread(LogChange, old.log, new.log)

    def apply() -> None:
        _check_draining(parts)  # a drain may have begun meanwhile
        _apply(parts, new)
        parts.state.restrict(access)
        parts.alerts.reconfigure(new.alerts, sinks)
        watch_rates(parts)
        if owns_log:
            log_change.apply()
        on_config(new)

    before = _certificate_alerts(parts)
    try:
        checked = await parts.certificates.reconfigure(new, apply)
    except BaseException:
        log_change.drop()
        raise
    if new.auth.role != old.auth.role:
        await parts.state.cut_denied_streams()
    if checked:
        for kind, about, count in _certificate_alerts(parts):
            if (kind, about, count) in before:  # not raised again: the certificate is no longer configured
                parts.alerts.resolve(kind, about=about)
    return _as_reloaded(changes)


def _as_reloaded(changes: Sequence[ConfigChange]) -> Reloaded:
    return Reloaded(
        applied=[change for change in changes if change.effect is not Effect.RESTART],
        needs_restart=[change for change in changes if change.effect is Effect.RESTART],
    )


def _check_draining(parts: Parts) -> None:
    if parts.state.draining:
        raise ConfigError(["the server is draining and cannot reload; start it again"])


def _apply(parts: Parts, new: Config) -> None:
    """Apply what cannot fail."""
    state, limits, sessions = parts.state, new.limits, new.sessions
    parts.active.config = new
    state.reconfigure(connection_settings(new))
    if state.runs is not None:
        state.runs.reconfigure(run_limits(new), new.streams.durable_abandon_after)
    state.write_buffer_bytes = limits.write_buffer_bytes
    state.write_timeout = limits.write_timeout
    state.partial_frames.limits = partial_frame_limits(new)
    settings = replace(session_settings(new), max_sessions=state.registry.settings.max_sessions)
    if settings != state.registry.settings:
        state.registry.reconfigure(settings)
    state.binding.reconfigure(sessions.bind_address, sessions.bind_client)
    state.request_limits.reconfigure(request_settings(new))
    state.clients.limits = call_limits(new)
    state.threads.reconfigure(thread_limits(new))
    parts.login.throttle.reconfigure(limits.login_failures)
    parts.login.max_pending = limits.logins_pending
    parts.acceptor.handshake_timeout = new.tls.handshake_timeout
    parts.acceptor.client_pins = parse_pins(new.tls.client_pins)
    parts.listener.reconfigure(new)
    if parts.http is not None:
        parts.http.reconfigure(new)


def _certificate_alerts(parts: Parts) -> list[tuple[AlertKind, str, int]]:
    """Return the kind, subject and count of the open alerts about certificates."""
    return [
        (alert.kind, alert.about, alert.count)
        for alert in parts.alerts.center.open_alerts()
        if alert.kind in _CERTIFICATE_ALERTS
    ]
