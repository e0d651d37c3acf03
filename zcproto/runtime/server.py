"""A server on one event loop: it builds its parts, listens, serves, drains, ends.

    async with Server(app, config) as server:
        await server.wait_closed()

    build -> control socket -> sessions -> lifespan -> bind -> background work -> listen
    drain: stop accepting -> GOAWAY -> wait for running methods -> cancel -> close -> wait for the peers

Rules:
- All faults of the configuration, the certificates and the lifespan are raised before a port is bound.
- A method may finish within the limit of the drain; a caller whose method is cut off gets CANCELLED.
- A peer that does not close after close_notify is reset after the linger time.
- After the drain, what was started ends in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from zcproto.admin.control import ControlSocket, require_unused
from zcproto.admin.metrics import server_metrics
from zcproto.admin.operations import Operations
from zcproto.admin.parts import Parts
from zcproto.admin.snapshot import read_stats
from zcproto.admin.users import ServerUsers
from zcproto.alerts import AlertKind
from zcproto.app.app import App, default_app
from zcproto.app.context import ASK_TIMEOUT, ConnectedClient, result_of
from zcproto.auth import Authenticators
from zcproto.certs import authority
from zcproto.certs.pair import CertificatePair
from zcproto.common.clock import Clock, Entropy, system_clock, system_entropy
from zcproto.common.home import Home, resolve_home
from zcproto.common.misuse import wrong_use
from zcproto.common.text import counted
from zcproto.common.value_types import RETURNS_ANY, Returned
from zcproto.config import Config, load_config
from zcproto.connection.events import GoAwayReason
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import ConfigError, FailedPrecondition
from zcproto.http.messages import Router
from zcproto.observe.log import configure_logging, flush_log, is_configured, report_suppressed, set_level
from zcproto.runtime.background import background, background_work, roll_out_certificates
from zcproto.runtime.build import SINGLE, WorkerRole, alert_source, build, build_telemetry
from zcproto.runtime.process_setup import worker_count
from zcproto.runtime.reload import ReadConfig, Reloaded, preview_reload, reload_config
from zcproto.runtime.store_setup import run_limit
from zcproto.server.listener import bind
from zcproto.server.state import ServerState, log
from zcproto.sessions import EndReason
from zcproto.tls.server import TlsServerTransport
from zcproto.tls.transport import LINGER_TIME

if TYPE_CHECKING:
    from zcproto.telemetry.export import Telemetry

CANCELLED_TIME: Final = 2.0
"""Seconds that cancelled methods have to clean up."""

T = TypeVar("T")


class Server:
    """A server for an application.

    `home` is the folder of users and certificates; by default the one that the command line uses, and so is
    the configuration.
    `authenticators` decide who may open sessions; by default those of the application.
    Raises ConfigError, CertificateError or LifespanError on entering, before anything listens. A lifespan that
    fails later drains the server, and its error is raised on leaving.
    """

    def __init__(
        self,
        app: App | None = None,
        config: Config | None = None,
        *,
        home: str | Path | None = None,
        authenticators: Authenticators | None = None,
        sockets: Sequence[socket.socket] = (),
        redirect_sockets: Sequence[socket.socket] = (),
        progress: Callable[[str], None] = lambda sentence: None,
        read_config: ReadConfig | None = None,
        control: bool | socket.socket = True,
        addresses: Sequence[tuple[str, int]] = (),
        clock: Clock = system_clock,
        entropy: Entropy = system_entropy,
        role: WorkerRole = SINGLE,
    ) -> None:
        """Make a server. All other parameters are for `zcproto serve`, workers and tests.

        `read_config` reads the configuration again for `reload`; by default as `config` is read if it is left out.
        `control` is whether to open a control socket in the home folder, which only one server can have; or one
        that listens there already.
        `addresses` are those on which other processes accept, for a server that does not listen itself.
        `sockets` are listening sockets that replace `server.host` and `server.port`, and `redirect_sockets` those
        that replace `http.redirect_port`; the server closes them.
        """
        if not isinstance(app, App | None):
            raise TypeError(
                f"app is an App object, not {type(app).__name__}; zcproto serve takes a name like shop:app"
            )
        if not isinstance(config, Config | None):
            raise TypeError("config is a Config, such as Config(server=ServerConfig(port=7443))")
        self.home = resolve_home(None, os.environ) if home is None else Home(Path(home))
        if config is None:
            read_config = partial(load_config, None, home=self.home.path, environ=os.environ)
            config = read_config()
        self._first_config = at_home(config, self.home)
        self.read_config = read_config
        self._control_socket = control if isinstance(control, socket.socket) else None
        self._has_control = control is True
        self._addresses_elsewhere = list(addresses)
        self._is_alone, self._maintains = role is SINGLE, role.maintains
        self._build = partial(
            build,
            self._first_config,
            self.home,
            default_app() if app is None else app,
            authenticators=authenticators,
            progress=progress,
            clock=clock,
            entropy=entropy,
            role=role,
        )
        self._sockets = list(sockets)
        self._redirect_sockets = list(redirect_sockets)
        self._parts: Parts | None = None
        self._control: ControlSocket | None = None
        self._running = AsyncExitStack()
        self._requested: set[asyncio.Task[Any]] = set()
        self._closed = asyncio.Event()
        self._ending, self._reloading = asyncio.Lock(), asyncio.Lock()
        self.owns_log = False
        """Whether `[log]` of this configuration applies to the log of the process."""
        self.before_listening: Callable[[Sequence[str]], Awaitable[None]] | None = None
        """Awaited with the names of the certificate when all that can fail has been done, before anything is
        accepted."""
        self.on_reload_requested: Callable[[bool], Awaitable[None]] = _no_other_process
        """Awaited after a reload that an operator requested, for the other processes of the server: it was applied,
        or refused."""
        self.on_log_level: Callable[[], None] | None = None
        """Called when an operator has set the level of the log."""
        self.on_certificates: Callable[[], object] = lambda: None
        """Called when new certificates are in service."""
        self.on_drain_requested: Callable[[float], object] | None = None
        """Called in place of a drain that an operator requests."""
        self.on_upgrade_requested: Callable[[], object] | None = None
        """Called when an operator requests an upgrade; None if this server cannot be upgraded in place."""
        self.upgrade_failure = ""
        """Why the last upgrade has failed."""
        self.on_config: Callable[[Config], None] = lambda config: None
        """Called with each configuration that `reload` applies."""
        self.on_drain: Callable[[float], None] = lambda limit: None
        """Called with the limit when `begin_drain` has begun to drain."""
        self.on_connections_drained: Callable[[], object] = lambda: None
        """Called when durable methods go on after the connections have ended."""
        self.around_reload: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Entered while a configuration is read and applied."""

    # --- start ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    if not TYPE_CHECKING:
        __enter__ = __exit__ = wrong_use("write async with, or use zcproto.serve")

    async def __aexit__(self, *error: object) -> None:
        await self.drain()

    async def start(self) -> None:
        """Prepare everything, then listen."""
        async with AsyncExitStack() as stack:
            for passed in (*self._sockets, *self._redirect_sockets):
                stack.callback(passed.close)
            if self._is_alone and worker_count(self._first_config) > 1:
                raise ConfigError(
                    [
                        "server.workers: a Server in a program is one process; set it to 1, or run the application"
                        " by `zcproto serve` or zcproto.serve()"
                    ]
                )
            if self._first_config.log.model_fields_set and not is_configured():
                configure_logging(self._first_config.log)
                self.owns_log = True
            if self._has_control:
                await asyncio.to_thread(require_unused, self.home)
            parts = await self._build()
            runs = parts.state.runs
            if runs is not None:
                stack.push_async_callback(runs.store.stop)
            stack.push_async_callback(close_state, parts)
            telemetry = await self._start_telemetry(parts, stack)
            routes = Operations(
                parts,
                self.reload,
                self.preview_reload,
                self.begin_drain,
                self._set_log_level,
                self._begin_upgrade,
                lambda: self.upgrade_failure,
            ).routes()
            self._control = control = ControlSocket(self.home, parts.state, Router(routes))
            stack.callback(control.close)
            if self._control_socket is not None:
                control.listen_on([self._control_socket])
            elif self._has_control:
                await asyncio.to_thread(control.open)
            stack.push_async_callback(parts.alerts.stop)
            if parts.store is not None:
                await parts.store.start()
                stack.push_async_callback(parts.store.stop)
            if runs is not None:
                await runs.store.start()
            if parts.state.topics is not None:
                if parts.state.topics.is_used:  # else once the first client handles calls
                    await parts.state.topics.start()
                stack.push_async_callback(parts.state.topics.stop)
            if parts.state.remote_clients is not None:
                stack.push_async_callback(parts.state.remote_clients.stop)
            stack.push_async_callback(self._stop_lifespans, parts)
            await parts.lifespans.start(parts.config.server.lifespan_timeout, self.begin_drain)
            stack.callback(parts.listener.close)
            if parts.http is not None:
                stack.callback(parts.http.close)
            self._bind(parts)
            parts.alerts.source = alert_source(parts.listener.addresses[0][1])
            parts.alerts.start()
            stack.callback(parts.loop_lag.stop)
            parts.loop_lag.start()
            spawn = await stack.enter_async_context(background())
            roll_out_certificates(parts, spawn, self.on_certificates)
            for work in background_work(parts):
                spawn(work)
            if telemetry is not None:
                spawn(telemetry.send_metrics(server_metrics(parts).series))
            if self._has_control:
                spawn(control.keep())
            if self.before_listening is not None:
                await self.before_listening(parts.certificate_pairs[0].names)
            control.start()
            parts.listener.start()
            if parts.http is not None and parts.http.redirect is not None:
                parts.http.redirect.start()
            if parts.lifespans.failure is not None:  # it has ended meanwhile
                raise parts.lifespans.failure
            self._parts = parts
            self._running = stack.pop_all()

    async def _start_telemetry(self, parts: Parts, stack: AsyncExitStack) -> Telemetry | None:
        state = parts.state
        telemetry = await asyncio.to_thread(
            build_telemetry, parts.config.telemetry, parts.clock, state.entropy
        )
        if telemetry is not None:
            stack.push_async_callback(telemetry.stop)
            state.tracing = telemetry.follow_requests(state.methods)
            state.telemetry_counts = telemetry.counts
        return telemetry

    async def _stop_lifespans(self, parts: Parts) -> None:
        await parts.lifespans.stop(self.config.server.lifespan_timeout)

    def _bind(self, parts: Parts) -> None:
        if self._addresses_elsewhere:
            parts.listener.addresses = self._addresses_elsewhere
            return
        config = parts.config
        parts.listener.listen_on(self._sockets or bind(config.server.host, config.server.port))
        if parts.http is not None and (config.http.redirect_port or self._redirect_sockets):
            parts.http.listen_plain(parts.certificate_names, parts.listener.port, self._redirect_sockets)
        elif self._redirect_sockets:
            raise no_redirect()

    # --- while it runs -------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        assert self._parts is not None, "the server has not been started"
        return self._parts

    @property
    def state(self) -> ServerState:
        return self.parts.state

    @property
    def config(self) -> Config:
        """The configuration that applies now."""
        return self._first_config if self._parts is None else self._parts.config

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of every listening socket, also after the end; none before the start."""
        return [] if self._parts is None else self._parts.listener.addresses

    @property
    def port(self) -> int:
        return self.parts.listener.port

    @property
    def certificates(self) -> list[CertificatePair]:
        """The certificates of the default site; none before the start."""
        return [] if self._parts is None else list(self._parts.certificate_pairs)

    @property
    def pins(self) -> list[str]:
        """Pins of the public keys that are served, as clients take them."""
        return [pair.pin for pair in self.certificates]

    def clients(self, *, user: str | None = None, handles: str | None = None) -> list[ConnectedClient]:
        """Return the clients of this process that handle calls: those of a user, or of a method, the newest first.

        Each is one session on one connection.

            for client in server.clients(user="ada", handles="approve"):
                return await client.call("approve", tool="shell")
        """
        return self.state.clients.find(user, handles)

    async def ask(
        self,
        user: str,
        method: str,
        params: Mapping[str, Any] | None = None,
        /,
        *,
        returns: type[Returned] = RETURNS_ANY,
        timeout: float = ASK_TIMEOUT,  # noqa: ASYNC109  it is sent
        traceparent: str | None = None,
        bound: bool = False,
        **named: Any,
    ) -> Returned:
        """Ask a user, whatever clients they have now or until the timeout, and return the first answer.

            approved = await server.ask("ada", "approve", text="pay 100?", timeout=3600)

        `Context.ask` does the same in a method, and describes it.
        """
        named = named if params is None else {**params, **named}
        call = CallToClient(method, named, timeout, traceparent)
        return await result_of(self.state.ask(user, call, bound=bound), returns)

    async def find_clients(
        self, *, user: str | None = None, handles: str | None = None
    ) -> list[ConnectedClient]:
        """Return clients of all workers and servers, as `Context.find_clients` does in a method."""
        return await self.state.find_clients(user, handles)

    @property
    def ca_file(self) -> Path | None:
        """The certificate with which clients verify this server; None if it is another one than its own."""
        certificates = self.config.certificates
        return authority.SERVER.paths(certificates.directory)[0] if certificates.mode == "own" else None

    @property
    def users(self) -> ServerUsers:
        """The users in the home folder, to list and change them as `zcproto user` does."""
        return ServerUsers(self.parts)

    async def end_sessions(self, user: str) -> int:
        """End all sessions of a user, also on other servers of the same store; return how many there were.

        For users of the application whose access has changed. Their clients get TokenRevoked. Raises Unavailable if
        a store has not taken it in time: the sessions have ended here, and the store will take it later.
        """
        ended = await self.state.revoke_all(user, EndReason.USER_CHANGED)
        log.info("user.gone", user=user, sessions=ended)
        return ended

    def summary(self) -> str:
        """Return one sentence on the load, and on a refused configuration."""
        state = self.state
        connections = counted(len(state.connections), "connection")
        refused = [
            f"; {alert.title}"
            for alert in self.parts.alerts.center.open_alerts()
            if alert.kind is AlertKind.CONFIG_REFUSED
        ]
        return f"serving {connections}, {counted(len(state.registry), 'session')}{''.join(refused)}"

    def statistics(self) -> dict[str, Any]:
        """Return the figures of `server.stats`."""
        return read_stats(self.parts)

    async def reload(self) -> Reloaded:
        """Read the configuration again and apply all of it that can change at run time, or nothing.

        Raises ConfigError with all faults; then nothing has changed. No connection is closed by it.
        """
        try:
            reloaded = await self.reload_here()
        except ConfigError:
            await self.on_reload_requested(False)
            raise
        await self.on_reload_requested(True)
        return reloaded

    async def reload_here(self) -> Reloaded:
        """Reload in this process of the server alone."""
        if self._parts is None:
            raise ConfigError(["the server is not running: start it; it reads its configuration then"])
        # A task, so that a caller who goes away cannot leave half of it done.
        return await asyncio.shield(self._begin(self._reload(self._parts)))

    async def _reload(self, parts: Parts) -> Reloaded:
        with self.around_reload():
            async with self._reloading:
                return await reload_config(
                    parts,
                    self._read_again,
                    on_config=self.on_config,
                    owns_log=self.owns_log,
                    is_first=self._maintains,
                )

    async def preview_reload(self) -> Reloaded:
        """Return what `reload` would do. Raises the ConfigError with which it would be refused."""
        if not self.can_reload:
            raise FailedPrecondition(
                "the configuration comes from the program that runs this server; restart it to apply changes"
            )
        return await preview_reload(self.parts, self._read_again, owns_log=self.owns_log)

    def _set_log_level(self, level: str) -> None:
        set_level(level)
        if self.on_log_level is not None:
            self.on_log_level()

    @property
    def can_reload(self) -> bool:
        """Whether `reload` has a configuration to read."""
        return self.read_config is not None and self._parts is not None

    def _read_again(self) -> Config:
        if self.read_config is None:
            raise ConfigError(
                [
                    "the configuration comes from the program that runs this server;"
                    " restart that program, or let it pass read_config to Server"
                ]
            )
        return at_home(self.read_config(), self.home)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start what an operator has requested; the end of the server does not cancel it."""
        task = asyncio.get_running_loop().create_task(work)
        self._requested.add(task)
        task.add_done_callback(self._requested_done)
        return task

    def _requested_done(self, task: asyncio.Task[Any]) -> None:
        self._requested.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved by the caller, unless it has gone

    def _begin_upgrade(self) -> None:
        if self.on_upgrade_requested is None:
            raise FailedPrecondition("server.workers = 1: one process cannot be replaced; restart it instead")
        self.upgrade_failure = ""
        self.on_upgrade_requested()

    # --- the end -------------------------------------------------------------------------------------

    def begin_drain(self, limit: float | None = None) -> None:
        """Start `drain` and return at once."""
        if self.on_drain_requested is not None:
            self.on_drain_requested(self.config.server.drain_timeout if limit is None else limit)
            return
        limit = self.config.server.drain_timeout if limit is None else limit
        self._begin(self.drain(limit))
        self.on_drain(limit)

    def leave(self) -> None:
        """Stop accepting, because another server does on the same sockets, and serve on until `drain`.

        It then asks its clients to connect again at once: no server has to start first.
        """
        if self._parts is None:
            return
        state = self._parts.state
        state.settings = replace(state.settings, retry_draining_ms=0)
        self._parts.listener.close()

    async def drain(self, limit: float | None = None, runs: float | None = None) -> None:
        """Stop accepting, send GOAWAY, wait for running methods, close every connection, end.

        `limit` is the seconds that running methods have; None is the configured limit, 0 cancels them at once.
        `runs` is how long durable ones may go on afterwards. A second call waits for the first. Raises
        LifespanError if the lifespan of the application has failed.
        """
        async with self._ending:
            if self._parts is None:
                return
            if not self._closed.is_set():
                limit = self.config.server.drain_timeout if limit is None else limit
                runs = run_limit(self.config, limit) if runs is None else runs
                cut_off = await drain_connections(self._parts, limit, runs, self.on_connections_drained)
                await self._running.aclose()
                self._closed.set()
                log.info("server.ended", cut_off=cut_off)
                report_suppressed()
                flush_log()
            if self._parts.lifespans.failure is not None:
                raise self._parts.lifespans.failure

    async def wait_closed(self) -> None:
        """Return when the server has ended."""
        await self._closed.wait()


def no_redirect() -> ConfigError:
    """Return the error for a redirect socket without HTTP."""
    return ConfigError(["http.enabled = false: pass no socket for http.redirect_port, or enable http"])


def at_home(config: Config, home: Home) -> Config:
    """Default the folder of certificates to the home folder."""
    if "directory" in config.certificates.model_fields_set:
        return config
    certificates = config.certificates.model_copy(update={"directory": home.certs})
    return config.model_copy(update={"certificates": certificates})


# --- the end of connections ----------------------------------------------------------------------------


async def drain_connections(
    parts: Parts, limit: float, run_limit: float = 0.0, on_drained: Callable[[], object] = lambda: None
) -> int:
    """Stop accepting and end every connection; return how many were cut off after `limit` seconds.

    Durable methods may go on for `run_limit` seconds more, because clients read them at other processes. If there
    are some, `on_drained` is called before.
    """
    state, http = parts.state, parts.http
    state.draining = state.idempotency.is_draining = True
    state.stopping.set()
    if http is not None:
        http.drain()
    parts.listener.close()
    state.log_soon.write()
    log.info("server.draining", connections=len(state.connections))
    async for connection in state.each_connection():
        if run_limit:
            connection.leave_runs()
        connection.go_away(GoAwayReason.DRAINING)
    await _within(limit, _wait_idle(parts))
    if http is not None:
        http.close()
    cut_off = len(state.connections)
    for connection in list(state.connections):
        connection.cancel_all()
        connection.close("drain_timeout")
    # close_notify has been sent: wait for the peers, or for the linger time that resets the rest.
    await _within(LINGER_TIME + 0.5, parts.listener.wait_empty())
    if state.runs is not None:
        if run_limit and len(state.runs):
            log.info("server.runs_go_on", count=len(state.runs), seconds=run_limit)
            on_drained()
            await _within(run_limit, state.runs.wait_idle())
        state.runs.close()
    stuck = await state.tasks.close(CANCELLED_TIME) + await state.threads.close(CANCELLED_TIME)
    if stuck:
        log.error("server.methods_stuck", count=stuck)
    return cut_off


async def close_state(parts: Parts) -> None:
    """Abort unfinished handshakes and release what connections share."""
    state = parts.state
    state.log_soon.write()  # what ended during the drain: its deadline is in the wheel
    state.idempotency.stop_renewing()
    for waiting in state.wheel.close():
        assert isinstance(waiting, TlsServerTransport), "all conversations have ended"
        waiting.abort()
    await _within(LINGER_TIME, parts.listener.wait_empty())
    state.close()


async def _no_other_process(has_applied: bool) -> None:
    """Report a reload to no other process."""


async def _wait_idle(parts: Parts) -> None:
    await parts.state.wait_drained()
    if parts.http is not None:
        await parts.http.endpoint.wait_at_rest()


async def _within(seconds: float, condition: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await condition
