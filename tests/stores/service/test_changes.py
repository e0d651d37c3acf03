"""Changes by other processes are applied within the second."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.stores.faulty import BUSY, FAILS
from tests.stores.service.harness import (
    FaultyStoreView,
    SessionProcess,
    StartProcess,
    StoreWithOtherFind,
    raw,
)
from zcproto.errors import Code
from zcproto.sessions import Session
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.token import digest_of
from zcproto.stores import sync as sync_module
from zcproto.stores.base import Change, ChangeKind


async def test_unused_session_changed_by_another_process_is_forgotten(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    await other.find(opened.token)
    await one.revoke(opened)
    other.store.report_change(raw(opened))
    assert other.check(opened.token) is Code.UNAUTHENTICATED
    assert await other.find(opened.token) is Code.TOKEN_REVOKED
    other.store.report_change(b"?" * 16)


@pytest.mark.parametrize("memory", [True, False])
async def test_session_in_use_ended_by_another_process_ends_here(
    one: SessionProcess, other: SessionProcess, memory: bool
) -> None:
    opened, kept = await one.open(), await one.open()
    await other.join(opened, kept)
    await one.revoke(opened)
    if not memory:
        other.store.lose_all()
        kept_record = one.registry.record(raw(kept))
        assert kept_record is not None
        other.store.registry.restore(kept_record)
    other.store.report_change(raw(opened))
    assert other.is_valid(opened)
    await other.settle()
    reason = "revoked" if memory else "ended elsewhere"
    assert other.ended == [(opened.session.id, Code.TOKEN_REVOKED, reason)]
    assert not other.is_valid(opened)
    assert other.is_valid(kept)


async def test_session_in_use_replaced_by_another_process_ends_here(start_process: StartProcess) -> None:
    one = await start_process(shared=True, per_user=1, when_full="evict_oldest")
    other = await start_process(FaultyStoreView(one.store))
    opened = await one.open()
    await other.join(opened)
    await one.open()
    other.store.report_change(raw(opened))
    await other.settle()
    assert other.ended == [(opened.session.id, Code.SESSION_REPLACED, "replaced by a newer session")]


async def test_session_in_use_whose_end_is_reported_ends_without_asking_the_store(
    one: SessionProcess, other: SessionProcess
) -> None:
    used, unused = await one.open(), await one.open()
    for each in (used, unused):
        await other.find(each.token)
    other.use(used)
    calls = len(other.store.calls)
    for each in (used, unused):
        record = other.registry.record(raw(each))
        assert record is not None
        ended = EndedRecord(record.id, record.token_digest, Code.TOKEN_REVOKED, one.clock.wall())
        other.store.report_change(record.id, ended)
    assert other.ended == [(used.session.id, Code.TOKEN_REVOKED, "revoked")]
    assert other.check(used.token) is Code.TOKEN_REVOKED
    assert other.check(unused.token) is Code.UNAUTHENTICATED  # forgotten: the store is asked if it comes back
    await other.settle()
    assert len(other.store.calls) == calls


async def test_refresh_by_another_process_is_reported_to_those_that_use_the_session(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    await other.join(opened)
    seen: dict[str, list[tuple[str, bytes]]] = {"one": [], "other": []}
    for name, process in (("one", one), ("other", other)):
        process.registry.rotation_observers.append(lambda *rotation, name=name: seen[name].append(rotation))
    refreshed = await one.refresh(opened)
    newest = (opened.session.id, digest_of(refreshed.token))
    assert seen == {"one": [newest], "other": []}
    other.store.report_change(raw(opened))
    await other.settle()
    assert seen == {"one": [newest], "other": [newest]}


async def test_session_in_use_refreshed_by_another_process_has_the_new_token(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    await other.join(opened)
    again = await one.refresh(opened)
    other.store.report_change(raw(opened))
    await other.settle()
    assert other.is_valid(again)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED
    assert other.ended == []


@pytest.mark.parametrize("mode", [FAILS, BUSY])
async def test_failed_check_is_repeated(one: SessionProcess, other: SessionProcess, mode: str) -> None:
    opened = await one.open()
    await other.join(opened)
    await one.revoke(opened)
    other.store.modes["get"] = mode
    other.store.report_change(raw(opened))
    await other.store.called("get")
    other.store.modes.clear()
    await other.settle()
    assert not other.is_valid(opened)


async def test_one_check_of_changes_runs_at_a_time(one: SessionProcess, other: SessionProcess) -> None:
    opened = [await one.open() for _ in range(3)]
    for each in opened:
        await other.join(each)
        await one.revoke(each)
    other.store.calls.clear()
    other.store.gate = asyncio.Event()
    for each in opened:
        other.store.report_change(raw(each))
        for _ in range(10):
            await asyncio.sleep(0)
    assert other.store.calls == ["get"]
    other.store.gate.set()
    await other.settle()
    assert other.store.calls == ["get"] * 3
    assert not any(other.is_valid(each) for each in opened)


async def test_changes_during_an_outage_are_applied_after_it(
    one: SessionProcess, other: SessionProcess
) -> None:
    used, idle, kept = await one.open(), await one.open(), await one.open()
    for each in (used, idle, kept):
        await other.find(each.token)
    other.use(used)
    other.use(kept)
    await other.outage()
    await one.revoke(used)
    await one.revoke(idle)
    other.store.report_change(raw(used))
    other.store.report_all_changed()
    await other.settle()
    assert other.is_valid(used)  # the store cannot be asked
    await other.recover()
    assert [other.is_valid(each) for each in (used, idle, kept)] == [False, False, True]
    assert await other.find(idle.token) is Code.TOKEN_REVOKED


async def test_reconnect_checks_only_sessions_in_use(start_process: StartProcess) -> None:
    one = await start_process(shared=True, per_user=1_000)
    other = await start_process(FaultyStoreView(one.store), per_user=1_000)
    opened = [await one.open() for _ in range(300)]
    for number, each in enumerate(opened):
        await other.find(each.token)
        if number % 2:
            other.use(each)
    for each in opened[:10]:
        await one.revoke(each)
    other.store.calls.clear()
    other.store.report_all_changed()
    await other.settle()
    assert other.store.calls == ["get"] * 150
    assert other.registry.kept == 145
    assert len(other.ended) == 5
    for number, each in enumerate(opened):
        found = await other.find(each.token)
        assert (found is Code.TOKEN_REVOKED) if number < 10 else isinstance(found, Session)


@pytest.mark.parametrize("all_of_them", [True, False])
async def test_session_ended_by_another_process_during_its_lookup_is_not_accepted(
    start_process: StartProcess, all_of_them: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "CHANGES", 2)
    one = await start_process(shared=True)
    other = await start_process(FaultyStoreView(one.store))
    opened = await one.open()
    find = other.store.inner.find

    async def late(digest: bytes) -> Any:
        """Return a result that is out of date."""
        found = await find(digest)
        other.store.inner = one.store.inner
        await one.revoke(opened)
        if all_of_them:
            other.store.report_all_changed()
        else:
            other.store.report_change(raw(opened))
        return found

    other.store.inner = StoreWithOtherFind(other.store.inner, late)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED


async def test_session_that_is_reported_as_changed_while_it_is_opened_is_open(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start_process(shared=True)
    restore = process.registry.restore

    def restore_and_report(record: SessionRecord, **options: Any) -> bool:
        restored = restore(record, **options)
        process.store.on_change(Change(ChangeKind.SESSION, record.id))
        return restored

    with monkeypatch.context() as patch:
        patch.setattr(process.registry, "restore", restore_and_report)
        opened = await process.open()
    await process.settle()
    assert process.is_valid(opened)
