"""Refreshes, repeated, concurrent or with an unknown outcome, never lose or revive a session."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.stores.faulty import FAILS, FAILS_AFTER, HANGS, HANGS_AFTER
from tests.stores.service.harness import (
    ADDRESS,
    CLIENT,
    DAY_MS,
    FaultyStoreView,
    Log,
    SessionProcess,
    StartProcess,
    cancel_and_wait,
    raw,
    refused,
)
from zcproto.errors import Code, TokenExpired, TokenRevoked, Unauthenticated
from zcproto.sessions import OpenedSession
from zcproto.sessions.token import digest_of
from zcproto.stores import service as service_module


async def test_refresh_issues_a_new_pair_and_revokes_the_old_one(process: SessionProcess) -> None:
    opened = await process.open()
    again = await process.refresh(opened)
    assert again.session.id == opened.session.id
    assert process.is_valid(again)
    assert process.check(opened.token) is Code.TOKEN_REVOKED
    stored = process.stored(opened)
    assert stored.token_digest == digest_of(again.token)
    assert process.ended == []


async def test_repeated_refresh_returns_the_same_pair_within_the_grace(process: SessionProcess) -> None:
    opened = await process.open()
    first = await process.refresh(opened)
    calls = process.store.calls.count("rotate")
    second = await process.refresh(opened)
    assert (first.token, first.refresh_token) == (second.token, second.refresh_token)
    assert process.store.calls.count("rotate") == calls


@pytest.mark.parametrize("is_shared", [False, True])
async def test_reused_refresh_token_ends_the_session_and_is_reported(
    start_process: StartProcess, log: Log, is_shared: bool
) -> None:
    process = await start_process(shared=is_shared)
    opened = await process.open()
    again = await process.refresh(opened)
    process.clock.advance(60)
    await refused(process.refresh(opened, user="ada"), TokenRevoked)
    assert process.check(again.token) is Code.TOKEN_REVOKED
    assert process.ended == [(opened.session.id, Code.TOKEN_REVOKED, "refresh token reused")]
    assert process.registry.refresh_reused == 1
    (line,) = log.of("session.refresh_reused")
    assert (line["session"], line["user"], line["peer"]) == (opened.session.id, "ada", ADDRESS)
    await refused(process.refresh(again), TokenRevoked)
    assert process.store.registry.kept == 0


@pytest.mark.parametrize("token", [b"x" * 32, b"", b"x" * 31])
async def test_unknown_refresh_token_is_unauthenticated(process: SessionProcess, token: bytes) -> None:
    await refused(process.sessions.refresh(token, client=CLIENT, address=ADDRESS), Unauthenticated)


async def test_expired_refresh_token_is_refused(process: SessionProcess) -> None:
    opened = await process.open()
    process.clock.advance(31 * DAY_MS / 1000)
    await refused(process.refresh(opened), TokenExpired)
    assert process.registry.kept == 0


async def test_concurrent_refreshes_share_one_result(process: SessionProcess) -> None:
    opened = await process.open()
    pairs = await asyncio.gather(*(process.refresh(opened) for _ in range(20)))
    assert len({pair.token for pair in pairs}) == 1
    assert process.store.calls.count("rotate") == 1
    assert process.is_valid(pairs[0])
    assert process.is_valid(await process.refresh(pairs[0]))
    assert process.store.calls.count("rotate") == 2


async def test_concurrent_refresh_with_another_token_ends_the_session(process: SessionProcess) -> None:
    opened = await process.open()
    outcomes = await asyncio.gather(
        process.refresh(opened), process.refresh(opened, address="203.0.113.9"), return_exceptions=True
    )
    assert isinstance(outcomes[1], TokenRevoked)
    assert process.store.registry.kept == 0


async def test_session_of_another_process_is_refreshed_here(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(one.store)
    opened = await one.open()
    again = await other.refresh(opened)
    assert other.is_valid(again)
    assert await other.find(opened.token) is Code.TOKEN_REVOKED


async def test_refresh_of_another_process_session_makes_room_in_a_full_registry(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(FaultyStoreView(one.store), max_sessions=1)
    await other.open("bob")
    again = await other.refresh(await one.open("ada"))
    assert other.is_valid(again)


async def test_refresh_repeated_on_another_node_returns_the_same_pair(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    await other.find(opened.token)
    assert other.is_valid(opened)
    first = await one.refresh(opened)
    one.clock.advance(1)
    second = await other.refresh(opened)
    assert (second.token, second.refresh_token) == (first.token, first.refresh_token)
    assert other.is_valid(second)
    assert other.check(opened.token) is Code.TOKEN_REVOKED
    assert one.ended == other.ended == []
    assert one.registry.refresh_reused == other.registry.refresh_reused == 0
    assert one.is_valid(await one.refresh(second))


async def test_refresh_repeated_on_another_node_after_the_grace_ends_the_session(
    one: SessionProcess, other: SessionProcess
) -> None:
    opened = await one.open()
    first = await one.refresh(opened)
    one.clock.advance(5)
    await other.refresh(opened)
    one.clock.advance(5)  # the first repetition does not extend the grace
    await refused(other.refresh(opened), TokenRevoked)
    assert await other.find(first.token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("is_shared", [False, True])
async def test_refresh_repeated_after_the_server_was_killed_returns_the_same_pair(
    start_process: StartProcess, log: Log, is_shared: bool
) -> None:
    killed = await start_process(shared=is_shared)
    opened = await killed.open()
    lost = await killed.refresh(opened)
    restarted = await start_process(FaultyStoreView(killed.store))
    restarted.clock.advance(1)
    again = await restarted.refresh(opened)
    assert (again.token, again.refresh_token) == (lost.token, lost.refresh_token)
    assert restarted.is_valid(again)
    assert restarted.check(opened.token) is not Code.UNAVAILABLE
    assert restarted.registry.refresh_reused == 0
    assert restarted.is_valid(await restarted.refresh(again))
    restarted.clock.advance(60)
    await refused(restarted.refresh(opened), TokenRevoked)


async def test_grace_of_zero_keeps_no_pair_in_the_store(start_process: StartProcess) -> None:
    one = await start_process(shared=True, refresh_grace_ms=0)
    other = await start_process(FaultyStoreView(one.store), refresh_grace_ms=0)
    opened = await one.open()
    await one.refresh(opened)
    await refused(other.refresh(opened), TokenRevoked)


async def test_damaged_pair_of_a_repeated_refresh_is_unavailable(
    one: SessionProcess, other: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = await one.open()
    monkeypatch.setattr(service_module, "seal_pair", lambda *pair: b"damaged")
    first = await one.refresh(opened)
    await refused(other.refresh(opened))
    assert one.is_valid(first)
    await other.find(first.token)
    assert other.is_valid(first)


@pytest.mark.parametrize("is_shared", [False, True])
async def test_session_is_found_by_its_refresh_token(start_process: StartProcess, is_shared: bool) -> None:
    one = await start_process(shared=is_shared)
    other = await start_process(FaultyStoreView(one.store)) if is_shared else one
    opened = await one.open()
    assert opened.refresh_token is not None
    record = await other.sessions.find_by_refresh_token(opened.refresh_token)
    assert record is not None
    assert record.id == raw(opened)
    await one.refresh(opened)
    assert await other.sessions.find_by_refresh_token(opened.refresh_token) is not None
    assert await other.sessions.find_by_refresh_token(b"x" * 32) is None
    await one.revoke(opened)
    assert await other.sessions.find_by_refresh_token(opened.refresh_token) is None
    if is_shared:
        await other.outage()
        await refused(other.sessions.find_by_refresh_token(opened.refresh_token))


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("end", ["revoke", "expire", "refresh"])
async def test_only_a_live_session_is_found_by_its_newest_token(
    start_process: StartProcess, is_shared: bool, end: str
) -> None:
    one = await start_process(shared=is_shared)
    other = await start_process(FaultyStoreView(one.store)) if is_shared else one
    opened = await one.open()
    found = await other.sessions.holder(opened.session.token_digest)
    assert found is not None
    assert (found.id, found.user) == (raw(opened), "ada")
    if end == "revoke":
        await one.revoke(opened)
    elif end == "expire":
        one.clock.advance(one.registry.settings.lifetime_ms / 1000 + 1)
    else:
        newer = await one.refresh(opened)
        assert await other.sessions.holder(newer.session.token_digest) is not None
    assert await other.sessions.holder(opened.session.token_digest) is None
    assert await other.sessions.holder(bytes(32)) is None
    if is_shared:
        await other.outage()
        await refused(other.sessions.holder(opened.session.token_digest))


async def test_session_revoked_while_it_is_refreshed_stays_ended(process: SessionProcess) -> None:
    opened = await process.open()
    process.sync.breaker.timeout = TIMEOUT
    process.store.late["rotate"] = asyncio.Event()
    refreshing = asyncio.ensure_future(process.refresh(opened))
    while process.store.registry.refresh_reused + process.store.calls.count("rotate") < 1:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await process.revoke(opened)
    process.store.late["rotate"].set()
    await refused(refreshing, TokenRevoked)
    assert process.store.registry.kept == process.registry.kept == 0


async def test_refresh_of_a_cancelled_caller_is_finished_and_can_be_repeated(process: SessionProcess) -> None:
    opened = await process.open()
    process.store.gate = asyncio.Event()
    await cancel_and_wait(asyncio.ensure_future(process.refresh(opened)))
    process.store.gate.set()
    await process.settle()
    again = await process.refresh(opened)
    assert process.is_valid(again)
    assert process.store.calls.count("rotate") == 1
    assert "get" not in process.store.calls  # nothing has changed meanwhile


async def test_refresh_with_unknown_outcome_is_repeated_unchanged(process: SessionProcess) -> None:
    for mode in (HANGS_AFTER, FAILS_AFTER, HANGS, FAILS):
        opened = await process.open(mode)
        process.store.mode = mode
        await refused(process.refresh(opened))
        await process.outage(mode)
        await process.recover()
        again = await process.refresh(opened)
        assert process.is_valid(again), mode
        assert not process.is_valid(opened)
        process.clock.advance(60)
        assert process.is_valid(await process.refresh(again)), mode
    assert process.registry.refresh_reused == 0


async def test_repeated_refresh_from_another_address_succeeds(process: SessionProcess) -> None:
    opened = await process.open()
    process.store.modes["rotate"] = FAILS
    await refused(process.refresh(opened))
    process.store.modes.clear()
    again = await process.refresh(opened, address="203.0.113.9")
    assert process.is_valid(again)
    record = process.stored(opened)
    assert record.address == "203.0.113.9"


async def test_refreshes_with_unknown_outcome_are_bounded(
    process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "UNDECIDED", 2)
    process.store.modes["rotate"] = FAILS_AFTER
    opened = []
    for number in range(4):
        opened.append(await process.open(f"u{number}"))
        await refused(process.refresh(opened[-1]))
        await process.advance(20)  # no outage
    process.store.modes.clear()
    for each in opened[2:]:
        assert process.is_valid(await process.refresh(each))
    await refused(process.refresh(opened[1]), TokenRevoked)  # evicted, so it looks reused


async def test_refresh_with_known_outcome_evicts_no_other(
    process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "UNDECIDED", 2)
    opened = []
    for number in range(3):
        opened.append(await process.open(f"u{number}"))
        process.store.modes["rotate"] = FAILS_AFTER
        await refused(process.refresh(opened[-1]))
        process.store.modes.clear()
        await process.advance(20)  # no outage
        if number == 1:
            assert process.is_valid(await process.refresh(opened[1]))
    for each in opened[::2]:
        assert process.is_valid(await process.refresh(each))


async def test_repeated_refresh_within_the_grace_succeeds_during_an_outage(process: SessionProcess) -> None:
    opened = await process.open()
    first = await process.refresh(opened)
    await process.outage()
    assert (await process.refresh(opened)).token == first.token


async def test_refresh_of_a_session_that_is_forgotten_meanwhile_succeeds(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start_process(shared=True)
    opened = await process.open()
    apply_rotation = process.registry.apply_rotation

    def applied(*rotation: Any) -> OpenedSession:
        asyncio.get_running_loop().call_soon(process.store.report_change, raw(opened))
        return apply_rotation(*rotation)

    monkeypatch.setattr(process.registry, "apply_rotation", applied)
    assert process.is_valid(await process.refresh(opened))
