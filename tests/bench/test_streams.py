"""Open streams on many connections: figures, bars, and items that are lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.curves.watch import Watched
from bench.report import Report
from bench.samples import Sample
from bench.scenarios.streams import StreamsPlan, open_streams, report
from tests.load import helpers
from zcproto.load.record import Tally
from zcproto.load.result import Moment, Result


def sample(rss_bytes: int) -> Sample:
    return Sample(0.0, 0.0, 0, 0, rss_bytes, 0.0, 0.0, ())


def watched(items: Tally, *memory: int, latency_us: int = 1_000) -> Watched:
    """Return a load of ten streams, and the server's memory meanwhile."""
    result: Result = helpers.verified_result(plan=helpers.plan(stream="repeat"))
    result.record.items = items
    last = result.readings[Moment.VERIFIED]
    sent = items.equal + items.unequal
    result.readings[Moment.VERIFIED] = last._replace(stats=last.stats._replace(items=sent))
    result.record.latencies["item"] = helpers.latencies(latency_us)
    return Watched(result, {"load": [sample(each) for each in memory]})


def figures(found: Report) -> dict[str, float | None]:
    return {row.key: row.value for row in found.columns["figure"]}


def failing(found: Report) -> set[str]:
    return {row.key for row in found.columns["figure"] if not row.holds}


def test_items_in_order_and_in_time_pass() -> None:
    found = report(watched(Tally(50, 50, 50), 1_000_000, 1_020_480, 1_010_000))
    assert failing(found) == set()
    assert found.exit_code == 0
    assert figures(found)["items"] == 50
    assert figures(found)["reached"] == 200
    assert figures(found)["stream_kib"] == 2.0


def test_memory_of_a_stream_needs_two_samples() -> None:
    assert figures(report(watched(Tally(50, 50, 50), 1_000_000)))["stream_kib"] is None


@pytest.mark.parametrize(
    ("items", "latency_us", "fails"),
    [
        (Tally(50, 50, 49, 0, 1), 1_000, {"lost", "unverified"}),
        (Tally(50, 50, 49, 1), 1_000, {"wrong", "unverified"}),
        (Tally(50, 50, 50), 200_000, {"p99_ms"}),
    ],
    ids=["lost", "wrong", "late"],
)
def test_lost_wrong_and_late_items_fail(items: Tally, latency_us: int, fails: set[str]) -> None:
    found = report(watched(items, latency_us=latency_us))
    assert failing(found) == fails
    assert found.exit_code == 1


def test_streams_of_a_real_server_are_verified(tmp_path: Path) -> None:
    found = open_streams(tmp_path / "home", StreamsPlan(connections=10, rate=20.0, seconds=0.5))
    shown = figures(found)
    assert (shown["streams"], shown["items"], shown["lost"], shown["wrong"]) == (10, 100, 0, 0)
    assert found.faults == []
