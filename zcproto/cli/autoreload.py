"""`zcproto serve --reload`: run the server in a child process, and start another one when a file has changed.

    this process: opens the sockets, watches the files     child: `zcproto serve` with these sockets

Rules:
- The sockets stay open between two servers: clients wait for the next one, at the same port.
- A server that ends by itself, as after a syntax error, is started again after the next change.
- A signal of the terminal reaches this process alone, which ends the server. The server also ends if this process
  is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import click

from zcproto.cli import main
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

DRAIN_TIMEOUT: Final = "1s"
"""Time for requests in progress when a file has changed: a person waits for the new code."""

KILL_AFTER_S: Final = 5.0
"""Seconds after which a server that has not ended is killed."""

LOOK_MS: Final = 250
"""How often the server is checked for its end, in milliseconds."""

SHOWN_FILES: Final = 3

_FIRST_DESCRIPTOR: Final = 3  # sd_listen_fds(3)
_UNUSED_DESCRIPTOR: Final = 256
_PR_SET_PDEATHSIG: Final = 1


def serve_reloading(
    arguments: Sequence[str], folders: Sequence[Path], listen: Callable[[], Sequence[socket.socket]]
) -> None:
    """Run `zcproto serve` with these arguments, again after each change of a Python file, until SIGINT or SIGTERM.

    `listen` opens the sockets. Raises ConfigError for a folder that cannot be watched.
    """
    from watchfiles import PythonFilter, watch  # noqa: PLC0415 - it comes with an extra

    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(
            [f"{escape_text(str(missing[0]))}: no such folder; give --reload-dir one that exists"]
        )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.set())
    sockets = listen()
    changes = watch(
        *folders,
        watch_filter=PythonFilter(),
        stop_event=stop,
        rust_timeout=LOOK_MS,
        yield_on_timeout=True,
        raise_interrupt=False,
    )
    try:
        supervise(lambda: _start(arguments, sockets), ([path for _, path in each] for each in changes))
    except OSError as error:
        raise ConfigError(
            [
                f"the files cannot be watched: {error.strerror or error}; choose smaller folders with --reload-dir"
            ]
        ) from error
    finally:
        for each in sockets:
            each.close()


def supervise(start: Callable[[], subprocess.Popen[bytes]], changes: Iterable[Sequence[str]]) -> None:
    """Run a server, and another one after each change: the paths that have changed, or none if time has passed."""
    server = start()
    has_ended = False
    try:
        for changed in changes:
            if changed:
                names = sorted({Path(path).name for path in changed})
                more = ", ..." if len(names) > SHOWN_FILES else ""
                shown = escape_text(", ".join(names[:SHOWN_FILES]) + more)
                click.echo(f"zcproto: changed: {shown}; starting again", err=True)
                _end(server)
                server, has_ended = start(), False
            elif not has_ended and server.poll() is not None:
                has_ended = True
                click.echo("zcproto: the server has ended; it starts again after a change", err=True)
    finally:
        _end(server)


def _start(arguments: Sequence[str], sockets: Sequence[socket.socket]) -> subprocess.Popen[bytes]:
    descriptors = [each.fileno() for each in sockets]
    command = [sys.executable, "-m", __name__, str(os.getpid()), ",".join(map(str, descriptors)), *arguments]
    return subprocess.Popen(  # noqa: S603 - this program
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
        env={**os.environ, "ZCPROTO_SERVER__DRAIN_TIMEOUT": DRAIN_TIMEOUT},
        process_group=0,
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


# --- in the child ----------------------------------------------------------------------------------------


def run_child(parent: int, descriptors: Sequence[int], arguments: Sequence[str]) -> int:
    """Pass the sockets on as a service manager does, and run the command line."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it was killed before the call
        return 1
    copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _UNUSED_DESCRIPTOR) for each in descriptors]
    for number, copy in enumerate(copies, _FIRST_DESCRIPTOR):
        os.dup2(copy, number, inheritable=False)
        os.close(copy)
    os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = str(len(copies)), str(os.getpid())
    # Python takes a cached file for the new code if it was saved twice in a second, with the same length.
    sys.dont_write_bytecode = True
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run_child(int(sys.argv[1]), [int(each) for each in sys.argv[2].split(",")], sys.argv[3:]))
