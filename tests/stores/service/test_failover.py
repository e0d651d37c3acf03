"""A failover to a replica that lacks the last writes: revocations stay, and one token of a session is good."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from tests.stores.faulty import DAMAGED, FAILS, WORKS, FaultyStore
from tests.stores.service.harness import (
    HOUR_MS,
    FaultyStoreView,
    SessionProcess,
    StartProcess,
    raw,
    refused,
)
from tests.workers.hub_harness import until
from zcproto.errors import Code, TokenRevoked
from zcproto.sessions import EndReason, OpenedSession
from zcproto.sessions.health import MAX_DELAY_S, HealthState
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.token import digest_of
from zcproto.stores import revoker
from zcproto.stores.revoker import AFTER_GAP_S, REPEATS_S

T = TypeVar("T")


async def fail_over(records: Sequence[SessionRecord], *processes: SessionProcess) -> None:
    """Move all processes to a replica that has these sessions."""
    first, *others = processes
    first.store.roll_back(records)
    for other in others:
        other.store.use_data_of(first.store)
    for process in processes:
        process.store.report_all_changed()
        await process.settle()


async def two_processes(
    start_process: StartProcess, **options: object
) -> tuple[SessionProcess, SessionProcess]:
    one = await start_process(shared=True, **options)
    return one, await start_process(FaultyStoreView(one.store), **options)


def ids(process: SessionProcess) -> set[bytes]:
    """Return the sessions that the store of a process has."""
    return {record.id for record in process.store.records}


async def is_accepted(process: SessionProcess, opened: OpenedSession) -> bool:
    return not isinstance(await process.find(opened.token), Code)


@pytest.mark.parametrize("is_known", [True, False])
async def test_revocation_lost_by_failover_is_repeated(
    one: SessionProcess, other: SessionProcess, is_known: bool
) -> None:
    opened, kept = await one.open(), await one.open()
    records = one.store.records
    revoking = one if is_known else other
    assert await revoking.revoke(opened)
    await fail_over(records, one, other)
    for process in (one, other):
        assert not await is_accepted(process, opened)
        assert await is_accepted(process, kept)
    assert ids(one) == {raw(kept)}


async def test_store_that_keeps_its_changes_is_not_asked_to_repeat_them(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaultyStore, "keeps_changes", True)
    one, other = await two_processes(start_process)
    opened, kept = await one.open(), await one.open()
    one.use(kept)
    kept = await one.refresh(kept)
    await one.revoke(opened)
    for process in (one, other):
        process.store.calls.clear()
        process.store.report_all_changed()
        await process.advance(REPEATS_S[-1])
        assert not {"end", "rotate"} & {*process.store.calls}
    assert "get" in one.store.calls  # sessions in use are checked
    assert await is_accepted(other, kept)
    assert not await is_accepted(other, opened)


async def test_revocations_of_a_user_and_of_all_are_repeated(
    one: SessionProcess, other: SessionProcess
) -> None:
    await one.open("ada")
    bob = await one.open("bob")
    before = one.store.records
    await other.sessions.revoke_user("ada", "asked for")
    one.clock.advance(1)
    ada = await one.open("ada")
    await fail_over([*before, *one.store.records], one, other)
    assert ids(one) == {raw(ada), raw(bob)}  # one was opened since
    before = one.store.records
    await other.sessions.revoke_all("asked for")
    one.clock.advance(1)
    ada = await one.open("ada")
    for _ in range(2):
        await fail_over([*before, *one.store.records], other, one)
        assert ids(one) == {raw(ada)}
        one.clock.advance(60)


@pytest.mark.parametrize("key", ["", "device:phone"])
async def test_revocation_sent_to_old_primary_ends_sessions_opened_before_on_the_new_one(
    one: SessionProcess, other: SessionProcess, key: str
) -> None:
    moved = [await other.open("ada", key=key), await other.open("ben", key=key)]
    another_key = await other.open("ada", key="device:tablet")
    on_new_primary = one.store.records
    one.store.roll_back([])
    if key:
        assert await one.sessions.revoke_key("ada", key, "removed") == 0
    else:
        assert await one.sessions.revoke_user("ada", "all") == 0
    other.store.use_data_of(one.store)
    other.clock.advance(1)
    since = await other.open("ada", key=key)
    await fail_over([*on_new_primary, *other.store.records], one, other)
    kept = [moved[1], since, *([another_key] if key else [])]
    assert ids(one) == {raw(each) for each in kept}
    for process in (one, other):
        assert not await is_accepted(process, moved[0])


async def run_turns() -> None:
    """Let other tasks run until they wait."""
    for _ in range(100):
        await asyncio.sleep(0)


async def answer_after_gap(
    process: SessionProcess, records: Sequence[SessionRecord], operation: str, work: Coroutine[Any, Any, T]
) -> T:
    """Complete a call after a failover. In a cluster an operation may still wait for another server then."""
    process.store.late[operation] = asyncio.Event()
    calling = asyncio.create_task(work)
    await process.store.called(operation)
    process.store.roll_back(records)
    process.store.report_all_changed()
    await run_turns()
    process.store.late.pop(operation).set()
    result = await calling
    await process.advance(AFTER_GAP_S[0])
    return result


async def test_revocation_answered_after_the_gap_is_repeated(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await other.open()
    assert await answer_after_gap(one, one.store.records, "end", one.revoke(opened))
    assert one.store.records == []


async def test_revocation_of_a_user_answered_after_the_gap_is_repeated(
    one: SessionProcess, other: SessionProcess
) -> None:
    await other.open()
    revoking = one.sessions.revoke_user("ada", "all")
    assert await answer_after_gap(one, one.store.records, "end_user", revoking) == 1
    assert one.store.records == []


async def test_eviction_answered_after_the_gap_is_repeated(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1, when_full="evict_oldest")
    await other.open()
    with pytest.raises(TokenRevoked):
        await answer_after_gap(one, one.store.records, "create", one.open())
    await one.advance(AFTER_GAP_S[0])
    assert one.store.records == []


async def test_rotation_answered_after_the_gap_is_repeated(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    again = await answer_after_gap(one, one.store.records, "rotate", one.refresh(opened))
    other.store.use_data_of(one.store)
    for process in (one, other):
        assert await is_accepted(process, again)
        assert not await is_accepted(process, opened)


async def test_revocations_of_users_that_are_repeated_are_bounded(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker, "RECENT_LISTS", 2)
    one = await start_process(shared=True)
    for user in ("ada", "ben", "eve"):
        await one.sessions.revoke_user(user, "all")
    one.store.calls.clear()
    await fail_over([], one)
    assert one.store.calls.count("list") == 2


async def test_eviction_lost_by_failover_is_repeated(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1, when_full="evict_oldest")
    evicted = await one.open()
    records = one.store.records
    await other.open()
    await fail_over(records, one, other)
    assert not await is_accepted(one, evicted)
    assert one.store.records == []


async def test_session_ended_for_a_reused_refresh_token_stays_ended(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, refresh_grace_ms=0)
    opened = await one.open()
    await one.refresh(opened)
    records = one.store.records
    await refused(other.refresh(opened), TokenRevoked)
    await fail_over(records, one, other)
    assert one.store.records == []


async def test_revocation_older_than_the_last_minutes_is_not_repeated(one: SessionProcess) -> None:
    opened = await one.open()
    await one.revoke(opened)
    await one.advance(HOUR_MS / 1000)
    one.store.calls.clear()
    one.store.report_all_changed()
    await one.settle()
    assert "end" not in one.store.calls


async def test_revoking_a_session_remembered_as_ended_asks_the_store(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    records = one.store.records
    await one.revoke(opened)
    assert not await one.revoke(opened)
    one.store.roll_back(records)
    assert await one.revoke(opened)
    assert not await is_accepted(other, opened)


async def test_rotation_lost_by_failover_is_repeated(one: SessionProcess, other: SessionProcess) -> None:
    opened = await one.open()
    await other.join(opened)
    records = one.store.records
    again = await one.refresh(opened)
    await fail_over(records, one, other)
    for process in (one, other):
        assert await is_accepted(process, again)
        assert not await is_accepted(process, opened)
    assert await is_accepted(other, await other.refresh(again))


async def test_lost_rotation_of_a_session_that_is_checked_is_repeated_at_once(one: SessionProcess) -> None:
    opened = await one.open()
    records = one.store.records
    again = await one.refresh(opened)
    one.use(again)
    one.store.roll_back(records)
    one.store.report_change(raw(opened))
    await one.settle()
    assert [record.token_digest for record in one.store.records] == [digest_of(again.token)]


async def test_rotations_of_two_processes_are_repeated_in_their_order(
    one: SessionProcess, other: SessionProcess
) -> None:
    await other.advance(REPEATS_S[-1])  # nothing is repeated because of the start any more
    opened = await one.open()
    records = one.store.records
    second = await one.refresh(opened)
    third = await other.refresh(second)
    fourth = await other.refresh(third)
    one.use(opened)
    await fail_over(records, other, one)
    await other.advance(AFTER_GAP_S[0])
    one.store.report_change(raw(opened))
    await one.settle()
    for process in (one, other):
        assert await is_accepted(process, fourth)
        for spent in (opened, second, third):
            assert not await is_accepted(process, spent)
    other.store.calls.clear()
    await other.advance(AFTER_GAP_S[-1])
    await other.advance(REPEATS_S[-1])
    assert other.store.calls.count("get") == 1
    assert "rotate" not in other.store.calls


@pytest.mark.parametrize("rotates_too", [False, True])
async def test_session_in_use_awaits_the_rotation_that_another_process_repeats(
    one: SessionProcess, other: SessionProcess, rotates_too: bool
) -> None:
    opened = await one.open()
    records = one.store.records
    newest = await one.refresh(opened)
    await other.join(newest)
    if rotates_too:
        other.clock.advance(1.0)
        newest = await other.refresh(newest)
    await fail_over(records, other, one)
    for _ in AFTER_GAP_S:
        assert await is_accepted(other, newest)
        await other.advance(1.0)
    for process in (one, other):
        assert await is_accepted(process, newest)
        assert not await is_accepted(process, opened)


async def test_session_that_has_ended_is_not_disputed(one: SessionProcess, other: SessionProcess) -> None:
    opened = await one.open()
    await other.join(opened)
    one.store.roll_back(one.store.records)
    other.store.use_data_of(one.store)
    other.registry.end(raw(opened), Code.TOKEN_REVOKED, EndReason.CLOSED, other.clock.wall())
    other.store.report_change(raw(opened))
    await other.settle()
    assert one.store.records == []


async def test_lost_rotation_is_repeated_by_the_process_that_answered_it_again(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    records = one.store.records
    again = await one.refresh(opened)
    assert (await other.refresh(opened)).token == again.token
    await fail_over(records, other)  # the process that made the rotation has died
    assert await is_accepted(other, again)
    assert not await is_accepted(other, opened)
    assert other.store.records[0].refresh_digest != records[0].refresh_digest


async def test_session_whose_lost_rotation_is_unknown_is_ended(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    records = one.store.records
    again = await one.refresh(opened)
    await other.find(again.token)
    await other.join(opened)
    await fail_over(records, other)  # the process that made the rotation has died
    for _ in AFTER_GAP_S:
        assert await is_accepted(other, again)  # until then it might have repeated the rotation
        await other.advance(1.0)
    assert not await is_accepted(other, again)
    assert not await is_accepted(other, opened)
    assert other.store.records == []


async def test_spent_token_used_before_the_rotation_is_repeated_ends_the_session(
    start_process: StartProcess,
) -> None:
    one, other = await two_processes(start_process, refresh_grace_ms=0)
    opened = await one.open()
    records = one.store.records
    again = await one.refresh(opened)
    one.use(opened)
    one.store.roll_back(records)
    other.store.use_data_of(one.store)
    one.store.late["get"] = asyncio.Event()  # the rotation was read as lost, and is repeated late
    one.store.calls.clear()
    one.store.report_all_changed()
    await until(lambda: "get" in one.store.calls)
    await other.refresh(opened)
    one.store.late.pop("get").set()
    await one.settle()
    assert not one.is_valid(again)
    assert one.store.records == []


async def test_many_revocations_are_repeated_in_few_operations(one: SessionProcess) -> None:
    opened = [await one.open(f"user-{n}") for n in range(300)]
    for each in opened:
        await one.refresh(each)
    records = one.store.records
    for each in opened:
        one.clock.advance(0.001)
        assert await one.revoke(each, user=None)
    one.store.calls.clear()
    await fail_over(records, one)
    assert one.store.records == []
    assert one.store.calls.count("end") == 2
    assert "get" not in one.store.calls  # no rotation of an ended session is repeated
    assert "rotate" not in one.store.calls


async def test_repetition_continues_after_a_failure(one: SessionProcess, other: SessionProcess) -> None:
    opened = await one.open()
    records = one.store.records
    await one.revoke(opened)
    one.store.modes["end"] = FAILS
    one.store.roll_back(records)
    other.store.use_data_of(one.store)
    one.store.report_all_changed()
    while one.store.calls.count("end") < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    one.store.modes.clear()
    await one.settle()
    assert not await is_accepted(other, opened)


async def test_damaged_session_does_not_prevent_recovery(one: SessionProcess) -> None:
    opened = await one.open()
    await one.refresh(opened)
    await one.outage()
    one.store.mode, one.store.modes["get"] = WORKS, DAMAGED
    await one.advance(MAX_DELAY_S)
    assert one.state is HealthState.HEALTHY
