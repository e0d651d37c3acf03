"""Tests of the drain: GOAWAY, running methods, close_notify, and nothing left behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from tests.limits import TIMEOUT
from tests.server.helpers import (
    ERROR,
    GOAWAY,
    PONG,
    RESPONSE,
    ServerThread,
    client_context,
    configuration,
    eventually,
    read_to_end,
)
from zcproto.app.app import App
from zcproto.app.authentication import CallableAuthenticator
from zcproto.app.context import Context
from zcproto.auth.identity import Identity
from zcproto.errors import Code
from zcproto.runtime import server as server_module
from zcproto.runtime.server import Server

Serve = Callable[..., ServerThread]


class WaitingMethods:
    """Methods that wait until the test releases them."""

    def __init__(self) -> None:
        self.app = App()
        self.running: list[asyncio.Future[str]] = []
        self.cancelled = 0
        self.contexts: list[Context] = []
        self.app.method("echo")(lambda **params: params)
        self.app.method("wait")(self.wait)
        self.app.method("stubborn")(self.stubborn)

    async def wait(self, context: Context) -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.contexts.append(context)
        self.running.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def stubborn(self) -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running.append(future)
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError:
                self.cancelled += 1
        return future.result()


@pytest.fixture
def methods() -> WaitingMethods:
    return WaitingMethods()


@pytest.fixture(params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, serve: Serve, methods: WaitingMethods) -> ServerThread:
    loop_factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
    return serve(methods.app, loop_factory=loop_factory)


def test_drain_closes_idle_clients_with_goaway_and_close_notify(server: ServerThread) -> None:
    clients = [server.client("ada") for _ in range(3)] + [server.client()]
    server.begin_drain(TIMEOUT)
    for client in clients:
        frames, how = client.rest_until_closed()
        assert [frame.kind for frame in frames] == [GOAWAY]
        assert frames[0].value == {"reason": "draining", "retry_after_ms": 1_000}
        assert how == "close_notify"
        client.close()
    server.join()
    assert server.server.state.counters.connections_ended == {"draining": 4}


def test_drain_sends_goaway_in_several_turns(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.server.state.CONNECTIONS_PER_TURN", 2)
    clients = [server.client() for _ in range(5)]
    server.begin_drain(TIMEOUT)
    for client in clients:
        assert client.rest_until_closed()[0][0].kind == GOAWAY
        client.close()
    server.join()


def test_drain_waits_for_running_methods(server: ServerThread, methods: WaitingMethods) -> None:
    with server.client("ada") as client:
        client.send(client.request("wait"), client.request("wait"))
        eventually(lambda: len(methods.running) == 2)
        server.begin_drain(TIMEOUT)
        assert client.receive().kind == GOAWAY
        # New requests are refused; running ones continue.
        refused = client.refused("echo")
        assert refused.code == Code.UNAVAILABLE
        assert refused.details == {"retry_after_ms": 1_000}
        server.in_loop(lambda: methods.running[0].set_result("first"))
        assert client.answer().value == "first"
        client.send(client.frame(6))
        assert client.receive().kind == PONG
        server.in_loop(lambda: methods.running[1].set_result("second"))
        frames, how = client.rest_until_closed()
        assert [frame.value for frame in frames] == ["second"]
        assert how == "close_notify"
    server.join()
    assert methods.cancelled == 0


def test_request_cancelled_during_drain_ends_the_connection(
    server: ServerThread, methods: WaitingMethods
) -> None:
    with server.client("ada") as client:
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        server.begin_drain(TIMEOUT)
        assert client.receive().kind == GOAWAY
        client.cancel(client.stream)
        frames, how = client.rest_until_closed()
        assert [frame.code for frame in frames] == [Code.CANCELLED]
        assert how == "close_notify"
    server.join()


def test_method_over_the_drain_limit_is_cancelled(server: ServerThread, methods: WaitingMethods) -> None:
    with server.client("ada") as client, server.client("eve") as idle:
        client.send(client.request("wait"), client.request("wait"))
        eventually(lambda: len(methods.running) == 2)
        server.begin_drain(0.05)
        assert [frame.kind for frame in idle.rest_until_closed()[0]] == [GOAWAY]
        frames, how = client.rest_until_closed()
        assert [frame.kind for frame in frames] == [GOAWAY, ERROR, ERROR]
        assert {frame.code for frame in frames[1:]} == {Code.CANCELLED}
        assert {frame.stream for frame in frames[1:]} == {client.stream - 1, client.stream}
        assert how == "close_notify"
        assert [context.cancelled for context in methods.contexts] == [True, True]
    server.join()
    assert methods.cancelled == 2
    ended = server.server.state.counters.connections_ended
    assert ended == {"draining": 1, "drain_timeout": 1}


def test_server_that_leaves_serves_on_and_lets_its_clients_connect_again_at_once(
    server: ServerThread, methods: WaitingMethods
) -> None:
    with server.client("ada") as client, server.client() as idle:
        server.in_loop(server.server.leave)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        assert client.call("echo", {"x": 1}) == {"x": 1}
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        server.begin_drain(TIMEOUT)
        at_once = {"retry_after_ms": 0}
        assert client.receive().value == {"reason": "draining", **at_once}
        assert client.refused("echo").details == at_once
        assert [frame.value["retry_after_ms"] for frame in idle.rest_until_closed()[0]] == [0]
        server.in_loop(lambda: methods.running[0].set_result("x"))
        client.rest_until_closed()
    server.join()


async def test_leaving_before_the_start_does_nothing(home: Path) -> None:
    Server(config=configuration(home), home=home).leave()


def test_connect_during_drain_is_refused(server: ServerThread, methods: WaitingMethods) -> None:
    with server.client("ada") as client:
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        server.begin_drain(TIMEOUT)
        assert client.receive().kind == GOAWAY
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        server.in_loop(lambda: methods.running[0].set_result("x"))
        assert client.answer().kind == RESPONSE
        client.rest_until_closed()
    server.join()


def test_handshake_finished_during_drain_gets_goaway(server: ServerThread, methods: WaitingMethods) -> None:
    context = client_context(server.home / "certs" / "ca.crt")
    with server.client("ada") as client, server.tcp() as raw:
        server.until(lambda: server.server.parts.listener.connections == 2)
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        server.begin_drain(TIMEOUT)
        assert client.receive().kind == GOAWAY
        with context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as late:
            data = b""
            while piece := late.recv(65_536):  # ends with close_notify
                data += piece
            assert b"draining" in data
        server.in_loop(lambda: methods.running[0].set_result("x"))
        client.rest_until_closed()
    server.join()


def test_session_opened_during_a_drain_does_not_fail_its_end(serve: Serve) -> None:
    logins: list[asyncio.Future[Identity]] = []

    async def log_in() -> Identity:
        logins.append(asyncio.get_running_loop().create_future())
        return await logins[0]

    server = serve(authenticators=[CallableAuthenticator("slow", log_in)])
    with server.client() as client:
        client.send(client.request("session.open", {"scheme": "slow"}))
        eventually(lambda: logins)
        server.begin_drain(TIMEOUT)
        assert client.receive().kind == GOAWAY
        server.in_loop(lambda: logins[0].set_result(Identity("ada")))
        assert client.answer().kind == RESPONSE
        client.rest_until_closed()
    server.join()
    assert len(server.server.parts.state.wheel) == 0


def test_unfinished_handshake_is_aborted_at_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(server_module, "LINGER_TIME", 0.0)
    with server.tcp() as raw:
        raw.sendall(b"\x16\x03\x01")
        server.until(lambda: server.server.parts.acceptor.pending.silent == 1)
        server.drain(0.0)
        assert read_to_end(raw) == (b"", "FIN")
    assert server.server.parts.listener.connections == 0
    assert len(server.server.parts.state.wheel) == 0


def test_client_without_close_notify_is_reset(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr(server_module, "LINGER_TIME", 0.0)
    client = server.client("ada")
    server.drain(0.0)  # half a second for the client's close_notify
    frames, _ = client.rest_until_closed()
    assert [frame.kind for frame in frames] == [GOAWAY]
    client.fin()
    assert server.server.parts.listener.connections == 0


def test_uncancellable_method_does_not_block_the_drain(
    server: ServerThread,
    methods: WaitingMethods,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server_module, "CANCELLED_TIME", 0.02)
    with server.client("ada") as client:
        client.send(client.request("stubborn"))
        eventually(lambda: methods.running)
        server.begin_drain(0)
        frames, how = client.rest_until_closed()
        assert [frame.kind for frame in frames] == [GOAWAY, ERROR]
        assert how == "close_notify"
    # The server ends; here the thread's loop ends with it.
    server.join()
    assert server.server.state.tasks.running == 1
    for task in asyncio.all_tasks(server.loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would report what this test is about
    assert '"event":"server.methods_stuck"' in capsys.readouterr().err


def test_concurrent_drains_are_one_drain(server: ServerThread, methods: WaitingMethods) -> None:
    with server.client("ada") as client:
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        drains = [
            asyncio.run_coroutine_threadsafe(server.server.drain(TIMEOUT), server.loop) for _ in range(2)
        ]
        assert client.receive().kind == GOAWAY
        server.in_loop(lambda: methods.running[0].set_result("x"))
        client.rest_until_closed()
    for drain in drains:
        drain.result(TIMEOUT)
    server.join()


def test_cancelled_drain_can_be_repeated(server: ServerThread, methods: WaitingMethods) -> None:
    with server.client("ada") as client:
        client.send(client.request("wait"))
        eventually(lambda: methods.running)
        first = asyncio.run_coroutine_threadsafe(server.server.drain(TIMEOUT), server.loop)
        assert client.receive().kind == GOAWAY
        first.cancel()
        server.begin_drain(0)
        assert [frame.code for frame in client.rest_until_closed()[0]] == [Code.CANCELLED]
    server.join()


# --- the server as a context manager --------------------------------------------------------------------------


async def test_server_is_an_async_context_manager(home: Path) -> None:
    async with Server(config=configuration(home), home=home) as server:
        port = server.port
        assert server.addresses == [("127.0.0.1", port)]
        assert [pin.startswith("sha256/") for pin in server.pins] == [True]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
    await server.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await server.drain()  # idempotent
    assert len(asyncio.all_tasks()) == 1


async def test_exception_in_the_body_drains_the_server(home: Path) -> None:
    server = Server(config=configuration(home), home=home)
    with pytest.raises(LookupError):
        async with server:
            raise LookupError
    await server.wait_closed()


async def test_drain_before_start_does_nothing(home: Path) -> None:
    await Server(config=configuration(home), home=home).drain()


async def test_two_servers_run_on_one_loop(home: Path) -> None:
    async with (
        Server(config=configuration(home), home=home) as first,
        Server(config=configuration(home), home=home, control=False) as second,
    ):
        assert first.port != second.port
