"""Every operation of a session, under every fault, with every store that can have it: no promise is broken.

A cell is one operation (open, refresh, touch, revoke one, a family, a user and all, attach, a request with an
idempotency key) that meets one fault at one moment: begun when the fault is there (before), in flight, done by the
store but not acknowledged (unacknowledged), acknowledged just before the fault (after), or on the other server
(elsewhere).

There are two servers in processes of their own, one without a shared store. The store is killed, stopped, slow,
full, read-only or fails over; one server is cut off from it in one direction, killed, paused, or its clock is set.
Clients retry as the protocol permits and try all tokens on both servers all the time. Then the fault ends, every
operation has to be acknowledged, and all tokens are tried again, also after the servers were killed and started.

One checker reads the history of each cell: nothing acknowledged is lost, what was revoked is refused within 1 s
by the server that acknowledged it and within 5 s by the other, at most three sessions of a user are live, at most
one token of each is good, and no request with a key runs twice. A server that does not reach its store has these
5 s from when it does; until then it accepts the sessions that it knows, for store.grace.

Cells of one store, fault and moment share the fault; each has users of its own.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.command import measurement, progress
from bench.deployments import Cluster, Deployment, WithSentinel
from bench.proxy import FROM_SERVER, TO_SERVER
from bench.report import Report, Row
from bench.scenarios.helper import Helper
from bench.scenarios.history import ELSEWHERE_S, CutOff
from bench.scenarios.matrix_cells import (
    OPERATIONS,
    PER_USER,
    Attach,
    Cell,
    Means,
    Place,
    RevokeAll,
)
from bench.scenarios.matrix_node import SLOW_S, MatrixNode
from bench.server_process import ServerProcess
from bench.stage import ECDSA_ONLY, HOST, Stage
from zcproto.auth import DeviceFile, UserFile
from zcproto.client.credentials import Device, DeviceKey
from zcproto.common.process import new_event_loop
from zcproto.errors import ZcprotoError
from zcproto.load.caller import LoadTarget
from zcproto.load.demo.run import temporary_home
from zcproto.load.plan import Credential

CELLS: Final = 500
"""The bar of a whole run."""

FAULT_S: Final = 1.5
PAUSE_S: Final = 6.5
"""Longer than a revocation elsewhere may take to be effective."""

IN_FLIGHT_S: Final = 0.06
"""After which a request is at the store: a quarter of the store's timeout."""

RECOVER_S: Final = 30.0
NEWS_S: Final = 1.5
HOUR_MS: Final = 3_600_000
POLL_S: Final = 0.02

MEMORY: Final = "memory"
SQLITE: Final = "SQLite"
VALKEY: Final = "Valkey"
SENTINEL: Final = "Valkey with Sentinel"
CLUSTER: Final = "Valkey Cluster"
DEPLOYMENTS: Final[dict[str, type[Deployment]]] = {
    VALKEY: Deployment,
    SENTINEL: WithSentinel,
    CLUSTER: Cluster,
}
STORES: Final = (MEMORY, SQLITE, *DEPLOYMENTS)

SETTINGS: Final = {
    **ECDSA_ONLY,
    "server.port": 0,
    "sessions.per_user": PER_USER,
    # Longer than the hour by which a clock is set:
    "sessions.idle_timeout": "6h",
    "sessions.refresh_grace": "1m",
    "store.cleanup_interval": "1s",
    "limits.connections_per_address": 0,
    "limits.public_requests_per_address": 0,
}


class Moment(Enum):
    BEFORE = "before"
    IN_FLIGHT = "in flight"
    UNACKNOWLEDGED = "unacknowledged"
    AFTER = "after"
    ELSEWHERE = "elsewhere"


class Node:
    """One of the servers, as its parent process sees it."""

    def __init__(self, name: str, stage: Stage, runs: Path) -> None:
        self.name = name
        self.home = stage.home.path
        self._arguments = self.home, runs
        self._ca_file = stage.ca_file
        self._stack = AsyncExitStack()
        self._target: LoadTarget | None = None
        self._helper: Helper | None = None

    @property
    def place(self) -> Place:
        return Place(self.name, self._current_target)

    def _current_target(self) -> LoadTarget:
        if self._target is None:
            raise ZcprotoError("the server does not run")
        return self._target

    async def start(self) -> None:
        helper = Helper(MatrixNode, *self._arguments, processor=None)
        self._helper = await self._stack.enter_async_context(helper)
        port = await helper.call("start")
        self._target = LoadTarget(HOST, HOST, port, self._ca_file)
        self._stack.callback(self._target.close)

    async def call(self, method: str, *arguments: Any) -> Any:
        if self._helper is None:
            raise ZcprotoError("the server does not run")
        return await self._helper.call(method, *arguments)

    async def kill(self) -> None:
        """Kill the process. Nothing happens if it does not run."""
        if self._helper is not None:
            self._helper.signal(signal.SIGKILL)
        self._helper = self._target = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    def pause(self) -> None:
        assert self._helper is not None
        self._helper.signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._helper is not None
        self._helper.signal(signal.SIGCONT)

    async def write_uses(self) -> bool:
        try:
            return bool(await self.call("write_uses"))
        except ZcprotoError:
            return False


class Site:
    """A store of one kind and its servers."""

    def __init__(self, kind: str, folder: Path, pattern: Stage) -> None:
        self.kind = kind
        self._folder = folder
        self._pattern = pattern
        self.runs = folder / "runs"
        self.deployment: Deployment | None = None
        self.nodes: list[Node] = []

    @property
    def here(self) -> Node:
        return self.nodes[0]

    @property
    def is_shared(self) -> bool:
        return self.kind in DEPLOYMENTS

    @property
    def store(self) -> Deployment:
        assert self.deployment is not None
        return self.deployment

    async def in_thread(self, work: Callable[[], Any]) -> None:
        await asyncio.to_thread(work)

    def prepare(self, stack: ExitStack) -> None:
        """Start the store, and make the home folders of the servers."""
        self._folder.mkdir()
        self.runs.touch()
        url = self.kind.lower()
        if self.is_shared:
            self.deployment = stack.enter_context(DEPLOYMENTS[self.kind](self._folder))
            url = self.deployment.url
        for name in ("here", "elsewhere") if self.is_shared else ("here",):
            stage = self._pattern.copy(self._folder / name)
            stage.configure({**SETTINGS, "store.url": url})
            self.nodes.append(Node(name, stage, self.runs))

    async def start(self) -> None:
        await asyncio.gather(*(node.start() for node in self.nodes))
        await self.await_health()

    async def restart(self) -> None:
        await asyncio.gather(*(node.restart() for node in self.nodes))
        await self.await_health()

    async def repair(self) -> None:
        """Start everything that a round has left killed, stopped or full."""
        if self.deployment is not None:
            await self.in_thread(self.deployment.repair)
        await self.restart()

    async def stop(self) -> None:
        for node in self.nodes:
            await node.kill()

    async def await_health(self) -> dict[str, float]:
        """Wait until all servers reach the store. Return when each did."""

        async def healthy(node: Node) -> float:
            end = time.monotonic() + RECOVER_S
            while await node.call("health") != "healthy":
                if time.monotonic() > end:
                    raise ZcprotoError(f"the server {node.name} is not healthy within {RECOVER_S:g} s")
                await asyncio.sleep(POLL_S)
            return time.monotonic()

        return dict(
            zip(
                [node.name for node in self.nodes],
                await asyncio.gather(*map(healthy, self.nodes)),
                strict=True,
            )
        )

    async def hold(self, *directions: str) -> None:
        """Keep back what the first server sends to its store, or the answers, and let all else pass."""
        if self.kind == SQLITE:
            await self.here.call("hurt_disk", "hanging")
        elif self.is_shared:
            await self.here.call("hurt_network", directions)

    async def release(self, cut: bool) -> None:
        with suppress(ZcprotoError):  # it was killed
            if self.kind == SQLITE:
                await self.here.call("hurt_disk", "")
            elif self.is_shared:
                await self.here.call("hurt_network", (), 0.0, cut)


# --- faults ------------------------------------------------------------------------------------------------

Act = Callable[[Site], Awaitable[Any]]
_ALL: Final = (Moment.BEFORE, Moment.IN_FLIGHT, Moment.UNACKNOWLEDGED, Moment.AFTER)
_STATE: Final = (Moment.BEFORE, Moment.AFTER)


class Fault(NamedTuple):
    """What happens, and how it ends. `moments` are those at which an operation can meet it, by store."""

    name: str
    moments: dict[str, Sequence[Moment]]
    begin: Act
    end: Act
    seconds: float = FAULT_S
    cuts_off: str = ""
    """Which servers do not reach their store: "all", "here" or none."""
    arm: Act | None = None
    """What is done before the operation."""
    hurts_network: bool = False
    """Whether it changes the way of the servers to their store."""
    pauses_server: bool = False
    loses_server: bool = False
    loses_writes: bool = False


def _on_store(method: str) -> Act:
    return lambda site: site.in_thread(getattr(site.store, method))


def _on_either(method: str, disk: str) -> Act:
    """Hurt the servers of a store, or the disk of SQLite."""

    async def act(site: Site) -> None:
        if site.kind == SQLITE:
            await site.here.call("hurt_disk", disk)
        else:
            await site.in_thread(getattr(site.store, method))

    return act


async def _slow_down(site: Site) -> None:
    if site.kind == SQLITE:
        await site.here.call("hurt_disk", "slow")
    else:
        await asyncio.gather(*(node.call("hurt_network", (), SLOW_S) for node in site.nodes))


async def _mend(site: Site) -> None:
    if site.kind == SQLITE:
        await site.here.call("hurt_disk", "")
    else:
        await asyncio.gather(*(node.call("hurt_network") for node in site.nodes))


def _cut_off(direction: str) -> Act:
    return lambda site: site.here.call("hurt_network", (direction,))


def _set_clock(offset_ms: int) -> Act:
    return lambda site: site.here.call("set_clock", offset_ms)


class Failover:
    """A failover, and from which server."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._since: dict[Site, ServerProcess] = {}

    async def begin(self, site: Site) -> None:
        def work() -> None:
            primary = site.store.primary()
            assert primary is not None
            self._since[site] = primary
            getattr(site.store, self._method)()

        await site.in_thread(work)

    async def end(self, site: Site) -> None:
        await site.in_thread(partial(site.store.await_failover, self._since.pop(site)))


async def _pause(site: Site) -> None:
    site.here.pause()


async def _resume(site: Site) -> None:
    site.here.resume()


def _with_replica(moments: Sequence[Moment]) -> dict[str, Sequence[Moment]]:
    return dict.fromkeys((SENTINEL, CLUSTER), moments)


def _shared(moments: Sequence[Moment]) -> dict[str, Sequence[Moment]]:
    return dict.fromkeys(DEPLOYMENTS, moments)


_IN_PROCESS: Final = (Moment.BEFORE, Moment.IN_FLIGHT, Moment.AFTER)
_STRUCK: Final = (Moment.IN_FLIGHT, Moment.UNACKNOWLEDGED, Moment.AFTER, Moment.ELSEWHERE)
_planned = Failover("fail_over")
_unplanned = Failover("kill_primary")

FAULTS: Final = (
    Fault("store killed", _shared(_ALL), _on_store("kill"), _on_store("start"), cuts_off="all"),
    Fault(
        "store stopped",
        {SQLITE: _IN_PROCESS, **_shared(_ALL)},
        _on_either("stop", "hanging"),
        _on_either("go_on", ""),
        cuts_off="all",
    ),
    Fault(
        "store slow",
        {SQLITE: _IN_PROCESS, **_shared(_ALL)},
        _slow_down,
        _mend,
        cuts_off="all",
        hurts_network=True,
    ),
    Fault(
        "store full",
        {SQLITE: _IN_PROCESS, **_shared((Moment.BEFORE, Moment.IN_FLIGHT, Moment.AFTER))},
        _on_either("fill", "full"),
        _on_either("drain", ""),
        cuts_off="all",
    ),
    Fault(
        "store read-only",
        {SQLITE: _IN_PROCESS, **_shared((Moment.BEFORE, Moment.IN_FLIGHT, Moment.AFTER))},
        _on_either("make_read_only", "read-only"),
        _on_either("make_writable", ""),
        cuts_off="all",
    ),
    Fault("planned failover", _with_replica(_ALL), _planned.begin, _planned.end, cuts_off="all"),
    Fault("unplanned failover", _with_replica(_ALL), _unplanned.begin, _unplanned.end, cuts_off="all"),
    Fault(
        "failover that loses writes",
        _with_replica((Moment.AFTER,)),
        _unplanned.begin,
        _unplanned.end,
        cuts_off="all",
        arm=_on_store("hold_back"),
        loses_writes=True,
    ),
    Fault(
        "cut off, to the store",
        _shared((Moment.BEFORE, Moment.IN_FLIGHT, Moment.AFTER, Moment.ELSEWHERE)),
        _cut_off(TO_SERVER),
        _mend,
        cuts_off="here",
        hurts_network=True,
    ),
    Fault(
        "cut off, from the store",
        _shared((Moment.BEFORE, Moment.UNACKNOWLEDGED, Moment.AFTER, Moment.ELSEWHERE)),
        _cut_off(FROM_SERVER),
        _mend,
        cuts_off="here",
        hurts_network=True,
    ),
    *(
        Fault(
            f"clock {sign}1 h",
            {MEMORY: _STATE, SQLITE: _STATE, **_shared((*_STATE, Moment.ELSEWHERE))},
            _set_clock(factor * HOUR_MS),
            _set_clock(0),
        )
        for sign, factor in (("+", 1), ("-", -1))
    ),
    Fault(
        "server killed",
        {
            MEMORY: (Moment.IN_FLIGHT, Moment.AFTER),
            SQLITE: (Moment.IN_FLIGHT, Moment.AFTER),
            **_shared(_STRUCK),
        },
        lambda site: site.here.kill(),
        lambda site: site.here.start(),
        loses_server=True,
    ),
    Fault(
        "server paused",
        {MEMORY: _IN_PROCESS, SQLITE: _IN_PROCESS, **_shared(_STRUCK)},
        _pause,
        _resume,
        seconds=PAUSE_S,
        pauses_server=True,
    ),
)

NOTES: Final = (
    "memory cannot have a fault of a store or of the network to it: it is a part of the server",
    "SQLite cannot be killed without its server, fail over or be cut off: it is a library in the server",
    "a single Valkey cannot fail over",
    "a server that is killed or paused can be asked before, in flight and afterwards, but not while it is killed",
    "a store that is full or read-only does nothing that it could leave unacknowledged",
    "a failover that loses writes may lose openings, last uses and answers, as SECURITY.md says; not revocations",
)


# --- rounds ------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Cells that share a fault."""

    kind: str
    fault: Fault
    moment: Moment
    operations: tuple[type[Cell], ...]

    def name(self, operation: type[Cell]) -> str:
        return f"{self.kind} / {self.fault.name} / {self.moment.value} / {operation.name}"


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came of a cell; it holds if `broken` is empty."""

    kind: str
    fault: str
    moment: str
    operation: str
    broken: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} / {self.fault} / {self.moment} / {self.operation}"


def rounds(only: Sequence[str] = ()) -> Iterator[Round]:
    """Yield all rounds, or those with cells that `only` names: each is a part of a name, or several with commas."""

    def is_wanted(name: str) -> bool:
        return not only or any(all(part.strip() in name for part in each.split(",")) for each in only)

    others = tuple(operation for operation in OPERATIONS if operation is not RevokeAll)
    for kind in STORES:
        for fault in FAULTS:
            for moment in fault.moments.get(kind, ()):
                for operations in (others, (RevokeAll,)):
                    made = Round(kind, fault, moment, operations)
                    wanted = tuple(each for each in operations if is_wanted(made.name(each)))
                    if wanted:
                        yield made._replace(operations=wanted)


class People:
    """Users, operators and devices for all cells of one store, each used once."""

    def __init__(self, kind: str, cells: Sequence[type[Cell]], stage: Stage) -> None:
        prefix = kind.lower().replace(" ", "-")
        count, spare, stores = len(cells), 1, DEPLOYMENTS.get(kind, Deployment).stores
        if kind == CLUSTER:  # a third of all users are in the shard that is hurt
            spare = 4
        self._users = iter(
            [user for user in stage.add_users(prefix, count * spare + 20) if stores(user.user)]
        )
        names = [f"{prefix}-operator-{number}" for number in range(count)]
        made = UserFile(stage.home.users).add_many(names, operator=True)
        self._operators = iter([Credential(*each) for each in made])
        self._devices: dict[str, DeviceKey] = {}
        self._with_device: list[Credential] = []
        devices = DeviceFile(stage.home.devices)
        for _ in range(cells.count(Attach)):
            user, device = next(self._users), Device(Ed25519PrivateKey.generate())
            devices.add(user.user, user.user, device.public_key, datetime.now(UTC))
            self._devices[user.user] = DeviceKey(device, user.user)
            self._with_device.append(user)

    def user(self, operation: type[Cell]) -> tuple[Credential, DeviceKey | None]:
        """Return a new user, with a device for Attach."""
        user = self._with_device.pop() if operation is Attach else next(self._users)
        return user, self._devices.get(user.user)

    def operator(self) -> Credential:
        return next(self._operators)


class Running:
    """A round in progress."""

    def __init__(self, round: Round, site: Site, people: People, chance: random.Random) -> None:
        self._round = round
        self._site = site
        self._chance = chance
        at = site.nodes[-1] if round.moment is Moment.ELSEWHERE else site.here
        forgets = round.fault.loses_server and site.kind == MEMORY
        self._cells = []
        for operation in round.operations:
            user, device = people.user(operation)
            means = Means(
                places=[node.place for node in site.nodes],
                at=at.place,
                user=user,
                operator=people.operator(),
                device=device,
                write_uses=self._write_uses,
                loses_writes=round.fault.loses_writes,
                loses_server=round.fault.loses_server,
                forgets=forgets,
            )
            self._cells.append(operation(means))

    async def _write_uses(self, place: Place) -> bool:
        return await next(node for node in self._site.nodes if node.name == place.name).write_uses()

    async def conduct(self) -> list[CellResult]:
        try:
            await self._conduct()
        except Exception as error:  # fails the cells of this round; the others still run
            if not self._cells:
                raise  # no cell would show it
            for cell in self._cells:
                cell.history.faults.append(f"{type(error).__name__}: {error}")
            await self._site.repair()
        finally:
            for cell in self._cells:
                await cell.stop_watching()
                cell.close()
        runs = Counter(self._site.runs.read_text().split())
        for cell in self._cells:
            cell.history.ran(Counter({key: runs[key] for key in cell.keys}))
        kind, fault, moment, _ = self._round
        return [
            CellResult(kind, fault.name, moment.value, cell.name, tuple(cell.history.violations()))
            for cell in self._cells
        ]

    async def _conduct(self) -> None:
        site, fault = self._site, self._round.fault
        await self._each(lambda cell: cell.prepare())
        if fault.arm is not None:
            await fault.arm(site)
        began = time.monotonic()
        acts = await self._meet(fault)
        await asyncio.sleep(max(0.0, began + fault.seconds - time.monotonic()))
        await fault.end(site)
        healthy = await site.await_health()
        self._note_cut_offs(fault, began, healthy)
        await acts
        await self._each(lambda cell: cell.finish())
        await self._each(lambda cell: cell.settle(ELSEWHERE_S + NEWS_S))
        await self._each(lambda cell: cell.census("after the fault"))
        if site.kind != MEMORY:
            await site.restart()
            await self._each(lambda cell: cell.census("after a restart"))

    async def _meet(self, fault: Fault) -> asyncio.Future[Any]:
        """Begin the fault at its moment; return the operations in progress."""
        site, moment = self._site, self._round.moment
        if moment is Moment.AFTER:
            await self._act()
            await fault.begin(site)
            return asyncio.ensure_future(asyncio.sleep(0))
        if moment in (Moment.BEFORE, Moment.ELSEWHERE):
            await fault.begin(site)
            return asyncio.ensure_future(self._act())
        await site.hold(TO_SERVER if moment is Moment.IN_FLIGHT else FROM_SERVER)
        acts = asyncio.ensure_future(self._act())
        pause_s = IN_FLIGHT_S if site.kind != MEMORY else self._chance.random() * IN_FLIGHT_S / 20
        await asyncio.sleep(pause_s)
        strikes_server = fault.pauses_server or fault.loses_server
        if moment is Moment.UNACKNOWLEDGED and not strikes_server and fault.cuts_off != "here":
            await site.release(cut=True)
            await fault.begin(site)
            return acts
        await fault.begin(site)
        if not fault.hurts_network and not (site.kind == SQLITE and fault.cuts_off):
            self._releasing = asyncio.ensure_future(site.release(cut=False))  # a paused server does it later
        return acts

    async def _act(self) -> None:
        await self._each(lambda cell: cell.first_attempt())

    async def _each(self, work: Callable[[Cell], Awaitable[None]]) -> None:
        async with asyncio.TaskGroup() as group:
            for cell in self._cells:
                group.create_task(self._work(work, cell))

    @staticmethod
    async def _work(work: Callable[[Cell], Awaitable[None]], cell: Cell) -> None:
        if cell.has_failed:
            return
        try:
            await work(cell)
        except ZcprotoError as error:
            cell.has_failed = True
            cell.history.faults.append(f"{type(error).__name__}: {error}")

    def _note_cut_offs(self, fault: Fault, began: float, healthy: dict[str, float]) -> None:
        for name, until in healthy.items():
            if fault.cuts_off in ("all", name):
                for cell in self._cells:
                    cell.history.cut_offs.append(CutOff(name, began, until))


async def run_site(
    kind: str,
    made: Sequence[Round],
    site: Site,
    people: People,
    chance: random.Random,
    found: list[CellResult],
) -> None:
    """Carry out the rounds of one store, in a random order."""
    order = list(made)
    chance.shuffle(order)
    with ExitStack() as stack:
        await asyncio.to_thread(site.prepare, stack)
        try:
            await site.start()
            for number, round in enumerate(order, 1):
                begin = time.monotonic()
                results = await Running(round, site, people, chance).conduct()
                found += results
                held = sum(not result.broken for result in results)
                progress(
                    f"{kind}, round {number} of {len(order)}, {time.monotonic() - begin:.1f} s: {round.fault.name},"
                    f" {round.moment.value}: {held} of {len(results)} cells hold"
                )
                for result in results:
                    for sentence in result.broken:
                        progress(f"    {result.operation}: {sentence}")
        finally:
            await site.stop()


async def run_matrix(
    only: Sequence[str], seed: int, jobs: int, folder: Path, stores: Sequence[str] = STORES
) -> list[CellResult]:
    """Carry out all cells, or those that `only` names, with `jobs` stores at once."""
    pattern = Stage(folder / "pattern", SETTINGS)
    await asyncio.to_thread(pattern.make_certificates)
    found: list[CellResult] = []
    slots = asyncio.Semaphore(jobs)

    wanted = {kind: [round for round in rounds(only) if round.kind == kind] for kind in reversed(stores)}
    cells = {
        kind: [each for round in made for each in round.operations] for kind, made in wanted.items() if made
    }
    people = {kind: People(kind, cells[kind], pattern) for kind in cells}  # before the folder is copied

    async def run_one(kind: str) -> None:
        async with slots:
            site = Site(kind, folder / kind.replace(" ", "-"), pattern)
            chance = random.Random(f"{seed} {kind}")  # noqa: S311 - an order and moments, no secret
            await run_site(kind, wanted[kind], site, people[kind], chance, found)

    async with asyncio.TaskGroup() as group:
        for kind in cells:
            group.create_task(run_one(kind))
    return found


def report(found: Sequence[CellResult], *, is_whole: bool) -> Report:
    """Return how many cells hold, by store and fault."""
    columns: dict[str, list[Row]] = {}
    for kind in STORES:
        cells = [cell for cell in found if cell.kind == kind]
        names = [fault.name for fault in FAULTS if any(cell.fault == fault.name for cell in cells)]
        rows = [_row(name, name, [cell for cell in cells if cell.fault == name]) for name in names]
        if rows:
            columns[kind] = [*rows, _row("cells", "all", cells)]
    total = _row("held", "cells that hold", found)
    count = Row("count", "cells", len(found), at_least=CELLS if is_whole else 1)
    possible = len({(cell.kind, cell.fault, cell.operation) for cell in found})
    every = len(OPERATIONS) * len(FAULTS) * len(STORES)
    combinations = (
        f"{possible} of {every} combinations of operation, fault and store, at {len(Moment)} moments"
    )
    broken = [f"{cell.name}: {sentence}" for cell in found for sentence in cell.broken]
    details = [asdict(cell) for cell in found]
    return Report(
        {**columns, "in all": [total, count]},
        broken,
        notes=[combinations, *NOTES],
        details={"cells": details},
    )


def _row(key: str, label: str, cells: Sequence[CellResult]) -> Row:
    return Row(key, label, sum(not cell.broken for cell in cells), equals=len(cells))


@measurement
@click.option("--only", multiple=True, help='Parts of the names of cells, as "Cluster, killed, refresh".')
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order and the moments.")
@click.option(
    "--jobs", type=click.IntRange(1, len(STORES)), default=2, show_default=True, help="Stores at once."
)
def command(only: tuple[str, ...], seed: int, jobs: int) -> Report:
    with temporary_home() as home, asyncio.Runner(loop_factory=new_event_loop) as runner:
        found = runner.run(run_matrix(only, seed, jobs, home.path))
    return report(found, is_whole=not only)
