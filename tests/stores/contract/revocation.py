"""Ended sessions leave a tombstone, and end once."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.contract.helpers import EVICT_ONE, MINUTE, ONE, WALL, ended, opened, rotation, session
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord
from zcproto.stores.base import Created, NotRotated, SessionStore


class RevocationContract:
    @pytest.mark.parametrize("code", [Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.TOKEN_EXPIRED])
    async def test_ended_session_leaves_a_tombstone(self, store: SessionStore, code: Code) -> None:
        record = session()
        await opened(store, record)
        gone = ended(record, code, WALL + 3)
        assert await store.end([record.id], code, WALL + 3) == [gone]
        assert await store.find(record.token_digest) == gone
        assert await store.get(record.id) == gone
        assert await store.count() == 0
        assert await store.list("alice") == []

    async def test_ending_a_session_twice_returns_it_once(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.end([record.id], Code.SESSION_REPLACED, WALL)
        assert await store.end([record.id], Code.TOKEN_REVOKED, WALL + 9) == []
        assert await store.get(record.id) == ended(record, Code.SESSION_REPLACED)

    async def test_several_sessions_are_ended_and_unknown_ids_ignored(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(4)]
        await opened(store, *records)
        ids = [records[2].id, bytes(16), records[0].id, b"", records[2].id]
        assert await store.end(ids, Code.TOKEN_REVOKED, WALL) == [ended(records[2]), ended(records[0])]
        assert await store.list() == [records[1], records[3]]
        assert await store.end([], Code.TOKEN_REVOKED, WALL) == []

    async def test_end_with_a_user_ends_only_sessions_of_that_user(self, store: SessionStore) -> None:
        mine, other = session(1, "alice"), session(2, "bob")
        await opened(store, mine, other)
        gone = await store.end([other.id, mine.id], Code.TOKEN_REVOKED, WALL, "alice")
        assert gone == [ended(mine)]
        assert await store.get(other.id) == other

    async def test_lapsed_sessions_are_ended(self, store: SessionStore) -> None:
        records = [session(1, expires_at=WALL - 1), session(2, "bob", expires_at=WALL - 1)]
        await opened(store, *records)
        assert await store.end([records[0].id], Code.TOKEN_REVOKED, WALL) == [ended(records[0])]
        assert await store.end_user("bob", Code.TOKEN_REVOKED, WALL) == [ended(records[1])]

    async def test_end_user_ends_all_sessions_of_the_user(self, store: SessionStore) -> None:
        records = [session(number, "alice" if number % 2 else "bob") for number in range(6)]
        await opened(store, *records)
        gone = await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
        assert gone == [ended(record) for record in records[1::2]]
        assert await store.list() == records[::2]
        assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == []

    async def test_end_all_ends_all_sessions(self, store: SessionStore) -> None:
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

    async def test_sessions_are_opened_after_end_all(self, store: SessionStore) -> None:
        await opened(store, session(1), session(2))
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        late = session(3, wall=WALL + 1)
        assert await store.create(late, ONE) == Created()
        assert await store.create(session(1), EVICT_ONE) == Created()
        assert await store.list() == [late]
        assert await store.end_all(Code.SESSION_REPLACED, WALL + 2) == 1
        assert await store.get(late.id) == ended(late, Code.SESSION_REPLACED, WALL + 2)
        assert await store.get(session(1).id) == ended(session(1))

    async def test_concurrent_revocations_return_the_session_once(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        results = await asyncio.gather(*(store.end([record.id], Code.TOKEN_REVOKED, WALL) for _ in range(20)))
        assert sorted(map(len, results)) == [*19 * [0], 1]

    async def test_concurrent_revocation_and_refresh_leave_no_live_session(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(20)]
        await opened(store, *records)
        await asyncio.gather(
            *(store.rotate(rotation(record)) for record in records),
            *(store.end([record.id], Code.TOKEN_REVOKED, WALL + MINUTE) for record in records),
        )
        assert await store.count() == 0
        for record in records:
            assert isinstance(await store.get(record.id), EndedRecord)
