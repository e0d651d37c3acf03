"""asyncio streams on the event loop of the standard library: a length of four bytes, and the payload."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from bench.peers.servers.common import BACKLOG, HOST, listening, tls_context, until_parent_ends

LENGTH_BYTES: Final = 4
MOST: Final = 1 << 20


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readexactly(LENGTH_BYTES)
            length = int.from_bytes(head, "big")
            if length > MOST:
                return
            writer.write(head + await reader.readexactly(length))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):  # the client is gone
        return
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def main() -> None:
    server = await asyncio.start_server(echo, HOST, 0, ssl=tls_context(), backlog=BACKLOG)
    listening(server.sockets[0].getsockname()[1])
    await until_parent_ends()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
