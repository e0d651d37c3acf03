"""Valkey killed, hung, slow, emptied, read-only and cut off under load: nothing lost, nobody waits.

    python -m bench.outages [--seconds 10] [--sessions 500] [--rate 1000] [--only NAME] [--json FILE]

For each outage there are a Valkey (valkey-server, appendfsync always) and two servers (`zcproto serve`) of its own.

- So many sessions, each on a connection of its own, ask `echo` at a steady rate, some of them on the second server
  as well. Beside them sessions are opened, refreshed and revoked, on both servers, all the time.
- The store is well for half of the seconds, then hurt for all of them, then well again. Each request and call is
  timed from when it was due to its answer, before, meanwhile and after. What counts is how much longer the longest
  one waits since the outage began than the longest one before: all of it shares the machine.
- Afterwards every session that anybody was told of is tried on both servers, on the first one again after it was
  killed and started, and on one that is new: those that were revoked must be refused, all others good.

Exit code: 0 if all targets are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.outages.harm import HARMS
from bench.outages.plan import OutagePlan
from bench.outages.run import run_outages
from bench.rotation.__main__ import positive, whole
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.progress import new_console

CANNOT = 2
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plan = OutagePlan(
        seconds=options.seconds,
        sessions=options.sessions,
        shared=min(OutagePlan().shared, options.sessions),
        rate=options.rate,
        only=tuple(options.only),
    )
    try:
        outcomes = run_outages(plan, new_console(), tell, options.json)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 1 if any(outcome.reasons() for outcome in outcomes) else 0


def tell(line: str) -> None:
    """How it goes on."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = OutagePlan()
    parser = argparse.ArgumentParser(prog="python -m bench.outages", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=positive, default=usual.seconds, help="how long each outage lasts")
    parser.add_argument("--sessions", type=whole, default=usual.sessions, help="that are known before")
    parser.add_argument("--rate", type=positive, default=usual.rate, help="requests a second, over all")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help=f"one outage, may be given again: {', '.join(harm.name for harm in HARMS)}",
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
