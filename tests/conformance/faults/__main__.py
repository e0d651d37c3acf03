"""`python -m tests.conformance.faults`: every scripted scenario must fail against the client with its fault."""

from __future__ import annotations

import asyncio
import fnmatch
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import click

from tests.conformance.faults import FAULTS
from tests.wire.vectors import FOLDER
from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance import scenarios, vectors
from zcproto_conformance.check import Check
from zcproto_conformance.errors import CheckFailed, KitError
from zcproto_conformance.harness import Fixtures
from zcproto_conformance.program import Program, StepFailed
from zcproto_conformance.run import PASSED, Result, run_checks

PATIENCE: Final = 3.0
"""Timeout in seconds: with many of these faults, something expected never happens."""

JOBS: Final = 8
"""Concurrent programs. They mostly wait for a timeout."""

PROGRAM: Final = (sys.executable, "-m", "tests.conformance.faulty_client")


async def run_against_faults(
    checks: Sequence[Check],
    *,
    patience: float = PATIENCE,
    jobs: int = JOBS,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run each check against the client with its fault."""
    with tempfile.TemporaryDirectory(prefix="zcproto-conformance-") as folder:
        return await run_checks(
            checks,
            PROGRAM,
            Fixtures(Path(folder), system_clock, system_entropy),
            patience=patience,
            jobs=jobs,
            prepare=apply_fault,
            on_result=on_result,
        )


async def apply_fault(program: Program, check: Check) -> None:
    """Replace the fault in a client's program by that of a check. Raises KitError."""
    try:
        await (await program.begin("fault", {"check": check.name}))
    except (CheckFailed, StepFailed) as error:
        raise KitError(f"{check.name}: cannot apply its fault: {error}\n{program.stderr}") from error


@click.command()
@click.option(
    "--only", default="*", metavar="PATTERN", help="Run matching checks, such as scripted/goaway-*."
)
@click.option("--patience", type=click.FloatRange(0.1, 100), default=1.0, metavar="FACTOR")
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=JOBS, show_default=True, help="Concurrent scenarios."
)
def main(only: str, patience: float, jobs: int) -> None:
    """Check that each scripted scenario fails against a client with the fault it exists to detect."""
    checks = [*scenarios.scripted(), *(check for check in vectors.checks(FOLDER) if check.name in FAULTS)]
    chosen = [check for check in checks if fnmatch.fnmatchcase(check.name, only)]
    without = [check.name for check in chosen if check.name not in FAULTS]
    if without:
        raise click.ClickException(f"no fault for {', '.join(without)}; add one to tests/conformance/faults")

    def report(result: Result) -> None:
        outcome = "PASSES" if result.result == PASSED else "fails"
        why = result.why.partition("\n")[0][:200]
        click.echo(f"{outcome:7}{result.check.name}: {FAULTS[result.check.name].what} -> {why}")

    results = asyncio.run(
        run_against_faults(chosen, patience=PATIENCE * patience, jobs=jobs, on_result=report)
    )
    undetected = [result.check.name for result in results if result.result == PASSED]
    click.echo(f"{len(results)} scenarios, {len(results) - len(undetected)} of them detect their fault")
    sys.exit(1 if undetected else 0)


if __name__ == "__main__":
    main()
