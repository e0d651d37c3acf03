"""Keeps the sessions that are known here and the store together: at the start, during an outage, after it, and
while other processes write to the store.

What this file decides:
- Revocations that waited come to the store before anything else, and before a token is accepted.
- A store that is not shared is loaded whole; nothing of it can be asked for that is not known here.
- What another process has changed is forgotten here if no connection uses it; else the store is asked within the
  second what became of it.
- A store that has lost what it kept (EMPTIED) gets the sessions that are known here once more: those in use before
  anything else, as nobody who is let in shall notice. Not after the grace: then nobody is let in any more. For a
  while it is told again and again what was revoked, as another process may have brought that back.
- What may have been created though nobody was told is ended.

It must not know: connections (but for whether one uses a session), how a call is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import CallError, Code, ConfigError, Unavailable
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, SessionRegistry
from zcproto.sessions.health import NEVER, Alert, StoreHealth
from zcproto.sessions.record import EndedRecord, SessionRecord, UserLimit
from zcproto.sessions.token import id_text
from zcproto.stores.guarded import GuardedStore
from zcproto.stores.pending import PendingRevocations, Revocation
from zcproto.stores.store import MAX_LISTED, Change, ChangeKind, SessionStore, StoreUnavailable

TOUCH_INTERVAL_S: Final = 30.0
"""How old the last uses are that the store knows: idle limits are minutes."""

SLOTS: Final = 2_000
"""Sessions looked at in one turn of the loop, about a millisecond."""

LOADED_AT_ONCE: Final = 200
"""Records taken in in one turn, about as long."""

EXPIRED_AT_ONCE: Final = 4_000
ROOM_S: Final = 0.02
"""For others, after a slice that was cut short because they wait."""

ENDED_AT_ONCE: Final = 256
ASKED_AT_ONCE: Final = 64

OPEN_LIMIT_S: Final = 30.0
"""For opening a store, and for each batch when it is loaded: nobody waits for that."""

CLOSE_LIMIT_S: Final = 2.0
PAUSE_S: Final = 0.05
"""Before a question is asked again that failed without an outage."""

REPEATS_S: Final = (*map(float, range(1, 11)), 20.0, 30.0)
"""After a loss what was revoked is revoked again: each process brings back what it knows when it finds the store
working, some at once, and all of them by then."""

CHANGES: Final = 4_096
ORPHANS: Final = 8_192
CLOCK_SKEW_MS: Final = 10_000
"""Between processes that share a store."""

_ALONE: Final = 0.5
"""The part of its timeout in which the store alone is asked to end a session."""

_DISK_PART: Final = 0.7
"""As much of it for writing that down, if that has to be: together little more than the timeout."""

DISK_AT_LEAST_S: Final = 0.05
"""For writing down a revocation, with however short a timeout of the store."""

_NO_LIMIT: Final = UserLimit(2**31 - 1, "refuse", None)
_REASONS: Final = {
    Code.TOKEN_REVOKED: EndReason.REVOKED_ELSEWHERE,
    Code.SESSION_REPLACED: EndReason.REPLACED,
    Code.TOKEN_EXPIRED: EndReason.UNKNOWN,
}

_TASK: Final = "zcproto-store"
_UPKEEP: Final = "zcproto-store-upkeep"

T = TypeVar("T")
OnEvent = Callable[[str, Mapping[str, Any]], None]
"""Gets what is logged of the store that somebody may have to be told of: the event's name, and its values."""

log = get_logger("zcproto.store")


class Ask(Protocol):
    """`GuardedStore.ask` or `attempt`."""

    def __call__(self, operation: Coroutine[Any, Any, T], /) -> Coroutine[Any, Any, T]: ...


class _Repeated(NamedTuple):
    """What is revoked again after a loss, and when (monotonic seconds, the next one last)."""

    times: list[float]
    revocations: list[Revocation]


class StoreKeeper:
    """One process's sessions and their store. `is_used` says whether a connection uses a session, by its id's text.

    `store` is guarded. `on_event` hears of outages and losses. Whoever asks the store raises
    `unavailable()` when it fails.
    """

    def __init__(
        self,
        store: SessionStore,
        registry: SessionRegistry,
        pending: PendingRevocations,
        *,
        is_used: Callable[[str], bool],
        wheel: DeadlineWheel,
        clock: Clock,
        random: Callable[[], float],
        timeout: float,
        grace: float,
        cleanup_interval: float,
        keep_ended_ms: int,
        on_event: OnEvent = lambda event, values: None,
    ) -> None:
        self.registry = registry
        self.pending = pending
        self.health = StoreHealth(grace_s=grace, timeout_s=timeout, random=random, on_alert=self._alerted)
        self.store = GuardedStore(store, self.health, timeout=timeout, now=clock.now)
        self._is_used = is_used
        self._wheel = wheel
        self._clock = clock
        self._cleanup_interval = cleanup_interval
        self._keep_ended_ms = keep_ended_ms
        self._on_event = on_event
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_open = False
        self._is_loaded = False
        self._is_stopping = False
        self._touched_until = 0
        self._orphans: OrderedDict[bytes, None] = OrderedDict()
        self._replayed: list[Revocation] = []  # of users, or of all
        self._repeated: list[_Repeated] = []
        self._is_repeating = False
        # What others have changed
        self._all_changed = False
        self._is_emptied = False
        self._to_check: dict[bytes, int] = {}  # with the change for which it has to be done
        self._to_bring_back: dict[bytes, int] = {}
        self._checking = False
        self._changes: OrderedDict[bytes, int] = OrderedDict()
        self._all_changed_at = 0
        self.changes = 0
        self.replayed = 0
        self.deadline_tick = 0

    # --- start and end -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Bring the store what waited for it, and take in what it has.

        A store that is out is no fault: every token is refused until it can be asked. Raises ConfigError for what
        waiting cannot mend.
        """
        try:
            await self.pending.open()
        except StoreUnavailable as error:
            raise ConfigError([f"revocations of before cannot be read: {error.reason}"]) from error
        for copy in self.pending.damaged:
            log.error("revocations.damaged", copy=str(copy))
            self._on_event("revocations.damaged", {"copy": str(copy)})
        try:
            await self._recover()
        except StoreUnavailable as error:
            self.store.reason = error.reason
            self.health.begin_outage(self._clock.now(), grace=False)
        except BaseException:
            await self.pending.close()
            await self.store.close()
            raise
        self._every(TOUCH_INTERVAL_S, self.write_uses)
        self._every(self._cleanup_interval, self.clean)

    async def stop(self) -> None:
        """Finish what is under way, write the last uses, and let go of the store."""
        self._is_stopping = True
        self._wheel.discard(self)
        running = self._tasks - {task for task in self._tasks if task.get_name() == _UPKEEP}
        if running:
            await asyncio.wait(running, timeout=2 * self.store.timeout)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CLOSE_LIMIT_S)
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.write_uses()
        except (StoreUnavailable, TimeoutError):
            log.warning("store.uses_not_written", reason=self.store.reason)
        await self.pending.close()
        await self.store.close()

    def spawn(self, work: Coroutine[Any, Any, T], name: str = _TASK) -> asyncio.Task[T]:
        """Do something that goes on when whoever asked for it is gone."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """As `spawn`, and wait for it."""
        task = self.spawn(work)
        await asyncio.wait([task])
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is for whoever waits for the task, if that is still there

    def in_background(self, work: Coroutine[Any, Any, object], name: str = _TASK) -> None:
        """As `spawn`, where nobody waits."""

        async def watched() -> None:
            try:
                await work
            except (StoreUnavailable, CallError):
                pass  # they are counted and logged where they are raised
            except Exception as error:
                log.error("store.task_failed", exc_info=error)

        self.spawn(watched(), name)

    def _every(self, interval: float, work: Callable[[], Awaitable[object]]) -> None:
        async def forever() -> None:
            while True:
                await asyncio.sleep(interval)
                try:
                    await work()
                except StoreUnavailable:
                    continue  # the health has been told; it is done when the store is back
                except Exception as error:
                    log.error("store.upkeep_failed", what=work.__name__, exc_info=error)

        self.spawn(forever(), _UPKEEP)

    # --- health ------------------------------------------------------------------------------------

    @property
    def is_shared(self) -> bool:
        return self.store.shared

    def check(self) -> None:
        """Raise Unavailable if the store is not asked just now."""
        if not self.health.is_asked:
            raise self.unavailable()

    def unavailable(self) -> Unavailable:
        """What callers are told who need the store."""
        return Unavailable(
            "the store of sessions does not answer: try again",
            {"retry_after_ms": self.health.retry_after_ms(self._clock.now())},
        )

    def handle_deadline(self, now: float) -> None:
        if self.health.handle_time(now):
            self.in_background(self._probe())
        if not self._is_repeating and self._repeats_at() <= now:
            self._is_repeating = True
            self.in_background(self._revoke_again())
        self._set_deadline()

    def _set_deadline(self) -> None:
        if not self._is_stopping:
            self._wheel.set(self, min(self.health.next_deadline(), self._repeats_at()))

    def _alerted(self, alert: Alert) -> None:
        health, registry = self.health, self.registry
        if alert is Alert.BEGAN:
            log.error(
                "store.degraded", reason=self.store.reason, sessions=len(registry), pending=len(self.pending)
            )
            self._on_event("store.degraded", {"reason": self.store.reason, "sessions": len(registry)})
        elif alert is Alert.GRACE_OVER:
            registry.refuse_all()
            log.error("store.grace_over", reason=self.store.reason)
            self._on_event("store.grace_over", {"reason": self.store.reason})
        else:
            registry.stop_refusing()
            seconds = round(self._clock.now() - health.since, 3)
            log.warning("store.recovered", seconds=seconds, replayed=self.replayed)
            self._on_event("store.recovered", {"seconds": seconds, "replayed": self.replayed})
        self._set_deadline()

    async def _probe(self) -> None:
        """Find out whether the store is back."""
        try:
            await self._recover()
        except StoreUnavailable as error:
            self.store.reason = error.reason
            self.health.probe_failed(self._clock.now())
        except Exception as error:  # such as one of the configuration: it can be mended while we run
            self.store.reason = str(error)
            log.error("store.probe_failed", exc_info=error)
            self.health.probe_failed(self._clock.now())
        except BaseException:
            self.health.probe_failed(self._clock.now())
            raise
        else:
            self.health.probe_succeeded(self._clock.now())
            self._start_checking()
        self._set_deadline()

    async def _recover(self) -> None:
        """Have the store and what is known here say the same. No turn passes between the end of this and what the
        caller does next, so that nothing new waits."""
        guarded = self.store
        attempt = guarded.attempt
        if self._is_open:
            await attempt(guarded.store.ping())
        else:
            await attempt(guarded.store.open(self._changed), OPEN_LIMIT_S)
            self._is_open = True
        self.replayed = 0
        self._replayed.clear()
        await self._replay(attempt)
        await self._end_orphans(attempt)
        if guarded.shared:
            await self._check_all(attempt)
        elif not self._is_loaded:
            await self._load()
        while len(self.pending):
            await self._replay(attempt)

    # --- what others have changed --------------------------------------------------------------------

    def changed_since(self, session_id: bytes, changes: int) -> bool:
        """Whether another process may have changed a session since `changes` was this number."""
        return self._all_changed_at > changes or self._changes.get(session_id, 0) > changes

    def _changed(self, change: Change) -> None:
        """The store says what another process did."""
        self.changes += 1
        if change.kind is not ChangeKind.SESSION:
            self._all_changed_at = self.changes
            self._changes.clear()
            self._all_changed = True
            if change.kind is ChangeKind.EMPTIED:
                self._is_emptied = True
                log.error("store.emptied", sessions=len(self.registry))
                self._on_event("store.emptied", {"sessions": len(self.registry)})
            self._start_checking()
            return
        self._changes.pop(change.id, None)
        self._changes[change.id] = self.changes
        if len(self._changes) > CHANGES:
            _, self._all_changed_at = self._changes.popitem(last=False)
        if self._is_used(id_text(change.id)):
            self._to_check[change.id] = self.changes
            self._start_checking()
        else:
            self.registry.forget(change.id)

    def _start_checking(self) -> None:
        # During an outage nothing is asked; all is checked when it is over.
        if not self._checking and self.health.is_asked and not self._is_stopping:
            self._checking = True
            self.in_background(self._check_changed())

    async def _check_changed(self) -> None:
        ask = self.store.ask
        try:
            while self.health.is_asked:
                if self._all_changed:
                    work = self._check_all(ask)
                elif self._to_check:
                    work = self._check_some(ask, _first_of(self._to_check))
                elif self._to_bring_back:
                    work = self._bring_back(ask, _first_of(self._to_bring_back))
                else:
                    break
                try:
                    await work
                except StoreUnavailable:
                    await asyncio.sleep(PAUSE_S)
        finally:
            self._checking = False

    async def _check_all(self, ask: Ask) -> None:
        """Forget what is not in use, and ask the store for what is; or give it what it has lost."""
        emptied, used = self._is_emptied and not self.registry.closed, []

        def is_kept(session_id: bytes) -> bool:
            is_used = self._is_used(id_text(session_id))
            if is_used:
                used.append(session_id)
            elif emptied:
                self._to_bring_back[session_id] = self.changes
            return is_used or emptied

        self._all_changed = self._is_emptied = False
        try:
            start = -1
            while start:
                start = self.registry.forget_unless(is_kept, max(start, 0), SLOTS)
                await asyncio.sleep(0)
            one_by_one = self._bring_back if emptied else self._check_some
            for first in range(0, len(used), ASKED_AT_ONCE):
                await one_by_one(ask, used[first : first + ASKED_AT_ONCE])
        except BaseException:
            self._all_changed, self._is_emptied = True, self._is_emptied or emptied
            raise
        if emptied:
            self._revoke_again_later()

    async def _check_some(self, ask: Ask, ids: Iterable[bytes]) -> None:
        """Bring what is known of sessions to what the store says."""
        await self._each(self._to_check, ids, partial(self._check_one, ask))

    async def _each(
        self,
        waiting: dict[bytes, int],
        ids: Iterable[bytes],
        work: Callable[[bytes], Awaitable[None]],
    ) -> None:
        """Do something for sessions that wait for it, all at once. One for which it has to be done anew by the time
        that all are done goes on waiting."""
        begun = {session_id: waiting.get(session_id) for session_id in ids}
        await asyncio.gather(*map(work, begun))
        for session_id, change in begun.items():
            if waiting.get(session_id) == change:
                waiting.pop(session_id, None)

    async def _check_one(self, ask: Ask, session_id: bytes) -> None:
        if not await self._ask_again(ask, session_id):
            self.registry.end(session_id, Code.TOKEN_REVOKED, EndReason.ELSEWHERE, self._clock.wall())

    async def _ask_again(self, ask: Ask, session_id: bytes) -> bool:
        """Whether the store knows anything of a session; what it does is taken in."""
        found = await self.fetch(partial(self.store.store.get, session_id), ask)
        self.take_in(found)
        return found is not None

    def take_in(self, found: SessionRecord | EndedRecord | None) -> None:
        """Know what the store says of a session."""
        if isinstance(found, SessionRecord):
            self.registry.restore(found, make_room=self.store.shared)
        elif found is not None:
            self.end_here(found)

    async def _bring_back(self, ask: Ask, ids: Iterable[bytes]) -> None:
        """Give the store sessions that it has lost."""
        await self._each(self._to_bring_back, ids, partial(self._bring_back_one, ask))

    async def _bring_back_one(self, ask: Ask, session_id: bytes) -> None:
        record = self.registry.record(session_id)
        if record is not None:
            await ask(self.store.store.create(record, _NO_LIMIT))
            # Another process may have been first, and its session may have been changed or ended since.
            await self._ask_again(ask, session_id)

    async def settle(self, session_id: bytes) -> None:
        """Before something is asked of the store for a session: it shall have it."""
        if session_id in self._to_bring_back:
            await self._bring_back(self.store.ask, [session_id])

    def _revoke_again_later(self) -> None:
        since = self._clock.wall() - self._keep_ended_ms
        ended = self.registry.ended_since(Code.TOKEN_REVOKED, since)
        again = [Revocation(each.ended_at, each.id) for each in ended]
        self._repeat([*self._replayed, *again])

    def _repeat(self, revocations: list[Revocation]) -> None:
        """Revoke this again for a while."""
        if revocations:
            now = self._clock.now()
            times = [now + after_s for after_s in reversed(REPEATS_S)]
            self._repeated.append(_Repeated(times, revocations))
            self._set_deadline()

    def _repeats_at(self) -> float:
        """When something has to be revoked again; not while that is under way, or the store is out."""
        if self._is_repeating or not self.health.is_asked:
            return NEVER
        return min((each.times[-1] for each in self._repeated), default=NEVER)

    async def _revoke_again(self) -> None:
        try:
            for each in list(self._repeated):
                now = self._clock.now()
                if each.times[-1] > now:
                    continue
                await self._end_again(self.store.ask, each.revocations)
                while each.times and each.times[-1] <= now:
                    each.times.pop()
                if not each.times:
                    self._repeated.remove(each)
        except StoreUnavailable:
            await asyncio.sleep(PAUSE_S)
            raise
        finally:
            self._is_repeating = False
            self._set_deadline()

    async def fetch(
        self,
        operation: Callable[[], Coroutine[Any, Any, SessionRecord | EndedRecord | None]],
        ask: Ask | None = None,
    ) -> SessionRecord | EndedRecord | None:
        """What the store says of a session, no older than the last change that was told of it."""
        while True:
            changes = self.changes
            found = await (ask or self.store.ask)(operation())
            if found is None or not self.changed_since(found.id, changes):
                return found

    # --- revocations ---------------------------------------------------------------------------------

    async def revoke(self, revocation: Revocation) -> list[EndedRecord] | None:
        """End sessions in the store that have ended here; those that had been there, or None if it is out.

        Then they are written down instead. Raises Unavailable if that cannot be, either.
        """
        within = max(self.store.timeout, DISK_AT_LEAST_S)
        keeping: asyncio.Task[None] | None = None
        if self.health.is_asked:
            ending = self.spawn(self._end(self.store.ask, revocation))
            # Nobody shall wait for the one and then for the other: the disk begins before the store is given up.
            within = max(self.store.timeout * _DISK_PART, DISK_AT_LEAST_S)
            ended_in_time, _ = await asyncio.wait([ending], timeout=self.store.timeout * _ALONE)
            if not ended_in_time:
                keeping = self.spawn(self.pending.add(revocation, within))
                await asyncio.wait([ending])
            try:
                ended = ending.result()
            except StoreUnavailable:
                # What waits is brought by a probe, so there must be one.
                self.health.begin_outage(self._clock.now())
            else:
                for each in ended:
                    self.end_here(each)
                if keeping is not None:
                    self.in_background(self._strike([revocation]))
                return ended
        try:
            await (keeping or self.pending.add(revocation, within))
        except StoreUnavailable as error:
            if revocation.id:
                self.add_orphan(revocation.id)  # so it is not forgotten before this process ends
            log.error("revocations.not_kept", reason=error.reason)
            self._on_event("revocations.not_kept", {"reason": error.reason, "pending": len(self.pending)})
            raise self.unavailable() from error
        return None

    async def _end(self, ask: Ask, revocation: Revocation) -> list[EndedRecord]:
        store, code, wall = self.store.store, revocation.code, revocation.wall
        if revocation.id:
            return await ask(store.end([revocation.id], code, wall))
        if revocation.user is not None:
            return await ask(store.end_user(revocation.user, code, wall))
        await ask(store.end_all(code, wall))
        return []

    async def _replay(self, ask: Ask) -> None:
        """Bring the revocations that wait to the store."""
        entries = self.pending.entries
        if not entries:
            return
        unknown = await self._end_again(ask, entries)
        if self.store.shared:
            # They may have ended already; or this process began after the store had lost them, and does not know.
            self._repeat(unknown)
        await self._strike(entries)
        self.replayed += len(entries)
        self._replayed += [one for one in entries if not one.id]

    async def _strike(self, revocations: Sequence[Revocation]) -> None:
        """The store has these: they need not wait any longer."""
        try:
            await self.pending.remove(revocations, max(self.store.timeout, DISK_AT_LEAST_S))
        except StoreUnavailable as error:
            log.warning("revocations.not_removed", reason=error.reason)

    async def _end_again(self, ask: Ask, revocations: Sequence[Revocation]) -> list[Revocation]:
        """Those for one session are given back of which the store had none that could be ended."""
        store, found = self.store.store, set()
        ids: dict[tuple[Code, int], list[bytes]] = {}
        for one in revocations:
            if one.id:
                ids.setdefault((one.code, one.wall), []).append(one.id)
        for (code, wall), group in ids.items():
            for first in range(0, len(group), ENDED_AT_ONCE):
                for ended in await ask(store.end(group[first : first + ENDED_AT_ONCE], code, wall)):
                    self.end_here(ended)
                    found.add(ended.id)
        for one in revocations:
            if not one.id:
                await self._end_opened_before(ask, one)
        return [one for one in revocations if one.id and one.id not in found]

    async def _end_opened_before(self, ask: Ask, revocation: Revocation) -> None:
        """End a user's sessions, or everybody's, but for those that were opened after the revocation."""
        store, until = self.store.store, revocation.wall
        if store.shared:
            until += CLOCK_SKEW_MS
        while True:
            records = await ask(store.list(revocation.user))
            ids = [record.id for record in records if record.created_at <= until]
            for first in range(0, len(ids), ENDED_AT_ONCE):
                part = ids[first : first + ENDED_AT_ONCE]
                for ended in await ask(store.end(part, revocation.code, revocation.wall)):
                    self.end_here(ended)
            if len(ids) < MAX_LISTED or revocation.user is not None:
                return

    def end_here(self, ended: EndedRecord) -> None:
        """The store says that a session has ended."""
        reason = _REASONS[ended.code]
        if not self.registry.end(ended.id, ended.code, reason, ended.ended_at):
            self.registry.restore_ended(ended)

    # --- what nobody was told of -----------------------------------------------------------------------

    def add_orphan(self, session_id: bytes) -> None:
        """A session may be in the store that nobody has the tokens of: it is ended when that can be asked again."""
        self._orphans[session_id] = None
        if len(self._orphans) > ORPHANS:
            self._orphans.popitem(last=False)

    async def _end_orphans(self, ask: Ask) -> None:
        while self._orphans:
            ids = [*self._orphans][:ENDED_AT_ONCE]
            await ask(self.store.store.end(ids, Code.TOKEN_REVOKED, self._clock.wall()))
            for session_id in ids:
                self._orphans.pop(session_id, None)

    # --- loading, last uses, cleaning --------------------------------------------------------------------

    async def _load(self) -> None:
        """Take in all that a store holds which is not shared."""
        registry, loaded, left_out = self.registry, 0, 0
        batches = self.store.store.load()
        while True:
            batch = await self.store.attempt(_next_of(batches), OPEN_LIMIT_S)
            if batch is None:
                break
            for first in range(0, len(batch), LOADED_AT_ONCE):
                for record in batch[first : first + LOADED_AT_ONCE]:
                    if isinstance(record, EndedRecord):
                        registry.restore_ended(record)
                    else:
                        loaded += 1
                        left_out += not registry.restore(record)
                await asyncio.sleep(0)
        self._is_loaded = True
        log.info("sessions.loaded", sessions=loaded - left_out)
        if left_out:
            log.error("sessions.left_out", sessions=left_out, cure="fewer sessions are kept than there are")

    async def write_uses(self) -> None:
        """Tell the store when sessions were last used."""
        wall = self._clock.wall()
        since = min(self._touched_until, wall)  # the clock may have been set back
        start = -1
        while start:
            start, uses = self.registry.uses(since, max(start, 0), SLOTS)
            if uses:
                await self.store.touch(uses)
            else:
                await asyncio.sleep(0)
        self._touched_until = wall - 1  # a session may be used again in this very millisecond

    async def clean(self) -> None:
        """Remove what has ended by time, here and in the store; and what may be left of outages."""
        registry, wall = self.registry, self._clock.wall()
        sweeps = registry.sweeps
        while registry.sweeps == sweeps:
            registry.clean(wall, SLOTS)
            await asyncio.sleep(0)
        removed = 1
        while removed:
            removed = await self.store.expire(wall, self._keep_ended_ms, EXPIRED_AT_ONCE)
            await asyncio.sleep(ROOM_S if 0 < removed < EXPIRED_AT_ONCE else 0)
        await self._end_orphans(self.store.ask)

    # --- what operators see ------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        health = self.health
        return {
            "state": health.state.value,
            "refusing": self.registry.closed,
            "outages": health.outages,
            "failures": health.failures,
            "pending_revocations": len(self.pending),
            "changes": self.changes,
        }


def _first_of(ids: Iterable[bytes]) -> list[bytes]:
    return list(islice(ids, ASKED_AT_ONCE))


async def _next_of(batches: Any) -> Sequence[SessionRecord | EndedRecord] | None:
    """The next batch, None after the last."""
    batch: Sequence[SessionRecord | EndedRecord] | None = await anext(batches, None)
    return batch
