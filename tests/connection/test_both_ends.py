"""Test a client connection against a server connection."""

from __future__ import annotations

import pytest

from tests.helpers import NOW, SALT, WALL, small_registry, with_requests
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import GoAwayReceived, ResponseReceived, Welcomed
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.wire.message import encode_body


@pytest.fixture
def ends() -> tuple[ClientConnection, ServerConnection]:
    server = ServerConnection(ConnectionSettings(), small_registry(), salt=SALT, wall=WALL, now=NOW)
    client = ClientConnection()
    assert [type(event) for event in client.receive_data(server.data_to_send(), WALL, NOW)] == [Welcomed]
    return client, server


def test_client_and_server_exchange_request_response_and_goaway(
    ends: tuple[ClientConnection, ServerConnection],
) -> None:
    client, server = ends
    stream = client.request("echo", {"x": 1}, wall=WALL)
    client.ping(WALL)
    events = with_requests(server.receive_data(client.data_to_send(), WALL, NOW))
    request = next(events)
    server.respond(request, encode_body(request.params), WALL)
    assert list(events) == []
    server.go_away("draining", 5, WALL)
    assert list(client.receive_data(server.data_to_send(), WALL, NOW)) == [
        ResponseReceived(stream, {"x": 1}),
        GoAwayReceived("draining", 5),
    ]
