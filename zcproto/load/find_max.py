"""The search for the highest rate of requests whose p99 is below a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TextIO

import click

from zcproto.load.hdr import percentiles_ms
from zcproto.load.report import generator_saturated, table
from zcproto.load.result import Result, Verdict

SCHEMA: Final = "zcproto-bench-find-max/1"
PRECISION: Final = 1.1
"""The search ends when the lowest rate that misses the limit is at most so many times the highest that holds."""

MAX_RATE: Final = 10_000_000.0
MIN_RATE: Final = 1.0
TRIES: Final = 2
"""Runs of a rate that misses the limit: one pause of the machine must not decide."""


class Step(NamedTuple):
    """One run at one rate."""

    rate: float
    reached: float
    latency_ms: dict[str, float]
    """By percentile; empty if nothing was answered."""
    holds: bool
    cause: str
    """Why it does not hold; empty if it does."""


class Search:
    """The runs so far, and what follows from them."""

    def __init__(self, limit_ms: float) -> None:
        self.limit_ms = limit_ms
        self.steps: list[Step] = []
        self.interrupted = False
        self.highest: float | None = None
        """The highest rate that holds."""

    def rates(self, first: float) -> Iterator[float]:
        """Yield rates to try; `add` the result of each before the next. Double or halve, then narrow down."""
        rate, lowest_miss = first, math.inf
        while MIN_RATE <= rate <= MAX_RATE:
            for _ in range(TRIES):
                yield rate
                if self.interrupted or self.steps[-1].holds:
                    break
            if self.interrupted:
                return
            if self.steps[-1].holds:
                self.highest = rate
            else:
                lowest_miss = rate
            if self.highest is None:
                rate /= 2
            elif lowest_miss == math.inf:
                rate *= 2
            elif lowest_miss / self.highest > PRECISION:
                rate = math.sqrt(lowest_miss * self.highest)
            else:
                return

    def add(self, result: Result) -> None:
        """Add the run of the rate that was yielded last."""
        self.interrupted = result.verdict is Verdict.INTERRUPTED
        latency_ms = percentiles_ms(result.record.latencies["request"])
        cause = self._cause(result, latency_ms.get("p99", math.inf))
        self.steps.append(Step(result.plan.rate, result.request_rate, latency_ms, not cause, cause))

    def _cause(self, result: Result, p99_ms: float) -> str:
        if result.verdict is Verdict.INTERRUPTED:
            return "interrupted"
        if result.verdict is Verdict.FAILED:
            return "; ".join(result.reasons())
        if p99_ms < self.limit_ms:
            return ""
        return "generator saturated" if generator_saturated(result) else "p99"

    @property
    def conclusion(self) -> str:
        wanted = f"p99 below {self.limit_ms:g} ms"
        if self.highest is None:
            return "interrupted before a rate held" if self.interrupted else f"no rate has a {wanted}"
        text = f"highest rate with a {wanted}: {self.highest:,.0f} requests/s"
        if self.interrupted:
            return f"{text} so far; interrupted"
        misses = [step for step in self.steps if not step.holds]
        if misses and min(misses, key=lambda step: step.rate).cause == "generator saturated":
            text += (
                "; beyond it the generator could not keep its schedule, so the server may be faster: use more"
                " --processes or another machine"
            )
        return text

    def as_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "limit_ms": self.limit_ms,
            "highest_rate": self.highest,
            "conclusion": self.conclusion,
            "interrupted": self.interrupted,
            "steps": [step._asdict() for step in self.steps],
        }


def show_search(search: Search, out: TextIO) -> None:
    """Print the runs in the order of their rates, and the conclusion."""
    rows = []
    for step in sorted(search.steps, key=lambda step: step.rate):
        waits = (f"{step.latency_ms[key]:,.2f}" if step.latency_ms else "-" for key in ("p50", "p99"))
        mark = "ok" if step.holds else f"no: {step.cause}"
        rows.append((f"{step.rate:,.0f}", f"{step.reached:,.0f}", *waits, mark))
    click.echo(table("Requests per second", ("planned", "reached", "p50 ms", "p99 ms", ""), rows, (4,)), out)
    click.secho(search.conclusion, out, fg="red" if search.highest is None else "green", bold=True)
