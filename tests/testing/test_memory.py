"""An application, its server and its clients in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import zcproto
from tests.limits import TIMEOUT
from zcproto import (
    BUILT_IN_SCHEMES,
    App,
    CallableAuthenticator,
    CallNext,
    Config,
    Context,
    Identity,
    Items,
    LifespanError,
    SessionsConfig,
)
from zcproto.common.roles import OPERATORS
from zcproto.testing import MemoryServer, connect_in_memory


@pytest.fixture
def app() -> App:
    app = App()

    @app.method("greet")
    def greet(context: Context, name: str, times: int = 1) -> str:
        return " ".join(["hello", name] * times) + f" from {context.user}"

    @app.method("open", public=True)
    def open_() -> str:
        return "welcome"

    @app.method("rule", roles=OPERATORS)
    def rule() -> bool:
        return True

    @app.method("forever")
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    @app.method("double")
    async def double(numbers: Items[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    @app.method("ask")
    async def ask(context: Context) -> str:
        return f"the client says {await context.client.call('answer')}"

    @app.method("notify")
    def notify(context: Context) -> bool:
        return context.send_event("noticed", {"by": context.user})

    @app.method("large")
    def large(size: int) -> bytes:
        return bytes(size)

    return app


async def test_call_in_memory_runs_the_method_with_the_session_of_the_user(app: App) -> None:
    async with connect_in_memory(app, user="ada") as client:
        assert await client.call("greet", name="world", times=2) == "hello world hello world from ada"
        assert client.session is not None
        assert (await client.call("session.info"))["user"] == "ada"
        assert "greet" in {method["name"] for method in (await client.call("server.info"))["methods"]}


@pytest.mark.parametrize(
    ("method", "params", "error"),
    [
        ("greet", {"name": 3}, zcproto.InvalidArgument),
        ("unknown", {}, zcproto.Unimplemented),
        ("rule", {}, zcproto.PermissionDenied),
    ],
)
async def test_call_in_memory_is_checked_as_by_a_real_server(
    app: App, method: str, params: dict[str, object], error: type[zcproto.CallError]
) -> None:
    async with connect_in_memory(app, user="ada") as client:
        with pytest.raises(error):
            await client.call(method, params)


async def test_client_without_a_user_may_call_public_methods_only(app: App) -> None:
    async with connect_in_memory(app) as client:
        assert await client.call("open") == "welcome"
        with pytest.raises(zcproto.Unauthenticated):
            await client.call("greet", name="world")


async def test_users_of_one_server_have_their_own_sessions_and_roles(app: App) -> None:
    async with MemoryServer(app) as server:
        key = server.users.add("root", roles=OPERATORS)
        async with server.connect("ada") as ada, server.connect("root") as root:
            assert await root.call("rule")
            assert await ada.call("greet", name="you") == "hello you from ada"
            async with ada.session_for(user="root", key=key) as other:
                assert await other.call("rule")
        with pytest.raises(zcproto.Unauthenticated):
            async with server.connect("ada", key=key):
                pass


async def test_schemes_of_the_application_open_sessions_beside_its_users() -> None:
    def check(word: str) -> Identity | None:
        return Identity("eve", roles=OPERATORS) if word == "sesame" else None

    app = App(authenticators=[CallableAuthenticator("word", check), BUILT_IN_SCHEMES])

    @app.method("who")
    def who(context: Context) -> str:
        return context.user

    async with MemoryServer(app) as server, server.connect("ada") as ada:
        assert await ada.call("who") == "ada"
        async with server.connect(login={"scheme": "word", "word": "sesame"}) as eve:
            assert await eve.call("who") == "eve"
        with pytest.raises(zcproto.Unauthenticated):
            async with server.connect(login={"scheme": "word", "word": "please"}):
                pass


async def test_limits_of_the_configuration_apply_in_memory(app: App) -> None:
    config = Config(sessions=SessionsConfig(per_user=1))
    async with MemoryServer(app, config) as server, server.connect("ada"):
        with pytest.raises(zcproto.ResourceExhausted):
            async with server.connect("ada"):
                pass


async def test_streams_calls_of_the_server_and_events_work_in_memory(app: App) -> None:
    async with MemoryServer(app) as server:
        client = server.connect("ada")

        @client.handler("answer")
        def answer() -> str:
            return "yes"

        async with client:
            assert await client.call("ask") == "the client says yes"
            async with client.stream("double", items=range(500)) as doubled:
                assert [item async for item in doubled] == list(range(0, 1000, 2))
            assert await client.call("notify")
            event = await anext(client.events)
            assert (event.name, event.data) == ("noticed", {"by": "ada"})


async def test_large_answers_in_memory_are_held_back_and_arrive(app: App) -> None:
    async with connect_in_memory(app, user="ada") as client:
        answers = await asyncio.gather(*(client.call("large", size=900_000) for _ in range(8)))
        assert {len(answer) for answer in answers} == {900_000}


async def test_end_of_the_server_cancels_running_methods(app: App) -> None:
    async with MemoryServer(app) as server:
        client = await server.connect("ada")
        running = asyncio.create_task(client.call("forever", timeout=None))
        await client.call("greet", name="you")
    with pytest.raises((zcproto.Cancelled, zcproto.ConnectionClosed)):
        await running
    await client.close()


async def test_lifespan_middleware_and_threads_work_in_memory() -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: App[str]) -> AsyncIterator[str]:
        yield "pool"
        seen.append("ended")

    app = App(lifespan=lifespan)

    @app.middleware
    async def note(context: Context[str], call_next: CallNext[Context]) -> Any:
        seen.append(context.method)
        return await call_next(context)

    @app.method(thread=True)
    def get(context: Context[str]) -> str:
        assert threading.current_thread() is not threading.main_thread()
        return context.state

    async with connect_in_memory(app, user="ada") as client:
        assert await client.call("get") == "pool"
    assert seen == ["get", "ended"]


def test_connect_in_memory_outside_a_loop_names_the_cure(app: App) -> None:
    with pytest.raises(RuntimeError, match=r"make the test `async def`, or use the fixture zcproto_serve"):
        connect_in_memory(app, user="ada")


def test_connect_in_memory_needs_no_plugin(app: App) -> None:
    async def main() -> str:
        async with connect_in_memory(app, user="ada") as client:
            return str(await client.call("greet", name="you"))

    assert asyncio.run(main()) == "hello you from ada"


async def test_failing_lifespan_fails_the_start_or_the_end() -> None:
    @asynccontextmanager
    async def lifespan(app: App[None]) -> AsyncIterator[None]:
        if fails == "start":
            raise OSError("no database")
        yield
        raise OSError("no database")

    for fails in ("start", "end"):
        with pytest.raises(LifespanError, match=f"did not {fails}"):
            async with MemoryServer(App(lifespan=lifespan)):
                assert fails == "end"


async def test_end_of_the_server_waits_for_the_threads_of_its_methods(app: App) -> None:
    begun, ended = threading.Event(), threading.Event()

    @app.method("slow", thread=True)
    def slow() -> None:
        begun.set()
        ended.wait(TIMEOUT)

    async with MemoryServer(app) as server:
        client = await server.connect("ada")
        running = asyncio.create_task(client.call("slow", timeout=None))
        await asyncio.to_thread(begun.wait, TIMEOUT)
        asyncio.get_running_loop().call_later(0.05, ended.set)
    assert ended.is_set()
    with pytest.raises((zcproto.Cancelled, zcproto.ConnectionClosed)):
        await running
    await client.close()
