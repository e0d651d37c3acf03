from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.certs import authority, managed
from zcproto.certs.managed import ManagedSettings
from zcproto.load import generator

Serve = Callable[..., ServerThread]


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of managed certificates to copy. Its CA has 2048 bits, because 4096 take a second."""
    folder = tmp_path_factory.mktemp("bench") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        managed.ensure(
            folder,
            ManagedSettings(
                names=(),
                key_types=("ecdsa-p256",),
                lifetime=timedelta(days=90),
                renew_before=timedelta(days=30),
                renew_key=False,
            ),
            datetime.now(UTC),
        )
    return folder


@pytest.fixture
def serve(tmp_path: Path, certs: Path) -> Iterator[Serve]:
    """Start a server for an application and stop it after the test."""
    with ExitStack() as stack:

        def start(app: App | None = None, **options: Any) -> ServerThread:
            return stack.enter_context(ServerThread(tmp_path / "home", certs, app, **options))

        yield start


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeouts of the generator."""
    monkeypatch.setattr(generator, "ANSWER_TIMEOUT", 0.3)
    monkeypatch.setattr(generator, "CLOSE_TIMEOUT", 3.0)
