"""`zcproto demo`: a server under load in one command."""

from __future__ import annotations

from pathlib import Path

import click

OUTPUT = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--connections",
    type=click.IntRange(1, 1_000_000),
    default=10_000,
    show_default=True,
    metavar="N",
    help="TLS connections, all open at once.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0.1, 10_000_000),
    default=5_000.0,
    show_default=True,
    metavar="R",
    help="Requests per second over all connections.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3_600),
    default=6.0,
    show_default=True,
    metavar="S",
    help="The duration of the load.",
)
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write all results.")
@click.option("--plot", type=OUTPUT, metavar="FILE.png", help="Draw latencies, connections and rates.")
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
