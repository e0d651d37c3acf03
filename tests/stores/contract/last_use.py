"""Last uses are recorded and never go backwards."""

from __future__ import annotations

import asyncio

from tests.stores.contract.helpers import ONE, WALL, digest, ended, opened, session
from zcproto.errors import Code
from zcproto.stores.base import SessionStore


class LastUseContract:
    async def test_last_use_is_recorded_and_never_goes_back(self, store: SessionStore) -> None:
        records = [session(number) for number in range(3)]
        await opened(store, *records)
        await store.touch([(records[0].id, WALL + 5), (records[1].id, WALL + 7)])
        await store.touch([(records[0].id, WALL + 4), (records[1].id, WALL + 8)])
        found = [await store.get(record.id) for record in records]
        assert found == [
            records[0]._replace(last_used_at=WALL + 5),
            records[1]._replace(last_used_at=WALL + 8),
            records[2],
        ]

    async def test_last_use_of_an_unknown_session_is_ignored(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record, session(2))
        await store.end([session(2).id], Code.TOKEN_REVOKED, WALL)
        await store.touch([])
        await store.touch([(bytes(16), WALL + 9), (b"", WALL + 9), (session(2).id, WALL + 9)])
        await store.touch([(digest("x")[:16], WALL + 9), (record.id, WALL + 9)])
        assert await store.get(session(2).id) == ended(session(2))
        assert await store.get(record.id) == record._replace(last_used_at=WALL + 9)
        assert await store.count() == 1

    async def test_last_uses_of_many_sessions_are_recorded(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number}") for number in range(300)]
        await asyncio.gather(*(store.create(record, ONE) for record in records))
        await store.touch([(record.id, WALL + number) for number, record in enumerate(records)])
        used = {record.id: record.last_used_at for record in await store.list()}
        assert used == {record.id: WALL + number for number, record in enumerate(records)}
