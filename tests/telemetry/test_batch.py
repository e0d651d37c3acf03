"""The queue of what is to be sent: it never waits, is bounded, and counts what is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, get_value

from tests.telemetry.helpers import TIMEOUT
from zcproto.telemetry.export import MAX_BATCH, Batches

LONG = 3600.0
"""A delay that no test waits for: what is sent earlier is sent for another reason."""


class Sink:
    """An exporter that waits until it may go on."""

    def __init__(self, *, result: bool = True, is_open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.result = result
        self.entered, self.gate = threading.Event(), threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, batch: Sequence[int]) -> bool:
        self.entered.set()
        assert self.gate.wait(TIMEOUT)
        self.batches.append(list(batch))
        return self.result


def queue(export: Callable[[Sequence[int]], bool], most: int = 10_000, delay: float = LONG) -> Batches[int]:
    return Batches(export, most=most, delay=delay, name="test")


def test_end_sends_what_waits() -> None:
    sink = Sink()
    batches = queue(sink)
    for number in range(3):
        batches.put(number)
    assert batches.close(TIMEOUT) == 0
    assert sink.batches == [[0, 1, 2]]
    assert (batches.sent, batches.failed, batches.dropped) == (3, 0, 0)


def test_full_batch_is_sent_before_its_delay() -> None:
    sink = Sink()
    batches = queue(sink)
    for number in range(MAX_BATCH):
        batches.put(number)
    assert sink.entered.wait(TIMEOUT)
    assert batches.close(TIMEOUT) == 0
    assert sum(map(len, sink.batches)) == MAX_BATCH


def test_lone_item_is_sent_after_the_delay() -> None:
    sink = Sink()
    batches = queue(sink, delay=0.01)
    batches.put(1)
    assert sink.entered.wait(TIMEOUT)
    assert batches.close(TIMEOUT) == 0


def test_full_queue_drops_and_counts_and_does_not_wait() -> None:
    sink = Sink(is_open=False)
    batches = queue(sink, most=MAX_BATCH)
    for number in range(MAX_BATCH):
        batches.put(number)
    assert sink.entered.wait(TIMEOUT)  # the first batch is on its way, and takes as long as it likes
    for number in range(MAX_BATCH + 50):
        batches.put(number)
    assert (batches.waiting, batches.dropped) == (MAX_BATCH, 50)
    sink.gate.set()
    assert batches.close(TIMEOUT) == 0
    assert batches.sent == 2 * MAX_BATCH


def test_end_has_a_limit_and_counts_what_is_lost() -> None:
    sink = Sink(is_open=False)
    batches = queue(sink, delay=0.01)
    batches.put(1)
    assert sink.entered.wait(TIMEOUT)
    batches.put(2)
    assert batches.close(0.0) == 1
    assert batches.dropped == 1
    batches.put(3)
    assert batches.dropped == 2
    sink.gate.set()


def test_exporter_is_not_traced_itself() -> None:
    suppressed: list[object] = []

    def export(batch: Sequence[int]) -> bool:
        suppressed.append(get_value(_SUPPRESS_INSTRUMENTATION_KEY))
        return True

    batches = queue(export)
    batches.put(1)
    batches.close(TIMEOUT)
    assert suppressed == [True]


@pytest.mark.parametrize("raises", [False, True])
def test_batch_that_cannot_be_delivered_is_given_up(raises: bool) -> None:
    def export(batch: Sequence[int]) -> bool:
        if raises:
            raise OSError("no route to host")
        return False

    batches = queue(export)
    for number in range(3):
        batches.put(number)
    batches.close(TIMEOUT)
    assert (batches.sent, batches.failed) == (0, 3)
