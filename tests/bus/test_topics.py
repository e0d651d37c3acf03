"""The topics of several processes over a carrier in memory, which loses what a real one may lose."""

from __future__ import annotations

import random
from collections import deque

import pytest

from zcproto.bus.topics import EVENTS_PER_S, MAX_WAITING, SharedTopics
from zcproto.common.rates import BURST_S
from zcproto.errors import ResourceExhausted


class LocalTopic:
    """The subscribers of one process."""

    def __init__(self) -> None:
        self.name = "news"
        self.carrier: SharedTopics | None = None
        self.received: list[bytes] = []
        self.missed = 0

    def receive(self, body: bytes | None, missed: int = 0) -> None:
        self.missed += missed
        if body is not None:
            self.received.append(body)


class Process:
    """A process, and its end of the carrier. What it sends and receives waits until `step`."""

    unreadable = 0

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.topic = LocalTopic()
        self.now = 0.0
        self.topics = SharedTopics(self, lambda: self.now)
        self.topics.add(self.topic)
        self.waiting = 0
        self.published: list[bytes] = []
        self.sent: deque[tuple[int, bytes | None]] = deque()
        self.arriving: deque[tuple[bytes, int, int, bytes | None, bool]] = deque()
        self.is_following = False

    async def start(self, topics: SharedTopics) -> None: ...
    async def stop(self) -> None: ...

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        self.sent.append((lost, body))

    def follow(self, name: str) -> None:
        self.is_following = True
        self.topics.at(name, self.medium.epoch, self.medium.number)

    def unfollow(self, name: str) -> None:
        self.is_following = False

    def say(self, body: bytes) -> None:
        self.topics.publish("news", body)
        self.published.append(body)

    def cut(self) -> None:
        """Lose the connection, with all that was on its way."""
        self.is_following = False
        self.sent.clear()
        self.arriving.clear()
        self.topics.down()

    def step(self) -> None:
        if self.sent:
            self.medium.number_message(self, *self.sent.popleft())
        elif self.arriving:
            epoch, number, lost, body, is_own = self.arriving.popleft()
            if is_own:
                self.topics.acknowledged("news", 1)
            self.topics.received("news", epoch, number, lost, body, is_own=is_own)


class Medium:
    """The numbers of a topic, and the processes."""

    def __init__(self, processes: int) -> None:
        self.epoch = b"1"
        self.number = 0
        self.processes = [Process(self) for _ in range(processes)]

    def number_message(self, sender: Process, lost: int, body: bytes | None) -> None:
        self.number += lost + (body is not None)
        for each in self.processes:
            if each.is_following or each is sender:
                each.arriving.append((self.epoch, self.number, lost, body, each is sender))

    def settle(self) -> None:
        while any(each.sent or each.arriving for each in self.processes):
            for each in self.processes:
                each.step()


def medium_of(processes: int) -> Medium:
    """Return a medium whose processes are connected and follow the topic."""
    medium = Medium(processes)
    for each in medium.processes:
        each.topics.follow("news")
        each.topics.up()
    return medium


def test_events_reach_all_other_processes_in_order() -> None:
    medium = medium_of(3)
    first, second, third = medium.processes
    first.say(b"a")
    second.say(b"b")
    medium.settle()
    assert third.topic.received == [b"a", b"b"]
    assert (first.topic.received, second.topic.received) == ([b"b"], [b"a"])
    assert [each.topic.missed for each in medium.processes] == [0, 0, 0]


def test_event_published_without_the_carrier_is_missed_by_others() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    first.cut()
    first.say(b"a")
    first.say(b"b")
    first.topics.up()
    first.say(b"c")
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([b"c"], 2)
    assert (first.topic.missed, first.topics.lost) == (0, 2)


def test_lost_events_are_reported_without_another_event() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    first.cut()
    first.say(b"a")
    first.topics.up()
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([], 1)


def test_event_that_was_not_acknowledged_counts_as_lost() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    first.say(b"a")
    first.cut()
    first.topics.up()
    medium.settle()
    assert second.topic.missed == 1


def test_failed_message_is_reported_with_the_next_one() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    first.say(b"a")
    first.sent.clear()
    first.topics.failed("news")
    first.say(b"b")
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([b"b"], 1)


def test_process_that_follows_again_has_missed_what_came_between() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    second.cut()
    first.say(b"a")
    first.say(b"b")
    medium.settle()
    second.topics.up()
    first.say(b"c")
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([b"c"], 2)


def test_new_subscriber_has_missed_nothing() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    second.topics.unfollow("news")
    first.say(b"a")
    medium.settle()
    second.topics.follow("news")
    first.say(b"b")
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([b"b"], 0)


@pytest.mark.parametrize("is_cut", [True, False])
def test_numbers_begin_again_with_another_epoch(is_cut: bool) -> None:
    medium = medium_of(2)
    first, second = medium.processes
    first.say(b"a")
    medium.settle()
    medium.epoch, medium.number = b"2", 0
    if is_cut:
        second.cut()
    medium.number_message(first, 0, b"b")
    first.arriving.clear()
    if is_cut:
        second.topics.up()
    medium.settle()
    assert second.topic.missed == is_cut
    assert second.topic.received == ([b"a"] if is_cut else [b"a", b"b"])


def test_event_before_the_number_of_a_topic_is_delivered() -> None:
    """A store confirms a subscription before it returns the number: an event may come between."""
    process = Medium(1).processes[0]
    process.topics.follow("news")
    process.topics.received("news", b"1", 7, 0, b"a", is_own=False)
    process.topics.at("news", b"1", 7)
    process.topics.received("news", b"1", 9, 0, b"c", is_own=False)
    assert (process.topic.received, process.topic.missed) == ([b"a", b"c"], 1)


def test_number_that_a_failover_took_back_counts_nothing_as_missed() -> None:
    process = medium_of(1).processes[0]
    for number in (1, 2, 2, 3):
        process.topics.received("news", b"1", number, 0, b"%d" % number, is_own=False)
    assert (process.topic.received, process.topic.missed) == ([b"1", b"2", b"2", b"3"], 0)


def test_topic_without_subscribers_gets_nothing() -> None:
    medium = medium_of(2)
    first, second = medium.processes
    second.topics.unfollow("news")
    second.topics.received("news", b"1", 5, 0, b"late", is_own=False)
    second.topics.received("other", b"1", 5, 0, b"unknown", is_own=False)
    second.topics.at("other", b"1", 5)
    first.say(b"a")
    medium.settle()
    assert (second.topic.received, second.topic.missed) == ([], 0)


def test_publishing_too_fast_is_refused_and_counted() -> None:
    process = medium_of(1).processes[0]
    for _ in range(int(EVENTS_PER_S * BURST_S)):
        process.say(b"a")
    with pytest.raises(ResourceExhausted, match="topic news: too many events") as refused:
        process.say(b"b")
    assert refused.value.details["retry_after_ms"] > 0
    assert process.topics.refused == 1
    process.now += 1.0
    process.say(b"b")


@pytest.mark.parametrize("waiting", [MAX_WAITING, MAX_WAITING - 1])
def test_events_that_wait_are_bounded_in_bytes(waiting: int) -> None:
    process = medium_of(1).processes[0]
    process.waiting = waiting
    if waiting == MAX_WAITING:
        with pytest.raises(ResourceExhausted):
            process.say(b"a")
    else:
        process.say(b"a")
    assert len(process.sent) == (waiting < MAX_WAITING)


async def test_stop_gives_the_topics_back() -> None:
    process = medium_of(1).processes[0]
    assert process.topic.carrier is process.topics
    await process.topics.start()
    await process.topics.stop()
    assert process.topic.carrier is None
    assert not process.topics.is_up


@pytest.mark.parametrize("seed", range(100))
def test_each_event_is_received_once_in_order_or_counts_as_missed(seed: int) -> None:
    """Publish, deliver and cut connections at random; then let everything settle."""
    chance = random.Random(seed)
    medium = medium_of(3)
    for step in range(chance.randrange(1, 120)):
        process = chance.choice(medium.processes)
        action = chance.random()
        if action < 0.35:
            process.say(b"%d" % step)
        elif action < 0.9:
            process.step()
        elif process.topics.is_up:
            process.cut()
        else:
            process.topics.up()
    for process in medium.processes:
        if not process.topics.is_up:
            process.topics.up()
    medium.settle()
    for process in medium.processes:
        others = {body for each in medium.processes if each is not process for body in each.published}
        received = process.topic.received
        assert set(received) <= others
        assert len(received) == len(set(received))
        for other in medium.processes:
            from_it = [body for body in received if body in other.published]
            assert from_it == sorted(from_it, key=other.published.index)
        assert len(received) + process.topic.missed >= len(others)
