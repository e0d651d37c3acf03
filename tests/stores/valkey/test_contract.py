"""The Valkey store passes the contract, with real Valkey and Redis servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from tests.stores.contract import DurabilityContract, RepeatedRefreshContract, StoreContract, StoreTime
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, is_installed, needs, running, wait_for
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import Change, SessionStore
from zcproto.stores.valkey.store import ValkeyStore

CLUSTER = "--cluster-enabled"


class ValkeyHarness:
    def __init__(self, url: str) -> None:
        self.url = url
        self.time = StoreTime()
        self.stores: list[ValkeyStore] = []

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        store = ValkeyStore(self.url, answers=answers, time=self.time)
        if answers is not DEFAULT_LIMITS:
            store._shards = 1  # in a cluster each shard has a part of the limits
        self.stores.append(store)
        await store.open(self._hear)
        return store

    async def reopen(self, store: SessionStore) -> SessionStore:
        await store.close()
        return await self.make_store()

    def _hear(self, change: Change) -> None:
        pytest.fail(f"no other process changes this store: {change}")


KINDS = [*PROGRAMS, *(f"{program}, in a cluster" for program in PROGRAMS)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """Start one server of each installed kind, all at once because a cluster takes a while."""
    with ExitStack() as stack:
        started = {}
        for kind in KINDS:
            program, _, cluster = kind.partition(", ")
            if is_installed(program):
                options = (CLUSTER, "yes") if cluster else ()
                server = stack.enter_context(running(program, tmp_path_factory.mktemp("server"), *options))
                if cluster:
                    server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
                started[kind] = server
        yield started


@pytest.fixture(params=KINDS, scope="module")
def server(request: pytest.FixtureRequest, servers: dict[str, ServerProcess]) -> ServerProcess:
    needs(request.param.partition(", ")[0])
    server = servers[request.param]
    if CLUSTER in server.options:
        wait_for(lambda: b"cluster_state:ok" in server.command("CLUSTER", "INFO"))
    return server


@pytest.fixture
async def harness(server: ServerProcess) -> AsyncIterator[ValkeyHarness]:
    assert server.command("FLUSHALL") == b"OK"
    clustered = CLUSTER in server.options
    url = f"redis+cluster://{server.address}" if clustered else server.url
    harness = ValkeyHarness(url)
    yield harness
    for store in harness.stores:
        await store.close()


class TestValkeyStore(StoreContract, DurabilityContract, RepeatedRefreshContract):
    """Every test of the contract."""
