"""The reload of a server's configuration by its processes.

    SIGHUP -> "reload" to the coordinator -> "reloaded" -> "reload" to the workers -> "reloaded" of each
           -> "applied" to the coordinator

Decides: who applies a configuration, and how long that is awaited.

Rules:
- The coordinator is first: if it refuses the configuration, nothing changes.
- A reload by the control socket begins in the coordinator, so that its "reloaded" is the first message.
- A request during a reload is one more reload after it.

It must not know: what a configuration is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from zcproto.observe.log import get_logger
from zcproto.workers.child import ChildProcess
from zcproto.workers.service import SupervisedService

RELOAD_LIMIT: Final = 30.0
"""Seconds for which a reload waits for the processes."""

log = get_logger("zcproto.server")


class Reload:
    """The reloads of one server. Once `is_stopped` is set, none begins."""

    def __init__(
        self,
        service: SupervisedService,
        coordinator: ChildProcess,
        workers: Sequence[ChildProcess],
        now: Callable[[], float],
    ) -> None:
        self._service = service
        self._coordinator = coordinator
        self._workers = workers
        self._now = now
        self._waiting: set[ChildProcess] | None = None
        self._until = 0.0
        self._is_requested = False
        self.is_stopped = False

    def request(self) -> None:
        """Begin a reload, or another one after that in progress."""
        if self.is_stopped:
            return
        if self._waiting is not None:
            self._is_requested = True  # it will read whatever has changed by then
            return
        self._wait_for([self._coordinator])

    def handle_reloaded(self, process: ChildProcess, *, has_applied: bool) -> None:
        """Handle a process that has applied the configuration, or refused it."""
        if process is self._coordinator and has_applied and not self.is_stopped:
            self._service.reload()
            self._wait_for(self._workers)
        else:
            self.remove(process)

    def remove(self, process: ChildProcess) -> None:
        """Do not wait for a process any more."""
        if self._waiting is not None:
            self._waiting.discard(process)
            if not self._waiting:
                self._end()

    def check_time(self, now: float) -> None:
        """End a reload that takes too long."""
        if self._waiting is not None and now >= self._until:
            log.warning("workers.reload_slow", count=len(self._waiting), seconds=RELOAD_LIMIT)
            self._end()

    def _wait_for(self, processes: Iterable[ChildProcess]) -> None:
        if self._waiting is None:
            self._service.reloading(True)
        self._until = self._now() + RELOAD_LIMIT
        self._waiting = {each for each in processes if each.ready_at is not None and each.send("reload")}
        if not self._waiting:
            self._end()

    def _end(self) -> None:
        self._waiting = None
        self._service.reloading(False)
        self._coordinator.send("applied")
        if self._is_requested:
            self._is_requested = False
            self.request()
