"""`zcproto stubs`: write a typed client for the methods of a server or of an application."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from zcproto.cli import Instance, instance_options, out_option
from zcproto.cli.connect import TrustChoice, call_once, key_option, read_key, trust_options, user_option
from zcproto.cli.stub_python import Python, listed_methods
from zcproto.cli.stub_types import Language, Stubs, clean_text
from zcproto.cli.stub_typescript import TypeScript
from zcproto.common.text import escape_text

LANGUAGES: dict[str, type[Language]] = {"python": Python, "typescript": TypeScript}


@click.command()
@click.argument("source", metavar="HOST:PORT|MODULE:APP")
@click.option(
    "--language", type=click.Choice(list(LANGUAGES)), required=True, help="The language of the client."
)
@click.option("--blocking", is_flag=True, help="For programs without an event loop, in Python.")
@user_option("Open a session of this user. Without it only public methods are written.")
@key_option("user")
@trust_options
@out_option("Write to this file. [default: standard output]")
@instance_options
def stubs(
    instance: Instance,
    source: str,
    language: str,
    blocking: bool,
    user: str | None,
    key_file: Path | None,
    trust: TrustChoice,
    out: Path | None,
) -> None:
    """Write a module with a typed client for the methods of a server, or of an App object such as `shop.api:app`.

    The module has a class Api, made with a client of zcproto, and a type for each class of the parameters and
    results. Of a server it has the methods that the user may call.
    """
    if blocking and language != "python":
        raise click.UsageError("--blocking goes with --language python.")
    if source.rpartition(":")[2].isdigit():
        key = read_key(key_file) if user is not None else None
        info = call_once(trust, instance.home, source, "server.info", {}, user=user, key=key)
        methods = listed_methods(info)
    else:
        from zcproto.cli.serve import load_app  # noqa: PLC0415 - imports the application

        methods = [{**method.listing, "schema": method.schema} for method in load_app(source)]
    writer = Python(is_blocking=True) if blocking else LANGUAGES[language]()
    found = Stubs(methods, writer)
    text = writer.write(found, clean_text(source))
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
    if found.without_schema:
        names = escape_text(", ".join(sorted(found.without_schema)), 500)
        click.echo(f"zcproto: without a schema in server.info, and left out: {names}", err=True)
