"""All requirements, step by step: each step fills rows, and a step that fails is the reason in all of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from rich.console import Console

from bench import machine
from bench.curves.echoes import Cost
from bench.curves.watch import Watched
from bench.requirements import measures
from bench.requirements.finding import Finding, Scale, Verdict
from bench.requirements.marked_tests import finding_of, run_marked_tests
from bench.requirements.measures import Handshakes
from bench.requirements.requirement import REQUIREMENTS, Requirement
from bench.requirements.sizes import Sizes
from bench.scenarios.rotation import RotationOutcome
from bench.stage import Stages
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.demo import temporary_home


class RequirementRow(NamedTuple):
    """A requirement with what was found, or why nothing was."""

    requirement: Requirement
    finding: Finding | None
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        return Verdict.NONE if self.finding is None else self.finding.verdict

    @property
    def passes(self) -> bool:
        """Whether it holds, as far as was measured."""
        return self.verdict in (Verdict.PASS, Verdict.SMALL)


@dataclass(slots=True)
class Drawn:
    """Measurements for plots, beside the rows. None is 'not measured'."""

    handshakes: dict[str, Handshakes] = field(default_factory=dict)
    many: Watched | None = None
    payloads: dict[int, Cost] = field(default_factory=dict)
    rotation: RotationOutcome | None = None


@dataclass(slots=True)
class Run:
    """One run, complete or in part."""

    sizes: Sizes
    rows: list[RequirementRow] = field(default_factory=list)
    drawn: Drawn = field(default_factory=Drawn)
    scale: Scale = field(default_factory=Scale)
    steps_s: dict[str, float] = field(default_factory=dict)
    """How long each step took."""

    @property
    def passes(self) -> bool:
        return bool(self.rows) and all(row.passes for row in self.rows)

    @property
    def small(self) -> bool:
        return any(row.verdict is Verdict.SMALL for row in self.rows)

    @property
    def total_s(self) -> float:
        return sum(self.steps_s.values())


class Step(NamedTuple):
    """A measurement, and the rows that it fills."""

    name: str
    keys: tuple[str, ...]
    act: Callable[[Fill], None]


class Fill:
    """Fills rows, and prints progress. A row that cannot be filled leaves the others alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.found: dict[str, Finding | None] = {}
        self.reasons: dict[str, str] = {}

    def __call__(self, key: str, measure: Callable[[], Finding | None]) -> None:
        with self.failing_for((key,)):
            finding = measure()
            self.found[key] = finding
            if finding is not None:
                self.print(f"    {key}: {finding.verdict.value}, {finding.figure}")

    @contextmanager
    def failing_for(self, keys: Sequence[str]) -> Iterator[None]:
        """Make an error of a server the reason why these rows have no figure."""
        try:
            yield
        except (ZcprotoError, OSError) as error:  # ssl.SSLError is an OSError
            reason = f"{type(error).__name__}: {error}"
            self.reasons.update({key: reason for key in keys if key not in self.found})
            self.print(f"    could not be measured: {reason}", "red")

    def print(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def run_requirements(sizes: Sizes, console: Console, only: Sequence[str] = ()) -> Run:
    """Carry out all steps, or those named. Raises ConfigError."""
    run, fill = Run(sizes, scale=Scale(machine.slowdown())), Fill(console)
    if run.scale.slowdown > 1:
        fill.print(
            f"this machine is {run.scale.slowdown:.2f} times slower than the reference; times are scaled"
        )
    with temporary_home() as home:
        steps = steps_of(Stages(home.path), run)
        unknown = sorted(set(only) - {step.name for step in steps})
        if unknown:
            names = ", ".join(step.name for step in steps)
            raise ConfigError([f"no such step: {', '.join(unknown)}; there are {names}"])
        chosen = [step for step in steps if not only or step.name in only]
        started = time.monotonic()
        for number, step in enumerate(chosen, 1):
            began = time.monotonic()
            fill.print(f"[{number} of {len(chosen)}] {step.name} ...")
            with fill.failing_for(step.keys):
                step.act(fill)
            run.steps_s[step.name] = seconds = time.monotonic() - began
            fill.print(f"    {seconds:.1f} s, {time.monotonic() - started:.0f} s in all", "dim")
    keys = {key for step in chosen for key in step.keys}
    run.rows = [
        RequirementRow(each, fill.found.get(each.key), fill.reasons.get(each.key, ""))
        for each in REQUIREMENTS
        if each.key in keys or not only
    ]
    return run


def steps_of(stages: Stages, run: Run) -> list[Step]:
    """Return the steps in an order in which those that need a quiet machine come first."""
    sizes, drawn, scale = run.sizes, run.drawn, run.scale

    def tokens(fill: Fill) -> None:
        figures = measures.token_figures(stages, sizes)
        fill("token_validation", lambda: measures.check_row(figures, sizes, scale))
        fill("token_memory", lambda: measures.memory_row(figures, sizes))
        fill("cleanup", lambda: measures.cleanup_row(figures, sizes, scale))

    def parts(fill: Fill) -> None:
        fill("certificate_loading", lambda: measures.loading_row(stages, sizes, scale))
        fill("hsts_cost", lambda: measures.hsts_row(sizes, scale))

    def handshakes(fill: Fill) -> None:
        drawn.handshakes = measures.handshakes_at_rest(stages, sizes)
        fill("handshake_at_rest", lambda: measures.at_rest_row(drawn.handshakes, sizes, scale))

    def payloads(fill: Fill) -> None:
        drawn.payloads = measures.cost_by_payload(stages, sizes)

    def connections(fill: Fill) -> None:
        drawn.many = many = measures.many_connections(stages, sizes, scale)
        fill("handshake_arriving", lambda: measures.arriving_row(many, sizes, scale))
        fill("connections", lambda: measures.connections_row(many, sizes))

    def rotation(fill: Fill) -> None:
        drawn.rotation = outcome = measures.rotations(stages, sizes)
        fill("rotation", lambda: measures.rotation_row(outcome, sizes))
        fill("rotation_stall", lambda: measures.stall_row(outcome, sizes, scale))

    def tests(fill: Fill) -> None:
        results = run_marked_tests(TESTED, stages.folder)
        for key in TESTED:
            fill(key, lambda key=key: finding_of(results.get(key, {})))  # type: ignore[misc]

    return [
        Step("tokens", ("token_validation", "token_memory", "cleanup"), tokens),
        Step("parts", ("certificate_loading", "hsts_cost"), parts),
        Step("handshakes", ("handshake_at_rest",), handshakes),
        Step("payloads", (), payloads),
        Step("connections", ("handshake_arriving", "connections"), connections),
        Step("rotation", ("rotation", "rotation_stall"), rotation),
        Step("tests", TESTED, tests),
    ]


TESTED: Final = tuple(each.key for each in REQUIREMENTS if each.is_tested)
"""Requirements that tests show."""
