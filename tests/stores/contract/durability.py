"""Sessions, claims and answers are there after the store was closed and opened."""

from __future__ import annotations

import pytest

from tests.stores.contract.helpers import (
    KEEP,
    LEASE,
    MINUTE,
    STRINGS,
    WALL,
    Harness,
    digest,
    ended,
    loaded,
    opened,
    rotated,
    rotation,
    session,
)
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord
from zcproto.stores.base import Claim, ClaimState, SessionStore


class DurabilityContract:
    @pytest.fixture
    def lasting(self, harness: Harness, store: SessionStore) -> SessionStore:
        """Return a store whose sessions survive closing."""
        if not harness.durable:
            pytest.skip("its sessions end with it")
        return store

    async def test_sessions_and_tombstones_survive_reopening(
        self, lasting: SessionStore, harness: Harness
    ) -> None:
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

    async def test_last_use_survives_reopening(self, lasting: SessionStore, harness: Harness) -> None:
        record = session()
        await opened(lasting, record)
        await lasting.touch([(record.id, WALL + 9)])
        again = await harness.reopen(lasting)
        assert await again.get(record.id) == record._replace(last_used_at=WALL + 9)

    async def test_end_all_survives_reopening(self, lasting: SessionStore, harness: Harness) -> None:
        records = [session(number, f"user-{number}") for number in range(40)]
        await opened(lasting, *records)
        await lasting.end_all(Code.TOKEN_REVOKED, WALL)
        again = await harness.reopen(lasting)
        assert await again.count() == 0
        for record in records:
            assert await again.get(record.id) == ended(record)

    async def test_claims_and_answers_survive_reopening(
        self, lasting: SessionStore, harness: Harness
    ) -> None:
        for key in ("running", "done", "released"):
            await lasting.claim("alice", key, digest("body"), LEASE)
        await lasting.keep_answer("alice", "done", b"answer", KEEP)
        await lasting.release_claim("alice", "released")
        again = await harness.reopen(lasting)
        claims = [
            await again.claim("alice", key, digest("body"), LEASE) for key in ("running", "done", "released")
        ]
        assert claims == [Claim(ClaimState.RUNNING), Claim(ClaimState.DONE, b"answer"), Claim(ClaimState.NEW)]

    async def test_load_yields_all_records_of_a_store_that_is_not_shared(
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

    async def test_ping_succeeds_on_a_working_store(self, store: SessionStore) -> None:
        await store.ping()
        await store.ping()
        assert await store.count() == 0

    async def test_close_is_idempotent(self, store: SessionStore) -> None:
        await store.close()
        await store.close()
