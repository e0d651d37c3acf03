"""The faults of the matrix, and at which moments an operation can meet them, by store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from bench.proxy import FROM_SERVER, TO_SERVER
from bench.scenarios.matrix_node import SLOW_S
from bench.scenarios.matrix_site import CLUSTER, DEPLOYMENTS, MEMORY, SENTINEL, SQLITE, Site
from bench.server_process import ServerProcess

FAULT_S: Final = 1.5
PAUSE_S: Final = 6.5
"""Longer than a revocation elsewhere may take to be effective."""

HOUR_MS: Final = 3_600_000


class Moment(Enum):
    BEFORE = "before"
    IN_FLIGHT = "in flight"
    UNACKNOWLEDGED = "unacknowledged"
    AFTER = "after"
    ELSEWHERE = "elsewhere"


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
            self._since[site] = site.store.known_primary()
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
    "a failover that loses writes may lose openings, last uses and answers, as SECURITY.md says; not revocations. "
    "Other servers may refuse the token of a lost refresh for 5 s",
)
