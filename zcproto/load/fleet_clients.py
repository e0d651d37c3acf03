"""The clients of a fleet (fleet.py) in a process of their own: `python -m zcproto.load.fleet_clients`.

It reads a `ClientsPlan` as JSON from standard input, and writes JSON lines: each TICK_S what the readers have
received, at last what became of each run. Each reader is a client of a user of its own that reads one durable run
after the other. In each run its connection is cut, and in some it is replaced by another client, at random moments.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from zcproto.client.client import Client
from zcproto.client.dial import Dialer
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol
from zcproto.common.clock import MonotonicClock, system_clock
from zcproto.common.process import new_event_loop
from zcproto.errors import CallError, ZcprotoError

TICK_S: Final = 0.25
STUCK_S: Final = 90.0
"""An item that comes no sooner is lost: longer than a process needs to find out that another one is lost."""

OPENING_S: Final = 60.0
KEEPERS: Final = 5
"""One reader of so many keeps its session and its positions in a file."""


@dataclass(frozen=True, slots=True)
class ClientsPlan:
    """What the clients do. `seconds`: no run is begun later; `devices`: clients of each user that answer."""

    addresses: list[str]
    ca_file: str
    users: list[tuple[str, str]]
    folder: str
    runs: int
    items: int = 50
    pause: float = 0.05
    seconds: float = 1e9
    asks: int = 0
    expires: int = 0
    devices: int = 1
    restarts: float = 0.3
    """The share of runs in which the client is replaced by another one."""
    prefix: str = "run"
    pictured: int = 0
    """Users of whose runs the moments of all items are written."""
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """What a reader saw of one run."""

    run: str
    reader: str
    began: float
    ended: float = 0.0
    items: int = 0
    end: str = ""
    """`result`, or the name of the error's code."""
    reason: str = ""
    end_items: int | None = None
    """The number of items in the details of the error."""
    gap: float = 0.0
    """The longest time without an item, in seconds."""
    gap_at: float = 0.0
    faults: list[str] = field(default_factory=list)
    cuts: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When items came, if the reader is pictured."""


class Connection:
    """A client whose connection can be cut."""

    def __init__(self, addresses: list[str], options: ConnectOptions) -> None:
        self._dialer = Dialer(options, MonotonicClock(system_clock), system_clock)
        self._made: list[ClientProtocol] = []  # a second one, if the server of the first is slow
        self._has_vanished = False
        self.client = Client(addresses, options, dial=self._dial)

    async def _dial(self, *attempt: Any) -> ClientProtocol:
        made = await self._dialer(*attempt)
        self._made = [*self._living(), made]
        if self._has_vanished:  # else the client would log out on it
            made.abort()
        return made

    def _living(self) -> list[ClientProtocol]:
        return [each for each in self._made if each.error is None]

    def cut(self) -> bool:
        """Abort the connection. Return whether there was one."""
        living = self._living()
        for each in living:
            each.abort()
        return bool(living)

    async def vanish(self) -> None:
        """End as a process that is killed: the session stays open."""
        self._has_vanished = True
        living = self._living()
        self.cut()
        for each in living:
            await each.closed
        await self.client.close()


class Readers:
    """All readers of this process."""

    def __init__(self, plan: ClientsPlan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)  # noqa: S311 - moments, no secret
        self.began = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.items = 0
        self.longest = 0.0
        """The longest gap of an item since the last tick."""
        self.offers = 0
        self.waiting = len(plan.users)
        """Readers that have no connection yet; the first run begins when all have one."""
        self._names = self._runs()
        self._all_wait = asyncio.Event()

    def _runs(self) -> Iterator[str]:
        for number in range(self._plan.runs):
            if time.monotonic() > self.began + self._plan.seconds:
                return
            yield f"{self._plan.prefix}-{number}"

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            readers = [
                group.create_task(self._reader(number, *user)) for number, user in enumerate(self._plan.users)
            ]
            others = [
                group.create_task(self._other_device(*user))
                for user in self._plan.users
                for _ in range(self._plan.devices - 1)
            ]
            ticks = group.create_task(self._tick())
            await asyncio.wait(readers)
            for task in (*others, ticks):
                task.cancel()
        self._write()

    # --- clients ----------------------------------------------------------------------------------------

    def _connection(self, user: str, key: str, file: Path | None = None) -> Connection:
        plan = self._plan
        options = ConnectOptions(
            user=user,
            key=key,
            ca_file=plan.ca_file,
            timeout=OPENING_S,
            start_timeout=OPENING_S,
            session_file=file,
        )
        connection = Connection(plan.addresses, options)
        connection.client.handler("approve")(self._approve)
        return connection

    async def _opened(self, user: str, key: str, file: Path | None = None) -> Connection:
        """Return a client that has a session: the first attempts may meet a process that is killed."""
        end = time.monotonic() + OPENING_S
        while True:
            connection = self._connection(user, key, file)
            try:
                await connection.client.open()
            except ZcprotoError:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.1 + self._random.random())
            else:
                return connection

    async def _approve(self, run: str, position: int, silent: bool) -> str:
        self.offers += 1
        if silent:
            await asyncio.sleep(STUCK_S)
        return f"{run}/{position}"

    async def _other_device(self, user: str, key: str) -> None:
        while True:
            connection = await self._opened(user, key)
            await asyncio.sleep(self._random.expovariate(0.1))
            await connection.vanish()

    # --- runs -------------------------------------------------------------------------------------------

    async def _reader(self, number: int, user: str, key: str) -> None:
        await asyncio.sleep(number * 0.002)
        file = Path(self._plan.folder) / f"{user}.session" if number % KEEPERS == 0 else None
        reopen = partial(self._opened, user, key, file)
        connection = await reopen()
        self.waiting -= 1
        if not self.waiting:
            self.began = time.monotonic()
            self._all_wait.set()
        await self._all_wait.wait()
        for name in self._names:
            outcome = Outcome(name, user, time.monotonic())
            self.outcomes.append(outcome)
            is_pictured = number < self._plan.pictured
            connection = await self._read(
                outcome, connection, reopen, knows_position=file is not None, is_pictured=is_pictured
            )
            outcome.ended = time.monotonic()
        await connection.client.close()

    async def _read(
        self,
        outcome: Outcome,
        connection: Connection,
        reopen: Callable[[], Awaitable[Connection]],
        *,
        knows_position: bool,
        is_pictured: bool,
    ) -> Connection:
        """Read one run to its end. Return the client that is there at the end."""
        plan, chance = self._plan, self._random
        length = plan.items * plan.pause
        special = chance.sample(range(1, plan.items), plan.asks + plan.expires)
        asks, expires = special[: plan.asks], special[plan.asks :]
        leave_at = chance.randrange(plan.items) if chance.random() < plan.restarts else None
        current = connection

        def cut() -> None:
            if current.cut():
                outcome.cuts.append(time.monotonic())

        cutting = asyncio.get_running_loop().call_later(chance.random() * length, cut)
        stream = connection.client.stream(
            "work",
            durable=True,
            item_timeout=STUCK_S,
            run=outcome.run,
            total=plan.items,
            pause=plan.pause,
            asks=asks,
            expires=expires,
        )
        last = outcome.began
        try:
            while True:
                async with stream:
                    async for item in stream:
                        now = time.monotonic()
                        self.longest = max(self.longest, now - last)
                        if now - last > outcome.gap:
                            outcome.gap, outcome.gap_at = now - last, now
                        last = now
                        if is_pictured:
                            outcome.times.append(now)
                        self._check(outcome, item, asks, expires)
                        if outcome.items == leave_at:
                            break
                    else:
                        outcome.end = "result"
                        return current
                leave_at = None
                assert stream.id is not None, "it is durable"
                await current.vanish()
                outcome.restarts.append(time.monotonic())
                current = await reopen()
                after = None if knows_position else outcome.items
                stream = current.client.resume(stream.id, method="work", after=after, item_timeout=STUCK_S)
        except CallError as error:
            outcome.end, outcome.reason = (
                error.code.name,
                str(error.details.get("reason", "") or error.message),
            )
            outcome.end_items = error.details.get("items")
        except ZcprotoError as error:
            outcome.end = f"{type(error).__name__}: {error}"
        finally:
            cutting.cancel()
        return current

    def _check(self, outcome: Outcome, item: Any, asks: list[int], expires: list[int]) -> None:
        position = outcome.items
        expected: Any = position
        if position in asks:
            expected = [position, f"{outcome.run}/{position}"]
        elif position in expires:
            expected = [position, "DEADLINE_EXCEEDED"]
        if item != expected:
            outcome.faults.append(f"item {position} is {item!r}"[:100])
        outcome.items += 1
        self.items += 1

    # --- output -----------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._write_line({"at": time.monotonic(), **self._counts()})
            self.longest = 0.0

    def _counts(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "longest": self.longest,
            "done": sum(bool(each.end) for each in self.outcomes),
            "begun": len(self.outcomes),
            "waiting": self.waiting,
            "began": self.began,
        }

    def _write(self) -> None:
        self._write_line({"at": time.monotonic(), **self._counts(), "offers": self.offers,
                          "outcomes": [asdict(each) for each in self.outcomes]})  # fmt: skip

    def _write_line(self, value: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def main() -> None:
    plan = ClientsPlan(**json.loads(sys.stdin.readline()))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_read_all(plan))


async def _read_all(plan: ClientsPlan) -> None:
    await Readers(plan).run()


if __name__ == "__main__":
    main()
