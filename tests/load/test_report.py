"""Reports: tables, verdicts and JSON."""

from __future__ import annotations

import io
import json

import pytest

from tests.load.helpers import latencies, plan, stats, verified_result
from tests.server.helpers import KEY
from zcproto.load.record import RequestKind, Tally
from zcproto.load.report import as_json, show
from zcproto.load.result import Moment, Result, StatsReading, Verdict

BARS = {"memory_per_connection_kib": 38.0, "pause_connecting_ms": 5.0}


def shown(result: Result, bars: dict[str, float] | None = None) -> str:
    out = io.StringIO()
    show(result, out, bars or {})
    return out.getvalue()


def row(text: str, label: str, table: str = "") -> list[str]:
    """Return the cells of the first row with a label after the title of a table."""
    lines = text[text.index(table) :].splitlines()
    line = next(line for line in lines if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_verified_run_shows_its_figures() -> None:
    text = shown(verified_result())
    assert text.rstrip().endswith("verified: 10 of 10 connections, 60 correct answers, 0 errors")
    assert row(text, "TCP and TLS handshake") == ["49", "2.50", "4.40", "4.90", "4.90", "4.90"]
    assert row(text, "connections", "Rate per second") == ["500", "500", "0.0"]
    assert row(text, "requests", "Rate per second") == ["200", "200", "0.2"]
    assert row(text, "requests", "Counts of both sides") == ["70", "70", "70", "ok"]
    assert row(text, "server memory per connection and session") == ["36.00", "KiB"]
    assert row(text, "verified by a last request") == ["10", "10", "ok"]
    assert "Failures" not in text
    assert "saturated" not in text
    assert "has had connections before" not in text


def test_saturated_generator_and_reused_server_are_reported() -> None:
    result = verified_result()
    result.record.latencies["lag"] = latencies(50_000)
    result.readings[Moment.IDLE] = StatsReading(stats(handshakes=100), 3, 0.0)
    assert "generator saturated" in shown(result)
    assert "has had connections before" in shown(result)


def test_run_without_an_operator_says_that_the_count_of_the_server_is_missing() -> None:
    result = verified_result(plan=plan(operator=None), readings={})
    text = shown(result)
    assert result.verdict is Verdict.VERIFIED
    assert "the server's own count was not read; give --operator-key-file" in text
    assert row(text, "connections", "Counts of both sides")[:3] == ["10", "10", "-"]


@pytest.mark.parametrize(
    ("lag_ms", "mark", "text"),
    [(0.1, ["no"], "above what an idle machine reaches"), (9.0, ["not", "judged"], "are not judged")],
)
def test_missed_bar_is_explained(lag_ms: float, mark: list[str], text: str) -> None:
    result = verified_result()
    for name in ("lag", "arrival_lag"):
        result.record.latencies[name] = latencies(round(lag_ms * 1000))
    page = shown(result, {"handshake_p99_ms": 1.0})
    assert row(page, "TLS handshake while connecting, p99")[3:] == mark
    assert text in page


def test_run_with_streams_shows_items_instead_of_requests() -> None:
    result = verified_result(plan=plan(stream="repeat"))
    result.record.items = Tally(50, 50, 50)
    last = result.readings[Moment.VERIFIED]
    result.readings[Moment.VERIFIED] = last._replace(stats=last.stats._replace(items=50))
    text = shown(result)
    assert row(text, "items", "Counts of both sides") == ["50", "50", "50", "ok"]
    assert text.rstrip().endswith(
        "verified: 10 of 10 connections, 50 items in order, 60 correct answers, 0 errors"
    )
    assert row(text, "first item, from when its stream was due")[:2] == ["49", "2.50"]
    assert row(text, "item, from the one before")[0] == "49"
    assert row(text, "items", "Rate per second") == ["200", "200", "0.2"]
    assert row(text, "time to the first item, p99") == ["4.90", "ms"]
    assert row(text, "server CPU per item, at this rate") == ["20.00", "us"]
    assert "request under load" not in text
    assert "from when it was sent" not in text
    result.record.items = Tally(50, 50, 45, 2, 3)
    result.record.tallies[RequestKind.LOAD] = Tally(10, 10, 8, 2)
    text = shown(result)
    assert row(text, "items: wrong or out of order") == ["2"]
    assert row(text, "items: did not arrive") == ["3"]
    assert "2 streams got a wrong answer; 2 items wrong or out of order; 3 items did not arrive" in text


def test_bars_are_shown_with_their_verdicts() -> None:
    text = shown(verified_result(), BARS)
    assert row(text, "server memory per connection and session") == ["36.00", "KiB", "38", "ok"]
    assert row(text, "peak lag of the server's event loop, connecting") == ["20.00", "ms", "5", "no"]
    assert row(text, "request under load, p99")[-1] == "ms"


def failed_result() -> Result:
    result = verified_result()
    result.record.tallies[RequestKind.LOAD] = Tally(
        50, 47, 40, 2, 4, {"INTERNAL": 1}, {"the connection was lost": 3}
    )
    result.record.lost_connections = {"truncated": 1}
    return result


def test_failed_run_shows_its_reasons() -> None:
    text = shown(failed_result())
    assert row(text, "load: error INTERNAL") == ["1"]
    assert row(text, "load: not sent, the connection was lost") == ["3"]
    assert row(text, "load: wrong answer") == ["2"]
    assert row(text, "load: no answer") == ["4"]
    assert row(text, "connection: truncated") == ["1"]
    assert "failed: 1 connection failed or got lost; 2 requests of the load" in text


def test_interrupted_run_shows_partial_figures() -> None:
    result = Result(plan(), interrupted=True)
    text = shown(result)
    assert row(text, "TCP and TLS handshake") == ["0", "-", "-", "-", "-", "-"]
    assert row(text, "connections", "Counts of both sides") == ["10", "0", "-", "no"]
    assert "has had connections before" not in text
    assert "interrupted: the figures cover part of the run" in text


def test_json_has_all_results_and_no_key() -> None:
    result = failed_result()
    text = json.dumps(as_json(result, BARS, 1_800_000_000.0))
    assert KEY not in text
    value = json.loads(text)
    assert value["schema"] == "zcproto-bench/1"
    assert value["started"] == "2027-01-15T08:00:00+00:00"
    assert value["verdict"] == Verdict.FAILED.value
    assert value["reasons"] == result.reasons()
    assert value["plan"]["connections"] == 10
    assert value["requests"]["load"]["lost"] == 4
    assert value["lost_connections"] == {"truncated": 1}
    assert value["latency_ms"]["request"]["p99.9"] == 4.9
    assert value["figures"]["memory_per_connection_kib"] == {
        "value": 36.0, "unit": "KiB", "bar": 38.0, "holds": True,
    }  # fmt: skip
    assert value["server"]["connected"]["rss_bytes"] == 40_368_640
    assert value["counted"][0] == {
        "what": "connections", "asked": 10, "client": 10, "server": 10, "is_read": True, "agree": True,
    }  # fmt: skip
    assert value["over_time"] == {
        "tick_s": 0.25, "connected": {"0": 4, "1": 6}, "answered": {"2": 50, "3": 10},
    }  # fmt: skip
    assert value["machine"]["cpus"] >= 1
    assert value["machine"]["openssl"].startswith("OpenSSL")
    assert value["generator_saturated"] is False
