"""Clients that are in and go on asking, in an open loop: `python -m bench.storms.honest`.

Latency counts from when a request was due. How late this process itself was is measured beside it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.storms.lines import Answer, Commands, run_helper
from bench.told import open_session
from zcproto.errors import CallError, ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.latency import Latencies
from zcproto.load.pacer import Pacer
from zcproto.load.plan import Credential
from zcproto.load.schedule import arrivals, rounds

ANSWER_S: Final = 10.0
"""Seconds after the last request for answers that have not come; what comes later is lost."""

OPEN_AT_ONCE: Final = 32
DATA_BYTES: Final = 64


class Honest:
    """Connections with a session each."""

    def __init__(self, share: Answer) -> None:
        self._place = Place(share["host"], share["host"], share["port"], Path(share["ca_file"]))
        self._credentials = [Credential(*each) for each in share["credentials"]]
        self._rate = share["rate"]
        self._random = random.Random(share["seed"])  # noqa: S311  no secret
        self._data = self._random.randbytes(DATA_BYTES)
        self._callers: list[Caller] = []
        self._pacer = Pacer(asyncio.get_running_loop())
        self._begin()

    def commands(self) -> Commands:
        return {"open": self.open, "load": self.load, "stop": self.stop, "leave": self.leave}

    def _begin(self) -> None:
        self._sent = self._equal = self._in_flight = 0
        self._failed: Counter[str] = Counter()
        self._latency, self._lag = Latencies(), Latencies()

    async def open(self) -> Answer:
        waiting = iter(self._credentials)

        async def some() -> None:
            for credential in waiting:
                caller = await self._place.caller()
                caller.token = (await open_session(caller, credential)).token
                self._callers.append(caller)

        async with asyncio.TaskGroup() as group:
            for _ in range(OPEN_AT_ONCE):
                group.create_task(some())
        return {"opened": len(self._callers)}

    async def load(self, seconds: float) -> Answer:
        """Ask for so long, or until `stop`; what became of all requests."""
        self._begin()
        callers = rounds(self._callers, self._random)
        begin = time.monotonic()
        times = arrivals(self._rate, seconds, self._random)
        await self._pacer.run(times, lambda due: self._ask(next(callers), due))
        took_s = time.monotonic() - begin
        end = time.monotonic() + ANSWER_S
        while self._in_flight and time.monotonic() < end:  # noqa: ASYNC110  it is seen in ten milliseconds
            await asyncio.sleep(0.01)
        return {
            "seconds": took_s,
            "sent": self._sent,
            "equal": self._equal,
            "lost": self._in_flight,
            "failed": self._failed,
            "latency": self._latency.as_json(),
            "lag": self._lag.as_json(),
            "connections": sum(not caller.ended for caller in self._callers),
        }

    async def stop(self) -> Answer:
        self._pacer.stop()
        return {}

    async def leave(self) -> Answer:
        await asyncio.gather(*(caller.leave() for caller in self._callers))
        self._pacer.close()
        self._place.close()
        return {}

    def _ask(self, caller: Caller, due: float) -> None:
        self._sent += 1
        params = {"n": self._sent, "data": self._data}
        self._lag.add(time.monotonic() - due)
        try:
            caller.ask("echo", params, partial(self._done, due, params))
        except ZcprotoError as error:
            self._failed[type(error).__name__] += 1
        else:
            self._in_flight += 1

    def _done(self, due: float, params: dict[str, Any], value: Any, error: ZcprotoError | None) -> None:
        self._in_flight -= 1
        self._latency.add(time.monotonic() - due)
        if error is not None:
            self._failed[error.code.name if isinstance(error, CallError) else type(error).__name__] += 1
        elif value == params:
            self._equal += 1
        else:
            self._failed["another answer"] += 1


def begin(share: dict[str, Any]) -> Commands:
    return Honest(share).commands()


if __name__ == "__main__":
    run_helper(begin)
