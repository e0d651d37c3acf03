"""A TCP proxy on loopback to a server, with the faults of a network."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final, Self

TO_SERVER: Final = "to the server"
FROM_SERVER: Final = "from the server"


class Proxy:
    """A proxy to a Unix socket or to a port of loopback, as an async context manager.

    It listens from its creation on. `delay_s` is added each way; `accepted` counts connections. With `refuses` new
    connections are reset.
    """

    def __init__(self, to: Path | int) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = {direction: asyncio.Event() for direction in (TO_SERVER, FROM_SERVER)}
        self.release()
        self.delay_s = 0.0
        self.refuses = False
        self.accepted = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._listening)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def hold(self, *directions: str) -> None:
        """Keep back all bytes of a direction, as TCP does while a network loses packets, until `release`."""
        for direction in directions:
            self._flows[direction].clear()

    def release(self) -> None:
        for flow in self._flows.values():
            flow.set()

    def cut(self) -> None:
        """Reset all connections; bytes that were held are lost."""
        for writer in self._writers:
            writer.transport.abort()

    def isolate(self) -> None:
        """Reset all connections, and refuse new ones."""
        self.refuses = True
        self.cut()

    def restore(self) -> None:
        self.refuses = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refuses:
            writer.transport.abort()
            return
        try:
            if isinstance(self._to, Path):
                there = await asyncio.open_unix_connection(self._to)
            else:
                there = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:  # the server does not run
            writer.transport.abort()
            return
        self._writers |= {writer, there[1]}
        for source, sink, direction in (
            (reader, there[1], TO_SERVER),
            (there[0], writer, FROM_SERVER),
        ):
            pump = asyncio.create_task(self._pump(source, sink, self._flows[direction]))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flow: asyncio.Event
    ) -> None:
        try:
            while data := await source.read(65_536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                await flow.wait()
                sink.write(data)
                await sink.drain()
            await flow.wait()
        except (OSError, RuntimeError):
            pass  # one side is gone, and the other follows; uvloop raises RuntimeError for a closed transport
        finally:
            self._writers.discard(sink)
            sink.transport.abort()
