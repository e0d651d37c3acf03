"""Killing the process at any moment loses no acknowledged change and revives no ended session.

Run as a program (`python -m tests.stores.sqlite.test_kill FILE SEED SECONDS`), this file kills its own children
while they open, refresh and end sessions. A test run has threads, so it should not do that itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.killed_child import lines_of_killed_child
from tests.limits import TIMEOUT
from tests.stores.contract import DAY, FIVE, WALL, digest, session
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord
from zcproto.stores.base import Created
from zcproto.stores.sqlite.store import SqliteStore

KILLS = 100
TASKS = 8
"""Users, each with a task in a child."""


def test_process_killed_at_random_moments_loses_no_acknowledged_change(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.stores.sqlite.test_kill"]
    command += [str(tmp_path / "home" / "sessions.db"), "20260601"]
    done = subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=TIMEOUT, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    assert all(report.values())


# --- what is expected ------------------------------------------------------------------------------------------


def record_of(number: int, generation: int) -> SessionRecord:
    """Return a session of the user `number % TASKS` after so many refreshes."""
    return session(
        number,
        f"user-{number % TASKS}",
        token_digest=digest(f"token {number} {generation}"),
        refresh_digest=digest(f"refresh {number} {generation}"),
    )


@dataclass
class Expected:
    """The expected content of the file, from what a child has reported."""

    live: dict[int, int] = field(default_factory=dict)
    """The generation of each live session."""
    asked: dict[int, str] = field(default_factory=dict)
    """The operation on a session that has begun and not returned."""
    ended: set[int] = field(default_factory=set)
    spent: set[tuple[int, int]] = field(default_factory=set)
    """Generations whose token was revoked since the last check."""
    ever_ended: set[int] = field(default_factory=set)
    next: list[int] = field(default_factory=lambda: list(range(TASKS)))
    report: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("kills", "created", "refreshed", "ended", "took effect", "did not"), 0
        )
    )

    def mates(self, number: int) -> list[int]:
        return [each for each in self.live if each % TASKS == number % TASKS]

    def hear(self, line: str) -> None:
        """Record that an operation has begun (`create 7`) or returned (`created 7`)."""
        what, _, text = line.partition(" ")
        number = int(text)
        match what:
            case "create":
                self.next[number % TASKS] = number + TASKS
                self.asked[number] = what
            case "refresh" | "end":
                self.asked[number] = what
            case "end-all":
                self.asked |= dict.fromkeys(self.mates(number), "end")
            case "created":
                self.done(number, "create")
            case "refreshed":
                self.done(number, "refresh")
            case "ended":
                self.done(number, "end")
            case "ended-all":
                for each in self.mates(number):
                    self.done(each, "end")

    def done(self, number: int, what: str) -> None:
        self.asked.pop(number, None)
        match what:
            case "create":
                self.live[number] = 0
                self.report["created"] += 1
            case "refresh":
                self.spent.add((number, self.live[number]))
                self.live[number] += 1
                self.report["refreshed"] += 1
            case "end":
                del self.live[number]
                self.ended.add(number)
                self.ever_ended.add(number)
                self.report["ended"] += 1

    def settle(self, found: dict[bytes, SessionRecord | EndedRecord]) -> None:
        """Determine the outcome of the operations that have not returned."""
        for number, what in list(self.asked.items()):
            one = found.get(record_of(number, 0).id)
            generation = self.live.get(number, 0)
            match what:
                case "create":
                    happened = one is not None
                case "refresh":
                    assert isinstance(one, SessionRecord)
                    happened = one.token_digest == record_of(number, generation + 1).token_digest
                case _:
                    happened = isinstance(one, EndedRecord)
            self.report["took effect" if happened else "did not"] += 1
            if happened:
                self.done(number, what)
        self.asked.clear()

    def check(self, records: list[SessionRecord | EndedRecord]) -> None:
        by_id = {record.id: record for record in records if record.id}
        by_token = {record.token_digest: record for record in records}
        self.settle(by_id)
        alive = {record.token_digest for record in records if isinstance(record, SessionRecord)}
        assert alive == {record_of(*each).token_digest for each in self.live.items()}
        for number in self.ended:
            assert isinstance(by_id[record_of(number, 0).id], EndedRecord)
        for number, generation in self.spent:
            gone = by_token[record_of(number, generation).token_digest]
            assert isinstance(gone, EndedRecord)
            assert gone.code is Code.TOKEN_REVOKED
        for number in self.ever_ended:
            assert not isinstance(by_id.get(record_of(number, 0).id), SessionRecord)
        self.ended.clear()
        self.spent.clear()


# --- a child, and its end --------------------------------------------------------------------------------------


async def churn(path: Path, expected: Expected, seed: int, output: int) -> None:
    """Open, refresh and end sessions until killed, reporting each operation before and after."""
    store = SqliteStore(path, timeout=TIMEOUT)
    await store.open(lambda change: None)

    def say(what: str, number: int) -> None:
        line = f"{what} {number}"
        os.write(output, f"{line}\n".encode())
        expected.hear(line)

    async def work(task: int) -> None:
        chance = random.Random(seed * TASKS + task)
        while True:
            live = expected.mates(task)
            choice = chance.random()
            if not live or (choice < 0.45 and len(live) < 5):
                number = expected.next[task]
                say("create", number)
                assert await store.create(record_of(number, 0), FIVE) == Created()
                say("created", number)
            elif choice < 0.75:
                number = chance.choice(live)
                old, new = (record_of(number, expected.live[number] + more) for more in (0, 1))
                rotation = Rotation(
                    id=old.id,
                    spent_digest=old.refresh_digest,
                    token_digest=new.token_digest,
                    refresh_digest=new.refresh_digest,
                    expires_at=WALL + DAY,
                    client="",
                    address="",
                    wall=WALL,
                )
                say("refresh", number)
                assert isinstance(await store.rotate(rotation), SessionRecord)
                say("refreshed", number)
            elif choice < 0.95:
                number = chance.choice(live)
                say("end", number)
                assert len(await store.end([record_of(number, 0).id], Code.TOKEN_REVOKED, WALL)) == 1
                say("ended", number)
            else:
                say("end-all", task)
                assert len(await store.end_user(f"user-{task}", Code.TOKEN_REVOKED, WALL)) == len(live)
                say("ended-all", task)

    await asyncio.gather(*(work(task) for task in range(TASKS)))


def kill_a_child(path: Path, expected: Expected, seed: int, after_s: float) -> None:
    """Run a child, kill it in the middle, and record what it has reported."""
    for line in lines_of_killed_child(
        lambda output: asyncio.run(churn(path, expected, seed, output)), after_s
    ):
        expected.hear(line)


async def look(path: Path, expected: Expected) -> None:
    """Check what the next start finds, and remove tombstones to keep the file small."""
    store = SqliteStore(path, timeout=TIMEOUT, on_notice=lambda name, **values: sys.exit(f"{name}: {values}"))
    await store.open(lambda change: None)
    expected.check([record async for batch in store.load() for record in batch])
    await store.expire(WALL, 0, 100_000)
    await store.close()


def main(path: Path, seed: int) -> dict[str, int]:
    chance, patience = random.Random(seed), 1.0
    expected = Expected()
    while expected.report["kills"] < KILLS:
        after_s = patience * chance.choice([0.003, 0.02, 0.06]) * chance.random()
        kill_a_child(path, expected, chance.getrandbits(32), after_s)
        asyncio.run(look(path, expected))
        expected.report["kills"] += 1
        if not all(expected.report.values()):
            patience *= 1.1  # the machine is busy with other things
    return expected.report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
