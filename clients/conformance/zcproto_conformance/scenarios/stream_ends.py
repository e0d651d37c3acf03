"""Streams across the ends of sessions and connections, and when a stream is opened again."""

from __future__ import annotations

from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import CANCELLED, SESSION_REPLACED, UNAVAILABLE
from zcproto_conformance.connection import pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import HOUR_MS, Harness
from zcproto_conformance.scenarios.streams import WELCOME, connect, expect_cancel, grant_of, open_stream

scenario: Final = Scenarios(SCRIPTED)


@scenario("stream-of-a-revoked-session", "18.7: a stream cut by the end of its session reports the reason")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    peer.connection.respond_error(opened, CANCELLED, {"reason": "token_revoked"})
    error = await stream.expect_code(CANCELLED)
    expect(
        error.get("details") == {"map": {"reason": "token_revoked"}},
        f"the details are {error.get('details')}",
    )
    await peer.connection.expect_silence("after a stream was cut")


@scenario(
    "stream-outlives-a-refresh", "18.7: the frames of a stream keep the token of its OPEN after a refresh"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer, credit=[2, 60_000])
    peer.connection.event(
        "session.expiring", {"expires_at": peer.connection.wall + HOUR_MS}, peer.session.token
    )
    request = await peer.connection.expect_request("session.refresh")
    newer = harness.new_session()
    harness.grant_session(peer.connection, request, newer)
    await peer.exchange()
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    grant_of(await peer.connection.next_frame("CREDIT"), opened, [2, 60_000])
    await stream.leave()
    await expect_cancel(peer.connection, opened, "of a stream that was left")
    peer.connection.respond_error(opened, CANCELLED, {"reason": "caller"})
    following, again = await open_stream(peer)
    expect(again.token == newer.token, "OPEN after a refresh has another token than the session's")
    peer.connection.respond(again, None)
    await following.expect_end(None)


@scenario(
    "stream-of-a-replaced-session", "11.1: a client does not come back by itself after SESSION_REPLACED"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.respond_error(opened, SESSION_REPLACED)
    await stream.expect_code(SESSION_REPLACED)
    following = await peer.client.open("tokens", {})
    await following.expect_code(SESSION_REPLACED)
    await peer.connection.expect_silence("after SESSION_REPLACED")


@scenario("stream-after-goaway", "18.8: after GOAWAY streams go on, and OPEN uses another connection")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    peer.connection.goaway()
    await peer.connection.sync()
    following = await peer.client.open("tokens", {})
    second = await harness.next_resumed(peer.session, **WELCOME)
    again = await second.expect_open("tokens")
    second.respond(again, "second")
    await following.expect_end("second")
    peer.connection.item(opened, 2)
    peer.connection.respond(opened, "first")
    await stream.expect_items(2)
    await stream.expect_end("first")


@scenario(
    "stream-cut-by-a-drain", "18.8: a stream that has begun is not opened again after the drain timeout"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    await stream.expect_items(1)
    peer.connection.respond_error(opened, CANCELLED, {"reason": "draining", "retry_after_ms": 0})
    await stream.expect_code(CANCELLED)
    await peer.connection.expect_silence("after a stream was cut by a drain")


@scenario(
    "stream-unavailable", "11.1, 18.8: an OPEN that certainly was not run is repeated after `retry_after_ms`"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    following = await stream.begin("next")
    peer.connection.respond_error(opened, UNAVAILABLE, {"retry_after_ms": 0})
    again = await peer.connection.expect_open("tokens")
    peer.connection.respond(again, None)
    expect(await harness.step_result(following, "next") == {"end": None}, "the stream did not end")


@scenario("stream-is-not-repeated-after-an-item", "18.8: a stream is never opened again after an ITEM")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    peer.connection.respond_error(opened, UNAVAILABLE, {"retry_after_ms": 0})
    await stream.expect_items(1)
    await stream.expect_code(UNAVAILABLE)
    await peer.connection.expect_silence("after a stream had begun")


@scenario("stream-is-not-repeated-after-credit", "18.8: a stream is never opened again after a CREDIT")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.credit(opened, 1, 1)
    peer.connection.respond_error(opened, UNAVAILABLE, {"retry_after_ms": 0})
    await stream.expect_code(UNAVAILABLE)
    await peer.connection.expect_silence("after a stream had begun")


@scenario(
    "stream-of-a-lost-connection", "18.8: items that have arrived, then the loss; it is not opened again"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    item = peer.connection.frame_bytes("ITEM", opened.stream, pack("second"), token=opened.token)
    peer.connection.write(item[:-2])
    peer.connection.truncate()
    await stream.expect_items(1)
    await stream.expect_lost(clean=False)
    second = await harness.next_resumed(peer.session, **WELCOME)
    await second.expect_silence("of a stream that had begun")


@scenario("stream-of-a-closed-connection", "18.8: a clean end without an answer, after an item: perhaps run")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    stream, opened = await open_stream(peer)
    peer.connection.item(opened, 1)
    peer.connection.goaway()
    peer.connection.close()
    await stream.expect_items(1)
    await stream.expect_lost(clean=True)
    second = await harness.next_resumed(peer.session, **WELCOME)
    await second.expect_silence("of a stream that had begun")
