"""`zcproto bench` and `zcproto demo`: put a server under load and verify every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zcproto.cli import Instance, file_option, instance_options, number_option
from zcproto.cli.connect import TrustChoice, ca_option, check_connection
from zcproto.common.text import escape_text

COUNT = click.IntRange(1, 1_000_000)
RATE = click.FloatRange(0.1, 10_000_000)
json_option = file_option("--json", "json_file", text="Write all results.", dir_okay=False)
plot_option = file_option(
    "--plot", metavar="FILE.png", text="Draw latencies, connections and rates.", dir_okay=False
)


@click.command()
@click.argument("address", metavar="HOST:PORT")
@number_option("--connections", COUNT, 100, "N", "TLS connections, all open at once.")
@click.option(
    "--sessions",
    type=COUNT,
    metavar="M",
    help="Sessions; fewer than connections are shared. [default: one per connection]",
)
@number_option(
    "--rate",
    RATE,
    1_000.0,
    "R",
    "Requests (with --stream, items) per second over all connections, sent whether or not answers arrive.",
)
@click.option(
    "--stream",
    default="",
    metavar="METHOD",
    help="Open a stream of this method on each connection and verify each item. `zcproto serve` offers `repeat`.",
)
@number_option("--duration", click.FloatRange(0.1, 86_400), 10.0, "S", "The duration of the load in seconds.")
@number_option(
    "--payload", click.IntRange(0), 64, "BYTES", "Random bytes in each request and answer or item."
)
@number_option(
    "--pipeline", click.IntRange(1, 1_024), 1, "D", "Requests in each write; streams of each connection."
)
@number_option("--arrival-rate", click.FloatRange(0.1, 100_000), 500.0, "A", "New connections per second.")
@number_option("--processes", click.IntRange(1, 256), 1, "P", "Processes that generate the load.")
@file_option(
    "--keys",
    text="Keys of users, five sessions each: from `zcproto user add load --count 2000 --keys-out FILE`. Required.",
    dir_okay=False,
)
@file_option(
    "--operator-key-file",
    text="The key of an operator who reads the server's count; a file like --keys. [default: the first of --keys]",
    dir_okay=False,
)
@ca_option
@number_option("--seed", click.INT, 1, "N", "The seed of arrivals and payloads.")
@json_option
@file_option(
    "--hdr",
    "hdr_file",
    text="Write latencies as an HdrHistogram log, or as percentiles if FILE ends with .hgrm.",
    dir_okay=False,
)
@plot_option
@instance_options
def bench(
    address: str,
    connections: int,
    sessions: int | None,
    duration: float,
    payload: int,
    keys: Path | None,
    operator_key_file: Path | None,
    ca: Path | None,
    json_file: Path | None,
    hdr_file: Path | None,
    plot: Path | None,
    instance: Instance,
    **load: Any,
) -> int:
    """Measure the server at HOST:PORT: connections, an open-loop load, and one last request on each.

    Every answer and item is compared with its request, and the server's own count with the client's. Exit code 1 if
    anything was lost, out of order, different or unverified. Latencies are measured from when a request or item was
    due, so a slow server cannot hide behind requests that were not sent. It calls `echo`, which `zcproto serve`
    offers by default.
    """
    from zcproto.client.address import parse_address  # noqa: PLC0415
    from zcproto.load.command import EXIT_CODES, Outputs, run_and_report  # noqa: PLC0415
    from zcproto.load.plan import Plan, check_plan, read_credentials  # noqa: PLC0415
    from zcproto.load.progress import new_console  # noqa: PLC0415

    host, port = parse_address(address)
    sessions = connections if sessions is None else sessions
    if keys is None:
        raise click.UsageError(_how_to_make_keys(address, sessions))
    credentials = read_credentials(keys)
    trust = TrustChoice(ca)
    operators = credentials if operator_key_file is None else read_credentials(operator_key_file)
    plan = Plan(
        host=host,
        port=port,
        connections=connections,
        sessions=sessions,
        duration_s=duration,
        payload_bytes=payload,
        credentials=credentials,
        operator=operators[0],
        ca_file=trust.ca_file(instance.home, address),
        **load,
    )
    check_plan(plan)
    check_connection(trust, instance.home, address)
    result = run_and_report(plan, Outputs(json_file, hdr_file, plot), new_console())
    return EXIT_CODES[result.verdict]


def _how_to_make_keys(address: str, sessions: int) -> str:
    from zcproto.load.plan import users_for  # noqa: PLC0415

    return (
        f"Missing option '--keys'. Create {users_for(sessions)} users, and an operator who reads the server's"
        " count; on the server:\n\n"
        f"  zcproto user add load --count {users_for(sessions)} --keys-out load.keys\n"
        "  zcproto user add ops --operator --count 1 --keys-out ops.keys\n\n"
        f"Then: zcproto bench {escape_text(address, 300)} --keys load.keys --operator-key-file ops.keys"
    )


@click.command()
@number_option("--connections", COUNT, 10_000, "N", "TLS connections, all open at once.")
@number_option("--rate", RATE, 5_000.0, "R", "Requests per second over all connections.")
@number_option("--seconds", click.FloatRange(0.1, 3_600), 6.0, "S", "The duration of the load.")
@json_option
@plot_option
def demo(connections: int, rate: float, seconds: float, json_file: Path | None, plot: Path | None) -> int:
    """Open 10,000 verified connections to a server of its own.

    Creates users and certificates in a temporary folder, starts a server in one process, and opens the connections
    from another, each with its own session and each verified by its answers. It ends within a minute and leaves no
    process and no file. Exit code 0 if everything is verified.
    """
    from zcproto.load.command import EXIT_CODES  # noqa: PLC0415
    from zcproto.load.demo.run import Demo, run_demo  # noqa: PLC0415
    from zcproto.load.progress import new_console  # noqa: PLC0415

    result = run_demo(Demo(connections, rate, seconds, json=json_file, plot=plot), new_console())
    return EXIT_CODES[result.verdict]
