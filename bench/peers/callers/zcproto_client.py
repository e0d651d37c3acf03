"""zcproto's client on uvloop. Arguments: port, certificate of the CA, user, key, size of the payload."""

from __future__ import annotations

import asyncio
import os
import sys

from bench.peers.callers.common import run, run_slices
from zcproto.client import connect


async def main() -> None:
    _, port, ca_file, user, key, size = sys.argv
    payload = os.urandom(int(size))
    async with connect(f"localhost:{port}", user=user, key=key, ca_file=ca_file) as client:

        async def call(count: int) -> None:
            for _ in range(count):
                answer = await client.call("echo", data=payload)
                assert answer == {"data": payload}

        async def calls(count: int, depth: int) -> None:
            if depth == 1:
                await call(count)
            else:
                await asyncio.gather(*(call(count // depth) for _ in range(depth)))

        await run_slices(calls)


if __name__ == "__main__":
    run(main())
