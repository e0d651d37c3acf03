"""The stream of events that an application reads."""

from __future__ import annotations

import asyncio

import pytest

from tests.client.helpers import scripted, turns
from zcproto.client.events import MAX_EVENTS, Event, EventStream


@scripted
async def test_events_come_in_their_order_and_are_awaited() -> None:
    stream = EventStream()
    stream.put(Event("a", 1))
    stream.put(Event("b", 2))
    assert [await anext(stream), await anext(stream)] == [("a", 1), ("b", 2)]
    waiting = asyncio.create_task(stream.__anext__())
    await turns()
    assert not waiting.done()
    stream.put(Event("c", 3))
    assert await waiting == ("c", 3)


@scripted
async def test_the_stream_ends_when_it_is_closed_after_what_was_left_in_it() -> None:
    stream = EventStream()
    stream.put(Event("a", 1))
    stream.close()
    assert [event async for event in stream] == [("a", 1)]
    assert [event async for event in stream] == []


@scripted
async def test_all_who_wait_are_told_of_the_end() -> None:
    stream = EventStream()

    async def read() -> list[Event]:
        return [event async for event in stream]

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await turns()
    stream.close()
    assert await asyncio.gather(*readers) == [[], [], []]


@scripted
async def test_the_oldest_make_room_and_are_counted() -> None:
    stream = EventStream()
    for number in range(MAX_EVENTS + 5):
        stream.put(Event("a", number))
    assert stream.dropped == 5
    assert await anext(stream) == ("a", 5)


@scripted
async def test_each_event_goes_to_one_reader() -> None:
    stream = EventStream()
    readers = [asyncio.create_task(stream.__anext__()) for _ in range(2)]
    await turns()
    stream.put(Event("a", 1))
    stream.put(Event("b", 2))
    assert await asyncio.gather(*readers) == [("a", 1), ("b", 2)]


@scripted
async def test_a_reader_that_is_cancelled_takes_no_event_with_it() -> None:
    stream = EventStream()
    first, second, third = (asyncio.create_task(stream.__anext__()) for _ in range(3))
    await turns()
    first.cancel()
    await turns()
    stream.put(Event("a", 1))
    second.cancel()  # in the turn in which it was woken
    assert await third == ("a", 1)
    assert first.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await second


@scripted
async def test_one_who_was_woken_for_an_event_that_another_took_waits_again() -> None:
    stream = EventStream()
    waiting = asyncio.create_task(stream.__anext__())
    await turns()
    stream.put(Event("a", 1))
    assert await anext(stream) == ("a", 1)
    await turns()
    assert not waiting.done()
    stream.put(Event("b", 2))
    assert await waiting == ("b", 2)
