"""During an outage known sessions go on for the grace, and no caller waits for the store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.stores.faulty import DAMAGED, FAILS, FAILS_AFTER, HANGS, HANGS_AFTER, READ_ONLY, WORKS
from tests.stores.service.harness import GRACE, HOUR_MS, Log, SessionProcess, StartProcess, refused
from zcproto.errors import Code, ConfigError, Unavailable
from zcproto.sessions import EndReason, OpenedSession
from zcproto.sessions.health import FAILURES, FIRST_DELAY_S, MAX_DELAY_S, HealthState
from zcproto.stores import revoker as revoker_module
from zcproto.stores.base import Change, ChangeKind
from zcproto.stores.sync import HOLD_S


@pytest.mark.parametrize("mode", [FAILS, HANGS, FAILS_AFTER, HANGS_AFTER, READ_ONLY])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_outage_keeps_known_sessions_and_refuses_other_operations(
    start_process: StartProcess, log: Log, mode: str, is_shared: bool
) -> None:
    process = await start_process(shared=is_shared)
    known = [await process.open() for _ in range(3)]
    for each in known:
        process.use(each)
    process.store.mode = mode
    for _ in range(3):
        error = await refused(process.open())
        assert error.details["retry_after_ms"] >= 100
    assert process.state is HealthState.DEGRADED
    calls = list(process.store.calls)
    for _ in range(10):  # no call waits for a timeout
        await refused(process.open())
        await refused(process.refresh(known[0]))
        assert all(process.is_valid(each) for each in known)
    assert process.store.calls == calls
    await process.recover()
    assert process.is_valid(await process.open("bob"))
    assert process.is_valid(await process.refresh(known[0]))
    assert all(process.is_valid(each) for each in known[1:])
    assert process.ended == []
    names = [event for event in log.events if event.startswith("store.")]
    slow = ["store.slow"] if mode in (HANGS, HANGS_AFTER) else []
    assert names == [*slow, "store.degraded", "store.recovered"]
    # Orphaned sessions are ended, and do not count against the limit.
    assert process.store.registry.kept == process.registry.kept == 4


async def test_hung_store_costs_one_timeout(process: SessionProcess) -> None:
    process.store.mode = HANGS
    outcomes = await asyncio.gather(*(process.open(f"u{n}") for n in range(50)), return_exceptions=True)
    assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
    asked = process.store.calls.count("create")
    await refused(process.open())
    assert process.store.calls.count("create") == asked  # the store is not called
    assert process.sync.health.outages == 1


async def test_tokens_are_refused_after_the_grace_until_recovery(process: SessionProcess, log: Log) -> None:
    opened = await process.open()
    await process.outage()
    await process.advance(GRACE - 1)
    assert process.is_valid(opened)
    await process.advance(1.5)
    assert process.check(opened.token) is Code.UNAVAILABLE
    assert process.check(b"x" * 32) is Code.UNAVAILABLE
    assert process.ended == []
    assert process.sessions.statistics()["refusing"]
    await process.recover()
    assert process.is_valid(opened)
    names = [event for event in log.events if event.startswith("store.")]
    assert names == ["store.degraded", "store.grace_over", "store.recovered"]


async def test_new_connection_ends_an_outage_before_the_next_probe(start_process: StartProcess) -> None:
    process = await start_process(shared=True)
    await process.outage()
    for _ in range(3):
        await process.advance(MAX_DELAY_S)
    process.store.mode = WORKS
    await process.advance(2 * FIRST_DELAY_S)
    assert process.state is HealthState.DEGRADED
    process.store.report_all_changed()
    await process.advance(FIRST_DELAY_S)
    assert process.state is HealthState.HEALTHY


@pytest.mark.parametrize("mode", [HANGS, FAILS])
async def test_lost_connection_begins_an_outage_without_an_operation(
    start_process: StartProcess, mode: str
) -> None:
    process = await start_process(shared=True, grace=0.0)
    opened = await process.open()
    process.store.on_change(Change(ChangeKind.LOST))
    await process.settle()
    assert process.is_valid(opened)
    process.store.mode = mode
    process.store.on_change(Change(ChangeKind.LOST))
    await process.settle()
    assert process.state is HealthState.DEGRADED
    assert process.check(opened.token) is Code.UNAVAILABLE


async def test_store_away_by_order_is_an_outage_without_an_alert(
    start_process: StartProcess, log: Log
) -> None:
    process = await start_process(shared=True, grace=0.0)
    opened = await process.open()
    process.use(opened)
    for has_alert in (False, True):
        log.clear()
        process.store.on_change(Change(ChangeKind.AWAY))
        assert process.is_valid(opened)
        await process.outage()
        assert process.check(opened.token) is Code.UNAVAILABLE
        if has_alert:
            await process.advance(HOLD_S)
        process.store.mode = WORKS
        await process.advance(2 * FIRST_DELAY_S)
        if has_alert:
            await process.recover()
        assert process.is_valid(opened)
        found = [event for event in log.events if event.startswith("store.")]
        expected = ["store.degraded", "store.grace_over", "store.recovered"] if has_alert else ["store.moved"]
        assert found == expected


async def test_wall_clock_jump_does_not_end_the_grace(start_process: StartProcess) -> None:
    process = await start_process(idle_timeout_ms=None)
    opened = await process.open()
    await process.outage()
    process.clock.wall_ms += 10 * HOUR_MS
    await process.advance(10)
    assert process.is_valid(opened)
    process.clock.wall_ms -= 20 * HOUR_MS
    await process.advance(GRACE - 11)
    assert process.is_valid(opened)
    await process.advance(2)
    assert process.check(opened.token) is Code.UNAVAILABLE


async def test_without_grace_tokens_are_refused_at_once(start_process: StartProcess) -> None:
    process = await start_process(grace=0.0)
    opened = await process.open()
    await process.outage()
    assert process.check(opened.token) is Code.UNAVAILABLE
    await process.recover()
    assert process.is_valid(opened)


async def test_orphaned_sessions_are_ended_by_the_cleanup(
    process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revoker_module, "ORPHANS", 1)
    process.store.modes["create"] = FAILS_AFTER
    await refused(process.open())
    await refused(process.open())
    assert process.state is HealthState.HEALTHY
    assert process.store.registry.kept == 2
    process.store.modes.clear()
    await process.sync.clean()
    assert process.store.registry.kept == 1  # the oldest orphan was dropped


async def test_cleanup_of_one_process_of_many_leaves_the_store_to_another(process: SessionProcess) -> None:
    await process.sync.clean()
    assert "expire" in process.store.calls
    process.store.calls.clear()
    process.sync.maintains = False
    await process.sync.clean()
    assert "expire" not in process.store.calls


async def test_stop_during_an_outage_does_not_hang(process: SessionProcess, log: Log) -> None:
    await process.open()
    process.store.mode = HANGS
    opening = asyncio.ensure_future(process.open())
    await asyncio.sleep(0)
    await process.sync.stop()
    await refused(opening)
    assert "store.uses_not_written" in log.events


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("create", lambda process, opened: process.open()),
        ("rotate", lambda process, opened: process.refresh(opened)),
        ("find", lambda process, opened: process.find(b"x" * 32)),
        ("end", lambda process, opened: process.revoke(opened)),
        ("end_user", lambda process, opened: process.sessions.revoke_user("ada", "all")),
        ("end_all", lambda process, opened: process.sessions.revoke_all("all")),
    ],
)
async def test_operation_cancelled_by_the_stop_is_unavailable(
    shared_process: SessionProcess,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    call: Callable[[SessionProcess, OpenedSession], Coroutine[Any, Any, Any]],
) -> None:
    process = shared_process
    monkeypatch.setattr(process.store, "keeps_time", True)  # no timeout of ours ends the operation first
    opened = await process.open()
    process.store.calls.clear()
    process.store.modes[operation] = HANGS
    calling = asyncio.ensure_future(call(process, opened))
    await process.store.called(operation)
    process.sync.breaker.timeout = 0.0
    await process.sync.stop()
    assert "the server stopped" in (await refused(calling)).message


async def test_stop_cancels_a_running_probe(process: SessionProcess) -> None:
    await process.outage(HANGS)
    process.clock.advance(MAX_DELAY_S)
    process.timers.advance(MAX_DELAY_S)
    assert process.state is HealthState.RECOVERING
    await asyncio.sleep(0)
    await process.sync.stop()
    assert not process.sync.tasks.running
    assert len(process.sync.wheel) == 0


async def test_probe_that_raises_is_logged_and_repeated(
    process: SessionProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    await process.outage()

    async def ping() -> None:
        raise ConfigError(["store.url: the password was changed"])

    with monkeypatch.context() as patch:
        patch.setattr(process.store, "ping", ping)
        await process.advance(MAX_DELAY_S)
        assert process.state is HealthState.DEGRADED
        assert "store.probe_failed" in log.events
    await process.recover()


async def test_exception_in_a_background_task_is_logged(
    process: SessionProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wrong() -> None:
        raise ValueError("a bug")

    process.sync.tasks.run_in_background(wrong())
    await process.settle()
    assert "store.task_failed" in log.events


async def test_damaged_record_fails_the_call_without_an_outage(shared_process: SessionProcess) -> None:
    process = shared_process
    opened = await process.open("ada")
    process.store.mode = DAMAGED
    for _ in range(2 * FAILURES):
        error = await refused(process.open("ben"))
        assert "damaged" in error.message
        await refused(process.refresh(opened))
        await refused(process.sessions.list("ben"))
    await refused(process.find(bytes(32)))
    assert process.state is HealthState.HEALTHY
    assert process.sync.health.failures == 0
    process.store.mode = WORKS
    assert process.is_valid(await process.open("ben"))


async def test_revocation_that_meets_a_damaged_record_is_refused_and_reported(
    shared_process: SessionProcess, log: Log
) -> None:
    process = shared_process
    opened = await process.open("ada")
    process.store.modes["end_user"] = DAMAGED
    await refused(process.sessions.revoke_user("ada", EndReason.BY_USER))
    assert not process.is_valid(opened)
    assert "revocations.not_kept" in log.events
    assert process.state is HealthState.HEALTHY
    assert len(process.pending) == 0


async def test_damaged_record_does_not_prolong_an_outage(shared_process: SessionProcess, log: Log) -> None:
    process = shared_process
    await process.open("ada")
    await process.outage()
    assert await process.sessions.revoke_user("ada", EndReason.BY_USER) == 1
    process.store.mode, process.store.modes["list"] = WORKS, DAMAGED
    await process.advance(MAX_DELAY_S)
    assert process.state is HealthState.HEALTHY
    assert "revocations.not_kept" in log.events
    assert len(process.pending) == 0


async def test_end_of_an_outage_is_reported_once(process: SessionProcess) -> None:
    ends: list[HealthState] = []
    process.sync.on_reached = lambda: ends.append(process.state)
    await process.outage()
    assert ends == []
    await process.recover()
    await process.advance(MAX_DELAY_S)
    assert ends == [HealthState.HEALTHY]
