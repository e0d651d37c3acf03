"""One curve: the cost at each size, and the words for how it grows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from bench.curves.fit import FLAT, LEAST, Fit, growth, line, power

CLEAR: Final = 0.5
"""A fit with a smaller R2 does not describe the series."""

MUCH: Final = 2.0
"""A series without a fit that varies by a smaller factor is called constant."""


class Series(NamedTuple):
    """One cost at each size."""

    name: str
    unit: str
    values: tuple[float, ...]


class Described(NamedTuple):
    """A series with its fits, and the sentence about them."""

    series: Series
    line: Fit | None
    power: Fit | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Curve:
    """Costs by one size. With `inverse` the requests of a write share its cost: the line is in 1/size."""

    key: str
    title: str
    size: str
    """The unit of the size, in the singular: `connection`."""
    axis: str
    """The same in the plural, for tables and plots."""
    sizes: tuple[int, ...]
    series: tuple[Series, ...]
    how: str
    inverse: bool = False
    notes: tuple[str, ...] = field(default=())

    def described(self) -> list[Described]:
        return [self._describe(each) for each in self.series]

    def _describe(self, series: Series) -> Described:
        xs = [1 / size if self.inverse else float(size) for size in self.sizes]
        pairs = [(x, y) for x, y in zip(xs, series.values, strict=True) if y > 0]
        if len(pairs) < LEAST:
            return Described(series, None, None, f"{series.name}: too few points for a fit")
        sizes, costs = [x for x, _ in pairs], [y for _, y in pairs]
        straight, by_power = line(sizes, costs), power(sizes, costs)
        assert straight is not None
        assert by_power is not None
        return Described(series, straight, by_power, self._sentence(series, costs, sizes, straight, by_power))

    def _sentence(
        self, series: Series, costs: Sequence[float], sizes: Sequence[float], straight: Fit, by_power: Fit
    ) -> str:
        name, unit = series.name, series.unit
        spread = f"{number(min(costs))} to {number(max(costs))} {unit}"
        if self.inverse:
            return (
                f"{name}: {number(straight.base)} {unit} for each request and {number(straight.slope)} {unit} for "
                f"each write (R² {straight.r2:.3f}); {spread}"
            )
        exponent = f"exponent {by_power.slope:.2f}, R² {by_power.r2:.3f}"
        noise = max(straight.r2, by_power.r2) < CLEAR
        if noise and max(costs) > MUCH * min(costs):
            return f"{name} has no clear trend: {spread} ({exponent})"
        if noise or abs(by_power.slope) <= FLAT:
            return f"{name} hardly grows: {spread} ({exponent})"
        if _error(straight, sizes, costs) <= _error(by_power, sizes, costs):
            sign = "+" if straight.slope >= 0 else "-"
            each = f"{sign} {number(abs(straight.slope))} {unit} for each {self.size}"
            return f"{name}: {number(straight.base)} {unit} {each} (R² {straight.r2:.3f}); {spread}"
        return f"{name} {growth(by_power)}: {spread} ({exponent})"

    def as_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "title": self.title,
            "size": self.size,
            "how": self.how,
            "notes": list(self.notes),
            "sizes": list(self.sizes),
            "series": [
                {
                    "name": each.series.name,
                    "unit": each.series.unit,
                    "values": [round(value, 6) for value in each.series.values],
                    "line": None if each.line is None else each.line._asdict(),
                    "power": None if each.power is None else each.power._asdict(),
                    "growth": each.sentence,
                }
                for each in self.described()
            ],
        }


def best(described: Described, sizes: Sequence[float]) -> Fit | None:
    """Return the fit with the smaller relative errors at these sizes."""
    if described.line is None or described.power is None:
        return None
    pairs = [(x, y) for x, y in zip(sizes, described.series.values, strict=True) if y > 0]
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    return min((described.line, described.power), key=lambda fit: _error(fit, xs, ys))


def _error(fit: Fit, sizes: Sequence[float], costs: Sequence[float]) -> float:
    return sum((fit.at(x) / y - 1) ** 2 for x, y in zip(sizes, costs, strict=True))


def number(value: float) -> str:
    """Format with three significant digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"
