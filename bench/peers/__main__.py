"""The same echo over TLS 1.3 by zcproto and by others, side by side: what each costs its server.

    python -m bench.peers [--rounds 7] [--connections 10000] [--json FILE] [--plot FILE.png]

- grpcio's asyncio server, uvicorn (HTTP/1.1), websockets and uvloop are installed from PyPI into a virtual
  environment in the user's cache, once. The fourth is asyncio's own streams on the loop of the standard library.
  zcproto runs from where it is.
- All serve one certificate (ECDSA P-256) from one processor and are asked from another, in short slices in turn: 50
  connections, one request in flight on each. A ratio is taken in each round; the table has the median.
- CPU is that of the server's process, of all its threads, by the account of the kernel. Memory is what is resident.
- They do not do the same. What a figure has in it, or has not, stands beside it.

Exit code: 0 if all bars are met, 1 if not, 2 if it cannot be measured like this, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import ssl
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.peers.environment import Environment, default_folder
from bench.peers.measure import CONNECTIONS, NAMES, Plan, Servers, measure
from bench.peers.outcome import CONNECT, MEMORY, REQUEST, Row, reasons, rows
from bench.rotation.__main__ import bounded, whole
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.load.command import Outputs, check_outputs
from zcproto.load.demo.run import temporary_home
from zcproto.load.demo.server import DemoServer
from zcproto.load.plan import SPARE_FILES, require_open_files
from zcproto.load.progress import new_console

CANNOT: Final = 2
INTERRUPTED: Final = 130
SCHEMA: Final = "zcproto-bench-peers/1"
MOST_PAYLOAD: Final = 16_000
"""Bytes: what fits into one frame of each protocol."""

MOST_HELD: Final = 20_000
"""From one address to one port there are about 28,000 connections."""

TITLES: Final = {
    REQUEST: "server CPU of a request, depth 1",
    CONNECT: "server CPU of a connection: handshake, the protocol's own opening, one request",
    MEMORY: "server memory of a connection",
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    plan = Plan(options.rounds, options.requests, options.connects, options.connections, options.payload)
    try:
        check_outputs(Outputs(json=options.json, plot=options.plot))
        open_files = max(plan.held, len(NAMES) * (CONNECTIONS + plan.connects)) + SPARE_FILES
        require_open_files(open_files, plan.held, lambda limit: limit - SPARE_FILES)
        environment = Environment(options.environment or default_folder())
        environment.prepare(tell)
        with temporary_home() as home:
            servers = Servers(home, environment, plan)
            with DemoServer(home.path, "memory"):
                pass  # it makes its certificates
            started = time.time()
            figures = measure(servers, plan, tell)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CANNOT
    except (ZcprotoError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    found = rows(figures)
    versions = {**environment.versions(), "zcproto": importlib.metadata.version("zcproto")}
    show(found, plan, versions, figures.suites, new_console())
    if options.json is not None:
        content = as_json(found, plan, versions, figures.suites, started)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        from bench.peers.plot import write_plot  # noqa: PLC0415  matplotlib takes half a second to import

        write_plot(options.plot, found, plan)
    return 1 if reasons(found) else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = Plan()
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=whole, default=usual.rounds, help="in which a ratio is taken")
    parser.add_argument("--requests", type=whole, default=usual.requests, help="in a round, to each server")
    parser.add_argument(
        "--connects", type=bounded(int, 1, 2_000), default=usual.connects, help="connections made in a round"
    )
    parser.add_argument(
        "--connections",
        type=bounded(int, 0, MOST_HELD),
        default=usual.held,
        help="held to be weighed; 0: memory is not measured",
    )
    parser.add_argument(
        "--payload",
        type=bounded(int, 1, MOST_PAYLOAD),
        default=usual.payload_bytes,
        help="bytes that are echoed",
    )
    parser.add_argument(
        "--environment", type=Path, help="a folder for the others instead of the user's cache"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this file (png, svg, pdf)")
    return parser.parse_args(arguments)


def show(
    found: list[Row], plan: Plan, versions: dict[str, str], suites: dict[str, str], console: Console
) -> None:
    """Print the tables and the verdict."""
    for figure, title in TITLES.items():
        some = [row for row in found if row.figure == figure]
        if not some:
            continue
        extra = f"{plan.held:,} held" if figure == MEMORY else f"echo of {plan.payload_bytes} bytes"
        table = Table(
            title=f"{title}, {extra}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("", "figure", "zcproto is", "bar", "", "what is not the same"):
            numeric = column in ("figure", "zcproto is", "bar")
            table.add_column(
                column, justify="right" if numeric else "left", no_wrap=not column.startswith("what")
            )
        for row in some:
            table.add_row(*cells(row))
        console.print(table)
    for words in (versions, suites):
        line = ", ".join(f"{name} {value}" for name, value in words.items())
        console.print(line, highlight=False, soft_wrap=True)
    failed = reasons(found)
    said = f"failed: {'; '.join(failed)}" if failed else "passed: every bar is met"
    console.print(Text(said, "bold red" if failed else "bold green"), soft_wrap=True)


def cells(row: Row) -> list[str | Text]:
    """A row of the table. A ratio stands with its least and its most of all rounds."""
    ratio = "" if row.ratio is None else f"{row.ratio:.3f} of it"
    if row.least is not None:
        ratio = f"{row.ratio:.3f} of it ({row.least:.3f}..{row.most:.3f})"
    bar = ""
    verdict = Text()
    if row.bar is not None:
        bar, verdict = f"{row.bar:.3f}", Text("pass", "green") if row.holds else Text("FAIL", "bold red")
    return [row.name, f"{row.value:,.1f} {row.unit}", ratio, bar, verdict, row.note]


def as_json(
    found: list[Row], plan: Plan, versions: dict[str, str], suites: dict[str, str], started: float
) -> dict[str, Any]:
    """All of it. `started` is in Unix seconds."""
    return {
        "schema": SCHEMA,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "openssl": ssl.OPENSSL_VERSION,
        },
        "versions": versions,
        "suites": suites,
        "plan": {name: getattr(plan, name) for name in plan.__slots__},
        "rows": [row.as_json() for row in found],
        "reasons": reasons(found),
    }


def tell(line: str) -> None:
    """How it goes on."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
