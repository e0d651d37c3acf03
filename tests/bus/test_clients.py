"""Calls to clients of other servers over real Valkey and Redis servers, alone and as a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.helpers import until
from tests.limits import TIMEOUT
from tests.server.remote_clients_harness import Process
from tests.stores.valkey.helpers import url_of
from tests.stores.valkey.server_process import ServerProcess
from zcproto.bus.sealing import Opener, Sealer
from zcproto.bus.valkey import ValkeyTopics
from zcproto.common.clock import system_clock, system_entropy
from zcproto.server import remote_clients
from zcproto.stores.valkey.store import ValkeyStore

KEYS = (bytes(32),)


@pytest.fixture
async def processes(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Process, Process]]:
    """Two servers: a client of the second one handles calls."""
    monkeypatch.setattr(remote_clients, "CHECK_S", 0.02)
    monkeypatch.setattr(remote_clients, "LOST_S", TIMEOUT)
    monkeypatch.setattr(remote_clients, "JOIN_S", TIMEOUT)
    found = []
    for _ in range(2):
        store = ValkeyStore(url_of(server), timeout=TIMEOUT)
        sealing = Sealer(KEYS, system_entropy), Opener(KEYS)
        carrier = ValkeyTopics(store.make_servers, b"zcp:", *sealing, system_entropy, TIMEOUT)
        found.append(Process(carrier, system_clock, system_entropy))
    yield found[0], found[1]
    for each in found:
        await each.remote.stop()
        await each.topics.stop()


async def test_call_to_a_client_of_another_server_outlives_the_store(
    server: ServerProcess, processes: tuple[Process, Process]
) -> None:
    here, there = processes
    connection = there.register()
    await there.find()  # it has joined
    (client,) = await here.find("ada")
    assert not [name for name in server.command("KEYS", "*") if b"ada" in name]
    calls = [asyncio.create_task(client.call("approve", {"tool": "ls"})) for _ in range(3)]
    await until(lambda: len(connection.calls) == len(calls))
    calls.pop().cancel()
    await until(lambda: connection.withdrawn == 1)
    server.kill()
    await until(lambda: not (here.topics.is_up or there.topics.is_up))
    connection.answer.set_result("fine")
    await asyncio.sleep(0)
    assert await here.find("ada") == []
    server.start()
    assert await asyncio.gather(*calls) == ["fine", "fine"]
    assert len(connection.calls) == 3


async def test_call_to_a_server_that_is_gone_has_perhaps_run(
    server: ServerProcess, processes: tuple[Process, Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = processes
    connection = there.register()
    await there.find()
    (client,) = await here.find("ada")
    call = asyncio.create_task(client.call("approve"))
    await until(lambda: bool(connection.calls))
    monkeypatch.setattr("zcproto.bus.topics.SharedTopics.absence_s", 0.0)
    await there.topics.stop()
    with pytest.raises(remote_clients.ConnectionClosed, match="may have run"):
        await call
    with pytest.raises(remote_clients.Unavailable, match="find the client again"):
        await client.call("approve")
