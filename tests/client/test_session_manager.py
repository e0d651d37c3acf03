"""SessionManager: when a session is opened and when it ends. Its refreshes: test_session_refresh.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.client.helpers import (
    ScriptedServer,
    client_of,
    cut,
    fail,
    now,
    numbers,
    ok,
    scripted,
    silence,
    token,
    turns,
)
from tests.helpers import WALL
from zcproto.client.client import connect
from zcproto.client.handlers import Event
from zcproto.client.retry import MAX_LOST
from zcproto.errors import (
    CallError,
    Code,
    ConfigError,
    ConnectionClosed,
    InternalError,
    InvalidArgument,
    ProtocolError,
    SessionReplaced,
    TokenExpired,
    TokenRevoked,
    Unauthenticated,
    Unavailable,
)
from zcproto.wire.frame import NO_TOKEN

# --- opening -----------------------------------------------------------------------------------------


@scripted
async def test_connect_opens_a_session_with_user_key_and_client(server: ScriptedServer) -> None:
    async with client_of(server, client="shop/2.1") as client:
        opened = server.calls("session.open")[0]
        assert opened.params == {"scheme": "api_key", "user": "ada", "key": "secret", "client": "shop/2.1"}
        assert opened.token == NO_TOKEN
        session = client.session
        assert session is not None
        assert (session.id, session.user, session.bound) == ("session-1", "ada", False)
        await client.call("echo")
        assert server.calls()[0].token == token(1)


@scripted
async def test_calls_without_credentials_carry_no_token(server: ScriptedServer) -> None:
    async with client_of(server, user=None) as client:
        await client.call("server.info")
        assert client.session is None
        with pytest.raises(Unauthenticated):
            await client.open_session()
    assert server.methods == ["server.info"]
    assert server.requests[0].token == NO_TOKEN


@scripted
async def test_session_false_opens_no_session_until_requested(server: ScriptedServer) -> None:
    async with client_of(server, session=False) as client:
        await client.call("server.info")
        assert client.session is None
        session = await client.open_session()
        assert await client.open_session() is session
        await client.call("echo")
        assert server.calls()[0].token == token(1)
    assert server.methods == ["server.info", "session.open", "echo", "session.close"]


@scripted
async def test_session_open_is_retried_while_the_server_is_busy(server: ScriptedServer) -> None:
    server.script("session.open", *[fail(Code.UNAVAILABLE, retry_after_ms=100)] * 3)
    start = now()
    async with client_of(server, random=numbers(0.0)):
        assert now() - start == pytest.approx(0.3)


@scripted
async def test_session_open_with_stale_timestamp_is_retried_once() -> None:
    server = ScriptedServer()
    server.script("session.open", fail(Code.STALE_TIMESTAMP, server_time=WALL), ok({}))
    with pytest.raises(ProtocolError, match="is invalid"):
        await client_of(server)
    server = ScriptedServer()
    server.script("session.open", *[fail(Code.STALE_TIMESTAMP)] * 2)
    with pytest.raises(CallError):
        await client_of(server)
    assert len(server.requests) == 2


@scripted
async def test_lost_session_open_is_retried_a_limited_number_of_times(server: ScriptedServer) -> None:
    server.script("session.open", *[cut] * 100)
    with pytest.raises(ConnectionClosed):
        await client_of(server)
    assert len(server.calls("session.open")) == MAX_LOST + 1


@scripted
async def test_slow_lost_session_open_is_retried(server: ScriptedServer) -> None:
    server.script("session.open", lambda request: asyncio.get_running_loop().call_later(6, request.link.cut))
    async with client_of(server) as client:
        assert client.session is not None
    assert server.methods == ["session.open", "session.open", "session.close"]


@scripted
async def test_concurrent_calls_share_one_session_open(server: ScriptedServer) -> None:
    server.script("session.open", silence)
    async with client_of(server, session=False) as client:
        opening = asyncio.create_task(client.open_session())
        calls = [asyncio.create_task(client.call("echo", i=i)) for i in range(10)]
        await turns()
        assert server.methods == ["session.open"]
        server.requests[0].respond(server.opened())
        await opening
        await asyncio.gather(*calls)
        assert server.methods == ["session.open", *["echo"] * 10]


@scripted
async def test_cancelled_call_does_not_cancel_the_shared_session_open(server: ScriptedServer) -> None:
    async with client_of(server, session=False) as client:
        server.script("session.open", silence)
        first = asyncio.create_task(client.open_session())
        await turns()
        second = asyncio.create_task(client.call("echo", x=1))
        await turns()
        first.cancel()
        await turns()
        server.requests[0].respond(server.opened())
        assert await second == {"x": 1}
        assert server.link.cancelled == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"token": "text"},
        {"token": bytes(31)},
        {"id": 5},
        {"user": None},
        {"expires_at": "later"},
        {"idle_timeout_ms": None},
        {"bound": 1},
        {"refresh_token": bytes(31)},
        {"refresh_token": "text"},
        {"refresh_expires_at": "later"},
    ],
)
@scripted
async def test_invalid_session_open_answer_raises(server: ScriptedServer, wrong: dict[str, Any]) -> None:
    server.session = wrong
    with pytest.raises(ProtocolError):
        await client_of(server)


def test_user_or_key_alone_is_refused() -> None:
    with pytest.raises(ConfigError):
        connect("localhost", user="ada")
    with pytest.raises(ConfigError):
        connect("localhost", key="secret")


# --- events ------------------------------------------------------------------------------------------


@scripted
async def test_session_revoked_twice_ends_once(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        calls = [await server.hold_call(client) for _ in range(2)]
        server.calls()[0].fail(Code.SESSION_REPLACED)
        server.calls()[1].fail(Code.TOKEN_REVOKED)
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [SessionReplaced, TokenRevoked]
        with pytest.raises(SessionReplaced):
            await client.call("echo")


@pytest.mark.parametrize(
    ("code", "error"), [(Code.TOKEN_REVOKED, TokenRevoked), (Code.SESSION_REPLACED, SessionReplaced)]
)
@scripted
async def test_session_revoked_event_raises_revoked_or_replaced(code: Code, error: type[CallError]) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", fail(code))
        server.link.event("session.revoked", {"reason": "because"}, token(1))
        await turns()
        assert client.session is None
        with pytest.raises(error):
            await client.call("echo")
        assert server.methods == ["session.open", "session.info"]
        assert await anext(client.events) == Event("session.revoked", {"reason": "because"})


@scripted
async def test_session_revoked_event_of_another_session_is_ignored(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.link.event("session.revoked", {"reason": "because"}, token(9))
        await turns()
        assert server.methods == ["session.open"]
        assert client.session is not None


@scripted
async def test_session_revoked_before_close_is_checked_on_reconnect(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.script("session.info", fail(Code.TOKEN_REVOKED))
        server.link.event("session.revoked", {"reason": "because"}, token(1))
        server.link.go_away("draining", 0)
        await asyncio.sleep(1)
        assert client.session is None


@scripted
async def test_presented_token_that_expired_is_renewed_with_the_next_call(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        server.script("session.info", fail(Code.TOKEN_EXPIRED))
        await server.lose()
        await asyncio.sleep(1)
        await client.call("echo")
    assert server.methods == ["session.open", "session.info", "session.open", "echo", "session.close"]


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.UNAVAILABLE, Code.INTERNAL])
@scripted
async def test_other_errors_to_a_presented_token_are_left_to_calls(code: Code) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", fail(code))
        await server.lose()
        await asyncio.sleep(1)
        assert await client.call("echo", x=1) == {"x": 1}
        assert client.session is not None


@scripted
async def test_token_is_presented_again_after_a_lost_answer(server: ScriptedServer) -> None:
    async with client_of(server):
        server.script("session.info", cut)
        await server.lose()
        await asyncio.sleep(1)
        assert server.methods == ["session.open", "session.info", "session.info"]


@scripted
async def test_call_that_can_be_sent_only_when_its_session_expires_opens_another() -> None:
    server = ScriptedServer()
    server.session = {"expires_at": lambda number: server.wall() + 5_000 * number}
    async with client_of(server) as client:
        server.link.pause()
        call = asyncio.create_task(client.call("echo", x=1))
        asyncio.get_running_loop().call_at(now() + 5, server.link.resume)
        assert await call == {"x": 1}
    assert [request.token for request in server.calls()] == [token(2)]


@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.NOT_FOUND])
@scripted
async def test_error_of_a_method_before_the_token_is_accepted_is_raised(code: Code) -> None:
    server = ScriptedServer()
    async with client_of(server) as client:
        server.script("session.info", silence)
        await server.lose()
        await asyncio.sleep(1)
        server.script("echo", fail(code))
        with pytest.raises(CallError):
            await client.call("echo")
    assert server.methods == ["session.open", "session.info", "echo", "session.close"]


# --- large requests ----------------------------------------------------------------------------------


@scripted
async def test_large_request_after_reconnect_waits_for_the_token(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        await client.call("echo", x=bytes(100_000))
        await server.lose()
        server.script("session.info", silence)
        assert len((await client.call("echo", x=bytes(100_000)))["x"]) == 100_000
        assert server.methods == ["session.open", "echo", "session.info", "session.info", "echo"]


@scripted
async def test_large_request_without_session_is_refused_locally(server: ScriptedServer) -> None:
    async with client_of(server, user=None) as client:
        with pytest.raises(InvalidArgument, match="at most 16384"):
            await client.call("server.info", x=bytes(20_000))
        assert await client.call("server.info", timeout=None, x=bytes(100)) is None
    assert server.methods == ["server.info"]


@scripted
async def test_oversized_request_is_refused_after_presenting_the_token(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        await server.lose()
        await asyncio.sleep(1)
        with pytest.raises(InvalidArgument, match="accepts at most 1048576"):
            await client.call("echo", x=bytes(2_000_000), timeout=None)
        presented = server.methods
        with pytest.raises(InvalidArgument, match="accepts at most 1048576"):
            await client.call("echo", x=bytes(2_000_000))
        assert server.methods == presented  # the connection has its session: nothing is sent


# --- the end -----------------------------------------------------------------------------------------


@scripted
async def test_failed_open_leaves_no_resources(server: ScriptedServer) -> None:
    server.script("session.open", fail(Code.INTERNAL))
    client = client_of(server)
    with pytest.raises(InternalError):
        await client.open()
    assert server.link.ended == "closed"
    with pytest.raises(RuntimeError, match="opened before"):
        await client.open()


@scripted
async def test_open_on_busy_server_ends_at_the_call_timeout(server: ScriptedServer) -> None:
    server.script("session.open", *[fail(Code.UNAVAILABLE, retry_after_ms=1_000)] * 100)
    start = now()
    with pytest.raises(CallError):
        await client_of(server, timeout=5)
    assert now() - start == pytest.approx(5, abs=0.1)


@scripted
async def test_failed_session_close_is_ignored(server: ScriptedServer) -> None:
    server.script("session.close", fail(Code.UNAVAILABLE))
    async with client_of(server):
        pass
    assert server.link.ended == "closed"


def test_session_errors_are_call_errors() -> None:
    for kind in (TokenExpired, TokenRevoked, SessionReplaced, Unauthenticated, Unavailable):
        assert issubclass(kind, CallError)


@scripted
async def test_unauthenticated_session_is_reopened_on_request(server: ScriptedServer) -> None:
    server.script("echo", fail(Code.UNAUTHENTICATED))
    async with client_of(server) as client:
        with pytest.raises(Unauthenticated):
            await client.call("echo")
        assert (await client.open_session()).id == "session-2"
        server.script("session.info", fail(Code.UNAUTHENTICATED))
        await server.lose()
        await asyncio.sleep(1)
        assert (await client.open_session()).id == "session-3"
        assert (await client.open_session()).id == "session-3"
