"""`zcproto demo`: the whole in one command."""

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
    help="Requests a second, over all connections.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3_600),
    default=6.0,
    show_default=True,
    metavar="S",
    help="How long.",
)
@click.option("--json", "json_file", type=OUTPUT, metavar="FILE", help="Write everything measured.")
@click.option("--plot", type=OUTPUT, metavar="FILE.png", help="Draw latencies, connections and rates.")
def demo(connections: int, rate: float, seconds: float, json_file: Path | None, plot: Path | None) -> int:
    """See 10,000 verified connections to a server of its own.

    Makes users and certificates in a temporary folder, starts a server on them in one process, and opens the
    connections from another, each with a session of its own and each verified by its answers. It ends by
    itself, in less than a minute, and leaves nothing behind: no process, no file. Exit code 0 if all is verified.
    """
    from zcproto.load.command import EXIT_CODES  # noqa: PLC0415
    from zcproto.load.demo.run import Demo, run_demo  # noqa: PLC0415
    from zcproto.load.progress import new_console  # noqa: PLC0415

    result = run_demo(Demo(connections, rate, seconds, json=json_file, plot=plot), new_console())
    return EXIT_CODES[result.verdict]
