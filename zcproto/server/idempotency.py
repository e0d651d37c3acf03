"""Idempotency keys: a request with a key is run once per user, whatever the connection, worker or retry.

Decides: whether a request is run, waits for one in progress or gets a stored answer; which answers
are stored.

Rules:
- A run belongs to no connection. A caller that cancels, times out or disconnects ends its own wait and never the
  run, so that a retry can find out what happened.
- The runs of one user are bounded, with a caller or without, and so are their operations that wait for the store.
- All callers with one key get the same answer, which is stored before the first of them gets it.
- An answer that guarantees that nothing was done (`NOT_RUN`) is not stored: the next caller runs the request.
  Every other answer is, errors included: a request that failed half-way must not be repeated automatically.
- Without the store no request with a key is run: running it without that promise is what the key prevents.
- A claim lasts as long as an answer is stored, and is renewed while the request runs. If the process that ran the
  request is gone, the outcome is unknown; callers get that as an error and the request is not run again.
- A claim that may have expired, or that the store may have lost, is confirmed before the answer is stored or the
  claim is released: another process may have it by now.

It must not know: connections, frames, how a method is run.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from operator import itemgetter
from typing import Any, Final, NamedTuple

from zcproto.common.backoff import backoff_s
from zcproto.common.clock import MS_PER_SECOND, Clock, MonotonicClock
from zcproto.common.counts import Counts
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import (
    CallError,
    Code,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    UnknownError,
)
from zcproto.server.eager import EagerTasks
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits, Answers, too_many_requests
from zcproto.stores.base import Claim, ClaimState, StoreUnavailable
from zcproto.stores.operations import CircuitBreaker
from zcproto.wire.message import encode_body

DEFAULT_KEEP_MS: Final = 600_000
"""Longer than a client retries, and than a person who retries by hand."""

DEFAULT_RUNNING: Final = 256
"""Twice what one connection can have in flight, and a small part of what may wait for a store."""

NOT_RUN: Final = frozenset(
    {
        Code.UNAVAILABLE,
        Code.RESOURCE_EXHAUSTED,
        Code.STALE_TIMESTAMP,
        Code.TOKEN_EXPIRED,
        Code.TOKEN_REVOKED,
        Code.SESSION_REPLACED,
        Code.UNAUTHENTICATED,
    }
)
"""Codes that guarantee that the request was not run (zcp1.md, section 11.1)."""

RETRY_MS: Final = 1_000

SAVE_AGAIN_S: Final = RETRY_MS / 2_000
"""After a failure of the store that began no outage: before the caller's retry, which another process may get."""

POLL_FIRST_S: Final = 0.05
POLL_LAST_S: Final = 1.0
"""How often the store is polled for the answer of another process; the pause doubles each time."""

ORPHANED_S: Final = 1.0
"""How long the process that runs a request must have shown no sign of life until its outcome counts as unknown. A
failover of the store may lose the signs for a moment."""

RENEW_S: Final = 60.0
"""How often claims are renewed, at most: at least four times in the time that one lasts, so that three may fail."""

BATCH: Final = 200
"""Claims renewed at once, so that other operations get their turn."""

MAX_REMEMBERED: Final = 1_024
"""Keys whose state is missing in the store; beyond that the oldest expire there on their own."""

_SWEPT: Final = 8
"""Old answers checked for expiry at each request; two would keep up with new ones."""

_USER_SHARE: Final = 4
"""The answers of one user take at most 1/4 of the memory for all."""

_CONTAINERS: Final = frozenset({dict, list})

Name = tuple[str, str]
"""The user and the key."""


class Answer(NamedTuple):
    """The body of a RESPONSE (`code` 0), or of an ERROR."""

    code: int
    body: bytes


Execute = Callable[[], Awaitable[bytes]]
"""Runs the method and returns the encoded result. An exception is an answer too."""

AnswerError = Callable[[BaseException], Answer]
"""Returns the answer for an exception."""


@dataclass(slots=True, eq=False)
class _KeyedRun:
    """A request in progress."""

    digest: bytes
    waiting: dict[Waiting, None] = field(default_factory=dict)
    is_begun: bool = False
    """Whether its method runs here, or has run."""
    is_over: bool = False
    """Whether its method has ended."""
    claimed_until: float = 0.0
    """Until when the claim is certainly that of this process, in monotonic seconds."""
    renewal: asyncio.Task[bool] | None = None
    """The last renewal of the claim, maybe in progress."""


class Waiting:
    """A caller that waits for a run."""

    __slots__ = ("_is_first", "_run", "on_answer")

    def __init__(self, run: _KeyedRun, on_answer: Callable[[Answer], None], *, is_first: bool) -> None:
        self._run = run
        self._is_first = is_first
        self.on_answer = on_answer
        run.waiting[self] = None

    @property
    def has_begun(self) -> bool:
        """Whether the method runs for the request of this caller, and not for another one with its key."""
        return self._is_first and self._run.is_begun

    def cancel(self) -> None:
        """Stop waiting. The run goes on."""
        self._run.waiting.pop(self, None)


class IdempotencyCache:
    """The requests with a key in one process.

    With `breaker`, around a store, idempotency holds across processes and restarts. Without one, answers are kept
    in memory within `limits` (a store has its own limits).

    Counters for operators: callers that got a stored answer or joined a run (`repeated`), that used a key for
    another request (`conflicts`), whose outcome is unknown (`lost`), and who had `max_running` runs in progress
    (`refused`).
    """

    def __init__(
        self,
        tasks: EagerTasks,
        clock: Clock,
        wheel: DeadlineWheel,
        *,
        breaker: CircuitBreaker | None = None,
        keep_ms: int = DEFAULT_KEEP_MS,
        limits: AnswerLimits = DEFAULT_LIMITS,
        max_running: int = DEFAULT_RUNNING,
        running_of: Counts | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._wheel = wheel
        self._breaker = breaker
        self._keep_ms = keep_ms
        self._keep_s = keep_ms / MS_PER_SECOND
        self._renew_s = min(self._keep_s / 4, RENEW_S)
        self._limits = limits
        self._max_running = max_running
        self._sleep = sleep
        self._running: dict[Name, _KeyedRun] = {}
        self._running_of = Counts() if running_of is None else running_of
        # All answers without a store, else those it failed to store.
        self._memory = Answers(limits, MonotonicClock(clock).wall)
        # Answers in memory, to be written to the store; and requests that it may hold a claim of this process for,
        # though nothing runs: they are released when it is back. Both by name, with the digest of the request.
        self._unsaved: OrderedDict[Name, bytes] = OrderedDict()
        self._idle_claims: OrderedDict[Name, bytes] = OrderedDict()
        self._is_saving = self._is_save_planned = False
        self._is_renewing = self._is_renewal_due = False
        self.deadline_tick = 0
        self.is_draining = False
        """Whether callers are sent away to wait at another server for the run of a third one."""
        self._no_runs = asyncio.Event()
        self._no_runs.set()
        self.repeated = 0
        self.conflicts = 0
        self.lost = 0
        self.refused = 0

    @property
    def running(self) -> int:
        """The number of requests in progress, including those that wait for their claim."""
        return len(self._running)

    @property
    def bytes_kept(self) -> int:
        """The bytes of the answers in memory."""
        return self._memory.bytes

    @property
    def counts(self) -> dict[str, int]:
        """The counters for operators."""
        return {
            "running": self.running,
            "repeated": self.repeated,
            "conflicts": self.conflicts,
            "lost": self.lost,
            "refused": self.refused,
        }

    async def wait_idle(self) -> None:
        """Wait until no request is in progress, and the store has all that is to be written to it."""
        await self._no_runs.wait()
        while self._unsaved or self._idle_claims or self._is_saving:
            self.save()
            await self._sleep(POLL_FIRST_S)

    def submit(
        self,
        user: str,
        key: str,
        digest: bytes,
        execute: Execute,
        answer_error: AnswerError,
        on_answer: Callable[[Answer], None],
    ) -> Answer | Waiting:
        """Run a request unless it is in progress or has an answer. `digest` identifies its content.

        Return the answer if it is available at once; otherwise `on_answer` is called with it later.
        """
        name = (user, key)
        run = self._running.get(name)
        if run is not None:
            if run.digest != digest:
                return answer_error(self._conflict())
            self.repeated += 1
            return Waiting(run, on_answer, is_first=False)
        if not self._running_of.add(user, self._max_running):
            self.refused += 1
            return answer_error(too_many_requests("of this user "))
        run = self._running[name] = _KeyedRun(digest)
        self._no_runs.clear()
        try:
            worker = self._tasks.start(self._answer(name, run, execute, answer_error))
        except BaseException:
            self._ended(name)
            raise
        if worker is None:
            self._ended(name)
            answer: Answer = self._tasks.result
            return answer

        if not self.deadline_tick:
            self._wheel.set(self, self._clock.now() + self._renew_s)

        def done(answer: Answer | None, error: BaseException | None) -> None:
            self._ended(name)
            if answer is None:
                assert error is not None
                answer = answer_error(error)
            for waiting in list(run.waiting):
                if waiting in run.waiting:
                    waiting.on_answer(answer)

        worker.done = done
        return Waiting(run, on_answer, is_first=True)

    def _ended(self, name: Name) -> None:
        del self._running[name]
        self._running_of.remove(name[0])
        if not self._running:
            self._wheel.discard(self)
            self._no_runs.set()

    async def _answer(
        self, name: Name, run: _KeyedRun, execute: Execute, answer_error: AnswerError
    ) -> Answer:
        try:
            stored = await self._claim(name, run)
        except asyncio.CancelledError as error:
            await self._release_if_own(name, run.digest)
            return answer_error(error)
        except Exception as error:
            return answer_error(error)
        if stored is not None:
            self.repeated += 1
            return stored
        if self.is_draining and not run.waiting:  # they were sent away, and may be at another server by now
            await self._release(name, run)
            return answer_error(self._sent_away())
        run.is_begun = True
        try:
            answer = Answer(0, await execute())
        except (Exception, asyncio.CancelledError) as error:  # not one that stops the process
            answer = answer_error(error)
        if answer.code in NOT_RUN:
            await self._release(name, run)
        else:
            await self._keep(name, run, self._fit(answer, answer_error))
        return answer

    # --- claiming --------------------------------------------------------------------------------

    async def _claim(self, name: Name, run: _KeyedRun) -> Answer | None:
        """Return the stored answer, or None if the request is to be run. Raises CallError if it may not be."""
        polls, orphaned_s = 0, 0.0
        while True:
            until = self._clock.now() + self._keep_s
            claim = await self._claim_once(name, run)
            if claim.state is ClaimState.CONFLICT:
                raise self._conflict()
            if claim.state is ClaimState.DONE:
                return self._stored(claim.answer)
            is_idle = claim.is_own and name in self._idle_claims
            if claim.state is ClaimState.NEW or is_idle:
                self._idle_claims.pop(name, None)
                run.claimed_until = until
                return None
            is_lost = (
                claim.is_orphan or claim.is_own
            )  # nothing runs for an own one, which may just be released
            if not self._is_shared or (is_lost and orphaned_s >= ORPHANED_S):
                self.lost += 1
                raise UnknownError(
                    "the server stopped while it ran this request: check whether it was done, then use another key"
                )
            polls += 1
            pause = backoff_s(polls, POLL_FIRST_S, POLL_LAST_S)
            await self._sleep(pause)
            orphaned_s = orphaned_s + pause if is_lost else 0.0
            if self.is_draining or not run.waiting:
                raise self._sent_away()

    async def _claim_once(self, name: Name, run: _KeyedRun) -> Claim:
        breaker = self._breaker
        self._memory.expire(_SWEPT)
        if breaker is None or self._memory.entry(*name) is not None:
            return self._memory.claim(*name, run.digest, self._keep_ms)
        try:
            claim = await breaker.call(breaker.store.claim(*name, run.digest, self._keep_ms))
        except StoreUnavailable as error:
            _remember(self._idle_claims, name, run.digest)  # it may have been claimed nevertheless
            self._save_later()
            raise Unavailable(
                "the session store does not answer, so no request with an idempotency key is run: try again",
                {"retry_after_ms": RETRY_MS},
            ) from error
        self.save()
        return claim

    @property
    def _is_shared(self) -> bool:
        return self._breaker is not None and self._breaker.store.shared

    def _is_mine(self, claim: Claim) -> bool:
        """Return whether a claim that was made again for a run of this process is that of this process."""
        return claim.state is ClaimState.NEW or (
            claim.state is ClaimState.RUNNING and (claim.is_own or not self._is_shared)
        )

    def _sent_away(self) -> CallError:
        return Unavailable(
            "this server no longer waits for the run of this request; send it again",
            {"retry_after_ms": RETRY_MS},
        )

    def _conflict(self) -> CallError:
        self.conflicts += 1
        return FailedPrecondition("this idempotency key was used for another request; use a new one")

    def _stored(self, data: bytes) -> Answer:
        if not data:
            self.lost += 1
            raise UnknownError("this request was run, but its answer was not kept; check what it did")
        return Answer(data[0], data[1:])

    # --- renewing claims ---------------------------------------------------------------------------

    def handle_deadline(self, now: float) -> None:
        self._start_renewal()
        self._wheel.set(self, now + self._renew_s)

    def stop_renewing(self) -> None:
        """Renew no more claims, even if a method does not end."""
        self._wheel.discard(self)

    def store_reached(self) -> None:
        """Write what the store has missed, and confirm all claims.

        Call it when the store was reached after a gap, in which it may have lost them.
        """
        for run in self._running.values():
            run.claimed_until = 0.0
        self._start_renewal()
        self.save()

    def _start_renewal(self) -> None:
        self._is_renewal_due = True
        if not self._is_renewing:
            self._is_renewing = True
            self._tasks.start(self._renew())

    async def _renew(self) -> None:
        try:
            while self._is_renewal_due:
                self._is_renewal_due = False
                await self._renew_claims()
        finally:
            self._is_renewing = False

    async def _renew_claims(self) -> None:
        """Renew the claims of the runs in progress, up to the first failure; those made lately need it later."""
        recent = self._clock.now() + self._keep_s - self._renew_s / 2
        due = [item for item in self._running.items() if item[1].is_begun and item[1].claimed_until < recent]
        for start in range(0, len(due), BATCH):
            renewals = []
            for name, run in due[start : start + BATCH]:
                if not run.is_over:
                    run.renewal = asyncio.create_task(self._renew_claim(name, run), name="zcproto-store")
                    renewals.append(run.renewal)
            outcomes = await asyncio.gather(*renewals, return_exceptions=True)
            if any(isinstance(outcome, BaseException) for outcome in outcomes):
                break

    async def _renew_claim(self, name: Name, run: _KeyedRun) -> bool:
        """Extend the claim of a run, or make it again if the store has lost it. Return False if another process has
        it.
        """
        until, breaker = self._clock.now() + self._keep_s, self._breaker
        if breaker is None:
            claim = self._memory.claim(*name, run.digest, self._keep_ms)
        else:
            claim = await breaker.call(breaker.store.claim(*name, run.digest, self._keep_ms))
        if self._is_mine(claim):
            run.claimed_until = until
            return True
        return False

    async def _has_claim(self, name: Name, run: _KeyedRun) -> bool:
        """Return whether the claim of a run that has ended is still that of this process."""
        run.is_over = True
        if run.renewal is not None:  # in the store, it must come before what follows
            await asyncio.wait([run.renewal])
        return self._clock.now() < run.claimed_until or await self._renew_claim(name, run)

    # --- storing the answer ------------------------------------------------------------------------

    def _fit(self, answer: Answer, answer_error: AnswerError) -> Answer:
        most = min(self._limits.user_bytes, self._limits.bytes)
        if 1 + len(answer.body) <= most:
            return answer
        return answer_error(UnknownError("this request was run, but its answer was too large to be kept"))

    async def _keep(self, name: Name, run: _KeyedRun, answer: Answer) -> None:
        data, breaker = bytes([answer.code]) + answer.body, self._breaker
        if breaker is None:
            with suppress(ResourceExhausted):  # the claim had expired, and there is no room for another one
                await self._has_claim(name, run)
            self._memory.keep(*name, data, self._keep_ms)
            return
        try:
            if await self._has_claim(name, run):
                await breaker.call(breaker.store.keep_answer(*name, data, self._keep_ms))
        except (StoreUnavailable, ResourceExhausted, asyncio.CancelledError) as error:
            self._memory.claim(*name, run.digest, self._keep_ms)
            _remember(self._unsaved, name, run.digest)
            self._save_later(error)
            self._memory.keep(*name, data, self._keep_ms)

    async def _release(self, name: Name, run: _KeyedRun) -> None:
        breaker = self._breaker
        if breaker is None:
            with suppress(ResourceExhausted):
                await self._has_claim(name, run)
            self._memory.release(*name)
            return
        try:
            if await self._has_claim(name, run):
                await breaker.call(breaker.store.release_claim(*name))
        except (StoreUnavailable, ResourceExhausted, asyncio.CancelledError) as error:
            _remember(self._idle_claims, name, run.digest)
            self._save_later(error)

    async def _release_if_own(self, name: Name, digest: bytes) -> None:
        """Release the claim of a run that was cancelled before it knew whether it has one."""
        breaker = self._breaker
        if breaker is not None:
            with suppress(StoreUnavailable, ResourceExhausted):
                claim = await breaker.call(breaker.store.claim(*name, digest, self._keep_ms))
                if claim.state is ClaimState.NEW or claim.is_own:
                    await breaker.call(breaker.store.release_claim(*name))

    def _save_later(self, error: BaseException | None = None) -> None:
        """Plan the next attempt after a failure, unless that was the end of the server."""
        is_ending = isinstance(error, asyncio.CancelledError)
        if not self._is_save_planned and not is_ending:
            self._is_save_planned = True
            self._tasks.start(self._save_after_pause())

    async def _save_after_pause(self) -> None:
        await self._sleep(SAVE_AGAIN_S)
        self._is_save_planned = False
        self.save()

    def save(self) -> None:
        """Start to write the answers to the store that it failed to store, and to release the claims that nothing
        runs for: the request may come to another process. Call it when the store is back.
        """
        if (self._unsaved or self._idle_claims) and not self._is_saving and self._breaker is not None:
            self._is_saving = True
            self._tasks.start(self._save(self._breaker))

    async def _save(self, breaker: CircuitBreaker) -> None:
        try:
            while self._unsaved:
                name = next(iter(self._unsaved))
                entry = self._memory.entry(*name)
                if entry is not None and entry.answer is not None:
                    left_ms = self._memory.left_ms(entry)
                    claim = await breaker.call(breaker.store.claim(*name, entry.digest, left_ms))
                    if self._is_mine(claim):  # else another process has run it since
                        await breaker.call(breaker.store.keep_answer(*name, entry.answer, left_ms))
                self._unsaved.pop(name, None)
            for name, digest in list(self._idle_claims.items()):
                if name not in self._running:
                    await self._release_idle(breaker, name, digest)
        except (StoreUnavailable, ResourceExhausted):
            self._save_later()
        finally:
            self._is_saving = False

    async def _release_idle(self, breaker: CircuitBreaker, name: Name, digest: bytes) -> None:
        """Release a claim if it is of this process. A request that comes meanwhile waits for that."""
        self._idle_claims.pop(name, None)
        try:
            claim = await breaker.call(breaker.store.claim(*name, digest, self._keep_ms))
            if name in self._running:
                _remember(self._idle_claims, name, digest)  # it may run by this claim
            elif claim.state is ClaimState.NEW or claim.is_own:
                await breaker.call(breaker.store.release_claim(*name))
        except (StoreUnavailable, ResourceExhausted):
            _remember(self._idle_claims, name, digest)
            raise


def _remember(names: OrderedDict[Name, bytes], name: Name, digest: bytes) -> None:
    names[name] = digest
    if len(names) > MAX_REMEMBERED:
        names.popitem(last=False)


def request_digest(method: str, params: Mapping[str, Any]) -> bytes:
    """Return a digest of a request's method and params.

    It depends neither on the encoding msgpack chose for a value nor on the order of keys in a map.
    """
    return sha256(canonical_request(method, params)).digest()


def canonical_request(method: str, params: Mapping[str, Any]) -> bytes:
    """Return a request's method and params in a form that does not depend on how they were sent."""
    return encode_body([method, _ordered(params)])


def _ordered(value: Any) -> Any:
    if value.__class__ is dict:
        items = sorted(value.items(), key=itemgetter(0))
        return {key: _ordered(item) if item.__class__ in _CONTAINERS else item for key, item in items}
    return [_ordered(item) if item.__class__ in _CONTAINERS else item for item in value]


def answer_limits(max_bytes: int, per_user: int) -> AnswerLimits:
    """Return the limits of stored answers from the configuration."""
    return AnswerLimits(
        count=max(DEFAULT_LIMITS.count, per_user),
        bytes=max_bytes,
        user_count=per_user,
        user_bytes=max_bytes // _USER_SHARE,
    )
