"""Pending calls: offers of a call that other clients of the user may answer first."""

from __future__ import annotations

from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import CANCELLED
from zcproto_conformance.connection import Connection, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import HOUR_MS, Called, ConnectedClient, Harness
from zcproto_conformance.scenarios.server_calls import WELCOME, connect, expect_failure

scenario: Final = Scenarios(SCRIPTED)

ID: Final = "9f86d081884c7d659a2feaa0c55ad015"


async def offered(connection: Connection, number: int, peer: ConnectedClient) -> Called:
    """Offer a pending call, and return it as the application holds it."""
    meta = {"deadline_ms": HOUR_MS, "pending": ID}
    connection.send("CALL", number, pack(["approve", {"tool": "shell"}, meta]), token=peer.session.token)
    called = await peer.client.called()
    expect(called.method == "approve" and called.params == {"tool": "shell"}, f"called {called}")
    expect(called.pending in (ID, None), f"the id of the call is {called.pending!r}")
    return called


async def expect_result(connection: Connection, number: int, value: Any, token: bytes) -> None:
    result = await connection.expect_frame("RESULT", number)
    expect(result.value == value, f"RESULT is {result.value!r} instead of {value!r}")
    expect(result.token == token, "RESULT was sent with another token than its CALL")


@scenario("pending-call", "19.4: a CALL with the id of a pending call is answered like any other")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    called = await offered(peer.connection, 1, peer)
    await called.answer(True)
    await expect_result(peer.connection, 1, True, peer.session.token)


@scenario("pending-call-withdrawn", "19.4: a CALL that another client has answered first is withdrawn")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    called = await offered(peer.connection, 1, peer)
    peer.connection.send("WITHDRAW", 1, token=peer.session.token)
    await expect_failure(peer.connection, 1, CANCELLED, peer.session.token)
    await called.begin_answer("late")
    await peer.connection.expect_silence("after a call was withdrawn")
    await peer.exchange()


@scenario("pending-call-after-a-failure", "19.4: a client that could not answer gets the same call again")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    await offered(peer.connection, 1, peer)
    peer.connection.send("WITHDRAW", 1, token=peer.session.token)
    await expect_failure(peer.connection, 1, CANCELLED, peer.session.token)
    again = await offered(peer.connection, 2, peer)
    await again.answer("second")
    await expect_result(peer.connection, 2, "second", peer.session.token)


@scenario("pending-call-after-reconnect", "19.4: a call has the same id after the client has reconnected")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    await offered(peer.connection, 1, peer)
    await peer.client.cut()
    second = await harness.next_resumed(peer.session, **WELCOME)
    second.respond(await second.expect_request("session.handle"), {})
    again = await offered(second, 1, peer)
    await again.answer("again")
    await expect_result(second, 1, "again", peer.session.token)
