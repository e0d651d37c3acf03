from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from tests.load.conftest import Serve
from tests.load.helpers import OPERATOR
from tests.server.helpers import KEY, ServerThread
from zcproto.errors import ConfigError, ConnectionClosed, TlsError, ZcprotoError
from zcproto.load import caller as module
from zcproto.load.plan import Credential
from zcproto.load.stats import Operator, Stats


async def connect(server: ServerThread, credential: Credential = OPERATOR) -> Operator:
    ca_file = server.home / "certs" / "ca.crt"
    return await Operator.connect("127.0.0.1", "127.0.0.1", server.port, ca_file, credential)


async def test_the_operator_reads_the_servers_own_count(serve: Serve) -> None:
    server = serve()
    operator = await connect(server)
    figures = await operator.stats()
    assert (figures.connections, figures.sessions, figures.handshakes) == (1, 1, 1)
    asked = operator.asked
    again = await operator.stats()
    assert again.requests - figures.requests == operator.asked - asked == 1
    assert figures.cpu_s > 0
    assert figures.rss_bytes > 1_000_000
    await operator.leave()
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_a_user_who_is_no_operator_is_told_how_to_make_one(serve: Serve) -> None:
    server = serve()
    with pytest.raises(ConfigError, match="zcproto user add ops --operator"):
        await connect(server, Credential("somebody", KEY))
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_a_wrong_key_is_told_without_showing_it(serve: Serve) -> None:
    server = serve()
    with pytest.raises(ConfigError, match="'operator' got no session: UNAUTHENTICATED") as caught:
        await connect(server, Credential("operator", "not-the-key"))
    assert "not-the-key" not in str(caught.value)
    server.until_left()


async def test_nobody_listening_is_a_closed_connection(serve: Serve) -> None:
    server = serve()
    port = server.port
    await asyncio.to_thread(server.drain)
    with pytest.raises(ConnectionClosed, match=f"127.0.0.1:{port}: Connection refused"):
        await Operator.connect("127.0.0.1", "127.0.0.1", port, None, OPERATOR)


async def test_a_server_that_is_not_trusted_is_a_tls_error(serve: Serve) -> None:
    server = serve()
    with pytest.raises(TlsError) as caught:
        await Operator.connect("127.0.0.1", "127.0.0.1", server.port, None, OPERATOR)
    assert caught.value.failure == "certificate_untrusted"


@pytest.fixture
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_a_server_that_says_nothing_is_not_waited_for_too_long(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with pytest.raises((ConnectionClosed, TlsError), match=r"does not answer|in time"):
        await Operator.connect("127.0.0.1", "127.0.0.1", silent, None, OPERATOR)


async def test_a_server_that_ends_fails_what_was_asked_of_it(serve: Serve) -> None:
    server = serve()
    operator = await connect(server)
    asked = asyncio.create_task(operator.call("sleep", {"ms": 60_000}))
    await asyncio.sleep(0)
    await asyncio.to_thread(server.until, lambda: server.server.state.tasks.running == 1)
    await asyncio.to_thread(server.in_loop, lambda: next(iter(server.server.state.connections)).abort("test"))
    with pytest.raises(ConnectionClosed, match="the operator's connection is gone"):
        await asked
    with pytest.raises(ZcprotoError):
        await operator.stats()
    await operator.leave()  # there is nobody left to ask


async def test_an_answer_that_does_not_come_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = await connect(serve())
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with pytest.raises(ConnectionClosed, match="no answer to sleep"):
        await operator.call("sleep", {"ms": 200})
    monkeypatch.setattr(module, "TIMEOUT", 5.0)
    await operator.call("sleep", {"ms": 200})  # the answer that came too late is not taken for this one
    await operator.leave()


async def test_leaving_a_server_that_does_not_answer_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    operator = await connect(server)
    monkeypatch.setattr(module, "TIMEOUT", 0.0)
    await operator.leave()
    server.until_left()


async def test_answers_that_nobody_waits_for_are_dropped(serve: Serve) -> None:
    operator = await connect(serve())
    operator.answered(4711, {})
    operator.refused(4711, 13, "internal", {})
    await operator.leave()


@pytest.mark.parametrize("value", [None, {}, {"connections": 1}, {"connections": "many"}])
def test_figures_of_another_kind_of_server_are_refused(value: object) -> None:
    with pytest.raises(ZcprotoError, match="does not tell what is needed"):
        Stats.of(value)
