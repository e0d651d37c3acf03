"""Tokens and sessions of other processes are looked up in a shared store."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.stores.faulty import FAILS, HANGS
from tests.stores.service.harness import (
    ADDRESS,
    DAY_MS,
    HOUR_MS,
    SessionProcess,
    StartProcess,
    raw,
    refused,
)
from zcproto.common.roles import NO_ROLES, OPERATORS
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions import Session
from zcproto.stores import service as service_module
from zcproto.stores.service import MISSES_PER_ADDRESS, MISSES_S, UNKNOWN_TOKEN_S


async def test_near_cache_is_bounded_and_other_sessions_are_looked_up(start_process: StartProcess) -> None:
    process = await start_process(shared=True, max_sessions=4, per_user=100)
    opened = [await process.open() for _ in range(20)]
    assert process.registry.kept == 4
    for each in opened:
        found = await process.find(each.token)
        assert isinstance(found, Session)
        assert found.id == each.session.id
    assert process.registry.kept == 4


async def test_token_of_another_process_is_found(one: SessionProcess, start_process: StartProcess) -> None:
    other = await start_process(one.store)
    opened = await one.open(key="device:phone")
    found = await other.find(opened.token)
    assert isinstance(found, Session)
    assert (found.id, found.user, found.bound) == (opened.session.id, "ada", True)
    assert other.sessions.statistics()["lookups"] == 1
    assert isinstance(await other.find(opened.token), Session)
    assert other.store.calls.count("find") == 1


async def test_store_that_is_not_shared_is_not_asked_for_tokens(process: SessionProcess) -> None:
    assert not process.sessions.is_shared
    assert await process.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert "find" not in process.store.calls


async def test_concurrent_lookups_of_a_token_share_one_operation(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(one.store)
    opened = await one.open()
    found = await asyncio.gather(*(other.find(opened.token) for _ in range(50)))
    assert all(isinstance(each, Session) for each in found)
    assert other.store.calls.count("find") == 1
    other.registry.forget(raw(opened))
    assert isinstance(await other.find(opened.token), Session)
    assert other.store.calls.count("find") == 2


async def test_unknown_token_is_not_looked_up_again_for_a_while(
    shared_process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "UNKNOWN_TOKENS", 3)
    for _ in range(10):
        assert await shared_process.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert shared_process.store.calls.count("find") == 1
    shared_process.clock.advance(UNKNOWN_TOKEN_S)
    assert await shared_process.find(b"x" * 32) is Code.UNAUTHENTICATED
    assert shared_process.store.calls.count("find") == 2
    tokens = [number.to_bytes(32, "big") for number in range(10)]
    for token in [*tokens, *tokens[-3:]]:
        await shared_process.find(token)
    assert shared_process.store.calls.count("find") == 2 + len(tokens)
    await shared_process.find(tokens[-4])  # evicted, because only three are remembered
    assert shared_process.store.calls.count("find") == 3 + len(tokens)


async def test_address_with_many_unknown_tokens_is_limited(shared_process: SessionProcess) -> None:
    opened = await shared_process.open()
    shared_process.registry.forget(raw(opened))
    numbers = itertools.count()
    for _ in range(MISSES_PER_ADDRESS):
        await shared_process.find(next(numbers).to_bytes(32, "big"))
    error = await refused(shared_process.find(next(numbers).to_bytes(32, "big")), ResourceExhausted)
    assert error.details == {"retry_after_ms": MISSES_S * 1000}
    assert isinstance(await shared_process.find(opened.token, "192.0.2.8"), Session)
    await shared_process.find(next(numbers).to_bytes(32, "big"), "192.0.2.8")
    shared_process.clock.advance(MISSES_S)
    for _ in range(MISSES_PER_ADDRESS):
        await shared_process.find(next(numbers).to_bytes(32, "big"))
    await refused(shared_process.find(next(numbers).to_bytes(32, "big")), ResourceExhausted)
    assert shared_process.sessions.statistics()["misses"] == 2 * MISSES_PER_ADDRESS + 1
    await shared_process.find(next(numbers).to_bytes(32, "big"), "192.0.2.9")


async def test_ipv6_network_counts_as_one_address(shared_process: SessionProcess) -> None:
    for number in range(MISSES_PER_ADDRESS):
        await shared_process.find(number.to_bytes(32, "big"), f"2001:db8::{number + 1:x}")
    await refused(shared_process.find(b"x" * 32, "2001:db8::ffff"), ResourceExhausted)
    assert await shared_process.find(b"x" * 32, "2001:db8:0:1::1") is Code.UNAUTHENTICATED


async def test_concurrent_lookups_are_bounded(
    shared_process: SessionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MAX_LOOKUPS", 2)
    shared_process.store.gate = asyncio.Event()
    finding = [asyncio.ensure_future(shared_process.find(bytes([n]) * 32)) for n in range(2)]
    await asyncio.sleep(0)
    error = await refused(shared_process.find(b"x" * 32), ResourceExhausted)
    assert error.details == {"retry_after_ms": 100}
    shared_process.store.gate.set()
    assert await asyncio.gather(*finding) == [Code.UNAUTHENTICATED] * 2


@pytest.mark.parametrize("mode", [FAILS, HANGS])
async def test_lookup_during_an_outage_is_unavailable(
    one: SessionProcess, other: SessionProcess, mode: str
) -> None:
    opened = await one.open()
    other.store.mode = mode
    await refused(other.find(opened.token))
    await other.outage(mode)
    error = await refused(other.find(opened.token))
    assert error.details["retry_after_ms"] >= 100
    await other.recover()
    assert isinstance(await other.find(opened.token), Session)


async def test_token_revoked_by_another_process_is_revoked(start_process: StartProcess) -> None:
    one = await start_process(shared=True, per_user=1, when_full="evict_oldest")
    other = await start_process(one.store)
    first = await one.open()
    second = await one.open()
    await one.revoke(second)
    assert await other.find(first.token) is Code.SESSION_REPLACED
    assert await other.find(second.token) is Code.TOKEN_REVOKED


async def test_idle_token_is_looked_up_because_another_process_may_have_used_it(
    one: SessionProcess, start_process: StartProcess
) -> None:
    other = await start_process(one.store)
    opened = await one.open()
    assert isinstance(await other.find(opened.token), Session)
    for _ in range(2):
        one.clock.advance(0.75 * HOUR_MS / 1000)
        assert one.is_valid(opened)
    await one.sync.write_uses()
    assert isinstance(await other.find(opened.token), Session)
    one.clock.advance(2 * HOUR_MS / 1000)
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED
    finds = other.store.calls.count("find")
    one.clock.advance(DAY_MS / 1000)
    assert await other.find(opened.token) is Code.TOKEN_EXPIRED  # past its absolute limit
    assert other.store.calls.count("find") == finds


async def test_idle_token_is_expired_during_an_outage(shared_process: SessionProcess) -> None:
    opened = await shared_process.open()
    await shared_process.outage()
    shared_process.clock.advance(HOUR_MS / 1000)
    assert await shared_process.find(opened.token) is Code.TOKEN_EXPIRED


async def test_revoked_token_is_not_looked_up(shared_process: SessionProcess) -> None:
    opened = await shared_process.open()
    await shared_process.sessions.look_up(
        opened.token, ADDRESS, Code.UNAUTHENTICATED
    )  # refused for its address
    assert "find" not in shared_process.store.calls


@pytest.mark.parametrize("is_shared", [False, True])
async def test_sessions_of_a_user_are_listed(start_process: StartProcess, is_shared: bool) -> None:
    one = await start_process(shared=is_shared)
    opened = [await one.open(key="device:phone"), await one.open(roles=OPERATORS)]
    await one.open("bob")
    one.clock.advance(60)
    assert one.is_valid(opened[1])
    infos = await one.sessions.list("ada")
    assert [info.id for info in infos] == [each.session.id for each in opened]
    assert infos == [one.registry.info(each.session.id, one.clock.wall()) for each in opened]
    assert [(info.bound, info.roles) for info in infos] == [(True, NO_ROLES), (False, OPERATORS)]
    assert infos[1].last_used_at == one.clock.wall()


@pytest.mark.parametrize("is_shared", [False, True])
async def test_records_of_all_users_are_listed(start_process: StartProcess, is_shared: bool) -> None:
    one = await start_process(shared=is_shared)
    ids = []
    for user in ("bob", "ada", "bob"):
        ids.append(raw(await one.open(user)))
        one.clock.advance(1)
    assert [record.id for record in await one.sessions.records(None, 10)] == ids
    assert [record.id for record in await one.sessions.records(None, 2)] == ids[:2]
    assert [record.id for record in await one.sessions.records("bob", 10)] == [ids[0], ids[2]]
    await one.outage()
    if is_shared:
        await refused(one.sessions.records(None, 10))
    else:
        assert len(await one.sessions.records(None, 10)) == 3


async def test_sessions_of_other_processes_are_listed_until_they_expire(start_process: StartProcess) -> None:
    one = await start_process(shared=True, refresh_lifetime_ms=2 * DAY_MS)
    other = await start_process(one.store, refresh_lifetime_ms=2 * DAY_MS)
    opened = await one.open()
    (info,) = await other.sessions.list("ada")
    assert (info.id, info.live) == (opened.session.id, True)
    assert other.registry.kept == 0
    one.clock.advance(1.5 * DAY_MS / 1000)
    (info,) = await other.sessions.list("ada")
    assert not info.live
    one.clock.advance(DAY_MS / 1000)
    assert await other.sessions.list("ada") == []
    await other.outage()
    await refused(other.sessions.list("ada"))


async def test_sessions_without_refresh_or_idle_limit_are_listed(start_process: StartProcess) -> None:
    one = await start_process(shared=True, refresh=False, idle_timeout_ms=None)
    await one.open()
    one.clock.advance(0.9 * DAY_MS / 1000)
    (info,) = await one.sessions.list("ada")
    assert (info.live, info.refresh_expires_at) == (True, None)
    one.clock.advance(0.2 * DAY_MS / 1000)
    assert await one.sessions.list("ada") == []


async def test_statistics_for_operators(process: SessionProcess) -> None:
    opened = await process.open()
    assert process.sessions.statistics() == {
        "state": "healthy",
        "refusing": False,
        "outages": 0,
        "failures": 0,
        "pending_revocations": 0,
        "changes": 0,
        "lookups": 0,
        "misses": 0,
    }
    process.store.mode = FAILS
    await process.revoke(opened)
    values = process.sessions.statistics()
    assert (values["state"], values["outages"], values["failures"], values["pending_revocations"]) == (
        "degraded",
        1,
        1,
        1,
    )
