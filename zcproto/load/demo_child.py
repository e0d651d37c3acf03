"""The server process of a demonstration: `python -m zcproto.load.demo_child HOME [ARGUMENTS]`.

It runs `zcproto serve` in a home folder, with these arguments. When its parent ends in whatever way, which closes
the pipe on standard input, it exits and deletes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from typing import Final, NoReturn

from zcproto.cli import main as zcproto

DRAIN_TIMEOUT: Final = 5.0
"""Seconds for an orphaned server to drain."""


def main(home: str, *arguments: str) -> int:
    signal.signal(signal.SIGTERM, _terminated)  # until the server has its own handler
    orphaned, ended = threading.Event(), threading.Event()
    threading.Thread(
        target=end_with_parent, args=(sys.stdin.fileno(), home, orphaned, ended), daemon=True
    ).start()
    try:
        return zcproto(["--home", home, "serve", *arguments])
    finally:
        ended.set()
        if orphaned.is_set():
            shutil.rmtree(home, ignore_errors=True)


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def end_with_parent(parent: int, home: str, orphaned: threading.Event, ended: threading.Event) -> None:
    # Not sys.stdin: its lock would block the interpreter at exit.
    with open(parent, "rb", buffering=0, closefd=False) as pipe:
        pipe.readall()
    if ended.is_set():
        return
    orphaned.set()
    os.kill(os.getpid(), signal.SIGTERM)
    if not ended.wait(DRAIN_TIMEOUT):
        shutil.rmtree(home, ignore_errors=True)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
