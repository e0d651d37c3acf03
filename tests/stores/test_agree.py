"""The registry in memory and the SQLite store return the same for any sequence of operations."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.sessions.helpers import CountedEntropy
from tests.stores.contract import DAY, HOUR, IDLE, LEASE, MINUTE, WALL, digest, rotation, session
from tests.stores.memory_store import MemoryStore
from zcproto.errors import Code
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.stores.base import Created, SessionStore
from zcproto.stores.sqlite.store import SqliteStore

USERS = ("alice", "bob", "carol")
STEPS = 400


class Both:
    """Two stores that get the same operations."""

    def __init__(self, seed: int) -> None:
        self.stores: list[SessionStore] = []
        self.chance = random.Random(seed)
        self.wall = WALL
        self.asked = 0
        self.made: list[SessionRecord] = []
        self.dead: list[bytes] = []

    async def ask(self, name: str, *arguments: object) -> object:
        results = [await getattr(store, name)(*arguments) for store in self.stores]
        assert results[0] == results[1], (name, arguments)
        return results[0]

    async def step(self) -> None:
        chance = self.chance
        self.wall += chance.choice([0, 1, MINUTE, 20 * MINUTE])
        user = chance.choice(USERS)
        any_of = chance.choice(self.made) if self.made else session(-1)
        match chance.choice(
            ["create"] * 4 + ["rotate"] * 4 + ["end", "end_user", "touch", "again", "claim", "all"]
        ):
            case "create":
                record = session(
                    self.asked, user, self.wall, expires_at=self.wall + chance.choice([MINUTE, HOUR, DAY])
                )
                record = record._replace(refresh_expires_at=WALL + 300 * DAY)
                limit = UserLimit(chance.randrange(1, 5), chance.choice(["refuse", "evict_oldest"]), IDLE)
                self.asked += 1
                if isinstance(await self.ask("create", record, limit), Created):
                    self.made.append(record)
            case "again":
                await self.ask("create", any_of, UserLimit(1, "evict_oldest", IDLE))
            case "rotate":
                spent = any_of if chance.random() < 0.8 else self.made[0] if self.made else any_of
                wanted = rotation(spent, chance.randrange(1_000_000), self.wall)
                result = await self.ask("rotate", wanted)
                if isinstance(result, SessionRecord):
                    self.dead.append(spent.token_digest)
                    self.made = [result if each.id == spent.id else each for each in self.made]
                    assert await self.ask("rotate", wanted) == result
            case "end":
                ids = [each.id for each in chance.choices(self.made, k=3)] if self.made else []
                code = chance.choice([Code.TOKEN_REVOKED, Code.SESSION_REPLACED])
                await self.ask("end", ids, code, self.wall, chance.choice([None, user]))
            case "end_user":
                await self.ask("end_user", user, Code.TOKEN_REVOKED, self.wall)
            case "touch":
                one = await self.ask("get", any_of.id)
                # A token that was idle for too long is not used again.
                if isinstance(one, SessionRecord) and self.wall < min(
                    one.expires_at, one.last_used_at + IDLE
                ):
                    uses = [(one.id, self.wall), (one.id, self.wall - MINUTE), (bytes(16), 1)]
                    await self.ask("touch", uses)
            case "claim":
                key = chance.choice("pqr")
                await self.ask("claim", user, key, digest(chance.choice("xy")), LEASE)
                if chance.random() < 0.5:
                    await self.ask("keep_answer", user, key, chance.randbytes(20), LEASE)
                elif chance.random() < 0.5:
                    await self.ask("release_claim", user, key)
            case "all":
                if chance.random() < 0.1:
                    await self.ask("end_all", Code.TOKEN_REVOKED, self.wall)

    async def look(self) -> None:
        await self.ask("count")
        await self.ask("list")
        for user in USERS:
            await self.ask("list", user)
        for record in self.made:
            await self.ask("get", record.id)
            await self.ask("find", record.token_digest)
        for token in self.dead:
            await self.ask("find", token)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
async def test_memory_and_sqlite_return_the_same(tmp_path: Path, seed: int) -> None:
    both = Both(seed)
    file = SqliteStore(tmp_path / "home" / "sessions.db", timeout=TIMEOUT, time=lambda: both.wall)
    await file.open(lambda change: None)
    settings = SessionSettings(idle_timeout_ms=IDLE, dead_keep_ms=1_000 * DAY, max_sessions=1_000)
    memory = MemoryStore(SessionRegistry(settings, CountedEntropy()), time=lambda: both.wall)
    both.stores += [memory, file]
    for number in range(STEPS):
        await both.step()
        if number % 50 == 0:
            await both.look()
    await both.look()
    assert both.dead
    await file.close()


async def test_grouped_operations_have_the_same_effect_as_single_ones(tmp_path: Path) -> None:
    alone, grouped = (
        SqliteStore(tmp_path / name / "sessions.db", timeout=TIMEOUT) for name in ("one", "many")
    )
    for store in (alone, grouped):
        await store.open(lambda change: None)
    chance = random.Random(7)
    records = [session(number, USERS[number % 3], WALL + number) for number in range(60)]
    for number in range(0, 60, 20):
        asked: list[tuple[str, tuple[object, ...]]] = []
        for earlier in records[max(0, number - 20) : number]:  # first, because an end overtakes what waits
            asked.append(("end", ([earlier.id], Code.TOKEN_REVOKED, WALL + HOUR)))
        for _ in range(100):
            record = records[number + chance.randrange(20)]
            limit = UserLimit(4, "evict_oldest", IDLE)
            asked.append(
                chance.choice(
                    [
                        ("create", (record, limit)),
                        ("create", (record, limit)),
                        ("rotate", (rotation(record, chance.randrange(3), WALL + HOUR),)),
                        ("list", (record.user,)),
                        ("count", ()),
                        ("find", (record.token_digest,)),
                        ("touch", ([(record.id, WALL + chance.randrange(HOUR))],)),
                    ]
                )
            )
        one_by_one = [await getattr(alone, name)(*arguments) for name, arguments in asked]
        at_once = await asyncio.gather(*(getattr(grouped, name)(*arguments) for name, arguments in asked))
        assert at_once == one_by_one
    assert await grouped.list() == await alone.list() != []
    for store in (alone, grouped):
        await store.close()
