"""Results: the comparison of counts, the verdict, and figures."""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.helpers import latencies, plan, stats, verified_result
from zcproto.load.record import RequestKind
from zcproto.load.report import Figure, figures, generator_saturated
from zcproto.load.result import Moment, Result, StatsReading, Verdict


def test_run_with_equal_counts_is_verified() -> None:
    result = verified_result()
    assert result.reasons() == []
    assert result.verdict is Verdict.VERIFIED
    assert all(each.agree for each in result.counted())
    requests = {each.what: each for each in result.counted()}["requests"]
    assert (requests.asked, requests.client, requests.server) == (70, 70, 70)  # without the operator's
    assert verified_result(interrupted=True).verdict is Verdict.INTERRUPTED


LOAD, LAST, CLOSE = RequestKind.LOAD, RequestKind.LAST, RequestKind.CLOSE


@pytest.mark.parametrize(
    ("kind", "field", "value", "reason"),
    [
        (LOAD, "unequal", 1, "1 request of the load got a wrong answer"),
        (LOAD, "lost", 2, "2 requests of the load got no answer"),
        (LOAD, "errors", {"INTERNAL": 2, "ABORTED": 1}, "3 requests of the load got an error"),
        (LOAD, "not_sent", {"gone": 1_500}, "1,500 requests of the load could not be sent"),
        (CLOSE, "lost", 1, "1 session.close request got no answer"),
        (LAST, "equal", 7, "3 of 10 connections not verified"),
        (None, "lost_connections", {"truncated": 2, "TLS: other": 1}, "3 connections failed or got lost"),
    ],
)
def test_each_kind_of_failure_is_a_reason(
    kind: RequestKind | None, field: str, value: object, reason: str
) -> None:
    result = verified_result()
    setattr(result.record if kind is None else result.record.tallies[kind], field, value)
    assert result.reasons() == [reason]
    assert result.verdict is Verdict.FAILED


def test_method_that_the_server_lacks_is_named_with_the_cure() -> None:
    result = verified_result()
    result.record.tallies[LAST].errors = {"UNIMPLEMENTED": 10}
    assert result.reasons() == [
        "10 last requests got an error",
        "the server has no method `echo`; name one of its own by --method or --stream",
    ]


@pytest.mark.parametrize("what", ["connections", "sessions", "requests"])
def test_different_server_count_is_a_reason(what: str) -> None:
    result = verified_result()
    last = result.readings[Moment.VERIFIED]
    more = last.stats._replace(**{what: getattr(last.stats, what) + 1})
    result.readings[Moment.VERIFIED] = last._replace(stats=more)
    (reason,) = result.reasons()
    assert f" {what}, the client " in reason


def test_unread_counters_are_a_reason() -> None:
    result = verified_result(unread="the server's counters could not be read: gone")
    del result.readings[Moment.VERIFIED]
    assert len(result.reasons()) == 4
    assert not any(each.agree for each in result.counted())
    assert result.verdict is Verdict.FAILED


# --- figures --------------------------------------------------------------------------------------------


def values(result: Result) -> dict[str, float | None]:
    return {each.key: each.value for each in figures(result, {})}


def test_figures_are_differences_between_readings() -> None:
    result = verified_result()
    found = values(result)
    assert found["memory_per_connection_kib"] == pytest.approx(36.0)
    assert found["connect_cpu_s"] == pytest.approx(0.02)
    assert found["request_cpu_us"] == pytest.approx(0.001 / 50 * 1e6)
    assert found["pause_connecting_ms"] == pytest.approx(20.0)
    assert found["pause_loading_ms"] == pytest.approx(1.0)
    assert found["handshake_p99_ms"] == pytest.approx(4.9, rel=0.01)
    assert result.connect_rate == pytest.approx(500)
    assert result.request_rate == pytest.approx(200)


def test_unmeasured_figure_has_no_value() -> None:
    found = values(Result(plan()))
    assert found.pop("generator_cpu_percent") == 0
    assert set(found.values()) == {None}
    assert Result(plan()).connect_rate == Result(plan()).request_rate == 0
    used = verified_result()
    used.readings[Moment.IDLE] = StatsReading(stats(handshakes=500), 3, 0.0)
    assert used.server_was_used
    assert values(used)["memory_per_connection_kib"] is None


@pytest.mark.parametrize(
    ("value", "bar", "holds"),
    [(5.0, None, True), (None, None, True), (5.0, 6.0, True), (6.0, 6.0, False), (None, 6.0, False)],
)
def test_figure_holds_below_its_bar(value: float | None, bar: float | None, holds: bool) -> None:
    assert Figure("key", "label", "ms", value, bar).holds is holds


@pytest.mark.parametrize(
    ("name", "late"),
    [("lag", latencies(*[20_000] * 5, *range(95))), ("arrival_lag", latencies(20_000)), ("cpu_share", 0.97)],
)
def test_late_or_busy_generator_is_saturated(name: str, late: Any) -> None:
    result = verified_result()
    assert not generator_saturated(result)
    if isinstance(late, float):
        result.record.cpu_share = late
    else:
        result.record.latencies[name] = late
    assert generator_saturated(result)
