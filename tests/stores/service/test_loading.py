"""A store with very many sessions is loaded while the server works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.stores.faulty import FAILS
from tests.stores.service.harness import FaultyStoreView, Log, SessionProcess, StartProcess, raw, refused
from tests.stores.valkey.server_process import until
from zcproto.errors import Code, ResourceExhausted, TokenRevoked
from zcproto.sessions import EndReason, OpenedSession, Session
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores import sync as sync_module
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.leases import LEASE_S

FIRST, USERS = 2, 6

Batch = Sequence[SessionRecord | EndedRecord]


class Loading:
    """A process whose load waits after the first sessions, which are of other users than the rest."""

    def __init__(self, process: SessionProcess, opened: list[OpenedSession]) -> None:
        self.process = process
        self.opened = opened
        self.gate = asyncio.Event()
        self.loads = 0
        self.is_late = True
        """Whether sessions are restored as they were when the load began."""
        self.is_over = False
        self.error: Exception | None = None
        process.store.load = self.load  # type: ignore[method-assign]
        process.sync.on_loaded = lambda: setattr(self, "is_over", True)

    async def load(self) -> AsyncIterator[Batch]:
        self.loads += 1
        records = self.process.store.records
        yield records[:FIRST]
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        registry = self.process.store.registry
        ended = [registry._tombstone(slot) for slot in registry._table.tombstone_slots()]
        yield [record for record in records[FIRST:] if self.is_late or registry.record(record.id)]
        yield ended

    async def end(self) -> None:
        self.gate.set()
        await until(lambda: self.is_over)


StartLoading = Callable[..., Awaitable[Loading]]


@pytest.fixture
async def start_loading(start_process: StartProcess, monkeypatch: pytest.MonkeyPatch) -> StartLoading:
    monkeypatch.setattr(sync_module, "LOADED_FIRST", FIRST)

    async def start(**options: Any) -> Loading:
        earlier = await start_process(**options)
        opened = []
        for number in range(USERS):
            opened.append(await earlier.open(f"user-{number}"))
            earlier.clock.advance(0.001)
        process = await start_process(FaultyStoreView(earlier.store), starts=False, **options)
        loading = Loading(process, opened)
        await process.sync.start()
        return loading

    return start


@pytest.fixture
async def loading(start_loading: StartLoading) -> Loading:
    return await start_loading()


async def test_server_works_before_the_store_is_loaded(loading: Loading, log: Log) -> None:
    process = loading.process
    assert len(process.registry) == FIRST
    assert process.sessions.looks_up
    for opened in loading.opened:
        found = await process.find(opened.token)
        assert isinstance(found, Session)
        assert found.id == opened.session.id
    assert await process.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert process.sessions.lookups == USERS - FIRST + 1
    await loading.end()
    assert len(process.registry) == USERS
    assert not process.sessions.looks_up
    lookups = process.sessions.lookups
    await process.sessions.look_up(b"y" * 32, "192.0.2.1", Code.UNAUTHENTICATED)
    assert process.sessions.lookups == lookups
    assert "sessions.loaded" in log.events


async def test_sessions_that_are_not_loaded_are_listed_and_refreshed(loading: Loading) -> None:
    process, opened = loading.process, loading.opened[-1]
    user = opened.session.user
    assert [info.id for info in await process.sessions.list(user)] == [opened.session.id]
    assert len(await process.sessions.records(None, USERS)) == USERS
    assert opened.refresh_token is not None
    assert await process.sessions.find_by_refresh_token(opened.refresh_token) is not None
    refreshed = await process.refresh(opened)
    await loading.end()
    assert process.is_valid(refreshed)
    assert process.check(opened.token) is Code.TOKEN_REVOKED
    assert len(process.registry) == USERS


@pytest.mark.parametrize("by", ["id", "user", "key", "all", "reuse"])
async def test_session_that_was_revoked_while_it_was_loaded_stays_revoked(
    start_loading: StartLoading, by: str, log: Log
) -> None:
    loading = await start_loading()
    process, opened = loading.process, loading.opened[-1]
    user = opened.session.user
    if by == "id":
        assert not await process.revoke(opened, "another")
        assert await process.revoke(opened, user)
    elif by == "user":
        assert await process.sessions.revoke_user(user, EndReason.BY_USER) == 1
    elif by == "key":
        assert await process.sessions.revoke_key(user, "", EndReason.BY_USER) == 1
    elif by == "all":
        loading.is_late = False
        await process.sessions.revoke_all(EndReason.BY_USER)
    else:
        spent, opened = opened, await process.refresh(opened)
        process.clock.advance(3_600.0)
        await refused(process.refresh(spent), TokenRevoked)
    await loading.end()
    await process.settle()
    assert await process.find(opened.token) is Code.TOKEN_REVOKED
    assert len(process.registry) == (0 if by == "all" else USERS - 1)
    assert "sessions.left_out" not in log.events


async def test_session_that_is_loaded_while_all_are_revoked_is_revoked(loading: Loading) -> None:
    process = loading.process
    record = process.store.records[-1]
    held = process.store.late["end_all"] = asyncio.Event()
    revoking = asyncio.create_task(process.sessions.revoke_all(EndReason.BY_USER))
    await until(lambda: not process.store.records)
    process.registry.restore(record)  # it was read before
    held.set()
    await revoking
    await process.settle()
    assert len(process.registry) == 0
    await loading.end()


async def test_login_at_the_limit_ends_a_session_that_is_not_loaded(start_loading: StartLoading) -> None:
    loading = await start_loading(per_user=1)
    process, old = loading.process, loading.opened[-1]
    process.clock.advance(LEASE_S)
    await process.open(old.session.user)
    await loading.end()
    assert isinstance(process.check(old.token), Code)
    assert len(process.registry) == USERS


async def test_sessions_that_are_not_loaded_count_for_the_limit_of_all(start_loading: StartLoading) -> None:
    loading = await start_loading(max_sessions=USERS + 1)
    process = loading.process
    for opened in loading.opened:
        await process.find(opened.token)  # those that are looked up are not counted twice
    await process.open()
    await refused(process.open(), ResourceExhausted)
    await loading.end()
    await refused(process.open(), ResourceExhausted)
    assert len(process.registry) == USERS + 1


async def test_load_begins_again_after_an_outage(
    loading: Loading, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(sync_module, "RETRY_PAUSE_S", 0.001)
    process = loading.process
    process.store.mode, loading.error = FAILS, StoreUnavailable("the test makes it fail")
    loading.gate.set()
    await until(lambda: not process.sync.health.is_healthy)
    loading.error = None
    await process.recover()
    await until(lambda: loading.is_over)
    assert (loading.loads, len(process.registry)) == (2, USERS)
    assert [line["sessions"] for line in log.of("sessions.loaded")] == [USERS]


async def test_outage_before_the_next_batch_does_not_begin_the_load_again(loading: Loading) -> None:
    await loading.process.outage()
    await loading.process.recover()
    await loading.end()
    assert (loading.loads, len(loading.process.registry)) == (1, USERS)


async def test_fault_during_the_load_leaves_the_rest_to_look_ups(loading: Loading, log: Log) -> None:
    process, opened = loading.process, loading.opened[-1]
    loading.error = ValueError("a fault")
    loading.gate.set()
    async with asyncio.timeout(TIMEOUT):
        while "store.task_failed" not in log.events:  # noqa: ASYNC110
            await asyncio.sleep(0)
    found = await process.find(opened.token)
    assert isinstance(found, Session)
    assert raw(opened) == found.raw_id
