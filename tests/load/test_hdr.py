from __future__ import annotations

import re
from pathlib import Path

import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from tests.load.helpers import latencies, verified_result
from zcproto.load.hdr import LONGEST_NS, histogram, percentiles_ms, write_file
from zcproto.load.record import Latencies, Record


def test_percentiles_match_the_counts() -> None:
    counted = latencies(*range(1, 1_001))
    assert percentiles_ms(counted) == pytest.approx(
        {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}, rel=0.002
    )
    figures = percentiles_ms(latencies(1_234_567))
    assert figures["p99.9"] <= figures["max"] == pytest.approx(1234.567, abs=0.001)
    assert percentiles_ms(Latencies()) == {}


def test_duration_beyond_an_hour_counts_as_an_hour() -> None:
    made = histogram(Latencies({2 * 3_600_000_000: 1}, 2 * 3_600_000_000))
    assert made.get_total_count() == 1
    assert made.get_max_value() == pytest.approx(LONGEST_NS, rel=0.001)


def test_log_is_readable_by_hdrhistogram(tmp_path: Path) -> None:
    path = tmp_path / "run.hlog"
    record = verified_result().record
    write_file(path, record, 1_800_000_000.0)
    lines = path.read_text().splitlines()
    assert lines[1] == "#[Histogram log format version 1.2]"
    reader = HistogramLogReader(str(path), HdrHistogram(1, LONGEST_NS, 3))
    found = []
    while (interval := reader.get_next_interval_histogram()) is not None:
        found.append((interval.get_tag(), interval.get_start_time_stamp(), interval.get_total_count()))
    reader.close()
    start = 1_800_000_000_000
    assert found == [
        (None, start, 3),
        (None, start + 2_000, 1),
        ("handshake", start, 49),
        ("session_open", start, 49),
        ("first_item", start, 49),
        ("between_items", start, 49),
        ("last_request", start, 49),
    ]
    assert reader.get_start_time_sec() == 1_800_000_000.0
    write_file(path, Record(), 1_800_000_000.0)
    assert len(path.read_text().splitlines()) == 4  # only its header


def test_percentile_distribution_is_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "run.hgrm"
    record = Record()
    record.latencies["request"] = latencies(*[1_000] * 50, *[3_000] * 50)
    write_file(path, record, 0.0)
    text = path.read_text()
    assert text.split()[:4] == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    rows = [line.split() for line in text.splitlines()[2:] if not line.startswith("#")]
    assert float(rows[0][0]) == pytest.approx(1.0, rel=0.002)
    assert float(rows[-1][0]) == pytest.approx(3.0, rel=0.002)
    assert rows[-1][2] == "100"
    (mean, deviation) = re.findall(r"#\[Mean += +([0-9.]+), StdDeviation += +([0-9.]+)\]", text)[0]
    assert [float(mean), float(deviation)] == pytest.approx([2.0, 1.0], rel=0.01)
