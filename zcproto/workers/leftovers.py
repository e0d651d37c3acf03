"""Wait for processes of a server that was killed: they hold its port and its sessions for a moment.

The service manager starts a server at once whose supervisor was killed. The other processes of the old one end
within the time that `zcproto/workers/processes.py` gives them. This is for the start, before there is a loop.

It must not know: why a port or a file is in use.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from zcproto.common.clock import Clock, system_clock
from zcproto.common.files import is_locked
from zcproto.errors import ConfigError
from zcproto.server.listener import bind
from zcproto.server.state import log

PATIENCE: Final = 3.0
"""Seconds: ten times what a process has that lost its supervisor. Another program may have the port for good."""

PAUSE: Final = 0.02


class Patience:
    """Pauses between attempts, for PATIENCE seconds in all. `sleep` waits so many seconds."""

    def __init__(self, clock: Clock = system_clock, sleep: Callable[[float], object] = time.sleep) -> None:
        self._now = clock.now
        self._sleep = sleep
        self._until: float | None = None

    def pause(self, what: str) -> bool:
        """Wait until the next attempt. Return False if there is to be none. `what` is in use, for the log."""
        now = self._now()
        if self._until is None:
            self._until = now + PATIENCE
            log.warning("server.start_waits", what=what, seconds=PATIENCE)
        if now >= self._until:
            return False
        self._sleep(PAUSE)
        return True


def bind_patiently(
    hosts: Sequence[str], port: int, key: str = "server.port", patience: Patience | None = None
) -> list[socket.socket]:
    """Bind as `bind`, without listening. Wait for a port that is in use. Raises ConfigError."""
    patience = patience or Patience()
    while True:
        try:
            return bind(hosts, port, key, backlog=0)
        except ConfigError as error:
            in_use = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if not in_use or not patience.pause(f"{key} = {port}"):
                raise


def wait_unlocked(path: Path, patience: Patience | None = None) -> None:
    """Wait until no process holds the lock beside `path`. Who takes it next reports if one still does."""
    patience = patience or Patience()
    lock = path.with_name(path.name + ".lock")
    while is_locked(lock) and patience.pause(str(path)):
        pass
