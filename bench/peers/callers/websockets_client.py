"""The client of websockets on uvloop. Arguments: port, certificate of the CA, size of the payload, compression.

Its messages have no ids: calls in flight are sent one after the other, then their answers are read in order.
"""

from __future__ import annotations

import os
import ssl
import sys

from websockets.asyncio.client import connect

from bench.peers.callers.common import run, run_slices


async def main() -> None:
    _, port, ca_file, size, compression = sys.argv
    payload = os.urandom(int(size))
    context = ssl.create_default_context(cafile=ca_file)
    # Periodic pings are off, as in the server. Compression is `deflate`, its default, or `none`.
    options = {"ssl": context, "ping_interval": None}
    if compression == "none":
        options["compression"] = None
    async with connect(f"wss://localhost:{port}", **options) as connection:

        async def calls(count: int, depth: int) -> None:
            for _ in range(count // depth):
                for _ in range(depth):
                    await connection.send(payload)
                for _ in range(depth):
                    assert await connection.recv() == payload

        await run_slices(calls)


if __name__ == "__main__":
    run(main())
