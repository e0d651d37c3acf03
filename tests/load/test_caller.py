"""Connections for single calls, and the operator's, which reads the server's counters."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from tests.load.helpers import OPERATOR, app_with
from tests.server.conftest import Serve
from tests.server.helpers import KEY, TIMEOUT, ServerThread
from zcproto.errors import ConfigError, ConnectionClosed, TlsError, ZcprotoError
from zcproto.load import caller as module
from zcproto.load.caller import Caller, LoadTarget, Operator, ServerStats
from zcproto.load.plan import Credential


async def test_cancelled_disconnect_closes_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_TIMEOUT", TIMEOUT)
    server = serve()
    target = LoadTarget("127.0.0.1", "127.0.0.1", server.port, server.home / "certs" / "ca.crt")
    caller = await target.caller()
    resume = threading.Event()
    server.loop.call_soon_threadsafe(resume.wait, TIMEOUT)  # the server does not close its end
    leaving = asyncio.create_task(caller.disconnect())
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await caller.disconnect()  # nothing is left to wait for
    resume.set()
    target.close()


async def test_welcome_after_cancelled_dial_is_ignored() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = LoadTarget("127.0.0.1", "127.0.0.1", silent.getsockname()[1], None)
        caller = Caller(target.wheel)
        dialing = asyncio.create_task(target.connect(caller))
        accepted, _ = await asyncio.to_thread(silent.accept)
        await asyncio.to_thread(accepted.recv, 1)  # the ClientHello
        await asyncio.sleep(0.01)  # the task waits for WELCOME
        dialing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialing
        caller.welcomed()
        accepted.close()
        target.close()


# --- the operator -----------------------------------------------------------------------------------


async def connect(server: ServerThread, credential: Credential = OPERATOR) -> Operator:
    ca_file = server.home / "certs" / "ca.crt"
    return await Operator.connect("127.0.0.1", "127.0.0.1", server.port, ca_file, credential)


async def test_operator_reads_the_server_counters(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    operator = await connect(server)
    figures = await operator.stats()
    assert (figures.connections, figures.sessions, figures.handshakes) == (1, 1, 1)
    before = operator.requests
    again = await operator.stats()
    assert again.requests - figures.requests == operator.requests - before == 1
    assert figures.cpu_s > 0
    assert figures.rss_bytes > 1_000_000
    operator.answered(4711, {})  # no call is pending with this number
    operator.refused(4711, 13, "internal", {})
    monkeypatch.setattr(module, "TIMEOUT", 0.0)
    await operator.disconnect()  # without waiting for the server
    server.until_left()
    assert server.stats["sessions"] == 0


@pytest.mark.parametrize(
    ("credential", "fault"),
    [
        (Credential("another", KEY), "zcproto user add ops --operator"),
        (Credential("operator", "not-the-key"), "'operator' got no session: UNAUTHENTICATED"),
    ],
)
async def test_user_who_is_not_operator_is_refused_without_its_key(
    serve: Serve, credential: Credential, fault: str
) -> None:
    server = serve()
    with pytest.raises(ConfigError, match=fault) as caught:
        await connect(server, credential)
    assert credential.key not in str(caught.value)
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_server_that_cannot_be_used_raises(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    port = server.port
    with pytest.raises(TlsError) as caught:
        await Operator.connect("127.0.0.1", "127.0.0.1", port, None, OPERATOR)
    assert caught.value.failure == "certificate_untrusted"
    await asyncio.to_thread(server.drain)
    with pytest.raises(ConnectionClosed, match=f"127.0.0.1:{port}: Connection refused"):
        await Operator.connect("127.0.0.1", "127.0.0.1", port, None, OPERATOR)
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises((ConnectionClosed, TlsError), match=r"does not answer|in time"),
    ):
        await Operator.connect("127.0.0.1", "127.0.0.1", silent.getsockname()[1], None, OPERATOR)


async def test_lost_connection_fails_pending_calls(serve: Serve) -> None:
    server = serve()
    operator = await connect(server)
    asked = asyncio.create_task(operator.call("sleep", {"ms": 60_000}))
    await asyncio.sleep(0)
    await asyncio.to_thread(server.until, lambda: server.server.state.tasks.running == 1)
    await asyncio.to_thread(server.in_loop, lambda: next(iter(server.server.state.connections)).abort("test"))
    with pytest.raises(ConnectionClosed, match="the operator's connection was lost"):
        await asked
    with pytest.raises(ZcprotoError):
        await operator.stats()
    await operator.disconnect()  # the server is gone


async def test_missing_answer_raises_after_the_timeout(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def echo(n: int) -> int:
        await release.wait()
        return n

    server = serve(app_with(echo))
    operator = await connect(server)
    with monkeypatch.context() as patch:
        patch.setattr(module, "TIMEOUT", 0.05)
        with pytest.raises(ConnectionClosed, match="no answer to echo"):
            await operator.call("echo", {"n": 1})
    server.in_loop(release.set)
    assert await operator.call("echo", {"n": 2}) == 2  # not confused with the late answer
    await operator.disconnect()


@pytest.mark.parametrize("value", [None, {}, {"connections": 1}, {"connections": "many"}])
def test_stats_with_missing_counters_are_refused(value: object) -> None:
    with pytest.raises(ZcprotoError, match="lacks a counter"):
        ServerStats.parse(value)
