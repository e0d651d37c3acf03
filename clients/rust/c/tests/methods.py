"""The application of the server that the tests of the C interface use."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import zcproto
from zcproto import App, Context, Ended, Items

app = App()


@app.method("echo")
def echo(**params: object) -> object:
    """Return the params."""
    return params


@app.method("rest")
async def rest(ms: int) -> int:
    """Wait, and return the time that was asked for."""
    await asyncio.sleep(ms / 1000)
    return ms


@app.method("find")
def find() -> None:
    """Fail with details."""
    raise zcproto.NotFound("there is no such thing", details={"size": 3})


@app.method("count")
async def count(n: int) -> AsyncIterator[int | Ended[dict]]:
    """Send n items."""
    for number in range(n):
        yield number
    yield Ended({"sent": n})


@app.method("total")
async def total(numbers: Items[int]) -> int:
    """Add up the items."""
    result = 0
    async for number in numbers:
        result += number
    return result


@app.method("ask")
async def ask(context: Context, method: str, text: str) -> object:
    """Call the caller's method, and return its answer or the name of the error."""
    try:
        return await context.client.call(method, {"text": text})
    except zcproto.CallError as error:
        return error.code.name


@app.method("hold")
async def hold(context: Context) -> None:
    """Call the caller's method `hold`, and do not return, whatever its answer is."""
    with suppress(zcproto.CallError):
        await context.client.call("hold")
    await asyncio.sleep(3600)
