"""A request with an idempotency key is run once for its user."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.idempotency_harness import (
    DIGEST,
    KEEP_MS,
    OTHER,
    CacheHarness,
    Caller,
    FakeStore,
    MakeHarness,
    code,
)
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    TokenExpired,
    Unavailable,
)
from zcproto.server.idempotency import NOT_RUN, Answer, answer_limits, request_digest
from zcproto.stores.answers import AnswerLimits
from zcproto.wire.message import decode_error, encode_body


@pytest.fixture(params=["memory", "store", "shared store"])
def harness(request: pytest.FixtureRequest, make_harness: MakeHarness) -> CacheHarness:
    """Return harnesses without a store, with its own store and with a shared store."""
    store = None if request.param == "memory" else FakeStore(request.param == "shared store")
    return make_harness(store)


# --- once ------------------------------------------------------------------------------------------------


def test_repeated_request_gets_the_stored_answer(harness: CacheHarness) -> None:
    first = harness.call("paid")
    assert first == Answer(0, encode_body("paid"))
    assert harness.call("paid twice") == first
    assert harness.ran == 1
    assert harness.cache.counts == {"running": 0, "repeated": 1, "conflicts": 0, "lost": 0, "refused": 0}


def test_concurrent_requests_share_one_answer(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    callers = [harness.begin("paid", wait=gate) for _ in range(5)]
    harness.turn()
    assert harness.ran == 1
    assert not any(caller.answers for caller in callers)
    harness.release(gate)
    assert {caller.answer for caller in callers} == {Answer(0, encode_body("paid"))}
    assert (harness.ran, harness.cache.repeated, harness.cache.running) == (1, 4, 0)


def test_cancelled_wait_gets_no_answer_and_does_not_stop_the_run(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    first, second = harness.begin("paid", wait=gate), harness.begin("paid", wait=gate)
    harness.turn()
    for caller in (first, second):
        caller.waiting.cancel()
        caller.waiting.cancel()
    harness.release(gate)
    assert not first.answers
    assert not second.answers
    assert harness.call("again") == Answer(0, encode_body("paid"))
    assert harness.ran == 1


def test_caller_may_leave_while_others_are_answered(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    first, second = harness.begin(wait=gate), harness.begin(wait=gate)
    harness.turn()
    first.waiting.on_answer = lambda answer: second.waiting.cancel()
    harness.release(gate)
    assert not second.answers


@pytest.mark.parametrize("running", [False, True])
def test_key_of_another_request_is_refused(harness: CacheHarness, running: bool) -> None:
    gate = harness.loop.create_future()
    first = harness.begin("paid", wait=gate)
    if not running:
        harness.release(gate)
    assert code(harness.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    if running:
        harness.release(gate)
    assert first.answer.code == 0
    assert (harness.ran, harness.cache.conflicts) == (1, 1)


def test_keys_are_per_user(harness: CacheHarness) -> None:
    assert harness.call("ada's", user="ada") != harness.call("bob's", user="bob")
    assert harness.call("another", key="k2").body == encode_body("another")
    assert harness.ran == 3


def test_answer_is_kept_for_the_configured_time_after_the_run(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    caller = harness.begin("paid", wait=gate)
    harness.turn()
    harness.clock.advance(500)
    harness.release(gate)
    harness.clock.advance(KEEP_MS / 1000 - 0.001)
    assert harness.call("again") == caller.answer
    harness.clock.advance(0.001)
    assert harness.call("again").body == encode_body("again")


@pytest.mark.parametrize("hours", [1, -1])
def test_step_of_the_wall_clock_expires_no_answer(harness: CacheHarness, hours: int) -> None:
    first = harness.call("paid")
    harness.clock.wall_ms += hours * 3_600_000
    assert harness.call("again") == first
    harness.clock.advance(KEEP_MS / 1000)
    assert harness.call("again").body == encode_body("again")


# --- which answers are kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no such account"),
        FailedPrecondition("the account is empty"),
        DeadlineExceeded("the bank is slow"),
        ValueError("a fault"),
        Cancelled("half-way"),
        asyncio.CancelledError(),
    ],
    ids=repr,
)
def test_error_of_a_request_that_ran_is_stored(harness: CacheHarness, error: BaseException) -> None:
    first = harness.call(error)
    assert first.code != 0
    assert harness.call("paid") == first
    assert harness.ran == 1


@pytest.mark.parametrize("number", sorted(NOT_RUN))
def test_error_that_guarantees_no_run_releases_the_key(harness: CacheHarness, number: Code) -> None:
    assert code(harness.call(CallError.by_code[number]("not now"))) is number
    assert harness.call("paid").code == 0
    assert harness.ran == 2


def test_all_waiting_callers_get_an_error_that_guarantees_no_run(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    callers = [harness.begin(Unavailable("not now"), wait=gate) for _ in range(3)]
    harness.turn()
    harness.release(gate)
    assert [code(caller.answer) for caller in callers] == [Code.UNAVAILABLE] * 3


def test_not_run_has_the_codes_of_the_specification() -> None:
    assert {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, TokenExpired.code} <= NOT_RUN
    assert not NOT_RUN & {Code.UNKNOWN, Code.INTERNAL, Code.CANCELLED, Code.DEADLINE_EXCEEDED}


def test_exception_that_stops_the_process_is_not_an_answer(make_harness: MakeHarness) -> None:
    harness = make_harness()
    with pytest.raises(SystemExit):
        harness.begin(SystemExit())
    assert harness.cache.running == 0


def test_answer_too_large_to_be_kept_is_sent_once(make_harness: MakeHarness) -> None:
    harness = make_harness(limits=AnswerLimits(bytes=1_000, user_bytes=100))
    assert harness.call("x" * 200).code == 0
    again = harness.call("x" * 200)
    assert code(again) is Code.UNKNOWN
    assert b"too large" in again.body
    assert harness.call("x" * 97, key="fits") == harness.call(key="fits")
    assert harness.ran == 2


def test_running_requests_per_user_are_bounded(make_harness: MakeHarness) -> None:
    harness = make_harness(limits=AnswerLimits(user_count=2))
    gate = harness.loop.create_future()
    for key in ("a", "b"):
        harness.begin(key=key, wait=gate)
    refused = harness.call(key="c")
    assert code(refused) is Code.RESOURCE_EXHAUSTED
    assert decode_error(refused.body).details["retry_after_ms"] > 0
    assert harness.call(user="bob", key="c").code == 0
    harness.release(gate)
    assert harness.call(key="c").code == 0


def test_expired_answers_in_memory_are_removed_gradually(make_harness: MakeHarness) -> None:
    harness = make_harness()
    harness.call(key="0")
    size = harness.cache.bytes_kept
    for number in range(1, 20):
        harness.call(key=str(number))
    assert harness.cache.bytes_kept == 20 * size
    harness.clock.advance(KEEP_MS / 1000)
    for number in range(4):
        harness.call(key=f"new {number}")
    assert harness.cache.bytes_kept == 4 * size


def test_limits_follow_from_the_configuration() -> None:
    limits = answer_limits(64 << 20, 500)
    assert limits == AnswerLimits(bytes=64 << 20, user_bytes=16 << 20, user_count=500)
    assert answer_limits(64 << 20, 1_000_000).count == 1_000_000


# --- the end of the server -------------------------------------------------------------------------------------


def test_request_cancelled_by_shutdown_is_stored_as_cancelled(
    loop: asyncio.AbstractEventLoop, make_harness: MakeHarness
) -> None:
    store = FakeStore()
    harness = CacheHarness(loop, store)
    caller = harness.begin(wait=loop.create_future())
    harness.turn()
    assert loop.run_until_complete(harness.tasks.close(1.0)) == 0
    assert code(caller.answer) is Code.CANCELLED
    restarted = make_harness(store)
    assert restarted.call() == caller.answer
    assert restarted.ran == 0


@pytest.mark.parametrize("result", ["paid", Unavailable("not now")], ids=["kept", "not run"])
def test_shutdown_while_the_answer_is_stored(loop: asyncio.AbstractEventLoop, result: Any) -> None:
    store = FakeStore()
    harness = CacheHarness(loop, store)
    gate = loop.create_future()
    caller = harness.begin(result, wait=gate)
    harness.turn()
    store.held = loop.create_future()
    harness.release(gate)
    assert not caller.answers
    assert loop.run_until_complete(harness.tasks.close(1.0)) == 0
    assert caller.answer == (
        Answer(0, encode_body("paid")) if result == "paid" else harness.answer_error(result)
    )


def test_shutdown_while_the_request_is_claimed(loop: asyncio.AbstractEventLoop) -> None:
    store = FakeStore()
    store.held = loop.create_future()
    harness = CacheHarness(loop, store)
    caller = harness.begin()
    harness.turn()
    assert loop.run_until_complete(harness.tasks.close(1.0)) == 0
    assert code(caller.answer) is Code.CANCELLED
    assert harness.ran == 0


def test_run_cancelled_before_its_task_began_is_answered(loop: asyncio.AbstractEventLoop) -> None:
    harness = CacheHarness(loop)
    caller = Caller()

    async def scenario() -> None:
        async def execute() -> bytes:
            await loop.create_future()
            raise AssertionError

        harness.cache.submit("ada", "k", DIGEST, execute, harness.answer_error, caller.answers.append)
        await harness.tasks.close(1.0)

    loop.run_until_complete(scenario())
    harness.turn()
    assert code(caller.answer) is Code.CANCELLED
    assert harness.cache.running == 0


def test_method_that_cancels_itself_is_answered_and_not_run_again(make_harness: MakeHarness) -> None:
    harness = make_harness()

    class CancelsItself:
        def __await__(self) -> Iterator[Any]:
            task = asyncio.current_task()
            task.cancel()
            yield from harness.loop.create_future()

    assert code(harness.call(wait=CancelsItself())) is Code.CANCELLED
    assert code(harness.call()) is Code.CANCELLED, "the stored answer"
    assert harness.ran == 1


def test_runs_of_one_user_are_bounded_when_their_callers_have_gone(make_harness: MakeHarness) -> None:
    harness = make_harness(max_running=2)
    gate = harness.loop.create_future()
    for key in ("one", "two"):
        waiting = harness.begin(key=key, wait=gate).waiting
        waiting.cancel()
    harness.turn()
    refused = harness.call(key="three")
    assert code(refused) is Code.RESOURCE_EXHAUSTED
    assert decode_error(refused.body).details == {"retry_after_ms": 1_000}
    assert harness.cache.counts["refused"] == 1
    assert harness.call(key="three", user="bob") == Answer(0, encode_body("paid"))
    harness.release(gate)
    assert harness.call(key="three") == Answer(0, encode_body("paid"))
    assert harness.ran == 4


def test_answer_that_a_full_store_refuses_is_stored_in_memory(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    gate = harness.loop.create_future()
    caller = harness.begin("paid", wait=gate)
    harness.turn()
    store.is_full = True
    harness.release(gate)
    assert caller.answer == Answer(0, encode_body("paid"))
    assert harness.call() == Answer(0, encode_body("paid"))
    assert code(harness.call(key="another")) is Code.RESOURCE_EXHAUSTED
    assert harness.ran == 1


def test_wait_idle_returns_when_no_request_runs(make_harness: MakeHarness) -> None:
    harness = make_harness()
    gate = harness.loop.create_future()
    harness.begin(wait=gate)
    waiting = harness.loop.create_task(harness.cache.wait_idle())
    harness.turn()
    assert not waiting.done()
    harness.release(gate)
    assert waiting.done()


# --- what the same request is --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("pay", {"amount": 5}), ("pay", {"amount": 6})),
        (("pay", {"amount": 5}), ("refund", {"amount": 5})),
        (("pay", {"amount": 5}), ("pay", {"amount": 5.0})),
        (("pay", {"to": "x"}), ("pay", {"to": b"x"})),
        (("pay", {"to": ["a", "b"]}), ("pay", {"to": ["b", "a"]})),
        (("pay", {}), ("pay", {"amount": None})),
    ],
)
def test_different_requests_have_different_digests(
    one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    assert request_digest(*one) != request_digest(*other)


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    one = {"a": [{"x": 1, "y": {"p": 1, "q": [2]}}], "b": 2}
    other = {"b": 2, "a": [{"y": {"q": [2], "p": 1}, "x": 1}]}
    assert request_digest("m", one) == request_digest("m", other)
    assert list(one) == ["a", "b"], "the params themselves stay as they are"
