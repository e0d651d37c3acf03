"""How many operations go to the servers at once, and which of them wait or are refused."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ResponseError

from tests.limits import TIMEOUT
from zcproto.errors import ResourceExhausted
from zcproto.stores.base import DamagedRecord, StoreUnavailable
from zcproto.stores.valkey import store as module
from zcproto.stores.valkey.store import ValkeyStore, behind, operation


class GatedStore(ValkeyStore):
    """Operations that wait for `gate`."""

    def __init__(self) -> None:
        super().__init__("valkey://localhost", timeout=TIMEOUT)
        self.gate = asyncio.Event()
        self.running: list[str] = []

    async def _run_operation(self, name: str) -> str:
        self.running.append(name)
        await self.gate.wait()
        return name

    @operation
    async def create(self) -> str:
        return await self._run_operation("create")

    @operation
    async def end(self) -> str:
        return await self._run_operation("end")

    @behind
    @operation
    async def claim(self) -> str:
        return await self._run_operation("claim")

    @behind
    @operation
    async def keep_answer(self) -> str:
        return await self._run_operation("keep")


async def test_operations_in_progress_are_bounded_but_sessions_can_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_OPERATIONS", 2)
    store = GatedStore()
    opening = [asyncio.create_task(store.create()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as refused:
        await store.create()
    assert refused.value.details == {"retry_after_ms": 250}
    ending = asyncio.create_task(store.end())
    await asyncio.sleep(0)
    store.gate.set()
    assert await asyncio.gather(*opening, ending) == ["create", "create", "end"]
    assert await store.create() == "create"


async def test_operations_on_answers_wait_for_each_other_and_not_before_sessions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ANSWERS_AT_ONCE", 1)
    monkeypatch.setattr(module, "MAX_OPERATIONS", 3)
    store = GatedStore()
    later = [asyncio.create_task(store.claim()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted):
        await store.claim()
    keeping = asyncio.create_task(store.keep_answer())
    opening = asyncio.create_task(store.create())
    await asyncio.sleep(0)
    assert store.running == ["claim", "create"]
    store.gate.set()
    await asyncio.gather(*later, keeping, opening)
    assert store.running == ["claim", "create", "claim", "claim", "keep"]


async def test_password_in_an_error_of_the_server_is_hidden() -> None:
    class RefusedStore(ValkeyStore):
        @operation
        async def count(self) -> int:
            raise ResponseError("ERR AUTH hunter2 is not a command of this proxy")

    with pytest.raises(StoreUnavailable, match=r"AUTH \*\*\* is not") as failed:
        await RefusedStore("valkey://ann:hunter2@localhost").count()
    assert "hunter2" not in str(failed.value)


async def test_damaged_record_is_reported_and_raised() -> None:
    class DamagedStore(ValkeyStore):
        @operation
        async def count(self) -> int:
            raise DamagedRecord("a session cannot be read")

    notices: list[tuple[str, str]] = []
    store = DamagedStore(
        "valkey://localhost", on_notice=lambda name, **values: notices.append((name, values["where"]))
    )
    with pytest.raises(DamagedRecord, match="cannot be read"):
        await store.count()
    assert notices == [("store_record_damaged", "count")]
