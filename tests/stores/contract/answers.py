"""A request with an idempotency key is claimed once, and its answer is stored."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores.contract.helpers import KEEP, LAST, LEASE, STRINGS, WALL, digest, expire_all
from zcproto.errors import Code
from zcproto.stores.base import Claim, ClaimState, SessionStore


class AnswerContract:
    async def test_first_claim_is_new_and_the_second_is_running(self, store: SessionStore) -> None:
        first = await store.claim("alice", "k", digest("body"), WALL, LEASE)
        second = await store.claim("alice", "k", digest("body"), WALL + 1, LEASE)
        assert (first, second) == (Claim(ClaimState.NEW), Claim(ClaimState.RUNNING))

    async def test_answer_is_stored(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL + 1, KEEP)
        for wall in (WALL + 1, WALL + KEEP):
            assert await store.claim("alice", "k", digest("body"), wall, LEASE) == Claim(
                ClaimState.DONE, b"answer"
            )

    @pytest.mark.parametrize("answer", [b"", b"\0", bytes(range(256)), 100_000 * b"x"])
    async def test_answers_of_every_kind_are_stored_unchanged(
        self, store: SessionStore, answer: bytes
    ) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", answer, WALL, KEEP)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.DONE, answer)

    async def test_other_request_with_the_same_key_is_a_conflict(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.CONFLICT)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.CONFLICT)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    @pytest.mark.parametrize("kind", STRINGS)
    async def test_keys_are_per_user(self, store: SessionStore, kind: str) -> None:
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
    async def test_expired_claim_can_be_claimed_again(self, store: SessionStore, body: str) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        late = WALL + LEASE
        assert await store.claim("alice", "k", digest("body"), late - 1, LEASE) == Claim(ClaimState.RUNNING)
        assert await store.claim("alice", "k", digest(body), late, LEASE) == Claim(ClaimState.NEW)
        assert await store.claim("alice", "k", digest(body), late, LEASE) == Claim(ClaimState.RUNNING)

    async def test_expired_answer_counts_as_absent(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("other"), WALL + KEEP, LEASE) == Claim(ClaimState.NEW)

    async def test_released_claim_can_be_claimed_again(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.release_claim("alice", "k")
        assert await store.claim("alice", "k", digest("other"), WALL, LEASE) == Claim(ClaimState.NEW)

    async def test_release_keeps_a_stored_answer(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        await store.release_claim("alice", "k")
        await store.release_claim("alice", "unknown")
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    async def test_answer_without_a_claim_is_not_stored(self, store: SessionStore) -> None:
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(ClaimState.NEW)

    async def test_expired_claims_and_answers_are_removed(self, store: SessionStore) -> None:
        for number in range(3):
            await store.claim("alice", f"{number}", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "1", b"answer", WALL, KEEP)
        await store.keep_answer("alice", "2", b"answer", WALL, 2 * KEEP)
        assert await expire_all(store, WALL + LEASE - 1) == 0
        assert await expire_all(store, WALL + KEEP) == 2
        claims = [await store.claim("alice", f"{number}", digest("body"), WALL, LEASE) for number in range(3)]
        assert claims == [Claim(ClaimState.NEW), Claim(ClaimState.NEW), Claim(ClaimState.DONE, b"answer")]

    async def test_claim_and_answer_at_the_largest_time(self, store: SessionStore) -> None:
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(ClaimState.NEW)
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(ClaimState.RUNNING)
        await store.keep_answer("alice", "k", b"answer", LAST - 1, KEEP)
        assert await store.claim("alice", "k", digest("body"), LAST - 1, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )

    async def test_concurrent_claims_give_one_new(self, store: SessionStore) -> None:
        claims = await asyncio.gather(
            *(store.claim("alice", "k", digest("body"), WALL, LEASE) for _ in range(20))
        )
        assert sorted(claim.state.name for claim in claims) == ["NEW", *19 * ["RUNNING"]]

    async def test_ending_sessions_keeps_answers(self, store: SessionStore) -> None:
        await store.claim("alice", "k", digest("body"), WALL, LEASE)
        await store.keep_answer("alice", "k", b"answer", WALL, KEEP)
        await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        assert await store.claim("alice", "k", digest("body"), WALL, LEASE) == Claim(
            ClaimState.DONE, b"answer"
        )
