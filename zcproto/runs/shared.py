"""The durable runs of one process in a store that several processes share.

    host -> SharedRuns -> carrier -> the coordinator's table (zcproto/workers/runs.py)
                                  -> or Valkey (zcproto/bus/runs.py)

Decides: what a process repeats when the store was away or has lost a part, and which owner is lost.

Rules:
- The owner of a run keeps its items until they were taken, and the end for COPY_S more. A gap in the log, which a
  failover leaves, is filled from there; so is a log that is missing, unless the run was deleted.
- An append waits while the store is away. So do readers: they get stored items alone. The owner's own reader gets
  them from the copies, unless another process has changed the run since the owner has seen its state.
- An attachment and what it has taken are repeated after the store was away. A newer attachment has a higher order.
- After each reconnection all that wait read again, and readers every POLL_S: a wake-up may be lost. The host looks
  at its runs as often.
- An owner is lost if the store saw no sign of it throughout LOST_S of one connection. Any process then writes the
  end, as does a process that finds a run which names it and which it does not run.

It must not know: links, Valkey, methods.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

from zcproto.common.backoff import backoff_s
from zcproto.common.clock import Entropy
from zcproto.errors import Code, NotFound, ResourceExhausted, Unavailable
from zcproto.observe.log import get_logger
from zcproto.runs.log import (
    ITEM_BYTES,
    KNOWN_S,
    RETRY_MS,
    RUN_BYTES,
    End,
    Gap,
    Opening,
    RunInfo,
    RunKey,
    RunLimits,
    RunState,
    Taken,
    within,
)
from zcproto.wire.message import encode_error

COPY_S: Final = 30.0
LOST_S: Final = 10.0
CHECK_S: Final = 2.0
POLL_S: Final = 5.0
OPEN_WITHIN_S: Final = 5.0
"""How long an opening is repeated whose answer was lost."""

FLUSH_S: Final = 2.0
"""How long a process that stops tries to store ends of its runs."""

REPAIRS_AT_ONCE: Final = 64
MAX_KNOWN: Final = 65_536
"""Ids of own runs that have ended, which are written to a new store."""

_PROCESS_SIZE: Final = 8
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 0.5

T = TypeVar("T")

log = get_logger("zcproto.server")


class RunCarrier(Protocol):
    """The store as one process reaches it. It calls `up`, `down` and `woken`.

    The operations are those of `RunTable`. Any may raise Unavailable, without knowing whether it had an effect.
    """

    async def start(self, runs: SharedRuns) -> None:
        """Connect, and stay connected. Does not wait for the store."""

    async def stop(self) -> None: ...

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]: ...

    async def append(
        self,
        key: RunKey,
        info: RunInfo,
        first: int,
        bodies: Sequence[bytes],
        end: End | None,
        taken: Taken | None,
    ) -> RunState | None:
        """Record what the own reader has taken, as `take`, and append. The state has the same `info`."""

    async def restore(self, key: RunKey, lost: RunState) -> bool: ...

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int, order: int
    ) -> tuple[RunState, Sequence[bytes]]: ...

    async def take(self, key: RunKey, attachment: str, position: int, order: int) -> None: ...

    async def detach(self, key: RunKey, attachment: str) -> None: ...

    async def cancel(self, key: RunKey, reason: str) -> bool: ...

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]: ...

    async def forget(self, user: str | None) -> int: ...

    async def missing(self, processes: Collection[str]) -> set[str]:
        """Return those of the processes that show no sign of life."""

    async def restored(self, known: Iterable[RunKey]) -> None:
        """Note that this process has written back its runs after a reconnection, and which have gone."""

    def reconfigure(self, limits: RunLimits) -> None: ...

    def watch(self, key: RunKey) -> None:
        """Have `woken` called when a run changes."""

    def unwatch(self, key: RunKey) -> None: ...


class Absences:
    """Finds the processes that showed no sign of life throughout LOST_S."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def clear(self) -> None:
        """Begin again: signs may have been missed."""
        self._since.clear()

    def lost(self, missing: Collection[str], now: float) -> set[str]:
        """Take which processes show no sign of life now. Return those that are lost."""
        self._since = {each: self._since.get(each, now) for each in missing}
        return {each for each, since in self._since.items() if now - since >= LOST_S}


def new_process(entropy: Entropy) -> str:
    """Return the id of this process in a shared store; to be made after its fork."""
    return entropy(_PROCESS_SIZE).hex()


def owner_lost(items: int) -> End:
    """Return the end of a run after so many items whose process is lost."""
    details = {"reason": "owner_lost", "items": items}
    return Code.UNKNOWN, encode_error(Code.UNKNOWN, "the process that ran the method was lost", details)


def log_lost(key: RunKey, items: int) -> None:
    """Log that a run has ended because its process is lost."""
    log.warning("runs.owner_lost", user=key.user, run=key.id, count=items)


def process_of(attachment: str) -> str:
    """Return the process of an attachment in a shared store."""
    return attachment.partition(".")[0]


@dataclass(slots=True, eq=False)
class _Owned:
    """A run of this process. `state` is the last one that an append has returned, after `seen` of the `changes`.

    `copies` begin at `base`. The store has had all before `stored`.
    """

    state: RunState
    base: int = 0
    stored: int = 0
    copies: list[bytes] = field(default_factory=list)
    end: End | None = None
    taken: Taken | None = None
    forget_at: float | None = None
    changes: int = 0
    seen: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def next(self) -> int:
        return self.base + len(self.copies)

    def serves(self, attachment: str, position: int) -> bool:
        """Return whether the copies have what an attachment may read from a position on."""
        is_read_by = self.seen == self.changes and self.state.attachment == attachment
        return is_read_by and self.base <= position <= self.stored


@dataclass(slots=True)
class _Reader:
    order: int
    taken: int = 0


class SharedRuns:
    """The store of the runs of one process, whose id `process` is random and never used again.

    `size` counts the bytes of its runs: as in a table, but items are copies.
    """

    def __init__(self, carrier: RunCarrier, limits: RunLimits, process: str) -> None:
        self._carrier = carrier
        self._limits = limits
        self._process = process
        self._owned: dict[RunKey, _Owned] = {}
        self._starting: set[bytes] = set()
        self._known: OrderedDict[RunKey, float] = OrderedDict()
        self._readers: dict[tuple[RunKey, str], _Reader] = {}
        self._watchers: dict[RunKey, list[Callable[[], None]]] = {}
        self._suspects: dict[RunKey, RunState] = {}
        self._absences = Absences()
        self._up = asyncio.Event()
        self._is_stopped = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self.size = 0
        self.repaired = self.lost = 0

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    async def start(self) -> None:
        """Let the carrier connect."""
        await self._carrier.start(self)
        self._begin(self._check())
        self._begin(self._poll())

    async def stop(self) -> None:
        """Store what is not stored yet, if that takes no long time, and disconnect."""
        await asyncio.sleep(0)  # methods that were cancelled now have their ends
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await asyncio.gather(*(self._repair(key, run) for key, run in [*self._owned.items()]))
        self._is_stopped = True
        self._up.set()  # what waits for the store fails
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._carrier.stop()

    def reconfigure(self, limits: RunLimits) -> None:
        self._limits = limits
        self._carrier.reconfigure(limits)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="zcproto-runs")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def _repeat(self, operation: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run an operation until the store has answered it."""
        failures = 0
        while True:
            await self._up.wait()
            if self._is_stopped:
                raise Unavailable("the server stops")
            try:
                return await operation(*arguments)
            except Unavailable:
                failures += 1
            await asyncio.sleep(backoff_s(failures, _FIRST_PAUSE_S, _LONGEST_PAUSE_S))

    # --- the owner -------------------------------------------------------------------------------------

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]:
        """Start a run or attach to one as `RunTable.open`. Raises Unavailable while the store is away, too."""
        attachment, info = self._named(opening.attachment), opening.info
        if not self.is_up:
            raise Unavailable("the store of durable runs is away", {"retry_after_ms": RETRY_MS})
        if info is not None:
            if self.size >= self._limits.total_bytes:
                raise ResourceExhausted(
                    "the items of durable runs need too much memory; try again", {"retry_after_ms": RETRY_MS}
                )
            info = replace(info, owner=self._process)
            self._starting.add(info.generation)
        try:
            async with asyncio.timeout(OPEN_WITHIN_S):
                is_new, state = await self._repeat(
                    self._carrier.open, key, replace(opening, attachment=attachment, info=info)
                )
        except BaseException as error:
            if info is not None:
                if isinstance(error, Unavailable | TimeoutError | asyncio.CancelledError):
                    self._begin(self._disown(key, info))  # it may have been started
                elif isinstance(error, ResourceExhausted):
                    self._begin(self._suspect_all(key.user))
                self._starting.discard(info.generation)
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    "the store of durable runs does not answer", {"retry_after_ms": RETRY_MS}
                ) from None
            raise
        self._readers[key, attachment] = _Reader(state.order)
        if is_new:
            if key in self._owned:  # the store has lost that one, and its end
                self._release(key, self._owned[key])
            assert info is not None, "it was started"
            state = replace(state, info=info)
            self._owned[key] = _Owned(state)
            self.size += RUN_BYTES + info.size
        if info is not None:
            self._starting.discard(info.generation)
        return is_new, state

    async def append(
        self, key: RunKey, generation: bytes, first: int, bodies: Sequence[bytes], end: End | None
    ) -> RunState | None:
        """Add items and the end as `RunTable.append`. Waits while the store is away."""
        run = self._owned.get(key)
        if run is None or run.state.info.generation != generation:
            return None
        for body in bodies[run.next - first :]:
            run.copies.append(body)
            self.size += ITEM_BYTES + len(body)
        if end is not None:
            run.end = end
        return await self._repair(key, run)

    async def _repair(self, key: RunKey, run: _Owned) -> RunState | None:
        """Bring the log of a run to what its owner has. Return None if the run has ended otherwise."""
        async with run.lock:
            while self._owned.get(key) is run:
                bodies, changes = run.copies[run.stored - run.base :], run.changes
                end, taken = run.end, run.taken
                try:
                    state = await self._repeat(
                        self._carrier.append, key, run.state.info, run.stored, bodies, end, taken
                    )
                except Gap as gap:  # a failover has taken a part of the log
                    self.repaired += 1
                    run.stored = max(gap.next, run.base)
                    if gap.next < run.base and not await self._restore(key, run):
                        break
                    continue
                if state is None:
                    if not await self._restore(key, run):
                        break
                    run.stored = run.base
                    continue
                has_more = state.next > run.stored or state.end is not None
                run.state, run.stored, run.seen = state, state.next, changes
                if run.taken is taken:
                    run.taken = None
                self._drop_copies(run, state.taken)
                if state.end is not None and run.forget_at is None:
                    run.forget_at = self._now() + COPY_S
                if has_more:
                    self._wake(key)
                return state
        self._release(key, run)
        return None

    async def _restore(self, key: RunKey, run: _Owned) -> bool:
        lost = replace(run.state, taken=run.base)
        return await self._repeat(self._carrier.restore, key, lost)

    def _drop_copies(self, run: _Owned, before: int) -> None:
        count = min(max(before - run.base, 0), len(run.copies))
        self.size -= sum(ITEM_BYTES + len(body) for body in run.copies[:count])
        del run.copies[:count]
        run.base += count

    def _release(self, key: RunKey, run: _Owned) -> None:
        if self._owned.get(key) is run:
            del self._owned[key]
            self.size -= RUN_BYTES + run.state.info.size
            self._drop_copies(run, run.next)
            self._known[key] = self._now() + KNOWN_S
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)

    # --- readers ---------------------------------------------------------------------------------------

    def _named(self, attachment: str) -> str:
        return f"{self._process}.{attachment}"

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int
    ) -> tuple[RunState, Sequence[bytes]]:
        """Return items as `RunTable.read`. Waits while the store is away."""
        attachment = self._named(attachment)
        run = self._owned.get(key)
        if run is not None and run.serves(attachment, position):
            last = min(position + items, run.stored)
            return run.state, within(run.copies[position - run.base : last - run.base], size)
        reader = self._readers.get((key, attachment), _Reader(0))
        state, bodies = await self._repeat(
            self._carrier.read, key, attachment, position, items, size, reader.order
        )
        if reader.taken > state.taken:  # it came before the owner had repaired the log
            with suppress(Unavailable):
                await self._carrier.take(key, attachment, reader.taken, reader.order)
        self._look_at(key, state)
        return state, bodies

    async def take(self, key: RunKey, attachment: str, position: int) -> None:
        """Record what an attachment does not need any more; again after the store was away."""
        attachment = self._named(attachment)
        reader = self._readers.get((key, attachment))
        if reader is not None and position > reader.taken:
            reader.taken = position
            run = self._owned.get(key)
            if run is not None and run.end is None:  # the next append records it
                run.taken = attachment, position, reader.order
                if run.state.is_full:
                    self._wake(key)
                return
            with suppress(Unavailable):
                await self._carrier.take(key, attachment, position, reader.order)

    async def detach(self, key: RunKey, attachment: str) -> None:
        attachment = self._named(attachment)
        self._readers.pop((key, attachment), None)
        self._suspects.pop(key, None)
        await self._repeat(self._carrier.detach, key, attachment)

    async def cancel(self, key: RunKey, reason: str) -> bool:
        return await self._repeat(self._carrier.cancel, key, reason)

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]:
        found = await self._carrier.runs(user)
        for key, state in found:
            self._look_at(key, state)
        return found

    async def forget(self, user: str | None) -> int:
        """Delete the runs of a user, or of all users, later if the store is away: then return 0."""
        try:
            return await self._carrier.forget(user)
        except Unavailable:
            self._begin(self._repeat(self._carrier.forget, user))
            return 0

    def watch(self, key: RunKey, wake: Callable[[], None]) -> None:
        watchers = self._watchers.setdefault(key, [])
        watchers.append(wake)
        if len(watchers) == 1 and self.is_up:
            self._carrier.watch(key)

    def unwatch(self, key: RunKey, wake: Callable[[], None]) -> None:
        watchers = self._watchers.get(key, [])
        if wake in watchers:
            watchers.remove(wake)
            if not watchers:
                del self._watchers[key]
                if self.is_up and not self._is_stopped:
                    self._carrier.unwatch(key)

    # --- from the carrier ------------------------------------------------------------------------------

    def up(self) -> None:
        """The store is there: write back what it may have lost, and read again."""
        self._absences.clear()
        self._up.set()
        for key in self._watchers:
            self._carrier.watch(key)
        self._begin(self._write_back())

    def down(self) -> None:
        """The store is away."""
        self._up.clear()

    def woken(self, key: RunKey) -> None:
        """A run has changed, but by an append of this process."""
        run = self._owned.get(key)
        if run is not None:
            run.changes += 1
        self._wake(key)

    def _wake(self, key: RunKey) -> None:
        for wake in tuple(self._watchers.get(key, ())):
            wake()

    async def _write_back(self) -> None:
        at_once = asyncio.Semaphore(REPAIRS_AT_ONCE)

        async def repair(key: RunKey, run: _Owned) -> None:
            async with at_once:
                await self._repair(key, run)

        await asyncio.gather(*(repair(key, run) for key, run in [*self._owned.items()]))
        now = self._now()
        while self._known and next(iter(self._known.values())) <= now:
            self._known.popitem(last=False)
        await self._repeat(self._carrier.restored, [*self._known])
        for (key, attachment), reader in [*self._readers.items()]:
            await self._repeat(self._carrier.take, key, attachment, reader.taken, reader.order)
        await self._wake_all(self._watchers)

    async def _wake_all(self, keys: Iterable[RunKey]) -> None:
        for count, key in enumerate([*keys]):
            self.woken(key)
            if not count % REPAIRS_AT_ONCE:
                await asyncio.sleep(0)

    # --- time ------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget the copies of ends that were kept long enough."""
        now = self._now()
        for key, run in [*self._owned.items()]:
            if run.forget_at is not None and run.forget_at <= now:
                self._release(key, run)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            self.sweep()
            await self._wake_all({key for key, _ in self._readers})

    def _look_at(self, key: RunKey, state: RunState) -> None:
        """Note a run that this process depends on and another one runs; end one that no process runs."""
        self._suspects.pop(key, None)
        if state.end is not None:
            return
        info = state.info
        if info.owner != self._process:
            self._suspects[key] = state
        elif info.generation not in self._starting:
            run = self._owned.get(key)
            if run is None or run.state.info.generation != info.generation:
                self._begin(self._disown(key, info))

    async def _suspect_all(self, user: str) -> None:
        """Look for runs of a user whose owners are lost: they count for its bound."""
        with suppress(Unavailable):
            await self.runs(user)

    async def _disown(self, key: RunKey, info: RunInfo, items: int = 0) -> None:
        """Write the end of a run that no process runs."""
        while True:
            try:
                await self._repeat(self._carrier.append, key, info, items, [], owner_lost(items), None)
            except Gap as gap:
                items = gap.next
            else:
                self.lost += 1
                log_lost(key, items)
                self.woken(key)
                return

    async def _check(self) -> None:
        """End the runs of processes that are lost, and the attachments of those to own runs."""
        while True:
            await asyncio.sleep(CHECK_S)
            attached = {
                key: run.state.attachment
                for key, run in self._owned.items()
                if run.state.is_attached and process_of(run.state.attachment) != self._process
            }
            suspects = dict(self._suspects)
            processes = {state.info.owner for state in suspects.values()}
            processes.update(map(process_of, attached.values()))
            if not processes or not self.is_up:
                self._absences.clear()
                continue
            try:
                missing = await self._carrier.missing(processes)
            except Unavailable:
                self._absences.clear()
                continue
            reading = {key for key, _ in self._readers}
            for key, state in suspects.items():
                if state.info.owner not in missing and key not in reading:  # it was only listed
                    self._suspects.pop(key, None)
            await self._end_lost(self._absences.lost(missing, self._now()), suspects, attached)

    async def _end_lost(
        self, lost: set[str], suspects: Mapping[RunKey, RunState], attached: Mapping[RunKey, str]
    ) -> None:
        for key, state in suspects.items():
            if state.info.owner in lost:
                self._suspects.pop(key, None)
                await self._disown(key, state.info, state.next)
        for key, attachment in attached.items():
            if process_of(attachment) in lost:
                with suppress(NotFound):
                    await self._repeat(self._carrier.detach, key, attachment)
