"""What OpenTelemetry costs a request: the counts, which do not depend on the machine, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import tracing
from bench.__main__ import main


@pytest.mark.skipif("sys.gettrace() is not None", reason="it counts with a trace function of its own")
def test_request_that_is_not_recorded_costs_a_few_bytecodes() -> None:
    figures = {row.key: row.value for row in tracing.counted_rows()}
    assert all(value is not None for value in figures.values())
    assert 0 <= (figures["bytecodes_off"] or 0) < tracing.MOST_BYTECODES
    assert 0 < (figures["bytecodes_unrecorded"] or 0) < (figures["bytecodes"] or 0) / 8
    assert (figures["bytecodes_recorded"] or 0) > (figures["bytecodes"] or 0)


@pytest.mark.slow
def test_small_run_measures_the_three_servers(tmp_path: Path) -> None:
    file = tmp_path / "tracing.json"
    assert main(["tracing", "--rounds", "1", "--requests", "2000", "--json", str(file)]) in {0, 1}
    written = json.loads(file.read_text())
    assert "off / without" in json.dumps(written)
