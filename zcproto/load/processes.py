"""Starting a module of this package in a process of its own, where it is to run, and clearing up whatever comes
between."""

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
"""Those that this process may use."""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line. -P: `zcproto` must be this one, not a folder of that name where the user happens to be."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """The environment to start it with: the package is found again wherever this process found it."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the body is done: what it starts must be known, what it clears up must be gone.

    Ctrl-C is for the main thread: in any other there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextmanager
def on_processor(number: int) -> Iterator[None]:
    """Keep this process and what is started meanwhile, with all its threads to come, to one of the processors.

    By custom the first is the server's, and the second that of who asks it. With one processor nothing is changed.
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
