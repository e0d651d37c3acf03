"""The configuration read again while a server runs: all of it is put in force at once, or nothing.

    read and check it whole -> prepare what can fail (files, certificates) -> apply in one turn of the loop

What this file decides: what is prepared, what is applied to what. Which keys can be applied is in
zcproto/config/changes.py.

Rules:
- What fails does so before anything is applied; then all stays as it was, and the log says why.
- No connection is closed by it. Those that stand keep what they were told in WELCOME.
- Certificates are looked at anew where their settings have changed, and have to prove themselves first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from zcproto.admin.https import HttpSide
from zcproto.alerts import Alert, AlertKind
from zcproto.alerts.service import ServerAlerts, sinks_of
from zcproto.auth import Throttle
from zcproto.certs.keeper import CertificateKeeper
from zcproto.common.clock import Clock
from zcproto.common.network import AddressSet
from zcproto.config import Config
from zcproto.config.changes import TAKES_EFFECT, Change, Effect, changes_between, in_force
from zcproto.errors import CertificateError, ConfigError
from zcproto.observe.log import LogChange
from zcproto.runtime.settings import connection_settings, session_settings
from zcproto.server.listener import Listener
from zcproto.server.state import Serving, log
from zcproto.sessions import SessionSettings
from zcproto.tls.pins import parse_pins
from zcproto.tls.server import TlsAcceptor

ReadConfig = Callable[[], Config]

LOG_KEYS: Final = frozenset(key for key in TAKES_EFFECT if key.startswith("log."))

_OF_CERTIFICATES: Final = (
    AlertKind.CERTIFICATE_EXPIRY,
    AlertKind.CERTIFICATE_RENEWAL,
    AlertKind.CERTIFICATE_FILES,
)
"""What is raised anew by whoever looks at certificates anew, if it is still so."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload has changed, and what it could not change."""

    changes: tuple[Change, ...]

    @property
    def applied(self) -> list[Change]:
        return [change for change in self.changes if change.effect is not Effect.RESTART]

    @property
    def waiting(self) -> list[Change]:
        """What takes a restart."""
        return [change for change in self.changes if change.effect is Effect.RESTART]

    def as_dict(self) -> dict[str, Any]:
        return {
            "changed": [change.as_dict() for change in self.applied],
            "restart": [change.as_dict() for change in self.waiting],
        }


@dataclass(slots=True)
class Reloader:
    """Reloads one server. `read` reads its configuration, None if it was given by a program; `config` is in force.

    `owns_log`: the process's log is this server's, and `[log]` is applied.
    `on_config` is called with each configuration that is put in force.
    """

    config: Config
    read: ReadConfig | None
    on_config: Callable[[Config], None]
    watch: Callable[[ServerAlerts], None]
    clock: Clock
    serving: Serving
    acceptor: TlsAcceptor
    listener: Listener
    keeper: CertificateKeeper
    throttle: Throttle
    alerts: ServerAlerts
    session_settings: SessionSettings
    http: HttpSide | None = None
    owns_log: bool = False
    _one_at_a_time: asyncio.Lock | None = None

    async def reload(self) -> Reloaded:
        """Read the configuration, and put it in force. Raises ConfigError; then nothing has changed."""
        if self._one_at_a_time is None:
            self._one_at_a_time = asyncio.Lock()
        async with self._one_at_a_time:
            try:
                reloaded = await self._reload()
            except (ConfigError, CertificateError) as error:
                faults = error.faults if isinstance(error, ConfigError) else [str(error)]
                self.serving.counters.reloads_refused += 1
                log.error("config.refused", faults=faults)
                raise ConfigError(faults) from error
            self.serving.counters.reloads += 1
            log.info(
                "config.reloaded",
                changed=[change.key for change in reloaded.applied],
                restart=[change.key for change in reloaded.waiting],
            )
            return reloaded

    async def _reload(self) -> Reloaded:
        if self.read is None:
            raise ConfigError(
                [
                    "the program that runs this server has made its configuration: there is no file to read again"
                ]
            )
        self._check_draining()
        old, read = self.config, await asyncio.to_thread(self.read)
        kept = frozenset() if self.owns_log else LOG_KEYS
        reloaded = Reloaded(tuple(changes_between(old, read, kept)))
        new = in_force(old, read, kept)
        sinks = await asyncio.to_thread(sinks_of, new.alerts, self.clock)
        log_change = await asyncio.to_thread(LogChange, old.log, new.log)

        def apply() -> None:
            self._check_draining()  # it may have begun meanwhile
            self._apply(new)
            self.alerts.reconfigure(new.alerts, sinks, self.watch)
            if self.owns_log:
                log_change.apply()
            self.on_config(new)

        before = self._certificate_alerts()
        try:
            looked_anew = await self.keeper.reconfigure(new, apply)
        except BaseException:
            log_change.drop()
            raise
        if looked_anew:
            self._end_alerts(before)
        return reloaded

    def _check_draining(self) -> None:
        if self.serving.draining:
            raise ConfigError(["the server is draining: nothing is reloaded any more"])

    def _apply(self, new: Config) -> None:
        """Put in force what cannot fail."""
        self.config = new
        serving, limits, sessions = self.serving, new.limits, new.sessions
        serving.settings = replace(connection_settings(new), looks_up=serving.settings.looks_up)
        serving.write_buffer_bytes = limits.write_buffer_bytes
        serving.write_timeout = limits.write_timeout
        settings = replace(session_settings(new), max_sessions=self.session_settings.max_sessions)
        serving.session_idle_timeout_ms = settings.idle_timeout_ms
        if settings != self.session_settings:
            self.session_settings = settings
            serving.registry.reconfigure(settings)
            serving.sessions.reconfigure(settings)
        serving.binding.reconfigure(sessions.bind_address, sessions.bind_client)
        self.throttle.reconfigure(limits.login_failures)
        self.acceptor.handshake_timeout = new.tls.handshake_timeout
        self.acceptor.client_pins = parse_pins(new.tls.client_pins)
        self.listener.reconfigure(
            max_handshakes=new.tls.max_handshakes,
            max_connections=limits.max_connections,
            connections_per_address=limits.connections_per_address,
            balancers=AddressSet(new.server.proxy_protocol_from),
        )
        if self.http is not None:
            self.http.reconfigure(new)

    def _certificate_alerts(self) -> dict[tuple[AlertKind, str], Alert]:
        return {
            (alert.kind, alert.about): alert
            for alert in self.alerts.center.open_alerts()
            if alert.kind in _OF_CERTIFICATES
        }

    def _end_alerts(self, before: dict[tuple[AlertKind, str], Alert]) -> None:
        """End those that were not raised again, as what they are about is looked at no more."""
        for key, alert in self._certificate_alerts().items():
            old = before.get(key)
            if old is not None and old.count == alert.count:
                self.alerts.resolve(alert.kind, about=alert.about)
