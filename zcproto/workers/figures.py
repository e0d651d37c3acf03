"""The figures of all processes of a server as one report, collected by its coordinator.

    /metrics of a worker -> RemoteFigures -> Collector in the coordinator -> Reporter in each worker -> merge
    a worker that ends -> LAST -> Collector

Rules:
- Figures are collected on demand, at most once in FRESH_S for all callers.
- A worker that does not answer in time, or whose answer cannot be read, is listed as silent. The others are shown,
  and its counters stay in the sums as they were last reported.
- Sums do not go backwards when a process ends: its last report stays in them. The workers keep a copy of the sums
  of ended processes for the next coordinator, without reading it.

A process is asked by a function from bytes to bytes; `serve` gives the one that asks over a link.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any, Final, Self

import msgpack

from zcproto.admin.metrics import readings
from zcproto.admin.parts import FleetFigures, Parts
from zcproto.admin.snapshot import (
    finish_status,
    readiness_report,
    stats_figures,
    status_figures,
    store_readiness,
    take_snapshot,
)
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.errors import Unavailable, ZcprotoError
from zcproto.observe.histogram import Histogram
from zcproto.observe.log import get_logger
from zcproto.observe.metrics import Metrics, Reading, Series, series_of
from zcproto.observe.process import process_readings
from zcproto.workers.link import Link, LinkClient, LinkServer, Topics
from zcproto.workers.merge import Depth, Report, lasting, merge, pack_report, readings_of, unpack_report

FRESH_S: Final = 0.1
"""Seconds for which a collected report is used again."""

ANSWER_S: Final = 0.5
"""Seconds after which a worker that has not answered is silent."""

ASK_S: Final = 2.0
"""Seconds for which a worker waits for the report of all."""

POLL_S: Final = 10.0
"""Seconds between two collections without a request: what a killed worker has counted since is lost."""

LAST_S: Final = 1.0
"""Seconds that a worker has for its last report."""

JOIN_S: Final = 1.0
"""Seconds for which a new coordinator waits for the workers before it reports sums without some of them."""

REPORT: Final = "figures.report"
"""Call to the coordinator: the figures of all processes."""

ASK: Final = "figures.ask"
"""Call to a worker: its own figures."""

LAST: Final = "figures.last"
"""Call to the coordinator: the figures of a worker that ends."""

COORDINATOR: Final = "coordinator"

SUBSCRIBERS: Final = "zcproto_topic_subscribers"

Ask = Callable[[bytes], Awaitable[bytes]]
"""Sends a question to a process and returns its answer. May raise OSError, LinkLost or a CallError."""

Read = Callable[[Depth], Report]
"""Reads the figures of this process."""

log = get_logger("zcproto.server")


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a server. The coordinator has the number 0, workers count from 1.

    `restarts` is how many processes of this number have ended before. `server_started_at` is when the first process
    of the server started, in milliseconds since the Unix epoch; 0 if it is not known.
    """

    number: int
    pid: int
    restarts: int = 0
    server_started_at: int = 0

    @property
    def name(self) -> str:
        return str(self.number) if self.number else COORDINATOR

    @property
    def facts(self) -> dict[str, int]:
        """What a worker says of itself to the coordinator."""
        return {"number": self.number, "pid": self.pid, "restarts": self.restarts}

    @classmethod
    def at(cls, link: Link) -> Self | None:
        """Return the worker at the other end of a link; None for its connection to the store."""
        facts = [link.facts.get(name) for name in ("number", "pid", "restarts")]
        return cls(*facts) if {*map(type, facts)} == {int} else None  # type: ignore[arg-type]


_OF_CLIENTS: Final = frozenset(
    {"zcproto_draining", "zcproto_limit", "zcproto_limit_use", "zcproto_loop_lag_seconds"}
)
"""What the coordinator does not report: it would hide the figures of the processes that serve clients."""


def read_report(parts: Parts, member: Member, depth: Depth = Depth.FIGURES) -> Report:
    """Read the figures of this process. Call it in its loop."""
    readiness = readiness_report(parts) if member.number else {}  # the coordinator serves no clients
    if depth is Depth.READINESS:
        return Report({}, {}, readiness, {})
    snapshot = take_snapshot(parts)
    status = status_figures(snapshot)
    line = _line(status, member)
    status["pid"] = os.getppid()  # the supervisor
    if member.server_started_at:
        status["started_at"] = member.server_started_at
        status["uptime_s"] = max(0, snapshot.time - member.server_started_at) // MS_PER_SECOND
    series = series_of(chain(readings(snapshot), process_readings()))
    series |= series_of(_member_readings(status, member, parts.loop_lag.lags))
    if not member.number:
        del status["draining"]
        series = {name: values for name, values in series.items() if name not in _OF_CLIENTS}
    return Report(
        status=status,
        stats=stats_figures(parts, snapshot, take=depth is Depth.STATS),
        readiness=readiness,
        series=series,
        workers=[line],
    )


def _member_readings(status: dict[str, Any], member: Member, lags: Histogram) -> Iterator[Reading]:
    if member.number:
        yield "zcproto_worker_connections", status["connections"]["tcp"], member.name
        yield "zcproto_worker_requests_total", status["requests"]["total"], member.name
    yield "zcproto_worker_cpu_seconds_total", status["process"]["cpu_s"], member.name
    yield "zcproto_worker_resident_memory_bytes", status["process"]["rss_bytes"], member.name
    yield "zcproto_worker_loop_lag_seconds", lags, member.name


def _line(status: dict[str, Any], member: Member) -> dict[str, Any]:
    of_clients = {
        "connections": status["connections"]["tcp"],
        "requests": status["requests"]["total"],
        "requests_per_s": status["traffic"]["requests_per_s"],
    }
    return {
        "worker": member.name,
        "pid": member.pid,
        "state": "draining" if status.get("draining") else "serving",
        "started_at": status["started_at"],
        "restarts": member.restarts,
        **(of_clients if member.number else dict.fromkeys(of_clients)),
        **status["process"],
    }


def _missing_line(member: Member, state: str, started_at: int = 0) -> dict[str, Any]:
    """Return the line of a process without figures: it is silent or absent (being replaced)."""
    keys = ("connections", "requests", "requests_per_s", "cpu_s", "rss_bytes", "loop_lag_s")
    return {
        "worker": member.name,
        "pid": member.pid or None,
        "state": state,
        "started_at": started_at,
        "restarts": member.restarts,
        **dict.fromkeys(keys),
    }


# --- questions and answers -----------------------------------------------------------------------------------

_VERSION: Final = version("zcproto")

_NOTHING: Final = Report({}, {}, {}, {})


def _read_nothing(depth: Depth) -> Report:
    """Stand for a server that is not built yet."""
    return _NOTHING


@dataclass(slots=True)
class _EndedTotals:
    """The counters of processes that have ended, as a coordinator gave them to the workers.

    `epoch` is the process id of that coordinator, `serial` grows with every question, also of its successors.
    """

    epoch: int = 0
    serial: int = 0
    totals: bytes = b""


class Reporter:
    """Answers the coordinator in a worker, and keeps what the next coordinator needs.

    `read` reads the figures of the worker once it is built.
    """

    def __init__(self) -> None:
        self.read: Read = _read_nothing
        self._ended_totals = _EndedTotals()

    def answer(self, question: bytes) -> bytes:
        """Return the report of this process. Raises ValueError if the question is from another version."""
        depth, epoch, serial, totals = _open(question, 4)
        had = self._ended_totals
        returned = [] if epoch == had.epoch or not had.totals else [had.epoch, had.serial, had.totals]
        if totals:
            self._ended_totals = _EndedTotals(epoch, serial, totals)
        return _seal(pack_report(self.read(Depth(depth))), returned)

    def last(self) -> bytes:
        """Return the answer for the end of this process, which the coordinator then counts to its last request."""
        return _seal(pack_report(self.read(Depth.FIGURES)), [])

    # --- over a link ---------------------------------------------------------------------------------

    def serve(self, topics: Topics) -> None:
        """Answer the coordinator at the other end of a link."""

        async def answer(link: Link, question: bytes) -> bytes:
            return self.answer(question)

        topics.calls[ASK] = answer

    def read_parts(self, member: Member, client: LinkClient, parts: Parts) -> FleetFigures:
        """Report the parts of this worker from now on; return the figures of all processes."""
        self.read = partial(read_report, parts, member)
        return RemoteFigures(partial(client.call, REPORT, within=ASK_S))

    async def report_last(self, client: LinkClient) -> None:
        """Report the figures of this worker, which ends."""
        # Without a coordinator, the next one has the figures of before.
        with contextlib.suppress(ZcprotoError, TimeoutError):
            async with asyncio.timeout(LAST_S):
                await client.call(LAST, self.last(), within=LAST_S)


def _seal(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb([_VERSION, *fields])
    return packed


def _open(message: bytes, count: int) -> list[Any]:
    """Return the fields of a message. Raises ValueError."""
    try:
        of, *fields = msgpack.unpackb(message)
    except (TypeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError("this is not a message of a process of this server") from error
    if of != _VERSION or len(fields) != count:
        raise ValueError(f"this is a message of version {of!s:.40}, not of {_VERSION}")
    return list(fields)


@dataclass(slots=True)
class _Asked:
    """A worker as the collector knows it. `ask` is None while it is not connected."""

    member: Member
    ask: Ask | None
    last: Report | None = None
    is_silent: bool = False


_NO_ANSWER: Final = "workers: none has answered"
_NO_WORKER: Final[Mapping[str, Any]] = {"ready": False, "warnings": [], "checks": {}}
"""The readiness of a server in its first moments, or if no worker answers."""


class FleetReports:
    """The reports of a server, of the figures of all its processes."""

    async def report(self, depth: Depth = Depth.FIGURES) -> Report:
        """Return the figures. Raises Unavailable if the process that adds them up does not answer."""
        raise NotImplementedError

    async def status(self) -> dict[str, Any]:
        report = await self.report()
        if not report.status:  # no process is built
            raise _no_figures()
        # `draining` is missing if no worker answers.
        return finish_status({"draining": False, **report.status}, report.workers)

    async def readiness(self) -> Mapping[str, Any]:
        found = (await self.report(Depth.READINESS)).readiness
        if "ready" not in found:
            found = {**_NO_WORKER, **found, "reasons": [_NO_ANSWER, *found.get("reasons", ())]}
        return {
            **{key: value for key, value in found.items() if key != "has_store"},
            "ready": found["ready"] and found.get("has_store", True),
        }

    async def stats(self) -> dict[str, Any]:
        report = await self.report(Depth.STATS)
        return {**report.stats, "workers": report.workers}

    async def metrics(self) -> Metrics:
        report = await self.report()
        return Metrics(lambda: readings_of(report.series))


class Collector(FleetReports):
    """Adds up the figures of the coordinator and its workers.

    `read` reads those of the coordinator once it is built, `pid` is its process id, `workers` the configured number
    of workers.
    """

    def __init__(
        self,
        pid: int,
        workers: int,
        clock: Clock,
        *,
        answer_s: float = ANSWER_S,
        join_s: float = JOIN_S,
    ) -> None:
        self.read: Read = _read_nothing
        self.local_topics: set[str] = set()
        """Topics of each process whose subscribers were not yet seen in several."""
        self._epoch, self._serial = pid, 0
        self._clock = clock
        self._answer_s, self._join_s = answer_s, join_s
        self._expected = {number: Member(number, 0) for number in range(1, workers + 1)}
        self._workers: dict[int, _Asked] = {}  # by process id
        self._ended = _NOTHING
        self._inherited: tuple[int, Report] | None = None  # with its serial
        self._joined, self._changed = asyncio.Event(), asyncio.Event()
        self._running: dict[Depth, asyncio.Task[Report]] = {}
        self._collected: dict[Depth, tuple[float, Report]] = {}

    # --- processes -----------------------------------------------------------------------------------

    def joined(self, member: Member, ask: Ask) -> None:
        """Ask this process from now on, which may have been asked before by another way."""
        worker = self._workers.setdefault(member.pid, _Asked(member, ask))
        worker.member, worker.ask = member, ask
        if member.number in self._expected:
            self._expected[member.number] = replace(member, pid=0)
        if self._expected.keys() <= self._connected():
            self._joined.set()
        self._drop_replaced()

    def left(self, pid: int, last: bytes | None = None) -> None:
        """Stop asking a process. It stays listed as silent until it has ended, joins again or is replaced.

        `last` is its answer at the end, if it had the time to send one.
        """
        worker = self._workers.get(pid)
        if worker is None:
            return
        worker.ask = None
        if last is not None:
            with contextlib.suppress(ValueError):
                worker.last = self._read_answer(last)
        self._drop_replaced()

    def ended(self, pid: int) -> None:
        """Keep the counters of a process that has ended, and list it no longer."""
        worker = self._workers.pop(pid, None)
        if worker is not None and worker.last is not None:
            self._ended = merge([self._ended, lasting(worker.last)])
        self._changed.set()

    def _connected(self) -> set[int]:
        return {each.member.number for each in self._workers.values() if each.ask is not None}

    def _drop_replaced(self) -> None:
        connected = self._connected()
        for pid, worker in list(self._workers.items()):
            if worker.ask is None and worker.member.number in connected:
                self.ended(pid)

    # --- over links ----------------------------------------------------------------------------------

    def serve(self, server: LinkServer) -> None:
        """Collect the figures of all workers that connect to the coordinator."""
        # By process id: a worker that connects again may be seen before its old link is lost.
        links: dict[int, Link] = {}

        def made(link: Link) -> None:
            member = Member.at(link)
            if member is not None:
                links[member.pid] = link
                self.joined(member, partial(link.call, ASK, within=ANSWER_S))

        def lost(link: Link) -> None:
            member = Member.at(link)
            if member is not None and links.get(member.pid) is link:
                del links[member.pid]
                self.left(member.pid)

        async def report(link: Link, question: bytes) -> bytes:
            return await self.answer(question)

        async def last(link: Link, answer: bytes) -> None:
            member = Member.at(link)
            if member is not None:
                self.left(member.pid, answer)

        server.topics.calls |= {REPORT: report, LAST: last}
        server.on_link.append(made)
        server.on_lost.append(lost)

    def read_parts(
        self, member: Member, parts: Parts, *, count_sessions: Callable[[], int] | None
    ) -> FleetFigures:
        """Add the figures of the coordinator, which is built; return those of all processes.

        `count_sessions` returns the sessions in the store of this server; None for one of several servers.
        """

        def read(depth: Depth) -> Report:
            report = read_report(parts, member, depth)
            if count_sessions is None:
                return report
            report = replace(report, readiness=store_readiness(parts))
            if depth is Depth.READINESS:
                return report
            count = count_sessions()
            status = {**report.status, "sessions": {**report.status["sessions"], "live": count}}
            series: Series = {**report.series, "zcproto_sessions": {("live",): count}}
            return replace(report, status=status, stats={**report.stats, "sessions": count}, series=series)

        self.read = read
        topics = (method.topic for method in parts.state.methods.values())
        self.local_topics = {topic.name for topic in topics if topic is not None and topic.scope == "process"}
        return self

    # --- collecting ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Collect the figures now and then, so that little is lost when a process is killed, until cancelled."""
        while True:
            try:
                await self.report()
            except Exception as error:  # an internal error must not end the polling
                log.error("server.fault", what="figures", exc_info=error)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._changed.wait()

    async def report(self, depth: Depth = Depth.FIGURES) -> Report:
        """Return the figures of all processes."""
        for deep in Depth:
            at, report = self._collected.get(deep, (float("-inf"), _NOTHING))
            if deep >= depth and self._clock.now() - at < FRESH_S:
                return report
        task = self._running.get(depth)
        if task is None:
            task = self._running[depth] = asyncio.create_task(self._collect(depth))
            task.add_done_callback(lambda task: self._running.pop(depth, None))
        return await asyncio.shield(task)

    async def _collect(self, depth: Depth) -> Report:
        if depth is not Depth.READINESS and self._inherited is None:
            await self._inherit()
        own, totals = self.read(depth), b""
        if depth is not Depth.READINESS:  # what is reported now is with the workers if this process is killed
            totals = msgpack.packb(pack_report(merge([lasting(own), self._past()])))
        asked = list(self._workers.values())
        answers = await self._ask_all(asked, depth, totals)
        # One moment: from here on the counters of a process that ends are in the sums by its answer.
        answered = [
            (worker, answer)
            for worker, answer in zip(asked, answers, strict=True)
            if self._workers.get(worker.member.pid) is worker
        ]
        total = own if depth is Depth.READINESS else merge([own, self._past()])
        for worker, answer in answered:
            total = self._add(total, worker, answer, depth)
            await asyncio.sleep(0)  # with a thousand methods each takes milliseconds
        if self.local_topics:
            self._warn_of_split_topics(answer for _, answer in answered if answer is not None)
        built = {worker.member.number for worker, answer in answered if answer is None or answer.workers}
        total = self._add_absent(
            total, [each for each in self._expected.values() if each.number not in built]
        )
        total = replace(total, series=total.series | series_of(_line_readings(total.workers)))
        self._collected[depth] = self._clock.now(), total
        return total

    def _warn_of_split_topics(self, reports: Iterable[Report]) -> None:
        """Warn once of each topic whose subscribers are in several processes, but get the events of one."""
        found = Counter(
            name
            for report in reports
            for (name,), count in report.series.get(SUBSCRIBERS, {}).items()
            if count
        )
        for name in self.local_topics & {name for name, processes in found.items() if processes > 1}:
            self.local_topics.discard(name)
            log.warning("topics.split", topic=name, workers=found[name])

    async def _inherit(self) -> None:
        """Wait for the workers, and ask them for what an earlier coordinator has left with them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._join_s):
                await self._joined.wait()
        await self._ask_all(list(self._workers.values()), Depth.READINESS, b"")
        self._inherited = self._inherited or (0, _NOTHING)

    def _past(self) -> Report:
        """Return the counters of processes that have ended."""
        return self._ended if self._inherited is None else merge([self._ended, self._inherited[1]])

    def _add(self, total: Report, worker: _Asked, answer: Report | None, depth: Depth) -> Report:
        before = worker.last
        if answer is not None:
            if depth is not Depth.READINESS:
                worker.last = answer
            try:
                return merge([total, answer])
            except ValueError as error:
                log.error("server.fault", what="figures", exc_info=error)
                worker.last = before
        started_at = next((line["started_at"] for line in before.workers), 0) if before is not None else 0
        line = _missing_line(worker.member, "silent", started_at)
        warning = f"worker {worker.member.name}: it does not answer"
        past = [lasting(before)] if before is not None and depth is not Depth.READINESS else []
        return merge([total, Report({}, {}, {"warnings": [warning]}, {}, [line]), *past])

    @staticmethod
    def _add_absent(total: Report, absent: Iterable[Member]) -> Report:
        lines = [_missing_line(member, "absent") for member in absent]
        return merge([total, Report({}, {}, {}, {}, lines)]) if lines else total

    async def _ask_all(self, workers: list[_Asked], depth: Depth, totals: bytes) -> list[Report | None]:
        self._serial += 1
        question = _seal(depth, self._epoch, self._serial, totals)
        return await asyncio.gather(*(self._ask(worker, question) for worker in workers))

    async def _ask(self, worker: _Asked, question: bytes) -> Report | None:
        """Return the answer of a worker, or None if it has not come in time or cannot be read."""
        if worker.ask is None:
            return None
        try:
            async with asyncio.timeout(self._answer_s):
                answer = self._read_answer(await worker.ask(question))
        except (OSError, ValueError, ZcprotoError) as error:  # TimeoutError is an OSError
            if not worker.is_silent:
                cause = str(error) or f"no answer within {self._answer_s:g} s"
                log.warning("worker.silent", what=worker.member.name, pid=worker.member.pid, cause=cause)
            worker.is_silent = True
            return None
        worker.is_silent = False
        return answer

    def _read_answer(self, answer: bytes) -> Report:
        report, returned = _open(answer, 2)
        if returned:  # from an earlier coordinator; workers may have those of different moments
            _, serial, totals = returned
            if self._inherited is None or serial > self._inherited[0]:
                self._inherited = serial, unpack_report(msgpack.unpackb(totals))
                self._serial = max(self._serial, serial)
        return unpack_report(report)

    async def answer(self, question: bytes) -> bytes:
        """Return the report of all processes, for a worker that was asked for it. Raises ValueError."""
        (depth,) = _open(question, 1)
        return _seal(pack_report(await self.report(Depth(depth))))


def _line_readings(lines: Iterable[Mapping[str, Any]]) -> Iterator[Reading]:
    for line in lines:
        yield "zcproto_worker_up", line["state"] in ("serving", "draining"), line["worker"]
        yield "zcproto_worker_restarts_total", line["restarts"], line["worker"]


class RemoteFigures(FleetReports):
    """The figures of all processes, in a worker. `ask` asks the coordinator."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def report(self, depth: Depth = Depth.FIGURES) -> Report:
        """Return the figures. Raises Unavailable if the coordinator does not answer."""
        try:
            async with asyncio.timeout(ASK_S):
                (report,) = _open(await self._ask(_seal(depth)), 1)
            return unpack_report(report)
        except (OSError, ValueError, ZcprotoError) as error:  # TimeoutError is an OSError
            raise _no_figures() from error


def _no_figures() -> Unavailable:
    return Unavailable(
        "the figures of all workers cannot be collected just now; retry", {"retry_after_ms": MS_PER_SECOND}
    )
