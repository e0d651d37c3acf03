"""The application of the scenarios `readers`, `topics` and `durable_costs`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

from zcproto.app.app import default_app
from zcproto.app.context import Context
from zcproto.common.roles import OPERATORS

WATCHED_S: Final = 1.0
"""For how long the turns of the event loop are watched after an event."""

app = default_app()
news = app.topic("news", keep=16)
shared = app.topic("shared", keep=16, scope="server")
alive: Counter[str] = Counter()
"""Calls of `hold` that run now, by connection."""
most_alive = 0
"""The most of one connection so far."""


@app.method("fill")
async def fill(size: int) -> AsyncIterator[bytes]:
    """Send items of this size until the client leaves."""
    item = bytes(size)
    while True:
        yield item


@app.method("hold")
async def hold(context: Context) -> AsyncIterator[int]:
    """Send nothing until the client leaves."""
    global most_alive  # noqa: PLW0603  one process, one server
    connection = context.connection
    alive[connection] += 1
    most_alive = max(most_alive, alive[connection])
    try:
        await asyncio.Event().wait()
        yield 0
    finally:
        alive[connection] -= 1


async def numbers(total: int, pause: float) -> AsyncIterator[int]:
    """Send numbers, with a pause of so many seconds before each but the first; a negative one has no end."""
    for number in range(total):
        if number and pause < 0:
            # Not an event: it takes a KiB, and what an application holds is not what a run costs.
            await asyncio.get_running_loop().create_future()
        elif number and pause:
            await asyncio.sleep(pause)
        yield number


app.method("plain")(numbers)
app.method("durable", durable=True)(numbers)


@app.method("alive", roles=OPERATORS)
def count_alive() -> int:
    """Return the most calls of `hold` that have been alive at once on one connection."""
    return most_alive


@app.method("subscribers", roles=OPERATORS)
def subscribers() -> int:
    """Return the number of subscribers."""
    return news.subscribers


@app.method("say", roles=OPERATORS)
async def say(topic: str, number: int, size: int) -> float:
    """Publish an event. Return when, by the machine's monotonic clock."""
    began = time.monotonic()
    (shared if topic == "shared" else news).publish({"number": number, "data": bytes(size)})
    return began


@app.method("publish", roles=OPERATORS)
async def publish(number: int, size: int) -> dict[str, Any]:
    """Publish an event; return how long that took, and the longest turn of the loop afterwards, in seconds.

    Both are processor time of the loop's thread: what other programs take does not count.
    """
    end = time.monotonic() + WATCHED_S
    began = last = time.thread_time()
    news.publish({"number": number, "data": bytes(size)})
    longest = published = time.thread_time() - began
    while time.monotonic() < end:
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, last = max(longest, now - last), now
    return {"published_s": published, "longest_s": longest}
