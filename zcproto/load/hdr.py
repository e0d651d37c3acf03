"""Percentiles of measured latencies, and files for the HdrHistogram tools, which need the extra "hdr"."""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TextIO

from zcproto.load.record import TICKS_PER_SECOND, Latencies, Record

NS_PER_US: Final = 1_000
LONGEST_NS: Final = 3_600 * 1_000_000_000
SIGNIFICANT_DIGITS: Final = 3
NS_PER_MS: Final = 1_000_000.0
US_PER_MS: Final = 1_000.0
PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
TICKS_PER_HALF_DISTANCE: Final = 5


def histogram(latencies: Latencies) -> Any:
    """Return an HdrHistogram in nanoseconds, the unit of its tools."""
    from hdrh.histogram import HdrHistogram  # noqa: PLC0415 - of an extra

    made = HdrHistogram(NS_PER_US, LONGEST_NS, SIGNIFICANT_DIGITS)
    for micros, count in latencies.counts.items():
        made.record_value(min(micros * NS_PER_US, LONGEST_NS), count)
    return made


def percentiles_ms(latencies: Latencies) -> dict[str, float]:
    """Return the PERCENTILES and `max` in milliseconds, or an empty dict without latencies."""
    if not latencies.counts:
        return {}
    micros = sorted(latencies.counts)
    seen = [*accumulate(latencies.counts[each] for each in micros)]
    ranks = {name: max(1, int(percent / 100 * seen[-1] + 0.5)) for name, percent in PERCENTILES.items()}
    figures = {
        name: min(micros[bisect_left(seen, rank)], latencies.max_us) / US_PER_MS
        for name, rank in ranks.items()
    }
    return {**figures, "max": latencies.max_us / US_PER_MS}


def write_file(path: Path, record: Record, started: float) -> None:
    """Write latencies for the HdrHistogram tools. `started` is the start of the run in Unix seconds.

    `NAME.hgrm` is the percentile distribution of the load's requests or items in milliseconds, for the plotter. Any
    other name is a histogram log (version 1.2) of all latencies, with an interval for each second of the load.
    """
    if path.suffix == ".hgrm":
        path.write_bytes(_distribution(record.latencies["item" if record.items.planned else "request"]))
        return
    with path.open("w", encoding="ascii") as file:
        _write_log(file, record, started)


def _distribution(latencies: Latencies) -> bytes:
    made = histogram(latencies)
    text = io.BytesIO()
    made.output_percentile_distribution(text, NS_PER_MS, TICKS_PER_HALF_DISTANCE)
    # The library scales every number except the deviation.
    deviation = b"StdDeviation   = %12.3f" % (made.get_stddev() / NS_PER_MS)
    return re.sub(rb"StdDeviation   = *[0-9.]+", deviation, text.getvalue())


def _write_log(file: TextIO, record: Record, started: float) -> None:
    file.write("#[Latencies in nanoseconds, from when each was due]\n")
    file.write("#[Histogram log format version 1.2]\n")
    file.write(f"#[StartTime: {started:.3f} (seconds since epoch)]\n")
    file.write('"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"\n')
    for second, latencies in sorted(record.request_by_second.items()):
        _write_interval(file, "", second, 1, latencies)
    ended = max((*record.answered_over_time, *record.connected_over_time), default=0) / TICKS_PER_SECOND
    for name in ("handshake", "session_open", "first_item", "between_items", "last_request"):
        if record.latencies[name].counts:
            _write_interval(file, f"Tag={name},", 0, ended + 1 / TICKS_PER_SECOND, record.latencies[name])


def _write_interval(file: TextIO, tag: str, start: float, length: float, latencies: Latencies) -> None:
    encoded = histogram(latencies).encode().decode("ascii")
    file.write(f"{tag}{start:.3f},{length:.3f},{latencies.max_us / 1000:.3f},{encoded}\n")
