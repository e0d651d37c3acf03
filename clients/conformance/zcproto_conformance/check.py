"""Checks: a name, the rule of the specification that is checked, and the scenario that checks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from zcproto_conformance.harness import Harness

Scenario = Callable[[Harness], Awaitable[None]]

VECTORS: Final = "vectors"
SCRIPTED: Final = "scripted"
SERVER: Final = "server"
DURABLE: Final = "durable"
"""The feature of clients with durable streams."""
PARTS: Final = (VECTORS, SCRIPTED, SERVER)


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `name` begins with its part; `proves` is a section of spec/zcp1.md and its rule.

    It is skipped for a client whose program does not announce the feature `needs`.
    """

    name: str
    proves: str
    run: Scenario
    needs: str = ""


class Scenarios:
    """A decorator that registers the scenarios of one module as checks, in order of definition."""

    def __init__(self, part: str, needs: str = "") -> None:
        self.part = part
        self.needs = needs
        self.checks: list[Check] = []

    def __call__(self, name: str, proves: str) -> Callable[[Scenario], Scenario]:
        """Register a scenario."""

        def register(scenario: Scenario) -> Scenario:
            self.checks.append(Check(f"{self.part}/{name}", proves, scenario, self.needs))
            return scenario

        return register
