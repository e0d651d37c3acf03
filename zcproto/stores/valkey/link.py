"""One connection to a server: many commands at once, and what the server says by itself.

What this file decides: the order of commands and replies, and when a connection is lost.

Rules:
- Commands go out in the order of `call`, those of one turn of the loop together; replies come in that order.
- The server's news (client tracking) comes on this connection too, in its place between the replies: never
  before the reply to a command that was done earlier.
- A connection that brings nothing for `silence` seconds although a reply is due is lost. What waited then
  fails, and may have been done all the same.

It must not know: sessions, scripts, which servers there are.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.stores.base import StoreUnavailable

MAX_WAITING: Final = 8_192
"""Commands without a reply, after which no more are taken."""

_SLACK: Final = 0.9  # of the timeout: loops wake a little early

LAST_LOOK_S: Final = 0.005
"""How long a connection that seems to be lost has to show that it is not."""


class Target:
    """A server, and how to connect to it."""

    __slots__ = ("database", "host", "password", "path", "port", "tls", "username")

    def __init__(
        self,
        host: str,
        port: int,
        *,
        path: str = "",
        tls: ssl.SSLContext | None = None,
        username: str = "",
        password: str = "",
        database: int = 0,
    ) -> None:
        self.host = host
        self.port = port
        self.path = path
        self.tls = tls
        self.username = username
        self.password = password
        self.database = database

    def __repr__(self) -> str:
        where = self.path or (
            f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        )
        return escape_text(where, 200)

    def connection(self) -> AbstractConnection:
        options: dict[str, Any] = {
            "db": self.database,
            "username": self.username or None,
            "password": self.password or None,
            "protocol": 3,
            "socket_timeout": None,
            "socket_connect_timeout": None,  # whoever connects has a time limit of its own
        }
        if self.path:
            return UnixDomainSocketConnection(path=self.path, **options)
        if self.tls is None:
            return Connection(host=self.host, port=self.port, **options)
        connection = SSLConnection(host=self.host, port=self.port, **options)
        connection.ssl_context.context = self.tls
        return connection


class Link:
    """A connection that is up, until `lost` says otherwise.

    `on_news` is called with the keys that the server says have changed, or None for all of them; `on_lost` once,
    unless it is closed.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        silence: float,
        on_news: Callable[[list[bytes] | None], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._silence = silence
        self._on_news = on_news
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._wake = asyncio.Event()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._heard = 0
        self._silent_since = -1
        self.lost = ""
        """Why it is lost; empty while it is up."""
        parser: Any = connection._parser
        parser.set_invalidation_push_handler(self._take_news)
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._write())]

    @classmethod
    async def connect(
        cls,
        target: Target,
        silence: float,
        on_news: Callable[[list[bytes] | None], None] = lambda keys: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Link:
        """Connect and log in, however long that takes. Raises StoreUnavailable, or ConfigError."""
        connection: Any = target.connection()
        try:
            await connection.connect()
        except RedisError as error:
            raise _refused(error, target) from None
        except Exception:  # the library takes every answer for one of a server that it knows
            await _disconnect(connection)
            raise StoreUnavailable(f"{target}: it does not answer like Valkey or Redis") from None
        except BaseException:
            await _disconnect(connection)
            raise
        return cls(connection, silence, on_news, on_lost)

    @property
    def is_silent(self) -> bool:
        """Whether it may be lost: that is known in LAST_LOOK_S."""
        return self._silent_since == self._heard

    async def call(self, *command: bytes | str | int) -> Any:
        """Send a command, and wait for its reply. Raises ResponseError for one that says no."""
        sent_at, heard = self._loop.time(), self._heard
        try:
            return await self.send(*command)
        except asyncio.CancelledError:
            if heard == self._heard and self._loop.time() - sent_at >= self._silence * _SLACK:
                # A loop that stood still comes to what waits in its sockets first.
                self._silent_since = heard
                self._loop.call_later(LAST_LOOK_S, self._lose_if_silent, heard)
            raise

    def send(self, *command: bytes | str | int) -> asyncio.Future[Any]:
        """Send a command; what comes for it."""
        if self.lost:
            raise StoreUnavailable(self.lost)
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable("too many operations wait for the server")
        self._out += self._connection.pack_command(*command)
        self._wake.set()
        future = self._loop.create_future()
        self._waiting.append(future)
        return future

    def lose(self, reason: str) -> None:
        """Give the connection up. All that waits fails."""
        if not self.lost:
            self._end(reason)
            self._on_lost()

    async def close(self) -> None:
        """Give the connection up, and wait until it is gone."""
        self._end("closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self, reason: str) -> None:
        if not self.lost:
            self.lost = escape_text(reason, 200)
            for future in self._waiting:
                if not future.done():
                    future.set_exception(StoreUnavailable(self.lost))
            self._waiting.clear()
            for task in self._tasks:
                task.cancel()

    def _lose_if_silent(self, heard: int) -> None:
        if heard == self._heard:
            self.lose(f"no answer within {self._silence * 1000:.0f} ms")

    async def _read(self) -> None:
        reason = ""
        try:
            while True:
                await self._read_one()
        except (RedisError, OSError) as error:
            reason = _said(error)
        except (ValueError, IndexError):
            reason = "the server answers what was not asked"
        finally:
            await _disconnect(self._connection)
        self.lose(reason)

    async def _read_one(self) -> None:
        reply: Any
        try:
            reply = await self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            reply = error
        self._heard += 1
        future = self._waiting.popleft()
        if future.done():
            return
        if isinstance(reply, ResponseError):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    async def _write(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                out, self._out = self._out, []
                await self._connection.send_packed_command(b"".join(out), check_health=False)
        except (RedisError, OSError) as error:
            self.lose(_said(error))

    async def _take_news(self, message: list[Any]) -> None:
        self._heard += 1
        self._on_news(message[1])


async def _disconnect(connection: AbstractConnection) -> None:
    with suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _refused(error: RedisError, target: Target) -> StoreUnavailable | ConfigError:
    """Why there is no connection: an outage, or what waiting cannot mend."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                [
                    f"store.url: the certificate of {target} is not trusted ({cause.verify_message}); "
                    "see store.ca_file"
                ]
            )
        cause = cause.__cause__ or cause.__context__
    said = escape_text(_said(error), 200)
    if target.password:
        said = said.replace(target.password, "***")
    if isinstance(error, AuthenticationError | NoPermissionError):
        return ConfigError([f"store.url: {target} refuses this user or password: {said}"])
    if isinstance(error, ResponseError):  # it answers, and will not say anything else later
        return ConfigError([f"store.url: {target} cannot be used: {said}"])
    return StoreUnavailable(f"{target}: {said}")
