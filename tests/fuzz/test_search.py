"""Run a short coverage-guided search where atheris is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import has_atheris
from tests.fuzz.corpus import ROOT
from tests.fuzz.targets import NAMES

RUNS = 150
"""Inputs per target, including the corpus."""


@pytest.mark.skipif(not has_atheris(), reason="atheris is not installed (it has wheels for Linux on x86-64)")
def test_coverage_guided_search_finds_no_violation(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--runs", str(RUNS), "--corpus", str(tmp_path)]
    # A search measured by coverage.py as well would exceed its CPU limits.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-6_000:]
    runs = [int(number) for number in re.findall(r"stat::number_of_executed_units: +(\d+)", done.stderr)]
    assert len(runs) == len(NAMES)
    assert min(runs) >= RUNS
