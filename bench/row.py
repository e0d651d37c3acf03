"""One figure of a measurement, held against its bar."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One figure. `value` is None if it could not be measured, which a bar does not forgive."""

    key: str
    label: str
    value: float | None
    unit: str = ""
    bar: float | None = None
    exact: bool = False
    """Whether it has to be the bar, and not below it."""

    at_rest: float | None = None
    """The same figure from the time before anything was done, where there is one. It is held against no bar."""

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        if self.value is None:
            return False
        return self.value == self.bar if self.exact else self.value < self.bar

    @property
    def target(self) -> str:
        """The bar as a table shows it; empty without one."""
        if self.bar is None:
            return ""
        return f"= {self.bar:,g}" if self.exact else f"< {self.bar:,g}"
