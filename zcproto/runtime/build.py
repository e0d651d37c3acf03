"""Builds the parts of a server from its configuration, in order of dependency.

    build_alerts -> build_certificates -> build_state -> build_login -> build_endpoints -> Parts

Nothing listens or runs yet; zcproto/runtime/server.py starts what this file makes. All faults of the configuration
and the certificates are raised here, before a port is bound.

A `WorkerRole` replaces what workers of one server have in common, and leaves out what must be done once.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from math import inf
from typing import Final, NamedTuple, cast

from zcproto.admin.https import HTTP_ALPN, HttpSide
from zcproto.admin.machines import build_tokens
from zcproto.admin.merge import Whole
from zcproto.admin.parts import ActiveConfig, Parts
from zcproto.admin.resources import ALPN, Resources
from zcproto.admin.traffic import Traffic
from zcproto.admin.whole import stats_method
from zcproto.alerts.service import ServerAlerts, sinks_of
from zcproto.app.app import App
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
from zcproto.auth.schemes import ApiKeyAuthenticator, CertificateAuthenticator, DeviceAuthenticator
from zcproto.auth.throttle import LoginThrottle
from zcproto.certs.acme.challenges import challenge_folder
from zcproto.certs.client_user import user_of
from zcproto.certs.manager import CertificateManager
from zcproto.common.clock import MS_PER_SECOND, Clock, Entropy, random_fraction, system_clock, system_entropy
from zcproto.common.counts import ALONE, Counting
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.connection.settings import ConnectionSettings, StreamLimits, TransportSecurityPolicy
from zcproto.errors import ConfigError
from zcproto.observe.loop_holds import Hold, LoopHolds
from zcproto.observe.loop_lag import LoopLag
from zcproto.runtime.alert_sources import (
    on_certificate_notice,
    on_certificates_checked,
    on_refresh_reused,
    on_revoked,
    on_store_event,
    watch_rates,
)
from zcproto.runtime.oidc import build_jwt
from zcproto.runtime.store_setup import NEAR_CACHE, build_store
from zcproto.server.access import access_of
from zcproto.server.clients import CallLimits, RegisteredClients
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import IdempotencyCache, answer_limits
from zcproto.server.lifespan import Lifespans
from zcproto.server.listener import Listener
from zcproto.server.partial_frames import PartialFrameLimits, PartialFrames
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import protocol_methods
from zcproto.server.request_limits import RequestLimits, RequestSettings
from zcproto.server.state import ConnectionsElsewhere, ServerState, SessionConnections, log
from zcproto.server.threads import ThreadLimits, ThreadPool
from zcproto.server.traced_protocol import TracedProtocol
from zcproto.sessions import EndReason, SessionRegistry, SessionSettings
from zcproto.sessions.binding import SessionBinding
from zcproto.sessions.record import WhenFull
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import id_text
from zcproto.stores.base import HEARTBEAT_S, SessionStore
from zcproto.stores.hub import HubStore
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.service import SessionService, StoredSessionService
from zcproto.stores.sync import StoreSync
from zcproto.tls.context import SUITES, can_choose_suites
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import parse_pins
from zcproto.tls.server import TlsAcceptor
from zcproto.wire.frame import LENGTH_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRole:
    """What the process of a server shares with others. By default it is the only one."""

    counting: Counting = ALONE
    """Counts what is limited."""
    maintains: bool = True
    """Whether this process issues certificates, ends the sessions of users and devices that are gone, and removes
    expired entries from the store. If not, another one does."""
    has_lifespans: bool = True
    """Whether the lifespans of the application run in this process."""
    store: SessionStore | None = None
    """Replaces the store of the configuration."""
    alerts: ServerAlerts | None = None
    """Replaces the alerts, which are then logged and delivered by another process."""
    throttle: LoginThrottle | None = None
    """Replaces the throttle of logins."""
    report_gone: Callable[[str, str, str], Awaitable[None]] | None = None
    """Called without `maintains` with each user or device that is gone: see zcproto/runtime/gone.py."""
    run: str | None = None
    """The prefix of connection ids; None for a random one."""
    whole: Callable[[Parts], Whole] | None = None
    """Makes, of the parts of this process, what reports the figures of all."""
    connections: Callable[[ServerState], ConnectionsElsewhere] | None = None
    """Makes, of the state of this process, what finds the connections of sessions in the others."""


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
    first = config.tls.suites[0]
    if first != SUITES[0] and not can_choose_suites():
        raise ConfigError([f"tls.suites = [{first!r}, ...]: {SUITES[0]} must come first before Python 3.15"])
    await asyncio.to_thread(home.ensure)
    active = ActiveConfig(config)
    loop = asyncio.get_running_loop()
    wheel = DeadlineWheel(loop)
    alerts = await build_alerts(config, clock, entropy) if role.alerts is None else role.alerts
    certificates = await build_certificates(config, alerts, clock, progress, role)
    found = role.store
    if found is None:
        found = await asyncio.to_thread(build_store, config, home, partial(on_store_event, alerts))
    settings = session_settings(config)
    if found is not None and found.shared:
        settings = replace(settings, max_sessions=NEAR_CACHE)
    await asyncio.sleep(0)  # here and below: a coordinator answers the workers, whose logins wait
    state, store = build_state(config, home, settings, alerts, wheel, clock, entropy, found, role)
    jwt = await asyncio.to_thread(build_jwt, config.auth, clock, alerts)
    login = build_login(
        active,
        home,
        state,
        app.authenticators if authenticators is None else authenticators,
        jwt=jwt,
        now=certificates.now,
        role=role,
    )
    acceptor, listener, http = build_endpoints(active, state, certificates, wheel, role)
    loop_lag = LoopLag(
        loop,
        lambda: state.counters.requests + acceptor.handshakes_completed,
        is_waiting=lambda: state.tasks.running,
    )
    state.traffic_begins = loop_lag.traffic_begins
    await asyncio.sleep(0)
    state.add_methods([*protocol_methods(state, login.login, login.enrollment, app), *app])
    parts = Parts(
        active=active,
        home=home,
        clock=clock,
        started_at=clock.wall(),
        alerts=alerts,
        certificates=certificates,
        state=state,
        store=store,
        login=login.login,
        jwt=jwt,
        users=login.users,
        devices=login.devices,
        tokens=None
        if http is None
        else build_tokens(home, login.login, alerts, clock, certificates.now, reports=role.maintains),
        acceptor=acceptor,
        listener=listener,
        http=http,
        lifespans=Lifespans(app.lifespans() if role.has_lifespans else {}, state.lifespan_values),
        loop_lag=loop_lag,
        traffic=Traffic(clock, state.counters, acceptor, state.methods, loop_lag),
    )
    if role.whole is not None:
        parts = replace(parts, whole=role.whole(parts))
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
    role: WorkerRole = SINGLE,
) -> CertificateManager:
    """Load the certificates, or make them if the server manages its own and this process maintains them."""
    certificates = CertificateManager(
        config,
        clock,
        [ALPN, HTTP_ALPN] if config.http.enabled else [ALPN],
        on_notice=partial(on_certificate_notice, alerts) if role.maintains else lambda notice: None,
        on_problem=partial(on_certificates_checked, alerts),
        progress=progress,
        maintains=role.maintains,
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
    role: WorkerRole = SINGLE,
) -> tuple[ServerState, StoreSync | None]:
    """Build what all connections share, and the use of the store; None if sessions end with the process."""
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
            cleanup_interval=config.store.cleanup_interval,
            keep_ended_ms=settings.dead_keep_ms,
            # The changes of a hub are calls in this process: none is missed, however long it does not run.
            heartbeat=inf if isinstance(store, HubStore) else HEARTBEAT_S,
            maintains=role.maintains,
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
            running_of=role.counting.counts("idempotency.running_per_user"),
        ),
        request_limits=RequestLimits(request_settings(config), role.counting),
        threads=ThreadPool(thread_limits(config)),
        clients=RegisteredClients(call_limits(config)),
        binding=SessionBinding(config.sessions.bind_address, config.sessions.bind_client),
        on_revoked=partial(on_revoked, alerts),
    )
    if role.run is not None:
        state.run = role.run
    if role.connections is not None:
        state.connections_elsewhere = role.connections(state)
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
    role: WorkerRole = SINGLE,
) -> LoginParts:
    """Build the login. `BUILT_IN_SCHEMES` stands for the home's users, devices and client certificates, and `jwt`.

    `now` is the time by which certificates are valid.
    """
    limits = active.config.limits
    throttle = Throttle(limits.login_failures) if role.throttle is None else role.throttle

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
        return LoginParts(Login(found, throttle, limits.logins_pending, role.counting))
    users = Directory(
        UserFile(home.users),
        on_gone=partial(end_user_sessions, state),
        on_gone_elsewhere=None if role.maintains else partial(_leave_user, role),
    )
    device_file = DeviceFile(home.devices)
    devices = Directory(
        device_file,
        on_gone=partial(end_device_sessions, state),
        on_gone_elsewhere=None if role.maintains else partial(_leave_device, role, state),
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
    login = Login(found, throttle, limits.logins_pending, role.counting)
    return LoginParts(login, users, devices, enrollment)


def _log_login_refused(scheme: str, reason: str, address: str) -> None:
    log.info("login.refused", scheme=scheme, peer=address, reason=reason)


def _log_login_timed_out(scheme: str, address: str) -> None:
    log.warning("login.timed_out", scheme=scheme, peer=address)


def _log_device_refused(reason: str, address: str) -> None:
    log.info("login.device_refused", peer=address, reason=reason)


def _log_certificate_refused(reason: str, address: str) -> None:
    log.info("login.certificate_refused", peer=address, reason=reason)


async def end_user_sessions(state: ServerState, name: str, user: User) -> int:
    """End the sessions of a user who was removed or changed; return how many. `user` is the entry before."""
    ended = await state.sessions.revoke_user(name, EndReason.USER_CHANGED)
    log.info("user.gone", user=name, sessions=ended)
    state.on_revoked(f"the user {name} was removed or changed", ended, False)
    return ended


async def end_device_sessions(state: ServerState, name: str, device: RegisteredDevice) -> int:
    """End the sessions of a device that was removed; return how many. Its proofs on open connections are void."""
    disprove_device(state, name)
    ended = await state.sessions.revoke_key(device.user, DEVICE_KEY + name, EndReason.DEVICE_REMOVED)
    log.info("device.gone", device=name, user=device.user, sessions=ended)
    state.on_revoked(f"the device {name} of {device.user} was removed or changed", ended, False)
    return ended


def disprove_device(state: ServerState, name: str) -> None:
    """Void the proofs of a device on the open connections."""
    key = DEVICE_KEY + name
    for connection in state.connections:
        connection.disprove(key)


async def _leave_user(role: WorkerRole, name: str, user: User) -> None:
    """Leave the sessions of a user to the process that ends them."""
    if role.report_gone is not None:
        await role.report_gone(UserFile.kind, name, name)


async def _leave_device(role: WorkerRole, state: ServerState, name: str, device: RegisteredDevice) -> None:
    """Leave the sessions of a device to the process that ends them."""
    disprove_device(state, name)
    if role.report_gone is not None:
        await role.report_gone(DeviceFile.kind, name, device.user)


def build_endpoints(
    active: ActiveConfig,
    state: ServerState,
    certificates: CertificateManager,
    wheel: DeadlineWheel,
    role: WorkerRole = SINGLE,
) -> tuple[TlsAcceptor, Listener, HttpSide | None]:
    """Build the TLS endpoint and the protocols that are spoken on it."""
    config = active.config
    loop = asyncio.get_running_loop()
    protocol = TracedProtocol if config.telemetry.traces else ServerProtocol
    protocols: dict[str | None, Callable[[], asyncio.Protocol]] = {ALPN: partial(protocol, state)}
    http = HttpSide(config, state, role.counting) if config.http.enabled else None
    if http is not None:
        protocols |= http.protocols
    acceptor = TlsAcceptor(
        certificates.serving.contexts,
        protocols,
        wheel,
        loop,
        suites=frozenset(config.tls.suites),
        handshake_timeout=config.tls.handshake_timeout,
        on_failure=_log_tls_failure,
        challenge_context=partial(challenge_context, active),
        on_challenge=_log_challenge,
        client_pins=parse_pins(config.tls.client_pins),
    )
    return acceptor, Listener(acceptor, state, loop, config, role.counting), http


def challenge_context(active: ActiveConfig, server_name: str | None) -> ssl.SSLContext | None:
    """Return the context that answers a CA which checks a server name; None if none is expected."""
    folder = challenge_folder(active.config)
    return None if folder is None else folder.context(server_name)


def _log_challenge(peer: str) -> None:
    log.info("tls.challenge_answered", peer=peer)


def _log_tls_failure(failure: TlsFailure, peer: str) -> None:
    log.info("tls.failed", cause=failure.value, peer=peer)


# --- settings from the configuration ---------------------------------------------------------------------


def connection_settings(config: Config) -> ConnectionSettings:
    """Return the limits of future connections."""
    limits = config.limits
    return ConnectionSettings(
        max_frame=limits.max_frame_bytes,
        max_frame_before_session=limits.max_frame_bytes_before_session,
        max_streams=limits.max_streams,
        max_depth=limits.max_depth,
        tolerance_ms=to_ms(config.freshness.tolerance),
        idle_timeout_s=limits.idle_timeout,
        frame_timeout_s=limits.frame_timeout,
        open_timeout_s=config.sessions.open_timeout,
        # Independent of http.hsts, which is for browsers: these clients use TLS only.
        sts=TransportSecurityPolicy(config.http.hsts_max_age_seconds, config.http.hsts_include_subdomains),
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
        write_bytes=streams.write_bytes,
        stall_timeout_s=streams.stall_timeout,
    )


def call_limits(config: Config) -> CallLimits:
    """Return the limits of calls to clients, beside that of each connection."""
    calls = config.calls
    return CallLimits(calls.per_user, calls.total, calls.names_per_user)


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
