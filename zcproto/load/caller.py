"""Connections for single calls whose answers are awaited, such as the operator's, which reads `server.stats`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar

from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.errors import CallError, ConfigError, ConnectionClosed, PermissionDenied, TlsError, ZcprotoError
from zcproto.load.connection import FrameConnection
from zcproto.load.plan import CLIENT_NAME, Credential
from zcproto.tls.client import TlsClientTransport, TlsConnector
from zcproto.tls.context import client_context
from zcproto.tls.transport import TlsTransport
from zcproto.wire.frame import NO_TOKEN

CLOSE_TIMEOUT: Final = 3.0
"""Seconds for the server to close its end of a connection."""

TIMEOUT: Final = 30.0
"""Seconds to connect and for each call: a server under load may be slow."""

Done = Callable[[Any, ZcprotoError | None], object]
"""Called with the answer to a request, or with its error."""


class Caller(FrameConnection):
    """One connection. `token` is used for requests without a token of their own; `requests` counts requests."""

    __slots__ = ("_calls", "_gone", "_ready", "_tls", "requests", "token")

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.token = NO_TOKEN
        self.requests = 0
        self._tls: TlsTransport | None = None
        self._gone = asyncio.Event()
        self._gone.set()  # until it is connected
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls: dict[int, Done] = {}

    async def dial(self, connector: TlsConnector, host: str, address: str, port: int) -> None:
        """Connect and wait for WELCOME. Raises TlsError or ConnectionClosed after closing everything."""

        def on_handshake(error: TlsError | None) -> None:
            if error is not None:
                self._fail_all(error)

        self._tls = transport = TlsClientTransport(connector, self, on_handshake)
        try:
            async with asyncio.timeout(TIMEOUT):
                await asyncio.get_running_loop().create_connection(lambda: transport, address, port)
                await self._ready
        except BaseException as error:
            await self.disconnect()
            if isinstance(error, TimeoutError):
                raise ConnectionClosed(f"{escape_text(host)}:{port} does not answer") from error
            if isinstance(error, OSError):
                reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
                raise ConnectionClosed(f"{escape_text(host)}:{port}: {reason}") from error
            raise

    def submit(
        self,
        method: str,
        params: dict[str, Any],
        done: Done,
        token: bytes | None = None,
        meta: dict[str, Any] | None = None,
    ) -> int:
        """Send a request, with `token` instead of the connection's own if given, and return its stream.

        Raises like `ClientConnection.request`.
        """
        token = self.token if token is None else token
        stream = self.conversation.request(method, params, token=token, meta=meta, wall=system_clock.wall())
        self.requests += 1
        self._calls[stream] = done
        self.flush()
        return stream

    async def call(
        self,
        method: str,
        params: dict[str, Any],
        token: bytes | None = None,
        meta: dict[str, Any] | None = None,
    ) -> Any:
        """Send a request and return its answer. Raises CallError or ConnectionClosed."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(value: Any, error: ZcprotoError | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        self.submit(method, params, done, token, meta)
        try:
            async with asyncio.timeout(TIMEOUT):
                return await answer
        except TimeoutError as error:
            raise ConnectionClosed(f"no answer to {method} within {TIMEOUT:.0f} s") from error

    async def disconnect(self) -> None:
        """Close the connection, if necessary by a reset. Never fails."""
        assert self._tls is not None
        self.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._gone.wait()
        finally:  # a caller that is cancelled here may stop the loop at once
            self._tls.abort()
        await asyncio.sleep(0)

    # --- events of the connection -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._gone.clear()
        super().connection_made(transport)

    def gone(self) -> None:
        self._gone.set()

    def welcomed(self) -> None:
        if not self._ready.done():  # `dial` may have been cancelled
            self._ready.set_result(None)

    def answered(self, stream: int, value: Any) -> None:
        done = self._calls.pop(stream, None)
        if done is not None:
            done(value, None)

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        done = self._calls.pop(stream, None)
        if done is not None:
            done(None, CallError.from_wire(code, escape_text(message, 200), details))

    def lost(self, cause: str) -> None:
        self._fail_all(ConnectionClosed(f"the connection was lost: {cause}"))

    def _fail_all(self, error: ZcprotoError) -> None:
        calls, self._calls = self._calls, {}
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # mark it as retrieved: `dial` raises it all the same
        for done in calls.values():
            done(None, error)


class LoadTarget:
    """A server to connect to, and what its connections share. Create it in the loop, and `close` it at the end."""

    def __init__(self, host: str, address: str, port: int, ca_file: Path | None) -> None:
        self.wheel = DeadlineWheel(asyncio.get_running_loop())
        self._host = host
        self._address = address
        self._port = port
        self._connector = TlsConnector(
            client_context(ca_file=ca_file),
            host,
            self.wheel,
            wall=system_clock.wall,
            handshake_timeout=TIMEOUT,
        )

    async def connect(self, caller: _C) -> _C:
        """Connect a caller that was made with this target's wheel. Raises like `Caller.dial`."""
        await caller.dial(self._connector, self._host, self._address, self._port)
        return caller

    async def caller(self) -> Caller:
        """Return a new connection."""
        return await self.connect(Caller(self.wheel))

    def close(self) -> None:
        self.wheel.close()


_C = TypeVar("_C", bound=Caller)


class ServerStats(NamedTuple):
    """The server's counters at one moment, from `server.stats`."""

    connections: int
    sessions: int
    requests: int
    """All requests since its start, including the `server.stats` call that returned this."""
    cpu_s: float
    rss_bytes: int
    longest_pause_s: float
    """The peak lag of its event loop since the previous call."""
    handshakes: int
    items: int
    """Items of streams sent since its start."""

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Parse the result of `server.stats`. Raises ZcprotoError for a missing value."""
        try:
            return cls(
                int(value["connections"]),
                int(value["sessions"]),
                int(value["requests"]),
                float(value["cpu_s"]),
                int(value["rss_bytes"]),
                float(value["longest_pause_s"]),
                int(value["handshakes_completed"]),
                int(value["items_sent"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ZcprotoError(
                "the server's server.stats lacks a counter that is needed here; upgrade the server"
            ) from error


class UserCaller(Caller):
    """A connection with a session of a user."""

    __slots__ = ("_target",)

    def __init__(self, target: LoadTarget) -> None:
        super().__init__(target.wheel)
        self._target = target

    @classmethod
    async def connect(
        cls, host: str, address: str, port: int, ca_file: Path | None, credential: Credential
    ) -> Self:
        """Connect and open the session. Raises ConfigError if the user gets none."""
        target = LoadTarget(host, address, port, ca_file)
        caller = await target.connect(cls(target))
        try:
            await caller.open(credential)
        except BaseException:
            await caller.disconnect()
            raise
        return caller

    async def open(self, credential: Credential) -> None:
        params = {"scheme": "api_key", "user": credential.user, "key": credential.key, "client": CLIENT_NAME}
        try:
            opened = await self.call("session.open", params)
        except CallError as error:
            raise ConfigError([f"{escape_text(credential.user)!r} got no session: {error}"]) from error
        self.token = opened["token"]

    async def disconnect(self) -> None:
        """Close the session and the connection. Never fails."""
        if self.token != NO_TOKEN and not self.ended:
            with contextlib.suppress(ZcprotoError):  # the server is gone, and its sessions with it
                await self.call("session.close", {})
        await super().disconnect()
        self._target.close()


class Operator(UserCaller):
    """A connection with a session that may call `server.stats`."""

    __slots__ = ()

    async def open(self, credential: Credential) -> None:
        await super().open(credential)
        try:
            await self.stats()
        except PermissionDenied as error:
            raise ConfigError(
                [
                    f"{escape_text(credential.user)!r} is not an operator, so the server's counters cannot be read;"
                    " create one with: zcproto user add ops --operator --count 1 --out ops.keys, and give"
                    " --operator-key-file ops.keys"
                ]
            ) from error

    async def stats(self) -> ServerStats:
        """Return the server's counters."""
        return ServerStats.parse(await self.call("server.stats", {}))

    def lost(self, cause: str) -> None:
        self._fail_all(ConnectionClosed(f"the operator's connection was lost: {cause}"))
