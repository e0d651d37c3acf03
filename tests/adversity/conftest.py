from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adversity.helpers import Bystander, undisturbed_bystander
from tests.server.helpers import Client, ServerThread
from zcproto.app.app import App, default_app

SETTINGS: dict[str, Any] = {"limits__write_buffer_bytes": 65_536, "limits__max_streams": 16}


def application() -> App:
    app = default_app()

    @app.method("big")
    def big(size: int) -> bytes:
        return bytes(size)

    return app


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[ServerThread]:
    """Start one server for all tests of a module."""
    home = tmp_path_factory.mktemp("adversity") / "home"
    with ServerThread(home, certs, application(), **SETTINGS) as server:
        yield server


@pytest.fixture(autouse=True)
def bystander(request: pytest.FixtureRequest) -> Iterator[Bystander | None]:
    """Check that each test disturbs no other connection and leaks nothing."""
    if "server" not in request.fixturenames:
        yield None
        return
    server: ServerThread = request.getfixturevalue("server")
    with undisturbed_bystander(server) as bystander:
        yield bystander


@pytest.fixture
def connect(server: ServerThread) -> Iterator[Callable[..., Client]]:
    """Return a function that opens connections; they are closed at the end of the test."""
    clients: list[Client] = []

    def connect(user: str | None = None, **options: Any) -> Client:
        clients.append(server.client(user, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
