"""A request with an idempotency key is run once for its user, also when the store fails or the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from tests.helpers import FakeClock
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    NotFound,
    ResourceExhausted,
    TokenExpired,
    Unavailable,
)
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import (
    MAX_REMEMBERED,
    NOT_RUN,
    POLL_FIRST_S,
    POLL_LAST_S,
    Answer,
    IdempotencyCache,
    Waiting,
    answer_limits,
    request_digest,
)
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits, Answers
from zcproto.stores.base import Claim, StoreUnavailable
from zcproto.wire.message import decode_error, encode_body, encode_error

if TYPE_CHECKING:
    from zcproto.stores.operations import CircuitBreaker

T = TypeVar("T")

KEEP_MS = 600_000
DIGEST = request_digest("pay", {"amount": 5})
OTHER = request_digest("pay", {"amount": 6})


class FakeStore:
    """The part of a store for answers. It can be out, also after an operation has taken effect."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.answers = Answers(AnswerLimits())
        self.out = False
        self.fails_after_the_effect = False
        self.asked: list[str] = []
        self.held: asyncio.Future[None] | None = None

    async def _turn(self, name: str) -> None:
        self.asked.append(name)
        await asyncio.sleep(0)
        if self.held is not None:
            await self.held
        if self.out and not self.fails_after_the_effect:
            raise StoreUnavailable("it is out")

    def _end(self) -> None:
        if self.out:
            raise StoreUnavailable("no answer in time")

    async def claim(self, user: str, key: str, digest: bytes, wall: int, lease_ms: int) -> Claim:
        await self._turn("claim")
        claim = self.answers.claim(user, key, digest, wall, lease_ms)
        self._end()
        return claim

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        await self._turn("keep")
        self.answers.keep(user, key, answer, wall, keep_ms)
        self._end()

    async def release_claim(self, user: str, key: str) -> None:
        await self._turn("release")
        self.answers.release(user, key)
        self._end()


class PassThrough:
    """A circuit breaker that never opens."""

    def __init__(self, store: FakeStore) -> None:
        self.store = store

    async def call(self, operation: Coroutine[Any, Any, T]) -> T:
        return await operation


class CacheHarness:
    """The cache of one process, with the time advanced by the test."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: FakeStore | None = None,
        limits: AnswerLimits = DEFAULT_LIMITS,
    ) -> None:
        self.loop = loop
        self.clock = FakeClock()
        self.tasks = EagerTasks(loop)
        self.slept: list[float] = []
        self.while_asleep: Callable[[], object] = lambda: None
        self.cache = IdempotencyCache(
            self.tasks,
            self.clock,
            breaker=None if store is None else cast("CircuitBreaker", PassThrough(store)),
            keep_ms=KEEP_MS,
            limits=limits,
            sleep=self.sleep,
        )
        self.ran = 0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)
        await asyncio.sleep(0)
        self.while_asleep()

    def answer_error(self, error: BaseException) -> Answer:
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("the server stopped")
        if not isinstance(error, CallError):
            error = InternalError(type(error).__name__)
        return Answer(error.code, encode_error(error.code, error.message, error.details))

    def begin(
        self,
        result: Any = "paid",
        *,
        user: str = "ada",
        key: str = "k",
        digest: bytes = DIGEST,
        wait: Awaitable[Any] | None = None,
    ) -> Caller:
        async def execute() -> bytes:
            self.ran += 1
            if wait is not None:
                await wait
            if isinstance(result, BaseException):
                raise result
            return encode_body(result)

        caller = Caller()

        async def ask() -> None:
            outcome = self.cache.submit(user, key, digest, execute, self.answer_error, caller.answers.append)
            if isinstance(outcome, Answer):
                caller.answers.append(outcome)
            else:
                caller.waiting = outcome

        self.loop.run_until_complete(ask())
        return caller

    def turn(self) -> None:
        for _ in range(60):
            self.loop.run_until_complete(asyncio.sleep(0))

    def call(self, result: Any = "paid", **options: Any) -> Answer:
        caller = self.begin(result, **options)
        self.turn()
        return caller.answer


class Caller:
    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.waiting: Waiting | None = None

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


MakeHarness = Callable[..., CacheHarness]


@pytest.fixture
def make_harness(loop: asyncio.AbstractEventLoop) -> Iterator[MakeHarness]:
    made: list[CacheHarness] = []

    def make(*args: Any, **options: Any) -> CacheHarness:
        made.append(CacheHarness(loop, *args, **options))
        return made[-1]

    yield make
    for harness in made:
        assert loop.run_until_complete(harness.tasks.close(1.0)) == 0
        assert harness.cache.running == 0


@pytest.fixture(params=["memory", "store", "shared store"])
def harness(request: pytest.FixtureRequest, make_harness: MakeHarness) -> CacheHarness:
    """Return harnesses without a store, with its own store and with a shared store."""
    store = None if request.param == "memory" else FakeStore(request.param == "shared store")
    return make_harness(store)


def code(answer: Answer) -> Code:
    message = decode_error(answer.body)
    assert message.code == answer.code
    return Code(answer.code)


# --- once ------------------------------------------------------------------------------------------------


def test_repeated_request_gets_the_stored_answer(harness: CacheHarness) -> None:
    first = harness.call("paid")
    assert first == Answer(0, encode_body("paid"))
    assert harness.call("paid twice") == first
    assert harness.ran == 1
    assert harness.cache.counts == {"running": 0, "repeated": 1, "conflicts": 0, "lost": 0}


def test_concurrent_requests_share_one_answer(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    callers = [harness.begin("paid", wait=gate) for _ in range(5)]
    harness.turn()
    assert harness.ran == 1
    assert not any(caller.answers for caller in callers)
    gate.set_result(None)
    harness.turn()
    assert {caller.answer for caller in callers} == {Answer(0, encode_body("paid"))}
    assert (harness.ran, harness.cache.repeated, harness.cache.running) == (1, 4, 0)


def test_cancelled_wait_gets_no_answer_and_does_not_stop_the_run(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    first, second = harness.begin("paid", wait=gate), harness.begin("paid", wait=gate)
    harness.turn()
    for caller in (first, second):
        assert caller.waiting is not None
        caller.waiting.cancel()
        caller.waiting.cancel()
    gate.set_result(None)
    harness.turn()
    assert not first.answers
    assert not second.answers
    assert harness.call("again") == Answer(0, encode_body("paid"))
    assert harness.ran == 1


def test_caller_may_leave_while_others_are_answered(harness: CacheHarness) -> None:
    gate = harness.loop.create_future()
    first, second = harness.begin(wait=gate), harness.begin(wait=gate)
    harness.turn()
    assert first.waiting is not None
    assert second.waiting is not None
    first.waiting.on_answer = lambda answer: second.waiting.cancel()  # type: ignore[union-attr]
    gate.set_result(None)
    harness.turn()
    assert not second.answers


@pytest.mark.parametrize("running", [False, True])
def test_key_of_another_request_is_refused(harness: CacheHarness, running: bool) -> None:
    gate = harness.loop.create_future()
    first = harness.begin("paid", wait=gate)
    if not running:
        gate.set_result(None)
    harness.turn()
    assert code(harness.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    if running:
        gate.set_result(None)
        harness.turn()
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
    gate.set_result(None)
    harness.turn()
    harness.clock.advance(KEEP_MS / 1000 - 0.001)
    assert harness.call("again") == caller.answer
    harness.clock.advance(0.001)
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
    gate.set_result(None)
    harness.turn()
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
    gate.set_result(None)
    harness.turn()
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
    gate = killed.loop.create_future()
    killed.begin(wait=gate)
    killed.turn()
    restarted = make_harness(store)
    restarted.clock.advance(1)
    store.out = True
    assert code(restarted.call()) is Code.UNAVAILABLE
    store.out = False
    caller = restarted.begin()
    restarted.turn()
    assert restarted.ran == 0
    assert bool(restarted.slept) == shared
    assert bool(caller.answers) == (not shared)
    gate.set_result(None)
    killed.turn()
    restarted.turn()


def test_claim_that_could_not_be_released_is_reused(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness = make_harness(store)
    gate = harness.loop.create_future()
    caller = harness.begin(Unavailable("not now"), wait=gate)
    harness.turn()
    store.out = True
    gate.set_result(None)
    harness.turn()
    assert code(caller.answer) is Code.UNAVAILABLE
    store.out = False
    assert harness.call("paid").code == 0
    assert harness.slept == []


@pytest.mark.parametrize("all_the_same", [False, True])
def test_answer_that_failed_to_be_stored_is_kept_here_and_written_later(
    make_harness: MakeHarness, all_the_same: bool
) -> None:
    store = FakeStore(shared=True)
    harness, another = make_harness(store), make_harness(store)
    gate = harness.loop.create_future()
    caller = harness.begin("paid", wait=gate)
    harness.turn()
    store.out, store.fails_after_the_effect = True, all_the_same
    gate.set_result(None)
    harness.turn()
    assert caller.answer.code == 0
    assert harness.call("again") == caller.answer
    assert code(harness.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    store.out = False
    harness.call(key="another")
    assert another.call("again") == caller.answer
    assert another.slept == []
    assert (harness.ran, another.ran) == (2, 0)


def test_expired_answer_is_not_written_later(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    gate = harness.loop.create_future()
    harness.begin("paid", wait=gate)
    harness.turn()
    store.out = True
    gate.set_result(None)
    harness.turn()
    harness.clock.advance(KEEP_MS / 1000)
    store.out = False
    store.asked.clear()
    harness.call(key="another")
    harness.turn()
    assert store.asked == ["claim", "keep"]


def test_delayed_write_continues_after_another_outage(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    gate = harness.loop.create_future()
    harness.begin("paid", wait=gate)
    harness.turn()
    store.out = True
    gate.set_result(None)
    harness.turn()
    store.out = False
    harness.begin(key="another")
    store.asked.clear()
    harness.turn()
    first = store.asked.count("keep")
    assert first == 2, "the other's answer, and the one that was left behind"


def test_delayed_write_waits_for_the_store(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    gate = harness.loop.create_future()
    harness.begin("paid", wait=gate)
    harness.turn()
    store.out = True
    gate.set_result(None)
    harness.turn()

    async def keep_fails(*args: Any) -> None:
        raise StoreUnavailable("read only")

    store.out = False
    works, store.keep_answer = store.keep_answer, keep_fails  # type: ignore[method-assign]
    harness.call(key="another")
    store.keep_answer = works  # type: ignore[method-assign]
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

    store.claim = broken  # type: ignore[method-assign]
    assert code(harness.call()) is Code.INTERNAL
    assert harness.ran == 0


def test_answer_lost_by_the_store_is_reported_as_unknown(make_harness: MakeHarness) -> None:
    store = FakeStore()
    harness = make_harness(store)
    harness.call()
    entry = store.answers.entry("ada", "k")
    assert entry is not None
    entry.answer = b""
    assert code(harness.call()) is Code.UNKNOWN
    assert (harness.ran, harness.cache.lost) == (1, 1)


# --- other processes -----------------------------------------------------------------------------------------


def test_request_running_in_another_process_is_polled(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness, another = make_harness(store), make_harness(store)
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


def test_request_released_by_another_process_is_run_here(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness, another = make_harness(store), make_harness(store)
    gate = another.loop.create_future()
    another.begin(ResourceExhausted("full"), wait=gate)
    another.turn()
    harness.while_asleep = lambda: gate.done() or gate.set_result(None)
    assert harness.call("paid").code == 0
    assert (harness.ran, another.ran) == (1, 1)


def test_claim_of_a_dead_process_lasts_as_long_as_an_answer(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness, gone = make_harness(store), make_harness(store)
    gate = gone.loop.create_future()
    gone.begin(wait=gate)
    gone.turn()
    begun = harness.clock.wall()
    caller = harness.begin("paid")
    while not caller.answers:
        harness.turn()
    assert caller.answer.code == 0
    assert harness.clock.wall() - begun >= KEEP_MS
    gate.set_result(None)
    gone.turn()


def test_polling_ends_without_waiting_callers(make_harness: MakeHarness) -> None:
    store = FakeStore(shared=True)
    harness, another = make_harness(store), make_harness(store)
    gate = another.loop.create_future()
    another.begin(wait=gate)
    another.turn()
    caller = harness.begin()
    assert caller.waiting is not None
    caller.waiting.cancel()
    harness.turn()
    assert (harness.cache.running, harness.slept) == (0, [POLL_FIRST_S])
    gate.set_result(None)
    another.turn()


def test_request_running_when_the_server_was_killed_is_not_run_again(make_harness: MakeHarness) -> None:
    store = FakeStore()
    killed = make_harness(store)
    gate = killed.loop.create_future()
    killed.begin(wait=gate)
    killed.turn()
    restarted = make_harness(store)
    answer = restarted.call()
    assert code(answer) is Code.UNKNOWN
    assert (restarted.ran, restarted.cache.lost) == (0, 1)
    restarted.clock.advance(KEEP_MS / 1000)
    assert restarted.call().code == 0
    gate.set_result(None)
    killed.turn()


def test_stored_answer_survives_a_restart(make_harness: MakeHarness) -> None:
    store = FakeStore()
    first = make_harness(store).call("paid")
    restarted = make_harness(store)
    assert restarted.call("again") == first
    assert restarted.ran == 0


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
    gate.set_result(None)
    harness.turn()
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
            assert task is not None
            task.cancel()
            yield from harness.loop.create_future()

    assert code(harness.call(wait=CancelsItself())) is Code.CANCELLED
    assert code(harness.call()) is Code.UNKNOWN
    assert harness.ran == 1


def test_wait_idle_returns_when_no_request_runs(make_harness: MakeHarness) -> None:
    harness = make_harness()
    gate = harness.loop.create_future()
    harness.begin(wait=gate)
    waiting = harness.loop.create_task(harness.cache.wait_idle())
    harness.turn()
    assert not waiting.done()
    gate.set_result(None)
    harness.turn()
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
