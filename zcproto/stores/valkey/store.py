"""Sessions in Valkey or Redis: the store of several processes and machines.

What this file decides: what each operation asks of the servers, and what their news means. What is done to
sessions there, and under which keys, is in sessions.lua; which servers there are, in servers.py.

- An operation is one script, so it takes effect whole or not at all. In a cluster the script does so for all keys
  of one user; what leads there from a token or an id is written before, and cleaned up behind.
- What is durable when an operation returns is what the server promises: with `appendonly yes` and `appendfsync
  always` the change is on its disk; with `everysec` a crash of its machine may lose the last second; with neither,
  a restart loses all. A failover to a replica may lose what had not reached it. See `examine`.
- `maxmemory-policy` has to be `noeviction`: any other may take sessions away.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from redis.exceptions import AskError, OutOfMemoryError, ReadOnlyError, RedisError

from zcproto.common.clock import Entropy, system_entropy
from zcproto.common.text import escape_text
from zcproto.errors import Code, ConfigError
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.sessions.token import id_from_text
from zcproto.stores.answers import AnswerLimits, check_size
from zcproto.stores.base import (
    MAX_LISTED,
    Change,
    ChangeKind,
    Claim,
    Created,
    LimitReached,
    NotRotated,
    Rotated,
    StoreUnavailable,
)
from zcproto.stores.valkey.link import Link, Target
from zcproto.stores.valkey.requests import BATCH, NODE_SIZE, TAG_SIZE, Requests
from zcproto.stores.valkey.scripts import SCRIPTS
from zcproto.stores.valkey.servers import CLUSTER_SHARDS, Cluster, Sentinels, Servers, SingleServer
from zcproto.stores.valkey.url import Address, Kind, ServerUrl, parse_url

TIMEOUT_S: Final = 0.25
PREFIX: Final = "zcp:"
SCHEMA: Final = 1

_READ_BATCH: Final = 100

_T = TypeVar("_T")


class ValkeyStore:
    """A store on the servers at `url` (see url.py), under keys that begin with `prefix`.

    `timeout` is in seconds, for each operation and for connecting. `password` takes the place of the URL's. With
    TLS, `ca_file` holds the authorities to trust instead of the system's, and `certificate_file` and `key_file`
    are for servers that want to know their clients.

    `end_all`, `list` of everybody, and `touch` of many are done in steps, each with the timeout: one that fails
    leaves the rest as it was. Changes by another ValkeyStore are news, also if it is in this process.

    Raises ConfigError for a URL or files that cannot be used.
    """

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
        answers: AnswerLimits | None = None,
        entropy: Entropy = system_entropy,
    ) -> None:
        self._url = parse_url(url)
        self._password = self._url.password if password is None else password
        if self._url.username and not self._password:
            raise ConfigError(["store.url: it has a user without a password"])
        self._tls = _tls(self._url, ca_file, certificate_file, key_file)
        self._timeout = timeout
        self._prefix = prefix.encode()
        if b"{" in self._prefix or b"}" in self._prefix:
            raise ConfigError(["store.prefix: it must have no { or }, which divide keys among servers"])
        self._answers = answers or AnswerLimits()
        self._node = entropy(NODE_SIZE // 2).hex().encode()
        self._entropy = entropy
        self._marks: dict[int, bytes] = {}
        self._is_emptied = False
        self._servers: Servers | None = None
        self._requests: Requests | None = None
        self._on_change: Callable[[Change], None] = _ignore

    def __repr__(self) -> str:
        return f"ValkeyStore({self._url})"

    @property
    def shared(self) -> bool:
        return True

    async def open(self, on_change: Callable[[Change], None]) -> None:
        """As `SessionStore.open`. May be called again after it failed.

        When a connection was lost and made again `on_change` gets ALL, or EMPTIED if the server has come back
        without what it kept. That somebody had all keys removed (FLUSHDB) is a will: ALL.
        """
        assert self._servers is None, "it is open"
        self._marks.clear()
        servers = self._make_servers()
        await servers.open()  # which leaves nothing behind if it fails
        self._servers = servers
        self._requests = Requests(servers, self._prefix, self._node, self._answers)
        self._on_change = on_change

    async def close(self) -> None:
        servers, self._servers, self._requests, self._on_change = self._servers, None, None, _ignore
        if servers is not None:
            await servers.close()

    async def ping(self) -> None:
        await self._within(self._ask.ping())

    async def load(self) -> AsyncIterator[Sequence[SessionRecord | EndedRecord]]:
        """Nothing: what is wanted is looked up."""
        nothing: tuple[Sequence[SessionRecord | EndedRecord], ...] = ()
        for batch in nothing:
            yield batch

    async def examine(self) -> Sequence[str]:
        """What an operator should know of how the server is set up. Empty: there is nothing to say."""
        return await self._within(self._ask.examine())

    # --- sessions --------------------------------------------------------------------------------

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        return await self._within(self._ask.create(record, limit))

    async def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        return await self._within(self._ask.rotate(rotation))

    async def find(self, token_digest: bytes) -> SessionRecord | EndedRecord | None:
        return await self._within(self._ask.find(token_digest))

    async def get(self, id: bytes) -> SessionRecord | EndedRecord | None:
        return await self._within(self._ask.get(id))

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        for start in range(0, len(uses), BATCH):
            await self._within(self._ask.touch(uses[start : start + BATCH]))

    async def end(
        self, ids: Sequence[bytes], code: Code, wall: int, user: str | None = None
    ) -> list[EndedRecord]:
        return await self._within(self._ask.end(ids, code, wall, user))

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        return await self._within(self._ask.end_user(user, code, wall))

    async def end_all(self, code: Code, wall: int) -> int:
        count = 0
        for shard in range(self._ask.shards):
            more = True
            while more:
                ended, more = await self._within(self._ask.end_some(shard, code, wall))
                count += ended
        return count

    async def list(self, user: str | None = None) -> list[SessionRecord]:
        """As `SessionStore.list`. Of too many, those whose time is over first."""
        if user is not None:
            return await self._within(self._ask.list_user(user))
        found: list[tuple[int, SessionRecord]] = []
        for shard in range(self._ask.shards):
            members = await self._within(self._ask.first_members(shard))
            for start in range(0, len(members), _READ_BATCH):
                found += await self._within(self._ask.read(members[start : start + _READ_BATCH]))
        found.sort(key=lambda pair: pair[0])
        return [record for _, record in found[:MAX_LISTED]]

    async def count(self) -> int:
        return await self._within(self._ask.count())

    async def expire(self, wall: int, keep_ended_ms: int, limit: int) -> int:
        """As `SessionStore.expire`. Rather than to take long it removes fewer."""
        loop = asyncio.get_running_loop()
        enough_at = loop.time() + self._timeout / 2
        return await self._within(
            self._ask.expire(wall, wall - keep_ended_ms, limit, lambda: loop.time() >= enough_at)
        )

    # --- answers of requests with an idempotency key ----------------------------------------------

    async def claim(self, user: str, key: str, request_digest: bytes, wall: int, lease_ms: int) -> Claim:
        """As `SessionStore.claim`. Raises ResourceExhausted if more requests run than may."""
        return await self._within(self._ask.claim(user, key, request_digest, wall, lease_ms))

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        """As `SessionStore.keep_answer`. Raises ValueError for an answer that is too large for any room."""
        check_size(answer, self._answers)
        await self._within(self._ask.keep_answer(user, key, answer, wall, keep_ms))

    async def release_claim(self, user: str, key: str) -> None:
        await self._within(self._ask.release_claim(user, key))

    # --- the servers -----------------------------------------------------------------------------

    @property
    def _ask(self) -> Requests:
        if self._requests is None:
            raise StoreUnavailable("it is not open")
        return self._requests

    async def _within(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of an operation, in time, or StoreUnavailable."""
        try:
            async with asyncio.timeout(self._timeout):
                return await work
        except TimeoutError:
            reason = f"no answer within {self._timeout * 1000:.0f} ms"
        except ReadOnlyError:
            if self._servers is not None:
                self._servers.lose("the server is a replica now")
            reason = "the server is a replica, which cannot be written to"
        except OutOfMemoryError:
            reason = "the server's memory is full (maxmemory)"
        except (RedisError, ConfigError) as error:
            reason = str(error)
        raise StoreUnavailable(self._hide(reason))

    def _make_servers(self) -> Servers:
        url = self._url
        if url.kind is Kind.CLUSTER:
            return Cluster(
                url.addresses,
                self._target,
                timeout=self._timeout,
                prepare=self._prepare,
                on_news=self._take_news,
                on_gap=self._tell_gap,
            )

        async def its_own() -> Target:
            return self._target(url.addresses[0] if url.addresses else ("", 0))

        find = its_own
        if url.kind is Kind.SENTINEL:
            find = Sentinels(url.addresses, url.service, self._target, self._timeout).find
        return SingleServer(
            find,
            timeout=self._timeout,
            prepare=self._prepare,
            on_news=self._take_news,
            on_gap=self._tell_gap,
        )

    def _target(self, address: Address) -> Target:
        url = self._url
        return Target(
            *address,
            path=url.path,
            tls=self._tls,
            username=url.username,
            password=self._password,
            database=url.database,
        )

    async def _prepare(self, link: Link, was_flushed: bool) -> None:
        """Have a server tell what others change, look at the marks that it should have, and give it the scripts."""
        await link.call("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._prefix + b"c:")
        shards = range(CLUSTER_SHARDS if self._url.kind is Kind.CLUSTER else 1)
        await asyncio.gather(
            _load_scripts(link), *(self._check_mark(link, shard, was_flushed) for shard in shards)
        )

    async def _check_mark(self, link: Link, shard: int, was_flushed: bool) -> None:
        """See that what is there was written by no newer version, and that it still is what it was.

        Raises ConfigError.
        """
        key, mine = self._prefix + b"v:{%d}" % shard, b"%d %s" % (SCHEMA, self._entropy(16).hex().encode())
        try:
            found = await link.call("GET", key) or await link.call("SET", key, mine, "NX", "GET") or mine
        except AskError:  # another server of the cluster has it
            return
        version, _, mark = found.partition(b" ")
        if not version.isdigit() or int(version) > SCHEMA:
            said = escape_text(version.decode("latin-1"), 20)
            raise ConfigError(
                [
                    f"store.url: what {self._url} keeps was written by a newer version of zcproto "
                    f"(schema {said}; this one knows {SCHEMA}): upgrade this one"
                ]
            )
        if not was_flushed and self._marks.get(shard, mark) != mark:
            self._is_emptied = True
        self._marks[shard] = mark

    def _take_news(self, keys: Sequence[bytes]) -> None:
        """The server says which keys were changed: the names tell whose, and by whom."""
        start = len(self._prefix) + len(b"c:{") + TAG_SIZE + len(b"}")
        for key in keys:
            id = id_from_text(key[start + NODE_SIZE :].decode("ascii", "replace"))
            if id is not None and key[start : start + NODE_SIZE] != self._node:
                self._on_change(Change(ChangeKind.SESSION, id))

    def _tell_gap(self) -> None:
        """A connection was made again."""
        is_emptied, self._is_emptied = self._is_emptied, False
        self._on_change(Change(ChangeKind.EMPTIED if is_emptied else ChangeKind.ALL))

    def _hide(self, text: str) -> str:
        if self._password:
            text = text.replace(self._password, "***")
        return escape_text(text, 200)


async def _load_scripts(link: Link) -> None:
    scripts = list(SCRIPTS.values())
    known = await link.call("SCRIPT", "EXISTS", *(script.sha for script in scripts))
    missing = [script for script, is_known in zip(scripts, known, strict=True) if not is_known]
    await asyncio.gather(*(link.call("SCRIPT", "LOAD", script.source) for script in missing))


def _ignore(change: Change) -> None:
    """Nobody listens."""


def _tls(
    url: ServerUrl, ca_file: Path | None, certificate: Path | None, key: Path | None
) -> ssl.SSLContext | None:
    if not url.tls:
        if ca_file is not None or certificate is not None:
            raise ConfigError(
                ["store.ca_file: the store is asked without TLS; write rediss:// or valkeys://"]
            )
        return None
    try:
        context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            [f"store.ca_file: it or the certificate for the store cannot be used: {error}"]
        ) from None
    return context
