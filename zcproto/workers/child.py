"""One process of a server, as its supervisor sees it."""

from __future__ import annotations

from typing import Any, Final

from zcproto.common.process import queued_seconds
from zcproto.errors import ZcprotoError
from zcproto.workers.channel import Channel
from zcproto.workers.restarts import RestartPacer

COORDINATOR: Final = 0
"""The number of the coordinator; workers have those from 1 on."""


MARGIN: Final = 10.0
"""Seconds that a process has to end in addition to its drain, before it is killed."""

KILLED_LIMIT: Final = 5.0
"""Seconds for which the end of killed processes is awaited; an uninterruptible system call may take longer."""


class ChildProcess:
    """One process of the server, and its successors."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = "coordinator" if number == COORDINATOR else str(number)
        self.pid = 0
        """0 while it does not run."""
        self.channel: Channel | None = None
        self.ready_at: float | None = None
        self.heard_at = 0.0
        """When its last message came; until it is ready, when it was started."""
        self._queued = 0.0
        self.kill_at: float | None = None
        self.is_aborted = False
        self.is_drained = False
        """Whether it was ordered to end."""
        self.start_at: float | None = 0.0
        """When to start it; None while it runs, or if it is not to run."""
        self.failure: ZcprotoError | None = None
        self.pacer = RestartPacer()

    @property
    def is_running(self) -> bool:
        return bool(self.pid)

    def heard(self, now: float) -> None:
        """Begin to count its silence again."""
        self.heard_at, self._queued = now, queued_seconds(self.pid)

    def silence(self, now: float) -> float:
        """Return the seconds since then, without those in which it waited for a processor."""
        return now - self.heard_at - (queued_seconds(self.pid) - self._queued)

    def send(self, name: str, **values: Any) -> bool:
        return self.channel is not None and self.channel.send(name, **values)
