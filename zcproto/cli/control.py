"""The control socket of a running server: its client, and the commands `reload`, `drain` and `log level`.

    server = find_control(home)          # None: no server runs with this home folder
    server.get("/v1/status")

Rules: a server that runs and cannot be asked is an error, and never mistaken for none.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import click

from zcproto.cli import Instance, command_group
from zcproto.cli.json_values import json_value
from zcproto.cli.output import json_text, print_report, print_result, report_options, table, utc
from zcproto.common.home import Home
from zcproto.common.text import counted, escape_text
from zcproto.common.unix_socket import connect_unix
from zcproto.errors import ConfigError, NotFound, ZcprotoError

CONNECT_S = 5.0
TIMEOUT_S = 660.0
"""The timeout of a response: longer than the server's own limit, which covers making keys."""

MAX_ANSWER = 16_777_216
MAX_MESSAGE = 500

LEVELS = ("debug", "info", "warning", "error")
POLL_S = 0.2
MARGIN_S = 30.0
"""Seconds beyond the limit of a drain within which a server ends."""

READING = frozenset({"sessions"})
"""Operations of `Control.run` that change nothing."""


class ControlError(ZcprotoError):
    """The server cannot be asked, or refused the request."""


class Control:
    """A connection to a running server, for several requests."""

    def __init__(self, home: Home, connected: socket.socket, timeout: float = TIMEOUT_S) -> None:
        self._home = home
        connected.settimeout(timeout)
        self._connection = http.client.HTTPConnection("localhost", timeout=timeout)
        self._connection.sock = connected
        self._connection.auto_open = 0  # never connect to the port 80 of localhost

    def get(self, path: str, **params: Any) -> Any:
        """Read a resource. Parameters with the value None are omitted.

        Raises ControlError, NotFound and ConfigError.
        """
        query = urlencode({name: value for name, value in params.items() if value is not None})
        return self._ask("GET", f"{path}?{query}" if query else path, None)

    def post(self, path: str, **params: Any) -> Any:
        """Run an operation. Parameters and errors are as in `get`."""
        return self._ask("POST", path, {name: value for name, value in params.items() if value is not None})

    def run(self, operation: str, **params: Any) -> dict[str, Any]:
        """Run an operation by its name: see zcproto/cli/backends.py."""
        ask = self.get if operation in READING else self.post
        return dict(ask(f"/v1/{operation}", **params))

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str, params: Mapping[str, Any] | None) -> Any:
        body = None if params is None else json.dumps(params)
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = self._connection.getresponse()
            data = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = (
                "it did not answer in time" if isinstance(error, TimeoutError) else "it ended the connection"
            )
            raise ControlError(
                f"the server at {self._home.control} cannot be asked: {reason}; if it is starting or ending,"
                " try again"
            ) from error
        if len(data) > MAX_ANSWER:
            raise ControlError(f"the server at {self._home.control} sent more than {MAX_ANSWER} bytes")
        if answer.headers.get_content_type() != "application/json":
            raise self._unexpected(answer.status, path)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"the server at {self._home.control} sent malformed JSON") from error
        if answer.status == HTTPStatus.OK:
            return value
        raise self._refused(answer.status, value)

    def _unexpected(self, status: int, path: str) -> ZcprotoError:
        if status == HTTPStatus.FORBIDDEN:
            return ControlError(
                f"{self._home.control}: you are not allowed; run this as the server's user, or as root"
            )
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return ControlError(
                f"the server runs another version, without {path}; restart it, or use the zcproto of its version"
            )
        return ControlError(f"the server answered {status}; see its log")

    def _refused(self, status: int, value: Any) -> ZcprotoError:
        faults = value.get("faults") if isinstance(value, dict) else None
        if isinstance(faults, list):
            return ConfigError([escape_text(str(fault), MAX_MESSAGE) for fault in faults])
        message = str(value.get("error", "")) if isinstance(value, dict) else ""
        kind = NotFound if status == HTTPStatus.NOT_FOUND else ControlError
        return kind(escape_text(message or f"the server answered {status}; see its log", MAX_MESSAGE))


def find_control(home: Home, timeout: float = TIMEOUT_S) -> Control | None:
    """Connect to the server that runs with this home folder; return None if none does.

    The connection is closed when the command ends. Raises ControlError for a server that cannot be asked.
    """
    try:
        connected = connect_unix(home.control, CONNECT_S)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError | ConnectionRefusedError):
            return None
        if isinstance(error, PermissionError):
            raise ControlError(f"{home.control}: you are not allowed; {_permission_hint(home)}") from error
        reason = error.strerror or error
        raise ControlError(f"{home.control}: the server cannot be asked: {reason}") from error
    found = Control(home, connected, timeout)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(found.close)
    return found


def require_control(home: Home, timeout: float = TIMEOUT_S) -> Control:
    """Connect to the server that runs with this home folder. Raises ControlError if none does."""
    found = find_control(home, timeout)
    if found is None:
        home.require()
        raise ControlError(
            f"no server runs with the home folder {escape_text(str(home.path))}; start one, or use --home"
        )
    return found


def _permission_hint(home: Home) -> str:
    try:
        owner = os.stat(home.control).st_uid
    except OSError:
        return "run this as the server's user, or as root"
    return f"it belongs to uid {owner}; run this as that user, or as root"


@click.command()
@click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")
@report_options
def reload(instance: Instance, dry_run: bool, as_json: bool) -> None:
    """Read the configuration again and apply all changes that need no restart, or nothing.

    Prints what changed, and what needs a restart. No connection is closed. Exit code 2 if the configuration has
    faults; then nothing has changed. SIGHUP does the same, and logs the result.
    """
    server = require_control(instance.home)
    done = server.get("/v1/reload") if dry_run else server.post("/v1/reload")
    rows = [
        [each["key"], *_values(each), "restart needed" if each["effect"] == "restart" else each["effect"]]
        for each in [*done["changed"], *done["restart"]]
    ]
    text = table(("KEY", "OLD", "NEW", "APPLIES TO"), rows) if rows else "nothing has changed"
    print_report(as_json, done, text)
    if dry_run and rows and not as_json:
        click.echo("nothing is applied yet: zcproto reload applies what needs no restart", err=True)
    elif done["restart"] and not as_json:
        click.echo(f"restart the server to apply {counted(len(done['restart']), 'change')}", err=True)


def _values(change: dict[str, str]) -> list[str]:
    if not change["old"] and not change["new"]:
        return ["(hidden)", "(hidden)"]
    return [change["old"], change["new"]]


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds for running requests to finish. [default: server.drain_timeout]",
)
@click.option("--wait", is_flag=True, help="Wait until the server has ended.")
@report_options
def drain(instance: Instance, timeout: float | None, wait: bool, as_json: bool) -> None:
    """Stop accepting connections, finish running requests, and end the server. SIGTERM does the same."""
    done = require_control(instance.home).post("/v1/drain", timeout=timeout)
    if wait:
        _wait_for_end(instance.home, done["timeout"] + MARGIN_S)
    draining = f"the server drains {counted(done['connections'], 'connection')} within {done['timeout']:g} s"
    print_result(as_json, {**done, "ended": wait}, "the server has ended" if wait else draining)


@click.command()
@report_options
def upgrade(instance: Instance, as_json: bool) -> None:
    """Replace a running server by a new one of the installed version, on the same sockets.

    For servers with workers. The new server reads the configuration and loads the application; when it serves, the
    workers of the old one are drained one at a time. If it fails, or does not serve within server.upgrade_timeout,
    the old one serves on, and the exit code is 1. SIGUSR2 does the same.
    """
    begun = require_control(instance.home).post("/v1/upgrade")
    for _ in range(int((begun["timeout"] + MARGIN_S) / POLL_S)):
        time.sleep(POLL_S)
        try:
            with contextlib.closing(
                require_control(instance.home)
            ) as server:  # the server admits few at once
                found = server.get("/v1/upgrade")
        except ControlError:  # between the old coordinator and the new one
            continue
        if found["supervisor"] != begun["supervisor"]:
            pid = {"pid": found["supervisor"]}
            print_result(as_json, pid, f"the new server serves, with process id {pid['pid']}")
            return
        if found["failure"]:
            raise ControlError(
                f"the old server serves on; the new one has failed: {found['failure']}; see its log"
            )
    raise ControlError(f"the new server does not serve after {begun['timeout']:g} s; see its log")


def _wait_for_end(home: Home, seconds: float) -> None:
    for _ in range(int(seconds / POLL_S)):
        found = find_control(home)
        if found is None:
            return
        found.close()
        time.sleep(POLL_S)
    raise ControlError(f"the server still runs after {seconds:g} s; see its log")


topic = command_group("topic", "Publish events in the topics of a running server.")


@topic.command()
@click.argument("name")
@click.argument("event", metavar="JSON")
@report_options
def publish(instance: Instance, name: str, event: str, as_json: bool) -> None:
    """Publish an event in a topic of the server, for all its subscribers.

    JSON is the event, or @FILE for a file with it.
    """
    value = json_value(event)
    done = require_control(instance.home).post("/v1/topics/publish", topic=name, event=value)
    print_result(as_json, done, f"published in {name}")


calls = command_group(
    "calls", "List and answer the calls of a running server that wait for a user: approvals, for instance."
)


@calls.command("list")
@click.option("--user", metavar="NAME", help="Only calls to this user.")
@report_options
def list_calls(instance: Instance, user: str | None, as_json: bool) -> None:
    """List the pending calls, the oldest first. --json also has their parameters, without secrets."""
    result = require_control(instance.home).get("/v1/calls", user=user)
    found = result["calls"]
    head = ("ID", "USER", "METHOD", "ASKED", "EXPIRES", "FOR SESSION", "FROM", "OFFERED TO")
    print_report(as_json, found, table(head, [_call_row(each) for each in found]))
    if result["more"] and not as_json:
        click.echo(
            f"more than these {len(found)} calls may wait; --user NAME lists those to one user",
            err=True,
        )


def _call_row(found: dict[str, Any]) -> tuple[str, ...]:
    return (
        found["id"],
        found["user"],
        found["method"],
        *(f"{utc(found[key]):%Y-%m-%d %H:%M:%SZ}" for key in ("asked_at", "expires_at")),
        found["session"],
        found["peer"],
        counted(found["offered"], "client"),
    )


@calls.command("answer")
@click.argument("id")
@click.argument("result", metavar="JSON")
@report_options
def answer_call(instance: Instance, id: str, result: str, as_json: bool) -> None:
    """Answer a pending call in place of its user.

    JSON is what the call returns, or @FILE for a file with it. The audit trail records it.
    """
    value = json_value(result)
    done = require_control(instance.home).post("/v1/calls/answer", id=id, result=value)
    print_result(as_json, done, f"answered {done['method']} for {escape_text(done['user'])}")


@calls.command("refuse")
@click.argument("id")
@click.option("--reason", metavar="TEXT", help="The message of the error, PERMISSION_DENIED.")
@report_options
def refuse_call(instance: Instance, id: str, reason: str | None, as_json: bool) -> None:
    """Refuse a pending call: the method that waits gets an error. The audit trail records it."""
    done = require_control(instance.home).post("/v1/calls/refuse", id=id, reason=reason)
    print_result(as_json, done, f"refused {done['method']} for {escape_text(done['user'])}")


log = command_group("log", "Show and set the log level of a running server.")


@log.command()
@click.argument("wanted", metavar="[LEVEL]", required=False, type=click.Choice(LEVELS))
@report_options
def level(instance: Instance, wanted: str | None, as_json: bool) -> None:
    """Print the log level of the server, or set it until the server ends or log.level is changed.

    LEVEL is debug, info, warning or error; less severe events are not written.
    """
    server = require_control(instance.home)
    if wanted is None:
        done = server.get("/v1/log")
        click.echo(json_text(done) if as_json else done["level"])
    else:
        done = server.post("/v1/log", level=wanted)
        print_result(as_json, done, f"the log level is {done['level']} now; it was {done['before']}")
