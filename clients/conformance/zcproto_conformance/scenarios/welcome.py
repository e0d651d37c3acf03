"""WELCOME: when it is sent, how it is split, and what makes it invalid."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.connection import MIN_LENGTH, QUIET, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import USER, ConnectedClient, Harness

scenario: Final = Scenarios(SCRIPTED)

_NO_WELCOME: Final = ("closed", "connect", "tls")
"""Kinds of error that may be reported for a connection without a valid WELCOME."""


async def _expect_refused(harness: Harness, **changes: Any) -> None:
    """Send WELCOME with changes; the client must close the connection and report an error."""
    _, connecting = await harness.begin_connect(connect_timeout_ms=int(harness.patience * 500))
    connection = await harness.next_connection()
    connection.welcome(**changes)
    await connection.expect_close("after an invalid WELCOME")
    await harness.error_of(connecting, "connect", *_NO_WELCOME)


@scenario("welcome-is-awaited", "6.2: a client sends nothing before it has received WELCOME")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(user=USER, key=harness.key)
    connection = await harness.next_connection()
    await connection.expect_silence("before WELCOME")
    connection.welcome()
    await harness.answer_session_open(connection)
    await harness.step_result(connecting, "connect")


@scenario("welcome-byte-by-byte", "5.5: a WELCOME that arrives byte by byte is decoded")
async def _(harness: Harness) -> None:
    client, connecting = await harness.begin_connect()
    connection = await harness.next_connection()
    await connection.write_in_pieces(connection.welcome_bytes())
    await harness.step_result(connecting, "connect")
    await ConnectedClient(client, connection).exchange()


@scenario("welcome-with-unknown-keys", "6.2, 15: unknown keys are ignored")
async def _(harness: Harness) -> None:
    peer = await harness.connect(welcome={"motto": [1, {"a": b"\0"}], "max_dreams": 2**64 - 1})
    await peer.exchange()


@scenario("welcome-followed-by-frame", "5.5: a frame in the same read as WELCOME is not lost")
async def _(harness: Harness) -> None:
    client, connecting = await harness.begin_connect()
    connection = await harness.next_connection()
    connection.write(connection.welcome_bytes() + connection.frame_bytes("EVENT", 0, pack(["early", 1])))
    await harness.step_result(connecting, "connect")
    event = await client.event()
    expect(event == ("early", 1), f"the application received {event}")
    await ConnectedClient(client, connection).exchange()


@scenario("welcome-without-version-1", "6.2: a client closes if the server does not support its version")
async def _(harness: Harness) -> None:
    await _expect_refused(harness, versions=[2, 3])


@scenario("welcome-without-required-key", "6.2: a WELCOME without a required key is refused")
async def _(harness: Harness) -> None:
    await _expect_refused(harness, max_streams=None)


@scenario("welcome-with-wrong-type", "6.2: a WELCOME with a value of a wrong type is refused")
async def _(harness: Harness) -> None:
    await _expect_refused(harness, max_frame="1048576")


@scenario("welcome-not-first", "6.2: a first frame other than WELCOME is refused")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(connect_timeout_ms=int(harness.patience * 500))
    connection = await harness.next_connection()
    connection.send("PING")
    await connection.expect_close("after a first frame other than WELCOME")
    await harness.error_of(connecting, "connect", *_NO_WELCOME)


@scenario("welcome-with-nonzero-counter", "6.2: a WELCOME whose counter is not 0 is refused")
async def _(harness: Harness) -> None:
    await _expect_refused(harness, header={"counter": 1})


@scenario("welcome-twice", "6.2: a second WELCOME is refused")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {})
    await peer.connection.expect_request("echo")
    peer.connection.welcome(header={"counter": 1})
    await peer.connection.expect_close("after a second WELCOME")
    await call.expect_lost()


@scenario("welcome-unparsable", "6.2, 12.2: a WELCOME that is not a msgpack map is refused")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(connect_timeout_ms=int(harness.patience * 500))
    connection = await harness.next_connection()
    connection.send("WELCOME", 0, b"\xc1", counter=0)
    await connection.expect_close("after a WELCOME that cannot be parsed")
    await harness.error_of(connecting, "connect", *_NO_WELCOME)


@scenario("welcome-too-large", "5.3: a WELCOME above the initial limit is refused by its header alone")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(connect_timeout_ms=int(harness.patience * 500))
    connection = await harness.next_connection()
    connection.send("WELCOME", 0, b"", counter=0, length=MIN_LENGTH + 64 * 1_048_576)
    await connection.expect_close("after a length above the limit")
    await harness.error_of(connecting, "connect", *_NO_WELCOME)


@scenario("welcome-never-sent", "11: a connect attempt times out without WELCOME")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(connect_timeout_ms=int(QUIET * 1000))
    accepting = asyncio.create_task(harness.next_connection())
    await harness.error_of(connecting, "connect", *_NO_WELCOME)
    accepting.cancel()  # a slow client gives up during the handshake
    await asyncio.gather(accepting, return_exceptions=True)


@scenario("max-streams", "6.2, 6.3: no more requests are in flight than WELCOME allows")
async def _(harness: Harness) -> None:
    peer = await harness.connect(welcome={"max_streams": 2})
    calls = await peer.client.calls("echo", 5)
    waiting = await peer.connection.expect_requests("echo", 2)
    await peer.connection.expect_silence("beyond max_streams")
    for number in range(len(calls)):
        request = waiting.pop(0)
        peer.connection.respond(request, request.params)
        if number + 2 < len(calls):
            waiting.append(await peer.connection.expect_request("echo"))
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})
