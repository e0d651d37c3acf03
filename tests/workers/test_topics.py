"""Topics of several workers over real links to a coordinator, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.helpers import until
from tests.limits import TIMEOUT
from tests.sessions.helpers import CountedEntropy
from zcproto.app.topics import Subscription, Topic
from zcproto.bus import topics as bus
from zcproto.bus.topics import SharedTopics
from zcproto.common.clock import system_clock
from zcproto.common.unix_socket import listen_unix
from zcproto.workers import topics as workers
from zcproto.workers.link import Link, LinkServer, Topics
from zcproto.workers.topics import FOLLOW, TopicHub, WorkerTopics


class Worker:
    """A worker: its topic and a subscriber of it."""

    def __init__(self, path: Path, number: int) -> None:
        self.carrier = WorkerTopics(path, name=f"worker {number}", silence=TIMEOUT, random=lambda: 0.0)
        self.topics = SharedTopics(self.carrier, system_clock.now)
        self.topic = Topic("news", scope="server", keep=1_024)
        self.topics.add(self.topic)
        self.events: Subscription = self.topic.subscribe()

    async def next(self, count: int = 1) -> list[object]:
        return [(await anext(self.events)).value for _ in range(count)]


class Fleet:
    """A coordinator with its own topic, and workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entropy = CountedEntropy()
        self.workers: list[Worker] = []

    async def start(self, workers: int = 2) -> None:
        self.hub = TopicHub(self.entropy)
        self.server = LinkServer(listen_unix(self.path, 16), Topics(), name="coordinator")
        self.hub.serve(self.server)
        follow, following = self.server.topics.notices[FOLLOW], list[Link]()
        self.server.topics.notices[FOLLOW] = lambda link, name: (follow(link, name), following.append(link))
        await self.server.start()
        self.topic = Topic("news", scope="server")
        self.topics = SharedTopics(self.hub, system_clock.now)
        self.topics.add(self.topic)
        await self.topics.start()
        for number in range(len(self.workers), workers):
            self.workers.append(Worker(self.path, number))
            await self.workers[-1].topics.start()
        await until(lambda: len(following) == workers)

    async def stop(self) -> None:
        await self.topics.stop()
        await self.server.close()


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path / "link.sock")
    await fleet.start()
    yield fleet
    for worker in fleet.workers:
        await worker.topics.stop()
    await fleet.stop()


async def test_event_reaches_the_subscribers_of_all_workers_once(fleet: Fleet) -> None:
    first, second = fleet.workers
    for number in range(100):
        first.topic.publish(number)
    second.topic.publish("end")
    assert await first.next(101) == [*range(100), "end"]
    assert sorted(map(str, await second.next(101))) == sorted(map(str, [*range(100), "end"]))
    assert (first.events.missed, second.events.missed) == (0, 0)


async def test_event_of_the_coordinator_reaches_all_workers(fleet: Fleet) -> None:
    fleet.topic.publish("a")
    assert [await worker.next() for worker in fleet.workers] == [["a"], ["a"]]


async def test_new_coordinator_reports_what_was_published_without_one(fleet: Fleet) -> None:
    first, second = fleet.workers
    await fleet.stop()
    await until(lambda: not first.topics.is_up and not second.topics.is_up)
    first.topic.publish("to the first one alone")
    assert await first.next() == ["to the first one alone"]
    await fleet.start()
    first.topic.publish("a")
    assert await second.next() == ["a"]
    assert (first.events.missed, second.events.missed) == (0, 1)


async def test_worker_without_subscribers_gets_nothing_and_publishes_all_the_same(fleet: Fleet) -> None:
    first, second = fleet.workers
    second.topic.leave(None)
    second.topic.publish("a")
    assert await first.next() == ["a"]
    published = second.topic.published
    first.topic.publish("b")
    second.topic.publish("c")
    assert await first.next(2) == ["b", "c"]
    assert second.topic.published == published + 1


async def test_worker_that_does_not_read_misses_events(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = fleet.workers
    monkeypatch.setattr(workers, "MAX_WAITING", -1)
    first.topic.publish("lost")
    await until(lambda: fleet.hub.dropped == 1)
    monkeypatch.setattr(workers, "MAX_WAITING", bus.MAX_WAITING)
    first.topic.publish("a")
    event = await anext(second.events)
    assert (event.value, event.missed) == ("a", 1)


async def test_lost_worker_is_not_followed_any_more(fleet: Fleet) -> None:
    first, second = fleet.workers
    await second.topics.stop()
    await until(lambda: len(fleet.server.links) == 1)
    second.topic.publish("alone")
    first.topic.publish("a")
    assert await first.next() == ["a"]
    assert await second.next() == ["alone"]
    await asyncio.sleep(0)
