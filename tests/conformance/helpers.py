"""Run the kit in a test: against the Python client, and against faulty programs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.limits import TIMEOUT
from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance import scenarios
from zcproto_conformance.check import Check
from zcproto_conformance.harness import Fixtures
from zcproto_conformance.run import PASSED, Result, run_checks

PYTHON_CLIENT = (sys.executable, "-m", "zcproto_conformance.python_client")
SCRIPTED = {check.name: check for check in scenarios.scripted()}


async def results_of(
    checks: Sequence[Check],
    command: Sequence[str] = PYTHON_CLIENT,
    *,
    patience: float = TIMEOUT,
    jobs: int = 1,
) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        fixtures = Fixtures(Path(folder), system_clock, system_entropy)
        return await run_checks(checks, command, fixtures, patience=patience, jobs=jobs)


def failures(results: Sequence[Result]) -> list[str]:
    return [f"{result.check.name}: {result.why}" for result in results if result.result != PASSED]


def program(*answers: str) -> list[str]:
    """Return the command of a program that answers hello, and then each step with the next of these lines."""
    hello = '{"id": 1, "ok": {"kit": 1, "client": "faulty/1"}}'
    source = (
        "import sys\n"
        f"for answer in {[hello, *answers]!r}:\n"
        "    if not sys.stdin.readline(): break\n"
        "    print(answer, flush=True)\n"
    )
    return [sys.executable, "-c", source]
