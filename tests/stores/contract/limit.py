"""The per-user limit refuses a session or ends an old one, also for concurrent openings."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.contract.helpers import (
    EVICT_ONE,
    EVICT_TWO,
    FIVE,
    HOUR,
    IDLE,
    MINUTE,
    ONE,
    WALL,
    ended,
    opened,
    rotated,
    rotation,
    session,
)
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.stores.base import NO_LIMIT, Created, LimitReached, SessionStore


async def without_connection(store: SessionStore, per_user: int, *records: SessionRecord) -> UserLimit:
    """Return a limit after the connections of these sessions have ended."""
    await store.lease([(record.id, False) for record in records])
    ids = frozenset(record.id for record in records)
    return UserLimit(per_user, "evict_disconnected", IDLE, ids)


class LimitContract:
    async def test_session_over_the_limit_is_refused_and_nothing_changes(self, store: SessionStore) -> None:
        records = [session(number) for number in range(6)]
        results = [await store.create(record, FIVE) for record in records]
        assert results == [*5 * [Created()], LimitReached()]
        assert await store.list("alice") == records[:5]
        assert await store.find(records[5].token_digest) is None

    async def test_limit_is_per_user(self, store: SessionStore) -> None:
        assert await store.create(session(1, "alice"), ONE) == Created()
        assert await store.create(session(2, "bob"), ONE) == Created()
        assert await store.create(session(3, "bob"), ONE) == LimitReached()

    async def test_evict_oldest_replaces_the_oldest_session(self, store: SessionStore) -> None:
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

    async def test_refresh_does_not_change_which_session_is_oldest(self, store: SessionStore) -> None:
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
    async def test_lapsed_session_is_ended_to_make_room(
        self, store: SessionStore, limit: UserLimit, lapsed: SessionRecord
    ) -> None:
        await opened(store, lapsed)
        late = session(2, wall=WALL + MINUTE)
        assert await store.create(late, limit) == Created((ended(lapsed, Code.TOKEN_EXPIRED, WALL + MINUTE),))
        assert await store.list("alice") == [late]
        assert await store.find(lapsed.token_digest) == ended(lapsed, Code.TOKEN_EXPIRED, WALL + MINUTE)

    async def test_session_one_millisecond_before_lapsing_makes_no_room(self, store: SessionStore) -> None:
        await opened(store, session(last_used_at=WALL + MINUTE + 1 - IDLE, expires_at=WALL + MINUTE + 1))
        assert await store.create(session(2, wall=WALL + MINUTE), ONE) == LimitReached()

    async def test_lapsed_session_is_ended_before_the_oldest_live_one(self, store: SessionStore) -> None:
        old, lapsed, younger = session(1), session(2, expires_at=WALL + 1), session(3, expires_at=WALL + 1)
        await opened(store, old, lapsed, younger)
        result = await store.create(session(4, wall=WALL + 1), UserLimit(3, "evict_oldest", IDLE))
        assert result == Created((ended(lapsed, Code.TOKEN_EXPIRED, WALL + 1),))

    async def test_last_use_keeps_a_session_from_lapsing(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.touch([(record.id, WALL + 1)])
        assert await store.create(session(2, wall=WALL + IDLE), ONE) == LimitReached()
        result = await store.create(session(2, wall=WALL + IDLE + 1), ONE)
        assert isinstance(result, Created)
        assert len(result.ended) == 1

    async def test_expired_session_does_not_count(self, store: SessionStore) -> None:
        await opened(store, session(expires_at=WALL + 1, refresh_expires_at=WALL + 1))
        assert await store.create(session(2, wall=WALL + 1), ONE) == Created()
        assert await store.create(session(3, wall=WALL + 1), ONE) == LimitReached()

    async def test_idle_session_without_refresh_token_does_not_count(self, store: SessionStore) -> None:
        await opened(store, session(refresh_expires_at=0, last_used_at=WALL - IDLE))
        assert await store.create(session(2), ONE) == Created()
        assert await store.create(session(3), ONE) == LimitReached()

    async def test_ended_sessions_do_not_count(self, store: SessionStore) -> None:
        await opened(store, session(1))
        await store.end([session(1).id], Code.TOKEN_REVOKED, WALL)
        assert await store.create(session(2), ONE) == Created()

    async def test_lowered_limit_evicts_the_oldest_down_to_it(self, store: SessionStore) -> None:
        records = [session(number) for number in range(5)]
        await opened(store, *records)
        result = await store.create(session(5), EVICT_TWO)
        assert result == Created(tuple(ended(record, Code.SESSION_REPLACED) for record in records[:4]))
        assert await store.list("alice") == [records[4], session(5)]
        assert await store.find(records[0].token_digest) == ended(records[0], Code.SESSION_REPLACED)

    async def test_lowered_limit_evicts_lapsed_sessions_before_live_ones(self, store: SessionStore) -> None:
        old, young = session(1), session(4)
        lapsed = [session(number, expires_at=WALL + 1) for number in (2, 3)]
        await opened(store, old, *lapsed, young)
        new = session(5, wall=WALL + 1)
        assert await store.create(new, EVICT_TWO) == Created(
            (
                *(ended(record, Code.TOKEN_EXPIRED, WALL + 1) for record in lapsed),
                ended(old, Code.SESSION_REPLACED, WALL + 1),
            )
        )
        assert await store.list("alice") == [young, new]

    async def test_lowered_limit_refuses_although_a_lapsed_session_could_end(
        self, store: SessionStore
    ) -> None:
        records = [session(1), session(2, expires_at=WALL + 1), session(3)]
        await opened(store, *records)
        assert await store.create(session(4, wall=WALL + 1), ONE) == LimitReached()
        assert await store.list("alice") == records

    async def test_lowered_limit_evicts_as_many_lapsed_sessions_as_are_too_many(
        self, store: SessionStore
    ) -> None:
        live, *lapsed = session(1), *(session(number, expires_at=WALL + 1) for number in range(2, 6))
        await opened(store, live, *lapsed)
        new, limit = session(6, wall=WALL + 1), UserLimit(3, "refuse", IDLE)
        gone = tuple(ended(record, Code.TOKEN_EXPIRED, WALL + 1) for record in lapsed[:3])
        assert await store.create(new, limit) == Created(gone)
        assert await store.list("alice") == [live, lapsed[3], new]

    async def test_no_limit_admits_a_session_beside_others(self, store: SessionStore) -> None:
        records = [session(number) for number in range(6)]
        results = [await store.create(record, NO_LIMIT) for record in records]
        assert results == 6 * [Created()]
        assert await store.list("alice") == records

    # --- evict_disconnected --------------------------------------------------------------------------

    async def test_oldest_disconnected_session_makes_room_and_the_others_are_kept(
        self, store: SessionStore
    ) -> None:
        first, second, third, new = (session(number) for number in range(4))
        await opened(store, first, second, third)
        limit = await without_connection(store, 3, second, third)
        assert await store.create(new, limit) == Created((ended(second, Code.TOKEN_EXPIRED),))
        assert await store.list("alice") == [first, third, new]
        assert await store.find(second.token_digest) == ended(second, Code.TOKEN_EXPIRED)

    async def test_login_is_refused_while_all_sessions_are_in_use(self, store: SessionStore) -> None:
        records = [session(number) for number in range(3)]
        await opened(store, *records)
        limit = await without_connection(store, 3)
        assert await store.create(session(4), limit) == LimitReached()
        assert await store.list("alice") == records

    async def test_lapsed_session_makes_room_before_a_disconnected_one(self, store: SessionStore) -> None:
        old, lapsed = session(1), session(2, expires_at=WALL + 1)
        await opened(store, old, lapsed)
        limit = await without_connection(store, 2, old, lapsed)
        new = session(3, wall=WALL + 1)
        assert await store.create(new, limit) == Created((ended(lapsed, Code.TOKEN_EXPIRED, WALL + 1),))
        assert await store.list("alice") == [old, new]

    async def test_lowered_limit_evicts_disconnected_sessions_down_to_it(self, store: SessionStore) -> None:
        used, *rest = (session(number) for number in range(5))
        await opened(store, used, *rest)
        limit = await without_connection(store, 2, *rest)
        gone = tuple(ended(record, Code.TOKEN_EXPIRED) for record in rest)
        assert await store.create(session(5), limit) == Created(gone)
        assert await store.list("alice") == [used, session(5)]

    async def test_lowered_limit_refuses_while_that_many_are_in_use(self, store: SessionStore) -> None:
        records = [session(number) for number in range(4)]
        await opened(store, *records)
        limit = await without_connection(store, 2, *records[:2])
        assert await store.create(session(5), limit) == LimitReached()
        assert await store.list("alice") == records

    async def test_two_hundred_concurrent_openings_replace_only_the_disconnected(
        self, store: SessionStore
    ) -> None:
        records = [session(number) for number in range(5)]
        await opened(store, *records)
        limit = await without_connection(store, 5, *records[:3])
        results = await asyncio.gather(*(store.create(session(5 + number), limit) for number in range(200)))
        created = [result for result in results if isinstance(result, Created)]
        assert sorted(each.id for result in created for each in result.ended) == sorted(
            record.id for record in records[:3]
        )
        assert len(created) == 3
        assert await store.count() == 5

    async def test_fifty_concurrent_openings_get_five_sessions(self, store: SessionStore) -> None:
        results = await asyncio.gather(*(store.create(session(number), FIVE) for number in range(50)))
        assert sorted(type(result).__name__ for result in results) == 5 * ["Created"] + 45 * ["LimitReached"]
        listed = await store.list("alice")
        assert len(listed) == await store.count() == 5
        assert {record.id for record in listed} == {
            session(number).id for number, result in enumerate(results) if isinstance(result, Created)
        }

    async def test_fifty_concurrent_evicting_openings_leave_five_sessions(self, store: SessionStore) -> None:
        limit = UserLimit(5, "evict_oldest", IDLE)
        results = await asyncio.gather(*(store.create(session(number), limit) for number in range(50)))
        gone = [each.id for result in results if isinstance(result, Created) for each in result.ended]
        assert len(gone) == len(set(gone)) == 45
        listed = {record.id for record in await store.list("alice")}
        assert len(listed) == 5
        assert listed.isdisjoint(gone)
