"""The application of real_server_test.go."""

import asyncio
import io
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import redirect_stdout

from zcproto import BUILT_IN_SCHEMES, App, CallableAuthenticator, Context, Ended, Items
from zcproto.cli import main

used = set()
begun = defaultdict(asyncio.Event)
released = defaultdict(asyncio.Event)


async def redeem(user: str, ticket: int) -> str | None:
    if (user, ticket) in used:
        return None
    used.add((user, ticket))
    return user


app = App(authenticators=[BUILT_IN_SCHEMES, CallableAuthenticator("ticket", redeem)])


@app.method("command")
async def command(arguments: list[str]) -> str:
    """Run a command of zcproto here, because another process takes seconds to start. Return its output."""
    with redirect_stdout(io.StringIO()) as output:
        await asyncio.to_thread(main, arguments)
    return output.getvalue().strip()


@app.method("echo")
async def echo(Word: str) -> dict:  # noqa: N803 (a field of Go in the README)
    return {"Word": Word}


@app.method("same")
async def same(value: object = None) -> object:
    return value


@app.method("hold")
async def hold(name: str) -> dict:
    """Run until it is released, or the server stops."""
    begun[name].set()
    await released[name].wait()
    return {}


@app.method("until.stopping")
async def until_stopping(context: Context) -> AsyncIterator[str | Ended[str]]:
    yield "begun"
    await context.stopping.wait()
    yield Ended("stopped")


@app.method("begun")
async def wait_begun(name: str) -> dict:
    await begun[name].wait()
    return {}


@app.method("release")
async def release(name: str) -> dict:
    released[name].set()
    return {}


@app.method("count")
async def count(n: int) -> AsyncIterator[int | Ended[dict]]:
    for number in range(n):
        yield number
    yield Ended({"sent": n})


@app.method("total")
async def total(numbers: Items[int]) -> int:
    result = 0
    async for number in numbers:
        result += number
    return result


@app.method("ask")
async def ask(context: Context, method: str) -> object:
    return await context.client.call(method, {"user": context.user}, timeout=300.0)
