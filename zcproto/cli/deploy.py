"""`zcproto deploy`: print or write the files that systemd, Prometheus and Grafana need."""

from __future__ import annotations

from pathlib import Path

import click

from zcproto.common.text import escape_text
from zcproto.deploy import TOOLS, read_files
from zcproto.errors import ZcprotoError


@click.command()
@click.argument("tool", type=click.Choice(TOOLS), metavar="systemd|prometheus|grafana")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write the files into this folder."
)
@click.option("--force", is_flag=True, help="Replace files that are there already.")
def deploy(tool: str, out: Path | None, force: bool) -> None:
    """Print the files for a tool, or write them with --out.

    systemd: a hardened service, a socket and a system user. prometheus: alert rules. grafana: a dashboard.
    """
    texts = read_files(tool)
    if out is None:
        for name, text in texts.items():
            click.echo(f"# {name}\n{text}" if len(texts) > 1 else text, nl=False)
        return
    for name, text in texts.items():
        path = out / name
        try:
            out.mkdir(parents=True, exist_ok=True)
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ZcprotoError(f"{escape_text(str(path))}: is there already; --force replaces it") from None
        except OSError as error:
            raise ZcprotoError(f"{escape_text(str(path))}: cannot be written: {error.strerror}") from error
        click.echo(path)
