"""Figures of all processes of a server: collected by its coordinator, shown by any worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from tests.workers.hub_harness import until
from zcproto.common.unix_socket import listen_unix
from zcproto.errors import Unavailable
from zcproto.workers import figures
from zcproto.workers.figures import FRESH_S, SUBSCRIBERS, Collector, Member, RemoteFigures, Reporter
from zcproto.workers.link import LinkClient, LinkServer, Topics
from zcproto.workers.merge import Depth, Report

REQUESTS = "zcproto_requests_total"


class Process:
    """A worker or coordinator that counts requests."""

    def __init__(self, number: int, pid: int) -> None:
        self.member = Member(number, pid, restarts=3)
        self.requests = 0
        self.subscribers: dict[tuple[str, ...], float] = {}
        self.reads: list[Depth] = []
        self.reporter = Reporter()
        self.reporter.read = self.read

    def read(self, depth: Depth) -> Report:
        self.reads.append(depth)
        readiness = {"ready": True, "reasons": []} if self.member.number else {}
        if depth is Depth.READINESS:
            return Report({}, {}, readiness, {})
        line = {
            "worker": self.member.name,
            "pid": self.member.pid,
            "state": "serving",
            "started_at": self.member.pid,
            "restarts": self.member.restarts,
        }
        requests = {"total": self.requests}
        return Report(
            {"requests": requests, "started_at": 7},
            {"requests": self.requests},
            readiness,
            {
                REQUESTS: {(): self.requests},
                SUBSCRIBERS: self.subscribers,
                "zcproto_worker_requests_total": {(self.member.name,): self.requests},
            },
            [line],
        )

    async def ask(self, question: bytes) -> bytes:
        return self.reporter.answer(question)


class Group:
    """A coordinator and its workers."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.workers: dict[int, Process] = {}
        self.pid = 1000
        self.start()

    def start(self) -> None:
        """Start a coordinator, the first or the next."""
        self.pid += 1
        self.own = Process(0, self.pid)
        self.collector = Collector(self.pid, len(self.workers), self.clock, answer_s=0.01, join_s=0)
        self.collector.read = self.own.read
        for worker in self.workers.values():
            self.collector.joined(worker.member, worker.ask)

    def add(self, number: int) -> Process:
        self.pid += 1
        worker = self.workers[number] = Process(number, self.pid)
        self.collector.joined(worker.member, worker.ask)
        return worker

    async def ask_once(self, number: int) -> Process:
        """Add a worker, and let the coordinator ask what its predecessors have left."""
        worker = self.add(number)
        await self.report()
        self.clock.advance(FRESH_S)
        worker.reads.clear()
        self.own.reads.clear()
        return worker

    async def report(self, depth: Depth = Depth.FIGURES) -> Report:
        self.clock.advance(FRESH_S)
        return await self.collector.report(depth)

    async def total(self) -> Any:
        report = await self.report()
        assert report.series[REQUESTS][()] == report.status["requests"]["total"] == report.stats["requests"]
        return report.status["requests"]["total"]


def states(report: Report) -> dict[str, str]:
    return {line["worker"]: line["state"] for line in report.workers}


async def test_figures_are_added_up_over_all_processes() -> None:
    group = Group()
    group.own.requests = 1
    group.add(1).requests = 10
    group.add(2).requests = 100
    report = await group.report()
    assert report.status["requests"]["total"] == 111
    assert states(report) == {"coordinator": "serving", "1": "serving", "2": "serving"}
    assert report.series["zcproto_worker_requests_total"] == {("coordinator",): 1, ("1",): 10, ("2",): 100}
    assert report.series["zcproto_worker_up"] == {("coordinator",): True, ("1",): True, ("2",): True}
    assert report.series["zcproto_worker_restarts_total"] == {("coordinator",): 3, ("1",): 3, ("2",): 3}
    assert report.readiness == {"ready": True, "reasons": []}


async def test_askers_share_one_collection() -> None:
    group = Group()
    worker = await group.ask_once(1)
    await asyncio.gather(*(group.collector.report() for _ in range(100)))
    await group.collector.report()
    assert len(worker.reads) == len(group.own.reads) == 1
    group.clock.advance(FRESH_S)
    await group.collector.report()
    assert len(worker.reads) == 2


async def test_cancelled_asker_does_not_cancel_the_collection_of_others() -> None:
    group = Group()
    group.add(1)
    first = asyncio.create_task(group.collector.report())
    second = asyncio.create_task(group.collector.report())
    await asyncio.sleep(0)
    first.cancel()
    assert states(await second)["1"] == "serving"


async def test_deeper_report_serves_for_the_others() -> None:
    group = Group()
    worker = await group.ask_once(1)
    await group.collector.report(Depth.STATS)
    await group.collector.report(Depth.FIGURES)
    await group.collector.report(Depth.READINESS)
    assert worker.reads == [Depth.STATS]
    group.clock.advance(FRESH_S)
    await group.collector.report(Depth.READINESS)
    await group.collector.report(Depth.FIGURES)
    await group.collector.report(Depth.STATS)
    assert worker.reads == [Depth.STATS, *Depth]


async def hang(question: bytes) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


async def fail(question: bytes) -> bytes:
    raise ConnectionResetError("reset")


async def answer_other(question: bytes) -> bytes:
    return b"\x92\xa10\xc0"


@pytest.mark.parametrize("ask", [hang, fail, answer_other])
async def test_worker_that_does_not_answer_is_listed_as_silent_and_its_counters_stay(
    ask: Callable[[bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    fake = SimpleNamespace(warning=lambda event, **fields: logged.append((event, fields["what"])))
    monkeypatch.setattr(figures, "log", fake)
    group = Group()
    group.add(1).requests = 10
    worker = group.add(2)
    worker.requests = 100
    assert await group.total() == 110
    worker.requests = 200
    group.collector.joined(worker.member, ask)
    report = await group.report()
    assert states(report) == {"coordinator": "serving", "1": "serving", "2": "silent"}
    assert report.status["requests"]["total"] == 110
    assert report.series["zcproto_worker_up"]["2",] == 0
    assert report.readiness["ready"]
    assert report.readiness["warnings"] == ["worker 2: it does not answer"]
    silent = report.workers[-1]
    assert (silent["pid"], silent["started_at"], silent["requests"]) == (
        worker.member.pid,
        worker.member.pid,
        None,
    )
    await group.report()
    assert logged == [("worker.silent", "2")]  # once
    group.collector.joined(worker.member, worker.ask)
    assert await group.total() == 210


async def test_topic_of_a_process_with_subscribers_in_several_workers_is_reported_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged = []
    monkeypatch.setattr(figures.log, "warning", lambda event, **fields: logged.append((event, fields)))
    group = Group()
    first, second = await group.ask_once(1), group.add(2)
    group.collector.local_topics = {"prices", "jobs", "quiet"}
    first.subscribers = {("prices",): 2, ("jobs",): 1, ("news",): 1}
    second.subscribers = {("prices",): 1, ("jobs",): 0, ("news",): 1}
    for _ in range(2):
        await group.report()
    assert logged == [("topics.split", {"topic": "prices", "workers": 2})]
    second.subscribers["jobs",] = 1
    await group.report()
    assert [fields["topic"] for _, fields in logged] == ["prices", "jobs"]


async def test_readiness_alone_names_a_silent_worker_too() -> None:
    group = Group()
    worker = group.add(1)
    group.collector.joined(worker.member, fail)
    report = await group.report(Depth.READINESS)
    assert report.readiness == {"warnings": ["worker 1: it does not answer"]}
    assert report.status == {}


async def test_counters_of_an_ended_worker_stay_in_the_sums() -> None:
    group = Group()
    worker = group.add(1)
    worker.requests = 10
    await group.report()
    group.collector.ended(worker.member.pid)
    del group.workers[1]
    report = await group.report()
    assert states(report) == {"coordinator": "serving"}
    assert report.status["requests"]["total"] == 10
    group.add(1).requests = 1
    report = await group.report()
    assert report.status["requests"]["total"] == 11
    assert report.series["zcproto_worker_requests_total"]["1",] == 11


async def test_disconnected_worker_is_listed_until_it_is_replaced() -> None:
    group = Group()
    worker = group.add(1)
    worker.requests = 10
    await group.report()
    group.collector.left(worker.member.pid)
    assert states(await group.report())["1"] == "silent"
    group.collector.joined(worker.member, worker.ask)  # again, by a new connection
    assert await group.total() == 10
    group.collector.left(worker.member.pid)
    group.add(1)
    report = await group.report()
    assert [line["pid"] for line in report.workers if line["worker"] == "1"] == [group.workers[1].member.pid]
    assert report.status["requests"]["total"] == 10


async def test_last_answer_of_a_drained_worker_counts() -> None:
    group = Group()
    worker = group.add(1)
    worker.requests = 10
    await group.report()
    worker.requests = 15
    group.collector.left(worker.member.pid, worker.reporter.last())
    group.collector.ended(worker.member.pid)
    assert await group.total() == 15
    group.collector.left(4711, b"")  # unknown
    group.collector.ended(4711)
    assert await group.total() == 15


async def test_worker_that_ends_after_its_replacement_has_joined_is_listed_no_longer() -> None:
    group = Group()
    old = group.add(1)
    old.requests = 10
    await group.report()
    old.requests = 12
    group.add(1)
    group.collector.left(old.member.pid, old.reporter.last())
    report = await group.report()
    assert [line["pid"] for line in report.workers if line["worker"] == "1"] == [group.workers[1].member.pid]
    assert report.status["requests"]["total"] == 12


async def test_last_answer_of_another_version_leaves_the_counters_of_before() -> None:
    group = Group()
    worker = group.add(1)
    worker.requests = 10
    await group.report()
    group.collector.left(worker.member.pid, await answer_other(b""))
    assert await group.total() == 10


async def test_worker_that_connects_again_is_asked_by_its_new_link_alone(tmp_path: Path) -> None:
    server = LinkServer(listen_unix(tmp_path / "link.sock", 4), Topics(), name="coordinator")
    group, path = Group(), tmp_path / "link.sock"
    group.collector.serve(server)
    await server.start()
    worker = Process(1, 4711)
    clients = []
    for _ in range(2):
        topics = Topics()
        worker.reporter.serve(topics)
        client = LinkClient(
            path, topics, name="1", facts=worker.member.facts, silence=TIMEOUT, random=lambda: 0.0
        )
        client.start()
        await client.ready(TIMEOUT)
        clients.append(client)
    store = LinkClient(path, Topics(), name="1", facts={"urgent": True}, silence=TIMEOUT, random=lambda: 0.0)
    store.start()
    await store.ready(TIMEOUT)
    await until(lambda: len(server.links) == 3)
    await clients[0].close()
    await until(lambda: len(server.links) == 2)
    assert states(await group.report()) == {"coordinator": "serving", "1": "serving"}
    await clients[1].close()
    await until(lambda: len(server.links) == 1)
    assert states(await group.report())["1"] == "silent"
    await store.close()
    await server.close()


async def test_next_coordinator_gets_the_counters_of_ended_processes() -> None:
    group = Group()
    for number in (1, 2, 3):
        group.add(number).requests = 10
    group.own.requests = 5
    await group.report()
    group.collector.ended(group.workers.pop(3).member.pid)
    assert await group.total() == 35
    for _ in range(3):  # each is killed after one report
        group.start()
        assert await group.total() == 35
    group.own.requests = 100
    assert await group.total() == 135
    group.start()
    assert await group.total() == 135


async def test_newest_counters_of_an_earlier_coordinator_count() -> None:
    group = Group()
    one, two = group.add(1), group.add(2)
    group.own.requests = 5
    await group.report()
    group.collector.joined(two.member, fail)  # it misses what the coordinator counts now
    group.own.requests = 7
    await group.report()
    group.start()
    group.collector.joined(one.member, fail)
    assert await group.total() == 5
    group.collector.joined(one.member, one.ask)
    assert await group.total() == 7


async def test_new_coordinator_waits_for_the_workers_before_it_reports_sums() -> None:
    group = Group()
    for number in (1, 2):
        group.add(number).requests = 10
    collector = Collector(4711, 2, group.clock)
    collector.read = group.own.read
    collector.joined(group.workers[1].member, group.workers[1].ask)
    reading = asyncio.create_task(collector.report())
    ready = await collector.report(Depth.READINESS)
    assert ready.readiness["ready"]
    assert not reading.done()
    collector.joined(group.workers[2].member, group.workers[2].ask)
    assert (await reading).status["requests"]["total"] == 20


async def test_worker_that_is_being_replaced_is_absent() -> None:
    group = Group()
    group.add(1), group.add(2)
    group.start()
    await group.report()
    group.collector.ended(group.workers[2].member.pid)
    report = await group.report()
    assert states(report) == {"coordinator": "serving", "1": "serving", "2": "absent"}
    assert report.workers[-1]["restarts"] == 3
    assert report.series["zcproto_worker_up"]["2",] == 0


STEPS = st.sampled_from(["work", "work", "collect", "collect", "replace", "restart"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS, st.integers(1, 3)), max_size=30))
def test_totals_never_go_backwards(steps: list[tuple[str, int]]) -> None:
    """Workers and coordinators end in any order, with a collection after each."""

    async def run() -> None:
        group = Group()
        for number in (1, 2, 3):
            group.add(number)
        before = await group.total()
        for step, number in steps:
            if step == "work":
                group.workers[number].requests += 1
                group.own.requests += 1
            elif step == "replace":
                group.collector.ended(group.workers[number].member.pid)
                group.add(number)
            elif step == "restart":
                group.start()
            total = await group.total()
            assert total >= before
            before = total

    asyncio.run(run())


async def test_worker_gets_the_report_of_all_from_the_coordinator() -> None:
    group = Group()
    (await group.ask_once(1)).requests = 10
    report = await RemoteFigures(group.collector.answer).report(Depth.STATS)
    assert report.stats == {"requests": 10}
    assert group.workers[1].reads == [Depth.STATS]


@pytest.mark.parametrize("ask", [fail, answer_other])
async def test_worker_without_coordinator_reports_that_it_is_unavailable(ask: Callable[[bytes], Any]) -> None:
    with pytest.raises(Unavailable, match="cannot be collected"):
        await RemoteFigures(ask).report()


async def test_report_that_does_not_fit_makes_a_worker_silent() -> None:
    group = Group()
    worker = group.add(1)
    worker.requests = 10
    await group.report()
    worker.reporter.read = lambda depth: Report({"requests": 1}, {}, {}, {})
    report = await group.report()
    assert states(report)["1"] == "silent"
    assert report.status["requests"]["total"] == 10


async def test_figures_are_collected_now_and_then_and_when_a_worker_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = Group()
    one, two = group.add(1), group.add(2)
    monkeypatch.setattr(figures, "POLL_S", 0)
    polling = asyncio.create_task(group.collector.run())
    while len(one.reads) < 5:
        await asyncio.sleep(0)
        group.clock.advance(FRESH_S)
    monkeypatch.setattr(figures, "POLL_S", 3600)
    group.collector.ended(two.member.pid)
    await asyncio.sleep(0)
    before = len(one.reads)
    while len(one.reads) == before:
        await asyncio.sleep(0)
        group.clock.advance(FRESH_S)
        group.collector.ended(two.member.pid)
    polling.cancel()
    await asyncio.gather(polling, return_exceptions=True)
