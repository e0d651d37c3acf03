"""Sessions in Valkey or Redis: the store of several processes and machines.

Decides: which scripts and commands an operation sends and, in a cluster, in which order; which commands prepare a
server; how failures are translated. What the scripts do, and under which keys, is in sessions.lua and answers.lua.

- With one server an operation is one script, hence atomic.
- In a cluster a script is atomic for all keys of one user. Keys that lead to a session from a token or an id are
  written before it and removed after it. If that was interrupted, later operations ignore what is left over and
  `expire` removes it.
- A change is as durable as the server promises: with `appendonly yes` and `appendfsync always` it is on disk; with
  `everysec` a crash of the machine may lose the last second; with neither a restart loses everything. A failover
  may lose what had not reached the replica. See `examine`.
- `maxmemory-policy` has to be `noeviction`: any other may evict sessions.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from math import inf
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import msgpack
from redis.exceptions import (
    AskError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from zcproto.common.clock import MS_PER_SECOND, Entropy, MonotonicClock, system_clock, system_entropy
from zcproto.common.text import escape_text
from zcproto.errors import Code, ConfigError, ResourceExhausted
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit, WhenFull
from zcproto.sessions.token import id_from_text, id_text
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits, check_size, too_many_requests
from zcproto.stores.base import (
    CLOCK_SKEW_MS,
    LEASE_MS,
    MAX_LISTED,
    Change,
    ChangeKind,
    Claim,
    ClaimState,
    Created,
    DamagedRecord,
    KeysMoving,
    LimitReached,
    Notice,
    NotRotated,
    Repeated,
    StoreUnavailable,
    too_many_operations,
)
from zcproto.stores.operations import LoopTimeout
from zcproto.stores.valkey.link import Link, Target
from zcproto.stores.valkey.scripts import (
    DAY_MS,
    ID_TEXT_SIZE,
    MAX_TTL_MS,
    MEMBER_SIZE,
    NODE_SIZE,
    PLACE_SIZE,
    SCRIPTS,
    TAG_SIZE,
    TOKEN_MEMBER_SIZE,
    ended_record,
    key_digest,
    order_of,
    pack_session,
    raw_id,
    tag_of,
    time_text,
    ttl_for,
    unpack_session,
    utf8,
)
from zcproto.stores.valkey.servers import Cluster, Hooks, Sentinels, ValkeyConnection
from zcproto.stores.valkey.url import Address, ServerKind, ServerUrl, parse_url

TIMEOUT_S: Final = 0.25
PREFIX: Final = "zcp:"
SCHEMA: Final = 1

CLUSTER_SHARDS: Final = 16
"""The number of keys that a large index of a cluster is divided into."""

_DAMAGE: Final = re.compile(r"WRONGTYPE|(?<!@)user_script:\d|not an integer")
"""Errors of a command or a script that met a key of another type or content."""

MAX_OPERATIONS: Final = 4_096
"""Operations in progress, and as many that wait behind them; more are refused."""

ANSWERS_AT_ONCE: Final = 256
"""Operations on answers that are sent; the others wait, so that session operations go ahead of them."""

LASTING: Final = frozenset({"ping", "end", "_end_user_some", "_end_some", "keep_answer", "release_claim"})
"""Operations that are never refused. Each follows one that was admitted, or ends sessions."""

MOVING_LIMIT_S: Final = 2.0
"""How long an operation is repeated whose keys a cluster moves to another server: the keys of one slot are moved at
once, within about 50 ms."""

BATCH: Final = 250
"""Sessions touched in one script, which blocks the server for about 2 ms."""

_ENDED: Final = 100
"""Sessions ended in one script, likewise."""

_EVICTS: Final[Mapping[WhenFull, int]] = {"refuse": 0, "evict_oldest": 1, "evict_disconnected": 2}
"""As in the script `create`; one more if expired leases count too."""

_ATTEMPTS: Final = 32
"""To open a session beside very many of the same user while others of that user are opened."""

_READ_BATCH: Final = 100
_EXPIRED: Final = 200
"""Entries removed by one script, which blocks the server for about 2 ms."""

_SCANNED: Final = 1_000
_TRIMMED: Final = 16
_TRIMS: Final = 64

LIFE_MS: Final = 4_000
"""How long after its last sign of life a process counts as there."""

RENEW_S: Final = 1.0
"""How often a process shows a sign of life: three times in a row may fail."""

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U", SessionRecord, str)


def operation(
    method: Callable[Concatenate[ValkeyStore, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ValkeyStore, P], Coroutine[Any, Any, T]]:
    """Apply the store's timeout to a method, and raise StoreUnavailable for every failure of the servers.

    Repeat it while a cluster moves its keys. Raises ResourceExhausted if too many are in progress.
    """
    is_lasting = method.__name__ in LASTING

    @wraps(method)
    async def limited(self: ValkeyStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._in_progress >= MAX_OPERATIONS and not is_lasting:
            raise too_many_operations()
        self._in_progress += 1
        try:
            loop = asyncio.get_running_loop()
            until = 0.0
            while True:
                try:
                    async with LoopTimeout(self._timeout):
                        return await method(self, *args, **kwargs)
                except KeysMoving:
                    until = until or loop.time() + MOVING_LIMIT_S
                    if loop.time() >= until:
                        raise
        except TimeoutError:
            reason = f"no answer within {self._timeout * 1000:.0f} ms"
        except ReadOnlyError:
            if self._servers is not None:
                self._servers.lose("the server became a replica")
            reason = "the server is a replica, which cannot be written to"
        except OutOfMemoryError:
            reason = "the server's memory is full (maxmemory)"
        except DamagedRecord as error:
            self._report_damage(method.__name__, error.reason)
            raise
        except (RedisError, ConfigError) as error:
            reason = str(error)
            if _DAMAGE.search(reason):
                self._report_damage(method.__name__, reason)
                raise DamagedRecord(self._hide_password(reason)) from error
        finally:
            self._in_progress -= 1
        raise StoreUnavailable(self._hide_password(reason))

    return limited


def behind(
    method: Callable[Concatenate[ValkeyStore, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ValkeyStore, P], Coroutine[Any, Any, T]]:
    """Let an operation wait while too many of its kind are in progress. Its timeout begins after that."""
    is_lasting = method.__name__ in LASTING

    @wraps(method)
    async def queued(self: ValkeyStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._waiting_behind >= MAX_OPERATIONS and not is_lasting:
            raise too_many_operations()
        self._waiting_behind += 1
        try:
            async with self._behind:
                return await method(self, *args, **kwargs)
        finally:
            self._waiting_behind -= 1

    return queued


def mends_index(
    method: Callable[Concatenate[ValkeyStore, U, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[ValkeyStore, U, P], Coroutine[Any, Any, T]]:
    """Rebuild the damaged index of a user whose name, or session, is the first argument, and try once more."""

    @wraps(method)
    async def mended(self: ValkeyStore, subject: U, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, subject, *args, **kwargs)
        except DamagedRecord:
            user = subject.user if isinstance(subject, SessionRecord) else subject
            if not await self.rebuild_index(tag_of(user)):
                raise
            return await method(self, subject, *args, **kwargs)

    return mended


class ValkeyStore:
    """A store on the servers at a URL (see url.py). Keys begin with `prefix`.

    `end_all`, `list` of all users, and whatever ends or touches very many sessions are done in steps, each within
    the timeout. A step that fails leaves the rest as it was.

    `timeout` is in seconds, for each operation and for connecting. `password` replaces the one in the URL. With
    TLS, `ca_file` has the trusted authorities in place of the system's; `certificate_file` and `key_file` are for
    servers that require client certificates. `on_notice` is called with `store_record_damaged` (where, reason)
    for a key of another type or content. `time` replaces the clock of the servers for answers, in tests.

    Raises ConfigError for a URL or a file that cannot be used.
    """

    shared = True
    keeps_time = True
    keeps_changes = False

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        timeout: float = TIMEOUT_S,
        prefix: str = PREFIX,
        answers: AnswerLimits = DEFAULT_LIMITS,
        time: Callable[[], int] | None = None,
        entropy: Entropy = system_entropy,
        on_notice: Notice = lambda name, **values: None,
    ) -> None:
        self._url = parse_url(url)
        self._password = self._url.password if password is None else password
        if self._url.username and not self._password:
            raise ConfigError(["store.url: it has a user without a password; set store.password_file"])
        self._is_clustered = self._url.kind is ServerKind.CLUSTER
        self._shards = CLUSTER_SHARDS if self._is_clustered else 1
        self._tls = _tls_context(self._url, ca_file, certificate_file, key_file)
        self._timeout = timeout
        self._prefix = prefix.encode()
        if b"{" in self._prefix or b"}" in self._prefix:
            raise ConfigError(["store.prefix: it must not contain { or }, which divide keys among servers"])
        self._answers = answers
        self._time = time or MonotonicClock(system_clock).wall
        self._is_time_given = time is not None
        self._node = entropy(NODE_SIZE // 2).hex().encode()
        self._life = SignOfLife(self._call_in_time, self._prefix, self._node)
        self._entropy = entropy
        self._on_notice = on_notice
        self._marks: dict[int, bytes] = {}
        self._is_emptied = self._is_flushed = False
        self._in_progress = 0
        self._waiting_behind = 0
        self._behind = asyncio.Semaphore(ANSWERS_AT_ONCE)
        self._servers: ValkeyConnection | Cluster | None = None
        self._on_change: Callable[[Change], None] = _ignore

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url})"

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """Open the store as in `SessionStore.open`. May be called again after it failed.

        After a connection was lost and made again, `on_change` is called with ALL, or with EMPTIED if the server
        came back without its data, or with FLUSHED after FLUSHALL or FLUSHDB. Changes by another ValkeyStore in
        this process are reported too.
        """
        assert self._servers is None, "the store is open"
        self._marks.clear()
        servers = self.make_servers(
            Hooks(self._timeout, self._prepare, self._keys_changed, self._lost, self._reconnected)
        )
        await servers.open()  # leaves no connection open if it fails
        self._servers = servers
        self._life.store_reached()
        self._on_change = on_change

    async def close(self) -> None:
        await self._life.end()
        servers, self._servers, self._on_change = self._servers, None, _ignore
        if servers is not None:
            await servers.close()

    @operation
    async def ping(self) -> None:
        # After a stall, the server may have been replaced: its answer must not count (CONFIRM in spec/store.pml).
        await self._connected.confirm()
        servers = self._connected
        keys = (self._shard_key(b"p", shard) for shard in range(self._shards))
        calls = [self._call("SET", key, b"", "PX", 1_000) for key in keys]
        if isinstance(servers, Cluster):  # one that has none of these keys may report changes all the same
            calls.append(servers.ping())
        await self._gather(calls)

    @operation
    async def examine(self, wall: int) -> Sequence[str]:
        """Return what is wrong with the configuration of the servers, as in `SessionStore.examine`."""
        keys = (self._shard_key(b"x", shard) for shard in range(self._shards))
        found = await self._gather(self._examine_server(key, wall) for key in keys)
        return list(dict.fromkeys(problem for problems in found for problem in problems))

    async def _examine_server(self, key: bytes, wall: int) -> list[str]:
        """Examine the server that has this key."""
        call = self._connected.call
        found = []
        wanted = "appendonly", "appendfsync", "maxmemory-policy", "min-replicas-to-write"
        try:
            seconds, _ = await call(key, "TIME")
            apart_s = abs(int(seconds) - wall // 1000)
            if apart_s > CLOCK_SKEW_MS // 1000:
                found.append(
                    f"the clock of the store and this one are {apart_s} s apart: check NTP on both machines"
                )
            settings = await call(key, "CONFIG", "GET", *wanted)
            replication = (await call(key, "INFO", "replication")).decode()
        except ResponseError:
            names = ", ".join(wanted)
            return [*found, f"the server does not show its clock or configuration: check NTP, {names}"]
        values = {name.decode(): value.decode() for name, value in settings.items()}
        if values.get("appendonly") != "yes":
            found.append("appendonly is off: a restart of the server loses sessions and revocations")
        elif values.get("appendfsync") != "always":
            found.append("appendfsync is not always: a crash of its machine may lose the last second")
        if values.get("maxmemory-policy") != "noeviction":
            found.append("maxmemory-policy is not noeviction: the server may drop sessions when it is full")
        if "connected_slaves:0" not in replication.split() and values.get("min-replicas-to-write") == "0":
            found.append("min-replicas-to-write is 0: a failover may lose revocations that no replica has")
        return found

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Yield nothing: sessions are looked up when they are needed."""
        return
        yield ()  # makes it a generator

    # --- sessions ----------------------------------------------------------------------------------

    @mends_index
    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        evicted: list[EndedRecord] = []
        newest, ending = b"", list[tuple[Code, bytes]]()
        for _ in range(_ATTEMPTS):
            state, ended = await self._create(record, limit, newest, ending)
            if state == b"full":
                return LimitReached()
            if state != b"many":
                evicted += [ended_record(pair, Code(code), record.created_at) for code, pair in ended]
                return Created(tuple(evicted))
            others, newest = await self._list_user(record.user)
            if limit.when_full == "evict_disconnected":
                limit = replace(limit, disconnected=await self._disconnected(record.user, others, limit))
            room = limit.make_room(others, record.created_at)
            if room is None:
                await self._retract_session(record, with_pointers=True)
                return LimitReached()
            ending = [(code, id_text(other.id).encode()) for other, code in room]
            while len(ending) > _ENDED:  # the limit was lowered
                evicted += await self._evict(record, ending[:_ENDED])
                del ending[:_ENDED]
        raise too_many_operations()

    @operation
    async def _create(
        self, record: SessionRecord, limit: UserLimit, newest: bytes, ending: Sequence[tuple[Code, bytes]]
    ) -> tuple[bytes, list[tuple[int, Any]]]:
        """Return what became of it, and the sessions that were ended, with their codes."""
        tag, id, wall = tag_of(record.user), id_text(record.id).encode(), record.created_at
        due = max(record.expires_at, record.refresh_expires_at)
        ms = ttl_for(due - wall)
        idle_from = b"" if limit.idle_ms is None or limit.idle_ms > wall else time_text(wall - limit.idle_ms)
        order = 0
        if self._is_clustered:
            order = await self._announce_session(record, tag, id, due, ms)
        evicts = _EVICTS[limit.when_full] + limit.counts_expired
        limits = limit.per_user, evicts, idle_from
        packed = pack_session(record)
        chosen = newest, [(int(code), other) for code, other in ending]
        state, ended = await self._run(
            *("create", tag, id, packed, ms, time_text(wall), *limits, order, *chosen),
            *(self._given_time, LEASE_MS),
        )
        if state in (b"full", b"ended"):
            await self._retract_session(record, with_pointers=state == b"full")
        return state, ended

    async def _disconnected(
        self, user: str, records: Sequence[SessionRecord], limit: UserLimit
    ) -> frozenset[bytes]:
        """Return the ids of a user's sessions that no connection uses."""
        found = list[bytes]()
        for start in range(0, len(records), BATCH):
            found += await self._disconnected_of(user, records[start : start + BATCH], limit.counts_expired)
        return frozenset(raw_id(id) for id in found)

    @operation
    async def _disconnected_of(
        self, user: str, records: Sequence[SessionRecord], counts_expired: bool
    ) -> list[bytes]:
        ids = [id_text(record.id).encode() for record in records]
        found: list[bytes] = await self._run(
            "disconnected", tag_of(user), ids, self._given_time, counts_expired
        )
        return found

    @operation
    async def lease(self, uses: Sequence[tuple[bytes, bool]]) -> None:
        used = {id_text(id).encode(): is_used for id, is_used in uses}
        members = await self._with_tags(list(used))
        await self._gather(
            self._run(
                *("lease", tag, group, [used[member[-ID_TEXT_SIZE:]] for member in group]),
                *(self._given_time, LEASE_MS),
            )
            for tag, group in self._by_tag(members)
        )

    @operation
    async def _evict(self, record: SessionRecord, ending: Sequence[tuple[Code, bytes]]) -> list[EndedRecord]:
        evicted = []
        for code in dict(ending):
            same = [tag_of(record.user) + id for other, id in ending if other == code]
            evicted += await self._finish(same, code, record.created_at, None)
        return evicted

    async def _announce_session(self, record: SessionRecord, tag: bytes, id: bytes, due: int, ms: int) -> int:
        """In a cluster: write the keys that lead to a new session. Return its place in the order of opening."""
        counter, index = self._prefix + b"n", self._shard_key(b"x", self._shard(tag))
        order, *_ = await asyncio.gather(
            self._call("INCR", counter),
            self._call("SET", self._prefix + b"t:" + record.token_digest, tag + id, "PX", ms, "NX"),
            self._call("SET", self._prefix + b"i:" + id, tag, "PX", ms, "NX"),
            self._call("ZADD", index, "NX", time_text(due), tag + id),
            self._call("PEXPIRE", index, MAX_TTL_MS),
        )
        return int(order)

    @operation
    async def _retract_session(self, record: SessionRecord, *, with_pointers: bool) -> None:
        """In a cluster: remove what `_announce_session` has written."""
        if not self._is_clustered:
            return
        tag, id = tag_of(record.user), id_text(record.id).encode()
        await self._call("ZREM", self._shard_key(b"x", self._shard(tag)), tag + id)
        if with_pointers:
            await asyncio.gather(
                self._call("DEL", self._prefix + b"t:" + record.token_digest),
                self._call("DEL", self._prefix + b"i:" + id),
            )

    @operation
    async def rotate(self, rotation: Rotation) -> SessionRecord | NotRotated | Repeated:
        id, tag = id_text(rotation.id).encode(), b""
        token_key = self._prefix + b"t:" + rotation.token_digest
        if self._is_clustered:
            tag = await self._call("GET", self._prefix + b"i:" + id) or b""
            if not tag:
                return NotRotated(Code.UNAUTHENTICATED)
            ms = await self._call("PTTL", self._session_key(tag, id))
            await self._call("SET", token_key, tag + id, "PX", max(ms, DAY_MS))
        digests = rotation.spent_digest, rotation.token_digest, rotation.refresh_digest
        texts = utf8(rotation.client), utf8(rotation.address)
        expires_at, wall = time_text(rotation.expires_at), time_text(rotation.wall)
        # The time to live of the key ends the grace; the time in it, only where a test has its own clock.
        grace = (
            rotation.sealed,
            rotation.grace_ms,
            time_text(rotation.wall + rotation.grace_ms + CLOCK_SKEW_MS),
        )
        code, outcome = await self._run("rotate", tag, id, *digests, expires_at, *texts, wall, *grace)
        if code and self._is_clustered:
            await self._call("DEL", token_key)
        if code == Code.UNAVAILABLE:
            packed, sealed = outcome
            return Repeated(_session(id, packed), sealed)
        return NotRotated(Code(code), bool(outcome)) if code else _session(id, outcome)

    @operation
    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        if self._is_clustered:
            pointer = await self._call("GET", self._prefix + b"t:" + token_digest)
            raw = None
            if pointer and pointer[:1] != b"!":
                raw = next((raw for _, raw in await self._read_many([pointer])), None)
        else:
            pointer, raw = await self._run("find", b"", token_digest)
        if not pointer:
            return None
        if pointer[:1] == b"!":
            return EndedRecord(b"", token_digest, Code.TOKEN_REVOKED, int(pointer[1:]))
        if not raw:
            return None
        found = unpack_session(pointer[TAG_SIZE:], raw)
        if found.token_digest == token_digest:
            return found
        # A refresh replaced the token, and was interrupted before it could mark it as revoked.
        at = found.last_used_at if isinstance(found, SessionRecord) else found.ended_at
        return EndedRecord(b"", token_digest, Code.TOKEN_REVOKED, at)

    @operation
    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        members = await self._with_tags([id_text(id).encode()])
        for found in await self._read_many(members):
            return unpack_session(*found)
        return None

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        for start in range(0, len(uses), BATCH):
            await self._touch_batch(uses[start : start + BATCH])

    @operation
    async def _touch_batch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        times = {
            id_text(id).encode(): time_text(used_at) for id, used_at in sorted(uses, key=lambda use: use[1])
        }
        members = await self._with_tags(list(times))
        await self._gather(
            self._run("touch", tag, group, [times[member[-ID_TEXT_SIZE:]] for member in group])
            for tag, group in self._by_tag(members)
        )

    @operation
    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        members = await self._with_tags([id_text(id).encode() for id in ids])
        ended = await self._finish(members, code, wall, None if user is None else utf8(user))
        if self._is_clustered:  # the results are grouped by user
            place = {id: n for n, id in reversed(list(enumerate(ids)))}
            ended.sort(key=lambda record: place[record.id])
        return ended

    async def _finish(
        self, members: list[bytes], code: Code, wall: int, user: bytes | None
    ) -> list[EndedRecord]:
        groups = await self._gather(
            self._run("finish", tag, group, int(code), time_text(wall), user)
            for tag, group in self._by_tag(members)
        )
        return [ended_record(pair, code, wall) for group in groups for pair in group]

    @mends_index
    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        ended: list[EndedRecord] = []
        more = True
        while more:
            pairs, more = await self._end_user_some(user, code, wall)
            ended += [ended_record(pair, code, wall) for pair in pairs]
        return ended

    @operation
    async def _end_user_some(self, user: str, code: Code, wall: int) -> tuple[list[list[bytes]], bool]:
        pairs, more = await self._run("finish_user", tag_of(user), int(code), time_text(wall))
        return pairs, bool(more)

    async def end_all(self, code: Code, wall: int) -> int:
        count = 0
        for shard in range(self._shards):
            more = True
            while more:
                ended, more = await self._end_some(shard, code, wall)
                count += ended
        return count

    @operation
    async def _end_some(self, shard: int, code: Code, wall: int) -> tuple[int, bool]:
        """End the first sessions of an index. Return how many, and whether there may be more."""
        index = self._shard_key(b"x", shard)
        members = await self._members(shard, _ENDED)
        if not members:
            return 0, False
        ended = await self._finish(members, code, wall, None)
        await self._call("ZREM", index, *members)  # members without a session would be found forever
        return len(ended), True

    @mends_index
    async def _list_user(self, user: str) -> tuple[list[SessionRecord], bytes]:
        """Return the sessions of a user, oldest first, and the ID of the last one in their index."""
        records, newest, after = list[SessionRecord](), b"", b"-inf"
        while after:
            some, last, after = await self._list_some(user, after)
            records, newest = records + some, last or newest
        return records, newest

    @operation
    async def _list_some(self, user: str, after: bytes) -> tuple[list[SessionRecord], bytes, bytes]:
        """Return sessions, the last ID, and where to continue; an empty one at the end."""
        found, last, after = await self._run("user", tag_of(user), after)
        records = [unpack_session(id, raw) for id, raw in found]
        return [record for record in records if isinstance(record, SessionRecord)], last, after

    async def rebuild_index(self, tag: bytes) -> bool:
        """Rebuild the index of a user from that of all users, in steps. Return False if it has the right type."""
        if not await self._is_index_damaged(tag):
            return False
        ids, cursor = await self._scan_index(tag, 0)
        while cursor:
            more, cursor = await self._scan_index(tag, cursor)
            ids |= more
        await self._write_index(tag, ids)
        return True

    @operation
    async def _is_index_damaged(self, tag: bytes) -> bool:
        return await self._call("TYPE", self._prefix + b"u:{" + tag + b"}") not in (b"zset", b"none")

    @operation
    async def _scan_index(self, tag: bytes, cursor: int) -> tuple[set[bytes], int]:
        """Return IDs of a user's sessions, and where to continue; 0 at the end."""
        key = self._shard_key(b"x", self._shard(tag))
        after, found = await self._call("ZSCAN", key, cursor, "MATCH", tag + b"*", "COUNT", _SCANNED)
        return {member[TAG_SIZE:] for member in found[::2]}, int(after)

    @operation
    async def _write_index(self, tag: bytes, ids: set[bytes]) -> None:
        await self._run("index", tag, list(ids))

    @operation
    async def _read_batch(self, members: list[bytes]) -> list[tuple[int, SessionRecord]]:
        """Return sessions that are not ended, each with its place in the order of opening."""
        found = []
        for id, raw in await self._read_many(members):
            if isinstance(record := unpack_session(id, raw), SessionRecord):
                found.append((order_of(raw), record))
        return found

    @operation
    async def count(self) -> int:
        keys = [self._shard_key(b"x", shard) for shard in range(self._shards)]
        return sum(await self._gather(self._call("ZCARD", key) for key in keys))

    @operation
    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """Remove expired entries. May remove fewer than `limit` to stay within half the timeout."""
        loop = asyncio.get_running_loop()
        enough_at = loop.time() + self._timeout / 2
        removed = 0
        for shard in range(self._shards):
            for step in (self._expire_sessions, self._expire_answers):
                while removed < limit and loop.time() < enough_at:
                    most = min(_EXPIRED, limit - removed)
                    found, gone = await step(shard, wall, wall - keep_ended_ms, most)
                    removed += gone
                    if found < most or not gone:
                        break
        return removed

    async def _expire_sessions(self, shard: int, wall: int, ended_before: int, most: int) -> tuple[int, int]:
        """Return how many entries were checked, and how many of them were removed."""
        if not self._is_clustered:
            found, gone = await self._run("expire", b"", time_text(wall), b"%d" % ended_before, most, [], [])
            return found, gone
        dues = await self._range(b"x", shard, wall, most)
        tombstones = await self._range(b"m", shard, ended_before, most - len(dues))
        tokens = [member for member in tombstones if len(member) == TOKEN_MEMBER_SIZE]
        if tokens:
            await self._gather(self._call("DEL", self._prefix + b"t:" + member[1:]) for member in tokens)
            await self._call("ZREM", self._shard_key(b"m", shard), *tokens)
        groups: dict[bytes, tuple[list[bytes], list[bytes]]] = {
            tag: (group, []) for tag, group in self._by_tag(dues)
        }
        for tag, group in self._by_tag([member for member in tombstones if member not in tokens]):
            groups[tag] = (groups.get(tag, ([], []))[0], group)
        results = await self._gather(
            self._run("expire", tag, time_text(wall), b"%d" % ended_before, most, past, ended)
            for tag, (past, ended) in groups.items()
        )
        return len(dues) + len(tombstones), len(tokens) + sum(gone for _, gone in results)

    async def _expire_answers(self, shard: int, wall: int, ended_before: int, most: int) -> tuple[int, int]:
        if not self._is_clustered:
            found, gone = await self._run("forget_answers", b"", self._given_time, most, [], False, DAY_MS)
            return found, gone
        members: list[bytes] = []
        for kind in (b"w", b"o"):
            key, left = self._shard_key(kind, shard), most - len(members)
            past, _ = await self._run_for(key, "expired_answers", b"", self._given_time, left, kind == b"w")
            members += past
        return len(members), await self._forget_answers(members, False)

    # --- answers -----------------------------------------------------------------------------------

    @property
    def _given_time(self) -> tuple[bytes, bool]:
        """The time for scripts on answers, and whether they use it although their server has a clock."""
        return time_text(self._time()), self._is_time_given

    @behind
    @operation
    async def claim(self, user: str, key: str, request_digest: bytes, lease_ms: int) -> Claim:
        await self._life.begin()  # before others can find the claim
        tag, digest = tag_of(user), key_digest(key)
        times = self._given_time, lease_ms, ttl_for(lease_ms)
        claiming = "claim", tag, digest, request_digest, *times, self._answers.user_count
        state, answer, count, size = await self._run(*claiming, b"")
        if state == b"expired" and await self._life.is_gone(answer):
            state, answer, count, size = await self._run(*claiming, answer)
        has_expired = state == b"expired"
        if has_expired:
            state = b"running" if count else b"conflict"
        if state == b"full":
            raise too_many_requests("of this user ")
        if state == b"new" and not await self._trim(tag, count, size):
            await self._run("release", tag, digest, DAY_MS)
            raise too_many_requests()
        if state == b"running":
            is_own = answer == self._node
            is_orphan = not is_own and await self._life.is_missing(answer)
            return Claim(ClaimState.RUNNING, is_own=is_own, has_expired=has_expired, is_orphan=is_orphan)
        return Claim(ClaimState(state.decode()), answer)

    @behind
    @operation
    async def keep_answer(self, user: str, key: str, answer: bytes, keep_ms: int) -> None:
        check_size(answer, self._answers)
        tag, times = tag_of(user), (self._given_time, keep_ms, ttl_for(keep_ms))
        _, _, count, size = await self._run(
            "keep", tag, key_digest(key), answer, *times, self._answers.user_bytes
        )
        await self._trim(tag, count, size)

    @behind
    @operation
    async def release_claim(self, user: str, key: str) -> None:
        await self._run("release", tag_of(user), key_digest(key), DAY_MS)

    async def _trim(self, tag: bytes, count: int, size: int) -> bool:
        """Evict the oldest answers until all users together are within the limits. Return whether they are."""
        shard, shards, limits = self._shard(tag), self._shards, self._answers
        if self._is_clustered:
            count, size = await self._answers_held(shard)
        for _ in range(_TRIMS):
            if count <= limits.count / shards and size <= limits.bytes / shards:
                return True
            most = min(max(count - limits.count // shards, 1), _TRIMMED)
            if self._is_clustered:
                members = await self._call("ZRANGE", self._shard_key(b"o", shard), 0, most - 1)
                found = len(members)
                await self._forget_answers(members, True)
            else:
                found, _ = await self._run("forget_answers", b"", self._given_time, most, [], True, DAY_MS)
            if not found:
                break
            count, size = await self._answers_held(shard)
        return count <= limits.count / shards

    async def _answers_held(self, shard: int) -> tuple[int, int]:
        """Return the number of requests, running or answered, and the bytes of the answers."""
        running, done, size = await asyncio.gather(
            self._call("ZCARD", self._shard_key(b"w", shard)),
            self._call("ZCARD", self._shard_key(b"o", shard)),
            self._call("GET", self._shard_key(b"b", shard)),
        )
        return running + done, int(size or 0)

    async def _forget_answers(self, members: list[bytes], also_valid: bool) -> int:
        results = await self._gather(
            self._run("forget_answers", tag, self._given_time, len(group), group, also_valid, DAY_MS)
            for tag, group in self._by_tag(members, PLACE_SIZE)
        )
        return sum(gone for _, gone in results)

    @operation
    async def _members(self, shard: int, most: int) -> list[bytes]:
        """Return the TAG and ID of sessions of all users, those first that expire first."""
        text, _ = await self._run_for(self._shard_key(b"x", shard), "members", b"", 0, most - 1)
        return [text[start : start + MEMBER_SIZE] for start in range(0, len(text), MEMBER_SIZE)]

    async def _range(self, kind: bytes, shard: int, until: int, most: int) -> list[bytes]:
        """Return the members of an index that are due."""
        if most < 1:
            return []
        key = self._shard_key(kind, shard)
        found: list[bytes] = await self._call("ZRANGEBYSCORE", key, "-inf", until, "LIMIT", 0, most)
        return found

    async def _read_many(self, members: list[bytes]) -> list[list[bytes]]:
        groups = await self._gather(self._run("read", tag, group) for tag, group in self._by_tag(members))
        return [pair for group in groups for pair in group]

    async def _with_tags(self, ids: list[bytes]) -> list[bytes]:
        """In a cluster, put the TAG before each id and drop unknown ids."""
        if not self._is_clustered:
            return ids
        tags = await self._gather(self._call("GET", self._prefix + b"i:" + id) for id in ids)
        return [tag + id for tag, id in zip(tags, ids, strict=True) if tag]

    def _by_tag(self, members: list[bytes], skip: int = 0) -> list[tuple[bytes, list[bytes]]]:
        """Group members for scripts: in a cluster, a script works on the keys of one user."""
        if not self._is_clustered:
            return [(b"", members)] if members else []
        groups: dict[bytes, list[bytes]] = {}
        for member in members:
            groups.setdefault(member[skip : skip + TAG_SIZE], []).append(member)
        return list(groups.items())

    # --- commands and scripts ----------------------------------------------------------------------

    @property
    def _connected(self) -> ValkeyConnection | Cluster:
        if self._servers is None:
            raise StoreUnavailable("it is not open")
        return self._servers

    async def _call(self, *command: Any) -> Any:
        """Send a command whose first argument is a key."""
        return await self._connected.call(command[1], *command)

    @operation
    async def _call_in_time(self, *command: Any) -> Any:
        return await self._call(*command)

    async def _run(self, name: str, tag: bytes, *arguments: Any) -> Any:
        """Run a script for the keys of one user, then the commands that it returns for keys of other slots."""
        key = self._prefix + b"u:{" + tag + b"}" if tag else self._shard_key(b"x", 0)
        result, elsewhere = await self._run_for(key, name, tag, *arguments)
        if elsewhere:
            await self._gather(self._call(*command) for command in elsewhere)
        return result

    async def _run_for(self, key: bytes, name: str, tag: bytes, *arguments: Any) -> Any:
        servers, script = self._connected, SCRIPTS[name]
        head = (self._prefix, self._node, self._is_clustered, self._shard(tag), tag)
        argument: bytes = msgpack.packb([*head, *arguments], use_bin_type=False)
        try:
            raw = await servers.call(key, "EVALSHA", script.sha, 1, key, argument)
        except NoScriptError:
            raw = await servers.call(key, "EVAL", script.source, 1, key, argument)
        result, elsewhere, damaged = msgpack.unpackb(raw, raw=True)
        for damaged_key in damaged or ():
            self._report_damage(damaged_key.decode("latin-1"), "its type or content is not that of a session")
        return result, elsewhere

    def _report_damage(self, where: str, reason: str) -> None:
        self._on_notice(
            "store_record_damaged", where=escape_text(where, 200), reason=self._hide_password(reason)
        )

    async def _gather(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run calls concurrently; a single one without a task."""
        calls = list(calls)
        return [await calls[0]] if len(calls) == 1 else list(await asyncio.gather(*calls))

    def _session_key(self, tag: bytes, id: bytes) -> bytes:
        return self._prefix + b"s:{" + tag + b"}" + id

    def _shard_key(self, kind: bytes, shard: int) -> bytes:
        return self._prefix + kind + b":{%d}" % shard

    def _shard(self, tag: bytes) -> int:
        return sum(tag) % self._shards

    # --- servers -----------------------------------------------------------------------------------

    def make_servers(self, hooks: Hooks) -> ValkeyConnection | Cluster:
        """Return the servers of this store with other hooks, not connected."""
        url = self._url
        if url.kind is ServerKind.SENTINEL:
            return ValkeyConnection(Sentinels(url.addresses, url.service, self._target, self._timeout), hooks)
        if self._is_clustered:
            return Cluster(url.addresses, self._target, hooks)
        return ValkeyConnection(self._target(url.addresses[0] if url.addresses else ("", 0)), hooks)

    def _target(self, address: Address) -> Target:
        url = self._url
        return Target(*address, url.path, self._tls, url.username, self._password, url.database)

    async def _prepare(self, link: Link, was_flushed: bool) -> None:
        """Turn on client tracking, check the marks and load the scripts of a new connection."""
        await link.call("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix + b"c:")
        checks = (self._check_mark(link, shard, was_flushed) for shard in range(self._shards))
        await asyncio.gather(_load_scripts(link), *checks)

    async def _check_mark(self, link: Link, shard: int, was_flushed: bool) -> None:
        """Check that the data was written by no newer version, and whether it is the same data as before.

        Raises ConfigError.
        """
        key, new = self._prefix + b"v:{%d}" % shard, b"%d %s" % (SCHEMA, self._entropy(16).hex().encode())
        try:
            found = await link.call("GET", key)
            if found is None:
                found = await link.call("SET", key, new, "NX", "GET") or new
        except AskError:  # the slot is on another server of the cluster
            return
        except ResponseError as error:
            if _DAMAGE.search(str(error)) is None:
                raise
            found = b""
        version, _, mark = found.partition(b" ")
        if not version.isdigit():
            self._report_damage(key.decode(), "it is not the mark of a layout")
            raise StoreUnavailable(
                f"the key {key.decode()} is damaged: delete it, and servers write it again"
            )
        if int(version) > SCHEMA:
            shown = escape_text(version.decode("latin-1"), 20)
            raise ConfigError(
                [
                    f"store.url: the data at {self._url} was written by a newer version of zcproto "
                    f"(schema {shown}; this one supports {SCHEMA}): upgrade this one"
                ]
            )
        if self._marks.get(shard, mark) != mark:
            self._is_flushed |= was_flushed
            self._is_emptied |= not was_flushed
        self._marks[shard] = mark

    def _keys_changed(self, keys: Sequence[bytes]) -> None:
        """Report changes by other processes. The name of a key has the session and the process that changed it."""
        start = len(self._prefix) + len(b"c:{") + TAG_SIZE + len(b"}")
        for key in keys:
            id = id_from_text(key[start + NODE_SIZE :].decode("ascii", "replace"))
            if id is not None and key[start : start + NODE_SIZE] != self._node:
                self._on_change(Change(ChangeKind.SESSION, id))

    def _lost(self) -> None:
        self._on_change(Change(ChangeKind.LOST))

    def _reconnected(self) -> None:
        kind = ChangeKind.ALL
        if self._is_emptied or self._is_flushed:
            kind = ChangeKind.EMPTIED if self._is_emptied else ChangeKind.FLUSHED
        self._is_emptied = self._is_flushed = False
        self._life.store_reached()
        self._on_change(Change(kind))

    def _hide_password(self, text: str) -> str:
        if self._password:
            text = text.replace(self._password, "***")
        return escape_text(text, 200)

    # Last in the class, because its name hides the builtin in annotations.

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        """Return sessions as in `SessionStore.list`. Of too many, those that expire first."""
        if user is not None:
            return (await self._list_user(user))[0]
        found: list[tuple[int, SessionRecord]] = []
        for shard in range(self._shards):
            members = await self._members(shard, MAX_LISTED)
            for start in range(0, len(members), _READ_BATCH):
                found += await self._read_batch(members[start : start + _READ_BATCH])
        found.sort(key=lambda pair: pair[0])
        return [record for _, record in found[:MAX_LISTED]]


class SignOfLife:
    """Shows other processes that this one, which has claimed requests, is still there, and looks for theirs.

    After its first claim a process keeps renewing the key h:NODE. The key expires when the process has ended or
    lost the store; then its claims may be given away. If it still runs, its answers are stored all the same.

    `call` sends a command whose first argument is a key, within the store's timeout.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]], prefix: bytes, node: bytes) -> None:
        self._call = call
        self._prefix = prefix
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._trusted_at = inf

    async def begin(self) -> None:
        """Write the key, and renew it from now on. Idempotent. Raises like `call`."""
        if self._task is None:
            await self._renew()
        if self._task is None:  # nor has another claim begun it meanwhile
            self._task = asyncio.get_running_loop().create_task(self._renew_often())

    async def is_missing(self, node: bytes) -> bool:
        """Return whether a process has shown no sign of life lately."""
        return not await self._call("EXISTS", self._key(node))

    async def is_gone(self, node: bytes) -> bool:
        """Return whether a process has shown no sign of life although it had the time for one."""
        return asyncio.get_running_loop().time() >= self._trusted_at and await self.is_missing(node)

    def store_reached(self) -> None:
        """Give all processes time for a sign of life: the store was reached after a gap."""
        self._trusted_at = asyncio.get_running_loop().time() + LIFE_MS / MS_PER_SECOND

    async def end(self) -> None:
        """Renew the key no more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _renew(self) -> None:
        await self._call("SET", self._key(self._node), b"", "PX", LIFE_MS)

    async def _renew_often(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            with suppress(StoreUnavailable, ResourceExhausted):  # tried again after RENEW_S
                await self._renew()

    def _key(self, node: bytes) -> bytes:
        return self._prefix + b"h:" + node


async def _load_scripts(link: Link) -> None:
    scripts = list(SCRIPTS.values())
    known = await link.call("SCRIPT", "EXISTS", *(script.sha for script in scripts))
    missing = [script for script, is_known in zip(scripts, known, strict=True) if not is_known]
    await asyncio.gather(*(link.call("SCRIPT", "LOAD", script.source) for script in missing))


def _ignore(change: Change) -> None:
    """No-op callback."""


def _tls_context(
    url: ServerUrl, ca_file: Path | None, certificate: Path | None, key: Path | None
) -> ssl.SSLContext | None:
    if not url.tls:
        if ca_file is not None or certificate is not None:
            raise ConfigError(
                [
                    "store.ca_file: store.url is without TLS; write rediss:// or valkeys://, or remove the files"
                ]
            )
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            [f"store.ca_file: it or the client certificate for the store cannot be used: {error}"]
        ) from None
    return context


def _session(id: bytes, raw: bytes) -> SessionRecord:
    record = unpack_session(id, raw)
    assert isinstance(record, SessionRecord)
    return record
