"""`zcproto bench --requirements` and `--curves`: from the options to the exit code."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from bench.curves.run import Grown
from bench.requirements import machine, table
from bench.requirements.run import Run, run_requirements
from bench.requirements.sizes import FULL, QUICK
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

ENVIRONMENT: Final = "ZCPROTO_"
WIDTH: Final = 150
"""Of tables that go into a file or a pipe."""


@dataclass(frozen=True, slots=True)
class Files:
    """What to write, if anything."""

    json: Path | None = None
    html: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Raises ConfigError for files that could not be written: it would be a pity to find out after minutes."""
        faults = [
            f"{escape_text(str(path))}: cannot be written; name a file in a folder of yours"
            for path in (self.json, self.html, self.markdown)
            if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK)
        ]
        if faults:
            raise ConfigError(faults)


def measure(*, requirements: bool, curves: bool, quick: bool, only: Sequence[str], files: Files) -> int:
    """Measure what is asked for, print it, write the files. `only` are steps of one of the two.

    1 if a requirement fails or has no figure, or a curve could not be measured, else 0. Raises ConfigError.
    """
    files.check()
    if requirements and curves and only:
        raise ConfigError(
            ["--step: there are steps of the requirements and of the curves; ask for one of the two"]
        )
    importlib.import_module("matplotlib")  # if it is not installed, better to know now
    progress, told, started = Console(stderr=True, highlight=False), machine.machine(), time.time()
    run = grown = None
    with default_settings():
        if requirements:
            run = run_requirements(QUICK if quick else FULL, progress, only)
            table.show(run, _console())
        if curves:
            grown = _curves(quick, only, progress)
    _write(files, told, started, run, grown)
    return 0 if all(each is None or each.passes for each in (run, grown)) else 1


@contextmanager
def default_settings() -> Iterator[None]:
    """Without what the environment says of settings: the requirements are about what is configured here."""
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
    report.show(grown, _console())
    return grown


def _console() -> Console:
    """Standard output. What is no terminal has no width, and tables must not be cut there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _write(files: Files, told: dict[str, Any], started: float, run: Run | None, grown: Grown | None) -> None:
    from bench import page  # noqa: PLC0415  likewise
    from bench.curves import report  # noqa: PLC0415  likewise
    from bench.requirements import html, text  # noqa: PLC0415  matplotlib takes half a second to import

    if files.json is not None:
        content: dict[str, Any] = {"started": table.moment(started), "machine": told}
        content |= {} if run is None else table.as_json(run)
        content |= {} if grown is None else {"curves": report.as_json(grown)}
        files.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    meta = f"{table.moment(started)}. {machine.sentence(told)}"
    if files.html is not None:
        parts = [page.paragraph(meta, "meta")]
        parts += [] if run is None else html.parts(run)
        parts += [] if grown is None else report.html(grown)
        title = "zcproto: how cost grows" if run is None else "zcproto: requirements and what holds"
        files.html.write_text(page.page(title, parts), encoding="utf-8")
    if files.markdown is not None:
        lines = text.beginning(table.moment(started), machine.sentence(told))
        lines += [] if run is None else text.requirements(run)
        lines += [] if grown is None else report.markdown(grown)
        files.markdown.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
