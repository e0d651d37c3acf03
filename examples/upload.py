"""An upload with progress: pieces of a file go up, and what has arrived comes down.

zcproto serve upload:app
python upload.py [HOST:PORT [FILE]]
"""

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import zcproto
from zcproto import App, Ended, Items

PIECE = 32 * 1024

app = App()


@app.method("upload")
async def upload(size: int, pieces: Items[bytes]) -> AsyncIterator[int | Ended[str]]:
    """Take a file, yield the number of bytes so far, and end with its SHA-256 digest."""
    digest, arrived = hashlib.sha256(), 0
    async for piece in pieces:
        digest.update(piece)
        arrived += len(piece)
        if arrived > size:
            raise zcproto.OutOfRange(f"the file has more than {size} bytes; send its real size")
        yield arrived
    yield Ended(digest.hexdigest())


def pieces_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


async def main(address: str = "localhost:7443", name: str = __file__) -> None:
    path = Path(name)
    size = (await asyncio.to_thread(path.stat)).st_size
    async with (
        zcproto.connect(address, user="ada", key_file="ada.key") as client,
        client.stream("upload", size=size, items=pieces_of(path)) as stream,
    ):
        async for arrived in stream:
            print(f"{arrived / size:.0%}")
        print("sha256", stream.result)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
