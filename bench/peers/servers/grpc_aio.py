"""grpcio's asyncio server: a unary method on bytes, and a stream of them, without protobuf."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.peers.servers.common import HOST, certificate, listening, until_parent_ends


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def items(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for _ in range(int.from_bytes(request[:4], "big")):
        yield request[4:]


async def main() -> None:
    certificate_file, key_file = (Path(name).read_bytes() for name in certificate())  # noqa: ASYNC240 - before it serves
    server = grpc.aio.server()
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Items": grpc.unary_stream_rpc_method_handler(items),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer.Echo", methods),))
    port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([(key_file, certificate_file)]))
    await server.start()
    listening(port)
    await until_parent_ends()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
