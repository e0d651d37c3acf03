"""The progress of a run: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from time import monotonic
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

LINE_PERIOD: Final = 2.0
"""Seconds between two plain lines of a phase."""

PLAIN_WIDTH: Final = 110


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s", "cyan")


class Bars:
    """A progress bar for each phase."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            console=console,
        )
        self._name = ""
        self._task: Task | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, label: str, total: int) -> None:
        self._name = name
        number = self._progress.add_task(label, total=total, failed="")
        self._task = next(each for each in self._progress.tasks if each.id == number)

    def update(self, counts: dict[str, int]) -> None:
        if self._task is not None and self._name in counts:
            failed = counts["failed"]
            self._progress.update(
                self._task.id, completed=counts[self._name], failed=f"{failed:,} failed" if failed else ""
            )


class Lines:
    """A line every LINE_PERIOD, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._label = ""
        self._total = 0
        self._started = 0.0
        self._reported = 0
        self._reported_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def phase(self, name: str, label: str, total: int) -> None:
        self._name, self._label, self._total = name, label, total
        self._started = self._reported_at = monotonic()
        self._reported = 0
        self._console.print(f"{label}: {total:,}")

    def update(self, counts: dict[str, int]) -> None:
        done = counts.get(self._name)
        now = monotonic()
        if (
            not done
            or done == self._reported
            or (done < self._total and now - self._reported_at < LINE_PERIOD)
        ):
            return
        self._reported, self._reported_at = done, now
        failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
        rate = done / max(now - self._started, 1e-3)
        self._console.print(f"{self._label}: {done:,} of {self._total:,} ({rate:,.0f}/s){failed}")


def new_console() -> Console:
    """Return a console on standard output. Without a terminal it is wide enough for all tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def view_for(console: Console) -> Bars | Lines:
    """Return bars for a terminal, and lines otherwise."""
    return Bars(console) if console.is_terminal else Lines(console)
