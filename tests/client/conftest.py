"""A whole server over loopback TLS, as the tests of the server have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import certs, serve, shared
from tests.server.helpers import KEY, ServerThread
from zcproto.client.client import Client
from zcproto.client.connect import connect

__all__ = ["certs", "serve", "shared"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test remembers hosts in the folder of whoever runs it."""
    folder = tmp_path / "client-home"
    monkeypatch.setenv("ZCPROTO_HOME", str(folder))
    return folder


ConnectTo = Callable[..., Client]


@pytest.fixture
def connect_to() -> ConnectTo:
    """A client of a server, with a user's session and the server's own authority unless others are given."""

    def make(
        server: ServerThread, user: str | None = "ada", host: str = "127.0.0.1", **options: Any
    ) -> Client:
        if user is not None:
            options = {"user": user, "key": KEY, **options}
        if not {"ca_file", "pins", "verify", "system_store"} & options.keys():
            options["ca_file"] = server.home / "certs" / "ca.crt"
        return connect(f"{host}:{server.port}", **options)

    return make
