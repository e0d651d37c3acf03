"""A real client and a real server over loopback TLS."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from tests.client.conftest import ConnectTo
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App, default_app
from zcproto.app.context import Context
from zcproto.client import client as client_module
from zcproto.client.client import connect, default_client
from zcproto.client.dial import _resources
from zcproto.client.handlers import Event
from zcproto.errors import (
    ConnectionClosed,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SessionReplaced,
    TokenRevoked,
    Unauthenticated,
    Unimplemented,
)
from zcproto.sessions.token import id_from_text

DAY_MS = 86_400_000


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Run a coroutine on each kind of event loop."""

    def on_loop(work: Any) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(work, TIMEOUT))

    return on_loop


def test_call_works_on_uvloop_and_asyncio(
    run: Callable[[Any], Any], shared: ServerThread, connect_to: ConnectTo
) -> None:
    async def main() -> None:
        async with connect_to(shared) as client:
            assert await client.call("echo", x=1, y=[None, b"\x00", "\u20ac"]) == {
                "x": 1,
                "y": [None, b"\x00", "\u20ac"],
            }
            assert isinstance(await client.call("time"), int)
            assert client.welcome["server"] == "zcproto"
            assert client.session is not None
            assert client.session.user == "ada"
            (info,) = [each for each in await client.call("session.list") if each["current"]]
            assert info["id"] == client.session.id
            assert info["client"] == default_client()
        assert _resources == {}

    run(main())


def test_thousand_concurrent_calls_share_one_connection(
    run: Callable[[Any], Any], shared: ServerThread, connect_to: ConnectTo
) -> None:
    async def main() -> None:
        async with connect_to(shared) as client:
            before = shared.stats["connections_opened"]
            results = await asyncio.gather(*[client.call("echo", i=i) for i in range(1_000)])
            assert results == [{"i": i} for i in range(1_000)]
            assert shared.stats["connections_opened"] == before

    run(main())


def test_large_requests_and_answers_use_back_pressure(
    run: Callable[[Any], Any], shared: ServerThread, connect_to: ConnectTo
) -> None:
    async def main() -> None:
        async with connect_to(shared) as client:
            blob = bytes(range(256)) * 3_900
            results = await asyncio.gather(*[client.call("echo", i=i, blob=blob) for i in range(20)])
            assert all(result["blob"] == blob for result in results)
            with pytest.raises(InvalidArgument):
                await client.call("echo", blob=bytes(1_048_576))
            assert await client.call("echo", x=1) == {"x": 1}

    run(main())


async def test_client_can_be_awaited_and_closed_explicitly(
    shared: ServerThread, connect_to: ConnectTo
) -> None:
    client = await connect_to(shared)
    assert await client.call("echo", x=1) == {"x": 1}
    await client.close()
    assert repr(client) == f"Client('127.0.0.1:{shared.port}')"


async def test_a_client_that_was_never_opened_is_closed_without_ado(
    shared: ServerThread, connect_to: ConnectTo
) -> None:
    client = connect_to(shared)
    assert client.session is None
    assert client.welcome == {}
    with pytest.raises(RuntimeError, match="open the client first"):
        await client.call("echo")
    with pytest.raises(RuntimeError, match="open the client first"):
        await client.open_session()
    await client.close()


async def test_method_errors_have_the_class_of_their_code(
    shared: ServerThread, connect_to: ConnectTo
) -> None:
    async with connect_to(shared) as client:
        with pytest.raises(Unimplemented):
            await client.call("no.such.method")
        with pytest.raises(InvalidArgument, match="ms"):
            await client.call("sleep", ms=-1)
        with pytest.raises(InvalidArgument):
            await client.call("sleep", {"ms": 1, "more": 2})
        with pytest.raises(NotFound):
            await client.call("session.revoke", id="unknown")


async def test_public_methods_need_no_session(shared: ServerThread, connect_to: ConnectTo) -> None:
    async with connect_to(shared, user=None) as client:
        assert "methods" in await client.call("server.info")
        with pytest.raises(Unauthenticated):
            await client.call("echo")


async def test_wrong_key_raises_unauthenticated(shared: ServerThread, connect_to: ConnectTo) -> None:
    with pytest.raises(Unauthenticated):
        await connect_to(shared, key="wrong")
    assert _resources == {}


async def test_timed_out_call_is_cancelled_on_the_server(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    async with connect_to(server) as client:
        slow = asyncio.create_task(client.call("sleep", ms=400))
        with pytest.raises(DeadlineExceeded):
            await client.call("sleep", ms=3_600_000, timeout=0.05)
        assert await slow == {}
        await asyncio.to_thread(server.until, lambda: server.server.state.tasks.running == 0)


async def test_cancelled_call_is_cancelled_on_the_server(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    async with connect_to(server) as client:
        call = asyncio.create_task(client.call("sleep", ms=3_600_000))
        while server.stats["running"] == 0:  # noqa: ASYNC110 - it is in another thread
            await asyncio.sleep(0.005)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while server.stats["running"]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert await client.call("echo", x=1) == {"x": 1}


async def test_sixth_session_is_refused_or_replaces_the_oldest(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve(sessions__per_user=2)
    async with connect_to(server), connect_to(server):
        with pytest.raises(ResourceExhausted) as caught:
            await connect_to(server)
        assert caught.value.details == {"limit": 2}
    async with connect_to(server):  # both clients ended their sessions
        pass


async def test_replaced_session_stops_reconnect(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve(sessions__per_user=1, sessions__when_full="evict_oldest")
    async with connect_to(server) as first:
        async with connect_to(server) as second:
            assert await anext(first.events) == Event(
                "session.revoked", {"reason": "replaced by a newer session"}
            )
            for _ in range(2):
                with pytest.raises(SessionReplaced):
                    await first.call("echo")
            assert await second.call("echo", x=1) == {"x": 1}
        await first.open_session()
        assert await first.call("echo", x=1) == {"x": 1}


async def test_revoked_session_raises_token_revoked(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    seen: list[Event] = []
    async with connect_to(server, on_event=seen.append) as first, connect_to(server) as second:
        assert first.session is not None
        await second.call("session.revoke", id=first.session.id)
        while first.session is not None:  # noqa: ASYNC110 - the event, then the client's request
            await asyncio.sleep(0.005)
        assert [event.name for event in seen] == ["session.revoked"]
        with pytest.raises(TokenRevoked):
            await first.call("echo")


async def test_session_that_the_store_has_lost_is_replaced_for_a_connected_client(
    serve: Serve, connect_to: ConnectTo
) -> None:
    server = serve()
    async with connect_to(server) as client:
        assert client.session is not None
        lost = client.session.id
        forgotten = id_from_text(lost)
        assert forgotten is not None
        assert server.in_loop(lambda: server.server.state.registry.forget(forgotten))
        assert await asyncio.gather(*(client.call("echo", n=n) for n in range(5))) == [
            {"n": n} for n in range(5)
        ]
        assert client.session.id != lost
        assert server.in_loop(lambda: len(server.server.state.registry)) == 1


async def test_draining_server_answers_calls_in_flight(serve: Serve, connect_to: ConnectTo) -> None:
    app, go_on = App(), asyncio.Event()

    @app.method("wait")
    async def wait() -> int:
        await go_on.wait()
        return 1

    server = serve(app)
    async with connect_to(server) as client:
        call = asyncio.create_task(client.call("wait"))
        while server.stats["running"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        server.begin_drain(TIMEOUT)
        server.in_loop(go_on.set)
        assert await call == 1


async def test_client_reconnects_to_restarted_server(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    async with connect_to(server) as client:
        await client.call("echo")
        port = server.port
        await asyncio.to_thread(server.drain)
        await asyncio.to_thread(serve, server__port=port)
        assert await client.call("echo", x=1) == {"x": 1}  # with another session: the server stored none


async def test_server_clock_jump_past_expiry_renews_the_session(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    async with connect_to(server) as client:
        first = client.session
        assert first is not None
        server.clock.ahead_ms = 25 * 3_600_000
        assert await client.call("echo", x=1) == {"x": 1}
        second = client.session
        assert second is not None
        assert second.id == first.id  # refreshed, not reopened
        assert second.token != first.token


async def test_failing_on_event_is_logged_without_the_token(
    serve: Serve, connect_to: ConnectTo, caplog: pytest.LogCaptureFixture
) -> None:
    app = App()

    @app.method("tell")
    def tell(context: Context) -> None:
        context.send_event("news", "tea")

    second = asyncio.Event()
    seen: list[str] = []

    def on_event(event: Event) -> None:
        seen.append(event.name)
        if len(seen) == 2:
            second.set()
        raise ValueError(f"no place for {event.data}")

    def on_connected(_: object) -> None:
        raise ValueError("too early")

    async with connect_to(serve(app), on_event=on_event, on_connected=on_connected) as client:
        for _ in range(2):
            await client.call("tell")
        await second.wait()
        first, text, _ = [record.getMessage() for record in caplog.records]
        assert first.startswith("on_connected failed\n")
        assert text.startswith("on_event failed\nTraceback (most recent call last):\n")
        assert text.endswith("ValueError: no place for tea")


async def test_application_events_reach_the_client(serve: Serve, connect_to: ConnectTo) -> None:
    app = App()

    @app.method("poke")
    def poke(context: Context) -> bool:
        return context.send_event("poked", {"n": 1})

    server = serve(app)
    async with connect_to(server) as client:
        assert await client.call("poke") is True
        assert await anext(client.events) == Event("poked", {"n": 1})
    assert [event async for event in client.events] == []


async def test_call_waits_for_reconnect(serve: Serve, connect_to: ConnectTo) -> None:
    server = serve()
    async with connect_to(server, user=None) as client:
        port = server.port
        await asyncio.to_thread(server.drain)
        call = asyncio.create_task(client.call("server.info"))
        await asyncio.to_thread(serve, server__port=port)
        assert "methods" in await call


async def test_close_fails_calls_in_flight(shared: ServerThread, connect_to: ConnectTo) -> None:
    client = await connect_to(shared)
    call = asyncio.create_task(client.call("sleep", ms=3_600_000))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ConnectionClosed):
        await call


async def test_closed_client_leaves_no_resources(shared: ServerThread, connect_to: ConnectTo) -> None:
    client = await connect_to(shared)
    await client.call("echo")
    link = weakref.ref(client._connections)
    await client.close()
    del client
    gc.collect()
    assert link() is None
    assert _resources == {}


async def test_client_connects_without_a_home_folder(
    shared: ServerThread, connect_to: ConnectTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCPROTO_HOME", "~unknown-user/x")
    async with connect_to(shared) as client:
        assert await client.call("echo", x=1) == {"x": 1}


def test_default_client_is_product_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    default_client.cache_clear()
    assert default_client().startswith("zcproto-python/")

    def missing(name: str) -> str:
        raise client_module.metadata.PackageNotFoundError

    monkeypatch.setattr(client_module.metadata, "version", missing)
    default_client.cache_clear()
    assert default_client() == "zcproto-python/0"
    default_client.cache_clear()


def test_repr_of_client_contains_no_key() -> None:
    assert "secret" not in repr(connect("localhost", user="ada", key="secret"))
    assert "secret" not in repr(vars(connect("localhost", user="ada", key="secret")))


def test_built_in_application_has_the_called_methods() -> None:
    assert {method.name for method in default_app()} >= {"echo", "sleep", "time"}
