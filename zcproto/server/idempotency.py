"""Requests with an idempotency key: each is run once for its user, whatever the connection, worker or retry.

What this file decides: whether a request is run, waits for one that runs, or gets an answer that is kept; which
answers are kept.

Rules:
- A run belongs to nobody's connection. A caller that cancels, is out of time or is gone ends its own wait, never
  the run: whoever asks again must find out what became of it.
- All callers of one key get one answer, and it is kept before the first of them gets it.
- An answer that says for certain that nothing was done (`NOT_RUN`) is not kept: the next caller runs the request.
  Every other one is, errors too: what failed half-way must not be done again by itself.
- Without the store nothing is run: running it without a promise is what the key is there to prevent.
- A claim lasts as long as an answer is kept. If the process that ran it is gone, nobody knows what was done, and
  that is what callers are told; it is not run again.

It must not know: connections, frames, how a method is run.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from operator import itemgetter
from typing import Any, Final, NamedTuple, Protocol

from zcproto.common.clock import Clock
from zcproto.errors import CallError, Code, FailedPrecondition, Unavailable, UnknownError
from zcproto.server.eager import EagerTasks
from zcproto.stores.answers import AnswerLimits, Answers
from zcproto.stores.store import Claim, ClaimState, StoreUnavailable
from zcproto.wire.message import encode_body

DEFAULT_KEEP_MS: Final = 600_000
"""Longer than a client goes on trying, and than a person who tries again by hand."""

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
"""Codes by whose name section 11.1 of the specification says that the request was not run."""

RETRY_MS: Final = 1_000

POLL_FIRST_S: Final = 0.05
POLL_LAST_S: Final = 1.0
"""How often the store is asked whether another process has the answer; twice as long each time."""

LEFT_BEHIND: Final = 1_024
"""Keys of which the store knows less than we do; beyond that the oldest are left to their time."""

_SWEPT: Final = 8
"""Old answers that are looked at for each request: twice as many as can be added would do."""

_USER_SHARE: Final = 4
"""A user's answers take at most such a part of all."""

_CONTAINERS: Final = frozenset({dict, list})

Name = tuple[str, str]
"""The user and the key."""

_Claimed = tuple[Name, int]
"""A claim in the store, by when it ends."""


class AnswerStore(Protocol):
    """What is asked of a store of sessions, or of one with a guard."""

    @property
    def shared(self) -> bool: ...

    async def claim(self, user: str, key: str, request_digest: bytes, wall: int, lease_ms: int) -> Claim: ...

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None: ...

    async def release_claim(self, user: str, key: str) -> None: ...


class Answer(NamedTuple):
    """The body of a RESPONSE (`code` 0), or of an ERROR."""

    code: int
    body: bytes


Execute = Callable[[], Awaitable[bytes]]
"""Runs the method; the encoded result. What it raises is the answer, too."""

Failed = Callable[[BaseException], Answer]
"""What an exception is answered with."""


class _Run:
    """A request that runs, or is about to. `until` is when its claim in the store ends."""

    __slots__ = ("digest", "until", "waiting")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.until = 0
        self.waiting: dict[Waiting, None] = {}


class Waiting:
    """A caller that waits for a run."""

    __slots__ = ("_run", "on_answer")

    def __init__(self, run: _Run, on_answer: Callable[[Answer], None]) -> None:
        self._run = run
        self.on_answer = on_answer
        run.waiting[self] = None

    def cancel(self) -> None:
        """Wait no longer. The run goes on."""
        self._run.waiting.pop(self, None)


class OnceOnly:
    """All requests with a key, of one process.

    `store` makes it hold across processes and restarts. Without one, answers are kept in memory, within `limits`
    (a store has its own).

    The counts are for operators: callers that got an answer again (`repeated`), that used a key for another
    request (`conflicts`), and that had to be told that nobody knows (`lost`).
    """

    def __init__(
        self,
        tasks: EagerTasks,
        clock: Clock,
        *,
        store: AnswerStore | None = None,
        keep_ms: int = DEFAULT_KEEP_MS,
        limits: AnswerLimits | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._store = store
        self._keep_ms = keep_ms
        self._limits = AnswerLimits() if limits is None else limits
        self._sleep = sleep
        self._running: dict[Name, _Run] = {}
        self._memory = Answers(self._limits)  # without a store all answers, else those it did not take
        self._not_kept: OrderedDict[Name, None] = OrderedDict()  # of those, what the store must still be told
        self._idle_claims: OrderedDict[_Claimed, None] = OrderedDict()  # ours, maybe, and nobody runs them
        self._settling = False
        self._no_runs = asyncio.Event()
        self._no_runs.set()
        self.repeated = 0
        self.conflicts = 0
        self.lost = 0

    @property
    def running(self) -> int:
        """Requests that run now, or ask the store whether they may."""
        return len(self._running)

    @property
    def bytes_kept(self) -> int:
        """Bytes of the answers that are kept here, and not in a store."""
        return self._memory.bytes

    @property
    def counts(self) -> dict[str, int]:
        """The figures for operators."""
        return {
            "running": self.running,
            "repeated": self.repeated,
            "conflicts": self.conflicts,
            "lost": self.lost,
        }

    async def wait_idle(self) -> None:
        """Return when nothing runs."""
        await self._no_runs.wait()

    def ask(
        self,
        user: str,
        key: str,
        digest: bytes,
        execute: Execute,
        failed: Failed,
        on_answer: Callable[[Answer], None],
    ) -> Answer | Waiting:
        """Run a request, unless it runs or has its answer. `digest` is what tells requests apart.

        Either the answer is there at once, or `on_answer` is called with it later.
        """
        name = (user, key)
        run = self._running.get(name)
        if run is not None:
            if run.digest != digest:
                return failed(self._conflict())
            self.repeated += 1
            return Waiting(run, on_answer)
        run = self._running[name] = _Run(digest)
        self._no_runs.clear()
        try:
            worker = self._tasks.start(self._answer(name, run, execute, failed))
        except BaseException:
            self._ended(name)
            raise
        if worker is None:
            self._ended(name)
            answer: Answer = self._tasks.result
            return answer

        def done(answer: Answer | None, error: BaseException | None) -> None:
            self._ended(name)
            if answer is None:
                assert error is not None
                answer = failed(error)
            for waiting in list(run.waiting):
                if waiting in run.waiting:
                    waiting.on_answer(answer)

        worker.done = done
        return Waiting(run, on_answer)

    def _ended(self, name: Name) -> None:
        del self._running[name]
        if not self._running:
            self._no_runs.set()

    async def _answer(self, name: Name, run: _Run, execute: Execute, failed: Failed) -> Answer:
        try:
            kept = await self._claim(name, run)
        except (Exception, asyncio.CancelledError) as error:
            return failed(error)
        if kept is not None:
            self.repeated += 1
            return kept
        try:
            answer = Answer(0, await execute())
        except (Exception, asyncio.CancelledError) as error:  # one that stops the process is no answer
            answer = failed(error)
        if answer.code in NOT_RUN:
            await self._release(name, run.until)
        else:
            await self._keep(name, run.digest, self._keepable(answer, failed))
        return answer

    # --- may it run? -----------------------------------------------------------------------------

    async def _claim(self, name: Name, run: _Run) -> Answer | None:
        """The answer that is kept; None if the request is to be run. Raises CallError if it may not be."""
        pause = POLL_FIRST_S
        while True:
            claim = await self._claim_once(name, run)
            if claim.state is ClaimState.CONFLICT:
                raise self._conflict()
            if claim.state is ClaimState.DONE:
                return self._kept(claim.answer)
            if claim.state is ClaimState.NEW:
                return None
            if (name, claim.until) in self._idle_claims:
                del self._idle_claims[(name, claim.until)]
                run.until = claim.until
                return None
            if self._store is None or not self._store.shared:
                self.lost += 1
                raise UnknownError(
                    "the server stopped while it ran this request: see whether it was done, then use another key"
                )
            await self._sleep(pause)
            if not run.waiting:
                raise Unavailable("nobody waits for it any more", {"retry_after_ms": RETRY_MS})
            pause = min(2 * pause, POLL_LAST_S)

    async def _claim_once(self, name: Name, run: _Run) -> Claim:
        wall, store = self._clock.wall(), self._store
        run.until = wall + self._keep_ms
        self._memory.expire(wall, _SWEPT)
        entry = self._memory.entry(*name)
        if store is None or (entry is not None and wall < entry.until):
            return self._memory.claim(*name, run.digest, wall, self._keep_ms)
        try:
            claim = await store.claim(*name, run.digest, wall, self._keep_ms)
        except StoreUnavailable as error:
            _remember(self._idle_claims, (name, run.until))  # it may be claimed all the same
            raise Unavailable(
                "requests with an idempotency key cannot be run just now", {"retry_after_ms": RETRY_MS}
            ) from error
        if self._not_kept and not self._settling:
            self._settling = True
            self._tasks.start(self._settle(store))
        return claim

    def _conflict(self) -> CallError:
        self.conflicts += 1
        return FailedPrecondition("this idempotency key was used for another request: use a new one")

    def _kept(self, data: bytes) -> Answer:
        if not data:
            self.lost += 1
            raise UnknownError("this request was run; its answer was not kept")
        return Answer(data[0], data[1:])

    # --- what becomes of the answer ----------------------------------------------------------------

    def _keepable(self, answer: Answer, failed: Failed) -> Answer:
        most = min(self._limits.user_bytes, self._limits.bytes)
        if 1 + len(answer.body) <= most:
            return answer
        return failed(UnknownError("this request was run; its answer was too large to be kept"))

    async def _keep(self, name: Name, digest: bytes, answer: Answer) -> None:
        data, wall = bytes([answer.code]) + answer.body, self._clock.wall()
        if self._store is not None:
            try:
                await self._store.keep_answer(*name, data, wall, self._keep_ms)
            except (StoreUnavailable, asyncio.CancelledError):
                self._memory.claim(*name, digest, wall, self._keep_ms)
                _remember(self._not_kept, name)
            else:
                return
        self._memory.keep(*name, data, wall, self._keep_ms)

    async def _release(self, name: Name, until: int) -> None:
        if self._store is None:
            self._memory.release(*name)
            return
        try:
            await self._store.release_claim(*name)
        except (StoreUnavailable, asyncio.CancelledError):
            _remember(self._idle_claims, (name, until))

    async def _settle(self, store: AnswerStore) -> None:
        """Give the store the answers that it did not take."""
        try:
            while self._not_kept:
                name = next(iter(self._not_kept))
                entry, wall = self._memory.entry(*name), self._clock.wall()
                if entry is not None and entry.answer is not None and wall < entry.until:
                    await store.keep_answer(*name, entry.answer, wall, entry.until - wall)
                self._not_kept.pop(name, None)
        except StoreUnavailable:
            pass  # they are all there still, for the next time
        finally:
            self._settling = False


def _remember(things: OrderedDict[Any, None], thing: Any) -> None:
    things[thing] = None
    if len(things) > LEFT_BEHIND:
        things.popitem(last=False)


def request_digest(method: str, params: Mapping[str, Any]) -> bytes:
    """What tells a request from others: its method and the values of its params.

    In which of its forms msgpack wrote a value, and the order of a map's keys, make no difference.
    """
    return sha256(encode_body([method, _ordered(params)])).digest()


def _ordered(value: Any) -> Any:
    if value.__class__ is dict:
        items = sorted(value.items(), key=itemgetter(0))
        return {key: _ordered(item) if item.__class__ in _CONTAINERS else item for key, item in items}
    return [_ordered(item) if item.__class__ in _CONTAINERS else item for item in value]


def answer_limits(max_bytes: int, per_user: int) -> AnswerLimits:
    """The limits of a store's answers, by what is configured."""
    return AnswerLimits(
        count=max(AnswerLimits().count, per_user),
        bytes=max_bytes,
        user_count=per_user,
        user_bytes=max_bytes // _USER_SHARE,
    )
