"""What scenarios share: loads, what is done beside them, interruption, polling.

A scenario starts a server on a `Stage`, loads it, does something to it, and judges what came of that in a
`Report`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Final, TypeVar

from bench.report import Row
from zcproto.common.home import Home
from zcproto.common.network import address_of
from zcproto.common.process import new_event_loop
from zcproto.errors import CallError, TlsError, ZcprotoError
from zcproto.load.caller import Caller, Operator
from zcproto.load.pacer import Pacer, poisson_times, shuffled_rounds
from zcproto.load.plan import Plan
from zcproto.load.processes import on_processor
from zcproto.load.progress import Progress
from zcproto.load.record import Latencies, RequestKind
from zcproto.load.result import Result, Verdict
from zcproto.load.run import Stop, View, run

POLL_S: Final = 0.02
FOREVER_S: Final = 3_600.0
ANSWER_S: Final = 30.0
CALL_S: Final = 30.0
"""Seconds for a call of a client, with all that it repeats; as the timeout of the library."""

LAST_ANSWERS_S: Final = 10.0
"""Seconds after the last request within which answers count; later ones are lost."""

AT_ONCE: Final = 8
"""Calls in flight on one connection: fewer than it may have before its first session."""

T = TypeVar("T")


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first Ctrl-C, so that the run ends early and in order; the second ends the program."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


class _LoadingView:
    """Pass a view's calls on, and set `loading` when the load begins."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.loading = asyncio.Event()

    def phase(self, name: str, label: str, total: int) -> None:
        if name == "load":
            self.loading.set()
        self._view.phase(name, label, total)

    def update(self, counts: dict[str, int]) -> None:
        self._view.update(counts)


async def load_beside(plan: Plan, view: View, beside: Callable[[Operator], Awaitable[None]]) -> Result:
    """Carry out a load, and `beside` from when all its connections are open, which stay open until both have ended.

    `beside` may use the operator's connection, whose requests the load takes into account. If it fails, the load
    ends, and its error is raised.
    """
    watching, stop = _LoadingView(view), Stop()
    lent: list[Operator] = []

    async def begin() -> None:
        await watching.loading.wait()
        await beside(lent[0])

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            stop.request()

    task = asyncio.create_task(begin())
    task.add_done_callback(ended)

    def interrupt() -> None:
        stop.request()
        task.cancel()

    try:
        with on_interrupt(interrupt):
            result = await run(
                plan, watching, stop, on_operator=lent.append, after_load=lambda: asyncio.wait({task})
            )
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
    return result


def run_load_beside(plan: Plan, beside: Callable[[Operator], Awaitable[None]]) -> Result:
    """As `load_beside`, in an event loop of its own, on another processor than the server."""
    with (
        on_processor(1),
        closing(Progress(sys.stdout)) as view,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        return runner.run(load_beside(plan, view, beside))


def load_rows(result: Result) -> list[Row]:
    """Return the bars that hold for every load: no request is lost, and no connection."""
    tallies = [result.record.tallies[kind] for kind in (RequestKind.LOAD, RequestKind.LAST)]
    return [
        Row("requests_equal", "requests answered with what was sent", sum(each.equal for each in tallies)),
        Row("requests_lost", "requests lost", sum(each.failed for each in tallies), equals=0),
        Row("connections_lost", "connections lost", sum(result.record.lost_connections.values()), equals=0),
        Row("connections_kept", "connections that answered to the end", result.verified_connections,
            equals=result.plan.connections),
    ]  # fmt: skip


def load_faults(result: Result) -> list[str]:
    """Return why a load is not verified; an empty list if it is or was interrupted."""
    return result.reasons() if result.verdict is Verdict.FAILED else []


class OpenLoop:
    """Requests in an open loop: each is sent when it is due, whether answers come or not.

    `phase` is set by the owner; a request belongs to the phase in which it is answered.
    """

    def __init__(self, callers: Sequence[Caller], rate: float, data: bytes = b"") -> None:
        self._random = random.Random(1)  # noqa: S311 - an order, no secret
        self._callers = shuffled_rounds(callers, self._random)
        self._rate = rate
        self._data = data
        self._pacer = Pacer(asyncio.get_running_loop())
        self.phase: Any = ""
        self.sent = 0
        self.equal = 0
        self.unanswered = 0
        self.failed: Counter[str] = Counter()
        self.latency: dict[Any, Latencies] = defaultdict(Latencies)
        """From when a request was due to its answer, by phase."""
        self.lag: dict[Any, Latencies] = defaultdict(Latencies)
        """How late this process sent it, which is the machine's share."""

    async def run(self, seconds: float = FOREVER_S) -> None:
        """Send requests for so long, or until `stop`, then wait a little for the last answers."""
        try:
            await self._pacer.run(poisson_times(self._rate, seconds, self._random), self._send)
        finally:
            self._pacer.close()
        end = time.monotonic() + LAST_ANSWERS_S
        while self.unanswered and time.monotonic() < end:  # noqa: ASYNC110 - noticed within ten milliseconds
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self._pacer.stop()

    def _send(self, due: float) -> None:
        self.sent += 1
        params = {"n": self.sent, "data": self._data}
        self.lag[self.phase].add(time.monotonic() - due)
        try:
            next(self._callers).submit("echo", params, partial(self._done, due, params))
        except ZcprotoError as error:
            self.failed[cause_of(error)] += 1
        else:
            self.unanswered += 1

    def _done(self, due: float, params: dict[str, Any], value: Any, error: ZcprotoError | None) -> None:
        self.unanswered -= 1
        self.latency[self.phase].add(time.monotonic() - due)
        if error is not None:
            self.failed[cause_of(error)] += 1
        elif value != params:
            self.failed["a different answer"] += 1
        else:
            self.equal += 1


def ask_control(home: Home, verb: str, name: str, body: str | None = None) -> tuple[int, Any]:
    """Ask a server by its control socket; return status and body. Raises OSError, HTTPException or ValueError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected, address_of(home.control) as address:
        connected.settimeout(ANSWER_S)
        connected.connect(address)
        connection = http.client.HTTPConnection("localhost", timeout=ANSWER_S)
        connection.sock = connected
        connection.request(verb, f"/v1/{name}", body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


async def until(condition: Callable[[], Awaitable[bool]], within_s: float) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    end = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int = AT_ONCE) -> None:
    """Do something for each item, a few at once, in about their order."""
    waiting = iter(items)

    async def some() -> None:
        for item in waiting:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(some())


def cause_of(error: ZcprotoError) -> str:
    """Return a short name for why a call or a connection failed."""
    if isinstance(error, CallError):
        return error.code.name
    return f"TLS: {error.failure}" if isinstance(error, TlsError) else str(error)[:80] or type(error).__name__
