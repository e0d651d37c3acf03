"""Streams of items: credit, items of both ends, and the end of a stream."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import (
    CANCELLED,
    DATA_LOSS,
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    INTERNAL,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    STALE_TIMESTAMP,
    UNIMPLEMENTED,
)
from zcproto_conformance.connection import QUIET, STREAMS, TOLERANCE_MS, Connection, Frame, pack
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import ConnectedClient, Harness, Stream
from zcproto_conformance.program import StepFailed

scenario: Final = Scenarios(SCRIPTED)

WELCOME: Final = {"streams": STREAMS}
STALE: Final = {"offset_ms": -TOLERANCE_MS - 10_000}


async def connect(harness: Harness, **welcome: Any) -> ConnectedClient:
    """Connect a client with a session to a server with streams."""
    return await harness.connect_with_session(welcome={**WELCOME, **welcome})


async def open_stream(peer: ConnectedClient, **options: Any) -> tuple[Stream, Frame]:
    """Open a stream, and return it with its OPEN."""
    stream = await peer.client.open("tokens", {"prompt": "hi"}, **options)
    return stream, await peer.connection.expect_open("tokens")


async def expect_cancel(connection: Connection, opened: Frame, why: str) -> None:
    """Raise CheckFailed unless the next frame is the CANCEL of a stream, with its token. CREDIT may come before."""
    frame = await connection.next_frame(f"CANCEL {why}")
    while frame.kind == "CREDIT":
        frame = await connection.next_frame(f"CANCEL {why}")
    expect(frame.kind == "CANCEL" and frame.stream == opened.stream, f"received {frame} {why}")
    expect(frame.token == opened.token, "CANCEL was sent with another token than its OPEN")


# --- announcement -----------------------------------------------------------------------------------


@scenario("stream-without-streams", "18.3: a client sends no OPEN to a server without streams")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    stream = await peer.client.open("tokens", {})
    await stream.expect_code(UNIMPLEMENTED)
    await peer.exchange()


@scenario(
    "requests-beside-streams", "18.3: the keys of streams and calls in WELCOME change nothing for requests"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness, calls={"max": 32})
    await peer.exchange()
    await peer.connection.sync()


def _invalid_announcement(name: str, key: str, value: Any) -> None:
    @scenario(name, f"18.3: {key} of WELCOME is validated")
    async def _(harness: Harness) -> None:
        _, connecting = await harness.begin_connect()
        connection = await harness.next_connection()
        connection.welcome(**{key: value})
        await harness.error_of(connecting, "connect", "closed", "connect")
        await connection.wait_for_end(f"after a WELCOME whose {key} is {value!r}")


_invalid_announcement("welcome-streams-is-no-map", "streams", True)
_invalid_announcement("welcome-streams-without-max-item", "streams", {"max_open": 64})
_invalid_announcement("welcome-calls-without-max", "calls", {})


@scenario("welcome-streams-with-unknown-keys", "18.3: unknown keys of `streams` are ignored")
async def _(harness: Harness) -> None:
    peer = await connect(harness, streams={**STREAMS, "more": [1]})
    stream, opened = await open_stream(peer)
    peer.connection.respond(opened, None)
    await stream.expect_end(None)


# --- opening ----------------------------------------------------------------------------------------


@scenario("stream", "18.1, 18.4: OPEN has the method, the session's token and the client's first credit")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer, credit=[3, 5000])
    expect(opened.token == peer.session.token, "OPEN was sent with another token than the session's")
    expect(opened.params == {"prompt": "hi"}, f"the params are {opened.params}")
    expect(opened.meta.get("credit") == [3, 5000], f"meta is {opened.meta}")
    expect("idempotency_key" not in opened.meta, f"meta is {opened.meta}")
    for value in ("Hel", "lo"):
        peer.connection.item(opened, value)
    peer.connection.respond(opened, {"tokens": 2})
    await stream.expect_items("Hel", "lo")
    await stream.expect_end({"tokens": 2})


@scenario("stream-without-items", "18.2: a stream may have one RESPONSE and no items")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.respond(opened, 7)
    await stream.expect_end(7)
    await peer.exchange()


@scenario("request-of-a-stream", "18.4: FAILED_PRECONDITION with `shape` is reported and not repeated")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    call = await peer.client.call("tokens", {})
    request = await peer.connection.expect_request("tokens")
    peer.connection.respond_error(request, FAILED_PRECONDITION, {"shape": "server"})
    error = await call.expect_code(FAILED_PRECONDITION)
    expect(error.get("details") == {"map": {"shape": "server"}}, f"the details are {error.get('details')}")
    await peer.connection.expect_silence("after an error that must not be retried")


@scenario("stream-limit", "18.4: RESOURCE_EXHAUSTED with `limit` is reported: waiting does not help")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.respond_error(opened, RESOURCE_EXHAUSTED, {"limit": 64})
    await stream.expect_code(RESOURCE_EXHAUSTED)
    await peer.connection.expect_silence("after RESOURCE_EXHAUSTED with a limit", 3 * QUIET)


@scenario("max-open", "18.3: a client opens at most `max_open` streams, and requests go on")
async def _(harness: Harness) -> None:
    peer = await connect(harness, streams={**STREAMS, "max_open": 1})
    first, opened = await open_stream(peer)
    second = await peer.client.open("tokens", {})
    await second.expect_code(RESOURCE_EXHAUSTED)
    await peer.exchange()
    peer.connection.respond(opened, None)
    await first.expect_end(None)
    third, again = await open_stream(peer)
    peer.connection.respond(again, None)
    await third.expect_end(None)


# --- credit -----------------------------------------------------------------------------------------


@scenario(
    "credit-follows-the-application", "18.5: a client grants more only for items that its application took"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer, credit=[3, 60_000])
    for number in range(3):
        peer.connection.item(opened, number)
    await stream.expect_items(0)
    granted = [3, 60_000]
    async for frame in peer.connection.frames_within():
        granted = grant_of(frame, opened, granted)
    expect(granted[0] <= 4, f"granted {granted} after the application had taken one item of three")
    await stream.expect_items(1, 2)
    while granted[0] < 5:
        granted = grant_of(await peer.connection.next_frame("CREDIT"), opened, granted)
    for number in range(3, 5):
        peer.connection.item(opened, number)
    peer.connection.respond(opened, None)
    await stream.expect_items(3, 4)
    await stream.expect_end(None)


def grant_of(frame: Frame, opened: Frame, before: list[int]) -> list[int]:
    """Return the totals of a CREDIT. Raises CheckFailed if they are not totals that grow."""
    expect(frame.kind == "CREDIT" and frame.stream == opened.stream, f"received {frame} instead of CREDIT")
    expect(frame.token == opened.token, "CREDIT was sent with another token than its OPEN")
    totals = frame.value
    is_pair = isinstance(totals, list) and len(totals) == 2 and all(type(total) is int for total in totals)
    expect(is_pair, f"CREDIT is {totals!r}")
    expect(
        totals[0] >= before[0] and totals[1] >= before[1],
        f"CREDIT {totals} is lower than {before}: it has totals",
    )
    return list(totals)


@scenario("item-before-credit", "18.5: a client sends no item before CREDIT, and takes its totals")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    sending = [await stream.begin("send", value=number) for number in range(4)]
    await peer.connection.expect_silence("before any CREDIT")
    peer.connection.credit(opened, 2, 60_000)
    for number in range(2):
        item = await peer.connection.expect_frame("ITEM", opened.stream)
        expect(item.value == number and item.token == opened.token, f"item {number} is {item.value!r}")
        await harness.step_result(sending[number], "send")
    peer.connection.credit(opened, 2, 60_000)
    await peer.connection.expect_silence("beyond the credit of two items")
    peer.connection.credit(opened, 3, 60_000)
    await peer.connection.expect_frame("ITEM", opened.stream)
    await peer.connection.expect_silence("beyond the credit of three items")
    peer.connection.respond(opened, None)
    await stream.expect_end(None)


@scenario(
    "item-overdraws-the-bytes", "18.5: an item may exceed the bytes that are left, and is then the last"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    for _ in range(2):
        await stream.begin("send", value="x" * 1000)
    peer.connection.credit(opened, 10, 1)
    await peer.connection.expect_frame("ITEM", opened.stream)
    await peer.connection.expect_silence("after an item that has used all bytes")
    peer.connection.respond(opened, None)
    await stream.expect_end(None)


@scenario("items-beyond-the-credit", "18.5: a client ends the connection at an item that it has not allowed")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer, credit=[2, 60_000])
    for number in range(3):
        peer.connection.item(opened, number)
    # An item that the application takes before the third arrives would allow the third.
    await peer.connection.wait_for_end("after an item beyond the credit")
    await stream.expect_items(0, 1)
    await stream.expect_lost(clean=False)


@scenario("credit-lower", "18.5: a client ends the connection at a CREDIT lower than before")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.credit(opened, 5, 5000)
    peer.connection.credit(opened, 4, 9000)
    await stream.expect_lost(clean=False)
    await peer.connection.wait_for_end("after a CREDIT lower than before")


# --- the items of the client ------------------------------------------------------------------------


@scenario("end-at-once", "18.5: END needs no credit")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    await stream.finish()
    end = await peer.connection.expect_frame("END", opened.stream)
    expect(end.token == opened.token, "END was sent with another token than its OPEN")
    peer.connection.respond(opened, 0)
    await stream.expect_end(0)


@scenario("half-close", "18.6: after END the server's items go on")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer, credit=[1000, 1_000_000])
    await stream.finish()
    await peer.connection.expect_frame("END", opened.stream)
    for number in range(1000):
        peer.connection.item(opened, number)
    peer.connection.respond(opened, "all")
    await stream.expect_items(*range(1000))
    await stream.expect_end("all")


@scenario(
    "response-before-the-items-end", "18.6: a stream that is answered early ends, and sends nothing more"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.credit(opened, 5, 60_000)
    for number in range(3):
        await stream.send(number)
    for _ in range(3):
        await peer.connection.expect_frame("ITEM", opened.stream)
    peer.connection.respond(opened, "enough")
    await stream.expect_end("enough")
    await stream.begin("send", value="late")
    await stream.begin("finish")
    await peer.connection.expect_silence("on a stream that was answered")
    await peer.exchange()


# --- the end ----------------------------------------------------------------------------------------


@scenario("leave", "18.8: an application that leaves early cancels the stream")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    await stream.leave()
    await expect_cancel(peer.connection, opened, "of a stream that was left")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await peer.exchange()


@scenario("cancel-crosses-response", "18.6: after its CANCEL a client accepts RESPONSE")
async def _(harness: Harness) -> None:
    peer = await connect(harness, streams={**STREAMS, "max_open": 1})
    stream, opened = await open_stream(peer)
    await stream.leave()
    await expect_cancel(peer.connection, opened, "of a stream that was left")
    peer.connection.respond(opened, "crossed")
    await peer.connection.sync()
    following, again = await open_stream(peer)
    peer.connection.respond(again, None)
    await following.expect_end(None)


@scenario("items-after-cancel", "18.6: after its CANCEL a client drops items without decoding them")
async def _(harness: Harness) -> None:
    peer = await connect(harness, streams={**STREAMS, "max_open": 1})
    stream, opened = await open_stream(peer, credit=[64, 60_000])
    await stream.leave()
    await expect_cancel(peer.connection, opened, "of a stream that was left")
    for _ in range(64):
        peer.connection.send("ITEM", opened.stream, b"\xc1", token=opened.token)
    await peer.connection.sync()
    refused = await peer.client.open("tokens", {})
    await refused.expect_code(RESOURCE_EXHAUSTED)
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await peer.connection.sync()
    following, again = await open_stream(peer)
    peer.connection.respond(again, None)
    await following.expect_end(None)


@scenario("stream-deadline", "18.8: a deadline ends a stream; the items before it were delivered")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    timeout_ms = 1000 * round(harness.patience)
    stream, opened = await open_stream(peer, timeout_ms=timeout_ms)
    deadline = opened.meta.get("deadline_ms")
    expect(isinstance(deadline, int) and 0 < deadline <= timeout_ms, f"deadline_ms is {deadline!r}")
    peer.connection.item(opened, 1)
    peer.connection.respond_error(opened, DEADLINE_EXCEEDED)
    await stream.expect_items(1)
    await stream.expect_code(DEADLINE_EXCEEDED)


@scenario("stream-error-after-items", "18.6: items that have arrived come before the error")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    frames = [
        peer.connection.frame_bytes("ITEM", opened.stream, pack(n), token=opened.token) for n in range(3)
    ]
    peer.connection.in_flight.pop(opened.stream)
    error = pack([NOT_FOUND, "no such thing"])
    frames.append(peer.connection.frame_bytes("ERROR", opened.stream, error, token=opened.token))
    peer.connection.write(b"".join(frames))
    await stream.expect_items(0, 1, 2)
    await stream.expect_code(NOT_FOUND)


@scenario(
    "item-undecodable", "18.6: an item that cannot be decoded fails the stream with INTERNAL, and CANCEL"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    peer.connection.send("ITEM", opened.stream, b"\xd4\x05\x00", token=opened.token)
    await stream.expect_items(1)
    await stream.expect_code(INTERNAL)
    await expect_cancel(peer.connection, opened, "after an item that cannot be decoded")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await peer.exchange()


@scenario("item-too-long", "18.6: an ITEM longer than `max_item` is fatal from its header alone")
async def _(harness: Harness) -> None:
    peer = await connect(harness, streams={**STREAMS, "max_item": 1000})
    stream, opened = await open_stream(peer)
    header = peer.connection.frame_bytes("ITEM", opened.stream, token=opened.token, length=1001)
    peer.connection.write(header)
    await stream.expect_lost(clean=False)
    await peer.connection.wait_for_end("after the header of an item that is too long")


@scenario("item-on-a-request", "18.3: an ITEM on the stream of a REQUEST ends the connection")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.item(request, 1)
    await call.expect_lost(clean=False)
    await peer.connection.wait_for_end("after an ITEM on the stream of a REQUEST")


@scenario("item-on-unknown-stream", "18.6: ITEM and CREDIT on a stream that is not in flight are dropped")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.respond(opened, None)
    await stream.expect_end(None)
    peer.connection.item(opened, "late")
    peer.connection.credit(opened, 1, 1)
    peer.connection.send("ITEM", opened.stream + 1000, pack(1))
    await peer.exchange()


# --- freshness --------------------------------------------------------------------------------------


@scenario("stale-open", "18.4, 7.4: an OPEN that was stale is opened again once, with the right time")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    following = await stream.begin("next")
    peer.connection.respond_error(opened, STALE_TIMESTAMP, {"server_time": peer.connection.wall})
    again = await peer.connection.expect_open("tokens")
    peer.connection.item(again, 1)
    peer.connection.respond(again, None)
    expect(await harness.step_result(following, "next") == {"item": 1}, "the item did not arrive")
    await stream.expect_end(None)


@scenario("stale-item", "18.8: a stale ITEM fails the stream with DATA_LOSS, and the client sends CANCEL")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    peer.connection.item(opened, 2, **STALE)
    await stream.expect_code(DATA_LOSS)
    await expect_cancel(peer.connection, opened, "after a stale item")
    peer.connection.item(opened, 3)
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await peer.exchange()


@scenario("stale-credit", "18.8: a stale CREDIT fails the stream with DATA_LOSS, and the client sends CANCEL")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.credit(opened, 1, 1000, **STALE)
    await stream.expect_code(DATA_LOSS)
    await expect_cancel(peer.connection, opened, "after a stale CREDIT")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await peer.exchange()


@scenario("slow-response-of-a-stream", "7.2: a large answer whose header was in time is fresh")
async def _(harness: Harness) -> None:
    for margin in (1, 8):  # seconds for the header to arrive; a slow client needs more
        peer = await connect(harness)
        stream, opened = await open_stream(peer)
        answer = peer.connection.response_bytes(opened, "x" * 1000, offset_ms=-TOLERANCE_MS + 1000 * margin)
        peer.connection.write(answer[:100])
        await asyncio.sleep(margin + 1)  # it is too late for the frame as a whole
        peer.connection.write(answer[100:])
        try:
            await stream.expect_end("x" * 1000)
        except StepFailed as failure:
            if failure.error.get("code") != DATA_LOSS:
                raise
            cause = f"next failed with {failure}"
        else:
            return
    raise CheckFailed(cause)
