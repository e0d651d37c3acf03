"""Pending calls of servers that share a store, of which some are killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.conftest import patience
from tests.server.asking import APP, answer, ask, handle, offer, result, withdrawn
from tests.server.helpers import Client
from tests.server.process import ServerProcess
from tests.stores.valkey.server_process import PROGRAMS, running
from tests.stores.valkey.server_process import ServerProcess as Valkey
from zcproto.auth import UserFile

__all__ = ["patience"]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with running(PROGRAMS[0], tmp_path / "valkey", "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def servers(
    valkey: Valkey, tmp_path: Path, certs: Path
) -> Iterator[list[tuple[ServerProcess, Client, Client]]]:
    """Yield two servers with one store, and at each a client that asks and one that answers."""
    with ExitStack() as stack:
        found = []
        for number in range(2):
            home = tmp_path / f"home{number}"
            home.mkdir(0o700)
            (home / "asking.py").write_text(APP)
            (home / "config.toml").write_text(f'[store]\nurl = "{valkey.url}"\ntimeout = 2\n')
            if found:
                (home / "store.key").write_bytes((tmp_path / "home0" / "store.key").read_bytes())
                (home / "store.key").chmod(0o600)
            user_key = UserFile(home / "users.toml").add("ada").reveal()
            server = stack.enter_context(ServerProcess(home, certs, app="asking:app"))
            caller, client = (stack.enter_context(server.client("ada", user_key)) for _ in range(2))
            handle(client)
            found.append((server, caller, client))
        yield found


def test_pending_call_is_answered_at_another_server_whatever_happens_to_the_store(
    servers: list[tuple[ServerProcess, Client, Client]], valkey: Valkey
) -> None:
    (first, caller, here), (second, other_caller, there) = servers
    ask(caller)
    (call_id, own), (same_id, call) = offer(here), offer(there)
    assert call_id == same_id
    answer(there, call, "there")
    assert result(caller) == "there"
    withdrawn(here, own)
    (asked,), (answered,) = first.events("call.asked"), first.events("call.answered")
    assert asked["call"] == answered["call"] == call_id
    assert second.events("call.asked", "call.answered") == []

    ask(caller)
    _, (_, call) = offer(here), offer(there)
    valkey.kill()
    answer(there, call, "restarted")
    valkey.start()
    assert result(caller) == "restarted"

    ask(other_caller)
    (_, call), _ = offer(here), offer(there)
    second.signal(signal.SIGKILL)
    withdrawn(here, call)
