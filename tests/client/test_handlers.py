"""Calls of a real server to a real client."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.client.conftest import Blocking, ConnectTo
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.client.handlers import Call
from zcproto.errors import (
    Aborted,
    Code,
    ConnectionClosed,
    DeadlineExceeded,
    InternalError,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    ZcprotoError,
)
from zcproto.sessions import EndReason
from zcproto.sessions.token import token_text


class Methods:
    """An application whose methods call clients."""

    def __init__(self) -> None:
        self.app = App()
        self.server: ServerThread | None = None
        self.errors: list[BaseException] = []

        @self.app.method("ask")
        async def ask(context: Context, method: str, params: dict[str, Any], seconds: float = TIMEOUT) -> Any:
            try:
                return await context.client.call(method, params, timeout=seconds)
            except BaseException as error:
                self.errors.append(error)
                raise

        @self.app.method("ask.user")
        async def ask_user(user: str, method: str) -> Any:
            assert self.server is not None
            for client in self.server.server.clients(user=user, handles=method):
                try:
                    return await client.call(method, timeout=TIMEOUT)
                except ZcprotoError as error:
                    self.errors.append(error)
                    raise
            return "no client"

        @self.app.method("ask.user.size")
        async def ask_size(size: int) -> int:
            assert self.server is not None
            (client,) = self.server.server.clients(handles="big")
            return len(await client.call("big", timeout=TIMEOUT, n=size))

        @self.app.method("echo")
        def echo(x: int) -> int:
            return x


class Waiting:
    """A handler that waits until it is cancelled."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def run(self) -> None:
        self.began.set()
        try:
            await asyncio.sleep(3_600)
        finally:
            self.cancelled.set()


@pytest.fixture
def methods() -> Methods:
    return Methods()


@pytest.fixture
def server(serve: Serve, methods: Methods) -> ServerThread:
    methods.server = serve(methods.app)
    return methods.server


@pytest.fixture
def movable(serve: Serve, methods: Methods) -> ServerThread:
    """Return a server whose time a test moves, by less than a call of the client may take."""
    return serve(methods.app, loop_factory=asyncio.new_event_loop, limits__idle_timeout="1h")


async def test_pending_call_reaches_each_client_once_under_one_id(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    first, second, waiting = connect_to(server), connect_to(server), Waiting()
    ids: list[str | None] = []

    @first.handler("approve")
    async def wait(call: Call) -> None:
        ids.append(call.id)
        await waiting.run()

    @second.handler("approve")
    async def approve(call: Call) -> bool:
        ids.append(call.id)
        return True

    asked = asyncio.run_coroutine_threadsafe(server.server.ask("ada", "approve"), server.loop)
    async with first:
        await waiting.began.wait()
        async with second:
            assert await asyncio.wrap_future(asked) is True
            await waiting.cancelled.wait()
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert ids[0] is not None


async def test_method_calls_its_client_and_gets_the_result(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    client = connect_to(server)
    seen: list[Call] = []

    @client.handler("approve")
    async def approve(call: Call, tool: str) -> dict[str, Any]:
        seen.append(call)
        return {"tool": tool, "echo": await client.call("echo", x=7)}

    async with client:
        assert await client.call("ask", method="approve", params={"tool": "sh"}) == {
            "tool": "sh",
            "echo": 7,
        }
    assert (seen[0].method, seen[0].user, seen[0].cancelled, seen[0].id) == ("approve", "ada", True, None)
    assert 0 < seen[0].time_left <= TIMEOUT


async def test_error_of_the_handler_is_raised_in_the_method_and_aborts_it(
    server: ServerThread, methods: Methods, connect_to: ConnectTo, caplog: pytest.LogCaptureFixture
) -> None:
    token = token_text(bytes(range(100, 132)))

    client = connect_to(server)

    @client.handler("fail")
    def fail(kind: str) -> None:
        raise {"not_found": NotFound("no such thing\n", {"x": 1}), "key": KeyError(f"secret {token}")}[kind]

    async with client:
        for kind in ("not_found", "key"):
            with pytest.raises(Aborted):
                await client.call("ask", method="fail", params={"kind": kind})
        with pytest.raises(Aborted):
            await client.call("ask", method="other", params={})
    first, second, third = methods.errors
    assert isinstance(first, NotFound)
    assert (first.message, first.details) == ("no such thing\\n", {"x": 1})
    assert isinstance(second, InternalError)
    assert "secret" not in second.message
    assert isinstance(third, Unavailable)
    (text,) = [record.getMessage() for record in caplog.records]
    assert text.startswith("the handler of fail failed\nTraceback (most recent call last):\n")
    assert text.endswith("\nKeyError: 'secret (hidden)'")


async def test_call_without_answer_ends_at_its_deadline(
    movable: ServerThread, methods: Methods, connect_to: ConnectTo
) -> None:
    client = connect_to(movable)
    waiting = Waiting()
    client.handler("wait")(waiting.run)

    async with client:
        call = asyncio.ensure_future(client.call("ask", method="wait", params={}, seconds=600.0))
        await waiting.began.wait()
        movable.advance(600)
        with pytest.raises(Aborted):
            await call
        await waiting.cancelled.wait()
    assert isinstance(methods.errors[0], DeadlineExceeded)
    assert movable.server.state.clients.ended["deadline"] == 1


async def test_calls_beyond_the_limit_are_refused_in_the_server(
    server: ServerThread, methods: Methods, connect_to: ConnectTo
) -> None:
    client = connect_to(server, max_calls=100)
    go = asyncio.Event()

    @client.handler("wait")
    async def wait() -> int:
        await go.wait()
        return 1

    async with client:
        calls = [asyncio.ensure_future(client.call("ask", method="wait", params={})) for _ in range(33)]
        with pytest.raises(Aborted):
            await asyncio.wait_for(asyncio.shield(calls[32]), TIMEOUT)
        go.set()
        assert await asyncio.gather(*calls[:32]) == [1] * 32
    assert isinstance(methods.errors[0], ResourceExhausted)
    assert methods.errors[0].details == {"limit": 32}


async def test_calls_by_user_reach_the_newest_registration_then_the_other(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    first, second = connect_to(server), connect_to(server)
    first.handler("name")(lambda: "first")
    second.handler("name")(lambda: "second")
    async with connect_to(server, "bob") as bob, first:
        async with second:
            assert await bob.call("ask.user", user="ada", method="name") == "second"
        assert await bob.call("ask.user", user="ada", method="name") == "first"
        assert await bob.call("ask.user", user="ada", method="other") == "no client"
        assert await bob.call("ask.user", user="bob", method="name") == "no client"


async def test_lost_connection_fails_the_call_in_the_method(
    server: ServerThread, methods: Methods, connect_to: ConnectTo
) -> None:
    client = connect_to(server)
    waiting = Waiting()
    client.handler("wait")(waiting.run)

    async with connect_to(server, "bob") as bob:
        async with client:
            call = asyncio.ensure_future(bob.call("ask.user", user="ada", method="wait"))
            await waiting.began.wait()
            connection = client._connections.current
            assert connection is not None
            connection.abort()
            with pytest.raises(Aborted):
                await call
        assert isinstance(methods.errors[0], ConnectionClosed)
        assert await bob.call("ask.user", user="ada", method="wait") == "no client"


async def test_revoked_session_fails_its_calls_and_cancels_the_handlers(
    server: ServerThread, methods: Methods, connect_to: ConnectTo
) -> None:
    client = connect_to(server)
    waiting = Waiting()
    client.handler("wait")(waiting.run)

    async with client, connect_to(server, "bob") as bob, connect_to(server) as other:
        call = asyncio.ensure_future(bob.call("ask.user", user="ada", method="wait"))
        await waiting.began.wait()
        assert client.session is not None
        await other.call("session.revoke", id=client.session.id)
        with pytest.raises(Aborted):
            await call
        await waiting.cancelled.wait()
    assert isinstance(methods.errors[0], ConnectionClosed)


async def test_expired_session_fails_its_calls(
    server: ServerThread, methods: Methods, connect_to: ConnectTo
) -> None:
    """There is no event then: the handler is cancelled by WITHDRAW."""

    client = connect_to(server)
    waiting = Waiting()
    client.handler("wait")(waiting.run)

    async with client, connect_to(server, "bob") as bob:
        call = asyncio.ensure_future(bob.call("ask.user", user="ada", method="wait"))
        await waiting.began.wait()
        assert client.session is not None
        session_id = client.session.id
        server.in_loop(
            lambda: [
                each.session_ended(session_id, Code.TOKEN_EXPIRED, EndReason.EXPIRED)
                for each in [*server.server.state.connections]
            ]
        )
        with pytest.raises(Aborted):
            await call
        await waiting.cancelled.wait()
    assert isinstance(methods.errors[0], ConnectionClosed)


async def test_cancelled_method_withdraws_its_call(server: ServerThread, connect_to: ConnectTo) -> None:
    client = connect_to(server)
    waiting = Waiting()
    client.handler("wait")(waiting.run)

    async with client:
        call = asyncio.ensure_future(client.call("ask", method="wait", params={}))
        await waiting.began.wait()
        call.cancel()
        await waiting.cancelled.wait()
        assert await client.call("echo", x=1) == 1
    assert server.server.state.clients.ended["withdrawn"] == 1
    assert server.server.state.clients.in_flight == 0


async def test_result_of_the_largest_size_arrives_and_a_larger_one_fails(
    server: ServerThread, connect_to: ConnectTo
) -> None:
    client = connect_to(server)
    client.handler("big")(lambda n: b"x" * n)

    async with client, connect_to(server, "bob") as bob:
        largest = 1_048_576 - 64 - 5
        assert await bob.call("ask.user.size", size=largest) == largest
        with pytest.raises(Aborted):
            await bob.call("ask.user.size", size=largest + 1)


async def test_server_without_calls_is_unimplemented(
    serve: Serve, methods: Methods, connect_to: ConnectTo
) -> None:
    server = serve(methods.app, calls__max=0)

    client = connect_to(server)
    client.handler("name")(lambda: 1)
    async with client:
        assert "calls" not in client.welcome
        with pytest.raises(Aborted):
            await client.call("ask", method="name", params={})
        with pytest.raises(Unimplemented):
            await client.call("session.handle", methods=[], max=1)
        with pytest.raises(Unavailable, match=r"makes no calls; raise calls\.max"):
            await client.handle("other", lambda: 1)


def test_blocking_client_handles_calls_in_threads(server: ServerThread, blocking: Blocking) -> None:
    client = blocking(server)
    threads: set[int] = set()

    @client.handler("add")
    def add(call: Call, a: int) -> int:
        threads.add(threading.get_ident())
        return a + client.call("echo", x=1)  # type: ignore[no-any-return]

    with client:

        @client.handler("fail")
        def fail() -> None:
            raise NotFound("no")

        assert client.call("ask", method="add", params={"a": 1}) == 2
        server.until(lambda: bool(server.server.clients(user="ada", handles="fail")))
        with pytest.raises(Aborted, match="NOT_FOUND"):
            client.call("ask", method="fail", params={})
    assert threading.get_ident() not in threads


def test_blocking_handler_sees_that_its_call_was_withdrawn(movable: ServerThread, blocking: Blocking) -> None:
    client = blocking(movable, max_calls=1)
    withdrawn, go = threading.Event(), threading.Event()

    @client.handler("wait")
    def wait(call: Call) -> int:
        movable.advance(600)
        go.wait(TIMEOUT)
        if call.cancelled:
            withdrawn.set()
        return 1

    with client:
        with pytest.raises(Aborted, match="DEADLINE"):
            client.call("ask", method="wait", params={}, seconds=600.0)
        with pytest.raises(Aborted, match="RESOURCE_EXHAUSTED"):
            client.call("ask", method="wait", params={})
        go.set()
        assert withdrawn.wait(TIMEOUT)


async def test_handle_waits_until_the_server_can_call(server: ServerThread, connect_to: ConnectTo) -> None:
    async def hello() -> str:
        return "hello"

    async with connect_to(server) as client:
        await client.handle("hello", hello)
        assert await client.call("ask", method="hello", params={}) == "hello"
        with pytest.raises(ValueError, match="registered twice"):
            await client.handle("hello", hello)


def test_blocking_handle_waits_until_the_server_can_call(server: ServerThread, blocking: Blocking) -> None:
    client = blocking(server)
    client.handle("first", lambda: 1)
    with client:
        client.handle("second", lambda: 2)
        assert [client.call("ask", method=name, params={}) for name in ("first", "second")] == [1, 2]


async def test_handle_without_a_session_is_unavailable(server: ServerThread, connect_to: ConnectTo) -> None:
    async with connect_to(server, None) as client:
        with pytest.raises(Unavailable, match="connect with a user and a key"):
            await client.handle("hello", lambda: 1)
