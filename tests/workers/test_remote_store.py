"""The store of another process passes the contract of all stores, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.loop_reports import LoopReports
from tests.sessions.helpers import CountedEntropy
from tests.stores.contract import (
    FIVE,
    LEASE,
    WALL,
    DurabilityContract,
    RepeatedRefreshContract,
    StoreContract,
    digest,
    ended,
    opened,
    session,
)
from tests.stores.faulty import BUSY, DAMAGED, FAILS, WORKS, FaultyStore
from tests.workers.hub_harness import HubHarness, until
from zcproto.errors import Code, ConfigError, InternalError, ResourceExhausted
from zcproto.sessions import SessionSettings
from zcproto.stores.base import (
    Change,
    ChangeKind,
    ClaimState,
    Created,
    DamagedRecord,
    LimitReached,
    StoreUnavailable,
)
from zcproto.workers import remote_store
from zcproto.workers.link import LinkClient, Topics


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HubHarness]:
    monkeypatch.setattr(remote_store, "CONNECT_LIMIT_S", TIMEOUT)
    harness = HubHarness(tmp_path)
    yield harness
    await harness.close()


class TestRemoteStore(StoreContract, DurabilityContract, RepeatedRefreshContract):
    """Every test of the contract, with a store in a file."""


def stored_changes(changes: list[Change]) -> list[ChangeKind]:
    return [change.kind for change in changes]


async def test_change_by_one_process_is_reported_to_the_others(harness: HubHarness) -> None:
    await harness.start()
    stores = [await harness.opened() for _ in range(3)]
    record = session()
    await opened(stores[0], record)
    await stores[1].end([record.id], Code.TOKEN_REVOKED, WALL)
    for store in stores:
        await store.ping()  # its answer comes after the changes
    expected = [Change(ChangeKind.SESSION, record.id, ended(record))]
    assert harness.changes == [expected, [], expected]


async def test_failures_of_operations_of_all_processes_are_counted_by_that_with_the_store(
    harness: HubHarness,
) -> None:
    inner = FaultyStore(SessionSettings(), CountedEntropy())
    await harness.start(inner)
    failed: list[str] = []
    harness.stores.on_failed = lambda reason, waited_s: failed.append(reason)
    stores = [await harness.opened() for _ in range(2)]
    for mode in (FAILS, DAMAGED, WORKS):
        inner.mode = mode
        for store in stores:
            with suppress(StoreUnavailable):
                await store.find(session().token_digest)
    assert failed == ["the test makes it fail"] * 2


async def test_kind_of_change_of_a_newer_process_drops_the_cache(harness: HubHarness) -> None:
    await harness.start()
    store = await harness.opened()
    link = store._urgent.link
    known = ["session", session().id, None]
    harness.server.notify("store.changed", ["of tomorrow", b"", None], known)
    await store.ping()
    assert harness.changes == [[Change(ChangeKind.ALL), Change(ChangeKind.SESSION, session().id)]]
    assert store._urgent.link is link


async def test_members_hear_that_the_store_will_be_away_before_the_connection_ends(
    harness: HubHarness,
) -> None:
    await harness.start()
    await harness.opened()
    harness.hub.notify([Change(ChangeKind.AWAY)], None)
    await harness.server.flush()
    await harness.stop()
    await until(lambda: len(harness.changes[0]) == 2)
    assert harness.changes[0] == [Change(ChangeKind.AWAY), Change(ChangeKind.LOST)]


async def test_crash_of_the_store_process_is_an_outage_until_it_is_back(harness: HubHarness) -> None:
    await harness.start()
    store = await harness.opened()
    await opened(store, session())
    await harness.stop()
    with pytest.raises(StoreUnavailable, match=r"closed the connection|No such file|refused"):
        await store.find(session().token_digest)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await harness.start()
    await until(lambda: ChangeKind.ALL in stored_changes(harness.changes[0]))
    assert stored_changes(harness.changes[0]) == [ChangeKind.LOST, ChangeKind.ALL]
    await until(lambda: store._calls.link)
    assert await store.find(session().token_digest) == session()


async def test_store_is_back_when_both_connections_are(
    harness: HubHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.start()
    store = await harness.opened()
    found: list[object] = []
    monkeypatch.setattr(store, "_on_change", lambda change: found.append((change.kind, store._calls.link)))
    store._calls._failures = 6  # it connects later than the urgent one
    await harness.stop()
    await harness.start()
    await until(lambda: len(found) == 2)
    assert found[1] == (ChangeKind.ALL, store._calls.link)
    assert store._calls.link is not None


async def test_connection_lost_before_both_are_up_is_joined_again(
    harness: HubHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    await harness.start()
    store = await harness.opened()
    is_waited_for, may_be_up, ready = asyncio.Event(), asyncio.Event(), store._calls.ready

    async def ready_later(within: float) -> None:
        is_waited_for.set()
        await may_be_up.wait()
        await ready(within)

    monkeypatch.setattr(store._calls, "ready", ready_later)
    await harness.stop()
    await harness.start()
    await is_waited_for.wait()
    first = store._urgent.link
    assert first is not None
    first.lose("lost")
    await until(lambda: store._urgent.link not in (None, first))
    may_be_up.set()
    await until(lambda: ChangeKind.ALL in stored_changes(harness.changes[0]))
    assert store._urgent.link is not first
    assert [*harness.hub._members]
    await store.ping()


async def test_store_in_memory_is_emptied_by_a_crash_of_its_process(tmp_path: Path) -> None:
    harness = HubHarness(tmp_path, in_memory=True)
    await harness.start()
    store = await harness.opened()
    await opened(store, session())
    assert await store.get(session().id) == session()
    await harness.stop()
    await harness.start()
    await until(lambda: len(harness.changes[0]) == 2)
    assert stored_changes(harness.changes[0]) == [ChangeKind.LOST, ChangeKind.EMPTIED]
    await harness.close()


async def test_process_whose_connection_was_lost_joins_again(harness: HubHarness) -> None:
    await harness.start()
    store, other = await harness.opened(), await harness.opened()
    for link in list(harness.server.links):
        link.lose("lost")
    await until(lambda: all(ChangeKind.ALL in stored_changes(each) for each in harness.changes))
    await until(lambda: store._calls.link and other._calls.link)
    await opened(store, session())
    await other.end([session().id], Code.TOKEN_REVOKED, WALL)
    await store.ping()
    assert harness.changes[0][-1] == Change(ChangeKind.SESSION, session().id, ended(session()))
    assert len(harness.hub._members) == 2


async def test_process_that_joins_again_before_its_old_connection_is_lost_stays_a_member(
    harness: HubHarness,
) -> None:
    await harness.start()
    store, other = await harness.opened(), await harness.opened()
    (old,) = [link for link in harness.server.links if "urgent" in link.facts][:1]
    again = LinkClient(
        harness.path,
        Topics(),
        name="worker",
        facts={"urgent": True},
        silence=TIMEOUT,
        random=lambda: 0.0,
    )
    again.start()
    await again.ready(TIMEOUT)
    await again.call("store.join", store._id)
    old.lose("lost")
    await again.call("store.ping", store._id)  # the store of its process is still open
    await again.close()
    assert await other.count() == 0


async def test_ping_joins_again_after_a_store_that_could_not_be_opened(harness: HubHarness) -> None:
    faulty = FaultyStore(SessionSettings(), CountedEntropy())
    await harness.start(faulty)
    store = await harness.opened()
    await harness.stop()
    await until(lambda: not store._urgent.link)
    faulty.mode = FAILS
    await harness.start(faulty)
    await until(lambda: store._urgent.link)
    with pytest.raises(StoreUnavailable, match="the test makes it fail"):
        await store.ping()
    with pytest.raises(StoreUnavailable):
        await store.count()
    faulty.mode = WORKS
    await store.ping()
    await store.ping()
    assert stored_changes(harness.changes[0]) == [ChangeKind.LOST, ChangeKind.ALL]


async def test_opening_fails_without_a_process_and_can_be_repeated(
    harness: HubHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = harness.remote()
    with monkeypatch.context() as patch:
        patch.setattr(remote_store, "CONNECT_LIMIT_S", 0.05)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="No such file"):
                await store.open(lambda change: None)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    await harness.start()
    await store.open(lambda change: None)
    assert await store.count() == 0


async def test_fault_that_retrying_cannot_fix_arrives_as_such(harness: HubHarness, tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    (folder / "sessions.db").mkdir()
    await harness.start()
    with pytest.raises(ConfigError, match="is not a regular file"):
        await harness.opened()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(FAILS, StoreUnavailable), (DAMAGED, DamagedRecord), (BUSY, ResourceExhausted)],
)
async def test_failure_of_the_store_arrives_as_such(
    harness: HubHarness, mode: str, expected: type[Exception]
) -> None:
    faulty = FaultyStore(SessionSettings(), CountedEntropy())
    await harness.start(faulty)
    store = await harness.opened()
    faulty.mode = mode
    with pytest.raises(expected) as failed:
        await store.get(session().id)
    assert type(failed.value) is expected


async def test_claim_of_a_process_whose_connection_is_lost_is_an_orphan(harness: HubHarness) -> None:
    await harness.start()
    one, other = await harness.opened(), await harness.opened()
    assert (await one.claim("ada", "k", digest("body"), LEASE)).state is ClaimState.NEW
    seen = await other.claim("ada", "k", digest("body"), LEASE)
    assert (seen.state, seen.is_own, seen.is_orphan) == (ClaimState.RUNNING, False, False)
    await one.close()
    async with asyncio.timeout(TIMEOUT):
        while not seen.is_orphan:
            seen = await other.claim("ada", "k", digest("body"), LEASE)
    assert (seen.state, seen.answer) == (ClaimState.RUNNING, b"")


async def test_operation_of_a_process_that_has_not_joined_is_refused(harness: HubHarness) -> None:
    await harness.start()
    store, calls = harness.remote()
    await calls.ready(TIMEOUT)
    store._is_joined = True
    with pytest.raises(StoreUnavailable, match="has to connect again"):
        await store.count()


async def test_fault_in_the_other_process_is_an_internal_error(
    harness: HubHarness, loop_reports: LoopReports
) -> None:
    await harness.start()
    store = await harness.opened()
    with pytest.raises(InternalError):
        await store.touch([(b"", 1, 2)])  # type: ignore[list-item]
    (report,) = loop_reports.take()
    assert isinstance(report["exception"], ValueError)


async def test_damaged_file_is_reported_as_emptied_to_a_process_that_comes_back(harness: HubHarness) -> None:
    await harness.start()
    await harness.opened()
    await harness.stop()
    await harness.start()
    harness.hub.store_emptied()  # while the file was opened
    await until(lambda: len(harness.changes[0]) == 2)
    assert stored_changes(harness.changes[0]) == [ChangeKind.LOST, ChangeKind.EMPTIED]


async def test_limit_holds_exactly_for_logins_racing_over_four_processes(harness: HubHarness) -> None:
    await harness.start()
    stores = [await harness.opened() for _ in range(4)]
    results = await asyncio.gather(
        *(stores[number % 4].create(session(number), FIVE) for number in range(200))
    )
    assert results.count(Created()) == 5
    assert results.count(LimitReached()) == 195
    assert await stores[0].count() == 5
