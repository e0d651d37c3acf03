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
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.command import measurement, progress
from bench.deployments import Deployment
from bench.proxy import FROM_SERVER, TO_SERVER
from bench.report import Report, Row
from bench.scenarios.history import ELSEWHERE_S, CutOff
from bench.scenarios.matrix_cells import OPERATIONS, Attach, Cell, Means, Place, RevokeAll
from bench.scenarios.matrix_faults import FAULTS, NOTES, Fault, Moment
from bench.scenarios.matrix_site import CLUSTER, DEPLOYMENTS, MEMORY, SETTINGS, SQLITE, STORES, Site
from bench.stage import Stage
from zcproto.auth import DeviceFile, UserFile
from zcproto.client.credentials import Device, DeviceKey
from zcproto.common.process import new_event_loop
from zcproto.common.roles import OPERATORS
from zcproto.errors import ZcprotoError
from zcproto.load.demo import temporary_home
from zcproto.load.plan import Credential

CELLS: Final = 500
"""The bar of a whole run."""

IN_FLIGHT_S: Final = 0.06
"""After which a request is at the store: a quarter of the store's timeout."""

NEWS_S: Final = 1.5
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
        made = UserFile(stage.home.users).add_many(names, roles=OPERATORS)
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
