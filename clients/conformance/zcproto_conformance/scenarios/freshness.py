"""Salt, counter, timestamp and clock: what a client checks and what it sends."""

from __future__ import annotations

from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import DATA_LOSS, NOT_FOUND, STALE_TIMESTAMP
from zcproto_conformance.connection import TOLERANCE_MS, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import HOUR_MS, Harness

scenario: Final = Scenarios(SCRIPTED)

_STALE_MS: Final = 10 * TOLERANCE_MS


@scenario("wrong-salt", "7.2: a frame with a wrong salt is fatal")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.respond(request, {}, salt=b"another!")
    await peer.connection.expect_close("after a frame with a wrong salt")
    await call.expect_lost()


@scenario("counter-decreases", "7.2: a counter below the last one is fatal")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    peer.connection.send("PONG", counter=40)
    call = await peer.client.call("echo", {})
    peer.connection.respond(await peer.connection.expect_request("echo"), {}, counter=39)
    await peer.connection.expect_close("after a counter that decreased")
    await call.expect_lost()


@scenario("replayed-response", "7.2: a replayed frame is fatal")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    first = await peer.client.call("echo", {})
    answer = peer.connection.response_bytes(await peer.connection.expect_request("echo"), 1)
    peer.connection.write(answer)
    await first.expect_result(1)
    second = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.write(answer)
    await peer.connection.expect_close("after a replayed frame")
    await second.expect_lost()


@scenario("replayed-from-another-connection", "7.5: a frame captured on another connection is fatal")
async def _(harness: Harness) -> None:
    other = await harness.connect()
    await other.exchange()
    captured = await other.client.call("echo", {})
    answer = other.connection.response_bytes(await other.connection.expect_request("echo"), "captured")
    other.connection.write(answer)
    await captured.expect_result("captured")
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.write(answer)
    await peer.connection.expect_close("after a frame captured on another connection")
    await call.expect_lost()


@scenario("counter-jumps", "7.2: counters may have gaps, up to the largest value")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for counter in (5, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1):
        call = await peer.client.call("echo", {})
        peer.connection.respond(await peer.connection.expect_request("echo"), str(counter), counter=counter)
        await call.expect_result(str(counter))


@scenario(
    "counters-of-concurrent-calls",
    "7.2: the counters of a client increase, however many calls run concurrently",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    calls = await peer.client.calls("echo", 40)
    for request in await peer.connection.expect_requests("echo", 40):  # checks each counter
        peer.connection.respond(request, request.params)
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})


@scenario("stale-response", "7.3: a stale RESPONSE fails its call with DATA_LOSS at once")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for offset_ms in (-_STALE_MS, _STALE_MS):
        call = await peer.client.call("echo", {})
        peer.connection.respond(await peer.connection.expect_request("echo"), "stale", offset_ms=offset_ms)
        await call.expect_code(DATA_LOSS)
    await peer.exchange()


@scenario("stale-error", "7.3: a stale ERROR fails its call with DATA_LOSS, whatever its code")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.in_flight.clear()
    peer.connection.send("ERROR", request.stream, pack([NOT_FOUND, "gone"]), offset_ms=-_STALE_MS)
    await call.expect_code(DATA_LOSS)
    await peer.exchange()


@scenario("timestamps-of-any-value", "7.2: a timestamp may have any value, and never overflows")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for timestamp in (0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1):
        call = await peer.client.call("echo", {})
        peer.connection.respond(await peer.connection.expect_request("echo"), 1, timestamp=timestamp)
        await call.expect_code(DATA_LOSS)
    await peer.exchange()


@scenario("ten-stale-frames", "7.3: the tenth consecutive stale frame ends the connection")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    for _ in range(10):
        peer.connection.send("PONG", offset_ms=-_STALE_MS)
    await peer.connection.expect_close("after ten consecutive stale frames")
    await call.expect_lost()


@scenario("nine-stale-frames", "7.3: a fresh frame resets the count of stale ones")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for _ in range(3):
        for _ in range(9):
            peer.connection.send("PONG", offset_ms=-_STALE_MS)
        await peer.exchange()


@scenario("clock-ahead", "7.4: a client sends the server's time, here an hour ahead of its own")
async def _(harness: Harness) -> None:
    harness.clock_ahead_ms = HOUR_MS
    await (await harness.connect()).exchange()


@scenario(
    "clock-behind", "7.4: a client compares timestamps with the server's time, here a year behind its own"
)
async def _(harness: Harness) -> None:
    harness.clock_ahead_ms = -365 * 24 * HOUR_MS
    await (await harness.connect()).exchange()


@scenario(
    "clock-corrected", "7.4, 11.1: STALE_TIMESTAMP corrects the clock offset and the call is retried at once"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"n": 1})
    request = await peer.connection.expect_request("echo")
    peer.connection.clock_ahead_ms = HOUR_MS
    peer.connection.respond_error(request, STALE_TIMESTAMP, {"server_time": peer.connection.wall})
    again = await peer.connection.expect_request("echo")
    expect(again.params == {"n": 1}, f"the call was retried with params {again.params}")
    peer.connection.respond(again, "in time")
    await call.expect_result("in time")


@scenario(
    "clock-corrected-by-a-stale-error",
    "7.3: STALE_TIMESTAMP is processed even if it is stale by the client's clock",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.clock_ahead_ms = -HOUR_MS
    body = pack([STALE_TIMESTAMP, "your clock is off", {"server_time": peer.connection.wall}])
    peer.connection.in_flight.clear()
    peer.connection.send("ERROR", request.stream, body)
    peer.connection.respond(await peer.connection.expect_request("echo"), "in time")
    await call.expect_result("in time")


@scenario("stale-twice", "11.1: a second STALE_TIMESTAMP is reported to the application")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    for _ in range(2):
        request = await peer.connection.expect_request("echo")
        peer.connection.respond_error(request, STALE_TIMESTAMP, {"server_time": peer.connection.wall})
    await call.expect_code(STALE_TIMESTAMP)
    await peer.connection.expect_silence("after a second STALE_TIMESTAMP")
