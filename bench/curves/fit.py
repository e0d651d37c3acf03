"""How a series grows: lines by least squares, and the words for them. Pure.

Two forms are tried. A line, cost = base + slope * size, has the cost of each one more; its squares are of the
relative errors, because small points would otherwise have no weight beside large ones. A power, cost = base *
size ** exponent, is a line on two logarithmic scales; its exponent is how the cost grows: 0 not at all, 1 in
proportion. R2 is the part of the variation that a fit explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

LEAST: Final = 3
"""Points that a fit needs: any two are on a line."""

FLAT: Final = 0.1
"""Exponents up to this are called flat: a factor of two over three orders of magnitude."""

LINEAR: Final = (0.9, 1.1)


class Fit(NamedTuple):
    """cost = base + slope * size, or cost = base * size ** slope."""

    power: bool
    base: float
    slope: float
    r2: float
    """Of the costs themselves for a line, of their logarithms for a power."""

    def at(self, size: float) -> float:
        return self.base * size**self.slope if self.power else self.base + self.slope * size


def line(sizes: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """Fit by least squares of the relative errors. None for too few points. All costs must be above 0."""
    if len(sizes) < LEAST:
        return None
    base, slope = _least_squares(sizes, costs, [1 / cost**2 for cost in costs])
    return Fit(
        False, base, slope, _r2([base + slope * size for size in sizes], costs, [1 / c**2 for c in costs])
    )


def power(sizes: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """Fit by least squares of the logarithms. None for too few points. Sizes and costs must be above 0."""
    if len(sizes) < LEAST:
        return None
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    base, slope = _least_squares(xs, ys, [1.0] * len(xs))
    return Fit(True, math.exp(base), slope, _r2([base + slope * x for x in xs], ys, [1.0] * len(xs)))


def _least_squares(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return the intercept and the slope of the line."""
    total = sum(weights)
    x_mean, y_mean = (sum(w * v for w, v in zip(weights, values, strict=True)) / total for values in (xs, ys))
    spread = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    if spread == 0:
        return y_mean, 0.0
    both = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True))
    return y_mean - both / spread * x_mean, both / spread


def _r2(fitted: Sequence[float], ys: Sequence[float], weights: Sequence[float]) -> float:
    """Return R2: 1 if all points are on the line, 0 if their mean is as good."""
    mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / sum(weights)
    total = sum(w * (y - mean) ** 2 for w, y in zip(weights, ys, strict=True))
    rest = sum(w * (y - f) ** 2 for w, y, f in zip(weights, ys, fitted, strict=True))
    return 1.0 if total == 0 else 1 - rest / total


def growth(fit: Fit) -> str:
    """Return the words for a power."""
    assert fit.power
    if abs(fit.slope) <= FLAT:
        return "hardly grows"
    if fit.slope < 0:
        return "falls"
    if fit.slope < LINEAR[0]:
        return "grows more slowly than in proportion"
    return "grows in proportion" if fit.slope <= LINEAR[1] else "grows faster than in proportion"
