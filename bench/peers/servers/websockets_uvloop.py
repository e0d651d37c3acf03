"""websockets on uvloop: binary messages."""

from __future__ import annotations

import asyncio

import uvloop
from websockets.asyncio.server import ServerConnection, serve

from bench.peers.servers.common import BACKLOG, HOST, listening, tls_context, until_parent_ends


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


async def main() -> None:
    # No periodic pings: they would be measured with the requests, and held connections do not answer.
    options = {"ssl": tls_context(), "backlog": BACKLOG, "ping_interval": None}
    async with serve(echo, HOST, 0, **options) as server:
        listening(server.sockets[0].getsockname()[1])
        await until_parent_ends()
        server.close(close_connections=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
