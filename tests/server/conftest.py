from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.helpers import Client, ServerThread
from zcproto.app.app import App
from zcproto.certs import authority, managed
from zcproto.certs.managed import ManagedSettings


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of managed certificates to copy. Its CA has 2048 bits, because 4096 take a second."""
    folder = tmp_path_factory.mktemp("own") / "certs"
    settings = ManagedSettings(
        names=(),
        key_types=("ecdsa-p256",),
        lifetime=timedelta(days=90),
        renew_before=timedelta(days=30),
        renew_key=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        managed.ensure(folder, settings, datetime.now(UTC))
    return folder


Serve = Callable[..., ServerThread]


@pytest.fixture
def serve(tmp_path: Path, certs: Path) -> Iterator[Serve]:
    """Return a function that starts a server, which is drained at the end of the test."""
    with ExitStack() as stack:

        def start(app: App | None = None, **options: Any) -> ServerThread:
            return stack.enter_context(ServerThread(tmp_path / "home", certs, app, **options))

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[ServerThread]:
    """Start one server for all tests of a module that do not change it."""
    with ServerThread(tmp_path_factory.mktemp("shared") / "home", certs) as server:
        yield server


@pytest.fixture
def connect(shared: ServerThread) -> Iterator[Callable[..., Client]]:
    """Connects to a server that all tests share; each test has its own users."""
    with ExitStack() as stack:
        yield lambda user=None, **options: stack.enter_context(shared.client(user, **options))


@pytest.fixture
def user(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)
