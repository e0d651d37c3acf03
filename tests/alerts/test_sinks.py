"""Queues of messages: order, tries again, bounds, and the end. Time goes by only where a test says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from tests.helpers import FakeClock
from zcproto.alerts.sinks import (
    DOWN_AFTER,
    FIRST_DELAY_S,
    MAX_AGE_S,
    MAX_DELAY_S,
    QUEUED,
    SinkQueue,
    Undelivered,
)

SOON = 30.0


class FakeSink:
    """Fails as often as it is told, then takes all."""

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
        async with asyncio.timeout(SOON):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Desk:
    """A queue whose pauses move the clock and take no time."""

    def __init__(self, sink: FakeSink) -> None:
        self.clock = FakeClock()
        self.sink = sink
        self.pauses: list[float] = []
        self.down: list[str] = []
        self.up = 0
        self.queue = SinkQueue(
            sink,
            clock=self.clock,
            random=lambda: 0.999_999,
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
        """Wait until nothing is left to be done."""
        queue = self.queue
        async with asyncio.timeout(SOON):
            while len(queue) or queue.delivered + queue.lost < len({*self.sink.tried}) or queue.lost < lost:  # noqa: ASYNC110
                await asyncio.sleep(0)


def lost_lines(err: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "alert.lost"]


async def test_messages_go_out_in_their_order() -> None:
    desk = Desk(FakeSink())
    desk.queue.put(b"1", "one")  # before the start, it waits
    desk.queue.start()
    for body in (b"2", b"3"):
        desk.queue.put(body, "more")
    await desk.sink.until(lambda: len(desk.sink.taken) == 3)
    await desk.queue.stop(SOON)
    assert desk.sink.taken == [b"1", b"2", b"3"]
    assert (desk.queue.delivered, desk.queue.lost, desk.queue.failures, len(desk.queue)) == (3, 0, 0, 0)


async def test_it_is_tried_again_after_growing_pauses_and_in_order() -> None:
    desk = Desk(FakeSink(*[Undelivered("busy")] * 9))
    desk.queue.start()
    desk.queue.put(b"1", "one")
    desk.queue.put(b"2", "two")
    await desk.sink.until(lambda: len(desk.sink.taken) == 2)
    await desk.queue.stop(SOON)
    assert desk.sink.tried == [*[b"1"] * 10, b"2"]
    wanted = [min(FIRST_DELAY_S * 2**number, MAX_DELAY_S) for number in range(9)]
    assert desk.pauses == pytest.approx(wanted, rel=1e-5)


async def test_pauses_are_a_random_part_of_the_delay() -> None:
    desk = Desk(FakeSink(*[Undelivered("busy")] * 3))
    desk.queue._random = lambda: 0.0
    desk.queue.start()
    desk.queue.put(b"1", "one")
    await desk.sink.until(lambda: len(desk.sink.taken) == 1)
    await desk.queue.stop(SOON)
    assert desk.pauses == [FIRST_DELAY_S / 2, FIRST_DELAY_S, FIRST_DELAY_S * 2]


async def test_a_sink_is_down_after_some_failures_and_up_at_the_first_success() -> None:
    desk = Desk(FakeSink(*[Undelivered("refused")] * (DOWN_AFTER + 1)))
    desk.queue.start()
    desk.queue.put(b"1", "one")
    await desk.sink.until(lambda: len(desk.sink.tried) == DOWN_AFTER + 1)
    assert desk.queue.is_down
    await desk.sink.until(lambda: len(desk.sink.taken) == 1)
    await desk.queue.stop(SOON)
    assert desk.down == ["webhook: refused"] * 2
    assert (desk.up, desk.queue.is_down) == (1, False)


async def test_few_failures_are_chance() -> None:
    failures = [Undelivered("refused")] * (DOWN_AFTER - 1)
    desk = Desk(FakeSink(*failures, None, *failures))
    desk.queue.start()
    desk.queue.put(b"1", "one")
    desk.queue.put(b"2", "two")
    await desk.sink.until(lambda: len(desk.sink.taken) == 2)
    await desk.queue.stop(SOON)
    assert (desk.down, desk.up) == ([], 0)


async def test_what_is_refused_is_given_up_and_the_next_one_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    desk = Desk(FakeSink(*[Undelivered("answered 400", tries=2)] * 2))
    desk.queue.start()
    desk.queue.put(b"1", "store.degraded began")
    desk.queue.put(b"2", "two")
    await desk.sink.until(lambda: desk.sink.taken == [b"2"])
    await desk.queue.stop(SOON)
    assert desk.queue.lost == 1
    (line,) = lost_lines(capsys.readouterr().err)
    assert (line["sink"], line["what"], line["reason"]) == ("webhook", "store.degraded began", "answered 400")


async def test_after_an_hour_a_message_is_no_news() -> None:
    desk = Desk(FakeSink())
    desk.sink.forever = Undelivered("refused")
    desk.queue.start()
    desk.queue.put(b"1", "one")
    await desk.settle(lost=1)
    await desk.queue.stop(SOON)
    assert MAX_AGE_S <= sum(desk.pauses) <= MAX_AGE_S + MAX_DELAY_S


async def test_beyond_the_bound_the_oldest_go(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(FakeSink())
    for number in range(QUEUED + 100):
        desk.queue.put(str(number).encode(), f"message {number}")
    assert len(desk.queue) == QUEUED
    assert desk.queue.lost == 100
    desk.queue.start()
    await desk.queue.stop(SOON)
    assert desk.sink.taken == [str(number).encode() for number in range(100, QUEUED + 100)]
    lines = lost_lines(capsys.readouterr().err)
    assert {line["reason"] for line in lines} == {"too many wait"}


async def test_a_fault_of_a_sink_ends_no_queue(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(FakeSink(ValueError("a secret in a message")))
    desk.queue.start()
    desk.queue.put(b"1", "one")
    desk.queue.put(b"2", "two")
    await desk.sink.until(lambda: desk.sink.taken == [b"2"])
    await desk.queue.stop(SOON)
    err = capsys.readouterr().err
    assert "alert.sink_failed" in err
    assert "secret" not in err
    assert [line["reason"] for line in lost_lines(err)] == ["ValueError"]


# --- the end ----------------------------------------------------------------------------------------------------


async def test_at_the_end_what_waits_is_delivered() -> None:
    desk = Desk(FakeSink())
    desk.queue.start()
    for number in range(20):
        desk.queue.put(b"%d" % number, "more")
    await desk.queue.stop(SOON)
    assert len(desk.sink.taken) == 20


async def test_at_the_end_nobody_waits_for_a_next_try() -> None:
    desk = Desk(FakeSink())
    desk.sink.forever = Undelivered("refused")
    desk.asleep = asyncio.Event()  # a pause that never ends
    desk.queue.start()
    for number in range(3):
        desk.queue.put(b"%d" % number, "more")
    await desk.sink.until(lambda: bool(desk.pauses))
    await desk.queue.stop(SOON)
    assert desk.queue.lost == 3
    assert desk.sink.tried == [b"0", b"0", b"1", b"2"]


async def test_at_the_end_nobody_waits_for_a_sink_that_hangs(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(FakeSink())
    desk.sink.hangs = True
    desk.queue.start()
    for number in range(3):
        desk.queue.put(b"%d" % number, f"message {number}")
    await desk.sink.until(lambda: len(desk.sink.tried) == 1)
    await desk.queue.stop(0.05)
    lines = lost_lines(capsys.readouterr().err)
    assert [(line["what"], line["reason"]) for line in lines] == [
        (f"message {number}", "the server ends") for number in range(3)
    ]
    assert desk.queue.lost == 3


async def test_one_that_never_began_loses_what_waits() -> None:
    desk = Desk(FakeSink())
    desk.queue.put(b"1", "one")
    await desk.queue.stop(SOON)
    assert (desk.queue.lost, desk.sink.tried) == (1, [])


async def test_no_task_is_left_behind() -> None:
    desk = Desk(FakeSink(*[Undelivered("busy")] * 2))
    before = asyncio.all_tasks()
    desk.queue.start()
    desk.queue.put(b"1", "one")
    await desk.sink.until(lambda: bool(desk.sink.taken))
    await desk.queue.stop(SOON)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
