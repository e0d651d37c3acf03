"""Clients that mean harm, in four kinds: `python -m bench.storms.hostile`.

slow      a request a byte at a time, one a second
garbage   random bytes where frames should be
replay    a request that was answered, sent again, bit by bit
deaf      requests with large answers, none of which is ever read

Whoever is thrown out comes back after a while, as an attacker does, with a new connection.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any, Final

from bench.storms.crowd import cause
from bench.storms.lines import Answer, Commands, run_helper
from bench.told import open_session
from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, Place
from zcproto.load.plan import Credential

NICENESS: Final = 3
GARBAGE_BYTES: Final = 256
DEAF_BYTES: Final = 12_000
"""In a request; the server has to keep as much, until it stops reading."""

DEAF_AT_ONCE: Final = 100
"""Requests of which no answer was read: fewer than a connection may have in flight, more than fit into buffers."""

DEAF_PAUSE_S: Final = 0.5
"""Between two of them: what is measured is that nobody reads, not a flood."""

DEAF_RECEIVE_BYTES: Final = 4_096
"""Of the system's receive buffer, which would take megabytes for who does not read them."""

DEAF_AHEAD: Final = 65_536
"""Bytes that wait here to be sent, at most."""

DRIP_S: Final = 1.0
REFUSED_S: Final = 10.0
"""Within which a server has to throw out whoever sends what is none of the protocol."""


class Intruder(Caller):
    """A connection that writes what it likes. `out` is set when the server has ended it."""

    __slots__ = ("out",)

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.out = asyncio.Event()

    def lost(self, cause: str) -> None:
        self.out.set()
        super().lost(cause)

    def request(self, params: dict[str, Any]) -> bytes:
        """The bytes of a request, which are not sent."""
        self.conversation.request("echo", params, token=self.token, wall=system_clock.wall())
        return self.conversation.data_to_send()

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


class Hostile:
    """All of them, each doing what its kind does, until `end`."""

    def __init__(self, share: Answer) -> None:
        self._place = Place(share["host"], share["host"], share["port"], Path(share["ca_file"]))
        self._kinds = share["kinds"]
        self._credentials = [Credential(*each) for each in share["credentials"]]
        self._comes_back_s = share["comes_back_s"]
        self._random = random.Random(share["seed"])  # noqa: S311  no secret
        self._tasks: list[asyncio.Task[None]] = []
        self._counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()

    def commands(self) -> Commands:
        return {"begin": self.begin, "end": self.end}

    async def begin(self, over_s: float) -> Answer:
        """Let all come, one after the other, over so many seconds."""
        acts = {"slow": self._drip, "garbage": self._rave, "replay": self._replay, "deaf": self._be_deaf}
        loop = asyncio.get_running_loop()
        for number, credential in enumerate(self._credentials):
            act = acts[self._kinds[number % len(self._kinds)]]
            self._tasks.append(loop.create_task(self._go_on(act, credential)))
            await asyncio.sleep(over_s / len(self._credentials))
        return {}

    async def end(self) -> Answer:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._place.close()
        faults = [each for each in ended if isinstance(each, Exception)]
        if faults:
            raise faults[0]
        return {**self._counts, "causes": self._causes}

    async def _go_on(self, act: Any, credential: Credential) -> None:
        token = b""
        while True:
            intruder = Intruder(self._place.wheel)
            try:
                await self._place.join(intruder)
                self._counts["connected"] += 1
                if not token:
                    token = (await open_session(intruder, credential)).token
                intruder.token = token
                await act(intruder)
            except ZcprotoError as error:
                self._causes[cause(error)] += 1
            finally:
                self._counts["thrown_out"] += intruder.out.is_set()
                await intruder.leave()
            await asyncio.sleep(self._comes_back_s * (0.5 + self._random.random()))

    async def _drip(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        while not intruder.out.is_set():
            for byte in intruder.request({"n": 1}):
                intruder.send(bytes((byte,)))
                self._counts["bytes_dripped"] += 1
                if await _is_set(intruder.out, DRIP_S):
                    return

    async def _rave(self, intruder: Intruder) -> None:
        intruder.send(self._random.randbytes(GARBAGE_BYTES))
        self._counts["garbage_sent"] += 1
        self._counts["garbage_suffered"] += not await _is_set(intruder.out, REFUSED_S)

    async def _replay(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        again = intruder.request({"n": 2})
        intruder.send(again)
        intruder.send(again)
        self._counts["replays_sent"] += 1
        self._counts["replays_suffered"] += not await _is_set(intruder.out, REFUSED_S)

    async def _be_deaf(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        transport = intruder.transport
        assert transport is not None
        transport.pause_reading()
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEAF_RECEIVE_BYTES)
        params = {"data": self._random.randbytes(DEAF_BYTES)}
        while not intruder.out.is_set():
            if (
                transport.get_write_buffer_size() < DEAF_AHEAD
                and intruder.conversation.in_flight < DEAF_AT_ONCE
            ):
                intruder.send(intruder.request(params))
                self._counts["deaf_requests"] += 1
                await asyncio.sleep(DEAF_PAUSE_S)
            elif await _is_set(intruder.out, 0.5) or transport.is_closing():
                return


async def _is_set(event: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def begin(share: dict[str, Any]) -> Commands:
    return Hostile(share).commands()


if __name__ == "__main__":
    run_helper(begin, NICENESS)
