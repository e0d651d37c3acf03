"""`python -m bench requirements` and `python -m bench curves`: from the options to the exit code."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from bench import machine
from bench.command import OUTPUT, write_json
from bench.curves.run import Grown
from bench.report import new_console
from bench.requirements import table
from bench.requirements.run import Run, run_requirements
from bench.requirements.sizes import FULL, QUICK
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.report import moment

ENVIRONMENT: Final = "ZCPROTO_"
WIDTH: Final = 150
"""Of tables that go into a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Files:
    """Files to write, if any."""

    json: Path | None = None
    markdown: Path | None = None


def options(function: Callable[..., int]) -> Callable[..., int]:
    """Add the options that both commands have."""
    for option in (
        click.option("--markdown", type=OUTPUT, metavar="FILE", help="Write it as Markdown, with plots."),
        click.option("--json", type=OUTPUT, metavar="FILE", help="Write everything measured."),
        click.option(
            "--step", "steps", multiple=True, metavar="NAME", help="This step alone; may be repeated."
        ),
        click.option("--quick", is_flag=True, help="Small numbers, to see whether all of it works."),
    ):
        function = option(function)
    return function


@click.command()
@options
@click.option("--curves", "with_curves", is_flag=True, help="Measure the curves, too.")
def requirements(quick: bool, steps: tuple[str, ...], with_curves: bool, **files: Path | None) -> int:
    """Check every requirement: a table; exit code 1 if any fails or could not be checked."""
    return measure(requirements=True, curves=with_curves, quick=quick, only=steps, files=Files(**files))


@click.command()
@options
def curves(quick: bool, steps: tuple[str, ...], **files: Path | None) -> int:
    """Measure how cost grows by connections, payload, depth and sessions."""
    return measure(requirements=False, curves=True, quick=quick, only=steps, files=Files(**files))


def measure(*, requirements: bool, curves: bool, quick: bool, only: Sequence[str], files: Files) -> int:
    """Measure what is asked for, print it, write the files; return the exit code. Raises ConfigError.

    `only` are names of steps, of the requirements if they are measured, else of the curves.
    """
    for path in (files.json, files.markdown):
        check_outputs(Outputs(json=path))
    importlib.import_module("matplotlib")  # fail before the run if it is not installed
    progress, described, started = Console(stderr=True, highlight=False), machine.machine(), time.time()
    run = grown = None
    with default_settings():
        if requirements:
            run = run_requirements(QUICK if quick else FULL, progress, only)
            table.show(run, new_console(WIDTH))
        if curves:
            grown = _curves(quick, () if requirements else only, progress)
    _write(files, described, started, run, grown)
    return 0 if all(each is None or each.passes for each in (run, grown)) else 1


@contextmanager
def default_settings() -> Iterator[None]:
    """Ignore the environment's settings: the requirements are about the configuration written here."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _curves(quick: bool, only: Sequence[str], progress: Console) -> Grown:
    from bench.curves import report, run, sizes  # noqa: PLC0415  matplotlib takes half a second to import

    grown = run.run_curves(sizes.QUICK if quick else sizes.FULL, progress, only)
    report.show(grown, new_console(WIDTH))
    return grown


def _write(
    files: Files, described: dict[str, Any], started: float, run: Run | None, grown: Grown | None
) -> None:
    from bench.curves import report  # noqa: PLC0415  matplotlib takes half a second to import
    from bench.requirements import markdown  # noqa: PLC0415  it imports matplotlib
    from bench.requirements.plots import plots  # noqa: PLC0415  it imports matplotlib

    if files.json is not None:
        content = {} if run is None else table.as_json(run)
        write_json(
            files.json, started, content | ({} if grown is None else {"curves": report.as_json(grown)})
        )
    if files.markdown is not None:
        lines = markdown.beginning(moment(started), machine.sentence(described))
        if run is not None:
            lines += markdown.requirements(run) + markdown.save_plots(files.markdown, plots(run.drawn))
        if grown is not None:
            lines += report.markdown(grown, files.markdown)
        files.markdown.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
