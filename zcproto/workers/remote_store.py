"""The store of another process of this server, over a link: the client, and the end that serves it.

    the process with the store:  StoreServer(StoreHub(store, ...)).serve(LinkServer(...))
    each of the others:          RemoteStore(path, LinkClient(path, ...), ...)

Decides: how operations and their results are written, and which connection they take.

Rules:
- A process has two connections. Ends of sessions, pings and notices of changes take the urgent one, so that they do
  not wait behind thousands of logins; everything else takes the one that the process shares for its calls.
- A process is a member of the hub (hub.py) as long as its urgent connection lasts. When that is lost, changes are
  not reported any more: LOST. When it is back: ALL, or EMPTIED if the store has lost its data meanwhile.
- The answer to a ping comes after the notices of all changes until then.
- The store's own process decides when an operation is late, because only it can distinguish a slow disk from a busy
  process. A connection on which nothing arrives for a while is lost, and fails the operations that wait.

It must not know: what an operation is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from zcproto.common.clock import Entropy, random_fraction
from zcproto.errors import CallError, Code, ConfigError, FailedPrecondition, Unavailable
from zcproto.sessions.record import (
    EndedRecord,
    Rotation,
    SessionRecord,
    UserLimit,
    pack_origin,
    unpack_origin,
)
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits, check_size
from zcproto.stores.base import (
    Change,
    ChangeKind,
    Claim,
    ClaimState,
    Created,
    DamagedRecord,
    LimitReached,
    NotRotated,
    Repeated,
    StoreUnavailable,
)
from zcproto.workers.hub import HubStore, StoreHub
from zcproto.workers.link import Link, LinkClient, LinkLost, LinkServer, Topics

CONNECT_LIMIT_S: Final = 5.0
OPEN_LIMIT_S: Final = 30.0
OPERATION_LIMIT_S: Final = 30.0
"""The store's process gives up long before; this is for an answer that got lost."""

_CHANGE_KINDS: Final = frozenset(kind.value for kind in ChangeKind)
_MEMBER_SIZE: Final = 8
_ENDED_FIELDS: Final = 4
_ORPHAN: Final = b"orphan"
"""In place of the answer of a running request, which processes of earlier versions do not read."""
_rotation_values: Final = attrgetter(*Rotation.__slots__)

Found = SessionRecord | EndedRecord | None


# --- results -----------------------------------------------------------------------------------------------


def found_values(found: Found) -> tuple[Any, ...] | None:
    """Return a record as msgpack has it."""
    if isinstance(found, EndedRecord):
        return found.id, found.token_digest, found.code, found.ended_at
    return None if found is None else record_values(found)


def record_values(record: SessionRecord) -> tuple[Any, ...]:
    """Return a session as msgpack has it: without roles, as versions before them read it."""
    packed = pack_origin(record)
    return packed[:-1] if packed.roles else packed[:-2]


def record_of(values: Sequence[Any]) -> SessionRecord:
    """Reverse `record_values`."""
    return unpack_origin(SessionRecord(*values))


def found_of(values: list[Any] | None) -> Found:
    """Reverse `found_values`."""
    if values is None:
        return None
    if len(values) == _ENDED_FIELDS:
        return _ended_of(values)
    return record_of(values)


def _ended_of(values: list[Any]) -> EndedRecord:
    id, token_digest, code, ended_at = values
    return EndedRecord(id, token_digest, Code(code), ended_at)


def _change_values(change: Change) -> tuple[Any, ...]:
    return change.kind.value, change.id, found_values(change.ended)


def _rotated_values(rotated: SessionRecord | NotRotated | Repeated) -> tuple[Any, ...]:
    if isinstance(rotated, NotRotated):
        return None, rotated.code, rotated.reused
    if isinstance(rotated, Repeated):
        return record_values(rotated.record), rotated.sealed
    return (record_values(rotated),)


def _same(value: Any) -> Any:
    return value


def _all_same(*values: Any) -> tuple[Any, ...]:
    return values


def _all_found(found: Iterable[Found]) -> list[Any]:
    return [*map(found_values, found)]


_OPERATIONS: Final[dict[str, tuple[Callable[..., tuple[Any, ...]], Callable[[Any], Any]]]] = {
    **dict.fromkeys(
        ("ping", "examine", "touch", "lease", "count", "expire", "keep_answer", "release_claim"),
        (_all_same, _same),
    ),
    "create": (
        lambda record, limit: (record_of(record), UserLimit(*limit)),
        lambda created: _all_found(created.ended) if isinstance(created, Created) else None,
    ),
    "rotate": (lambda rotation: (Rotation(*rotation),), _rotated_values),
    "find": (_all_same, found_values),
    "get": (_all_same, found_values),
    "end": (lambda ids, code, wall, user: (ids, Code(code), wall, user), _all_found),
    "end_user": (lambda user, code, wall: (user, Code(code), wall), _all_found),
    "end_all": (lambda code, wall: (Code(code), wall), _same),
    "list": (_all_same, _all_found),
    "claim": (
        _all_same,
        lambda claim: (claim.state.value, _ORPHAN if claim.is_orphan else claim.answer, claim.is_own),
    ),
}
"""How the process with the store reads the arguments of each operation, and writes its result."""


# --- the process with the store ------------------------------------------------------------------------------


class StoreServer:
    """Serves a hub to other processes."""

    def __init__(self, hub: StoreHub) -> None:
        self._hub = hub
        self.on_failed: Callable[[str, float], object] = lambda reason, waited_s: None
        """Called with the reason of each operation that the store has failed, and how long it took."""
        self._members: dict[bytes, HubStore] = {}
        self._member_of: dict[Link, tuple[bytes, HubStore]] = {}

    def serve(self, server: LinkServer) -> None:
        """Serve the clients of a link server."""
        server.on_lost.append(self._lost)
        calls = server.topics.calls
        calls["store.join"] = self._join
        calls |= {f"store.{name}": partial(self._perform, name) for name in _OPERATIONS}

    def _lost(self, link: Link) -> None:
        id, member = self._member_of.pop(link, (b"", None))
        if member is not None:
            self._hub.leave(member)
            if self._members[id] is member:  # else it has joined again
                del self._members[id]

    async def _join(self, link: Link, id: bytes) -> bytes:
        """Make a process a member while this connection lasts. Return the epoch of the store."""
        try:
            await self._hub.open()
        except StoreUnavailable as error:
            raise _refusal(error) from error
        except ConfigError as error:
            raise FailedPrecondition("", {"faults": error.faults}) from error
        if not link.lost and link not in self._member_of:
            member = self._members[id] = self._hub.member(id)
            self._member_of[link] = id, member
            member.on_changes = lambda changes: link.notify("store.changed", *map(_change_values, changes))
            self._hub.join(member)
        return self._hub.epoch

    async def _perform(self, name: str, link: Link, member_id: bytes, *arguments: Any) -> Any:
        member = self._members.get(member_id)
        if member is None:
            raise _refusal(StoreUnavailable("this process has to connect again"))
        loop = asyncio.get_running_loop()
        began = loop.time()
        operation = getattr(member, name)
        read, write = _OPERATIONS[name]
        try:
            return write(await operation(*read(*arguments)))
        except StoreUnavailable as error:
            if not isinstance(error, DamagedRecord):
                self.on_failed(error.reason, loop.time() - began)
            raise _refusal(error) from error


def _refusal(error: StoreUnavailable) -> Unavailable:
    """Return the error that RemoteStore turns into the same StoreUnavailable."""
    return Unavailable("", {"reason": error.reason, "damaged": isinstance(error, DamagedRecord)})


def _failure(error: CallError | LinkLost) -> Exception:
    """Reverse `_refusal`."""
    if isinstance(error, LinkLost):
        return StoreUnavailable(error.reason)
    if isinstance(error, Unavailable) and "reason" in error.details:
        kind = DamagedRecord if error.details["damaged"] else StoreUnavailable
        return kind(error.details["reason"])
    if isinstance(error, FailedPrecondition) and "faults" in error.details:
        return ConfigError(error.details["faults"])
    return error


# --- the other processes ---------------------------------------------------------------------------------------


class RemoteStore:
    """The store that another process serves at `path`, as in `SessionStore`.

    `calls` is the connection for most operations, which others may use too: its user starts and closes it. The
    urgent connection belongs to this object, and is lost after `silence` seconds.
    """

    shared = True
    keeps_time = True

    def __init__(
        self,
        path: Path,
        calls: LinkClient,
        *,
        name: str,
        silence: float,
        answers: AnswerLimits = DEFAULT_LIMITS,
        entropy: Entropy,
    ) -> None:
        self._calls = calls
        self._answers = answers
        self._id = entropy(_MEMBER_SIZE)
        self._urgent = LinkClient(
            path,
            Topics(notices={"store.changed": self._hear}),
            name=name,
            facts={"urgent": True},
            silence=silence,
            random=partial(random_fraction, entropy),
        )
        self._urgent.on_up.append(self._is_up)
        self._urgent.on_down.append(self._is_down)
        self._on_change: Callable[[Change], None] | None = None
        self._epoch = b""
        self._is_joined = False
        self._joining: asyncio.Task[None] | None = None

    @property
    def keeps_changes(self) -> bool:
        return not self._epoch

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Open the store as in `SessionStore.open`. May be called again after it failed."""
        assert self._on_change is None, "the store is open"
        self._urgent.start()
        try:
            await self._urgent.ready(CONNECT_LIMIT_S)
            await self._calls.ready(CONNECT_LIMIT_S)
            self._epoch = await self._urgent.call("store.join", self._id, within=OPEN_LIMIT_S)
        except (CallError, LinkLost) as error:
            await self._urgent.close()
            raise _failure(error) from error
        except BaseException:
            await self._urgent.close()
            raise
        self._is_joined = True
        self._on_change = on_change

    async def close(self) -> None:
        self._on_change, self._is_joined = None, False
        if self._joining is not None:
            self._joining.cancel()
        await self._urgent.close()

    async def ping(self) -> None:
        if not self._is_joined:
            await self._join()
        await self._urgently("ping")

    async def examine(self, wall: int) -> Sequence[str]:
        problems: list[str] = await self._call("examine", wall)
        return problems

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Yield nothing: sessions are looked up when they are needed."""
        return
        yield ()  # makes it a generator

    # --- sessions ------------------------------------------------------------------------------------

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        values = limit.per_user, limit.when_full, limit.idle_ms  # the hub finds out which are disconnected
        ended = await self._call("create", record_values(record), values)
        return LimitReached() if ended is None else Created(tuple(map(_ended_of, ended)))

    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        record, *more = await self._call("rotate", _rotation_values(rotation))
        if record is None:
            code, reused = more
            return NotRotated(Code(code), reused)
        return Repeated(record_of(record), *more) if more else record_of(record)

    async def find(self, token_digest: bytes) -> Found:
        return found_of(await self._call("find", token_digest))

    async def get(self, id: bytes) -> Found:
        return found_of(await self._call("get", id))

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        await self._call("touch", uses)

    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        await self._call("lease", uses)

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        return [*map(_ended_of, await self._urgently("end", ids, code, wall, user))]

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return [*map(_ended_of, await self._urgently("end_user", user, code, wall))]

    async def end_all(self, code: Code, wall: int) -> int:
        count: int = await self._urgently("end_all", code, wall)
        return count

    async def count(self) -> int:
        count: int = await self._call("count")
        return count

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        removed: int = await self._call("expire", wall, keep_ended_ms, limit)
        return removed

    # --- answers -------------------------------------------------------------------------------------

    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        value, answer, is_own = await self._call("claim", user, key, request_digest, lease_ms)
        state = ClaimState(value)
        if state is ClaimState.RUNNING:
            return Claim(state, is_own=is_own, is_orphan=answer == _ORPHAN)
        return Claim(state, answer)

    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        check_size(answer, self._answers)
        await self._call("keep_answer", user, key, answer, keep_ms, is_lasting=True)

    async def release_claim(self, user: str, key: str) -> None:
        await self._call("release_claim", user, key, is_lasting=True)

    # --- the connections -----------------------------------------------------------------------------

    async def _call(self, operation: str, *arguments: Any, is_lasting: bool = False) -> Any:
        return await self._send(self._calls, operation, arguments, is_lasting)

    async def _urgently(self, operation: str, *arguments: Any) -> Any:
        return await self._send(self._urgent, operation, arguments, True)

    async def _send(
        self, link: LinkClient, operation: str, arguments: Sequence[Any], is_lasting: bool
    ) -> Any:
        if not self._is_joined:
            raise StoreUnavailable(self._urgent.reason or "it is not open")
        try:
            return await link.call(
                f"store.{operation}", self._id, *arguments, within=OPERATION_LIMIT_S, is_lasting=is_lasting
            )
        except (CallError, LinkLost) as error:
            raise _failure(error) from error

    def _hear(self, link: Link, *changes: Sequence[Any]) -> None:
        for kind, id, ended in changes:
            if kind not in _CHANGE_KINDS:  # of a newer process: it may be a revocation
                self._report(Change(ChangeKind.ALL))
            else:
                self._report(Change(ChangeKind(kind), id, None if ended is None else _ended_of(ended)))

    def _report(self, change: Change) -> None:
        if self._on_change is not None:
            self._on_change(change)

    def _is_up(self, link: Link) -> None:
        if self._on_change is not None and self._joining is None:
            self._joining = asyncio.get_running_loop().create_task(self._rejoin(), name="zcproto-store")

    def _is_down(self, link: Link) -> None:
        if self._is_joined:
            self._is_joined = False
            self._report(Change(ChangeKind.LOST))

    async def _rejoin(self) -> None:
        """Become a member again. A failure is left to the next ping."""
        tried: Link | None = None
        try:
            while self._urgent.link is not tried:
                tried = self._urgent.link
                with suppress(StoreUnavailable):
                    await self._join()
        finally:
            self._joining = None

    async def _join(self) -> None:
        """Become a member again, and report what may have happened meanwhile. Raises StoreUnavailable."""
        if self._on_change is None:
            raise StoreUnavailable("it is not open")
        link = self._urgent.link
        try:
            epoch = await self._urgent.call("store.join", self._id, within=OPEN_LIMIT_S)
            await self._calls.ready(
                CONNECT_LIMIT_S
            )  # else what is called from now on would begin another outage
        except (CallError, LinkLost) as error:
            raise _failure(error) from error
        if self._is_joined:  # by another task
            return
        if self._urgent.link is not link:
            raise StoreUnavailable(self._urgent.reason or "this process has to connect again")
        self._is_joined = True
        was_emptied, self._epoch = epoch != self._epoch, epoch
        self._report(Change(ChangeKind.EMPTIED if was_emptied else ChangeKind.ALL))

    # Last in the class, because its name hides the builtin in annotations.

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        return [record_of(values) for values in await self._call("list", user)]
