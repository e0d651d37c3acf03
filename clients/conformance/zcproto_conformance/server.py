"""The scripted server's listening side: each connection waits until a conversation takes it."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Final

from zcproto.common.clock import Clock, Entropy
from zcproto_conformance.errors import CheckFailed
from zcproto_conformance.link import Link

HOST: Final = "127.0.0.1"


def tls_context(
    pem: Path, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, alpn: str | None = "zcp/1"
) -> ssl.SSLContext:
    """A server's context: one version of TLS, and one protocol or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    context.num_tickets = 0
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    context.load_cert_chain(pem)
    return context


class ScriptedServer:
    """Listens on a free port. `accept` takes the connections in their order."""

    def __init__(self, clock: Clock, entropy: Entropy, *, patience: float) -> None:
        self._clock = clock
        self._entropy = entropy
        self._patience = patience
        self._waiting: asyncio.Queue[Link] = asyncio.Queue()
        self._links: list[Link] = []
        self._stopped = False
        self.connections = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accepted, HOST, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(reader, writer, self._clock, self._entropy, patience=self._patience)
        if self._stopped:  # it was on its way meanwhile
            await link.drop()
            return
        self.connections += 1
        self._links.append(link)
        self._waiting.put_nowait(link)

    async def connection(self, seconds: float | None = None) -> Link:
        """The next connection, before TLS. Raises CheckFailed if the client does not come."""
        try:
            async with asyncio.timeout(self._patience if seconds is None else seconds):
                return await self._waiting.get()
        except TimeoutError:
            raise CheckFailed("the client did not connect") from None

    async def nobody(self, why: str, seconds: float) -> None:
        """Raise CheckFailed if a client connects within a time."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.get()
        except TimeoutError:
            return
        raise CheckFailed(f"the client connected {why}")

    async def stop(self) -> None:
        self._server.close()
        self._stopped = True
        for link in self._links:
            await link.drop()
        await self._server.wait_closed()
