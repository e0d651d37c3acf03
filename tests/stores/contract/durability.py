"""Sessions, claims and answers are there after the store was closed and opened."""

from __future__ import annotations

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
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.base import Claim, ClaimState, NotRotated, Repeated, SessionStore


class DurabilityContract:
    """For stores that outlive their process."""

    async def test_sessions_and_tombstones_survive_reopening(
        self, store: SessionStore, harness: Harness
    ) -> None:
        records = [
            session(number, STRINGS[kind], client=STRINGS[kind], key=STRINGS[kind], flags=number % 4)
            for number, kind in enumerate(STRINGS)
        ]
        await opened(store, *records)
        wanted = rotation(records[1])
        await store.rotate(wanted)
        await store.end([records[2].id], Code.SESSION_REPLACED, WALL + 1)
        await store.end_user(records[3].user, Code.TOKEN_REVOKED, WALL + 2)
        again = await harness.reopen(store)
        kept = [records[0], rotated(records[1], wanted), *records[4:]]
        assert await again.list() == kept
        assert await again.count() == len(kept)
        assert await again.find(records[1].token_digest) == EndedRecord(
            b"", records[1].token_digest, Code.TOKEN_REVOKED, WALL + MINUTE
        )
        assert await again.get(records[2].id) == ended(records[2], Code.SESSION_REPLACED, WALL + 1)
        assert await again.find(records[3].token_digest) == ended(records[3], wall=WALL + 2)

    async def test_last_use_survives_reopening(self, store: SessionStore, harness: Harness) -> None:
        record = session()
        await opened(store, record)
        await store.touch([(record.id, WALL + 9)])
        again = await harness.reopen(store)
        assert await again.get(record.id) == record._replace(last_used_at=WALL + 9)

    async def test_end_all_survives_reopening(self, store: SessionStore, harness: Harness) -> None:
        records = [session(number, f"user-{number}") for number in range(40)]
        await opened(store, *records)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        again = await harness.reopen(store)
        assert await again.count() == 0
        for record in records:
            assert await again.get(record.id) == ended(record)

    async def test_claims_and_answers_survive_reopening(self, store: SessionStore, harness: Harness) -> None:
        for key in ("running", "done", "released"):
            await store.claim("alice", key, digest("body"), LEASE)
        await store.keep_answer("alice", "done", b"answer", KEEP)
        await store.release_claim("alice", "released")
        again = await harness.reopen(store)
        claims = [
            await again.claim("alice", key, digest("body"), LEASE) for key in ("running", "done", "released")
        ]
        assert claims == [Claim(ClaimState.RUNNING), Claim(ClaimState.DONE, b"answer"), Claim(ClaimState.NEW)]

    async def test_pair_of_a_refresh_survives_reopening(self, store: SessionStore, harness: Harness) -> None:
        await opened(store, session(), session(2))
        record = await store.rotate(rotation(session(), sealed=b"the pair", grace_ms=MINUTE))
        other = await store.rotate(rotation(session(2), sealed=b"the first pair", grace_ms=MINUTE))
        assert isinstance(other, SessionRecord)
        await store.rotate(rotation(other, 2, sealed=b"the second pair", grace_ms=MINUTE))
        again = await harness.reopen(store)
        assert await again.rotate(rotation(session(), 3)) == Repeated(record, b"the pair")
        assert isinstance(await again.claim("alice", "k", digest("body"), LEASE), Claim)
        spent = rotation(session(2), 3)
        assert await again.rotate(spent) == NotRotated(Code.TOKEN_REVOKED, reused=True)

    async def test_load_yields_all_records_of_a_store_that_is_not_shared(
        self, store: SessionStore, harness: Harness
    ) -> None:
        if store.shared:
            assert await loaded(store) == []
            return
        records = [session(number, f"user-{number % 9}") for number in range(600)]
        await opened(store, *records)
        await store.end([record.id for record in records[:300]], Code.TOKEN_REVOKED, WALL)
        again = await harness.reopen(store)
        found = await loaded(again)
        assert found == [*records[300:], *(ended(record) for record in records[:300])]
