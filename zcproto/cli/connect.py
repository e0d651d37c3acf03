"""`zcproto call`, and what all commands that connect to a server share: trust, the user's key, the connection.

Rules:
- A key is never taken from the command line, which every user of a machine can read.
- Variables of the environment give the user, the key and the CA to all of these commands; options override them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from zcproto.cli import Function, Instance, file_option, instance_options
from zcproto.cli.json_values import params_of, stdin_items, to_json
from zcproto.cli.output import json_text
from zcproto.cli.stub_python import listed_methods, signatures
from zcproto.client.credentials import MAX_KEY, read_key_file, usable_key
from zcproto.client.endpoints import parse_addresses
from zcproto.client.options import CA_VARIABLE, KEY_FILE_VARIABLE, KEY_VARIABLE, USER_VARIABLE, own_ca
from zcproto.common.home import Home
from zcproto.common.process import new_event_loop
from zcproto.common.text import escape_text
from zcproto.errors import (
    ConfigError,
    ConnectionClosed,
    FailedPrecondition,
    ProtocolError,
    TlsError,
    Unauthenticated,
    Unimplemented,
    ZcprotoError,
)
from zcproto.tls.failure import CERTIFICATE_CURES, TlsFailure

if TYPE_CHECKING:
    from zcproto.client import Client

EXIT_CANNOT_CONNECT = 3

MAX_CONNECT_TIMEOUT = 10.0
"""Seconds for an attempt to connect."""

START_TIMEOUT = 60.0
"""Seconds to wait for a server that is starting: its first start creates RSA keys, slowly on a small machine."""

CALL_CLIENT: Final = "zcproto-call"
"""The name of `zcproto call` as a client: it finds out by a call that a method is a stream."""

DEFAULT_TIMEOUT = 30.0
MAX_MESSAGE = 2_000
STREAM_SHAPES = frozenset({"server", "client", "both"})
"""Methods that refuse a call with their shape, without being run, and are called again as a stream."""

CURES: Final = {
    **CERTIFICATE_CURES,
    TlsFailure.NOT_TLS: "check that this is the port of zcproto, and that no proxy terminates TLS",
    TlsFailure.UNSUPPORTED_VERSION: "this is not a zcproto server, or a proxy before it uses an old TLS version",
    TlsFailure.NO_SHARED_PARAMETERS: (
        "it shares no cipher suite, key-exchange group or signature algorithm with this client: see tls.failed in"
        " its log. Without such a line this is another server, or a proxy is before it"
    ),
    TlsFailure.NO_APPLICATION_PROTOCOL: "this is not a zcproto server: check the port",
    TlsFailure.CERTIFICATE_REQUIRED: "it requires client certificates (tls.client_auth): connect with one",
    TlsFailure.DISCONNECTED: "it may be at its limit (its log has connection.refused), or a balancer has no server",
    TlsFailure.HANDSHAKE_TIMEOUT: "it is overloaded, or a firewall drops large packets: try from the server itself",
    TlsFailure.CERTIFICATE_UNTRUSTED: (
        "get the CA of the server (zcproto cert export-ca) and use --ca, or use --pin"
    ),
    TlsFailure.PIN_MISMATCH: "compare the pins with those of its operator (zcproto cert pins)",
}
"""The fix of each handshake failure, as a client sees it."""

CURES_BY_NAME: Final = {failure.value: cure for failure, cure in CURES.items()}

T = TypeVar("T")


def user_option(text: str, *, name: str = "--user", required: bool = False) -> Callable[[Function], Function]:
    """Add --user, which the environment can give too."""
    return click.option(
        name, metavar="NAME", required=required, envvar=USER_VARIABLE, show_envvar=True, help=text
    )


def key_option(owner: str) -> Callable[[Function], Function]:
    """Add --key-file; its value is `key_file`."""
    return file_option(
        "--key-file",
        text=f"The file with the {owner}'s key; - reads standard input. [default: the variable {KEY_VARIABLE}]",
        allow_dash=True,
        envvar=KEY_FILE_VARIABLE,
    )


ca_option = file_option(
    "--ca",
    text="The CA to trust. [default: certs/ca.crt in the home folder if it exists, else the system's store]",
    envvar=CA_VARIABLE,
)


def is_typed(*names: str) -> bool:
    """Return whether one of these parameters is on the command line, and not only in the environment."""
    context = click.get_current_context()
    return any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in names)


@dataclass(frozen=True, slots=True)
class TrustChoice:
    """The options on which servers to trust."""

    ca: Path | None = None
    pins: tuple[str, ...] = ()

    def ca_file(self, home: Home, address: str) -> Path | None:
        """Return the CA to trust; None is the system's store, or no CA beside pins.

        A server of this machine may be starting, and create the CA of its home folder. Raises ConfigError for a
        malformed address.
        """
        return self.ca if self.ca or self.pins else own_ca(home, parse_addresses(address))

    def make_client(self, home: Home, address: str, **options: Any) -> Client:
        """Return a client that has not connected yet. Raises ConfigError for a malformed pin."""
        from zcproto.client import connect  # noqa: PLC0415

        ca_file = self.ca_file(home, address)
        if options.get("user") is options.get("login") is None:
            options["session"] = False  # not that of the environment
        try:
            return connect(address, home=home.path, ca_file=ca_file, pins=self.pins, **options)
        except TlsError as error:
            raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error

    def explain(self, error: TlsError, home: Home, address: str) -> str:
        """Return the message of a failed handshake, with the fix for users of a command."""
        cure = CURES_BY_NAME.get(error.failure)
        if cure is None or error.failure == TlsFailure.PIN_MISMATCH.value:
            return str(error)
        ca_file = self.ca_file(home, address)
        if error.failure == TlsFailure.CERTIFICATE_EXPIRED.value and "not yet valid" in error.detail:
            cure = "compare the clocks of both machines: the one here is slow, or the server's was fast"
        if error.failure == TlsFailure.CERTIFICATE_UNTRUSTED.value and ca_file is not None:
            cure = f"{ca_file} is not the CA of this server; zcproto cert export-ca writes that: use it with --ca"
        return f"{error.failure}: {error.detail.partition('; ')[0]}; {cure}"


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ca and --pin: `function` gets `trust: TrustChoice`."""

    @functools.wraps(function)
    def with_trust(*args: Any, ca: Path | None, pins: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, trust=TrustChoice(ca, pins), **kwargs)

    with_pin = click.option(
        "--pin",
        "pins",
        multiple=True,
        metavar="PIN",
        help="sha256/BASE64 of the server's public key: beside --ca or instead of a CA. May be repeated.",
    )(with_trust)
    return ca_option(with_pin)


def read_key(path: Path | None) -> str:
    """Return the key of --key-file, or of the environment without one. Raises ConfigError."""
    if path is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            raise ConfigError(
                [f"no key is given; use --key-file FILE, or set {KEY_FILE_VARIABLE} or {KEY_VARIABLE}"]
            )
        return usable_key(key, KEY_VARIABLE)
    if str(path) == "-":
        key = (
            click.prompt("Key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(MAX_KEY)
        )
        return usable_key(key, "standard input")
    return read_key_file(path)


def run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


@asynccontextmanager
async def connected_client(
    trust: TrustChoice, home: Home, address: str, **options: Any
) -> AsyncIterator[Client]:
    """Connect, and close at the end. Without a connection, end the command after a message."""
    options = {"connect_timeout": MAX_CONNECT_TIMEOUT, "start_timeout": START_TIMEOUT, **options}
    client = trust.make_client(home, address, **options)
    try:
        await client.open()
    except (ConnectionClosed, ProtocolError, TlsError) as error:
        reason = trust.explain(error, home, address) if isinstance(error, TlsError) else str(error)
        click.echo(f"zcproto: no connection: {escape_text(reason, MAX_MESSAGE)}", err=True)
        raise click.exceptions.Exit(EXIT_CANNOT_CONNECT) from error
    try:
        yield client
    finally:
        await client.close()


def check_connection(trust: TrustChoice, home: Home, address: str) -> None:
    """Connect and close, after waiting for a server that is starting. Fails like `connected_client`."""

    async def work() -> None:
        async with connected_client(trust, home, address):
            pass

    run(work())


def call_once(
    trust: TrustChoice, home: Home, address: str, method: str, params: dict[str, Any], **options: Any
) -> Any:
    """Connect, call a method and return its result. Without a connection, end the command after a message."""

    async def work() -> Any:
        async with connected_client(trust, home, address, **options) as client:
            return await client.call(method, params)

    return run(work())


# --- zcproto call ----------------------------------------------------------------------------------------


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.argument("method", metavar="METHOD|--list", required=False)
@click.argument("params", metavar="[JSON]", nargs=-1)
@click.option("--list", "lists", is_flag=True, help="Print the methods that can be called, with their types.")
@user_option("Open a session of this user. Without it only public methods can be called.")
@key_option("user")
@click.option("--login", "by_login", is_flag=True, help="Open a session with the tokens of `zcproto login`.")
@trust_options
@click.option(
    "--timeout",
    type=click.FloatRange(0, 86_400, min_open=True),
    metavar="SECONDS",
    help=f"The deadline of the call. [default: {DEFAULT_TIMEOUT:.0f}, and none for a method that yields items]",
)
@file_option(
    "--key-log",
    text="Append the TLS secrets of the connection, with which Wireshark can decrypt it (spec/wireshark).",
)
@instance_options
def call(
    instance: Instance,
    address: str,
    method: str | None,
    params: tuple[str, ...],
    lists: bool,
    user: str | None,
    key_file: Path | None,
    by_login: bool,
    trust: TrustChoice,
    timeout: float | None,
    key_log: Path | None,
) -> None:
    """Call METHOD of the server at HOST:PORT and print the result as JSON.

    JSON is an object with the params. Bytes are written {"base64": "..."}, both ways; in a result, floats that JSON
    cannot express are {"float": "nan"}, "inf" or "-inf".

    The items of a method that yields some are printed as they come, each on its own line, then the result on the
    last line. A method that takes items gets those on standard input, one JSON value per line. Ctrl-C cancels the
    method. With --list the methods of the application are printed instead.

    A server that is starting is awaited, for 60 s at most.

    \b
    Exit codes: 0    the result is printed
                1    the server answered with an error, or the connection was lost
                2    wrong usage, or an unusable file; nothing was sent
                3    no connection: no server there, or not a trusted one
                130  Ctrl-C
    """
    if lists is (method is not None):
        raise click.UsageError("Give either METHOD or --list.")
    arguments = params_of(params)
    if by_login and is_typed("user", "key_file"):
        raise click.UsageError("--login goes without --user and --key-file.")
    user = None if by_login else user
    key = read_key(key_file) if user is not None else None
    if user is None and is_typed("key_file"):
        raise click.UsageError("--key-file goes with --user.")
    limit = DEFAULT_TIMEOUT if timeout is None else timeout
    options: dict[str, Any] = {"user": user, "key": key, "timeout": limit, "key_log_file": key_log}
    options["client"] = CALL_CLIENT
    if by_login:
        from zcproto.cli.login import stored_login  # noqa: PLC0415

        options["login"] = stored_login(instance.home)
    if timeout is not None:
        options["connect_timeout"] = min(timeout, MAX_CONNECT_TIMEOUT)
        options["start_timeout"] = min(timeout, START_TIMEOUT)

    async def work() -> None:
        async with connected_client(trust, instance.home, address, **options) as client:
            if method is None:
                click.echo(signatures(listed_methods(await client.call("server.info"))))
                return
            try:
                result = await client.call(method, arguments)
            except Unauthenticated as error:
                if user is not None or by_login:
                    raise
                near = await _like(client, method)
                hint = f"; or did you mean {near!r}, which needs none?" if near else ""
                raise ZcprotoError(
                    f"{escape_text(method)} needs a session; use --user NAME and --key-file FILE, or set"
                    f" {USER_VARIABLE} and {KEY_FILE_VARIABLE}{hint}"
                ) from error
            except Unimplemented as error:
                near = await _like(client, method)
                if error.details or near is None:
                    raise
                raise ZcprotoError(f"unknown method {method!r}; did you mean {near!r}?") from error
            except FailedPrecondition as error:
                if error.details.get("shape") not in STREAM_SHAPES:
                    raise
                items = None if error.details["shape"] == "server" else stdin_items()
                await _print_stream(client, method, arguments, items, timeout)
            else:
                click.echo(json_text(to_json(result), indent=2))

    run(work())


async def _like(client: Client, method: str) -> str | None:
    """Return the method with the most similar name among those that this client can call."""
    names = [str(each["name"]) for each in listed_methods(await client.call("server.info"))]
    return next(iter(get_close_matches(method, names, 1)), None)


async def _print_stream(
    client: Client,
    method: str,
    params: dict[str, Any],
    items: AsyncGenerator[Any, None] | None,
    limit: float | None,
) -> None:
    """Print each item on its own line as it comes, then the result."""
    async with client.stream(method, params, items=items, timeout=limit) as stream:
        async for item in stream:
            click.echo(json_text(to_json(item)))
        click.echo(json_text(to_json(stream.result)))
