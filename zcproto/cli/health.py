"""`zcproto health`: whether the server of this home folder answers, for container engines and other probes.

Rules:
- It needs no shell, no key and no configuration, and imports little: probes run it every few seconds.
- It ends within LIMIT_S, whatever the server does. The exit code is 0 or 1, with one line.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Final

import click

from zcproto.cli import Instance, instance_options
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.common.unix_socket import connect_unix
from zcproto.errors import ZcprotoError

LIMIT_S: Final = 2.0

MAX_ANSWER: Final = 65_536
MAX_REASON: Final = 200

_REQUEST: Final = b"GET /v1/readiness HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@click.command()
@click.option(
    "--ready",
    is_flag=True,
    help="Also fail while new clients should not connect: it drains, or has no store.",
)
@instance_options
def health(instance: Instance, ready: bool) -> None:
    """Check that the server of this home folder answers, within two seconds. Exit code 1 if it does not.

    For the health check of a container. With --ready it is what /readyz reports.
    """
    status, body = _ask(instance.home)
    if status == HTTPStatus.FORBIDDEN:
        raise ZcprotoError(f"{instance.home.control}: you are not allowed; run this as the server's user")
    if not ready:
        click.echo("the server answers")
        return
    if status != HTTPStatus.OK:
        raise ZcprotoError(f"not ready: the server answered {status}; see its log")
    reasons = _reasons(body)
    if reasons:
        raise ZcprotoError(f"not ready: {escape_text('; '.join(reasons), MAX_REASON)}")
    click.echo("ready")


def _ask(home: Home) -> tuple[int, bytes]:
    """Return the status and the body of the answer. Raises ZcprotoError."""
    where = escape_text(str(home.control))
    try:
        answer = _exchange(home, system_clock.now() + LIMIT_S)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise ZcprotoError(
            f"no server runs with the home folder {escape_text(str(home.path))}; start one, or use --home"
        ) from None
    except PermissionError as error:
        raise ZcprotoError(f"{where}: you are not allowed; run this as the server's user") from error
    except (TimeoutError, BlockingIOError) as error:
        raise ZcprotoError(f"{where}: the server did not answer within {LIMIT_S:g} s; see its log") from error
    except OSError as error:
        reason = error.strerror or error
        raise ZcprotoError(f"{where}: the server cannot be asked: {reason}; see its log") from error
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head[9:12]
    if not head.startswith(b"HTTP/1.1 ") or not status.isdigit():
        raise ZcprotoError(f"{where}: the server ended the connection; see its log")
    return int(status), body


def _exchange(home: Home, deadline: float) -> bytes:
    """Send the request and return the answer, up to MAX_ANSWER bytes. Raises OSError."""
    answer = b""
    with connect_unix(home.control, LIMIT_S) as connected:
        connected.sendall(_REQUEST)
        while len(answer) <= MAX_ANSWER:
            left = deadline - system_clock.now()
            if left <= 0:
                raise TimeoutError
            connected.settimeout(left)
            data = connected.recv(MAX_ANSWER)
            if not data:
                break
            answer += data
    return answer


def _reasons(body: bytes) -> list[str]:
    """Return why new clients should not connect; nothing if they should."""
    try:
        report: Any = json.loads(body)
        return [] if report["ready"] else [str(each) for each in report["reasons"]] or ["no worker serves"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ["the answer of the server cannot be read"]
