"""Expired sessions, tombstones and answers are removed, not before their time."""

from __future__ import annotations

from tests.stores.contract.helpers import (
    KEEP_ENDED,
    WALL,
    ended,
    expire_all,
    opened,
    rotated,
    rotation,
    session,
)
from zcproto.errors import Code
from zcproto.sessions.record import SessionRecord
from zcproto.stores.base import NotRotated, SessionStore


class ExpiryContract:
    async def test_sessions_of_a_user_are_listed_oldest_first(self, store: SessionStore) -> None:
        records = [session(number, "alice" if number % 3 else "bob", WALL + number) for number in range(12)]
        await opened(store, *records)
        assert await store.list("bob") == records[::3]
        assert await store.list() == records
        await store.rotate(rotation(records[0]))
        assert [record.id for record in await store.list("bob")] == [record.id for record in records[::3]]
        assert await store.list("unknown") == []

    async def test_lapsed_sessions_are_listed_and_counted(self, store: SessionStore) -> None:
        record = session(expires_at=WALL - 1)
        await opened(store, record)
        assert await store.list("alice") == await store.list() == [record]
        assert await store.count() == 1

    async def test_session_with_both_tokens_expired_is_removed(self, store: SessionStore) -> None:
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

    async def test_expired_token_is_found_until_it_is_removed(self, store: SessionStore) -> None:
        record = session(expires_at=WALL - 2, refresh_expires_at=WALL - 1)
        await opened(store, record)
        assert await store.find(record.token_digest) == record

    async def test_tombstones_are_removed_after_their_time(self, store: SessionStore) -> None:
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

    async def test_spent_refresh_token_ends_the_session_after_its_tombstone_was_removed(
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

    async def test_expire_removes_at_most_the_limit(self, store: SessionStore) -> None:
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
