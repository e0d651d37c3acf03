"""Calls from the server: registration, answers, refusals, withdrawal, and the sessions that they belong to."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import (
    CANCELLED,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    STALE_TIMESTAMP,
    TOKEN_EXPIRED,
    TOKEN_REVOKED,
    UNAUTHENTICATED,
    UNIMPLEMENTED,
)
from zcproto_conformance.connection import MAX_FRAME, STREAMS, TOLERANCE_MS, Connection, Frame, pack
from zcproto_conformance.errors import expect
from zcproto_conformance.harness import HOUR_MS, ConnectedClient, Harness

scenario: Final = Scenarios(SCRIPTED)

WELCOME: Final = {"streams": STREAMS, "calls": {"max": 32}}
STALE_MS: Final = -TOLERANCE_MS - 10_000


async def connect(harness: Harness, *methods: str, **options: Any) -> ConnectedClient:
    """Connect a client with a session, whose application holds calls of some methods."""
    peer = await harness.connect_with_session(welcome=WELCOME, **options)
    for method in methods:
        await handle(peer, method)
    return peer


async def handle(peer: ConnectedClient, method: str) -> Frame:
    """Let the application handle a method, and answer the registration."""
    await peer.client.begin_handle(method)
    request = await peer.connection.expect_request("session.handle")
    peer.connection.respond(request, {})
    return request


def answer_repeated_registrations(connection: Connection) -> None:
    """Answer each further `session.handle`: a client may repeat it after a refresh."""
    connection.auto_responses["session.handle"] = lambda connection, request: connection.respond(request, {})


async def expect_failure(connection: Connection, number: int, code: int, token: bytes) -> None:
    """Raise CheckFailed unless the next frame is the FAILURE of a call, with this code and token."""
    failure = await connection.expect_frame("FAILURE", number)
    expect(failure.token == token, "FAILURE was sent with another token than its CALL")
    is_error = isinstance(failure.value, list) and len(failure.value) in (2, 3)
    expect(is_error and failure.value[0] == code, f"FAILURE is {failure.value!r} instead of code {code}")


@scenario("handle", "19.1: session.handle names all methods, for the session of its token")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    request = await handle(peer, "choose")
    expect(
        request.token == peer.session.token, "session.handle was sent with another token than the session's"
    )
    expect(sorted(request.params["methods"]) == ["approve", "choose"], f"the params are {request.params}")
    expect(type(request.params.get("max")) is int, f"the params are {request.params}")


@scenario("call", "19.2: a CALL is answered by RESULT, with its number and token")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    token = peer.session.token
    for number, answer in ((7, True), (9, {"choice": [1, None]})):
        peer.connection.call(number, "approve", {"tool": "shell"}, token)
        called = await peer.client.called()
        expect(called.method == "approve" and called.params == {"tool": "shell"}, f"called {called}")
        expect(called.user == "ada", f"the user of the call is {called.user!r}")
        await called.answer(answer)
        result = await peer.connection.expect_frame("RESULT", number)
        expect(result.value == answer, f"RESULT is {result.value!r} instead of {answer!r}")
        expect(result.token == token, "RESULT was sent with another token than its CALL")


@scenario("call-with-the-number-of-a-request", "18.2: the numbers of CALLs and requests are independent")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    call = await peer.client.call("echo", {})
    request = await peer.connection.expect_request("echo")
    peer.connection.call(request.stream, "approve", {}, peer.session.token)
    called = await peer.client.called()
    await called.answer("yes")
    result = await peer.connection.expect_frame("RESULT", request.stream)
    expect(result.value == "yes", f"RESULT is {result.value!r}")
    peer.connection.respond(request, "answer")
    await call.expect_result("answer")


@scenario(
    "handle-on-further-connections",
    "19.1: a client registers its methods on each connection of the session before it sends other requests there",
)
async def _(harness: Harness) -> None:
    welcome = {**WELCOME, "max_streams": 1}
    peer = await harness.connect_with_session(welcome=welcome, max_connections=2)
    await handle(peer, "approve")
    first = await peer.client.call("sleep", {})
    request = await peer.connection.expect_request("sleep")
    second = await peer.client.call("echo", {})
    further = await harness.next_welcomed(**welcome)
    registration = await further.expect_request("session.handle")
    expect(registration.token == peer.session.token, "session.handle was sent with another token")
    expect(registration.params["methods"] == ["approve"], f"the params are {registration.params}")
    further.respond(registration, {})
    echo = await further.expect_request("echo")
    further.call(1, "approve", {"tool": "shell"}, peer.session.token)
    await (await peer.client.called()).answer(True)
    result = await further.expect_frame("RESULT", 1)
    expect(result.value is True, f"RESULT is {result.value!r} instead of true")
    further.respond(echo, "after an approval")
    await second.expect_result("after an approval")
    peer.connection.respond(request, None)
    await first.expect_result(None)


@scenario("call-of-an-error", "19.2: an error of a handler is a FAILURE with its code")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    await (await peer.client.called()).fail(NOT_FOUND)
    await expect_failure(peer.connection, 1, NOT_FOUND, peer.session.token)


@scenario("call-without-a-handler", "19.2: a method without a handler is FAILURE UNIMPLEMENTED")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "other", {}, peer.session.token)
    await expect_failure(peer.connection, 1, UNIMPLEMENTED, peer.session.token)
    await peer.exchange()


@scenario("call-with-an-unknown-token", "19.2: an unknown token is FAILURE UNAUTHENTICATED")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    other = bytes(range(32))
    peer.connection.call(1, "approve", {}, other)
    await expect_failure(peer.connection, 1, UNAUTHENTICATED, other)
    await peer.exchange()


@scenario("call-without-a-deadline", "19.2: a CALL without `deadline_ms` is refused")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.send("CALL", 1, pack(["approve", {}]), token=peer.session.token)
    await expect_failure(peer.connection, 1, INVALID_ARGUMENT, peer.session.token)


@scenario("call-undecodable", "19.2: a CALL that cannot be decoded is refused, and the connection continues")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.send("CALL", 1, b"\xc1", token=peer.session.token)
    await expect_failure(peer.connection, 1, INVALID_ARGUMENT, peer.session.token)
    await peer.exchange()


@scenario("call-withdrawn", "19.2: a withdrawn CALL is answered by FAILURE CANCELLED, once")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    called = await peer.client.called()
    peer.connection.send("WITHDRAW", 1, token=peer.session.token)
    await expect_failure(peer.connection, 1, CANCELLED, peer.session.token)
    await called.begin_answer("late")
    await peer.connection.expect_silence("after a call was answered")
    peer.connection.send("WITHDRAW", 1, token=peer.session.token)
    peer.connection.call(1, "approve", {}, peer.session.token)
    again = await peer.client.called()
    await again.answer("second")
    result = await peer.connection.expect_frame("RESULT", 1)
    expect(result.value == "second", f"RESULT is {result.value!r}")


@scenario("call-withdrawn-late", "19.2: a stale WITHDRAW is honoured")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    await peer.client.called()
    peer.connection.send("WITHDRAW", 1, token=peer.session.token, offset_ms=STALE_MS)
    await expect_failure(peer.connection, 1, CANCELLED, peer.session.token)


@scenario("call-answered-once", "19.2: each CALL gets one answer")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    await (await peer.client.called()).answer(True)
    await peer.connection.expect_frame("RESULT", 1)
    peer.connection.send("WITHDRAW", 1, token=peer.session.token)
    await peer.connection.expect_silence("after a call was answered")
    await peer.exchange()


@scenario("call-stale", "19.2: a stale CALL is FAILURE STALE_TIMESTAMP, and is not run")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {"number": 1}, peer.session.token, offset_ms=STALE_MS)
    await expect_failure(peer.connection, 1, STALE_TIMESTAMP, peer.session.token)
    peer.connection.call(2, "approve", {"number": 2}, peer.session.token)
    called = await peer.client.called()
    expect(called.params == {"number": 2}, "a stale call was run")
    await called.answer(None)
    await peer.connection.expect_frame("RESULT", 2)


@scenario("call-on-a-number-in-flight", "19.2: a CALL on a number that is in flight is fatal")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    for _ in range(2):
        peer.connection.call(1, "approve", {}, peer.session.token)
    await peer.connection.wait_for_end("after a CALL on a number in flight")


@scenario("call-without-registration", "18.3: a CALL to a client that never sent session.handle is fatal")
async def _(harness: Harness) -> None:
    peer = await connect(harness)
    await peer.exchange()
    peer.connection.call(1, "approve", {}, peer.session.token)
    await peer.connection.wait_for_end("after a CALL that was never registered")


@scenario("handle-without-calls", "18.3: a client sends no session.handle to a server that makes no calls")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session(welcome={"streams": STREAMS})
    await peer.client.begin_handle("approve")
    await peer.connection.expect_silence("to a server that makes no calls")
    await peer.exchange()


@scenario(
    "call-result-of-max-frame", "19.2, 13: RESULT has at most max_frame; a larger one is FAILURE INTERNAL"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    for number, size in ((1, MAX_FRAME - 64 - 5), (2, MAX_FRAME - 64 - 4)):
        peer.connection.call(number, "approve", {}, peer.session.token)
        await (await peer.client.called()).answer(b"z" * size)
        if number == 1:
            result = await peer.connection.expect_frame("RESULT", number)
            expect(len(result.body) == size + 5, f"RESULT has {len(result.body)} bytes")
        else:
            await expect_failure(peer.connection, number, INTERNAL, peer.session.token)


@scenario("calls-at-once", "19.1: one CALL more than `max` is FAILURE RESOURCE_EXHAUSTED")
async def _(harness: Harness) -> None:
    peer = await connect(harness, max_calls=2)
    request = await handle(peer, "approve")
    expect(request.params.get("max") == 2, f"the params are {request.params}")
    held = []
    for number in (1, 2):
        peer.connection.call(number, "approve", {}, peer.session.token)
        held.append(await peer.client.called())
    peer.connection.call(3, "approve", {}, peer.session.token)
    await expect_failure(peer.connection, 3, RESOURCE_EXHAUSTED, peer.session.token)
    await held[0].answer(None)
    await peer.connection.expect_frame("RESULT", 1)
    peer.connection.call(3, "approve", {}, peer.session.token)
    await peer.client.called()


@scenario("handle-after-reconnect", "19.1: a client registers its methods again after it has reconnected")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    await peer.exchange()  # the client has the answer of session.handle: it does not send it again on its own
    await peer.client.cut()
    second = await harness.next_resumed(peer.session, **WELCOME)
    request = await second.expect_request("session.handle")
    expect(request.token == peer.session.token, "session.handle was sent with another token")
    expect(request.params["methods"] == ["approve"], f"the params are {request.params}")
    second.respond(request, {})
    second.call(1, "approve", {}, peer.session.token)
    await (await peer.client.called()).answer("again")
    await second.expect_frame("RESULT", 1)


@scenario("call-after-a-refresh", "19.2: after a refresh a session is called by its new token")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    answer_repeated_registrations(peer.connection)
    expiring = {"expires_at": peer.connection.wall + HOUR_MS}
    peer.connection.event("session.expiring", expiring, peer.session.token)
    newer = harness.new_session()
    harness.grant_session(peer.connection, await peer.connection.expect_request("session.refresh"), newer)
    peer.connection.call(1, "approve", {}, newer.token)
    await (await peer.client.called()).answer("renewed")
    result = await peer.connection.expect_frame("RESULT", 1)
    expect(result.token == newer.token, "RESULT was sent with another token than its CALL")


@scenario(
    "call-after-an-expiry", "19.1: a registration holds again when its token had expired and is refreshed"
)
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    answer_repeated_registrations(peer.connection)
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    newer = harness.new_session()
    harness.grant_session(peer.connection, await peer.connection.expect_request("session.refresh"), newer)
    peer.connection.call(1, "approve", {}, newer.token)
    peer.connection.respond(await peer.connection.expect_request("echo"), "echoed")
    await call.expect_result("echoed")
    await (await peer.client.called()).answer("renewed")
    result = await peer.connection.expect_frame("RESULT", 1)
    expect(result.token == newer.token, "RESULT was sent with another token than its CALL")


@scenario(
    "handle-with-an-expired-token",
    "19.1: a client registers again after the refresh if its token had expired",
)
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    await peer.exchange()
    await peer.client.cut()
    second = await harness.next_resumed(peer.session, **WELCOME)
    newer = harness.new_session()

    def respond(connection: Connection, request: Frame) -> None:
        if request.token == newer.token:
            connection.respond(request, "echoed")
        else:
            connection.respond_error(request, TOKEN_EXPIRED)

    second.auto_responses["echo"] = second.auto_responses["session.info"] = respond
    second.respond_error(await second.expect_request("session.handle"), TOKEN_EXPIRED)
    call = await peer.client.call("echo", {})
    harness.grant_session(second, await second.expect_request("session.refresh"), newer)
    request = await second.expect_request("session.handle")
    expect(request.token == newer.token, "session.handle was sent with another token")
    expect(request.params["methods"] == ["approve"], f"the params are {request.params}")
    second.respond(request, {})
    second.call(1, "approve", {}, newer.token)
    await (await peer.client.called()).answer("again")
    await second.expect_frame("RESULT", 1)
    await call.expect_result("echoed")


@scenario(
    "handle-after-a-lost-refresh",
    "19.1: a client that reconnects during a refresh registers after it",
)
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    await peer.exchange()
    expiring = {"expires_at": peer.connection.wall + HOUR_MS}
    peer.connection.event("session.expiring", expiring, peer.session.token)
    await peer.connection.expect_request("session.refresh")
    await peer.client.cut()
    second = await harness.next_welcomed(**WELCOME)
    newer = harness.new_session()

    second.auto_responses["session.handle"] = lambda connection, request: connection.respond_error(
        request, TOKEN_EXPIRED
    )
    refresh = await second.expect_request("session.refresh")
    del second.auto_responses["session.handle"]
    second.auto_responses["echo"] = lambda connection, request: connection.respond(request, "echoed")
    harness.grant_session(second, refresh, newer)
    call = await peer.client.call("echo", {})
    request = await second.expect_request("session.handle")
    expect(request.token == newer.token, "session.handle was sent with another token")
    second.respond(request, {})
    second.call(1, "approve", {}, newer.token)
    await (await peer.client.called()).answer("again")
    await second.expect_frame("RESULT", 1)
    await call.expect_result("echoed")


@scenario("calls-of-a-revoked-session", "19.2: a client cancels the handlers of a session that has ended")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    await peer.client.called()
    peer.connection.auto_responses["session.info"] = peer.connection.auto_responses["session.handle"] = (
        lambda connection, request: connection.respond_error(request, TOKEN_REVOKED)
    )
    peer.connection.event("session.revoked", {"by": "operator"}, peer.session.token)
    await expect_failure(peer.connection, 1, CANCELLED, peer.session.token)


@scenario("call-during-goaway", "19.2: GOAWAY does not stop the calls in flight")
async def _(harness: Harness) -> None:
    peer = await connect(harness, "approve")
    peer.connection.call(1, "approve", {}, peer.session.token)
    called = await peer.client.called()
    peer.connection.goaway()
    second = await harness.next_resumed(peer.session, **WELCOME)
    second.respond(await second.expect_request("session.handle"), {})
    await called.answer("still")
    result = await peer.connection.expect_frame("RESULT", 1)
    expect(result.value == "still", f"RESULT is {result.value!r}")


# --- several users on one connection ----------------------------------------------------------------


@scenario(
    "session-for", "19.2, 9.1: sessions of several users share a connection; their tokens tell them apart"
)
async def _(harness: Harness) -> None:
    ada = await connect(harness, "approve")
    bob = await harness.session_for(ada, "bob")
    await handle(bob, "approve")
    for number, peer in enumerate((bob, ada, bob), 1):
        call = await peer.client.call("echo", {"n": number})
        request = await peer.connection.expect_request("echo")
        expect(request.token == peer.session.token, "a request was sent with the token of another session")
        peer.connection.respond(request, number)
        await call.expect_result(number)
        peer.connection.call(number, "approve", {"number": number}, peer.session.token)
        called = await peer.client.called()
        expect(called.params == {"number": number}, f"called {called}")
        await called.answer(number)
        result = await peer.connection.expect_frame("RESULT", number)
        expect(result.token == peer.session.token, "RESULT was sent with the token of another session")


@scenario("session-for-is-revoked", "18.7, 19.2: the end of one session leaves those of other users alone")
async def _(harness: Harness) -> None:
    ada = await connect(harness, "approve")
    bob = await harness.session_for(ada, "bob")
    await handle(bob, "approve")
    stream = await ada.client.open("tokens", {})
    opened = await ada.connection.expect_open("tokens")
    for number, peer in enumerate((ada, bob), 1):
        peer.connection.call(number, "approve", {}, peer.session.token)
    held = await ada.client.called()
    await bob.client.called()

    def refuse(connection: Connection, request: Frame) -> None:
        expect(request.token == bob.session.token, "the wrong session was checked")
        connection.respond_error(request, TOKEN_REVOKED)

    bob.connection.auto_responses["session.info"] = bob.connection.auto_responses["session.handle"] = refuse
    bob.connection.event("session.revoked", {"by": "operator"}, bob.session.token)
    await expect_failure(bob.connection, 2, CANCELLED, bob.session.token)
    await held.answer("unaffected")
    result = await ada.connection.expect_frame("RESULT", 1)
    expect(result.value == "unaffected", f"RESULT is {result.value!r}")
    ada.connection.item(opened, 1)
    ada.connection.respond(opened, "done")
    await stream.expect_items(1)
    await stream.expect_end("done")
    bob.connection.auto_responses["echo"] = refuse
    # A client may check the session only now: its request is read while the call waits.
    answering = asyncio.ensure_future(bob.connection.next_frame())
    call = await bob.client.call("echo", {})
    await call.expect_code(TOKEN_REVOKED)
    answering.cancel()
    await asyncio.wait([answering])
    del bob.connection.auto_responses["echo"]
    await ada.exchange()
