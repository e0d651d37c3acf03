"""The progress of a run: one line that is rewritten on a terminal, a line every LINE_PERIOD elsewhere."""

from __future__ import annotations

from time import monotonic
from typing import Final, TextIO

import click

LINE_PERIOD: Final = 2.0
"""Seconds between two lines of a phase in a log or a pipe."""


class Progress:
    """Prints what is done of each phase. `close` ends its last line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rewrites = out.isatty()
        self._is_open = False
        self._name = ""
        self._label = ""
        self._total = 0
        self._started = 0.0
        self._reported = 0
        self._reported_at = 0.0

    def phase(self, name: str, label: str, total: int) -> None:
        self.close()
        self._name, self._label, self._total = name, label, total
        self._started = self._reported_at = monotonic()
        self._reported = 0
        self._print(f"{label}: {total:,}")

    def update(self, counts: dict[str, int]) -> None:
        done = counts.get(self._name)
        now = monotonic()
        is_due = self._rewrites or now - self._reported_at >= LINE_PERIOD
        if not done or done == self._reported or (done < self._total and not is_due):
            return
        self._reported, self._reported_at = done, now
        failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
        rate = done / max(now - self._started, 1e-3)
        self._print(f"{self._label}: {done:,} of {self._total:,} ({rate:,.0f}/s){failed}")

    def close(self) -> None:
        if self._is_open:
            click.echo(file=self._out)
            self._is_open = False

    def _print(self, text: str) -> None:
        self._is_open = self._rewrites
        click.echo(f"\r{text}\x1b[K" if self._rewrites else text, self._out, nl=not self._rewrites)
