"""What a service manager is told while a server runs: that it is ready, how it is, that its loop still turns.

The watchdog is fed by the loop itself: what stops the loop stops the feeding, and the service manager ends the
process. Its signal is SIGABRT, upon which Python writes where every thread stood, and no core.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from zcproto.common.clock import Clock
from zcproto.runtime.service_manager import USEC, ServiceManager
from zcproto.server.state import log

STATUS_INTERVAL: Final = 10.0
"""Seconds between two looks at what is said of the service, if no watchdog asks for more."""

MIN_INTERVAL: Final = 0.02
"""Seconds: a watchdog of microseconds cannot be fed, and must not be all that the loop does."""

STOP_MARGIN: Final = 10.0
"""Seconds beyond the time to drain in which a process ends."""


class Supervision:
    """Tells the service manager. Without one, every method does nothing.

    `status` is a sentence on what the server does.
    """

    def __init__(
        self,
        manager: ServiceManager,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        status: Callable[[], str],
    ) -> None:
        self._manager = manager
        self._loop = loop
        self._clock = clock
        self._status = status
        self._said = ""
        self._interval = STATUS_INTERVAL
        if manager.watchdog is not None:
            self._interval = max(MIN_INTERVAL, min(STATUS_INTERVAL, manager.watchdog / 2))
        self._next: asyncio.TimerHandle | None = None
        self._is_stopping = False

    def ready(self) -> None:
        """It listens. From here on the watchdog is fed."""
        manager = self._manager
        if not manager.is_told:
            return
        if manager.watchdog is not None and not faulthandler.is_enabled() and sys.stderr is not None:
            faulthandler.enable()
        self._said = self._status()
        if not manager.notify(READY=1, MAINPID=os.getpid(), STATUS=self._said):
            log.warning("service_manager.unreachable", cure="it is told nothing; see NOTIFY_SOCKET")
        self._next = self._loop.call_later(self._interval, self._tick)

    def _tick(self) -> None:
        self._next = self._loop.call_later(self._interval, self._tick)
        values: dict[str, str | int] = {}
        if self._manager.watchdog is not None:
            values["WATCHDOG"] = 1
        said = self._status()
        if said != self._said:
            values["STATUS"] = said
        if values and self._manager.notify(**values):
            self._said = said

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """What SIGHUP asks for is done within the body; whatever comes of it, the service is ready after it.

        Before `ready` and while it drains there is nothing to tell.
        """
        if self._next is None or self._is_stopping:
            yield
            return
        # Type=notify-reload compares this time with that of its signal (systemd.service(5)).
        self._manager.notify(RELOADING=1, MONOTONIC_USEC=int(self._clock.now() * USEC))
        try:
            yield
        finally:
            self._said = self._status()
            self._manager.notify(READY=1, STATUS=self._said)

    def stopping(self, drain_timeout: float) -> None:
        """It drains, which may take `drain_timeout` seconds. The watchdog is fed on."""
        self._is_stopping = True
        self._manager.notify(
            STOPPING=1,
            STATUS="draining",
            EXTEND_TIMEOUT_USEC=int((drain_timeout + STOP_MARGIN) * USEC),
        )
        self._status = lambda: "draining"
        self._said = "draining"

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._manager.close()
