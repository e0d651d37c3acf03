"""`serve()`: a process that is a server, with signals and exit codes.

SIGTERM, SIGINT    drain; a second one ends the process at once
SIGHUP             reload the configuration, reopen the log file
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from zcproto.app.app import App
from zcproto.common.clock import system_clock
from zcproto.common.event_loop import new_event_loop
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import configure_logging, finish_log, reopen_log
from zcproto.runtime.process import FileLimit, Risk, harden, tune_interpreter
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import ServiceManager, Supervision
from zcproto.server.state import log

REDIRECT_SOCKET: Final = "redirect"
"""FileDescriptorName= of a socket without TLS, for http.redirect_port. All others are for TLS."""

_PHRASE: Final = re.compile(r"[A-Za-z][A-Za-z' ]*")
"""What asyncio writes before a callback and its arguments."""


def serve(
    app: App | None = None,
    config: Config | None = None,
    *,
    home: Path | None = None,
    ready: Callable[[Server], None] = lambda server: None,
    **options: Any,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal cuts off what still runs.

    `ready` is called when it listens. A service manager such as systemd is notified as well; it may run a watchdog
    and pass the listening sockets. Further options are passed to `Server`. Raises ConfigError or CertificateError
    before anything listens.
    """
    risks = harden(os.environ)  # before any key is loaded
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    options["sockets"] = [passed.socket for passed in manager.sockets if passed.name != REDIRECT_SOCKET]
    options["redirect_sockets"] = [
        passed.socket for passed in manager.sockets if passed.name == REDIRECT_SOCKET
    ]
    server = Server(app, config, home=home, **options)
    configure_logging(server.config.log)
    server.owns_log = True
    server.on_config = FileLimit().raise_for
    server.on_config(server.config)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(server, ready, manager, risks))
    finally:
        finish_log()


async def _serve(
    server: Server, ready: Callable[[Server], None], manager: ServiceManager, risks: list[Risk]
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
    supervision = Supervision(manager, loop, system_clock, server.summary)
    server.around_reload = supervision.reloading
    reloads: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        if len(reloads) > 1:  # the one that waits will read whatever has changed by then
            return
        reload = loop.create_task(_reload(server, supervision))
        reloads.add(reload)
        reload.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    loop.set_exception_handler(log_loop_fault)
    await server.start()
    for risk in risks:
        log.warning(risk.event, cure=risk.cure)
    tune_interpreter()
    ready(server)
    supervision.ready()
    await stop.wait()
    supervision.stopping(server.config.server.drain_timeout if drain_timeout is None else drain_timeout)
    draining = loop.create_task(server.drain())
    forced = loop.create_task(force.wait())
    await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("server.forced")
        _exit_at_once()
    forced.cancel()
    draining.result()
    supervision.close()
    if server.state.tasks.running:  # methods that cannot be cancelled would block the end of the loop
        _exit_at_once()


async def _reload(server: Server, supervision: Supervision) -> None:
    """Handle SIGHUP: reload the configuration and reopen the log file."""
    if not server.can_reload:
        with supervision.reloading():
            reopen_log()
        return
    with contextlib.suppress(ConfigError):  # logged by the reload
        await server.reload()
    reopen_log()


def log_loop_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an uncaught exception of the loop; asyncio's own handler would print arguments of callbacks."""
    phrase = _PHRASE.match(str(context.get("message", "")))
    log.error("server.fault", what=phrase[0].strip() if phrase else None, exc_info=context.get("exception"))


def _exit_at_once() -> None:
    finish_log()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
