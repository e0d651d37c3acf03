"""The event stream of a client."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from tests.client.helpers import scripted, turns
from zcproto.client.handlers import MAX_EVENT_BYTES, MAX_EVENTS, Event, EventStream
from zcproto.wire.message import encode_body


@scripted
async def test_events_arrive_in_order() -> None:
    stream = EventStream()
    stream.put(encode_body(["a", 1]))
    stream.put(encode_body(["b", 2]))
    assert [await anext(stream), await anext(stream)] == [("a", 1), ("b", 2)]
    waiting = asyncio.create_task(stream.__anext__())
    await turns()
    assert not waiting.done()
    stream.put(encode_body(["c", 3]))
    assert await waiting == ("c", 3)


@scripted
async def test_closed_stream_ends_after_queued_events() -> None:
    stream = EventStream()
    stream.put(encode_body(["a", 1]))
    stream.close()
    assert [event async for event in stream] == [("a", 1)]
    assert [event async for event in stream] == []


@scripted
async def test_closed_stream_ends_all_readers() -> None:
    stream = EventStream()

    async def read() -> list[Event]:
        return [event async for event in stream]

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await turns()
    stream.close()
    assert await asyncio.gather(*readers) == [[], [], []]


@scripted
async def test_full_stream_drops_and_counts_the_oldest() -> None:
    stream = EventStream()
    for number in range(MAX_EVENTS + 5):
        stream.put(encode_body(["a", number]))
    assert stream.dropped == 5
    assert await anext(stream) == ("a", 5)


@scripted
async def test_large_events_are_limited_by_bytes() -> None:
    stream = EventStream()
    body = encode_body(["a", bytes(MAX_EVENT_BYTES // 4)])
    for _ in range(10):
        stream.put(body)
    assert stream.dropped == 7
    for _ in range(3):
        await anext(stream)
    for _ in range(3):
        stream.put(body)
    assert stream.dropped == 7  # events that were read do not count


@scripted
async def test_event_larger_than_the_limit_is_kept_alone() -> None:
    stream = EventStream()
    stream.put(encode_body(["a", 1]))
    stream.put(encode_body(["b", bytes(MAX_EVENT_BYTES)]))
    assert stream.dropped == 1
    assert (await anext(stream)).name == "b"


@scripted
async def test_queued_events_take_no_more_memory_than_their_bodies() -> None:
    stream = EventStream()
    body = encode_body(["a", [{}] * 60_000])
    tracemalloc.start()
    try:
        for _ in range(100):
            stream.put(bytes(bytearray(body)))
        assert tracemalloc.get_traced_memory()[0] < MAX_EVENT_BYTES + 100_000
    finally:
        tracemalloc.stop()


@scripted
async def test_each_event_goes_to_one_reader() -> None:
    stream = EventStream()
    readers = [asyncio.create_task(stream.__anext__()) for _ in range(2)]
    await turns()
    stream.put(encode_body(["a", 1]))
    stream.put(encode_body(["b", 2]))
    assert await asyncio.gather(*readers) == [("a", 1), ("b", 2)]


@scripted
async def test_cancelled_reader_loses_no_event() -> None:
    stream = EventStream()
    first, second, third = (asyncio.create_task(stream.__anext__()) for _ in range(3))
    await turns()
    first.cancel()
    await turns()
    stream.put(encode_body(["a", 1]))
    second.cancel()  # in the turn in which it was woken
    assert await third == ("a", 1)
    assert first.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await second


@scripted
async def test_reader_waits_again_if_another_took_the_event() -> None:
    stream = EventStream()
    waiting = asyncio.create_task(stream.__anext__())
    await turns()
    stream.put(encode_body(["a", 1]))
    assert await anext(stream) == ("a", 1)
    await turns()
    assert not waiting.done()
    stream.put(encode_body(["b", 2]))
    assert await waiting == ("b", 2)
