"""A server on one event loop: it makes or loads its certificates, listens, serves, drains, ends.

    async with Server(app, config) as server:
        await server.wait_closed()

No certificate, no listening: everything that can be wrong is found before a port is bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from zcproto.admin.control import ControlSocket
from zcproto.admin.control_resources import ControlResources
from zcproto.admin.http_resources import ALPN, CertificateLife
from zcproto.admin.https import HTTP_ALPN, HttpSide
from zcproto.admin.metrics import USER_CHANGED, ServerMetrics
from zcproto.admin.status import ServerStatus
from zcproto.admin.traffic import Traffic
from zcproto.alerts.service import ServerAlerts, sinks_of
from zcproto.app.app import App, Method
from zcproto.auth import (
    Authenticator,
    CertificateAuthenticator,
    Device,
    Login,
    Throttle,
)
from zcproto.auth.device_directory import Devices
from zcproto.auth.user_directory import Users
from zcproto.certs import CertificatePair
from zcproto.certs.certificates import NextPins
from zcproto.certs.clients import user_of
from zcproto.certs.keeper import CertificateKeeper, Kept, unix_ms
from zcproto.certs.revoked import Issue, issue_of
from zcproto.common.clock import Clock, Entropy, system_clock, system_entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.home import Home, resolve_home
from zcproto.common.network import AddressSet
from zcproto.config import Config, load_config
from zcproto.errors import ConfigError
from zcproto.http.router import Router
from zcproto.observe.log import flush_log, tell_suppressed
from zcproto.observe.loop_lag import PauseMeter
from zcproto.observe.process import resident_bytes, used_cpu_s
from zcproto.runtime.alert_sources import (
    tell_certificate,
    tell_certificates_not_used,
    tell_refresh_reused,
    tell_revoked,
    tell_store,
    watch_rates,
)
from zcproto.runtime.reload import ReadConfig, Reloaded, Reloader
from zcproto.runtime.settings import connection_settings, session_settings, to_ms
from zcproto.runtime.store_setup import NEAR_CACHE, keeper_of, store_of
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import OnceOnly, answer_limits
from zcproto.server.listener import Listener, bind, log_listening, take_over
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import KEY_GONE, default_app, protocol_methods
from zcproto.server.state import Serving, log
from zcproto.sessions import SessionRegistry
from zcproto.sessions.binding import Binding
from zcproto.sessions.session import DEVICE_KEY
from zcproto.stores.service import StoredSessions
from zcproto.tls.context import can_choose_suites
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import parse_pins
from zcproto.tls.server import TlsAcceptor, TlsServerTransport
from zcproto.tls.suites import SUITES
from zcproto.tls.transport import LINGER_TIME
from zcproto.wire.message import encode_body

CLEANUP_SLOTS: Final = 2_000
"""Sessions looked at in one slice of the cleanup, about a millisecond of the loop."""

GOAWAYS_PER_TURN: Final = 100

CANCELLED_TIME: Final = 2.0
"""Seconds that methods have, once cancelled, to clean up after themselves."""

GC_THRESHOLDS: Final = (20_000, 50, 100)
"""Collections in the usual rhythm walk every object of 10,000 connections again and again."""


FLUSH_INTERVAL: Final = 1.0
"""Seconds until lines that nobody took are offered again, should no other line come."""

FLUSHES_PER_SUMMARY: Final = 60

SWITCH_INTERVAL: Final = 0.000_5
"""Seconds that another thread may keep the loop waiting for the interpreter: the usual 5 ms would be felt."""


T = TypeVar("T")


class Server:
    """A server for an application.

    `home` is the folder of users and certificates; by default the one that the command line uses, and so is
    the configuration.
    `authenticators` decide who may open sessions; by default API keys of the home's users.
    `read_config` reads the configuration again for `reload`; it is known if `config` is left out.
    `control` is whether there is a control socket in the home folder, which one server alone can have.
    `sockets` are listening ones to serve on, in place of `server.host` and `server.port`, and
    `redirect_sockets` in place of `http.redirect_port`; the server closes them.
    Raises ConfigError or CertificateError on entering, before anything listens.
    """

    def __init__(
        self,
        app: App | None = None,
        config: Config | None = None,
        *,
        home: Path | None = None,
        authenticators: Sequence[Authenticator] | None = None,
        sockets: Sequence[socket.socket] = (),
        redirect_sockets: Sequence[socket.socket] = (),
        progress: Callable[[str], None] = lambda sentence: None,
        read_config: ReadConfig | None = None,
        control: bool = True,
        clock: Clock = system_clock,
        entropy: Entropy = system_entropy,
    ) -> None:
        self._app = default_app() if app is None else app
        self.home = resolve_home(None, os.environ) if home is None else Home(home)
        if config is None:
            read_config = partial(load_config, None, home=self.home.path, environ=os.environ)
            config = read_config()
        self.config = _at_home(config, self.home)
        self._read_config = read_config
        self._wants_control = control
        self._control: ControlSocket | None = None
        self._reloader: Reloader | None = None
        self.on_drain: Callable[[float], None] = lambda limit: None
        """Called with the limit when `begin_drain` has begun to drain."""
        self._authenticators = authenticators
        self._progress = progress
        self._clock = clock
        self._entropy = entropy
        self._users: Users | None = None
        self._devices: Devices | None = None
        self._kept: Kept | None = None
        self._next_pins: NextPins | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._ending_tasks: set[asyncio.Task[Any]] = set()
        self._serving: Serving | None = None
        self._http: HttpSide | None = None
        self._sockets: list[socket.socket] = list(sockets)
        self._redirect_sockets = list(redirect_sockets)
        self._addresses: list[tuple[str, int]] = []
        self._closed = asyncio.Event()
        self._ending = asyncio.Lock()
        self.owns_log = False
        """Whether the log of the process goes by this server's configuration."""
        self.on_config: Callable[[Config], None] = lambda config: None
        """Called with each configuration that `reload` puts in force."""
        self.around_reload: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Entered while a configuration is read and put in force."""

    # --- start ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.drain()

    async def start(self) -> None:
        """Prepare everything, then listen."""
        config = self.config
        loop = asyncio.get_running_loop()
        self._check_suites()
        await asyncio.to_thread(self.home.ensure)
        sinks = await asyncio.to_thread(sinks_of, config.alerts, self._clock)
        alerts = self.alerts = ServerAlerts(
            config.alerts,
            sinks,
            clock=self._clock,
            entropy=self._entropy,
            source=_source(config.server.port),
        )
        on_store_event = partial(tell_store, alerts)
        keeper = self._keeper = CertificateKeeper(
            config,
            self._clock,
            [ALPN, HTTP_ALPN] if config.http.enabled else [ALPN],
            on_kept=self._serve_certificates,
            on_next_pins=self._announce_pins,
            on_notice=partial(tell_certificate, alerts),
            on_problem=partial(tell_certificates_not_used, alerts),
            progress=self._progress,
        )
        await keeper.start()
        assert self._kept is not None
        wheel = DeadlineWheel(loop)
        settings = session_settings(config)
        store = await asyncio.to_thread(store_of, config, self.home, on_store_event)
        is_shared = store is not None and store.shared
        if is_shared:
            settings = replace(settings, max_sessions=NEAR_CACHE)
        registry = SessionRegistry(settings, self._entropy)
        store_keeper = None
        if store is not None:
            store_keeper = keeper_of(
                store,
                config,
                self.home,
                registry,
                keep_ended_ms=settings.dead_keep_ms,
                is_used=lambda session_id: self.serving.uses(session_id),  # noqa: PLW0108 - made below
                wheel=wheel,
                clock=self._clock,
                entropy=self._entropy,
                on_event=on_store_event,
            )
        methods: dict[str, Method] = {}
        tasks = EagerTasks(loop)
        serving = Serving(
            settings=replace(connection_settings(config), looks_up=is_shared),
            registry=registry,
            methods=methods,
            wheel=wheel,
            tasks=tasks,
            call_soon=loop.call_soon,
            clock=self._clock,
            entropy=self._entropy,
            write_buffer_bytes=config.limits.write_buffer_bytes,
            write_timeout=config.limits.write_timeout,
            session_idle_timeout_ms=settings.idle_timeout_ms,
            once=OnceOnly(
                tasks,
                self._clock,
                store=None if store_keeper is None else store_keeper.store,
                keep_ms=to_ms(config.idempotency.keep),
                limits=answer_limits(config.idempotency.max_bytes, config.idempotency.per_user),
            ),
            binding=Binding(config.sessions.bind_address, config.sessions.bind_client),
        )
        login = self._login()
        if self._users is not None:
            serving.binding.is_user = self._users.is_user
        devices = self._devices
        enrollment = None if devices is None else devices.enrollment
        for method in (*protocol_methods(serving, login, self.statistics, enrollment), *self._app):
            methods[method.name] = method
        protocols: dict[str | None, Callable[[], asyncio.Protocol]] = {ALPN: lambda: ServerProtocol(serving)}
        if config.http.enabled:
            self._http = HttpSide(
                config,
                serving,
                certificates=self._lives,
                schemes=login.schemes,
                figures=lambda: self.status.figures(),  # noqa: PLW0108 - made below
                metrics=lambda accept: self.metrics.render(accept),  # noqa: PLW0108 - made below
            )
            protocols |= self._http.protocols
        acceptor = TlsAcceptor(
            self._kept.contexts,
            protocols,
            wheel,
            loop,
            suites=frozenset(config.tls.suites),
            handshake_timeout=config.tls.handshake_timeout,
            on_failure=self._tls_failed,
            client_pins=parse_pins(config.tls.client_pins),
        )
        self._acceptor = acceptor
        self._serving = serving
        self._tell_pins()
        if store_keeper is not None:
            serving.sessions = StoredSessions(store_keeper, settings, self._clock)
            await store_keeper.start()
        serving.sessions.on_reuse = partial(tell_refresh_reused, alerts)
        serving.on_revoked = partial(tell_revoked, alerts)
        watch_rates(alerts, serving=serving, acceptor=acceptor, login=login)
        try:
            if self._wants_control:
                control = ControlSocket(self.home, serving, Router(ControlResources(self).routes()))
                if await asyncio.to_thread(control.open):
                    self._control = control
            if self._sockets:
                take_over(self._sockets)
            else:
                self._sockets = bind(config.server.host, config.server.port)
            self._addresses = [listening.getsockname()[:2] for listening in self._sockets]
            if self._http is not None and (config.http.redirect_port or self._redirect_sockets):
                self._http.redirect(self._certificate_names, self.port, self._redirect_sockets)
            elif self._redirect_sockets:
                raise ConfigError(
                    ["http.enabled = false: a socket for http.redirect_port was passed all the same"]
                )
        except BaseException:
            await serving.sessions.stop()
            if self._control is not None:
                self._control.close()
            for listening in (*self._sockets, *self._redirect_sockets):
                listening.close()
            raise
        self._wheel = wheel
        self._listener = Listener(
            self._sockets,
            acceptor,
            serving,
            loop,
            max_handshakes=config.tls.max_handshakes,
            max_connections=config.limits.max_connections,
            connections_per_address=config.limits.connections_per_address,
            balancers=AddressSet(config.server.proxy_protocol_from),
        )
        self.pauses = PauseMeter(loop, lambda: serving.counters.requests + acceptor.handshakes_completed)
        self.pauses.start()
        self.metrics = ServerMetrics(
            config=lambda: self.config,
            session_settings=settings,
            clock=self._clock,
            serving=serving,
            acceptor=acceptor,
            listener=self._listener,
            login=login,
            certificates=keeper,
            pauses=self.pauses,
            alerts=alerts,
            store=store_keeper,
            http=self._http,
        ).metrics()
        traffic = Traffic(self._clock, serving.counters, acceptor, methods)
        self.status = ServerStatus(
            config=lambda: self.config,
            addresses=lambda: self.addresses,
            clock=self._clock,
            started_at=self._clock.wall(),
            serving=serving,
            acceptor=acceptor,
            listener=self._listener,
            certificates=keeper,
            pauses=self.pauses,
            alerts=alerts,
            traffic=traffic,
            http=self._http,
        )
        self._reloader = Reloader(
            config=config,
            read=None if self._read_config is None else self._read_again,
            on_config=self._configured,
            watch=partial(watch_rates, serving=serving, acceptor=acceptor, login=login),
            clock=self._clock,
            serving=serving,
            acceptor=acceptor,
            listener=self._listener,
            keeper=keeper,
            throttle=self._throttle,
            alerts=alerts,
            session_settings=settings,
            http=self._http,
            owns_log=self.owns_log,
        )
        self._start_task(traffic.run())
        self._start_task(look_after_log())
        if store_keeper is None:
            self._start_task(self._clean_forever(registry))
        alerts.source = _source(self.port)
        alerts.start()
        self._start_task(alerts.run())
        self._start_task(keeper.run())
        if devices is not None:
            self._start_task(devices.watch())
        if self._users is not None:
            self._start_task(self._users.watch())
        if self._control is not None:
            self._control.start(loop)
        self._listener.start()
        if self._http is not None:
            await self._http.start_redirecting()
        log_listening(self._sockets)

    def _check_suites(self) -> None:
        first = self.config.tls.suites[0]
        if first != SUITES[0] and not can_choose_suites():
            raise ConfigError(
                [f"tls.suites = [{first!r}, ...]: {SUITES[0]} must come first before Python 3.15"]
            )

    def _login(self) -> Login:
        authenticators = self._authenticators
        throttle = self._throttle = Throttle(self.config.limits.login_failures)
        if authenticators is None:
            users = self._users = Users(self.home, on_gone=self._user_gone)
            self._devices = Devices(
                self.home,
                users.current,
                throttle,
                on_gone=self._device_gone,
                on_refused=self._device_refused,
            )
            authenticators = [users.authenticator, self._devices.authenticator]
            if self.config.tls.client_auth != "off":
                authenticators.append(
                    CertificateAuthenticator(users.current, self._user_of, on_refused=self._login_refused)
                )
        return Login(authenticators, throttle)

    def _user_of(self, certificate: bytes) -> str:
        return user_of(certificate, self.config.tls.client_name, self._keeper.now())

    def _login_refused(self, reason: str, address: str) -> None:
        log.info("login.certificate_refused", peer=address, reason=reason)

    def _device_refused(self, reason: str, address: str) -> None:
        log.info("login.device_refused", peer=address, reason=reason)

    async def _user_gone(self, name: str) -> int:
        """End the sessions of a user who is none any more, or somebody else."""
        ended = await self.serving.sessions.revoke_user(name, USER_CHANGED)
        log.info("user.gone", user=name, sessions=ended)
        self.serving.on_revoked(f"the user {name} was removed or changed", ended, False)
        return ended

    async def _device_gone(self, name: str, device: Device) -> int:
        """End the sessions of a device that is removed. No connection counts as its own any more."""
        key = DEVICE_KEY + name
        for protocol in self.serving.connections:
            protocol.disprove(key)
        ended = await self.serving.sessions.revoke_key(device.user, key, KEY_GONE)
        log.info("device.gone", device=name, user=device.user, sessions=ended)
        self.serving.on_revoked(f"the device {name} of {device.user} was removed", ended, False)
        return ended

    # --- while it runs -------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def users(self) -> Users | None:
        """The users of the home folder; None if others decide who may open sessions."""
        return self._users

    @property
    def devices(self) -> Devices | None:
        """The devices of the home folder; None if others decide who may open sessions."""
        return self._devices

    @property
    def next_pins(self) -> NextPins | None:
        """What is announced of keys to come."""
        return self._next_pins

    async def make_certificates(self, make: Callable[[datetime], T]) -> T:
        """Have own certificates made in a thread, and serve them by the time that this returns.

        `make` gets the wall time, aware. What it raises is raised.
        """
        made = await asyncio.to_thread(make, self._keeper.now())
        await self._keeper.look()
        return made

    async def reload(self) -> Reloaded:
        """Read the configuration again, and put it in force: all that can be, or nothing.

        Raises ConfigError with all faults; then nothing has changed. No connection is closed by it.
        """
        if self._reloader is None:
            raise ConfigError(["the server has not been started: it reads its configuration when it is"])
        # A task of its own: who asked may go away, and a half of it must not be left.
        reload = asyncio.get_running_loop().create_task(self._reload(self._reloader))
        self._ending_tasks.add(reload)
        reload.add_done_callback(self._reload_done)
        return await asyncio.shield(reload)

    async def _reload(self, reloader: Reloader) -> Reloaded:
        with self.around_reload():
            return await reloader.reload()

    def _reload_done(self, reload: asyncio.Task[Reloaded]) -> None:
        self._ending_tasks.discard(reload)
        if not reload.cancelled():
            reload.exception()  # it is for who asked, if that is still there

    @property
    def can_reload(self) -> bool:
        """Whether there is a configuration to be read again, now."""
        return self._read_config is not None and self._reloader is not None

    def _read_again(self) -> Config:
        assert self._read_config is not None
        return _at_home(self._read_config(), self.home)

    def _configured(self, config: Config) -> None:
        self.config = config
        self.on_config(config)

    @property
    def serving(self) -> Serving:
        assert self._serving is not None, "the server has not been started"
        return self._serving

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where it listens, or listened: host and port."""
        return self._addresses

    @property
    def port(self) -> int:
        return self.addresses[0][1]

    @property
    def certificates(self) -> list[CertificatePair]:
        """What is served to whoever asks for no site's name; nothing before the start."""
        return [] if self._kept is None else list(self._kept.certificates.default.pairs)

    @property
    def pins(self) -> list[str]:
        """Pins of the public keys that are served, as clients take them."""
        return [pair.pin for pair in self.certificates]

    def _lives(self) -> list[CertificateLife]:
        now = self._keeper.now()
        return [
            CertificateLife(pair.key_type, (pair.not_after - now).total_seconds())
            for pair in self.certificates
        ]

    def _certificate_names(self) -> list[str]:
        assert self._kept is not None, "there is a certificate before anything listens"
        return [name for pair in self._kept.certificates.pairs for name in pair.names]

    def _start_task(self, work: Coroutine[Any, Any, None], *, keeps_going: bool = False) -> None:
        """Start what goes on until the server ends; or what brings about its end, and is not cancelled by it."""
        task = asyncio.get_running_loop().create_task(work)
        tasks: set[Any] = self._ending_tasks if keeps_going else self._background
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # --- certificates ----------------------------------------------------------------------------

    def _serve_certificates(self, kept: Kept) -> None:
        """Connections from here on get these; those that stand go on, unless their client's was revoked."""
        before, self._kept = self._kept, kept
        if before is None:
            return
        assert self._acceptor is not None
        self._acceptor.contexts = kept.contexts
        self._tell_pins()
        revoked = kept.revoked - before.revoked
        if revoked:
            self._start_task(self._close_revoked(revoked))

    def _announce_pins(self, next_pins: NextPins | None) -> None:
        self._next_pins = next_pins
        if self._serving is not None:
            self._tell_pins()

    def _tell_pins(self) -> None:
        serving, following = self.serving, self._next_pins
        serving.pins = tuple(self.pins)
        body = None
        serving.pins_next = None
        if following is not None:
            serving.pins_next = {"pins": list(following.pins), "from": unix_ms(following.use_from)}
            body = encode_body(["pins.next", serving.pins_next])
        self._start_task(serving.announce(body))

    async def _close_revoked(self, revoked: frozenset[Issue]) -> None:
        """A client whose certificate is revoked is not served on, whatever it has opened before."""
        for number, protocol in enumerate(list(self.serving.connections), 1):
            certificate = protocol.peer_certificate()
            if certificate is not None and issue_of(certificate) in revoked:
                log.warning("connection.certificate_revoked", peer=protocol.peer, connection=protocol.id)
                protocol.close("certificate_revoked")
            if number % GOAWAYS_PER_TURN == 0:
                await asyncio.sleep(0)
        if self._http is not None:
            self._http.close_those(lambda certificate: issue_of(certificate) in revoked)

    def _tls_failed(self, failure: TlsFailure, peer: str) -> None:
        log.info("tls.failed", cause=failure.value, peer=peer)

    async def _clean_forever(self, registry: SessionRegistry) -> None:
        while True:
            await asyncio.sleep(self.config.store.cleanup_interval)
            sweeps = registry.sweeps
            while registry.sweeps == sweeps:
                registry.clean(self._clock.wall(), CLEANUP_SLOTS)
                await asyncio.sleep(0)

    def summary(self) -> str:
        """What it does, in a sentence for people."""
        serving = self.serving
        return f"serving {len(serving.connections)} connections, {len(serving.registry)} sessions"

    def statistics(self) -> dict[str, Any]:
        """The figures of `server.stats`. Times in seconds, memory in bytes; pauses since the last call."""
        serving = self.serving
        counters = serving.counters
        acceptor = self._acceptor
        assert acceptor is not None
        return {
            "connections": len(serving.connections),
            "tcp_connections": self._listener.connections,
            "http": None if self._http is None else self._http.figures(),
            "sessions": len(serving.registry),
            "requests": counters.requests,
            "running": serving.tasks.running,
            "tasks": len(asyncio.all_tasks()),
            "errors": {str(code): count for code, count in counters.errors.items()},
            "connections_opened": counters.connections_opened,
            "connections_ended": counters.connections_ended,
            "refused_per_address": counters.refused_per_address,
            "refused_full": counters.refused_full,
            "accept_failed": counters.accept_failed,
            "dropped_stale": counters.dropped_stale,
            "refused_users": serving.binding.refused_users,
            "refused_addresses": serving.binding.refused_addresses,
            "refused_clients": serving.binding.refused_clients,
            "idempotency": serving.once.counts,
            "store": serving.sessions.statistics(),
            "handshakes_completed": acceptor.handshakes_completed,
            "handshakes_in_progress": acceptor.handshakes_in_progress,
            "tls_failures": {failure.value: count for failure, count in acceptor.failures.items() if count},
            "cpu_s": used_cpu_s(),
            "rss_bytes": resident_bytes(),
            "longest_pause_s": self.pauses.take_longest(),
            "longest_own_pause_s": self.pauses.take_longest_own(),
            "pauses": self.pauses.counts,
            **self._keeper.figures(),
        }

    # --- the end -------------------------------------------------------------------------------------

    def begin_drain(self, limit: float | None = None) -> None:
        """As `drain`, without waiting for the end."""
        limit = self.config.server.drain_timeout if limit is None else limit
        self._start_task(self.drain(limit), keeps_going=True)
        self.on_drain(limit)

    async def drain(self, limit: float | None = None) -> None:
        """Stop accepting, say GOAWAY, finish what runs within the limit, close every connection, end.

        `limit` in seconds; None is the configured one, 0 cancels what runs at once. Who calls while another
        drains waits for the same end.
        """
        async with self._ending:
            if self._serving is not None and not self._closed.is_set():
                await self._drain(self.config.server.drain_timeout if limit is None else limit)

    async def _drain(self, limit: float) -> None:
        serving = self.serving
        serving.draining = True
        if self._http is not None:
            self._http.drain()
        self._listener.close()
        serving.log_soon.write()
        log.info("server.draining", connections=len(serving.connections))
        for number, protocol in enumerate(list(serving.connections)):
            protocol.go_away("draining")
            if number % GOAWAYS_PER_TURN == GOAWAYS_PER_TURN - 1:
                await asyncio.sleep(0)
        await self._within(limit, self._wait_at_rest())
        if self._http is not None:
            self._http.end()
        cut_off = len(serving.connections)
        for protocol in list(serving.connections):
            protocol.cancel_all()
            protocol.close("drain_timeout")
        # close_notify is out: wait for the peers' ends, or for the linger time that resets the rest.
        await self._within(LINGER_TIME + 0.5, self._listener.wait_empty())
        stuck = await serving.tasks.close(CANCELLED_TIME)
        if stuck:
            log.error("server.methods_stuck", count=stuck)
        for task in self._background:
            task.cancel()
        await serving.sessions.stop()
        await self.alerts.stop()
        self.pauses.stop()
        serving.log_soon.write()
        if self._control is not None:
            self._control.close()
        for waiting in self._wheel.close():  # handshakes that were never finished: nobody else would end them
            assert isinstance(waiting, TlsServerTransport), "all conversations have ended"
            waiting.abort()
        await self._within(LINGER_TIME, self._listener.wait_empty())
        serving.close()
        self._closed.set()
        log.info("server.ended", cut_off=cut_off)
        tell_suppressed()
        flush_log()

    async def _wait_at_rest(self) -> None:
        await self.serving.wait_drained()
        if self._http is not None:
            await self._http.wait_at_rest()

    async def _within(self, seconds: float, condition: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await condition

    async def wait_closed(self) -> None:
        """Return when the server has ended."""
        await self._closed.wait()


def _at_home(config: Config, home: Home) -> Config:
    """A configuration that names no folder of certificates has them in the home folder."""
    if "directory" in config.certificates.model_fields_set:
        return config
    certificates = config.certificates.model_copy(update={"directory": home.certs})
    return config.model_copy(update={"certificates": certificates})


def _source(port: int) -> str:
    """Which server it is, for whoever gets its alerts."""
    return f"{socket.gethostname()}:{port}"


async def look_after_log() -> None:
    """Write what waited for a reader or for the disk, and once a minute how much was left out. Until cancelled."""
    while True:
        for _ in range(FLUSHES_PER_SUMMARY):
            await asyncio.sleep(FLUSH_INTERVAL)
            flush_log()
        tell_suppressed()


def tune_interpreter() -> None:
    """For a process that is a server and nothing else: short turns for other threads (certificates, the disk),
    and collections kept away from what lives long."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
