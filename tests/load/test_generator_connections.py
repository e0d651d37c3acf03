"""Connections of the generator that fail or end early."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import until
from tests.load.helpers import all_phases, app_with, share
from tests.server.conftest import Serve
from tests.server.helpers import KEY
from zcproto.app.app import Method
from zcproto.load import generator as module
from zcproto.load.generator import Generator, PendingRequest, Stage, code_name
from zcproto.load.record import RequestKind

# --- connections that cannot be made ----------------------------------------------------------------------


async def test_wrong_key_gets_no_session(serve: Serve) -> None:
    credentials = [["user-1", KEY], ["user-2", "wrong"], ["user-3", KEY], ["user-4", KEY]]
    generator = Generator(share(serve(), credentials=credentials), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_connections == {"no session: UNAUTHENTICATED": 1}
    assert generator.record.tallies[RequestKind.OPEN].errors == {"UNAUTHENTICATED": 1}
    assert generator.record.tallies[RequestKind.LAST].equal == 3
    assert "wrong" not in str(generator.record.as_json())


@pytest.mark.parametrize("arrival_rate", [1e6, 20.0])
async def test_connections_that_share_a_refused_session_fail(arrival_rate: float, serve: Serve) -> None:
    credentials = [["user-1", "wrong"]]
    crowd = share(serve(), connections=3, credentials=credentials, arrival_rate=arrival_rate)
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.lost_connections == {
        "no session: UNAUTHENTICATED": 1,
        "its session could not be opened": 2,
    }
    await generator.close()


async def test_shared_session_with_wrong_answer_is_not_joined(serve: Serve) -> None:
    def echo(**params: Any) -> dict[str, Any]:
        return {}

    crowd = share(serve(app_with(echo)), connections=2, credentials=[["user-1", KEY]])
    generator = Generator(crowd, asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.lost_connections == {"its first answer differs from the request": 1}
    await generator.close()


async def test_session_open_without_token_fails(serve: Serve) -> None:
    server = serve()
    opening = Method("session.open", lambda **params: {"token": b"short"}, public=True)
    server.in_loop(lambda: server.server.state.methods.update({"session.open": opening}))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    assert generator.record.tallies[RequestKind.OPEN].unequal == 4
    assert generator.record.lost_connections == {"the answer to session.open has no token": 4}
    await generator.close()


async def test_connection_lost_before_its_session_is_counted(serve: Serve) -> None:
    server = serve()

    def hang_up(**params: Any) -> None:
        for each in [*server.server.state.connections]:
            each.abort("test")

    opening = Method("session.open", hang_up, public=True)
    server.in_loop(lambda: server.server.state.methods.update({"session.open": opening}))
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    assert sum(generator.record.lost_connections.values()) == 4
    assert generator.record.ready == 0
    assert generator.record.connected_over_time == {}
    await generator.close()


async def test_connection_lost_while_waiting_does_not_join(serve: Serve) -> None:
    crowd = share(serve(), connections=2, credentials=[["user-1", KEY]])
    generator = Generator(crowd, asyncio.get_running_loop())
    owner, other = generator.connections
    generator._joining[0] = [other]
    generator._fail(other, "truncated")
    generator._handle_opened(owner, PendingRequest(RequestKind.OPEN, 0, 0.0, 0.0), {"token": b"t" * 32})
    assert generator.record.ready == 1
    assert generator.record.tallies[RequestKind.JOIN].planned == 0
    await generator.close()


async def test_refused_connections_are_counted(serve: Serve) -> None:
    server = serve()
    port = server.port
    await asyncio.to_thread(server.drain)
    nowhere = share(server=None, port=port, connections=2, credentials=[["user-1", KEY]] * 2)
    generator = Generator(nowhere, asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_connections == {"TCP: Connection refused": 2}


async def test_untrusted_server_gets_no_requests(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server=None, port=server.port), asyncio.get_running_loop())
    await all_phases(generator)
    assert generator.record.lost_connections == {"TLS: certificate_untrusted": 4}
    assert server.stats["connections_opened"] == 0


@pytest.fixture
def silent() -> Iterator[int]:
    """Return a port whose connections are never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_silent_server_times_out(silent: int) -> None:
    part = share(server=None, port=silent, connect_timeout_s=0.2)
    generator = Generator(part, asyncio.get_running_loop())
    await all_phases(generator)
    assert sum(generator.record.lost_connections.values()) == 4
    assert generator.record.lost_connections.keys() <= {
        *("TLS: handshake_timeout", "no session in time"),
        "no TCP connection in time",  # on a busy machine
    }


async def test_tcp_connect_timeout_is_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(share(serve(), connect_timeout_s=0.1), asyncio.get_running_loop())
    loop = asyncio.get_running_loop()

    async def never(*_: Any, **__: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(loop, "create_connection", never)
    await generator.connect()
    assert sum(generator.record.lost_connections.values()) == 4
    await generator.close()


async def test_concurrent_connects_are_limited(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTING", 2)
    generator = Generator(share(serve(), connections=9, arrival_rate=1e6,
                                credentials=[["user-1", KEY]] * 9), asyncio.get_running_loop())  # fmt: skip
    most = 0
    connect = generator._open

    async def watched(connection: Any) -> None:
        nonlocal most
        most = max(most, len(generator._connecting))
        await connect(connection)

    monkeypatch.setattr(generator, "_open", watched)
    await generator.connect()
    assert (generator.record.ready, most) == (9, 2)
    # The delay of those that had to wait is measured.
    assert generator.record.latencies["arrival_lag"].max_us > 500
    await generator.close()


# --- ending early ---------------------------------------------------------------------------------------


async def test_stopped_load_closes_its_sessions(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server, duration_s=60.0), asyncio.get_running_loop())
    await generator.connect()
    load = asyncio.create_task(generator.load())
    await until(lambda: generator.record.tallies[RequestKind.LOAD].equal > 10)
    generator.stop()
    await load
    assert generator.record.tallies[RequestKind.LOAD].sent < 400 * 60
    await generator.close()
    assert generator.record.tallies[RequestKind.CLOSE].equal == 4
    server.until_left()
    assert server.stats["sessions"] == 0


async def test_stop_before_the_start_skips_all_phases(serve: Serve) -> None:
    server = serve()
    generator = Generator(share(server), asyncio.get_running_loop())
    generator.stop()
    await generator.connect()
    assert generator.record.ready == 0
    await generator.close()
    generator = Generator(share(server), asyncio.get_running_loop())
    await generator.connect()
    generator.stop()
    await generator.load()
    await generator.verify()
    assert generator.record.requests_sent == 4
    await generator.close()
    assert generator.record.tallies[RequestKind.CLOSE].equal == 4


async def test_connect_phase_can_be_stopped(serve: Serve) -> None:
    server = serve()
    slow = share(server, connections=1_000, arrival_rate=10.0, credentials=[["user-1", KEY]] * 1_000)
    generator = Generator(slow, asyncio.get_running_loop())
    connect = asyncio.create_task(generator.connect())
    await until(lambda: generator.record.ready >= 2)
    generator.stop()
    await connect
    assert generator.record.ready < 1_000
    await generator.close()
    server.until_left()


async def test_connection_made_after_close_is_closed(serve: Serve) -> None:
    server = serve()
    generator = Generator(
        share(server, connections=1, credentials=[["user-1", KEY]]), asyncio.get_running_loop()
    )
    (connection,) = generator.connections
    generator._arrive(connection, 0.0)
    connection.close()
    generator._fail(connection, "no session in time")
    await until(lambda: server.stats["handshakes_completed"] == 1)
    await generator.close()
    server.until_left()
    assert connection.stage is Stage.OVER
    assert generator.record.latencies["handshake"].total == 0


def test_unknown_code_is_shown_by_number() -> None:
    assert code_name(16) == "UNAUTHENTICATED"
    assert code_name(99) == "CODE_99"
