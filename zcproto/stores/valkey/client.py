"""The client of a Valkey or Redis store: connects, prepares servers, runs scripts and reports changes.

Decides: which commands prepare a server, how failures are translated, what client tracking means.
The operations are in store.py; what they do to keys is in sessions.lua and answers.lua.

It must not know: what an operation is for.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import wraps
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

from zcproto.common.clock import Entropy, MonotonicClock, system_clock, system_entropy
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.sessions.token import id_from_text
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import (
    CLOCK_SKEW_MS,
    Change,
    ChangeKind,
    DamagedRecord,
    KeysMoving,
    Notice,
    StoreUnavailable,
    too_many_operations,
)
from zcproto.stores.operations import LoopTimeout
from zcproto.stores.valkey.life import SignOfLife
from zcproto.stores.valkey.link import Link, Target
from zcproto.stores.valkey.scripts import NODE_SIZE, SCRIPTS, TAG_SIZE
from zcproto.stores.valkey.sentinels import Sentinels
from zcproto.stores.valkey.servers import Cluster, Hooks, ValkeyConnection
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

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="ValkeyClient")


def operation(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Apply the store's timeout to a method, and raise StoreUnavailable for every failure of the servers.

    Repeat it while a cluster moves its keys. Raises ResourceExhausted if too many are in progress.
    """
    is_lasting = method.__name__ in LASTING

    @wraps(method)
    async def limited(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
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
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Let an operation wait while too many of its kind are in progress. Its timeout begins after that."""
    is_lasting = method.__name__ in LASTING

    @wraps(method)
    async def queued(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._waiting_behind >= MAX_OPERATIONS and not is_lasting:
            raise too_many_operations()
        self._waiting_behind += 1
        try:
            async with self._behind:
                return await method(self, *args, **kwargs)
        finally:
            self._waiting_behind -= 1

    return queued


class ValkeyClient:
    """The connections of one process to the servers at a URL (see url.py). Keys begin with `prefix`.

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
        servers = self._make_servers()
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
        if isinstance(
            servers, Cluster
        ):  # a server may have none of these keys, and report changes all the same
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

    def _make_servers(self) -> ValkeyConnection | Cluster:
        url = self._url
        hooks = Hooks(self._timeout, self._prepare, self._keys_changed, self._lost, self._reconnected)
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
