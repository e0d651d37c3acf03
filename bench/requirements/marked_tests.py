"""Requirements that tests show: `pytest -m requirement` is run once, and its results are mapped to rows.

A test shows a requirement by `@pytest.mark.requirement("key")`, with more than one key if it shows several. A
row holds if at least one of its tests passed, and none failed; a skipped test shows nothing.

This module is also the pytest plugin that writes the results to the file named by
`ZCPROTO_REQUIREMENT_RESULTS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.requirements.finding import Finding
from zcproto.errors import ZcprotoError

if TYPE_CHECKING:
    import pytest

ROOT: Final = Path(__file__).parents[2]
TIMEOUT_S: Final = 900.0
EXIT_CODES: Final = (0, 1, 5)
"""Of pytest: all passed, some failed, none collected. Others are errors of pytest or of collection."""

NAMED: Final = 3
"""Failed tests that a row names."""

_RESULTS: Final = "ZCPROTO_REQUIREMENT_RESULTS"
_PROPERTY: Final = "requirement"

Results = dict[str, dict[str, str]]
"""The outcome of each test ("passed", "failed" or "skipped"), by requirement and test."""


def run_marked_tests(keys: Sequence[str], folder: Path) -> Results:
    """Run the tests of these requirements. Raises ZcprotoError if pytest itself fails."""
    file = folder / "requirement_tests.json"
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    tests = [str(path) for path in files if _marks(path.read_text("utf-8"), keys)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        __name__,
        "-m",
        "requirement",
        "--no-header",
        *(tests or ["tests"]),
    ]
    environment = {**os.environ, _RESULTS: str(file), "ZCPROTO_REQUIREMENTS": ",".join(keys)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ZcprotoError(f"the tests took longer than {TIMEOUT_S:.0f} s") from error
    if done.returncode not in EXIT_CODES or not file.exists():
        raise ZcprotoError(
            f"pytest failed with exit code {done.returncode}: {(done.stdout + done.stderr)[-400:]}"
        )
    results: Results = json.loads(file.read_text(encoding="utf-8"))
    return results


def _marks(source: str, keys: Sequence[str]) -> bool:
    """Return whether a file may have tests of these requirements: others are not worth importing."""
    return "mark.requirement(" in source and any(key in source for key in keys)


def finding_of(results: Mapping[str, str]) -> Finding | None:
    """Return what the tests of one requirement show; None if none of them passed or failed."""
    passed = [test for test, outcome in results.items() if outcome == "passed"]
    failed = [test for test, outcome in results.items() if outcome == "failed"]
    if not passed and not failed:
        return None
    figure = f"{len(passed)} of {len(passed) + len(failed)} tests passed"
    if failed:
        figure += f"; failed: {', '.join(failed[:NAMED])}"
    return Finding(figure, not failed, values={"tests": len(passed)}, tests=tuple(results))


# --- the plugin --------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note the requirements of each test in its properties, and deselect tests of other requirements."""
    wanted = set(os.environ["ZCPROTO_REQUIREMENTS"].split(","))
    kept = []
    for item in items:
        keys = [key for mark in item.iter_markers("requirement") for key in mark.args if key in wanted]
        item.user_properties += [(_PROPERTY, key) for key in keys]
        if keys:
            kept.append(item)
    items[:] = kept


class _Recorder:
    """Collects the outcome of every test, by requirement."""

    def __init__(self) -> None:
        self.results: Results = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (
            report.when == "call" or report.outcome != "passed"
        ):  # a set-up that fails or skips is an outcome, too
            for name, key in report.user_properties:
                if name == _PROPERTY:
                    outcomes = self.results.setdefault(str(key), {})
                    if outcomes.get(report.nodeid) != "failed":
                        outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: Any) -> None:
        Path(os.environ[_RESULTS]).write_text(json.dumps(self.results), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Recorder())
