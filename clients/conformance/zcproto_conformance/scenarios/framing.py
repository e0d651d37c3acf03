"""Frames: split reads, invalid headers, and streams that end early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.connection import MAX_FRAME, MIN_LENGTH, Connection, Frame, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import ConnectedClient, Harness

scenario: Final = Scenarios(SCRIPTED)

_CUTS: Final = (1, 3, 4, 5, 6, 8, 12, 20, 28, 36, 67, 68, 69)
"""Offsets at which a response is cut: the ends of its fields, and some within fields."""


@scenario("response-byte-by-byte", "5.5: a response that arrives byte by byte is decoded")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"word": "pieces"})
    request = await peer.connection.expect_request("echo")
    await peer.connection.write_in_pieces(peer.connection.response_bytes(request, {"word": "pieces"}))
    await call.expect_result({"word": "pieces"})


@scenario("response-in-two-pieces", "5.5: a response that is split anywhere is decoded")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    for at in _CUTS:
        call = await peer.client.call("echo", {"at": at})
        request = await peer.connection.expect_request("echo")
        await peer.connection.write_in_pieces(peer.connection.response_bytes(request, {"at": at}), [at])
        await call.expect_result({"at": at})


@scenario("responses-in-one-read", "5.5: all responses of one read are decoded")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    calls = await peer.client.calls("echo", 50)
    requests = await peer.connection.expect_requests("echo", 50)
    peer.connection.write(b"".join(peer.connection.response_bytes(one, one.params) for one in requests))
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})


@scenario("response-of-a-megabyte", "5.3: after WELCOME a client accepts frames of up to max_frame")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    size = MAX_FRAME - MIN_LENGTH - len(pack(b"\0" * 70_000)) + 70_000
    peer.connection.respond(request, b"z" * size)
    await call.expect_result(b"z" * size)


async def _expect_fatal(harness: Harness, write: Callable[[Connection, Frame], None], when: str) -> None:
    """Write something while a call is in flight; the client must end the connection."""
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    write(peer.connection, await peer.connection.expect_request("echo"))
    await peer.connection.expect_close(when)
    await call.expect_lost()


def _invalid_frame(name: str, proves: str, when: str, kind: str | int, **fields: Any) -> None:
    """Register a scenario with one invalid frame, which must end the connection."""
    body, on_stream = fields.pop("body", b""), fields.pop("on_stream", False)

    @scenario(name, proves)
    async def _(harness: Harness) -> None:
        def write(connection: Connection, request: Frame) -> None:
            connection.send(kind, request.stream if on_stream else 0, body, **fields)

        await _expect_fatal(harness, write, when)


_invalid_frame(
    "length-below-64", "5.4: a length below 64 is fatal", "after a length of 63", "PONG", length=63
)
_invalid_frame(
    "length-above-limit",
    "5.3: a length above the limit is fatal before the body arrives",
    "after a length above the limit",
    "RESPONSE",
    on_stream=True,
    length=256 * 1_048_576,
)
_invalid_frame(
    "version-2", "5.4: an unknown version is fatal", "after a frame of version 2", "PING", version=2
)
_invalid_frame("flag-set", "5.4: a flag is fatal", "after a frame with a flag", "PING", flags=1)
_invalid_frame("reserved-kind", "6.1: a reserved kind is fatal", "after a frame of kind 0x1F", 0x1F)
_invalid_frame(
    "kind-of-client",
    "6.1: a kind that only clients may send is fatal",
    "after a CANCEL",
    "CANCEL",
    on_stream=True,
)
_invalid_frame(
    "response-on-stream-0",
    "5.4: RESPONSE on stream 0 is fatal",
    "after RESPONSE on stream 0",
    "RESPONSE",
    body=b"\xc0",
)
_invalid_frame(
    "event-on-nonzero-stream",
    "5.4: EVENT on a stream is fatal",
    "after EVENT on a stream",
    "EVENT",
    on_stream=True,
    body=pack(["name", None]),
)
_invalid_frame(
    "ping-with-body", "6.1: a body on PING is fatal", "after a PING with a body", "PING", body=b"\xc0"
)
_invalid_frame(
    "event-unparsable",
    "16: an EVENT that cannot be parsed is fatal",
    "after an invalid EVENT",
    "EVENT",
    body=b"\x92\xa1a",
)
_invalid_frame(
    "goaway-without-required-key",
    "16: a GOAWAY without a required key is fatal",
    "after an invalid GOAWAY",
    "GOAWAY",
    body=pack({"reason": "draining"}),
)


@scenario("fatal-error", "6.4, 10.3: ERROR on stream 0 is the last frame of a connection")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.write(
        peer.connection.frame_bytes("ERROR", 0, pack([64, "ended"]))
        + peer.connection.response_bytes(request, "too late")
    )
    await peer.connection.expect_close("after ERROR on stream 0")
    await call.expect_lost()


@scenario(
    "fatal-error-unparsable", "6.4: an ERROR on stream 0 ends the connection even if it cannot be parsed"
)
async def _(harness: Harness) -> None:
    await _expect_fatal(
        harness, lambda connection, request: connection.send("ERROR", 0, b"\xc1"), "after ERROR on stream 0"
    )


@scenario("truncated", "4.3: an end without close_notify is an error, never a clean end")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.truncate()
    await call.expect_lost(clean=False)


@scenario("reset", "4.3: a reset is not a clean end")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.reset()
    await call.expect_lost(clean=False)


@scenario("clean-end", "4.3: close_notify ends a connection cleanly")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.close()
    await call.expect_lost(clean=True)
    await peer.connection.expect_close("after the close_notify of the server")


@scenario(
    "truncated-everywhere",
    "4.3, 5.5: wherever a stream ends within a response, the call fails and no partial result is delivered",
)
async def _(harness: Harness) -> None:
    # A client for each: one that loses its connections again and again waits longer each time.
    peers = [await harness.connect() for _ in _CUTS]
    for at, peer in zip(_CUTS, peers, strict=True):
        call = await peer.client.call("echo", {})
        answer = peer.connection.response_bytes(await peer.connection.expect_request("echo"), {"word": "cut"})
        peer.connection.write(answer[:at])
        if at % 2:
            peer.connection.close()
        else:
            peer.connection.truncate()
        await call.expect_lost(clean=bool(at % 2))


@scenario("end-before-welcome", "4.3: an end before WELCOME fails the connect attempt at once")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect()
    connection = await harness.next_connection()
    connection.write(connection.welcome_bytes()[:100])
    connection.truncate()
    await harness.error_of(connecting, "connect", "closed", "connect", "tls")


@scenario("close-notify-on-close", "4.3: a client sends close_notify before it closes")
async def _(harness: Harness) -> None:
    peer: ConnectedClient = await harness.connect()
    await peer.exchange()
    closing = await peer.client.begin_close()
    await peer.connection.expect_close("when the application closed the client")
    peer.connection.close()
    await harness.step_result(closing, "close")


@scenario(
    "close-notify-at-end-of-input",
    "4.3: when its input ends, the program sends close_notify for its clients and exits with 0",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    await peer.exchange()
    stopping = asyncio.create_task(harness.program.stop())
    try:
        await peer.connection.expect_close("when the program's input ended")
    finally:
        code = await stopping
    expect(code == 0, f"the program's exit code is {code}")
