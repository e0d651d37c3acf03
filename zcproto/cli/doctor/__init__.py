"""`zcproto doctor`: diagnose a server, or the connection to one."""

from __future__ import annotations

from pathlib import Path

import click

from zcproto.cli import EXIT_FAILED, Instance, instance_options, number_option
from zcproto.cli.connect import TrustChoice, key_option, trust_options
from zcproto.cli.doctor.finding import FAULT, SKIPPED, Finding, as_text
from zcproto.cli.output import as_json_option, print_report

MAX_TIMEOUT = 60


@click.command()
@click.argument("address", metavar="[HOST:PORT]", required=False)
@click.option("--user", metavar="NAME", help="Also open a session of this user, use it and close it.")
@key_option("user")
@trust_options
@number_option(
    "--timeout",
    click.FloatRange(0, MAX_TIMEOUT, min_open=True),
    10.0,
    "SECONDS",
    "The timeout of each step over the network.",
)
@as_json_option
@instance_options
def doctor(
    instance: Instance,
    address: str | None,
    user: str | None,
    key_file: Path | None,
    trust: TrustChoice,
    timeout: float,
    as_json: bool,
) -> int:
    """Diagnose the server of this machine, or the connection to the one at HOST:PORT, and print how to fix it.

    Without HOST:PORT it checks the home folder, permissions, configuration, certificates, store, disk, limits, and
    the server itself if it runs. Nothing is changed. Run it as the server's user.

    \b
    Exit codes: 0  no faults; warnings are possible
                1  there are faults
                2  wrong usage
    """
    from zcproto.cli.doctor import local, remote  # noqa: PLC0415 - `--help` is quick without them

    if user is None and key_file is not None:
        raise click.UsageError("--key-file goes with --user.")
    findings = local.folder(instance.home)
    config = local.configuration(instance, findings)
    if address is None and config is None:
        findings.append(Finding("server", SKIPPED, "further checks need a valid configuration"))
    elif address is None and config is not None:
        findings += local.server(config, instance.home)
        if local.is_served(findings):
            address = local.own_address(config)
    if address is not None:
        login = None if user is None else (user, key_file)
        findings += remote.check(address, trust, instance.home, login, timeout)
    print_report(as_json, [each.data for each in findings], as_text(findings))
    return EXIT_FAILED if any(each.state == FAULT for each in findings) else 0
