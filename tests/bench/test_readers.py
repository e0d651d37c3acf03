"""Readers: a small run of all kinds, in which one bar cannot be met."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.scenarios import reader_app
from bench.scenarios import readers as module
from bench.scenarios.readers import KINDS, ReadersPlan


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_small_run_detects_an_unmet_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # No duration is promised on a machine that runs tests.
    monkeypatch.setattr(module, "MAX_SLICE_MS", 1e9)
    monkeypatch.setattr(module, "P99_MS", 1e9)
    monkeypatch.setattr(module, "MAX_UNREAD_KIB", 1.0)
    monkeypatch.setattr(module, "ReadersPlan", partial(ReadersPlan, events=2, unread=20, honest=2, rate=50.0))
    file = tmp_path / "readers.json"
    arguments = ["--subscribers", "70", "--hasty", "1600", "--json", str(file)]
    assert main(["scenario", "readers", *arguments]) == 1, capsys.readouterr()
    found = json.loads(file.read_text())
    assert [*found["figures"]] == [*KINDS]
    (reason,) = found["reasons"]
    assert reason.startswith("unread: memory that each takes")
    assert found["figures"]["hasty"]["alive"]["value"] > 1


def test_application_of_the_scenario_has_its_methods() -> None:
    shapes = {method.name: method.shape for method in reader_app.app}
    assert (
        shapes.items() >= {"news": "server", "fill": "server", "hold": "server", "publish": "unary"}.items()
    )
