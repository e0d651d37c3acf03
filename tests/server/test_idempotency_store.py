"""Idempotency with a store: it fails, and other processes share it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.server.idempotency_harness import (
    DIGEST,
    KEEP_MS,
    OTHER,
    CacheHarness,
    FakeStore,
    MakeHarness,
    code,
)
from zcproto.errors import Code, ResourceExhausted, Unavailable
from zcproto.server.idempotency import (
    BATCH,
    MAX_REMEMBERED,
    ORPHANED_S,
    POLL_FIRST_S,
    POLL_LAST_S,
    RENEW_S,
    Answer,
)
from zcproto.stores.base import Claim, StoreUnavailable
from zcproto.wire.message import decode_error, encode_body


@pytest.fixture
def store() -> FakeStore:
    """Return the shared store of one process."""
    return FakeStore(shared=True)


@pytest.fixture
def harness(make_harness: MakeHarness, store: FakeStore) -> CacheHarness:
    return make_harness(store)


@pytest.fixture
def another(make_harness: MakeHarness, store: FakeStore) -> CacheHarness:
    """Return another process, whose store has the same data."""
    return make_harness(FakeStore(shared=True, data_of=store))


def claim_without_an_answer(harness: CacheHarness, store: FakeStore) -> None:
    """Call during an outage in which the store makes the claim and does not answer."""
    store.out = store.fails_after_the_effect = True
    assert code(harness.call()) is Code.UNAVAILABLE
    store.out = store.fails_after_the_effect = False


# --- the store fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_no_request_is_run_during_an_outage(make_harness: MakeHarness, shared: bool) -> None:
    store = FakeStore(shared)
    harness = make_harness(store)
    store.out = True
    refused = harness.call()
    assert code(refused) is Code.UNAVAILABLE
    assert decode_error(refused.body).details["retry_after_ms"] > 0
    assert b"it is out" not in refused.body
    store.out = False
    assert harness.call("paid").code == 0
    assert harness.ran == 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tries", [1, 3])
def test_claim_with_unknown_outcome_can_be_claimed_again(
    make_harness: MakeHarness, shared: bool, tries: int
) -> None:
    store = FakeStore(shared)
    harness = make_harness(store)
    store.out = store.fails_after_the_effect = True
    for _ in range(tries):
        assert code(harness.call()) is Code.UNAVAILABLE
        harness.clock.advance(1)
    store.out = False
    assert harness.call("paid") == harness.call("again") == Answer(0, encode_body("paid"))
    assert (harness.ran, harness.slept) == (1, [])


@pytest.mark.parametrize("shared", [False, True])
def test_claim_of_another_process_is_not_reused(make_harness: MakeHarness, shared: bool) -> None:
    store = FakeStore(shared)
    killed = make_harness(store)
    held = killed.hold()
    seen_by_another = FakeStore(shared, data_of=store)
    restarted = make_harness(seen_by_another)
    seen_by_another.out = True
    assert code(restarted.call()) is Code.UNAVAILABLE
    seen_by_another.out = False
    caller = restarted.begin()
    restarted.turn()
    assert restarted.ran == 0
    assert bool(restarted.slept) == shared
    assert bool(caller.answers) == (not shared)
    held.finish()
    restarted.turn()


def test_outcome_is_unknown_once_the_process_of_a_claim_has_shown_no_sign_of_life_for_some_time(
    make_harness: MakeHarness,
) -> None:
    store = FakeStore(shared=True)
    killed = make_harness(store)
    held = killed.hold()
    seen_by_another = FakeStore(shared=True, data_of=store)
    another = make_harness(seen_by_another)
    missing = itertools.chain(
        [True, True, True, False], itertools.repeat(True)
    )  # a failover loses it for a moment

    def look() -> None:
        seen_by_another.is_orphan = next(missing)

    look()
    another.while_asleep = look
    caller = another.begin()
    another.turn()
    assert sum(another.slept[4:]) == pytest.approx(ORPHANED_S, abs=POLL_LAST_S)
    assert code(caller.answer) is Code.UNKNOWN
    assert another.ran == 0
    assert another.cache.lost == 1
    held.finish()


def test_drain_sends_away_callers_that_wait_for_the_run_of_another_process(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    running = make_harness(store)
    held = running.hold()
    draining = make_harness(FakeStore(shared=True, data_of=store))
    draining.while_asleep = lambda: setattr(draining.cache, "is_draining", len(draining.slept) == 3)
    caller = draining.begin()
    assert not caller.waiting.has_begun
    draining.turn()
    assert code(caller.answer) is Code.UNAVAILABLE
    assert "retry_after_ms" in decode_error(caller.answer.body).details
    assert (draining.ran, len(draining.slept)) == (0, 3)
    held.finish()
    assert draining.call().code == 0, "the claim is that of the other process still"


def test_claim_that_could_not_be_released_is_reused(store: FakeStore, harness: CacheHarness) -> None:
    caller = harness.hold(Unavailable("not now"))
    store.out = True
    caller.finish()
    assert code(caller.answer) is Code.UNAVAILABLE
    store.out = False
    assert harness.call("paid").code == 0
    assert harness.slept == []


@pytest.mark.parametrize("is_claimed", [False, True])
def test_claim_with_unknown_outcome_is_released_for_other_processes(
    store: FakeStore, harness: CacheHarness, another: CacheHarness, is_claimed: bool
) -> None:
    store.out, store.fails_after_the_effect = True, is_claimed
    assert code(harness.call()) is Code.UNAVAILABLE
    store.out = False
    harness.save()
    assert another.call("paid").code == 0
    assert (harness.ran, another.ran, another.slept) == (0, 1, [])


@pytest.mark.parametrize("failures", [1, 3])
def test_claim_with_unknown_outcome_is_released_soon_without_an_outage(
    store: FakeStore, harness: CacheHarness, another: CacheHarness, failures: int
) -> None:
    store.out = store.fails_after_the_effect = True
    assert code(harness.call()) is Code.UNAVAILABLE
    for _ in range(failures - 1):
        harness.save_again()
    store.out = False
    harness.save_again()
    assert not harness.saves_again
    assert another.call("paid").code == 0
    assert another.slept == []


def test_answer_and_release_that_failed_are_repeated_soon_without_an_outage(
    store: FakeStore, harness: CacheHarness, another: CacheHarness
) -> None:
    gate = harness.loop.create_future()
    harness.begin("paid", wait=gate)
    harness.begin(Unavailable("not now"), key="released", wait=gate)
    harness.turn()
    store.out = True
    harness.release(gate)
    store.out = False
    harness.save_again()
    assert another.call("again") == Answer(0, encode_body("paid"))
    assert another.call("now", key="released") == Answer(0, encode_body("now"))
    assert another.slept == []


def test_server_that_ends_plans_nothing_for_later(store: FakeStore, harness: CacheHarness) -> None:
    held = harness.hold("paid")
    store.held = harness.loop.create_future()
    held.finish()
    assert store.asked[-1] == "keep"
    assert harness.loop.run_until_complete(harness.tasks.close(1.0)) == 0
    assert not harness.saves_again


def test_end_waits_until_claims_are_released_and_answers_are_written(
    store: FakeStore, harness: CacheHarness
) -> None:
    claim_without_an_answer(harness, store)
    finish_during_outage(harness, store)
    waiting = harness.loop.create_task(harness.cache.wait_idle())
    harness.turn()
    assert not waiting.done()
    store.out = False
    harness.turn()
    assert waiting.done()
    assert [entry.running for entry in store.answers._entries.values()] == [False]


def test_end_waits_for_a_release_that_has_begun(store: FakeStore, harness: CacheHarness) -> None:
    claim_without_an_answer(harness, store)
    store.held = harness.loop.create_future()
    harness.cache.save()
    waiting = harness.loop.create_task(harness.cache.wait_idle())
    harness.turn()
    assert not waiting.done()
    store.held.set_result(None)
    harness.turn()
    assert waiting.done()
    assert not store.answers._entries


@pytest.mark.parametrize("is_own", [True, False])
def test_claim_of_a_run_that_is_cancelled_before_its_answer_is_released(
    make_harness: MakeHarness, is_own: bool
) -> None:
    store = FakeStore(shared=True)
    if not is_own:
        store.answers.claim("ada", "k", DIGEST, KEEP_MS)
        store.others.add(("ada", "k"))
    harness, claim = make_harness(store), store.claim
    lost = harness.loop.create_future()

    async def claim_and_wait(*arguments: Any) -> Claim:
        made = await claim(*arguments)
        if not lost.done():
            await lost
        return made

    store.claim = claim_and_wait
    caller = harness.begin()
    harness.turn()
    assert harness.loop.run_until_complete(harness.tasks.close(10.0)) == 0
    assert code(caller.answer) is Code.CANCELLED
    assert bool(store.answers._entries) is not is_own
    assert harness.ran == 0


def test_request_without_a_caller_is_not_run_by_a_server_that_drains(
    store: FakeStore, harness: CacheHarness
) -> None:
    store.held = harness.loop.create_future()
    caller = harness.begin()
    harness.cache.is_draining = True
    caller.waiting.cancel()
    store.held.set_result(None)
    harness.turn()
    assert (harness.ran, caller.answers) == (0, [])
    assert not store.answers._entries


def test_claim_of_another_process_is_not_released(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    another = make_harness(store)
    caller = another.hold("paid")
    seen_by_harness = FakeStore(shared=True, data_of=store)
    harness = make_harness(seen_by_harness)
    seen_by_harness.out = True
    assert code(harness.call()) is Code.UNAVAILABLE
    seen_by_harness.out = False
    harness.save()
    assert "release" not in seen_by_harness.asked
    caller.finish()
    assert harness.call("again") == caller.answer


def test_claim_whose_release_fails_is_released_later(store: FakeStore, harness: CacheHarness) -> None:
    store.out = store.fails_after_the_effect = True
    assert code(harness.call()) is Code.UNAVAILABLE
    store.fails_after_the_effect = False
    harness.save()
    store.out = False
    harness.save()
    assert store.asked[-2:] == ["claim", "release"]
    assert not store.answers


def test_request_that_comes_during_a_release_runs_once(store: FakeStore, harness: CacheHarness) -> None:
    claim_without_an_answer(harness, store)
    store.held = harness.loop.create_future()
    harness.save()
    callers = [harness.begin("paid"), harness.begin("paid")]
    store.held.set_result(None)
    store.held = None
    harness.turn()
    assert [caller.answer.code for caller in callers] == [0, 0]
    assert harness.ran == 1
    harness.save()
    assert harness.call("again") == callers[0].answer


@pytest.mark.parametrize("all_the_same", [False, True])
def test_answer_that_failed_to_be_stored_is_kept_here_and_written_later(
    store: FakeStore, harness: CacheHarness, another: CacheHarness, all_the_same: bool
) -> None:
    caller = harness.hold("paid")
    store.out, store.fails_after_the_effect = True, all_the_same
    caller.finish()
    assert caller.answer.code == 0
    assert harness.call("again") == caller.answer
    assert code(harness.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    store.out = False
    harness.call(key="another")
    assert another.call("again") == caller.answer
    assert another.slept == []
    assert (harness.ran, another.ran) == (2, 0)


def finish_during_outage(harness: CacheHarness, store: FakeStore) -> None:
    """Finish a call while the store is out, so that its answer is still to be written."""
    held = harness.hold("paid")
    store.out = True
    held.finish()


def test_one_task_at_a_time_writes_answers(store: FakeStore, harness: CacheHarness) -> None:
    finish_during_outage(harness, store)
    store.out, store.held = False, harness.loop.create_future()
    store.asked.clear()
    for _ in range(3):
        harness.save()
    assert store.asked == ["claim"]
    store.held.set_result(None)
    harness.turn()
    assert store.asked == ["claim", "keep"]


def test_answer_is_written_when_the_store_is_back(
    store: FakeStore, harness: CacheHarness, another: CacheHarness
) -> None:
    finish_during_outage(harness, store)
    store.out = False
    for _ in range(2):  # the second time all is written
        harness.save()
    assert another.call("again") == harness.call("again")
    assert (another.slept, another.ran) == ([], 0)


def test_expired_answer_is_not_written_later(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    finish_during_outage(harness, store)
    harness.clock.advance(KEEP_MS / 1000)
    store.out = False
    store.asked.clear()
    harness.call(key="another")
    harness.turn()
    assert store.asked == ["claim", "keep"]


def test_delayed_write_continues_after_another_outage(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    finish_during_outage(harness, store)
    store.out = False
    harness.begin(key="another")
    store.asked.clear()
    harness.turn()
    first = store.asked.count("keep")
    assert first == 2, "the other's answer, and the one that was left behind"


def test_delayed_write_waits_for_the_store(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    finish_during_outage(harness, store)

    async def keep_fails(*args: Any) -> None:
        raise StoreUnavailable("read only")

    store.out = False
    works, store.keep_answer = store.keep_answer, keep_fails
    harness.call(key="another")
    store.keep_answer = works
    for key, answers_stored in (("a third", 3), ("a fourth", 1)):
        store.asked.clear()
        harness.call(key=key)
        harness.turn()
        assert store.asked.count("keep") == answers_stored


def test_remembered_claims_are_bounded(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    store.out = store.fails_after_the_effect = True
    for number in range(MAX_REMEMBERED + 5):
        harness.begin(user=str(number), key="k")
        if number % 50 == 0:
            harness.turn()
    harness.turn()
    store.out = False
    assert [code(harness.call(user=str(number), key="k")) for number in (0, 4)] == [Code.UNKNOWN] * 2
    assert harness.ran == 0
    assert [harness.call(user=str(number), key="k").code for number in (5, MAX_REMEMBERED + 4)] == [0, 0]


def test_exception_of_the_store_is_an_internal_error(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)

    async def broken(*args: Any) -> Claim:
        raise ValueError("a fault")

    store.claim = broken
    assert code(harness.call()) is Code.INTERNAL
    assert harness.ran == 0


def test_answer_lost_by_the_store_is_reported_as_unknown(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    harness.call()
    entry = store.answers.entry("ada", "k")
    entry.answer = b""
    assert code(harness.call()) is Code.UNKNOWN
    assert (harness.ran, harness.cache.lost) == (1, 1)


# --- other processes -----------------------------------------------------------------------------------------


def test_request_running_in_another_process_is_polled(harness: CacheHarness, another: CacheHarness) -> None:
    gate = another.loop.create_future()
    first = another.begin("paid", wait=gate)
    another.turn()

    def end_it() -> None:
        if len(harness.slept) == 8:
            gate.set_result(None)

    harness.while_asleep = end_it
    answer = harness.call("again")
    assert answer == first.answer == Answer(0, encode_body("paid"))
    assert (harness.ran, another.ran) == (0, 1)
    assert harness.slept[:2] == [POLL_FIRST_S, 2 * POLL_FIRST_S]
    assert harness.slept[-1] == POLL_LAST_S


def test_request_released_by_another_process_is_run_here(
    harness: CacheHarness, another: CacheHarness
) -> None:
    gate = another.loop.create_future()
    another.begin(ResourceExhausted("full"), wait=gate)
    another.turn()
    harness.while_asleep = lambda: gate.done() or gate.set_result(None)
    assert harness.call("paid").code == 0
    assert (harness.ran, another.ran) == (1, 1)


def test_claim_of_a_dead_process_lasts_as_long_as_an_answer(
    store: FakeStore, harness: CacheHarness, another: CacheHarness
) -> None:
    held = another.hold()
    store.is_orphan = True
    for _ in range(3):
        assert code(harness.call()) is Code.UNKNOWN
    harness.advance(KEEP_MS / 1000 - sum(harness.slept) - 10.0)
    assert code(harness.call()) is Code.UNKNOWN
    harness.advance(10.0)
    assert harness.call("paid").code == 0
    held.finish()
    assert harness.call("again") == Answer(0, encode_body("paid"))


# --- long runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "store", "shared store"])
def test_run_that_outlasts_the_time_that_answers_are_kept_happens_once(
    make_harness: MakeHarness, kind: str
) -> None:
    store = None if kind == "memory" else FakeStore(kind == "shared store")
    harness = make_harness(store)
    other = make_harness(FakeStore(shared=True, data_of=store)) if store and store.shared else harness
    gate = harness.loop.create_future()
    first = harness.begin("paid", wait=gate)
    for number in range(20):
        harness.advance(KEEP_MS / 4000)
        harness.call(key=f"k-{number}")  # removes what has expired
    second = other.begin("twice")
    other.turn()
    assert (harness.ran, other.ran) == ((21, 0) if other is not harness else (21, 21))
    assert not second.answers
    harness.release(gate)
    other.while_asleep = lambda: None
    other.turn()
    assert first.answer == second.answer == Answer(0, encode_body("paid"))
    assert other.call("again") == first.answer


def test_claims_of_runs_in_progress_are_renewed_in_batches(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness = make_harness(store, max_running=3 * BATCH)
    gate = harness.loop.create_future()
    for number in range(3 * BATCH - 1):
        harness.begin(key=f"k-{number}", wait=gate)
    harness.turn()
    harness.advance(RENEW_S / 2 + 1)
    harness.begin(key="recent", wait=gate)
    harness.turn()
    store.asked.clear()
    held = store.held = harness.loop.create_future()
    harness.advance(RENEW_S / 2)
    assert store.asked == BATCH * ["claim"]
    store.held = None
    held.set_result(None)
    harness.turn()
    assert store.asked == (3 * BATCH - 1) * ["claim"]
    harness.release(gate)
    store.asked.clear()
    harness.advance(2 * RENEW_S)
    assert store.asked == []


def test_renewal_that_fails_is_repeated_when_the_store_is_reached(
    store: FakeStore, harness: CacheHarness, another: CacheHarness
) -> None:
    first = harness.hold("paid")
    store.out = True
    harness.advance(3 * RENEW_S)
    store.out = False
    store.answers.release("ada", "k")  # as in a failover that has lost it
    harness.store_reached()
    second = another.begin("twice")
    another.turn()
    first.finish()
    another.turn()
    assert (harness.ran, another.ran) == (1, 0)
    assert first.answer == second.answer


def test_answer_is_kept_although_the_store_has_lost_the_claim(
    store: FakeStore, harness: CacheHarness
) -> None:
    held = harness.hold("paid")
    store.out = True
    harness.store_reached()
    store.answers.release("ada", "k")
    store.out = False
    held.finish()
    assert harness.call("again") == Answer(0, encode_body("paid"))
    assert harness.ran == 1


@pytest.mark.parametrize("is_run", [True, False])
def test_process_that_was_paused_leaves_the_claim_to_the_one_that_has_it(
    store: FakeStore, harness: CacheHarness, another: CacheHarness, is_run: bool
) -> None:
    late = harness.hold("late" if is_run else ResourceExhausted("full"))
    another.cache._breaker.store.is_orphan = True
    another.advance(KEEP_MS / 1000)
    caller = another.hold("paid")
    assert another.ran == 1
    late.finish()
    assert (late.answer.code == 0) is is_run
    assert store.asked == ["claim", "claim"], "its answer is not stored, and the claim not released"
    caller.finish()
    assert caller.answer == harness.call("again") == Answer(0, encode_body("paid"))


def test_answer_of_a_run_comes_after_the_renewal_of_its_claim(
    store: FakeStore, harness: CacheHarness
) -> None:
    running = harness.hold(ResourceExhausted("full"))
    held = store.held = harness.loop.create_future()
    harness.advance(RENEW_S)
    harness.store_reached()  # while claims are renewed
    running.finish()
    assert store.asked == ["claim", "claim"]
    store.held = None
    held.set_result(None)
    harness.turn()
    assert store.asked[2:] == ["release"]
    assert not store.answers


def test_answer_that_was_not_stored_leaves_the_claim_of_another_process(
    store: FakeStore, harness: CacheHarness, another: CacheHarness
) -> None:
    held = harness.hold("early")
    store.out = True
    held.finish()
    store.answers.release("ada", "k")  # as in a failover that has lost it
    assert another.call("paid").code == 0
    store.out = False
    harness.store_reached()
    assert another.call("again") == Answer(0, encode_body("paid"))
    assert "keep" not in store.asked[2:]


def test_polling_ends_without_waiting_callers(harness: CacheHarness, another: CacheHarness) -> None:
    held = another.hold()
    caller = harness.begin()
    caller.waiting.cancel()
    harness.turn()
    assert (harness.cache.running, harness.slept) == (0, [POLL_FIRST_S])
    held.finish()


def test_request_running_when_the_server_was_killed_is_not_run_again(make_harness: MakeHarness) -> None:
    store = FakeStore()
    killed = make_harness(store)
    held = killed.hold()
    restarted = make_harness(store)
    answer = restarted.call()
    assert code(answer) is Code.UNKNOWN
    assert (restarted.ran, restarted.cache.lost) == (0, 1)
    restarted.clock.advance(KEEP_MS / 1000)
    assert restarted.call().code == 0
    held.finish()


def test_stored_answer_survives_a_restart(make_harness: MakeHarness) -> None:
    store = FakeStore()
    first = make_harness(store).call("paid")
    restarted = make_harness(store)
    assert restarted.call("again") == first
    assert restarted.ran == 0
