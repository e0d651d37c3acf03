"""A process that is a server, with its protection, signals and exit codes.

SIGTERM, SIGINT    drain, or end the process at once if it does not listen yet; a second one ends it at once
SIGHUP             reload the configuration, reopen the log file
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from zcproto.app.app import App, default_app
from zcproto.auth import BUILT_IN_SCHEMES, Authenticators
from zcproto.common.process import collapse_heap, new_event_loop
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import configure_logging, finish_log, reopen_log
from zcproto.runtime.first_start import FirstStart
from zcproto.runtime.preflight import preflight
from zcproto.runtime.process_setup import (
    LEAST_FILES,
    UPGRADE,
    exit_at_once,
    harden,
    log_loop_fault,
    log_risks,
    raise_limit_for,
    tune_interpreter,
    worker_count,
)
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import ServiceManager
from zcproto.runtime.store_setup import run_limit
from zcproto.server.state import log

REDIRECT_SOCKET: Final = "redirect"
"""FileDescriptorName= of a socket without TLS, for http.redirect_port. All others are for TLS."""


def run_server(
    app: App | None,
    config: Config | None,
    *,
    home: str | Path | None,
    authenticators: Authenticators | None,
    ready: Callable[[Server], None],
    listening: Callable[[Sequence[tuple[str, int]]], None],
    progress: Callable[[str], None],
    options: dict[str, Any],
) -> None:
    """Run a server until a signal ends it, as `serve` describes."""
    risks = harden(os.environ)  # before any key is loaded
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    options["sockets"] = [passed for name, passed in manager.sockets if name != REDIRECT_SOCKET]
    options["redirect_sockets"] = [passed for name, passed in manager.sockets if name == REDIRECT_SOCKET]
    for name in options.keys() - inspect.signature(Server).parameters:
        raise TypeError(
            f"serve() has no option {name!r}; give a Config, such as Config(server=ServerConfig(port=7443))"
        )
    first = FirstStart(progress, sys.stderr if sys.stderr.isatty() else None)
    server = Server(app, config, home=home, authenticators=authenticators, progress=first.progress, **options)
    first.begin(server.config, server.home)
    workers = worker_count(server.config)

    def on_ready(server: Server) -> None:
        first.ready([name for pair in server.certificates[:1] for name in pair.names], server.port)
        listening(server.addresses)
        ready(server)

    try:
        configure_logging(server.config.log, processes=workers)
        raise_limit_for(server.config, LEAST_FILES)
        if workers > 1 or UPGRADE in os.environ:
            from zcproto.workers.processes import serve_processes  # noqa: PLC0415 - one process needs none of it

            serve_processes(
                server,
                partial(Server, app, authenticators=authenticators),
                workers,
                risks,
                options={name: value for name, value in options.items() if name != "read_config"},
                manager=manager,
                first=first,
                ready=ready,
                listening=listening,
            )
            return
        server.owns_log = True
        server.on_config = raise_limit_for
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(server, on_ready, manager, risks))
    except ConfigError as error:
        has_users = authenticators is None or BUILT_IN_SCHEMES in authenticators
        raise _with_all_faults(error, server, app, has_users) from error
    finally:
        finish_log()


def _with_all_faults(error: ConfigError, server: Server, app: App | None, has_users: bool) -> ConfigError:
    """Return an error with everything else that would prevent the next start too."""
    config, methods = server.config, default_app() if app is None else app
    # Without the ports, which are bound after everything else.
    others = preflight(config, server.home, methods, running=config, has_users=has_users)
    return ConfigError([*dict.fromkeys((*error.faults, *(fault.message for fault in others)))])


async def _serve(
    server: Server, ready: Callable[[Server], None], manager: ServiceManager, risks: dict[str, str]
) -> None:
    loop = asyncio.get_running_loop()
    stop, force = asyncio.Event(), asyncio.Event()
    drain_timeout: float | None = None

    def on_stop_signal() -> None:
        if stop.is_set():
            force.set()
        stop.set()

    def on_drain(limit: float) -> None:
        nonlocal drain_timeout
        drain_timeout = limit
        stop.set()  # the next signal ends the process, whatever began this drain

    server.on_drain = on_drain
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop_signal)
    server.around_reload = manager.reloading
    reloads: set[asyncio.Task[None]] = set()

    def on_upgrade() -> None:
        log.error(
            "upgrade.failed", reason="server.workers = 1", cure="restart the server, or let it have workers"
        )

    def on_hangup() -> None:
        if len(reloads) > 1:  # the one that waits will read whatever has changed by then
            return
        reload = loop.create_task(_reload(server, manager))
        reloads.add(reload)
        reload.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    loop.add_signal_handler(signal.SIGUSR2, on_upgrade)
    loop.set_exception_handler(log_loop_fault)
    starting, stopping = loop.create_task(server.start()), loop.create_task(stop.wait())
    forced = loop.create_task(force.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting, forced}, return_when=asyncio.FIRST_COMPLETED)
        log.info("server.start_stopped")
        exit_at_once(0)  # a thread that generates a key would delay the end
    starting.result()
    log_risks(risks)
    tune_interpreter()
    collapse_heap()
    ready(server)
    manager.ready(loop, server.summary)
    await stopping
    limits = server.config.server
    limit = limits.drain_timeout if drain_timeout is None else drain_timeout
    manager.stopping(limit + run_limit(server.config, limit) + limits.lifespan_timeout)
    draining = loop.create_task(server.drain())
    await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("server.forced")
        exit_at_once()
    forced.cancel()
    manager.close()
    if server.state.tasks.running or server.parts.lifespans.is_stuck:  # it would block the end of the loop
        exit_at_once()
    draining.result()


async def _reload(server: Server, manager: ServiceManager) -> None:
    """Handle SIGHUP: reload the configuration and reopen the log file."""
    if server.can_reload:
        with contextlib.suppress(ConfigError):  # logged by the reload
            await server.reload()
        reopen_log()
    else:
        with manager.reloading():
            reopen_log()
