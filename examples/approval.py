"""An approval: the server asks a person at the client before it does something.

zcproto serve approval:app
python approval.py [HOST:PORT]
"""

import asyncio
import sys

import zcproto
from zcproto import App, Context

app = App()
files = {"notes.txt", "draft.txt"}


@app.method("file.delete")
async def delete(context: Context, name: str) -> int:
    """Delete a file after its user has agreed, and return how many are left."""
    if name not in files:
        raise zcproto.NotFound(f"there is no file {name}; give one of {', '.join(sorted(files))}")
    try:
        agreed = await context.client.call("approve", text=f"delete {name}", timeout=120.0)
    except zcproto.ZcprotoError:  # a timeout, a lost connection, a client without the handler
        agreed = False
    if agreed is not True:
        raise zcproto.PermissionDenied(f"{name} is kept; its deletion was not approved")
    files.discard(name)
    return len(files)


async def approve(text: str) -> bool:
    """Ask the person at the terminal."""
    print(f"{text}? [y/N]", flush=True)
    answer: str = await asyncio.to_thread(sys.stdin.readline)
    return answer.strip() == "y"


async def main(address: str = "localhost:7443") -> None:
    async with zcproto.connect(address, user="ada", key_file="ada.key") as client:
        await client.handle("approve", approve)
        for name in ("notes.txt", "draft.txt"):
            try:
                print("left:", await client.call("file.delete", name=name))
            except zcproto.PermissionDenied as error:
                print(error.message)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
