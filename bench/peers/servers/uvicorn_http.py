"""uvicorn with uvloop and httptools, as its `standard` extra installs it, and the smallest ASGI application."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any, Final

import uvicorn
import uvloop

from bench.peers.servers.common import BACKLOG, HOST, certificate, listening, until_parent_ends

KEEP_ALIVE_S: Final = 3_600
"""Seconds. The default of 5 would close connections that are held to measure memory."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def main() -> None:
    certificate_file, key_file = certificate()
    config = uvicorn.Config(
        echo,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        ssl_certfile=certificate_file,
        ssl_keyfile=key_file,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=BACKLOG,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    listener = socket.create_server((HOST, 0), backlog=BACKLOG)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    listening(listener.getsockname()[1])
    await until_parent_ends()
    server.should_exit = server.force_exit = True
    await serving


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
