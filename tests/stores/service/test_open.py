"""Sessions are opened in the store first and then in the registry."""

from __future__ import annotations

import asyncio

import pytest

from tests.limits import TIMEOUT
from tests.sessions.helpers import CountedEntropy
from tests.stores.faulty import FAILS, FaultyStore
from tests.stores.service.harness import (
    ADDRESS,
    CLIENT,
    SessionProcess,
    StartProcess,
    cancel_and_wait,
    raw,
    refused,
)
from zcproto.common.roles import OPERATORS
from zcproto.errors import Code, ResourceExhausted, TokenRevoked
from zcproto.sessions import OpenedSession, SessionSettings
from zcproto.sessions.health import HealthState
from zcproto.stores.service import OPENINGS_PER_USER


@pytest.mark.parametrize("is_shared", [False, True])
async def test_opened_session_is_in_the_store_and_in_the_registry(
    start_process: StartProcess, is_shared: bool
) -> None:
    process = await start_process(shared=is_shared)
    opened = await process.open(key="device:phone", roles=OPERATORS)
    assert process.is_valid(opened)
    record = process.stored(opened)
    assert record == process.registry.record(raw(opened))
    assert (record.user, record.client, record.address, record.key) == (
        "ada",
        CLIENT,
        ADDRESS,
        "device:phone",
    )
    assert opened.session.bound
    assert opened.session.roles == OPERATORS


async def test_session_is_not_returned_before_the_store_has_it(process: SessionProcess) -> None:
    process.store.gate = asyncio.Event()
    opening = asyncio.ensure_future(process.open())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not opening.done()
    assert len(process.registry) == 0
    process.store.gate.set()
    assert process.is_valid(await opening)


async def test_per_user_limit_is_applied_by_the_store(start_process: StartProcess) -> None:
    process = await start_process(per_user=2, when_full="refuse")
    await process.open()
    await process.open()
    error = await refused(process.open(), ResourceExhausted)
    assert error.details == {"limit": 2}
    assert process.store.registry.kept == process.registry.kept == 2
    await process.open("bob")


async def test_session_evicted_by_the_limit_ends_in_the_registry(start_process: StartProcess) -> None:
    process = await start_process(per_user=1, when_full="evict_oldest")
    first = await process.open()
    second = await process.open()
    assert process.ended == [(first.session.id, Code.SESSION_REPLACED, "replaced by a newer session")]
    assert process.check(first.token) is Code.SESSION_REPLACED
    assert process.is_valid(second)


async def test_full_server_refuses_without_calling_the_store(start_process: StartProcess) -> None:
    process = await start_process(max_sessions=1)
    await process.open()
    calls = list(process.store.calls)
    error = await refused(process.open("bob"), ResourceExhausted)
    assert error.details == {"retry_after_ms": 10_000}
    assert process.store.calls == calls


async def test_login_refused_during_an_outage_leaves_nothing_to_end_after_it(process: SessionProcess) -> None:
    await process.outage()
    await refused(process.open())
    await process.recover()
    assert "end" not in process.store.calls


async def test_concurrent_openings_do_not_exceed_max_sessions(start_process: StartProcess) -> None:
    process = await start_process(max_sessions=3)
    outcomes = await asyncio.gather(*(process.open(f"u{n}") for n in range(6)), return_exceptions=True)
    assert sum(isinstance(outcome, OpenedSession) for outcome in outcomes) == 3
    assert sum(isinstance(outcome, ResourceExhausted) for outcome in outcomes) == 3


async def test_user_who_logs_in_without_end_is_refused_and_others_are_served(
    start_process: StartProcess,
) -> None:
    process = await start_process(per_user=2 * OPENINGS_PER_USER)
    process.sync.breaker.timeout = TIMEOUT
    process.store.late["create"] = asyncio.Event()
    waiting = [asyncio.ensure_future(process.open()) for _ in range(OPENINGS_PER_USER)]
    await asyncio.sleep(0)
    error = await refused(process.open(), ResourceExhausted)
    assert error.details == {"retry_after_ms": 100}
    other = asyncio.ensure_future(process.open("bob"))
    await asyncio.sleep(0)
    process.store.late["create"].set()
    await asyncio.gather(other, *waiting)
    assert (await process.open()).session.user == "ada"
    assert not process.sessions._opening_of  # type: ignore[attr-defined]


async def test_session_revoked_while_it_is_opened_is_not_returned(process: SessionProcess) -> None:
    process.sync.breaker.timeout = TIMEOUT
    process.store.late["create"] = asyncio.Event()
    opening = asyncio.ensure_future(process.open())
    while not process.store.registry.kept:  # noqa: ASYNC110 - the store has no event to wait for
        await asyncio.sleep(0)
    assert await process.sessions.revoke_user("ada", "all") == 1
    process.store.late["create"].set()
    await refused(opening, TokenRevoked)
    assert process.store.registry.kept == process.registry.kept == 0


async def test_session_whose_caller_was_cancelled_is_ended(process: SessionProcess) -> None:
    process.store.gate = asyncio.Event()
    await cancel_and_wait(asyncio.ensure_future(process.open()))
    process.store.gate.set()
    await process.settle()
    assert process.store.calls == ["open", "create", "end"]
    assert process.store.registry.kept == process.registry.kept == 0


async def test_cancelled_opening_that_fails_later_leaves_no_session(process: SessionProcess) -> None:
    process.store.gate = asyncio.Event()
    await cancel_and_wait(asyncio.ensure_future(process.open()))
    process.store.mode = FAILS
    process.store.gate.set()
    await process.settle()
    assert process.registry.kept == 0


async def test_full_store_reports_the_limit_of_the_user(start_process: StartProcess) -> None:
    """A refusal by the store itself reaches the caller."""
    store = FaultyStore(SessionSettings(max_sessions=1), CountedEntropy())
    process = await start_process(store)
    await process.open()
    error = await refused(process.open("bob"), ResourceExhausted)
    assert error.details == {"retry_after_ms": 10_000}
    assert process.state is HealthState.HEALTHY
