"""How long requests wait at half of the most that this machine can do, with 10,000 connections.

    python -m bench.half_rate [--connections 10000] [--seconds 15] [--json FILE]

1. The most: for some seconds more requests are due than can be answered. The rate at which they are answered in the
   end is the most that server and generator can do together, each in a process of its own.
2. Half of it, on a new server: an open loop, each latency from when its request was due, over all connections.

Every answer is compared with what was sent, both times. Where the generator was late itself, the figure is its own
as much as the server's: it says so, and that is no excuse.

Exit code: 0 if the target is met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.curves.watch import Watched
from bench.micro.token_check import Figure, conclude
from bench.requirements.homes import Workshop
from bench.requirements.measures import load_on
from bench.rotation.__main__ import positive, whole
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import ARRIVAL_RATE
from zcproto.load.figures import generator_saturated
from zcproto.load.hdr import percentiles_ms
from zcproto.load.progress import new_console
from zcproto.load.result import Result, Verdict

MAX_P99_9_MS: Final = 25.0
CANNOT: Final = 2
INTERRUPTED: Final = 130

LoadOn = Callable[[Workshop, str, int, float, float, float, Console], Watched]
"""As `bench.requirements.measures.load_on`."""


@dataclass(frozen=True, slots=True)
class HalfPlan:
    """What is asked for. Rates are requests a second over all connections."""

    connections: int = 10_000
    too_many: float = 60_000.0
    """Several times what a server in Python can do."""
    flood_s: float = 2.0
    seconds: float = 15.0
    """Of half of the most."""
    arrival_rate: float = ARRIVAL_RATE


@dataclass(slots=True)
class Halved:
    """What was seen."""

    most: Result
    half: Result

    @property
    def reasons(self) -> list[str]:
        """What was not answered as it had to be."""
        return [*self.most.reasons(), *self.half.reasons()]

    @property
    def interrupted(self) -> bool:
        return Verdict.INTERRUPTED in (self.most.verdict, self.half.verdict)

    def figures(self) -> list[Figure]:
        waits = percentiles_ms(self.half.record.latencies["request"])
        late = percentiles_ms(self.half.record.latencies["lag"])
        never = float("inf")
        return [
            Figure("the most, requests a second", self.most.request_rate, ""),
            Figure("half of it, asked for", self.half.plan.rate, ""),
            Figure("half of it, answered", self.half.request_rate, ""),
            Figure("connections that answered to the end", self.half.verified_connections, ""),
            Figure("reasons why not all is verified", len(self.reasons), "", 1),
            Figure("server CPU of a request", self.half.cpu_per_request_us or never, "us"),
            Figure("request, p50", waits.get("p50", never), "ms"),
            Figure("request, p99", waits.get("p99", never), "ms"),
            Figure("request, p99.9", waits.get("p99.9", never), "ms", MAX_P99_9_MS),
            Figure("request, longest", waits.get("max", never), "ms"),
            Figure("how late the generator was, p99.9", late.get("p99.9", never), "ms"),
        ]


def measure(folder: Path, plan: HalfPlan, console: Console, load: LoadOn = load_on) -> Halved:
    """Both loads. Raises ConfigError for what cannot be measured here."""
    workshop = Workshop(folder)
    console.print("the most: more requests than can be answered ...", highlight=False)
    most = load(
        workshop, "most", plan.connections, plan.too_many, plan.flood_s, plan.arrival_rate, console
    ).result
    if most.verdict is not Verdict.VERIFIED or not most.request_rate:
        return Halved(most, most)
    rate = most.request_rate / 2
    console.print(f"half of {most.request_rate:,.0f} a second ...", highlight=False)
    half = load(workshop, "half", plan.connections, rate, plan.seconds, plan.arrival_rate, console).result
    return Halved(most, half)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.half_rate", description=(__doc__ or "").split("\n")[0]
    )
    usual = HalfPlan()
    parser.add_argument("--connections", type=whole, default=usual.connections, help="each with a session")
    parser.add_argument("--seconds", type=positive, default=usual.seconds, help="of half of the most")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    plan = HalfPlan(connections=options.connections, seconds=options.seconds)
    try:
        check_outputs(Outputs(json=options.json))
        with tempfile.TemporaryDirectory(prefix="zcproto-half-") as folder:
            found = measure(Path(folder), plan, new_console())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    code = conclude(found.figures(), options.json)
    if found.interrupted:
        print("interrupted: the figures are those of a part of the run, and nothing is proven")
        return INTERRUPTED
    if generator_saturated(found.half):
        print("the generator was late itself: its waits are in these figures")
    for reason in found.reasons[:5]:
        print(reason, file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
