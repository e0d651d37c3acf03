"""A crowd that comes back at once, and hostile clients among honest ones: what those feel who are in.

    python -m bench.storms [--clients 10000] [--only storm|mix] [--json FILE] [--plot FILE.png]

- Storm: so many clients with a session each lose their server, which is killed and started again. Then all come
  back at once, and try until they are served. 50 others, who are in already, go on asking all the while. It is done
  twice: with the default of `tls.max_handshakes`, which is held against the bars, and without a bound, to compare.
- Mix: of so many connections a fifth is hostile: slow (a byte a second), garbage, replay (a request sent twice),
  deaf (who never reads an answer), and all of them. The rest is honest, and asks 500 times a second in all; so it
  does alone.
- The server has a processor, and its clients another if there is one. Latency counts from when a request was due.

Exit code: 0 if all bars are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.rotation.__main__ import bounded, positive
from bench.row import Row
from bench.storms.outcome import Felt, Mix, Storm, reasons
from bench.storms.run import StormPlan, run_all
from bench.storms.stage import is_measurable
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import SERVER_SPARE, temporary_home
from zcproto.load.figures import SATURATED_LAG_MS
from zcproto.load.plan import require_open_files
from zcproto.load.progress import new_console

CANNOT: Final = 2
INTERRUPTED: Final = 130
SCHEMA: Final = "zcproto-bench-storms/1"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plan = StormPlan(
        clients=options.clients,
        honest=options.honest,
        rate=options.rate,
        seconds=options.seconds,
        comes_back_s=options.comes_back,
    )
    started = time.time()
    try:
        if not is_measurable():
            raise ConfigError(["this system has no /proc, which tells of memory"])
        check_outputs(Outputs(json=options.json, plot=options.plot))
        needed = plan.clients + plan.honest + SERVER_SPARE
        require_open_files(needed, plan.clients, lambda limit: limit - plan.honest - SERVER_SPARE)
        with temporary_home() as home:
            outcomes = run_all(plan, home, options.only, tell)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except ZcprotoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    show(outcomes, plan, new_console())
    if options.json is not None:
        content = as_json(outcomes, plan, started)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        from bench.storms.plot import write_plot  # noqa: PLC0415  matplotlib takes half a second to import

        write_plot(options.plot, outcomes)
    return 1 if reasons(outcomes) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = StormPlan()
    parser = argparse.ArgumentParser(prog="python -m bench.storms", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--clients", type=bounded(int, 10, 25_000), default=usual.clients, help="of a crowd, and of a mix"
    )
    parser.add_argument(
        "--honest", type=bounded(int, 1, 1_000), default=usual.honest, help="who are in when a crowd comes"
    )
    parser.add_argument(
        "--rate", type=positive, default=usual.rate, help="requests a second of the honest, over all"
    )
    parser.add_argument("--seconds", type=positive, default=usual.seconds, help="of each mix")
    parser.add_argument(
        "--comes-back",
        type=positive,
        default=usual.comes_back_s,
        help="seconds until who was thrown out is back",
    )
    parser.add_argument("--only", choices=("storm", "mix"), help="one of them alone")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this file (png, svg, pdf)")
    return parser.parse_args(arguments)


def show(outcomes: Sequence[Storm | Mix], plan: StormPlan, console: Console) -> None:
    """Print the tables and the verdict."""
    crowd = [each for each in outcomes if isinstance(each, Storm)]
    if crowd:
        console.print(table(f"{plan.clients:,} clients come back at once", crowd))
        for storm in crowd:
            told = [
                *storm.causes.items(),
                *((f"server: {name}", n) for name, n in storm.tls_failures.items()),
            ]
            causes = ", ".join(f"{name} {count:,}" for name, count in told) or "none"
            console.print(f"{storm.title}: tries that failed: {causes}", highlight=False, soft_wrap=True)
    mixed = [each for each in outcomes if isinstance(each, Mix)]
    if mixed:
        title = (
            f"{plan.clients:,} connections, {plan.hostile:,} of them hostile; the others ask {plan.rate:,g}/s"
        )
        console.print(table(title, mixed))
    late = [each.title for each in outcomes if (_felt(each).lag_p99_ms or 0.0) > SATURATED_LAG_MS]
    if late:
        console.print(
            Text(
                f"late were the clients themselves ({', '.join(late)}): this machine is too small or too busy to "
                "show what the server alone would have made them wait",
                "yellow",
            ),
            soft_wrap=True,
        )
    failed = reasons(list(outcomes))
    said = f"failed: {'; '.join(failed)}" if failed else "passed: every bar is met"
    console.print(Text(said, "bold red" if failed else "bold green"), soft_wrap=True)


def _felt(outcome: Storm | Mix) -> Felt:
    return outcome.meanwhile if isinstance(outcome, Storm) else outcome.felt


def table(title: str, outcomes: Sequence[Storm | Mix]) -> Table:
    """Figures downwards, what they are of across; the bar beside those that have one."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("", no_wrap=True)
    for outcome in outcomes:
        made.add_column(outcome.title, justify="right")
    made.add_column("unit")
    made.add_column("target", justify="right", no_wrap=True)
    by_key: dict[str, dict[int, Row]] = {}
    for number, outcome in enumerate(outcomes):
        for row in outcome.rows():
            by_key.setdefault(row.key, {})[number] = row
    for rows in by_key.values():
        first = next(iter(rows.values()))
        told = [cell(rows.get(number)) for number in range(len(outcomes))]
        targets = {row.target for row in rows.values() if row.bar is not None}
        made.add_row(first.label, *told, first.unit, targets.pop() if len(targets) == 1 else "")
    return made


def cell(row: Row | None) -> Text:
    if row is None:
        return Text("")
    value = "-" if row.value is None else f"{row.value:,.0f}" if not row.unit else f"{row.value:,.2f}"
    return Text(value if row.holds else f"{value} FAIL", "" if row.holds else "bold red")


def as_json(outcomes: Sequence[Storm | Mix], plan: StormPlan, started: float) -> dict[str, Any]:
    """All of it. `started` is in Unix seconds. No keys are in it."""
    return {
        "schema": SCHEMA,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "plan": {name: getattr(plan, name) for name in plan.__slots__},
        "storms": [each.as_json() for each in outcomes if isinstance(each, Storm)],
        "mixes": [each.as_json() for each in outcomes if isinstance(each, Mix)],
        "reasons": reasons(list(outcomes)),
    }


def tell(line: str) -> None:
    """How it goes on."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
