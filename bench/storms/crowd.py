"""Clients that have sessions, lose their server, and all come back at once: `python -m bench.storms.crowd`.

Each tries again after a short wait, twice as long each time and never the same for two, until a request with its
token is answered. Nothing else limits them: it is the server that has to.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from bench.storms.lines import Answer, Commands, run_helper
from bench.told import open_session
from zcproto.errors import CallError, TlsError, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.plan import Credential

NICENESS: Final = 3
"""Those that are measured on the same processor come first: it is the server that is asked to be fair, not this."""

FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 2.0
OPEN_AT_ONCE: Final = 32
BEGUN_IN_A_TURN: Final = 256
"""Clients that begin before the answers to others are looked at, as they would be by clients of their own."""


def cause(error: ZcprotoError) -> str:
    """A short name for why a try failed."""
    if isinstance(error, TlsError):
        return f"TLS: {error.failure}"
    return error.code.name if isinstance(error, CallError) else str(error)[:80]


class Crowd:
    """All of them. Times in monotonic seconds, which all processes of a machine share."""

    def __init__(self, share: Answer) -> None:
        self._ca_file = Path(share["ca_file"])
        self._host = share["host"]
        self._credentials = [Credential(*each) for each in share["credentials"]]
        self._random = random.Random(share["seed"])  # noqa: S311  no secret
        self._tokens: list[bytes] = []
        self._callers: list[Caller] = []
        self._place: Place | None = None

    def commands(self) -> Commands:
        return {"open": self.open, "come_back": self.come_back, "check": self.check, "leave": self.leave}

    def _new_place(self, port: int) -> Place:
        if self._place is not None:
            self._place.close()
        self._place = Place(self._host, self._host, port, self._ca_file)
        return self._place

    async def open(self, port: int) -> Answer:
        """Connect all, a few at once, each with its session."""
        place = self._new_place(port)
        waiting = iter(self._credentials)

        async def some() -> None:
            for credential in waiting:
                caller = await place.caller()
                caller.token = (await open_session(caller, credential)).token
                self._callers.append(caller)
                self._tokens.append(caller.token)

        async with asyncio.TaskGroup() as group:
            for _ in range(OPEN_AT_ONCE):
                group.create_task(some())
        return {"opened": len(self._tokens)}

    async def come_back(self, port: int, within_s: float) -> Answer:
        """All at once: when each was served, how often it had to try, and why tries failed."""
        await asyncio.gather(*(caller.leave() for caller in self._callers))
        self._callers = []
        place = self._new_place(port)
        causes: Counter[str] = Counter()
        served: list[float] = []
        tries = wrong = 0
        begin, used = time.monotonic(), time.process_time()

        async def one(number: int, token: bytes) -> None:
            nonlocal tries, wrong
            wait_s = FIRST_WAIT_S
            while time.monotonic() < begin + within_s:
                tries += 1
                try:
                    caller = await place.caller()
                    caller.token = token
                    answer = await caller.call("echo", {"n": number})
                except ZcprotoError as error:
                    causes[cause(error)] += 1
                    await asyncio.sleep(wait_s * (0.5 + self._random.random()))
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    continue
                wrong += answer != {"n": number}
                served.append(time.monotonic() - begin)
                self._callers.append(caller)
                return

        async with asyncio.TaskGroup() as group:
            for number, token in enumerate(self._tokens):
                group.create_task(one(number, token))
                if number % BEGUN_IN_A_TURN == 0:
                    await asyncio.sleep(0)
            begun_s = time.monotonic() - begin
        cpu_share = (time.process_time() - used) / (time.monotonic() - begin)
        return {
            "begun_s": begun_s,
            "cpu_share": cpu_share,
            "served_s": served,
            "tries": tries,
            "causes": causes,
            "wrong": wrong,
        }

    async def check(self) -> Answer:
        """One more request on each connection: how many were answered."""
        answered = 0
        waiting = iter(list(enumerate(self._callers)))

        async def some() -> None:
            nonlocal answered
            for number, caller in waiting:
                try:
                    answer = await caller.call("echo", {"n": number})
                except ZcprotoError:  # it is missing in the count
                    continue
                answered += answer == {"n": number}

        async with asyncio.TaskGroup() as group:
            for _ in range(OPEN_AT_ONCE):
                group.create_task(some())
        return {"answered": answered}

    async def leave(self) -> Answer:
        await asyncio.gather(*(caller.leave() for caller in self._callers))
        if self._place is not None:
            self._place.close()
        return {}


def begin(share: dict[str, Any]) -> Commands:
    return Crowd(share).commands()


if __name__ == "__main__":
    run_helper(begin, NICENESS)
