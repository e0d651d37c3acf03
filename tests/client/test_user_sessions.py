"""Sessions of several users on one connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.client.helpers import (
    ScriptedServer,
    client_of,
    fail,
    now,
    refreshable,
    scripted,
    silence,
    token,
    turns,
)
from tests.client.test_device import DEVICE, BoundServer
from tests.helpers import WALL
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import KEY
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.client.client import Client, UserSession, connect
from zcproto.client.credentials import Device
from zcproto.errors import (
    Code,
    ConfigError,
    ConnectionClosed,
    PermissionDenied,
    TokenRevoked,
    Unauthenticated,
)
from zcproto.wire.frame import NO_TOKEN


def gateway(server: ScriptedServer, **options: Any) -> Client:
    """Return a client without a session of its own."""
    return client_of(server, user=None, **options)


def ada(client: Client) -> UserSession:
    return client.session_for(user="ada", key="secret")


def bob(client: Client) -> UserSession:
    return client.session_for(user="bob", key="secret")


def sent(server: ScriptedServer) -> list[tuple[str, bytes]]:
    return [(request.method, request.token) for request in server.requests]


# --- opening and closing -----------------------------------------------------------------------------


@scripted
async def test_sessions_share_the_connection_and_have_their_own_tokens(server: ScriptedServer) -> None:
    async with gateway(server, timeout=5.0) as client, ada(client) as first, bob(client) as second:
        await client.call("echo")
        await first.call("echo", x=1)
        await second.call("echo")
        assert first.session is not None
        assert client.session is None
        assert [request.params["user"] for request in server.calls("session.open")] == ["ada", "bob"]
        assert [request.token for request in server.calls()] == [NO_TOKEN, token(1), token(2)]
        assert server.calls()[1].meta.deadline_ms == 5_000, "the options of the client apply"
        assert len(server.links) == 1
        assert "server.example" in repr(first)
    assert sent(server)[-2:] == [("session.close", token(2)), ("session.close", token(1))]


@scripted
async def test_closed_session_leaves_the_connection_open(server: ScriptedServer) -> None:
    async with client_of(server) as client:
        async with bob(client) as session:
            pass
        await session.close()
        assert sent(server) == [
            ("session.open", NO_TOKEN),
            ("session.open", NO_TOKEN),
            ("session.close", token(2)),
        ]
        with pytest.raises(ConnectionClosed):
            await session.call("echo")
        assert [event async for event in session.events] == []
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.calls()[-1].token == token(1)
        assert client._users == {}


@scripted
async def test_closed_client_closes_all_sessions(server: ScriptedServer) -> None:
    client = await gateway(server)
    sessions = [client.session_for(user=f"user{number}", key="x") for number in range(100)]
    for session in sessions:
        await session.open()
    await client.close()
    assert {request.token for request in server.calls("session.close")} == {
        token(number + 1) for number in range(100)
    }
    assert [event async for event in sessions[0].events] == []
    with pytest.raises(ConnectionClosed):
        await sessions[0].call("echo")
    with pytest.raises(ConnectionClosed):
        await ada(client).open()


@scripted
async def test_server_that_does_not_answer_delays_the_close_of_all_sessions_once() -> None:
    server = ScriptedServer()
    client = await gateway(server)
    sessions = [client.session_for(user=f"user{number}", key="x") for number in range(100)]
    for session in sessions:
        await session.open()
    server.scripts["session.close"] = [silence] * 200
    began = now()
    await client.close()
    assert now() - began < 3.0
    assert [event async for event in sessions[-1].events] == []
    assert client._users == {}
    assert len(client._wheel) == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


@scripted
async def test_refused_login_raises_and_leaves_nothing(server: ScriptedServer) -> None:
    server.script("session.open", fail(Code.UNAUTHENTICATED))
    async with gateway(server) as client:
        with pytest.raises(Unauthenticated):
            async with ada(client):
                pass
        assert client._users == {}
        async with ada(client) as session:
            await session.call("echo")


@scripted
async def test_session_is_opened_once_and_after_its_client(server: ScriptedServer) -> None:
    client = gateway(server)
    session = ada(client)
    with pytest.raises(RuntimeError, match="open the client first"):
        await session.open()
    with pytest.raises(RuntimeError, match="open the session first"):
        await session.call("echo")
    await session.close()
    async with client, ada(client) as session:
        with pytest.raises(RuntimeError, match="opened before"):
            await session.open()


def test_credentials_must_be_complete() -> None:
    client = connect("server.example", verify=False, certificate="client.crt")
    for options in ({}, {"user": "ada"}, {"key": "x"}, {"device": DEVICE}):
        with pytest.raises(ConfigError):
            client.session_for(**options)


# --- independence ------------------------------------------------------------------------------------


@scripted
async def test_end_of_one_session_does_not_disturb_the_others(server: ScriptedServer) -> None:
    async with gateway(server) as client, ada(client) as first, bob(client) as second:
        server.script("echo", fail(Code.TOKEN_REVOKED))
        with pytest.raises(TokenRevoked):
            await first.call("echo")
        with pytest.raises(TokenRevoked):
            await first.call("echo")
        assert await second.call("echo", x=1) == {"x": 1}
        await server.lose()
        assert await second.call("echo", x=2) == {"x": 2}
        await first.open_session()
        assert await first.call("echo", x=3) == {"x": 3}
        assert server.calls()[-1].token == token(3)


@scripted
async def test_each_session_is_refreshed_by_itself(server: ScriptedServer) -> None:
    server.session = refreshable(expires_at=lambda number: WALL + 100_000 * number)
    async with gateway(server) as client, ada(client) as first, bob(client) as second:
        await asyncio.sleep(90)
        assert server.methods == ["session.open", "session.open", "session.refresh"]
        await first.call("echo")
        await second.call("echo")
        assert [request.token for request in server.calls()] == [token(3), token(2)]


@scripted
async def test_events_reach_their_session(server: ScriptedServer) -> None:
    own: list[str] = []
    async with (
        client_of(server, on_event=lambda event: own.append(event.name)) as client,
        ada(client) as first,
        bob(client) as second,
    ):
        for name, owner in (("own", 1), ("first", 2), ("second", 3)):
            server.link.event(name, None, token(owner))
        server.link.event("server", None, NO_TOKEN)
        await turns()
        assert own == ["own", "server"]
        assert (await anext(first.events)).name == "first"
        assert (await anext(second.events)).name == "second"


@scripted
async def test_event_with_the_token_before_the_last_refresh_reaches_its_session() -> None:
    server = ScriptedServer()
    server.session = refreshable(expires_at=lambda number: WALL + 100_000 * number)
    async with gateway(server) as client, ada(client) as session:
        await asyncio.sleep(90)
        server.link.event("late", None, token(1))
        await turns()
        assert (await anext(session.events)).name == "late"


@scripted
async def test_event_of_a_closed_session_reaches_no_other(server: ScriptedServer) -> None:
    own: list[str] = []
    async with client_of(server, on_event=lambda event: own.append(event.name)) as client:
        async with ada(client):
            pass
        server.link.event("late", None, token(2))
        server.link.event("own", None, token(1))
        await turns()
        assert own == ["own"]


@scripted
async def test_expiring_session_of_a_user_is_refreshed(server: ScriptedServer) -> None:
    server.session = refreshable()
    async with gateway(server) as client, ada(client), bob(client):
        server.link.event("session.expiring", {"expires_at": WALL}, token(2))
        await turns()
        refreshed = server.calls("session.refresh")
        assert [request.params["refresh_token"] for request in refreshed] == [bytes([102]) * 32]


# --- reconnecting ------------------------------------------------------------------------------------


@scripted
async def test_reconnect_shows_each_session() -> None:
    server = ScriptedServer(calls={"max": 8})
    async with client_of(server) as client, ada(client) as first, bob(client):
        first.handler("ask")(lambda: 1)
        await turns()
        server.requests.clear()
        await server.lose()
        await asyncio.sleep(1)
        assert sorted(sent(server)) == [
            ("session.handle", token(2)),
            ("session.info", token(1)),
            ("session.info", token(3)),
        ]


@scripted
async def test_sessions_beyond_the_requests_in_flight_are_shown_in_turn() -> None:
    server = ScriptedServer(max_streams=4)
    async with gateway(server) as client:
        for number in range(20):
            await client.session_for(user=f"user{number}", key="x").open()
        server.requests.clear()
        await server.lose()
        await asyncio.sleep(1)
        assert sent(server) == [("session.info", token(number + 1)) for number in range(20)]


@scripted
async def test_connection_lost_while_sessions_are_shown_shows_them_on_the_next() -> None:
    server = ScriptedServer(max_streams=1)
    async with gateway(server) as client, ada(client), bob(client):
        server.requests.clear()
        server.script("session.info", lambda request: request.link.cut())
        await server.lose()
        await asyncio.sleep(1)
        shown = [("session.info", token(1)), ("session.info", token(2))]
        assert sent(server) == [shown[0], *shown]


@scripted
async def test_client_whose_sessions_are_all_over_does_not_reconnect(server: ScriptedServer) -> None:
    async with client_of(server) as client, ada(client) as session:
        for each in (client, session):
            server.script("echo", fail(Code.TOKEN_REVOKED))
            with pytest.raises(TokenRevoked):
                await each.call("echo")
        await server.lose()
        await asyncio.sleep(60)
        assert len(server.links) == 1


@scripted
async def test_devices_prove_their_keys_one_by_one() -> None:
    server = BoundServer()
    async with gateway(server) as client:
        first = client.session_for(device=DEVICE, device_name="laptop")
        second = client.session_for(device=Device(DEVICE._key), device_name="phone")
        async with first, second:
            server.requests.clear()
            await server.lose()
            await asyncio.sleep(1)
            assert sent(server) == [("session.attach", token(1)), ("session.attach", token(2))]


# --- with a real server ------------------------------------------------------------------------------


def application() -> App:
    app = App()

    @app.method("me")
    def me(context: Context) -> str:
        return context.user

    @app.method("ask")
    async def ask(context: Context) -> Any:
        return await context.client.call("who")

    @app.method("letters")
    async def letters(context: Context) -> Any:
        for letter in context.user:
            yield letter

    return app


def test_users_of_one_connection_call_stream_and_are_called(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve(application())

    async def main() -> None:
        async with connect_to(server, user=None) as client:
            first = client.session_for(user="ada", key=KEY)
            second = client.session_for(user="bob", key=KEY)
            first.handler("who")(lambda: "the handler of ada")
            second.handler("who")(lambda: "the handler of bob")
            async with first, second:
                assert [await first.call("me"), await second.call("me")] == ["ada", "bob"]
                assert await second.call("ask") == "the handler of bob"
                assert await first.call("ask") == "the handler of ada"
                assert [letter async for letter in second.stream("letters")] == [*"bob"]
                assert len(server.server.state.connections) == 1
                with pytest.raises(PermissionDenied):
                    await first.call("server.sessions")

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_revoked_session_ends_alone(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve(application())

    async def main() -> None:
        async with (
            connect_to(server, user=None) as client,
            connect_to(server) as other,
            client.session_for(user="ada", key=KEY) as first,
            client.session_for(user="bob", key=KEY) as second,
        ):
            second.handler("who")(lambda: "bob")
            assert first.session is not None
            await other.call("session.revoke", id=first.session.id)
            with pytest.raises(TokenRevoked):
                await first.call("me")
            assert await second.call("ask") == "bob"
            assert [letter async for letter in second.stream("letters")] == [*"bob"]

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_blocking_client_has_sessions_of_several_users(serve: Serve, blocking: Blocking) -> None:
    server = serve(application())
    with blocking(server, None) as client:
        session = client.session_for(user="bob", key=KEY)
        assert "127.0.0.1" in repr(session)
        with client.session_for(user="ada", key=KEY) as first, session as second:
            second.handler("who")(lambda: "bob")
            assert [first.call("me"), second.call("me")] == ["ada", "bob"]
            server.until(lambda: bool(server.server.clients(user="bob")))
            assert second.call("ask") == "bob"
            assert [*second.stream("letters")] == [*"bob"]
            assert second.session is not None
            assert second.open_session() is second.session
        last = client.session_for(user="ada", key=KEY)
        last.open()
    last.close()
    assert [*last.events] == []
