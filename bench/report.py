"""Figures held against their bars: the one report of every measurement.

Decides: whether a measurement passed, and what its table, its JSON and its exit code are.
Rules: a figure with a bar that could not be measured fails. An interrupted run proves nothing.
Must not know: what is measured, and how.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FAILED: Final = 1
INTERRUPTED: Final = 130
LABEL_WIDTH: Final = 36
"""That labels have beside their figures, if the names of the columns can be wrapped."""

GAP: Final = 3
"""Between two columns of a table."""


class Row(NamedTuple):
    """One figure, with at most one bar. A `value` of None means that it could not be measured."""

    key: str
    label: str
    value: float | None
    unit: str = ""
    below: float | None = None
    at_least: float | None = None
    equals: float | None = None
    aim: float | None = None
    """What the value should be below one day. A report shows where it is not, and does not fail."""

    @property
    def has_bar(self) -> bool:
        return (self.below, self.at_least, self.equals) != (None, None, None)

    @property
    def holds(self) -> bool:
        if self.value is None:
            return not self.has_bar
        return (
            (self.below is None or self.value < self.below)
            and (self.at_least is None or self.value >= self.at_least)
            and (self.equals is None or self.value == self.equals)
        )

    @property
    def target(self) -> str:
        """The bar as a table shows it; empty without one."""
        bars = (("<", self.below), (">=", self.at_least), ("=", self.equals))
        return " ".join(f"{sign} {bar:,.6g}" for sign, bar in bars if bar is not None)

    @property
    def figure(self) -> str:
        """The value as a table shows it."""
        if self.value is None:
            return "-"
        if not self.unit and self.value % 1 == 0:
            return f"{self.value:,.0f}"
        return f"{self.value:,.2f}" if self.value == 0 or abs(self.value) >= 1 else f"{self.value:.3g}"

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 6)
        return {**self._asdict(), "value": value, "holds": self.holds}


@dataclass(slots=True)
class Report:
    """The outcome of one measurement. `columns` are its figures by what they are of."""

    columns: dict[str, list[Row]]
    faults: list[str] = field(default_factory=list)
    """Reasons for failing that are not figures."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know beside the figures."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More for the JSON file."""
    interrupted: bool = False

    def reasons(self) -> list[str]:
        """Return why the measurement failed; an empty list if it passed."""
        missed = [
            (f"{column}: " if len(self.columns) > 1 else "")
            + f"{row.label}: {row.figure if row.value is not None else 'not measured'} {row.unit}".rstrip()
            + f", must be {row.target}"
            for column, rows in self.columns.items()
            for row in rows
            if not row.holds
        ]
        return [*missed, *self.faults]

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        return FAILED if self.reasons() else 0

    def row(self, key: str, column: str | None = None) -> Row:
        """Return the figure with this key, of the only column or the one named."""
        rows = next(iter(self.columns.values())) if column is None else self.columns[column]
        return next(row for row in rows if row.key == key)

    def show(self, console: Console) -> None:
        """Print the tables, the notes and the verdict."""
        for part in _parts(self.columns, console.width):
            console.print(_table(part))
        for note in self.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        console.print(Text(self.sentence(), self._style()), soft_wrap=True)

    def sentence(self) -> str:
        if self.interrupted:
            return "interrupted: the figures are those of a part of the run and prove nothing"
        reasons = self.reasons()
        return f"failed: {'; '.join(reasons)}" if reasons else "passed: every bar is met"

    def _style(self) -> str:
        return {0: "bold green", INTERRUPTED: "bold yellow"}.get(self.exit_code, "bold red")

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": not self.reasons() and not self.interrupted,
            "interrupted": self.interrupted,
            "reasons": self.reasons(),
            "notes": self.notes,
            "figures": {
                name: {row.key: row.as_json() for row in rows} for name, rows in self.columns.items()
            },
            **self.details,
        }


def new_console(width: int = 110) -> Console:
    """Return standard output. A file or a pipe has no width, and tables must not be cut there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def plain_table(title: str = "") -> Table:
    """Return an empty table in the style of all reports."""
    return Table(
        title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )


def _parts(columns: Mapping[str, Sequence[Row]], width: int) -> Iterator[dict[str, Sequence[Row]]]:
    """Yield the columns by table, as many in each as fit beside the labels."""
    rows = [row for column in columns.values() for row in column]
    longest = max((len(row.label) for row in rows), default=0)
    others = max((len(row.unit) for row in rows), default=0) + max(
        (len(_target(row)) for row in rows), default=0
    )
    room = width - min(longest, LABEL_WIDTH) - others - 2 * GAP
    part: dict[str, Sequence[Row]] = {}
    used = 0
    for name, column in columns.items():
        needed = GAP + max(len(word) for word in [*name.split(), *(_cell(row).plain for row in column), ""])
        if part and used + needed > room:
            yield part
            part, used = {}, 0
        part[name] = column
        used += needed
    yield part


def _table(columns: Mapping[str, Sequence[Row]]) -> Table:
    """Figures downwards, columns across, then the unit and the bar. Names are wrapped, figures never cut."""
    table = plain_table()
    longest = max((len(row.label) for rows in columns.values() for row in rows), default=0)
    table.add_column("", min_width=min(longest, LABEL_WIDTH))
    for name, rows in columns.items():
        table.add_column(name, justify="right", min_width=max((len(_cell(row)) for row in rows), default=0))
    table.add_column("unit", no_wrap=True)
    table.add_column("bar", justify="right", no_wrap=True)
    by_key: dict[str, dict[str, Row]] = {}
    for name, rows in columns.items():
        for row in rows:
            by_key.setdefault(row.key, {})[name] = row
    for found in by_key.values():
        first = next(iter(found.values()))
        targets = {_target(row) for row in found.values() if row.has_bar or row.aim is not None}
        cells = [_cell(found[name]) if name in found else Text() for name in columns]
        table.add_row(first.label, *cells, first.unit, targets.pop() if len(targets) == 1 else "")
    return table


def _target(row: Row) -> str:
    return row.target if row.aim is None else f"{row.target} (aim {row.aim:,.6g})".lstrip()


def _cell(row: Row) -> Text:
    if not row.holds:
        return Text(f"{row.figure} FAIL", "bold red")
    is_missed = row.aim is not None and row.value is not None and row.value >= row.aim
    return Text(f"{row.figure} aim: no" if is_missed else row.figure)


def counted(words: str, counts: Mapping[str, int]) -> Iterable[str]:
    """Yield one line for counts by cause, if there are any."""
    if counts:
        yield f"{words}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
