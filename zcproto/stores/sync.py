"""Keeps the registry of one process and its store consistent, despite outages and changes by other processes.

Decides:
- Pending revocations reach the store before anything else, and before a token is accepted.
- A store that is not shared is loaded completely: up to LOADED_FIRST records before the server listens, the rest
  beside its work. Until then unknown tokens are looked up in it, and after that never.
- When last uses are written, and when expired entries are removed.
- A session changed by another process is dropped from the registry if no connection uses it. Otherwise it is ended
  if the store has reported its end, else the store is asked for it within the second. If both still disagree about
  its token when all processes have repeated their rotations, the session is ended.
- After this process did not run for longer than heartbeat and timeout (it was stopped, its machine slept, or its
  loop was blocked), no token is accepted before the store has answered and all changes it reported are applied
  (DISTRUST in spec/store.pml). If the store does not answer within
  the timeout, that is an outage, whose grace began with the stall.
- A store that lost its data (EMPTIED) gets the sessions that are known here back: those in use before anything
  else, so that their users notice nothing. After the grace period it does not, because tokens are refused then;
  revocations are repeated all the same, because other processes may still restore sessions.

It must not know: connections (except whether one uses a session), how a call is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from math import inf, isfinite
from typing import Any, Final, NamedTuple

from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import Code, ConfigError, ResourceExhausted
from zcproto.observe.log import get_logger
from zcproto.sessions import EndReason, SessionRegistry
from zcproto.sessions.health import NEVER, STEADY_S, HealthAlert, StoreHealth
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.token import id_from_text, id_text
from zcproto.stores.base import HEARTBEAT_S, NO_LIMIT, Change, ChangeKind, SessionStore, StoreUnavailable
from zcproto.stores.leases import IsUsed, Leases
from zcproto.stores.operations import UPKEEP, BackgroundTasks, Call, CircuitBreaker, LoopTimeout
from zcproto.stores.pending import PendingRevocations
from zcproto.stores.revoker import AFTER_GAP_S, RETRY_PAUSE_S, OnEvent, Revoker, end_here

SLOTS: Final = 2_000
"""Sessions looked at in one turn of the event loop, about a millisecond."""

CLEANUP_S: Final = 30.0
"""Seconds between two removals of ended sessions. They are refused from their end on, removed or not."""

TOUCH_INTERVAL_S: Final = 30.0
"""How often last uses are written; idle limits are minutes."""

EXAMINE_INTERVAL_S: Final = 3_600.0

LOADED_FIRST: Final = 5_000
"""Records loaded before the server listens: a small part of a second."""

EXPIRED_AT_ONCE: Final = 4_000
EXPIRE_PAUSE_S: Final = 0.02
"""The pause after a slice that was cut short because other operations waited."""

OPEN_LIMIT_S: Final = 30.0
"""For opening a store, and for each batch while it is loaded; no caller waits for that."""

CLOSE_LIMIT_S: Final = 2.0

MAX_CHECKS: Final = 64
"""Sessions checked in the store at once."""

CHANGES: Final = 4_096
"""Changed sessions that are remembered, for `has_changed`."""

HOLD_S: Final = 5.0
"""How long an outage may last without an alert, an alert outlasts it, and how soon after an order one may begin. A
new process opens the store in less than a second."""

REPEATED: Final = 3
"""Outages within STEADY_S of which the last raises an alert at once."""

_EXTENSIONS: Final = 4
"""Extensions of the trust within its limit."""

Found = SessionRecord | EndedRecord

Batches = AsyncIterator[Sequence[Found]]

log = get_logger("zcproto.store")


@dataclass(eq=False)
class StoreSync:
    """The registry and the store of one process.

    Times are in seconds. `random` returns numbers from 0 to 1. `on_event` is called at outages and losses of data.
    """

    store: SessionStore
    registry: SessionRegistry
    pending: PendingRevocations
    _: KW_ONLY
    is_used: IsUsed
    in_use: Callable[[], Iterable[str]] = tuple
    """The sessions that connections use."""
    wheel: DeadlineWheel
    clock: Clock
    random: Callable[[], float]
    timeout: float
    grace: float
    keep_ended_ms: int
    heartbeat: float = HEARTBEAT_S
    maintains: bool = True
    """Whether this process removes expired entries from the store and examines its servers."""
    on_event: OnEvent = lambda event, values: None

    def __post_init__(self) -> None:
        self.health = StoreHealth(
            grace_s=self.grace, timeout_s=self.timeout, random=self.random, on_alert=self._alerted
        )
        self.breaker = CircuitBreaker(self.store, self.health, timeout=self.timeout, now=self.clock.now)
        self.tasks = BackgroundTasks()
        self.revoker = Revoker(
            self.breaker,
            self.registry,
            self.pending,
            self.tasks,
            self.wheel,
            self.clock,
            self.keep_ended_ms,
            self.on_event,
        )
        self.changes = ChangeTracker(self.revoker, self._is_kept)
        self.leases = Leases(
            self.breaker, self.registry, self.is_used, self.in_use, self.tasks, self.wheel, self.clock
        )
        self.leases.is_registry_complete = lambda: self._is_loaded
        self.stalls = StallWatch(
            self.registry, self.wheel, self.clock, self.heartbeat + self.timeout, self._stalled
        )
        self.report = OutageReport(
            lambda: OutageFigures(self.breaker.reason, len(self.registry), len(self.pending)), self.on_event
        )
        self._is_open = False
        self._is_loaded = self._is_loading = False
        self._loaded = self._left_out = 0
        self.unloaded = 0
        """Sessions that are still to be loaded, at most."""
        self.on_loaded: Callable[[], None] = lambda: None
        """Called when a store that is not shared is loaded."""
        self._touched_until = 0
        self.problems: tuple[str, ...] = ()
        self.on_reached: Callable[[], None] = lambda: None
        """Called when the store was reached after a gap, in which it may have lost data."""
        self.deadline_tick = 0

    # --- start and stop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Replay pending revocations and load the store.

        An outage is not an error: every token is refused until the store is back. Raises ConfigError for a fault
        that retrying cannot fix.
        """
        try:
            await self.pending.open()
        except StoreUnavailable as error:
            raise ConfigError([f"pending revocations cannot be read: {error.reason}"]) from error
        self._report_damaged()
        try:
            await self._recover()
        except StoreUnavailable as error:
            self.breaker.reason = error.reason
            self.health.begin_outage(self.clock.now(), grace=False)
        except BaseException:
            await self.pending.close()
            await self.store.close()
            raise
        self.leases.begin()
        if self.store.shared and isfinite(self.heartbeat):
            self.stalls.resume()
        self.tasks.repeat(TOUCH_INTERVAL_S, self.write_uses)
        self.tasks.repeat(CLEANUP_S, self.clean)
        if self.store.shared and self.maintains:
            self.tasks.run_in_background(self.examine())
            self.tasks.repeat(EXAMINE_INTERVAL_S, self.examine)

    async def stop(self) -> None:
        """Finish what is in progress, write the last uses and close the store."""
        self.tasks.is_stopping = True
        self.wheel.discard(self)
        self.wheel.discard(self.revoker)
        self.wheel.discard(self.leases)
        self.stalls.stop()
        await self.tasks.stop(2 * self.breaker.timeout)
        try:
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self.write_uses()
        except (StoreUnavailable, ResourceExhausted, TimeoutError):
            log.warning("store.uses_not_written", reason=self.breaker.reason)
        await self.pending.close()
        await self.store.close()

    @property
    def looks_up(self) -> bool:
        """Whether a session that the registry does not have may be in the store."""
        return self.store.shared or not self._is_loaded

    def _is_kept(self, session_id: str) -> bool:
        """Return whether a session is in use here, or is being opened."""
        return self.is_used(session_id) or (
            bool(self.leases.unjoined) and id_from_text(session_id) in self.leases.unjoined
        )

    # --- outages -----------------------------------------------------------------------------------

    def handle_deadline(self, now: float) -> None:
        self.report.handle_time(now)
        if self.health.handle_time(now):
            self.tasks.run_in_background(self._probe())
        self._set_deadlines()

    def _set_deadlines(self) -> None:
        if not self.tasks.is_stopping:
            self.wheel.set(self, min(self.health.next_deadline(), self.report.next_deadline()))
            self.revoker.set_deadline()

    def _alerted(self, alert: HealthAlert) -> None:
        if alert is not HealthAlert.ENDED:
            if alert is HealthAlert.GRACE_OVER:
                self.registry.refuse_all()
            self.report.handle(alert, self.clock.now(), is_slow=self.health.is_slow)
        else:
            self.registry.stop_refusing()
            self.leases.begin()
            now = self.clock.now()
            self.report.end(now, round(now - self.health.since, 3), self.revoker.replayed)
            self.on_reached()
            if self.store.shared and self.maintains:
                self.tasks.run_in_background(self.examine())  # after a failover it is another server
        self._set_deadlines()

    def _stalled(self, seconds: float, hidden_s: float) -> None:
        log.warning("store.stalled", seconds=round(seconds, 3))
        self.tasks.run_in_background(self._regain_trust(seconds, hidden_s))

    async def _regain_trust(self, stalled_s: float, hidden_s: float) -> None:
        """Wait until the store has answered and all reported changes are applied, or an outage has begun."""
        ended = self.clock.now()
        while self.health.is_healthy:
            try:
                async with LoopTimeout(self.timeout):
                    await self.breaker.call(self.store.ping())  # its answer comes after the changes until now
                await self.changes.checked.wait()
                break
            except TimeoutError:
                self.breaker.failed(f"no answer within {self.timeout * 1000:.0f} ms", self.timeout)
            except StoreUnavailable:
                await asyncio.sleep(RETRY_PAUSE_S)
        self.health.count_stall(self.clock.now(), stalled_s + self.clock.now() - ended, hidden_s)
        self._set_deadlines()
        if not self.tasks.is_stopping:
            self.stalls.resume()

    def take_left(self) -> None:
        """Write the revocations to the store that other processes of this home have left."""
        if not self.tasks.is_stopping:
            self.tasks.run_in_background(self._take_left())

    async def _take_left(self) -> None:
        known = len(self.pending.damaged)
        await self.pending.take_left(OPEN_LIMIT_S)
        self._report_damaged(known)
        try:
            if self.health.is_healthy:  # else the next probe does it
                await self.revoker.replay(self.breaker.call)
        except StoreUnavailable:
            self.health.begin_outage(self.clock.now())  # only a probe repeats it

    def _report_damaged(self, first: int = 0) -> None:
        for copy in self.pending.damaged[first:]:
            log.error("revocations.damaged", copy=str(copy))
            self.on_event("revocations.damaged", {"copy": str(copy)})

    def _changed(self, change: Change) -> None:
        if change.kind is ChangeKind.AWAY:
            self.report.expect(self.clock.now())
            return
        self.changes.handle(change)
        if change.kind is not ChangeKind.SESSION:
            self.leases.begin()
        if change.kind not in (ChangeKind.SESSION, ChangeKind.LOST) and self.health.is_healthy:
            self.on_reached()
        if change.kind is not ChangeKind.SESSION and not self.health.is_healthy:  # a new connection
            self.health.hasten_probe(self.clock.now())
            self._set_deadlines()

    async def _probe(self) -> None:
        """Check whether the store is back."""
        is_back = False
        try:
            await self._recover()
            is_back = True
        except StoreUnavailable as error:
            self.breaker.reason = error.reason
        except Exception as error:  # such as a ConfigError, which may be fixed while the server runs
            self.breaker.reason = str(error)
            log.error("store.probe_failed", exc_info=error)
        finally:
            if is_back:
                self.health.probe_succeeded(self.clock.now())
                self.changes.start_checking()
            else:
                self.health.probe_failed(self.clock.now())
            self._set_deadlines()

    async def _recover(self) -> None:
        """Make the store and the registry consistent.

        Must not yield after the last replay: a revocation added then would be left in the file.
        """
        attempt = self.breaker.attempt
        if self._is_open:
            await attempt(self.store.ping())
        else:
            await attempt(self.store.open(self._changed), OPEN_LIMIT_S)
            self._is_open = True
        self.revoker.replayed = 0
        await self.revoker.replay(attempt)
        await self.revoker.end_orphans(attempt)
        if self.store.shared:
            await self.changes.check_all(attempt)
            if not self._is_loaded:
                self._is_loaded = True
                if not self.store.keeps_changes:
                    self.revoker.repeat_after_loss()  # it may have lost data before this process started
        elif not self._is_loaded and not self._is_loading:
            await self._load_first()
        while len(self.pending):
            await self.revoker.replay(attempt)

    # --- loading, last uses, cleaning --------------------------------------------------------------

    async def _load_first(self) -> None:
        """Load the first records of a store that is not shared, and begin to load the rest."""
        batches = await self._load_until(LOADED_FIRST)
        if batches is not None:
            self.unloaded = max(await self.breaker.attempt(self.store.count()) - self._loaded, 0)
            log.info("sessions.loading", sessions=self._loaded, left=self.unloaded)
            self._is_loading = True
            self.tasks.spawn(self._load_rest(batches), UPKEEP)

    async def _load_rest(self, batches: Batches) -> None:
        """Load the rest while the server works, after an outage from the beginning."""
        following: Batches | None = batches
        while not self._is_loaded:
            if following is None and not self.health.is_healthy:
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            try:
                following = await self._load_until(inf, following)
            except StoreUnavailable as error:
                following, self.breaker.reason = None, error.reason
                self.health.begin_outage(self.clock.now())  # only a probe finds out when the store is back
            except Exception as error:  # sessions that are not loaded are looked up
                log.error("store.task_failed", exc_info=error)
                return

    async def _load_until(self, count: float, batches: Batches | None = None) -> Batches | None:
        """Load about `count` records, from the beginning without `batches`. Return what follows them; None at the
        end.
        """
        if batches is None:
            batches, self._loaded, self._left_out = self.store.load(), 0, 0
        while self._loaded < count:
            batch = await self.breaker.attempt(anext(batches, None), OPEN_LIMIT_S)
            if batch is None:
                self._end_loading()
                return None
            self._restore(
                batch
            )  # in one turn of the loop: what was changed after it was read is applied later
            self.unloaded = max(self.unloaded - len(batch), 0)
            await asyncio.sleep(0)
        return batches

    def _restore(self, batch: Sequence[Found]) -> None:
        registry = self.registry
        for record in batch:
            if isinstance(record, EndedRecord):
                registry.restore_ended(record)
                continue
            self._loaded += 1
            # One that is known was looked up, and may have a newer token.
            if registry.record(record.id) is None and not registry.restore(record):
                self._left_out += (
                    registry.kept >= registry.settings.max_sessions
                )  # else it was ended meanwhile

    def _end_loading(self) -> None:
        self._is_loaded, self.unloaded = True, 0
        log.info("sessions.loaded", sessions=self._loaded - self._left_out)
        if self._left_out:
            log.error(
                "sessions.left_out",
                sessions=self._left_out,
                cure="the server cannot hold more sessions; their users have to log in again",
            )
        self.on_loaded()

    async def write_uses(self) -> None:
        """Write to the store when sessions were last used."""
        wall = self.clock.wall()
        since = min(self._touched_until, wall)  # the clock may have been set back
        start = -1
        while start:
            start, uses = self.registry.uses(since, max(start, 0), SLOTS)
            if uses:
                await self.breaker.call(self.store.touch(uses))
            else:
                await asyncio.sleep(0)
        self._touched_until = wall - 1  # a session may be used again within this millisecond

    async def clean(self) -> None:
        """Remove expired entries, here and in the store, and end orphans."""
        registry, wall = self.registry, self.clock.wall()
        sweeps = registry.sweeps
        while registry.sweeps == sweeps:
            registry.clean(wall, SLOTS)
            await asyncio.sleep(0)
        removed = 1
        while removed and self.maintains:
            removed = await self.breaker.call(self.store.expire(wall, self.keep_ended_ms, EXPIRED_AT_ONCE))
            await asyncio.sleep(EXPIRE_PAUSE_S if 0 < removed < EXPIRED_AT_ONCE else 0)
        await self.revoker.end_orphans(self.breaker.call)

    async def examine(self) -> None:
        """Report what is wrong with the configuration of the store's servers."""
        had_problems = bool(self.problems)
        self.problems = tuple(await self.breaker.call(self.store.examine(self.clock.wall())))
        if self.problems:
            log.warning("store.misconfigured", faults=list(self.problems))
        if self.problems or had_problems:
            self.on_event("store.misconfigured", {"faults": "; ".join(self.problems)})

    def statistics(self) -> dict[str, Any]:
        health = self.health
        return {
            "state": health.state.value,
            "refusing": self.registry.closed,
            "outages": health.outages,
            "failures": health.failures,
            "pending_revocations": len(self.pending),
            "changes": self.changes.count,
        }


class ChangeTracker:
    """Changes by other processes. `count` numbers them."""

    def __init__(self, revoker: Revoker, is_used: IsUsed) -> None:
        self._revoker = revoker
        self._breaker = revoker.breaker
        self._store = revoker.breaker.store
        self._registry = revoker.registry
        self._is_used = is_used
        self._all_changed = False
        self._is_emptied = False
        self._to_check: dict[bytes, int] = {}  # with the number of the change that made it necessary
        self._to_restore: dict[bytes, int] = {}
        self._disputed: dict[bytes, float] = {}  # with the time until which a rotation may be repeated
        revoker.on_repeated = self._check_disputed
        self.checked = asyncio.Event()
        """Set while no change waits to be applied, or during an outage."""
        self.checked.set()
        self._changed_at: OrderedDict[bytes, int] = OrderedDict()
        self._all_changed_at = 0
        self.count = 0

    def has_changed(self, session_id: bytes, since: int) -> bool:
        """Return whether another process may have changed a session since `count` was `since`."""
        return self._all_changed_at > since or self._changed_at.get(session_id, 0) > since

    async def fetch(
        self, read: Callable[[bytes], Coroutine[Any, Any, Found | None]], key: bytes, call: Call | None = None
    ) -> Found | None:
        """Read a session by `find` or `get` of the store, again if it was changed meanwhile."""
        while True:
            count = self.count
            found: Found | None = await (call or self._breaker.call)(read(key))
            if found is None or not self.has_changed(found.id, count):
                return found

    def apply(self, found: Found | None) -> bool:
        """Update the registry with a session read from the store.

        Return False if the store has a session that has ended here, or a token that was replaced here.
        """
        if isinstance(found, SessionRecord):
            return self._registry.restore(found, make_room=self._store.shared)
        if found is not None:
            end_here(self._registry, found)
        return True

    async def ensure_stored(self, session_id: bytes) -> None:
        """Restore a session that the store has lost, before it is asked about it."""
        if session_id in self._to_restore:
            await self._restore(self._breaker.call, [session_id])

    def handle(self, change: Change) -> None:
        """Handle a change by another process, reported by the store."""
        if change.kind is ChangeKind.LOST:
            self._revoker.tasks.run_in_background(self._check_connection())
            return
        self.count += 1
        if change.kind is not ChangeKind.SESSION:
            self._all_changed_at = self.count
            self._changed_at.clear()
            self._all_changed = True
            sessions = len(self._registry)
            if change.kind is ChangeKind.EMPTIED:
                self._is_emptied = True
                log.error("store.emptied", sessions=sessions)
                self._revoker.on_event("store.emptied", {"sessions": sessions})
            elif change.kind is ChangeKind.FLUSHED:
                log.error("store.flushed", sessions=sessions)
                self._revoker.on_event("store.flushed", {"sessions": sessions})
            self.start_checking()
            return
        self._changed_at.pop(change.id, None)
        self._changed_at[change.id] = self.count
        if len(self._changed_at) > CHANGES:
            _, self._all_changed_at = self._changed_at.popitem(last=False)
        if not self._is_used(id_text(change.id)):
            self._registry.forget(change.id)
        elif change.ended is not None:
            end_here(self._registry, change.ended)
        else:
            self._to_check[change.id] = self.count
            self.start_checking()

    async def _check_connection(self) -> None:
        """Begin an outage if the store cannot be reached, although no operation needs it."""
        while self._breaker.health.is_healthy:
            try:
                await self._breaker.call(self._store.ping())
                break
            except StoreUnavailable:
                await asyncio.sleep(RETRY_PAUSE_S)

    def handle_all_ended(self) -> None:
        """Check sessions that were read while this process ended all in the store, which does not report them."""
        self.count += 1
        self._all_changed_at = self.count
        self._to_check |= dict.fromkeys(
            (record.id for record in self._registry.records(None, self._registry.kept)), self.count
        )
        self.start_checking()

    def start_checking(self) -> None:
        # After an outage everything is checked, so nothing is started during one.
        tasks = self._revoker.tasks
        if self.checked.is_set() and self._breaker.health.is_healthy and not tasks.is_stopping:
            self.checked.clear()
            tasks.run_in_background(self._check_changed())

    async def _check_changed(self) -> None:
        call = self._breaker.call
        try:
            while self._breaker.health.is_healthy:
                if self._all_changed:
                    work = self.check_all(call)
                elif self._to_check:
                    work = self._check(call, islice(self._to_check, MAX_CHECKS))
                elif self._to_restore:
                    work = self._restore(call, islice(self._to_restore, MAX_CHECKS))
                else:
                    break
                try:
                    await work
                except (StoreUnavailable, ResourceExhausted):
                    await asyncio.sleep(RETRY_PAUSE_S)
        finally:
            self.checked.set()

    async def check_all(self, call: Call) -> None:
        """Drop the sessions that are not in use and check the others; or restore all if the store lost them."""
        was_emptied, used = self._is_emptied, []
        emptied = was_emptied and not self._registry.closed

        def is_kept(session_id: bytes) -> bool:
            is_used = self._is_used(id_text(session_id))
            if is_used:
                used.append(session_id)
            elif emptied:
                self._to_restore[session_id] = self.count
            return is_used or emptied

        self._all_changed = self._is_emptied = False
        try:
            if not emptied:
                await self._revoker.repeat_after_gap(call)
            start = -1
            while start:
                start = self._registry.forget_unless(is_kept, max(start, 0), SLOTS)
                await asyncio.sleep(0)
            work = self._restore if emptied else self._check
            for first in range(0, len(used), MAX_CHECKS):
                await work(call, used[first : first + MAX_CHECKS])
        except BaseException:
            self._all_changed, self._is_emptied = True, self._is_emptied or was_emptied
            raise
        if was_emptied:
            self._revoker.repeat_after_loss()

    async def _check(self, call: Call, ids: Iterable[bytes]) -> None:
        """Update sessions in the registry from the store."""

        async def check(session_id: bytes) -> None:
            if not await self._agrees(call, session_id):
                # A failover has lost a rotation, or the session was read before one of this process.
                await self._revoker.rotate_session_again(call, session_id)
                if not await self._agrees(call, session_id):
                    if self._registry.ended(session_id) is None and self._awaits_others(session_id):
                        return
                    if not await self._agrees(call, session_id, is_settled=True):
                        # It cannot be decided which token is good, or the session has ended here.
                        await self._revoker.end_in_store(call, session_id)
            self._disputed.pop(session_id, None)

        await _process(self._to_check, ids, check)

    def _awaits_others(self, session_id: bytes) -> bool:
        """Return whether another process may still repeat the rotation that the store has lost."""
        now = self._revoker.clock.now()
        until = self._disputed.setdefault(session_id, now + AFTER_GAP_S[-1])
        if now < until:
            self._revoker.repeat_again()
        return now < until

    def _check_disputed(self) -> None:
        if self._disputed:
            self._to_check |= dict.fromkeys(self._disputed, self.count)
            self.start_checking()

    async def _agrees(self, call: Call, session_id: bytes, *, is_settled: bool = False) -> bool:
        """Update a session from the store. Return whether both agree about it.

        Until it `is_settled`, a token that this process has issued is kept if the store has another, older one.
        """
        found = await self.fetch(self._store.get, session_id, call)
        known = self._registry.record(session_id)
        if not is_settled and isinstance(found, SessionRecord) and known is not None:
            is_older = found.token_digest != known.token_digest and found.expires_at < known.expires_at
            if is_older and self._revoker.has_issued(known):
                return False
        if found is None:
            wall = self._revoker.clock.wall()
            self._registry.end(session_id, Code.TOKEN_REVOKED, EndReason.ELSEWHERE, wall)
        return self.apply(found)

    async def _restore(self, call: Call, ids: Iterable[bytes]) -> None:
        """Write sessions back that the store has lost."""

        async def restore(session_id: bytes) -> None:
            record = self._registry.record(session_id)
            if record is not None:
                await call(self._store.create(record, NO_LIMIT))
                # Another process may have restored it first, and it may have been changed or ended since.
                self.apply(await self.fetch(self._store.get, session_id, call))

        await _process(self._to_restore, ids, restore)


async def _process(
    waiting: dict[bytes, int], ids: Iterable[bytes], work: Callable[[bytes], Awaitable[None]]
) -> None:
    """Process sessions concurrently and remove them from `waiting`, except those changed again meanwhile."""
    begun = {session_id: waiting.get(session_id) for session_id in ids}
    await asyncio.gather(*map(work, begun))
    for session_id, change in begun.items():
        if waiting.get(session_id) == change:
            waiting.pop(session_id, None)


class StallWatch:
    """Extends the trust in a registry by `limit` seconds, until this process does not run for longer than that.

    Trust ends by the wall clock: requests are checked against it before the event loop has run a timer, and it
    advances while a machine sleeps. A step of it looks like a stall, which costs one question to the store.

    `on_stall` is called with the seconds of the stall, and how many of them the monotonic clock did not count.
    Nothing is trusted from then until `resume`.
    """

    def __init__(
        self,
        registry: SessionRegistry,
        wheel: DeadlineWheel,
        clock: Clock,
        limit: float,
        on_stall: Callable[[float, float], None],
    ) -> None:
        self._registry = registry
        self._wheel = wheel
        self._clock = clock
        self._limit = limit
        self._on_stall = on_stall
        self._wall = 0
        self._now = 0.0
        self.deadline_tick = 0

    def resume(self) -> None:
        """Trust the registry from now on."""
        before = self._wall
        self._wall, self._now = self._clock.wall(), self._clock.now()
        if self._wall < before:  # what connections reuse until the old time must be checked again
            self._registry.generation += 1
        self._registry.trusted_until = self._wall + round(self._limit * MS_PER_SECOND)
        self._wheel.set(self, self._now + self._limit / _EXTENSIONS)

    def stop(self) -> None:
        self._wheel.discard(self)

    def handle_deadline(self, now: float) -> None:
        counted = self._clock.now() - self._now
        stalled = max(counted, (self._clock.wall() - self._wall) / MS_PER_SECOND)
        if stalled < self._limit:
            self.resume()
        else:
            self._registry.distrust()
            self._on_stall(stalled, stalled - counted)


class OutageFigures(NamedTuple):
    """Why the store fails, the sessions that are known, and the revocations that wait for it."""

    reason: str
    sessions: int
    pending: int


class OutageReport:
    """Logs the outages of a store and raises their alerts. Times are monotonic seconds.

    - An outage that lasts longer than HOLD_S raises an alert. A shorter one is in the log: as `store.slow` if it
      began with a late answer, as on a busy machine, else as `store.degraded`. The third `store.degraded` within a
      minute raises the alert at once: the store answers probes and nothing else, as on a full disk.
    - An outage that begins soon after an order to be away (ChangeKind.AWAY), as in an upgrade, is logged only if it
      lasts longer than HOLD_S. The new process may be busy with its start, so the store may come back in several
      attempts.
    - An alert ends when the store has answered for HOLD_S: an outage that begins before then continues it.

    `read` returns the figures of a report. `on_event` is called with the name and the values of a log event that
    may raise an alert.
    """

    def __init__(self, read: Callable[[], OutageFigures], on_event: OnEvent) -> None:
        self._read = read
        self._on_event = on_event
        self._away_until = self._alert_at = 0.0
        self._ends_at = NEVER
        self._end: dict[str, Any] = {}
        self._is_ordered = False
        self._is_logged = False
        self._has_alert = False
        self._held: list[HealthAlert] = []
        self._recent: deque[float] = deque(maxlen=REPEATED)
        self._unlogged: set[HealthAlert] = set()

    def expect(self, now: float) -> None:
        """Note that the store will be away, or busy, by order."""
        self._away_until = now + HOLD_S

    def handle(self, alert: HealthAlert, now: float, *, is_slow: bool = False) -> None:
        """Log that an outage has begun, by a late answer or otherwise, or that its grace is over."""
        if alert is HealthAlert.BEGAN:
            self._is_ordered = now < self._away_until
            self._is_logged = False
            self._ends_at = NEVER
            self._alert_at = now + HOLD_S
            if not is_slow and not self._is_ordered:
                self._recent.append(now)
                if len(self._recent) == REPEATED and now - self._recent[0] <= STEADY_S:
                    self._alert_at = now
        self._held.append(alert)
        self._unlogged.add(alert)
        if not self._is_ordered or now >= self._alert_at:
            if is_slow and alert is HealthAlert.BEGAN:
                reason, sessions, pending = self._read()
                log.warning("store.slow", reason=reason, sessions=sessions, pending=pending)
                self._is_logged = True
            else:
                self._log(alert)
        self.handle_time(now)

    def handle_time(self, now: float) -> None:
        """Raise or end the alerts that were held back, if the outage or its end has lasted for long enough."""
        if now >= self._ends_at:
            self._ends_at, self._has_alert = NEVER, False
            self._on_event("store.recovered", self._end)
        if now < self._alert_at:
            return
        held, self._held = self._held, []
        for alert in held:
            self._log(alert)
            reason, sessions, _ = self._read()
            self._has_alert = True
            if alert is HealthAlert.BEGAN:
                self._on_event("store.degraded", {"reason": reason, "sessions": sessions})
            else:
                self._on_event("store.grace_over", {"reason": reason})

    def _log(self, alert: HealthAlert) -> None:
        if alert not in self._unlogged:
            return
        self._unlogged.discard(alert)
        self._is_logged = True
        reason, sessions, pending = self._read()
        if alert is HealthAlert.BEGAN:
            log.error("store.degraded", reason=reason, sessions=sessions, pending=pending)
        else:
            log.error("store.grace_over", reason=reason)

    def next_deadline(self) -> float:
        """Return the latest time for the next call of `handle_time`, or NEVER."""
        return min(self._ends_at, self._alert_at if self._held else NEVER)

    def end(self, now: float, seconds: float, replayed: int) -> None:
        """Report that an outage has ended after so many seconds, with so many revocations that waited."""
        self._held.clear()
        self._unlogged.clear()
        if self._is_logged:
            log.warning("store.recovered", seconds=seconds, replayed=replayed)
        else:
            log.info("store.moved", seconds=seconds)
        if self._has_alert:
            self._ends_at, self._end = now + HOLD_S, {"seconds": seconds, "replayed": replayed}
