"""Durable streams: how a client attaches to a run again, what it reports, and how it leaves.

A client may do each of this only while its application waits for an item; the scenarios let it wait.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final

from zcproto_conformance.check import DURABLE, SCRIPTED, Scenarios
from zcproto_conformance.codes import (
    CANCELLED,
    INTERNAL,
    NOT_FOUND,
    OUT_OF_RANGE,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
)
from zcproto_conformance.connection import DURABLE_STREAMS, STREAMS, Connection, Frame
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import ConnectedClient, Harness, Stream
from zcproto_conformance.scenarios.streams import STALE

scenario: Final = Scenarios(SCRIPTED, needs=DURABLE)

WELCOME: Final = {"streams": DURABLE_STREAMS}
REPORTED_WITHIN: Final = 1.0
"""Seconds after which a client has reported what was taken (section 20.3)."""


async def connect(harness: Harness) -> ConnectedClient:
    """Connect a client with a session to a server with durable streams."""
    return await harness.connect_with_session(welcome=WELCOME)


async def start(peer: ConnectedClient, *items: Any, **options: Any) -> tuple[Stream, Frame]:
    """Start a run, accept it, and let the application take these items. Return the stream and its OPEN."""
    stream = await peer.client.open("chat", {"prompt": "hi"}, durable=True, **options)
    opened = await peer.connection.expect_open("chat")
    peer.connection.accept(opened)
    for item in items:
        peer.connection.item(opened, item)
    await stream.expect_items(*items)
    return stream, opened


async def expect_attaching(connection: Connection, first: Frame, position: int) -> Frame:
    """Return the next OPEN, which must attach to the run of the first one at a position."""
    while (frame := await connection.next_frame("an OPEN that attaches")).kind in ("CREDIT", "END"):
        pass  # of the attachment before
    expect(frame.kind == "OPEN" and frame.method == "chat", f"received {frame} instead of OPEN chat")
    wanted = {"id": first.meta["resume"]["id"], "from": position}
    expect(frame.meta.get("resume") == wanted, f"resume is {frame.meta.get('resume')} instead of {wanted}")
    expect(frame.value[1] is None, f"the params are {frame.value[1]} instead of nil")
    return frame


async def end(harness: Harness, connection: Connection, opened: Frame, waiting: asyncio.Future[Any]) -> None:
    """Accept an attachment and end its run; the application waits for the end."""
    connection.accept(opened)
    connection.respond(opened, "done")
    result = await harness.step_result(waiting, "next")
    expect(result == {"end": "done"}, f"next returned {result} instead of the end")


async def expect_left(connection: Connection, opened: Frame, why: str) -> None:
    """Raise CheckFailed unless the client sends END, and not CANCEL."""
    while (frame := await connection.next_frame(f"END {why}")).kind == "CREDIT":
        pass
    expect(frame.kind == "END" and frame.stream == opened.stream, f"received {frame} instead of END {why}")
    expect(frame.token == opened.token, "END was sent with another token than its OPEN")


def taken_in(frame: Frame) -> int | None:
    """Return the third number of a CREDIT; None without one."""
    numbers = frame.value
    return numbers[2] if frame.kind == "CREDIT" and len(numbers) == 3 else None


async def expect_taken(harness: Harness, connection: Connection, position: int) -> None:
    """Raise CheckFailed unless the client reports a position in time, and none beyond it."""
    async with asyncio.timeout(REPORTED_WITHIN + harness.patience):
        async for frame in connection.frames_within(REPORTED_WITHIN + harness.patience):
            taken = taken_in(frame)
            expect(taken is None or taken <= position, f"taken is {taken}; {position} items were received")
            if taken == position:
                return
    raise CheckFailed(f"no CREDIT has reported that {position} items were taken")


# --- opening ----------------------------------------------------------------------------------------


@scenario("durable-not-announced", "20: a client sends no `resume` to a server without durable streams")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session(welcome={"streams": STREAMS})
    stream = await peer.client.open("chat", {}, durable=True)
    await stream.expect_code(UNIMPLEMENTED)
    await peer.exchange()


@scenario("durable-open", "20.1: the first OPEN has an id of its own, `from` 0, and params that are a map")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    ids = set()
    for _ in range(2):
        stream = await peer.client.open("chat", {}, durable=True)
        opened = await peer.connection.expect_open("chat")
        resume = opened.meta.get("resume")
        if not isinstance(resume, dict) or resume.keys() != {"id", "from"}:
            raise CheckFailed(f"resume is {resume}")
        run_id = resume["id"]
        is_id = isinstance(run_id, str) and re.fullmatch("[A-Za-z0-9_-]{16,64}", run_id)
        expect(bool(is_id), f"the id is {run_id!r}")
        expect(resume["from"] == 0, f"from is {resume['from']}")
        expect(opened.value[1] == {}, f"the params are {opened.value[1]} instead of an empty map")
        ids.add(run_id)
        peer.connection.accept(opened)
        peer.connection.item(opened, 1)
        peer.connection.respond(opened, "done")
        await stream.expect_items(1)
        await stream.expect_end("done")
        expect(await stream.position() == {"id": run_id, "position": 1}, "the position is not 1")
    expect(len(ids) == 2, "two runs have the same id")


@scenario("durable-open-is-repeated", "20.1: a first OPEN without ACCEPTED is repeated as it was")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream = await peer.client.open("chat", {"prompt": "hi"}, durable=True)
    first = await peer.connection.expect_open("chat")
    waiting = await stream.begin("next")
    peer.connection.truncate()
    second = await harness.next_resumed(peer.session, **WELCOME)
    again = await second.expect_open("chat")
    expect(again.meta["resume"] == first.meta["resume"], f"resume is {again.meta['resume']}")
    expect(again.value[1] == {"prompt": "hi"}, f"the params are {again.value[1]}")
    await end(harness, second, again, waiting)


@scenario("durable-resume", "20.1: an application goes on with a run that it knows by its id and position")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream = await peer.client.resume("kF3_9xQ0", "chat", 17)
    opened = await peer.connection.expect_open("chat")
    expect(opened.meta.get("resume") == {"id": "kF3_9xQ0", "from": 17}, f"meta is {opened.meta}")
    expect(opened.value[1] is None, f"the params are {opened.value[1]} instead of nil")
    peer.connection.accept(opened, state="ended", next=18)
    peer.connection.item(opened, "last")
    peer.connection.respond(opened, "done")
    await stream.expect_items("last")
    await stream.expect_end("done")
    expect((await stream.position())["position"] == 18, "the position is not 18")


# --- attaching again --------------------------------------------------------------------------------


@scenario("durable-after-a-loss", "20.4: a client that lost its connection attaches behind its last item")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one", "two")
    peer.connection.truncate()
    waiting = await stream.begin("next")
    second = await harness.next_resumed(peer.session, **WELCOME)
    again = await expect_attaching(second, opened, 2)
    second.accept(again)
    second.item(again, "three")
    expect(await harness.step_result(waiting, "next") == {"item": "three"}, "the item did not arrive")
    second.respond(again, "done")
    await stream.expect_end("done")


@scenario("durable-after-accepted", "20.1: a client that has received ACCEPTED attaches with nil")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer)
    waiting = await stream.begin("next")
    await peer.connection.sync()
    peer.connection.truncate()
    second = await harness.next_resumed(peer.session, **WELCOME)
    await end(harness, second, await expect_attaching(second, opened, 0), waiting)


@scenario("durable-after-a-cut", "20.4: after an ERROR with `detached` a client attaches again")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    waiting = await stream.begin("next")
    for position in (1, 2):
        details = {"reason": "slow", "detached": True}
        peer.connection.respond_error(opened, RESOURCE_EXHAUSTED, details)
        opened = await expect_attaching(peer.connection, opened, position)
        if position == 2:
            break
        peer.connection.accept(opened)
        peer.connection.item(opened, "two")
        expect(await harness.step_result(waiting, "next") == {"item": "two"}, "the item did not arrive")
        waiting = await stream.begin("next")
    await end(harness, peer.connection, opened, waiting)


@scenario("durable-after-a-drain", "20.4: a run is read on by way of another connection after GOAWAY")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    waiting = await stream.begin("next")
    peer.connection.goaway()
    details = {"reason": "draining", "retry_after_ms": 0, "detached": True}
    peer.connection.respond_error(opened, CANCELLED, details)
    second = await harness.next_resumed(peer.session, **WELCOME)
    await end(harness, second, await expect_attaching(second, opened, 1), waiting)


@scenario("durable-stale-item", "20.4: after a stale ITEM a client sends END, and attaches again")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    waiting = await stream.begin("next")
    peer.connection.item(opened, "two", **STALE)
    await expect_left(peer.connection, opened, "after a stale item")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "detached", "detached": True})
    again = await expect_attaching(peer.connection, opened, 1)
    await end(harness, peer.connection, again, waiting)


@scenario("durable-resumed-elsewhere", "20.4: a stream that was resumed elsewhere is not opened again")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    details = {"reason": "resumed_elsewhere", "detached": True}
    peer.connection.respond_error(opened, CANCELLED, details)
    await stream.expect_code(CANCELLED)
    await peer.connection.expect_silence("after a stream was resumed elsewhere")


@scenario("durable-run-has-gone", "20.1: NOT_FOUND and OUT_OF_RANGE are reported to the application")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    for code in (NOT_FOUND, OUT_OF_RANGE):
        stream = await peer.client.resume("kF3_9xQ0", "chat", 3)
        opened = await peer.connection.expect_open("chat")
        peer.connection.respond_error(opened, code, {"first": 7, "next": 9})
        await stream.expect_code(code)
    await peer.connection.expect_silence("after the run had gone")


@scenario("durable-error-of-the-method", "20.4: an ERROR without `detached` is the end of the run")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "abandoned"})
    await stream.expect_code(CANCELLED)
    await peer.connection.expect_silence("after the run had ended")


# --- leaving ----------------------------------------------------------------------------------------


@scenario("durable-leave", "20.4: an application that stops reading leaves the run by END, not by CANCEL")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    await stream.leave()
    await expect_left(peer.connection, opened, "of a stream that was left")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "detached", "detached": True})
    await peer.exchange()


@scenario("durable-cancel", "20.4: CANCEL cancels the run")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    cancelling = await stream.begin("cancel_run")
    while (frame := await peer.connection.next_frame("CANCEL")).kind == "CREDIT":
        pass
    expect(frame.kind == "CANCEL" and frame.stream == opened.stream, f"received {frame} instead of CANCEL")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    await harness.step_result(cancelling, "cancel_run")
    await stream.expect_code(CANCELLED)


@scenario("durable-item-undecodable", "20.4: an item that cannot be decoded is reported, and END is sent")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one")
    peer.connection.send("ITEM", opened.stream, b"\xd4\x05\x00", token=opened.token)
    await stream.expect_code(INTERNAL)
    await expect_left(peer.connection, opened, "after an item that cannot be decoded")
    expect((await stream.position())["position"] == 1, "the item was counted")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "detached", "detached": True})
    await peer.exchange()


# --- what is reported -------------------------------------------------------------------------------


@scenario("durable-taken", "20.3: what was taken is reported within a second, though no credit is due")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one", "two", credit=[64, 262_144])
    waiting = await stream.begin("next")
    await expect_taken(harness, peer.connection, 2)
    peer.connection.respond(opened, "done")
    expect(await harness.step_result(waiting, "next") == {"end": "done"}, "the stream did not end")


@scenario("durable-taken-again", "20.3: what was taken is reported again on each attachment")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await start(peer, "one", "two")
    waiting = await stream.begin("next")
    await expect_taken(harness, peer.connection, 2)
    peer.connection.truncate()
    second = await harness.next_resumed(peer.session, **WELCOME)
    again = await expect_attaching(second, opened, 2)
    await asyncio.sleep(2 * REPORTED_WITHIN)  # the report is due before ACCEPTED
    await second.sync()
    second.accept(again)
    await expect_taken(harness, second, 2)
    second.respond(again, "done")
    expect(await harness.step_result(waiting, "next") == {"end": "done"}, "the stream did not end")
