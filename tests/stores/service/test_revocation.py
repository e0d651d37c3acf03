"""Revoked sessions end here at once and in the store before the call returns."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import Any

import pytest

from tests.stores.service.harness import (
    FaultyStoreView,
    SessionProcess,
    StartProcess,
    cancel_and_wait,
    raw,
    refused,
    start_opening,
)
from zcproto.errors import Code, TokenRevoked


@pytest.mark.parametrize("is_shared", [False, True])
async def test_revoked_session_ends_here_at_once_and_in_the_store(
    start_process: StartProcess, is_shared: bool
) -> None:
    process = await start_process(shared=is_shared)
    opened, kept = await process.open(), await process.open()
    process.store.gate = asyncio.Event()
    revoking = asyncio.ensure_future(process.revoke(opened))
    await asyncio.sleep(0)
    assert process.ended == [(opened.session.id, Code.TOKEN_REVOKED, "asked for")]
    assert not revoking.done()
    process.store.gate.set()
    assert await revoking
    assert process.store.registry.record(raw(opened)) is None
    assert process.store.registry.record(raw(kept)) is not None
    assert not await process.revoke(opened)


async def test_revocation_event_is_suppressed_only_while_sessions_end(process: SessionProcess) -> None:
    seen: list[str] = []

    @contextmanager
    def quietly() -> Any:
        seen.append("quiet")
        yield
        seen.append("loud")

    process.registry.observers.append(lambda *reported: seen.append("ended"))
    process.store.gate = asyncio.Event()
    opened, user = start_opening(process), "ada"
    process.store.gate.set()
    session = await opened
    process.store.gate = asyncio.Event()
    revoking = asyncio.ensure_future(process.sessions.revoke_user(user, "all", quietly()))
    await asyncio.sleep(0)
    assert seen == ["quiet", "ended", "loud"]
    process.store.gate.set()
    assert await revoking == 1
    assert not process.is_valid(session)


async def test_session_of_another_user_is_not_revoked(process: SessionProcess) -> None:
    opened = await process.open()
    calls = list(process.store.calls)
    assert not await process.revoke(opened, "eve")
    assert not await process.sessions.revoke("no id", user="eve", reason="")
    assert not await process.sessions.revoke("A" * 22, user="eve", reason="")
    assert process.is_valid(opened)
    assert process.store.calls == calls
    assert await process.revoke(opened, None)


async def test_session_of_another_process_is_revoked_only_by_its_user(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(one.store)
    opened = await one.open()
    assert not await other.revoke(opened, "eve")
    assert await other.revoke(opened, "ada")
    assert not await other.revoke(opened, "ada")
    assert one.store.registry.record(raw(opened)) is None


async def test_revoke_user_ends_all_sessions_of_the_user(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(one.store)
    mine = [await one.open(), await one.open(), await other.open()]
    bob = await one.open("bob")
    assert await one.sessions.revoke_user("ada", "all") == 3
    assert [one.is_valid(each) for each in mine] == [False] * 3
    assert await one.find(mine[2].token) is Code.TOKEN_REVOKED
    assert one.is_valid(bob)
    assert one.store.registry.kept == 1


@pytest.mark.parametrize("is_shared", [False, True])
async def test_revoke_key_ends_the_sessions_bound_to_it(start_process: StartProcess, is_shared: bool) -> None:
    one = await start_process(shared=is_shared)
    other = await start_process(one.store) if is_shared else one
    phone = [await one.open(key="device:phone"), await other.open(key="device:phone")]
    kept = [await one.open(key="device:other"), await one.open(), await one.open("bob", key="device:phone")]
    assert await one.sessions.revoke_key("ada", "device:phone", "removed") == 2
    assert not one.is_valid(phone[0])
    assert [await one.find(each.token) for each in phone] == [Code.TOKEN_REVOKED] * 2
    assert all(one.is_valid(each) for each in kept)
    assert one.store.registry.kept == 3
    assert await one.sessions.revoke_key("ada", "device:phone", "removed") == 0


async def test_revoke_key_during_an_outage_ends_known_sessions(
    one: SessionProcess, other: SessionProcess
) -> None:
    known, unknown = await one.open(key="device:phone"), await other.open(key="device:phone")
    await one.outage()
    await refused(one.sessions.revoke_key("ada", "device:phone", "removed"))
    assert not one.is_valid(known)
    await one.recover()
    assert one.store.registry.records("ada", 9) == [one.store.registry.record(raw(unknown))]


async def test_revoke_all_ends_all_sessions(process: SessionProcess) -> None:
    opened = [await process.open(user) for user in ("ada", "bob")]
    assert await process.sessions.revoke_all("all") == 2
    assert [process.check(each.token) for each in opened] == [Code.TOKEN_REVOKED] * 2
    assert process.store.registry.kept == 0


@pytest.mark.parametrize("work", ["create", "rotate"])
@pytest.mark.parametrize("how", ["ended", "replaced", "unchanged"])
async def test_concurrent_change_by_another_process_takes_effect(
    one: SessionProcess, other: SessionProcess, work: str, how: str
) -> None:
    opened = await other.open("bob") if work == "rotate" else None
    other.store.late[work] = asyncio.Event()
    waiting = asyncio.ensure_future(other.open() if opened is None else other.refresh(opened))
    while work not in other.store.calls:  # noqa: ASYNC110
        await asyncio.sleep(0)
    user = "ada" if opened is None else "bob"
    (record,) = one.store.registry.records(user, 10)
    if how == "ended":
        await one.sessions.revoke_user(user, "all")
    elif how == "replaced":
        one.store.registry.restore(record._replace(token_digest=bytes(32)))
    other.store.report_change(record.id)
    other.store.late[work].set()
    if how == "unchanged":
        assert other.is_valid(await waiting)
    elif how == "replaced" and work == "create":
        assert not other.is_valid(await waiting)
    else:
        await refused(waiting, TokenRevoked)
    assert one.store.registry.kept == (0 if how == "ended" else 1)


@pytest.mark.parametrize("is_read_first", [False, True])
@pytest.mark.parametrize("is_opening", [False, True])
async def test_session_read_while_all_are_revoked_is_not_accepted(
    one: SessionProcess, start_process: StartProcess, is_read_first: bool, is_opening: bool
) -> None:
    process = await start_process(FaultyStoreView(one.store))
    late = process.store.late
    name = "create" if is_opening else "find"
    late[name], late["end_all"] = asyncio.Event(), asyncio.Event()
    opened = None if is_opening else await one.open()
    reading = asyncio.ensure_future(process.open() if opened is None else process.find(opened.token))
    while name not in process.store.calls:  # noqa: ASYNC110
        await asyncio.sleep(0)
    revoking = asyncio.ensure_future(process.sessions.revoke_all("asked for"))
    await process.store.called("end_all")
    for event, task in ((late[name], reading), (late["end_all"], revoking))[:: 1 if is_read_first else -1]:
        event.set()
        await asyncio.wait([task])
    await process.settle()
    assert len(process.registry) == 0
    if opened is not None:
        assert isinstance(await process.find(opened.token), Code)
    elif not is_read_first:
        assert isinstance(reading.exception(), TokenRevoked)


async def test_revocation_of_a_cancelled_caller_is_finished(process: SessionProcess) -> None:
    opened = await process.open()
    process.store.gate = asyncio.Event()
    await cancel_and_wait(asyncio.ensure_future(process.revoke(opened)))
    process.store.gate.set()
    await process.settle()
    assert process.store.registry.kept == 0
