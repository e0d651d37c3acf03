"""Sessions: opening, tokens, refresh, and how a session ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.codes import (
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    SESSION_REPLACED,
    TOKEN_EXPIRED,
    TOKEN_REVOKED,
    UNAUTHENTICATED,
    UNAVAILABLE,
)
from zcproto_conformance.connection import (
    BEFORE_SESSION,
    MAX_FRAME,
    NO_TOKEN,
    QUIET,
    Connection,
    ConnectionEnded,
    Frame,
    Responder,
)
from zcproto_conformance.errors import CheckFailed, expect
from zcproto_conformance.harness import USER, ConnectedClient, Harness, Session
from zcproto_conformance.values import typed

scenario: Final = Scenarios(SCRIPTED)


@scenario(
    "session-open",
    "9.2, 9.4: session.open carries zeros, the scheme and its fields; later frames carry the token",
)
async def _(harness: Harness) -> None:
    client, connecting = await harness.begin_connect(user=USER, key=harness.key, client_name="kit/1.0")
    connection = await harness.next_welcomed()
    request = await connection.expect_request("session.open")
    expect(request.token == NO_TOKEN, "session.open was sent with a token")
    expected = {"scheme": "api_key", "user": USER, "key": harness.key, "client": "kit/1.0"}
    expect(request.params == expected, f"session.open has the keys {sorted(request.params)}, or wrong values")
    session = harness.new_session()
    harness.grant_session(connection, request, session)
    await harness.step_result(connecting, "connect")
    call = await client.call("echo", {})
    request = await connection.expect_request("echo")
    expect(request.token == session.token, "the call was sent with a token other than the session's")
    connection.respond(request, None)
    await call.expect_result(None)
    state = await client.session()
    expect(
        state is not None and state.get("id") == session.id and state.get("user") == USER,
        f"session is {state}",
    )


@scenario(
    "own-scheme",
    "9.4: the params of an application's scheme are sent as given, and asked for again before each session.open",
)
async def _(harness: Harness) -> None:
    tickets = [harness.fixtures.entropy(16) for _ in range(3)]
    logins = [typed({"scheme": "kit.ticket", "user": USER, "ticket": ticket}) for ticket in tickets]

    async def answer(connection: Connection, ticket: bytes) -> Session:
        request = await connection.expect_request("session.open")
        expected = {"scheme": "kit.ticket", "user": USER, "ticket": ticket, "client": "kit/1.0"}
        expect(
            request.params == expected, f"session.open has the keys {sorted(request.params)}, or wrong values"
        )
        session = harness.new_session(refresh=False)
        harness.grant_session(connection, request, session)
        return session

    client, connecting = await harness.begin_connect(login=logins, client_name="kit/1.0")
    connection = await harness.next_welcomed()
    peer = ConnectedClient(client, connection, await answer(connection, tickets[0]))
    await harness.step_result(connecting, "connect")
    call = await client.call("echo", {})
    connection.respond_error(await connection.expect_request("echo"), TOKEN_EXPIRED)
    peer.session = await answer(connection, tickets[1])
    await _answer_retry(peer, peer.session.token)
    await call.expect_result({})
    connection.auto_responses.update(_refuse_all(TOKEN_REVOKED))
    call = await client.call("echo", {})
    connection.respond_error(await connection.expect_request("echo"), TOKEN_REVOKED)
    await call.expect_code(TOKEN_REVOKED)
    opening = await client.begin_open_session()
    session = await answer(connection, tickets[2])
    result = await harness.step_result(opening, "open_session")
    expect(result == {"session": session.id}, f"open_session returned {result}")


@scenario("secrets", "9.1: no token and no key is ever printed")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    for code in (TOKEN_EXPIRED, UNAUTHENTICATED, TOKEN_REVOKED):
        call = await peer.client.call("echo", {})
        peer.connection.respond_error(await peer.connection.expect_request("echo"), code)
        if code == TOKEN_EXPIRED:
            fresh = await _answer_refresh(harness, peer)
            await _answer_retry(peer, fresh.token)
            await call.expect_result({})
        else:
            await call.expect_code(code)
    peer.connection.send("PING", version=9)  # an error that the client may log
    await peer.connection.expect_close("after a frame of version 9")
    await asyncio.sleep(QUIET)  # all output is searched as it arrives


@scenario("no-session", "9.2: a call without a session carries zeros")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("server.info")
    request = await peer.connection.expect_request("server.info")
    expect(request.token == NO_TOKEN, "a call without a session was sent with a token")
    peer.connection.respond(request, {})
    await call.expect_result({})


@scenario("wrong-key", "11.1: UNAUTHENTICATED for session.open is reported and not retried")
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(user=USER, key=harness.key)
    connection = await harness.next_welcomed()
    connection.respond_error(await connection.expect_request("session.open"), UNAUTHENTICATED)
    await _expect_no_retry(harness, connection)
    error = await harness.error_of(connecting, "connect", "call")
    expect(error.get("code") == UNAUTHENTICATED, f"connect ended with {error}")


@scenario(
    "too-many-sessions",
    "9.8, 11.1: RESOURCE_EXHAUSTED with limit for session.open is reported and not retried",
)
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(user=USER, key=harness.key)
    connection = await harness.next_welcomed()
    connection.respond_error(
        await connection.expect_request("session.open"), RESOURCE_EXHAUSTED, {"limit": 5}
    )
    await _expect_no_retry(harness, connection)
    error = await harness.error_of(connecting, "connect", "call")
    expect(error.get("code") == RESOURCE_EXHAUSTED, f"connect ended with {error}")


async def _expect_no_retry(harness: Harness, connection: Connection) -> None:
    """The client must not retry: it stays silent or closes the connection."""
    if await connection.expect_silence_or_end("after an error that must not be retried"):
        await harness.server.expect_no_connection("after an error that must not be retried", QUIET)


@scenario("unauthenticated", "11.1: UNAUTHENTICATED is reported and not retried")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), UNAUTHENTICATED)
    await call.expect_code(UNAUTHENTICATED)
    await peer.connection.expect_silence("after UNAUTHENTICATED")


_UNKNOWN: Final = {"reason": "unknown_token"}


@scenario(
    "unknown-token",
    "11.1: an unknown token causes one new session for all calls, without a refresh, and one retry of each",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    calls = await peer.client.calls("echo", 3)
    for request in await peer.connection.expect_requests("echo", 3):
        peer.connection.respond_error(request, UNAUTHENTICATED, _UNKNOWN)
    session = await harness.answer_session_open(peer.connection)
    for _ in range(3):
        await _answer_retry(peer, session.token)
    for number, call in enumerate(calls):
        await call.expect_result({"n": number})


@scenario("unknown-token-twice", "11.1: a second unknown token is reported to the application")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), UNAUTHENTICATED, _UNKNOWN)
    await harness.answer_session_open(peer.connection)
    peer.connection.respond_error(await peer.connection.expect_request("echo"), UNAUTHENTICATED, _UNKNOWN)
    await call.expect_code(UNAUTHENTICATED)
    await peer.connection.expect_silence("after a second unknown token")


_MANY: Final = 10
_MANY_SECONDS: Final = 2.0


@scenario(
    "unknown-token-backoff", "11.2: a client whose sessions become unknown opens others ever more slowly"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    until = asyncio.get_running_loop().time() + _MANY_SECONDS
    for _ in range(_MANY):
        call = await peer.client.call("echo", {})
        request = await peer.connection.expect_request("echo")
        peer.connection.respond_error(request, UNAUTHENTICATED, _UNKNOWN)
        try:
            async with asyncio.timeout_at(until):
                session = await harness.answer_session_open(peer.connection)
        except TimeoutError:
            # With full jitter ten of them take a minute; about one run in 100,000 is faster than the timeout.
            await call.cancel()
            return
        await _answer_retry(peer, session.token)
        await call.expect_result({})
    raise CheckFailed(f"the client opened {_MANY} sessions in {_MANY_SECONDS:g} s")


# --- refresh ----------------------------------------------------------------------------------------


async def _answer_refresh(harness: Harness, peer: ConnectedClient) -> Session:
    """Answer the `session.refresh` that must come next with new tokens."""
    request = await peer.connection.expect_request("session.refresh")
    expect(request.token == NO_TOKEN, "session.refresh was sent with a token")
    expect(
        request.params.get("refresh_token") == peer.session.refresh_token,
        "session.refresh was sent with a refresh token other than the latest",
    )
    fresh = harness.new_session()
    fresh.id = peer.session.id
    harness.grant_session(peer.connection, request, fresh)
    peer.session = fresh
    return fresh


async def _answer_retry(peer: ConnectedClient, token: bytes) -> None:
    """Answer the retry of a call, which must carry this token."""
    again = await peer.connection.expect_request("echo")
    expect(again.token == token, "the call was retried with a token other than the new one")
    peer.connection.respond(again, again.params)


@scenario("expired-token", "11.1: TOKEN_EXPIRED causes a refresh and one retry of the call")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    fresh = await _answer_refresh(harness, peer)
    await _answer_retry(peer, fresh.token)
    await call.expect_result({"n": 1})


@scenario("refresh-rotation", "9.6: a refresh token works once; the next refresh uses the new one")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    for number in range(3):
        call = await peer.client.call("echo", {"n": number})
        peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
        fresh = await _answer_refresh(harness, peer)
        await _answer_retry(peer, fresh.token)
        await call.expect_result({"n": number})


@scenario(
    "refresh-shown-on-each-connection",
    "9.6: a new token is shown at once on each further connection of the session, also one that drains",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    draining = peer.connection
    old = await peer.client.call("sleep", {})
    request = await draining.expect_request("sleep")
    draining.goaway()
    peer.connection = await harness.next_resumed(peer.session)
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    draining.auto_responses.clear()
    fresh = await _answer_refresh(harness, peer)
    shown = await draining.next_frame("a request with the new token on the other connection")
    expect(shown.kind == "REQUEST", f"received {shown} after a refresh on another connection")
    expect(shown.token == fresh.token, "a request was sent with a token other than the new one")
    draining.respond_error(shown, UNAVAILABLE, {"retry_after_ms": 0})
    await _answer_retry(peer, fresh.token)
    await call.expect_result({"n": 1})
    draining.respond(request, "still answered")
    await old.expect_result("still answered")


@scenario("concurrent-calls-share-one-refresh", "9.6: all calls that need a new token wait for one refresh")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    calls = await peer.client.calls("echo", 5)
    for request in await peer.connection.expect_requests("echo", 5):
        peer.connection.respond_error(request, TOKEN_EXPIRED)
    request = await peer.connection.expect_request("session.refresh")
    late = await peer.client.call("echo", {"n": 5})
    await peer.connection.expect_silence("during a refresh")
    fresh = harness.new_session()
    harness.grant_session(peer.connection, request, fresh)
    for _ in range(6):
        await _answer_retry(peer, fresh.token)
    for number, call in enumerate([*calls, late]):
        await call.expect_result({"n": number})


@scenario("expired-twice", "11.1: a second TOKEN_EXPIRED is reported to the application")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    await _answer_refresh(harness, peer)
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    await call.expect_code(TOKEN_EXPIRED)


@scenario(
    "expired-without-refresh-token", "11.1: without a refresh token, TOKEN_EXPIRED causes a new session"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session(refresh=False)
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    session = await harness.answer_session_open(peer.connection)
    await _answer_retry(peer, session.token)
    await call.expect_result({"n": 1})


@scenario("expired-refresh-token", "11.1: an expired refresh token causes a new session")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    peer.connection.respond_error(await peer.connection.expect_request("session.refresh"), TOKEN_EXPIRED)
    session = await harness.answer_session_open(peer.connection)
    await _answer_retry(peer, session.token)
    await call.expect_result({"n": 1})


@scenario(
    "lost-refresh",
    "9.6: after a lost refresh a client sends the same refresh token again or opens a new session",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {"n": 1})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    await peer.connection.expect_request("session.refresh")
    await peer.connection.truncate_and_wait()
    peer.connection = await harness.next_welcomed()
    request = await peer.connection.next_frame("session.refresh or session.open")
    expect(
        request.kind == "REQUEST" and request.token == NO_TOKEN, f"received {request} after a lost refresh"
    )
    if request.method == "session.refresh":
        same = request.params.get("refresh_token") == peer.session.refresh_token
        expect(same, "session.refresh was retried with another refresh token")
    else:
        expect(request.method == "session.open", f"received {request} after a lost refresh")
    fresh = harness.new_session()
    harness.grant_session(peer.connection, request, fresh)
    await _answer_retry(peer, fresh.token)
    await call.expect_result({"n": 1})


_GRACE: Final = 10.0
"""Seconds after its first use in which a refresh token may be sent again (section 9.6)."""

_LOST_AFTER: Final = 4.0
"""Seconds after which each answer is lost: a client that counts from its last attempt never reaches the grace."""


@scenario(
    "refresh-lost-repeatedly",
    "9.6: a refresh token is not sent again after the grace, which its first attempt began",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {"n": 1}, timeout_ms=60_000 + int(harness.patience * 1000))
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    request = await peer.connection.expect_request("session.refresh")
    now = asyncio.get_running_loop().time
    first_at = now()
    while request.method == "session.refresh":
        expect(
            now() - first_at < _GRACE + harness.patience,  # what is sent in time may arrive later
            f"a used refresh token was sent {now() - first_at:.1f} s after its first use",
        )
        await asyncio.sleep(_LOST_AFTER)
        await peer.connection.truncate_and_wait()
        peer.connection = await harness.next_welcomed()
        request = await peer.connection.next_frame("session.refresh or session.open")
    expect(request.method == "session.open", f"received {request} after the grace of a lost refresh")
    session = harness.new_session()
    harness.grant_session(peer.connection, request, session)
    await _answer_retry(peer, session.token)
    await call.expect_result({"n": 1})


@scenario(
    "refresh-of-revoked-session", "11.1: TOKEN_REVOKED for a refresh is reported, and no session is opened"
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_EXPIRED)
    peer.connection.respond_error(await peer.connection.expect_request("session.refresh"), TOKEN_REVOKED)
    await call.expect_code(TOKEN_REVOKED)
    await peer.connection.expect_silence("after a refresh that must not be retried")


# --- floods of refreshes ----------------------------------------------------------------------------

_WATCHED: Final = 2.5
"""Seconds in which the requests of a client are counted."""

_MAX_RENEWALS: Final = 4
_BETWEEN_EVENTS: Final = 0.05


@scenario(
    "expired-session", "9.6: sessions that are over when they are opened are renewed with growing delays"
)
async def _(harness: Harness) -> None:
    _, connecting = await harness.begin_connect(user=USER, key=harness.key, timeout_ms=int(_WATCHED * 1000))
    connection = await harness.next_welcomed()
    opened = 0
    with contextlib.suppress(ConnectionEnded):  # the client may give up
        async for request in connection.frames_within(_WATCHED):
            if request.method != "session.close":
                opened += 1
                expect(opened <= _MAX_RENEWALS, f"{opened} requests for sessions that were over at once")
                result = harness.new_session().result(connection.wall)
                connection.respond(request, {**result, "expires_at": connection.wall - 1000})
            else:
                connection.respond(request, None)
    await harness.error_of(connecting, "connect", "call", "closed")


@scenario("expiring-again-and-again", "9.6: at least a second passes between refreshes that no call needs")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    session, refreshes = peer.session, 0
    now = asyncio.get_running_loop().time
    ends = now() + _WATCHED
    while now() < ends:
        peer.connection.event("session.expiring", {"expires_at": 0}, session.token)
        async for request in peer.connection.frames_within(_BETWEEN_EVENTS):
            expect(request.method == "session.refresh", f"received {request} after session.expiring")
            refreshes += 1
            expect(refreshes <= _MAX_RENEWALS, f"{refreshes} refreshes within {_WATCHED} s")
            session = harness.new_session()
            harness.grant_session(peer.connection, request, session)
    expect(refreshes, "no refresh after session.expiring")


# --- revoked and replaced sessions ------------------------------------------------------------------


def _refuse_all(code: int, *more: str) -> dict[str, Responder]:
    """Return error responses to requests that a client may send on its own initiative, and to more methods."""

    def refuse(connection: Connection, request: Frame) -> None:
        connection.respond_error(request, code)

    return dict.fromkeys(["session.info", "session.close", *more], refuse)


async def _expect_session_ended(harness: Harness, code: int) -> None:
    """End a session with an error; the client must report it and do nothing else on its own."""
    peer = await harness.connect_with_session()
    peer.connection.auto_responses.update(_refuse_all(code))
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), code)
    await call.expect_code(code)
    await peer.connection.expect_silence("after the session ended")
    peer.connection.close()
    await peer.connection.wait_for_end("after the server closed")
    await harness.server.expect_no_connection("on its own after its session ended", QUIET * 2)


@scenario("revoked-token", "11.1: after TOKEN_REVOKED a client retries nothing on its own")
async def _(harness: Harness) -> None:
    await _expect_session_ended(harness, TOKEN_REVOKED)


@scenario(
    "replaced-session",
    "9.8: after SESSION_REPLACED a client neither opens a session nor reconnects on its own",
)
async def _(harness: Harness) -> None:
    await _expect_session_ended(harness, SESSION_REPLACED)


@scenario("new-session-after-revocation", "11.1: after TOKEN_REVOKED the application can open a new session")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    call = await peer.client.call("echo", {})
    peer.connection.respond_error(await peer.connection.expect_request("echo"), TOKEN_REVOKED)
    await call.expect_code(TOKEN_REVOKED)
    opening = await peer.client.begin_open_session()
    session = await harness.answer_session_open(peer.connection)
    result = await harness.step_result(opening, "open_session")
    expect(result.get("session") == session.id, f"open_session returned {result}")
    call = await peer.client.call("echo", {})
    await _answer_retry(peer, session.token)
    await call.expect_result({})


@scenario(
    "session-revoked-event",
    "9.7: session.revoked is delivered, the session has ended, and no new one is opened",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    peer.connection.auto_responses.update(_refuse_all(TOKEN_REVOKED, "echo"))
    peer.connection.event("session.revoked", {"reason": "by an operator"}, peer.session.token)
    event = await peer.client.event()
    expect(event == ("session.revoked", {"reason": "by an operator"}), f"the application received {event}")
    async with peer.connection.auto_responding():  # the client may send the call or refuse it itself
        call = await peer.client.call("echo", {})
        await call.expect_code(TOKEN_REVOKED)
    await peer.connection.expect_silence("after the session was revoked")


@scenario("reconnect-with-token", "9.1: a client reconnects with its valid token and opens no new session")
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    await peer.exchange()
    await peer.connection.truncate_and_wait()
    connection = await harness.next_resumed(peer.session)
    call = await peer.client.call("echo", {}, idempotency_key="again")
    request = await connection.expect_request("echo")
    expect(request.token == peer.session.token, "the call was sent with a token other than the session's")
    connection.respond(request, "the same session")
    await call.expect_result("the same session")


@scenario(
    "reconnect-with-small-frame-first",
    "5.3: a client that reconnects sends a small frame first and waits for its response",
)
async def _(harness: Harness) -> None:
    peer = await harness.connect_with_session()
    await peer.exchange()
    await peer.connection.truncate_and_wait()
    connection = await harness.next_welcomed()
    connection.auto_responses.clear()
    blob = b"z" * (4 * BEFORE_SESSION)
    call = await peer.client.call("echo", {"blob": blob}, idempotency_key="again")
    small = [await connection.next_frame("a small request")]  # `frame_limit` rejects a large one
    small += [frame async for frame in connection.frames_within()]
    connection.frame_limit = MAX_FRAME
    for frame in small:
        expect(
            frame.kind == "REQUEST" and frame.token == peer.session.token,
            f"received {frame}, or a wrong token",
        )
        connection.respond(frame, {})
    request = await connection.expect_request("echo")
    expect(request.params == {"blob": blob}, "the params differ from those of the call")
    connection.respond(request, None)
    await call.expect_result(None)


@scenario("large-frame-without-session", "13: without a session a client sends no frame above 16,384 bytes")
async def _(harness: Harness) -> None:
    peer = await harness.connect()
    call = await peer.client.call("echo", {"blob": b"z" * BEFORE_SESSION})
    error = await harness.step_error("expect", "call", "argument", call=call.name)
    expect(error.get("code") in (None, INVALID_ARGUMENT, RESOURCE_EXHAUSTED), f"the call ended with {error}")
    await peer.exchange()
