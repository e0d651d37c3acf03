"""`zcproto bench` and `zcproto demo`: put a server under load and verify every answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from zcproto.cli import EXIT_INTERRUPTED, Group, Instance, file_option, instance_options, number_option
from zcproto.cli.connect import (
    TrustChoice,
    ca_option,
    check_connection,
    is_typed,
    key_option,
    read_key,
    user_option,
)
from zcproto.cli.json_values import parse_params, read_json
from zcproto.common.text import escape_text

if TYPE_CHECKING:
    from zcproto.load.plan import Credential, Target

COUNT = click.IntRange(1, 1_000_000)
RATE = click.FloatRange(0.1, 10_000_000)
SESSIONS_OF_ONE_USER: Final = 4
"""Sessions of --user. The default of `sessions.per_user` leaves one for another program of this user."""

SEARCH_DURATION_S: Final = 3.0
"""The duration of each load of --find-max, of which there are about twelve."""

json_option = file_option("--json", "json_file", text="Write all results.", dir_okay=False)
plot_option = file_option(
    "--plot", metavar="FILE.svg", text="Draw latencies, connections and rates.", dir_okay=False
)
html_option = file_option(
    "--html", metavar="FILE.html", text="Write the report and its plot as a page.", dir_okay=False
)


@click.command()
@click.argument("address", metavar="HOST:PORT")
@number_option("--connections", COUNT, 100, "N", "TLS connections, all open at once.")
@click.option(
    "--sessions",
    type=COUNT,
    metavar="M",
    help="Sessions; fewer than connections are shared. [default: one per connection; 4 with --user]",
)
@number_option(
    "--rate",
    RATE,
    1_000.0,
    "R",
    "Requests (with --stream, items) per second over all connections, sent whether or not answers arrive.",
)
@click.option(
    "--find-max",
    type=click.FloatRange(0.1, 60_000),
    metavar="P99",
    help="Search the highest rate at which the p99 of requests is below so many ms, beginning at --rate.",
)
@click.option("--method", metavar="METHOD", help="Call this method, not `echo` with random bytes.")
@click.option("--params", metavar="JSON|@FILE", help="The params of --method or --stream. [default: {}]")
@click.option(
    "--expect", metavar="JSON|@FILE", help="The result of --method or --stream. [default: any result]"
)
@click.option(
    "--stream",
    default="",
    metavar="METHOD",
    help="Open a stream of this method on each connection and verify each item: `zcproto serve` offers `repeat`."
    " With --params it is a method of your application: --rate opens streams, whose items may be any.",
)
@number_option("--duration", click.FloatRange(0.1, 86_400), 10.0, "S", "The duration of the load in seconds.")
@number_option(
    "--payload", click.IntRange(0), 64, "BYTES", "Random bytes in each request and answer or item."
)
@number_option(
    "--pipeline", click.IntRange(1, 1_024), 1, "D", "Requests in each write; streams of each connection."
)
@number_option("--arrival-rate", click.FloatRange(0.1, 100_000), 500.0, "A", "New connections per second.")
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    metavar="P",
    help="Processes that generate the load. [default: 1, or as many as the limit of open files requires]",
)
@click.option(
    "--sources",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Addresses that connections to 127.0.0.1 come from, beginning there. Linux only. [default: one for each"
    " 20,000 connections]",
)
@file_option(
    "--keys",
    text="Keys of users, five sessions each: from `zcproto user add load --count 2000 --out FILE`.",
    dir_okay=False,
)
@user_option("One user, instead of --keys; the server's count is read with --operator-key-file alone.")
@key_option("user")
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
@html_option
@instance_options
def bench(
    address: str,
    connections: int,
    sessions: int | None,
    find_max: float | None,
    method: str | None,
    params: str | None,
    expect: str | None,
    duration: float,
    payload: int,
    processes: int | None,
    keys: Path | None,
    user: str | None,
    key_file: Path | None,
    operator_key_file: Path | None,
    ca: Path | None,
    json_file: Path | None,
    hdr_file: Path | None,
    plot: Path | None,
    html: Path | None,
    instance: Instance,
    **load: Any,
) -> int:
    """Measure the server at HOST:PORT: connections, an open-loop load, and one last request on each.

    Every answer and item is compared with its request, and the server's own count with the client's. Exit code 1 if
    anything was lost, out of order, different or unverified. Latencies are measured from when a request or item was
    due, so a slow server cannot hide behind requests that were not sent. It calls `echo`, which `zcproto serve`
    offers by default, or a --method of your application. A server that limits connections of one address
    (limits.connections_per_address) refuses more.
    """
    from zcproto.client.endpoints import parse_address  # noqa: PLC0415
    from zcproto.load.command import EXIT_CODES, Outputs, find_max_and_report, run_and_report  # noqa: PLC0415
    from zcproto.load.plan import Plan, check_plan, processes_for, read_credentials  # noqa: PLC0415

    host, port = parse_address(address)
    stream: str = load["stream"]
    if stream and (method is not None or (find_max is not None and params is None)):
        raise click.UsageError("--stream excludes --method, and without --params also --find-max.")
    is_own = bool(stream) and params is not None
    target = _target(stream if is_own else method, params, expect, is_stream=is_own)
    if is_own:
        load["stream"] = ""  # each is a request: its items are not known
    if find_max is not None and hdr_file is not None:
        raise click.UsageError("--hdr excludes --find-max, which measures several loads.")
    credentials = _credentials(address, connections, keys, user, key_file)
    if sessions is None:
        sessions = connections if keys is not None else min(connections, SESSIONS_OF_ONE_USER)
    trust = TrustChoice(ca)
    operators = credentials[:1] if keys is not None else ()
    if operator_key_file is not None:
        operators = read_credentials(operator_key_file)
    if find_max is not None and not is_typed("duration"):
        duration = SEARCH_DURATION_S
    plan = Plan(
        host=host,
        port=port,
        connections=connections,
        sessions=sessions,
        duration_s=duration,
        payload_bytes=payload,
        processes=processes_for(connections) if processes is None else processes,
        credentials=credentials,
        operator=operators[0] if operators else None,
        target=target,
        ca_file=trust.ca_file(instance.home, address),
        **load,
    )
    check_plan(plan)
    check_connection(trust, instance.home, address)
    outputs, out = Outputs(json_file, hdr_file, plot, html=html), sys.stdout
    if find_max is None:
        return EXIT_CODES[run_and_report(plan, outputs, out).verdict]
    search = find_max_and_report(plan, find_max, outputs, out)
    return EXIT_INTERRUPTED if search.interrupted else int(search.highest is None)


def _target(
    method: str | None, params: str | None, expect: str | None, *, is_stream: bool = False
) -> Target | None:
    from zcproto.load.plan import Target  # noqa: PLC0415

    if method is None:
        if params is not None or expect is not None:
            raise click.UsageError("--params and --expect go with --method or --stream.")
        return None
    return Target(method, parse_params(params), () if expect is None else (read_json(expect),), is_stream)


def _credentials(
    address: str, connections: int, keys: Path | None, user: str | None, key_file: Path | None
) -> tuple[Credential, ...]:
    """Return the users of --keys, or the one of --user. Raises ConfigError or click.UsageError."""
    from zcproto.load.plan import Credential, read_credentials  # noqa: PLC0415

    if keys is not None:
        if is_typed("user"):
            raise click.UsageError("--user excludes --keys.")
        return read_credentials(keys)
    if user is None:
        raise click.UsageError(_how_to_make_keys(address, connections))
    return (Credential(user, read_key(key_file)),)


def _how_to_make_keys(address: str, sessions: int) -> str:
    from zcproto.load.plan import users_for  # noqa: PLC0415

    return (
        "Missing option '--user' or '--keys'. Give --user and --key-file of one user, whose four sessions the"
        " connections share, without the server's count.\n\n"
        f"For one session each, create {users_for(sessions)} users, and an operator who reads the server's"
        " count; on the server:\n\n"
        f"  zcproto user add load --count {users_for(sessions)} --out load.keys\n"
        "  zcproto user add ops --operator --count 1 --out ops.keys\n\n"
        f"Then: zcproto bench {escape_text(address, 300)} --keys load.keys --operator-key-file ops.keys"
    )


@click.group(cls=Group, invoke_without_command=True)
@number_option("--connections", COUNT, 10_000, "N", "TLS connections, all open at once.")
@number_option("--rate", RATE, 5_000.0, "R", "Maximum of requests per second over all connections.")
@number_option("--seconds", click.FloatRange(0.1, 3_600), 6.0, "S", "The duration of the load.")
@json_option
@plot_option
@html_option
@click.pass_context
def demo(
    ctx: click.Context,
    connections: int,
    rate: float,
    seconds: float,
    json_file: Path | None,
    plot: Path | None,
    html: Path | None,
) -> int:
    """Open 10,000 verified connections to a server of its own.

    Creates users and certificates in a temporary folder, starts a server in one process, and opens the connections
    from another, each with its own session and each verified by its answers. It first measures with a few of them
    what the machine can do, and asks for half of that at most. It ends within a minute on an idle machine, and
    leaves no process and no file. Exit code 0 if everything is verified.
    """
    if ctx.invoked_subcommand is not None:
        return 0
    from zcproto.load.command import EXIT_CODES  # noqa: PLC0415
    from zcproto.load.demo import Demo, run_demo  # noqa: PLC0415

    result = run_demo(Demo(connections, rate, seconds, json=json_file, plot=plot, html=html), sys.stdout)
    return EXIT_CODES[result.verdict]


@demo.command(name="fleet")
@number_option("--clients", click.IntRange(1, 10_000), 500, "N", "Clients, each of a user of its own.")
@number_option(
    "--seconds", click.FloatRange(1, 3_600), 30.0, "S", "How long connections are cut and processes killed."
)
@click.option(
    "--kind",
    type=click.Choice(["workers", "servers"]),
    help="A server of four workers, or three servers on a Valkey or Redis. [default: servers, if one is installed]",
)
@number_option("--seed", click.INT, 1, "N", "The seed of the moments and the choices.")
@json_option
@plot_option
@html_option
def fleet(
    clients: int,
    seconds: float,
    kind: str | None,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
    html: Path | None,
) -> int:
    """Kill the processes that serve 500 clients, and show what is lost.

    The clients read durable runs and answer questions of their methods, while connections are cut, clients are
    replaced, and processes are killed or upgraded at random. Prints a picture of the gaps, and what was lost.
    It leaves no process and no file. Exit code 0 if nothing was lost.
    """
    from zcproto.load.fleet_demo import FleetDemo, run_fleet_demo  # noqa: PLC0415

    wanted = FleetDemo(clients, seconds, kind or "", seed, json=json_file, plot=plot, html=html)
    return run_fleet_demo(wanted, sys.stdout)
