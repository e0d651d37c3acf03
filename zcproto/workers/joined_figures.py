"""Joins the figures of the processes of one server, over the links between them.

worker: REPORT -> coordinator: Collector -> ASK -> every worker
worker that ends: LAST -> coordinator
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final

from zcproto.admin.parts import FleetFigures, Parts
from zcproto.admin.snapshot import store_readiness
from zcproto.common.clock import system_clock
from zcproto.errors import ZcprotoError
from zcproto.observe.metrics import Series
from zcproto.workers.figures import ANSWER_S, ASK_S, Collector, Member, RemoteWhole, Reporter, read_report
from zcproto.workers.link import Link, LinkClient, LinkServer, Topics
from zcproto.workers.merge import Depth, Report
from zcproto.workers.place import Place

REPORT: Final = "figures.report"
"""Call to the coordinator: the figures of all processes."""

ASK: Final = "figures.ask"
"""Call to a worker: its own figures."""

LAST: Final = "figures.last"
"""Call to the coordinator: the figures of a worker that ends."""

_LAST_S: Final = 1.0

Join = Callable[[Parts], FleetFigures]


def member_of(place: Place) -> Member:
    return Member(place.number, os.getpid(), place.restarts, place.started_at)


def facts_of(place: Place) -> dict[str, int]:
    """Return what a worker says of itself to the coordinator."""
    return {"number": place.number, "pid": os.getpid(), "restarts": place.restarts}


def collect(
    server: LinkServer, topics: Topics, place: Place, sessions: Callable[[], int | None]
) -> tuple[Collector, Join]:
    """Collect the figures of all workers that connect to the coordinator.

    `sessions` returns how many sessions the store of this server has; None if it is a store of several servers.
    Return the collector, and what gives it those of the coordinator once it is built.
    """
    collector = Collector(os.getpid(), place.workers, system_clock)
    # By process id: a worker that connects again may be seen before its old link is lost.
    links: dict[int, Link] = {}

    def joined(link: Link) -> None:
        member = _member(link)
        if member is not None:
            links[member.pid] = link
            collector.joined(member, partial(link.call, ASK, within=ANSWER_S))

    def lost(link: Link) -> None:
        member = _member(link)
        if member is not None and links.get(member.pid) is link:
            del links[member.pid]
            collector.left(member.pid)

    async def report(link: Link, question: bytes) -> bytes:
        return await collector.answer(question)

    async def last(link: Link, answer: bytes) -> None:
        member = _member(link)
        if member is not None:
            collector.left(member.pid, answer)

    topics.calls |= {REPORT: report, LAST: last}
    server.on_link.append(joined)
    server.on_lost.append(lost)

    def join(parts: Parts) -> FleetFigures:
        def read(depth: Depth) -> Report:
            report, count = read_report(parts, member_of(place), depth), sessions()
            if count is None:
                return report
            report = replace(report, readiness=store_readiness(parts))
            if depth is Depth.READINESS:
                return report
            status = {**report.status, "sessions": {**report.status["sessions"], "live": count}}
            series: Series = {**report.series, "zcproto_sessions": {("live",): count}}
            return replace(report, status=status, stats={**report.stats, "sessions": count}, series=series)

        collector.read = read
        return collector

    return collector, join


def _member(link: Link) -> Member | None:
    """Return the worker at the other end; None for its connection to the store."""
    facts = [link.facts.get(name) for name in ("number", "pid", "restarts")]
    return Member(*facts) if {*map(type, facts)} == {int} else None  # type: ignore[arg-type]


def report(client: LinkClient, topics: Topics, place: Place) -> tuple[Join, Callable[[], Awaitable[None]]]:
    """Report the figures of a worker, and ask the coordinator for those of all.

    Return what gives the worker's parts once they are built, and what reports them for the last time.
    """
    reporter = Reporter()

    async def answer(link: Link, question: bytes) -> bytes:
        return reporter.answer(question)

    def join(parts: Parts) -> FleetFigures:
        reporter.read = partial(read_report, parts, member_of(place))
        return RemoteWhole(partial(client.call, REPORT, within=ASK_S))

    async def last() -> None:
        try:
            async with asyncio.timeout(_LAST_S):
                await client.call(LAST, reporter.last(), within=_LAST_S)
        except (ZcprotoError, TimeoutError):  # without a coordinator its next one has the figures of before
            pass

    topics.calls[ASK] = answer
    return join, last
