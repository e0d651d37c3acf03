"""Processes that run a module of this package: command, environment, signals and CPU affinity."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PROCESSORS: Final = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
"""The processors that this process may use."""


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command line. `-P` prevents importing a folder named `zcproto` in the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """Return the environment in which the process imports the same package as this one."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the body is done, so that what it starts is known and what it deletes is gone.

    Without effect outside the main thread, which is the only one to get Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


@contextmanager
def on_processor(number: int) -> Iterator[None]:
    """Bind this process and the processes and threads that it starts in the body to one processor.

    By convention the server runs on the first and its load on the second. Without effect with one processor.
    """
    if len(PROCESSORS) < 2:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {PROCESSORS[number]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
