"""Four processes that serve on one socket and count connections together, until standard input ends.

python -m tests.workers.counting_workers HOME LIMIT
"""

from __future__ import annotations

import asyncio
import mmap
import os
import sys
from pathlib import Path
from typing import Final

import zcproto
from zcproto.runtime.build import WorkerRole
from zcproto.server.listener import bind
from zcproto.workers.limits import SharedMemory, memory_size

WORKERS: Final = 4
CONNECTIONS: Final = 1_000


async def serve(server: zcproto.Server, ready: int, end: int) -> None:
    async with server:
        os.write(ready, b".")
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(end, ended.set)
        await ended.wait()


def main(home: Path, limit: int) -> None:
    config = zcproto.Config(
        log=zcproto.LogConfig(level="error"),
        store=zcproto.StoreConfig(url="memory"),
        server=zcproto.ServerConfig(drain_timeout=0.0),
        tls=zcproto.TlsConfig(handshake_timeout=30.0),
        limits=zcproto.LimitsConfig(max_connections=CONNECTIONS, connections_per_address=limit),
        certificates=zcproto.CertificatesConfig(key_types=("ecdsa-p256",)),
    )
    memory = SharedMemory(
        mmap.mmap(-1, memory_size(WORKERS, CONNECTIONS)), WORKERS, CONNECTIONS, os.urandom(32)
    )
    (listening,) = bind(["127.0.0.1"], 0)
    is_ready, ready = os.pipe()
    end, closed = os.pipe()
    for number in range(WORKERS):
        if not os.fork():
            os.close(closed)
            role = WorkerRole(counting=memory.worker(number), maintains=False, run=f"{number}")
            server = zcproto.Server(
                None, config, home=home, sockets=[listening.dup()], control=False, role=role
            )
            asyncio.run(serve(server, ready, end))
            os._exit(0)
    for _ in range(WORKERS):
        os.read(is_ready, 1)
    print(listening.getsockname()[1], flush=True)
    sys.stdin.read()
    os.close(closed)
    for _ in range(WORKERS):
        os.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
