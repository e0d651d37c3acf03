"""The clients of a server that is replaced again and again: some that stay, and others that come and go.

Those that stay use the client library, which sends a request again only where section 11.1 of the specification
allows it. A request that it reports as failed is lost. Those that come and go have no library in between, so that
each connection that was refused is counted with its cause; they send again what the same table allows.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.scenarios.harness import CALL_S, FOREVER_S, cause_of
from bench.scenarios.sessions import open_session
from bench.stage import HOST
from zcproto.client.client import Client
from zcproto.client.options import ConnectOptions
from zcproto.client.retry import Backoff, Step, Then, retry_after_ms, what_next
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import CallError, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.pacer import Pacer, poisson_times, shuffled_rounds
from zcproto.load.plan import Credential
from zcproto.load.record import Latencies

KEYED_EVERY: Final = 10
"""One of so many requests has an idempotency key, and can be repeated after any loss."""

MAX_OPEN: Final = 20_000
"""Requests without an answer. More are not sent, and missing in the rate: the server is too slow for it."""

VISIT_S: Final = CALL_S
"""Seconds for a client that comes and goes, with all that it repeats."""


@dataclass(slots=True)
class Seen:
    """What became of requests and connections."""

    sent: int = 0
    answered: int = 0
    skipped: int = 0
    """Requests that were due while too many had no answer."""
    visits: int = 0
    """Connections that were made, used and closed."""
    seconds: float = 0.0
    longest_gap_s: float = 0.0
    """Between two answers, of whatever connections."""
    lost: Counter[str] = field(default_factory=Counter)
    """Requests whose outcome the client does not know and may not repeat, by cause."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections that ended before WELCOME, by cause."""
    retried: Counter[str] = field(default_factory=Counter)
    """Requests that were sent again, by the reason for it."""
    waits: Latencies = field(default_factory=Latencies)
    """From when a request was due to its answer."""
    visit_waits: Latencies = field(default_factory=Latencies)
    """From when a connection was due to when it was closed."""


class Staying(Client):
    """A client that counts what it sends again."""

    def __init__(self, address: str, options: ConnectOptions, retried: Counter[str]) -> None:
        super().__init__(address, options)
        self._retried = retried

    async def _wait(self, step: Step, error: ZcprotoError) -> None:
        if step.then is Then.LATER:
            self._retried[cause_of(error)] += 1
        await super()._wait(step, error)


class Visitor(Caller):
    """A connection that notes GOAWAY."""

    __slots__ = ("goaway_ms",)

    def __init__(self, wheel: DeadlineWheel) -> None:
        super().__init__(wheel)
        self.goaway_ms: int | None = None

    def going_away(self, retry_after_ms: int) -> None:
        self.goaway_ms = retry_after_ms

    def repeats_after_ms(self, error: ZcprotoError) -> int | None:
        """Return when to send a request again that got this error; None if that is not allowed."""
        if isinstance(error, CallError):
            return retry_after_ms(error.details) if what_next(error) is Then.LATER else None
        return self.goaway_ms


class RollingClients:
    """`rate` requests a second of clients that stay, and `visit_rate` connections a second of `visitors`."""

    def __init__(
        self,
        port: int,
        ca_file: Path,
        users: Sequence[Credential],
        visitors: Sequence[Credential],
        rate: float,
        visit_rate: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._random = random.Random(1)  # noqa: S311 - an order, no secret
        self._seen = Seen()
        self._target = LoadTarget(HOST, HOST, port, ca_file)
        self._staying = [
            Staying(
                f"{HOST}:{port}",
                ConnectOptions(user=user, key=key, ca_file=ca_file, timeout=CALL_S),
                self._seen.retried,
            )
            for user, key in users
        ]
        self._turns = shuffled_rounds(self._staying, self._random)
        self._visitors = itertools.cycle(visitors)
        self._rate, self._visit_rate = rate, visit_rate
        self._pacers = [Pacer(self._loop), Pacer(self._loop)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered_at = 0.0

    async def open(self) -> None:
        """Connect all that stay."""
        for client in self._staying:
            await client.open()

    async def load(self) -> Seen:
        """Send requests and connect until `stop`; then wait for what is under way."""
        began = self._answered_at = time.monotonic()
        await asyncio.gather(
            *(
                pacer.run(poisson_times(rate, FOREVER_S, self._random), act)
                for pacer, rate, act in zip(
                    self._pacers, (self._rate, self._visit_rate), (self._send, self._visit), strict=True
                )
            )
        )
        self._seen.seconds = time.monotonic() - began
        while self._tasks:
            await asyncio.wait(self._tasks)
        return self._seen

    async def stop(self) -> None:
        for pacer in self._pacers:
            pacer.close()

    async def disconnect(self) -> None:
        await asyncio.gather(*(client.close() for client in self._staying))
        self._target.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- clients that stay ---------------------------------------------------------------------------

    def _send(self, due: float) -> None:
        seen = self._seen
        if len(self._tasks) >= MAX_OPEN:
            seen.skipped += 1
            return
        seen.sent += 1
        self._begin(self._call(next(self._turns), seen.sent, due))

    async def _call(self, client: Client, number: int, due: float) -> None:
        key = None if number % KEYED_EVERY else f"rolling-{number}"
        seen = self._seen
        try:
            answer = await client.call("echo", idempotency_key=key, n=number)
        except ZcprotoError as error:
            seen.lost[f"{'without' if key is None else 'with'} a key: {cause_of(error)}"] += 1
            return
        now = time.monotonic()
        seen.longest_gap_s = max(seen.longest_gap_s, now - self._answered_at)
        self._answered_at = now
        seen.waits.add(now - due)
        if answer == {"n": number}:
            seen.answered += 1
        else:
            seen.lost["a different answer"] += 1

    # --- clients that come and go --------------------------------------------------------------------

    def _visit(self, due: float) -> None:
        self._begin(self._visit_until_served(next(self._visitors), due))

    async def _visit_until_served(self, user: Credential, due: float) -> None:
        seen, backoff = self._seen, Backoff(self._random.random)
        while True:
            visitor = Visitor(self._target.wheel)
            try:
                await self._target.connect(visitor)
            except ZcprotoError as error:
                seen.refused[cause_of(error)] += 1
                return
            try:
                visitor.token = (await open_session(visitor, user)).token
                await visitor.call("echo", {})
                await visitor.call("session.close", {})
            except ZcprotoError as error:
                wait_ms = visitor.repeats_after_ms(error)
                if wait_ms is None or time.monotonic() > due + VISIT_S:
                    seen.lost[f"of a new connection: {cause_of(error)}"] += 1
                    return
                seen.retried[f"of a new connection: {cause_of(error)}"] += 1
            else:
                seen.visits += 1
                seen.visit_waits.add(time.monotonic() - due)
                return
            finally:
                await visitor.disconnect()
            await asyncio.sleep(backoff.next(wait_ms))
