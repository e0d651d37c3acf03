"""A connection for single calls, each with an answer that somebody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.errors import CallError, ConnectionClosed, TlsError, ZcprotoError
from zcproto.load.link import Link
from zcproto.tls.client import TlsConnector
from zcproto.tls.context import client_context
from zcproto.tls.transport import TlsTransport
from zcproto.wire.frame import NO_TOKEN

LEAVE_TIMEOUT: Final = 3.0
"""Seconds for the server to see that a connection is closed."""

TIMEOUT: Final = 30.0
"""Seconds for connecting and for each call: a server under load may be slow."""

Done = Callable[[Any, ZcprotoError | None], object]
"""Called with what a request was answered, or why it was not."""


class Caller(Link):
    """One connection. `token` is what requests carry that name no other; `asked` counts requests made."""

    __slots__ = ("_calls", "_gone", "_ready", "_tls", "asked", "token")

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.token = NO_TOKEN
        self.asked = 0
        self._tls: TlsTransport | None = None
        self._gone = asyncio.Event()
        self._gone.set()  # until it is there
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls: dict[int, Done] = {}

    async def dial(self, connector: TlsConnector, host: str, address: str, port: int) -> None:
        """Connect, and wait for WELCOME. Raises TlsError or ConnectionClosed; then nothing is left of it."""

        def handshaken(error: TlsError | None) -> None:
            if error is not None:
                self._fail_all(error)

        self._tls = transport = connector.transport(self, handshaken)
        try:
            async with asyncio.timeout(TIMEOUT):
                await asyncio.get_running_loop().create_connection(lambda: transport, address, port)
                await self._ready
        except BaseException as error:
            await self.leave()
            if isinstance(error, TimeoutError):
                raise ConnectionClosed(f"{escape_text(host)}:{port} does not answer") from error
            if isinstance(error, OSError):
                reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
                raise ConnectionClosed(f"{escape_text(host)}:{port}: {reason}") from error
            raise

    def ask(self, method: str, params: dict[str, Any], done: Done, token: bytes | None = None) -> int:
        """Send one request, with this token instead of the connection's own if it is given; its stream.

        Raises as `ClientConnection.request`.
        """
        token = self.token if token is None else token
        stream = self.conversation.request(method, params, token=token, wall=system_clock.wall())
        self.asked += 1
        self._calls[stream] = done
        self.flush()
        return stream

    async def call(self, method: str, params: dict[str, Any], token: bytes | None = None) -> Any:
        """One request and its answer. Raises CallError or ConnectionClosed."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(value: Any, error: ZcprotoError | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        self.ask(method, params, done, token)
        try:
            async with asyncio.timeout(TIMEOUT):
                return await answer
        except TimeoutError as error:
            raise ConnectionClosed(f"no answer to {method} within {TIMEOUT:.0f} s") from error

    async def leave(self) -> None:
        """Close the connection; whether that succeeds changes nothing any more."""
        assert self._tls is not None
        self.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_TIMEOUT):
                    await self._gone.wait()
        finally:  # whoever does not wait any longer may end the loop at once
            self._tls.abort()
        await asyncio.sleep(0)

    # --- the connection's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._gone.clear()
        super().connection_made(transport)

    def gone(self) -> None:
        self._gone.set()

    def welcomed(self) -> None:
        if not self._ready.done():  # whoever waited may have gone
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
        self._fail_all(ConnectionClosed(f"the connection is gone: {cause}"))

    def _fail_all(self, error: ZcprotoError) -> None:
        calls, self._calls = self._calls, {}
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # whoever waits for it is told all the same
        for done in calls.values():
            done(None, error)


class Place:
    """A server to connect to, with what its connections share. Made in the loop; `close` it at the end."""

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

    async def join(self, caller: _C) -> _C:
        """Connect a caller of this place's wheel. Raises as `Caller.dial`."""
        await caller.dial(self._connector, self._host, self._address, self._port)
        return caller

    async def caller(self) -> Caller:
        """A new connection."""
        return await self.join(Caller(self.wheel))

    def close(self) -> None:
        self.wheel.close()


_C = TypeVar("_C", bound=Caller)
