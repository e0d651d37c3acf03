from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.load.helpers import latencies, plan, verified_result
from zcproto.load.find_max import Search, Step
from zcproto.load.plot import curve, draw_run, draw_search, from_zero, logarithmic
from zcproto.load.record import Latencies
from zcproto.load.result import Result, Verdict


def test_curve_has_the_points_of_the_distribution() -> None:
    xs, ys = zip(*curve(latencies(100, 200, 200, 400)), strict=True)
    assert xs == pytest.approx((1.0, 4 / 3, 4.0, 4.0))  # from 0 %, 25 %, 75 % on; the last is the maximum
    assert ys == pytest.approx((0.1, 0.2, 0.4, 0.4))


def test_empty_curve_has_no_points() -> None:
    assert curve(Latencies()) == []


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(verified_result(), id="verified"),
        pytest.param(verified_result(interrupted=True), id=Verdict.INTERRUPTED.value),
        pytest.param(Result(plan()), id="nothing"),
    ],
)
def test_every_result_can_be_plotted(result: Result) -> None:
    drawn = draw_run(result)
    ElementTree.fromstring(drawn)
    for text in ("Latency by percentile", "Connections with a session", "Answers per second"):
        assert text in drawn
    assert "nan" not in drawn


def test_lines_and_their_legend_are_drawn_for_what_was_measured() -> None:
    drawn = draw_run(verified_result())
    assert ("session.open" in drawn, "<polyline" in drawn) == (True, True)
    nothing = draw_run(Result(plan()))
    assert ("session.open" in nothing, "<circle" in nothing) == (False, False)


def test_search_is_drawn_as_curves_with_rings_where_the_limit_was_missed() -> None:
    search = Search(5.0)
    search.steps = [
        Step(4_000, 3_900, {"p50": 3.0, "p99": 9.0}, False, "p99"),
        Step(1_000, 1_000, {"p50": 1.0, "p99": 2.0}, True, ""),
        Step(2_000, 2_000, {"p50": 1.0, "p99": 8.0}, False, "p99"),
        Step(2_000, 2_000, {"p50": 1.0, "p99": 3.0}, True, ""),
        Step(8_000, 0, {}, False, "3 requests got no answer"),
    ]
    search.highest = 2_000
    drawn = draw_search(search)
    root = ElementTree.fromstring(drawn)
    lines = root.findall(".//{*}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3, 2, 2]  # p99, p50, limit, highest
    assert [dot.attrib["fill"] == "#fff" for dot in root.findall(".//{*}circle")] == [False, False, True] * 2
    assert "highest rate with a p99 below 5 ms: 2,000 requests/s" in drawn


def test_search_without_an_answer_can_be_plotted() -> None:
    search = Search(5.0)
    search.steps = [Step(1_000, 0, {}, False, "interrupted")]
    ElementTree.fromstring(draw_search(search))


@pytest.mark.parametrize(
    ("high", "top", "labels"),
    [
        (93.0, None, ["0", "20", "40", "60", "80", "100"]),
        (0.0, None, ["0"]),
        (12_345.0, None, ["0", "5,000", "10,000", "15,000"]),
        (10.4, 10.4, ["0", "2", "4", "6", "8", "10"]),
    ],
)
def test_axis_from_zero_has_a_few_round_ticks(high: float, top: float | None, labels: list[str]) -> None:
    axis = from_zero(high, top)
    assert [*axis.ticks.values()][: len(labels)] == labels
    assert len(axis.ticks) <= 7
    assert axis.high >= high


def test_logarithmic_axis_names_parts_of_decades_where_there_is_room() -> None:
    assert [*logarithmic([0.3, 8.0]).ticks.values()] == ["0.5", "1", "2", "5", "10"]
    assert [*logarithmic([0.1, 2_000.0]).ticks.values()] == ["0.1", "1", "10", "100", "1,000"]
    assert logarithmic([]).ticks
