"""Build the parts of a server from its configuration, in order of dependency.

    build_alerts -> build_certificates -> build_state -> build_login -> build_endpoints -> Parts

Nothing listens or runs yet; zcproto/runtime/server.py starts the parts. All faults of the configuration and the
certificates are raised here, before a port is bound.

A `WorkerRole` has the ports by which the processes of one server do together what must be done once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from zcproto.admin.https import HTTP_ALPN, HttpSide
from zcproto.admin.machines import build_tokens
from zcproto.admin.parts import ActiveConfig, FleetFigures, Parts
from zcproto.admin.resources import ALPN, Resources
from zcproto.admin.snapshot import stats_method
from zcproto.admin.traffic import Traffic
from zcproto.alerts.service import ServerAlerts, sinks_of
from zcproto.app.app import App
from zcproto.app.topics import Topic
from zcproto.auth import (
    BUILT_IN_SCHEMES,
    ApplicationAuthenticator,
    Authenticator,
    Authenticators,
    DeviceFile,
    Enrollment,
    Login,
    PairingFile,
    RegisteredDevice,
    Throttle,
    User,
    UserFile,
)
from zcproto.auth.directory import Directory, Origins
from zcproto.auth.identity import BuiltInSchemes
from zcproto.auth.jwt import IssuerKey, TokenRules
from zcproto.auth.oidc import IssuerKeys, JwtAuthenticator, Provider, TrustedIssuer
from zcproto.auth.schemes import ApiKeyAuthenticator, CertificateAuthenticator, DeviceAuthenticator
from zcproto.auth.throttle import LoginThrottle
from zcproto.bus.topics import Carrier, SharedTopics
from zcproto.certs.acme.challenges import challenge_folder
from zcproto.certs.client_user import user_of
from zcproto.certs.manager import CertificateManager
from zcproto.common.clock import MS_PER_SECOND, Clock, Entropy, random_fraction, system_clock, system_entropy
from zcproto.common.counts import ALONE, Counting
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.home import Home
from zcproto.common.https import verifying_context
from zcproto.common.text import extra_cure
from zcproto.config import AuthConfig, Config, OidcConfig, TelemetryConfig
from zcproto.connection.settings import ConnectionSettings, StreamLimits
from zcproto.errors import ConfigError
from zcproto.observe.loop_lag import Hold, LoopHolds, LoopLag
from zcproto.runs.log import RunLimits, RunTable
from zcproto.runs.store import MemoryRuns, RunStore
from zcproto.runtime.alert_sources import (
    on_certificate_notice,
    on_certificates_checked,
    on_file_read,
    on_issuer_answered,
    on_issuer_failed,
    on_refresh_reused,
    on_revoked,
    on_store_event,
    watch_rates,
)
from zcproto.runtime.store_setup import NEAR_CACHE, build_carrier, build_runs, build_store
from zcproto.server.access import access_of
from zcproto.server.clients import CallLimits, RegisteredClients
from zcproto.server.durable import serve_runs
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import IdempotencyCache, answer_limits
from zcproto.server.lifespan import Lifespans
from zcproto.server.listener import Listener
from zcproto.server.partial_frames import PartialFrameLimits, PartialFrames
from zcproto.server.protocol import ServerProtocol, TracedProtocol
from zcproto.server.protocol_methods import protocol_methods
from zcproto.server.remote_clients import RemoteClients
from zcproto.server.request_limits import RequestLimits, RequestSettings
from zcproto.server.state import (
    ConnectionsElsewhere,
    PendingElsewhere,
    ServerState,
    SessionConnections,
    log,
)
from zcproto.server.threads import ThreadLimits, ThreadPool
from zcproto.sessions import EndReason, SessionRegistry, SessionSettings
from zcproto.sessions.binding import SessionBinding
from zcproto.sessions.record import WhenFull
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import id_text
from zcproto.stores.base import HEARTBEAT_S, SessionStore
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.service import SessionService, StoredSessionService
from zcproto.stores.sync import StoreSync
from zcproto.tls.pins import parse_pins
from zcproto.tls.server import TlsAcceptor
from zcproto.wire.frame import LENGTH_SIZE

if TYPE_CHECKING:
    from zcproto.telemetry.export import Telemetry

ReportGone = Callable[[str, str, str], Awaitable[None]]
"""Report that a user or a device is gone: the kind of its file, its name, and the user."""


async def _report_to_none(kind: str, name: str, user: str) -> None:
    """No-op port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRole:
    """The ports of a process to the others of its server. By default it is the only process."""

    counting: Counting = ALONE
    """Counts for limits."""
    maintains: bool = True
    """Whether this process issues certificates, ends the sessions of users and devices that are gone, and removes
    expired entries from the store. If not, another one does."""
    has_lifespans: bool = True
    """Whether the lifespans of the application run in this process."""
    store: SessionStore | None = None
    """Replaces the configured store."""
    """Replaces the store of the configuration."""
    heartbeat: float = HEARTBEAT_S
    """Seconds between two pings of the store."""
    alerts: ServerAlerts | None = None
    """Replaces the alerts; another process logs and delivers them."""
    throttle: LoginThrottle | None = None
    """Replaces the throttle of logins."""
    report_gone: ReportGone = _report_to_none
    """Called without `maintains`, to have the sessions of a user or device ended by another process."""
    run: str | None = None
    """The prefix of connection ids; None for a random one."""
    fleet: Callable[[Parts], FleetFigures] | None = None
    """Makes the reports of all processes from the parts of this one."""
    topics: Carrier | None = None
    """Takes events to the topics of the other processes."""
    runs: RunStore | None = None
    """The durable runs that the processes share."""
    calls: PendingElsewhere | None = None
    """The pending calls of the processes that serve clients."""
    connections: Callable[[ServerState], ConnectionsElsewhere] | None = None
    """Makes the lookup of connections in other processes from the state of this one."""


SINGLE: Final = WorkerRole()


async def build(
    config: Config,
    home: Home,
    app: App,
    *,
    authenticators: Authenticators | None = None,
    role: WorkerRole = SINGLE,
    progress: Callable[[str], None] = lambda sentence: None,
    clock: Clock = system_clock,
    entropy: Entropy = system_entropy,
) -> Parts:
    """Build all parts of a server. Raises ConfigError or CertificateError."""
    await asyncio.to_thread(home.ensure)
    active = ActiveConfig(config)
    loop = asyncio.get_running_loop()
    wheel = DeadlineWheel(loop)
    alerts = await build_alerts(config, clock, entropy) if role.alerts is None else role.alerts
    certificates = await build_certificates(config, alerts, clock, progress, role.maintains)
    store = role.store
    if store is None:
        store = await asyncio.to_thread(build_store, config, home, partial(on_store_event, alerts))
    settings = session_settings(config)
    if store is not None and store.shared:
        settings = replace(settings, max_sessions=NEAR_CACHE)
    await asyncio.sleep(0)  # here and below: a coordinator answers the workers, whose logins wait
    state, sync = build_state(
        config,
        home,
        settings,
        alerts,
        wheel,
        clock,
        entropy,
        store,
        role.counting,
        role.maintains,
        role.heartbeat,
    )
    if role.run is not None:
        state.run = role.run
    if role.connections is not None:
        state.connections_elsewhere = role.connections(state)
    jwt = await asyncio.to_thread(build_jwt, config.auth, clock, alerts)
    on_read = partial(on_file_read, alerts)
    login = build_login(
        active,
        home,
        state,
        app.authenticators if authenticators is None else authenticators,
        jwt=jwt,
        now=certificates.now,
        throttle=role.throttle,
        counting=role.counting,
        report_gone=None if role.maintains else role.report_gone,
        on_read=on_read,
    )
    acceptor, listener, http = build_endpoints(active, state, certificates, wheel, role.counting)
    loop_lag = LoopLag(
        loop,
        lambda: state.counters.requests + acceptor.handshakes_completed,
        is_waiting=lambda: state.tasks.running,
    )
    state.traffic_begins = loop_lag.traffic_begins
    await asyncio.sleep(0)
    state.add_methods([*protocol_methods(state, login.login, login.enrollment, app), *app])
    topics = [method.topic for method in app if method.topic is not None and method.topic.scope == "server"]
    if role.calls is not None:
        state.pending_elsewhere = role.calls
    if topics or role.has_lifespans:
        carrier = role.topics or await asyncio.to_thread(build_carrier, store, config, home, entropy)
        if carrier is not None:
            state.topics = share_topics(topics, carrier, clock)
            if role.has_lifespans:
                state.remote_clients = remote = RemoteClients(state, state.topics)
                state.pending_elsewhere = remote.pending
    if any(method.is_durable for method in app):
        limits = run_limits(config)
        runs = role.runs or await asyncio.to_thread(build_runs, store, config, home, entropy, limits)
        serve_runs(
            state, runs or MemoryRuns(RunTable(limits), clock.now), config.streams.durable_abandon_after
        )
    parts = Parts(
        active=active,
        home=home,
        clock=clock,
        started_at=clock.wall(),
        alerts=alerts,
        certificates=certificates,
        state=state,
        store=sync,
        login=login.login,
        jwt=jwt,
        users=login.users,
        devices=login.devices,
        tokens=None
        if http is None
        else build_tokens(
            home,
            login.login,
            alerts,
            clock,
            certificates.now,
            reports=role.maintains,
            on_read=partial(on_read, home.tokens),
        ),
        acceptor=acceptor,
        listener=listener,
        http=http,
        lifespans=Lifespans(app.lifespans() if role.has_lifespans else {}, state.lifespan_values),
        loop_lag=loop_lag,
        traffic=Traffic(clock, state.counters, acceptor, state.methods, loop_lag),
    )
    if role.fleet is not None:
        parts = replace(parts, fleet=role.fleet(parts))
    watch_rates(parts)
    state.add_methods([stats_method(parts)])
    state.restrict(access_of(state.methods, config.auth.role))
    await asyncio.sleep(0)
    if role.has_lifespans:  # else no client calls a method
        state.prepare_schemas()
    functions = [each for method in state.methods.values() for each in method.functions()]
    loop_lag.holds = LoopHolds(loop_lag.overdue, functions, _log_hold)
    if http is not None:
        for route in Resources(parts).routes():
            http.router.add(route)
    return parts


def share_topics(topics: Iterable[Topic[Any]], carrier: Carrier, clock: Clock) -> SharedTopics:
    """Join topics with those of the other processes of the server."""
    shared = SharedTopics(carrier, clock.now)
    for topic in topics:
        if topic.carrier is None:  # else another server of this process has joined it
            shared.add(topic)
    return shared


def _log_hold(hold: Hold) -> None:
    log.warning("loop.held", what=hold.method, at=hold.at, seconds=round(hold.seconds, 3))


async def build_alerts(config: Config, clock: Clock, entropy: Entropy) -> ServerAlerts:
    """Build the alerts and the sinks that they are sent to."""
    sinks = await asyncio.to_thread(sinks_of, config.alerts, clock)
    source = alert_source(config.server.port)
    return ServerAlerts(config.alerts, sinks, clock=clock, entropy=entropy, source=source)


def alert_source(port: int) -> str:
    """Return the name of this server in its alerts."""
    return f"{socket.gethostname()}:{port}"


async def build_certificates(
    config: Config,
    alerts: ServerAlerts,
    clock: Clock,
    progress: Callable[[str], None],
    maintains: bool,
) -> CertificateManager:
    """Load the certificates, or issue them if the server manages its own and this process maintains them."""
    certificates = CertificateManager(
        config,
        clock,
        [ALPN, HTTP_ALPN] if config.http.enabled else [ALPN],
        on_notice=partial(on_certificate_notice, alerts) if maintains else lambda notice: None,
        on_problem=partial(on_certificates_checked, alerts),
        progress=progress,
        maintains=maintains,
    )
    await certificates.start()
    return certificates


def build_state(
    config: Config,
    home: Home,
    settings: SessionSettings,
    alerts: ServerAlerts,
    wheel: DeadlineWheel,
    clock: Clock,
    entropy: Entropy,
    store: SessionStore | None = None,
    counting: Counting = ALONE,
    maintains: bool = True,
    heartbeat: float = HEARTBEAT_S,
) -> tuple[ServerState, StoreSync | None]:
    """Build the state that all connections share, and the use of the store, None without a store."""
    loop = asyncio.get_running_loop()
    registry = SessionRegistry(settings, entropy)
    connections = SessionConnections()
    sync = None
    sessions = SessionService(registry, clock)
    if store is not None:
        sync = StoreSync(
            store,
            registry,
            PendingRevocations(home.revocations),
            is_used=connections.has_connection,
            in_use=lambda: connections,
            wheel=wheel,
            clock=clock,
            random=partial(random_fraction, entropy),
            timeout=config.store.timeout,
            grace=config.store.grace,
            keep_ended_ms=settings.dead_keep_ms,
            heartbeat=heartbeat,
            maintains=maintains,
            on_event=partial(on_store_event, alerts),
        )
        sessions = StoredSessionService(sync, clock)
    else:
        registry.is_disconnected = lambda raw_id: not connections.has_connection(id_text(raw_id))
    sessions.on_reuse = partial(on_refresh_reused, alerts)
    tasks = EagerTasks(loop)
    state = ServerState(
        settings=replace(connection_settings(config), looks_up=sessions.looks_up),
        registry=registry,
        wheel=wheel,
        tasks=tasks,
        call_soon=loop.call_soon,
        clock=clock,
        entropy=entropy,
        write_buffer_bytes=config.limits.write_buffer_bytes,
        write_timeout=config.limits.write_timeout,
        partial_frames=PartialFrames(partial_frame_limits(config)),
        sessions=sessions,
        session_connections=connections,
        idempotency=IdempotencyCache(
            tasks,
            clock,
            wheel,
            breaker=None if sync is None else sync.breaker,
            keep_ms=to_ms(config.idempotency.keep),
            limits=answer_limits(config.idempotency.max_bytes, config.idempotency.per_user),
            max_running=config.idempotency.running_per_user,
            running_of=counting.counts("idempotency.running_per_user"),
        ),
        request_limits=RequestLimits(request_settings(config), counting),
        threads=ThreadPool(thread_limits(config)),
        clients=RegisteredClients(call_limits(config)),
        binding=SessionBinding(config.sessions.bind_address, config.sessions.bind_client),
        on_revoked=partial(on_revoked, alerts),
    )
    if sync is not None:
        sync.on_loaded = partial(_end_looking_up, state)
        sync.on_reached = state.idempotency.store_reached
        changed = sync.leases.connection_changed
        connections.on_changed = lambda session_id: None if state.draining else changed(session_id)
    return state, sync


def _end_looking_up(state: ServerState) -> None:
    """Refuse unknown tokens of new connections at once: the registry has all sessions."""
    state.settings = replace(state.settings, looks_up=False)


class LoginParts(NamedTuple):
    """The login. Users, devices and enrollment are `None` if the program's authenticators replace them."""

    login: Login
    users: Directory[User] | None = None
    devices: Directory[RegisteredDevice] | None = None
    enrollment: Enrollment | None = None


def build_login(
    active: ActiveConfig,
    home: Home,
    state: ServerState,
    authenticators: Authenticators,
    *,
    jwt: Authenticator | None = None,
    now: Callable[[], datetime],
    throttle: LoginThrottle | None = None,
    counting: Counting = ALONE,
    report_gone: ReportGone | None = None,
    on_read: Callable[[Path, Sequence[str]], None] = lambda path, faults: None,
) -> LoginParts:
    """Build the login. `BUILT_IN_SCHEMES` stands for the home's users, devices and client certificates, and `jwt`.

    `now` is the time by which certificates are valid. `report_gone` is None if this process ends the sessions of
    users and devices that are gone. `on_read` is called with the path of a file and its faults, as by `Directory`.
    """
    limits = active.config.limits
    if throttle is None:
        throttle = Throttle(limits.login_failures)

    def timeout() -> float:
        return active.config.limits.login_timeout

    found: list[Authenticator] = [
        each
        if isinstance(each, ApiKeyAuthenticator | DeviceAuthenticator | CertificateAuthenticator)
        else ApplicationAuthenticator(each, timeout, _log_login_refused, _log_login_timed_out)
        for each in authenticators
        if not isinstance(each, BuiltInSchemes)
    ]
    if jwt is not None:
        if BUILT_IN_SCHEMES not in authenticators:
            raise ConfigError(
                ["auth.oidc: the application has its own authenticators; add BUILT_IN_SCHEMES to them"]
            )
        found.append(ApplicationAuthenticator(jwt, timeout, _log_login_refused, _log_login_timed_out))
    if BUILT_IN_SCHEMES not in authenticators:
        return LoginParts(Login(found, throttle, limits.logins_pending, counting))
    users = Directory(
        UserFile(home.users),
        on_gone=partial(_end_user_sessions, state),
        on_gone_elsewhere=report_gone and partial(_report_user, report_gone),
        on_read=partial(on_read, home.users),
    )
    device_file = DeviceFile(home.devices)
    devices = Directory(
        device_file,
        on_gone=partial(_end_device_sessions, state),
        on_gone_elsewhere=report_gone and partial(_report_device, report_gone, state),
        on_read=partial(on_read, home.devices),
    )
    enrollment = Enrollment(PairingFile(home.pairing), device_file, users, throttle)
    found += ApiKeyAuthenticator(users), DeviceAuthenticator(devices, users, on_refused=_log_device_refused)
    if active.config.tls.client_auth != "off":

        def user_of_certificate(certificate: bytes) -> str:
            return user_of(certificate, active.config.tls.client_name, now())

        found.append(
            CertificateAuthenticator(users, user_of_certificate, on_refused=_log_certificate_refused)
        )
    origins = Origins(users, devices)
    state.binding.is_user, state.binding.origin_of = users.is_known, origins.of
    state.binding.is_origin = origins.applies
    login = Login(found, throttle, limits.logins_pending, counting)
    return LoginParts(login, users, devices, enrollment)


def _log_login_refused(scheme: str, reason: str, address: str) -> None:
    log.info("login.refused", scheme=scheme, peer=address, reason=reason)


def _log_login_timed_out(scheme: str, address: str) -> None:
    log.warning("login.timed_out", scheme=scheme, peer=address)


def _log_device_refused(reason: str, address: str) -> None:
    log.info("login.device_refused", peer=address, reason=reason)


def _log_certificate_refused(reason: str, address: str) -> None:
    log.info("login.certificate_refused", peer=address, reason=reason)


async def _end_user_sessions(state: ServerState, name: str, user: User) -> int:
    """End the sessions of a user who was removed or changed. Return how many."""
    ended = await state.revoke_all(name, EndReason.USER_CHANGED)
    log.info("user.gone", user=name, sessions=ended)
    state.on_revoked(f"the user {name} was removed or changed", ended, False)
    return ended


async def _end_device_sessions(state: ServerState, name: str, device: RegisteredDevice) -> int:
    """End the sessions of a device that was removed, and void its proofs on open connections. Return how many."""
    _disprove_device(state, name)
    ended = await state.sessions.revoke_key(device.user, DEVICE_KEY + name, EndReason.DEVICE_REMOVED)
    log.info("device.gone", device=name, user=device.user, sessions=ended)
    state.on_revoked(f"the device {name} of {device.user} was removed or changed", ended, False)
    return ended


def _disprove_device(state: ServerState, name: str) -> None:
    for connection in state.connections:
        connection.disprove(DEVICE_KEY + name)


async def _report_user(report: ReportGone, name: str, user: User) -> None:
    await report(UserFile.kind, name, name)


async def _report_device(report: ReportGone, state: ServerState, name: str, device: RegisteredDevice) -> None:
    _disprove_device(state, name)
    await report(DeviceFile.kind, name, device.user)


def build_endpoints(
    active: ActiveConfig,
    state: ServerState,
    certificates: CertificateManager,
    wheel: DeadlineWheel,
    counting: Counting,
) -> tuple[TlsAcceptor, Listener, HttpSide | None]:
    """Build the TLS endpoint and the protocols that are spoken on it."""
    config = active.config
    loop = asyncio.get_running_loop()
    protocol = TracedProtocol if config.telemetry.traces else ServerProtocol
    protocols: dict[str | None, Callable[[], asyncio.Protocol]] = {ALPN: partial(protocol, state)}
    http = HttpSide(config, state, counting) if config.http.enabled else None
    if http is not None:
        protocols |= http.protocols
    acceptor = TlsAcceptor(
        certificates.serving.contexts,
        protocols,
        wheel,
        loop,
        handshake_timeout=config.tls.handshake_timeout,
        on_failure=lambda failure, peer: log.info("tls.failed", cause=failure.value, peer=peer),
        challenge_context=partial(challenge_context, active),
        on_challenge=lambda peer: log.info("tls.challenge_answered", peer=peer),
        client_pins=parse_pins(config.tls.client_pins),
    )
    return acceptor, Listener(acceptor, state, loop, config, counting), http


def challenge_context(active: ActiveConfig, server_name: str | None) -> ssl.SSLContext | None:
    """Return the context that answers a CA which checks a server name; None if none is expected."""
    folder = challenge_folder(active.config)
    return None if folder is None else folder.context(server_name)


def build_telemetry(config: TelemetryConfig, clock: Clock, entropy: Entropy) -> Telemetry | None:
    """Build the exporter of traces, metrics and log records; None if all are off. Raises as `check_telemetry`."""
    if not check_telemetry(config):
        return None
    from zcproto.telemetry.export import Telemetry  # noqa: PLC0415 - of an extra

    return Telemetry(config, clock, entropy)


def check_telemetry(config: TelemetryConfig) -> bool:
    """Return whether something is exported.

    Raises ConfigError for an unusable file or environment, and without the packages of the extra.
    """
    if not (config.traces or config.metrics or config.logs):
        return False
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    try:
        from zcproto.telemetry.export import check_environment, headers_of  # noqa: PLC0415 - of an extra
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError([f"telemetry: OpenTelemetry is not installed; {extra_cure('otel')}"]) from None
    check_environment(os.environ)
    headers_of(config.headers_file)
    return True


def build_jwt(config: AuthConfig, clock: Clock, alerts: ServerAlerts) -> JwtAuthenticator | None:
    """Return the authenticator of tokens, or None without an issuer. Reads files of CA certificates.

    Raises ConfigError for an unusable file, and without the packages of the extra.
    """
    if not config.oidc:
        return None
    try:
        import jwt  # noqa: F401, PLC0415 - it comes with an extra
    except ImportError:
        raise ConfigError([f"auth.oidc: PyJWT is not installed; {extra_cure('oidc')}"]) from None
    issuers = [
        _issuer(each, f"auth.oidc[{number}]", clock, alerts) for number, each in enumerate(config.oidc)
    ]
    return JwtAuthenticator(issuers, clock.wall)


def provider_of(config: OidcConfig, key: str) -> Provider:
    """Return the provider of a table, whose key is `key`. Raises ConfigError for an unusable file."""
    return Provider(config.issuer, verifying_context(config.ca_file, f"{key}.ca_file"))


def _issuer(config: OidcConfig, key: str, clock: Clock, alerts: ServerAlerts) -> TrustedIssuer:
    return TrustedIssuer(
        rules=TokenRules(
            issuer=config.issuer,
            audience=frozenset(config.audience),
            algorithms=frozenset(config.algorithms),
        ),
        keys=IssuerKeys(
            fetch=provider_of(config, key).keys,
            now=clock.now,
            events=_ReportedKeys(config.issuer, alerts),
        ),
        user_claim=config.user_claim,
        user_prefix=config.user_prefix,
        roles_claim=config.roles_claim,
        roles={each.rpartition("=")[0] or each: each.rpartition("=")[2] for each in config.roles},
        may_outlive=config.outlive_token,
    )


@dataclass(frozen=True, slots=True)
class _ReportedKeys:
    """Reports to the log and the alerts whether the keys of an issuer could be read."""

    issuer: str
    alerts: ServerAlerts

    def loaded(self, keys: Sequence[IssuerKey]) -> None:
        log.info("oidc.keys_loaded", issuer=self.issuer, count=len(keys))
        on_issuer_answered(self.alerts, self.issuer)

    def failed(self, reason: str, can_serve: bool) -> None:
        log.warning("oidc.keys_failed", issuer=self.issuer, reason=reason, can_serve=can_serve)
        on_issuer_failed(self.alerts, self.issuer, reason, can_serve)


# --- settings from the configuration ---------------------------------------------------------------------


def connection_settings(config: Config) -> ConnectionSettings:
    """Return the limits of future connections."""
    limits = config.limits
    return ConnectionSettings(
        max_frame=limits.max_frame_bytes,
        max_frame_before_session=limits.max_frame_bytes_before_session,
        max_streams=limits.max_streams,
        tolerance_ms=to_ms(config.freshness.tolerance),
        idle_timeout_s=limits.idle_timeout,
        frame_timeout_s=limits.frame_timeout,
        open_timeout_s=config.sessions.open_timeout,
        streams=stream_limits(config),
        max_calls=config.calls.max,
    )


def stream_limits(config: Config) -> StreamLimits | None:
    """Return the limits of streams; None if they are off."""
    streams = config.streams
    if not streams.max_open:
        return None
    return StreamLimits(
        max_open=streams.max_open,
        max_item=min(streams.max_item_bytes, config.limits.max_frame_bytes),
        window_items=streams.window_items,
        window_bytes=streams.window_bytes,
        memory_bytes=streams.memory_bytes,
        stall_timeout_s=streams.stall_timeout,
    )


def run_limits(config: Config) -> RunLimits:
    """Return the limits of durable runs."""
    streams = config.streams
    return RunLimits(
        runs_per_user=streams.durable_per_user, total_bytes=streams.durable_bytes, keep_s=streams.durable_keep
    )


def call_limits(config: Config) -> CallLimits:
    """Return the limits of calls to clients, beside that of each connection."""
    calls = config.calls
    return CallLimits(
        calls.per_user,
        calls.total,
        pending_per_user=calls.pending_per_user,
        pending_total=calls.pending_total,
    )


def thread_limits(config: Config) -> ThreadLimits:
    """Return the limits of methods that run in threads."""
    return ThreadLimits(config.limits.threads, config.limits.waiting_for_thread)


def partial_frame_limits(config: Config) -> PartialFrameLimits:
    """Return the bounds of incomplete frames; one frame of the largest size always fits."""
    limits = config.limits
    per_user = max(limits.partial_frame_bytes_per_user, limits.max_frame_bytes + LENGTH_SIZE)
    return PartialFrameLimits(max(limits.partial_frame_bytes, per_user), per_user)


def request_settings(config: Config) -> RequestSettings:
    """Return the limits of requests."""
    limits = config.limits
    return RequestSettings(
        per_user=limits.requests_per_user,
        per_address=limits.requests_per_address,
        public_per_address=limits.public_requests_per_address,
        running_per_user=limits.running_per_user,
        running_per_address=limits.running_per_address,
    )


def session_settings(config: Config) -> SessionSettings:
    """Return the lifetimes and limits of sessions."""
    sessions = config.sessions
    return SessionSettings(
        lifetime_ms=to_ms(sessions.lifetime),
        idle_timeout_ms=None if sessions.idle_timeout is None else to_ms(sessions.idle_timeout),
        per_user=sessions.per_user,
        when_full=cast("WhenFull", sessions.when_full),
        refresh=sessions.refresh,
        refresh_lifetime_ms=to_ms(sessions.refresh_lifetime),
        refresh_grace_ms=to_ms(sessions.refresh_grace),
    )


def to_ms(seconds: float) -> int:
    """Return seconds as whole milliseconds."""
    return round(seconds * MS_PER_SECOND)
