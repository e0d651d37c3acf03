"""Durable runs of a server of several processes, of which some are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runs.served import APP, attach, read
from tests.server.helpers import Client
from tests.server.process import ServerProcess
from tests.workers.test_processes import pids
from zcproto.errors import Code
from zcproto.wire.frame import Kind


@pytest.fixture
def server(home: Path, certs: Path) -> Iterator[ServerProcess]:
    (home / "durable.py").write_text(APP)
    with ServerProcess(home, certs, "--workers", "2", app="durable:app") as server:
        yield server


@pytest.fixture
def clients(server: ServerProcess, key: str) -> Iterator[dict[int, Client]]:
    """Yield a connection to each worker, by the id of its process."""
    found: dict[int, Client] = {}
    with ExitStack() as stack:
        while len(found) < 2:
            client = stack.enter_context(server.client("ada", key))
            found.setdefault(client.call("pid"), client)
        yield found


def test_run_is_read_through_another_worker_and_after_the_coordinator_was_killed(
    server: ServerProcess, clients: dict[int, Client], home: Path
) -> None:
    first, second = clients.values()
    attach(first, 0, {"total": 100, "hold": 10})
    assert read(first, 10) == [*range(10)]
    attach(second, 5)
    assert read(second, 5) == [*range(5, 10)]
    superseded = first.receive()
    assert (superseded.kind, superseded.details["reason"]) == (Kind.ERROR, "resumed_elsewhere")
    os.kill(pids(server)["coordinator"], signal.SIGKILL)
    (home / "go").touch()
    assert read(second, 90) == [*range(10, 100)]
    assert second.receive().kind == Kind.RESPONSE
    assert len((home / "started").read_text().split()) == 1


def test_run_of_a_killed_worker_ends_after_its_stored_items(
    server: ServerProcess, clients: dict[int, Client], home: Path
) -> None:
    (owner, first), (_, other) = clients.items()
    attach(first, 0, {"total": 100, "hold": 10})
    assert read(first, 10) == [*range(10)]
    attach(other, 3)
    assert read(other, 7) == [*range(3, 10)]
    os.kill(owner, signal.SIGKILL)
    end = other.receive()
    assert (end.kind, end.code) == (Kind.ERROR, Code.UNKNOWN)
    assert end.details == {"reason": "owner_lost", "items": 10}
    assert len((home / "started").read_text().split()) == 1
