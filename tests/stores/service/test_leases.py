"""A login at the limit ends a session that no connection uses, whichever process had the connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.stores.faulty import FAILS, WORKS
from tests.stores.service.harness import FaultyStoreView, Log, SessionProcess, StartProcess, raw, refused
from zcproto.errors import Code, ResourceExhausted, Unavailable
from zcproto.sessions import OpenedSession
from zcproto.stores.leases import BATCH, LEASE_S, MAX_CHANGED, RENEW_S

ALL_IN_USE = "all sessions of this user are in use"


def connect(process: SessionProcess, opened: OpenedSession) -> OpenedSession:
    process.use(opened)
    process.sync.leases.connection_changed(opened.session.id)
    return opened


def disconnect(process: SessionProcess, opened: OpenedSession) -> None:
    process.used.discard(opened.session.id)
    process.sync.leases.connection_changed(opened.session.id)


async def two_processes(start_process: StartProcess, **options: Any) -> tuple[SessionProcess, SessionProcess]:
    """Return two processes that share a store, and have had it for longer than a lease."""
    one = await start_process(shared=True, **options)
    other = await start_process(FaultyStoreView(one.store), **options)
    for process in (one, other):
        process.store.inner.time = process.clock.wall
    one.clock.advance(LEASE_S)
    for process in (one, other):
        process.timers.advance(LEASE_S)
        await process.settle()
    return one, other


async def advance(seconds: float, *processes: SessionProcess) -> None:
    """Advance the time of all processes in steps that are shorter than a renewal."""
    for _ in range(round(seconds)):
        processes[0].clock.advance(1.0)
        for process in processes:
            process.timers.advance(1.0)
            await process.settle()


# --- a store of one process --------------------------------------------------------------------------------------


@pytest.mark.requirement("per_user")
async def test_login_at_the_limit_ends_the_oldest_disconnected_session(start_process: StartProcess) -> None:
    process = await start_process(per_user=3)
    first, second, third = [connect(process, await process.open()) for _ in range(3)]
    disconnect(process, second)
    disconnect(process, third)
    new = connect(process, await process.open())
    assert process.ended == [
        (
            second.session.id,
            Code.TOKEN_EXPIRED,
            "ended without a connection, to make room for a newer session",
        )
    ]
    assert process.check(second.token) is Code.TOKEN_EXPIRED
    assert all(process.is_valid(each) for each in (first, third, new))


async def test_racing_logins_neither_exceed_the_limit_nor_end_each_others_sessions(
    start_process: StartProcess,
) -> None:
    process = await start_process(per_user=5)
    process.sync.breaker.timeout = TIMEOUT

    async def login() -> OpenedSession | None:
        try:
            opened = await process.open()
        except ResourceExhausted:
            return None
        return connect(process, opened)

    for _ in range(8):
        await asyncio.gather(*(login() for _ in range(25)))
        assert process.store.registry.kept == process.registry.kept == len(process.used) == 5
    assert process.ended == []


async def test_sessions_of_before_a_restart_have_a_lease_to_come_back(start_process: StartProcess) -> None:
    before = await start_process(per_user=1)
    old = await before.open()
    await before.sync.stop()
    before.clock.advance(1.0)
    after = await start_process(before.store, per_user=1)
    assert ALL_IN_USE in (await refused(after.open(), ResourceExhausted)).message
    after.clock.advance(LEASE_S)
    await after.open()
    assert after.check(old.token) is Code.TOKEN_EXPIRED


async def test_store_of_one_process_has_no_leases(start_process: StartProcess) -> None:
    process = await start_process()
    connect(process, await process.open())
    await advance(2 * RENEW_S, process)
    assert "lease" not in process.store.calls


# --- a shared store ----------------------------------------------------------------------------------------------


async def test_session_that_another_process_has_a_connection_for_is_kept(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1)
    opened = connect(one, await one.open())
    await advance(10 * LEASE_S, one, other)
    assert ALL_IN_USE in (await refused(other.open(), ResourceExhausted)).message
    assert one.is_valid(opened)


async def test_session_whose_connection_ended_elsewhere_makes_room_at_once(
    start_process: StartProcess,
) -> None:
    one, other = await two_processes(start_process, per_user=1)
    opened = connect(one, await one.open())
    disconnect(one, opened)
    await advance(1.0, one)
    await other.open()
    await one.settle()
    assert one.store.registry.record(raw(opened)) is None


async def test_own_changes_are_written_before_a_session_is_chosen(start_process: StartProcess) -> None:
    """Neither a connection that has just ended nor one that has just begun is overlooked."""
    process, _ = await two_processes(start_process, per_user=2)
    first, second = [connect(process, await process.open()) for _ in range(2)]
    await advance(1.0, process)
    disconnect(process, first)
    await advance(1.0, process)
    connect(process, first)
    disconnect(process, second)
    await process.open()
    assert process.is_valid(first)
    assert not process.is_valid(second)


async def test_sessions_of_a_crashed_process_make_room_when_their_leases_have_expired(
    start_process: StartProcess, log: Log
) -> None:
    one, other = await two_processes(start_process, per_user=1)
    crashed = connect(one, await one.open())
    await advance(LEASE_S - 1, other)
    await refused(other.open(), ResourceExhausted)
    await advance(1.0, other)
    await other.open()
    (evicted,) = log.of("session.evicted")
    assert evicted["session"] == crashed.session.id


async def test_expired_leases_do_not_count_for_a_lease_after_an_outage(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1)
    connect(one, await one.open())
    await advance(LEASE_S, other)
    await other.outage()
    await other.recover()
    await refused(other.open(), ResourceExhausted)
    await advance(LEASE_S, other)
    await other.open()


async def test_leases_are_renewed_as_soon_as_the_store_is_back(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1)
    connect(one, await one.open())
    await one.outage()
    await advance(2 * LEASE_S, one)
    assert one.store.mode == FAILS
    await one.recover()
    await advance(1.0, one)
    await refused(other.open(), ResourceExhausted)


async def test_lease_that_could_not_be_written_is_written_again(start_process: StartProcess) -> None:
    one, other = await two_processes(start_process, per_user=1)
    opened = connect(one, await one.open())
    await advance(1.0, one)
    disconnect(one, opened)
    one.store.modes["lease"] = FAILS
    await advance(1.0, one)
    await refused(other.open(), ResourceExhausted)
    one.store.modes["lease"] = WORKS
    await advance(2.0, one)
    await other.open()


async def test_login_fails_if_the_leases_cannot_be_written(start_process: StartProcess) -> None:
    one, _ = await two_processes(start_process, per_user=1)
    connect(one, await one.open())
    one.store.modes["lease"] = FAILS
    await refused(one.open(), Unavailable)


async def test_ten_thousand_leases_are_renewed_in_few_operations(start_process: StartProcess) -> None:
    one, _ = await two_processes(start_process, per_user=100_000)
    opened = await one.open()
    sessions = [opened.session.id[:-5] + f"{number:04}A" for number in range(10_000)]
    one.used.update(sessions)
    one.store.calls.clear()
    await advance(2 * RENEW_S, one)
    assert one.store.calls.count("lease") == 2 * 10_000 // BATCH


async def test_changes_that_wait_for_the_store_are_bounded(start_process: StartProcess) -> None:
    one, _ = await two_processes(start_process)
    for number in range(MAX_CHANGED + 10):
        one.sync.leases.connection_changed(f"{number}")
    assert len(one.sync.leases._changed) == MAX_CHANGED
    one.sync.leases._changed.clear()


async def test_n_plus_one_clients_that_always_come_back_do_not_end_each_others_sessions(
    start_process: StartProcess,
) -> None:
    """No kick loop: the one too many is refused each time, on any process, and the others keep their sessions."""
    processes = await two_processes(start_process, per_user=5)
    connected = [connect(processes[n % 2], await processes[n % 2].open()) for n in range(5)]
    for number in range(60):
        await advance(3.0, *processes)
        await refused(processes[number % 2].open(), ResourceExhausted)
    assert processes[0].ended == processes[1].ended == []
    for number, opened in enumerate(connected):
        assert processes[number % 2].is_valid(opened)
