"""A request with an idempotency key is run once for its user, and everybody who asks gets its answer.

First the decisions, over stores of sessions that fail in every way; then whole connections, with their time
turned by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from tests.helpers import FakeClock
from tests.server.test_protocol import Harness, Peer
from zcproto.app.app import App
from zcproto.app.context import Context
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
from zcproto.stores.answers import AnswerLimits, Answers
from zcproto.stores.base import Claim, StoreUnavailable
from zcproto.wire.frame import CANCEL, NO_TOKEN, Kind
from zcproto.wire.message import decode_error, encode_body, encode_error

if TYPE_CHECKING:
    from zcproto.stores.circuit_breaker import CircuitBreaker

T = TypeVar("T")

KEEP_MS = 600_000
DIGEST = request_digest("pay", {"amount": 5})
OTHER = request_digest("pay", {"amount": 6})


class FakeStore:
    """The part of a store that keeps answers. It can be out, and it can do what it says it did not."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.answers = Answers(AnswerLimits())
        self.out = False
        self.does_it_all_the_same = False
        self.asked: list[str] = []
        self.held: asyncio.Future[None] | None = None

    async def _turn(self, name: str) -> None:
        self.asked.append(name)
        await asyncio.sleep(0)
        if self.held is not None:
            await self.held
        if self.out and not self.does_it_all_the_same:
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


class World:
    """One process that runs requests once. Its time is turned by hand."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: FakeStore | None = None,
        limits: AnswerLimits | None = None,
    ) -> None:
        self.loop = loop
        self.clock = FakeClock()
        self.tasks = EagerTasks(loop)
        self.slept: list[float] = []
        self.while_asleep: Callable[[], object] = lambda: None
        self.once = IdempotencyCache(
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

    def failed(self, error: BaseException) -> Answer:
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
            outcome = self.once.submit(user, key, digest, execute, self.failed, caller.answers.append)
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


Worlds = Callable[..., World]


@pytest.fixture
def worlds(loop: asyncio.AbstractEventLoop) -> Iterator[Worlds]:
    made: list[World] = []

    def make(*args: Any, **options: Any) -> World:
        made.append(World(loop, *args, **options))
        return made[-1]

    yield make
    for world in made:
        assert loop.run_until_complete(world.tasks.close(1.0)) == 0
        assert world.once.running == 0


@pytest.fixture(params=["memory", "store", "shared store"])
def world(request: pytest.FixtureRequest, worlds: Worlds) -> World:
    """One without a store, with a store of its own, and with a shared one: none of them may matter."""
    store = None if request.param == "memory" else FakeStore(request.param == "shared store")
    return worlds(store)


def code(answer: Answer) -> Code:
    said = decode_error(answer.body)
    assert said.code == answer.code
    return Code(answer.code)


# --- once ------------------------------------------------------------------------------------------------


def test_the_same_request_again_gets_the_answer_that_is_kept(world: World) -> None:
    first = world.call("paid")
    assert first == Answer(0, encode_body("paid"))
    assert world.call("paid twice") == first
    assert world.ran == 1
    assert world.once.counts == {"running": 0, "repeated": 1, "conflicts": 0, "lost": 0}


def test_who_comes_while_it_runs_waits_for_the_same_answer(world: World) -> None:
    gate = world.loop.create_future()
    callers = [world.begin("paid", wait=gate) for _ in range(5)]
    world.turn()
    assert world.ran == 1
    assert not any(caller.answers for caller in callers)
    gate.set_result(None)
    world.turn()
    assert {caller.answer for caller in callers} == {Answer(0, encode_body("paid"))}
    assert (world.ran, world.once.repeated, world.once.running) == (1, 4, 0)


def test_a_caller_that_waits_no_longer_is_not_told_and_stops_nothing(world: World) -> None:
    gate = world.loop.create_future()
    first, second = world.begin("paid", wait=gate), world.begin("paid", wait=gate)
    world.turn()
    for caller in (first, second):
        assert caller.waiting is not None
        caller.waiting.cancel()
        caller.waiting.cancel()
    gate.set_result(None)
    world.turn()
    assert not first.answers
    assert not second.answers
    assert world.call("again") == Answer(0, encode_body("paid"))
    assert world.ran == 1


def test_a_caller_may_go_while_others_are_told(world: World) -> None:
    gate = world.loop.create_future()
    first, second = world.begin(wait=gate), world.begin(wait=gate)
    world.turn()
    assert first.waiting is not None
    assert second.waiting is not None
    first.waiting.on_answer = lambda answer: second.waiting.cancel()  # type: ignore[union-attr]
    gate.set_result(None)
    world.turn()
    assert not second.answers


@pytest.mark.parametrize("running", [False, True])
def test_the_key_of_another_request_is_refused(world: World, running: bool) -> None:
    gate = world.loop.create_future()
    first = world.begin("paid", wait=gate)
    if not running:
        gate.set_result(None)
    world.turn()
    assert code(world.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    if running:
        gate.set_result(None)
        world.turn()
    assert first.answer.code == 0
    assert (world.ran, world.once.conflicts) == (1, 1)


def test_keys_are_each_users_own(world: World) -> None:
    assert world.call("ada's", user="ada") != world.call("bob's", user="bob")
    assert world.call("another", key="k2").body == encode_body("another")
    assert world.ran == 3


def test_an_answer_is_kept_as_long_as_configured_from_its_end_on(world: World) -> None:
    gate = world.loop.create_future()
    caller = world.begin("paid", wait=gate)
    world.turn()
    world.clock.advance(500)
    gate.set_result(None)
    world.turn()
    world.clock.advance(KEEP_MS / 1000 - 0.001)
    assert world.call("again") == caller.answer
    world.clock.advance(0.001)
    assert world.call("again").body == encode_body("again")


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
def test_an_error_of_what_was_run_is_kept(world: World, error: BaseException) -> None:
    first = world.call(error)
    assert first.code != 0
    assert world.call("paid") == first
    assert world.ran == 1


@pytest.mark.parametrize("number", sorted(NOT_RUN))
def test_an_error_that_says_it_was_not_run_frees_the_key(world: World, number: Code) -> None:
    assert code(world.call(CallError.by_code[number]("not now"))) is number
    assert world.call("paid").code == 0
    assert world.ran == 2


def test_all_who_wait_are_told_that_it_was_not_run(world: World) -> None:
    gate = world.loop.create_future()
    callers = [world.begin(Unavailable("not now"), wait=gate) for _ in range(3)]
    world.turn()
    gate.set_result(None)
    world.turn()
    assert [code(caller.answer) for caller in callers] == [Code.UNAVAILABLE] * 3


def test_what_is_not_run_are_the_codes_that_the_specification_names() -> None:
    assert {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, TokenExpired.code} <= NOT_RUN
    assert not NOT_RUN & {Code.UNKNOWN, Code.INTERNAL, Code.CANCELLED, Code.DEADLINE_EXCEEDED}


def test_what_stops_the_process_is_no_answer(worlds: Worlds) -> None:
    world = worlds()
    with pytest.raises(SystemExit):
        world.begin(SystemExit())
    assert world.once.running == 0


def test_an_answer_too_large_to_be_kept_is_given_once(worlds: Worlds) -> None:
    world = worlds(limits=AnswerLimits(bytes=1_000, user_bytes=100))
    assert world.call("x" * 200).code == 0
    again = world.call("x" * 200)
    assert code(again) is Code.UNKNOWN
    assert b"too large" in again.body
    assert world.call("x" * 97, key="fits") == world.call(key="fits")
    assert world.ran == 2


def test_more_than_a_user_may_run_are_refused(worlds: Worlds) -> None:
    world = worlds(limits=AnswerLimits(user_count=2))
    gate = world.loop.create_future()
    for key in ("a", "b"):
        world.begin(key=key, wait=gate)
    refused = world.call(key="c")
    assert code(refused) is Code.RESOURCE_EXHAUSTED
    assert decode_error(refused.body).details["retry_after_ms"] > 0
    assert world.call(user="bob", key="c").code == 0
    gate.set_result(None)
    world.turn()
    assert world.call(key="c").code == 0


def test_old_answers_in_memory_are_forgotten_by_and_by(worlds: Worlds) -> None:
    world = worlds()
    for number in range(20):
        world.call(key=str(number))
    world.clock.advance(KEEP_MS / 1000)
    for number in range(4):
        world.call(key=f"new {number}")
    assert len(world.once._memory) == 4


def test_limits_follow_from_what_is_configured() -> None:
    limits = answer_limits(64 << 20, 500)
    assert limits == AnswerLimits(bytes=64 << 20, user_bytes=16 << 20, user_count=500)
    assert answer_limits(64 << 20, 1_000_000).count == 1_000_000


# --- the store fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_run_while_the_store_is_out(worlds: Worlds, shared: bool) -> None:
    store = FakeStore(shared)
    world = worlds(store)
    store.out = True
    refused = world.call()
    assert code(refused) is Code.UNAVAILABLE
    assert decode_error(refused.body).details["retry_after_ms"] > 0
    assert b"it is out" not in refused.body
    store.out = False
    assert world.call("paid").code == 0
    assert world.ran == 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tries", [1, 3])
def test_a_claim_that_took_effect_unseen_is_no_obstacle(worlds: Worlds, shared: bool, tries: int) -> None:
    store = FakeStore(shared)
    world = worlds(store)
    store.out = store.does_it_all_the_same = True
    for _ in range(tries):
        assert code(world.call()) is Code.UNAVAILABLE
        world.clock.advance(1)
    store.out = False
    assert world.call("paid") == world.call("again") == Answer(0, encode_body("paid"))
    assert (world.ran, world.slept) == (1, [])


@pytest.mark.parametrize("shared", [False, True])
def test_the_claim_of_another_is_not_taken_for_one_of_ours(worlds: Worlds, shared: bool) -> None:
    store = FakeStore(shared)
    killed = worlds(store)
    gate = killed.loop.create_future()
    killed.begin(wait=gate)
    killed.turn()
    restarted = worlds(store)
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


def test_a_claim_that_could_not_be_released_is_used_by_the_next(worlds: Worlds) -> None:
    store = FakeStore(shared=True)
    world = worlds(store)
    gate = world.loop.create_future()
    caller = world.begin(Unavailable("not now"), wait=gate)
    world.turn()
    store.out = True
    gate.set_result(None)
    world.turn()
    assert code(caller.answer) is Code.UNAVAILABLE
    store.out = False
    assert world.call("paid").code == 0
    assert world.slept == []


@pytest.mark.parametrize("all_the_same", [False, True])
def test_an_answer_that_the_store_did_not_take_is_kept_here_and_written_later(
    worlds: Worlds, all_the_same: bool
) -> None:
    store = FakeStore(shared=True)
    world, another = worlds(store), worlds(store)
    gate = world.loop.create_future()
    caller = world.begin("paid", wait=gate)
    world.turn()
    store.out, store.does_it_all_the_same = True, all_the_same
    gate.set_result(None)
    world.turn()
    assert caller.answer.code == 0
    assert world.call("again") == caller.answer
    assert code(world.call(digest=OTHER)) is Code.FAILED_PRECONDITION
    store.out = False
    world.call(key="another")
    assert another.call("again") == caller.answer
    assert another.slept == []
    assert (world.ran, another.ran) == (2, 0)


def test_an_answer_that_is_too_old_by_then_is_not_written(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)
    gate = world.loop.create_future()
    world.begin("paid", wait=gate)
    world.turn()
    store.out = True
    gate.set_result(None)
    world.turn()
    world.clock.advance(KEEP_MS / 1000)
    store.out = False
    store.asked.clear()
    world.call(key="another")
    world.turn()
    assert store.asked == ["claim", "keep"]
    assert not world.once._unsaved


def test_writing_later_goes_on_another_time_if_the_store_is_out_again(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)
    gate = world.loop.create_future()
    world.begin("paid", wait=gate)
    world.turn()
    store.out = True
    gate.set_result(None)
    world.turn()
    store.out = False
    world.begin(key="another")
    store.asked.clear()
    world.turn()
    first = store.asked.count("keep")
    assert first == 2, "the other's answer, and the one that was left behind"


def test_writing_later_waits_for_a_store_that_works(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)
    gate = world.loop.create_future()
    world.begin("paid", wait=gate)
    world.turn()
    store.out = True
    gate.set_result(None)
    world.turn()

    async def keep_fails(*args: Any) -> None:
        raise StoreUnavailable("read only")

    store.out = False
    works, store.keep_answer = store.keep_answer, keep_fails  # type: ignore[method-assign]
    world.call(key="another")
    assert len(world.once._unsaved) == 2
    store.keep_answer = works  # type: ignore[method-assign]
    world.call(key="a third")
    world.turn()
    assert not world.once._unsaved


def test_what_is_left_behind_is_bounded(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)
    store.out = True
    for number in range(MAX_REMEMBERED + 5):
        world.begin(key=str(number))
        if number % 50 == 0:
            world.turn()
    world.turn()
    assert len(world.once._idle_claims) == MAX_REMEMBERED


def test_a_fault_of_the_store_is_a_fault_of_the_server(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)

    async def broken(*args: Any) -> Claim:
        raise ValueError("a fault")

    store.claim = broken  # type: ignore[method-assign]
    assert code(world.call()) is Code.INTERNAL
    assert world.ran == 0


def test_an_answer_that_the_store_lost_is_told_as_such(worlds: Worlds) -> None:
    store = FakeStore()
    world = worlds(store)
    world.call()
    entry = store.answers.entry("ada", "k")
    assert entry is not None
    entry.answer = b""
    assert code(world.call()) is Code.UNKNOWN
    assert (world.ran, world.once.lost) == (1, 1)


# --- other processes -----------------------------------------------------------------------------------------


def test_another_process_that_runs_it_is_waited_for(worlds: Worlds) -> None:
    store = FakeStore(shared=True)
    world, another = worlds(store), worlds(store)
    gate = another.loop.create_future()
    first = another.begin("paid", wait=gate)
    another.turn()

    def end_it() -> None:
        if len(world.slept) == 8:
            gate.set_result(None)

    world.while_asleep = end_it
    answer = world.call("again")
    assert answer == first.answer == Answer(0, encode_body("paid"))
    assert (world.ran, another.ran) == (0, 1)
    assert world.slept[:2] == [POLL_FIRST_S, 2 * POLL_FIRST_S]
    assert world.slept[-1] == POLL_LAST_S


def test_what_another_process_did_not_run_after_all_is_run_here(worlds: Worlds) -> None:
    store = FakeStore(shared=True)
    world, another = worlds(store), worlds(store)
    gate = another.loop.create_future()
    another.begin(ResourceExhausted("full"), wait=gate)
    another.turn()
    world.while_asleep = lambda: gate.done() or gate.set_result(None)
    assert world.call("paid").code == 0
    assert (world.ran, another.ran) == (1, 1)


def test_the_claim_of_a_process_that_is_gone_lasts_as_long_as_an_answer(worlds: Worlds) -> None:
    store = FakeStore(shared=True)
    world, gone = worlds(store), worlds(store)
    gate = gone.loop.create_future()
    gone.begin(wait=gate)
    gone.turn()
    begun = world.clock.wall()
    caller = world.begin("paid")
    while not caller.answers:
        world.turn()
    assert caller.answer.code == 0
    assert world.clock.wall() - begun >= KEEP_MS
    gate.set_result(None)
    gone.turn()


def test_nobody_polls_for_nobody(worlds: Worlds) -> None:
    store = FakeStore(shared=True)
    world, another = worlds(store), worlds(store)
    gate = another.loop.create_future()
    another.begin(wait=gate)
    another.turn()
    caller = world.begin()
    assert caller.waiting is not None
    caller.waiting.cancel()
    world.turn()
    assert (world.once.running, world.slept) == (0, [POLL_FIRST_S])
    gate.set_result(None)
    another.turn()


def test_what_ran_when_the_server_was_killed_is_not_run_again(worlds: Worlds) -> None:
    store = FakeStore()
    killed = worlds(store)
    gate = killed.loop.create_future()
    killed.begin(wait=gate)
    killed.turn()
    restarted = worlds(store)
    answer = restarted.call()
    assert code(answer) is Code.UNKNOWN
    assert (restarted.ran, restarted.once.lost) == (0, 1)
    restarted.clock.advance(KEEP_MS / 1000)
    assert restarted.call().code == 0
    gate.set_result(None)
    killed.turn()


def test_a_kept_answer_outlives_the_process(worlds: Worlds) -> None:
    store = FakeStore()
    first = worlds(store).call("paid")
    restarted = worlds(store)
    assert restarted.call("again") == first
    assert restarted.ran == 0


# --- the end of the server -------------------------------------------------------------------------------------


def test_what_the_end_of_the_server_cancelled_is_kept_as_such(
    loop: asyncio.AbstractEventLoop, worlds: Worlds
) -> None:
    store = FakeStore()
    world = World(loop, store)
    caller = world.begin(wait=loop.create_future())
    world.turn()
    assert loop.run_until_complete(world.tasks.close(1.0)) == 0
    assert code(caller.answer) is Code.CANCELLED
    restarted = worlds(store)
    assert restarted.call() == caller.answer
    assert restarted.ran == 0


@pytest.mark.parametrize("result", ["paid", Unavailable("not now")], ids=["kept", "not run"])
def test_the_end_of_the_server_while_the_store_is_told(loop: asyncio.AbstractEventLoop, result: Any) -> None:
    store = FakeStore()
    world = World(loop, store)
    gate = loop.create_future()
    caller = world.begin(result, wait=gate)
    world.turn()
    store.held = loop.create_future()
    gate.set_result(None)
    world.turn()
    assert not caller.answers
    assert loop.run_until_complete(world.tasks.close(1.0)) == 0
    assert caller.answer == (Answer(0, encode_body("paid")) if result == "paid" else world.failed(result))


def test_the_end_of_the_server_while_the_store_is_asked(loop: asyncio.AbstractEventLoop) -> None:
    store = FakeStore()
    store.held = loop.create_future()
    world = World(loop, store)
    caller = world.begin()
    world.turn()
    assert loop.run_until_complete(world.tasks.close(1.0)) == 0
    assert code(caller.answer) is Code.CANCELLED
    assert world.ran == 0


def test_a_run_that_is_cancelled_before_its_task_began_is_answered(loop: asyncio.AbstractEventLoop) -> None:
    world = World(loop)
    caller = Caller()

    async def scenario() -> None:
        async def execute() -> bytes:
            await loop.create_future()
            raise AssertionError

        world.once.submit("ada", "k", DIGEST, execute, world.failed, caller.answers.append)
        await world.tasks.close(1.0)

    loop.run_until_complete(scenario())
    world.turn()
    assert code(caller.answer) is Code.CANCELLED
    assert world.once.running == 0


def test_a_method_that_cancels_itself_before_it_waits_is_answered_and_not_run_again(worlds: Worlds) -> None:
    world = worlds()

    class CancelsItself:
        def __await__(self) -> Iterator[Any]:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            yield from world.loop.create_future()

    assert code(world.call(wait=CancelsItself())) is Code.CANCELLED
    assert code(world.call()) is Code.UNKNOWN
    assert world.ran == 1


def test_the_end_waits_until_nothing_runs(worlds: Worlds) -> None:
    world = worlds()
    gate = world.loop.create_future()
    world.begin(wait=gate)
    waiting = world.loop.create_task(world.once.wait_idle())
    world.turn()
    assert not waiting.done()
    gate.set_result(None)
    world.turn()
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
def test_requests_that_differ_have_different_digests(
    one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    assert request_digest(*one) != request_digest(*other)


def test_the_order_of_keys_makes_no_difference_however_deep() -> None:
    one = {"a": [{"x": 1, "y": {"p": 1, "q": [2]}}], "b": 2}
    other = {"b": 2, "a": [{"y": {"q": [2], "p": 1}, "x": 1}]}
    assert request_digest("m", one) == request_digest("m", other)
    assert list(one) == ["a", "b"], "the params themselves stay as they are"


# --- whole connections ---------------------------------------------------------------------------------------


class Shop(Harness):
    """A harness whose methods can be called with a key."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.counts: dict[str, int] = {}

    def _methods(self) -> App:
        app = super()._methods()

        def count(name: str) -> int:
            self.counts[name] = self.counts.get(name, 0) + 1
            return self.counts[name]

        @app.method("pay")
        def pay(amount: int = 1, size: int = 0) -> Any:
            return bytes(size) if size else ["paid", amount, count("pay")]

        @app.method("fail")
        def fail(code: int) -> None:
            count("fail")
            raise CallError.by_code[code](f"number {self.counts['fail']}")

        @app.method("break")
        def break_() -> object:
            count("break")
            return object()

        @app.method("hello", public=True)
        def hello(context: Context) -> str:
            return f"hello {count('hello')}"

        @app.method("anything")
        def anything(**params: Any) -> Any:
            params["n"] = count("anything")
            return params

        return app


@pytest.fixture
def shop(loop: asyncio.AbstractEventLoop) -> Iterator[Shop]:
    shop = Shop(loop)
    yield shop
    for future in shop.futures:
        if not future.done():
            future.set_result(None)
    assert loop.run_until_complete(shop.state.tasks.close(1.0)) == 0


def visitor(shop: Shop, user: str = "ada") -> Peer:
    peer = shop.connect()
    peer.login(user)
    return peer


def ask(peer: Peer, stream: int, method: str, params: dict[str, Any] | None = None, **meta: Any) -> Any:
    """The one answer to a request that is answered at once."""
    peer.send(peer.request(stream, method, params, **{"idempotency_key": "k", **meta}))
    (answer,) = peer.answers()
    assert answer.stream == stream
    return answer


def test_the_answer_is_given_again_on_this_connection_and_on_another(shop: Shop) -> None:
    peer, again = visitor(shop), visitor(shop)
    assert ask(peer, 1, "pay", {"amount": 5}).value == ["paid", 5, 1]
    assert ask(peer, 2, "pay", {"amount": 5}, deadline_ms=5_000).value == ["paid", 5, 1]
    assert ask(again, 1, "pay", {"amount": 5}).value == ["paid", 5, 1]
    assert ask(again, 2, "pay", {"amount": 6}).error.code == Code.FAILED_PRECONDITION
    assert ask(visitor(shop, "bob"), 1, "pay", {"amount": 6}).value == ["paid", 6, 2]
    assert ask(again, 3, "pay", {"amount": 5}, idempotency_key="another").value == ["paid", 5, 3]


def test_requests_without_a_key_are_run_each(shop: Shop) -> None:
    peer = visitor(shop)
    for stream in (1, 2):
        peer.send(peer.request(stream, "pay", deadline_ms=1_000))
        (answer,) = peer.answers()
        assert answer.value == ["paid", 1, stream]


def test_a_method_may_change_its_params(shop: Shop) -> None:
    peer = visitor(shop)
    first = ask(peer, 1, "anything", {"a": [1]}).value
    assert ask(peer, 2, "anything", {"a": [1]}).value == first == {"a": [1], "n": 1}


def test_params_that_do_not_fit_use_up_no_key(shop: Shop) -> None:
    peer = visitor(shop)
    assert ask(peer, 1, "pay", {"amount": "five"}).error.code == Code.INVALID_ARGUMENT
    assert ask(peer, 2, "pay", {"amount": 5}).value == ["paid", 5, 1]


def test_a_key_without_a_session_is_a_promise_that_cannot_be_kept(shop: Shop) -> None:
    peer = shop.connect()
    answer = ask(peer, 1, "hello")
    assert answer.error.code == Code.INVALID_ARGUMENT
    assert "session" in answer.error.message
    assert ask(peer, 2, "pay").error.code == Code.UNAUTHENTICATED
    assert ask(visitor(shop), 1, "hello").value == "hello 1"
    assert ask(visitor(shop), 1, "hello").value == "hello 1"


def test_errors_and_faults_are_given_again_with_their_incident(shop: Shop) -> None:
    peer = visitor(shop)
    assert ask(peer, 1, "fail", {"code": 5}).error.message == "number 1"
    assert ask(peer, 2, "fail", {"code": 5}).error.message == "number 1"
    first = ask(peer, 3, "break", idempotency_key="b").error
    assert first.code == Code.INTERNAL
    assert ask(peer, 4, "break", idempotency_key="b").error == first
    assert shop.counts == {"fail": 1, "break": 1}
    for stream in (5, 6):
        assert (
            ask(peer, stream, "fail", {"code": 14}, idempotency_key="u").error.details["retry_after_ms"] > 0
        )
    assert shop.counts["fail"] == 3


def test_a_large_answer_is_sent_and_kept_and_one_that_is_too_large_is_a_fault(shop: Shop) -> None:
    peer = visitor(shop)
    assert len(ask(peer, 1, "pay", {"size": 9_000}).value) == 9_000
    assert len(ask(peer, 2, "pay", {"size": 9_000}).value) == 9_000
    too_large = {"size": shop.state.settings.max_frame}
    first = ask(peer, 3, "pay", too_large, idempotency_key="large").error
    assert first.code == Code.INTERNAL
    assert ask(peer, 4, "pay", too_large, idempotency_key="large").error == first


def test_one_that_waits_is_run_once_for_all_connections(shop: Shop) -> None:
    peers = [visitor(shop) for _ in range(3)]
    for peer in peers:
        peer.send(peer.request(1, "wait", idempotency_key="k"), peer.request(2, "wait", idempotency_key="k"))
    (future,) = shop.futures
    future.set_result("done")
    shop.turn()
    for peer in peers:
        assert sorted((answer.stream, answer.value) for answer in peer.answers()) == [
            (1, "done"),
            (2, "done"),
        ]
        assert peer.protocol._workers == {}


def test_the_end_of_the_connection_ends_nothing_but_itself(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.lose()
    shop.turn()
    (future,), (context,) = shop.futures, shop.contexts
    assert not future.cancelled()
    again = visitor(shop)
    again.send(again.request(1, "wait", idempotency_key="k"))
    future.set_result("done")
    shop.turn()
    (answer,) = again.answers()
    assert answer.value == "done"
    assert ask(visitor(shop), 1, "wait").value == "done"
    assert len(shop.futures) == 1
    assert not context.send_event("nobody", 1)


def test_connections_that_are_gone_leave_nothing_behind_at_a_run(shop: Shop) -> None:
    for _ in range(5):
        peer = visitor(shop)
        peer.send(*(peer.request(stream, "wait", idempotency_key="k") for stream in (1, 2)))
        peer.send(peer.frame(CANCEL, 2))
        peer.lose()
    (run,) = shop.state.idempotency._running.values()
    assert run.waiting == {}


def test_cancel_is_answered_at_once_and_the_run_goes_on(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.send(peer.frame(CANCEL, 1))
    (answer,) = peer.answers()
    assert answer.error.code == Code.CANCELLED
    shop.turn()
    (future,), (context,) = shop.futures, shop.contexts
    assert not future.cancelled()
    assert not context.cancelled
    future.set_result("done")
    shop.turn()
    assert peer.answers() == []
    assert peer.protocol._workers == {}
    assert ask(peer, 1, "wait").value == "done"


def test_a_request_that_was_cancelled_takes_a_place_until_it_has_ended(shop: Shop) -> None:
    peer = visitor(shop)
    for stream in range(1, 17):
        peer.send(peer.request(stream, "wait", idempotency_key=f"k{stream}"))
        peer.send(peer.frame(CANCEL, stream))
    peer.answers()
    assert ask(peer, 50, "pay").error.code == Code.RESOURCE_EXHAUSTED
    for future in shop.futures:
        future.set_result(None)
    shop.turn()
    assert ask(peer, 50, "pay").value == ["paid", 1, 1]


def test_the_deadline_of_a_caller_ends_its_wait_alone(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "wait", idempotency_key="k", deadline_ms=1_000))
    peer.send(peer.request(2, "wait", idempotency_key="k", deadline_ms=5_000))
    (context,) = shop.contexts
    assert context.time_left is None
    shop.advance(1.5)
    (answer,) = peer.answers()
    assert (answer.stream, answer.error.code) == (1, Code.DEADLINE_EXCEEDED)
    shop.futures[0].set_result("done")
    shop.turn()
    (answer,) = peer.answers()
    assert (answer.stream, answer.value) == (2, "done")


def test_a_method_that_ends_its_own_connection_goes_on(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "close.and.wait", idempotency_key="k"))
    assert peer.transport.closed
    shop.futures[0].set_result(None)
    shop.turn()
    assert ask(visitor(shop), 1, "close.and.wait").value is None
    assert len(shop.futures) == 1
    peer = visitor(shop)
    peer.send(peer.request(1, "close.and.answer", idempotency_key="c"))
    assert peer.transport.closed
    assert ask(visitor(shop), 1, "close.and.answer", idempotency_key="c").value == b""


def test_draining_waits_for_runs_that_have_no_connection(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.lose()
    shop.state.draining = True
    drained = shop.loop.create_task(shop.state.wait_drained())
    shop.turn()
    assert not drained.done()
    shop.futures[0].set_result(None)
    shop.turn()
    assert drained.done()


def test_the_end_of_the_server_tells_the_callers_and_keeps_that(shop: Shop) -> None:
    peer = visitor(shop)
    peer.send(peer.request(1, "wait", idempotency_key="k"))
    peer.send(peer.request(2, "wait", idempotency_key="k"))
    peer.send(peer.frame(CANCEL, 2))
    peer.answers()
    peer.protocol.cancel_all()
    peer.protocol.close("drain_timeout")
    (answer,) = peer.answers()
    assert (answer.stream, answer.error.code) == (1, Code.CANCELLED)
    assert shop.loop.run_until_complete(shop.state.tasks.close(1.0)) == 0
    assert ask(visitor(shop), 1, "wait").error.code == Code.CANCELLED
    assert len(shop.futures) == 1


def test_the_protocols_own_methods_keep_no_answers(shop: Shop) -> None:
    """An answer of theirs may hold tokens, which nobody may keep."""
    peer = visitor(shop)
    peer.token = NO_TOKEN
    answer = ask(peer, 1, "session.open", {"scheme": "none"})
    assert answer.kind is Kind.ERROR
    assert len(shop.state.idempotency._memory) == 0
