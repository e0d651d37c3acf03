"""The durable runs of all workers: in the table of the coordinator, which they reach over a link.

    worker: open, append, read, ... -> coordinator: RunTable
    worker: WATCH                   -> coordinator: WOKEN, when a run has changed, but by its own append

Rules:
- The link is of its own: the calls of sessions never wait behind items.
- A worker joins with its process id. After LOST_S without it, the coordinator writes the end of its runs.
- A new coordinator has an empty table. Until all workers have written back their runs, for LOST_S at most, it
  answers UNAVAILABLE to a worker that asks for a run which it does not know.

It must not know: methods, the content of items.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from zcproto.bus.topics import MAX_WAITING
from zcproto.errors import Unavailable
from zcproto.runs.log import (
    RETRY_MS,
    End,
    Gap,
    Opening,
    RunInfo,
    RunKey,
    RunLimits,
    RunState,
    RunTable,
    Superseded,
    Taken,
)
from zcproto.runs.shared import LOST_S, Absences, SharedRuns, log_lost, owner_lost, process_of
from zcproto.runs.store import MemoryRuns
from zcproto.workers.link import NOTICE, Link, LinkClient, LinkLost, LinkServer, Topics, pack

WATCH: Final = "runs.watch"
UNWATCH: Final = "runs.unwatch"
WOKEN: Final = "runs.woken"

SWEEP_S: Final = 1.0

_GAP: Final = "gap"
_SUPERSEDED: Final = "superseded"
_UNKNOWN_IS_AWAITED: Final = ("open", "read", "cancel", "detach")
"""Operations for which a run that the coordinator does not know may still be written back."""


def info_values(info: RunInfo) -> list[Any]:
    """Return what is fixed of a run as msgpack has it."""
    return [getattr(info, name) for name in RunInfo.__slots__]


def state_values(state: RunState) -> list[Any]:
    """Return a run as msgpack has it."""
    values = [getattr(state, name) for name in RunState.__slots__]
    return [info_values(state.info), *values[1:]]


def state_of(values: Sequence[Any], info: RunInfo | None = None) -> RunState:
    """Reverse `state_values`, perhaps with an `info` that is known."""
    state = RunState(info or RunInfo(*values[0]), *values[1:])
    state.end = _end_of(state.end)
    return state


def _end_of(values: Sequence[Any] | None) -> End | None:
    return None if values is None else (values[0], values[1])


@dataclass(slots=True)
class _Watched:
    """A run that workers watch, whether the table knows it or not."""

    key: RunKey
    links: dict[Link, None] = field(default_factory=dict)
    appender: Link | None = None
    """The one that appends now, and need not be woken."""

    def wake(self) -> None:
        data = pack(NOTICE, WOKEN, self.key)
        for link in self.links:
            if link is not self.appender and link.waiting <= MAX_WAITING:  # else it reads every POLL_S
                link.send(data)


class RunHub:
    """The runs of so many workers, in the coordinator, whose store is `store`. `now` is in monotonic seconds."""

    def __init__(self, limits: RunLimits, workers: int, now: Callable[[], float]) -> None:
        self.table = RunTable(limits, may_lag=True)
        self.store = MemoryRuns(self.table, now)
        self._workers = workers
        self._now = now
        self._complete_at = now() + LOST_S
        self._restored: set[str] = set()
        self._processes: dict[Link, str] = {}
        self._watched: dict[RunKey, _Watched] = {}
        self._absences = Absences()

    def serve(self, server: LinkServer) -> None:
        """Answer the workers."""
        server.topics.notices |= {WATCH: self._watch, UNWATCH: self._unwatch}
        server.topics.calls |= {"runs.join": self._join, "runs.restored": self._note_restored}
        for name in ("open", "append", "restore", "read", "take", "detach", "cancel", "runs", "forget"):
            server.topics.calls[f"runs.{name}"] = partial(self._perform, name, getattr(self, f"_{name}"))
        server.on_lost.append(self._lost)

    async def run(self) -> None:
        """Delete what is not kept any more, and end the runs of workers that are lost, for ever."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        now, present = self._now(), {*self._processes.values()}
        self.table.sweep(now)
        runs = self.table.runs()
        processes = {state.info.owner for _, state in runs if state.end is None}
        processes |= {process_of(state.attachment) for _, state in runs if state.is_attached}
        lost = self._absences.lost(processes - present, now)
        if not lost:
            return
        for key, state in runs:
            if state.end is None and state.info.owner in lost:
                self.table.append(key, state.info.generation, state.next, [], owner_lost(state.next), now)
                self.store.lost += 1
                log_lost(key, state.next)
            if state.is_attached and process_of(state.attachment) in lost:
                self.table.detach(key, state.attachment, now)

    # --- workers ---------------------------------------------------------------------------------------

    async def _join(self, link: Link, process: str) -> None:
        self._processes[link] = process

    async def _note_restored(self, link: Link, known: list[list[str]]) -> None:
        self.table.known((RunKey(*key) for key in known), self._now())
        if link in self._processes:
            self._restored.add(self._processes[link])

    def _lost(self, link: Link) -> None:
        self._processes.pop(link, None)
        for key in [key for key, watched in self._watched.items() if link in watched.links]:
            self._unwatch(link, *key)

    def _watch(self, link: Link, user: str, id_: str) -> None:
        key = RunKey(user, id_)
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(key)
            if self.table.knows(key):
                self.table.watch(key, watched.wake)
        watched.links[link] = None

    def _unwatch(self, link: Link, user: str, id_: str) -> None:
        key = RunKey(user, id_)
        watched = self._watched.get(key)
        if watched is not None:
            watched.links.pop(link, None)
            if not watched.links:
                del self._watched[key]
                self.table.unwatch(key, watched.wake)

    # --- operations ------------------------------------------------------------------------------------

    def _perform(
        self, name: str, operation: Callable[..., Any], link: Link, user: str | None, *arguments: Any
    ) -> Any:
        if name in ("runs", "forget"):
            return operation(user)
        assert user is not None, "the operation concerns a run"
        key = RunKey(user, arguments[0])
        is_complete = len(self._restored) >= self._workers or self._now() >= self._complete_at
        if name in _UNKNOWN_IS_AWAITED and not is_complete and not self.table.knows(key):
            raise Unavailable("the coordinator was replaced; retry", {"retry_after_ms": RETRY_MS})
        watched = self._watched.get(key) if name == "append" else None
        if watched is None:
            return operation(key, *arguments[1:])
        watched.appender = link
        try:
            return operation(key, *arguments[1:])
        finally:
            watched.appender = None

    def _open(self, key: RunKey, opening: list[Any], info: list[Any] | None) -> Any:
        method, digest, position, attachment, is_bound = opening
        given = Opening(
            method, digest, position, attachment, is_bound, None if info is None else RunInfo(*info)
        )
        is_new, state = self.table.open(key, given, self._now())
        return is_new, state_values(state)

    def _append(
        self, key: RunKey, generation: bytes, first: int, bodies: list[bytes], end: Any, taken: Any
    ) -> Any:
        try:
            state = self.table.append(key, generation, first, bodies, _end_of(end), self._now(), taken)
        except Gap as gap:
            return _GAP, gap.next
        return None if state is None else (None, *state_values(state)[1:])

    def _restore(self, key: RunKey, lost: list[Any]) -> bool:
        was_known = self.table.knows(key)
        is_restored = self.table.restore(key, state_of(lost), self._now())
        if is_restored and not was_known and key in self._watched:
            self.table.watch(key, self._watched[key].wake)
        return is_restored

    def _read(self, key: RunKey, *arguments: Any) -> Any:
        try:
            state, bodies = self.table.read(key, *arguments)
        except Superseded:
            return _SUPERSEDED
        return state_values(state), bodies

    def _take(self, key: RunKey, *arguments: Any) -> None:
        self.table.take(key, *arguments)

    def _detach(self, key: RunKey, attachment: str) -> None:
        self.table.detach(key, attachment, self._now())

    def _cancel(self, key: RunKey, reason: str) -> bool:
        return self.table.cancel(key, reason)

    def _runs(self, user: str) -> Any:
        return [(key.id, state_values(state)) for key, state in self.table.runs(user)]

    def _forget(self, user: str | None) -> int:
        return self.table.forget(user, self._now())


class WorkerRuns:
    """The carrier of a worker's runs: its link to the coordinator at `path`. `process` is its id."""

    def __init__(
        self, path: Path, process: str, *, name: str, silence: float, random: Callable[[], float]
    ) -> None:
        self._process = process
        self._client = LinkClient(
            path, Topics(notices={WOKEN: self._woken}), name=name, silence=silence, random=random
        )
        self._runs: SharedRuns | None = None
        self._joining: asyncio.Task[None] | None = None

    async def start(self, runs: SharedRuns) -> None:
        self._runs = runs
        self._client.on_up.append(self._found)
        self._client.on_down.append(lambda link: runs.down())
        self._client.start()

    async def stop(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
        await self._client.close()

    def _found(self, link: Link) -> None:
        self._joining = asyncio.get_running_loop().create_task(self._join(link))

    async def _join(self, link: Link) -> None:
        assert self._runs is not None, "it was started"
        try:
            await link.call("runs.join", self._process, is_lasting=True)
        except LinkLost:
            link.lose("the coordinator does not answer")
        else:
            self._runs.up()

    def _woken(self, link: Link, user: str, id_: str) -> None:
        assert self._runs is not None, "it was started"
        self._runs.woken(RunKey(user, id_))

    async def _call(self, name: str, user: str | None, *arguments: Any) -> Any:
        try:
            return await self._client.call(f"runs.{name}", user, *arguments, is_lasting=True)
        except LinkLost as error:
            raise Unavailable(error.reason) from None

    def reconfigure(self, limits: RunLimits) -> None:
        """Do nothing: the limits are those of the coordinator."""

    def watch(self, key: RunKey) -> None:
        self._client.notify(WATCH, *key)

    def unwatch(self, key: RunKey) -> None:
        self._client.notify(UNWATCH, *key)

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]:
        *values, info = (getattr(opening, name) for name in Opening.__slots__)
        is_new, state = await self._call("open", *key, values, None if info is None else info_values(info))
        return is_new, state_of(state)

    async def append(
        self,
        key: RunKey,
        info: RunInfo,
        first: int,
        bodies: Sequence[bytes],
        end: End | None,
        taken: Taken | None,
    ) -> RunState | None:
        answer = await self._call("append", *key, info.generation, first, bodies, end, taken)
        if answer is not None and answer[0] == _GAP:
            raise Gap(answer[1])
        return None if answer is None else state_of(answer, info)

    async def restore(self, key: RunKey, lost: RunState) -> bool:
        return bool(await self._call("restore", *key, state_values(lost)))

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int, order: int
    ) -> tuple[RunState, Sequence[bytes]]:
        answer = await self._call("read", *key, attachment, position, items, size, order)
        if answer == _SUPERSEDED:
            raise Superseded
        return state_of(answer[0]), answer[1]

    async def take(self, key: RunKey, attachment: str, position: int, order: int) -> None:
        await self._call("take", *key, attachment, position, order)

    async def detach(self, key: RunKey, attachment: str) -> None:
        await self._call("detach", *key, attachment)

    async def cancel(self, key: RunKey, reason: str) -> bool:
        return bool(await self._call("cancel", *key, reason))

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]:
        return [(RunKey(user, id_), state_of(values)) for id_, values in await self._call("runs", user)]

    async def forget(self, user: str | None) -> int:
        return int(await self._call("forget", user))

    async def missing(self, processes: Collection[str]) -> set[str]:
        """Return none: the coordinator ends the runs of lost workers."""
        return set()

    async def restored(self, known: Iterable[RunKey]) -> None:
        try:
            await self._client.call("runs.restored", [*known], is_lasting=True)
        except LinkLost as error:
            raise Unavailable(error.reason) from None
