"""What each operation asks of the servers, and what their answers say. What is done there is in sessions.lua.

What this file decides: which script or command an operation takes, and in a cluster in which order.

Rules:
- With one server an operation is one script.
- In a cluster what leads to a session is written before it, and removed after it. Where that was cut short, the
  next operation passes over what is left, and `expire` removes it.

It must not know: how servers are found and connected to, time limits.
"""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from collections.abc import Callable, Coroutine, Iterable, Sequence
from hashlib import sha256
from typing import Any, Final

import msgpack
from redis.exceptions import NoScriptError, ResponseError

from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.sessions.token import id_from_text, id_text
from zcproto.stores.answers import LAST_MS, AnswerLimits
from zcproto.stores.base import MAX_LISTED, Claim, ClaimState, Created, LimitReached, NotRotated, Rotated
from zcproto.stores.valkey.scripts import SCRIPTS
from zcproto.stores.valkey.servers import Servers

BATCH: Final = 500
_EXPIRED: Final = 200
"""Entries that one script removes: the server does nothing else meanwhile, for some 2 ms."""
"""Sessions for which one script runs, where it need not be all at once: some milliseconds."""

TAG_SIZE: Final = 20
NODE_SIZE: Final = 8

_DAY_MS: Final = 86_400_000
_LONGEST_MS: Final = 3_650 * _DAY_MS
_PLACE_SIZE: Final = 16
_ID_TEXT_SIZE: Final = 22
_MEMBER_SIZE: Final = TAG_SIZE + _ID_TEXT_SIZE
_TOKEN_MEMBER_SIZE: Final = 33
_RETRY_MS: Final = 1_000
_TRIMMED: Final = 16
_TRIMS: Final = 64

Found = SessionRecord | EndedRecord


class Requests:
    """The operations of a store on these servers, each for as long as it takes. `node` is 8 bytes of text."""

    def __init__(self, servers: Servers, prefix: bytes, node: bytes, answers: AnswerLimits) -> None:
        self._servers = servers
        self._prefix = prefix
        self._node = node
        self._answers = answers

    @property
    def shards(self) -> int:
        """Into how many parts sessions are divided."""
        return self._servers.shards

    # --- sessions --------------------------------------------------------------------------------

    async def create(self, record: SessionRecord, limit: UserLimit) -> Created | LimitReached:
        tag, id, wall = _tag(record.user), id_text(record.id).encode(), record.created_at
        due = max(record.expires_at, record.refresh_expires_at)
        ms = _ttl(due - wall)
        idle_from = b"" if limit.idle_ms is None or limit.idle_ms > wall else _time(wall - limit.idle_ms)
        order = 0
        if self._servers.clustered:
            order = await self._announce_session(record, tag, id, due, ms)
        state, ended = await self._run(
            "create",
            tag,
            id,
            _pack(record),
            ms,
            _time(wall),
            limit.per_user,
            limit.when_full == "evict_oldest",
            idle_from,
            order,
        )
        if self._servers.clustered and state in (b"full", b"ended"):
            await self._take_back_session(record, tag, id, with_pointers=state == b"full")
        return (
            LimitReached() if state == b"full" else Created(tuple(_ended(p, Code(c), wall) for c, p in ended))
        )

    async def _announce_session(self, record: SessionRecord, tag: bytes, id: bytes, due: int, ms: int) -> int:
        """In a cluster: write what leads to a session that will be there at once; its place in the order."""
        counter, index = self._prefix + b"n", self._shard_key(b"x", self._shard(tag))
        order, *_ = await asyncio.gather(
            self._call("INCR", counter),
            self._call("SET", self._prefix + b"t:" + record.token_digest, tag + id, "PX", ms, "NX"),
            self._call("SET", self._prefix + b"i:" + id, tag, "PX", ms, "NX"),
            self._call("ZADD", index, "NX", _time(due), tag + id),
            self._call("PEXPIRE", index, _LONGEST_MS),
        )
        return int(order)

    async def _take_back_session(
        self, record: SessionRecord, tag: bytes, id: bytes, *, with_pointers: bool
    ) -> None:
        await self._call("ZREM", self._shard_key(b"x", self._shard(tag)), tag + id)
        if with_pointers:
            await asyncio.gather(
                self._call("DEL", self._prefix + b"t:" + record.token_digest),
                self._call("DEL", self._prefix + b"i:" + id),
            )

    async def rotate(self, rotation: Rotation) -> Rotated | NotRotated:
        id, tag = id_text(rotation.id).encode(), b""
        token_key = self._prefix + b"t:" + rotation.token_digest
        if self._servers.clustered:
            tag = await self._call("GET", self._prefix + b"i:" + id) or b""
            if not tag:
                return NotRotated(Code.UNAUTHENTICATED)
            ms = await self._call("PTTL", self._session_key(tag, id))
            await self._call("SET", token_key, tag + id, "PX", max(ms, _DAY_MS))
        code, *rest = await self._run(
            "rotate",
            tag,
            id,
            rotation.spent_digest,
            rotation.token_digest,
            rotation.refresh_digest,
            _time(rotation.expires_at),
            _utf8(rotation.client),
            _utf8(rotation.address),
            _time(rotation.wall),
        )
        if code:
            if self._servers.clustered:
                await self._call("DEL", token_key)
            return NotRotated(Code(code), bool(rest[0]))
        raw, old = rest
        record = _record(id, raw)
        assert isinstance(record, SessionRecord)
        return Rotated(record, old)

    async def find(self, token: bytes) -> Found | None:
        if self._servers.clustered:
            pointer = await self._call("GET", self._prefix + b"t:" + token)
            raw = None
            if pointer and pointer[:1] != b"!":
                raw = await self._call("GET", self._session_key(pointer[:TAG_SIZE], pointer[TAG_SIZE:]))
        else:
            pointer, raw = await self._run("find", b"", token)
        if not pointer:
            return None
        if pointer[:1] == b"!":
            return EndedRecord(b"", token, Code.TOKEN_REVOKED, int(pointer[1:]))
        if not raw:
            return None
        found = _record(pointer[TAG_SIZE:], raw)
        if found.token_digest == token:
            return found
        # A refresh has replaced it, and was stopped before it could note so.
        at = found.last_used_at if isinstance(found, SessionRecord) else found.ended_at
        return EndedRecord(b"", token, Code.TOKEN_REVOKED, at)

    async def get(self, id: bytes) -> Found | None:
        members = await self._with_tags([id_text(id).encode()])
        for found in await self._read_many(members):
            return _record(*found)
        return None

    async def touch(self, uses: Sequence[tuple[bytes, int]]) -> None:
        times = {id_text(id).encode(): _time(used_at) for id, used_at in sorted(uses, key=lambda use: use[1])}
        members = await self._with_tags(list(times))
        await self._gather(
            self._run("touch", tag, group, [times[member[-_ID_TEXT_SIZE:]] for member in group])
            for tag, group in self._by_tag(members)
        )

    async def end(self, ids: Sequence[bytes], code: Code, wall: int, user: str | None) -> list[EndedRecord]:
        members = await self._with_tags([id_text(id).encode() for id in ids])
        ended = await self._finish(members, code, wall, None if user is None else _utf8(user))
        if self._servers.clustered:  # where they come by user
            place = {id: n for n, id in reversed(list(enumerate(ids)))}
            ended.sort(key=lambda record: place[record.id])
        return ended

    async def _finish(
        self, members: list[bytes], code: Code, wall: int, user: bytes | None
    ) -> list[EndedRecord]:
        groups = await self._gather(
            self._run("finish", tag, group, int(code), _time(wall), user)
            for tag, group in self._by_tag(members)
        )
        return [_ended(pair, code, wall) for group in groups for pair in group]

    async def end_user(self, user: str, code: Code, wall: int) -> list[EndedRecord]:
        pairs = await self._run("finish_user", _tag(user), int(code), _time(wall))
        return [_ended(pair, code, wall) for pair in pairs]

    async def end_some(self, shard: int, code: Code, wall: int) -> tuple[int, bool]:
        """End the first sessions of an index; how many, and whether there may be more."""
        index = self._shard_key(b"x", shard)
        members = await self._members(index, BATCH)
        if not members:
            return 0, False
        ended = await self._finish(members, code, wall, None)
        await self._call("ZREM", index, *members)  # what was left behind there would be found for ever
        return len(ended), True

    async def list_user(self, user: str) -> list[SessionRecord]:
        found = [_record(id, raw) for id, raw in await self._run("user", _tag(user))]
        return [record for record in found if isinstance(record, SessionRecord)]

    async def first_members(self, shard: int) -> list[bytes]:
        """Sessions of everybody, for `read`: those first whose time is over first."""
        return await self._members(self._shard_key(b"x", shard), MAX_LISTED)

    async def read(self, members: list[bytes]) -> list[tuple[int, SessionRecord]]:
        """Those of these sessions that are kept, each with its place in the order of opening."""
        found = []
        for id, raw in await self._read_many(members):
            if isinstance(record := _record(id, raw), SessionRecord):
                found.append((_order(raw), record))
        return found

    async def count(self) -> int:
        keys = [self._shard_key(b"x", shard) for shard in range(self.shards)]
        return sum(await self._gather(self._call("ZCARD", key) for key in keys))

    async def expire(self, wall: int, ended_before: int, limit: int, is_enough: Callable[[], bool]) -> int:
        """Remove what is past, at most `limit`, in steps until `is_enough` says so."""
        removed = 0
        for shard in range(self.shards):
            for step in (self._expire_sessions, self._expire_answers):
                while removed < limit and not is_enough():
                    most = min(_EXPIRED, limit - removed)
                    found, gone = await step(shard, wall, ended_before, most)
                    removed += gone
                    if found < most:
                        break
        return removed

    async def _expire_sessions(self, shard: int, wall: int, ended_before: int, most: int) -> tuple[int, int]:
        """How many entries were looked at, and how many of them removed."""
        if not self._servers.clustered:
            found, gone = await self._run("expire", b"", _time(wall), _score(ended_before), most, [], [])
            return found, gone
        dues = await self._range(b"x", shard, wall, most)
        memories = await self._range(b"m", shard, ended_before, most - len(dues))
        tokens = [member for member in memories if len(member) == _TOKEN_MEMBER_SIZE]
        if tokens:
            await self._gather(self._call("DEL", self._prefix + b"t:" + member[1:]) for member in tokens)
            await self._call("ZREM", self._shard_key(b"m", shard), *tokens)
        groups: dict[bytes, tuple[list[bytes], list[bytes]]] = {
            tag: (group, []) for tag, group in self._by_tag(dues)
        }
        for tag, group in self._by_tag([member for member in memories if member not in tokens]):
            groups[tag] = (groups.get(tag, ([], []))[0], group)
        results = await self._gather(
            self._run("expire", tag, _time(wall), _score(ended_before), most, past, ended)
            for tag, (past, ended) in groups.items()
        )
        return len(dues) + len(memories), len(tokens) + sum(gone for _, gone in results)

    async def _expire_answers(self, shard: int, wall: int, ended_before: int, most: int) -> tuple[int, int]:
        if not self._servers.clustered:
            found, gone = await self._run("forget_answers", b"", _time(wall), most, [], False, _DAY_MS)
            return found, gone
        members = await self._range(b"w", shard, wall, most)
        members += await self._range(b"o", shard, wall, most - len(members))
        return len(members), await self._forget_answers(members, wall, False)

    # --- answers ---------------------------------------------------------------------------------

    async def claim(self, user: str, key: str, request: bytes, wall: int, lease_ms: int) -> Claim:
        tag, digest, until = _tag(user), _key_digest(key), min(wall + lease_ms, LAST_MS)
        state, answer, count, size = await self._run(
            "claim",
            tag,
            digest,
            request,
            _time(wall),
            _time(until),
            _ttl(until - wall),
            self._answers.user_count,
        )
        if state == b"full":
            raise _too_many("of this user ")
        if state == b"new" and not await self._trim(tag, wall, count, size):
            await self._run("release", tag, digest, _DAY_MS)
            raise _too_many("")
        if state == b"running":
            return Claim(ClaimState.RUNNING, until=int(answer))
        return Claim(ClaimState(state.decode()), answer)

    async def keep_answer(self, user: str, key: str, answer: bytes, wall: int, keep_ms: int) -> None:
        tag, until = _tag(user), min(wall + keep_ms, LAST_MS)
        _, _, count, size = await self._run(
            "keep",
            tag,
            _key_digest(key),
            answer,
            _time(wall),
            _time(until),
            _ttl(until - wall),
            self._answers.user_bytes,
        )
        await self._trim(tag, wall, count, size)

    async def release_claim(self, user: str, key: str) -> None:
        await self._run("release", _tag(user), _key_digest(key), _DAY_MS)

    async def _trim(self, tag: bytes, wall: int, count: int, size: int) -> bool:
        """Forget the oldest answers while all users together have more than they may; whether that did it."""
        shard, shards, limits = self._shard(tag), self.shards, self._answers
        if self._servers.clustered:
            count, size = await self._answers_held(shard)
        for _ in range(_TRIMS):
            if count <= limits.count / shards and size <= limits.bytes / shards:
                return True
            most = min(max(count - limits.count // shards, 1), _TRIMMED)
            if self._servers.clustered:
                members = await self._oldest(shard, most)
                found = len(members)
                await self._forget_answers(members, wall, True)
            else:
                found, _ = await self._run("forget_answers", b"", _time(wall), most, [], True, _DAY_MS)
            if not found:
                break
            count, size = await self._answers_held(shard)
        return count <= limits.count / shards

    async def _answers_held(self, shard: int) -> tuple[int, int]:
        """How many requests run or are answered, and the bytes of the answers."""
        running, done, size = await asyncio.gather(
            self._call("ZCARD", self._shard_key(b"w", shard)),
            self._call("ZCARD", self._shard_key(b"o", shard)),
            self._call("GET", self._shard_key(b"b", shard)),
        )
        return running + done, int(size or 0)

    async def _oldest(self, shard: int, most: int) -> list[bytes]:
        found: list[bytes] = await self._call("ZRANGE", self._shard_key(b"o", shard), 0, most - 1)
        return found

    async def _forget_answers(self, members: list[bytes], wall: int, also_good: bool) -> int:
        results = await self._gather(
            self._run("forget_answers", tag, _time(wall), len(group), group, also_good, _DAY_MS)
            for tag, group in self._by_tag(members, _PLACE_SIZE)
        )
        return sum(gone for _, gone in results)

    # --- about the servers ----------------------------------------------------------------------

    async def ping(self) -> None:
        keys = [self._shard_key(b"p", shard) for shard in range(self.shards)]
        await self._gather(self._call("SET", key, b"", "PX", 1_000) for key in keys)

    async def examine(self) -> list[str]:
        found: list[str] = []
        wanted = ("appendonly", "appendfsync", "maxmemory-policy")
        key = self._prefix + b"schema"
        try:
            settings = await self._servers.call(key, "CONFIG", "GET", *wanted)
        except ResponseError:
            return ["the server does not say how it is set up: see to appendonly and maxmemory-policy"]
        values = {name.decode(): value.decode() for name, value in settings.items()}
        if values.get("appendonly") != "yes":
            found.append("appendonly is off: a restart of the server loses sessions and revocations")
        elif values.get("appendfsync") != "always":
            found.append("appendfsync is not always: a crash of its machine may lose the last second")
        if values.get("maxmemory-policy") != "noeviction":
            found.append("maxmemory-policy is not noeviction: the server may drop sessions when it is full")
        return found

    # --- parts -----------------------------------------------------------------------------------

    async def _call(self, *command: Any) -> Any:
        """Send a command whose first argument is a key."""
        return await self._servers.call(command[1], *command)

    async def _run(self, name: str, tag: bytes, *arguments: Any) -> Any:
        """Run a script for one user's keys, and what it leaves to be done elsewhere."""
        key = self._prefix + b"u:{" + tag + b"}" if tag else self._shard_key(b"x", 0)
        result, elsewhere = await self._run_for(key, name, tag, *arguments)
        if elsewhere:
            await self._gather(self._call(*command) for command in elsewhere)
        return result

    async def _run_for(self, key: bytes, name: str, tag: bytes, *arguments: Any) -> Any:
        servers, script = self._servers, SCRIPTS[name]
        head = (self._prefix, self._node, servers.clustered, self._shard(tag), tag)
        argument: bytes = msgpack.packb([*head, *arguments], use_bin_type=False)
        try:
            raw = await servers.call(key, "EVALSHA", script.sha, 1, key, argument)
        except NoScriptError:
            raw = await servers.call(key, "EVAL", script.source, 1, key, argument)
        return msgpack.unpackb(raw, raw=True)

    async def _gather(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Do several things at once, or one by itself without a task."""
        calls = list(calls)
        return [await calls[0]] if len(calls) == 1 else list(await asyncio.gather(*calls))

    async def _members(self, key: bytes, most: int) -> list[bytes]:
        """The first members, TAG and ID, of an index of sessions."""
        text, _ = await self._run_for(key, "members", b"", 0, most - 1)
        return [text[start : start + _MEMBER_SIZE] for start in range(0, len(text), _MEMBER_SIZE)]

    async def _range(self, kind: bytes, shard: int, until: int, most: int) -> list[bytes]:
        """Members of an index that are due."""
        if most < 1:
            return []
        key = self._shard_key(kind, shard)
        found: list[bytes] = await self._call("ZRANGEBYSCORE", key, "-inf", _score(until), "LIMIT", 0, most)
        return found

    async def _read_many(self, members: list[bytes]) -> list[list[bytes]]:
        groups = await self._gather(self._run("read", tag, group) for tag, group in self._by_tag(members))
        return [pair for group in groups for pair in group]

    async def _with_tags(self, ids: list[bytes]) -> list[bytes]:
        """Ids, in a cluster with the TAG before each, without those that are not known."""
        if not self._servers.clustered:
            return ids
        tags = await self._gather(self._call("GET", self._prefix + b"i:" + id) for id in ids)
        return [tag + id for tag, id in zip(tags, ids, strict=True) if tag]

    def _by_tag(self, members: list[bytes], skip: int = 0) -> list[tuple[bytes, list[bytes]]]:
        """Members by the users that a script can work on together: in a cluster one each."""
        if not self._servers.clustered:
            return [(b"", members)] if members else []
        groups: dict[bytes, list[bytes]] = {}
        for member in members:
            groups.setdefault(member[skip : skip + TAG_SIZE], []).append(member)
        return list(groups.items())

    def _session_key(self, tag: bytes, id: bytes) -> bytes:
        return self._prefix + b"s:{" + tag + b"}" + id

    def _shard_key(self, kind: bytes, shard: int) -> bytes:
        return self._prefix + kind + b":{%d}" % shard

    def _shard(self, tag: bytes) -> int:
        return sum(tag) % self.shards


def _too_many(whose: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"too many requests {whose}with an idempotency key are running", {"retry_after_ms": _RETRY_MS}
    )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogatepass")


def _tag(user: str) -> bytes:
    """What stands for a user in keys."""
    return urlsafe_b64encode(sha256(_utf8(user)).digest()[:15])


def _key_digest(key: str) -> bytes:
    return urlsafe_b64encode(sha256(_utf8(key)).digest()[:16]).rstrip(b"=")


def _time(value: int) -> bytes:
    """A time as scripts compare it. Those before 1970 are all one."""
    return b"%d" % max(value, 0)


def _score(value: int) -> bytes:
    return b"%d" % value


def _ttl(ms: int) -> int:
    """How long a key has to live that is needed for so long."""
    return min(max(ms, 0) + _DAY_MS, _LONGEST_MS)


def _pack(record: SessionRecord) -> bytes:
    """A session, as sessions.lua says. The scripts add its place in the order."""
    packed: bytes = msgpack.packb(
        [
            0,
            record.token_digest,
            record.refresh_digest,
            _utf8(record.user),
            _utf8(record.client),
            _utf8(record.address),
            _utf8(record.key),
            record.flags,
            _time(record.created_at),
            _time(record.last_used_at),
            _time(record.expires_at),
            _time(record.refresh_expires_at),
        ],
        use_bin_type=False,
    )
    return packed


def _record(id: bytes, raw: bytes) -> SessionRecord | EndedRecord:
    """A session by the text of its id, or the memory of one."""
    code, token, *rest = msgpack.unpackb(raw, raw=True)
    raw_id = id_from_text(id.decode("ascii"))
    assert raw_id is not None
    if code:
        return EndedRecord(raw_id, token, Code(code), int(rest[0]))
    refresh, user, client, address, key, flags, created_at, last_used_at, expires_at, refresh_expires_at = (
        rest[:10]
    )
    return SessionRecord(
        raw_id,
        token,
        refresh,
        _text(user),
        _text(client),
        _text(address),
        flags,
        int(created_at),
        int(last_used_at),
        int(expires_at),
        int(refresh_expires_at),
        _text(key),
    )


def _order(raw: bytes) -> int:
    order: int = msgpack.unpackb(raw, raw=True)[12]
    return order


def _ended(pair: Sequence[bytes], code: Code, wall: int) -> EndedRecord:
    id = id_from_text(pair[0].decode("ascii"))
    assert id is not None
    return EndedRecord(id, pair[1], code, wall)
