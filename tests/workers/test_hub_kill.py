"""Killing the process with the store loses no acknowledged change, and the others go on with its successor.

Run as a program (`python -m tests.workers.test_hub_kill FOLDER`), this file is the process with the store.
"""

from __future__ import annotations

import asyncio
import random
import sys
from contextlib import suppress
from pathlib import Path

from tests.limits import TIMEOUT
from tests.stores.contract import WALL, session
from tests.workers.hub_harness import HubHarness, until
from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, SessionRecord, UserLimit
from zcproto.stores.base import Change, ChangeKind, Created, StoreUnavailable
from zcproto.workers.remote_store import RemoteStore

ALL = Change(ChangeKind.ALL)
KILLS = 5
PROCESSES = 3
TASKS = 4
MANY = UserLimit(1_000_000, "refuse", None)


class Churn:
    """Sessions that processes open and end in the store, and which changes were acknowledged."""

    def __init__(self) -> None:
        self.next = 0
        self.live: dict[bytes, SessionRecord] = {}
        self.ended: dict[bytes, SessionRecord] = {}
        self.acknowledged = 0

    async def run(self, store: RemoteStore) -> None:
        """Open and end sessions until cancelled. A change that failed may have taken effect."""
        while True:
            with suppress(StoreUnavailable):
                number = self.next = self.next + 1
                record = session(number, f"user-{number}")
                assert await store.create(record, MANY) == Created()
                self.live[record.id] = record
                self.acknowledged += 1
                if number % 2:
                    del self.live[record.id]  # unknown until it is acknowledged
                    await store.end([record.id], Code.TOKEN_REVOKED, WALL)
                    self.ended[record.id] = record
                    self.acknowledged += 1
            await asyncio.sleep(0)


async def start(folder: Path) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.workers.test_hub_kill", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def until_answered(store: RemoteStore) -> None:
    """Wait until both links of a store are up: the one of usual calls may come back after the urgent one."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            with suppress(StoreUnavailable):
                await store.count()
                return
            await asyncio.sleep(0.01)


async def test_killed_store_process_loses_nothing_acknowledged(tmp_path: Path) -> None:
    harness, churn, random_ = HubHarness(tmp_path), Churn(), random.Random(20261127)
    process = await start(tmp_path)
    stores = [await harness.opened() for _ in range(PROCESSES)]
    tasks = [asyncio.ensure_future(churn.run(store)) for store in stores for _ in range(TASKS)]
    for kill in range(KILLS):
        enough = churn.acknowledged + random_.randrange(20, 200)
        await until(lambda enough=enough: churn.acknowledged >= enough)  # type: ignore[misc]
        process.kill()
        await process.wait()
        process = await start(tmp_path)
        await until(lambda kills=kill + 1: min(each.count(ALL) for each in harness.changes) == kills)  # type: ignore[misc]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for store in (stores[0], stores[-1]):
        await until_answered(store)
    for id, record in churn.live.items():
        assert await stores[0].get(id) == record
    for id, record in churn.ended.items():
        assert await stores[-1].get(id) == EndedRecord(id, record.token_digest, Code.TOKEN_REVOKED, WALL)
    assert len(churn.live) > KILLS
    assert len(churn.ended) > KILLS
    process.kill()
    await process.wait()
    await harness.close()


async def serve(folder: Path) -> None:
    harness = HubHarness(folder)
    await harness.start()
    await harness.hub.open()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the test has ended, or failed


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
