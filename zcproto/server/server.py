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
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from zcproto.auth import ApiKeyAuthenticator, Authenticator, Login, Throttle, UserFile
from zcproto.certs import CertificatePair, ensure_own_certificates
from zcproto.clock import MS_PER_SECOND, Clock, Entropy, system_clock, system_entropy
from zcproto.config import Config, load_config
from zcproto.connection.settings import ConnectionSettings
from zcproto.deadlines import DeadlineWheel
from zcproto.errors import ConfigError
from zcproto.home import Home, resolve_home
from zcproto.server.app import App, Method
from zcproto.server.builtin import default_app, protocol_methods
from zcproto.server.eager import EagerTasks
from zcproto.server.listener import Listener, bind, log_listening
from zcproto.server.pauses import PauseMeter
from zcproto.server.protocol import ServerProtocol
from zcproto.server.serving import Serving, log
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.suites import SUITES
from zcproto.tls.context import can_choose_suites, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.server import TlsAcceptor, TlsServerTransport
from zcproto.tls.transport import LINGER_TIME

CLEANUP_SLOTS: Final = 2_000
"""Sessions looked at in one slice of the cleanup, about a millisecond of the loop."""

GOAWAYS_PER_TURN: Final = 100

CANCELLED_TIME: Final = 2.0
"""Seconds that methods have, once cancelled, to clean up after themselves."""

GC_THRESHOLDS: Final = (20_000, 50, 100)
"""Collections in the usual rhythm walk every object of 10,000 connections again and again."""


class Server:
    """A server for an application.

    `home` is the folder of users and certificates; by default the one that the command line uses, and so is
    the configuration.
    `authenticators` decide who may open sessions; by default API keys of the home's users.
    Raises ConfigError or CertificateError on entering, before anything listens.
    """

    def __init__(
        self,
        app: App | None = None,
        config: Config | None = None,
        *,
        home: Path | None = None,
        authenticators: Sequence[Authenticator] | None = None,
        progress: Callable[[str], None] = lambda sentence: None,
        clock: Clock = system_clock,
        entropy: Entropy = system_entropy,
    ) -> None:
        self._app = default_app() if app is None else app
        self.home = resolve_home(None, os.environ) if home is None else Home(home)
        self.config = load_config(None, home=self.home.path, environ=os.environ) if config is None else config
        self._authenticators = authenticators
        self._progress = progress
        self._clock = clock
        self._entropy = entropy
        self.certificates: list[CertificatePair] = []
        self._serving: Serving | None = None
        self._sockets: list[socket.socket] = []
        self._addresses: list[tuple[str, int]] = []
        self._closed = asyncio.Event()
        self._ending = asyncio.Lock()

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
        context = await asyncio.to_thread(self._load_certificates)
        wheel = DeadlineWheel(loop)
        settings = _session_settings(config)
        registry = SessionRegistry(settings, self._entropy)
        methods: dict[str, Method] = {}
        serving = Serving(
            settings=_connection_settings(config),
            registry=registry,
            methods=methods,
            wheel=wheel,
            tasks=EagerTasks(loop),
            call_soon=loop.call_soon,
            clock=self._clock,
            entropy=self._entropy,
            write_buffer_bytes=config.limits.write_buffer_bytes,
            write_timeout=config.limits.write_timeout,
            session_idle_timeout_ms=settings.idle_timeout_ms,
        )
        for method in (*protocol_methods(serving, self._login(), self.statistics), *self._app):
            methods[method.name] = method
        acceptor = TlsAcceptor(
            context,
            {"zcp/1": lambda: ServerProtocol(serving)},
            wheel,
            loop,
            suites=frozenset(config.tls.suites),
            handshake_timeout=config.tls.handshake_timeout,
            on_failure=self._tls_failed,
        )
        self._sockets = bind(config.server.host, config.server.port)
        self._addresses = [listening.getsockname()[:2] for listening in self._sockets]
        self._serving = serving
        self._acceptor = acceptor
        self._wheel = wheel
        self._listener = Listener(
            self._sockets,
            acceptor,
            serving,
            loop,
            max_handshakes=config.tls.max_handshakes,
            max_connections=config.limits.max_connections,
            connections_per_address=config.limits.connections_per_address,
        )
        self.pauses = PauseMeter(loop, lambda: serving.counters.requests + acceptor.handshakes_completed)
        self.pauses.start()
        self._cleanup = loop.create_task(self._clean_forever(registry))
        self._listener.start()
        log_listening(self._sockets)

    def _load_certificates(self) -> ssl.SSLContext:
        config = self.config
        if config.tls.suites[0] != SUITES[0] and not can_choose_suites():
            first = config.tls.suites[0]
            raise ConfigError(
                [f"tls.suites = [{first!r}, ...]: {SUITES[0]} must come first before Python 3.15"]
            )
        self.home.ensure()
        self.certificates = ensure_own_certificates(
            config.certificates.directory,
            names=config.certificates.names,
            key_types=config.certificates.key_types,
            lifetime=timedelta(seconds=config.certificates.lifetime),
            renew_before=timedelta(seconds=config.certificates.renew_before),
            renew_key=config.certificates.renew_key,
            now=datetime.fromtimestamp(self._clock.wall() / MS_PER_SECOND, UTC),
            progress=self._progress,
        )
        self._warn_of_expiry()
        pairs = [(pair.certificate, pair.key) for pair in self.certificates]
        return server_context(pairs, ["zcp/1"], config.tls.suites)

    def _warn_of_expiry(self) -> None:
        now = datetime.fromtimestamp(self._clock.wall() / MS_PER_SECOND, UTC)
        for pair in self.certificates:
            days_left = (pair.not_after - now).days
            log.info(
                "certificate.loaded",
                file=str(pair.certificate),
                key_type=pair.key_type,
                pin=pair.pin,
                days_left=days_left,
            )
            if days_left <= max(self.config.certificates.alert_days, default=0):
                log.warning("certificate.expires", file=str(pair.certificate), days_left=days_left)

    def _login(self) -> Login:
        authenticators = self._authenticators
        if authenticators is None:
            users = UserFile(self.home.users)
            users.load()
            authenticators = [
                ApiKeyAuthenticator(users, on_fault=_users_unreadable, on_recovered=_users_readable)
            ]
        return Login(authenticators, Throttle(self.config.limits.login_failures))

    # --- while it runs -------------------------------------------------------------------------------

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
    def pins(self) -> list[str]:
        """Pins of the public keys that are served, as clients take them."""
        return [pair.pin for pair in self.certificates]

    def _tls_failed(self, failure: TlsFailure, peer: str) -> None:
        self.serving.log_limited("tls.failed", f"{failure.value} {peer}", cause=failure.value, peer=peer)

    async def _clean_forever(self, registry: SessionRegistry) -> None:
        while True:
            await asyncio.sleep(self.config.store.cleanup_interval)
            sweeps = registry.sweeps
            while registry.sweeps == sweeps:
                registry.clean(self._clock.wall(), CLEANUP_SLOTS)
                await asyncio.sleep(0)

    def statistics(self) -> dict[str, Any]:
        """The figures of `server.stats`. Times in seconds, memory in bytes; pauses since the last call."""
        serving = self.serving
        counters = serving.counters
        acceptor = self._acceptor
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "connections": len(serving.connections),
            "tcp_connections": self._listener.connections,
            "sessions": len(serving.registry),
            "requests": counters.requests,
            "running": serving.tasks.running,
            "errors": {str(code): count for code, count in counters.errors.items()},
            "connections_opened": counters.connections_opened,
            "connections_ended": counters.connections_ended,
            "refused_per_address": counters.refused_per_address,
            "refused_full": counters.refused_full,
            "accept_failed": counters.accept_failed,
            "dropped_stale": counters.dropped_stale,
            "handshakes_completed": acceptor.handshakes_completed,
            "handshakes_in_progress": acceptor.handshakes_in_progress,
            "tls_failures": {failure.value: count for failure, count in acceptor.failures.items() if count},
            "cpu_s": used.ru_utime + used.ru_stime,
            "rss_bytes": resident_bytes(),
            "longest_pause_s": self.pauses.take_longest(),
            "pauses": self.pauses.counts,
        }

    # --- the end -------------------------------------------------------------------------------------

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
        self._listener.close()
        log.info("server.draining", connections=len(serving.connections))
        for number, protocol in enumerate(list(serving.connections)):
            protocol.go_away("draining")
            if number % GOAWAYS_PER_TURN == GOAWAYS_PER_TURN - 1:
                await asyncio.sleep(0)
        await self._within(limit, serving.wait_drained())
        cut_off = len(serving.connections)
        for protocol in list(serving.connections):
            protocol.cancel_all()
            protocol.close("drain_timeout")
        # close_notify is out: wait for the peers' ends, or for the linger time that resets the rest.
        await self._within(LINGER_TIME + 0.5, self._listener.wait_empty())
        stuck = await serving.tasks.close(CANCELLED_TIME)
        if stuck:
            log.error("server.methods_stuck", count=stuck)
        self._cleanup.cancel()
        self.pauses.stop()
        for waiting in self._wheel.close():  # handshakes that were never finished: nobody else would end them
            assert isinstance(waiting, TlsServerTransport), "all conversations have ended"
            waiting.abort()
        await self._within(LINGER_TIME, self._listener.wait_empty())
        serving.close()
        self._closed.set()
        log.info("server.ended", cut_off=cut_off)

    async def _within(self, seconds: float, condition: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(condition, seconds)

    async def wait_closed(self) -> None:
        """Return when the server has ended."""
        await self._closed.wait()


def _users_unreadable(error: ConfigError) -> None:
    log.error("users.unreadable", faults=error.faults)


def _users_readable() -> None:
    log.info("users.readable")


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes; the largest so far where /proc is missing."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tune_garbage_collector() -> None:
    """For a process that is a server and nothing else: keep collections away from what lives long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def _connection_settings(config: Config) -> ConnectionSettings:
    limits = config.limits
    return ConnectionSettings(
        max_frame=limits.max_frame_bytes,
        max_frame_before_session=limits.max_frame_bytes_before_session,
        max_streams=limits.max_streams,
        max_depth=limits.max_depth,
        tolerance_ms=_ms(config.freshness.tolerance),
        idle_timeout_s=limits.idle_timeout,
        open_timeout_s=config.sessions.open_timeout,
    )


def _session_settings(config: Config) -> SessionSettings:
    sessions = config.sessions
    return SessionSettings(
        lifetime_ms=_ms(sessions.lifetime),
        idle_timeout_ms=None if sessions.idle_timeout is None else _ms(sessions.idle_timeout),
        per_user=sessions.per_user,
        when_full="evict_oldest" if sessions.when_full == "evict_oldest" else "refuse",
        refresh=sessions.refresh,
        refresh_lifetime_ms=_ms(sessions.refresh_lifetime),
        refresh_grace_ms=_ms(sessions.refresh_grace),
    )


def _ms(seconds: float) -> int:
    return round(seconds * MS_PER_SECOND)
