"""Frames: pieces, headers that no frame may have, streams of bytes that end too early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import expect
from zcproto_conformance.link import MAX_FRAME, MIN_LENGTH, Frame, Link, pack
from zcproto_conformance.stage import Joined, Stage

scenario: Final = Scenarios(SCRIPTED)

_EVERY_CUT: Final = (1, 3, 4, 5, 6, 8, 12, 20, 28, 36, 67, 68, 69)
"""Where an answer is cut: at the ends of its fields, and beside."""


@scenario("answer-byte-by-byte", "5.5: an answer that comes byte by byte is the same answer")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"word": "pieces"})
    request = await joined.link.request("echo")
    await joined.link.write_in_pieces(joined.link.answer_bytes(request, {"word": "pieces"}))
    await call.gives({"word": "pieces"})


@scenario("answer-in-halves", "5.5: an answer that is cut in two anywhere is the same answer")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for at in _EVERY_CUT:
        call = await joined.client.call("echo", {"at": at})
        request = await joined.link.request("echo")
        await joined.link.write_in_pieces(joined.link.answer_bytes(request, {"at": at}), [at])
        await call.gives({"at": at})


@scenario("answers-in-one-read", "5.5: many answers in one read are all heard")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    calls = await joined.client.calls("echo", 50)
    requests = await joined.link.requests("echo", 50)
    joined.link.write(b"".join(joined.link.answer_bytes(one, one.params) for one in requests))
    for number, call in enumerate(calls):
        await call.gives({"n": number})


@scenario("answer-of-a-megabyte", "5.3: a client with a WELCOME accepts frames of up to max_frame")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    size = MAX_FRAME - MIN_LENGTH - len(pack(b"\0" * 70_000)) + 70_000
    joined.link.answer(request, b"z" * size)
    await call.gives(b"z" * size)


async def _ends(stage: Stage, write: Callable[[Link, Frame], None], why: str) -> None:
    """With a call in flight the server writes something; the client must end the connection."""
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    write(joined.link, await joined.link.request("echo"))
    await joined.link.ended_by_client(why)
    await call.lost()


def _bad(name: str, proves: str, why: str, kind: str | int, **fields: Any) -> None:
    """A conversation in which one frame is wrong and the connection must end."""
    body, on_stream = fields.pop("body", b""), fields.pop("on_stream", False)

    @scenario(name, proves)
    async def _(stage: Stage) -> None:
        def write(link: Link, request: Frame) -> None:
            link.send(kind, request.stream if on_stream else 0, body, **fields)

        await _ends(stage, write, why)


_bad("length-below-64", "5.4: a length below 64 is fatal", "after a length of 63", "PONG", length=63)
_bad(
    "length-above-the-limit",
    "5.3: a length above the limit is fatal, before the body comes",
    "after a header whose length is above the limit",
    "RESPONSE",
    on_stream=True,
    length=256 * 1_048_576,
)
_bad("version-2", "5.4: another version is fatal", "after a frame of version 2", "PING", version=2)
_bad("flag-set", "5.4: a flag is fatal", "after a frame with a flag", "PING", flags=1)
_bad("reserved-kind", "6.1: a reserved kind is fatal", "after a frame of kind 0x10", 0x10)
_bad(
    "kind-of-the-other-side",
    "6.1: a kind from the wrong side is fatal",
    "after a CANCEL",
    "CANCEL",
    on_stream=True,
)
_bad("answer-on-stream-0", "5.4: RESPONSE on stream 0 is fatal", "after it", "RESPONSE", body=b"\xc0")
_bad(
    "event-on-a-stream",
    "5.4: EVENT on a stream is fatal",
    "after it",
    "EVENT",
    on_stream=True,
    body=pack(["name", None]),
)
_bad("ping-with-a-body", "6.1: a body on PING is fatal", "after a PING with a body", "PING", body=b"\xc0")
_bad("event-unreadable", "16: an EVENT that cannot be read is fatal", "after it", "EVENT", body=b"\x92\xa1a")
_bad(
    "goaway-without-its-keys",
    "16: a GOAWAY without the form of its table is fatal",
    "after it",
    "GOAWAY",
    body=pack({"reason": "draining"}),
)


@scenario("fatal-error", "6.4, 10.3: ERROR on stream 0 is the last frame of a connection")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    request = await joined.link.request("echo")
    joined.link.write(
        joined.link.bytes_of("ERROR", 0, pack([64, "ended"])) + joined.link.answer_bytes(request, "too late")
    )
    await joined.link.ended_by_client("after ERROR on stream 0")
    await call.lost()


@scenario("fatal-error-unreadable", "6.4: ERROR on stream 0 is the last frame, also if it cannot be read")
async def _(stage: Stage) -> None:
    await _ends(stage, lambda link, request: link.send("ERROR", 0, b"\xc1"), "after ERROR on stream 0")


@scenario("truncation", "4.3: an end without close_notify is an error, never a clean end")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.truncate()
    await call.lost(clean=False)


@scenario("reset", "4.3: a reset is no clean end")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.reset()
    await call.lost(clean=False)


@scenario("clean-end", "4.3: close_notify ends a connection cleanly")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {})
    await joined.link.request("echo")
    joined.link.close()
    await call.lost(clean=True)
    await joined.link.ended_by_client("after the server's")


@scenario(
    "every-cut", "4.3, 5.5: wherever a stream is cut in an answer, the call fails, and no half answer is told"
)
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    for at in _EVERY_CUT:
        await joined.exchange()  # a success, so that the client comes back soon
        call = await joined.client.call("echo", {})
        answer = joined.link.answer_bytes(await joined.link.request("echo"), {"word": "cut"})
        joined.link.write(answer[:at])
        if at % 2:
            joined.link.close()
        else:
            joined.link.truncate()
        await call.lost(clean=bool(at % 2))
        joined.link = await stage.welcomed()


@scenario("end-before-the-greeting", "4.3: an end before WELCOME fails the attempt to connect at once")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting()
    link = await stage.link()
    link.write(link.welcome_bytes()[:100])
    link.truncate()
    await stage.refusal(connected, "connect", "closed", "connect", "tls")


@scenario("goodbye", "4.3: a client sends close_notify before it closes")
async def _(stage: Stage) -> None:
    joined: Joined = await stage.joined()
    await joined.exchange()
    closing = await joined.client.closing()
    await joined.link.ended_by_client("when the application closed it")
    joined.link.close()
    await stage.answer(closing, "close")


@scenario("end-of-input", "4.3: a program whose input ends says goodbye for its clients, and exits with 0")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    await joined.exchange()
    stopping = asyncio.create_task(stage.program.stop())
    try:
        await joined.link.ended_by_client("when the program's input ended")
    finally:
        code = await stopping
    expect(code == 0, f"the program's exit code is {code}")
