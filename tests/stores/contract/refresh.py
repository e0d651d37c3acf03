"""A refresh replaces the token pair once; a reused refresh token ends the session."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.contract.helpers import (
    DAY,
    HOUR,
    MINUTE,
    ONE,
    WALL,
    digest,
    ended,
    opened,
    rotated,
    rotation,
    session,
)
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.base import LimitReached, NotRotated, Repeated, SessionStore


class RefreshContract:
    async def test_refresh_replaces_the_token_pair(self, store: SessionStore) -> None:
        record = session(flags=3, key="device:phone")
        await opened(store, record)
        wanted = rotation(record)
        new = rotated(record, wanted)
        assert await store.rotate(wanted) == new
        assert await store.find(wanted.token_digest) == new
        assert await store.get(record.id) == new
        assert await store.list("alice") == [new]
        assert await store.count() == 1

    async def test_old_access_token_is_revoked(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.rotate(rotation(record))
        assert await store.find(record.token_digest) == EndedRecord(
            b"", record.token_digest, Code.TOKEN_REVOKED, WALL + MINUTE
        )

    async def test_refresh_after_refresh(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        for number in range(1, 6):
            wanted = rotation(record, number, WALL + number * HOUR)
            result = await store.rotate(wanted)
            assert result == rotated(record, wanted)
            record = rotated(record, wanted)
        assert await store.list("alice") == [record]

    async def test_new_token_does_not_outlive_the_refresh_token(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=WALL + 2 * HOUR)
        await opened(store, record)
        result = await store.rotate(rotation(record))
        assert isinstance(result, SessionRecord)
        assert result.expires_at == result.refresh_expires_at == WALL + 2 * HOUR

    async def test_refresh_revives_a_lapsed_session(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record, wall=WALL + 2 * DAY)
        assert await store.rotate(wanted) == rotated(record, wanted)
        assert await store.create(session(2, wall=WALL + 2 * DAY), ONE) == LimitReached()

    async def test_reused_refresh_token_ends_the_session(self, store: SessionStore) -> None:
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
        # The holder of the valid token is refused too, but not as a reuse.
        assert await store.rotate(rotation(new, 3, WALL + HOUR)) == NotRotated(Code.TOKEN_REVOKED)

    async def test_refresh_token_spent_long_ago_ends_the_session(self, store: SessionStore) -> None:
        first = record = session()
        await opened(store, record)
        for number in range(3):
            wanted = rotation(record, number)
            await store.rotate(wanted)
            record = rotated(record, wanted)
        assert await store.rotate(rotation(first, 9)) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        assert await store.count() == 0

    async def test_forged_refresh_token_of_a_known_family_ends_the_session(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        guess = rotation(record, spent_digest=digest("guess"))
        assert await store.rotate(guess) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        assert await store.count() == 0

    async def test_refresh_token_of_an_unknown_family_is_unauthenticated(self, store: SessionStore) -> None:
        await opened(store, session(1))
        assert await store.rotate(rotation(session(2))) == NotRotated(Code.UNAUTHENTICATED)
        assert await store.count() == 1

    async def test_expired_refresh_token_is_refused(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        late = rotation(record, wall=record.refresh_expires_at)
        assert await store.rotate(late) == NotRotated(Code.TOKEN_EXPIRED)
        assert await store.find(late.token_digest) is None

    async def test_spent_refresh_token_of_an_expired_session_is_expired(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        await store.rotate(rotation(record))
        late = rotation(record, 2, WALL + 31 * DAY)
        assert await store.rotate(late) == NotRotated(Code.TOKEN_EXPIRED)

    async def test_expired_refresh_token_of_a_live_session_is_refused(self, store: SessionStore) -> None:
        record = session(refresh_expires_at=WALL + MINUTE)
        await opened(store, record)
        assert await store.rotate(rotation(record)) == NotRotated(Code.TOKEN_EXPIRED)
        assert await store.get(record.id) == record

    @pytest.mark.parametrize("code", [Code.TOKEN_REVOKED, Code.SESSION_REPLACED, Code.TOKEN_EXPIRED])
    async def test_refresh_of_an_ended_session_returns_its_code(
        self, store: SessionStore, code: Code
    ) -> None:
        record = session()
        await opened(store, record)
        await store.end([record.id], code, WALL)
        assert await store.rotate(rotation(record)) == NotRotated(code)

    async def test_repeated_rotation_changes_nothing(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        wanted = rotation(record)
        await store.rotate(wanted)
        assert await store.rotate(wanted) == rotated(record, wanted)
        assert await store.count() == 1

    async def test_concurrent_refreshes_with_one_token_end_the_session(self, store: SessionStore) -> None:
        record = session()
        await opened(store, record)
        results = await asyncio.gather(*(store.rotate(rotation(record, number)) for number in range(20)))
        assert sum(isinstance(result, SessionRecord) for result in results) == 1
        assert results.count(NotRotated(Code.TOKEN_REVOKED, reused=True)) == 1
        assert results.count(NotRotated(Code.TOKEN_REVOKED)) == 18
        assert await store.count() == 0

    async def test_concurrent_refreshes_of_many_sessions_succeed(self, store: SessionStore) -> None:
        records = [session(number, f"user-{number % 7}") for number in range(40)]
        await opened(store, *records)
        results = await asyncio.gather(*(store.rotate(rotation(record)) for record in records))
        assert results == [rotated(each, rotation(each)) for each in records]


class RepeatedRefreshContract:
    """For stores that keep sealed pairs: those that several processes share."""

    async def test_refresh_repeated_within_the_grace_returns_its_sealed_pair(
        self, store: SessionStore
    ) -> None:
        record = await self._refreshed(store)
        again = rotation(session(), 2, sealed=b"another pair", grace_ms=MINUTE)
        assert await store.rotate(again) == Repeated(record, b"the pair")
        assert await store.find(again.token_digest) is None
        assert await store.find(record.token_digest) == record
        assert await store.count() == 1

    @pytest.mark.parametrize(
        "changes", [{"client": "zc/3"}, {"address": "192.0.2.8"}, {"wall": WALL + HOUR}], ids=str
    )
    async def test_refresh_repeated_by_another_client_or_after_the_grace_ends_the_session(
        self, store: SessionStore, changes: dict[str, object]
    ) -> None:
        await self._refreshed(store)
        again = rotation(session(), 2, **changes)
        assert await store.rotate(again) == NotRotated(Code.TOKEN_REVOKED, reused=True)
        assert await store.count() == 0

    async def test_only_the_last_refresh_can_be_repeated(self, store: SessionStore) -> None:
        record = await self._refreshed(store)
        await store.rotate(rotation(record, sealed=b"the next pair", grace_ms=MINUTE))
        again = rotation(session(), 2)
        assert await store.rotate(again) == NotRotated(Code.TOKEN_REVOKED, reused=True)

    async def test_refresh_without_a_sealed_pair_makes_the_one_before_unrepeatable(
        self, store: SessionStore
    ) -> None:
        record = await self._refreshed(store)
        await store.rotate(rotation(record))
        assert await store.rotate(rotation(session(), 2)) == NotRotated(Code.TOKEN_REVOKED, reused=True)

    async def test_refresh_of_an_ended_session_is_not_repeated(self, store: SessionStore) -> None:
        record = await self._refreshed(store)
        await store.end([record.id], Code.TOKEN_REVOKED, WALL)
        assert await store.rotate(rotation(session(), 2)) == NotRotated(Code.TOKEN_REVOKED)

    async def _refreshed(self, store: SessionStore) -> SessionRecord:
        """Return a session after a refresh with a sealed pair."""
        await opened(store, session())
        record = await store.rotate(rotation(session(), sealed=b"the pair", grace_ms=MINUTE))
        assert isinstance(record, SessionRecord)
        return record
