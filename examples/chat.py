"""A chat: a topic sends each line to all clients in the room.

zcproto serve chat:app
python chat.py [HOST:PORT [USER]]      in several terminals, with a user in each; Ctrl-D leaves
"""

import asyncio
import sys
from collections.abc import AsyncIterable, AsyncIterator

import zcproto
from zcproto import App, Context, TopicEvent

app = App()
lines = app.topic("lines", slow="drop_oldest")  # who reads slowly misses lines


@app.method("room.enter")
async def enter(context: Context) -> AsyncIterator[TopicEvent | dict[str, str]]:
    """Yield a welcome, which shows that the subscription has begun, then each line."""
    with lines.subscribe(until=context.stopping) as events:
        yield {"user": "room", "text": f"welcome {context.user}"}
        async for event in events:
            yield event


@app.method("room.say")
def say(context: Context, text: str) -> None:
    """Send a line to all clients in the room."""
    lines.publish({"user": context.user, "text": text})


async def show(room: AsyncIterable[dict[str, str]], user: str) -> None:
    async for line in room:
        print(f"{line['user']}: {line['text']}")
        if line == {"user": user, "text": "(leaves)"}:
            return


async def main(address: str = "localhost:7443", user: str = "ada") -> None:
    async with (
        zcproto.connect(address, user=user, key_file=f"{user}.key") as client,
        client.stream("room.enter") as room,
        asyncio.TaskGroup() as tasks,
    ):
        print((await room.receive())["text"])
        tasks.create_task(show(room, user))
        while line := await asyncio.to_thread(sys.stdin.readline):
            await client.call("room.say", text=line.strip())
        await client.call("room.say", text="(leaves)")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
