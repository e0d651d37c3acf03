"""A request with an idempotency key is claimed once, and its answer is stored."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.contract.helpers import HOUR, KEEP, LEASE, STRINGS, WALL, Harness, digest, expire_all
from zcproto.errors import Code
from zcproto.stores.answers import LATE_MS
from zcproto.stores.base import Claim, ClaimState, SessionStore


class AnswerContract:
    async def test_first_claim_is_new_and_the_second_is_running(self, store: SessionStore) -> None:
        first = await store.claim("alice", "k", digest("body"), LEASE)
        second = await store.claim("alice", "k", digest("body"), LEASE)
        assert (first, second) == (Claim(ClaimState.NEW), Claim(ClaimState.RUNNING))

    async def test_answer_is_stored(self, store: SessionStore, harness: Harness) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        for ms in (WALL, WALL + KEEP - 1):
            harness.time.ms = ms
            assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, b"answer")

    @pytest.mark.parametrize("answer", [b"", b"\0", bytes(range(256)), 100_000 * b"x"])
    async def test_answers_of_every_kind_are_stored_unchanged(
        self, store: SessionStore, answer: bytes
    ) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.keep_answer("alice", "k", answer, KEEP)
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, answer)

    async def test_other_request_with_the_same_key_is_a_conflict(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.CONFLICT)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.CONFLICT)
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, b"answer")

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_keys_are_per_user(self, store: SessionStore, kind: str) -> None:
        odd = STRINGS[kind]
        pairs = [("alice", odd), ("bob", odd), (odd, "k"), ("alice", odd + "x")]
        for number, (user, key) in enumerate(pairs):
            claim = await store.claim(user, key, digest(f"body {number}"), LEASE)
            assert claim == Claim(ClaimState.NEW)
            await store.keep_answer(user, key, b"answer %d" % number, KEEP)
        for number, (user, key) in enumerate(pairs):
            claim = await store.claim(user, key, digest(f"body {number}"), LEASE)
            assert claim == Claim(ClaimState.DONE, b"answer %d" % number)

    @pytest.mark.parametrize("body", ["body", "other"])
    async def test_expired_claim_can_be_claimed_again(
        self, store: SessionStore, harness: Harness, body: str
    ) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        harness.time.ms = WALL + LEASE - 1
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.CONFLICT)
        harness.time.ms = WALL + LEASE
        assert await store.claim("alice", "k", digest(body), LEASE) == Claim(ClaimState.NEW)
        assert await store.claim("alice", "k", digest(body), LEASE) == Claim(ClaimState.RUNNING)

    async def test_claim_that_is_made_again_is_renewed(self, store: SessionStore, harness: Harness) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        for renewals in range(1, 4):
            harness.time.ms = WALL + renewals * (LEASE - 1)
            assert (await store.claim("alice", "k", digest("body"), LEASE)).is_own
        assert await expire_all(store, WALL) == 0
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.CONFLICT)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, b"answer")

    async def test_claim_names_its_process(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        assert (await store.claim("alice", "k", digest("body"), LEASE)).is_own

    async def test_expired_answer_counts_as_absent(self, store: SessionStore, harness: Harness) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        harness.time.ms = WALL + KEEP
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.NEW)

    async def test_released_claim_can_be_claimed_again(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.release_claim("alice", "k")
        assert await store.claim("alice", "k", digest("other"), LEASE) == Claim(ClaimState.NEW)

    async def test_release_keeps_a_stored_answer(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        await store.release_claim("alice", "k")
        await store.release_claim("alice", "unknown")
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, b"answer")

    async def test_answer_without_a_claim_is_not_stored(self, store: SessionStore) -> None:
        await store.keep_answer("alice", "k", b"answer", KEEP)
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.NEW)

    async def test_expired_claims_and_answers_are_removed(
        self, store: SessionStore, harness: Harness
    ) -> None:
        for number in range(3):
            await store.claim("alice", f"{number}", digest("body"), LEASE)
        await store.keep_answer("alice", "1", b"answer", KEEP)
        await store.keep_answer("alice", "2", b"answer", KEEP + LATE_MS + HOUR)
        harness.time.ms = WALL + LEASE - 1
        assert await expire_all(store, WALL + HOUR) == 0
        harness.time.ms = WALL + KEEP + LATE_MS
        assert await expire_all(store, WALL) == 2
        claims = [await store.claim("alice", f"{number}", digest("body"), LEASE) for number in range(3)]
        assert claims == [Claim(ClaimState.NEW), Claim(ClaimState.NEW), Claim(ClaimState.DONE, b"answer")]

    async def test_concurrent_claims_give_one_new(self, store: SessionStore) -> None:
        claims = await asyncio.gather(*(store.claim("alice", "k", digest("body"), LEASE) for _ in range(20)))
        assert sorted(claim.state.name for claim in claims) == ["NEW", *19 * ["RUNNING"]]

    async def test_ending_sessions_keeps_answers(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), LEASE)
        await store.keep_answer("alice", "k", b"answer", KEEP)
        await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        assert await store.claim("alice", "k", digest("body"), LEASE) == Claim(ClaimState.DONE, b"answer")
