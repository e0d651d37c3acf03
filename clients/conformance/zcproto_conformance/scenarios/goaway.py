"""GOAWAY, lost connections, and which calls are sent again."""

from __future__ import annotations

import asyncio
from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.link import QUIET
from zcproto_conformance.stage import Joined, Stage

scenario: Final = Scenarios(SCRIPTED)

RESOURCE_EXHAUSTED: Final = 8
UNAVAILABLE: Final = 14
_STORM: Final = 10
_STORM_SECONDS: Final = 2.0
_WHILE_MS: Final = 500
"""A delay that a server asks for, long enough to be told from none."""


@scenario("goaway-in-the-middle", "6.7: what is in flight at GOAWAY is still answered there")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.goaway()
    joined.link.answer(request, "still answered")
    await call.gives("still answered")


@scenario("goaway-and-new-calls", "6.7: after GOAWAY new requests go to another connection")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    old = await joined.client.call("sleep", {})
    request = await joined.link.request("sleep")
    joined.link.goaway()
    await joined.link.heard()
    new = await joined.client.call("echo", {})
    link = await stage.welcomed()
    link.answer(await link.request("echo"), "over here")
    await new.gives("over here")
    await joined.link.quiet("on a connection that is going away")
    joined.link.answer(request, "over there")
    await old.gives("over there")


@scenario("goaway-retry-after", "6.7: no other connection before retry_after_ms")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    joined.link.goaway(retry_after_ms=_WHILE_MS)
    await joined.link.heard()
    call = await joined.client.call("echo", {})
    await stage.server.nobody("before retry_after_ms", _WHILE_MS / 1000 * 0.8)
    link = await stage.welcomed()
    link.answer(await link.request("echo"), "later")
    await call.gives("later")


@scenario("goaway-twice", "16: GOAWAY can come more than once")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.goaway("idle")
    joined.link.goaway("draining")
    joined.link.answer(request, "still answered")
    await call.gives("still answered")


@scenario(
    "goaway-then-a-clean-end",
    "11.1, 16: without an answer and cleanly ended, the request did not run: sent again",
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"n": 1})
    await joined.link.request("echo")
    joined.link.goaway()
    joined.link.close()
    link = await stage.welcomed()
    again = await link.request("echo")
    expect(again.params == {"n": 1}, f"the call came again with {again.params}")
    link.answer(again, "after all")
    await call.gives("after all")


@scenario(
    "goaway-then-cut", "11.1, 16: cut after GOAWAY, nobody knows whether the request ran: not sent again"
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.goaway()
    joined.link.truncate()
    await call.lost(clean=False)


@scenario("lost-without-a-key", "11.1: a call whose connection was lost is not sent again")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.truncate()
    await call.lost()
    following = await joined.client.call("time")
    link = await stage.welcomed()
    link.answer(await link.request("time"), 1)
    await following.gives(1)
    await link.quiet("after a call that was lost")


@scenario(
    "lost-with-a-key", "11.1: a call with an idempotency key is sent again when its connection was lost"
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"n": 1}, idempotency_key="order-7")
    link = joined.link
    for _ in range(2):
        request = await link.request("echo")
        expect(request.meta.get("idempotency_key") == "order-7", f"meta is {request.meta}")
        expect(request.params == {"n": 1}, f"the params are {request.params}")
        link.truncate()
        link = await stage.welcomed()
    link.answer(await link.request("echo"), "once")
    await call.gives("once")


@scenario(
    "cut-by-the-network",
    "11.1: a connection that is destroyed under a client fails its calls; the next connects",
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    await joined.client.cut()
    await call.lost(clean=False)
    following = await joined.client.call("time")
    link = await stage.welcomed()
    link.answer(await link.request("time"), 1)
    await following.gives(1)


@scenario("no-storm", "11.2: a client that is thrown out again and again comes back ever more slowly")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    await joined.link.lose()
    call = await joined.client.call("echo", {}, idempotency_key="again")
    before = stage.server.connections
    try:
        async with asyncio.timeout(_STORM_SECONDS):
            # With full jitter so many tries take minutes; one run in a hundred thousand is quicker than this.
            while stage.server.connections - before < _STORM:
                (await stage.welcomed()).truncate()
    except TimeoutError:
        await call.cancel()
        return
    raise CheckFailed(f"the client connected {_STORM} times in {_STORM_SECONDS:g} s")


# --- errors that say when to come again -------------------------------------------------------------


async def _again(stage: Stage, code: int) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"n": 1})
    for _ in range(2):
        request = await joined.link.request("echo")
        joined.link.refuse(request, code, {"retry_after_ms": 20})
    again = await joined.link.request("echo")
    expect(again.params == {"n": 1}, f"the call came again with {again.params}")
    joined.link.answer(again, "at last")
    await call.gives("at last")


@scenario("unavailable", "11.1: UNAVAILABLE is sent again, until the call's time is over")
async def _(stage: Stage) -> None:
    await _again(stage, UNAVAILABLE)


@scenario("resource-exhausted", "11.1: RESOURCE_EXHAUSTED without limit is sent again")
async def _(stage: Stage) -> None:
    await _again(stage, RESOURCE_EXHAUSTED)


@scenario("retry-after", "11.1: not before retry_after_ms")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.refuse(request, UNAVAILABLE, {"retry_after_ms": _WHILE_MS})
    await joined.link.quiet("before retry_after_ms", _WHILE_MS / 1000 * 0.8)
    joined.link.answer(await joined.link.request("echo"), "later")
    await call.gives("later")


@scenario("retry-has-an-end", "11.1: all of this happens within the time that the call was given")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {}, timeout_ms=500)
    request = await joined.link.request("echo")
    joined.link.refuse(request, UNAVAILABLE, {"retry_after_ms": 600_000})
    await call.refused(UNAVAILABLE, 4)


@scenario("limit-reached", "11.1: RESOURCE_EXHAUSTED with limit is for the application")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), RESOURCE_EXHAUSTED, {"limit": 5})
    await call.refused(RESOURCE_EXHAUSTED)
    await joined.link.quiet("after an error that is for the application")


@scenario(
    "other-errors-are-told", "11.1: INTERNAL, UNKNOWN, ABORTED and others are never sent again by themselves"
)
async def _(stage: Stage) -> None:
    joined: Joined = await stage.joined()
    for code in (2, 10, 13, 15):
        call = await joined.client.call("echo", {}, idempotency_key=f"key-{code}")
        joined.link.refuse(await joined.link.request("echo"), code)
        await call.refused(code)
        await joined.link.quiet("after an error that is for the application", QUIET / 3)
