"""`zcproto-conformance CLIENT-COMMAND`; README.md of the distribution describes it."""

from __future__ import annotations

import asyncio
import fnmatch
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import click

from zcproto.common.clock import system_clock, system_entropy
from zcproto_conformance import report, scenarios, vectors
from zcproto_conformance.check import PARTS, Check
from zcproto_conformance.errors import KitError
from zcproto_conformance.harness import PATIENCE, Fixtures
from zcproto_conformance.run import (
    FAILED,
    PASSED,
    SKIPPED,
    Result,
    apply_exceptions,
    load_exceptions,
    run_checks,
)

CANNOT_RUN: Final = 2
_PACKAGE: Final = Path(__file__).resolve().parent


def default_vectors() -> Path:
    """Return the folder of the installed vectors, or `spec/vectors` when this runs from a checkout."""
    installed = _PACKAGE / "data"
    return installed if installed.is_dir() else _PACKAGE.parents[2] / "spec" / "vectors"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Run this part. Repeatable.")
@click.option(
    "--only",
    multiple=True,
    metavar="PATTERN",
    help="Run checks with a matching name, such as scripted/goaway-*. Repeatable.",
)
@click.option("--list", "lists", is_flag=True, help="List the checks and exit.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the results to FILE."
)
@click.option(
    "--exceptions",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Accept the failures listed in FILE.",
)
@click.option(
    "--vectors",
    "vectors_folder",
    type=click.Path(path_type=Path),
    default=default_vectors,
    metavar="DIR",
    help="Use the vectors in DIR instead of those of the kit.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0.1, 100),
    default=1.0,
    metavar="FACTOR",
    help="Multiply all timeouts, for a slow machine.",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=1, metavar="N", help="Run N checks concurrently.")
@click.option("--verbose", is_flag=True, help="Print each line between the kit and the program.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="CLIENT-COMMAND...")
def main(
    parts: tuple[str, ...],
    only: tuple[str, ...],
    lists: bool,
    json_file: Path | None,
    exceptions: Path | None,
    vectors_folder: Path,
    patience: float,
    jobs: int,
    verbose: bool,
    command: tuple[str, ...],
) -> None:
    """Check a client of ZCP/1 in any language. CLIENT-COMMAND runs its `conform` program."""
    try:
        known = all_checks(vectors_folder)
        chosen = choose(known, parts or PARTS, only)
        if lists:
            _echo(report.listing(chosen))
            return
        if not command:
            raise KitError("no command; give the command that runs the client's program")
        allowed = load_exceptions(exceptions) if exceptions is not None else {}
        results = run(chosen, command, patience=PATIENCE * patience, jobs=jobs, verbose=verbose)
        results, faults = apply_exceptions(results, allowed, {check.name for check in known})
        noted = [result for result in results if result.result not in (PASSED, SKIPPED)]
        _echo(line for result in noted for line in report.lines_of(result))
        _echo(report.table(results))
        _echo(faults)
        if json_file is not None:
            report.write_json(json_file, command, results, faults)
    except (KitError, OSError) as error:
        click.echo(f"the kit cannot run: {error}", err=True)
        sys.exit(CANNOT_RUN)
    sys.exit(1 if faults or any(result.result == FAILED for result in results) else 0)


def all_checks(vectors_folder: Path) -> list[Check]:
    """Return all checks in the order of the parts. Raises KitError if the vectors cannot be read."""
    return [*vectors.checks(vectors_folder), *scenarios.scripted(), *scenarios.with_real_server()]


def choose(checks: Sequence[Check], parts: Sequence[str], only: Sequence[str]) -> list[Check]:
    """Return the checks of these parts whose names match. Raises KitError if none does."""
    chosen = [
        check
        for check in checks
        if report.part_of(check) in parts
        and (not only or any(fnmatch.fnmatchcase(check.name, pattern) for pattern in only))
    ]
    if not chosen:
        raise KitError("no check matches; run --list to see all")
    return chosen


def run(
    checks: Sequence[Check], command: Sequence[str], *, patience: float, jobs: int = 1, verbose: bool = False
) -> list[Result]:
    """Run checks in a temporary folder."""
    on_line = (lambda line: click.echo(line, err=True)) if verbose else None

    async def run_all(folder: Path) -> list[Result]:
        fixtures = Fixtures(folder, system_clock, system_entropy)
        return await run_checks(checks, command, fixtures, patience=patience, jobs=jobs, on_line=on_line)

    with tempfile.TemporaryDirectory(prefix="zcproto-conformance-") as folder:
        return asyncio.run(run_all(Path(folder)))


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


if __name__ == "__main__":
    main()
