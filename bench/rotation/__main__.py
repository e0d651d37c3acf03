"""Certificates replaced once a second under load: nothing lost, nothing refused, nothing held up.

    python -m bench.rotation [--rotations 100] [--connections 1000] [--rate 2000] [--json FILE]

- A server in a process of its own, on certificates of both key types in a temporary folder; a generator in
  another process, with connections that have a session each and whose every answer is checked (`zcproto.load`).
- This process replaces the certificates, one rotation a second, by the files alone, as `zcproto cert` does: all are
  renewed with their keys, and every tenth time the ECDSA one gets a new key.
- All the while new connections come, a few a second, and look whether the certificate that they are shown is good
  and is the newest, or was until a moment ago.
- For the first half minute nothing is rotated: how long the server's loop stands still then is told beside how
  long it does while certificates change. Server, load and this process share the machine, of which the load and
  this process keep to one processor; and a pause is told whole, and less the time for which other programs had the
  processor that the loop could have used.

Exit code: 0 if all targets are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.rotation.plan import RotationPlan
from bench.rotation.run import run_rotations
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.command import EXIT_CODES
from zcproto.load.progress import new_console

CANNOT = 2


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plan = RotationPlan(
        rotations=options.rotations,
        interval_s=options.interval,
        rest_s=options.rest,
        connections=options.connections,
        rate=options.rate,
        newcomers=options.newcomers,
        delay_s=options.delay,
    )
    try:
        outcome = run_rotations(plan, new_console(), options.json)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    return EXIT_CODES[outcome.verdict]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = RotationPlan()
    parser = argparse.ArgumentParser(prog="python -m bench.rotation", description=__doc__.split("\n")[0])
    parser.add_argument("--rotations", type=whole, default=usual.rotations, help="how many")
    parser.add_argument("--interval", type=positive, default=usual.interval_s, help="seconds between two")
    parser.add_argument(
        "--rest", type=positive, default=usual.rest_s, help="seconds before the first, to compare"
    )
    parser.add_argument("--connections", type=whole, default=usual.connections, help="that stay")
    parser.add_argument("--rate", type=positive, default=usual.rate, help="requests a second, over all")
    parser.add_argument(
        "--newcomers", type=positive, default=usual.newcomers, help="new connections a second"
    )
    parser.add_argument(
        "--delay",
        type=positive,
        default=usual.delay_s,
        help="seconds in which an old certificate may be shown",
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


def bounded(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value

    return convert


whole = bounded(int, 1, 1_000_000)
positive = bounded(float, 0.01, 1_000_000)


if __name__ == "__main__":
    raise SystemExit(main())
