"""Fixtures: a real server over loopback TLS, and clients of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.helpers import KEY, ServerThread
from zcproto.client.client import Client, connect


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep known hosts out of the home folder of the user who runs the tests."""
    folder = tmp_path / "client-home"
    monkeypatch.setenv("ZCPROTO_HOME", str(folder))
    return folder


ConnectTo = Callable[..., Client]


@pytest.fixture
def connect_to() -> ConnectTo:
    """Return a factory of clients, by default with a session of ada and the server's CA."""

    def make(
        server: ServerThread, user: str | None = "ada", host: str = "127.0.0.1", **options: Any
    ) -> Client:
        if user is not None:
            options = {"user": user, "key": KEY, **options}
        if not {"ca_file", "pins", "verify", "system_store"} & options.keys():
            options["ca_file"] = server.home / "certs" / "ca.crt"
        return connect(f"{host}:{server.port}", **options)

    return make
