"""Commands of `python -m bench`: what every measurement has in common on the command line."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from bench.machine import machine
from bench.report import Report, Row, new_console
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.report import moment

SCHEMA: Final = "zcproto-measurement/1"

COUNT: Final = click.IntRange(1, 1_000_000)
RATE: Final = click.FloatRange(0.01, 1_000_000)
SECONDS: Final = click.FloatRange(0.01, 1_000_000)
OUTPUT: Final = click.Path(path_type=Path, dir_okay=False)
FOLDER: Final = click.Path(path_type=Path, file_okay=False, exists=True)


def measurement(measure: Callable[..., Report | Sequence[Row]]) -> click.Command:
    """Make a command of a function that measures: `--json`, the table, and the verdict as exit code.

    The function takes its options as keywords; its module's docstring is the help.
    """

    @functools.wraps(measure)
    def run(*, json_file: Path | None, **options: Any) -> int:
        check_outputs(Outputs(json=json_file))
        started = time.time()
        found = measure(**options)
        report = found if isinstance(found, Report) else Report({"figure": [*found]})
        report.show(new_console())
        if json_file is not None:
            write_json(json_file, started, {"options": options, **report.as_json()})
        return report.exit_code

    with_json = click.option(
        "--json", "json_file", type=OUTPUT, metavar="FILE", help="Write everything measured."
    )
    text = sys.modules[measure.__module__].__doc__ or ""
    name = measure.__module__.rpartition(".")[2]
    return click.command(name, help=_help(text))(with_json(run))


def _help(text: str) -> str:
    """Keep the line breaks of each paragraph, which click would join."""
    return "\n\n".join(f"\b\n{paragraph}" for paragraph in text.strip().split("\n\n"))


def write_json(path: Path, started: float, content: dict[str, Any]) -> None:
    """Write a measurement with when and where it was made. `started` is in Unix seconds."""
    head = {"schema": SCHEMA, "started": moment(started), "machine": machine()}
    path.write_text(json.dumps({**head, **content}, indent=2, default=str) + "\n", encoding="utf-8")


def progress(line: str) -> None:
    """Print a line about how the measurement goes on, beside its output."""
    print(line, file=sys.stderr, flush=True)
