"""Runs durable methods, and reads their items for the streams that are attached to them.

    OPEN with resume -> store.open -> new: the method runs in a task of this process, and appends its items
                                   -> `serve`: ACCEPTED, the stored items, then the answer

Decides: when a method waits, when it is cancelled, and which answer ends a run.

Rules:
- A run belongs to its user. The end of a connection ends an attachment and nothing else.
- A method waits at its `yield` while the items that were not taken reach a bound, whether one reads them or not.
- The items of one turn of the loop are one append, of a batch at most: by so much a method may exceed a bound.
- A run ends with CANCEL, its deadline, the revocation of the session that opened it, the end of its user or of the
  role that its method needs, and after `abandon_after` seconds without an attachment. While it waits for the answer
  to a pending call it is not abandoned, unless the session that opened it has expired.
- A session that may not attach to a run neither lists nor cancels it: one that is less bound than the one that has
  opened it, or whose roles do not allow its method.

It must not know: where runs are stored, what is on the wire.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any, Final, cast

from zcproto.app.app import Method
from zcproto.app.context import CallConnection, ConnectedClient, Context
from zcproto.app.topics import TopicEvent
from zcproto.auth.identity import Channel
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.deadlines import next_multiple
from zcproto.common.parameters import Ended
from zcproto.connection.events import NEVER, DurableStream, Request
from zcproto.connection.refusals import RESUMED_ELSEWHERE
from zcproto.connection.server import ServerConnection
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import (
    CallError,
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from zcproto.runs.log import (
    ITEM_BYTES,
    RETRY_MS,
    End,
    Opening,
    RunInfo,
    RunKey,
    RunLimits,
    RunState,
    Superseded,
    check_binding,
)
from zcproto.runs.store import RunStore
from zcproto.server.idempotency import Answer, canonical_request
from zcproto.server.protocol_methods import protocol_method
from zcproto.server.state import DETACHED, ServerState, log
from zcproto.server.streams import StreamRunner
from zcproto.sessions import EndReason, Session
from zcproto.wire.frame import MIN_LENGTH, NO_TOKEN
from zcproto.wire.message import MessageError, encode_error

SWEEP_S: Final = 5.0
CHECKED_PER_TURN: Final = 100
"""Sessions that are checked in one turn of the loop."""

BATCH_ITEMS: Final = 64
BATCH_BYTES: Final = 65_536
"""What is read, or appended, at once."""

MAX_STOPPING: Final = 16
"""Methods of one user that were cancelled and have not ended. With more no run starts."""

_ID_SIZE: Final = 16

NOT_DURABLE: Final = "this method is not durable; declare it with durable=True, or open it as a plain stream"


def serve_runs(state: ServerState, store: RunStore, abandon_after: float) -> None:
    """Let clients open durable methods durably, if there is one."""
    if state.settings.streams is None or not any(each.is_durable for each in state.methods.values()):
        return
    state.runs = runs = DurableRuns(state, store, abandon_after)
    state.add_methods(_run_methods(runs))
    state.reconfigure(state.settings)


def _run_methods(runs: DurableRuns) -> list[Method]:
    """Return `stream.list` and `stream.cancel`."""

    async def stream_list(context: Context) -> list[dict[str, Any]]:
        """The durable runs of this user: those that run, and those that are kept."""
        assert context.session is not None, "it is not public"
        return await runs.describe(context.session)

    async def stream_cancel(context: Context, id: str) -> dict[str, Any]:
        """Cancel a durable run of this user by its `id`. `cancelled` is whether it was running."""
        assert context.session is not None, "it is not public"
        return {"cancelled": await runs.cancel(context.session, id)}

    return [protocol_method("stream.list", stream_list), protocol_method("stream.cancel", stream_cancel)]


@dataclass(slots=True)
class _Opener:
    """A session that has opened runs of this process. It expires at `until` for good, in wall time."""

    raw_id: bytes
    until: int
    runs: dict[RunKey, OwnedRun] = field(default_factory=dict)


class DurableRuns:
    """The durable runs of one process. `abandon_after` is in seconds."""

    deadline_tick = 0

    def __init__(self, state: ServerState, store: RunStore, abandon_after: float) -> None:
        self.state = state
        self.store = store
        self.abandon_after = abandon_after
        self._owned: dict[RunKey, OwnedRun] = {}
        self._openers: dict[str, _Opener] = {}  # by the id of the session
        self._is_checking = False
        self._opening: set[DurableStream] = set()
        self._readers: dict[DurableStream, tuple[RunKey, str]] = {}
        self._newest: dict[RunKey, tuple[DurableStream, StreamRunner, int]] = {}  # and its order
        self.items = 0
        """Items of the methods."""
        self.ended: Counter[str] = Counter()
        """Runs that ended, by the name of their code; `ok` for a result."""
        self.stopping: Counter[str] = Counter()
        """Methods that were cancelled and have not ended, by user."""
        self._idle: asyncio.Event | None = None
        state.registry.observers.append(self._session_ended)

    def __len__(self) -> int:
        """Return how many methods run."""
        return len(self._owned)

    @property
    def attached(self) -> int:
        return len(self._readers)

    def reconfigure(self, limits: RunLimits, abandon_after: float) -> None:
        """Apply new limits. A bound that is lower holds for the next item, and the next run."""
        self.store.reconfigure(limits)
        self.abandon_after = abandon_after

    # --- attachments -----------------------------------------------------------------------------------

    async def serve(
        self, stream: DurableStream, method: Method, runner: StreamRunner, connection: ServerConnection
    ) -> Answer:
        """Start or find the run of an OPEN and send its items. Return its answer. Raises that of the attachment."""
        session, resume = stream.session, stream.resume
        assert session is not None, "a stream needs one"
        if not method.is_durable:
            raise FailedPrecondition(NOT_DURABLE)
        key = RunKey(session.user, resume.id)
        attachment = self.state.entropy(_ID_SIZE).hex()
        opening, run = Opening(method.name, None, resume.position, attachment, session.bound), None
        if not resume.attaches:
            if self.stopping[session.user] >= MAX_STOPPING:
                raise ResourceExhausted(
                    "too many durable methods of this user were cancelled and have not ended; try again",
                    {"retry_after_ms": RETRY_MS},
                )
            run = OwnedRun(self, key, method, stream, runner.owner.peer)
            info = run.describe(canonical_request(method.name, stream.params))
            opening = replace(opening, digest=info.digest, info=info)
        opened = self.state.tasks.start_task(self._open(key, opening, run), self._opened)
        self._opening.add(stream)
        try:
            state = await asyncio.shield(opened)  # a cut must not leave a run that no process runs
        except asyncio.CancelledError:
            is_cancelled = stream not in self._opening  # by its client
            opened.add_done_callback(partial(self._leave, key, attachment, is_cancelled))
            raise
        finally:
            self._opening.discard(stream)
        accepted = {
            "id": resume.id,
            "attachment": attachment,
            "from": resume.position,
            "state": "running" if state.end is None else "ended",
            "first": state.first,
            "next": max(state.next, resume.position),  # its log may lag behind the items that a client has
        }
        self._begin_reading(stream, runner, key, attachment, state.order)
        try:
            connection.accept(
                stream, accepted, self.state.clock.wall(), is_opener=state.info.session == session.id
            )
            runner.owner.flush_soon()  # the client waits for ACCEPTED, though no item may follow for long
            items = self._items(stream, runner, key, attachment)
            return cast("Answer", await runner.produce(stream, items, _unchanged))
        except MessageError as error:  # it was stored under a larger limit
            raise FailedPrecondition(f"{error}; resume behind it") from None
        finally:
            self._readers.pop(stream, None)
            if self._newest.get(key, (None,))[0] is stream:
                del self._newest[key]
            self._do(self.store.detach(key, attachment))

    def _begin_reading(
        self, stream: DurableStream, runner: StreamRunner, key: RunKey, attachment: str, order: int
    ) -> None:
        """Cut the attachment of this process that a newer one has replaced, though it may wait for credit."""
        self._readers[stream] = key, attachment
        older = self._newest.get(key)
        if older is None or older[2] <= order:
            self._newest[key] = stream, runner, order
            if older is not None and not older[0].is_answered:
                older[1].owner.cut_stream(older[0], RESUMED_ELSEWHERE)

    def _opened(self, task: asyncio.Task[RunState]) -> None:
        self.state.tasks.forget_task(task)
        if not task.cancelled():
            task.exception()  # it is raised in `serve`, unless that was cut

    def _leave(
        self, key: RunKey, attachment: str, is_cancelled: bool, opened: asyncio.Task[RunState]
    ) -> None:
        """End an attachment that was cut before it could read. One that was refused does not cancel the run."""
        is_accepted = not opened.cancelled() and opened.exception() is None
        if is_cancelled and is_accepted:
            self._do(self.store.cancel(key, "caller"))
        self._do(self.store.detach(key, attachment))

    async def _open(self, key: RunKey, opening: Opening, run: OwnedRun | None) -> RunState:
        is_new, state = await self.store.open(key, opening)
        if is_new:
            assert run is not None, "only an OPEN with params starts a run"
            self._begin(run, state)
        return state

    async def _items(
        self, stream: DurableStream, runner: StreamRunner, key: RunKey, attachment: str
    ) -> AsyncGenerator[Any, None]:
        """Yield the items of a run from the position of an attachment on, and at last its answer."""
        position, changed = stream.resume.position, asyncio.Event()
        self.store.watch(key, changed.set)
        try:
            while True:
                changed.clear()
                try:
                    state, bodies = await self.store.read(key, attachment, position, BATCH_ITEMS, BATCH_BYTES)
                except Superseded:
                    runner.owner.cut_stream(stream, RESUMED_ELSEWHERE)
                    return
                for body in bodies:
                    position += 1
                    yield body
                if state.end is not None and position == state.next:
                    yield Ended(Answer(*state.end))
                    return
                if not bodies or position >= state.next:
                    await changed.wait()
        finally:
            self.store.unwatch(key, changed.set)

    def credit_received(self, stream: DurableStream) -> None:
        """Record which items the client does not need any more."""
        reader = self._readers.get(stream)
        if reader is not None and stream.taken > 0:
            self._do(self.store.take(*reader, stream.taken))

    def cut(self, stream: DurableStream, reason: str) -> None:
        """Cancel the run of an attachment that its client has cancelled, perhaps before it has begun to read."""
        if reason == "caller" and stream.session is not None:
            self._opening.discard(stream)
            self._do(self.cancel(stream.session, stream.resume.id))

    def _do(self, operation: Coroutine[Any, Any, object]) -> None:
        """Run an operation of the store without waiting for it."""
        with suppress(CallError):  # it has gone, or is repeated by the next attachment
            self.state.tasks.start(operation)

    # --- the runs of this process ----------------------------------------------------------------------

    def _begin(self, run: OwnedRun, state: RunState) -> None:
        session, record = run.session, self.state.registry.record(run.session.raw_id)
        self.state.wheel.set(self, next_multiple(SWEEP_S, self.state.clock.now()))
        self._owned[run.key] = run
        opener = self._openers.setdefault(session.id, _Opener(session.raw_id, session.expires_at))
        opener.runs[run.key] = run
        run.begin(state)
        if not run.method.may_be_called_by(session):
            run.stop("denied")
        elif record is not None:
            opener.until = max(record.expires_at, record.refresh_expires_at)
        else:  # it has ended since the OPEN was read, or has left the cache with its connection
            ended = self.state.registry.ended(session.raw_id)
            if ended is not None and ended.code is Code.TOKEN_REVOKED:
                run.stop("token_revoked")

    def forget(self, run: OwnedRun, end: End | None) -> None:
        """Forget a run whose end is stored, or None if it was deleted."""
        self.ended["deleted" if end is None else Code(end[0]).name.lower() if end[0] else "ok"] += 1
        if self._owned.get(run.key) is run:  # else another one has replaced it
            del self._owned[run.key]
            if self._idle is not None and not self._owned:
                self._idle.set()
        opener = self._openers.get(run.session.id)
        if opener is not None and opener.runs.get(run.key) is run:
            del opener.runs[run.key]
            if not opener.runs:
                del self._openers[run.session.id]

    def stopped(self, user: str) -> None:
        """Note that a method has ended which was cancelled."""
        self.stopping[user] -= 1
        if not self.stopping[user]:
            del self.stopping[user]

    def _session_ended(self, session_id: str, code: Code, reason: EndReason) -> None:
        """Cancel the runs of a session that was revoked, or has logged out."""
        if code is Code.TOKEN_REVOKED:
            self._revoked(session_id)

    def _revoked(self, session_id: str) -> None:
        opener = self._openers.get(session_id)
        for run in [] if opener is None else [*opener.runs.values()]:
            run.stop("token_revoked")

    async def _check_openers(self) -> None:
        """Cancel the runs of sessions that were revoked while they were expired, or not in this process's cache.

        Observers do not learn of these.
        """
        if self._is_checking:
            return
        self._is_checking = True
        try:
            for number, (session_id, opener) in enumerate([*self._openers.items()], 1):
                record = self.state.registry.record(opener.raw_id)
                if record is not None:
                    opener.until = max(record.expires_at, record.refresh_expires_at)
                elif await self._is_revoked(session_id, opener):
                    self._revoked(session_id)
                if number % CHECKED_PER_TURN == 0:
                    await asyncio.sleep(0)
        finally:
            self._is_checking = False

    async def _is_revoked(self, session_id: str, opener: _Opener) -> bool:
        """Return whether a session was revoked that the registry does not have.

        One that has neither a record nor a tombstone counts as revoked until it would have expired.
        """
        ended = self.state.registry.ended(opener.raw_id)
        if ended is not None:
            return ended.code is Code.TOKEN_REVOKED
        if self.state.clock.wall() >= opener.until or not opener.runs:
            return False
        user = next(iter(opener.runs.values())).session.user
        try:
            sessions = await self.state.sessions.list(user)
        except CallError:  # it is checked again
            return False
        return all(info.id != session_id for info in sessions)

    def lives(self, session_id: str) -> bool:
        """Return whether the session that opened runs has neither been revoked nor expired for good."""
        opener = self._openers.get(session_id)
        return opener is not None and self.state.clock.wall() < opener.until

    def cut_denied(self) -> None:
        """Cancel the runs whose sessions may no longer call their methods."""
        for run in [*self._owned.values()]:
            if not self.state.methods[run.method.name].may_be_called_by(run.session):
                run.stop("denied")

    async def cancel(self, session: Session, id: str) -> bool:
        """Cancel a run. Return whether it was running. Raises NotFound or PermissionDenied."""
        key = RunKey(session.user, id)
        for found, state in await self.store.runs(session.user):
            if found == key:
                check_binding(state.info, session.bound)
                if not self._may_call(session, state):
                    raise PermissionDenied("the roles of this session do not allow the method of this run")
                return await self.store.cancel(key, "caller")
        raise NotFound("there is no run with this id; call stream.list for those that are kept")

    async def describe(self, session: Session) -> list[dict[str, Any]]:
        """Return the runs that a session may read."""
        return [
            {
                "id": key.id,
                "method": state.info.method,
                "state": "running" if state.end is None else "ended",
                "first": state.first,
                "next": state.next,
                "since": state.info.since,
                "attached": state.is_attached,
                "session": state.info.session,
                "address": state.info.peer,
            }
            for key, state in await self.store.runs(session.user)
            if (session.bound or not state.info.is_bound) and self._may_call(session, state)
        ]

    def _may_call(self, session: Session, state: RunState) -> bool:
        """Return whether the roles of a session allow the method of a run, which must be known here."""
        method = self.state.methods.get(state.info.method)
        return method is not None and method.may_be_called_by(session)

    async def wait_idle(self) -> None:
        """Wait until no method runs. Called once, when the server drains."""
        self._idle = asyncio.Event()
        if self._owned:
            await self._idle.wait()

    def close(self) -> None:
        """Cancel all methods: the server has stopped."""
        self.state.registry.observers.remove(self._session_ended)
        self.state.wheel.discard(self)
        for run in [*self._owned.values()]:
            run.stop("draining")
            self.state.wheel.discard(run)

    def handle_deadline(self, now: float) -> None:
        self.store.sweep()
        self._do(self._check_openers())
        self.state.wheel.set(self, next_multiple(SWEEP_S, now))


class OwnedRun:
    """A run whose method this process runs. Its methods are called by its task, by the store and by the wheel."""

    __slots__ = (
        "_abandoned_at",
        "_arguments",
        "_deadline",
        "_flush_planned",
        "_is_appending",
        "_next",
        "_pending",
        "_pending_bytes",
        "_room",
        "_runs",
        "_state",
        "_task",
        "_waiting",
        "deadline_tick",
        "end",
        "key",
        "method",
        "peer",
        "request",
        "session",
    )

    def __init__(
        self, runs: DurableRuns, key: RunKey, method: Method, request: DurableStream, peer: str
    ) -> None:
        assert request.session is not None, "a stream needs one"
        self._runs = runs
        self.key = key
        self.method = method
        self.peer = peer
        self.session = request.session
        self.request = Request(  # its params are in the arguments; a run must not keep a token that is valid
            0, NO_TOKEN, request.session, method.name, {}, request.meta, held=True
        )
        self._arguments = method.bind(request.params)
        if method.context_name is not None:
            self._arguments[method.context_name] = RunContext(
                cast("CallConnection", RunCaller(runs.state, self)), self.request
            )
        self._state: RunState
        self.end: End | None = None
        self.deadline_tick = 0
        self._waiting = 0  # pending calls whose answers the method awaits
        self._deadline = NEVER
        self._abandoned_at = NEVER
        self._next = 0  # the position of the first pending item
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._flush_planned = self._is_appending = False
        self._room: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None

    def describe(self, request: bytes) -> RunInfo:
        """Return what the store keeps of the run, whose canonical request is given."""
        state, deadline_ms = self._runs.state, self.request.meta.deadline_ms
        wall = state.clock.wall()
        if deadline_ms is not None:
            self._deadline = state.clock.now() + deadline_ms / MS_PER_SECOND
            self.request.deadline = self._deadline
        return RunInfo(
            method=self.method.name,
            digest=sha256(request).digest(),
            session=self.session.id,
            peer=self.peer,
            is_bound=self.session.bound,
            since=wall,
            deadline=None if deadline_ms is None else wall + deadline_ms,
            owner=state.run,
            generation=state.entropy(_ID_SIZE),
            size=len(request),
        )

    def begin(self, state: RunState) -> None:
        """Run the method."""
        self._state = state
        method, arguments = self.method, self._arguments
        del self._arguments
        if method.middleware:
            work = method.function(**arguments, produce=partial(self._produce, encode=method.encode_item))
        else:
            work = self._produce(method.function(**arguments), method.encode_item)
        self._runs.store.watch(self.key, self.look)
        self._runs.state.wheel.set(self, self._deadline)
        self._task = self._runs.state.tasks.start_task(work, self._task_ended)

    # --- items -----------------------------------------------------------------------------------------

    async def _produce(self, items: AsyncGenerator[Any, None], encode: Callable[[Any], bytes]) -> Any:
        """Append the items of a generator; return the result that it ends with."""
        limits = self._runs.state.settings.streams
        assert limits is not None, "streams are announced"
        most = limits.max_item - MIN_LENGTH
        try:
            async for item in items:
                if item.__class__ is Ended:
                    return item.result
                body = item.body if item.__class__ is TopicEvent else encode(item)
                if len(body) > most:
                    raise MessageError(
                        f"the item has {len(body)} bytes; at most {most} fit (streams.max_item_bytes)"
                    )
                if self.end is not None:  # cancelled, and the generator has ignored that
                    return None
                self._pending.append(body)
                self._pending_bytes += ITEM_BYTES + len(body)
                if not self._flush_planned:
                    self._flush_planned = True
                    self._runs.state.call_soon(self._flush)
                if (
                    self._state.is_full
                    or len(self._pending) >= BATCH_ITEMS
                    or self._pending_bytes >= BATCH_BYTES
                ):
                    await self._wait_for_room()
        finally:
            await items.aclose()
        return None

    async def _wait_for_room(self) -> None:
        """Wait until what is pending is stored, and there is room for more."""
        while self.end is None and (self._pending or self._state.is_full):
            self._room = asyncio.get_running_loop().create_future()
            try:
                await self._room
            finally:
                self._room = None

    def look(self) -> None:
        """Look at the run in the store, and append what is pending, at the end of this turn."""
        if not (self._flush_planned or self._is_appending):
            self._flush_planned = True
            self._runs.state.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        if not self._is_appending:
            self._is_appending = True
            self._runs.state.tasks.start(self._append())

    async def _append(self) -> None:
        """Append until nothing is pending, and the end if there is one."""
        is_done = False
        try:
            while True:
                bodies, self._pending, self._pending_bytes = self._pending, [], 0
                first, self._next, end = self._next, self._next + len(bodies), self.end
                self._runs.items += len(bodies)
                generation = self._state.info.generation
                state = await self._runs.store.append(self.key, generation, first, bodies, end)
                if state is None or end is not None:
                    self._forget(None if state is None else end)
                    is_done = True
                    return
                self._observe(state)
                if not self._pending and self.end is None:
                    is_done = True
                    return
        finally:
            self._is_appending = False
            if not is_done:  # cancelled, because the server ends
                self.look()

    def _observe(self, state: RunState) -> None:
        """Do what the state of the run asks for."""
        self._state = state
        if state.cancel:
            self.stop(state.cancel)
        if state.is_attached:
            self._abandoned_at = NEVER
        elif self._abandoned_at == NEVER:
            self._abandoned_at = self._runs.state.clock.now() + self._runs.abandon_after
        self._runs.state.wheel.set(self, min(self._deadline, self._abandoned_at))
        if self._room is not None and not (self._room.done() or state.is_full):
            self._room.set_result(None)

    # --- the end ---------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End the run, and cancel its method."""
        if self.end is None:
            error: CallError = Cancelled("the run was cancelled", {"reason": reason})
            if reason == "deadline":
                error = DeadlineExceeded("the deadline of the run has passed")
            elif reason == "draining":
                error = Cancelled("the server stopped before the method returned", {"reason": reason})
            self.end = error.code, encode_error(error.code, error.message, error.details)
            log.info(
                "run.cancelled",
                user=self.key.user,
                run=self.key.id,
                what=self.method.name,
                reason=reason,
                session=self.session.id,
            )
            self._cancel()
            self.look()

    def _cancel(self) -> None:
        assert self._task is not None, "it was begun"
        self._task.cancel()
        self._runs.stopping[self.key.user] += 1

    def handle_deadline(self, now: float) -> None:
        if now >= self._deadline:
            self.stop("deadline")
        elif now >= self._abandoned_at:
            if self._waiting and self._runs.lives(self.session.id):
                self._await_reader()
            else:
                self.stop("abandoned")

    def _await_reader(self) -> None:
        """Let the run go on for `abandon_after` from now without an attachment."""
        self._abandoned_at = self._runs.state.clock.now() + self._runs.abandon_after
        self._runs.state.wheel.set(self, min(self._deadline, self._abandoned_at))

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Do not count the body's time as abandoned: it waits for a person, whose client may not be connected."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting and self.end is None and self._abandoned_at != NEVER:
                self._await_reader()

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        """Store the answer of the method, unless the run has ended before."""
        state = self._runs.state
        state.tasks.forget_task(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self.end is not None:  # it was cancelled
            self._runs.stopped(self.key.user)
            return
        try:
            if error is not None:
                raise error
            body = self.method.encode(task.result())
            if len(body) > state.settings.max_body:
                raise MessageError(f"the answer has {len(body)} bytes, more than limits.max_frame_bytes")
            self.end = 0, body
        except BaseException as raised:  # a method may raise anything
            if isinstance(raised, CallError):
                raised.details = {name: raised.details[name] for name in raised.details if name != DETACHED}
            self.end = state.error_answer(self.method.name, raised, peer=self.peer, connection="")
        self.look()

    def _forget(self, end: End | None) -> None:
        """Release all references: the end is stored, or the run was deleted."""
        runs = self._runs
        runs.store.unwatch(self.key, self.look)
        runs.state.wheel.discard(self)
        if self.end is None:
            self.end = Code.CANCELLED, b""
            self._cancel()
        runs.forget(self, end)


class RunContext(Context[Any]):
    """A call of a durable method. It continues without its connection, and has no token."""

    __slots__ = ()

    outlives_connection = True


class RunCaller:
    """What a durable method uses in place of the connection of its call; `peer` is that of the OPEN.

    It lacks the parts of a `CallConnection` that only the methods of the protocol use.
    """

    __slots__ = ("_run", "_state", "suppress_revoked_event")

    def __init__(self, state: ServerState, run: OwnedRun) -> None:
        self._state = state
        self._run = run
        self.suppress_revoked_event = False

    @property
    def id(self) -> str:
        return f"run {self._run.key.id}"

    @property
    def peer(self) -> str:
        return self._run.peer

    @property
    def stopping(self) -> asyncio.Event:
        return self._state.stopping

    def wall(self) -> int:
        return self._state.clock.wall()

    def now(self) -> float:
        return self._state.clock.now()

    def peer_certificate(self) -> bytes | None:
        return None

    def channel(self, context: Any = None) -> Channel:
        return Channel(context=context)

    def has_ended(self, request: Request) -> bool:
        return self._run.end is not None

    def lifespan_value(self, method: str) -> Any:
        return self._state.lifespan_value(method)

    async def run_in_thread(
        self, context: Context, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Any:
        return await self._state.threads.run(f"user {context.user}", partial(function, **arguments))

    async def call_client(self, user: str, session_id: str, call: CallToClient) -> Any:
        """Call a method that the session has registered on any of its connections."""
        connection = self._state.clients.handling(user, session_id, call.method)
        if connection is None:
            self._state.clients.count("unavailable")
            raise Unavailable("the client handles no such method, or is not connected")
        return await connection.call_here(session_id, call)

    async def ask(
        self, user: str, call: CallToClient, *, caller: Session | None = None, bound: bool = False
    ) -> Any:
        """Make a pending call, which ends with the run."""
        with self._run.asking():
            return await self._state.ask(user, call, caller=caller, peer=self.peer, bound=bound)

    async def find_clients(self, user: str | None, handles: str | None) -> list[ConnectedClient]:
        return await self._state.find_clients(user, handles)

    def send_event(self, session_id: str, name: str, data: Any) -> bool:
        """Send an event to the connections of the session. Return whether there was one."""
        connections = self._state.session_connections.of(session_id)
        return sum(connection.send_event(session_id, name, data) for connection in connections) > 0


def _unchanged(body: bytes) -> bytes:
    return body
