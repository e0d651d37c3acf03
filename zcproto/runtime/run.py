"""`serve()`: a process that is a server, with its protection, signals and exit codes.

SIGTERM, SIGINT    drain; a second one ends the process at once
SIGHUP             reload the configuration, reopen the log file
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from zcproto.app.app import App
from zcproto.auth import Authenticators
from zcproto.common.process import new_event_loop, raise_file_limit
from zcproto.config import Config
from zcproto.errors import ConfigError
from zcproto.observe.log import configure_logging, finish_log, reopen_log
from zcproto.runtime.first_start import FirstStart
from zcproto.runtime.server import Server
from zcproto.runtime.service_manager import ServiceManager
from zcproto.server.state import log

_PR_SET_DUMPABLE: Final = 4
KEY_LOG: Final = "SSLKEYLOGFILE"

GC_THRESHOLDS: Final = (10_000, 5, 2_000)
"""The defaults would walk every object of 10,000 connections again and again. The second number bounds what one
collection walks: with 50, that was every object of those connections, for 200 ms."""

SWITCH_INTERVAL: Final = 0.000_5
"""Seconds that another thread may hold the interpreter while the loop waits; the default of 5 ms is noticeable."""

SPARE_FILES: Final = 256
"""Descriptors in addition to those of connections: certificates, the store, the log, pipes."""

REDIRECT_SOCKET: Final = "redirect"
"""FileDescriptorName= of a socket without TLS, for http.redirect_port. All others are for TLS."""

_PHRASE: Final = re.compile(r"[A-Za-z][A-Za-z' ]*")
"""What asyncio writes before a callback and its arguments."""


def serve(
    app: App | None = None,
    config: Config | None = None,
    *,
    home: Path | None = None,
    authenticators: Authenticators | None = None,
    ready: Callable[[Server], None] = lambda server: None,
    progress: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal cuts off what still runs.

    `authenticators` decide who may open sessions; by default those of the application. `ready` is called when it
    listens, `progress` with sentences about new certificates; on a terminal, three lines replace those of the first
    start. A service manager such as systemd is notified as well; it may run a watchdog and pass the listening
    sockets. Further options are passed to `Server`. Raises ConfigError, CertificateError or LifespanError before
    anything listens, LifespanError at the end, and RuntimeError inside a running event loop or outside the main
    thread: use `Server` there.
    """
    _check_own_process()
    risks = harden(os.environ)  # before any key is loaded
    manager = ServiceManager.from_environ(os.environ, os.getpid())
    options["sockets"] = [passed for name, passed in manager.sockets if name != REDIRECT_SOCKET]
    options["redirect_sockets"] = [passed for name, passed in manager.sockets if name == REDIRECT_SOCKET]
    first = FirstStart(progress, sys.stderr if sys.stderr.isatty() else None)
    server = Server(app, config, home=home, authenticators=authenticators, progress=first.progress, **options)
    first.begin(server)
    configure_logging(server.config.log)
    server.owns_log = True
    server.on_config = raise_limit_for
    server.on_config(server.config)

    def on_ready(server: Server) -> None:
        first.ready(server)
        ready(server)

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(server, on_ready, manager, risks))
    finally:
        finish_log()


def _check_own_process() -> None:
    """Refuse to run where the loop or the signals belong to the rest of the program."""
    instead = "use `async with zcproto.Server(app) as server:` there, as the application guide shows"
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError(f"serve() runs an event loop, and one is running here; {instead}")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(f"serve() handles signals, which only the main thread can; {instead}")


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

    def on_hangup() -> None:
        if len(reloads) > 1:  # the one that waits will read whatever has changed by then
            return
        reload = loop.create_task(_reload(server, manager))
        reloads.add(reload)
        reload.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    loop.set_exception_handler(log_loop_fault)
    await server.start()
    for event, cure in risks.items():
        log.warning(event, cure=cure)
    tune_interpreter()
    ready(server)
    manager.ready(loop, server.summary)
    await stop.wait()
    limits = server.config.server
    manager.stopping(
        (limits.drain_timeout if drain_timeout is None else drain_timeout) + limits.lifespan_timeout
    )
    draining = loop.create_task(server.drain())
    forced = loop.create_task(force.wait())
    await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("server.forced")
        _exit_at_once()
    forced.cancel()
    manager.close()
    if server.state.tasks.running or server.parts.lifespans.is_stuck:  # it would block the end of the loop
        _exit_at_once()
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


def log_loop_fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an uncaught exception of the loop; asyncio's own handler would print arguments of callbacks."""
    phrase = _PHRASE.match(str(context.get("message", "")))
    log.error("server.fault", what=phrase[0].strip() if phrase else None, exc_info=context.get("exception"))


def _exit_at_once() -> None:
    finish_log()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


# --- the process ------------------------------------------------------------------------------------------


def deny_core_dumps() -> None:
    """Keep a crash from writing the memory to the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def deny_tracing() -> bool:
    """Keep other processes of this user from tracing this one: on Linux, prctl(PR_SET_DUMPABLE, 0).

    Its folder in /proc belongs to root from then on; stat, statm and status stay readable for everyone. Core dumps
    through a pipe, which RLIMIT_CORE does not forbid, are prevented too. Return False on an unsupported system.
    """
    if sys.platform != "linux":
        return False
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # a C library without it
        return False
    return bool(prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0)


def harden(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Protect this process; return the log events of risks that only the operator can remove, and the cures.

    None of it stops root, and keys in Python `bytes` cannot be erased. It keeps the memory from the disk and from
    other processes of the same user.
    """
    found = {}
    deny_core_dumps()
    if not deny_tracing():
        found["server.traceable"] = "keep other processes from its user"
    if environ.pop(KEY_LOG, None) is not None:  # some builds of OpenSSL write the keys of connections to it
        found["server.key_log_ignored"] = f"unset {KEY_LOG}; no keys are written"
    if os.geteuid() == 0:
        found["server.runs_as_root"] = "run it as a separate user: zcproto deploy systemd"
    return found


def tune_interpreter() -> None:
    """Give other threads (certificates, the disk) short turns, and exclude long-lived objects from collections."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def raise_limit_for(config: Config) -> None:
    """Raise the limit on open files to what a configuration needs."""
    _raise_file_limit(config.limits.max_connections + SPARE_FILES)


@cache
def _raise_file_limit(wanted: int) -> None:
    limit = raise_file_limit(wanted)
    if limit < wanted:
        log.warning(
            "server.file_limit", limit=limit, wanted=wanted, cure="raise it with ulimit -n or LimitNOFILE="
        )
