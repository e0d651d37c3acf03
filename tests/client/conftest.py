"""Fixtures: a scripted server in memory, a real server over loopback TLS, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client.helpers import ScriptedServer
from tests.server.helpers import KEY, PATIENT_CLIENT, ServerThread
from zcproto.client.blocking import BlockingClient, connect_blocking
from zcproto.client.client import Client, connect


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep known hosts out of the home folder of the user who runs the tests."""
    folder = tmp_path / "client-home"
    monkeypatch.setenv("ZCPROTO_HOME", str(folder))
    return folder


ConnectTo = Callable[..., Client]
Blocking = Callable[..., BlockingClient]


def options_for(server: ServerThread, user: str | None = "ada", **options: Any) -> dict[str, Any]:
    """Return the options of a patient client, by default with a session of ada and the server's CA."""
    if user is not None:
        options = {"user": user, "key": KEY, **options}
    if not {"ca_file", "pins", "verify", "system_store"} & options.keys():
        options["ca_file"] = server.home / "certs" / "ca.crt"
    return {**PATIENT_CLIENT, **options}


@pytest.fixture
def connect_to() -> ConnectTo:
    """Return a factory of clients with `options_for`."""

    def make(server: ServerThread, *user: str | None, host: str = "127.0.0.1", **options: Any) -> Client:
        return connect(f"{host}:{server.port}", **options_for(server, *user, **options))

    return make


@pytest.fixture
def blocking() -> Blocking:
    """Return a factory of blocking clients with `options_for`."""

    def make(server: ServerThread, *user: str | None, **options: Any) -> BlockingClient:
        return connect_blocking(f"127.0.0.1:{server.port}", **options_for(server, *user, **options))

    return make


@pytest.fixture
def server() -> ScriptedServer:
    """Return a server in memory, for tests with `@scripted`."""
    return ScriptedServer()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use files in the loop, whose time does not wait for threads."""

    async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
