"""Keeps the handlers of a session registered on its connections, and their session in use.

    connected, session opened or refreshed, handler added  ->  session.handle  ->  wait for the next change

Decides: when `session.handle` is sent, and sent again after an error by the table in `retry.py`; that the session
of a client which only waits for calls is renewed, and shown to the server before its idle timeout.

Rules:
- Each connection has the registration, further ones too, and gets it before other requests: methods call back where
  they were called.

Must not know: what handlers do, how sessions are opened.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from math import inf
from typing import Final

from zcproto.client.handlers import Handler, Handlers
from zcproto.client.protocol import ClientProtocol, PendingCall
from zcproto.client.retry import Backoff, Random, Then, retry_after_ms, what_next
from zcproto.client.session import ANSWER_TIMEOUT, SessionManager, answer
from zcproto.common.clock import MS_PER_SECOND
from zcproto.errors import (
    CallError,
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    LoginError,
    ZcprotoError,
)
from zcproto.wire.frame import NO_TOKEN

log = logging.getLogger("zcproto.client")

MIN_INTERVAL: Final = 1.0
"""Seconds between two requests that only show the session."""


class Registrar:
    """Registers the handlers of one session on its connections. It does nothing without handlers."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sessions: SessionManager, handlers: Handlers, random: Random
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._handlers = handlers
        self._backoff = Backoff(random)
        self._main: ClientProtocol | None = None
        self._sent: dict[ClientProtocol, frozenset[str]] = {}  # what each connection has
        self._begun: dict[ClientProtocol, tuple[frozenset[str], PendingCall]] = {}  # not yet awaited
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def connected(self, connection: ClientProtocol, *, is_further: bool = False) -> bool:
        """Use another connection, beside the main one or in its place. Return True if that shows the session."""
        if not is_further:
            self._main = connection
        self._sent[connection] = frozenset()
        shows = bool(self._handlers.names) and "calls" in connection.conversation.welcome
        if not (shows and not self._sessions.is_renewing and self.begin(connection)):
            self.changed()
        return shows

    def begin(self, connection: ClientProtocol) -> bool:
        """Send `session.handle` with the present token now, if possible. Return True if it was sent."""
        names = self._handlers.names
        if (
            not (names and connection.ready and "calls" in connection.conversation.welcome)
            or self._sessions.session is None
            or self._sessions.needs_proof(connection)
        ):
            return False
        self._sent[connection] = frozenset()
        try:
            stream, call = self._request(connection, names, self._sessions.token)
        except InvalidArgument:  # too large for a connection without a session
            return False
        call.add_done_callback(lambda call: call.cancelled() or call.exception())  # mark it as retrieved
        self._begun[connection] = names, (stream, call)
        self.changed()
        return True

    def add(self, handler: Handler) -> None:
        self._handlers.add(handler)
        self.changed()

    def changed(self) -> None:
        """Look again whether the handlers are registered."""
        self._changed.set()
        self._settled.clear()
        if self._task is None and self._handlers.names:
            self._task = self._loop.create_task(self._work(), name="zcproto-registration")

    async def settle(self, deadline: float) -> None:
        """Wait until the handlers are registered, that has failed, or the deadline has passed."""
        if self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(None if deadline == inf else deadline):
                    await self._settled.wait()

    async def close(self) -> None:
        """Stop, and cancel the handlers that run."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._handlers.close()

    async def _work(self) -> None:
        while True:
            self._changed.clear()
            delay = await self._step()
            if not self._changed.is_set():
                self._settled.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if delay == inf else delay):
                    await self._changed.wait()

    async def _step(self) -> float:
        """Send what is due. Return the seconds until the next step, unless something changes before."""
        for connection in [*self._sent]:
            if connection.draining or connection.error is not None:
                del self._sent[connection]
                self._begun.pop(connection, None)
        if not self._sent:
            return inf
        if not any("calls" in connection.conversation.welcome for connection in self._sent):
            log.warning("the server makes no calls; the handlers of this client are not used")
            return inf
        try:
            await self._sessions.ensure()
        except LoginError as error:  # such as an identity provider that is down
            log.warning("handlers of this client wait for a session: %s", error)
            return self._backoff.next() + MIN_INTERVAL
        except ZcprotoError:  # the next call of the application raises it
            return inf
        self._changed.clear()  # what follows reads everything again
        return min(await asyncio.gather(*map(self._register, self._sent)), default=inf)

    async def _register(self, connection: ClientProtocol) -> float:
        """Send what is due on a connection. Return the seconds until the next step."""
        sessions, was_woken = self._sessions, False
        while True:
            names, token = self._handlers.names, sessions.token
            if connection.draining or connection.error is not None or token == NO_TOKEN:
                return inf
            if "calls" not in connection.conversation.welcome:
                return inf
            if not connection.conversation.handles(token):
                self._sent[connection] = frozenset()
            begun = self._begun.pop(connection, None)
            if begun is None and not self._is_due(connection, names):
                if was_woken:
                    connection.pass_on()
                return self._next_step(connection)
            if begun is not None or connection.ready:
                break
            await connection.wait_ready()
            was_woken = True
        try:
            if begun is not None:
                names, pending = begun
            else:
                if sessions.needs_proof(connection):
                    await sessions.attach(connection, token)
                pending = self._request(connection, names, token)
            await answer(connection, pending)
        except ConnectionClosed:
            return inf  # there will be another connection
        except CallError as error:
            return await self._after_error(error, connection, token)
        self._sent[connection] = names
        self._backoff.reset()
        return self._next_step(connection)

    def _is_due(self, connection: ClientProtocol, names: frozenset[str]) -> bool:
        """Return whether a request has to be sent: a registration, or one that only shows the session."""
        return names != self._sent[connection] or (connection is self._main and self._idle_left() <= 0)

    def _next_step(self, connection: ClientProtocol) -> float:
        return max(self._idle_left(), MIN_INTERVAL) if connection is self._main else inf

    def _request(self, connection: ClientProtocol, names: frozenset[str], token: bytes) -> PendingCall:
        now = self._loop.time()
        self._sessions.used(now)
        deadline = now + ANSWER_TIMEOUT
        if names == self._sent[connection]:
            return connection.request("session.info", None, token, None, deadline)
        self._handlers.user = "" if self._sessions.session is None else self._sessions.session.user
        return connection.handle(names, self._handlers.most, self._handlers, token, deadline)

    def _idle_left(self) -> float:
        """Return the seconds until the session has to be shown: half of its idle timeout."""
        session = self._sessions.session
        if session is None or not session.idle_timeout_ms:
            return self._sessions.valid_until - self._loop.time()
        return self._sessions.valid_until - session.idle_timeout_ms / MS_PER_SECOND / 2 - self._loop.time()

    async def _after_error(self, error: CallError, connection: ClientProtocol, token: bytes) -> float:
        then = what_next(error)
        if then is Then.ATTACH:
            with suppress(CallError):  # the next attempt gets the same error
                await self._sessions.attach(connection, token)
        elif then not in (Then.LATER, Then.AT_ONCE):
            self._sessions.refused(token, error)
            if then is Then.RAISE and not isinstance(error, DeadlineExceeded):
                log.warning("the server cannot call this client: %s", error)
                return inf
        return self._backoff.next(retry_after_ms(error.details))
