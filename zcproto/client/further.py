"""Further connections to the server of the main one, for calls that it has no room for (gRPC proposal A105).

Decides: when one is made and closed, and which call gets the next room.

Rules:
- One is made while calls wait for room and all connections have as many requests in flight as the server allows:
  one at a time, to where the main connection is. A failure does not fail a call. The next attempt after it, or
  after a loss, is delayed.
- Calls are served in order of arrival, by whichever connection has room first.
- One on which nothing was in flight for IDLE_AFTER is closed. One that is lost is not replaced until it is needed.

Must not know: sessions, except that `on_opened` shows them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from zcproto.client.address import Endpoint
from zcproto.client.protocol import ClientProtocol, WaitingQueue
from zcproto.client.retry import Backoff
from zcproto.errors import ZcprotoError

IDLE_AFTER: Final = 30.0
"""Seconds."""


@dataclass(eq=False, repr=False)
class FurtherConnections:
    """At most `most` connections beside the main one. `on_opened` is called with each new one."""

    _loop: asyncio.AbstractEventLoop
    _dial: Callable[[Endpoint], Awaitable[ClientProtocol]]
    _backoff: Backoff
    most: int
    on_opened: Callable[[ClientProtocol], None]
    _used_at: dict[ClientProtocol, float] = field(default_factory=dict, init=False)
    _waiting: WaitingQueue = field(default_factory=WaitingQueue, init=False)
    connecting: asyncio.Task[None] | None = field(default=None, init=False)
    _not_before: float = field(default=0.0, init=False)
    _idle_timer: asyncio.TimerHandle | None = field(default=None, init=False)

    def __contains__(self, connection: ClientProtocol) -> bool:
        return connection in self._used_at

    def __iter__(self) -> Iterator[ClientProtocol]:
        return iter([*self._used_at])

    async def wait_ready(self, main: ClientProtocol) -> ClientProtocol:
        """Return a connection that has room for a request, or the main one if it takes no more."""
        was_woken = False
        while True:
            if main.draining or main.error is not None:
                return main
            for connection in (main, *self._used_at):
                if connection.ready:
                    if connection is not main:
                        self._used_at[connection] = self._loop.time()
                    self.wake(
                        connection.free_streams - 1
                    )  # there may be more room than when this one was woken
                    return connection
            if all(connection.free_streams <= 0 for connection in (main, *self._used_at)):
                self._grow(main.endpoint)
            await self._waiting.wait(was_woken=was_woken, pass_on=partial(self.wake, 1))
            was_woken = True

    def wake(self, requests: int) -> None:
        """Wake the next callers, for so many of which there is room."""
        self._waiting.wake(requests)

    def wake_all(self) -> None:
        """Wake all callers: the main connection takes no more requests."""
        self._waiting.wake_all()

    # --- opening and closing ----------------------------------------------------------------------

    def _grow(self, endpoint: Endpoint) -> None:
        """Make another connection, unless that is under way, was refused lately, or there are too many."""
        if (
            self.connecting is None
            and len(self._used_at) < self.most
            and self._loop.time() >= self._not_before
        ):
            self.connecting = self._loop.create_task(self._connect(endpoint))

    async def _connect(self, endpoint: Endpoint) -> None:
        try:
            connection = await self._dial(endpoint)
        except ZcprotoError:  # whatever it is, the main connection goes on
            self._not_before = self._loop.time() + self._backoff.next()
            return
        finally:
            self.connecting = None
        if connection.draining or connection.error is not None:
            self._not_before = self._loop.time() + self._backoff.next(connection.retry_after_ms)
            return
        self._used_at[connection] = self._loop.time()
        self._close_later()
        self.on_opened(connection)
        self.wake(connection.free_streams)
        if self._waiting:
            self._grow(endpoint)

    def _close_later(self) -> None:
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(IDLE_AFTER, self._close_idle)

    def _close_idle(self) -> None:
        """Close the connections that were not used lately."""
        self._idle_timer = None
        idle_since = self._loop.time() - IDLE_AFTER
        for connection, used_at in [*self._used_at.items()]:
            if used_at <= idle_since and connection.is_idle:
                self.discard(connection)
                self._backoff.reset()
                connection.close("no calls for a further connection")
        if self._used_at:
            self._close_later()

    def discard(self, connection: ClientProtocol) -> None:
        """Use a connection no more: it was lost, or the server goes away."""
        if self._used_at.pop(connection, None) is not None:
            self._not_before = self._loop.time() + self._backoff.next()

    def close(self) -> None:
        """Make no more connections. The caller closes those that are open, and cancels `connecting`."""
        self.most = 0
        if self._idle_timer is not None:
            self._idle_timer.cancel()
