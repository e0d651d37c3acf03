"""The operator's connection: the server's own count, read from `server.stats`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from bench.load.link import Link
from bench.load.plan import Credential
from zcproto.clock import system_clock
from zcproto.deadlines import DeadlineWheel
from zcproto.errors import CallError, ConfigError, ConnectionClosed, PermissionDenied, TlsError, ZcprotoError
from zcproto.printable import printable
from zcproto.tls.client import TlsConnector
from zcproto.tls.context import client_context
from zcproto.tls.transport import TlsTransport
from zcproto.wire.frame import NO_TOKEN

LEAVE_TIMEOUT: Final = 3.0
"""Seconds for the server to see that the operator is leaving."""

TIMEOUT: Final = 30.0
"""Seconds for connecting and for each call: a server under load may be slow."""


class Stats(NamedTuple):
    """The server's figures at one moment."""

    connections: int
    sessions: int
    requests: int
    """All since its start, the `server.stats` that tells it included."""
    cpu_s: float
    rss_bytes: int
    longest_pause_s: float
    """Of its loop, since the call before."""
    handshakes: int

    @classmethod
    def of(cls, value: Any) -> Self:
        """From the map that `server.stats` returns. Raises ZcprotoError if something is missing."""
        try:
            return cls(
                int(value["connections"]),
                int(value["sessions"]),
                int(value["requests"]),
                float(value["cpu_s"]),
                int(value["rss_bytes"]),
                float(value["longest_pause_s"]),
                int(value["handshakes_completed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ZcprotoError("this server's server.stats does not tell what is needed here") from error


class Operator(Link):
    """One connection with one session that may call `server.stats`."""

    __slots__ = ("_calls", "_gone", "_ready", "_tls", "asked", "token")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(DeadlineWheel(loop))
        self.token = NO_TOKEN
        self.asked = 0
        """Requests made, all of which the server counts."""
        self._tls: TlsTransport | None = None
        self._gone = asyncio.Event()
        self._gone.set()  # until it is there
        self._ready: asyncio.Future[None] = loop.create_future()
        self._calls: dict[int, asyncio.Future[Any]] = {}

    @classmethod
    async def connect(
        cls, host: str, address: str, port: int, ca_file: Path | None, credential: Credential
    ) -> Operator:
        """Connect and open the session.

        Raises ConfigError if the user is unknown or no operator; nothing else was connected yet then.
        """
        loop = asyncio.get_running_loop()
        operator = cls(loop)

        def handshaken(error: TlsError | None) -> None:
            if error is not None:
                operator._fail_all(error)

        connector = TlsConnector(
            client_context(ca_file=ca_file),
            host,
            operator._wheel,
            wall=system_clock.wall,
            handshake_timeout=TIMEOUT,
        )
        operator._tls = transport = connector.transport(operator, handshaken)
        try:
            async with asyncio.timeout(TIMEOUT):
                await loop.create_connection(lambda: transport, address, port)
                await operator._ready
            await operator._open(credential)
        except BaseException as error:
            await operator.leave()
            if isinstance(error, TimeoutError):
                raise ConnectionClosed(f"{printable(host)}:{port} does not answer") from error
            if isinstance(error, OSError):
                reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
                raise ConnectionClosed(f"{printable(host)}:{port}: {reason}") from error
            raise
        return operator

    async def _open(self, credential: Credential) -> None:
        params = {
            "scheme": "api_key",
            "user": credential.user,
            "key": credential.key,
            "client": "zcproto-bench/1",
        }
        try:
            opened = await self.call("session.open", params)
        except CallError as error:
            raise ConfigError(
                [f"the operator {printable(credential.user)!r} got no session: {error}"]
            ) from error
        self.token = opened["token"]
        try:
            await self.stats()
        except PermissionDenied as error:
            raise ConfigError(
                [
                    f"the server's own count is for operators, and {printable(credential.user)!r} is none; make "
                    "one by: zcproto user add ops --operator --count 1 --keys-out ops.keys, and give "
                    "--operator-key-file ops.keys"
                ]
            ) from error

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """One request and its answer. Raises CallError or ConnectionClosed."""
        stream = self.conversation.request(method, params, token=self.token, wall=system_clock.wall())
        self.asked += 1
        answer = self._calls[stream] = asyncio.get_running_loop().create_future()
        self.flush()
        try:
            return await asyncio.wait_for(answer, TIMEOUT)
        except TimeoutError as error:
            raise ConnectionClosed(f"no answer to {method} within {TIMEOUT:.0f} s") from error

    async def stats(self) -> Stats:
        return Stats.of(await self.call("server.stats", {}))

    async def leave(self) -> None:
        """Close the session and the connection; whether that succeeds changes nothing any more."""
        if self.token != NO_TOKEN and not self.ended:
            with contextlib.suppress(ZcprotoError):  # the server is gone, and the session with it
                await self.call("session.close", {})
        self.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), LEAVE_TIMEOUT)
        assert self._tls is not None
        self._tls.abort()
        self._wheel.close()
        await asyncio.sleep(0)

    # --- the connection's calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._gone.clear()
        super().connection_made(transport)

    def gone(self) -> None:
        self._gone.set()

    def welcomed(self) -> None:
        self._ready.set_result(None)

    def answered(self, stream: int, value: Any) -> None:
        answer = self._calls.pop(stream, None)
        if answer is not None and not answer.done():
            answer.set_result(value)

    def refused(self, stream: int, code: int, message: str, details: dict[str, Any]) -> None:
        answer = self._calls.pop(stream, None)
        if answer is not None and not answer.done():
            answer.set_exception(CallError.from_wire(code, printable(message, 200), details))

    def lost(self, cause: str) -> None:
        self._fail_all(ConnectionClosed(f"the operator's connection is gone: {cause}"))

    def _fail_all(self, error: ZcprotoError) -> None:
        calls, self._calls = self._calls, {}
        for waiting in (self._ready, *calls.values()):
            if not waiting.done():
                waiting.set_exception(error)
