"""The clients of storms: those that stay connected, a crowd that comes back at once, and hostile ones.

Each class runs in a process of its own (`helper`): the server has one processor, all its clients another.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.scenarios.harness import OpenLoop, cause_of, for_each
from bench.scenarios.sessions import open_all, open_session
from bench.stage import HOST
from zcproto.common.clock import system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.plan import Credential
from zcproto.load.record import Latencies

DATA_BYTES: Final = 64
AT_ONCE: Final = 32
FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 2.0
BEGUN_IN_A_TURN: Final = 256
"""Clients of a crowd that begin before answers to others are read, as separate clients would."""


@dataclass(slots=True)
class Served:
    """What became of the requests of honest clients."""

    sent: int
    equal: int
    connections: int
    failed: Counter[str] = field(default_factory=Counter)
    latency: Latencies = field(default_factory=Latencies)
    lag: Latencies = field(default_factory=Latencies)


class Others:
    """Clients that a storm or an attack must not harm: `rate` requests or connections a second, in an open loop."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential], rate: float) -> None:
        self._target = LoadTarget(HOST, HOST, port, ca_file)
        self._users = users
        self._rate = rate


class Honest(Others):
    """Clients that stay connected and send requests."""

    _callers: Sequence[Caller] = ()
    _loop: OpenLoop | None = None

    async def open(self) -> None:
        self._callers = await open_all(self._target.caller, self._users, AT_ONCE)

    async def load(self, seconds: float) -> Served:
        """Send requests for so long, or until `stop`."""
        self._loop = loop = OpenLoop(self._callers, self._rate, bytes(DATA_BYTES))
        await loop.run(seconds)
        connections = sum(not caller.ended for caller in self._callers)
        return Served(loop.sent, loop.equal, connections, loop.failed, loop.latency[""], loop.lag[""])

    async def stop(self) -> None:
        if self._loop is not None:
            self._loop.stop()

    async def disconnect(self) -> None:
        await asyncio.gather(*(caller.disconnect() for caller in self._callers))
        self._target.close()


@dataclass(slots=True)
class CameBack:
    """How a crowd came back. Times in seconds since all began."""

    served_s: list[float] = field(default_factory=list)
    tries: int = 0
    wrong: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """Why tries failed."""
    begun_s: float = 0.0
    """How long it took this side until all had begun to connect."""
    cpu_share: float = 0.0
    """Of a processor, that the crowd used."""


class Crowd:
    """Clients with sessions that lose their server and come back at once.

    Each tries again after a short wait, twice as long each time and randomised, until a request with its token
    is answered. The server alone has to limit them.
    """

    def __init__(self, ca_file: Path, users: Sequence[Credential]) -> None:
        self._ca_file = ca_file
        self._users = users
        self._random = random.Random(1)  # noqa: S311 - no secret
        self._tokens: list[bytes] = []
        self._callers: list[Caller] = []
        self._target: LoadTarget | None = None

    def _new_target(self, port: int) -> LoadTarget:
        if self._target is not None:
            self._target.close()
        self._target = LoadTarget(HOST, HOST, port, self._ca_file)
        return self._target

    async def open(self, port: int) -> None:
        """Connect all, each with its session."""
        self._callers = await open_all(self._new_target(port).caller, self._users, AT_ONCE)
        self._tokens = [caller.token for caller in self._callers]

    async def come_back(self, port: int, within_s: float) -> CameBack:
        await asyncio.gather(*(caller.disconnect() for caller in self._callers))
        self._callers = []
        target, back = self._new_target(port), CameBack()
        begin, used = time.monotonic(), time.process_time()

        async def one(number: int, token: bytes) -> None:
            wait_s = FIRST_WAIT_S
            while True:
                back.tries += 1
                try:
                    caller = await target.caller()
                    caller.token = token
                    answer = await caller.call("echo", {"n": number})
                except ZcprotoError as error:
                    back.causes[cause_of(error)] += 1
                    if time.monotonic() > begin + within_s:
                        return
                    await asyncio.sleep(wait_s * (0.5 + self._random.random()))
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                    continue
                back.wrong += answer != {"n": number}
                back.served_s.append(time.monotonic() - begin)
                self._callers.append(caller)
                return

        async with asyncio.TaskGroup() as group:
            for number, token in enumerate(self._tokens):
                group.create_task(one(number, token))
                if number % BEGUN_IN_A_TURN == 0:
                    await asyncio.sleep(0)
            back.begun_s = time.monotonic() - begin
        back.cpu_share = (time.process_time() - used) / (time.monotonic() - begin)
        return back

    async def check(self) -> int:
        """Send one more request on each connection; return how many were answered."""
        answered = 0

        async def check(pair: tuple[int, Caller]) -> None:
            nonlocal answered
            number, caller = pair
            try:
                answer = await caller.call("echo", {"n": number})
            except ZcprotoError:
                return
            answered += answer == {"n": number}

        await for_each(list(enumerate(self._callers)), check, AT_ONCE)
        return answered

    async def disconnect(self) -> None:
        await asyncio.gather(*(caller.disconnect() for caller in self._callers))
        if self._target is not None:
            self._target.close()


# --- hostile clients ---------------------------------------------------------------------------------------

GARBAGE_BYTES: Final = 256
DEAF_BYTES: Final = 12_000
"""In a request; the server has to hold as much, until it stops reading."""

DEAF_AT_ONCE: Final = 100
"""Requests whose answers were not read: fewer than a connection may have in flight, more than fit into buffers."""

DEAF_PAUSE_S: Final = 0.5
"""Between two of them: this is about answers that are not read, not about a flood."""

DEAF_RECEIVE_BYTES: Final = 4_096
"""The system's receive buffer, which would hold megabytes otherwise."""

DEAF_AHEAD: Final = 65_536
"""Bytes that wait here to be sent, at most."""

DRIP_S: Final = 1.0
DISCONNECT_S: Final = 10.0
"""Within which a server has to disconnect a client that breaks the protocol."""


class Intruder(Caller):
    """A connection that can send any bytes. `out` is set when the server has ended it."""

    __slots__ = ("out",)

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.out = asyncio.Event()

    def lost(self, cause: str) -> None:
        self.out.set()
        super().lost(cause)

    def request(self, params: dict[str, Any]) -> bytes:
        """Return the bytes of a request without sending them."""
        self.conversation.request("echo", params, token=self.token, wall=system_clock.wall())
        return self.conversation.data_to_send()

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


class Hostile:
    """Hostile clients of four kinds. Those that are disconnected come back after a while.

    slow: a request one byte a second; garbage: random bytes instead of frames; replay: each request sent
    twice; deaf: requests with large answers that are never read.
    """

    def __init__(
        self, port: int, ca_file: Path, users: Sequence[Credential], kinds: Sequence[str], comes_back_s: float
    ) -> None:
        self._target = LoadTarget(HOST, HOST, port, ca_file)
        self._users = users
        self._kinds = kinds
        self._comes_back_s = comes_back_s
        self._random = random.Random(1)  # noqa: S311 - no secret
        self._tasks: list[asyncio.Task[None]] = []
        self.counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()

    async def begin(self, over_s: float) -> None:
        """Let all come, one after the other, over so many seconds."""
        acts = {
            "slow": self._drip,
            "garbage": self._send_garbage,
            "replay": self._replay,
            "deaf": self._read_nothing,
        }
        for number, user in enumerate(self._users):
            act = acts[self._kinds[number % len(self._kinds)]]
            self._tasks.append(asyncio.create_task(self._repeat(act, user)))
            await asyncio.sleep(over_s / len(self._users))

    async def end(self) -> tuple[Counter[str], Counter[str]]:
        """Stop all; return what they did, and why connections failed."""
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._target.close()
        errors = [each for each in ended if isinstance(each, Exception)]
        if errors:
            raise errors[0]
        return self.counts, self._causes

    async def _repeat(self, act: Callable[[Intruder], Awaitable[None]], user: Credential) -> None:
        token = b""
        while True:
            intruder = Intruder(self._target.wheel)
            try:
                await self._target.connect(intruder)
                self.counts["connected"] += 1
                intruder.token = token = token or (await open_session(intruder, user)).token
                await act(intruder)
            except ZcprotoError as error:
                self._causes[cause_of(error)] += 1
            finally:
                self.counts["disconnected"] += intruder.out.is_set()
                await intruder.disconnect()
            await asyncio.sleep(self._comes_back_s * (0.5 + self._random.random()))

    async def _drip(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        while not intruder.out.is_set():
            for byte in intruder.request({"n": 1}):
                intruder.send(bytes((byte,)))
                self.counts["bytes_dripped"] += 1
                if await _is_set(intruder.out, DRIP_S):
                    return

    async def _send_garbage(self, intruder: Intruder) -> None:
        intruder.send(self._random.randbytes(GARBAGE_BYTES))
        self.counts["garbage_sent"] += 1
        self.counts["garbage_tolerated"] += not await _is_set(intruder.out, DISCONNECT_S)

    async def _replay(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        again = intruder.request({"n": 2})
        intruder.send(again)
        intruder.send(again)
        self.counts["replays_sent"] += 1
        self.counts["replays_tolerated"] += not await _is_set(intruder.out, DISCONNECT_S)

    async def _read_nothing(self, intruder: Intruder) -> None:
        await intruder.call("echo", {})
        transport = intruder.transport
        assert transport is not None
        transport.pause_reading()
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DEAF_RECEIVE_BYTES)
        params = {"data": self._random.randbytes(DEAF_BYTES)}
        while not intruder.out.is_set():
            waiting, in_flight = transport.get_write_buffer_size(), len(intruder.conversation.in_flight)
            if waiting < DEAF_AHEAD and in_flight < DEAF_AT_ONCE:
                intruder.send(intruder.request(params))
                self.counts["deaf_requests"] += 1
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
