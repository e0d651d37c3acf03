"""Revocations during an outage are stored in a file and replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.stores.faulty import FAILS, FAILS_AFTER, HANGS, HANGS_AFTER, READ_ONLY, WORKS
from tests.stores.service.harness import (
    HOUR_MS,
    FaultyStoreView,
    Log,
    SessionProcess,
    StartProcess,
    raw,
    refused,
)
from zcproto.errors import Code
from zcproto.sessions.health import MAX_DELAY_S, HealthState
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores import revoker as revoker_module
from zcproto.stores.base import CLOCK_SKEW_MS, StoreUnavailable


@pytest.mark.parametrize("mode", [FAILS, HANGS, READ_ONLY, FAILS_AFTER, HANGS_AFTER])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["the first to notice", "known to be out"])
async def test_revocations_during_an_outage_apply_after_it(
    start_process: StartProcess, mode: str, is_shared: bool, known: bool
) -> None:
    process = await start_process(shared=is_shared, per_user=100)
    one, kept = await process.open("ada"), await process.open("ada")
    bobs = [await process.open("bob") for _ in range(3)]
    process.use(kept)
    process.store.mode = mode
    if known:
        await process.outage(mode)
    assert await process.revoke(one)
    assert await process.sessions.revoke_user("bob", "all") == 3
    assert process.state is HealthState.DEGRADED
    assert process.check(one.token) is Code.TOKEN_REVOKED
    assert len(process.pending) == 2
    await process.recover()
    assert len(process.pending) == 0
    assert process.store.registry.records(None, 100) == [process.store.registry.record(raw(kept))]
    assert process.is_valid(kept)
    assert not any(process.is_valid(each) for each in [one, *bobs])


async def test_pending_revocations_survive_a_crash_and_apply_before_a_token_is_accepted(
    start_process: StartProcess, tmp_path: Path
) -> None:
    one = await start_process()
    gone, kept = await one.open(), await one.open("bob")
    await one.outage()
    await one.revoke(gone)
    await one.pending.close()  # releases the lock, as the end of the process does
    other = await start_process(one.store)
    assert other.check(kept.token) is Code.UNAVAILABLE
    one.store.mode = WORKS
    one.store.gate = asyncio.Event()
    other.clock.advance(MAX_DELAY_S)
    other.timers.advance(MAX_DELAY_S)
    for _ in range(20):
        await asyncio.sleep(0)
    assert other.check(gone.token) is other.check(kept.token) is Code.UNAVAILABLE
    one.store.gate.set()
    await other.settle()
    assert not other.is_valid(gone)
    assert other.is_valid(kept)
    assert one.store.registry.record(raw(gone)) is None


async def test_pending_revocations_are_replayed_before_loading(start_process: StartProcess) -> None:
    one = await start_process()
    gone = await one.open()
    await one.outage()
    await one.revoke(gone)
    await one.pending.close()
    one.store.mode = WORKS
    one.store.calls.clear()
    await start_process(one.store)
    assert one.store.calls == ["open", "end"]


async def test_replayed_sessions_are_remembered_as_long_as_the_latest_revocation(
    process: SessionProcess,
) -> None:
    opened = [await process.open(), await process.open()]
    await process.outage()
    for each in opened:
        process.clock.advance(60)
        await process.revoke(each)
    revoked_at = process.clock.wall()
    await process.recover()
    ended = [process.store.registry.ended(raw(each)) for each in opened]
    assert [each and each.ended_at for each in ended] == 2 * [revoked_at]


async def test_revoke_all_during_an_outage_applies_after_it(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker_module, "MAX_ENDED", 7)
    process = await start_process(per_user=100)
    opened = [await process.open(f"u{n % 3}") for n in range(30)]
    await process.outage()
    assert await process.sessions.revoke_all("all") == 30
    end = process.store.end
    sizes: list[int] = []

    async def sized(ids: Sequence[bytes], *rest: Any) -> Any:
        sizes.append(len(ids))
        return await end(ids, *rest)

    monkeypatch.setattr(process.store, "end", sized)
    await process.recover()
    assert sum(sizes) == 30
    assert max(sizes) == 7
    assert process.store.registry.kept == 0
    assert not any(process.is_valid(each) for each in opened)


async def test_revoke_all_replays_more_sessions_than_are_listed_at_once(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.stores import memory_store as memory

    monkeypatch.setattr(revoker_module, "MAX_LISTED", 10)
    monkeypatch.setattr(memory, "MAX_LISTED", 10)
    process = await start_process(per_user=100)
    for number in range(25):
        await process.open(f"u{number}")
    await process.outage()
    await process.sessions.revoke_all("all")
    await process.recover()
    assert process.store.registry.kept == 0


async def test_replay_spares_sessions_opened_after_the_revocation(
    one: SessionProcess, other: SessionProcess
) -> None:
    await one.open()
    await one.outage()
    await one.sessions.revoke_user("ada", "all")
    one.clock.advance(CLOCK_SKEW_MS / 1000 + 1)
    new = await other.open()
    await one.recover()
    assert other.is_valid(new)
    assert one.store.registry.kept == 1


async def test_session_changed_while_it_is_checked_is_checked_again(
    one: SessionProcess, other: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await one.open(), await one.open()
    await other.join(first, second)
    get, held = other.store.get, asyncio.Event()

    async def slow(id: bytes) -> SessionRecord | EndedRecord | None:
        found = await get(id)
        if id == raw(second):
            await held.wait()
        return found

    monkeypatch.setattr(other.store, "get", slow)
    for each in (first, second):
        other.store.report_change(raw(each))
    while other.store.calls.count("get") < 2:  # noqa: ASYNC110 - a list of calls has no event
        await asyncio.sleep(0)
    await one.revoke(first)
    other.store.report_change(raw(first))  # makes the pending answer outdated
    held.set()
    await other.settle()
    assert (other.is_valid(first), other.is_valid(second)) == (False, True)


async def test_revocation_after_the_clock_was_set_back_ends_all_sessions(process: SessionProcess) -> None:
    opened = await process.open()
    await process.outage()
    process.clock.wall_ms -= HOUR_MS
    await process.sessions.revoke_user("ada", "all")
    await process.recover()
    assert process.store.registry.kept == 0
    assert not process.is_valid(opened)


async def test_revocation_that_cannot_be_stored_raises_unavailable(
    start_process: StartProcess, log: Log
) -> None:
    process = await start_process(pending_limit=1)
    first, second = await process.open(), await process.open()
    await process.outage()
    assert await process.revoke(first)
    await refused(process.revoke(second))
    assert not process.is_valid(second)  # it has ended here nevertheless
    assert "revocations.not_kept" in log.events
    await process.recover()
    assert not process.is_valid(second)
    assert process.store.registry.kept == 0


async def test_revoke_key_ends_all_sessions_even_if_one_revocation_fails(start_process: StartProcess) -> None:
    process = await start_process(pending_limit=1)
    opened = [await process.open(key="device:phone") for _ in range(3)]
    await process.outage()
    await refused(process.sessions.revoke_key("ada", "device:phone", "removed"))
    assert not any(process.is_valid(each) for each in opened)
    await process.recover()
    assert process.store.registry.kept == 0


async def test_repeated_revocation_succeeds_after_the_first_failed(
    process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await process.open()
    await process.outage()

    async def submit(work: object, within: float) -> None:
        raise StoreUnavailable("the disk did not answer")

    with monkeypatch.context() as patch:
        patch.setattr(process.pending, "_submit", submit)
        await refused(process.revoke(opened))
        await refused(process.revoke(opened))
    assert not await process.revoke(opened, "eve")
    assert await process.revoke(opened)
    await process.recover()
    assert process.store.registry.kept == 0
    assert not await process.revoke(opened)


async def test_replayed_revocation_that_cannot_be_removed_is_harmless(
    process: SessionProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await process.open()
    await process.outage()
    await process.revoke(opened)

    async def submit(work: object, within: float) -> None:
        raise StoreUnavailable("the disk did not answer")

    monkeypatch.setattr(process.pending, "_submit", submit)
    await process.recover()
    assert "revocations.not_removed" in log.events
    assert process.is_valid(await process.open())


async def test_revocation_during_recovery_is_replayed_before_it_ends(process: SessionProcess) -> None:
    first, second = await process.open(), await process.open()
    await process.outage()
    await process.revoke(first)
    process.sync.breaker.timeout = TIMEOUT
    process.store.mode = WORKS
    process.store.gate = asyncio.Event()
    process.clock.advance(MAX_DELAY_S)
    process.timers.advance(MAX_DELAY_S)
    assert process.state is HealthState.RECOVERING
    assert await process.revoke(second)
    process.store.gate.set()
    await process.settle()
    assert process.state is HealthState.HEALTHY
    assert len(process.pending) == 0
    assert process.store.registry.kept == 0


@pytest.mark.parametrize("user", ["ada", None])
@pytest.mark.parametrize("is_kept", [True, False], ids=["on disk", "in memory"])
async def test_revocation_of_an_unknown_session_applies_after_the_outage(
    one: SessionProcess,
    other: SessionProcess,
    user: str | None,
    is_kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = await one.open()
    await other.outage()
    if is_kept:
        assert await other.revoke(opened, user)
    else:  # the disk is full
        with monkeypatch.context() as patch:
            patch.setattr(other.pending._file, "_save", fail_to_write)
            await refused(other.revoke(opened, user))
    await other.recover()
    assert one.store.registry.record(raw(opened)) is None
    assert len(other.pending) == 0
    assert other.registry.revoked == 0


def fail_to_write() -> None:
    raise OSError(28, "No space left on device")


async def test_user_cannot_revoke_sessions_of_others_by_an_outage(
    one: SessionProcess, other: SessionProcess
) -> None:
    first, second = await one.open("ada"), await one.open("ada")
    await other.outage()
    assert await other.revoke(second, "ada")
    for opened in (first, second):
        assert await other.revoke(opened, "eve")
        assert await other.revoke(opened, "eve")  # a repetition takes no more room
    assert other.pending.unverified("eve") == 2
    await other.recover()
    assert one.store.registry.record(raw(first)) is not None
    assert one.store.registry.record(raw(second)) is None
    assert other.pending.unverified("eve") == 0


async def test_user_who_revokes_unknown_sessions_in_an_outage_is_bounded(start_process: StartProcess) -> None:
    one = await start_process(shared=True, per_user=3)
    other = await start_process(FaultyStoreView(one.store), per_user=2)
    found = [await one.open("ada") for _ in range(3)]
    await other.outage()
    for opened in found[:2]:
        assert await other.revoke(opened, "eve")
    await refused(other.revoke(found[2], "eve"))
    assert await other.revoke(found[2], "ada")
    assert await other.revoke(found[1], None)
    assert len(other.pending) == 4


async def test_slow_store_and_file_are_written_concurrently(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker_module, "_STORE_ALONE", 0.0)
    process = await start_process(shared=True)
    process.sync.breaker.timeout = TIMEOUT
    opened, other = await process.open(), await process.open()
    for each, failed in ((opened, False), (other, True)):
        process.store.gate = asyncio.Event()
        if failed:
            process.store.modes["end"] = FAILS
        revoking = asyncio.create_task(process.revoke(each))
        while not len(process.pending):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not revoking.done()
        process.store.gate.set()
        assert await revoking
        await process.settle()
        assert len(process.pending) == failed
        assert not process.is_valid(each)
    assert process.state is HealthState.DEGRADED


@pytest.mark.parametrize("fails", [False, True])
async def test_revocations_left_by_another_process_are_taken_over_while_this_one_runs(
    one: SessionProcess, start_process: StartProcess, *, fails: bool
) -> None:
    other = await start_process(FaultyStoreView(one.store), shared=True)
    opened = await other.open()
    await other.outage()
    await other.revoke(opened)
    assert isinstance(one.store.registry.record(raw(opened)), SessionRecord)
    await other.sync.stop()
    if fails:
        one.store.mode = FAILS
    one.sync.take_left()
    await one.settle()
    assert (one.state is HealthState.DEGRADED) is fails
    if fails:
        await one.recover()
    assert one.store.registry.record(raw(opened)) is None
    assert len(one.pending) == 0


async def test_nothing_is_taken_over_by_a_process_that_stops(start_process: StartProcess) -> None:
    process = await start_process()
    await process.sync.stop()
    process.sync.take_left()
    assert not process.sync.tasks.running
