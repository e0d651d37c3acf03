"""The listening side of the scripted server: connections wait until a scenario accepts them."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

from zcproto.common.clock import Clock, Entropy
from zcproto_conformance.connection import Connection
from zcproto_conformance.errors import CheckFailed

HOST: Final = "127.0.0.1"


def tls_context(
    pem: Path, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, alpn: str | None = "zcp/1"
) -> ssl.SSLContext:
    """Return a server context with one version of TLS and at most one ALPN protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.num_tickets = 0
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    context.load_cert_chain(pem)
    return context


class ScriptedServer:
    """Listens on a free port. `next_connection` returns connections in the order of their arrival."""

    def __init__(self, clock: Clock, entropy: Entropy, *, patience: float) -> None:
        self._clock = clock
        self._entropy = entropy
        self._patience = patience
        self._waiting: asyncio.Queue[Connection] = asyncio.Queue()
        self._connections: list[Connection] = []
        self._stopped = False

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def connection_count(self) -> int:
        """The number of connections accepted so far."""
        return len(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, self._clock, self._entropy, patience=self._patience)
        if self._stopped:  # it arrived while the server was stopping
            await connection.abort()
            return
        self._connections.append(connection)
        self._waiting.put_nowait(connection)

    async def next_connection(self) -> Connection:
        """Return the next connection, before TLS. Raises CheckFailed if the client does not connect in time."""
        try:
            async with asyncio.timeout(self._patience):
                return await self._waiting.get()
        except TimeoutError:
            raise CheckFailed("the client did not connect") from None

    async def expect_no_connection(self, when: str, seconds: float) -> None:
        """Raise CheckFailed if a client connects within a time."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.get()
        except TimeoutError:
            return
        raise CheckFailed(f"the client connected {when}")

    async def stop(self) -> None:
        self._stopped = True
        loop = asyncio.get_running_loop()
        for listener in self._server.sockets:
            loop.remove_reader(listener)
        await asyncio.sleep(0)  # Python 3.11 leaks a connection that is accepted while Server.close() runs
        self._server.close()
        for connection in self._connections:
            await connection.abort()
        await self._server.wait_closed()
