"""Tests of topics without a server: order, policies, bounds, slices of the loop, threads."""

from __future__ import annotations

import asyncio
import gc
import threading
import tracemalloc
from dataclasses import dataclass
from typing import Any, cast

import pytest

from zcproto.app.app import App
from zcproto.app.topics import KEPT_BYTES, SUBSCRIBERS_PER_TURN, Subscription, Topic
from zcproto.common.roles import OPERATORS
from zcproto.errors import Cancelled, InvalidArgument, ResourceExhausted
from zcproto.wire.frame import MIN_LENGTH
from zcproto.wire.message import MessageError, encode_body


class Reader:
    """A subscriber that reads in a task of its own."""

    def __init__(self, topic: Topic, until: asyncio.Event | None = None) -> None:
        self.values: list[Any] = []
        self.task = asyncio.create_task(self._read(topic.subscribe(until)))

    async def _read(self, events: Subscription) -> None:
        with events:
            async for event in events:
                self.values.append(event.value)


async def turns(number: int = 4) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def taken(events: Subscription, number: int) -> list[Any]:
    return [(await anext(events)).value for _ in range(number)]


async def test_every_subscriber_gets_every_event_in_order() -> None:
    topic = Topic("jobs")
    readers = [Reader(topic) for _ in range(3)]
    await turns()
    for number in range(10):
        topic.publish(number)
        await turns(number % 3)
    await turns()
    assert [reader.values for reader in readers] == [list(range(10))] * 3
    assert (topic.published, topic.dropped, topic.subscribers) == (10, 0, 3)
    for reader in readers:
        reader.task.cancel()
    await turns()
    assert topic.subscribers == 0


async def test_subscription_begins_with_the_next_event() -> None:
    topic = Topic("jobs")
    topic.publish(1)
    with topic.subscribe() as events:
        topic.publish(2)
        assert await taken(events, 1) == [2]


async def test_slow_subscriber_misses_the_oldest_events() -> None:
    topic = Topic("jobs", keep=3)
    with topic.subscribe() as events:
        for number in range(10):
            topic.publish(number)
        assert await taken(events, 3) == [7, 8, 9]
        topic.publish(10)
        assert await taken(events, 1) == [10]
    assert (topic.dropped, topic.ended) == (7, 0)


async def test_slow_subscriber_is_cancelled_if_the_policy_is_end() -> None:
    topic = Topic("jobs", keep=3, slow="end")
    with topic.subscribe() as events, topic.subscribe() as fast:
        topic.publish(0)
        assert await taken(events, 1) == await taken(fast, 1) == [0]
        for number in range(1, 5):
            topic.publish(number)
            assert await taken(fast, 1) == [number]
        with pytest.raises(Cancelled, match="missed 1 events") as raised:
            await anext(events)
    assert raised.value.details == {"reason": "slow"}
    assert (topic.dropped, topic.ended) == (1, 1)


async def test_kept_events_are_bounded_in_bytes() -> None:
    topic = Topic("jobs", keep=100)
    with topic.subscribe() as events:
        for number in range(10):
            topic.publish(bytes([number]) * 20_000)
        assert [value[0] for value in await taken(events, 3)] == [7, 8, 9]


async def test_event_that_no_item_can_carry_is_refused() -> None:
    topic = Topic("jobs")
    largest = bytes(KEPT_BYTES - MIN_LENGTH - len(encode_body(bytes(60_000))) + 60_000)
    with topic.subscribe() as events:
        topic.publish(largest)
        assert await taken(events, 1) == [largest]
        with pytest.raises(MessageError, match="at most 65472 fit"):
            topic.publish(largest + b"x")
        with pytest.raises(MessageError):
            topic.publish(object())
    assert topic.published == 1


@dataclass
class JobEvent:
    id: int
    state: str = "waits"


async def test_event_of_another_type_is_refused() -> None:
    topic = Topic("jobs", of=JobEvent)
    with topic.subscribe() as events:
        for value, fault in (
            ({"id": "7"}, "event.id must be an int"),
            ({"id": 7, "user": "ada"}, "event.user is unknown"),
            (7, "event must be a map"),
        ):
            with pytest.raises(TypeError, match=f"topic jobs: {fault}"):
                topic.publish(value)
        topic.publish({"id": 7})
        assert (await anext(events)).body == encode_body({"id": 7, "state": "waits"})
        topic.publish(JobEvent(8))
        assert (await anext(events)).body == encode_body({"id": 8, "state": "waits"})
    assert topic.published == 2
    with pytest.raises(TypeError, match="topic jobs: of: Topic cannot be used"):
        App().topic("jobs", of=Topic)


async def test_body_is_shared_by_all_subscribers() -> None:
    topic = Topic("jobs")
    with topic.subscribe() as one, topic.subscribe() as other:
        topic.publish({"id": 7})
        event = await anext(one)
        assert event is await anext(other)
        assert event.body == encode_body({"id": 7})


async def test_subscribers_that_do_not_read_take_no_memory_for_events() -> None:
    topic = Topic("jobs")
    stuck = [topic.subscribe() for _ in range(1_000)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(100):
        topic.publish(bytes([number]) * 10_000)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2 * KEPT_BYTES
    for events in stuck:
        events.__exit__()


async def test_one_turn_of_the_loop_wakes_few_of_10000_subscribers() -> None:
    topic = Topic("jobs")
    readers = [Reader(topic) for _ in range(10_000)]
    await turns()
    woken = []
    for turn in range(10_000 // SUBSCRIBERS_PER_TURN + 20):
        if turn < 5:  # publications do not add up
            topic.publish(turn)
        before = sum(bool(reader.values) for reader in readers)
        await turns(1)
        woken.append(sum(bool(reader.values) for reader in readers) - before)
    assert max(woken) <= SUBSCRIBERS_PER_TURN
    assert all(reader.values == list(range(5)) for reader in readers)
    for reader in readers:
        reader.task.cancel()
    await turns()


async def test_subscription_ends_when_the_server_stops_and_after_the_last_event() -> None:
    topic, stopping = Topic("jobs"), asyncio.Event()
    reader, endless = Reader(topic, stopping), Reader(topic)
    await turns()
    topic.publish(1)
    stopping.set()
    await turns()
    assert (reader.values, reader.task.done(), endless.task.done()) == ([1], True, False)
    endless.task.cancel()
    await turns()
    assert len(asyncio.all_tasks()) == 1


async def test_watcher_of_an_until_ends_with_its_last_subscription() -> None:
    topic, shared = Topic("jobs"), asyncio.Event()
    with topic.subscribe(shared) as stays:
        for _ in range(10):
            with topic.subscribe(asyncio.Event()), topic.subscribe(shared):
                await turns()
                assert len(asyncio.all_tasks()) == 3
        await turns()
        assert len(asyncio.all_tasks()) == 2
        shared.set()
        with pytest.raises(StopAsyncIteration):
            await anext(stays)
    await turns()
    assert len(asyncio.all_tasks()) == 1


async def test_subscribers_that_left_are_neither_woken_nor_kept() -> None:
    topic, stopping = Topic("jobs"), asyncio.Event()
    for _ in range(3):
        readers = [Reader(topic, stopping) for _ in range(2)]
        await turns()
        topic.publish(1)
        for reader in readers:
            reader.task.cancel()
        await turns()
        assert topic.subscribers == 0
        assert [reader.values for reader in readers] == [[], []]
    topic.publish(2)
    assert len(asyncio.all_tasks()) == 1


async def test_cancelled_waits_are_not_kept() -> None:
    topic = Topic("jobs")
    with topic.subscribe() as events:
        for _ in range(100):
            waiting = asyncio.ensure_future(anext(events))
            await turns(1)
            waiting.cancel()
            await turns(1)
        assert len(topic._waiting) <= 3
        topic.publish(1)
        assert await taken(events, 1) == [1]


async def test_publish_from_another_thread_names_call_soon_threadsafe() -> None:
    topic = Topic("jobs")
    loop, errors = asyncio.get_running_loop(), []

    def publish() -> None:
        try:
            topic.publish(1)
        except RuntimeError as error:
            errors.append(str(error))
        loop.call_soon_threadsafe(topic.publish, 2)

    with topic.subscribe() as events:
        thread = threading.Thread(target=publish)
        thread.start()
        assert await taken(events, 1) == [2]
        thread.join()
    assert "call_soon_threadsafe(topic.publish, event)" in errors[0]


def test_topic_has_subscribers_in_one_event_loop_only() -> None:
    topic = Topic("jobs")

    async def subscribe() -> Subscription:
        return topic.subscribe()

    async def publish() -> None:
        topic.publish(1)

    events = asyncio.run(subscribe())
    with pytest.raises(RuntimeError, match="share one event loop"):
        asyncio.run(subscribe())
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(publish())
    events.__exit__()
    asyncio.run(subscribe()).__exit__()


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1_025}, {"slow": "wait"}, {"scope": "all"}])
def test_unknown_policy_or_bound_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="topic jobs: "):
        App().topic("jobs", **options)


def test_topic_is_registered_as_a_stream() -> None:
    app = App()
    topic = app.topic("jobs", roles=OPERATORS)
    (method,) = app
    assert (method.name, method.shape, method.roles, method.topic) == ("jobs", "server", OPERATORS, topic)
    with pytest.raises(ValueError, match="registered twice"):
        app.topic("jobs")


async def test_missed_events_of_other_processes_are_counted_before_the_next_one() -> None:
    topic = Topic("news")
    with topic.subscribe() as events, topic.subscribe() as others:
        topic.receive(b"\x01")
        assert [(await anext(each)).value for each in (events, others)] == [1, 1]
        topic.receive(None, 2)
        topic.receive(b"\x02", 1)
        found = [await anext(each) for each in (events, others)]
        assert [(event.value, event.missed) for event in found] == [(2, 3), (2, 3)]
        assert (events.missed, topic.dropped, topic.published) == (3, 6, 2)
        topic.publish(3)
        assert (await anext(events)).missed == 0


async def test_slow_subscriber_counts_what_the_carrier_has_lost_too() -> None:
    topic = Topic("news", keep=2)
    with topic.subscribe() as events:
        for number in range(4):
            topic.receive(bytes([number]), missed=number % 2)
        event = await anext(events)
        assert (event.value, event.missed, event.position) == (2, 3, 3)
        event = await anext(events)
        assert (event.value, event.missed) == (3, 1)


async def test_missed_event_alone_ends_a_subscriber_whose_policy_is_end() -> None:
    topic = Topic("news", slow="end")
    with topic.subscribe() as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        topic.receive(None, 1)
        with pytest.raises(Cancelled, match="missed 1 event"):
            await waiting
    assert (topic.dropped, topic.ended) == (1, 1)


async def test_missed_event_alone_does_not_wake_other_subscribers_for_good() -> None:
    topic, stopping = Topic("news"), asyncio.Event()
    with topic.subscribe(until=stopping) as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        topic.receive(None, 1)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        stopping.set()
        with pytest.raises(StopAsyncIteration):
            await waiting


async def test_value_of_another_process_has_the_type_of_the_topic() -> None:
    topic = Topic("orders", of=JobEvent)
    with topic.subscribe() as events:
        topic.receive(encode_body({"id": 2, "state": "runs"}))
        topic.receive(encode_body({"id": "x"}))
        assert (await anext(events)).value == JobEvent(2, "runs")
        event = await anext(events)
        with pytest.raises(InvalidArgument):
            event.value  # noqa: B018  it is decoded now


class Carrier:
    """A carrier that refuses events if it is full."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.is_full = False

    def publish(self, name: str, body: bytes) -> None:
        if self.is_full:
            raise ResourceExhausted("full")
        self.calls.append(("publish", name, body))

    def follow(self, name: str) -> None:
        self.calls.append(("follow", name))

    def unfollow(self, name: str) -> None:
        self.calls.append(("unfollow", name))


async def test_topic_is_followed_while_it_has_subscribers() -> None:
    topic, carrier = Topic("news", scope="server"), Carrier()
    topic.carrier = cast("Any", carrier)
    with topic.subscribe() as first, topic.subscribe():
        topic.publish(1)
        assert (await anext(first)).value == 1
    assert carrier.calls == [("follow", "news"), ("publish", "news", b"\x01"), ("unfollow", "news")]


async def test_event_that_the_carrier_refuses_reaches_no_subscriber() -> None:
    topic, carrier = Topic("news", scope="server"), Carrier()
    topic.carrier = cast("Any", carrier)
    with topic.subscribe() as events:
        carrier.is_full = True
        with pytest.raises(ResourceExhausted):
            topic.publish(1)
        carrier.is_full = False
        topic.publish(2)
        event = await anext(events)
        assert (event.value, event.missed) == (2, 0)
