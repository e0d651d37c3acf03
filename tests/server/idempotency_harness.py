"""An IdempotencyCache with fake time and a fake store."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from tests.helpers import FakeClock, FakeTimers
from zcproto.common.clock import MonotonicClock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import CallError, Cancelled, Code, InternalError
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import (
    DEFAULT_RUNNING,
    SAVE_AGAIN_S,
    Answer,
    IdempotencyCache,
    Waiting,
    request_digest,
)
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits, Answers
from zcproto.stores.base import Claim, StoreUnavailable, too_many_operations
from zcproto.wire.message import decode_error, encode_body, encode_error

if TYPE_CHECKING:
    from zcproto.stores.operations import CircuitBreaker


T = TypeVar("T")

KEEP_MS = 600_000
NODES = itertools.count()
DIGEST = request_digest("pay", {"amount": 5})
OTHER = request_digest("pay", {"amount": 6})


class FakeStore:
    """The part of a store for answers. It can be out, also after an operation has taken effect.

    With `data_of` it is the store of another process with the same data. If it is shared, a claim that has expired
    is given away once its process shows no sign of life.
    """

    def __init__(self, shared: bool = False, data_of: FakeStore | None = None) -> None:
        self.shared = shared
        self.node = b"%d" % next(NODES) if shared else b""
        self.clock = FakeClock() if data_of is None else data_of.clock
        time = MonotonicClock(self.clock).wall
        self.answers = Answers(AnswerLimits(), time) if data_of is None else data_of.answers
        self.others = set(self.answers._entries)  # requests that another process has claimed
        self.is_orphan = False  # whether that process shows no sign of life
        self.out = False
        self.is_full = False
        self.fails_after_the_effect = False
        self.asked: list[str] = []
        self.held: asyncio.Future[None] | None = None

    async def _turn(self, name: str) -> None:
        self.asked.append(name)
        await asyncio.sleep(0)
        if self.held is not None:
            await self.held
        if self.is_full:
            raise too_many_operations()
        if self.out and not self.fails_after_the_effect:
            raise StoreUnavailable("it is out")

    def _end(self) -> None:
        if self.out:
            raise StoreUnavailable("no answer in time")

    async def claim(self, user: str, key: str, digest: bytes, lease_ms: int) -> Claim:
        await self._turn("claim")
        claim = self.answers.claim(user, key, digest + self.node, lease_ms)
        if claim.has_expired and self.is_orphan:
            self.answers.release(user, key)
            claim = self.answers.claim(user, key, digest + self.node, lease_ms)
        self._end()
        return replace(
            claim, is_own=claim.is_own and (user, key) not in self.others, is_orphan=self.is_orphan
        )

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        await self._turn("keep")
        self.answers.keep(user, key, answer, keep_ms)
        self._end()

    async def release_claim(self, user: str, key: str) -> None:
        await self._turn("release")
        self.answers.release(user, key)
        self._end()


class PassThrough(NamedTuple):
    """A circuit breaker that never opens."""

    store: FakeStore

    async def call(self, operation: Coroutine[Any, Any, T]) -> T:
        return await operation


class CacheHarness:
    """The cache of one process, with the time advanced by the test."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        store: FakeStore | None = None,
        limits: AnswerLimits = DEFAULT_LIMITS,
        max_running: int = DEFAULT_RUNNING,
    ) -> None:
        self.loop = loop
        self.clock = FakeClock() if store is None else store.clock
        self.tasks = EagerTasks(loop)
        self.timers = FakeTimers(self.clock.now())
        self.slept: list[float] = []
        self.while_asleep: Callable[[], object] = lambda: None
        self._until_saved_again: asyncio.Future[None] | None = None
        self.cache = IdempotencyCache(
            self.tasks,
            self.clock,
            DeadlineWheel(self.timers),
            breaker=None if store is None else cast("CircuitBreaker", PassThrough(store)),
            keep_ms=KEEP_MS,
            limits=limits,
            max_running=max_running,
            sleep=self.sleep,
        )
        self.ran = 0

    async def sleep(self, seconds: float) -> None:
        if seconds == SAVE_AGAIN_S:
            self._until_saved_again = self.loop.create_future()
            await self._until_saved_again
            return
        self.slept.append(seconds)
        self.clock.advance(seconds)
        await asyncio.sleep(0)
        self.while_asleep()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)
        self._in_loop(lambda: self.timers.advance(seconds))

    def store_reached(self) -> None:
        """Report that the store was reached after a gap."""
        self._in_loop(self.cache.store_reached)

    def save(self) -> None:
        """Write what the store has not taken."""
        self._in_loop(self.cache.save)

    def _in_loop(self, work: Callable[[], object]) -> None:
        self.loop.call_soon(work)
        self.turn()

    def save_again(self) -> None:
        """Let the time pass after which what the store has not taken is written again. That must be planned."""
        planned, self._until_saved_again = self._until_saved_again, None
        self.clock.advance(SAVE_AGAIN_S)
        planned.set_result(None)
        self.turn()

    @property
    def saves_again(self) -> bool:
        return self._until_saved_again is not None

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

    def hold(self, result: Any = "paid", **options: Any) -> Caller:
        """Begin a request whose run waits for `finish` of the caller."""
        gate = self.loop.create_future()
        caller = self.begin(result, wait=gate, **options)

        caller.finish = lambda: self.release(gate)
        self.turn()
        return caller

    def turn(self) -> None:
        for _ in range(60):
            self.loop.run_until_complete(asyncio.sleep(0))

    def release(self, gate: asyncio.Future[None]) -> None:
        """Let the runs go on that wait for a future."""
        gate.set_result(None)
        self.turn()

    def call(self, result: Any = "paid", **options: Any) -> Answer:
        caller = self.begin(result, **options)
        self.turn()
        return caller.answer


class Caller:
    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.waiting: Waiting
        self.finish: Callable[[], None] = lambda: None

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer


MakeHarness = Callable[..., CacheHarness]


def code(answer: Answer) -> Code:
    message = decode_error(answer.body)
    assert message.code == answer.code
    return Code(answer.code)
