"""Reloads the configuration of a running server: all of it applies at once, or nothing.

    read and check everything -> prepare what can fail (files, certificates) -> apply in one turn of the loop

What this file decides: what is prepared, and what each setting is applied to. zcproto/config/changes.py lists the
keys that can be applied.

Rules:
- A failure happens before anything is applied. Then nothing changes, and the log has the reason.
- No connection is closed. Existing ones keep the limits of their WELCOME.
- Certificates are loaded and tested again if their settings have changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from zcproto.admin.parts import Parts
from zcproto.alerts import Alert, AlertKind
from zcproto.alerts.service import sinks_of
from zcproto.config import Config
from zcproto.config.changes import TAKES_EFFECT, ConfigChange, Effect, changes_between, effective
from zcproto.errors import CertificateError, ConfigError
from zcproto.observe.log import LogChange
from zcproto.runtime.alert_sources import watch_rates
from zcproto.runtime.build import connection_settings, session_settings
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


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The result of a reload."""

    changes: tuple[ConfigChange, ...]

    @property
    def applied(self) -> list[ConfigChange]:
        return [change for change in self.changes if change.effect is not Effect.RESTART]

    @property
    def needs_restart(self) -> list[ConfigChange]:
        return [change for change in self.changes if change.effect is Effect.RESTART]

    def as_dict(self) -> dict[str, Any]:
        return {
            "changed": [change.as_dict() for change in self.applied],
            "restart": [change.as_dict() for change in self.needs_restart],
        }


class Reloader:
    """Reloads one server.

    `read` reads its configuration; None if a program gave it. `on_config` is called with each configuration that
    is applied. `owns_log` is whether `[log]` applies to the log of the process.
    """

    def __init__(
        self, parts: Parts, read: ReadConfig | None, *, on_config: Callable[[Config], None], owns_log: bool
    ) -> None:
        self._parts = parts
        self._read = read
        self._on_config = on_config
        self._owns_log = owns_log
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> Reloaded:
        """Read the configuration and apply it. Raises ConfigError; then nothing has changed."""
        async with self._one_at_a_time:
            try:
                reloaded = await self._reload()
            except (ConfigError, CertificateError) as error:
                faults = error.faults if isinstance(error, ConfigError) else [str(error)]
                self._parts.state.counters.reloads_refused += 1
                log.error("config.refused", faults=faults)
                raise ConfigError(faults) from error
            self._parts.state.counters.reloads += 1
            log.info(
                "config.reloaded",
                changed=[change.key for change in reloaded.applied],
                restart=[change.key for change in reloaded.needs_restart],
            )
            return reloaded

    async def _reload(self) -> Reloaded:
        if self._read is None:
            raise ConfigError(
                [
                    "the configuration comes from the program that runs this server;"
                    " restart that program, or let it pass read_config to Server"
                ]
            )
        self._check_draining()
        old, read = self._parts.config, await asyncio.to_thread(self._read)
        kept = frozenset() if self._owns_log else LOG_KEYS
        reloaded = Reloaded(tuple(changes_between(old, read, kept)))
        new = effective(old, read, kept)
        sinks = await asyncio.to_thread(sinks_of, new.alerts, self._parts.clock)
        log_change = await asyncio.to_thread(LogChange, old.log, new.log)

        def apply() -> None:
            self._check_draining()  # a drain may have begun meanwhile
            self._apply(new)
            self._parts.alerts.reconfigure(new.alerts, sinks, partial(watch_rates, self._parts))
            if self._owns_log:
                log_change.apply()
            self._on_config(new)

        before = self._certificate_alerts()
        try:
            checked = await self._parts.certificates.reconfigure(new, apply)
        except BaseException:
            log_change.drop()
            raise
        if checked:
            self._end_alerts(before)
        return reloaded

    def _check_draining(self) -> None:
        if self._parts.state.draining:
            raise ConfigError(["the server is draining and cannot reload; start it again"])

    def _apply(self, new: Config) -> None:
        """Apply what cannot fail."""
        parts, state, limits, sessions = self._parts, self._parts.state, new.limits, new.sessions
        parts.active.config = new
        state.settings = replace(connection_settings(new), looks_up=state.settings.looks_up)
        state.write_buffer_bytes = limits.write_buffer_bytes
        state.write_timeout = limits.write_timeout
        settings = replace(session_settings(new), max_sessions=state.registry.settings.max_sessions)
        if settings != state.registry.settings:
            state.registry.reconfigure(settings)
            state.sessions.reconfigure(settings)
        state.binding.reconfigure(sessions.bind_address, sessions.bind_client)
        parts.throttle.reconfigure(limits.login_failures)
        parts.acceptor.handshake_timeout = new.tls.handshake_timeout
        parts.acceptor.client_pins = parse_pins(new.tls.client_pins)
        parts.listener.reconfigure(new)
        if parts.http is not None:
            parts.http.reconfigure(new)

    def _certificate_alerts(self) -> dict[tuple[AlertKind, str], Alert]:
        return {
            (alert.kind, alert.about): alert
            for alert in self._parts.alerts.center.open_alerts()
            if alert.kind in _CERTIFICATE_ALERTS
        }

    def _end_alerts(self, before: dict[tuple[AlertKind, str], Alert]) -> None:
        """Resolve alerts that the check did not raise again: their certificates are no longer configured."""
        for key, alert in self._certificate_alerts().items():
            old = before.get(key)
            if old is not None and old.count == alert.count:
                self._parts.alerts.resolve(alert.kind, about=alert.about)
