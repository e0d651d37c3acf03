"""`serve()`: a whole process that is a server, with signals and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from zcproto.app.app import App
from zcproto.common.clock import system_clock
from zcproto.common.event_loop import new_event_loop
from zcproto.common.file_limit import raise_file_limit
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import configure_logging, finish_log, reopen_log
from zcproto.runtime import loop_faults
from zcproto.runtime.hardening import Risk, harden
from zcproto.runtime.server import Server, tune_interpreter
from zcproto.runtime.service_manager import ServiceManager
from zcproto.runtime.supervision import Supervision
from zcproto.server.state import log

REDIRECT_SOCKET: Final = "redirect"
"""FileDescriptorName= of a socket without TLS, as http.redirect_port is. All others are for TLS."""

SPARE_FILES: Final = 256
"""Descriptors beside those of connections: certificates, the store, the log, pipes."""


def serve(
    app: App | None = None,
    config: Config | None = None,
    *,
    home: Path | None = None,
    ready: Callable[[Server], None] = lambda server: None,
    **options: Any,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal cuts what still runs.

    `ready` is called once it listens. A service manager such as systemd is told the same, may watch it, and may
    pass it the sockets to listen on. Further options go to `Server`. Raises ConfigError or CertificateError before
    anything listens.
    """
    risks = harden(os.environ)  # before there is a key
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    options["sockets"] = [passed.socket for passed in manager.sockets if passed.name != REDIRECT_SOCKET]
    options["redirect_sockets"] = [
        passed.socket for passed in manager.sockets if passed.name == REDIRECT_SOCKET
    ]
    server = Server(app, config, home=home, **options)
    configure_logging(server.config.log)
    server.owns_log = True
    server.on_config = _FileLimit().raise_for
    server.on_config(server.config)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(server, ready, manager, risks))
    finally:
        finish_log()


class _FileLimit:
    """The limit of open files, raised as the configuration asks for it; that it cannot be is told once."""

    def __init__(self) -> None:
        self._wanted = 0

    def raise_for(self, config: Config) -> None:
        wanted = config.limits.max_connections + SPARE_FILES
        if wanted == self._wanted:
            return
        self._wanted = wanted
        limit = raise_file_limit(wanted)
        if limit < wanted:
            log.warning(
                "server.file_limit",
                limit=limit,
                wanted=wanted,
                cure="raise it with ulimit -n or LimitNOFILE=",
            )


async def _serve(
    server: Server, ready: Callable[[Server], None], manager: ServiceManager, risks: list[Risk]
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    force = asyncio.Event()

    def signalled() -> None:
        if stop.is_set():
            force.set()
        stop.set()

    asked: dict[str, float] = {}

    def drains(limit: float) -> None:
        asked["limit"] = limit
        stop.set()  # the next signal forces the end, whoever has asked for this one

    server.on_drain = drains
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    supervision = Supervision(manager, loop, system_clock, server.summary)

    server.around_reload = supervision.reloading
    reloads: set[asyncio.Task[None]] = set()

    def hung_up() -> None:
        if len(reloads) > 1:  # one is under way, and one that waits will see all that there is to see
            return
        reload = loop.create_task(_reload(server, supervision))
        reloads.add(reload)
        reload.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, hung_up)
    loop.set_exception_handler(loop_faults.tell)
    await server.start()
    for risk in risks:
        log.warning(risk.event, cure=risk.cure)
    tune_interpreter()
    ready(server)
    supervision.ready()
    await stop.wait()
    supervision.stopping(asked.get("limit", server.config.server.drain_timeout))
    draining = loop.create_task(server.drain())
    forced = loop.create_task(force.wait())
    await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("server.forced")
        _exit_at_once()
    forced.cancel()
    draining.result()
    supervision.close()
    if server.state.tasks.running:  # methods that cannot be cancelled: the loop's end would wait for them
        _exit_at_once()


async def _reload(server: Server, supervision: Supervision) -> None:
    """What SIGHUP asks for: the configuration is read again, and the log's file opened anew."""
    if not server.can_reload:
        with supervision.reloading():
            reopen_log()
        return
    with contextlib.suppress(ConfigError):  # the log says why nothing has changed
        await server.reload()
    reopen_log()


def _exit_at_once() -> None:
    finish_log()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
