"""Sessions: opening, the token, refresh, and what takes a session away."""

from __future__ import annotations

from typing import Final

from zcproto_conformance.check import SCRIPTED, Scenarios
from zcproto_conformance.errors import expect
from zcproto_conformance.link import BEFORE_SESSION, MAX_FRAME, NO_TOKEN, QUIET, Answer, Frame, Link
from zcproto_conformance.stage import USER, Joined, Session, Stage

scenario: Final = Scenarios(SCRIPTED)

INVALID_ARGUMENT: Final = 3
RESOURCE_EXHAUSTED: Final = 8
UNAUTHENTICATED: Final = 16
TOKEN_EXPIRED: Final = 68
TOKEN_REVOKED: Final = 69
SESSION_REPLACED: Final = 70


@scenario(
    "session-open", "9.2, 9.4: session.open carries zeros, the scheme and its fields; later frames the token"
)
async def _(stage: Stage) -> None:
    client, connected = await stage.connecting(user=USER, key=stage.key, client_name="kit/1.0")
    link = await stage.welcomed()
    request = await link.request("session.open")
    expect(request.token == NO_TOKEN, "session.open came with a token")
    wanted = {"scheme": "api_key", "user": USER, "key": stage.key, "client": "kit/1.0"}
    expect(
        request.params == wanted, f"the params of session.open are {sorted(request.params)}, or not as told"
    )
    session = stage.new_session()
    stage.give(link, request, session)
    await stage.answer(connected, "connect")
    call = await client.call("echo", {})
    request = await link.request("echo")
    expect(request.token == session.token, "a call came with another token than the session's")
    link.answer(request, None)
    await call.gives(None)
    told = await client.session()
    expect(
        told is not None and told.get("id") == session.id and told.get("user") == USER, f"session is {told}"
    )


@scenario("secrets", "9.1: no token and no key is ever put out, whatever happens")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    for code in (TOKEN_EXPIRED, UNAUTHENTICATED, TOKEN_REVOKED):
        call = await joined.client.call("echo", {})
        joined.link.refuse(await joined.link.request("echo"), code)
        if code == TOKEN_EXPIRED:
            fresh = await _refreshed(stage, joined)
            await _after(joined, fresh.token)
            await call.gives({})
        else:
            await call.refused(code)
    joined.link.send("PING", version=9)  # a fault, of which the client may write to its log
    await joined.link.ended_by_client("after a frame of version 9")
    await stage.pause(QUIET)  # whatever was put out is looked through as it comes


@scenario("no-session", "9.2: without a session a call carries zeros")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("server.info")
    request = await joined.link.request("server.info")
    expect(request.token == NO_TOKEN, "a call without a session came with a token")
    joined.link.answer(request, {})
    await call.gives({})


@scenario("wrong-key", "11.1: UNAUTHENTICATED at session.open is told; there is no second try")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(user=USER, key=stage.key)
    link = await stage.welcomed()
    link.refuse(await link.request("session.open"), UNAUTHENTICATED)
    await _no_more(stage, link)
    error = await stage.refusal(connected, "connect", "call")
    expect(error.get("code") == UNAUTHENTICATED, f"connect ended with {error}")


@scenario("too-many-sessions", "9.8, 11.1: RESOURCE_EXHAUSTED with limit at session.open is told")
async def _(stage: Stage) -> None:
    _, connected = await stage.connecting(user=USER, key=stage.key)
    link = await stage.welcomed()
    link.refuse(await link.request("session.open"), RESOURCE_EXHAUSTED, {"limit": 5})
    await _no_more(stage, link)
    error = await stage.refusal(connected, "connect", "call")
    expect(error.get("code") == RESOURCE_EXHAUSTED, f"connect ended with {error}")


async def _no_more(stage: Stage, link: Link) -> None:
    """The client makes no further try: it stays silent, or leaves."""
    if await link.quiet_or_gone("after a refusal that is for the application"):
        await stage.server.nobody("after a refusal that is for the application", QUIET)


@scenario("unauthenticated", "11.1: UNAUTHENTICATED is told, and not sent again")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), UNAUTHENTICATED)
    await call.refused(UNAUTHENTICATED)
    await joined.link.quiet("after UNAUTHENTICATED")


# --- refresh ----------------------------------------------------------------------------------------


async def _refreshed(stage: Stage, joined: Joined) -> Session:
    """Answer the refresh that must come next with new tokens."""
    request = await joined.link.request("session.refresh")
    expect(request.token == NO_TOKEN, "session.refresh came with a token")
    expect(
        request.params.get("refresh_token") == joined.session.refresh_token,
        "session.refresh came with another refresh token than the last one that was given",
    )
    fresh = stage.new_session()
    fresh.id = joined.session.id
    stage.give(joined.link, request, fresh)
    joined.session = fresh
    return fresh


async def _after(joined: Joined, token: bytes) -> None:
    """The call comes again, with a token."""
    again = await joined.link.request("echo")
    expect(again.token == token, "the call came again with another token than the new one")
    joined.link.answer(again, again.params)


@scenario("expired-token", "11.1: TOKEN_EXPIRED leads to a refresh, and to the call again, once")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {"n": 1})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    fresh = await _refreshed(stage, joined)
    await _after(joined, fresh.token)
    await call.gives({"n": 1})


@scenario(
    "refresh-rotation",
    "9.6: a refresh token works once; the next refresh uses the one that came with the last",
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    for number in range(3):
        call = await joined.client.call("echo", {"n": number})
        joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
        fresh = await _refreshed(stage, joined)
        await _after(joined, fresh.token)
        await call.gives({"n": number})


@scenario("one-refresh-at-a-time", "9.6: all calls that need a fresh token wait for one refresh")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    calls = await joined.client.calls("echo", 5)
    for request in await joined.link.requests("echo", 5):
        joined.link.refuse(request, TOKEN_EXPIRED)
    request = await joined.link.request("session.refresh")
    late = await joined.client.call("echo", {"n": 5})
    await joined.link.quiet("while a refresh is on its way")
    fresh = stage.new_session()
    stage.give(joined.link, request, fresh)
    for _ in range(6):
        await _after(joined, fresh.token)
    for number, call in enumerate([*calls, late]):
        await call.gives({"n": number})


@scenario("expired-twice", "11.1: after a second TOKEN_EXPIRED the application is told")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    await _refreshed(stage, joined)
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    await call.refused(TOKEN_EXPIRED)


@scenario("expired-without-refresh", "11.1: without a refresh token TOKEN_EXPIRED leads to another session")
async def _(stage: Stage) -> None:
    joined = await stage.with_session(refresh=False)
    call = await joined.client.call("echo", {"n": 1})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    session = await stage.open_session(joined.link)
    await _after(joined, session.token)
    await call.gives({"n": 1})


@scenario("expired-refresh-token", "11.1: a refresh token that has expired leads to another session")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {"n": 1})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    joined.link.refuse(await joined.link.request("session.refresh"), TOKEN_EXPIRED)
    session = await stage.open_session(joined.link)
    await _after(joined, session.token)
    await call.gives({"n": 1})


@scenario(
    "lost-refresh", "9.6: when the answer to a refresh was lost, the same refresh token, or another session"
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {"n": 1})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    await joined.link.request("session.refresh")
    await joined.link.lose()
    joined.link = await stage.welcomed()
    request = await joined.link.frame("session.refresh or session.open")
    expect(request.kind == "REQUEST" and request.token == NO_TOKEN, f"{request} came after a lost refresh")
    if request.method == "session.refresh":
        same = request.params.get("refresh_token") == joined.session.refresh_token
        expect(same, "session.refresh came again with another refresh token")
    else:
        expect(request.method == "session.open", f"{request} came after a lost refresh")
    fresh = stage.new_session()
    stage.give(joined.link, request, fresh)
    await _after(joined, fresh.token)
    await call.gives({"n": 1})


@scenario(
    "refresh-of-a-revoked-session", "11.1: a refresh that is TOKEN_REVOKED is told; no session is opened"
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_EXPIRED)
    joined.link.refuse(await joined.link.request("session.refresh"), TOKEN_REVOKED)
    await call.refused(TOKEN_REVOKED)
    await joined.link.quiet("after a refresh that was refused for good")


# --- the end of a session ---------------------------------------------------------------------------


def _refuses_all(code: int, *more: str) -> dict[str, Answer]:
    """Answers for whatever a client may ask by itself with a dead token, and for more methods."""

    def refuse(link: Link, request: Frame) -> None:
        link.refuse(request, code)

    return dict.fromkeys(["session.info", "session.close", *more], refuse)


async def _over(stage: Stage, code: int) -> None:
    """A session is taken away: the application is told, each call again, and nothing else happens by itself."""
    joined = await stage.with_session()
    joined.link.auto.update(_refuses_all(code))
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), code)
    await call.refused(code)
    await joined.link.quiet("after the session was taken away")
    joined.link.close()
    await joined.link.end("when the server closed")
    await stage.server.nobody("by itself after its session was taken away", QUIET * 2)


@scenario("revoked-token", "11.1: after TOKEN_REVOKED nothing is tried again by itself")
async def _(stage: Stage) -> None:
    await _over(stage, TOKEN_REVOKED)


@scenario(
    "replaced-session",
    "9.8: after SESSION_REPLACED a client neither opens a session nor reconnects by itself",
)
async def _(stage: Stage) -> None:
    await _over(stage, SESSION_REPLACED)


@scenario("another-session", "11.1: after TOKEN_REVOKED the application can open another session")
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    call = await joined.client.call("echo", {})
    joined.link.refuse(await joined.link.request("echo"), TOKEN_REVOKED)
    await call.refused(TOKEN_REVOKED)
    opening = await joined.client.open_session()
    session = await stage.open_session(joined.link)
    told = await stage.answer(opening, "open_session")
    expect(told.get("session") == session.id, f"open_session was answered with {told}")
    call = await joined.client.call("echo", {})
    await _after(joined, session.token)
    await call.gives({})


@scenario(
    "revoked-event",
    "9.7: session.revoked is told to the application; the session is over, and none is opened",
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    joined.link.auto.update(_refuses_all(TOKEN_REVOKED, "echo"))
    joined.link.event("session.revoked", {"reason": "by an operator"}, joined.session.token)
    told = await joined.client.event()
    expect(told == ("session.revoked", {"reason": "by an operator"}), f"the application was told {told}")
    async with joined.link.serving():  # the call may be made, or refused at the client already
        call = await joined.client.call("echo", {})
        await call.refused(TOKEN_REVOKED)
    await joined.link.quiet("after the session was revoked")


@scenario(
    "back-with-its-token", "9.1: a client that comes back uses its live token, and opens no other session"
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    await joined.exchange()
    await joined.link.lose()
    link = await stage.back(joined.session)
    call = await joined.client.call("echo", {}, idempotency_key="again")
    request = await link.request("echo")
    expect(request.token == joined.session.token, "the call came with another token than the session's")
    link.answer(request, "the same session")
    await call.gives("the same session")


@scenario(
    "small-frame-first", "5.3: a client that comes back begins with a small frame, and waits for its answer"
)
async def _(stage: Stage) -> None:
    joined = await stage.with_session()
    await joined.exchange()
    await joined.link.lose()
    link = await stage.welcomed()
    link.auto.clear()
    blob = b"z" * (4 * BEFORE_SESSION)
    call = await joined.client.call("echo", {"blob": blob}, idempotency_key="again")
    small = [await link.frame("a small request")]  # a large one is a fault until one of them was answered
    small += [frame async for frame in link.collect()]
    link.limit = MAX_FRAME
    for frame in small:
        expect(
            frame.kind == "REQUEST" and frame.token == joined.session.token, f"{frame} came, or another token"
        )
        link.answer(frame, {})
    request = await link.request("echo")
    expect(request.params == {"blob": blob}, "the params are not as they were given")
    link.answer(request, None)
    await call.gives(None)


@scenario("large-frame-without-a-session", "13: without a session nothing above 16,384 is sent")
async def _(stage: Stage) -> None:
    joined = await stage.joined()
    call = await joined.client.call("echo", {"blob": b"z" * BEFORE_SESSION})
    error = await stage.refused("expect", "call", "argument", call=call.name)
    expect(error.get("code") in (None, INVALID_ARGUMENT, RESOURCE_EXHAUSTED), f"the call ended with {error}")
    await joined.exchange()
