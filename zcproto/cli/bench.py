"""`zcproto bench`: measure a server under load."""

from __future__ import annotations

from pathlib import Path

import click

from zcproto.cli import home_options
from zcproto.cli.connect import ca_file
from zcproto.common.home import Home

OUTPUT = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--connections",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    metavar="N",
    help="TLS connections, all open at once.",
)
@click.option(
    "--sessions",
    type=click.IntRange(1, 1_000_000),
    metavar="M",
    help="Sessions; fewer than connections are shared. [default: one per connection]",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 10_000_000),
    default=1_000.0,
    show_default=True,
    metavar="R",
    help="Requests per second over all connections, sent whether or not answers arrive.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0.1, 86_400),
    default=10.0,
    show_default=True,
    metavar="S",
    help="The duration of the load in seconds.",
)
@click.option(
    "--payload",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    metavar="BYTES",
    help="Random bytes in each request and its answer.",
)
@click.option(
    "--pipeline",
    type=click.IntRange(1, 1_024),
    default=1,
    show_default=True,
    metavar="D",
    help="Requests in each write.",
)
@click.option(
    "--arrival-rate",
    type=click.FloatRange(0.1, 100_000),
    default=500.0,
    show_default=True,
    metavar="A",
    help="New connections per second.",
)
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    metavar="P",
    help="Processes that generate the load.",
)
@click.option(
    "--keys",
    type=OUTPUT,
    required=True,
    metavar="FILE",
    help="Keys of users, five sessions each: from `zcproto user add load --count 2000 --keys-out FILE`.",
)
@click.option(
    "--operator-key-file",
    type=OUTPUT,
    metavar="FILE",
    help="The key of an operator who reads the server's count; a file like --keys. [default: the first of --keys]",
)
@click.option(
    "--ca",
    type=OUTPUT,
    metavar="FILE",
    help="The CA to trust. [default: certs/ca.crt in the home folder if it exists, else the system's store]",
)
@click.option(
    "--seed", type=int, default=1, show_default=True, metavar="N", help="The seed of arrivals and payloads."
)
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write all results.")
@click.option(
    "--hdr",
    "hdr_file",
    type=OUTPUT,
    metavar="FILE",
    help="Write latencies as an HdrHistogram log, or as percentiles if FILE ends with .hgrm.",
)
@click.option("--plot", type=OUTPUT, metavar="FILE.png", help="Draw latencies, connections and rates.")
@home_options
def bench(
    address: str,
    connections: int,
    sessions: int | None,
    rate: float,
    duration: float,
    payload: int,
    pipeline: int,
    arrival_rate: float,
    processes: int,
    keys: Path,
    operator_key_file: Path | None,
    ca: Path | None,
    seed: int,
    json_file: Path | None,
    hdr_file: Path | None,
    plot: Path | None,
    home: Home,
    config_file: Path | None,
) -> int:
    """Measure the server at HOST:PORT: connections, an open-loop load, and one last request on each.

    Every answer is compared with its request, and the server's own count with the client's. Exit code 1 if
    anything was lost, different or unverified. Latencies are measured from when a request was due, so a slow server
    cannot hide behind requests that were not sent. It calls `echo`, which `zcproto serve` offers by default.
    """
    from zcproto.client.address import parse_address  # noqa: PLC0415
    from zcproto.load.command import EXIT_CODES, Outputs, run_and_report  # noqa: PLC0415
    from zcproto.load.plan import Plan, read_credentials  # noqa: PLC0415
    from zcproto.load.progress import new_console  # noqa: PLC0415

    host, port = parse_address(address)
    credentials = read_credentials(keys)
    operators = credentials if operator_key_file is None else read_credentials(operator_key_file)
    plan = Plan(
        host=host,
        port=port,
        connections=connections,
        sessions=connections if sessions is None else sessions,
        rate=rate,
        duration_s=duration,
        payload_bytes=payload,
        credentials=credentials,
        operator=operators[0],
        pipeline=pipeline,
        arrival_rate=arrival_rate,
        processes=processes,
        ca_file=ca_file(home, ca),
        seed=seed,
    )
    result = run_and_report(plan, Outputs(json_file, hdr_file, plot), new_console())
    return EXIT_CODES[result.verdict]
