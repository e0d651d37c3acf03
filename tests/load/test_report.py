from __future__ import annotations

import io
import json

from rich.console import Console

from tests.load.helpers import latencies, plan, stats, verified_result
from tests.server.helpers import KEY
from zcproto.load.report import as_json, show
from zcproto.load.result import Moment, Reading, Result, Verdict
from zcproto.load.tally import Kind, Tally

BARS = {"memory_per_connection_kib": 38.0, "pause_connecting_ms": 5.0}


def shown(result: Result, bars: dict[str, float] | None = None) -> str:
    out = io.StringIO()
    show(result, Console(file=out, width=110, highlight=False), bars or {})
    return out.getvalue()


def row(text: str, label: str, table: str = "") -> list[str]:
    """The cells of the row with a label, the first after the title of a table."""
    lines = text[text.index(table) :].splitlines()
    line = next(line for line in lines if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def test_a_verified_run_says_so_with_its_figures() -> None:
    text = shown(verified_result())
    assert text.rstrip().endswith(
        "verified: 10 of 10 connections, 60 answers equal to what was sent, 0 errors"
    )
    assert row(text, "TCP and TLS handshake") == ["49", "2.50", "4.40", "4.90", "4.90", "4.90"]
    assert row(text, "connections", "Rate per second") == ["500", "500", "0.0"]
    assert row(text, "requests", "Rate per second") == ["200", "200", "0.2"]
    assert row(text, "requests", "Counted by both sides") == ["70", "70", "70", "ok"]
    assert row(text, "server memory per connection with its session") == ["36.00", "KiB"]
    assert row(text, "verified by a last request") == ["10", "10", "ok"]
    assert "What went wrong" not in text
    assert "saturated" not in text


def test_bars_are_shown_with_their_verdicts() -> None:
    text = shown(verified_result(), BARS)
    assert row(text, "server memory per connection with its session") == ["36.00", "KiB", "38", "ok"]
    assert row(text, "longest pause of the server's loop, connecting") == ["20.00", "ms", "5", "no"]
    assert row(text, "request under load, p99")[-1] == "ms"


def failed_result() -> Result:
    result = verified_result()
    result.record.tallies[Kind.LOAD] = Tally(50, 47, 40, 2, 4, {"INTERNAL": 1}, {"the connection is lost": 3})
    result.record.lost_links = {"truncated": 1}
    return result


def test_a_failed_run_says_why() -> None:
    text = shown(failed_result())
    assert row(text, "load: answered with INTERNAL") == ["1"]
    assert row(text, "load: not sent, the connection is lost") == ["3"]
    assert row(text, "load: unequal") == ["2"]
    assert row(text, "load: lost") == ["4"]
    assert row(text, "connection: truncated") == ["1"]
    assert "failed: 1 connections were not made or did not last; 2 requests of the load" in text


def test_an_interrupted_run_shows_what_there_is() -> None:
    result = Result(plan(), interrupted=True)
    text = shown(result)
    assert row(text, "TCP and TLS handshake") == ["0", "-", "-", "-", "-", "-"]
    assert row(text, "connections", "Counted by both sides") == ["10", "0", "-", "no"]
    assert "held connections before" not in text
    assert "interrupted: the figures are those of a part of the run" in text


def test_a_saturated_generator_is_told() -> None:
    result = verified_result()
    result.record.latencies["lag"] = latencies(50_000)
    assert "generator saturated" in shown(result)


def test_a_server_that_is_not_fresh_is_told() -> None:
    result = verified_result()
    assert "has held connections before" not in shown(result)
    result.readings[Moment.IDLE] = Reading(stats(handshakes=100), 3, 0.0)
    assert "has held connections before" in shown(result)


def test_the_json_has_everything_and_no_key() -> None:
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
        "what": "connections", "asked": 10, "client": 10, "server": 10, "agree": True,
    }  # fmt: skip
    assert value["over_time"] == {
        "tick_s": 0.25, "connected": {"0": 4, "1": 6}, "answered": {"2": 50, "3": 10},
    }  # fmt: skip
    assert value["machine"]["cpus"] >= 1
    assert value["machine"]["openssl"].startswith("OpenSSL")
    assert value["generator_saturated"] is False
