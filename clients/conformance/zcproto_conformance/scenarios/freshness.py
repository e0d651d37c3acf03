"""Salt, counter, timestamp and the clock: what a client checks, and what it sends."""

from __future__ import annotations

from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import expect
from zcproto_conformance.link import TOLERANCE_MS, pack
from zcproto_conformance.stage import HOUR_MS, Stage

scenario: Final = Scenarios(SCRIPTED)

STALE_TIMESTAMP: Final = 67
_FAR_OFF: Final = 10 * TOLERANCE_MS


@scenario("wrong-salt", "7.2: a frame with another salt is fatal")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.answer(request, {}, salt=b"another!")
    await joined.link.ended_by_client("after a frame with another salt")
    await call.lost()


@scenario("counter-goes-back", "7.2: a counter below the last one is fatal")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    joined.link.send("PONG", counter=40)
    call = await joined.client.call("echo", {})
    joined.link.answer(await joined.link.request("echo"), {}, counter=39)
    await joined.link.ended_by_client("after a counter that went back")
    await call.lost()


@scenario("answer-replayed", "7.2: a frame that comes twice is fatal, whatever was done with the first")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    first = await joined.client.call("echo", {})
    answer = joined.link.answer_bytes(await joined.link.request("echo"), 1)
    joined.link.write(answer)
    await first.gives(1)
    second = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.write(answer)
    await joined.link.ended_by_client("after a frame that came twice")
    await second.lost()


@scenario("answer-of-another-connection", "7.5: a frame captured on another connection is worth nothing")
async def _(stage: Stage) -> None:
    other = await stage.joined()
    await other.exchange()
    captured = await other.client.call("echo", {})
    answer = other.link.answer_bytes(await other.link.request("echo"), "captured")
    other.link.write(answer)
    await captured.gives("captured")
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.write(answer)
    await joined.link.ended_by_client("after a frame of another connection")
    await call.lost()


@scenario("counter-jumps", "7.2: counters may have gaps, up to the largest value")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for counter in (5, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1):
        call = await joined.client.call("echo", {})
        joined.link.answer(await joined.link.request("echo"), str(counter), counter=counter)
        await call.gives(str(counter))


@scenario("counters-of-the-client", "7.2: a client's counters grow, however many calls run at once")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    calls = await joined.client.calls("echo", 40)
    for request in await joined.link.requests("echo", 40):  # each is looked at as it comes
        joined.link.answer(request, request.params)
    for number, call in enumerate(calls):
        await call.gives({"n": number})


@scenario("stale-answer", "7.3: a stale frame is dropped, and the connection goes on")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.answer(request, "stale", off_ms=-_FAR_OFF)
    joined.link.answer(request, "from tomorrow", off_ms=_FAR_OFF)
    joined.link.answer(request, "fresh")
    await call.gives("fresh")


@scenario("timestamps-of-all-sizes", "7.2: a timestamp can be any value, and never overflows")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    for timestamp in (0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1):
        joined.link.answer(request, timestamp, timestamp=timestamp)
    joined.link.answer(request, "fresh")
    await call.gives("fresh")


@scenario("ten-stale-frames", "7.3: the tenth stale frame in a row ends the connection")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    for _ in range(10):
        joined.link.send("PONG", off_ms=-_FAR_OFF)
    await joined.link.ended_by_client("after ten stale frames in a row")
    await call.lost()


@scenario("nine-stale-frames", "7.3: a frame that is not stale ends the row")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for _ in range(3):
        for _ in range(9):
            joined.link.send("PONG", off_ms=-_FAR_OFF)
        await joined.exchange()


@scenario("clock-ahead", "7.4: a client sends the server's time, an hour ahead of its own")
async def _(stage: Stage) -> None:
    stage.ahead_ms = HOUR_MS
    await (await stage.joined()).exchange()


@scenario(
    "clock-behind", "7.4: a client holds the server's frames against the server's time, a year behind its own"
)
async def _(stage: Stage) -> None:
    stage.ahead_ms = -365 * 24 * HOUR_MS
    await (await stage.joined()).exchange()


@scenario("clock-corrected", "7.4, 11.1: STALE_TIMESTAMP corrects the offset; the call is sent again at once")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"n": 1})
    request = await joined.link.request("echo")
    joined.link.ahead_ms = HOUR_MS
    joined.link.refuse(request, STALE_TIMESTAMP, {"server_time": joined.link.wall})
    again = await joined.link.request("echo")
    expect(again.params == {"n": 1}, f"the call came again with {again.params}")
    joined.link.answer(again, "in time")
    await call.gives("in time")


@scenario(
    "clock-corrected-by-a-stale-error",
    "7.3: STALE_TIMESTAMP is heard though it is stale by the client's clock",
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.ahead_ms = -HOUR_MS
    body = pack([STALE_TIMESTAMP, "your clock is off", {"server_time": joined.link.wall}])
    joined.link.in_flight.clear()
    joined.link.send("ERROR", request.stream, body)
    joined.link.answer(await joined.link.request("echo"), "in time")
    await call.gives("in time")


@scenario("stale-twice", "11.1: after a second STALE_TIMESTAMP the application is told")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    for _ in range(2):
        request = await joined.link.request("echo")
        joined.link.refuse(request, STALE_TIMESTAMP, {"server_time": joined.link.wall})
    await call.refused(STALE_TIMESTAMP)
    await joined.link.quiet("after a second STALE_TIMESTAMP")
