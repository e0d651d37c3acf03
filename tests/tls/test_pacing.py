"""Test pacing: many handshakes are spread over turns of the loop."""

from __future__ import annotations

import ssl
from typing import Any

import pytest

from tests.helpers import FakeTimers
from tests.tls.conftest import NewPair
from tests.tls.support import RecordingProtocol, TlsPair, new_acceptor
from zcproto.tls.server import BUDGET_WINDOW, TURN_BUDGET, TlsAcceptor
from zcproto.tls.transport import TlsPhase


class Stopwatch:
    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


class Step:
    """A fake expensive step of a handshake."""

    def __init__(self, watch: Stopwatch, cost: float, fault: Exception | None = None) -> None:
        self.watch = watch
        self.cost = cost
        self.fault = fault
        self.runs = 0

    def start_handshake(self) -> None:
        self.runs += 1
        self.watch.seconds += self.cost
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def watch() -> Stopwatch:
    return Stopwatch()


@pytest.fixture
def acceptor(timers: FakeTimers, server_tls: ssl.SSLContext, watch: Stopwatch) -> TlsAcceptor:
    return new_acceptor(timers, server_tls, RecordingProtocol, [], perf_counter=watch.perf_counter)


def schedule(acceptor: TlsAcceptor, *steps: Step) -> None:
    for step in steps:
        acceptor.pending.join(step, acceptor.network_of("192.0.2.1"))  # type: ignore[arg-type]
        acceptor.schedule(step)  # type: ignore[arg-type]


def done(steps: list[Step]) -> int:
    return sum(step.runs for step in steps)


def test_single_handshake_is_not_delayed(acceptor: TlsAcceptor, watch: Stopwatch) -> None:
    step = Step(watch, 0.002)
    schedule(acceptor, step)
    assert step.runs == 1


@pytest.mark.parametrize(
    ("cost", "per_turn"),
    [(TURN_BUDGET / 5, 5), (TURN_BUDGET / 2, 2), (TURN_BUDGET, 1), (10 * TURN_BUDGET, 1)],
)
def test_turn_runs_handshakes_within_budget_and_at_least_one(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers, cost: float, per_turn: int
) -> None:
    steps = [Step(watch, cost * 1.001) for _ in range(4 * per_turn)]
    schedule(acceptor, *steps)
    after = [done(steps)]
    while after[-1] < len(steps):
        timers.turn()
        after.append(done(steps))
    assert after == [per_turn * n for n in range(1, 5)]


def test_handshakes_start_in_order_of_hellos(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers
) -> None:
    steps = [Step(watch, 2 * TURN_BUDGET) for _ in range(6)]
    schedule(acceptor, *steps)
    for count in range(1, 7):
        assert [step.runs for step in steps] == [1] * count + [0] * (6 - count)
        timers.turn()


def test_new_handshake_queues_behind_waiting_ones(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers
) -> None:
    steps = [Step(watch, 2 * TURN_BUDGET) for _ in range(4)]
    schedule(acceptor, *steps[:3])
    timers.turn()
    schedule(acceptor, steps[3])
    assert [step.runs for step in steps] == [1, 1, 0, 0]
    timers.turn()
    assert [step.runs for step in steps] == [1, 1, 1, 0]
    timers.run()
    assert steps[3].runs == 1


def test_exactly_spent_budget_delays_the_next_handshake(acceptor: TlsAcceptor, watch: Stopwatch) -> None:
    watch.seconds = 0.0  # so that the sum is exact
    first, second = Step(watch, TURN_BUDGET), Step(watch, TURN_BUDGET)
    schedule(acceptor, first, second)
    assert (first.runs, second.runs) == (1, 0)


def test_spent_budget_expires_with_window(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers
) -> None:
    steps = [Step(watch, TURN_BUDGET / 10) for _ in range(10)]
    schedule(acceptor, *steps)
    assert done(steps) == 10
    watch.seconds += BUDGET_WINDOW
    steps = [Step(watch, TURN_BUDGET / 10) for _ in range(10)]
    schedule(acceptor, *steps)
    assert done(steps) == 10
    schedule(acceptor, late := Step(watch, 0.001))
    assert late.runs == 0
    timers.turn()
    assert late.runs == 1


def test_occasional_handshakes_never_wait(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers
) -> None:
    for _ in range(20):
        step = Step(watch, TURN_BUDGET / 2)
        schedule(acceptor, step)
        assert step.runs == 1
        watch.seconds += TURN_BUDGET
    assert timers.waiting == 0


def test_empty_queue_schedules_no_turn(acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers) -> None:
    schedule(acceptor, Step(watch, 0.001))
    assert timers.waiting == 0
    schedule(acceptor, Step(watch, 2 * TURN_BUDGET), Step(watch, 0.001))
    assert timers.run() == 1


def test_only_one_turn_is_scheduled(acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers) -> None:
    schedule(acceptor, *(Step(watch, 2 * TURN_BUDGET) for _ in range(50)))
    for _ in range(49):
        assert timers.waiting == 1
        timers.turn()


def test_exception_in_one_handshake_does_not_stop_others(
    acceptor: TlsAcceptor, watch: Stopwatch, timers: FakeTimers
) -> None:
    faults = [Step(watch, 2 * TURN_BUDGET, MemoryError()) for _ in range(2)]
    last = Step(watch, 0.001)
    with pytest.raises(MemoryError):
        schedule(acceptor, faults[0])
    schedule(acceptor, Step(watch, 2 * TURN_BUDGET), faults[1], last)
    assert faults[1].runs == 0
    with pytest.raises(MemoryError):
        timers.turn()
    timers.run()
    assert last.runs == 1
    watch.seconds += BUDGET_WINDOW
    schedule(acceptor, again := Step(watch, 0.001))
    assert again.runs == 1


class Ticking:
    """A clock that advances with each reading, so that two handshakes fill a turn."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 0.6 * TURN_BUDGET
        return self.seconds


@pytest.fixture
def queued(new_pair: NewPair) -> list[TlsPair]:
    """Return five connections whose hellos arrived in one turn."""
    first = new_pair(perf_counter=Ticking().perf_counter)
    pairs = [first, *(new_pair(acceptor=first.acceptor) for _ in range(4))]
    for pair in pairs:
        pair.raw.deliver(pair.step())
    return pairs


def phases(pairs: list[TlsPair]) -> list[Any]:
    return [pair.phase for pair in pairs]


def test_real_handshakes_are_paced(queued: list[TlsPair], timers: FakeTimers) -> None:
    for started in (2, 4, 5):
        assert phases(queued) == [TlsPhase.HANDSHAKE] * started + [TlsPhase.HELLO] * (5 - started)
        timers.turn()
    for pair in queued:
        pair.hear()
        pair.raw.deliver(pair.step())
    assert phases(queued) == [TlsPhase.OPEN] * 5


@pytest.mark.parametrize("how", ["reset", "end of stream", "timeout", "closed by us"])
def test_connection_closed_while_queued_costs_no_handshake(
    queued: list[TlsPair], timers: FakeTimers, how: str
) -> None:
    acceptor = queued[0].acceptor
    match how:
        case "reset":
            queued[2].raw.lose()
        case "end of stream":
            queued[2].raw.deliver_eof()
        case "timeout":
            queued[2].server.handle_deadline(timers.time())
        case "closed by us":
            queued[2].server.close()
    timers.run()
    assert queued[2].raw.writes == []
    assert queued[2].server.get_extra_info("ssl_object") is None
    assert phases(queued)[3:] == [TlsPhase.HANDSHAKE] * 2
    assert acceptor.handshakes_in_progress == 4
