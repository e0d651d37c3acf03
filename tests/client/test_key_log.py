"""`key_log_file`: TLS secrets of connections, written only on request."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import pytest

import zcproto
from tests.client.conftest import Blocking, ConnectTo
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.client.dial import LoopResources, Trust
from zcproto.client.options import ConnectOptions
from zcproto.errors import ConfigError

pytestmark = pytest.mark.usefixtures("home")


def lines(path: Path) -> int:
    return path.read_text().count("CLIENT_TRAFFIC_SECRET_0 ")


async def test_key_log_gets_the_secrets_of_a_connection(
    shared: ServerThread, connect_to: ConnectTo, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    for count in (1, 2):
        async with connect_to(shared, key_log_file=str(path)) as client:
            assert await client.call("echo", x=1) == {"x": 1}
        assert await asyncio.to_thread(lines, path) == count
    assert (await asyncio.to_thread(path.stat)).st_mode & 0o777 == 0o600


def test_blocking_client_writes_the_key_log(shared: ServerThread, blocking: Blocking, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with blocking(shared, key_log_file=path) as client:
        assert client.call("echo", x=1) == {"x": 1}
    assert lines(path) == 1


async def test_key_log_is_warned_of_once_per_file(
    shared: ServerThread, connect_to: ConnectTo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    with caplog.at_level(logging.WARNING, "zcproto.client"):
        for _ in range(2):
            async with connect_to(shared, key_log_file=path):
                pass
    assert [each.getMessage() for each in caplog.records] == [
        f"TLS secrets are appended to {path}: anyone who can read it can decrypt captured connections"
    ]


async def test_context_with_key_log_is_not_shared(ca_file: Path, tmp_path: Path) -> None:
    resources = LoopResources(asyncio.get_running_loop())

    def context(key_log: Path | None) -> ssl.SSLContext:
        return Trust(ConnectOptions(ca_file=ca_file, key_log_file=key_log)).context(resources.contexts)

    first, second = tmp_path / "first", tmp_path / "second"
    assert context(first).keylog_filename == str(first)
    assert context(None).keylog_filename is None
    assert context(second).keylog_filename == str(second)
    assert context(first) is context(first)
    assert len({id(context(first)), id(context(None)), id(context(second))}) == 3


async def test_other_client_does_not_write_the_key_log(
    shared: ServerThread, connect_to: ConnectTo, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    async with connect_to(shared, key_log_file=path), connect_to(shared) as other:
        assert await other.call("echo", x=1) == {"x": 1}
    assert await asyncio.to_thread(lines, path) == 1


async def test_sslkeylogfile_is_ignored(
    serve: Serve, connect_to: ConnectTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, path = tmp_path / "variable", tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(variable))
    server = serve()
    async with connect_to(server) as client:
        assert await client.call("echo", x=1) == {"x": 1}
    async with connect_to(server, key_log_file=path):
        pass
    assert not await asyncio.to_thread(variable.exists)
    assert await asyncio.to_thread(lines, path) == 1, (
        "the client's line; a server that wrote would add a second"
    )


async def test_unusable_key_log_raises_before_connecting(
    serve: Serve, connect_to: ConnectTo, tmp_path: Path
) -> None:
    server = serve()
    path = tmp_path / "keys"
    path.touch()
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read or change this file"):
        await connect_to(server, key_log_file=path)
    assert server.stats["connections_opened"] == 0


def test_server_has_no_key_log_option() -> None:
    with pytest.raises(TypeError):
        zcproto.Server(zcproto.App(), key_log_file="keys")  # type: ignore[call-arg]
