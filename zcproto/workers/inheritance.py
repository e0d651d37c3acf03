"""What a server passes to its successor: open descriptors, whose numbers are in an environment variable."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Self

from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.runtime.process_setup import UPGRADE
from zcproto.workers.channel import Channel
from zcproto.workers.failures import failure_of

MAX_SIZE: Final = 4_096

Owned = tuple[socket.socket, int]
"""A listening UNIX socket, and the descriptor of the lock of its file."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The descriptors. Both servers have all of them until the predecessor ends."""

    channel: Channel
    sockets: list[socket.socket]
    redirect_sockets: list[socket.socket]
    control: Owned | None
    link: Owned

    def encode(self) -> str:
        """Return the value of the variable."""
        return json.dumps(
            {
                "channel": self.channel.fileno(),
                "sockets": [each.fileno() for each in self.sockets],
                "redirect": [each.fileno() for each in self.redirect_sockets],
                "control": None if self.control is None else [self.control[0].fileno(), self.control[1]],
                "link": [self.link[0].fileno(), self.link[1]],
            },
            separators=(",", ":"),
        )

    def descriptors(self) -> list[int]:
        """Return all descriptors."""
        owned = [self.link] if self.control is None else [self.control, self.link]
        return [
            self.channel.fileno(),
            *(each.fileno() for each in (*self.sockets, *self.redirect_sockets)),
            *(number for each, lock in owned for number in (each.fileno(), lock)),
        ]

    def report(self, error: Exception) -> None:
        """Send the predecessor an error that has a message for the operator."""
        failure = failure_of(error)
        if failure["kind"] != "other":
            self.channel.send("failed", **failure)

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Self | None:
        """Remove the variable, and take the descriptors; None without it. Raises ConfigError."""
        text = environ.pop(UPGRADE, None)
        if text is None:
            return None
        try:
            if len(text) > MAX_SIZE:
                raise ValueError("too long")
            found = json.loads(text)
            control = found["control"]
            return cls(
                Channel(_socket(found["channel"])),
                [_socket(each) for each in found["sockets"]],
                [_socket(each) for each in found["redirect"]],
                None if control is None else _owned(control),
                _owned(found["link"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise ConfigError(
                [f"{UPGRADE} = {escape_text(text, 60)!r} (environment): unset it; only a server sets it"]
            ) from error


def _socket(number: Any) -> socket.socket:
    if type(number) is not int or number < 0:
        raise ValueError("not a descriptor")
    os.set_inheritable(number, False)
    return socket.socket(fileno=number)


def _owned(value: Any) -> Owned:
    number, lock = value
    if type(lock) is not int or lock < 0:
        raise ValueError("not a descriptor")
    os.set_inheritable(lock, False)
    return _socket(number), lock
