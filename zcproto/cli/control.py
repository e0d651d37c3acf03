"""What a command asks a running server by the control socket of its home folder.

    server = control_of(home)          # None: no server runs here, and the files are worked on
    server.get("/v1/status")

Rules: a server that is there and cannot be asked is an error, and never taken for none: what a command does to its
files behind its back would be half of what was meant.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import click

from zcproto.common.home import Home
from zcproto.common.local_socket import address_of
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, NotFound, ZcprotoError

CONNECT_S = 5.0
RETRY_S = 0.05
TIMEOUT_S = 660.0
"""For an answer: longer than the server gives itself, which may have keys to make."""

MAX_ANSWER = 16_777_216
MAX_SENTENCE = 500


class ControlError(ZcprotoError):
    """The server cannot be asked, or did not do what it was asked for."""


class _LocalConnection(http.client.HTTPConnection):
    """HTTP over a socket that is connected already."""

    def __init__(self, connected: socket.socket, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        connected.settimeout(timeout)
        self.sock = connected
        self.auto_open = 0


class Control:
    """A running server. It may be asked several times; `close` ends that."""

    def __init__(self, home: Home, connected: socket.socket, timeout: float = TIMEOUT_S) -> None:
        self._home = home
        self._connection = _LocalConnection(connected, timeout)

    def get(self, path: str) -> Any:
        """What there is at a path. Raises ControlError, NotFound and ConfigError."""
        return self._ask("GET", path, None)

    def post(self, path: str, **fields: Any) -> Any:
        """Have something done, with these fields but for those that are None. Raises as `get`."""
        return self._ask("POST", path, {name: value for name, value in fields.items() if value is not None})

    def close(self) -> None:
        self._connection.close()

    def _ask(self, method: str, path: str, fields: Mapping[str, Any] | None) -> Any:
        body = None if fields is None else json.dumps(fields)
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = self._connection.getresponse()
            data = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            why = (
                "it did not answer in time" if isinstance(error, TimeoutError) else "it ended the connection"
            )
            raise ControlError(
                f"the server at {self._home.control} cannot be asked: {why}; is it just starting or ending?"
            ) from error
        if len(data) > MAX_ANSWER:
            raise ControlError(f"the server at {self._home.control} answered with too much")
        if answer.headers.get_content_type() != "application/json":
            raise self._strange(answer.status, path)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"the server at {self._home.control} answered with what is no JSON") from error
        if answer.status == HTTPStatus.OK:
            return value
        raise self._refused(answer.status, value)

    def _strange(self, status: int, path: str) -> ZcprotoError:
        if status == HTTPStatus.FORBIDDEN:
            return ControlError(
                f"{self._home.control}: you are not allowed; run this as the server's user, or as root"
            )
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            return ControlError(
                f"the server is of another version, which does not know {path}; restart it, or use its own zcproto"
            )
        return ControlError(f"the server answered {status}; its log says why")

    def _refused(self, status: int, value: Any) -> ZcprotoError:
        faults = value.get("faults") if isinstance(value, dict) else None
        if isinstance(faults, list):
            return ConfigError([escape_text(str(fault), MAX_SENTENCE) for fault in faults])
        sentence = str(value.get("error", "")) if isinstance(value, dict) else ""
        kind = NotFound if status == HTTPStatus.NOT_FOUND else ControlError
        return kind(escape_text(sentence or f"the server answered {status}", MAX_SENTENCE))


def control_of(home: Home, timeout: float = TIMEOUT_S) -> Control | None:
    """The server that runs with this home folder; None if none does. It is let go when the command ends.

    Raises ControlError for one that may not be asked, or does not let anybody in.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(CONNECT_S)
    try:
        _connect(connected, home)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connected.close()
        return None
    except PermissionError as error:
        connected.close()
        raise ControlError(f"{home.control}: you are not allowed; {_who(home)}") from error
    except OSError as error:
        connected.close()
        raise ControlError(
            f"{home.control}: the server cannot be asked: {error.strerror or error}"
        ) from error
    found = Control(home, connected, timeout)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(found.close)
    return found


def _connect(connected: socket.socket, home: Home) -> None:
    """Connect; while as many wait as may, which the system does not wait for by itself, try again for a while."""
    with address_of(home.control) as address:
        for _ in range(int(CONNECT_S / RETRY_S)):
            try:
                connected.connect(address)
            except BlockingIOError:
                time.sleep(RETRY_S)
            else:
                return
        connected.connect(address)


def needed_control(home: Home, timeout: float = TIMEOUT_S) -> Control:
    """As `control_of`, for commands that do nothing without a server. Raises ControlError if there is none."""
    found = control_of(home, timeout)
    if found is None:
        raise ControlError(
            f"no server runs with the home folder {escape_text(str(home.path))}; start one, or use --home"
        )
    return found


def _who(home: Home) -> str:
    try:
        owner = os.stat(home.control).st_uid
    except OSError:
        return "run this as the server's user, or as root"
    return f"it belongs to the user with the uid {owner}; run this as that user, or as root"
