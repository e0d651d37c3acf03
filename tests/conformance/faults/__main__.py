"""`python -m tests.conformance.faults`: every conversation must fail against the client with its one fault."""

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
from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance import scenarios
from zcproto_conformance.check import Check
from zcproto_conformance.errors import CheckFailed, KitError
from zcproto_conformance.program import Program, Refused
from zcproto_conformance.run import PASSED, Result, run_checks
from zcproto_conformance.stage import Fixtures

PATIENCE: Final = 3.0
"""Seconds that a faulty client gets: many of these faults are that something never comes."""

JOBS: Final = 8
"""Programs at a time. They do next to nothing but wait for what never comes."""

PROGRAM: Final = (sys.executable, "-m", "tests.conformance.faulty_client")


async def seen_to_fail(
    checks: Sequence[Check],
    *,
    patience: float = PATIENCE,
    jobs: int = JOBS,
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run each check against the client with its fault, several at a time: most of them wait."""
    with tempfile.TemporaryDirectory(prefix="zcproto-conformance-") as folder:
        return await run_checks(
            checks,
            PROGRAM,
            Fixtures(Path(folder), system_clock, system_entropy),
            patience=patience,
            jobs=jobs,
            prepare=put_in,
            on_result=on_result,
        )


async def put_in(program: Program, check: Check) -> None:
    """Put the fault of a check into a client's program, in place of the one before. Raises KitError."""
    try:
        await (await program.begin("fault", {"check": check.name}))
    except (CheckFailed, Refused) as error:
        raise KitError(f"{check.name}: its fault cannot be put in: {error}\n{program.stderr}") from error


@click.command()
@click.option(
    "--only", default="*", metavar="PATTERN", help="Checks of this name, such as scripted/goaway-*."
)
@click.option("--patience", type=click.FloatRange(0.1, 100), default=1.0, metavar="FACTOR")
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=JOBS, show_default=True, help="Conversations at a time."
)
def main(only: str, patience: float, jobs: int) -> None:
    """Show that each conversation fails against a client with the one fault that it is there to find."""
    chosen = [check for check in scenarios.checks() if fnmatch.fnmatchcase(check.name, only)]
    without = [check.name for check in chosen if check.name not in FAULTS]
    if without:
        raise click.ClickException(f"no fault for {', '.join(without)}")

    def tell(result: Result) -> None:
        seen = "PASSES" if result.result == PASSED else "fails"
        why = result.why.partition("\n")[0][:200]
        click.echo(f"{seen:7}{result.check.name}: {FAULTS[result.check.name].what} -> {why}")

    results = asyncio.run(seen_to_fail(chosen, patience=PATIENCE * patience, jobs=jobs, on_result=tell))
    blind = [result.check.name for result in results if result.result == PASSED]
    click.echo(f"{len(results)} conversations, {len(results) - len(blind)} of them fail against their fault")
    sys.exit(1 if blind else 0)


if __name__ == "__main__":
    main()
