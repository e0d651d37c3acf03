"""Answers are bounded per user and in total; running requests are never evicted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.stores.contract.helpers import FIVE, KEEP, LEASE, WALL, Harness, digest, session
from zcproto.errors import ResourceExhausted
from zcproto.stores.answers import LATE_MS, AnswerLimits
from zcproto.stores.base import Claim, ClaimState, Created, SessionStore


class AnswerLimitContract:
    @pytest.fixture
    async def bounded(self, harness: Harness) -> SessionStore:
        """Return a store with small limits for answers."""
        return await harness.make_store(AnswerLimits(count=6, bytes=100, user_count=3, user_bytes=60))

    async def states(self, store: SessionStore, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """Return the states of requests without leaving a claim."""
        names = []
        for user, key in pairs:
            claim = await store.claim(user, key, digest("another body"), LEASE)
            names.append("kept" if claim.state is ClaimState.CONFLICT else "gone")
            if claim.state is ClaimState.NEW:
                await store.release_claim(user, key)
        return names

    async def answered(self, store: SessionStore, user: str, key: str, answer: bytes = b"x") -> None:
        assert await store.claim(user, key, digest("body"), LEASE) == Claim(ClaimState.NEW)
        await store.keep_answer(user, key, answer, KEEP)

    async def test_oldest_answer_of_the_user_is_evicted(self, bounded: SessionStore) -> None:
        await self.answered(bounded, "bob", "b")
        for key in "pqrs":
            await self.answered(bounded, "alice", key)
        pairs = [("bob", "b"), ("alice", "s"), ("alice", "r"), ("alice", "q")]
        assert await self.states(bounded, pairs) == 4 * ["kept"]

    async def test_oldest_answer_of_all_users_is_evicted(
        self, bounded: SessionStore, harness: Harness
    ) -> None:
        pairs = [(user, key) for user in ("a", "b", "c") for key in "pq"]
        for user, key in pairs:
            await self.answered(bounded, user, key)
            harness.time.ms += 1
        await self.answered(bounded, "d", "p")
        assert await self.states(bounded, [*pairs[1:], ("d", "p")]) == 6 * ["kept"]

    async def test_answers_are_bounded_in_bytes(self, bounded: SessionStore, harness: Harness) -> None:
        await self.answered(bounded, "alice", "p", 40 * b"x")
        await self.answered(bounded, "alice", "q", 30 * b"x")
        assert await self.states(bounded, [("alice", "q"), ("alice", "p")]) == ["kept", "gone"]
        harness.time.ms += 1
        await self.answered(bounded, "bob", "p", 60 * b"x")
        assert await self.states(bounded, [("alice", "q"), ("bob", "p")]) == ["kept", "kept"]
        harness.time.ms += 1
        await self.answered(bounded, "carol", "p", 30 * b"x")
        assert await self.states(bounded, [("bob", "p"), ("carol", "p"), ("alice", "q")]) == [
            "kept",
            "kept",
            "gone",
        ]

    async def test_answer_over_the_limit_raises_value_error(self, bounded: SessionStore) -> None:
        await bounded.claim("alice", "k", digest("body"), LEASE)
        with pytest.raises(ValueError, match="too large"):
            await bounded.keep_answer("alice", "k", 61 * b"x", KEEP)
        await bounded.keep_answer("alice", "k", 60 * b"x", KEEP)

    async def test_running_requests_are_never_evicted(self, bounded: SessionStore) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), LEASE)
        with pytest.raises(ResourceExhausted) as refused:
            await bounded.claim("alice", "s", digest("body"), LEASE)
        assert refused.value.details is not None
        assert refused.value.details["retry_after_ms"] > 0
        for key in "pqr":
            await bounded.claim("bob", key, digest("body"), LEASE)
        with pytest.raises(ResourceExhausted):
            await bounded.claim("carol", "p", digest("body"), LEASE)
        pairs = [(user, key) for user in ("alice", "bob") for key in "pqr"]
        assert await self.states(bounded, pairs) == 6 * ["kept"]

    async def test_expired_entries_are_evicted_first(self, bounded: SessionStore, harness: Harness) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), LEASE)
        harness.time.ms = WALL + LEASE + LATE_MS
        assert await bounded.claim("alice", "s", digest("body"), LEASE) == Claim(ClaimState.NEW)

    async def test_refused_claim_evicts_nothing_of_other_users(self, bounded: SessionStore) -> None:
        for key in "pqr":
            await bounded.claim("alice", key, digest("body"), LEASE)
        refused, allowed, created = await asyncio.gather(
            bounded.claim("alice", "s", digest("body"), LEASE),
            bounded.claim("bob", "s", digest("body"), LEASE),
            bounded.create(session(), FIVE),
            return_exceptions=True,
        )
        assert isinstance(refused, ResourceExhausted)
        assert (allowed, created) == (Claim(ClaimState.NEW), Created())
