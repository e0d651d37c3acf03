"""The Valkey store passes the contract, with real Valkey and Redis servers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.stores.contract import DurabilityContract, RepeatedRefreshContract, StoreContract, StoreTime
from tests.stores.valkey.conftest import ServerOf
from tests.stores.valkey.helpers import KINDS, url_of
from tests.stores.valkey.server_process import ServerProcess
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import Change, SessionStore
from zcproto.stores.valkey.store import ValkeyStore


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


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, server_of: ServerOf) -> ServerProcess:
    return server_of(request.param)


@pytest.fixture
async def harness(server: ServerProcess) -> AsyncIterator[ValkeyHarness]:
    harness = ValkeyHarness(url_of(server))
    yield harness
    for store in harness.stores:
        await store.close()


class TestValkeyStore(StoreContract, DurabilityContract, RepeatedRefreshContract):
    """Every test of the contract."""
