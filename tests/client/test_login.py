"""Logins by a scheme of the application: their fields are fetched for each session that is opened."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.client.helpers import (
    Action,
    ScriptedServer,
    client_of,
    cut,
    fail,
    now,
    refreshable,
    scripted,
    turns,
)
from tests.server.conftest import Serve
from tests.server.helpers import PATIENT_CLIENT, TIMEOUT
from zcproto.app.app import App, Context
from zcproto.app.authentication import CallableAuthenticator
from zcproto.client.blocking import connect_blocking
from zcproto.client.client import Client, connect
from zcproto.client.credentials import LOGIN_HOLDS
from zcproto.client.options import ConnectOptions
from zcproto.errors import (
    Code,
    ConfigError,
    ConnectionClosed,
    DeadlineExceeded,
    LoginError,
    TokenRevoked,
    Unauthenticated,
)
from zcproto.sessions import EndReason

PASSWORD = {"scheme": "password", "user": "ada", "password": "correct horse"}


class Tickets:
    """Returns a new ticket each time, as an identity provider does."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.issued = 0
        self.seconds = seconds

    async def __call__(self) -> dict[str, Any]:
        self.issued += 1
        number = self.issued
        await asyncio.sleep(self.seconds)
        return {"scheme": "ticket", "ticket": number}


def client_with(server: ScriptedServer, login: Any, **options: Any) -> Client:
    return client_of(server, user=None, login=login, **options)


def sent(server: ScriptedServer) -> list[int]:
    """Return the tickets of all logins."""
    return [request.params["ticket"] for request in server.calls("session.open")]


# --- opening, refreshing, opening again --------------------------------------------------------------


@pytest.mark.parametrize("login", [PASSWORD, lambda: PASSWORD], ids=["fields", "function"])
@scripted
async def test_fields_are_sent_as_given(server: ScriptedServer, login: Any) -> None:
    async with client_with(server, login, client="shop/2.1"):
        assert server.calls("session.open")[0].params == {**PASSWORD, "client": "shop/2.1"}


@pytest.mark.parametrize(
    ("session", "error", "tickets"),
    [
        ({}, fail(Code.TOKEN_EXPIRED), [1, 2]),
        ({"bound": True}, fail(Code.UNAUTHENTICATED, certificate=True), [1, 2]),
        (refreshable(), fail(Code.TOKEN_EXPIRED), [1]),
    ],
    ids=["expired", "bound to the previous certificate", "refreshed"],
)
@scripted
async def test_session_that_cannot_be_refreshed_is_opened_again_with_new_fields(
    server: ScriptedServer, session: dict[str, Any], error: Action, tickets: list[int]
) -> None:
    server.session = session
    async with client_with(server, Tickets(), certificate="client.crt") as client:
        server.script("echo", error)
        assert await client.call("echo", x=1) == {"x": 1}
        await server.lose()
        await client.call("echo")  # the session is kept over a reconnect
    assert sent(server) == tickets


@scripted
async def test_every_session_is_opened_with_new_fields() -> None:
    server, tickets = ScriptedServer(), Tickets()
    async with client_with(server, tickets) as client:
        server.script("echo", fail(Code.TOKEN_REVOKED))
        for _ in range(2):
            with pytest.raises(TokenRevoked):
                await client.call("echo")
        assert sent(server) == [1], "no session is opened until the application asks for one"
        await client.open_session()
        await client.call("echo")
    assert sent(server) == [1, 2]


@scripted
@pytest.mark.parametrize("action", [cut, fail(Code.UNAVAILABLE, retry_after_ms=10)])
async def test_repeated_login_has_new_fields(action: Callable[..., object]) -> None:
    server, tickets = ScriptedServer(), Tickets()
    server.script("session.open", action)
    async with client_with(server, tickets):
        assert sent(server) == [1, 2]


@scripted
async def test_concurrent_calls_share_one_login() -> None:
    server, tickets = ScriptedServer(), Tickets(seconds=1.0)
    async with client_with(server, tickets, session=False) as client:
        client._sessions.require()
        await asyncio.gather(*(client.call("echo") for _ in range(10)))
    assert sent(server) == [1]


@scripted
async def test_refused_login_is_not_repeated_until_the_application_asks() -> None:
    server, tickets = ScriptedServer(), Tickets()
    async with client_with(server, tickets, session=False) as client:
        server.script("session.open", fail(Code.UNAUTHENTICATED))
        with pytest.raises(Unauthenticated):
            await client.open_session()
        with pytest.raises(Unauthenticated):
            await client.call("echo")
        assert tickets.issued == 1
        await client.open_session()
        assert tickets.issued == 2


# --- the connection is lost while the function runs --------------------------------------------------


@scripted
async def test_login_is_sent_on_the_next_connection() -> None:
    server, tickets = ScriptedServer(), Tickets(seconds=60.0)
    async with client_with(server, tickets, session=False, timeout=None) as client:
        opening = asyncio.create_task(client.open_session())
        await asyncio.sleep(30)
        await server.lose()
        await opening
    assert (sent(server), len(server.links)) == ([1], 2)


@scripted
async def test_login_that_waited_too_long_for_a_connection_is_fetched_again() -> None:
    server, tickets = ScriptedServer(), Tickets()
    async with client_with(server, tickets, session=False, timeout=None) as client:
        tickets.seconds = 1.0
        opening = asyncio.create_task(client.open_session())
        await turns()
        server.greeting["max_streams"] = 0  # the next connection accepts no request
        await server.lose()
        await asyncio.sleep(LOGIN_HOLDS + 2)
        assert sent(server) == []
        server.greeting["max_streams"] = 128
        await server.lose()
        await opening
    assert sent(server) == [2]


# --- faults of the function ---------------------------------------------------------------------------


class ProviderDown(Exception):
    """The identity provider does not answer."""


@scripted
async def test_exception_of_the_function_is_the_cause_of_a_login_error() -> None:
    server, problems = ScriptedServer(), [ProviderDown("secret reason"), TimeoutError()]

    async def login() -> Mapping[str, Any]:
        if problems:
            raise problems.pop(0)
        return PASSWORD

    with pytest.raises(
        LoginError, match=r"^login: the function raised ProviderDown; see the cause$"
    ) as caught:
        await client_with(server, login)
    assert isinstance(caught.value.__cause__, ProviderDown)
    async with client_with(server, login, session=False) as client:
        with pytest.raises(LoginError, match="TimeoutError"):  # not taken for the timeout of the call
            await client.open_session()
        await client.call("echo")  # the next call runs it again
        assert client.session is not None


@pytest.mark.parametrize(
    ("error", "message"),
    [(ConnectionClosed("of the provider"), "ConnectionClosed"), (asyncio.CancelledError(), "was cancelled")],
)
@scripted
async def test_error_of_the_function_is_not_taken_for_the_servers(
    server: ScriptedServer, error: BaseException, message: str
) -> None:
    calls = 0

    async def login() -> Mapping[str, Any]:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(LoginError, match=message):
        await client_with(server, login)
    assert calls == 1


@scripted
async def test_slow_function_is_named_at_the_timeout_and_cancelled_on_close() -> None:
    ended: list[BaseException] = []

    async def login() -> Mapping[str, Any]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.append(error)
            raise
        return {}

    start = now()
    with pytest.raises(DeadlineExceeded, match="the function given as login has not returned: no session"):
        await client_with(ScriptedServer(), login, timeout=5.0)
    assert now() - start == pytest.approx(5.0, abs=0.1)
    assert len(ended) == 1


@scripted
async def test_client_can_be_closed_while_the_function_runs() -> None:
    client = await client_with(ScriptedServer(), Tickets(seconds=60.0), session=False)
    opening = asyncio.create_task(client.open_session())
    await turns()
    await client.close()
    with pytest.raises(ConnectionClosed, match="this client is closed"):
        await opening


FAULTS = [
    (None, "not NoneType"),
    ("secret", "not str"),
    ({}, "'scheme' is missing"),
    ({"scheme": 1}, "'scheme' is missing"),
    ({"scheme": "own", "client": "shop/2.1"}, "'client' is the product"),
    ({"scheme": "own", "secret": object()}, "send msgpack types"),
    ({"scheme": "own", 1: "secret"}, "not a str"),
]


@pytest.mark.parametrize(("login", "expected"), FAULTS)
def test_unusable_login_is_a_login_error_of_the_function(login: Any, expected: str) -> None:
    @scripted
    async def run() -> None:
        with pytest.raises(LoginError, match=f"cannot be sent: .*{expected}") as caught:
            await client_with(ScriptedServer(), lambda: login)
        assert "'secret'" not in str(caught.value)

    run()


@pytest.mark.parametrize(("login", "expected"), FAULTS[2:])
def test_unusable_login_is_refused_by_connect(login: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        connect("server.example", login=login)


@pytest.mark.parametrize(
    "others", [{"user": "ada"}, {"key": "k"}, {"device": "laptop.key"}, {"device_name": "laptop"}]
)
def test_login_excludes_other_credentials(others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="remove user, key, device and device_name"):
        Client("server.example", ConnectOptions(login=PASSWORD, **others))


def test_login_is_in_no_repr() -> None:
    options = ConnectOptions(login=PASSWORD)
    client = Client("server.example", options)
    assert "correct horse" not in f"{options!r} {client!r} {client._credentials!r}"


# --- several users -----------------------------------------------------------------------------------


@scripted
async def test_each_user_of_a_connection_has_a_login(server: ScriptedServer) -> None:
    async with (
        client_of(server, user=None) as gateway,
        gateway.session_for(login=PASSWORD) as ada,
        gateway.session_for(login=Tickets()) as bob,
    ):
        await ada.call("echo")
        await bob.call("echo")
        assert [request.params["scheme"] for request in server.calls("session.open")] == [
            "password",
            "ticket",
        ]
        assert len(server.links) == 1


# --- the blocking client ------------------------------------------------------------------------------


def test_blocking_client_runs_a_plain_function_in_a_thread(serve: Serve) -> None:
    server = tickets_at(serve)
    threads: list[str] = []

    def login() -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return server.ticket("ada")

    with connect_blocking(server.address, login=login, **server.trust) as client:
        assert client.call("who") == "ada"
        with client.session_for(login=lambda: server.ticket("bob")) as bob:
            assert bob.call("who") == "bob"
        assert client.session is not None
        client.call("session.revoke", id=client.session.id)
        with pytest.raises(TokenRevoked):
            client.call("who")
        client.open_session()
        assert client.call("who") == "ada"
    assert server.used == ["ada-1", "bob-2", "ada-3"]
    assert threads == ["zcproto-thread"] * 2


def test_blocking_client_takes_an_async_function_and_reports_its_error(serve: Serve) -> None:
    server = tickets_at(serve)

    async def login() -> dict[str, Any]:
        await asyncio.sleep(0)
        if not server.used:
            server.used.append("none")
            raise ProviderDown
        return server.ticket("ada")

    client = connect_blocking(server.address, login=login, **server.trust)
    with pytest.raises(LoginError, match="ProviderDown"):
        client.open()
    with connect_blocking(server.address, login=login, **server.trust) as client:
        assert client.call("who") == "ada"


def test_closing_a_blocking_client_does_not_wait_for_the_function(serve: Serve) -> None:
    server, asked, answer = tickets_at(serve), threading.Event(), threading.Event()

    def login() -> dict[str, Any]:
        asked.set()
        answer.wait(TIMEOUT)
        return {}

    def open_session() -> None:
        with pytest.raises(ConnectionClosed):
            client.open_session()

    with connect_blocking(server.address, login=login, session=False, **server.trust) as client:
        opening = threading.Thread(target=open_session)
        opening.start()
        assert asked.wait(TIMEOUT)
    opening.join(TIMEOUT)
    assert not opening.is_alive()
    answer.set()


# --- a real server ------------------------------------------------------------------------------------


class TicketServer:
    """A server that accepts each ticket once."""

    def __init__(self, serve: Serve, **settings: Any) -> None:
        self.used: list[str] = []
        self.issued = 0
        app = App(authenticators=[CallableAuthenticator("ticket", self.redeem, user_field=None)])

        @app.method("who")
        def who(context: Context) -> str:
            return context.user

        self.thread = serve(app, users_file=True, **settings)
        self.address = f"127.0.0.1:{self.thread.port}"
        self.trust: dict[str, Any] = {
            "ca_file": self.thread.home / "certs" / "ca.crt",
            **PATIENT_CLIENT,
        }

    def ticket(self, user: str) -> dict[str, Any]:
        self.issued += 1
        return {"scheme": "ticket", "ticket": f"{user}-{self.issued}"}

    def redeem(self, ticket: str) -> str | None:
        if ticket in self.used:
            return None
        self.used.append(ticket)
        return ticket.partition("-")[0]


def tickets_at(serve: Serve, **settings: Any) -> TicketServer:
    return TicketServer(serve, **settings)


async def test_session_is_opened_refreshed_and_opened_again_by_the_login(serve: Serve) -> None:
    server = tickets_at(serve, sessions__lifetime="60s", sessions__refresh_lifetime="120s")

    async def login() -> dict[str, Any]:
        return server.ticket("ada")

    async with connect(server.address, login=login, **server.trust) as client:
        assert await client.call("who") == "ada"
        first = client.session
        assert first is not None
        server.thread.clock.ahead_ms += 61_000
        assert await client.call("who") == "ada"
        assert client.session is not None
        assert client.session.id == first.id, "it was refreshed"
        assert server.used == ["ada-1"]
        server.thread.clock.ahead_ms += 121_000
        assert await client.call("who") == "ada"
        assert client.session.id != first.id
        assert server.used == ["ada-1", "ada-2"]
        server.thread.in_loop(
            lambda: server.thread.server.state.registry.revoke_user("ada", EndReason.BY_OPERATOR)
        )
        with pytest.raises(TokenRevoked):
            await client.call("who")
        await client.open_session()
        assert await client.call("who") == "ada"
    assert server.used == ["ada-1", "ada-2", "ada-3"]


async def test_used_ticket_is_refused(serve: Serve) -> None:
    server = tickets_at(serve)
    async with connect(server.address, login=server.ticket("ada"), **server.trust) as client:
        assert client.session is not None
        await client.call("session.revoke", id=client.session.id)
        with pytest.raises(TokenRevoked):
            await client.call("who")
        with pytest.raises(Unauthenticated, match="the login was not accepted"):
            await client.open_session()
