"""Test queues of messages: order, retries, bounds and shutdown, with a manual clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from tests.helpers import FakeClock
from tests.limits import TIMEOUT
from zcproto.alerts.sinks import (
    DOWN_AFTER,
    FIRST_DELAY_S,
    MAX_AGE_S,
    MAX_DELAY_S,
    QUEUED,
    SinkQueue,
    Undelivered,
)


class FakeSink:
    """A sink that fails a given number of times, then accepts every message."""

    name = "webhook"
    where = "nowhere"

    def __init__(self, *failures: BaseException | None) -> None:
        self.failures = list(failures)
        self.forever: BaseException | None = None
        self.taken: list[bytes] = []
        self.tried: list[bytes] = []
        self.hangs = False
        self.changed = asyncio.Event()

    async def deliver(self, body: bytes) -> str:
        self.tried.append(body)
        self.changed.set()
        if self.hangs:
            await asyncio.Event().wait()
        failure = self.failures.pop(0) if self.failures else self.forever
        if failure is not None:
            raise failure
        self.taken.append(body)
        return "fine"

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class QueueHarness:
    """A queue whose delays advance the clock without waiting."""

    def __init__(self, sink: FakeSink, random: float = 0.999_999) -> None:
        self.clock = FakeClock()
        self.sink = sink
        self.pauses: list[float] = []
        self.down: list[str] = []
        self.up = 0
        self.queue = SinkQueue(
            sink,
            clock=self.clock,
            random=lambda: random,
            on_down=lambda name, reason: self.down.append(f"{name}: {reason}"),
            on_up=self._is_up,
            sleep=self._sleep,
        )
        self.asleep: asyncio.Event | None = None

    def _is_up(self, name: str) -> None:
        self.up += 1

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.clock.advance(seconds)
        self.sink.changed.set()
        if self.asleep is not None:
            await self.asleep.wait()
        await asyncio.sleep(0)

    async def settle(self, lost: int = 0) -> None:
        """Wait until the queue is idle."""
        queue = self.queue
        async with asyncio.timeout(TIMEOUT):
            while len(queue) or queue.delivered + queue.lost < len({*self.sink.tried}) or queue.lost < lost:  # noqa: ASYNC110
                await asyncio.sleep(0)


def lost_lines(err: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "alert.lost"]


async def test_messages_are_delivered_in_order() -> None:
    harness = QueueHarness(FakeSink())
    harness.queue.put(b"1", "one")  # queued before the start
    harness.queue.start()
    for body in (b"2", b"3"):
        harness.queue.put(body, "more")
    await harness.sink.until(lambda: len(harness.sink.taken) == 3)
    await harness.queue.stop(TIMEOUT)
    assert harness.sink.taken == [b"1", b"2", b"3"]
    assert (harness.queue.delivered, harness.queue.lost, harness.queue.failures, len(harness.queue)) == (
        3,
        0,
        0,
        0,
    )


@pytest.mark.parametrize(("random", "part"), [(0.0, 0.5), (1.0, 1.0)])
async def test_failed_delivery_is_retried_with_backoff_in_order(random: float, part: float) -> None:
    harness = QueueHarness(FakeSink(*[Undelivered("busy")] * 9), random=random)
    harness.queue.start()
    harness.queue.put(b"1", "one")
    harness.queue.put(b"2", "two")
    await harness.sink.until(lambda: len(harness.sink.taken) == 2)
    await harness.queue.stop(TIMEOUT)
    assert harness.sink.tried == [*[b"1"] * 10, b"2"]
    assert harness.pauses == [part * min(FIRST_DELAY_S * 2**number, MAX_DELAY_S) for number in range(9)]


async def test_sink_is_down_after_failures_and_up_after_success() -> None:
    harness = QueueHarness(FakeSink(*[Undelivered("refused")] * (DOWN_AFTER + 1)))
    harness.queue.start()
    harness.queue.put(b"1", "one")
    await harness.sink.until(lambda: len(harness.sink.tried) == DOWN_AFTER + 1)
    assert harness.queue.is_down
    await harness.sink.until(lambda: len(harness.sink.taken) == 1)
    await harness.queue.stop(TIMEOUT)
    assert harness.down == ["webhook: refused"] * 2
    assert (harness.up, harness.queue.is_down) == (1, False)


async def test_few_failures_do_not_mark_sink_down() -> None:
    failures = [Undelivered("refused")] * (DOWN_AFTER - 1)
    harness = QueueHarness(FakeSink(*failures, None, *failures))
    harness.queue.start()
    harness.queue.put(b"1", "one")
    harness.queue.put(b"2", "two")
    await harness.sink.until(lambda: len(harness.sink.taken) == 2)
    await harness.queue.stop(TIMEOUT)
    assert (harness.down, harness.up) == ([], 0)


async def test_refused_message_is_dropped_and_next_is_delivered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    harness = QueueHarness(FakeSink(*[Undelivered("answered 400", tries=2)] * 2))
    harness.queue.start()
    harness.queue.put(b"1", "store.degraded began")
    harness.queue.put(b"2", "two")
    await harness.sink.until(lambda: harness.sink.taken == [b"2"])
    await harness.queue.stop(TIMEOUT)
    assert harness.queue.lost == 1
    (line,) = lost_lines(capsys.readouterr().err)
    assert (line["sink"], line["what"], line["reason"]) == ("webhook", "store.degraded began", "answered 400")


async def test_message_older_than_an_hour_is_dropped() -> None:
    harness = QueueHarness(FakeSink())
    harness.sink.forever = Undelivered("refused")
    harness.queue.start()
    harness.queue.put(b"1", "one")
    await harness.settle(lost=1)
    await harness.queue.stop(TIMEOUT)
    assert MAX_AGE_S <= sum(harness.pauses) <= MAX_AGE_S + MAX_DELAY_S


async def test_full_queue_drops_oldest(capsys: pytest.CaptureFixture[str]) -> None:
    harness = QueueHarness(FakeSink())
    for number in range(QUEUED + 100):
        harness.queue.put(str(number).encode(), f"message {number}")
    assert len(harness.queue) == QUEUED
    assert harness.queue.lost == 100
    harness.queue.start()
    await harness.queue.stop(TIMEOUT)
    assert harness.sink.taken == [str(number).encode() for number in range(100, QUEUED + 100)]
    lines = lost_lines(capsys.readouterr().err)
    assert {line["reason"] for line in lines} == {"the queue is full"}


async def test_exception_in_sink_does_not_stop_queue(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "Zk3v9QpX7mWc2LtR8sYb5NhJ"  # such as the last part of a webhook's address
    harness = QueueHarness(FakeSink(ValueError(f"cannot post to https://example.com/hooks/{secret}")))
    harness.queue.start()
    harness.queue.put(b"1", "one")
    harness.queue.put(b"2", "two")
    await harness.sink.until(lambda: harness.sink.taken == [b"2"])
    await harness.queue.stop(TIMEOUT)
    err = capsys.readouterr().err
    assert "alert.sink_failed" in err
    assert "cannot post to" in err
    assert secret not in err
    assert [line["reason"] for line in lost_lines(err)] == ["ValueError"]


# --- shutdown ----------------------------------------------------------------------------------------------------


async def test_stop_delivers_queued_messages() -> None:
    harness = QueueHarness(FakeSink())
    harness.queue.start()
    for number in range(20):
        harness.queue.put(b"%d" % number, "more")
    await harness.queue.stop(TIMEOUT)
    assert len(harness.sink.taken) == 20


async def test_stop_does_not_wait_for_retry() -> None:
    harness = QueueHarness(FakeSink())
    harness.sink.forever = Undelivered("refused")
    harness.asleep = asyncio.Event()  # a delay that never ends
    harness.queue.start()
    for number in range(3):
        harness.queue.put(b"%d" % number, "more")
    await harness.sink.until(lambda: bool(harness.pauses))
    await harness.queue.stop(TIMEOUT)
    assert harness.queue.lost == 3
    assert harness.sink.tried == [b"0", b"0", b"1", b"2"]


async def test_stop_does_not_wait_for_hanging_sink(capsys: pytest.CaptureFixture[str]) -> None:
    harness = QueueHarness(FakeSink())
    harness.sink.hangs = True
    harness.queue.start()
    for number in range(3):
        harness.queue.put(b"%d" % number, f"message {number}")
    await harness.sink.until(lambda: len(harness.sink.tried) == 1)
    await harness.queue.stop(0.05)
    lines = lost_lines(capsys.readouterr().err)
    assert [(line["what"], line["reason"]) for line in lines] == [
        (f"message {number}", "the server ends") for number in range(3)
    ]
    assert harness.queue.lost == 3


async def test_queue_never_started_loses_messages() -> None:
    harness = QueueHarness(FakeSink())
    harness.queue.put(b"1", "one")
    await harness.queue.stop(TIMEOUT)
    assert (harness.queue.lost, harness.sink.tried) == (1, [])


async def test_stop_leaves_no_task() -> None:
    harness = QueueHarness(FakeSink(*[Undelivered("busy")] * 2))
    before = asyncio.all_tasks()
    harness.queue.start()
    harness.queue.put(b"1", "one")
    await harness.sink.until(lambda: bool(harness.sink.taken))
    await harness.queue.stop(TIMEOUT)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
