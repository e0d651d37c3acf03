"""Durable runs of servers that share a store, some of which are killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bus.conftest import StartServers
from tests.runs.served import APP, attach, read
from tests.runtime.conftest import patience
from tests.server.helpers import Client
from tests.server.process import ServerProcess
from tests.stores.valkey.server_process import ServerProcess as Valkey
from zcproto.errors import Code
from zcproto.wire.frame import Kind

__all__ = ["patience"]


@pytest.fixture
def servers(start_servers: StartServers) -> Iterator[list[tuple[ServerProcess, Client]]]:
    """Yield two servers with one store, and a connection to each."""
    with ExitStack() as stack:
        yield [(server, stack.enter_context(server.client("ada", key))) for server, key in start_servers(APP)]


def test_run_is_read_at_another_server_and_after_the_store_was_restarted(
    servers: list[tuple[ServerProcess, Client]], valkey: Valkey, tmp_path: Path
) -> None:
    (_, first), (_, second) = servers
    attach(first, 0, {"total": 100, "hold": 10})
    assert read(first, 10) == [*range(10)]
    attach(second, 5)
    assert read(second, 5) == [*range(5, 10)]
    valkey.kill()
    (tmp_path / "home0" / "go").touch()
    valkey.start()
    assert read(second, 90) == [*range(10, 100)]
    assert second.receive().kind == Kind.RESPONSE


def test_run_of_a_server_that_ends_goes_on_and_is_read_at_another_server(
    servers: list[tuple[ServerProcess, Client]], tmp_path: Path
) -> None:
    (owner, first), (_, second) = servers
    attach(first, 0, {"total": 100, "hold": 10})
    assert read(first, 10) == [*range(10)]
    owner.signal(signal.SIGTERM)
    cut = first.receive()
    assert (cut.kind, cut.details) == (Kind.ERROR, {"reason": "draining", "detached": True})
    attach(second, 5)
    assert read(second, 5) == [*range(5, 10)]
    (tmp_path / "home0" / "go").touch()
    assert read(second, 90) == [*range(10, 100)]
    assert second.receive().kind == Kind.RESPONSE
    assert owner.wait() == 0


def test_run_of_a_killed_server_ends_after_its_stored_items(
    servers: list[tuple[ServerProcess, Client]],
) -> None:
    (owner, first), (_, second) = servers
    attach(first, 0, {"total": 100, "hold": 10})
    assert read(first, 10) == [*range(10)]
    attach(second, 3)
    assert read(second, 7) == [*range(3, 10)]
    owner.signal(signal.SIGKILL)
    end = second.receive()
    assert (end.kind, end.code) == (Kind.ERROR, Code.UNKNOWN)
    assert end.details == {"reason": "owner_lost", "items": 10}
