"""What became of the requests of one kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self


class Kind(StrEnum):
    """What a request of the generator is for."""

    OPEN = "open"  # session.open
    JOIN = "join"  # the first use of another connection's session
    LOAD = "load"
    LAST = "last"  # one on each connection, at the end
    CLOSE = "close"  # session.close


@dataclass(slots=True)
class Tally:
    """`planned` = `sent` + all `not_sent`, and `sent` = `equal` + `unequal` + `lost` + all `errors` + in flight.

    `equal` were answered with what had been sent, `unequal` with something else, `lost` not at all. `errors`
    are counted by the names of their codes, `not_sent` by why they could not be.
    """

    planned: int = 0
    sent: int = 0
    equal: int = 0
    unequal: int = 0
    lost: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    not_sent: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Requests of which it is certain that they will not be answered with what was sent."""
        return self.unequal + self.lost + sum(self.errors.values()) + sum(self.not_sent.values())

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**value)


def count(counts: dict[str, int], name: str, by: int = 1) -> None:
    """Add to a count that may not be there yet."""
    counts[name] = counts.get(name, 0) + by


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum of tallies."""
    whole = Tally()
    for each in tallies:
        whole.planned += each.planned
        whole.sent += each.sent
        whole.equal += each.equal
        whole.unequal += each.unequal
        whole.lost += each.lost
        for name, errors in each.errors.items():
            count(whole.errors, name, errors)
        for name, unsent in each.not_sent.items():
            count(whole.not_sent, name, unsent)
    return whole
