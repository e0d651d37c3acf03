"""`zcproto doctor`: what is wrong with a server or with the way to one, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import click

from zcproto.cli import EXIT_FAILED, home_options
from zcproto.cli.doctor.finding import FAULT, SKIPPED, Finding, as_text
from zcproto.common.home import Home

MAX_TIMEOUT = 60


@click.command()
@click.argument("address", metavar="[HOST:PORT]", required=False)
@click.option(
    "--user", metavar="NAME", help="Whose session to open, to see that it works. It is closed again."
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Where the user's key is; - reads standard input. [default: the variable ZCPROTO_KEY]",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Whose certificates to believe. [default: certs/ca.crt in the home folder if there, else the system's]",
)
@click.option("--pin", "pins", multiple=True, metavar="PIN", help="sha256/BASE64 of the server's public key.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=MAX_TIMEOUT),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="For each step over the network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@home_options
def doctor(
    home: Home,
    config_file: Path | None,
    address: str | None,
    user: str | None,
    key_file: Path | None,
    ca: Path | None,
    pins: tuple[str, ...],
    timeout: float,
    as_json: bool,
) -> int:
    """See what is wrong with a server, or with the way to the one at HOST:PORT, and what to do about it.

    Without HOST:PORT this machine's server is looked at: home folder, permissions, configuration, certificates,
    store, disk, limits, and the server itself if it runs. Nothing is changed. Run it as the server's user.

    \b
    Exit codes: 0  all is well, but for warnings
                1  there are faults
                2  wrong usage
    """
    from zcproto.cli.doctor import local, remote  # noqa: PLC0415 - `--help` is quick without them

    if user is None and key_file is not None:
        raise click.UsageError("--key-file goes with --user.")
    trust = remote.Trust(ca, pins, home)
    who = None if user is None else remote.Who(user, key_file)
    findings = local.folder(home) + local.configuration(home, config_file)
    if address is None:
        config = local.read(home, config_file)
        if config is None:
            findings.append(
                Finding("server", SKIPPED, "the rest is looked at once the configuration is right")
            )
        else:
            findings += local.server(config, home)
            address = local.own_address(config)
            findings += remote.look(address, trust, who, timeout) if local.is_served(findings) else []
    else:
        findings += remote.look(address, trust, who, timeout)
    if as_json:
        click.echo(json.dumps([each.data for each in findings], ensure_ascii=False, indent=2))
    else:
        click.echo(as_text(findings))
    return EXIT_FAILED if any(each.state == FAULT for each in findings) else 0
