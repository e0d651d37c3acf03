"""Finds every reason why a server could not start with a configuration, without starting one.

    zcproto config check, zcproto doctor, each reload -> preflight -> all faults
    zcproto serve -> the parts are built, and the preflight completes the faults if that fails

Rules:
- Each check calls what the start of a server calls, so that a fault has one message and one cure.
- Nothing is created, changed or sent. A port is bound for a moment, and does not listen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from zcproto.alerts.service import ServerAlerts, sinks_of
from zcproto.app.app import App, Method
from zcproto.auth import BUILT_IN_SCHEMES, DeviceFile, UserFile
from zcproto.auth.tokens import TokenFile
from zcproto.certs.checker import CertificateChecker
from zcproto.certs.examine import survey
from zcproto.certs.external import ExternalSite, load_site
from zcproto.certs.pair import Site
from zcproto.certs.settings import certificate_settings
from zcproto.common.clock import MS_PER_SECOND, system_clock, system_entropy
from zcproto.common.home import Home
from zcproto.config import Config, RoleConfig
from zcproto.errors import CertificateError, ConfigError
from zcproto.observe.log import AUDIT_KEY
from zcproto.observe.output import LOG_KEY, check_log_file
from zcproto.runtime.build import build_jwt, check_telemetry
from zcproto.runtime.service_manager import has_socket_unit
from zcproto.runtime.store_setup import build_store
from zcproto.server.access import access_of
from zcproto.server.listener import bind


class Fault(NamedTuple):
    """Why a server could not start. `check` is one word for the part, as `zcproto doctor` shows it."""

    check: str
    message: str


def preflight(
    config: Config,
    home: Home,
    app: App | Mapping[str, Method] | None,
    *,
    running: Config | None = None,
    served: Site | None = None,
    has_users: bool = True,
) -> list[Fault]:
    """Return all faults. Reads files.

    `app` is the application, or all methods of a running server; None skips the check of the roles. `running` is
    the configuration of a server that runs, whose ports are in use, and `served` the certificates of its default
    site. `has_users` is whether users and devices are in files.
    """
    checks: list[tuple[str, Callable[[], object]]] = [("home", home.check)] if home.path.exists() else []
    for path, key in ((config.log.file, LOG_KEY), (config.log.audit_file, AUDIT_KEY)):
        if path is not None:
            checks.append(("log", partial(check_log_file, path, key)))
    if has_users and (not isinstance(app, App) or BUILT_IN_SCHEMES in app.authenticators):
        checks += ("users", UserFile(home.users).load), ("devices", DeviceFile(home.devices).load)
    if config.http.enabled:
        checks.append(("tokens", TokenFile(home.tokens).load))
    alerts = ServerAlerts(config.alerts, (), clock=system_clock, entropy=system_entropy)
    checks += [
        ("alerts", partial(sinks_of, config.alerts, system_clock)),
        ("store", partial(build_store, config, home)),
        ("issuer", partial(build_jwt, config.auth, system_clock, alerts)),
        ("collector", partial(check_telemetry, config.telemetry)),
    ]
    if isinstance(app, App):
        methods, roles = {method.name: method for method in app}, _of_application(config.auth.role)
        checks.append(("roles", partial(access_of, methods, roles)))
    elif app is not None:
        checks.append(("roles", partial(access_of, app, config.auth.role)))
    checks += (("port", partial(_check_port, config, port, key)) for port, key in _ports(config, running))
    found = [Fault(name, message) for name, check in checks for message in _faults_of(check)]
    return [*found, *(Fault("certificate", fault) for fault in certificate_faults(config, running, served))]


def _faults_of(check: Callable[[], object]) -> Sequence[str]:
    try:
        check()
    except ConfigError as error:
        return error.faults
    return []


def _of_application(roles: Sequence[RoleConfig]) -> list[RoleConfig]:
    """Return the roles without the patterns that mean methods of the server, which an application does not have."""

    def without(patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(each for each in patterns if not each.startswith("server."))

    return [
        role.model_copy(update={"allow": without(role.allow), "deny": without(role.deny)}) for role in roles
    ]


def certificate_faults(
    config: Config, running: Config | None = None, served: Site | None = None
) -> list[str]:
    """Return what is wrong with certificates that a start would neither serve nor replace, as in `preflight`."""
    now = datetime.fromtimestamp(system_clock.wall() / MS_PER_SECOND, UTC)
    try:
        settings = certificate_settings(config)
        faults = [
            each.problem
            for each in survey(config, now, os.environ).certificates
            if each.problem and each.use == "server" and not each.is_managed
        ]
        faults += CertificateChecker(settings, (), random=lambda: 0.0, environ=os.environ).faults(now)
        is_same = running is not None and certificate_settings(running) == settings
        if not faults and served is not None and is_same and isinstance(settings.default, ExternalSite):
            load_site(settings.default, now, os.environ, served)
    except CertificateError as error:
        return [str(error)]
    return list(dict.fromkeys(faults))


def _ports(config: Config, running: Config | None) -> Iterator[tuple[int, str]]:
    in_use = {0} if running is None else {0, running.server.port, running.http.redirect_port}
    for port, key in ((config.server.port, "server.port"), (config.http.redirect_port, "http.redirect_port")):
        if port not in in_use and not has_socket_unit(port):
            yield port, key


def _check_port(config: Config, port: int, key: str) -> None:
    for each in bind(config.server.host, port, key, backlog=0):
        each.close()
