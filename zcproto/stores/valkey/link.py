"""One connection to a server, with many commands in flight and its client tracking messages.

Decides: the order of commands and replies, and when a connection counts as lost.

Rules:
- Commands are sent in the order of `call`, those of one turn of the loop together. Replies come in that order.
- Client tracking messages come on the same connection, so never before the reply to an earlier command. So do the
  messages of channels, and what confirms a subscription in place of a reply.
- A connection that receives nothing for `silence` seconds while a reply is due is lost. Commands in flight then
  fail, but may have been executed.

It must not know: sessions, scripts, which servers exist.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.valkey.url import address_text

MAX_WAITING: Final = 8_192
"""Commands in flight; more are refused."""

_SLACK: Final = 0.9  # of the timeout: event loops wake a little early

_CONFIRMED: Final = ("SUBSCRIBE", "UNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE")
"""Commands of one channel that are confirmed by a push message."""

LAST_CHECK_S: Final = 0.005
"""How long a silent connection has left to receive something before it is dropped."""


OnMessage = Callable[[bytes, bytes | None], None]


@dataclass(slots=True, repr=False)
class Target:
    """A server, and how to connect to it."""

    host: str
    port: int
    path: str = ""
    tls: ssl.SSLContext | None = None
    username: str = ""
    password: str = ""
    database: int = 0

    def __repr__(self) -> str:
        return escape_text(self.path or address_text((self.host, self.port)), 200)

    def connection(self) -> AbstractConnection:
        options: dict[str, Any] = {
            "db": self.database,
            "username": self.username or None,
            "password": self.password or None,
            "protocol": 3,
            "socket_timeout": None,
            "socket_connect_timeout": None,  # the caller has a time limit
        }
        if self.path:
            return UnixDomainSocketConnection(path=self.path, **options)
        if self.tls is None:
            return Connection(host=self.host, port=self.port, **options)
        connection = SSLConnection(host=self.host, port=self.port, **options)
        connection.ssl_context.context = self.tls
        return connection


class Link:
    """A connection, up until `lost` is set.

    `on_keys_changed` is called with changed keys, or None if all were deleted. `on_message` is called with a
    channel, and a message or None if the server has ended the subscription. `on_lost` is called once, unless the
    connection is closed.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        silence: float,
        on_keys_changed: Callable[[list[bytes] | None], None],
        on_lost: Callable[[], None],
        on_message: OnMessage,
    ) -> None:
        self._connection = connection
        self._silence = silence
        self._on_keys_changed = on_keys_changed
        self._on_lost = on_lost
        self._on_message = on_message
        self._confirming: dict[asyncio.Future[Any], list[bytes]] = {}
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._wake = asyncio.Event()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._received = 0
        self._silent_since = -1
        self.lost = ""
        """Why it was lost; empty while it is up."""
        parser: Any = connection._parser
        parser.set_invalidation_push_handler(self._read_invalidation)
        parser.set_pubsub_push_handler(self._read_push)
        self._tasks = [self._loop.create_task(self._read()), self._loop.create_task(self._write())]

    @classmethod
    async def connect(
        cls,
        target: Target,
        silence: float,
        on_keys_changed: Callable[[list[bytes] | None], None] = lambda keys: None,
        on_lost: Callable[[], None] = lambda: None,
        on_message: OnMessage = lambda channel, message: None,
    ) -> Link:
        """Connect and log in, without a time limit. Raises StoreUnavailable, or ConfigError."""
        connection: Any = target.connection()
        try:
            await connection.connect()
        except RedisError as error:
            raise _refused(error, target) from None
        except Exception:  # the library parses any answer as one of a known server
            await _disconnect(connection)
            raise StoreUnavailable(
                f"{target}: it does not answer like Valkey or Redis; check store.url"
            ) from None
        except BaseException:
            await _disconnect(connection)
            raise
        return cls(connection, silence, on_keys_changed, on_lost, on_message)

    @property
    def is_silent(self) -> bool:
        """Whether it may be lost, which is decided within LAST_CHECK_S."""
        return self._silent_since == self._received

    async def call(self, *command: bytes | str | int) -> Any:
        """Send a command and return its reply. Raises ResponseError for an error reply."""
        sent_at, received = self._loop.time(), self._received
        try:
            return await self.send(*command)
        except asyncio.CancelledError:
            if received == self._received and self._loop.time() - sent_at >= self._silence * _SLACK:
                # A loop that was blocked reads what is waiting in its sockets first.
                self._silent_since = received
                self._loop.call_later(LAST_CHECK_S, self._lose_if_silent, received)
            raise

    def send(self, *command: bytes | str | int) -> asyncio.Future[Any]:
        """Send a command and return a future for its reply."""
        if self.lost:
            raise StoreUnavailable(self.lost)
        if len(self._waiting) >= MAX_WAITING:
            raise StoreUnavailable("too many operations are waiting for the server")
        self._out += self._connection.pack_command(*command)
        self._wake.set()
        future = self._loop.create_future()
        self._waiting.append(future)
        if command[0] in _CONFIRMED:
            kind, channel = command
            assert isinstance(kind, str)
            assert isinstance(channel, bytes)
            self._confirming[future] = [kind.lower().encode(), channel]
        return future

    def lose(self, reason: str) -> None:
        """Drop the connection. Commands in flight fail."""
        if not self.lost:
            self._end(reason)
            self._on_lost()

    async def close(self) -> None:
        """Drop the connection and wait until it is closed."""
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

    def _lose_if_silent(self, received: int) -> None:
        if received == self._received:
            self.lose(f"no answer within {self._silence * 1000:.0f} ms")

    async def _read(self) -> None:
        reason = ""
        try:
            while True:
                await self._read_one()
        except (RedisError, OSError) as error:
            reason = _describe(error)
        except (ValueError, IndexError):
            reason = "the server sent a reply without a command"
        finally:
            await _disconnect(self._connection)
        self.lose(reason)

    async def _read_one(self) -> None:
        reply: Any
        try:
            reply = await self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            reply = error
        self._received += 1
        future = self._waiting.popleft()
        self._confirming.pop(future, None)
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
            self.lose(_describe(error))

    async def _read_invalidation(self, message: list[Any]) -> None:
        self._received += 1
        self._on_keys_changed(message[1])

    async def _read_push(self, message: list[Any]) -> None:
        self._received += 1
        kind, channel, content = message[0], message[1], message[-1]
        if kind in (b"message", b"smessage"):
            self._on_message(channel, content)
        elif self._waiting and self._confirming.get(self._waiting[0]) == [kind, channel]:
            future = self._waiting.popleft()
            del self._confirming[future]
            if not future.done():
                future.set_result(None)
        elif kind == b"sunsubscribe":  # its slot is moved to another server
            self._on_message(channel, None)


async def _disconnect(connection: AbstractConnection) -> None:
    with suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _refused(error: RedisError, target: Target) -> StoreUnavailable | ConfigError:
    """Return why connecting failed: an outage, or a fault that retrying cannot fix."""
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
    shown = escape_text(_describe(error), 200)
    if target.password:
        shown = shown.replace(target.password, "***")
    if isinstance(error, AuthenticationError | NoPermissionError):
        return ConfigError([f"store.url: {target} refuses this user or password: {shown}"])
    if isinstance(error, ResponseError):  # it answers, so retrying will not help
        return ConfigError([f"store.url: {target} cannot be used: {shown}"])
    return StoreUnavailable(f"{target}: {shown}")
