"""The client's connections: one for new calls, and older ones that finish what is in flight on them.

What it decides: when to connect, and when again. After a loss it comes back by itself with growing, jittered
delays; after GOAWAY when the server said so; after a close for idleness when the next call needs it. It does not
come back at all once the session was taken from this client. All who wait for a connection wait for one attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from zcproto.client.backoff import Backoff
from zcproto.client.protocol import ClientProtocol
from zcproto.client.retry import MAX_RETRY_AFTER_MS, may_pass
from zcproto.connection.events import EventReceived, GoAwayReason, GoAwayReceived
from zcproto.errors import CannotConnect, ConnectionClosed, TlsError, ZcprotoError

QUIET_REASONS: Final = frozenset({GoAwayReason.IDLE, GoAwayReason.NO_SESSION})
"""The server's reasons to close what nobody used: coming back at once would only be closed again."""


class LinkKeeper:
    """Keeps a connection to one server.

    `link` takes new calls, if there is one. `last_error` is why the last attempt failed. `on_event` gets the
    server's events, `on_link` each new connection; `is_wanted` says whether to come back unasked.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        dial: Callable[[LinkKeeper], Awaitable[ClientProtocol]],
        backoff: Backoff,
        *,
        on_event: Callable[[EventReceived], None],
        on_link: Callable[[ClientProtocol], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        self.link: ClientProtocol | None = None
        self.last_error: ZcprotoError | None = None
        self._loop = loop
        self._dial = dial
        self._backoff = backoff
        self._on_event = on_event
        self._on_link = on_link
        self._is_wanted = is_wanted
        self._older: set[ClientProtocol] = set()  # until they are gone, which takes the time of a TLS close
        self._connecting: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._had_one = False
        self._closed = False

    async def get(self) -> ClientProtocol:
        """The connection for new calls; connects if there is none, and waits while that may still succeed.

        Raises what the very first attempt fails with, and later what does not pass by waiting: TlsError,
        CertificateError, ConnectionClosed.
        """
        while self.link is None:
            if self._closed:
                raise ConnectionClosed("this client is closed", clean=True)
            await join(self._start())
        return self.link

    def _start(self) -> asyncio.Task[None]:
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return self._connecting

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # if nobody waited, the next call tries again and is told

    async def _connect(self) -> None:
        while True:
            delay = self._not_before - self._loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
            try:
                link = await self._dial(self)
                if link.draining:  # said in the same breath as WELCOME
                    raise CannotConnect("the server is going away")
                if link.error is not None:
                    raise link.error
            except (ConnectionClosed, TlsError) as error:
                self.last_error = error
                if not (self._had_one and _may_pass(error)):
                    raise
                self._wait(self._backoff.next())
                continue
            self._had_one = True
            self.link = link
            self._on_link(link)
            return

    def _wait(self, delay: float) -> None:
        self._not_before = max(self._not_before, self._loop.time() + delay)

    # --- what a connection tells ------------------------------------------------------------------

    def event_received(self, link: ClientProtocol, event: EventReceived) -> None:
        # Through the loop: whoever waits for an answer in the same read must be there first.
        self._loop.call_soon(self._on_event, event)

    def link_draining(self, link: ClientProtocol, event: GoAwayReceived) -> None:
        if link is self.link:
            self.link = None
            self._older.add(link)
        if event.reason in QUIET_REASONS:
            return
        if link.answered:
            self._backoff.reset()
        self._wait(self._backoff.next(min(event.retry_after_ms, MAX_RETRY_AFTER_MS)))
        self._come_back()

    def link_lost(self, link: ClientProtocol, error: ConnectionClosed) -> None:
        self._older.add(link)
        link.gone.add_done_callback(lambda _: self._older.discard(link))
        if link is not self.link:
            return
        self.link = None
        self.last_error = error
        if link.answered:
            self._backoff.reset()
        self._wait(self._backoff.next())
        self._come_back()

    def _come_back(self) -> None:
        if self._had_one and not self._closed and self._is_wanted():
            self._start()

    # --- the end ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Take leave of the server on all connections. Each ends within the time of a TLS close."""
        self._closed = True
        links = self._older | ({self.link} if self.link is not None else set())
        self.link = None
        for link in links:
            link.close("closed by this client")
        leaving: list[asyncio.Future[None]] = [link.gone for link in links]
        if self._connecting is not None:
            self._connecting.cancel()
            leaving.append(self._connecting)
        try:
            if leaving:
                await asyncio.wait(leaving)
        finally:  # whoever does not wait any longer may end the loop at once
            for link in links:
                link.abort()


async def join(task: asyncio.Task[None]) -> None:
    """Wait for a task that others wait for too: whoever is cancelled leaves alone. Raises what it raised."""
    await asyncio.wait([task])
    if task.cancelled():
        raise ConnectionClosed("this client is closed", clean=True)
    task.result()


def _may_pass(error: ConnectionClosed | TlsError) -> bool:
    return may_pass(error.failure) if isinstance(error, TlsError) else True
