"""A store that several processes share: notices of changes, leases, claims, unknown outcomes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FakeClock
from tests.sessions.helpers import CountedEntropy
from tests.stores.contract import (
    IDLE,
    LEASE,
    MINUTE,
    WALL,
    StoreTime,
    digest,
    ended,
    opened,
    rotation,
    session,
)
from tests.stores.faulty import BUSY, FAILS, FAILS_AFTER, WORKS, FaultyStore
from tests.stores.memory_store import MemoryStore
from tests.workers import hub_harness
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions import SessionSettings
from zcproto.sessions.record import EndedRecord, UserLimit
from zcproto.stores.base import (
    LEASE_MS,
    Change,
    ChangeKind,
    Claim,
    ClaimState,
    Created,
    LimitReached,
    Repeated,
    StoreUnavailable,
)
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.workers import hub as hub_module
from zcproto.workers.hub import RETURN_S, HubStore, StoreHub

ONE = UserLimit(1, "evict_disconnected", IDLE)
OLD, NEW = session(1), session(2)


class Members:
    """A hub with two members, and what each was notified of."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.time = StoreTime()
        self.store = FaultyStore(SessionSettings(idle_timeout_ms=IDLE), CountedEntropy())
        self.store.inner = MemoryStore(self.store.registry, time=self.time)
        self.hub = StoreHub(self.store, is_lasting=True, now=self.clock.now, entropy=CountedEntropy())
        self.heard: dict[HubStore, list[Change]] = {}

    async def join(self, id: bytes) -> HubStore:
        member = self.hub.member(id)
        self.heard[member] = []
        await member.open(self.heard[member].append)
        return member

    def changes(self, member: HubStore) -> list[Change]:
        """Return what a member was notified of since the last time."""
        heard = list(self.heard[member])
        self.heard[member].clear()
        return heard


@pytest.fixture
async def members() -> Members:
    return Members()


@pytest.fixture
async def one(members: Members) -> HubStore:
    return await members.join(b"1")


@pytest.fixture
async def other(members: Members) -> HubStore:
    return await members.join(b"2")


def changed(*found: bytes | EndedRecord) -> list[Change]:
    """Return changes of sessions by id, or with how they ended."""
    return [
        Change(ChangeKind.SESSION, each.id, each)
        if isinstance(each, EndedRecord)
        else Change(ChangeKind.SESSION, each)
        for each in found
    ]


async def test_store_is_opened_once(members: Members, one: HubStore, other: HubStore) -> None:
    await asyncio.gather(members.hub.open(), members.hub.open())
    assert members.store.calls.count("open") == 1
    assert one.shared
    assert one.keeps_time
    assert [batch async for batch in one.load()] == []


async def test_other_members_are_notified_of_each_change(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await opened(one, OLD, NEW)
    assert members.changes(other) == []  # a new session is unknown to others
    await one.rotate(rotation(OLD))
    assert members.changes(other) == changed(OLD.id)
    await one.rotate(rotation(OLD, 2))  # a spent token ends it
    assert members.changes(other) == changed(OLD.id)
    await one.rotate(rotation(OLD, 3))
    assert members.changes(other) == []
    await one.end([NEW.id, OLD.id], Code.TOKEN_REVOKED, WALL)
    assert members.changes(other) == changed(ended(NEW), OLD.id)
    await one.end([NEW.id], Code.TOKEN_REVOKED, WALL)  # repeated: the first attempt may have seemed to fail
    assert members.changes(other) == changed(NEW.id)
    assert members.changes(one) == []


async def test_other_members_are_notified_of_ends_by_user_of_evictions_and_of_all(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await opened(one, OLD, session(3, "bob"))
    await one.end_user("alice", Code.TOKEN_REVOKED, WALL)
    assert members.changes(other) == changed(ended(OLD))
    await one.create(session(4, "bob"), UserLimit(1, "evict_oldest", IDLE))
    assert members.changes(other) == changed(ended(session(3), Code.SESSION_REPLACED))
    await one.end_all(Code.TOKEN_REVOKED, WALL)
    assert members.changes(other) == [Change(ChangeKind.ALL)]
    assert members.changes(one) == []


async def test_repeated_refresh_is_not_reported_as_a_change(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await opened(one, OLD)
    await one.rotate(rotation(OLD, sealed=b"the pair", grace_ms=MINUTE))
    members.changes(other)
    assert isinstance(await other.rotate(rotation(OLD, 2)), Repeated)
    assert members.changes(one) == []


async def test_member_that_has_left_is_not_notified(members: Members, one: HubStore, other: HubStore) -> None:
    await opened(one, OLD)
    await other.close()
    await other.close()
    await one.end([OLD.id], Code.TOKEN_REVOKED, WALL)
    assert members.changes(other) == []


@pytest.mark.parametrize("operation", ["create", "rotate", "end", "end_user", "end_all"])
async def test_unknown_outcome_has_all_members_check_all_once_the_store_works(
    members: Members, one: HubStore, other: HubStore, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "SETTLE_PAUSE_S", 0)
    await opened(one, OLD)
    members.store.modes[operation] = FAILS_AFTER
    members.store.modes["ping"] = FAILS
    calls = {
        "create": lambda: one.create(NEW, ONE),
        "rotate": lambda: one.rotate(rotation(OLD)),
        "end": lambda: one.end([OLD.id], Code.TOKEN_REVOKED, WALL),
        "end_user": lambda: one.end_user("alice", Code.TOKEN_REVOKED, WALL),
        "end_all": lambda: one.end_all(Code.TOKEN_REVOKED, WALL),
    }
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await calls[operation]()
    await hub_harness.until(lambda: members.store.calls.count("ping") >= 2)
    assert members.changes(one) == members.changes(other) == []
    members.store.modes["ping"] = BUSY
    await hub_harness.until(lambda: members.store.calls.count("ping") >= 4)
    members.store.modes.clear()
    await hub_harness.until(lambda: members.heard[other])
    assert members.changes(one) == members.changes(other) == [Change(ChangeKind.ALL)]


async def test_hub_that_closes_waits_for_no_outcome(members: Members, one: HubStore) -> None:
    members.store.mode = FAILS
    with pytest.raises(StoreUnavailable):
        await one.end([OLD.id], Code.TOKEN_REVOKED, WALL)
    await members.hub.close()
    members.store.mode = WORKS
    await asyncio.sleep(0)
    assert members.changes(one) == []


async def test_lost_data_is_reported_to_all_and_changes_the_epoch(
    members: Members, one: HubStore, other: HubStore
) -> None:
    assert members.hub.epoch == b""
    assert one.keeps_changes
    members.hub.store_emptied()
    assert not one.keeps_changes
    assert members.hub.epoch != b""
    assert members.changes(one) == members.changes(other) == [Change(ChangeKind.EMPTIED)]


def test_store_that_ends_with_its_process_has_an_epoch_of_its_own(members: Members) -> None:
    epochs = {
        StoreHub(members.store, is_lasting=False, now=lambda: 0.0, entropy=members.hub._entropy).epoch
        for _ in range(2)
    }
    assert len(epochs) == 2
    assert b"" not in epochs


# --- leases ----------------------------------------------------------------------------------------


async def test_opened_session_is_in_use_and_given_up_at_once(one: HubStore, other: HubStore) -> None:
    await opened(one, OLD)
    assert await other.create(NEW, ONE) == LimitReached()
    await one.lease([(OLD.id, False)])
    assert await other.create(NEW, ONE) == Created((ended(OLD, Code.TOKEN_EXPIRED),))


async def test_session_is_in_use_as_long_as_one_member_uses_it(one: HubStore, other: HubStore) -> None:
    await opened(one, OLD)
    await other.lease([(OLD.id, True)])
    await one.lease([(OLD.id, False)])
    assert await one.create(NEW, ONE) == LimitReached()
    await other.lease([(OLD.id, False)])
    assert isinstance(await one.create(NEW, ONE), Created)


async def test_refused_session_has_no_lease(members: Members, one: HubStore) -> None:
    await opened(one, OLD)
    await one.create(NEW, ONE)
    assert one.held == {OLD.id}
    await one.end([OLD.id], Code.TOKEN_REVOKED, WALL)
    assert one.held == set()


@pytest.mark.parametrize(("mode", "error"), [(FAILS_AFTER, StoreUnavailable), (BUSY, ResourceExhausted)])
async def test_failed_login_has_no_lease(
    members: Members, one: HubStore, mode: str, error: type[Exception]
) -> None:
    members.store.modes["create"] = mode
    with pytest.raises(error):
        await one.create(NEW, ONE)
    assert one.held == set()


async def test_sessions_of_a_member_that_left_are_in_use_until_its_clients_may_be_back(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await opened(one, OLD)
    members.clock.advance(LEASE_MS / 1000)
    await one.close()
    members.clock.advance(RETURN_S - 0.001)
    assert await other.create(NEW, ONE) == LimitReached()
    members.clock.advance(0.001)
    assert isinstance(await other.create(NEW, ONE), Created)
    assert not members.hub._left


async def test_unknown_session_is_in_use_until_members_had_the_time_to_renew(
    members: Members, one: HubStore
) -> None:
    await members.store.create(OLD, ONE)  # before this hub
    members.clock.advance(LEASE_MS / 1000 - 0.001)
    assert await one.create(NEW, ONE) == LimitReached()
    members.clock.advance(0.001)
    assert isinstance(await one.create(NEW, ONE), Created)


async def test_given_up_sessions_are_remembered_only_while_unknown_ones_count(
    members: Members, one: HubStore
) -> None:
    await one.lease([(OLD.id, False)])
    assert members.hub._given_up == {OLD.id}
    members.clock.advance(LEASE_MS / 1000)
    await one.lease([(NEW.id, False)])
    assert members.hub._given_up == set()


# --- claims ----------------------------------------------------------------------------------------


async def claimed(member: HubStore) -> Claim:
    return await member.claim("alice", "key", digest("body"), LEASE)


async def test_running_claim_is_own_for_its_member_alone(one: HubStore, other: HubStore) -> None:
    assert (await claimed(one)).state is ClaimState.NEW
    again, elsewhere = await claimed(one), await claimed(other)
    assert (again.state, again.is_own) == (ClaimState.RUNNING, True)
    assert (elsewhere.state, elsewhere.is_own) == (ClaimState.RUNNING, False)


async def test_claim_whose_outcome_was_lost_is_own(members: Members, one: HubStore, other: HubStore) -> None:
    members.store.modes["claim"] = FAILS_AFTER
    with pytest.raises(StoreUnavailable):
        await claimed(one)
    members.store.modes.clear()
    assert not (await claimed(other)).is_own
    assert (await claimed(one)).is_own


async def test_released_claim_is_taken_by_another_member(one: HubStore, other: HubStore) -> None:
    await claimed(one)
    await one.release_claim("alice", "key")
    assert (await claimed(other)).state is ClaimState.NEW
    assert (await claimed(other)).is_own
    assert not (await claimed(one)).is_own


async def test_member_that_joins_again_keeps_its_claims(members: Members, one: HubStore) -> None:
    await claimed(one)
    await one.close()
    assert (await claimed(await members.join(b"1"))).is_own


async def test_claim_of_a_member_that_has_left_is_an_orphan_at_once(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await claimed(one)
    assert not (await claimed(other)).is_orphan
    await one.close()
    assert (await claimed(other)).is_orphan
    again = await members.join(b"1")
    assert not (await claimed(other)).is_orphan
    assert (await claimed(again)).is_own
    assert not (await claimed(again)).is_orphan
    await again.keep_answer("alice", "key", b"done", LEASE)
    await again.close()
    assert (await claimed(other)).state is ClaimState.DONE


async def test_claim_of_a_process_that_had_the_store_to_itself_is_an_orphan(
    members: Members, other: HubStore
) -> None:
    await claimed(members.hub.member())
    assert (await claimed(other)).is_orphan


async def test_claims_of_unknown_members_are_orphans_once_they_had_the_time_to_come_back(
    members: Members, other: HubStore
) -> None:
    await claimed(members.hub.member(b"1"))  # before the process with the store was restarted
    assert not (await claimed(other)).is_orphan
    members.clock.advance(RETURN_S - 0.1)
    assert not (await claimed(other)).is_orphan
    members.clock.advance(0.1)
    assert (await claimed(other)).is_orphan
    await other.close()
    assert members.hub._gone == set()


async def test_expired_claim_is_given_away_only_when_its_member_had_the_time_to_come_back(
    members: Members, one: HubStore, other: HubStore
) -> None:
    await claimed(one)
    members.time.ms += LEASE
    assert ((await claimed(other)).state, (await claimed(other)).is_orphan) == (ClaimState.RUNNING, False)
    await one.close()
    assert ((await claimed(other)).state, (await claimed(other)).is_orphan) == (ClaimState.RUNNING, True)
    again = await members.join(b"1")
    members.clock.advance(RETURN_S)
    assert (await claimed(other)).state is ClaimState.RUNNING
    assert (await again.claim("alice", "key", digest("other"), LEASE)).state is ClaimState.NEW
    await again.close()
    members.time.ms += LEASE
    members.clock.advance(RETURN_S)
    claims = await asyncio.gather(*map(claimed, (other, await members.join(b"3"))))
    assert sorted(claim.state.name for claim in claims) == ["NEW", "RUNNING"]


@pytest.mark.parametrize("joins_again", [False, True])
async def test_claim_whose_member_left_before_its_answer_is_released(
    members: Members, one: HubStore, other: HubStore, monkeypatch: pytest.MonkeyPatch, joins_again: bool
) -> None:
    claim = members.store.claim

    async def leave_and_claim(*arguments: Any) -> Claim:
        await one.close()
        if joins_again:
            await members.join(b"1")
        return await claim(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(members.store, "claim", leave_and_claim)
        await claimed(one)
    assert (await claimed(other)).state is (ClaimState.RUNNING if joins_again else ClaimState.NEW)


async def test_claim_is_own_after_the_death_of_the_process_with_the_store(tmp_path: Path) -> None:
    claims = []
    for id in (b"1", b"1", b"2"):
        store = SqliteStore(tmp_path / "sessions.db")
        hub = StoreHub(store, is_lasting=True, now=FakeClock().now, entropy=CountedEntropy())
        member = hub.member(id)
        await member.open(lambda change: None)
        claims.append(await claimed(member))
        await hub.close()
    assert [claim.state for claim in claims] == [ClaimState.NEW, ClaimState.RUNNING, ClaimState.RUNNING]
    assert [claim.is_own for claim in claims[1:]] == [True, False]


# --- the number of sessions ------------------------------------------------------------------------


async def test_number_of_sessions_is_bounded(
    members: Members, one: HubStore, other: HubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_SESSIONS", 2)
    await opened(one, session(1), session(2, "bob"))
    with pytest.raises(ResourceExhausted, match="limit of sessions"):
        await other.create(session(3), ONE)
    await other.end([session(1).id, session(2).id], Code.TOKEN_REVOKED, WALL)
    await opened(other, session(4), session(5, "bob"))
    await one.end_user("bob", Code.TOKEN_REVOKED, WALL)
    await opened(one, session(6, "bob"))
    await one.end_all(Code.TOKEN_REVOKED, WALL)
    await opened(one, session(7), session(8, "bob"))


async def test_sessions_that_were_there_or_expired_are_counted(members: Members) -> None:
    await members.store.create(OLD, ONE)
    one = await members.join(b"1")
    assert members.hub.sessions == 1
    while await one.expire(OLD.refresh_expires_at, MINUTE, 100):
        pass
    assert members.hub.sessions == 0
