"""Every operation of a session under every fault of its store, on two processes with a fake clock.

The checker is that of `python -m bench scenario matrix`, which does the same with real servers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from bench.scenarios.history import (
    ELSEWHERE_S,
    CutOff,
    End,
    History,
    Probe,
    Token,
    Verdict,
    acknowledge,
    begin,
)
from tests.stores.faulty import BUSY, FAILS, FAILS_AFTER, READ_ONLY, WORKS
from tests.stores.service.harness import FaultyStoreView, SessionProcess, StartProcess, raw
from zcproto.errors import CallError, Code, ResourceExhausted, Unavailable
from zcproto.sessions import OpenedSession, Session
from zcproto.sessions.health import MAX_DELAY_S
from zcproto.stores.base import StoreUnavailable

PER_USER = 3
LOST = "fails over to a replica without the last writes"
FAULTS = [FAILS, FAILS_AFTER, READ_ONLY, BUSY, LOST]
PAUSE_S = 0.5
RETRIES = 20


class Cell:
    """Two processes with a user's two sessions, and what a client sees of them. `at` is where the fault is."""

    def __init__(self, one: SessionProcess, other: SessionProcess, fault: str, *, is_here: bool) -> None:
        self.processes = {"here": one, "elsewhere": other}
        self.at = "here" if is_here else "elsewhere"
        self.fault = fault
        self.history = History(PER_USER)
        self.opened: dict[Token, OpenedSession] = {}
        self.began = 0.0

    @property
    def now(self) -> float:
        return self.processes["here"].clock.now()

    async def open(self, name: str) -> None:
        sent = self.now
        opened = await self.processes[name].open()
        token = self.history.opened(sent, self.now, may_be_lost=self.fault == LOST and bool(self.began))
        self.opened[token] = opened
        for process in self.processes.values():
            process.use(opened)
            await process.find(opened.token)

    async def refresh(self, name: str) -> None:
        old = self.history.tokens[0]
        begin(old.replaced, self.now)
        opened = await self.processes[name].refresh(self.opened[old])
        self.opened[self.history.refreshed(old, name, self.now)] = opened

    async def touch(self, name: str) -> None:
        await self.processes[name].sync.write_uses()

    async def revoke_one(self, name: str) -> None:
        opened = self.opened[self.history.tokens[0]]
        await self._end(name, [self.history.sessions[0].end], self.processes[name].revoke(opened))

    async def revoke_family(self, name: str) -> None:
        """Use a spent refresh token as a thief, from another address."""
        end = self.history.sessions[0].end
        if len(self.history.tokens) == 2:
            await self.refresh("here")
        try:
            spent = self.processes[name].refresh(self.opened[self.history.tokens[0]], address="203.0.113.9")
            await self._end(name, [end], spent)
        except CallError as error:
            if error.code is not Code.TOKEN_REVOKED:
                raise
            acknowledge(end, name, self.now)
        else:
            self.history.faults.append("a spent refresh token got a pair")

    async def revoke_user(self, name: str) -> None:
        await self._end(name, self._ends(), self.processes[name].sessions.revoke_user("ada", "asked for"))

    async def revoke_all(self, name: str) -> None:
        await self._end(name, self._ends(), self.processes[name].sessions.revoke_all("asked for"))

    def _ends(self) -> list[End]:
        return [session.end for session in self.history.sessions]

    async def _end(self, name: str, ends: list[End], work: Awaitable[object]) -> None:
        for end in ends:
            begin(end, self.now)
        await work
        for end in ends:
            acknowledge(end, name, self.now)

    async def try_all(self, census: str = "") -> None:
        for token, opened in self.opened.items():
            for name, process in self.processes.items():
                sent = self.now
                try:
                    is_accepted = isinstance(await process.find(opened.token), Session)
                    verdict = Verdict.ACCEPTED if is_accepted else Verdict.REFUSED
                except (Unavailable, ResourceExhausted):
                    verdict = Verdict.UNKNOWN
                self.history.probes.append(Probe(token, name, sent, self.now, verdict, census))

    async def advance(self, seconds: float) -> None:
        """Let time pass for both, and report the changes that each has made to the other."""
        first, *others = self.processes.values()
        for process in self.processes.values():
            for token in self.history.tokens:
                process.store.report_change(raw(self.opened[token]))
        await first.advance(seconds)
        for process in others:
            process.timers.advance(process.clock.now() - process.timers.time())
            await process.settle()
        await self.try_all()

    async def is_done(self, work: Callable[[str], Awaitable[None]], name: str) -> bool:
        try:
            await work(name)
        except StoreUnavailable:
            return False
        except (Unavailable, ResourceExhausted) as error:
            return "limit" in error.details
        except CallError as error:
            self.history.faults.append(f"the operation got {error.code.name} {name}")
        return True

    async def conduct(self, operation: str) -> None:
        """Do the operation while the store is hurt, then retry it on both processes until it is done."""
        for _ in range(2):
            await self.open("here")
        if operation == "revoke_family":
            await self.refresh("here")
        await self.advance(PAUSE_S)
        self.began = self.now
        store, work = self.processes[self.at].store, getattr(self, operation)
        before = store.records
        store.mode = WORKS if self.fault == LOST else self.fault
        is_done = await self.is_done(work, self.at)
        await self.try_all()
        if self.fault == LOST:
            first, other = (process.store for process in self.processes.values())
            first.roll_back(before)
            other.use_data_of(first)
            for each in (other, first) if self.at == "here" else (first, other):
                each.report_all_changed()
        if self.fault != BUSY:  # checks are repeated until it is not busy
            await self.advance(PAUSE_S)
        store.mode = WORKS
        await self.advance(MAX_DELAY_S)
        self.history.cut_offs.append(CutOff(self.at, self.began, self.now))
        names = [name for name in self.processes if name != self.at] + [self.at]
        for number in range(RETRIES):
            if is_done:
                break
            is_done = await self.is_done(work, names[number % 2])
            await self.advance(PAUSE_S)
        else:
            self.history.faults.append("the operation was never done")
        for _ in range(int(ELSEWHERE_S / PAUSE_S) + 1):
            await self.advance(PAUSE_S)
        await self.try_all("at the end")


OPERATIONS = ["open", "refresh", "touch", "revoke_one", "revoke_family", "revoke_user", "revoke_all"]


@pytest.mark.parametrize("is_here", [True, False], ids=["here", "elsewhere"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_no_promise_is_broken(
    start_process: StartProcess, tmp_path: Path, operation: str, fault: str, is_here: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    settings = {"per_user": PER_USER, "refresh_grace_ms": 60_000}
    one = await start_process(shared=True, **settings)
    other = await start_process(FaultyStoreView(one.store), folder=tmp_path / "elsewhere", **settings)
    cell = Cell(one, other, fault, is_here=is_here)
    await cell.conduct(operation)
    assert cell.history.violations() == []
    assert len(cell.history.probes) > 40
