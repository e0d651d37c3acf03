"""A shared store that lost its data gets the sessions back, and revocations are repeated."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.faulty import FAILS, WORKS
from tests.stores.service.harness import (
    GRACE,
    SessionProcess,
    StartProcess,
    raw,
    report_data_loss,
)
from zcproto.errors import Code
from zcproto.sessions.health import HealthState
from zcproto.stores.revoker import AFTER_GAP_S, REPEATS_S


@pytest.mark.parametrize("outage", [False, True])
async def test_sessions_are_restored_to_an_emptied_store(start_process: StartProcess, outage: bool) -> None:
    process = await start_process(shared=True, per_user=1_000)
    opened = [await process.open() for _ in range(150)]
    for each in opened[::2]:
        process.use(each)
    if outage:
        await process.outage()
        await process.revoke(opened[0])
    process.store.lose_all()
    report_data_loss(process)
    await process.settle()
    if outage:
        await process.recover()
    expected = opened[1:] if outage else opened
    assert all(process.is_valid(each) for each in expected)
    assert process.store.registry.kept == len(expected)
    assert process.ended == ([(opened[0].session.id, Code.TOKEN_REVOKED, "asked for")] if outage else [])
    assert not process.is_valid(opened[0]) or not outage
    for each in expected[:3]:
        assert process.is_valid(await process.refresh(each))


async def test_nothing_is_restored_after_the_grace(start_process: StartProcess) -> None:
    process = await start_process(shared=True)
    opened = await process.open()
    process.use(opened)
    await process.outage()
    await process.advance(GRACE + 1)
    process.store.lose_all()
    report_data_loss(process)
    await process.recover()
    assert await process.find(opened.token) is Code.TOKEN_REVOKED
    assert process.store.registry.kept == 0


async def test_revocation_is_repeated_after_another_process_restored_the_session(
    one: SessionProcess, other: SessionProcess
) -> None:
    before, meanwhile, of_user = await one.open(), await one.open(), await one.open("bob")
    await other.join(before, meanwhile, of_user)
    await one.revoke(before)  # unnoticed by the other
    await one.outage()
    await one.revoke(meanwhile)
    one.registry.forget(raw(of_user))
    await one.sessions.revoke_user("bob", "all")
    one.store.lose_all()
    other.store.use_data_of(one.store)
    report_data_loss(one)
    report_data_loss(other)
    await other.settle()
    await one.recover()
    await one.advance(REPEATS_S[0])
    assert one.store.registry.kept == 0
    other.store.report_all_changed()
    await other.settle()
    assert not any(other.is_valid(each) for each in (before, meanwhile, of_user))


@pytest.mark.parametrize("outage_s", [0.0, GRACE + 1])
async def test_revocations_are_repeated_for_late_restorations(
    one: SessionProcess, other: SessionProcess, outage_s: float
) -> None:
    opened = [await one.open(), await one.open("bob"), await one.open("bob")]
    for each in opened:
        await other.join(each)
    await one.outage()
    await one.revoke(opened[0])
    await one.sessions.revoke_user("bob", "all")
    await one.advance(outage_s)
    one.store.lose_all()
    report_data_loss(one)
    await one.recover()
    for _ in range(3):
        other.store.use_data_of(one.store)
        report_data_loss(other)
        await other.settle()
        assert one.store.registry.kept == 3
        await one.advance(REPEATS_S[0])
        assert one.store.registry.kept == 0
        one.store.lose_all()
    one.store.mode = FAILS
    await one.advance(REPEATS_S[0])
    other.store.use_data_of(one.store)
    report_data_loss(other)
    await other.settle()
    assert one.store.registry.kept == 3
    await one.recover()
    for _ in range(2):  # the repetitions missed during the outage are done once
        await one.advance(REPEATS_S[-1])
    assert one.store.registry.kept == 0
    one.store.calls.clear()
    await one.advance(2 * REPEATS_S[-1])
    assert not {"end", "end_user"} & {*one.store.calls}
    assert one.state is HealthState.HEALTHY


@pytest.mark.parametrize("of_user", [False, True])
async def test_process_started_after_the_loss_repeats_unknown_revocations(
    one: SessionProcess, other: SessionProcess, of_user: bool
) -> None:
    opened = await one.open()
    await other.join(opened)
    await one.outage()
    await (one.sessions.revoke_user("ada", "all") if of_user else one.revoke(opened))
    one.store.lose_all()
    await one.recover()  # like a process started meanwhile, it does not know of the loss
    other.store.use_data_of(one.store)
    report_data_loss(other)
    await other.settle()
    assert one.store.registry.kept == 1
    await one.advance(REPEATS_S[0])
    assert one.store.registry.kept == 0


async def restore_later(one: SessionProcess, other: SessionProcess) -> None:
    """Let another process restore its sessions 20 seconds after this one noticed the loss."""
    await one.advance(20.0)
    other.store.use_data_of(one.store)
    report_data_loss(other)
    await other.settle()
    assert one.store.registry.kept == 1
    await one.advance(10.0)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_replayed_revocation_is_repeated_only_if_the_store_lacks_the_session(
    one: SessionProcess, other: SessionProcess, is_lost: bool
) -> None:
    await other.advance(REPEATS_S[-1])  # nothing is repeated because of the start any more
    opened = await one.open()
    await other.find(opened.token)
    await other.outage()
    await other.revoke(opened)
    if is_lost:  # another process may restore it
        one.store.roll_back([])
        other.store.use_data_of(one.store)
    await other.recover()
    await other.advance(2 * AFTER_GAP_S[-1])  # after a gap, all recent revocations are repeated
    other.store.calls.clear()
    await other.advance(REPEATS_S[-1])
    assert ("end" in other.store.calls) is is_lost


@pytest.mark.parametrize("has_started_since", [False, True])
async def test_revocation_of_a_user_after_the_loss_is_repeated_for_late_restorations(
    one: SessionProcess, other: SessionProcess, start_process: StartProcess, has_started_since: bool
) -> None:
    other.use(await other.open())
    one.store.lose_all()
    if has_started_since:
        one = await start_process(one.store)
    else:
        report_data_loss(one)
        await one.settle()
    await one.sessions.revoke_user("ada", "all")
    await restore_later(one, other)
    assert one.store.registry.kept == 0


async def test_repeated_revocation_of_a_user_spares_sessions_opened_since(
    start_process: StartProcess,
) -> None:
    process = await start_process(shared=True)
    await process.open()
    await process.outage()
    await process.sessions.revoke_user("ada", "all")
    process.store.lose_all()
    report_data_loss(process)
    await process.recover()
    opened = await process.open()
    await process.advance(REPEATS_S[0])
    assert process.is_valid(opened)
    assert process.store.registry.kept == 1


async def test_refresh_restores_the_session_first(start_process: StartProcess) -> None:
    process = await start_process(shared=True)
    opened = [await process.open(), await process.open()]
    process.store.lose_all()
    process.store.modes["create"] = FAILS
    report_data_loss(process)
    while process.store.calls.count("create") < 4:  # noqa: ASYNC110
        await asyncio.sleep(0)
    process.store.modes.clear()
    assert process.state is HealthState.HEALTHY
    assert process.is_valid(await process.refresh(opened[1]))
    await process.settle()
    assert process.store.registry.kept == 2


async def test_restoration_continues_after_another_outage(start_process: StartProcess) -> None:
    process = await start_process(shared=True)
    opened = await process.open()
    process.use(opened)
    process.store.lose_all()
    process.store.mode = FAILS
    report_data_loss(process)
    await process.outage()
    process.store.mode = WORKS
    await process.recover()
    assert process.is_valid(opened)
    assert process.store.registry.kept == 1
