"""Run simulations: `python -m tests.simulation --seed N --hours H`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.simulation.faults import FAULTS
from tests.simulation.world import Plan, World


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    options = parser.parse_args()
    if options.fault:
        FAULTS[options.fault]()
    plan = Plan(
        seed=options.seed, seconds=options.hours * 3600, servers=options.servers, clients=options.clients
    )
    lines: list[str] = []
    world = World(plan, show=lines.append)
    begun = time.process_time()
    try:
        world.run()
    finally:
        if options.log:
            options.log.write_text("\n".join(lines) + "\n")
    print(
        world.digest,
        dict(world.truth.ended),
        f"{time.process_time() - begun:.1f} s of CPU, {world.scheduler.turns} turns",
    )
    sys.stdout.flush()
    os._exit(0)  # crashed processes are as they were: their coroutines must not be closed


main()
