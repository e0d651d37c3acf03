"""Pending calls of servers that share a store, of which some are killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.bus.conftest import StartServers
from tests.runtime.conftest import patience
from tests.server.asking import APP, answer, ask, handle, offer, result, withdrawn
from tests.server.helpers import Client
from tests.server.process import ServerProcess
from tests.stores.valkey.server_process import ServerProcess as Valkey

__all__ = ["patience"]


@pytest.fixture
def servers(start_servers: StartServers) -> Iterator[list[tuple[ServerProcess, Client, Client]]]:
    """Yield two servers with one store, and at each a client that asks and one that answers."""
    with ExitStack() as stack:
        found = []
        for server, key in start_servers(APP):
            caller, client = (stack.enter_context(server.client("ada", key)) for _ in range(2))
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
