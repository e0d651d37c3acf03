"""The search for the highest rate: which rates it tries, when it ends, what it concludes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.load.helpers import latencies, plan, verified_result
from zcproto.load.find_max import MAX_RATE, PRECISION, TRIES, Search, show_search
from zcproto.load.record import Record
from zcproto.load.result import Result

LIMIT_MS = 10.0


def run_at(rate: float, p99_ms: float, *, lag_ms: float = 0.1) -> Result:
    result = verified_result(plan=plan(rate=rate))
    result.record.latencies["request"] = latencies(round(p99_ms * 1000))
    result.record.latencies["lag"] = result.record.latencies["arrival_lag"] = latencies(round(lag_ms * 1000))
    return result


def search(first: float, measure: Callable[[float], Result]) -> Search:
    made = Search(LIMIT_MS)
    for rate in made.rates(first):
        made.add(measure(rate))
    return made


def server_of(capacity: float, **lag: float) -> Callable[[float], Result]:
    return lambda rate: run_at(rate, 1.0 if rate <= capacity else 50.0, **lag)


@pytest.mark.parametrize("first", [1.0, 100.0, 5_000.0, 80_000.0, 1_000_000.0])
def test_search_narrows_down_to_the_capacity(first: float) -> None:
    made = search(first, server_of(7_000.0))
    assert made.highest is not None
    assert 7_000.0 / PRECISION <= made.highest <= 7_000.0
    assert made.conclusion == f"highest rate with a p99 below 10 ms: {made.highest:,.0f} requests/s"


def test_server_that_is_never_fast_enough_has_no_highest_rate() -> None:
    made = search(64.0, server_of(0.0))
    assert made.highest is None
    assert len(made.steps) == 7 * TRIES
    assert made.conclusion == "no rate has a p99 below 10 ms"


def test_server_that_is_always_fast_ends_the_search_at_the_largest_rate() -> None:
    made = search(1_000.0, server_of(2 * MAX_RATE))
    assert made.highest is not None
    assert MAX_RATE / 2 < made.highest <= MAX_RATE


def test_one_slow_run_of_a_rate_does_not_decide() -> None:
    slow = [True]
    made = search(1_000.0, lambda rate: run_at(rate, 50.0 if slow and slow.pop() else 1.0))
    assert [step.holds for step in made.steps[:2]] == [False, True]
    assert made.steps[0].rate == made.steps[1].rate == 1_000.0
    assert made.highest is not None
    assert made.highest > MAX_RATE / 2


def test_wrong_answers_miss_the_limit_however_fast() -> None:
    def measure(rate: float) -> Result:
        result = run_at(rate, 1.0)
        if rate > 100:
            result.record.tallies = {**result.record.tallies}
            result.record.lost_connections = {"truncated": 1}
        return result

    made = search(100.0, measure)
    assert made.highest == 100.0 or (made.highest is not None and made.highest < 100.0 * PRECISION)
    assert any("1 connection failed or" in step.cause for step in made.steps)


def test_saturated_generator_is_named() -> None:
    made = search(1_000.0, server_of(1_500.0, lag_ms=20.0))
    assert {step.cause for step in made.steps if not step.holds} == {"generator saturated"}
    assert "the server may be faster: use more --processes" in made.conclusion


@pytest.mark.parametrize(
    ("tried", "conclusion"),
    [(0, "interrupted before a rate held"), (1, "1,000 requests/s so far; interrupted")],
)
def test_interruption_ends_the_search(tried: int, conclusion: str) -> None:
    rates: list[float] = []

    def measure(rate: float) -> Result:
        rates.append(rate)
        result = run_at(rate, 1.0)
        result.interrupted = len(rates) > tried
        return result

    made = search(1_000.0, measure)
    assert made.interrupted
    assert len(rates) == tried + 1
    assert made.conclusion.endswith(conclusion)


def test_report_shows_the_runs_by_rate() -> None:
    made = search(8_000.0, server_of(7_000.0))
    unanswered = replace(plan(rate=5.0))
    made.add(Result(unanswered, Record()))
    out = io.StringIO()
    show_search(made, out)
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    rows = [line for line in lines if line[0][0].isdigit()]
    assert rows[0] == ["5", "0", "-", "-", "no:", *made.steps[-1].cause.split()]
    rates = [float(line[0].replace(",", "")) for line in rows]
    assert rates == sorted(rates)
    assert len(rates) == len(made.steps)
    assert " ".join(lines[-1]).startswith("highest rate with a p99 below 10 ms")
    value = made.as_json()
    assert value["highest_rate"] == made.highest
    assert value["steps"][0]["rate"] == 8_000.0
    assert value["steps"][0]["cause"] == "p99"
