"""The whole system in one thread, and what goes wrong in it."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from tests.properties import nodes
from tests.simulation.clients import ClientProcess, Thief, application
from tests.simulation.loop import Scheduler, SimulatedLoop, one_thread
from tests.simulation.network import Network
from tests.simulation.servers import Disk, ServerProcess
from tests.simulation.store import ServerLink, SharedStore
from tests.simulation.truth import Truth, Violation
from zcproto.client import client as product_client
from zcproto.common.deadlines import DeadlineWheel, Timers
from zcproto.config import load_config
from zcproto.observe import log as product_log

CHECK_S = 5.0
SETTLE_S = 90.0
"""Seconds without faults at the end, after which nothing may be left."""

CLIENTS_PER_USER = 3

DOUBLE_S = 30.0
"""No server crashes so soon after a failover: SECURITY.md excludes the loss of a server together with writes."""


@dataclass(frozen=True)
class Plan:
    """What is simulated."""

    seed: int = 1
    seconds: float = 600.0
    servers: int = 1
    clients: int = 3
    thieves: int = 1
    think_s: float = 1.0
    fault_s: float = 20.0
    """Seconds between two faults, on average."""
    settings: tuple[tuple[str, Any], ...] = (
        ("limits.idle_timeout", "30s"),
        ("limits.login_failures", 100),
        ("sessions.per_user", 20),
        ("sessions.lifetime", "2m"),
        ("sessions.refresh_lifetime", "10m"),
        ("store.url", "memory"),
    )


class Fault(NamedTuple):
    """Something that goes wrong at a time, for some seconds."""

    at: float
    kind: str
    where: str
    seconds: float
    extent: int = 0

    def __str__(self) -> str:
        return f"{self.at:10.3f}  {self.kind} {self.where} for {self.seconds:.3f} s ({self.extent})"


class World:
    """A simulation of a plan. Without `faults` they come from the seed."""

    def __init__(
        self, plan: Plan, faults: Sequence[Fault] | None = None, show: Callable[[str], object] | None = None
    ) -> None:
        self.plan = plan
        self.scheduler = Scheduler(plan.seed)
        self.network = Network(self.scheduler.random_of)
        self._show = show
        self._digest = hashlib.sha256()
        self.truth = Truth(lambda: self.scheduler.now, self.log, self._reached_since)
        self.servers: dict[str, ServerProcess] = {}
        self.clients: dict[str, ClientProcess] = {}
        self.thieves: dict[str, Thief] = {}
        self.store = None
        if plan.servers > 1:
            self.store = SharedStore(self.scheduler.random_of("store"), self._lost)
        self._disturbed_until = 0.0
        self._failed_over_at = -inf
        self._disks = {name: Disk() for name in self.server_names}
        self._runs = 0
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.paused_until: dict[str, float] = {}
        self._graveyard: list[object] = []
        self.failure: BaseException | None = None
        overrides = dict(plan.settings)
        self._config = load_config(None, home=Path("/nonexistent"), environ={}, overrides=overrides)
        self.faults = list(self._faults_of_seed()) if faults is None else list(faults)

    @property
    def server_names(self) -> list[str]:
        return [f"server{number}" for number in range(1, self.plan.servers + 1)]

    @property
    def client_names(self) -> list[str]:
        return [f"client{number}" for number in range(1, self.plan.clients + 1)]

    def log(self, process: str, text: str) -> None:
        line = f"{self.scheduler.now:12.6f}  {process:10}  {text}"
        self._digest.update(line.encode() + b"\n")
        if self._show is not None:
            self._show(line)

    @property
    def digest(self) -> str:
        """The SHA-256 of the log."""
        return self._digest.hexdigest()

    def _new_loop(self, name: str) -> SimulatedLoop:
        self._runs += 1
        loop = SimulatedLoop(self.scheduler, name, self._runs)
        loop.set_exception_handler(self._loop_failed)
        return loop

    def _loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Nothing may fail unseen: an exception that only the loop reports ends the simulation."""
        error = context.get("exception")
        if self.failure is None:
            assert isinstance(loop, SimulatedLoop)
            self.failure = error or Violation(f"{loop.name}: {context['message']}")
            self.log(loop.name, f"failed: {context['message']}: {error!r}")

    # --- processes -----------------------------------------------------------------------------------

    def _start_server(self, name: str) -> None:
        loop = self._new_loop(name)
        app = application(self.truth, name, loop.random)
        link = None
        if self.store is not None:
            link = ServerLink(self.store, loop, loop.run, self._living)
        server = self.servers[name] = ServerProcess(loop, app, self._config, link, self._disks[name])
        loop.create_task(server.open()).add_done_callback(self._ended)
        self.scheduler.plan(loop, self.scheduler.now)
        self.log(name, "starts")

    def _living(self) -> list[str]:
        """Return the names under which running servers claim requests."""
        return [server.link.name for server in self.servers.values()]

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None and self.failure is None:
            self.failure = task.exception()

    def _start_client(self, number: int, name: str) -> None:
        user = f"user{number // CLIENTS_PER_USER}"
        client = ClientProcess(
            *self._process(name), servers=self.server_names, user=user, think_s=self.plan.think_s
        )
        self.clients[name] = client
        self._begin(client)

    def _start_thief(self, name: str) -> None:
        def victims() -> list[ClientProcess]:
            return list(self.clients.values())

        thief = self.thieves[name] = Thief(*self._process(name), servers=self.server_names, victims=victims)
        self._begin(thief)

    def _process(self, name: str) -> tuple[Any, ...]:
        loop = self._new_loop(name)
        return loop, self.network, self.servers.get, self.truth

    def _begin(self, process: ClientProcess | Thief) -> None:
        process.task.add_done_callback(self._ended)
        self.scheduler.plan(process.loop, self.scheduler.now)

    def _crash_server(self, name: str, *, is_silent: bool) -> None:
        server = self.servers.pop(name)
        server.loop.crash()
        self.network.crashed(name, is_silent=is_silent)
        self._graveyard.append(server)  # its coroutines must not be closed, which would run them
        if self.store is None:
            self.truth.store_lost(name)
        else:
            server.link.cut()

    def _crash_client(self, name: str) -> None:
        client = self.clients.pop(name)
        client.loop.crash()
        self.network.crashed(name, is_silent=False)
        self.truth.client_crashed(name)
        self._graveyard.append(client)

    def _lost(self, process: str, name: str, arguments: tuple[Any, ...]) -> None:
        """A failover has lost a write of a server."""
        if name in ("claim", "keep_answer", "release_claim"):
            self.truth.excused.add(arguments[1])

    def _reached_since(self) -> float:
        return max(self._disturbed_until, *self.paused_until.values(), 0.0)

    # --- faults --------------------------------------------------------------------------------------

    def _faults_of_seed(self) -> Iterator[Fault]:
        random = self.scheduler.random_of("faults")
        at = self.scheduler.now
        end = at + self.plan.seconds
        while (at := at + random.expovariate(1 / self.plan.fault_s)) < end:
            kinds = ["cut", "cut", "hold", "pause", "pause", "crash", "client crash", "clock"]
            if self.store is not None:
                kinds += ["store", "store", "failover"]
            kind = random.choice(kinds)
            server, client = random.choice(self.server_names), random.choice(self.client_names)
            where = {
                "cut": random.choice((f"{client} {server}", server)),
                "hold": f"{client} {server}",
                "pause": random.choice((client, server)),
                "client crash": client,
            }.get(kind, server)
            yield Fault(at, kind, where, random.expovariate(0.2), random.randrange(1 << 16))

    def _inject(self, fault: Fault) -> None:
        self.log("fault", f"{fault.kind} {fault.where} {fault.seconds:.3f} {fault.extent}")
        names = fault.where.split()
        now = self.scheduler.now
        match fault.kind:
            case "cut":
                self.network.cut(*names)
            case "hold":
                self.network.hold(*names, until=now + fault.seconds)
            case "pause":
                process = self.servers.get(names[0]) or self.clients.get(names[0])
                if process is not None:
                    process.loop.pause(fault.seconds)
                    self.paused_until[names[0]] = now + fault.seconds
            case "client crash" if names[0] in self.clients:
                number = self.client_names.index(names[0])
                self._crash_client(names[0])
                self._later(fault.seconds, lambda: self._start_client(number, names[0]))
            case "crash" if names[0] in self.servers and now > self._failed_over_at + DOUBLE_S:
                self._crash_server(names[0], is_silent=fault.extent % 2 == 0)
                self._later(fault.seconds, lambda: self._start_server(names[0]))
            case "clock" if names[0] in self.servers:
                self.servers[names[0]].clock.offset_ms = fault.extent % 20_000 - 10_000
            case "store" if names[0] in self.servers:
                link = self.servers[names[0]].link
                link.set_mode(nodes.FAULTS[fault.extent % len(nodes.FAULTS)])
                self._disturbed_until = max(self._disturbed_until, now + fault.seconds)
                self._later(fault.seconds, lambda: link.is_cut or link.set_mode(nodes.WORKS))
            case "failover" if self.store is not None:
                self.store.fail_over(fault.extent % 8, is_planned=False)
                self._failed_over_at = now
                self._disturbed_until = max(self._disturbed_until, now)

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        self._timers.append((self.scheduler.now + seconds, do))

    # --- the run ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the plan. Raises Violation, or what a process has raised."""
        with deterministic(self.scheduler):
            for name in self.server_names:
                self._start_server(name)
            for number, name in enumerate(self.client_names):
                self._start_client(number, name)
            end = self.scheduler.now + self.plan.seconds
            for number in range(self.plan.thieves):
                self._start_thief(f"thief{number + 1}")
            for fault in self.faults:
                self._timers.append((fault.at, partial(self._inject, fault)))
            self._run_until(end)
            self._run_until(end + SETTLE_S)
            for process in (*self.clients.values(), *self.thieves.values()):
                process.stop()
            self._run_until(self.scheduler.now + SETTLE_S)
            self._check_left()

    def _run_until(self, end: float) -> None:
        while self.scheduler.now < end:
            self._timers.sort(key=lambda timer: timer[0])
            due = self._timers[0][0] if self._timers else end
            self.scheduler.run_until(min(due, end, self.scheduler.now + CHECK_S))
            failure = self.failure or self.truth.violation
            if failure is not None:
                raise failure
            while self._timers and self._timers[0][0] <= self.scheduler.now:
                self._timers.pop(0)[1]()
            self.truth.check_calls(lambda name: self.paused_until.get(name, 0.0))

    def _check_left(self) -> None:
        """Check that nothing is left: all calls have ended, and so have the tables of servers."""
        if self.truth.calls:
            raise Violation(f"these calls have not ended: {sorted(self.truth.calls)}")
        for client in self.clients.values():
            if not client.task.done():
                raise Violation(f"{client.name} has not closed")
        for name, server in self.servers.items():
            state = server.state
            assert state is not None
            left = {
                "connections": len(state.connections),
                "sessions in use": len(state.session_connections),
                "requests": state.tasks.running,
                "keyed requests": state.idempotency.running,
            }
            if any(left.values()):
                raise Violation(f"{name} has left {left}")


class OrderedSet(dict[Any, None]):
    """A set whose order does not depend on the addresses of its members."""

    def __init__(self, members: Iterable[Any] = ()) -> None:
        super().__init__(dict.fromkeys(members))

    def add(self, member: Any) -> None:
        self[member] = None

    def discard(self, member: Any) -> None:
        dict.pop(self, member, None)

    def pop(self) -> Any:
        return self.popitem()[0]


class OrderedBuckets(dict[int, Any]):
    """The buckets of a DeadlineWheel."""

    def __setitem__(self, tick: int, entries: Iterable[Any]) -> None:
        super().__setitem__(tick, OrderedSet(entries))


def new_wheel(wheel: DeadlineWheel, timers: Timers) -> None:
    """Replace `DeadlineWheel.__init__`."""
    original_wheel(wheel, timers)
    wheel._buckets = OrderedBuckets()


original_wheel = DeadlineWheel.__init__


@contextmanager
def deterministic(scheduler: Scheduler) -> Iterator[None]:
    """Let randomness that cannot be given come from the seed, and nothing from threads or the garbage collector."""
    random = scheduler.random_of("process")
    patches: list[tuple[Any, str, Any]] = [
        (product_client, "system_entropy", random.randbytes),
        (DeadlineWheel, "__init__", new_wheel),
        (product_log._LogState, "write", lambda state, line: None),
        (secrets, "token_bytes", lambda size=32: random.randbytes(size)),
    ]
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        for owner, name, value in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.callback(sys.set_asyncgen_hooks, *sys.get_asyncgen_hooks())
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        yield
