"""`serve()`, which imports the server when it is called: so an application is imported quickly."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zcproto.app.app import App
    from zcproto.auth import Authenticators
    from zcproto.config import Config
    from zcproto.runtime.server import Server


def serve(
    app: App | None = None,
    config: Config | None = None,
    *,
    home: str | Path | None = None,
    authenticators: Authenticators | None = None,
    ready: Callable[[Server], None] = lambda server: None,
    listening: Callable[[Sequence[tuple[str, int]]], None] = lambda addresses: None,
    progress: Callable[[str], None] = lambda sentence: None,
    **options: Any,
) -> None:
    """Run a server until SIGTERM or SIGINT, then drain it; a second signal cuts off what still runs.

    A signal before it listens ends the process at once.

    With `server.workers` above 1 these are several processes. The caller's process forks them and supervises them.

    `authenticators` decide who may open sessions; by default those of the application. `ready` is called when it
    listens, in each worker, and `listening` once with host and port of every listening socket; `progress` with
    sentences about new certificates; on a terminal, three lines replace those of the first start. A service manager
    such as systemd is notified as well; it may run a watchdog and pass the listening sockets. Further options are
    passed to `Server`. Raises ConfigError, CertificateError or LifespanError before anything listens, LifespanError
    at the end, and RuntimeError inside a running event loop or outside the main thread: use `Server` there.
    """
    _check_own_process()
    from zcproto.runtime.run import run_server  # noqa: PLC0415 - see above

    run_server(
        app,
        config,
        home=home,
        authenticators=authenticators,
        ready=ready,
        listening=listening,
        progress=progress,
        options=options,
    )


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
