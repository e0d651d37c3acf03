"""Sessions are stored as they are, once, and found by token and id."""

from __future__ import annotations

import pytest

from tests.stores.contract.helpers import (
    DIGESTS,
    EVICT_ONE,
    FIVE,
    LAST,
    ONE,
    STRINGS,
    WALL,
    digest,
    ended,
    loaded,
    opened,
    rotated,
    rotation,
    session,
)
from zcproto.errors import Code
from zcproto.stores.base import Created, LimitReached, SessionStore


class SessionContract:
    async def test_session_is_found_by_token_and_by_id(self, store: SessionStore) -> None:
        record = session()
        assert await store.create(record, FIVE) == Created()
        assert await store.find(record.token_digest) == record
        assert await store.get(record.id) == record
        assert await store.count() == 1

    async def test_unknown_token_and_id_are_not_found(self, store: SessionStore) -> None:
        await opened(store, session())
        assert await store.find(digest("another")) is None
        assert await store.find(session().refresh_digest) is None
        assert await store.get(bytes(16)) is None
        assert await store.get(b"") is None
        assert await store.find(b"") is None

    async def test_empty_store_has_no_sessions(self, store: SessionStore) -> None:
        assert await store.count() == 0
        assert await store.list() == []
        assert await store.list("alice") == []
        assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == []
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 0
        assert await store.expire(LAST, 0, 100) == 0
        assert await loaded(store) == []

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_strings_of_every_kind_are_stored_unchanged(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        record = session(client=odd, address=odd[:45], key=odd)
        await opened(store, record)
        assert await store.find(record.token_digest) == record
        assert await store.list("alice") == [record]
        again = rotation(record, client=odd + "!", address="")
        assert await store.rotate(again) == rotated(record, again)

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_similar_user_names_are_distinguished(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        mine, other = session(1, odd), session(2, odd + "x")
        await opened(store, mine, other)
        assert await store.create(session(3, odd), ONE) == LimitReached()
        assert await store.list(odd) == [mine]
        assert await store.end_user(odd, Code.TOKEN_REVOKED, WALL) == [ended(mine)]
        assert await store.list(odd + "x") == [other]

    @pytest.mark.parametrize("kind", DIGESTS)
    async def test_digests_of_every_kind_are_stored_unchanged(self, store: SessionStore, kind: str) -> None:
        odd = DIGESTS[kind]
        record = session(id=odd[:16], token_digest=odd, refresh_digest=odd)
        await opened(store, record, session(2))
        assert await store.find(odd) == record
        assert await store.get(odd[:16]) == record
        assert await store.end([odd[:16]], Code.TOKEN_REVOKED, WALL) == [ended(record)]
        assert await store.find(odd) == ended(record)

    @pytest.mark.parametrize(("flags", "roles"), [(0, ""), (1, ""), (3, ""), (8, "admin"), (11, "admin a@b")])
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("key", value) for value in ("", "tls:" + 64 * "a", "device:a\0b")),
            *(("origin", value) for value in (b"\1" * 8, bytes(7) + b"\1", b"\1" + bytes(7))),
        ],
    )
    async def test_fields_of_a_login_are_stored_unchanged(
        self, store: SessionStore, name: str, value: str | bytes, flags: int, roles: str
    ) -> None:
        record = session(flags=flags, roles=roles, **{name: value})
        await opened(store, record)
        assert await store.get(record.id) == record
        wanted = rotation(record)
        assert await store.rotate(wanted) == rotated(record, wanted)
        assert await store.list("alice") == [rotated(record, wanted)]

    @pytest.mark.parametrize("time", [0, 1, 2**31, 2**32, 2**53 + 1, LAST])
    async def test_times_of_every_size_are_stored_unchanged(self, store: SessionStore, time: int) -> None:
        record = session(created_at=time, last_used_at=time, expires_at=time, refresh_expires_at=time)
        await opened(store, record)
        assert await store.find(record.token_digest) == record
        assert await store.end([record.id], Code.TOKEN_REVOKED, time) == [ended(record, wall=time)]
        assert await store.get(record.id) == ended(record, wall=time)

    async def test_session_without_refresh_token_is_stored(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=0)
        await opened(store, record)
        assert await store.get(record.id) == record

    async def test_repeated_create_adds_no_second_session(self, store: SessionStore) -> None:
        record = session()
        assert await store.create(record, ONE) == Created()
        assert await store.create(record, ONE) == Created()
        assert await store.create(record, EVICT_ONE) == Created()
        assert await store.list("alice") == [record]

    async def test_repeated_create_does_not_revive_an_ended_session(self, store: SessionStore) -> None:
        first, second = session(1), session(2)
        await opened(store, first, second)
        await store.end([first.id], Code.TOKEN_REVOKED, WALL)
        assert await store.create(first, EVICT_ONE) == Created()
        assert await store.get(first.id) == ended(first)
        assert await store.get(second.id) == second

    async def test_repeated_create_does_not_undo_a_refresh(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record)
        await store.rotate(wanted)
        assert await store.create(record, FIVE) == Created()
        assert await store.get(record.id) == rotated(record, wanted)

    async def test_ping_succeeds_on_a_working_store(self, store: SessionStore) -> None:
        await store.ping()
        await store.ping()
        assert await store.count() == 0

    async def test_close_is_idempotent(self, store: SessionStore) -> None:
        await store.close()
        await store.close()
