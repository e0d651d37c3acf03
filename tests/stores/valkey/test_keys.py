"""The keys on the server: digests only, with a time to live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import pytest

from tests.stores.contract import (
    DAY,
    EVICT_ONE,
    FIVE,
    HOUR,
    KEEP,
    KEEP_ENDED,
    LEASE,
    MINUTE,
    ONE,
    WALL,
    StoreTime,
    digest,
    ended,
    rotated,
    rotation,
    session,
)
from tests.stores.valkey.helpers import url_of
from tests.stores.valkey.server_process import ServerProcess
from zcproto.errors import Code, ResourceExhausted
from zcproto.sessions.record import EndedRecord, SessionRecord, UserLimit
from zcproto.sessions.token import id_text
from zcproto.stores.answers import LATE_MS, AnswerLimits
from zcproto.stores.base import ClaimState, Created, LimitReached
from zcproto.stores.valkey.scripts import SCRIPTS, tag_of
from zcproto.stores.valkey.store import ValkeyStore

KEPT_FOR_EVER = {b"v", b"n"}


@pytest.fixture
def time() -> StoreTime:
    return StoreTime()


@pytest.fixture
async def store(server: ServerProcess, time: StoreTime) -> AsyncIterator[ValkeyStore]:
    limits = AnswerLimits(3 * 16, 100 * 16, 3, 60)
    store = ValkeyStore(url_of(server), answers=limits, time=time)
    await store.open(lambda change: pytest.fail(f"no other process changes this store: {change}"))
    yield store
    await store.close()


def kinds(server: ServerProcess) -> set[bytes]:
    """Return the kinds of the existing keys."""
    return {key.split(b":", 2)[1] for key in server.command("KEYS", "*")}


def only(server: ServerProcess, kind: str) -> bytes:
    """Return the only key of a kind."""
    found: list[bytes] = server.command("KEYS", f"zcp:{kind}:*")
    assert len(found) == 1
    return found[0]


def scripts_run(server: ServerProcess) -> int:
    """Return how many scripts the server has run since the last call."""
    stats = server.command("INFO", "commandstats").decode()
    server.command("CONFIG", "RESETSTAT")
    (line,) = [line for line in stats.splitlines() if line.startswith("cmdstat_evalsha:")] or ["calls=0,"]
    return int(line.partition("calls=")[2].partition(",")[0])


async def open_many(store: ValkeyStore, count: int, *lapsed: int) -> list[SessionRecord]:
    """Open sessions of one user, some of which have not been used for too long."""
    used_at = dict.fromkeys(lapsed, WALL - 2 * HOUR)
    many = [session(number, last_used_at=used_at.get(number, WALL)) for number in range(count)]
    for record in many:
        await store.create(record, UserLimit(10_000, "refuse", None))
    return many


async def test_very_many_sessions_are_read_and_ended_in_several_scripts(
    store: ValkeyStore, server: ServerProcess
) -> None:
    many = await open_many(store, 600)
    scripts_run(server)
    assert await store.list("alice") == many
    assert scripts_run(server) == 3
    assert await store.create(session(600), UserLimit(600, "refuse", None)) == LimitReached()
    assert scripts_run(server) == 4
    created = await store.create(session(600), UserLimit(301, "evict_oldest", None))
    assert created == Created(tuple(ended(record, Code.SESSION_REPLACED) for record in many[:300]))
    assert scripts_run(server) == 7  # three to list them, two to end the first 200
    last = [*many[300:], session(600)]
    assert await store.list("alice") == last
    assert await store.create(session(601), UserLimit(1, "refuse", None)) == LimitReached()
    scripts_run(server)
    assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == [ended(record) for record in last]
    assert scripts_run(server) == 4
    assert await store.list() == []


async def test_limit_above_one_script_holds_for_concurrent_openings(store: ValkeyStore) -> None:
    many = await open_many(store, 298)
    results = await asyncio.gather(
        *(store.create(session(number), UserLimit(300, "refuse", HOUR)) for number in range(298, 310))
    )
    assert [results.count(Created()), results.count(LimitReached())] == [2, 10]
    evict = UserLimit(300, "evict_oldest", HOUR)
    replaced = await asyncio.gather(*(store.create(session(number), evict) for number in range(400, 406)))
    gone = [record.id for each in replaced if isinstance(each, Created) for record in each.ended]
    assert sorted(gone) == sorted(record.id for record in many[:6])
    assert await store.count() == 300


@pytest.mark.parametrize("meanwhile", ["used again", "another is opened"])
async def test_lapsed_session_is_kept_if_it_is_needed_while_others_are_read(
    store: ValkeyStore, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    many, limit = await open_many(store, 260, 7), UserLimit(260, "refuse", HOUR)
    listed, made = store._list_user, list[object]()

    async def list_slowly(user: str) -> tuple[list[SessionRecord], bytes]:
        monkeypatch.setattr(store, "_list_user", listed)
        found = await listed(user)
        if meanwhile == "used again":
            await store.touch([(many[7].id, WALL)])
        else:
            made.append(await store.create(session(300), limit))
        return found

    monkeypatch.setattr(store, "_list_user", list_slowly)
    assert await store.create(session(301), limit) == LimitReached()
    assert await store.get(session(301).id) is await store.find(session(301).token_digest) is None
    if meanwhile == "used again":
        assert isinstance(await store.get(many[7].id), SessionRecord)
    else:
        assert made == [Created((ended(many[7], Code.TOKEN_EXPIRED),))]
    assert await store.count() == 260


async def test_session_announced_early_and_opened_late_is_the_newest(
    store: ValkeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store._is_clustered:
        announce = store._announce_session

        async def announce_late(*arguments: Any) -> int:
            await announce(*arguments)
            return 1

        monkeypatch.setattr(store, "_announce_session", announce_late)
    await open_many(store, 5)
    assert await store.list("alice") == [session(number) for number in range(5)]


async def do_everything(store: ValkeyStore) -> None:
    record = session()
    await store.create(record, FIVE)
    await store.rotate(rotation(record, sealed=b"pair", grace_ms=MINUTE))
    await store.create(session(2, expires_at=WALL + 1, refresh_expires_at=WALL + 1), FIVE)
    await store.create(session(3), FIVE)
    await store.create(session(4, "bob"), FIVE)
    await store.create(session(5, "bob"), EVICT_ONE)
    await store.end([session(3).id], Code.TOKEN_REVOKED, WALL)
    await store.touch([(record.id, WALL + DAY)])
    await store.claim("alice", "running", digest("body"), LEASE)
    await store.claim("alice", "done", digest("body"), LEASE)
    await store.keep_answer("alice", "done", b"answer", KEEP)
    await store.ping()


async def test_every_key_has_a_time_to_live(store: ValkeyStore, server: ServerProcess) -> None:
    await do_everything(store)
    assert kinds(server) >= {
        b"s",
        b"u",
        b"i",
        b"t",
        b"x",
        b"m",
        b"q",
        b"a",
        b"w",
        b"o",
        b"b",
        b"p",
        b"n",
        b"r",
        b"v",
    }
    assert b"c" not in kinds(server)  # the key that announces a change is deleted at once
    for key in server.command("KEYS", "*"):
        ms = server.command("PTTL", key)
        kind = key.split(b":", 2)[1]
        if kind not in KEPT_FOR_EVER:
            assert ms > 0, key
        if kind in {b"s", b"i", b"t"}:
            assert ms <= 31 * DAY, key
    # A refresh and a touch neither remove nor extend it.
    session_key = b"zcp:s:{" + tag_of("alice") + b"}" + id_text(session().id).encode()
    assert 30 * DAY < server.command("PTTL", session_key) <= 31 * DAY


async def test_stored_data_contains_no_token(store: ValkeyStore, server: ServerProcess) -> None:
    token, refresh, spent = b"T" * 32, b"R" * 32, b"S" * 32
    record = session(token_digest=sha256(token).digest(), refresh_digest=sha256(spent).digest())
    await store.create(record, FIVE)
    await store.rotate(rotation(record, refresh_digest=sha256(refresh).digest()))
    await store.claim("alice", "the key of a request", digest("body"), LEASE)
    dumped = b"".join(key + server.command("DUMP", key) for key in server.command("KEYS", "*"))
    assert sha256(refresh).digest() in dumped
    for secret in (token, refresh, spent, sha256(spent).digest(), b"the key of a request"):
        assert secret not in dumped


async def test_expire_leaves_no_keys(store: ValkeyStore, server: ServerProcess, time: StoreTime) -> None:
    await do_everything(store)
    time.ms += 40 * DAY
    assert await store.create(session(6, "bob"), ONE) == LimitReached()
    while await store.expire(WALL + 40 * DAY, KEEP_ENDED, 1_000):
        pass
    assert kinds(server) - {b"h", b"p", b"b", b"r"} <= KEPT_FOR_EVER  # h expires in seconds
    assert {server.command("GET", key) for key in server.command("KEYS", "zcp:b:*")} == {b"0"}
    assert await store.count() == 0


async def test_ended_session_leaves_only_a_tombstone(store: ValkeyStore, server: ServerProcess) -> None:
    await store.create(session(client="the client", address="192.0.2.77"), FIVE)
    await store.end_user("alice", Code.TOKEN_REVOKED, WALL)
    kept = server.command("GET", only(server, "s"))
    for gone in (b"alice", b"the client", b"192.0.2.77", session().refresh_digest):
        assert gone not in kept
    assert kinds(server) - KEPT_FOR_EVER == {b"s", b"i", b"t", b"m"}


async def test_keys_contain_a_digest_of_the_user(store: ValkeyStore, server: ServerProcess) -> None:
    await store.create(session(user="mallory}{*?[a]\r\n"), FIVE)
    assert not any(b"mallory" in key for key in server.command("KEYS", "*"))


# --- what was cut short ------------------------------------------------------------------------------------------


async def test_refresh_interrupted_before_the_old_token_was_marked(
    store: ValkeyStore, server: ServerProcess
) -> None:
    """In a cluster the old token is marked after the refresh. It is revoked without the mark too."""
    record = session()
    await store.create(record, FIVE)
    pointer = server.command("GET", b"zcp:t:" + record.token_digest)
    wanted = rotation(record)
    await store.rotate(wanted)
    server.command("SET", b"zcp:t:" + record.token_digest, pointer)
    assert await store.find(record.token_digest) == EndedRecord(
        b"", record.token_digest, Code.TOKEN_REVOKED, wanted.wall
    )
    await store.end([record.id], Code.SESSION_REPLACED, WALL + MINUTE + 1)
    assert await store.find(record.token_digest) == EndedRecord(
        b"", record.token_digest, Code.TOKEN_REVOKED, WALL + MINUTE + 1
    )
    assert await store.find(wanted.token_digest) == ended(
        rotated(record, wanted), Code.SESSION_REPLACED, WALL + MINUTE + 1
    )


async def test_opening_interrupted_before_the_session_was_written(
    store: ValkeyStore, server: ServerProcess
) -> None:
    """In a cluster the keys that lead to a session are written first. Without the session they are cleaned up."""
    record = session()
    await store.create(record, FIVE)
    server.command("DEL", only(server, "s"))
    assert await store.find(record.token_digest) is None
    assert await store.get(record.id) is None
    assert await store.list("alice") == await store.list() == []
    assert await store.end([record.id], Code.TOKEN_REVOKED, WALL) == []
    assert await store.end_user("alice", Code.TOKEN_REVOKED, WALL) == []
    await store.touch([(record.id, WALL + 1)])
    assert await store.create(record, ONE) == Created()
    assert await store.get(record.id) == record


async def test_repeated_opening_leaves_no_extra_keys(store: ValkeyStore, server: ServerProcess) -> None:
    record = session(expires_at=WALL + 2 * DAY, refresh_expires_at=WALL + DAY)
    await store.create(record, FIVE)
    wanted = rotation(record)
    await store.rotate(wanted)
    before = {key: server.command("DUMP", key) for key in server.command("KEYS", "*")}
    assert await store.create(record, FIVE) == Created()
    after = {key: server.command("DUMP", key) for key in server.command("KEYS", "*")}
    assert {key for key in before | after if before.get(key) != after.get(key)} <= {b"zcp:n"}
    await store.end([record.id], Code.TOKEN_REVOKED, WALL)
    assert await store.create(record, FIVE) == Created()
    assert await store.count() == 0
    assert isinstance(await store.find(wanted.token_digest), EndedRecord)


async def test_index_entries_without_a_session_are_removed(store: ValkeyStore, server: ServerProcess) -> None:
    await store.create(session(), FIVE)
    await store.create(session(2, "bob"), FIVE)
    for key in server.command("KEYS", "zcp:s:*"):
        server.command("DEL", key)
    assert await store.count() == 2
    assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 0
    assert await store.count() == 0


async def test_wrong_index_entries_are_corrected(store: ValkeyStore, server: ServerProcess) -> None:
    record = session()
    await store.create(record, FIVE)
    index = only(server, "x")
    (member,) = server.command("ZRANGE", index, 0, -1)
    server.command("ZADD", index, WALL, member)  # too early
    assert await store.expire(WALL + 1, KEEP_ENDED, 10) == 0
    assert await store.get(record.id) == record
    assert server.command("ZSCORE", index, member) == b"%d" % record.refresh_expires_at
    memories = index.replace(b":x:", b":m:")
    server.command("ZADD", memories, WALL, member)  # it has not ended
    assert await store.expire(WALL + KEEP_ENDED, KEEP_ENDED, 10) == 0
    assert await store.get(record.id) == record
    await store.end([record.id], Code.TOKEN_REVOKED, WALL)
    server.command("ZADD", index, WALL, member)  # it has
    assert await store.expire(WALL + 1, KEEP_ENDED, 10) == 0
    assert await store.count() == 0
    assert await store.get(record.id) == ended(record)


async def test_wrong_index_entries_of_answers_are_corrected(
    store: ValkeyStore, server: ServerProcess
) -> None:
    await store.claim("alice", "k", digest("body"), LEASE)
    running = only(server, "w")
    (member,) = server.command("ZRANGE", running, 0, -1)
    await store.keep_answer("alice", "k", b"answer", KEEP)
    server.command("ZADD", running, WALL - LATE_MS, member)  # it is not running any more
    (done,) = server.command("ZRANGE", only(server, "o"), 0, -1)
    server.command("ZADD", running, WALL - LATE_MS, done)  # nor this
    server.command("ZADD", running, WALL - LATE_MS, done[:-22] + 22 * b"x")  # never did
    assert await store.expire(WALL + 1, KEEP_ENDED, 10) == 0
    assert b"w" not in kinds(server)
    claim = await store.claim("alice", "k", digest("body"), LEASE)
    assert (claim.state, claim.answer) == (ClaimState.DONE, b"answer")
    server.command("DEL", only(server, "a"))  # its time to live expired
    claim = await store.claim("alice", "k", digest("body"), LEASE)
    assert claim.state is ClaimState.NEW


# --- bounds that hold in a cluster, too --------------------------------------------------------------------------


async def test_answers_are_bounded_per_user(store: ValkeyStore) -> None:
    for key in "pqrs":
        await store.claim("alice", key, digest("body"), LEASE)
        await store.keep_answer("alice", key, 25 * b"x", KEEP)
    states = [(await store.claim("alice", key, b"other", LEASE)).state for key in "sr"]
    assert states == 2 * [ClaimState.CONFLICT]
    with pytest.raises(ValueError, match="too large"):
        await store.keep_answer("alice", "s", 61 * b"x", KEEP)


async def test_answers_are_bounded_in_total(store: ValkeyStore, server: ServerProcess) -> None:
    users = [f"user-{number}" for number in range(200)]
    for user in users:
        await store.claim(user, "k", digest("body"), LEASE)
        await store.keep_answer(user, "k", 10 * b"x", KEEP)
    assert len(server.command("KEYS", "zcp:a:*")) <= 3 * 16
    refused = 0
    for user in users:
        try:
            await store.claim(user, "another", digest("body"), LEASE)
        except ResourceExhausted:
            refused += 1
    assert refused >= len(users) - 3 * 16
    assert len(server.command("KEYS", "zcp:q:*")) <= 3 * 16


async def test_bytes_of_answers_are_bounded_in_total(server: ServerProcess) -> None:
    store = ValkeyStore(url_of(server), answers=AnswerLimits(10_000, 16 * 100, 1_000, 60))
    await store.open(lambda change: None)
    for number in range(150):
        await store.claim(f"user-{number}", "k", digest("body"), LEASE)
        await store.keep_answer(f"user-{number}", "k", 50 * b"x", KEEP)
    answers = server.command("KEYS", "zcp:a:*")
    assert 10 < len(answers) <= 32
    assert sum(int(server.command("GET", key)) for key in server.command("KEYS", "zcp:b:*")) == 50 * len(
        answers
    )
    await store.close()


# --- scripts -----------------------------------------------------------------------------------------------------


def test_scripts_declare_flags_so_that_a_full_server_refuses_them_whole() -> None:
    for script in SCRIPTS.values():
        first = script.source.split(b"\n", 1)[0]
        assert first.startswith(b"#!lua flags=")
    assert {"create", "rotate", "find", "claim", "forget_answers"} <= set(SCRIPTS)


async def test_many_sessions_of_one_user(store: ValkeyStore) -> None:
    limit: Any = FIVE.__class__(300, "evict_oldest", None)
    records = [session(number, wall=WALL + number) for number in range(303)]
    gone: list[EndedRecord] = []
    for record in records:
        result = await store.create(record, limit)
        assert isinstance(result, Created)
        gone += result.ended
    assert [each.id for each in gone] == [record.id for record in records[:3]]
    listed = await store.list("alice")
    assert [each.id for each in listed] == [record.id for record in records[3:]]
    assert all(isinstance(each, SessionRecord) for each in listed)
