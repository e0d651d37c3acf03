"""What every store of sessions does, whatever it is made of: the tests that all stores pass.

A store's test module says how one is made, by a fixture `harness`, and takes the tests by a class of its own:

    class TestMemoryStore(StoreContract):
        pass
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Protocol

import pytest

from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.base import (
    Claim,
    ClaimState,
    Created,
    LimitReached,
    NotRotated,
    Rotated,
    SessionStore,
)

WALL = 1_700_000_000_000
SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
LAST = 2**63 - 1

IDLE = HOUR
FIVE = UserLimit(5, "refuse", IDLE)
ONE = UserLimit(1, "refuse", IDLE)
EVICT_ONE = UserLimit(1, "evict_oldest", IDLE)
EVICT_TWO = UserLimit(2, "evict_oldest", IDLE)

KEEP_ENDED = 10 * MINUTE
LEASE = MINUTE
KEEP = 10 * MINUTE

STRINGS = {
    "empty": "",
    "long": 128 * "x",
    "two bytes": 128 * "\u00e9",
    "three bytes": 128 * "\u4e16",
    "four bytes": 128 * "\U0001f511",
    "quotes": "'\"\\`; DROP TABLE sessions; --",
    "spaces": " a  b ",
    "glob": "{a}*?[b]:%s_%",
    "combining": "e\u0301\u200d\u202e",
    "controls": "a\0b\nc\r\td\x7f",
    "a lone surrogate": "a\ud800b",
    "a number": "0012",
}

DIGESTS = {
    "zeros": bytes(32),
    "ones": 32 * b"\xff",
    "white space": b" \n\r\t\0\x0b\x0c,:;'\"\\" + 19 * b" ",
    "every byte": bytes(range(32)),
}


class Harness(Protocol):
    """How a kind of store is made. All stores of one harness see the same data."""

    durable: bool
    """Whether sessions are there after `reopen`."""
    bounded: bool
    """Whether the store bounds its answers itself, as `answers` says."""

    async def make_store(self, answers: AnswerLimits | None = None) -> SessionStore:
        """An open store without any sessions, whose idle limit is IDLE and that keeps ended ones KEEP_ENDED."""
        ...

    async def reopen(self, store: SessionStore) -> SessionStore:
        """Close a store; another one, open, on the same data."""
        ...


def digest(name: str) -> bytes:
    return sha256(name.encode()).digest()


def session(number: int = 1, user: str = "alice", wall: int = WALL, **changes: object) -> SessionRecord:
    """One of any number of sessions, opened at `wall`."""
    record = SessionRecord(
        id=digest(f"id {number}")[:16],
        token_digest=digest(f"token {number}"),
        refresh_digest=digest(f"refresh {number}"),
        user=user,
        client="zc/1",
        address="192.0.2.1",
        flags=0,
        created_at=wall,
        last_used_at=wall,
        expires_at=wall + DAY,
        refresh_expires_at=wall + 30 * DAY,
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def rotation(
    record: SessionRecord, number: int = 1, wall: int = WALL + MINUTE, **changes: object
) -> Rotation:
    """The refresh of a session, as somebody asks for it who has its current refresh token."""
    wanted = Rotation(
        id=record.id,
        spent_digest=record.refresh_digest,
        token_digest=digest(f"token {number} of {record.token_digest.hex()}"),
        refresh_digest=digest(f"refresh {number} of {record.token_digest.hex()}"),
        expires_at=wall + DAY,
        client="zc/2",
        address="192.0.2.9",
        wall=wall,
    )
    return replace(wanted, **changes)  # type: ignore[arg-type]


def rotated(record: SessionRecord, wanted: Rotation) -> SessionRecord:
    """What a session is after a refresh."""
    return replace(
        record,
        token_digest=wanted.token_digest,
        refresh_digest=wanted.refresh_digest,
        client=wanted.client,
        address=wanted.address,
        last_used_at=wanted.wall,
        expires_at=min(wanted.expires_at, record.refresh_expires_at),
    )


def ended(record: SessionRecord, code: Code = Code.TOKEN_REVOKED, wall: int = WALL) -> EndedRecord:
    return EndedRecord(record.id, record.token_digest, code, wall)


async def opened(store: SessionStore, *records: SessionRecord) -> None:
    for record in records:
        assert await store.create(record, UserLimit(10_000, "refuse", IDLE)) == Created()


async def loaded(store: SessionStore) -> list[SessionRecord | EndedRecord]:
    return [record async for batch in store.load() for record in batch]


async def expire_all(store: SessionStore, wall: int, limit: int = 1_000) -> int:
    """Ask until a store that looks at a part of its sessions at a time has looked at all of a small number."""
    removed = 0
    for _ in range(8):
        once = await store.expire(wall, KEEP_ENDED, limit)
        assert 0 <= once <= limit
        removed += once
    return removed


class StoreContract:
    @pytest.fixture
    async def store(self, harness: Harness) -> SessionStore:
        return await harness.make_store()

    # --- opening -------------------------------------------------------------------------------------------

    async def test_a_session_is_found_by_token_and_by_id(self, store: SessionStore) -> None:
        record = session()
        assert await store.create(record, FIVE) == Created()
        assert await store.find(record.token_digest) == record
        assert await store.get(record.id) == record
        assert await store.count() == 1

    async def test_what_is_not_there_is_not_found(self, store: SessionStore) -> None:
        await opened(store, session())
        assert await store.find(digest("another")) is None
        assert await store.find(session().refresh_digest) is None
        assert await store.get(bytes(16)) is None
        assert await store.get(b"") is None
        assert await store.find(b"") is None

    async def test_an_empty_store(self, store: SessionStore) -> None:
        assert await store.count() == 0
        assert await store.list() == []
        assert await store.list("alice") == []
        assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == []
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 0
        assert await store.expire(LAST, 0, 100) == 0
        assert await loaded(store) == []

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_strings_of_every_kind_are_kept(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        record = session(client=odd, address=odd[:45], key=odd)
        await opened(store, record)
        assert await store.find(record.token_digest) == record
        assert await store.list("alice") == [record]
        again = rotation(record, client=odd + "!", address="")
        assert await store.rotate(again) == Rotated(rotated(record, again), record.token_digest)

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_users_of_every_kind_are_told_apart(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        mine, other = session(1, odd), session(2, odd + "x")
        await opened(store, mine, other)
        assert await store.create(session(3, odd), ONE) == LimitReached()
        assert await store.list(odd) == [mine]
        assert await store.end_user(odd, Code.TOKEN_REVOKED, WALL) == [ended(mine)]
        assert await store.list(odd + "x") == [other]

    @pytest.mark.parametrize("kind", DIGESTS)
    async def test_digests_of_every_kind_are_kept(self, store: SessionStore, kind: str) -> None:
        odd = DIGESTS[kind]
        record = session(id=odd[:16], token_digest=odd, refresh_digest=odd)
        await opened(store, record, session(2))
        assert await store.find(odd) == record
        assert await store.get(odd[:16]) == record
        assert await store.end([odd[:16]], Code.TOKEN_REVOKED, WALL) == [ended(record)]
        assert await store.find(odd) == ended(record)

    @pytest.mark.parametrize("flags", [0, 1, 2, 3])
    async def test_flags_and_the_key_are_kept(self, store: SessionStore, flags: int) -> None:
        record = session(flags=flags, key="tls:" + 64 * "a")
        await opened(store, record)
        assert await store.get(record.id) == record

    @pytest.mark.parametrize("time", [0, 1, 2**31, 2**32, 2**53 + 1, LAST])
    async def test_times_of_every_size_are_kept(self, store: SessionStore, time: int) -> None:
        record = session(created_at=time, last_used_at=time, expires_at=time, refresh_expires_at=time)
        await opened(store, record)
        assert await store.find(record.token_digest) == record
        assert await store.end([record.id], Code.TOKEN_REVOKED, time) == [ended(record, wall=time)]
        assert await store.get(record.id) == ended(record, wall=time)

    async def test_a_session_without_a_refresh_token(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=0)
        await opened(store, record)
        assert await store.get(record.id) == record

    async def test_the_same_record_once_more_is_no_second_session(self, store: SessionStore) -> None:
        record = session()
        assert await store.create(record, ONE) == Created()
        assert await store.create(record, ONE) == Created()
        assert await store.create(record, EVICT_ONE) == Created()
        assert await store.list("alice") == [record]

    async def test_the_same_record_once_more_brings_back_nothing(self, store: SessionStore) -> None:
        first, second = session(1), session(2)
        await opened(store, first, second)
        await store.end([first.id], Code.TOKEN_REVOKED, WALL)
        assert await store.create(first, EVICT_ONE) == Created()
        assert await store.get(first.id) == ended(first)
        assert await store.get(second.id) == second

    async def test_a_refreshed_session_is_not_set_back_by_its_first_record(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record)
        await store.rotate(wanted)
        assert await store.create(record, FIVE) == Created()
        assert await store.get(record.id) == rotated(record, wanted)

    # --- the limit -----------------------------------------------------------------------------------------

    async def test_one_too_many_is_refused_and_nothing_changes(self, store: SessionStore) -> None:
        records = [session(number) for number in range(6)]
        results = [await store.create(record, FIVE) for record in records]
        assert results == [*5 * [Created()], LimitReached()]
        assert await store.list("alice") == records[:5]
        assert await store.find(records[5].token_digest) is None

    async def test_limits_are_each_users_own(self, store: SessionStore) -> None:
        assert await store.create(session(1, "alice"), ONE) == Created()
        assert await store.create(session(2, "bob"), ONE) == Created()
        assert await store.create(session(3, "bob"), ONE) == LimitReached()

    async def test_the_oldest_makes_room(self, store: SessionStore) -> None:
        records = [session(number, wall=WALL + number) for number in range(4)]
        await opened(store, *records[:2])
        assert await store.create(records[2], EVICT_TWO) == Created(
            (ended(records[0], Code.SESSION_REPLACED, WALL + 2),)
        )
        assert await store.create(records[3], EVICT_TWO) == Created(
            (ended(records[1], Code.SESSION_REPLACED, WALL + 3),)
        )
        assert await store.list("alice") == records[2:]
        assert await store.find(records[0].token_digest) == ended(records[0], Code.SESSION_REPLACED, WALL + 2)

    async def test_a_refresh_makes_no_session_younger(self, store: SessionStore) -> None:
        first, second = session(1), session(2, wall=WALL + 1)
        await opened(store, first, second)
        wanted = rotation(first)
        await store.rotate(wanted)
        third = session(3, wall=WALL + HOUR // 2)
        result = await store.create(third, EVICT_TWO)
        assert result == Created((ended(rotated(first, wanted), Code.SESSION_REPLACED, third.created_at),))

    @pytest.mark.parametrize("limit", [ONE, EVICT_ONE])
    @pytest.mark.parametrize(
        "lapsed",
        [session(expires_at=WALL + MINUTE), session(last_used_at=WALL + MINUTE - IDLE)],
        ids=["expired", "idle"],
    )
    async def test_a_lapsed_session_makes_room(
        self, store: SessionStore, limit: UserLimit, lapsed: SessionRecord
    ) -> None:
        await opened(store, lapsed)
        late = session(2, wall=WALL + MINUTE)
        assert await store.create(late, limit) == Created((ended(lapsed, Code.TOKEN_EXPIRED, WALL + MINUTE),))
        assert await store.list("alice") == [late]
        assert await store.find(lapsed.token_digest) == ended(lapsed, Code.TOKEN_EXPIRED, WALL + MINUTE)

    async def test_one_that_is_not_quite_lapsed_makes_none(self, store: SessionStore) -> None:
        await opened(store, session(last_used_at=WALL + MINUTE + 1 - IDLE, expires_at=WALL + MINUTE + 1))
        assert await store.create(session(2, wall=WALL + MINUTE), ONE) == LimitReached()

    async def test_the_lapsed_one_goes_before_the_oldest(self, store: SessionStore) -> None:
        old, lapsed, younger = session(1), session(2, expires_at=WALL + 1), session(3, expires_at=WALL + 1)
        await opened(store, old, lapsed, younger)
        result = await store.create(session(4, wall=WALL + 1), UserLimit(3, "evict_oldest", IDLE))
        assert result == Created((ended(lapsed, Code.TOKEN_EXPIRED, WALL + 1),))

    async def test_use_keeps_a_session_from_lapsing(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.touch([(record.id, WALL + 1)])
        assert await store.create(session(2, wall=WALL + IDLE), ONE) == LimitReached()
        result = await store.create(session(2, wall=WALL + IDLE + 1), ONE)
        assert isinstance(result, Created)
        assert len(result.ended) == 1

    async def test_one_past_both_its_times_does_not_count(self, store: SessionStore) -> None:
        await opened(store, session(expires_at=WALL + 1, refresh_expires_at=WALL + 1))
        assert await store.create(session(2, wall=WALL + 1), ONE) == Created()
        assert await store.create(session(3, wall=WALL + 1), ONE) == LimitReached()

    async def test_one_without_refresh_that_was_idle_too_long_does_not_count(
        self, store: SessionStore
    ) -> None:
        await opened(store, session(refresh_expires_at=0, last_used_at=WALL - IDLE))
        assert await store.create(session(2), ONE) == Created()
        assert await store.create(session(3), ONE) == LimitReached()

    async def test_ended_ones_do_not_count(self, store: SessionStore) -> None:
        await opened(store, session(1))
        await store.end([session(1).id], Code.TOKEN_REVOKED, WALL)
        assert await store.create(session(2), ONE) == Created()

    async def test_a_limit_that_was_lowered_ends_one_at_a_time(self, store: SessionStore) -> None:
        await opened(store, *(session(number) for number in range(4)))
        result = await store.create(session(5), EVICT_TWO)
        assert result == Created((ended(session(0), Code.SESSION_REPLACED),))
        assert await store.create(session(6), FIVE) == Created()
        assert await store.create(session(7), FIVE) == LimitReached()

    async def test_fifty_that_race_for_one_user_get_five(self, store: SessionStore) -> None:
        results = await asyncio.gather(*(store.create(session(number), FIVE) for number in range(50)))
        assert sorted(type(result).__name__ for result in results) == 5 * ["Created"] + 45 * ["LimitReached"]
        listed = await store.list("alice")
        assert len(listed) == await store.count() == 5
        assert {record.id for record in listed} == {
            session(number).id for number, result in enumerate(results) if isinstance(result, Created)
        }

    async def test_fifty_that_race_and_evict_leave_five(self, store: SessionStore) -> None:
        limit = UserLimit(5, "evict_oldest", IDLE)
        results = await asyncio.gather(*(store.create(session(number), limit) for number in range(50)))
        gone = [each.id for result in results if isinstance(result, Created) for each in result.ended]
        assert len(gone) == len(set(gone)) == 45
        listed = {record.id for record in await store.list("alice")}
        assert len(listed) == 5
        assert listed.isdisjoint(gone)

    # --- refreshing ----------------------------------------------------------------------------------------

    async def test_a_refresh_replaces_the_pair(self, store: SessionStore) -> None:
        record = session(flags=3, key="device:phone")
        await opened(store, record)
        wanted = rotation(record)
        new = rotated(record, wanted)
        assert await store.rotate(wanted) == Rotated(new, record.token_digest)
        assert await store.find(wanted.token_digest) == new
        assert await store.get(record.id) == new
        assert await store.list("alice") == [new]
        assert await store.count() == 1

    async def test_the_old_token_is_remembered_as_revoked(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.rotate(rotation(record))
        assert await store.find(record.token_digest) == EndedRecord(
            b"", record.token_digest, Code.TOKEN_REVOKED, WALL + MINUTE
        )

    async def test_a_refresh_after_another(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        for number in range(1, 6):
            wanted = rotation(record, number, WALL + number * HOUR)
            result = await store.rotate(wanted)
            assert result == Rotated(rotated(record, wanted), record.token_digest)
            record = rotated(record, wanted)
        assert await store.list("alice") == [record]

    async def test_no_new_token_outlives_the_refresh_token(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=WALL + 2 * HOUR)
        await opened(store, record)
        result = await store.rotate(rotation(record))
        assert isinstance(result, Rotated)
        assert result.record.expires_at == result.record.refresh_expires_at == WALL + 2 * HOUR

    async def test_a_lapsed_session_comes_back(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record, wall=WALL + 2 * DAY)
        assert await store.rotate(wanted) == Rotated(rotated(record, wanted), record.token_digest)
        assert await store.create(session(2, wall=WALL + 2 * DAY), ONE) == LimitReached()

    async def test_a_spent_refresh_token_ends_the_session(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record, session(2))
        wanted = rotation(record)
        await store.rotate(wanted)
        late = rotation(record, 2, WALL + HOUR)
        assert await store.rotate(late) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        new = rotated(record, wanted)
        assert await store.find(wanted.token_digest) == ended(new, wall=WALL + HOUR)
        assert await store.get(record.id) == ended(new, wall=WALL + HOUR)
        assert await store.find(late.token_digest) is None
        assert await store.list("alice") == [session(2)]
        # The holder of the good one is out, too; it was no reuse of theirs.
        assert await store.rotate(rotation(new, 3, WALL + HOUR)) == NotRotated(Code.TOKEN_REVOKED)

    async def test_one_spent_long_ago_ends_it_too(self, store: SessionStore) -> None:
        first = record = session()
        await opened(store, record)
        for number in range(3):
            wanted = rotation(record, number)
            await store.rotate(wanted)
            record = rotated(record, wanted)
        assert await store.rotate(rotation(first, 9)) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        assert await store.count() == 0

    async def test_made_up_bytes_of_a_known_family_end_it(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        guess = rotation(record, spent_digest=digest("guess"))
        assert await store.rotate(guess) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        assert await store.count() == 0

    async def test_a_family_that_is_not_known(self, store: SessionStore) -> None:
        await opened(store, session(1))
        assert await store.rotate(rotation(session(2))) == NotRotated(Code.UNAUTHENTICATED)
        assert await store.count() == 1

    async def test_a_refresh_token_past_its_time(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        late = rotation(record, wall=record.refresh_expires_at)
        assert await store.rotate(late) == NotRotated(Code.TOKEN_EXPIRED)
        assert await store.find(late.token_digest) is None

    async def test_one_past_its_time_of_a_session_that_lives_on(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=WALL + MINUTE)
        await opened(store, record)
        assert await store.rotate(rotation(record)) == NotRotated(Code.TOKEN_EXPIRED)
        assert await store.get(record.id) == record

    @pytest.mark.parametrize("code", [Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.TOKEN_EXPIRED])
    async def test_a_refresh_of_an_ended_session_says_how_it_ended(
        self, store: SessionStore, code: Code
    ) -> None:
        record = session()
        await opened(store, record)
        await store.end([record.id], code, WALL)
        assert await store.rotate(rotation(record)) == NotRotated(code)

    async def test_the_same_refresh_once_more_is_none(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record)
        await store.rotate(wanted)
        assert await store.rotate(wanted) == Rotated(rotated(record, wanted), b"")
        assert await store.count() == 1

    async def test_of_many_with_one_refresh_token_one_succeeds_and_the_family_ends(
        self, store: SessionStore
    ) -> None:
        record = session()
        await opened(store, record)
        results = await asyncio.gather(*(store.rotate(rotation(record, number)) for number in range(20)))
        assert sum(isinstance(result, Rotated) for result in results) == 1
        assert results.count(NotRotated(Code.TOKEN_REVOKED, reused=True)) == 1
        assert results.count(NotRotated(Code.TOKEN_REVOKED)) == 18
        assert await store.count() == 0

    async def test_many_sessions_are_refreshed_at_once(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number % 7}") for number in range(40)]
        await opened(store, *records)
        results = await asyncio.gather(*(store.rotate(rotation(record)) for record in records))
        assert results == [Rotated(rotated(each, rotation(each)), each.token_digest) for each in records]

    # --- last use ------------------------------------------------------------------------------------------

    async def test_last_use_is_noted_and_never_goes_back(self, store: SessionStore) -> None:
        records = [session(number) for number in range(3)]
        await opened(store, *records)
        await store.touch([(records[0].id, WALL + 5), (records[1].id, WALL + 7)])
        await store.touch([(records[0].id, WALL + 4), (records[1].id, WALL + 8)])
        found = [await store.get(record.id) for record in records]
        assert found == [
            replace(records[0], last_used_at=WALL + 5),
            replace(records[1], last_used_at=WALL + 8),
            records[2],
        ]

    async def test_last_use_of_what_is_not_there_is_passed_over(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record, session(2))
        await store.end([session(2).id], Code.TOKEN_REVOKED, WALL)
        await store.touch([])
        await store.touch([(bytes(16), WALL + 9), (b"", WALL + 9), (session(2).id, WALL + 9)])
        await store.touch([(digest("x")[:16], WALL + 9), (record.id, WALL + 9)])
        assert await store.get(session(2).id) == ended(session(2))
        assert await store.get(record.id) == replace(record, last_used_at=WALL + 9)
        assert await store.count() == 1

    async def test_last_uses_of_many(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(300)]
        await asyncio.gather(*(store.create(record, ONE) for record in records))
        await store.touch([(record.id, WALL + number) for number, record in enumerate(records)])
        used = {record.id: record.last_used_at for record in await store.list()}
        assert used == {record.id: WALL + number for number, record in enumerate(records)}

    # --- ending --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("code", [Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.TOKEN_EXPIRED])
    async def test_what_has_ended_is_remembered(self, store: SessionStore, code: Code) -> None:
        record = session()
        await opened(store, record)
        gone = ended(record, code, WALL + 3)
        assert await store.end([record.id], code, WALL + 3) == [gone]
        assert await store.find(record.token_digest) == gone
        assert await store.get(record.id) == gone
        assert await store.count() == 0
        assert await store.list("alice") == []

    async def test_ending_is_done_once(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.end([record.id], Code.SESSION_REPLACED, WALL)
        assert await store.end([record.id], Code.TOKEN_REVOKED, WALL + 9) == []
        assert await store.get(record.id) == ended(record, Code.SESSION_REPLACED)

    async def test_several_are_ended_and_unknown_ones_passed_over(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(4)]
        await opened(store, *records)
        ids = [records[2].id, bytes(16), records[0].id, b"", records[2].id]
        assert await store.end(ids, Code.TOKEN_REVOKED, WALL) == [ended(records[2]), ended(records[0])]
        assert await store.list() == [records[1], records[3]]
        assert await store.end([], Code.TOKEN_REVOKED, WALL) == []

    async def test_only_a_users_own_are_ended_if_that_is_said(self, store: SessionStore) -> None:
        mine, other = session(1, "alice"), session(2, "bob")
        await opened(store, mine, other)
        gone = await store.end([other.id, mine.id], Code.TOKEN_REVOKED, WALL, "alice")
        assert gone == [ended(mine)]
        assert await store.get(other.id) == other

    async def test_lapsed_sessions_are_ended_too(self, store: SessionStore) -> None:
        records = [session(1, expires_at=WALL - 1), session(2, "bob", expires_at=WALL - 1)]
        await opened(store, *records)
        assert await store.end([records[0].id], Code.TOKEN_REVOKED, WALL) == [ended(records[0])]
        assert await store.end_user("bob", Code.TOKEN_REVOKED, WALL) == [ended(records[1])]

    async def test_all_of_a_user_are_ended(self, store: SessionStore) -> None:
        records = [session(number, "alice" if number % 2 else "bob") for number in range(6)]
        await opened(store, *records)
        gone = await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
        assert gone == [ended(record) for record in records[1::2]]
        assert await store.list() == records[::2]
        assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == []

    async def test_all_are_ended(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number // 3}") for number in range(30)]
        await opened(store, *records)
        await store.end([records[0].id], Code.SESSION_REPLACED, WALL)
        assert await store.end_all(Code.TOKEN_REVOKED, WALL + 1) == 29
        assert await store.count() == 0
        assert await store.list() == []
        assert await store.list("user-3") == []
        assert await store.find(records[0].token_digest) == ended(records[0], Code.SESSION_REPLACED)
        for record in records[1:]:
            assert await store.find(record.token_digest) == ended(record, wall=WALL + 1)
            assert await store.get(record.id) == ended(record, wall=WALL + 1)
        assert await store.rotate(rotation(records[9])) == NotRotated(Code.TOKEN_REVOKED)
        assert await store.end_user("user-3", Code.TOKEN_REVOKED, WALL + 2) == []
        assert await store.end([records[9].id], Code.TOKEN_REVOKED, WALL + 2) == []
        assert await store.end_all(Code.TOKEN_REVOKED, WALL + 2) == 0

    async def test_after_all_were_ended_others_are_opened(self, store: SessionStore) -> None:
        await opened(store, session(1), session(2))
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        late = session(3, wall=WALL + 1)
        assert await store.create(late, ONE) == Created()
        assert await store.create(session(1), EVICT_ONE) == Created()
        assert await store.list() == [late]
        assert await store.end_all(Code.SESSION_REPLACED, WALL + 2) == 1
        assert await store.get(late.id) == ended(late, Code.SESSION_REPLACED, WALL + 2)
        assert await store.get(session(1).id) == ended(session(1))

    async def test_of_many_that_end_a_session_one_does(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        results = await asyncio.gather(*(store.end([record.id], Code.TOKEN_REVOKED, WALL) for _ in range(20)))
        assert sorted(map(len, results)) == [*19 * [0], 1]

    async def test_ending_and_refreshing_at_once_never_leaves_it_alive(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(20)]
        await opened(store, *records)
        await asyncio.gather(
            *(store.rotate(rotation(record)) for record in records),
            *(store.end([record.id], Code.TOKEN_REVOKED, WALL + MINUTE) for record in records),
        )
        assert await store.count() == 0
        for record in records:
            assert isinstance(await store.get(record.id), EndedRecord)

    # --- listing -------------------------------------------------------------------------------------------

    async def test_a_users_sessions_come_the_oldest_first(self, store: SessionStore) -> None:
        records = [session(number, "alice" if number % 3 else "bob", WALL + number) for number in range(12)]
        await opened(store, *records)
        assert await store.list("bob") == records[::3]
        assert await store.list() == records
        await store.rotate(rotation(records[0]))
        assert [record.id for record in await store.list("bob")] == [record.id for record in records[::3]]
        assert await store.list("nobody") == []

    async def test_lapsed_sessions_are_listed_and_counted(self, store: SessionStore) -> None:
        record = session(expires_at=WALL - 1)
        await opened(store, record)
        assert await store.list("alice") == await store.list() == [record]
        assert await store.count() == 1

    # --- time ----------------------------------------------------------------------------------------------

    async def test_what_is_past_both_its_times_is_removed(self, store: SessionStore) -> None:
        past = session(1, "a", expires_at=WALL + 1, refresh_expires_at=WALL + 1)
        no_refresh = session(2, "b", expires_at=WALL + 1, refresh_expires_at=0)
        live = session(3, "c", refresh_expires_at=WALL + 1)
        lapsed = session(4, "d", expires_at=WALL + 1, refresh_expires_at=WALL + 2)
        await opened(store, past, no_refresh, live, lapsed)
        assert await expire_all(store, WALL) == 0
        assert await expire_all(store, WALL + 1) == 2
        assert await store.list() == [live, lapsed]
        assert await store.list("a") == []
        for record in (past, no_refresh):
            assert not isinstance(await store.find(record.token_digest), SessionRecord)

    async def test_a_token_past_its_time_is_found_until_it_is_removed(self, store: SessionStore) -> None:
        record = session(expires_at=WALL - 2, refresh_expires_at=WALL - 1)
        await opened(store, record)
        assert await store.find(record.token_digest) == record

    async def test_memories_are_forgotten_in_time(self, store: SessionStore) -> None:
        records = [session(number) for number in range(3)]
        await opened(store, *records)
        await store.end([records[0].id], Code.TOKEN_REVOKED, WALL)
        wanted = rotation(records[2], wall=WALL)
        await store.rotate(wanted)
        await store.end([records[1].id], Code.TOKEN_REVOKED, WALL + 1)
        assert await expire_all(store, WALL + KEEP_ENDED - 1) == 0
        assert await store.find(records[2].token_digest) is not None
        assert await expire_all(store, WALL + KEEP_ENDED) == 2
        assert await store.get(records[0].id) is None
        assert await store.find(records[0].token_digest) is None
        assert await store.find(records[2].token_digest) is None
        assert await store.get(records[1].id) == ended(records[1], wall=WALL + 1)
        assert await store.list() == [rotated(records[2], wanted)]

    async def test_a_spent_refresh_token_is_known_when_its_access_token_is_forgotten(
        self, store: SessionStore
    ) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record, wall=WALL)
        await store.rotate(wanted)
        await store.touch([(record.id, WALL + KEEP_ENDED)])
        await expire_all(store, WALL + KEEP_ENDED)
        late = rotation(record, 2, WALL + KEEP_ENDED)
        assert await store.rotate(late) == NotRotated(Code.TOKEN_REVOKED, reused=True)

    async def test_no_more_are_removed_at_once_than_may_be(self, store: SessionStore) -> None:
        await opened(
            store, *(session(number, expires_at=WALL + 1, refresh_expires_at=WALL + 1) for number in range(9))
        )
        left = 9
        for _ in range(2_000):
            removed = await store.expire(WALL + 1, KEEP_ENDED, 2)
            assert removed <= 2
            assert await store.count() >= left - removed
            left = await store.count()
            if not left:
                break
        assert left == 0

    # --- answers -------------------------------------------------------------------------------------------

    async def test_the_first_who_claims_runs_the_request(self, store: SessionStore) -> None:
        first = await store.claim("alice", "k", digest("body"), WALL, LEASE)
        second = await store.claim("alice", "k", digest("body"), WALL + 1, LEASE)
        assert (first, second) == (Claim(ClaimState.NEW), Claim(ClaimState.RUNNING))

    async def test_an_answer_is_kept(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL + 1, KEEP)
        for wall in (WALL + 1, WALL + KEEP):
            assert await store.claim("alice", "k", digest("body"), wall, LEASE) == Claim(
                ClaimState.DONE, b"answer"
            )

    @pytest.mark.parametrize("answer", [b"", b"\0", bytes(range(256)), 100_000 * b"x"])
    async def test_answers_of_every_kind_are_kept(self, store: SessionStore, answer: bytes) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", answer, WALL, KEEP)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.DONE, answer)

    async def test_another_request_under_the_same_key_is_a_conflict(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.CONFLICT)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.CONFLICT)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_keys_are_each_users_own(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        pairs = [("alice", odd), ("bob", odd), (odd, "k"), ("alice", odd + "x")]
        for number, (user, key) in enumerate(pairs):
            claim = await store.claim(user, key, digest(f"body {number}"), WALL, LEASE)
            assert claim == Claim(ClaimState.NEW)
            await store.keep_answer(user, key, b"answer %d" % number, WALL, KEEP)
        for number, (user, key) in enumerate(pairs):
            claim = await store.claim(user, key, digest(f"body {number}"), WALL, LEASE)
            assert claim == Claim(ClaimState.DONE, b"answer %d" % number)

    @pytest.mark.parametrize("body", ["body", "other"])
    async def test_when_the_lease_is_over_somebody_else_may(self, store: SessionStore, body: str) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        late = WALL + LEASE
        assert await store.claim("alice", "k", digest("body"), late - 1, LEASE) == Claim(ClaimState.RUNNING)
        assert await store.claim("alice", "k", digest(body), late, LEASE) == Claim(ClaimState.NEW)
        assert await store.claim("alice", "k", digest(body), late, LEASE) == Claim(ClaimState.RUNNING)

    async def test_an_answer_past_its_time_is_as_if_it_had_never_been(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("other"), WALL + KEEP, LEASE) == Claim(ClaimState.NEW)

    async def test_a_request_that_was_not_run_is_for_the_next(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.release_claim("alice", "k")
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.NEW)

    async def test_an_answer_is_not_released(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        await store.release_claim("alice", "k")
        await store.release_claim("alice", "unknown")
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    async def test_without_a_claim_no_answer_is_kept(self, store: SessionStore) -> None:
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.NEW)

    async def test_claims_and_answers_are_removed_in_time(self, store: SessionStore) -> None:
        for number in range(3):
            await store.claim("alice", f"{number}", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "1", b"answer", WALL, KEEP)
        await store.keep_answer("alice", "2", b"answer", WALL, 2 * KEEP)
        assert await expire_all(store, WALL + LEASE - 1) == 0
        assert await expire_all(store, WALL + KEEP) == 2
        claims = [await store.claim("alice", f"{number}", digest("body"), WALL, LEASE) for number in range(3)]
        assert claims == [Claim(ClaimState.NEW), Claim(ClaimState.NEW), Claim(ClaimState.DONE, b"answer")]

    async def test_times_at_the_end_of_the_world(self, store: SessionStore) -> None:
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(ClaimState.NEW)
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(ClaimState.RUNNING)
        await store.keep_answer("alice", "k", b"answer", LAST - 1, KEEP)
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    async def test_of_many_who_claim_at_once_one_runs(self, store: SessionStore) -> None:
        claims = await asyncio.gather(
            *(store.claim("alice", "k", digest("body"), WALL, LEASE) for _ in range(20))
        )
        assert sorted(claim.state.name for claim in claims) == ["NEW", *19 * ["RUNNING"]]

    async def test_ending_sessions_leaves_answers(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    # --- bounds --------------------------------------------------------------------------------------------

    @pytest.fixture
    async def bounded(self, harness: Harness) -> SessionStore:
        """A store of few answers."""
        if not harness.bounded:
            pytest.skip("its answers are bounded by another program")
        return await harness.make_store(AnswerLimits(count=6, bytes=100, user_count=3, user_bytes=60))

    async def states(self, store: SessionStore, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """What is known of requests, without keeping a claim of them."""
        names = []
        for user, key in pairs:
            claim = await store.claim(user, key, digest("another body"), WALL, LEASE)
            names.append("kept" if claim.state is ClaimState.CONFLICT else "gone")
            if claim.state is ClaimState.NEW:
                await store.release_claim(user, key)
        return names

    async def answered(self, store: SessionStore, user: str, key: str, answer: bytes = b"x") -> None:
        assert await store.claim(user, key, digest("body"), WALL, LEASE) == Claim(ClaimState.NEW)
        await store.keep_answer(user, key, answer, WALL, KEEP)

    async def test_a_users_oldest_answer_makes_room(self, bounded: SessionStore) -> None:
        await self.answered(bounded, "bob", "b")
        for key in "pqrs":
            await self.answered(bounded, "alice", key)
        pairs = [("bob", "b"), ("alice", "s"), ("alice", "r"), ("alice", "q")]
        assert await self.states(bounded, pairs) == 4 * ["kept"]

    async def test_the_oldest_answer_of_all_makes_room(self, bounded: SessionStore) -> None:
        pairs = [(user, key) for user in ("a", "b", "c") for key in "pq"]
        for user, key in pairs:
            await self.answered(bounded, user, key)
        await self.answered(bounded, "d", "p")
        assert await self.states(bounded, [*pairs[1:], ("d", "p")]) == 6 * ["kept"]

    async def test_answers_are_bounded_in_bytes(self, bounded: SessionStore) -> None:
        await self.answered(bounded, "alice", "p", 40 * b"x")
        await self.answered(bounded, "alice", "q", 30 * b"x")
        assert await self.states(bounded, [("alice", "q"), ("alice", "p")]) == ["kept", "gone"]
        await self.answered(bounded, "bob", "p", 60 * b"x")
        assert await self.states(bounded, [("alice", "q"), ("bob", "p")]) == ["kept", "kept"]
        await self.answered(bounded, "carol", "p", 30 * b"x")
        assert await self.states(bounded, [("bob", "p"), ("carol", "p"), ("alice", "q")]) == [
            "kept",
            "kept",
            "gone",
        ]

    async def test_an_answer_that_is_too_large_is_refused(self, bounded: SessionStore) -> None:
        await bounded.claim("alice", "k", digest("body"), WALL, LEASE)
        with pytest.raises(ValueError, match="too large"):
            await bounded.keep_answer("alice", "k", 61 * b"x", WALL, KEEP)
        await bounded.keep_answer("alice", "k", 60 * b"x", WALL, KEEP)

    async def test_what_runs_is_never_forgotten(self, bounded: SessionStore) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), WALL, LEASE)
        with pytest.raises(ResourceExhausted) as refused:
            await bounded.claim("alice", "s", digest("body"), WALL, LEASE)
        assert refused.value.details is not None
        assert refused.value.details["retry_after_ms"] > 0
        for key in "pqr":
            await bounded.claim("bob", key, digest("body"), WALL, LEASE)
        with pytest.raises(ResourceExhausted):
            await bounded.claim("carol", "p", digest("body"), WALL, LEASE)
        pairs = [(user, key) for user in ("alice", "bob") for key in "pqr"]
        assert await self.states(bounded, pairs) == 6 * ["kept"]

    async def test_what_is_past_its_time_makes_room(self, bounded: SessionStore) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), WALL, LEASE)
        late = WALL + LEASE
        assert await bounded.claim("alice", "s", digest("body"), late, LEASE) == Claim(ClaimState.NEW)

    async def test_one_who_is_refused_takes_nobody_along(self, bounded: SessionStore) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), WALL, LEASE)
        refused, allowed, created = await asyncio.gather(
            bounded.claim("alice", "s", digest("body"), WALL, LEASE),
            bounded.claim("bob", "s", digest("body"), WALL, LEASE),
            bounded.create(session(), FIVE),
            return_exceptions=True,
        )
        assert isinstance(refused, ResourceExhausted)
        assert (allowed, created) == (Claim(ClaimState.NEW), Created())

    # --- what lasts ----------------------------------------------------------------------------------------

    @pytest.fixture
    def lasting(self, harness: Harness, store: SessionStore) -> SessionStore:
        """A store whose sessions outlive it."""
        if not harness.durable:
            pytest.skip("its sessions end with it")
        return store

    async def test_everything_is_there_after_reopening(self, lasting: SessionStore, harness: Harness) -> None:
        records = [
            session(number, STRINGS[kind], client=STRINGS[kind], key=STRINGS[kind], flags=number % 4)
            for number, kind in enumerate(STRINGS)
        ]
        await opened(lasting, *records)
        wanted = rotation(records[1])
        await lasting.rotate(wanted)
        await lasting.end([records[2].id], Code.SESSION_REPLACED, WALL + 1)
        await lasting.end_user(records[3].user, Code.TOKEN_REVOKED, WALL + 2)
        again = await harness.reopen(lasting)
        kept = [records[0], rotated(records[1], wanted), *records[4:]]
        assert await again.list() == kept
        assert await again.count() == len(kept)
        assert await again.find(records[1].token_digest) == EndedRecord(
            b"", records[1].token_digest, Code.TOKEN_REVOKED, WALL + MINUTE
        )
        assert await again.get(records[2].id) == ended(records[2], Code.SESSION_REPLACED, WALL + 1)
        assert await again.find(records[3].token_digest) == ended(records[3], wall=WALL + 2)

    async def test_last_use_is_there_after_reopening(self, lasting: SessionStore, harness: Harness) -> None:
        record = session()
        await opened(lasting, record)
        await lasting.touch([(record.id, WALL + 9)])
        again = await harness.reopen(lasting)
        assert await again.get(record.id) == replace(record, last_used_at=WALL + 9)

    async def test_the_end_of_all_holds_after_reopening(
        self, lasting: SessionStore, harness: Harness
    ) -> None:
        records = [session(number, f"user-{number}") for number in range(40)]
        await opened(lasting, *records)
        await lasting.end_all(Code.TOKEN_REVOKED, WALL)
        again = await harness.reopen(lasting)
        assert await again.count() == 0
        for record in records:
            assert await again.get(record.id) == ended(record)

    async def test_claims_and_answers_are_there_after_reopening(
        self, lasting: SessionStore, harness: Harness
    ) -> None:
        for key in ("running", "done", "released"):
            await lasting.claim("alice", key, digest("body"), WALL, LEASE)
        await lasting.keep_answer("alice", "done", b"answer", WALL, KEEP)
        await lasting.release_claim("alice", "released")
        again = await harness.reopen(lasting)
        claims = [
            await again.claim("alice", key, digest("body"), WALL, LEASE)
            for key in ("running", "done", "released")
        ]
        assert claims == [
            Claim(ClaimState.RUNNING),
            Claim(ClaimState.DONE, b"answer"),
            Claim(ClaimState.NEW),
        ]

    async def test_a_store_of_one_process_hands_out_all_that_it_keeps(
        self, lasting: SessionStore, harness: Harness
    ) -> None:
        if lasting.shared:
            assert await loaded(lasting) == []
            return
        records = [session(number, f"user-{number % 9}") for number in range(600)]
        await opened(lasting, *records)
        await lasting.end([record.id for record in records[:300]], Code.TOKEN_REVOKED, WALL)
        again = await harness.reopen(lasting)
        found = await loaded(again)
        assert found == [*records[300:], *(ended(record) for record in records[:300])]

    async def test_a_ping_shows_that_it_can_be_written_to(self, store: SessionStore) -> None:
        await store.ping()
        await store.ping()
        assert await store.count() == 0

    async def test_closing_twice_does_no_harm(self, store: SessionStore) -> None:
        await store.close()
        await store.close()
