"""All of it, step by step: each step fills rows, and one that fails says why in all of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from rich.console import Console

from bench.curves.echoes import Cost
from bench.curves.watch import Watched
from bench.requirements import (
    certificate_checks,
    http_checks,
    measures,
    operation_checks,
    session_checks,
    store_checks,
    tls_checks,
)
from bench.requirements.finding import Finding, Verdict
from bench.requirements.homes import Workshop
from bench.requirements.measures import Handshakes
from bench.requirements.requirement import REQUIREMENTS, Requirement
from bench.requirements.sizes import Sizes
from bench.rotation.outcome import Outcome
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.demo.run import temporary_home


class Row(NamedTuple):
    """A requirement with what was found of it, or why nothing was."""

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
    """What is measured for plots, beside the rows. None is 'not measured'."""

    handshakes: dict[str, Handshakes] = field(default_factory=dict)
    many: Watched | None = None
    payloads: dict[int, Cost] = field(default_factory=dict)
    rotation: Outcome | None = None


@dataclass(slots=True)
class Run:
    """One run, whole or in part."""

    sizes: Sizes
    rows: list[Row] = field(default_factory=list)
    drawn: Drawn = field(default_factory=Drawn)
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
    """What is done at once, and the rows that it fills."""

    name: str
    keys: tuple[str, ...]
    act: Callable[[Fill], None]


class Fill:
    """Fills rows, and tells how it goes on. A check that fails costs its own row alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.found: dict[str, Finding | None] = {}
        self.reasons: dict[str, str] = {}

    def __call__(self, key: str, check: Callable[[], Finding | None]) -> None:
        with self.failing_for((key,)):
            finding = check()
            self.found[key] = finding
            if finding is not None:
                self.say(f"    {key}: {finding.verdict.value}, {finding.figure}")

    @contextmanager
    def failing_for(self, keys: Sequence[str]) -> Iterator[None]:
        """What a server that fails leads to is the reason why these rows have no figure."""
        try:
            yield
        except (ZcprotoError, OSError) as error:  # ssl.SSLError is an OSError
            reason = f"{type(error).__name__}: {error}"
            self.reasons.update({key: reason for key in keys if key not in self.found})
            self.say(f"    it could not be done: {reason}", "red")

    def say(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def run_requirements(sizes: Sizes, console: Console, only: Sequence[str] = ()) -> Run:
    """Do all steps, or those of these names; `console` is told how it goes on. Raises ConfigError."""
    run, fill = Run(sizes), Fill(console)
    with temporary_home() as home:
        workshop = Workshop(home.path)
        steps = steps_of(workshop, run, console)
        unknown = sorted(set(only) - {step.name for step in steps})
        if unknown:
            names = ", ".join(step.name for step in steps)
            raise ConfigError([f"no such step: {', '.join(unknown)}; there are {names}"])
        chosen = [step for step in steps if not only or step.name in only]
        started = time.monotonic()
        for number, step in enumerate(chosen, 1):
            began = time.monotonic()
            fill.say(f"[{number} of {len(chosen)}] {step.name} ...")
            with fill.failing_for(step.keys):
                step.act(fill)
            run.steps_s[step.name] = seconds = time.monotonic() - began
            fill.say(f"    {seconds:.1f} s, {time.monotonic() - started:.0f} s in all", "dim")
    keys = {key for step in chosen for key in step.keys}
    run.rows = [
        Row(each, fill.found.get(each.key), fill.reasons.get(each.key, ""))
        for each in REQUIREMENTS
        if each.key in keys or not only
    ]
    return run


def steps_of(workshop: Workshop, run: Run, console: Console) -> list[Step]:
    """In an order in which what needs a quiet machine comes first."""
    sizes, drawn = run.sizes, run.drawn

    def tokens(fill: Fill) -> None:
        figures = measures.token_figures(workshop, sizes)
        fill("token_validation", lambda: measures.check_row(figures, sizes))
        fill("token_memory", lambda: measures.memory_row(figures, sizes))
        fill("cleanup", lambda: measures.cleanup_row(figures, sizes))

    def parts(fill: Fill) -> None:
        house = workshop.house("parts")
        fill("certificate_loading", lambda: measures.loading_row(house, sizes))
        fill("hsts_cost", lambda: measures.hsts_row(sizes))

    def handshakes(fill: Fill) -> None:
        drawn.handshakes = measures.handshakes_at_rest(workshop, sizes)
        fill("handshake_at_rest", lambda: measures.at_rest_row(drawn.handshakes, sizes))

    def payloads(fill: Fill) -> None:
        drawn.payloads = measures.cost_by_payload(workshop, sizes)

    def connections(fill: Fill) -> None:
        drawn.many = many = measures.many_connections(workshop, sizes, console)
        fill("handshake_arriving", lambda: measures.arriving_row(many, sizes))
        fill("connections", lambda: measures.connections_row(many, sizes))

    def rotation(fill: Fill) -> None:
        drawn.rotation = outcome = measures.rotations(workshop, sizes, console)
        fill("rotation", lambda: measures.rotation_row(outcome, sizes))
        fill("rotation_stall", lambda: measures.stall_row(outcome, sizes))

    def server(fill: Fill) -> None:
        house = workshop.house("usual", sessions=50)
        short = workshop.house("short", session_checks.SHORT_LIVES)
        with house.serve("sqlite") as usual, short.serve() as brief:
            both = (usual, house, brief, short)
            fill("tls_version", lambda: tls_checks.tls_version(usual))
            fill("cipher_suites", lambda: tls_checks.cipher_suites(usual))
            fill("forward_secrecy", lambda: tls_checks.forward_secrecy(usual))
            fill("tls_errors", lambda: tls_checks.errors(usual, house))
            fill("token_size", lambda: session_checks.token_size(usual, house, sizes.opened))
            fill("expiration", lambda: session_checks.expiration(*both))
            fill("refresh", lambda: session_checks.refresh(*both))
            fill("per_user", lambda: session_checks.per_user(*both))
            fill("replays", lambda: session_checks.replays(usual, house))
            fill("hsts", lambda: http_checks.hsts(usual))
            fill("metrics", lambda: http_checks.metrics(usual, house))
            fill("pinning", lambda: certificate_checks.pinning(usual, house))
            fill("key_size", lambda: certificate_checks.key_size(usual, workshop))
            fill("profile", lambda: certificate_checks.profile(usual))
            fill("logs", lambda: operation_checks.logs(usual, house))

    def single(key: str, check: Callable[[Workshop], Finding]) -> Step:
        return Step(key, (key,), lambda fill: fill(key, lambda: check(workshop)))

    return [
        Step("tokens", ("token_validation", "token_memory", "cleanup"), tokens),
        Step("parts", ("certificate_loading", "hsts_cost"), parts),
        Step("handshakes", ("handshake_at_rest",), handshakes),
        Step("payloads", (), payloads),
        Step("connections", ("handshake_arriving", "connections"), connections),
        Step("rotation", ("rotation", "rotation_stall"), rotation),
        Step("server", SERVER_KEYS, server),
        single("expiry_alerts", certificate_checks.expiry_alerts),
        single("renewal", certificate_checks.renewal),
        single("fallback", certificate_checks.fallback),
        single("recovery", store_checks.recovery),
        single("configuration", operation_checks.configuration),
        single("first_run", operation_checks.first_run),
        single("alerting", operation_checks.alerting),
    ]


SERVER_KEYS: Final = (
    "tls_version", "cipher_suites", "forward_secrecy", "tls_errors", "token_size", "expiration", "refresh",
    "per_user", "replays", "hsts", "metrics", "pinning", "key_size", "profile", "logs",
)  # fmt: skip
