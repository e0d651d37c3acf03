"""The generator's connections: those that cannot be made, and those that end early."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.load.conftest import Serve
from tests.load.helpers import all_phases, app_with, share, until
from tests.server.helpers import KEY
from zcproto.app.app import Method
from zcproto.load import generator as module
from zcproto.load.generator import Generator, code_name
from zcproto.load.load_link import Asked, Stage
from zcproto.load.tally import Kind

pytestmark = pytest.mark.usefixtures("short_limits")


# --- connections that cannot be made ----------------------------------------------------------------------


async def test_a_wrong_key_is_no_session(serve: Serve) -> None:
    credentials = [["user-1", KEY], ["user-2", "wrong"], ["user-3", KEY], ["user-4", KEY]]
    generator = Generator(share(serve(), credentials=credentials), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_links == {"no session: UNAUTHENTICATED": 1}
    assert generator.record.tallies[Kind.OPEN].errors == {"UNAUTHENTICATED": 1}
    assert generator.record.tallies[Kind.LAST].equal == 3
    assert "wrong" not in str(generator.record.as_json())


@pytest.mark.parametrize("arrival_rate", [1e6, 20.0])
async def test_who_would_share_a_session_that_is_refused_has_none(arrival_rate: float, serve: Serve) -> None:
    credentials = [["user-1", "wrong"]]
    crowd = share(serve(), connections=3, credentials=credentials, arrival_rate=arrival_rate)
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.lost_links == {
        "no session: UNAUTHENTICATED": 1,
        "its session could not be opened": 2,
    }
    await generator.close()


async def test_a_shared_session_that_echoes_wrongly_is_not_joined(serve: Serve) -> None:
    def echo(**params: Any) -> dict[str, Any]:
        return {}

    crowd = share(serve(app_with(echo)), connections=2, credentials=[["user-1", KEY]])
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.lost_links == {"the first answer was not what was sent": 1}
    await generator.close()


async def test_a_session_without_a_token_is_none(serve: Serve) -> None:
    server = serve()
    opening = Method("session.open", lambda **params: {"token": b"short"}, public=True)
    server.in_loop(lambda: server.server.state.methods.update({"session.open": opening}))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.tallies[Kind.OPEN].unequal == 4
    assert generator.record.lost_links == {"session.open was answered with no token": 4}
    await generator.close()


async def test_a_connection_lost_before_its_session_is_told(serve: Serve) -> None:
    server = serve()

    def hang_up(**params: Any) -> None:
        for each in [*server.server.state.connections]:
            each.abort("test")

    opening = Method("session.open", hang_up, public=True)
    server.in_loop(lambda: server.server.state.methods.update({"session.open": opening}))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    assert sum(generator.record.lost_links.values()) == 4
    assert generator.record.ready == 0
    assert generator.record.connected_over_time == {}
    await generator.close()


async def test_who_was_lost_while_waiting_for_a_session_does_not_use_it(serve: Serve) -> None:
    crowd = share(serve(), connections=2, credentials=[["user-1", KEY]])
    generator = Generator(crowd, asyncio.get_running_loop())
    owner, other = generator.links
    generator._joining[0] = [other]
    generator._not_made(other, "truncated")
    generator._opened(owner, Asked(Kind.OPEN, 0, 0.0, 0.0), {"token": b"t" * 32})
    assert generator.record.ready == 1
    assert generator.record.tallies[Kind.JOIN].planned == 0
    await generator.close()


async def test_nobody_listening_is_told(serve: Serve) -> None:
    server = serve()
    port = server.port
    await asyncio.to_thread(server.drain)
    nowhere = share(server=None, port=port, connections=2, credentials=[["user-1", KEY]] * 2)
    generator = Generator(nowhere, asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_links == {"TCP: Connection refused": 2}


async def test_a_server_that_is_not_trusted_is_not_talked_to(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server=None, port=server.port), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_links == {"TLS: certificate_untrusted": 4}
    assert server.stats["connections_opened"] == 0


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose backlog takes connections that nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_a_server_that_says_nothing_is_not_waited_for_too_long(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    generator = Generator(share(server=None, port=silent), asyncio.get_running_loop())
    await all_phases(generator)
    assert sum(generator.record.lost_links.values()) == 4
    assert generator.record.lost_links.keys() <= {"TLS: handshake_timeout", "no session in time"}


async def test_a_tcp_connection_that_is_never_made_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.1)
    generator = Generator(share(serve()), asyncio.get_running_loop())
    loop = asyncio.get_running_loop()

    async def never(*_: Any, **__: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(loop, "create_connection", never)
    await generator.connect()
    assert sum(generator.record.lost_links.values()) == 4
    await generator.close()


async def test_no_more_connections_are_made_at_once_than_allowed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTING", 2)
    generator = Generator(share(serve(), connections=9, arrival_rate=1e6,
                                credentials=[["user-1", KEY]] * 9), asyncio.get_running_loop())  # fmt: skip
    most = 0
    connect = generator._open

    async def watched(link: Any) -> None:
        nonlocal most
        most = max(most, len(generator._connecting))
        await connect(link)

    monkeypatch.setattr(generator, "_open", watched)
    await generator.connect()
    assert (generator.record.ready, most) == (9, 2)
    # Who had to wait was late, and that is not hidden.
    assert generator.record.latencies["arrival_lag"].max_us > 500
    await generator.close()


# --- ending early ---------------------------------------------------------------------------------------


async def test_a_load_can_be_stopped_and_what_was_opened_is_closed(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server, duration_s=60.0), asyncio.get_running_loop())
    await generator.connect()
    load = asyncio.create_task(generator.load())
    await until(lambda: generator.record.tallies[Kind.LOAD].equal > 10)
    generator.stop()
    await load
    assert generator.record.tallies[Kind.LOAD].sent < 1000
    await generator.close()
    assert generator.record.tallies[Kind.CLOSE].equal == 4
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_what_is_stopped_before_it_begins_does_nothing(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    generator.stop()
    await generator.connect()
    assert generator.record.ready == 0
    generator._stopped = False
    await generator.connect()
    generator.stop()
    await generator.load()
    await generator.verify()
    assert generator.record.requests_sent == 4
    await generator.close()
    assert generator.record.tallies[Kind.CLOSE].equal == 4


async def test_connecting_can_be_stopped(serve: Serve) -> None:
    server = serve()
    slow = share(server, connections=100, arrival_rate=50.0, credentials=[["user-1", KEY]] * 100)
    generator = Generator(slow, asyncio.get_running_loop())
    connect = asyncio.create_task(generator.connect())
    await until(lambda: generator.record.ready == 2)
    generator.stop()
    await connect
    assert generator.record.ready < 50
    await generator.close()
    server.until_left()


async def test_a_connection_that_is_made_after_the_end_is_closed(serve: Serve) -> None:
    server = serve()
    generator = Generator(
        share(server, connections=1, credentials=[["user-1", KEY]]), asyncio.get_running_loop()
    )
    (link,) = generator.links
    generator._arrive(link, 0.0)
    link.close()
    generator._not_made(link, "no session in time")
    await until(lambda: server.stats["handshakes_completed"] == 1)
    await generator.close()
    server.until_left()
    assert link.stage is Stage.OVER
    assert generator.record.latencies["handshake"].total == 0


def test_an_unknown_code_keeps_its_number() -> None:
    assert code_name(16) == "UNAUTHENTICATED"
    assert code_name(99) == "CODE_99"
